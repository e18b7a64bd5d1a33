"""What is not served, said at the start by name.

vLLM calls `verify_and_update_config` before anything is loaded. Each refusal is a feature that
would run, but without the sparse attention or with another one, or that nobody has tried with it.
"""

import os

from vllm.config.compilation import CUDAGraphMode
from vllm.model_executor.models.config import VerifyAndUpdateConfig
from vllm.platforms import current_platform
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from .media import UNASKED_FRAMES

IN_PIECES = "VLLM_USE_BREAKABLE_CUDAGRAPH"


class VideoNSAConfigCheck(VerifyAndUpdateConfig):
    """Refuses what is not served, and chooses the attention and CUDA graphs that are."""

    @staticmethod
    def verify_and_update_model_config(model_config) -> None:
        settings = model_config.multimodal_config.media_io_kwargs.setdefault("video", {})
        settings.setdefault("num_frames", UNASKED_FRAMES)

    @staticmethod
    def verify_and_update_config(vllm_config) -> None:
        if reasons := list(refusals(vllm_config)):
            raise ValueError(f"VideoNSA is not served with {'; nor with '.join(reasons)}.")
        # Graphs in pieces, with the attention of each layer between them (`attend` in model.py).
        os.environ.setdefault(IN_PIECES, "1")
        if vllm_config.compilation_config.cudagraph_mode is None:
            vllm_config.compilation_config.cudagraph_mode = CUDAGraphMode.PIECEWISE
        if current_platform.is_cuda():
            vllm_config.attention_config.backend = AttentionBackendEnum.FLASH_ATTN


def refusals(vllm_config):
    """Yields what of a configuration is not served, and what to do instead."""
    parallel, model = vllm_config.parallel_config, vllm_config.model_config
    text = model.hf_config.text_config
    for name in (
        "pipeline_parallel_size",
        "decode_context_parallel_size",
        "prefill_context_parallel_size",
    ):
        if (size := getattr(parallel, name)) > 1:
            yield f"{name} {size}: use tensor_parallel_size"
    if (ranks := parallel.tensor_parallel_size) > text.num_key_value_heads:
        yield (
            f"tensor_parallel_size {ranks}: the checkpoint has {text.num_key_value_heads} "
            "key/value heads, and the query heads of one select their blocks together"
        )
    if vllm_config.kv_transfer_config is not None:
        yield "a KV connector (kv_transfer_config): leave it out"
    if vllm_config.ec_transfer_config is not None:
        yield "an encoder connector (ec_transfer_config): leave it out"
    if model.enable_prompt_embeds or model.multimodal_config.enable_mm_embeds:
        yield "embeddings as input (enable_prompt_embeds, enable_mm_embeds): leave them out"
    if vllm_config.speculative_config is not None:
        yield "speculative decoding (speculative_config): leave it out"
    if vllm_config.lora_config is not None:
        yield "LoRA adapters: merge them into the checkpoint"
    if model.multimodal_config.is_multimodal_pruning_enabled():
        yield "video pruning (video_pruning_rate): give videos fewer tokens by max_tokens"
    cache, dtype = vllm_config.cache_config.cache_dtype, str(model.dtype).removeprefix("torch.")
    if cache not in ("auto", dtype):
        yield f"kv_cache_dtype {cache}: leave it out, keys and values stay in {dtype}"
    graphs = vllm_config.compilation_config.cudagraph_mode
    if graphs is not None and graphs.has_full_cudagraphs():
        yield f"cudagraph_mode {graphs.name}: use PIECEWISE or NONE"
    if os.environ.get(IN_PIECES, "1") != "1" and not model.enforce_eager:
        yield f"{IN_PIECES} {os.environ[IN_PIECES]}: unset it, or start with --enforce-eager"
    if not vllm_config.use_v2_model_runner:
        yield "vLLM's old model runner: unset VLLM_USE_V2_MODEL_RUNNER"
    if text.nsa_semantics != "paper":
        yield f"nsa_semantics {text.nsa_semantics!r}: run these weights with transformers"
    if current_platform.is_cpu() and dtype != "float32":
        yield f"dtype {dtype} on a CPU: start with --dtype float32"
    own = (None, AttentionBackendEnum.FLASH_ATTN)
    if current_platform.is_cuda() and vllm_config.attention_config.backend not in own:
        yield f"attention backend {vllm_config.attention_config.backend.name}: use FLASH_ATTN"
