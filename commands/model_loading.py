"""Which model a command loads, how, and what memory it will take: known before weights are read.

`prepare_model` reads the configuration alone, so that what cannot work is refused at once; the
weights come with `PreparedModel.load`. Adapters that are not merged are loaded over their base.
`stock_as_converted` makes a stock Qwen2.5-VL plannable before it is converted.
"""

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from huggingface_hub import snapshot_download
from transformers import AutoConfig, AutoModelForImageTextToText
from transformers.utils import find_adapter_config_file

from commands.forecast import Forecast, forecast
from commands.quantized_loading import loading_of, method_of


class PreparedModel(NamedTuple):
    """A model before its weights are read.

    config: its `VideoNSAConfig`.  device: a device's name, or "auto" for all GPUs.
    dtype: of its weights.  load_in: the name of `LOAD_IN` that they are quantised by, or None.
    load: loads it.  forecast_memory: the `Forecast` of a prompt from its tokens, vision tokens and
        the answer's, and the processes that share it out, by default one.
    """

    config: object
    device: str
    dtype: torch.dtype
    load_in: str | None
    load: Callable
    forecast_memory: Callable[..., Forecast]

    def describe(self) -> str:
        """What it runs on and how: "on the CPU in float32, sparse attention"."""
        where = {"cpu": "the CPU", "auto": "all GPUs"}.get(self.device, self.device)
        if self.device.startswith("cuda"):
            where += f" ({torch.cuda.get_device_name(self.device)})"
        attention = "sparse" if self.config.text_config.nsa_enabled else "dense"
        dtype = str(self.dtype).removeprefix("torch.")
        weights = "" if self.load_in is None else f", weights in {self.load_in}"
        if own := getattr(self.config, "quantization_config", None):
            weights = f", weights as {method_of(own)} saved them"
        return f"on {where} in {dtype}{weights}, {attention} attention"


def prepare_model(
    model: str,
    device: str | None = None,
    backend: str | None = None,
    attention: str | None = None,
    load_in: str | None = None,
) -> PreparedModel:
    """The model of a checkpoint or of an adapter, by folder or by name on the Hub.

    device: cpu, cuda, cuda:1, or auto for all GPUs; None is a GPU where there is one.
    backend: replaces the checkpoint's `nsa_backend`.
    attention: "sparse" or "dense", of vision tokens; None is what the checkpoint says.
    load_in: a name of `LOAD_IN`, to quantise the weights while they are loaded.

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
    text, asked = config.text_config, {}
    if backend is not None:
        asked["nsa_backend"] = backend
    if attention is not None:
        asked["nsa_enabled"] = attention == "sparse"
    # Made anew, so that an unknown backend is refused now.
    config.text_config = type(text).from_dict({**text.to_dict(), **asked})
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    loading = loading_of(load_in, config, device, dtype)

    def load():
        loaded = AutoModelForImageTextToText.from_pretrained(
            base,
            config=config,
            trust_remote_code=True,
            device_map=device,
            **loading,
        )
        if base == model:
            return loaded
        import peft  # needed for adapters only

        return peft.PeftModel.from_pretrained(loaded, model)

    def forecast_memory(prompt_tokens, vision_tokens, new_tokens, processes=1):
        return forecast(
            config,
            prompt_tokens,
            vision_tokens=vision_tokens,
            new_tokens=new_tokens,
            dtype=loading["dtype"],
            quantization=loading.get("quantization_config"),
            # What "auto" puts on which device is not known before it is done.
            device=None if device == "auto" else device,
            processes=processes,
        )

    return PreparedModel(config, device, loading["dtype"], load_in, load, forecast_memory)


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


def stock_as_converted(model: str, folder: Path) -> str:
    """Where a model's small files are: in `folder`, filled with them, for a stock Qwen2.5-VL.

    model: folder or Hub id, of which no weights are read or fetched. The name of another kind of
    model is returned as it is.
    """
    from convert_checkpoint import SOURCE_PATTERNS, write_small_files

    if find_adapter_config_file(model):
        return model
    if AutoConfig.from_pretrained(model, trust_remote_code=True).model_type != "qwen2_5_vl":
        return model
    source = Path(model)
    if not source.is_dir():
        small = [pattern for pattern in SOURCE_PATTERNS if "safetensors" not in pattern]
        source = Path(snapshot_download(model, allow_patterns=small))
    record = {"source": model, "dtype": "bfloat16", "semantics": "paper"}
    record |= {"gates": "even", "gate_value": 1 / 3}
    write_small_files(source, folder, {}, source.name, record)
    return str(folder)
