"""What a user does first: load it, from wherever it lies, in one line."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText
from transformers.dynamic_module_utils import get_imports, get_relative_import_files

from commands.checkpoint_files import CODE_FILES, listed_files
from paths import ROOT

MODEL_FILES = sorted(ROOT / name for name in CODE_FILES if name.endswith(".py"))
SHIPPED_IMPORTS = {"torch", "transformers", "huggingface_hub", "numpy", "PIL"}


@pytest.fixture(scope="module")
def payload(tmp_path_factory):
    """A folder with only the files that go to the Hub."""
    folder = tmp_path_factory.mktemp("payload")
    for name in listed_files(ROOT):
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def hub_home(payload, tmp_path_factory):
    """A Hugging Face home whose cache holds the payload as `someone/tiny-videonsa`."""
    home = tmp_path_factory.mktemp("home")
    repository = home / "hub" / "models--someone--tiny-videonsa"
    commit = "0123456789abcdef0123456789abcdef01234567"
    shutil.copytree(payload, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    return home


def load(source, home, *save_to, **environment):
    """What load_everything.py says of `source`, in a process with a cache of its own."""
    environment = {**os.environ, "HF_HOME": str(home), "HF_HUB_OFFLINE": "1", **environment}
    environment.pop("HF_MODULES_CACHE", None)
    home.mkdir(exist_ok=True)
    script = Path(__file__).with_name("load_everything.py")
    run = subprocess.run(
        [sys.executable, str(script), str(source), *map(str, save_to)],
        capture_output=True,
        text=True,
        env=environment,
        cwd=home,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout.splitlines()[-1])


def check(result):
    assert result["config"] == "VideoNSAConfig"
    assert result["model"] == result["auto_model"] == "VideoNSAForConditionalGeneration"
    assert result["processor"] == "VideoNSAProcessor"
    assert result["video_processor"] == "VideoNSAVideoProcessor"
    assert result["missing"] == result["unexpected"] == []
    assert result["pipeline"] == result["decoded"]


def test_payload_loads_from_a_folder_and_what_it_saves_loads_elsewhere(payload, tmp_path):
    saved = tmp_path / "saved"
    first = load(payload, tmp_path / "first", saved)
    check(first)
    weights = [load_file(folder / "model.safetensors") for folder in (payload, saved)]
    assert weights[0].keys() == weights[1].keys()
    moved = shutil.move(saved, tmp_path / "moved elsewhere")
    second = load(moved, tmp_path / "second")
    check(second)
    assert second["answer"] == first["answer"]


@pytest.mark.parametrize("triton", ["present", "blocked"])
def test_payload_loads_from_an_offline_hub_cache(hub_home, triton):
    blocked = {"BLOCK_TRITON": "1"} if triton == "blocked" else {}
    result = load("someone/tiny-videonsa", hub_home, **blocked)
    check(result)
    if triton == "blocked":
        assert not result["triton"]


@pytest.mark.parametrize("form", [".", "./", "../{name}", "{path}/", "Path"])
def test_a_clone_loads_however_it_is_named(form, monkeypatch):
    monkeypatch.chdir(ROOT)
    named = form.format(name=ROOT.name, path=ROOT)
    source = ROOT if form == "Path" else named
    model = AutoModelForImageTextToText.from_pretrained(source, trust_remote_code=True)
    assert type(model).__name__ == "VideoNSAForConditionalGeneration"


def test_hub_style_keys_load_without_a_random_weight(payload, tmp_path):
    """Qwen2.5-VL's published checkpoints name their weights `visual.*` and `model.*`."""
    from safetensors.torch import save_file

    folder = shutil.copytree(payload, tmp_path / "hub keys")
    weights = load_file(folder / "model.safetensors")
    renamed = {
        name.replace("model.visual", "visual").replace("model.language_model", "model"): tensor
        for name, tensor in weights.items()
    }
    assert renamed.keys() != weights.keys()
    save_file(renamed, folder / "model.safetensors", metadata={"format": "pt"})
    model, info = AutoModelForImageTextToText.from_pretrained(
        folder, trust_remote_code=True, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    for name, tensor in weights.items():
        assert torch.equal(model.state_dict()[name].to(tensor.dtype), tensor), name


def test_without_remote_code_it_does_not_load(payload):
    """Under Qwen2.5-VL's model_type it would load as the dense model, without a word."""
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        AutoModelForImageTextToText.from_pretrained(payload, trust_remote_code=False)


def test_the_loader_finds_every_file_of_the_model():
    """It copies what it reaches from the files named in `auto_map` by `from .name import`."""
    reached = {"modeling_videonsa.py", "processing_videonsa.py"}
    for start in sorted(reached):
        reached |= {Path(name).name for name in get_relative_import_files(ROOT / start)}
    assert reached == {path.name for path in MODEL_FILES}


@pytest.mark.parametrize("path", MODEL_FILES, ids=lambda path: path.name)
def test_files_of_the_model_need_nothing_unusual(path):
    assert set(get_imports(path)) - sys.stdlib_module_names <= SHIPPED_IMPORTS
