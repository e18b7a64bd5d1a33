"""What a checkpoint carries: exactly what loading it needs, and nothing that runs it.

The converter, the Trainer's saves, every push to the Hub and tools/publish.py go by these lists and
functions. Commands (ask.py, finetune.py, ...) live in the repository and take the checkpoint by
--model. The card of a checkpoint is written by commands/model_card.py.
"""

import shutil
from pathlib import Path

from huggingface_hub import HfApi

from commands import ROOT

# Every file of code that `trust_remote_code` reaches, and the packages it needs.
CODE_FILES = (
    "configuration_videonsa.py",
    "modeling_videonsa.py",
    "packing_videonsa.py",
    "positions_videonsa.py",
    "prefill_videonsa.py",
    "generation_videonsa.py",
    "library_videonsa.py",
    "fused_videonsa.py",
    "vision_videonsa.py",
    "nsa_reference.py",
    "nsa_kernels.py",
    "nsa_kernels_choice.py",
    "nsa_kernels_compressed.py",
    "nsa_kernels_dense.py",
    "nsa_kernels_primitives.py",
    "nsa_kernels_selected.py",
    "nsa_kernels_tiles.py",
    "nsa_kernels_window.py",
    "processing_videonsa.py",
    "planned_video_videonsa.py",
    "video_plan_videonsa.py",
    "video_reader_videonsa.py",
    "pixel_stream_videonsa.py",
    "requirements.txt",
)
REQUIRED_FILES = (*CODE_FILES, "config.json", "generation_config.json", "README.md")
TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "merges.txt", "added_tokens.json")
# Patterns of all that a checkpoint may carry, in the Hub's usual names, and what the card of the
# repository's own checkpoint shows.
CHECKPOINT_FILES = (
    *REQUIRED_FILES,
    "docs/branches.png",
    "docs/speed.png",
    "LICENSE",
    "model.safetensors",
    "model-*.safetensors",
    "model.safetensors.index.json",
    *TOKENIZER_FILES,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
)
# An adapter carries these in place of its base's code, config and weights.
ADAPTER_FILES = (
    "README.md",
    "adapter_config.json",
    "adapter_model.safetensors",
    *CHECKPOINT_FILES[CHECKPOINT_FILES.index("tokenizer.json") :],
)


def copy_code(folder: str | Path):
    """Copy this repository's CODE_FILES to `folder`, over what it has of them."""
    for name in CODE_FILES:
        shutil.copyfile(ROOT / name, Path(folder) / name)


def listed_files(folder: str | Path) -> list[str]:
    """Names of the files of the checkpoint `folder` that travel, in CHECKPOINT_FILES' order.

    Raises FileNotFoundError where one is missing that loading needs, and ValueError where an
    adapter lies beside the whole weights: loading would apply it to them once more.
    """
    folder = Path(folder)
    absent = [name for name in REQUIRED_FILES if not (folder / name).is_file()]
    if absent:
        raise FileNotFoundError(f"{folder} lacks {', '.join(absent)}, which users of it need.")
    if (folder / "adapter_config.json").exists():
        raise ValueError(
            f"{folder} holds an adapter beside whole weights, and loading would apply it to them. "
            "Move its adapter_config.json and adapter_model.safetensors to another folder."
        )
    found = [path for pattern in CHECKPOINT_FILES for path in sorted(folder.glob(pattern))]
    return [path.relative_to(folder).as_posix() for path in found if path.is_file()]


def upload(
    folder: str | Path, repo_id: str, names: list[str], message: str, private: bool | None = None
):
    """Send the files `names` of `folder` to the repository `repo_id` of the Hub, as one commit.

    The repository is made if it is absent. CHECKPOINT_FILES that it has from before and that are
    not in `names`, such as shards of an earlier split, are deleted in the same commit.
    """
    api = HfApi()
    api.create_repo(repo_id, private=private, exist_ok=True)
    api.upload_folder(
        repo_id=repo_id,
        folder_path=folder,
        allow_patterns=names,
        delete_patterns=list(CHECKPOINT_FILES),
        commit_message=message,
    )
