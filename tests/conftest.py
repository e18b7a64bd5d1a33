"""Keeps the tests to themselves and to one thread a worker, and skips GPU tests."""

import os
import signal
import tempfile
import warnings
from pathlib import Path

import pytest
import torch
from PIL import Image

# One thread a worker: workers share the cores, and the same run gives the same bits.
os.environ["OMP_NUM_THREADS"] = "1"  # of processes that tests start
torch.set_num_threads(1)

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported: kernels run on the CPU

# Before transformers reads them: no test downloads, and none leaves code in the user's cache.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
modules_cache = tempfile.TemporaryDirectory(prefix="videonsa-modules-")
os.environ["HF_MODULES_CACHE"] = modules_cache.name


from transformers import AutoModelForImageTextToText, AutoProcessor  # noqa: E402

from paths import ROOT  # noqa: E402


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture
def opened(monkeypatch):
    """The names of the video files that are opened from here on, as often as each is."""
    import av  # here, so that tests without files of videos run where it is not installed

    names, open_file = [], av.open

    def counting(file, *args, **kwargs):
        names.append(Path(file).name)
        return open_file(file, *args, **kwargs)

    monkeypatch.setattr(av, "open", counting)
    return names


# For the tests of the model.


@pytest.fixture
def prompts():
    from tiny import Prompts

    return Prompts()


# For the tests of kernels.


@pytest.fixture(scope="session")
def quick_interpreter():
    """Let the interpreter prepare its language once per module, not at each call of a helper."""
    if torch.cuda.is_available():
        yield
        return
    from triton.runtime import interpreter

    prepared, slow = set(), interpreter.InterpretedFunction.__call__

    def call(self, *args, **kwargs):
        if id(self.fn.__globals__) not in prepared:
            prepared.add(id(self.fn.__globals__))
            return slow(self, *args, **kwargs)
        return self.rewrite()(*args, **kwargs)

    interpreter.InterpretedFunction.__call__ = call
    yield
    interpreter.InterpretedFunction.__call__ = slow


@pytest.fixture
def unwritten_memory_is_nan():
    torch.use_deterministic_algorithms(True, warn_only=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def heeding_sigint():
    """SIGINT interrupts, also where these tests were started with it ignored (nohup)."""
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, previous)


# For the tests of fine-tuning, which share finetuning.py.


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with two clips of 4 s, their questions in clips.jsonl, some with new_kind.jsonl."""
    import finetuning
    import make_clips

    folder = tmp_path_factory.mktemp("data")
    finetuning.write_clips(folder, "new_kind.jsonl", make_clips.NEW_KINDS)
    finetuning.write_clips(folder, "clips.jsonl", make_clips.KINDS)
    Image.new("RGB", (120, 90), "red").save(folder / "red.png")
    return folder


@pytest.fixture(scope="module")
def processor():
    return AutoProcessor.from_pretrained(ROOT, trust_remote_code=True)


@pytest.fixture(scope="module")
def model():
    return AutoModelForImageTextToText.from_pretrained(
        ROOT, trust_remote_code=True, dtype=torch.float32
    )


@pytest.fixture
def batch(processor, model, folder):
    """Two conversations of different lengths, the second text alone."""
    from commands.finetuning_data import Collator, Conversations
    from finetuning import ROW, TEXT_ROW, write_rows

    write_rows(folder / "two.jsonl", [ROW, TEXT_ROW])
    data = Conversations([str(folder / "two.jsonl")], processor)
    return Collator(processor, model.config)([data[0], data[1]])
