"""What is not served is refused at the start, by name, before anything is loaded."""

import os

import pytest
from vllm.engine.arg_utils import EngineArgs

from engines import OPTIONS
from videonsa_serving.checkpoint import code_of_checkpoint

KV_CONNECTOR = {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}
REFUSED = {
    "pipeline_parallel_size 2: use tensor_parallel_size": {"pipeline_parallel_size": 2},
    "decode_context_parallel_size 2": {
        "decode_context_parallel_size": 2,
        "tensor_parallel_size": 2,
    },
    "prefill_context_parallel_size 2": {"prefill_context_parallel_size": 2},
    "tensor_parallel_size 7: the checkpoint has 2 key/value heads": {"tensor_parallel_size": 7},
    "a KV connector": {"kv_transfer_config": KV_CONNECTOR},
    "speculative decoding": {
        "speculative_config": {"method": "ngram", "num_speculative_tokens": 2}
    },
    "an encoder connector": {
        "ec_transfer_config": {"ec_connector": "ECExampleConnector", "ec_role": "ec_consumer"}
    },
    "embeddings as input": {"enable_mm_embeds": True},
    "embeddings as input (enable_prompt_embeds": {"enable_prompt_embeds": True},
    "LoRA adapters": {"enable_lora": True},
    "video pruning": {"video_pruning_rate": 0.5},
    "kv_cache_dtype fp8": {"kv_cache_dtype": "fp8"},
    "dtype bfloat16 on a CPU: start with --dtype float32": {"dtype": "bfloat16"},
    "cudagraph_mode FULL: use PIECEWISE": {"compilation_config": {"cudagraph_mode": "FULL"}},
    "nsa_semantics 'released'": {
        "hf_overrides": {"text_config": {"nsa_semantics": "released"}},
    },
}


def configure(checkpoint, **options):
    return EngineArgs(checkpoint, **OPTIONS | options).create_engine_config()


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """What a configuration sets for its process is not there for the next one."""
    monkeypatch.delenv("VLLM_USE_BREAKABLE_CUDAGRAPH", raising=False)


@pytest.mark.parametrize("message", REFUSED)
def test_refused_at_the_start(checkpoint, message):
    with pytest.raises(ValueError, match="VideoNSA is not served with") as error:
        configure(checkpoint, **REFUSED[message])
    assert message in str(error.value)


def test_the_old_model_runner_is_refused(checkpoint, monkeypatch):
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "0")
    with pytest.raises(ValueError, match="vLLM's old model runner: unset VLLM_USE_V2"):
        configure(checkpoint)


def test_compiled_layers_are_refused(checkpoint, monkeypatch):
    monkeypatch.setenv("VLLM_USE_BREAKABLE_CUDAGRAPH", "0")
    with pytest.raises(ValueError, match="BREAKABLE_CUDAGRAPH 0: unset it, or start with --enf"):
        configure(checkpoint, enforce_eager=False)
    configure(checkpoint)


def test_a_checkpoint_with_older_code_is_refused_by_what_it_lacks(checkpoint):
    model_config = configure(checkpoint).model_config
    with pytest.raises(ValueError, match="has no nsa_rules.rules_to_come.* take a newer revision"):
        code_of_checkpoint(model_config, "nsa_rules.rules_to_come")


def test_all_reasons_are_said_at_once(checkpoint):
    with pytest.raises(ValueError, match="pipeline_parallel_size 2.*; nor with LoRA"):
        configure(checkpoint, pipeline_parallel_size=2, enable_lora=True)


def test_what_is_served_is_configured(checkpoint):
    config = configure(checkpoint, tensor_parallel_size=2, enforce_eager=False)
    assert config.use_v2_model_runner
    assert os.environ["VLLM_USE_BREAKABLE_CUDAGRAPH"] == "1"
