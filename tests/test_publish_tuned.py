"""What was tuned and evaluated is published by one command, and loads from the Hub alone."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import transformers
from huggingface_hub import HfApi, metadata_load
from huggingface_hub.utils import filter_repo_objects
from packaging.version import Version

import evaluation
import publish
from finetuning import run
from paths import ROOT

COMMIT = "0" * 40


class FakeHub:
    """A cache of the Hub that holds what was uploaded, and nothing else."""

    def __init__(self, cache, patch):
        self.cache = cache
        patch.setattr(HfApi, "create_repo", lambda api, *args, **kwargs: None)
        patch.setattr(HfApi, "upload_folder", self.upload)
        patch.setenv("HF_HUB_CACHE", str(cache))  # of the processes that publish.py starts

    def folder(self, repo_id):
        return self.cache / f"models--{repo_id.replace('/', '--')}" / "snapshots" / COMMIT

    def upload(self, *, repo_id, folder_path, allow_patterns, **rest):
        folder = self.folder(repo_id)
        names = [p.relative_to(folder_path) for p in folder_path.rglob("*") if p.is_file()]
        for name in filter_repo_objects(map(str, names), allow_patterns=allow_patterns):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(folder_path / name, folder / name)
        repository = folder.parents[1]
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / "main").write_text(COMMIT)
        if not (folder / "config.json").exists():  # the Hub answers so, and the cache keeps that
            absent = repository / ".no_exist" / COMMIT
            absent.mkdir(parents=True)
            (absent / "config.json").touch()

    def ask(self, repo_id, modules):
        """What ask.py prints for a stranger who has only the Hub."""
        clip, question = ROOT / "examples/clips/circle.mp4", "What colour is the shape?"
        env = {"HF_HUB_CACHE": self.cache, "HF_MODULES_CACHE": modules, "HF_HUB_OFFLINE": 1}
        done = subprocess.run(
            [sys.executable, ROOT / "ask.py", "--model", repo_id, clip, question],
            env={**os.environ, **{name: str(value) for name, value in env.items()}},
            capture_output=True,
            text=True,
        )
        return done.stdout.splitlines()[-1] if done.returncode == 0 else done.stderr[-2000:]


@pytest.fixture(scope="module")
def published(folder, tmp_path_factory):
    """The Hub after a run with adapters was merged, evaluated and published, base first."""
    place = tmp_path_factory.mktemp("published")
    tuned, scores, clips = place / "tuned", place / "scores", folder / "clips.jsonl"
    with pytest.MonkeyPatch.context() as patch:
        hub = FakeHub(place / "hub", patch)
        run(
            clips, tuned, max_steps=2, lora_r=2, merge_lora=True, gate_lr=1e-5, learning_rate=1e-5,
            eval_data=clips, eval_answers=2, fps=2,
        )  # fmt: skip
        argv = ["--model", tuned, "--data", clips, "--limit", 3, "--output_path", scores]
        assert evaluation.main([str(one) for one in argv]) == 0
        with pytest.MonkeyPatch.context() as unchecked:  # another test publishes it
            unchecked.setattr(publish, "check_loads", lambda folder, names: None)
            assert publish.main(["--repo-id", "me/base"]) == 0
        argv = ["--model", str(tuned), "--repo-id", "me/merged", "--scores", str(scores)]
        assert publish.main(argv) == 0
        adapter = ["--model", str(tuned / "adapter"), "--repo-id", "me/lora", "--base", "me/base"]
        assert publish.main(adapter) == 0
    return hub, tuned


@pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.24"),
    reason="5.17 loads no tokenizer of a repository without config.json, which an adapter's is",
)
def test_an_adapter_loads_and_answers_from_the_hub_alone(published, tmp_path):
    """So does the merged checkpoint: publish.py loads what it sends from a cache of the Hub."""
    assert published[0].ask("me/lora", tmp_path) == "red"


def test_its_card_tells_base_data_settings_and_scores(published):
    hub, tuned = published
    card = hub.folder("me/merged") / "README.md"
    text, data = card.read_text(), metadata_load(card)
    assert "# me/merged\n" in text and 'from_pretrained("me/merged"' in text
    assert "--model me/merged VIDEO" in text and str(tuned.parent) not in text
    assert "on `clips.jsonl`" in text
    for row in (
        "| trained for | 2 steps of 8 conversations |",
        "| learning rate | 1e-05 |",
        "| adapters | rank 2, alpha 4 |",
        "| videos | fps 2.0 |",
        "| seed | 42 |",
    ):
        assert row in text
    assert "| clips.jsonl | exact_match | 1 | 2 |" in text  # of the run
    assert "| clips.jsonl | exact_match | 1 | 3 | sparse, of " in text  # of evaluation.py
    (index,) = data["model-index"]
    assert index["name"] == "me/merged"
    metrics = [m["type"] for result in index["results"] for m in result["metrics"]]
    assert sorted(metrics) == ["exact_match", "exact_match", "loss"]
    # The tiny checkpoint was trained from scratch: it has no base to name.
    assert "base_model" not in data


def test_the_card_of_an_adapter_names_its_base(published):
    hub, tuned = published
    folder = hub.folder("me/lora")
    data, text = metadata_load(folder / "README.md"), (folder / "README.md").read_text()
    assert (data["base_model"], data["base_model_relation"]) == ("me/base", "adapter")
    assert 'AutoModelForImageTextToText.from_pretrained("me/base"' in text
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "me/base"
    own = json.loads((tuned / "adapter" / "adapter_config.json").read_text())
    assert own["base_model_name_or_path"] == str(ROOT)  # the folder stays as it is


def test_what_does_not_belong_together_is_not_sent(published, capsys, monkeypatch, tmp_path):
    hub, tuned = published
    monkeypatch.setenv("HF_HUB_CACHE", str(hub.cache))
    scores = str(tuned.parent / "scores")
    adapter = ["--dry-run", "--model", str(tuned / "adapter"), "--base", "me/base", "--scores"]
    assert publish.main([*adapter, scores]) == 2
    assert f"has scores of {tuned}, not of {tuned / 'adapter'}" in capsys.readouterr().err
    assert publish.main([*adapter, str(tmp_path)]) == 2
    assert "there is no manifest" in capsys.readouterr().err
    other = shutil.copytree(hub.folder("me/base"), hub.folder("me/wider"))
    shutil.copytree(hub.folder("me/base").parents[1] / "refs", other.parents[1] / "refs")
    config = json.loads((other / "config.json").read_text())
    config["text_config"] |= {"num_key_value_heads": 1}
    (other / "config.json").write_text(json.dumps(config))
    argv = ["--dry-run", "--model", str(tuned / "adapter"), "--base", "me/wider"]
    assert publish.main(argv) == 2
    assert "it does not fit its base me/wider" in capsys.readouterr().err
