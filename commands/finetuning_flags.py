"""The flags and combinations of flags that finetune.py refuses, each with its reason.

They would be ignored without a word, or end the run far from their cause. All other flags of the
Trainer do what its documentation says.
"""

import dataclasses
import math
from pathlib import Path

import torch
from accelerate import DistributedType, PartialState
from transformers.utils import logging

from commands.finetuning_model import run_dtype
from commands.model_card import check_source
from commands.quantized_loading import method_of

logger = logging.get_logger("finetune")

ITS_OWN = "finetune.py evaluates by its own loss and answers"
READS_ALL = "it would read every video once before the first step: sort the data yourself"
IN_STEP = "batches are made by finetune.py, and all processes get equally many"
COMPILES = "the kernels are compiled already, and every batch has shapes of its own"
REFUSED = {
    "do_predict": "finetune.py does not predict: use evaluation.py on what it saved",
    "eval_accumulation_steps": ITS_OWN,
    "eval_do_concat_batches": ITS_OWN,
    "eval_use_gather_object": ITS_OWN,
    "batch_eval_metrics": ITS_OWN,
    "include_for_metrics": ITS_OWN,
    "prediction_loss_only": ITS_OWN,
    "bf16_full_eval": "evaluation runs as training does",
    "fp16_full_eval": "evaluation runs as training does",
    "label_names": "labels are made by finetune.py",
    "length_column_name": READS_ALL,
    "remove_unused_columns": IN_STEP,
    "enable_jit_checkpoint": "it writes in the middle of a step, and its checkpoints are not whole",
    "use_liger_kernel": "Liger has no kernels for this model, which has its own",
    "liger_kernel_config": "Liger has no kernels for this model, which has its own",
    "torch_compile": COMPILES,
    "torch_compile_backend": COMPILES,
    "torch_compile_mode": COMPILES,
    "parallelism_config": "--sequence_parallel_size makes the one that this model can use",
}
# Flags of which some values are refused.
VALUES = {
    "train_sampling_strategy": ({"group_by_length", "batch_rebalance"}, READS_ALL),
}
# Flags that need --eval_data.
EVALUATE = (
    "eval_strategy",
    "eval_steps",
    "eval_delay",
    "eval_on_start",
    "per_device_eval_batch_size",
    "load_best_model_at_end",
    "metric_for_best_model",
    "greater_is_better",
    "early_stopping_patience",
    "do_eval",
)
METRICS = ("loss", "exact_match")
COUNTS = {
    "per_device_eval_batch_size": "conversations",
    "per_device_train_batch_size": "conversations",
    "gradient_accumulation_steps": "batches",
    "gates_by_layer_every": "logs",
}


def refuse_flags(args):
    """Raises ValueError for a flag of the Trainer that would not do what its name says.

    args: TrainingArguments after their own checks.
    """
    for name, value in _given(args).items():
        if name in REFUSED:
            raise ValueError(f"--{name} {_text(value)}: {REFUSED[name]}.")
    for name, (values, reason) in VALUES.items():
        if (value := _text(getattr(args, name))) in values:
            raise ValueError(f"--{name} {value}: {reason}.")
    optim = _text(args.optim)
    if "lomo" in optim or "layerwise" in optim:
        raise ValueError(
            f"--optim {optim}: it steps inside the backward pass, without the learning rates of "
            "the parts and before gradients are accumulated or clipped."
        )
    if args.accelerator_config.dispatch_batches or not args.accelerator_config.even_batches:
        raise ValueError(
            f"--accelerator_config with dispatch_batches or uneven batches: {IN_STEP}."
        )
    for name, what in COUNTS.items():
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} is {getattr(args, name)}; it counts {what}, from 1.")
    for field in dataclasses.fields(args):
        value = getattr(args, field.name)
        if isinstance(value, float) and math.isnan(value):
            raise ValueError(f"--{field.name} is {value}; it must be a number.")


def _given(args):
    """Flag to value of those that are not at their defaults."""
    given = {}
    for field in dataclasses.fields(args):
        factory = field.default_factory
        default = field.default if factory is dataclasses.MISSING else factory()
        if (value := getattr(args, field.name)) != default:
            given[field.name] = value
    return given


def refuse_evaluation(data_args, args):
    """Raises ValueError for flags of an evaluation that there will not be, or not so."""
    given = _given(args)
    if not data_args.eval_data:
        if needing := [name for name in EVALUATE if name in given]:
            raise ValueError(
                f"--{needing[0]} {_text(given[needing[0]])}, but there is nothing to evaluate on: "
                "add --eval_data SET."
            )
        if _text(args.save_strategy) == "best":
            raise ValueError("--save_strategy best finds the best by --eval_data: add it.")
        return
    if data_args.eval_answers < 0:
        raise ValueError(f"--eval_answers is {data_args.eval_answers}; it counts answers, from 0.")
    if data_args.eval_answers and (args.fsdp or args.deepspeed):
        raise ValueError(
            f"--eval_answers {data_args.eval_answers} with --fsdp or --deepspeed: weights in "
            "shards generate no answers. Give --eval_answers 0 for the loss alone, and score the "
            "result with evaluation.py."
        )
    metric = (args.metric_for_best_model or "loss").removeprefix("eval_")
    metrics = METRICS if data_args.eval_answers else METRICS[:1]
    if metric not in metrics:
        raise ValueError(
            f"--metric_for_best_model is {args.metric_for_best_model}; there "
            f"{'are' if len(metrics) > 1 else 'is'} {' and '.join(metrics)}."
        )
    if args.early_stopping_patience is None:
        return
    if args.early_stopping_patience < 1 or not args.load_best_model_at_end:
        raise ValueError(
            f"--early_stopping_patience {args.early_stopping_patience}: it counts evaluations, "
            "from 1, and needs --load_best_model_at_end with --eval_strategy epoch or steps, and "
            "--save_strategy likewise."
        )


def refuse_together(model_args, args):
    """Raises ValueError for flags that contradict each other, or have no part in the run."""
    model, revision = model_args.model_name_or_path, model_args.model_revision
    check_source(model)
    if Path(args.output_dir).resolve() == Path(model).resolve():
        raise ValueError(
            f"--output_dir is {args.output_dir}, the folder of the model itself, which the result "
            "would replace. Name another folder."
        )
    if model_args.load_in and (args.fsdp or args.deepspeed):
        raise ValueError(
            f"--load_in {model_args.load_in} with FSDP or DeepSpeed, which share out whole "
            "weights: leave one of them away. Without them every process has all of the model."
        )
    _say_what_is_not_sharded(args)
    if Path(model, "adapter_config.json").exists() and not Path(model, "config.json").exists():
        raise ValueError(
            f"{model} is an adapter: go on with it by --resume_from_checkpoint, or train "
            "from a whole checkpoint, which --merge_lora makes."
        )
    if Path(model).is_dir() and revision != "main":
        raise ValueError(f"--model_revision {revision} is of a model on the Hub, {model} a folder.")
    for part in ("gates", "merger", "vision"):
        name = f"{part.removesuffix('s')}_lr"
        if getattr(args, name) is not None and part not in model_args.parts:
            raise ValueError(
                f"--{name} {getattr(args, name)}, but --train is {model_args.train!r}: add {part} "
                f"to --train, or leave --{name} out."
            )
    if model_args.lora_r and (args.fsdp_config or {}).get("activation_checkpointing"):
        raise ValueError(
            "fsdp_config's activation_checkpointing renames modules, and then adapters cannot be "
            "saved. With --lora_r, use --gradient_checkpointing instead."
        )


def refuse_quantised(config, model_args, args):
    """Raises ValueError for flags that do not go with a checkpoint that was saved quantised."""
    quantization = getattr(config, "quantization_config", None)
    if quantization is None:
        return
    name, method = model_args.model_name_or_path, method_of(quantization)
    saved, given = config.dtype or torch.float32, run_dtype(args)
    if model_args.load_in:
        raise ValueError(f"{name} is quantised already: leave --load_in {model_args.load_in} away.")
    if not model_args.lora_r:
        raise ValueError(
            f"{name} is quantised, and such weights do not train. Add adapters with --lora_r 64, "
            "or train from whole weights."
        )
    if args.fsdp or args.deepspeed:
        raise ValueError(
            f"{name} is quantised, and FSDP and DeepSpeed share out whole weights: leave them "
            "away, so that every process has all of the model, or train from whole weights."
        )
    if model_args.merge_lora and method != "bitsandbytes":
        raise ValueError(
            f"--merge_lora: {name} is quantised by {method}, whose weights are not made whole "
            "again. Leave --merge_lora out, for an adapter, or train from whole weights."
        )
    if saved != given:
        saved, given = (str(dtype).removeprefix("torch.") for dtype in (saved, given))
        flags = {"bfloat16": "add --bf16", "float16": "add --fp16"}
        raise ValueError(
            f"{name} was quantised in {saved}, and this run computes in {given}: "
            f"{flags.get(saved, 'leave --bf16 and --fp16 out')}."
        )


def _say_what_is_not_sharded(args):
    """A warning where accelerate leaves --fsdp out, by one process or on CPUs; not with groups."""
    kind = PartialState().distributed_type
    if not args.fsdp or kind not in (DistributedType.NO, DistributedType.MULTI_CPU):
        return
    where = "one process" if kind == DistributedType.NO else "processes on CPUs"
    if args.sequence_parallel_size > 1:
        raise ValueError(
            f"--sequence_parallel_size is {args.sequence_parallel_size}, which needs weights in "
            f"shards, and accelerate makes none for {where}. Run it on GPUs, or leave it out."
        )
    logger.warning(f"--fsdp is not used: for {where} accelerate keeps the weights whole in each.")


def _text(value):
    return str(getattr(value, "value", value))
