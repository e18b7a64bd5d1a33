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
from transformers import AutoModelForImageTextToText, AutoProcessor  # noqa: E402
from vllm import LLM, SamplingParams  # noqa: E402
from vllm.distributed.parallel_state import cleanup_dist_env_and_memory  # noqa: E402

from widen_checkpoint import widen  # noqa: E402

TOLERANCE = 1e-5  # of a log-probability, float32 against float64
worst_of = {}  # of each test, printed at the end for docs/serving.md
OPTIONS = {
    "trust_remote_code": True,
    "dtype": "float32",
    "enforce_eager": True,
    "max_model_len": 2048,
    "max_num_seqs": 8,
    "limit_mm_per_prompt": {"video": 3, "image": 3},
    "skip_mm_profiling": True,
    "disable_log_stats": True,
    "allowed_local_media_path": "/",
}


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
        llm = LLM(checkpoint, **OPTIONS | options)
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


class Reference:
    """The checkpoint as transformers runs it, in float64."""

    def __init__(self, folder):
        self.model = AutoModelForImageTextToText.from_pretrained(
            folder, trust_remote_code=True, dtype=torch.float64
        )
        self.processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)

    def check(self, output, messages, **settings):
        """The prompt of an engine's output, its greedy tokens and their log-probabilities."""
        inputs = self.processor.apply_chat_template(
            messages,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            **settings,
        )
        prompt = inputs["input_ids"][0].tolist()
        assert output.prompt_token_ids == prompt
        answer = output.outputs[0]
        inputs["input_ids"] = torch.tensor([prompt + list(answer.token_ids[:-1])])
        # The placeholders of the prompt are all that there are.
        length = inputs["input_ids"].shape[1]
        inputs["attention_mask"] = torch.ones(1, length, dtype=torch.long)
        kinds = torch.zeros(1, length, dtype=inputs["mm_token_type_ids"].dtype)
        kinds[:, : len(prompt)] = inputs["mm_token_type_ids"]
        inputs["mm_token_type_ids"] = kinds
        with torch.no_grad():
            logits = self.model(**inputs).logits[0, len(prompt) - 1 :].log_softmax(-1)
        assert list(answer.token_ids) == logits.argmax(-1).tolist()
        given = [
            step[token].logprob
            for step, token in zip(answer.logprobs, answer.token_ids, strict=True)
        ]
        expected = logits[torch.arange(len(given)), torch.tensor(answer.token_ids)]
        worst = (torch.tensor(given, dtype=torch.float64) - expected).abs().max().item()
        name = os.environ["PYTEST_CURRENT_TEST"].partition("::")[2].removesuffix(" (call)")
        worst_of[name] = max(worst, worst_of.get(name, 0.0))
        assert worst < TOLERANCE


def greedy(tokens=6):
    return SamplingParams(max_tokens=tokens, temperature=0, logprobs=0, ignore_eos=True)


def pytest_terminal_summary(terminalreporter):
    terminalreporter.write_line("largest difference of a log-probability:")
    for name, worst in worst_of.items():
        terminalreporter.write_line(f"{worst:.1e} {name}")
