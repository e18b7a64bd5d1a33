"""Weights of 8 or 4 bits: what --load_in takes, and the quantization_config that each name means.

The libraries are optional: bitsandbytes for 4bit and 8bit, torchao for int8, int4, float8 and
float8-dynamic, optimum-quanto for the names that begin with quanto. float8-dynamic alone multiplies
in 8 bits too, by float8_videonsa.py. The linear layers of the language model are
quantised as they are loaded. Gates, head, norms, embeddings and the vision tower stay as they are,
which the model itself sees to (`kept_from_quantizers` in library_videonsa.py).
"""

import importlib.util
import logging

import torch
from transformers import BitsAndBytesConfig, QuantoConfig, TorchAoConfig

PACKAGES = {  # of each name, the package and what it is imported as
    "4bit": ("bitsandbytes", "bitsandbytes"),
    "8bit": ("bitsandbytes", "bitsandbytes"),
    "int8": ("torchao", "torchao"),
    "int4": ("torchao", "torchao"),
    "float8": ("torchao", "torchao"),
    "float8-dynamic": ("torchao", "torchao"),
    "quanto-int8": ("optimum-quanto", "optimum.quanto"),
    "quanto-int4": ("optimum-quanto", "optimum.quanto"),
    "quanto-float8": ("optimum-quanto", "optimum.quanto"),
}
LOAD_IN = tuple(PACKAGES)
FLOAT8_PRODUCTS = 8, 9  # the least compute capability that has them
TRAINABLE = ("4bit", "8bit")  # under adapters
HELP = "quantise the language model's weights to 8 or 4 bits while they load"


def quantization_config(name: str):
    """The library's configuration that a name of `LOAD_IN` stands for.

    Raises ValueError for other names, and ImportError where the package is not installed.
    """
    if name not in PACKAGES:
        raise ValueError(f"--load_in is {name!r}; choose from {', '.join(LOAD_IN)}.")
    package, module = PACKAGES[name]
    if not _is_installed(module):
        raise ImportError(f"--load_in {name} needs {package}: pip install {package}")
    if name == "4bit":
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
    if name == "8bit":
        _say_once("bitsandbytes.autograd._functions")
        return BitsAndBytesConfig(load_in_8bit=True)
    if name.startswith("quanto-"):
        return QuantoConfig(weights=name.removeprefix("quanto-"))
    return TorchAoConfig(_torchao_type(name))


def check_device(name: str | None, device: str) -> None:
    """Raise ValueError for a device (by its name) that has no products of such weights."""
    if name not in ("int4", "float8-dynamic"):
        return
    if not device.startswith(("cuda", "auto")):
        raise ValueError(f"--load_in {name} needs a GPU: on a CPU use int8 or 8bit")
    number = torch.device(device) if device.startswith("cuda") else None
    if name == "float8-dynamic" and torch.cuda.get_device_capability(number) < FLOAT8_PRODUCTS:
        raise ValueError(
            f"--load_in {name} needs a GPU of compute capability 8.9 or more, as an H100 or an RTX "
            "4090 is: on this one use float8, whose products are in 16 bits"
        )


def check_widths(name: str | None, text_config, device: str) -> None:
    """Raise ValueError for widths that bitsandbytes' products in 4 bits do not take on a CPU."""
    widths = {key: getattr(text_config, key) for key in ("hidden_size", "intermediate_size")}
    odd = [f"{key} {width}" for key, width in widths.items() if width % 64]
    if name == "4bit" and device == "cpu" and odd:
        raise ValueError(
            f"--load_in 4bit on a CPU takes widths that are multiples of 64, and {odd[0]} is none: "
            "use 8bit or int8"
        )


def check_savable(name: str) -> None:
    """Raise ValueError where weights that are loaded so cannot be saved."""
    if name.startswith("quanto"):
        others = (other for other in LOAD_IN if not other.startswith("quanto"))
        raise ValueError(
            f"--load_in {name}: transformers does not save quanto's weights. Choose from "
            f"{', '.join(others)}."
        )


def loading_options(name: str | None) -> dict:
    """What `from_pretrained` takes for a name of `LOAD_IN`; nothing for None."""
    return {} if name is None else {"quantization_config": quantization_config(name)}


def loading_of(name: str | None, config, device: str, dtype: torch.dtype) -> dict:
    """What `from_pretrained` takes for a checkpoint of this configuration, the dtype with it.

    name: of `LOAD_IN`, or None.
    dtype: of weights that are not quantised. Those of a checkpoint that was saved quantised keep
        their own: transformers takes no other for all of them.

    Raises ValueError where a checkpoint is quantised already or is not to be multiplied so there.
    """
    if getattr(config, "quantization_config", None) is not None:
        if name is not None:
            raise ValueError(
                f"{config.name_or_path} is quantised already: leave --load_in {name} away"
            )
        return {"dtype": config.dtype or dtype}
    check_device(name, device)
    options = loading_options(name)
    check_widths(name, config.text_config, device)
    return {"dtype": dtype, **options}


def plain_state_dict(model) -> dict:
    """The state dict of a model, quantised weights taken apart into plain tensors."""
    quantizer, state = getattr(model, "hf_quantizer", None), None
    if quantizer is not None:
        state, _ = quantizer.get_state_dict_and_metadata(model)
    return model.state_dict() if state is None else state


def bits_of(name: str) -> dict:
    """The fields of bitsandbytes' configuration for "4bit" or "8bit", without that library."""
    fields = {"quant_method": "bitsandbytes", "load_in_8bit": name == "8bit"}
    return {**fields, "bnb_4bit_use_double_quant": True}


def bytes_per_weight(quantization, itemsize: int) -> float:
    """Bytes that a quantised weight takes, with its share of what scales it.

    quantization: a quantization_config, or its fields as config.json holds them. itemsize: of
    weights in whole, which those of other libraries are taken for unless they say their bits.
    """
    fields = _fields(quantization)
    method = method_of(fields)
    if method == "bitsandbytes" and fields.get("load_in_8bit"):
        return 1
    if method == "bitsandbytes":  # a scale for 64 weights: float32, or 8 bits and a few more
        nested = fields.get("bnb_4bit_use_double_quant")
        return 0.5 + (1 / 64 + 4 / (64 * 256) if nested else 4 / 64)
    if method == "torchao":
        bits = 4 if "Int4" in fields["quant_type"]["default"]["_type"] else 8
    elif method == "quanto":
        bits = int(fields["weights"].lstrip("intfloa"))
    else:
        bits = fields.get("bits") or 8 * itemsize
    return bits / 8 + (4 / 128 if bits < 8 else 0)  # two numbers of 16 bit for a group of 128


def is_int8_product(quantization) -> bool:
    """Whether activations are multiplied in 8 bits, as bitsandbytes does."""
    fields = _fields(quantization)
    return method_of(fields) == "bitsandbytes" and bool(fields.get("load_in_8bit"))


def skipped_modules(quantization) -> tuple[str, ...]:
    """Patterns of the modules that a quantization_config leaves in whole, by the user's list."""
    fields = _fields(quantization)
    names = ("llm_int8_skip_modules", "modules_to_not_convert")
    return tuple(pattern for name in names for pattern in fields.get(name) or ())


def method_of(quantization) -> str:
    """The library of a quantization_config, or of its fields, by the library's name for it."""
    method = _fields(quantization)["quant_method"]
    return str(getattr(method, "value", method))


def _fields(quantization):
    return quantization if isinstance(quantization, dict) else quantization.to_dict()


def _torchao_type(name):
    from torchao.quantization import (
        Float8DynamicActivationFloat8WeightConfig,
        Float8WeightOnlyConfig,
        Int4WeightOnlyConfig,
        Int8WeightOnlyConfig,
        PerRow,
    )

    if name == "float8-dynamic":
        return Float8DynamicActivationFloat8WeightConfig(granularity=PerRow())
    if name == "int4":  # packed for the product that torch itself has, on CUDA
        return Int4WeightOnlyConfig(group_size=128, int4_packing_format="tile_packed_to_4d")
    return {"int8": Int8WeightOnlyConfig, "float8": Float8WeightOnlyConfig}[name]()


def _is_installed(module):
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # its parent
        return False


def _say_once(name):
    """Let a library's logger say the same only once: some say it for each layer."""
    said = set()
    seen = lambda record: record.msg not in said and not said.add(record.msg)  # noqa: E731
    logging.getLogger(name).addFilter(seen)
