"""Publish a checkpoint folder on the Hub: only the listed files, checked first, as one commit.

    python tools/publish.py --dry-run
    python tools/publish.py --copy ../hub
    python tools/publish.py --model ../VideoNSA-7B --repo-id me/VideoNSA-7B --private
    python tools/publish.py --model out/tuned --repo-id me/tuned --scores out/evaluation/tuned
    python tools/publish.py --model out/lora --repo-id me/lora --base me/VideoNSA-7B

commands/checkpoint_files.py lists what goes to the Hub: of a checkpoint what loading it needs, of
the repository itself everything. --copy writes that to a folder in place of the Hub. Before it is
sent, the files that loading needs are loaded alone, from a folder and from a Hub cache, as users
have them: config, processor, and every key and shape of the model (on the meta device, so that a
large one needs no memory). Of an adapter, every key and shape is compared with those that its base
takes.

The card that is sent names the checkpoint by --repo-id, and an adapter's base by --base; --scores
adds those of evaluation.py's manifests. The folder itself stays as it is.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from huggingface_hub.errors import HTTPError
from videonsa import ROOT

from commands.checkpoint_files import ADAPTER_CONFIG, listed_files, repository_files, upload
from commands.model_card import HUB_ID, add_scores, read_scores, rename_card

LOAD = """
import sys
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

for name in sys.argv[1:]:
    config = AutoConfig.from_pretrained(name, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(name, trust_remote_code=True)
    if not processor.chat_template:
        sys.exit("the processor has no chat template")
    # Quantised weights are put together from several tensors, which are not there on "meta".
    device = "auto" if getattr(config, "quantization_config", None) else "meta"
    model, info = AutoModelForImageTextToText.from_pretrained(
        name, trust_remote_code=True, device_map=device, output_loading_info=True
    )
    faults = {fault: sorted(map(str, keys)) for fault, keys in info.items() if keys}
    if faults:
        sys.exit(str(faults))
"""
LOAD_ADAPTER = """
import sys
import torch
from peft import PeftConfig, get_peft_model, get_peft_model_state_dict
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

adapter, base = sys.argv[1:]
AutoProcessor.from_pretrained(adapter, trust_remote_code=True)
settings = PeftConfig.from_pretrained(adapter)
config = AutoConfig.from_pretrained(base, revision=settings.revision, trust_remote_code=True)
if config.model_type != "videonsa":
    sys.exit(f"its base {base} is a {config.model_type}, not a VideoNSA")
with torch.device("meta"):
    model = AutoModelForImageTextToText.from_config(config, trust_remote_code=True)
wanted = get_peft_model_state_dict(get_peft_model(model, settings))
wanted = {name: list(weight.shape) for name, weight in wanted.items()}
with safe_open(f"{adapter}/adapter_model.safetensors", "pt") as file:
    given = {name: file.get_slice(name).get_shape() for name in file.keys()}
if faults := sorted(str(one) for one in wanted.keys() | given.keys()
                    if wanted.get(one) != given.get(one)):
    sys.exit(f"it does not fit its base {base}: {faults}")
"""


def check_adapter_fits(folder, base):
    """Raise ValueError unless the adapter in `folder` has the weights that `base` takes."""
    with tempfile.TemporaryDirectory() as modules:
        result = subprocess.run(
            [sys.executable, "-c", LOAD_ADAPTER, str(folder), base],
            env={**os.environ, "HF_MODULES_CACHE": modules},
            capture_output=True,
            text=True,
        )
    if result.returncode:
        raise ValueError(f"the adapter does not load:\n{result.stderr.strip()}")


def check_loads(model, names):
    """Raise ValueError unless the files `names` of `model`, and no others, load by themselves."""
    with tempfile.TemporaryDirectory() as place:
        place = Path(place)
        snapshot = place / "hub/models--local--model/snapshots" / ("0" * 40)
        snapshot.mkdir(parents=True)
        (place / "hub/models--local--model/refs").mkdir()
        (place / "hub/models--local--model/refs/main").write_text("0" * 40)
        for name in names:
            (snapshot / name).parent.mkdir(exist_ok=True)
            if name.endswith(".safetensors"):
                (snapshot / name).symlink_to((model / name).resolve())
            else:
                shutil.copyfile(model / name, snapshot / name)
        result = subprocess.run(
            [sys.executable, "-c", LOAD, str(snapshot), "local/model"],
            cwd=place,
            env={
                **os.environ,
                "HF_HUB_CACHE": str(place / "hub"),
                "HF_MODULES_CACHE": str(place / "modules"),
                "HF_HUB_OFFLINE": "1",
            },
            capture_output=True,
            text=True,
        )
    if result.returncode:
        raise ValueError(f"{model} does not load by itself:\n{result.stderr.strip()}")


def find_base(model, base):
    """What an adapter's base is loaded by on the Hub; None where `model` is no adapter."""
    if not (model / ADAPTER_CONFIG).exists():
        if base is not None:
            raise ValueError(f"--base {base} is of an adapter, and {model} is a whole checkpoint.")
        return None
    own = json.loads((model / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    base = base or own.get("base_model_name_or_path") or ""
    if Path(base).exists() or not HUB_ID.fullmatch(base):
        raise ValueError(
            f"{model} is an adapter of {base or 'nothing named'}, which only this machine has. "
            f"Publish that first (python tools/publish.py --model {base or 'BASE'} --repo-id "
            "YOU/BASE), then give --base YOU/BASE."
        )
    return base


def stage(model, names, folder, *, repo_id, base, scores):
    """Puts what is sent into `folder`: the files `names`, the card with the names of the Hub."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(".safetensors"):
            (folder / name).symlink_to((model / name).resolve())
        else:
            shutil.copyfile(model / name, folder / name)
    card = (model / "README.md").read_text(encoding="utf-8")
    for manifest in scores:
        of, found = read_scores(manifest)
        if Path(of).resolve() != model and of != repo_id:
            raise ValueError(f"{manifest} has scores of {of}, not of {model}.")
        card = add_scores(card, found)
    if repo_id is not None:
        card = rename_card(card, repo_id, base)
    (folder / "README.md").write_text(card, encoding="utf-8")
    if base is not None:
        own = json.loads((model / ADAPTER_CONFIG).read_text(encoding="utf-8"))
        if base != own["base_model_name_or_path"]:  # a revision of the other says nothing of it
            own |= {"base_model_name_or_path": base, "revision": None}
        (folder / ADAPTER_CONFIG).write_text(json.dumps(own, indent=2) + "\n", encoding="utf-8")


def find_manifests(paths):
    """The manifests of evaluation.py among files and folders."""
    found = []
    for path in map(Path, paths):
        found += sorted(path.rglob("*_manifest_*.json")) if path.is_dir() else [path]
        if not found or not found[-1].is_file():
            raise ValueError(f"--scores {path}: there is no manifest of evaluation.py.")
    return found


def publish(model, repo_id=None, *, base=None, scores=(), private=False, dry_run=False, copy=None):
    """List, check and, unless `dry_run`, upload the folder `model`; return the listed names.

    copy: a new folder that the files are copied to, and not uploaded.
    """
    model = Path(model).resolve()
    if not model.is_dir():
        raise ValueError(f"there is no folder {model}.")
    needed = listed_files(model)
    names = repository_files() if model == ROOT else needed
    base, manifests = find_base(model, base), find_manifests(scores)
    if scores and model == ROOT:
        raise ValueError("--scores are of a checkpoint; the repository's own card has its own.")
    sizes = [(model / name).stat().st_size for name in names]
    for name, size in zip(names, sizes, strict=True):
        print(f"{size:>15,}  {name}")
    print(f"{sum(sizes):>15,}  bytes in {len(names)} files")
    with tempfile.TemporaryDirectory() as place:
        folder = model
        if model != ROOT:  # whose card is written by hand
            folder = Path(place, model.name)
            stage(model, names, folder, repo_id=repo_id, base=base, scores=manifests)
        if base is None:
            check_loads(folder, needed)
            print("These files load by themselves.")
        else:
            check_adapter_fits(folder, base)
            print(f"This adapter loads on {base}.")
        if copy is not None:
            for name in names:
                (copy / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(folder / name, copy / name)
            print(f"Copied to {copy}.")
        elif not dry_run:
            upload(folder, repo_id, names, f"Publish {model.name}", private)
            print(f"Published to {repo_id}.")
    return names


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, default=ROOT, help="folder (default: the repository)")
    parser.add_argument("--repo-id", help="repository on the Hub, owner/name; made if it is absent")
    parser.add_argument("--base", metavar="ID", help="the Hub's id of an adapter's base")
    parser.add_argument(
        "--scores", nargs="+", default=(), metavar="PATH", help="manifests of evaluation.py"
    )
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    parser.add_argument("--dry-run", action="store_true", help="list and check only")
    parser.add_argument("--copy", type=Path, metavar="FOLDER", help="copy to a new folder instead")
    options = parser.parse_args(arguments)
    if not options.dry_run and not options.repo_id and options.copy is None:
        parser.error("--repo-id is needed, or --dry-run or --copy")
    if options.copy is not None and options.copy.exists():
        parser.error(f"--copy {options.copy} exists; name a new folder")
    try:
        publish(**vars(options))
    except (ValueError, OSError) as error:  # the Hub's refusals, too
        print(f"publish: {error}", file=sys.stderr)
        return 2
    except HTTPError as error:
        print(
            f"publish: the Hub cannot be reached ({error}): try again when it can",
            file=sys.stderr,
        )
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
