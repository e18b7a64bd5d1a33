"""Makes the flat files at the root importable as the package `videonsa`, and skips GPU tests."""

import os
import sys
import types
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers reads it: no test downloads

ROOT = Path(__file__).parents[1]

package = types.ModuleType("videonsa")
package.__path__ = [str(ROOT)]
sys.modules["videonsa"] = package


def pytest_collection_modifyitems(items):
    import torch

    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
