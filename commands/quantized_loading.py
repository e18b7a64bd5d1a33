"""Weights of 8 or 4 bits: what --load_in takes, and the quantization_config that each name means.

The libraries are optional: bitsandbytes for 4bit and 8bit, torchao for int8, int4 and float8,
optimum-quanto for the names that begin with quanto. The linear layers of the language model are
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
    "quanto-int8": ("optimum-quanto", "optimum.quanto"),
    "quanto-int4": ("optimum-quanto", "optimum.quanto"),
    "quanto-float8": ("optimum-quanto", "optimum.quanto"),
}
LOAD_IN = tuple(PACKAGES)
HELP = f"weights of 8 or 4 bits, quantised while they load: {', '.join(LOAD_IN)}"


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


def loading_options(name: str | None) -> dict:
    """What `from_pretrained` takes for a name of `LOAD_IN`; nothing for None."""
    return {} if name is None else {"quantization_config": quantization_config(name)}


def _torchao_type(name):
    from torchao.quantization import (
        Float8WeightOnlyConfig,
        Int4WeightOnlyConfig,
        Int8WeightOnlyConfig,
    )

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
