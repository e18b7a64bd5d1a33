"""Fine-tuning through finetune.py: what trains and what it logs, alone and in two processes."""

import copy
import dataclasses
import json
import re
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from accelerate import DistributedType, ParallelismConfig, PartialState
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    TrainingArguments,
)

import finetune
import tiny
from commands import finetuning_model
from commands.checkpoint_files import REQUIRED_FILES, listed_files
from commands.finetuning_arguments import COMMON, ModelArguments
from commands.finetuning_data import REPORT, Collator, Conversations
from commands.finetuning_flags import REFUSED, refuse_together
from commands.finetuning_model import part_of
from commands.finetuning_rows import LAYOUTS
from commands.finetuning_saving import whole_checkpoints
from commands.finetuning_sharding import mesh_group
from commands.finetuning_summary import forecast_memory, summarize
from finetuning import (
    ROW,
    TEXT_ROW,
    flags,
    logits_of,
    losses,
    losses_on_disk,
    mixed_rows,
    run,
    start,
    write_rows,
)
from nsa_rules import BRANCHES
from paths import ROOT
from workers import made_once


def test_the_loss_of_labelled_rows_is_that_of_all_logits(model, batch):
    del batch["stats"]
    assert len(batch["logits_to_keep"]) < batch["input_ids"].shape[1] / 2
    output = model(**batch)
    assert output.logits.shape[1] == len(batch["logits_to_keep"])
    whole = {k: v for k, v in batch.items() if k not in ("logits_to_keep", "shift_labels")}
    torch.testing.assert_close(output.loss, model(**whole).loss, rtol=1e-6, atol=0)


def test_the_loss_of_text_is_stock_qwens(processor, model, folder):
    data = Conversations([str(write_rows(folder / "text.jsonl", [TEXT_ROW]))], processor)
    batch = Collator(processor, model.config)([data[0]])
    twin = tiny.stock_twin(model)
    stock = twin(**{k: batch[k] for k in ("input_ids", "attention_mask", "labels")})
    del batch["stats"]
    torch.testing.assert_close(model.eval()(**batch).loss, stock.loss, rtol=1e-6, atol=0)


def gradients_of_one_step(folder, tmp_path, **settings):
    """{name: largest gradient} after the backward pass of one step, without an update."""
    found = {}

    class Watching(finetune.VideoNSATrainer):
        def training_step(self, model, *args, **kwargs):
            loss = super().training_step(model, *args, **kwargs)
            for name, parameter in model.named_parameters():
                if parameter.grad is not None:
                    found[name] = parameter.grad.clone()
            return loss

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(finetune, "VideoNSATrainer", Watching)
        trainer = run(
            write_rows(folder / "one.jsonl", [ROW]), tmp_path / "out", max_steps=1, **settings
        )
    return trainer, found


def test_gradients_reach_every_branch_and_part(folder, tmp_path):
    trainer, grads = gradients_of_one_step(folder, tmp_path, train="vision,merger,llm,gates")
    trained = {name for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert trained == set(grads) == {name for name, _ in trainer.model.named_parameters()}
    # Nothing reads the last layer's vision rows: its gates never learn, here or in any model.
    for layer in range(trainer.model.config.text_config.num_hidden_layers - 1):
        attention = f"model.language_model.layers.{layer}.self_attn"
        for branch in range(3):
            # Of a trained gate that is shut for good, no gradient may be left.
            assert grads[f"{attention}.g_proj_2.weight"][branch::3].any(1).float().mean() > 0.5
        for name in ("g_proj_1", "q_proj", "k_proj", "v_proj"):
            assert grads[f"{attention}.{name}.weight"].any(), name
    assert all(g.any() for name, g in grads.items() if ".visual." in name and "weight" in name)


@pytest.mark.parametrize(
    "checkpointing",
    [
        {},
        {"gradient_checkpointing": True},
        {
            "gradient_checkpointing": True,
            "gradient_checkpointing_kwargs": '{"use_reentrant": true}',
        },
    ],
    ids=["plain", "checkpointing", "reentrant"],
)
def test_only_what_is_named_trains(folder, tmp_path, checkpointing):
    before = load_file(ROOT / "model.safetensors")
    trainer, grads = gradients_of_one_step(
        folder, tmp_path, train="merger,gates", warmup_steps=0, **checkpointing
    )
    assert {part_of(name) for name in grads} == {"merger", "gates"}
    after = load_file(tmp_path / "out" / "model.safetensors")
    changed = {part_of(n) for n in after if not torch.equal(after[n], before[n].float())}
    assert changed == {"merger", "gates"}


def evaluations(trainer):
    return [entry for entry in trainer.state.log_history if "eval_loss" in entry]


def evaluations_on_disk(out):
    history = json.loads((out / "trainer_state.json").read_text())["log_history"]
    return [entry for entry in history if "eval_loss" in entry]


def test_held_out_data_is_scored_and_the_best_checkpoint_is_the_result(folder, tmp_path, capsys):
    """At a rate that ruins what the checkpoint knows: the first evaluation is the best."""
    data = folder / "clips.jsonl"
    trainer = run(
        folder / "new_kind.jsonl", tmp_path, eval_data=data, learning_rate=0.05, max_steps=8,
        lr_scheduler_type="constant", eval_strategy="steps", save_strategy="steps", eval_steps=1,
        save_steps=1, save_total_limit=1, load_best_model_at_end=True, eval_on_start=True,
        metric_for_best_model="exact_match", early_stopping_patience=2,
        per_device_eval_batch_size=4, eval_answers=6,
    )  # fmt: skip
    start, *others, last = evaluations(trainer)
    assert start["eval_exact_match"] == 1 and start["eval_answers"] == 6
    assert all(one["eval_exact_match"] < 1 for one in others)
    assert others[-1]["step"] < 8, "it did not stop early"
    best = max(others, key=lambda one: one["eval_exact_match"])
    assert last["eval_loss"] == pytest.approx(best["eval_loss"], rel=1e-5)
    kept = whole_checkpoints(tmp_path)
    assert {f"checkpoint-{best['step']}"} <= {one.name for one in kept} and len(kept) <= 2
    assert f"loss {best['eval_loss']:.4g}, exact match" in capsys.readouterr().out


def test_evaluation_leaves_no_trace_in_what_training_logs(folder, tmp_path):
    data, steps = folder / "clips.jsonl", {"max_steps": 2, "lora_r": 2, "bf16": True}
    plain = run(data, tmp_path / "plain", **steps)
    scored = run(
        data, tmp_path / "scored", **steps, eval_data=data, eval_strategy="steps", eval_steps=1,
        eval_answers=2,
    )  # fmt: skip
    assert len(evaluations(scored)) == 2 and evaluations(scored)[0]["eval_exact_match"] == 1
    assert losses(scored) == losses(plain)
    logs = [[e for e in one.state.log_history if "loss" in e] for one in (plain, scored)]
    for before, after in zip(*logs, strict=True):
        assert before.keys() == after.keys()
        for name in ("gate_window", "keys_attended", "grad_norm"):
            assert before[name] == after[name], name


def test_parts_have_their_own_learning_rates(folder, tmp_path):
    trainer = run(
        folder / "clips.jsonl", tmp_path, max_steps=1, train="vision,merger,llm,gates",
        learning_rate=1e-5, gate_lr=1e-3, vision_lr=1e-6, merger_lr=1e-4, weight_decay=0.1,
    )  # fmt: skip
    names = {id(p): name for name, p in trainer.model.named_parameters()}
    seen = {}
    for group in trainer.optimizer.param_groups:
        for parameter in group["params"]:
            name = names.pop(id(parameter))
            seen.setdefault(part_of(name), set()).add(group["initial_lr"])
            if name.endswith(".bias"):
                assert group["weight_decay"] == 0, name
            elif parameter.ndim > 1:
                assert group["weight_decay"] == 0.1, name
    assert not names
    assert seen == {"llm": {1e-5}, "gates": {1e-3}, "vision": {1e-6}, "merger": {1e-4}}


@pytest.mark.parametrize("reentrant", [True, False])
def test_adapters_over_a_frozen_tower_with_checkpointing(folder, tmp_path, reentrant):
    outputs = []
    original = finetuning_model.run_frozen_tower_without_graph

    def watch(visual):
        original(visual)
        visual.merger.register_forward_hook(lambda *a: outputs.append(a[-1].requires_grad))
        visual.patch_embed.register_forward_hook(lambda *a: outputs.append(a[-1].grad_fn))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(finetuning_model, "run_frozen_tower_without_graph", watch)
        trainer, grads = gradients_of_one_step(
            folder, tmp_path, lora_r=2, gradient_checkpointing=True,
            gradient_checkpointing_kwargs=json.dumps({"use_reentrant": reentrant}),
        )  # fmt: skip
    assert outputs and not any(outputs)
    trained = {name for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert trained == set(grads)
    assert {name.rsplit(".", 3)[-3] for name in trained} == {"lora_A", "lora_B", "modules_to_save"}
    assert all(g.any() for name, g in grads.items() if "lora_B" in name)


@pytest.mark.parametrize("reentrant", [True, False])
def test_adapters_in_the_vision_tower_with_checkpointing(folder, tmp_path, reentrant):
    _, grads = gradients_of_one_step(
        folder, tmp_path, lora_r=2, train="vision,gates", lora_modules="qkv",
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs=json.dumps({"use_reentrant": reentrant}),
    )  # fmt: skip
    adapters = {name: g for name, g in grads.items() if "lora_B" in name}
    assert len(adapters) == 3 and all(".visual.blocks." in name for name in adapters)
    assert all(g.any() for g in adapters.values())


@pytest.mark.parametrize("adapters", [{}, {"lora_r": 2}], ids=["all", "lora"])
def test_what_trains_is_float32_and_the_rest_bfloat16(folder, tmp_path, adapters):
    seen = set()

    class Watching(finetune.VideoNSATrainer):
        def training_step(self, model, *args, **kwargs):
            seen.update((p.requires_grad, p.dtype) for p in model.parameters())
            return super().training_step(model, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(finetune, "VideoNSATrainer", Watching)
        # A new kind of question: of those it knows, the loss would be all rounding.
        data = folder / "new_kind.jsonl"
        trainer = run(data, tmp_path, max_steps=3, bf16=True, **adapters)
    assert seen == {(True, torch.float32), (False, torch.bfloat16)}
    exact = run(data, tmp_path / "exact", max_steps=3, **adapters)
    assert losses(trainer) == pytest.approx(losses(exact), rel=0.05)
    if not adapters:
        weights = load_file(tmp_path / "model.safetensors")
        assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}
        assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"


def test_the_log_has_the_gates_and_what_is_attended(folder, tmp_path, model, processor):
    trainer = run(
        write_rows(folder / "one.jsonl", [ROW]), tmp_path, max_steps=2, learning_rate=0,
        gates_by_layer_every=2,
    )  # fmt: skip
    first, second = [entry for entry in trainer.state.log_history if "loss" in entry]
    data = Conversations([str(folder / "one.jsonl")], processor)
    batch = Collator(processor, model.config)([data[0]])
    stats, used = batch.pop("stats"), []
    layers = model.model.language_model.layers
    hooks = [
        layer.self_attn.g_proj_2.register_forward_hook(lambda *a: used.append(a[-1]))
        for layer in layers
    ]
    model(**batch)
    [hook.remove() for hook in hooks]
    gates = (torch.stack(used) / 0.3).sigmoid().unflatten(-1, (-1, 3)).mean((1, 2))
    assert gates.shape == (len(layers), 3)
    for branch, name in enumerate(BRANCHES):
        assert first[f"gate_{name}"] == pytest.approx(float(gates.mean(0)[branch]), rel=1e-5)
        for layer in range(len(layers)):
            logged = first[f"gates_by_layer/{layer:02d}_{name}"]
            assert logged == pytest.approx(float(gates[layer, branch]), rel=1e-5)
    assert not any("by_layer" in name for name in second)
    assert first["keys_attended"] == stats["attended"] / stats["dense"]
    assert first["tokens_per_second"] > 0 and first["skipped_samples"] == 0


def test_padding_does_not_change_what_is_learned(folder, tmp_path):
    """Two conversations in one batch give the gradient of two batches of one.

    Their answers are equally long, since each batch's loss is a mean over its tokens.
    """
    longer = copy.deepcopy(ROW)
    longer["conversations"][0]["value"] += " Say what the shape does in the video."
    data = write_rows(folder / "pair.jsonl", [ROW, longer])
    one = run(data, tmp_path / "one", max_steps=1, per_device_train_batch_size=2)
    two = run(
        data, tmp_path / "two", max_steps=1, per_device_train_batch_size=1,
        gradient_accumulation_steps=2,
    )  # fmt: skip
    assert losses(one) == pytest.approx(losses(two), rel=1e-5)
    norms = [t.state.log_history[0]["grad_norm"] for t in (one, two)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)


def test_a_new_kind_of_question_is_learned(folder, tmp_path):
    trainer = run(
        folder / "new_kind.jsonl", tmp_path, max_steps=25, learning_rate=2e-3,
        per_device_train_batch_size=2, gate_lr=1e-4, lr_scheduler_type="constant",
    )  # fmt: skip
    first, last = losses(trainer)[0], sum(losses(trainer)[-3:]) / 3
    assert last < 0.5 < first


# Several processes.


def sharded(**settings):
    layers = ["Qwen2_5_VLDecoderLayer", "Qwen2_5_VLVisionBlock"]
    config = {"version": 2, "transformer_layer_cls_to_wrap": layers} | settings
    config |= {"cpu_ram_efficient_loading": False, "state_dict_type": "SHARDED_STATE_DICT"}
    return {"fsdp": True, "fsdp_config": json.dumps(config)}


# In order, so that of each step's two rows one has a video and one is text alone.
MIXED = {"train_sampling_strategy": "sequential", "max_steps": 3}
ALL_PARTS = MIXED | {"train": "vision,merger,llm,gates", "learning_rate": 1e-4}
ADAPTERS = MIXED | {"lora_r": 2, "merge_lora": True, "gradient_checkpointing": True}
# Both processes have a part of each conversation, and accumulate as one does.
SHARED = {"sequence_parallel_size": 2, "gradient_accumulation_steps": 2}
CASES = {
    "replicated": (ALL_PARTS, {"ddp_backend": "gloo"}),
    "sharded": (ALL_PARTS, sharded(activation_checkpointing=True)),
    "sharded adapters": (ADAPTERS, sharded()),
    "shared": (ALL_PARTS, sharded(activation_checkpointing=True) | SHARED),
    "shared adapters": (ADAPTERS, sharded() | SHARED),
}


@pytest.fixture(scope="module")
def two_processes(folder, tmp_path_factory):
    """The output folder of each case, and those of adapters resumed from their middle."""
    return made_once(tmp_path_factory, "two processes", partial(train_by_two_processes, folder))


def train_by_two_processes(folder, root):
    mixed = mixed_rows(folder)
    save = {"save_strategy": "steps", "save_steps": 2, "per_device_train_batch_size": 1}
    score = {"eval_data": mixed, "per_device_eval_batch_size": 1}
    argvs = [
        flags(
            mixed, root / name, **save, **settings, **parallel, **score,
            eval_answers=0 if "fsdp" in parallel else 5,
        )
        for name, (settings, parallel) in CASES.items()
    ]  # fmt: skip
    for name in ("sharded adapters", "shared adapters"):
        resume = {"resume_from_checkpoint": root / name / "checkpoint-2"}
        out, parallel = root / f"{name} resumed", CASES[name][1]
        argvs.append(flags(mixed, out, **save, **ADAPTERS, **parallel, **resume))
    # As the 7B has them: embeddings that are not also the head are sharded by themselves.
    model = AutoModelForImageTextToText.from_pretrained(ROOT, trust_remote_code=True)
    model.config.tie_word_embeddings = model.config.text_config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    model.save_pretrained(root / "untied")
    processor = AutoProcessor.from_pretrained(ROOT, trust_remote_code=True)
    processor.save_pretrained(root / "untied")
    untied = ADAPTERS | {"merge_lora": False, "model_name_or_path": root / "untied"} | sharded()
    argvs.append(flags(mixed, root / "untied adapters", **save, **untied))
    done = start(ROOT / "tests" / "finetune_on_cpus.py", [json.dumps(argvs)], processes=2)
    assert done.returncode == 0, done.stderr[-5000:]


@pytest.mark.parametrize("name", CASES)
def test_two_processes_train_as_one_that_accumulates(folder, tmp_path, two_processes, name):
    one = run(
        mixed_rows(folder), tmp_path, gradient_accumulation_steps=2,
        per_device_train_batch_size=1, per_device_eval_batch_size=1,
        eval_data=folder / "mixed.jsonl", eval_answers=5, **CASES[name][0],
    )  # fmt: skip
    (scored,), (theirs,) = evaluations(one), evaluations_on_disk(two_processes / name)
    assert theirs["eval_loss"] == pytest.approx(scored["eval_loss"], rel=1e-3)
    if name == "replicated":
        assert theirs["eval_answers"] == 5
        assert theirs["eval_exact_match"] == pytest.approx(scored["eval_exact_match"])
    assert losses_on_disk(two_processes / name) == pytest.approx(losses(one), rel=1e-4)
    logs = json.loads((two_processes / name / "trainer_state.json").read_text())["log_history"]
    for mine, theirs in zip(one.state.log_history[:3], logs[:3], strict=True):
        for key in ("grad_norm", "keys_attended", "gate_compressed", "gates_by_layer/03_window"):
            assert (key in mine) == (key in theirs), key
            assert theirs.get(key, 0) == pytest.approx(mine.get(key, 0), rel=1e-3), key
    before = load_file(ROOT / "model.safetensors")
    mine, theirs = (load_file(f / "model.safetensors") for f in (tmp_path, two_processes / name))
    for key, weight in mine.items():
        moved = (weight - before[key].float()).abs().max()
        assert (theirs[key] - weight).abs().max() <= 0.02 * moved, key
    model = AutoModelForImageTextToText.from_pretrained(
        two_processes / name, trust_remote_code=True
    )
    assert type(model).__name__ == "VideoNSAForConditionalGeneration"
    assert {*REQUIRED_FILES, "model.safetensors"} <= set(listed_files(two_processes / name))
    assert [one.name for one in whole_checkpoints(two_processes / name)] == [
        "checkpoint-2", "checkpoint-3",
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["sharded adapters", "shared adapters"])
def test_sharded_adapters_resume(two_processes, name):
    resumed = losses_on_disk(two_processes / f"{name} resumed")
    assert resumed == losses_on_disk(two_processes / name)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({}, "needs weights in shards of FSDP2"),
        ({"fsdp": True, "fsdp_config": '{"version": 1}'}, "needs weights in shards of FSDP2"),
        (sharded(), "1 processes run, which are not groups of 2"),
        (sharded() | {"sequence_parallel_size": 0}, "0, and 1 processes run"),
    ],
)
def test_sequences_that_cannot_be_shared_out_are_refused(folder, tmp_path, settings, message):
    settings = {"sequence_parallel_size": 2} | settings
    with pytest.raises(ValueError, match=message):
        finetune.parse(flags(folder / "clips.jsonl", tmp_path, **settings))


def test_parallelism_that_accelerate_was_told_of_elsewhere_is_refused():
    with pytest.raises(ValueError, match="accelerate was configured for {'cp': 2"):
        mesh_group(SimpleNamespace(parallelism_config=ParallelismConfig(cp_size=2)), 1)


# The command.


def test_memory_is_that_of_one_of_several_processes(folder, tmp_path, monkeypatch, capsys):
    """Weights in shards, tokens of a conversation shared out, layers checkpointed by FSDP."""
    config = AutoConfig.from_pretrained(ROOT, trust_remote_code=True)
    gib = {}
    for name, processes, settings in (
        ("one", 1, {"gradient_checkpointing": True}),
        ("sharded", 4, sharded()),
        ("shared", 4, sharded(activation_checkpointing=True) | {"sequence_parallel_size": 2}),
    ):
        count = property(lambda args, processes=processes: processes)
        monkeypatch.setattr(TrainingArguments, "world_size", count)
        argv = flags(folder / "clips.jsonl", tmp_path, **settings)
        model_args, _, args = finetune.parse(argv)
        forecast_memory(config, model_args, args, {"tokens": 2**20, "labels": 8})
        line = capsys.readouterr().out.splitlines()[-1]
        assert ("of one of 4 processes" in line and "in 4 shards" in line) == (processes == 4)
        gib[name] = [float(one) for one in re.findall(r"(?:izer|shards|tions) ([\d.]+)", line)]
    assert gib["sharded"][0] == pytest.approx(gib["one"][0] / 4, abs=0.006)
    assert gib["shared"][1] == pytest.approx(gib["one"][1] / 2, abs=0.006)
    assert gib["sharded"][1] > 2 * gib["one"][1]  # nothing is checkpointed


def test_a_dry_run_measures_and_trains_nothing(folder, tmp_path, capsys):
    data = write_rows(folder / "dry.jsonl", [ROW, {**ROW, "video": "gone.mp4"}, TEXT_ROW])
    assert run(data, tmp_path, dry_run=True, per_device_train_batch_size=2, max_tokens=70) is None
    printed = capsys.readouterr().out
    assert "3 conversations" in printed
    assert "1 would be skipped, 1 give up frames" in printed
    assert "gone.mp4" in printed
    assert "Tokens a conversation:" in printed and "GiB" in printed
    assert "6 steps of 2 conversations (3 epochs)" in printed
    assert [path.name for path in tmp_path.iterdir()] == [REPORT]


def test_a_refused_row_is_answered_with_a_row_of_each_layout(folder, tmp_path, capsys):
    data = write_rows(folder / "odd.jsonl", [{"clip_path": "a.mp4", "qa": "What?"}, ROW])
    run(data, tmp_path, dry_run=True)
    printed = capsys.readouterr().out
    assert "odd.jsonl:1: the row has neither messages nor conversations" in printed
    assert all(layout in printed for layout in LAYOUTS)


def test_a_run_measures_a_part_of_much_data(folder, tmp_path, capsys, processor, model):
    data = Conversations([f"{folder / 'clips.jsonl'}%1000"], processor)
    args = finetune.parse(flags(folder / "clips.jsonl", tmp_path))
    summarize(data, None, model.config, args[0], args[2], at_most=5)
    printed = capsys.readouterr().out
    assert f"{len(data)} conversations" in printed and ", of which 5 were measured" in printed
    tokens = re.search(r"about ([\d,]+) tokens", printed)[1]
    assert int(tokens.replace(",", "")) > 100 * len(data)  # of all of it


def test_a_run_says_what_it_takes_and_what_to_do_with_its_result(folder, tmp_path, capsys):
    out = tmp_path / "tuned"
    run(folder / "clips.jsonl", out, max_steps=1)
    printed = capsys.readouterr().out
    assert printed.index("Tokens a conversation") < printed.index(f"The result is in {out}")
    assert f"python ask.py --model {out} VIDEO" in printed
    assert f"python tools/publish.py --model {out} --repo-id YOU/tuned" in printed


@pytest.mark.parametrize("saved", [False, True])
def test_an_interrupted_run_says_how_to_go_on(folder, tmp_path, monkeypatch, capsys, saved):
    log = finetune.VideoNSATrainer.log

    def interrupt(trainer, logs, *args):
        log(trainer, logs, *args)
        if trainer.state.global_step == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(finetune.VideoNSATrainer, "log", interrupt)
    settings = {"save_strategy": "steps", "save_steps": 1} if saved else {}
    with pytest.raises(SystemExit, match="130"):
        run(folder / "clips.jsonl", tmp_path, max_steps=3, **settings)
    printed = capsys.readouterr().out
    assert "Interrupted at step 2" in printed
    assert ("checkpoint-1 is whole: the same command with --res" in printed) == saved
    assert ("before any checkpoint was saved" in printed) != saved
    if saved:
        with pytest.raises(ValueError, match=r"\(1; .*checkpoint-1\). Go on .*Start anew\?"):
            run(folder / "clips.jsonl", tmp_path, max_steps=3)


def test_what_can_be_known_before_training_ends_in_one_line(tmp_path):
    ended = start(ROOT / "finetune.py", flags("gone.jsonl", tmp_path))
    assert (ended.returncode, ended.stderr) == (2, "finetune.py: there is no file gone.jsonl.\n")


def printed_help(capsys, *arguments):
    with pytest.raises(SystemExit, match="0"):
        finetune.parse(["--help", *arguments])
    return capsys.readouterr().out


def test_help_shows_what_most_runs_set_and_all_where_it_is_asked_for(capsys):
    short, everything = printed_help(capsys), printed_help(capsys, "all")
    assert finetune.__doc__ in short and "set.json%50" in short
    own = {*vars(ModelArguments)["__dataclass_fields__"], "gate_lr", *COMMON}
    own = {name for name in own if not name.startswith("_")}
    assert all(re.search(rf"^  --{name}\b.*(\s{{2,}}|\n\s+)\w", short, re.M) for name in own)
    assert "--neftune_noise_alpha" in everything and "--neftune_noise_alpha" not in short
    assert len(short.splitlines()) < 100 < len(everything.splitlines())


def test_a_mistyped_flag_is_told_from_what_was_meant():
    with pytest.raises(ValueError, match="there is no --gat_lr 1. Did you mean --gate_lr?"):
        finetune.parse(flags("x.json", "out", gat_lr=1))


def test_settings_come_from_a_file_and_flags_override_it(folder, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"model_name_or_path: {ROOT}\ndata: [{folder}/clips.jsonl%50, {folder}/new_kind.jsonl]\n"
        f"output_dir: {tmp_path}\nlearning_rate: 1.0e-5\ngate_lr: 0.001\nbf16: false\n"
        "lr_scheduler_kwargs: {min_lr: 1.0e-7}\nlr_scheduler_type: cosine_with_min_lr\n"
        "gradient_checkpointing: true\nmax_tokens: null\n"
    )
    model_args, data_args, args = finetune.parse([str(recipe), "--learning_rate", "2e-5"])
    assert args.learning_rate == 2e-5 and args.gate_lr == 1e-3 and not args.bf16
    assert args.gradient_checkpointing and args.lr_scheduler_kwargs == {"min_lr": 1e-7}
    assert len(data_args.data) == 2 and data_args.max_tokens is None
    with pytest.raises(ValueError, match="--unheard_of"):
        finetune.parse([str(recipe), "--unheard_of", "1"])


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"train": "gate"}, "--train is 'gate'"),
        ({"train": "gates", "lora_r": 4}, "--lora_r 4 adapts"),
        ({"merge_lora": True}, "no adapter to merge"),
        ({"semantics": "paper", "lora_r": 4}, "runs with the semantics that its base names"),
        ({"semantics": "both"}, "nsa_semantics holds 'both'"),
        ({"lora_alpha": 8}, "--lora_alpha 8.0 without --lora_r"),
        ({"lora_modules": "q_proj"}, "--lora_modules q_proj without"),
        ({"lora_r": 4, "lora_alpha": 0}, "--lora_alpha 0.0: a rank is"),
        ({"lora_r": 4, "lora_modules": "q_proj,k_poj"}, "names k_poj, which"),
        ({"lora_r": 4, "lora_modules": "q_proj,qkv"}, "names qkv, which --train llm,gates has not"),
        ({"lora_r": 4, "lora_modules": "q_proj,"}, "names , which"),
        ({"lora_r": 4, "train": "llm,vision", "lora_modules": "q_proj"}, "--train names vision"),
        ({"lora_r": 4, "train": "llm,vision", "lora_modules": "qkv"}, "--train names llm"),
        ({"lora_r": 4, "fsdp_config": '{"activation_checkpointing": true}', "fsdp": True},
         "--gradient_checkpointing instead"),
        ({"train": "llm", "gate_lr": 1e-3}, "--gate_lr 0.001, but --train is 'llm'"),
        ({"vision_lr": 1e-3}, "add vision to --train"),
        ({"output_dir": ROOT}, "the folder of the model itself"),
        ({"model_name_or_path": "nowhere"}, "there is no folder nowhere, and an id on the Hub"),
        ({"model_revision": "v2"}, "--model_revision v2"),
        ({"gates_by_layer_every": 0}, "--gates_by_layer_every is 0"),
        ({"eval_strategy": "steps"}, "--eval_strategy steps, but .* add --eval_data SET"),
        ({"do_eval": True}, "--do_eval True, but there is nothing to evaluate on"),
        ({"save_strategy": "best", "metric_for_best_model": "loss"}, "add --eval_data SET"),
        ({"eval_data": "x.json", "do_predict": True}, "--do_predict True: finetune.py does not"),
        ({"eval_data": "x.json", "eval_answers": -1}, "--eval_answers is -1"),
        ({"eval_data": "x.json", "fsdp": True}, "--eval_answers 20 with --fsdp"),
        ({"eval_data": "x.json", "metric_for_best_model": "f1"}, "there are loss and exact_match"),
        ({"eval_data": "x.json", "metric_for_best_model": "exact_match", "eval_answers": 0},
         "there is loss"),
        ({"eval_data": "x.json", "early_stopping_patience": 1}, "needs --load_best_model_at_end"),
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size is 0; it counts conv"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps is 0; it counts batch"),
        ({"learning_rate": "nan"}, "learning_rate is nan; it must be a number"),
        ({"train_sampling_strategy": "group_by_length"}, "group_by_length: it would read every"),
        ({"remove_unused_columns": "true"}, "--remove_unused_columns True"),
        ({"enable_jit_checkpoint": True}, "--enable_jit_checkpoint"),
        ({"use_liger_kernel": True}, "--use_liger_kernel"),
        ({"torch_compile": True}, "--torch_compile True"),
        ({"optim": "lomo"}, "--optim lomo"),
        ({"accelerator_config": '{"dispatch_batches": true}'}, "--accelerator_config"),
        ({"accelerator_config": '{"even_batches": false}'}, "--accelerator_config"),
    ],
)  # fmt: skip
def test_settings_that_contradict_are_refused(folder, tmp_path, settings, words):
    with pytest.raises(ValueError, match=words):
        run(folder / "clips.jsonl", settings.pop("output_dir", tmp_path), **settings)


def test_an_adapter_is_no_model_to_train_from(folder, tmp_path):
    (tmp_path / "adapter_config.json").touch()
    with pytest.raises(ValueError, match="is an adapter: go on .* --merge_lora"):
        run(folder / "clips.jsonl", tmp_path / "out", model_name_or_path=tmp_path)


# Flags of the Trainer that do what its documentation says, as far as they were looked through.
TAKEN = """
    do_eval eval_strategy eval_steps eval_delay eval_on_start per_device_eval_batch_size
    load_best_model_at_end metric_for_best_model greater_is_better
    accelerator_config activation_checkpointing activation_checkpointing_kwargs adam_beta1
    adam_beta2 adam_epsilon auto_find_batch_size average_tokens_across_devices bf16 data_seed
    dataloader_drop_last dataloader_in_order dataloader_multiprocessing_context
    dataloader_num_workers dataloader_persistent_workers dataloader_pin_memory
    dataloader_prefetch_factor ddp_backend ddp_broadcast_buffers ddp_bucket_cap_mb
    ddp_find_unused_parameters ddp_static_graph ddp_timeout debug deepspeed disable_tqdm
    do_train fp16 fsdp fsdp_config full_determinism gradient_accumulation_steps
    gradient_checkpointing gradient_checkpointing_kwargs hub_always_push hub_model_id
    hub_private_repo hub_revision hub_strategy hub_token ignore_data_skip
    include_num_input_tokens_seen label_smoothing_factor learning_rate local_rank log_level
    log_level_replica log_on_each_node logging_first_step logging_nan_inf_filter logging_steps
    logging_strategy lr_scheduler_kwargs lr_scheduler_type max_grad_norm max_steps
    neftune_noise_alpha num_train_epochs optim optim_args optim_target_modules output_dir
    per_device_train_batch_size project push_to_hub report_to
    restore_callback_states_from_checkpoint resume_from_checkpoint run_name save_on_each_node
    save_only_model save_steps save_strategy save_total_limit seed skip_memory_metrics tf32
    torch_empty_cache_steps trackio_bucket_id trackio_space_id trackio_static_space_id
    train_sampling_strategy use_cache use_cpu warmup_steps weight_decay
"""


def test_every_flag_of_the_trainer_was_looked_through():
    names = {field.name for field in dataclasses.fields(TrainingArguments)}
    taken = set(TAKEN.split())
    assert not taken & REFUSED.keys()
    new = names - taken - REFUSED.keys()
    assert not new, f"transformers has new flags: try each, then take or refuse it: {sorted(new)}"


def test_label_smoothing_is_of_the_labels(folder, tmp_path, model, processor):
    data = write_rows(folder / "one.jsonl", [ROW])
    settings = {"max_steps": 1, "learning_rate": 0, "label_smoothing_factor": 0.1}
    [loss] = losses(run(data, tmp_path, **settings))
    batch = Collator(processor, model.config)([Conversations([str(data)], processor)[0]])
    labels = batch["shift_labels"][0]
    scores = logits_of(model, batch)[0].log_softmax(-1)[labels != -100]
    right = scores.gather(1, labels[labels != -100, None])
    assert loss == pytest.approx(-float(0.9 * right.mean() + 0.1 * scores.mean()), rel=1e-4)


def test_flags_that_reach_into_a_step_work_together(folder, tmp_path):
    data = write_rows(folder / "pair.jsonl", [ROW, TEXT_ROW])
    trainer = run(
        data, tmp_path, max_steps=2, per_device_train_batch_size=2, neftune_noise_alpha=5,
        include_num_input_tokens_seen="true", torch_empty_cache_steps=1, max_grad_norm=0,
        debug="underflow_overflow", logging_first_step=True, auto_find_batch_size=True,
        average_tokens_across_devices="false", train_sampling_strategy="sequential",
    )  # fmt: skip
    assert len(losses(trainer)) == 2 and trainer.state.num_input_tokens_seen > 0


@pytest.mark.parametrize("adapters", [{}, {"lora_r": 2, "merge_lora": True}], ids=["all", "lora"])
def test_other_semantics_are_trained_and_saved(folder, tmp_path, adapters):
    data = folder / "clips.jsonl"
    trainer = run(data, tmp_path, semantics="released", max_steps=1, **adapters)
    assert trainer.base.config.text_config.nsa_semantics == "released"
    saved = AutoConfig.from_pretrained(tmp_path, trust_remote_code=True)
    assert saved.text_config.nsa_semantics == "released"


def test_weights_that_accelerate_does_not_shard_are_said(tmp_path, monkeypatch, caplog):
    """It keeps them whole in one process and on CPUs; with groups it would fail, far from that."""
    settings = {"fsdp": True, "fsdp_config": '{"version": 2}'}
    model_args, _, args = finetune.parse(flags("x.json", tmp_path, **settings))
    refuse_together(model_args, args)
    assert "--fsdp is not used: for one process accelerate keeps the weights whole" in caplog.text
    monkeypatch.setattr(PartialState(), "distributed_type", DistributedType.MULTI_CPU)
    args.sequence_parallel_size = 2
    with pytest.raises(ValueError, match="size is 2, .* none for processes on CPUs. Run it on GPU"):
        refuse_together(model_args, args)
    caplog.clear()
    monkeypatch.setattr(PartialState(), "distributed_type", DistributedType.MULTI_GPU)
    refuse_together(model_args, args)
    assert not caplog.text


def test_recipes_are_settings_that_parse(tmp_path):
    recipes = sorted((ROOT / "examples" / "recipes").glob("*.yaml"))
    assert recipes
    for recipe in recipes:
        own = recipe.read_text().replace("deepspeed:", "run_name:")  # it is not installed here
        (tmp_path / recipe.name).write_text(own)
        argv = [tmp_path / recipe.name, *flags("x.json", "out", bf16="false")]
        _, data_args, args = finetune.parse([str(part) for part in argv])
        assert data_args.max_tokens and args.save_total_limit == 2
