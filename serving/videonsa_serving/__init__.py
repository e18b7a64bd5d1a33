"""A plug-in that lets vLLM serve VideoNSA checkpoints with their sparse attention.

vLLM calls `register`, its entry point, in every process. Where what is:

- refusals.py: what is not served, said at the start by name.
- media.py: files become pixels and placeholders by the checkpoint's own processor.
- state.py: which tokens of a request are vision, and what a step of the engine attends to.
- step.py: that step's rows and keys, laid out; pages.py: where the cache has those keys.
- backends.py: vLLM's own attention for the other rows, and where its cache keeps keys and values.
- checkpoint.py: the checkpoint's own code, which it calls.
- model.py: vLLM's Qwen2.5-VL with gates, and the checkpoint's sparse attention for vision rows.
"""


def register() -> None:
    """Make the model, its attention backends and its video loader known; may be called again."""
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    from . import media  # noqa: F401  registers the loader of videos
    from .refusals import VideoNSAConfigCheck

    name = "VideoNSAForConditionalGeneration"
    ModelRegistry.register_model(name, f"{__name__}.model:{name}")
    MODELS_CONFIG_MAP[name] = VideoNSAConfigCheck
    for backend, kind in (("VIDEONSA_CPU", "CPUBackend"), ("VIDEONSA_FLASH_ATTN", "FlashBackend")):
        if backend not in AttentionBackendEnum.__members__:
            register_backend(backend, f"{__name__}.backends.{kind}")
