"""Which model a command loads, how, and what memory it will take: known before weights are read.

`prepare_model` reads the configuration alone, so that what cannot work is refused at once; the
weights come with `PreparedModel.load`. Adapters that are not merged are loaded over their base.
"""

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import AutoConfig, AutoModelForImageTextToText
from transformers.utils import find_adapter_config_file

from commands.forecast import Forecast, forecast


class PreparedModel(NamedTuple):
    """A model before its weights are read.

    config: its `VideoNSAConfig`.  device: a device's name, or "auto" for all GPUs.
    load: loads it.  forecast_memory: the `Forecast` of a prompt from its tokens, vision tokens and
        the answer's.
    """

    config: object
    device: str
    load: Callable
    forecast_memory: Callable[[int, int, int], Forecast]


def prepare_model(
    model: str, device: str | None = None, backend: str | None = None
) -> PreparedModel:
    """The model of a checkpoint or of an adapter, by folder or by name on the Hub.

    device: cpu, cuda, cuda:1, or auto for all GPUs; None is a GPU where there is one.
    backend: replaces the checkpoint's `nsa_backend`.

    Raises ValueError where the device, the backend or the kind of model cannot be used.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device != "auto":
        try:
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(f"--device {device} cannot be used here: {reason}") from error
    config, base = read_config(model)
    if backend is not None:
        # Made anew, so that an unknown backend is refused now.
        text = config.text_config
        config.text_config = type(text).from_dict({**text.to_dict(), "nsa_backend": backend})
    dtype = torch.float32 if device == "cpu" else torch.bfloat16

    def load():
        loaded = AutoModelForImageTextToText.from_pretrained(
            base, config=config, trust_remote_code=True, dtype=dtype, device_map=device
        )
        if base == model:
            return loaded
        import peft  # needed for adapters only

        return peft.PeftModel.from_pretrained(loaded, model)

    def forecast_memory(prompt_tokens, vision_tokens, new_tokens):
        return forecast(
            config,
            prompt_tokens,
            vision_tokens=vision_tokens,
            new_tokens=new_tokens,
            dtype=dtype,
            # What "auto" puts on which device is not known before it is done.
            device=None if device == "auto" else device,
        )

    return PreparedModel(config, device, load, forecast_memory)


def read_config(model: str):
    """The configuration of a checkpoint or of an adapter's base, and where the base is.

    Raises ValueError for another kind of model, before anything large is read.
    """
    base = model
    if adapter := find_adapter_config_file(model):
        base = json.loads(Path(adapter).read_text(encoding="utf-8"))["base_model_name_or_path"]
    config = AutoConfig.from_pretrained(base, trust_remote_code=True)
    if config.model_type == "qwen2_5_vl":
        raise ValueError(
            f"{base} is a Qwen2.5-VL without gates: convert it first, with python "
            f"convert_checkpoint.py {shlex.quote(base)} FOLDER, and give that folder"
        )
    if config.model_type != "videonsa":
        raise ValueError(f"{base} is a {config.model_type} model, not a VideoNSA")
    return config, base
