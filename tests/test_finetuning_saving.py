"""What finetune.py saves, pushes and resumes from."""

import json
import shutil
import signal
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import HfApi
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from commands.checkpoint_files import REQUIRED_FILES
from commands.finetuning_saving import (
    COMPLETE,
    Papers,
    WholeCheckpoints,
    check_keys,
    complete_folder,
    find_checkpoint,
    prepare_folder,
    say_other_processes,
    whole_checkpoints,
)
from finetuning import flags, logits_of, losses, run, start
from paths import ROOT


@pytest.mark.parametrize("adapters", [{}, {"lora_r": 2, "lora_dropout": 0.2}], ids=["all", "lora"])
def test_a_resumed_run_is_the_uninterrupted_one(folder, tmp_path, adapters):
    settings = adapters | {
        "max_steps": 6, "save_strategy": "steps", "save_steps": 3, "warmup_steps": 2,
        "gradient_accumulation_steps": 2, "per_device_train_batch_size": 1, "gate_lr": 1e-2,
        "gradient_checkpointing": True,
    }  # fmt: skip
    data = folder / "clips.jsonl"
    whole = run(data, tmp_path / "whole", **settings)
    shutil.copytree(tmp_path / "whole" / "checkpoint-3", tmp_path / "again" / "checkpoint-3")
    again = run(data, tmp_path / "again", resume_from_checkpoint="last", **settings)
    assert losses(again) == losses(whole) and len(losses(whole)) == 6
    ours, theirs = again.model.state_dict(), whole.model.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert [one.name for one in whole_checkpoints(tmp_path / "whole")] == [
        "checkpoint-3", "checkpoint-6",
    ]  # fmt: skip
    # Resumed at its end, it trains no step more.
    ended = run(data, tmp_path / "whole", resume_from_checkpoint="last", **settings)
    ours = ended.model.state_dict()
    assert ended.state.global_step == 6
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_resuming_from_other_weights_is_an_error(folder, tmp_path):
    settings = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1, "lora_r": 2}
    checkpoint = tmp_path / "checkpoint-1"
    run(folder / "clips.jsonl", tmp_path, **settings)
    for flag, value in (("lora_alpha", 32), ("lora_r", 4)):
        with pytest.raises(
            ValueError, match=f"trained with --{flag} [24], and this run has {value}"
        ):
            run(folder / "clips.jsonl", tmp_path, **{**settings, "lora_alpha": 4, flag: value},
                resume_from_checkpoint=checkpoint)  # fmt: skip
    modules = "q_proj,k_proj,v_proj,o_proj,up_proj"
    with pytest.raises(ValueError, match="the checkpoint lacks 8 weights .* has 0 others"):
        run(folder / "clips.jsonl", tmp_path, **settings, lora_modules=modules,
            resume_from_checkpoint=checkpoint)  # fmt: skip
    weights = load_file(checkpoint / "adapter_model.safetensors")
    gate = next(name for name in weights if name.endswith("layers.1.self_attn.g_proj_2.weight"))
    weights[gate.replace("layers.1", "layers.9")] = weights.pop(gate)
    save_file(weights, checkpoint / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="the checkpoint lacks 1 weights .* has 1 others"):
        run(folder / "clips.jsonl", tmp_path, **settings, resume_from_checkpoint=checkpoint)
    weights[gate] = weights[gate.replace("layers.1", "layers.9")].clone()
    save_file(weights, checkpoint / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="the checkpoint lacks 0 weights .* has 1 others"):
        run(folder / "clips.jsonl", tmp_path, **settings, resume_from_checkpoint=checkpoint)
    with pytest.raises(ValueError, match="has an adapter, but this run trains whole weights"):
        run(folder / "clips.jsonl", tmp_path, max_steps=2, resume_from_checkpoint=checkpoint)


def test_whole_weights_are_compared_by_name(tmp_path, model):
    weights = load_file(ROOT / "model.safetensors")
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    check_keys(model, tmp_path)
    weights["model.other"] = torch.zeros(1)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="lacks 0 weights .* has 1 others .model.other"):
        check_keys(model, tmp_path)
    del weights["model.other"], weights["model.language_model.norm.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="lacks 1 weights .*model.language_model.norm.weight.*0"):
        check_keys(model, tmp_path)


def make_checkpoint(folder, step, *files):
    (folder / f"checkpoint-{step}").mkdir()
    for name in files:
        (folder / f"checkpoint-{step}" / name).touch()


def test_a_run_resumes_from_what_can_be_resumed(tmp_path):
    assert find_checkpoint("last", tmp_path) is None
    state = ("optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json")
    make_checkpoint(tmp_path, 9, COMPLETE, *state)
    make_checkpoint(tmp_path, 10, COMPLETE, *state)
    make_checkpoint(tmp_path, 11, *state)
    make_checkpoint(tmp_path, 2, COMPLETE)
    assert find_checkpoint("last", tmp_path) == tmp_path / "checkpoint-10"
    assert find_checkpoint(tmp_path / "checkpoint-9", tmp_path) == tmp_path / "checkpoint-9"
    for step, words in (
        (11, "not completely saved"),
        (2, "no state of the optimizer"),
        (3, "no s"),
    ):
        with pytest.raises(ValueError, match=words):
            find_checkpoint(tmp_path / f"checkpoint-{step}", tmp_path)
    for lost in state:
        shutil.rmtree(tmp_path / "checkpoint-9")
        make_checkpoint(tmp_path, 9, COMPLETE, *(name for name in state if name != lost))
        with pytest.raises(ValueError, match="checkpoint-9 has no state of"):
            find_checkpoint(tmp_path / "checkpoint-9", tmp_path)
    make_checkpoint(tmp_path, 12, COMPLETE)
    with pytest.raises(ValueError, match="checkpoint-12 has no state of the optimizer"):
        find_checkpoint("last", tmp_path)


@pytest.mark.parametrize(
    ("limit", "best", "left"),
    [
        (1, None, [4, 9]),
        (2, None, [3, 4, 9]),
        (None, None, [2, 3, 4, 9]),
        (0, None, [2, 3, 4, 9]),
        (1, 2, [2, 4, 9]),
        (2, 2, [2, 4, 9]),
        (3, 2, [2, 3, 4, 9]),
    ],
)
def test_old_checkpoints_go_once_a_new_one_is_whole(tmp_path, limit, best, left):
    for step in (2, 3):
        make_checkpoint(tmp_path, step, COMPLETE)
    make_checkpoint(tmp_path, 4)
    make_checkpoint(tmp_path, 9)  # of a run that was killed in a save: it counts for nothing
    args = SimpleNamespace(
        save_total_limit=limit, hub_strategy="end", output_dir=str(tmp_path), should_save=True,
        push_to_hub=False,
    )  # fmt: skip
    callback = WholeCheckpoints(args, None)
    assert args.save_total_limit is None  # the Trainer deletes nothing
    best = best and str(tmp_path / f"checkpoint-{best}")
    callback.on_save(args, SimpleNamespace(global_step=4, best_model_checkpoint=best), None)
    assert sorted(int(p.name.rpartition("-")[2]) for p in tmp_path.iterdir()) == left
    assert (tmp_path / "checkpoint-4" / COMPLETE).exists()


def test_a_save_clears_the_folder_of_its_own_checkpoint_alone(tmp_path):
    out = tmp_path / "checkpoint-7"  # as a user may call the output folder
    out.mkdir()
    for step in (1, 2):
        make_checkpoint(out, step, COMPLETE)
    args = SimpleNamespace(output_dir=str(out), should_save=True)
    for folder in (out, out / "adapter", tmp_path / "checkpoint-7" / "checkpoint-2"):
        prepare_folder(str(folder), args)
    assert [path.name for path in out.iterdir()] == ["checkpoint-1"]


@pytest.mark.parametrize("kind", ["whole", "shards", "adapter"])
def test_weights_of_an_earlier_run_do_not_stay_beside_new_ones(tmp_path, kind):
    """Loading would take an adapter, or a single file, before the weights that were trained."""
    shards = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    new = {"whole": ["model.safetensors"], "adapter": ["adapter_model.safetensors"]}
    new = new.get(kind, list(shards.values()))
    old = {"adapter_config.json", "adapter_model.safetensors", "model.safetensors", "config.json"}
    for name in {*old, *new}:
        (tmp_path / name).touch()
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": shards}))
    complete_folder(tmp_path, kind != "adapter", Papers(None, "the card", "the adapter's card"))
    weights = {p.name for p in tmp_path.iterdir() if "model" in p.name and p.suffix != ".py"}
    if kind == "adapter":
        assert weights == {"adapter_model.safetensors"} and not (tmp_path / "config.json").exists()
        assert (tmp_path / "README.md").read_text() == "the adapter's card"
    else:
        assert weights == {*new} | ({index.name} if kind == "shards" else set())
        assert (tmp_path / "README.md").read_text() == "the card"


KILLED = """
import os, signal, sys
sys.path.insert(0, {root!r})
import finetune
from transformers import TrainerState
save = TrainerState.save_to_json
def die(self, path):
    if self.global_step == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    save(self, path)
TrainerState.save_to_json = die
finetune.main()
"""


def test_a_kill_during_a_save_leaves_the_last_whole_checkpoint(folder, tmp_path):
    script = tmp_path / "killed.py"
    script.write_text(KILLED.format(root=str(ROOT)))
    settings = {"max_steps": 3, "save_strategy": "steps", "save_steps": 1, "save_total_limit": 1}
    argv = flags(folder / "clips.jsonl", tmp_path / "out", **settings)
    assert start(script, argv).returncode == -signal.SIGKILL
    assert [path.name for path in whole_checkpoints(tmp_path / "out")] == ["checkpoint-1"]
    half = tmp_path / "out" / "checkpoint-2"
    assert (half / "model.safetensors").exists() and (half / "optimizer.pt").exists()
    with pytest.raises(ValueError, match=f"no file {COMPLETE}.* is .*checkpoint-1"):
        run(folder / "clips.jsonl", tmp_path / "out", **settings, resume_from_checkpoint=half)
    again = run(folder / "clips.jsonl", tmp_path / "out", **settings, resume_from_checkpoint="last")
    assert again.state.global_step == 3
    assert sorted(path.name for path in (tmp_path / "out").iterdir() if "ch" in path.name[:2]) == [
        "chat_template.jinja", "checkpoint-3",
    ]  # fmt: skip
    never_killed = run(folder / "clips.jsonl", tmp_path / "new", max_steps=3)
    assert losses(again) == losses(never_killed)


def test_what_is_saved_loads_by_itself(folder, tmp_path, batch):
    out = tmp_path / "out"
    trainer = run(folder / "clips.jsonl", out, max_steps=2, save_strategy="steps", save_steps=2)
    config = json.loads((out / "config.json").read_text())
    assert config["text_config"]["use_cache"] and config.get("use_cache", True)
    for saved in (out, out / "checkpoint-2"):
        moved = tmp_path / f"moved_{saved.name}"
        shutil.copytree(saved, moved)
        model = AutoModelForImageTextToText.from_pretrained(moved, trust_remote_code=True)
        assert torch.equal(logits_of(model, batch), logits_of(trainer.model, batch))
        processor = AutoProcessor.from_pretrained(moved, trust_remote_code=True)
        assert type(processor).__name__ == "VideoNSAProcessor"


def test_adapters_load_with_their_gates_and_merge(folder, tmp_path, batch, model):
    import peft

    out = tmp_path / "out"
    trainer = run(folder / "clips.jsonl", out, max_steps=3, lora_r=2, gate_lr=1e-2, merge_lora=True)
    expected = logits_of(trainer.model, batch)
    base = AutoModelForImageTextToText.from_pretrained(
        ROOT, trust_remote_code=True, dtype=torch.float32
    )
    adapted = peft.PeftModel.from_pretrained(base, out / "adapter")
    assert torch.equal(logits_of(adapted, batch), expected)
    merged = AutoModelForImageTextToText.from_pretrained(out, trust_remote_code=True)
    torch.testing.assert_close(logits_of(merged, batch), expected, rtol=1e-4, atol=1e-4)

    trained = {n: p for n, p in trainer.model.named_parameters() if p.requires_grad}
    gates = {n: p for n, p in trained.items() if ".g_proj_" in n}
    assert gates and not torch.equal(expected, logits_of(model, batch))
    for name, gate in gates.items():
        plain = name.removeprefix("base_model.model.").replace("modules_to_save.default.", "")
        assert torch.equal(merged.get_parameter(plain), gate), name
        assert torch.equal(adapted.get_parameter(name), gate), name
        last = f".layers.{model.config.text_config.num_hidden_layers - 1}." in name
        assert torch.equal(model.get_parameter(plain), gate) == last, name


class Hub:
    """Stands for the Hub: commits go to a folder, as `HfApi.upload_folder` would make them."""

    def __init__(self, folder, monkeypatch):
        self.folder, self.commits = folder, []
        repo = SimpleNamespace(repo_id="someone/tuned")
        monkeypatch.setattr(HfApi, "create_repo", lambda api, *args, **kwargs: repo)
        monkeypatch.setattr(HfApi, "upload_folder", self.upload)
        monkeypatch.setattr(HfApi, "run_as_future", self.run)

    @staticmethod
    def run(api, function, *args):
        future = Future()
        try:
            future.set_result(function(*args))
        except Exception as error:
            future.set_exception(error)
        return future

    def upload(
        self, *, repo_id, folder_path, commit_message, path_in_repo="", allow_patterns="*",
        delete_patterns=None, **access,
    ):  # fmt: skip
        assert repo_id == "someone/tuned"
        self.commits.append(commit_message)
        source, target = Path(folder_path), self.folder / path_in_repo
        names = [str(path.relative_to(source)) for path in source.rglob("*") if path.is_file()]
        there = [str(path.relative_to(target)) for path in target.rglob("*") if path.is_file()]
        for name in filter_repo_objects(there, allow_patterns=delete_patterns or []):
            (target / name).unlink()
        for name in filter_repo_objects(names, allow_patterns=allow_patterns):
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source / name, target / name)


def names_in(folder):
    return {path.name for path in Path(folder).iterdir() if path.is_file()}


@pytest.mark.parametrize(
    ("settings", "whole"),
    [
        ({"save_strategy": "steps", "save_steps": 1, "save_total_limit": 1}, True),
        ({"lora_r": 2, "save_strategy": "steps", "save_steps": 1}, False),
        ({"lora_r": 2, "merge_lora": True}, True),
        ({"lora_r": 2, "merge_lora": True, "save_strategy": "steps", "save_steps": 1}, True),
        ({"lora_r": 2, "merge_lora": True, "hub_strategy": "all_checkpoints",
          "save_strategy": "epoch"}, True),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else "",
)  # fmt: skip
def test_a_folder_and_the_hub_hold_what_was_trained(
    folder, tmp_path, monkeypatch, batch, settings, whole
):
    import peft

    out, repo = tmp_path / "out", tmp_path / "hub"
    hub = Hub(repo, monkeypatch)
    trainer = run(
        folder / "clips.jsonl", out, max_steps=2, gate_lr=1e-2, push_to_hub=True, **settings
    )
    expected = logits_of(trainer.model, batch)
    saves = {"steps": 2, "epoch": 1, "no": 0}[settings.get("save_strategy", "no")]
    saves *= 2 if "hub_strategy" in settings else 1
    assert len(hub.commits) == saves + 1 and hub.commits[-1] == "End of training"
    for place in (out, repo, *whole_checkpoints(out)[-1:]):
        names = names_in(place)
        adapter = {"adapter_config.json", "adapter_model.safetensors"}
        if place.parent == out and "lora_r" in settings or not whole:
            assert adapter < names and not {"config.json", "model.safetensors"} & names
        else:
            assert not adapter & names and set(REQUIRED_FILES) | {"model.safetensors"} < names
        source = ROOT if adapter < names else place
        loaded = AutoModelForImageTextToText.from_pretrained(
            source, trust_remote_code=True, dtype=torch.float32
        )
        if adapter < names:
            loaded = peft.PeftModel.from_pretrained(loaded, place)
        logits = logits_of(loaded, batch)
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
        processor = AutoProcessor.from_pretrained(place, trust_remote_code=True)
        assert type(processor).__name__ == "VideoNSAProcessor"
        card = (place / "README.md").read_text()
        assert str(folder) not in card and str(ROOT) not in card and str(tmp_path) not in card
        assert "`clips.jsonl`" in card
    assert not {"data_report.jsonl", "training_args.bin", COMPLETE} & names_in(repo)


def test_a_run_that_ended_with_an_adapter_may_go_on_and_end_merged(
    folder, tmp_path, monkeypatch, batch
):
    out, repo = tmp_path / "out", tmp_path / "hub"
    Hub(repo, monkeypatch)
    settings = {"lora_r": 2, "save_strategy": "steps", "save_steps": 1, "push_to_hub": True}
    run(folder / "clips.jsonl", out, max_steps=1, **settings)
    assert "adapter_model.safetensors" in names_in(out) & names_in(repo)
    trainer = run(
        folder / "clips.jsonl", out, max_steps=2, resume_from_checkpoint="last", merge_lora=True,
        **settings,
    )  # fmt: skip
    expected = logits_of(trainer.model, batch)
    for place in (out, repo):
        assert not [name for name in names_in(place) if name.startswith("adapter_")]
        merged = AutoModelForImageTextToText.from_pretrained(place, trust_remote_code=True)
        torch.testing.assert_close(logits_of(merged, batch), expected, rtol=1e-4, atol=1e-4)
    assert "adapter_config.json" in names_in(out / "adapter")


def test_another_number_of_processes_that_goes_on_is_said(tmp_path, caplog):
    for saved, names in ((1, ["rng_state.pth"]), (2, ["rng_state_0.pth", "rng_state_1.pth"])):
        folder = tmp_path / f"checkpoint-{saved}"
        folder.mkdir()
        for name in names:
            (folder / name).touch()
        for processes in (1, 2):
            caplog.clear()
            say_other_processes(folder, processes)
            assert bool(caplog.text) == (processes != saved)
    say_other_processes(folder, 1)
    assert "saved by 2 processes, and 1 go on" in caplog.text
