"""Whichever way a checkpoint is made or sent, it carries the same: what loading it needs."""

import json
import shutil
import subprocess
import sys

import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor

import publish
from commands import checkpoint_files
from commands.checkpoint_files import CHECKPOINT_FILES, CODE_FILES, file_inside, listed_files
from convert_checkpoint import convert
from paths import ROOT

PICTURES = {name for name in CHECKPOINT_FILES if name.endswith(".png")}  # of the root's card alone
NOT_CODE = {"README.md", "requirements.txt"}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """The root checkpoint without its gates, as a Qwen2.5-VL, with files that do not travel."""
    folder = tmp_path_factory.mktemp("source") / "Qwen"
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(ROOT / name, folder)
    for name in ("generation_config.json", "preprocessor_config.json", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    config = json.loads((ROOT / "config.json").read_text())
    del config["auto_map"]
    config |= {"model_type": "qwen2_5_vl", "architectures": ["Qwen2_5_VLForConditionalGeneration"]}
    (folder / "config.json").write_text(json.dumps(config))
    weights = load_file(ROOT / "model.safetensors")
    weights = {name: x for name, x in weights.items() if ".g_proj_" not in name}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    for clutter in ("modeling_other.py", "optimizer.pt", "train.py"):
        (folder / clutter).touch()
    return folder


@pytest.fixture(scope="module")
def converted(source, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "converted"
    convert(source, out)
    return out


@pytest.fixture
def sent(monkeypatch):
    """The names that were uploaded last."""
    names = []

    class Api:
        def __init__(self, **settings):
            pass

        def create_repo(self, repo_id, **settings):
            pass

        def upload_folder(self, *, allow_patterns, **settings):
            names[:] = allow_patterns

    monkeypatch.setattr(checkpoint_files, "HfApi", Api)
    return names


def files_of(folder):
    return {path.name for path in folder.iterdir() if path.is_file()}


def test_a_converted_checkpoint_is_what_travels(converted):
    assert set(listed_files(converted)) == files_of(converted) - {"conversion.json"}
    assert set(CODE_FILES) | {"README.md", "LICENSE", "tokenizer.json"} <= files_of(converted)


def test_converter_and_publisher_send_the_same(source, converted, sent):
    convert(source, converted, push_to_hub="me/tiny")
    pushed = sorted(sent)
    sent.clear()
    publish.publish(converted, "me/tiny")
    assert sorted(sent) == pushed == sorted(listed_files(converted))


def test_the_root_carries_what_a_converted_one_does(converted):
    assert set(listed_files(ROOT)) - PICTURES == set(listed_files(converted))


@pytest.mark.parametrize("ways", [[], ["--lora_r", "2", "--merge_lora"]], ids=["whole", "merged"])
def test_a_tuned_checkpoint_carries_what_its_base_does(converted, tmp_path, ways):
    out = tmp_path / "tuned"
    command = [sys.executable, ROOT / "finetune.py", "--model_name_or_path", converted, *ways]
    command += ["--data", ROOT / "examples/clips/clips.jsonl", "--output_dir", out]
    command += ["--max_steps", "1", "--per_device_train_batch_size", "1", "--report_to", "none"]
    subprocess.run(list(map(str, command)), check=True, capture_output=True)
    tuned, base = set(listed_files(out)), set(listed_files(converted))
    # transformers 5 keeps the processor's settings in one file.
    assert tuned - base <= {"processor_config.json"}
    assert base - tuned <= {"preprocessor_config.json", "video_preprocessor_config.json"}


def test_only_blobs_count_as_inside_a_folder_of_the_hubs_cache(tmp_path):
    repository = tmp_path / "models--me--tiny"
    snapshot = repository / "snapshots/0123abc"
    for folder in (snapshot, repository / "blobs", repository / "refs"):
        folder.mkdir(parents=True)
    (repository / "blobs/0").touch()
    (repository / "refs/main").touch()
    (snapshot / "config.json").symlink_to("../../blobs/0")
    (snapshot / "README.md").symlink_to("../../refs/main")
    assert file_inside(snapshot, "config.json") == snapshot / "config.json"
    with pytest.raises(ValueError, match="README.md of .* leads to .*refs/main, outside"):
        file_inside(snapshot, "README.md")


def test_save_pretrained_copies_the_code(converted, tmp_path):
    """The library copies what it reached by itself; only papers are left to who saves."""
    remote = {"trust_remote_code": True}
    AutoModelForImageTextToText.from_pretrained(converted, **remote).save_pretrained(tmp_path)
    AutoProcessor.from_pretrained(converted, **remote).save_pretrained(tmp_path)
    saved = files_of(tmp_path)
    assert {name for name in saved if name.endswith(".py")} == set(CODE_FILES) - NOT_CODE
    for name in NOT_CODE:
        shutil.copy(converted / name, tmp_path)
    assert set(listed_files(tmp_path)) == saved | NOT_CODE
