"""Publish a checkpoint folder on the Hub: only the listed files, checked first, as one commit.

    python tools/publish.py --dry-run
    python tools/publish.py --copy ../hub
    python tools/publish.py --model ../VideoNSA-7B --repo-id me/VideoNSA-7B --private

commands/checkpoint_files.py lists what goes to the Hub: of a checkpoint what loading it needs, of
the repository itself everything. --copy writes that to a folder in place of the Hub. Before it is
sent, the files that loading needs are loaded alone, from a folder and from a Hub cache, as users
have them: config, processor, and every key and shape of the model (on the meta device, so that a
large one needs no memory).
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from videonsa import ROOT

from commands.checkpoint_files import ADAPTER_CONFIG, listed_files, repository_files, upload

LOAD = """
import sys
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

for name in sys.argv[1:]:
    AutoConfig.from_pretrained(name, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(name, trust_remote_code=True)
    if not processor.chat_template:
        sys.exit("the processor has no chat template")
    model, info = AutoModelForImageTextToText.from_pretrained(
        name, trust_remote_code=True, device_map="meta", output_loading_info=True
    )
    faults = {fault: sorted(map(str, keys)) for fault, keys in info.items() if keys}
    if faults:
        sys.exit(str(faults))
"""


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


def publish(model, repo_id=None, *, private=False, dry_run=False, copy=None):
    """List, check and, unless `dry_run`, upload the folder `model`; return the listed names.

    copy: a new folder that the files are copied to, and not uploaded.
    """
    model = Path(model).resolve()
    names = listed_files(model)
    if ADAPTER_CONFIG in names:
        raise ValueError(
            f"{model} is an adapter, which does not load by itself. Merge it into its base first "
            "(finetune.py's --merge_lora), or push it where it is made (its --push_to_hub)."
        )
    needed = names
    if model == ROOT:
        names = repository_files()
    sizes = [(model / name).stat().st_size for name in names]
    for name, size in zip(names, sizes, strict=True):
        print(f"{size:>15,}  {name}")
    print(f"{sum(sizes):>15,}  bytes in {len(names)} files")
    check_loads(model, needed)
    print("These files load by themselves.")
    if copy is not None:
        for name in names:
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(model / name, copy / name)
        print(f"Copied to {copy}.")
    elif not dry_run:
        upload(model, repo_id, names, f"Publish {model.name}", private)
        print(f"Published to {repo_id}.")
    return names


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, default=ROOT, help="folder (default: the repository)")
    parser.add_argument("--repo-id", help="repository on the Hub, owner/name; made if it is absent")
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
    except (ValueError, OSError) as error:
        print(f"publish: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
