"""Package the sparse attention for other models, as Hugging Face's `kernels` library loads it.

    pip install kernels
    python tools/package_kernels.py out/gated-nsa
    python examples/gated_nsa.py

Writes a kernel repository without what is compiled beforehand ("noarch"): a build for CUDA and one
for the CPU, of the same files, because Triton compiles them where they run. They are nsa_kernels.py
with all that it imports, as they are, and tools/gated_nsa/, the functions by device and the card.
On the Hub it is a repository of type "kernel", its version a branch: v1.
"""

import argparse
import base64
import hashlib
import json
import shutil
from pathlib import Path

from transformers.dynamic_module_utils import get_relative_import_files
from videonsa import ROOT

NAME, VERSION = "gated-nsa", 1
BACKENDS = ("cuda", "cpu")
OWN = ROOT / "tools/gated_nsa"


def source_files() -> list[Path]:
    """The files of a build."""
    kernels = ROOT / "nsa_kernels.py"
    imported = sorted(map(Path, get_relative_import_files(kernels)))
    return [OWN / "__init__.py", kernels, *imported]


def metadata(backend: str, contents: dict[str, bytes]) -> dict:
    """What metadata.json says of a build with these files, by name."""
    digests = {name: hashlib.sha256(content).digest() for name, content in contents.items()}
    # The name of the module: another one for other files, so that both can be loaded.
    whole = hashlib.sha256(b"".join(digests.values())).hexdigest()
    return {
        "name": NAME,
        "id": f"_{NAME.replace('-', '_')}_{backend}_{whole[:7]}",
        "version": VERSION,
        "license": "apache-2.0",
        "python-depends": [],
        "backend": {"type": backend},
        "kernels-minver": "0.17.2",
        "digest": {
            "algorithm": "sha256",
            "files": {name: base64.b64encode(one).decode() for name, one in digests.items()},
        },
    }


def package(folder: Path) -> None:
    """Writes the repository to a new folder. Raises FileExistsError where it exists."""
    contents = {path.name: path.read_bytes() for path in source_files()}
    folder.mkdir(parents=True)
    shutil.copy(OWN / "CARD.md", folder / "README.md")
    shutil.copy(ROOT / "LICENSE", folder)
    for backend in BACKENDS:
        build = folder / "build" / f"torch-{backend}"
        build.mkdir(parents=True)
        for name, content in contents.items():
            (build / name).write_bytes(content)
        text = json.dumps(metadata(backend, contents), indent=2)
        (build / "metadata.json").write_text(f"{text}\n", encoding="utf-8")
    print(f"{folder}: {len(contents)} files for each of {', '.join(BACKENDS)}")


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="a new one")
    folder = parser.parse_args(argv).folder
    if folder.exists():
        parser.error(f"{folder} exists; name a new folder")
    package(folder)


if __name__ == "__main__":
    main()
