"""Write the repository's toy checkpoint with attention heads that vLLM serves; it answers the same.

    python serving/widen_checkpoint.py out/wide

Its heads have 16 dimensions, and vLLM's attention on a CPU wants 32 or more. Every width of the
language model is doubled here: what is new is zero, and what a width is divided or normalised by is
made up for, so that every logit stays as it was, up to rounding.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from commands.checkpoint_files import listed_files  # noqa: E402


def widen_config(config: dict) -> dict:
    """The configuration of the doubled widths."""
    text = {**config["text_config"]}
    head_dim = text["hidden_size"] // text["num_attention_heads"]
    text["hidden_size"] *= 2
    text["rms_norm_eps"] /= 2  # beside a mean of squares over twice the width
    rope = dict(text["rope_parameters"])
    # Frequencies are powers of theta ** (-2 / head size); the others turn what is zero.
    rope["rope_theta"] **= 2
    *sections, last = rope["mrope_section"]
    rope["mrope_section"] = [*sections, last + head_dim // 2]
    vision = {**config["vision_config"], "out_hidden_size": text["hidden_size"]}
    return {**config, "text_config": {**text, "rope_parameters": rope}, "vision_config": vision}


def widen_weight(name: str, weight: torch.Tensor, head_dim: int) -> torch.Tensor:
    """One weight of the language model, or of the last layer of the vision tower, float32."""
    weight = weight.float()
    *_, part, kind = name.split(".")
    if "visual" in name:
        return double(weight, 0) if part == "2" else weight  # merger.mlp.2
    if "norm" in name:
        return double(weight / 2**0.5, 0)
    if part in ("q_proj", "k_proj", "v_proj"):
        weight = double_heads(weight, 0, head_dim)
        weight = weight * 2**0.5 if part == "q_proj" else weight  # scores / head_dim ** 0.5
        return double(weight, 1) if kind == "weight" else weight
    if part == "o_proj":
        return double(double_heads(weight, 1, head_dim), 0)
    if part == "down_proj" or part == "g_proj_1":
        weight = double(weight, 0)
    if kind == "weight" and part != "down_proj":
        weight = double(weight, 1)  # g_proj_1, g_proj_2, gate_proj, up_proj, embed_tokens
    return weight


def double(x: torch.Tensor, dim: int) -> torch.Tensor:
    """Zeros after what there is."""
    return torch.cat([x, torch.zeros_like(x)], dim)


def double_heads(x: torch.Tensor, dim: int, head_dim: int) -> torch.Tensor:
    """Zeros after each half of each head, since RoPE turns dimension i with i + head size / 2."""
    halves = x.unflatten(dim, (-1, head_dim // 2))
    return double(halves, dim + 1).flatten(dim, dim + 1)


def widen(folder: Path) -> None:
    """Write the checkpoint into `folder`, as widen_config and widen_weight make it."""
    for name in listed_files(ROOT):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, folder / name)
    config = json.loads((ROOT / "config.json").read_text())
    head_dim = config["text_config"]["hidden_size"] // config["text_config"]["num_attention_heads"]
    (folder / "config.json").write_text(json.dumps(widen_config(config), indent=2) + "\n")
    weights = load_file(ROOT / "model.safetensors")
    weights = {name: widen_weight(name, x, head_dim).contiguous() for name, x in weights.items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    widen(parser.parse_args().folder)
