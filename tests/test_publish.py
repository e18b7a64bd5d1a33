"""What goes to the Hub loads by itself, and nothing else goes."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from huggingface_hub.errors import HTTPError
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file, save_file
from transformers.dynamic_module_utils import get_relative_import_files

import publish
from commands import checkpoint_files
from commands.checkpoint_files import CODE_FILES
from paths import ROOT


@pytest.fixture
def model(tmp_path):
    """The repository's listed files, with clutter beside them that must stay at home."""
    folder = tmp_path / "model"
    folder.mkdir()
    for name in checkpoint_files.listed_files(ROOT):
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    for clutter in ("tests/test_it.py", "docs/README.md", "examples/clips/a.mp4", ".git/config"):
        (folder / clutter).parent.mkdir(parents=True, exist_ok=True)
        (folder / clutter).touch()
    for clutter in ("conversion.json", "optimizer.pt", ".env", "model.safetensors.tmp", "notes.md"):
        (folder / clutter).touch()
    return folder


class Api:
    """Stands in for HfApi: keeps what it was asked, applying the patterns as the Hub's client."""

    calls = []

    def create_repo(self, repo_id, *, private, exist_ok, **access):
        self.calls.append(("create_repo", repo_id, private, exist_ok))

    def upload_folder(
        self, *, repo_id, folder_path, allow_patterns, delete_patterns, commit_message, **access
    ):
        files = [p.relative_to(folder_path).as_posix() for p in folder_path.rglob("*")]
        sent = set(filter_repo_objects(files, allow_patterns=allow_patterns))
        remote = ["README.md", "model-00001-of-00002.safetensors", "adapter_config.json"]
        remote += [".gitattributes", "my.md"]
        deleted = set(filter_repo_objects(remote, allow_patterns=delete_patterns)) - sent
        self.calls.append(("upload_folder", repo_id, sent, deleted))


@pytest.fixture
def api(monkeypatch):
    monkeypatch.setattr(Api, "calls", [])
    monkeypatch.setattr(checkpoint_files, "HfApi", Api)
    return Api


def test_the_repository_can_be_published(api, capsys):
    assert publish.main(["--dry-run"]) == 0
    assert api.calls == []
    listing = capsys.readouterr().out
    names = {line.split()[-1] for line in listing.splitlines()}
    assert {"config.json", "model.safetensors", "modeling_videonsa.py", "README.md"} <= names
    assert f"{(ROOT / 'tokenizer.json').stat().st_size:,}" in listing
    assert set(checkpoint_files.listed_files(ROOT)) < names
    assert {"ask.py", "constraints.txt", "docs/usage.md", "examples/clips/circle.mp4"} <= names


def test_a_hub_that_is_not_reached_is_one_line(api, monkeypatch, capsys):
    def create_repo(self, repo_id, **options):
        raise HTTPError("Name or service not known")

    monkeypatch.setattr(Api, "create_repo", create_repo)
    monkeypatch.setattr(publish, "check_loads", lambda folder, names: None)
    assert publish.main(["--repo-id", "me/videonsa"]) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and "the Hub cannot be reached (Name or service" in line


def test_the_repository_is_published_whole(api, tmp_path, monkeypatch, capsys):
    """Every file that git has goes to the Hub, and with it every path that README.md names."""
    names = checkpoint_files.repository_files()
    if (ROOT / ".git").exists():
        command = ["git", "ls-files"]
        known = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        assert set(names) == set(known.stdout.splitlines())
    card = (ROOT / "README.md").read_text(encoding="utf-8")
    named = set(re.findall(r"[\w./-]+", card))
    named = {name for name in named if not name.startswith("out/")}  # what its commands write
    folders = {str(parent) for name in names for parent in Path(name).parents}
    lost = [
        name
        for name in named
        if (ROOT / name).exists() and name.strip("./") and os.path.normpath(name) not in folders
        if os.path.normpath(name) not in names
    ]
    assert lost == [] and len(named & set(names)) > 15

    monkeypatch.setattr(publish, "check_loads", lambda folder, names: None)
    assert publish.main(["--copy", str(tmp_path / "hub")]) == 0 and api.calls == []
    copied = [path for path in (tmp_path / "hub").rglob("*") if path.is_file()]
    assert {path.relative_to(tmp_path / "hub").as_posix() for path in copied} == set(names)
    with pytest.raises(SystemExit):
        publish.main(["--copy", str(tmp_path / "hub")])
    assert publish.main(["--repo-id", "me/videonsa"]) == 0
    *_, (uploaded, target, sent, deleted) = api.calls
    assert (uploaded, target) == ("upload_folder", "me/videonsa") and sent == set(names)


def test_what_git_does_not_have_is_not_published(monkeypatch):
    if not (ROOT / ".git").exists():
        pytest.skip("a copy without git")
    known = subprocess.CompletedProcess([], 0, stdout="README.md\0")
    monkeypatch.setattr(checkpoint_files.subprocess, "run", lambda *args, **options: known)
    with pytest.raises(ValueError, match=r"git does not have \.ci/.*would be published: commit or"):
        checkpoint_files.repository_files()


@pytest.mark.parametrize("name", ["configuration", "modeling", "processing"])
def test_every_file_that_the_code_imports_is_listed(name):
    imports = get_relative_import_files(str(ROOT / f"{name}_videonsa.py"))
    assert {Path(path).name for path in imports} <= set(CODE_FILES)


def test_only_listed_files_are_sent_in_one_commit(api, model, monkeypatch):
    monkeypatch.setattr(publish, "check_loads", lambda folder, names: None)
    assert publish.main(["--model", str(model), "--repo-id", "me/tiny", "--private"]) == 0
    (made, repo_id, private, exist_ok), (uploaded, target, sent, deleted) = api.calls
    assert (made, repo_id, private, exist_ok) == ("create_repo", "me/tiny", True, True)
    assert (uploaded, target) == ("upload_folder", "me/tiny")
    assert sent == set(checkpoint_files.listed_files(ROOT))
    # Of an earlier split, and of an adapter that loading would apply to these weights.
    assert deleted == {"model-00001-of-00002.safetensors", "adapter_config.json"}


def lose_a_weight(model):
    tensors = load_file(model / "model.safetensors")
    del tensors["model.language_model.norm.weight"]
    save_file(tensors, model / "model.safetensors", {"format": "pt"})


def import_what_is_not_listed(model):
    (model / "helpers.py").write_text("X = 1\n")
    path = model / "modeling_videonsa.py"
    path.write_text("from .helpers import X\n" + path.read_text())


def require_an_absent_package(model):
    """In a function of a file that another imports: only the Hub's loader minds."""
    path = model / "nsa_reference.py"
    path.write_text(path.read_text() + "\n\ndef late():\n    import no_such_package\n")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lose_a_weight, "'missing_keys': ['model.language_model.norm.weight']"),
        (import_what_is_not_listed, "helpers"),
        (require_an_absent_package, "no_such_package"),
        (
            lambda model: (model / "modeling_videonsa.py").unlink(),
            "lacks modeling_videonsa.py, which users of it need",
        ),
    ],
)
def test_what_does_not_load_by_itself_is_not_sent(api, model, damage, message, capsys):
    damage(model)
    assert publish.main(["--model", str(model), "--repo-id", "me/tiny"]) == 2
    assert message in capsys.readouterr().err
    assert api.calls == []


@pytest.mark.parametrize("name", ["README.md", "model.safetensors", "docs"])
def test_a_link_out_of_the_folder_is_not_sent(api, model, tmp_path, name, capsys):
    moved = tmp_path / "elsewhere"
    shutil.move(model / name, moved)
    (model / name).symlink_to(moved)
    assert publish.main(["--model", str(model), "--repo-id", "me/tiny"]) == 2
    assert "outside of that folder, and is not read" in capsys.readouterr().err
    assert api.calls == []


def test_a_link_inside_the_folder_is_sent(api, model, tmp_path):
    shutil.move(model / "model.safetensors", model / "weights.bin")
    (model / "model.safetensors").symlink_to("weights.bin")
    assert publish.main(["--model", str(model), "--repo-id", "me/tiny"]) == 0
    assert "model.safetensors" in api.calls[-1][2]


@pytest.mark.parametrize("name", ["README.md", "LICENSE", "docs", "model-1.safetensors"])
def test_a_link_to_nothing_is_not_sent(api, model, name, capsys):
    if (model / name).exists():
        shutil.move(model / name, model / "moved")
    (model / name).symlink_to("nowhere")
    assert publish.main(["--model", str(model), "--repo-id", "me/tiny"]) == 2
    assert f"{name} is a link to nowhere, which does not exist" in capsys.readouterr().err
    assert api.calls == []


SPLIT = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]


@pytest.mark.parametrize(
    ("weights", "indexed", "message"),
    [
        (["model.safetensors", SPLIT[0]], None, f"holds {SPLIT[0]} besides"),
        (["model.safetensors", *SPLIT], SPLIT, "holds model.safetensors besides"),
        (["model.safetensors"], SPLIT, "holds model.safetensors besides"),
        ([*SPLIT, "model-00003-of-00003.safetensors"], SPLIT, "holds model-00003-of-00003"),
        (SPLIT, None, f"holds {', '.join(SPLIT)} besides"),
        (SPLIT[:1], SPLIT, f"lacks {SPLIT[1]}, which its model.safetensors.index.json names"),
        ([], None, "lacks model.safetensors, which"),
        (SPLIT, {}, "model.safetensors.index.json has no weight_map"),
    ],
)
def test_weights_that_are_not_one_layout_are_not_sent(
    api, model, weights, indexed, message, capsys
):
    (model / "model.safetensors").unlink()
    for name in weights:
        (model / name).touch()
    if indexed is not None:
        index = {"weight_map": dict(enumerate(indexed))} if indexed else {}
        (model / "model.safetensors.index.json").write_text(json.dumps(index))
    assert publish.main(["--model", str(model), "--repo-id", "me/tiny"]) == 2
    assert message in capsys.readouterr().err
    assert api.calls == []


def test_an_index_of_the_single_file_is_sent(model):
    index = model / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "model.safetensors"}}))
    assert {index.name, "model.safetensors"} <= set(checkpoint_files.listed_files(model))


def test_an_adapter_beside_whole_weights_is_not_sent(api, model, capsys):
    """Loading the folder would apply it to weights that may have it merged already."""
    (model / "adapter_config.json").touch()
    assert publish.main(["--model", str(model), "--repo-id", "me/tiny"]) == 2
    assert "holds an adapter beside whole weights" in capsys.readouterr().err
    assert api.calls == []


def test_an_adapter_of_a_folder_is_not_sent(api, tmp_path, capsys):
    """Users of it would look for that folder on their machines."""
    for name in ("adapter_model.safetensors", "README.md"):
        (tmp_path / name).touch()
    config = {"base_model_name_or_path": str(ROOT)}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    assert publish.main(["--model", str(tmp_path), "--repo-id", "me/adapter"]) == 2
    error = capsys.readouterr().err
    assert f"is an adapter of {ROOT}, which only this machine has" in error
    assert "give --base YOU/BASE" in error
    assert api.calls == []


def test_a_base_is_of_an_adapter(api, model, capsys):
    assert publish.main(["--model", str(model), "--repo-id", "me/tiny", "--base", "me/base"]) == 2
    assert "--base me/base is of an adapter" in capsys.readouterr().err


def test_a_folder_that_is_not_there_is_named(tmp_path, capsys):
    assert publish.main(["--model", str(tmp_path / "tuned"), "--dry-run"]) == 2
    assert capsys.readouterr().err == f"publish: there is no folder {tmp_path / 'tuned'}.\n"


def test_a_target_is_asked_for(capsys):
    with pytest.raises(SystemExit, match="2"):
        publish.main([])
    assert "--repo-id is needed" in capsys.readouterr().err
