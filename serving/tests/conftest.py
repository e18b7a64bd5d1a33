"""The checkpoint to serve, the engines that serve it, and what they are held to: it in float64.

Run in an environment of serving/make_cpu_environment.sh: python -m pytest serving/tests
"""

import contextlib
import os
import shutil
import tempfile

import pytest

pytest.importorskip("vllm")

os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine in this process, where tests can look
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}
modules_cache = tempfile.TemporaryDirectory(prefix="videonsa-modules-")
os.environ["HF_MODULES_CACHE"] = modules_cache.name

import torch  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from vllm import LLM  # noqa: E402
from vllm.distributed.parallel_state import cleanup_dist_env_and_memory  # noqa: E402

from engines import OPTIONS, Reference, worst_of  # noqa: E402
from widen_checkpoint import widen  # noqa: E402


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """The wide checkpoint, which answers right, and is sharper than float32 on odd pictures."""
    folder = tmp_path_factory.mktemp("trained")
    widen(folder)
    return str(folder)


@pytest.fixture(scope="session")
def checkpoint(trained, tmp_path_factory):
    """It with random weights, whose float32 is near its float64 whatever it is asked."""
    folder = tmp_path_factory.mktemp("random")
    shutil.copytree(trained, folder, dirs_exist_ok=True)
    weights, generator = load_file(folder / "model.safetensors"), torch.Generator().manual_seed(0)
    for weight in weights.values():
        if weight.ndim > 1:
            weight.normal_(std=0.06, generator=generator)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)


@pytest.fixture(scope="session")
def engine(checkpoint):
    """Start an engine: `with engine(**options) as llm`."""

    @contextlib.contextmanager
    def start(**options):
        llm = LLM(**{"model": checkpoint} | OPTIONS | options)
        try:
            yield llm
        finally:
            llm.llm_engine.engine_core.shutdown()
            del llm
            cleanup_dist_env_and_memory()

    return start


@pytest.fixture(scope="session")
def reference(checkpoint):
    return Reference(checkpoint)


@pytest.fixture(scope="session")
def reference_of_trained(trained):
    return Reference(trained)


def pytest_terminal_summary(terminalreporter):
    terminalreporter.write_line("largest difference of a log-probability:")
    for name, worst in worst_of.items():
        terminalreporter.write_line(f"{worst:.1e} {name}")
