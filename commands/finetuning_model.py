"""The model that finetune.py trains: which parts train, adapters, and how the vision tower runs.

A parameter belongs to one of four parts by its name: llm, gates, merger or vision (`part_of`).
`choose_trained` freezes the others or puts adapters on llm and vision. `keep_vision_calls_equal`
lets processes that share sharded parameters stay in step, whatever media their batches have.
"""

import functools
import os
import re

import torch
from transformers import AutoModelForImageTextToText

from commands.quantized_loading import loading_options

PARTS = ("llm", "gates", "merger", "vision")
ATTENTION = "q_proj,k_proj,v_proj,o_proj,qkv,proj"  # of the llm and of the vision tower


def part_of(name):
    """The part of the model that a parameter belongs to, by its name."""
    if ".g_proj_" in name:
        return "gates"
    if ".visual." in name:
        return "merger" if ".visual.merger." in name else "vision"
    return "llm"


def load_model(model_args, args):
    """The checkpoint with its trainable parts chosen; frozen weights in the dtype of the run, or
    quantised.
    """
    quantised = loading_options(model_args.load_in)
    if quantised:
        quantised["device_map"] = {"": args.device}  # where a library quantises
    model = AutoModelForImageTextToText.from_pretrained(
        model_args.model_name_or_path,
        revision=model_args.model_revision,
        dtype=run_dtype(args),
        trust_remote_code=True,
        **quantised,
        **model_args.fields,
    )
    return choose_trained(model, model_args, args)


def run_dtype(args):
    return torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32


def choose_trained(model, model_args, args):
    """Freezes what does not train and adds adapters; returns the model or its PeftModel."""
    if not hasattr(model.config.text_config, "nsa_block_size"):
        raise ValueError(
            f"{model_args.model_name_or_path} is a {model.config.model_type} checkpoint, not a "
            "VideoNSA one; convert it first: python convert_checkpoint.py SOURCE FOLDER"
        )
    base, parts = model, set(model_args.parts)
    if model_args.lora_r:
        model = add_adapters(model, model_args, parts)
    else:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(part_of(name) in parts)
    if args.deepspeed:
        fetch_layers_whole(base.model)
    else:  # DeepSpeed keeps its own copies in float32
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
    run_frozen_tower_without_graph(base.model.visual)
    return model


def add_adapters(model, model_args, parts):
    import peft

    given = model_args.lora_modules
    names = (ATTENTION if given is None else given).replace(" ", "").split(",")
    stems = {"llm": r"language_model\.layers", "vision": r"visual\.blocks"}
    patterns = {
        part: rf".*{stem}\.\d+\.(?:.*\.)?({'|'.join(map(re.escape, names))})"
        for part, stem in stems.items()
        if part in parts
    }
    modules = [name for name, _ in model.named_modules()]
    found = {
        part: {match[1] for name in modules if (match := re.fullmatch(pattern, name))}
        for part, pattern in patterns.items()
    }
    unknown = [name for name in names if name not in set().union(*found.values())]
    if given and unknown:
        raise ValueError(
            f"--lora_modules names {', '.join(unknown)}, which --train {model_args.train} has not. "
            "The llm has q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj and down_proj, the "
            "vision tower qkv, proj, gate_proj, up_proj and down_proj."
        )
    for part in patterns:
        if not found[part]:
            raise ValueError(
                f"--train names {part}, but --lora_modules {model_args.lora_modules} has no module "
                "of it, and it would not train. Add one (the llm has q_proj, the vision tower "
                f"qkv), or leave {part} out of --train."
            )
    whole = {"gates": ["g_proj_1", "g_proj_2"], "merger": ["merger"]}
    config = peft.LoraConfig(
        r=model_args.lora_r,
        lora_alpha=model_args.lora_alpha or 2 * model_args.lora_r,
        lora_dropout=model_args.lora_dropout,
        target_modules="|".join(patterns.values()),
        modules_to_save=[name for part in PARTS if part in parts for name in whole.get(part, [])],
        revision=model_args.model_revision,
    )
    if os.path.isdir(model_args.model_name_or_path):  # the adapter may be loaded from elsewhere
        model.name_or_path = os.path.abspath(model_args.model_name_or_path)
    return peft.get_peft_model(model, config)


def fetch_layers_whole(inner):
    """Lets DeepSpeed ZeRO-3 fetch the weights of a layer together, as FSDP does.

    By itself it fetches those of each linear module where that is called. A layer uses some weights
    without their modules, and its gates for vision tokens alone: a process whose batch has none
    would fetch others than the rest, and hang.
    """
    from deepspeed.utils import set_z3_leaf_modules

    layers = (*inner.language_model.layers, *inner.visual.blocks)
    set_z3_leaf_modules(inner, list({type(layer) for layer in layers}))


def run_frozen_tower_without_graph(visual):
    """Frozen parts of the vision tower keep no activations and are not checkpointed.

    They would be where the library asks for gradients of the tower's input, as it does for some
    kinds of checkpointing, and PEFT with it.
    """
    if not any(parameter.requires_grad for parameter in visual.parameters()):
        frozen = [visual]
    elif all(part_of(f".visual.{name}") == "merger" for name, _ in _trained(visual)):
        frozen = [visual.patch_embed, *visual.blocks]
    else:
        frozen = []
    for module in frozen:
        module.eval()  # and so it stays
        module.train = functools.partial(_same, module)
        module.forward = torch.no_grad()(module.forward)


def _same(module, mode=True):
    return module


def _trained(model):
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]


def keep_vision_calls_equal(model, calls):
    """Makes every step run the vision tower `calls` times, once per kind of medium.

    Processes that share sharded parameters must use them in the same order, backward, too, for
    which FSDP2 fetches ahead in the order of the forward: one whose batch has no video while
    another's has would hang. What is missing is made up where the media of a batch have just been
    encoded, by the smallest picture, whose features are multiplied by zero. One process does the
    same, so that it trains the same.
    """
    inner, vision = model.model, model.config.vision_config
    side = vision.spatial_merge_size
    patch = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    missing = 0

    def count(module, args, kwargs):
        nonlocal missing
        given = [kwargs.get(name) for name in ("pixel_values", "pixel_values_videos")]
        # Batches ask for no cache, in evaluation too; `generate` does, and runs on each by itself.
        is_batch = kwargs.get("use_cache") is False
        missing = calls - sum(pixels is not None for pixels in given) if is_batch else 0

    def make_up(module, args, kwargs):
        for _ in range(missing):
            embeds = kwargs["inputs_embeds"]
            pixels = torch.zeros(side * side, patch, device=embeds.device)
            grid = torch.tensor([[1, side, side]], device=embeds.device)
            features = inner.visual(pixels, grid_thw=grid).pooler_output
            kwargs["inputs_embeds"] = embeds + 0 * features.sum().to(embeds.dtype)
        return args, kwargs

    inner.register_forward_pre_hook(count, with_kwargs=True)
    inner.language_model.register_forward_pre_hook(make_up, with_kwargs=True)
