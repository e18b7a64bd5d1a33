"""The checkpoint's own code, as `trust_remote_code` loads it."""

from typing import Any

from transformers.dynamic_module_utils import get_class_from_dynamic_module
from vllm.config import ModelConfig


def code_of_checkpoint(model_config: ModelConfig, name: str) -> Any:
    """What `name`, as module.attribute, is in the checkpoint's code.

    Raises ValueError where its code is older than this plug-in and has no such thing.
    """
    try:
        return get_class_from_dynamic_module(
            name,
            model_config.model,
            revision=model_config.revision,
            code_revision=model_config.code_revision,
        )
    except AttributeError as error:
        raise ValueError(
            f"the code of {model_config.model} has no {name}, which this plug-in needs: take a "
            "newer revision of the checkpoint, or the plug-in that its repository has."
        ) from error
