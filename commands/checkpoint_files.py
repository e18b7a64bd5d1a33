"""What a checkpoint carries: exactly what loading it needs, and nothing that runs it.

The converter, the Trainer's saves, every push to the Hub and tools/publish.py go by these lists and
functions. Commands (ask.py, finetune.py, ...) live in the repository, which is published whole, and
take the checkpoint by --model. The card of a checkpoint is written by commands/model_card.py.
"""

import json
import shutil
import subprocess
from pathlib import Path

from huggingface_hub import HfApi

from commands import ROOT

PROCESSOR_CODE = (
    "processing_videonsa.py",
    "placeholders_videonsa.py",
    "planned_video_videonsa.py",
    "message_parts_videonsa.py",
    "pictures_videonsa.py",
    "video_plan_videonsa.py",
    "video_settings_videonsa.py",
    "video_reader_videonsa.py",
    "video_readers_videonsa.py",
    "video_packets_videonsa.py",
    "video_source_videonsa.py",
    "joined_recordings_videonsa.py",
    "pixel_stream_videonsa.py",
)
# Every file of code that `trust_remote_code` reaches, and the packages it needs.
CODE_FILES = (
    "configuration_videonsa.py",
    "modeling_videonsa.py",
    "attention_videonsa.py",
    "packing_videonsa.py",
    "sharding_videonsa.py",
    "positions_videonsa.py",
    "media_features_videonsa.py",
    "memory_videonsa.py",
    "call_checks_videonsa.py",
    "generation_videonsa.py",
    "decoding_videonsa.py",
    "cache_videonsa.py",
    "library_videonsa.py",
    "float8_videonsa.py",
    "fused_videonsa.py",
    "vision_videonsa.py",
    "nsa_reference.py",
    "nsa_released.py",
    "nsa_checks.py",
    "nsa_rules.py",
    "nsa_kernels.py",
    "nsa_kernels_choice.py",
    "nsa_kernels_compressed.py",
    "nsa_kernels_decode.py",
    "nsa_kernels_dense.py",
    "nsa_kernels_primitives.py",
    "nsa_kernels_selected.py",
    "nsa_kernels_tiles.py",
    "nsa_kernels_window.py",
    *PROCESSOR_CODE,
    "requirements.txt",
)
REQUIRED_FILES = (*CODE_FILES, "config.json", "generation_config.json", "README.md")
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "merges.txt", "added_tokens.json")
# Patterns of all that a checkpoint may carry, in the Hub's usual names, and what the card of the
# repository's own checkpoint shows.
CHECKPOINT_FILES = (
    *REQUIRED_FILES,
    "docs/attention.png",
    "docs/branches.png",
    "docs/speed.png",
    "LICENSE",
    SINGLE,
    "model-*.safetensors",
    INDEX,
    *TOKENIZER_FILES,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
)
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# An adapter carries these: the code of the processor, not its base's code, config and weights.
ADAPTER_FILES = (
    "README.md",
    "LICENSE",
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    *PROCESSOR_CODE,
    *CHECKPOINT_FILES[CHECKPOINT_FILES.index("tokenizer.json") :],
)


# Patterns of all that the repository itself has: what README.md names is there with it.
REPOSITORY_FILES = (
    *CHECKPOINT_FILES,
    "*.py",
    "*.md",
    "requirements*.txt",
    "constraints*.txt",
    "pyproject.toml",
    ".gitignore",
    ".ci/*",
    *(f"{folder}/**/*" for folder in ("benchmarks", "commands", "docs", "examples", "tests")),
    "tools/**/*",
    # Not what installing leaves beside them.
    "serving/*",
    "serving/cpu/pyproject.toml",
    *(f"serving/{folder}/*.py" for folder in ("videonsa_serving", "tests", "cpu/*")),
)


def repository_files() -> list[str]:
    """Names of the files of this repository, as it is published.

    Raises ValueError in a git clone for files that git does not have: drafts are not published.
    """
    listed_files(ROOT)  # what loading needs is there, and of one layout
    paths = {path for one in REPOSITORY_FILES for path in ROOT.glob(one) if path.is_file()}
    names = sorted(path.relative_to(ROOT).as_posix() for path in paths)
    names = [name for name in names if "__pycache__" not in name]
    if (ROOT / ".git").exists():
        shown = subprocess.run(
            ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
        )
        if unknown := sorted(set(names) - set(shown.stdout.split("\0"))):
            raise ValueError(
                f"git does not have {', '.join(unknown)}, which would be published: commit or "
                "move them."
            )
    return names


def copy_code(folder: str | Path):
    """Copy this repository's CODE_FILES to `folder`, over what it has of them."""
    for name in CODE_FILES:
        shutil.copyfile(ROOT / name, Path(folder) / name)


def listed_files(folder: str | Path) -> list[str]:
    """Names of the files that travel of the checkpoint or adapter in `folder`, in the lists' order.

    Raises FileNotFoundError where one is missing that loading needs, and ValueError where one is a
    link to nothing or out of the folder, where weights of two layouts lie in it, or an adapter lies
    beside the whole weights: loading would apply it to them once more.
    """
    folder = Path(folder)
    is_adapter = (folder / ADAPTER_CONFIG).exists()
    if is_adapter and any(folder.glob("model*.safetensors")):
        raise ValueError(
            f"{folder} holds an adapter beside whole weights, and loading would apply it to them. "
            f"Move its {ADAPTER_CONFIG} and {ADAPTER_WEIGHTS} to another folder."
        )
    patterns = ADAPTER_FILES if is_adapter else CHECKPOINT_FILES
    # glob passes over a link to nothing, so a name without a match is looked at as it is.
    found = [p for one in patterns for p in sorted(folder.glob(one)) or [folder / one]]
    for path in (*found, *(path.parent for path in found)):
        if path.is_symlink() and not path.exists():
            raise ValueError(
                f"{path} is a link to {path.readlink()}, which does not exist. Put the file itself "
                "there, or delete the link."
            )
    required = (ADAPTER_WEIGHTS, "README.md") if is_adapter else REQUIRED_FILES
    absent = [name for name in required if not (folder / name).is_file()]
    if absent:
        raise FileNotFoundError(f"{folder} lacks {', '.join(absent)}, which users of it need.")
    names = [path.relative_to(folder).as_posix() for path in found if path.is_file()]
    for name in names:
        file_inside(folder, name)
    if not is_adapter:
        check_weights(folder, names)
    return names


def check_weights(folder: Path, names: list[str]):
    """Raises unless the weight files among `names` are all those of one layout, and no others.

    The layout is what INDEX names, or SINGLE without it. FileNotFoundError where some are absent;
    ValueError where others lie beside them: loading reads SINGLE before INDEX, and nothing else.
    """
    source = f"its {INDEX} names" if INDEX in names else f"it needs without {INDEX}"
    wanted = indexed_files(folder / INDEX) if INDEX in names else {SINGLE}
    present = {name for name in names if name.endswith(".safetensors")}
    absent, others = sorted(wanted - present), sorted(present - wanted)
    if absent and not others:
        raise FileNotFoundError(f"{folder} lacks {', '.join(absent)}, which {source}.")
    if others:
        raise ValueError(
            f"{folder} holds {', '.join(others)} besides the weights that {source} "
            f"({', '.join(sorted(wanted))}). Keep the files of one layout: {SINGLE} alone, or "
            "shards with the index that names them."
        )


def indexed_files(index: Path) -> set[str]:
    """Names of the weight files that an INDEX names; ValueError where it names none."""
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8-sig"))["weight_map"]
        return {str(name) for name in weight_map.values()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{index} has no weight_map of keys to files: fetch it or make it again."
        ) from error


def file_inside(folder: str | Path, name: str) -> Path:
    """The path of the file `name` of `folder`; ValueError where it lies outside of the folder.

    Links are followed: who made the folder may not be who publishes or converts it. In the Hub's
    cache a checkpoint's files are links to the blobs of its repository, which count as inside.
    """
    folder = Path(folder).resolve()
    path = (folder / name).resolve()
    homes = [folder]
    if folder.parent.name == "snapshots":
        homes.append(folder.parents[1] / "blobs")
    if not any(path.is_relative_to(home) for home in homes):
        raise ValueError(
            f"{name} of {folder} leads to {path}, outside of that folder, and is not read. If it "
            "belongs to the checkpoint, put the file itself there."
        )
    return folder / name


def upload(
    folder: str | Path,
    repo_id: str,
    names: list[str],
    message: str,
    private: bool | None = None,
    *,
    token: str | None = None,
    revision: str | None = None,
):
    """Send the files `names` of `folder` to the repository `repo_id` of the Hub, as one commit.

    The repository is made if it is absent. Files of a checkpoint or an adapter that it has from
    before and that are not in `names`, such as shards of an earlier split, are deleted in the same
    commit; where `folder` is this repository, all of its files.
    """
    own = REPOSITORY_FILES if Path(folder) == ROOT else CHECKPOINT_FILES
    api = HfApi()
    api.create_repo(repo_id, private=private, exist_ok=True, token=token)
    api.upload_folder(
        repo_id=repo_id,
        folder_path=folder,
        allow_patterns=names,
        delete_patterns=[*own, ADAPTER_CONFIG, ADAPTER_WEIGHTS],
        commit_message=message,
        token=token,
        revision=revision,
    )
