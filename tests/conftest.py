"""Keeps the tests to themselves and to one thread a worker, and skips GPU tests."""

import os
import tempfile
from pathlib import Path

import av
import pytest
import torch

# One thread a worker: workers share the cores, and the same run gives the same bits.
os.environ["OMP_NUM_THREADS"] = "1"  # of processes that tests start
torch.set_num_threads(1)

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported: kernels run on the CPU

# Before transformers reads them: no test downloads, and none leaves code in the user's cache.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
modules_cache = tempfile.TemporaryDirectory(prefix="videonsa-modules-")
os.environ["HF_MODULES_CACHE"] = modules_cache.name


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture
def opened(monkeypatch):
    """The names of the video files that are opened from here on, as often as each is."""
    names, open_file = [], av.open

    def counting(file, *args, **kwargs):
        names.append(Path(file).name)
        return open_file(file, *args, **kwargs)

    monkeypatch.setattr(av, "open", counting)
    return names
