"""The flags of finetune.py, its own and the Trainer's, and a --help that is short enough to read.

`parse` makes three groups of arguments of a command line, of a YAML or JSON file, or of both.
`--help` shows finetune.py's own flags and the Trainer's that most runs set (`COMMON`); `--help all`
shows every flag. What is refused, and why, is in finetuning_flags.py.
"""

import argparse
import difflib
import json
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import ClassVar

import yaml
from transformers import HfArgumentParser, TrainingArguments

from commands.finetuning_flags import refuse_flags
from commands.finetuning_model import PARTS
from commands.finetuning_sharding import parallelism_config
from commands.quantized_loading import TRAINABLE

USAGE = """\
finetune.py [SETTINGS.yaml] --model_name_or_path MODEL --data SET... --output_dir DIR [FLAGS]
       finetune.py --help        these flags
       finetune.py --help all    and every flag of the Trainer"""
# The Trainer's flags that --help shows, and what they do in a line.
COMMON = {
    "output_dir": "folder of the result and of the checkpoints on the way",
    "num_train_epochs": "how often all rows are seen",
    "max_steps": "steps, instead of epochs",
    "per_device_train_batch_size": "conversations of one step of one device",
    "gradient_accumulation_steps": "batches of one step",
    "learning_rate": "of what has no rate of its own below",
    "lr_scheduler_type": "linear, cosine, constant, ...",
    "warmup_steps": "steps, or a share below 1, in which the rate rises",
    "bf16": "compute in bfloat16; what trains is kept in float32",
    "gradient_checkpointing": "less memory for about a third more time",
    "logging_steps": "every how many steps the loss is logged",
    "report_to": "tensorboard, wandb, trackio, ...",
    "save_strategy": "no, steps, epoch or best",
    "save_steps": "every how many steps a checkpoint is saved",
    "save_total_limit": "checkpoints that are kept",
    "resume_from_checkpoint": "last, or the folder of a checkpoint to go on from",
    "eval_strategy": "no, steps or epoch: when --eval_data is scored besides at the end",
    "eval_steps": "every how many steps",
    "load_best_model_at_end": "the result is the best checkpoint, not the last",
    "metric_for_best_model": "loss or exact_match",
    "use_cpu": "train on the CPU although there is a GPU",
    "seed": "of all that is drawn",
    "push_to_hub": "push the result (--hub_model_id names the repository)",
}


@dataclass
class ModelArguments:
    _argument_group_name: ClassVar[str] = "the model, and what of it trains"

    model_name_or_path: str = field(
        metadata={"metavar": "MODEL", "help": "folder or Hub id of a VideoNSA checkpoint"}
    )
    model_revision: str = field(default="main", metadata={"help": "branch, tag or commit"})
    semantics: str | None = field(
        default=None,
        metadata={"help": "paper or released: nsa_semantics to train with and to save"},
    )
    load_in: str | None = field(
        default=None,
        metadata={"help": f"{' or '.join(TRAINABLE)}: quantise the frozen weights under adapters"},
    )
    train: str = field(default="llm,gates", metadata={"help": f"any of {','.join(PARTS)}"})
    lora_r: int = field(default=0, metadata={"help": "rank of the adapters; 0 trains whole parts"})
    lora_alpha: float | None = field(default=None, metadata={"help": "default: twice the rank"})
    lora_dropout: float = field(default=0.0, metadata={"help": "of the adapters' inputs"})
    lora_modules: str | None = field(
        default=None,
        metadata={"help": "linear layers with adapters (default: those of the attention)"},
    )
    merge_lora: bool = field(
        default=False,
        metadata={"help": "end with a whole checkpoint; the adapter goes to its folder adapter/"},
    )

    def __post_init__(self):
        self.parts = [part for part in self.train.replace(" ", "").split(",") if part]
        if not self.parts or not set(self.parts) <= set(PARTS):
            raise ValueError(f"--train is {self.train!r}; name one or more of {', '.join(PARTS)}.")
        if self.lora_r and not {"llm", "vision"} & set(self.parts):
            raise ValueError(
                f"--lora_r {self.lora_r} adapts the llm and the vision tower, but --train is "
                f"{self.train!r}. Add one of them, or leave --lora_r out."
            )
        if self.semantics and self.lora_r and not self.merge_lora:
            raise ValueError(
                f"--semantics {self.semantics} with --lora_r: an adapter runs with the semantics "
                "that its base names. Add --merge_lora, for a checkpoint that names its own."
            )
        if self.load_in and self.load_in not in TRAINABLE:
            raise ValueError(
                f"--load_in is {self.load_in!r}; adapters train over {' or '.join(TRAINABLE)}."
            )
        if self.load_in and not self.lora_r:
            raise ValueError(
                f"--load_in {self.load_in} without --lora_r: quantised weights do not train. Add "
                "adapters with --lora_r 64."
            )
        if self.merge_lora and not self.lora_r:
            raise ValueError("--merge_lora without --lora_r: there will be no adapter to merge.")
        for name in ("lora_alpha", "lora_dropout", "lora_modules"):
            value, default = getattr(self, name), self.__dataclass_fields__[name].default
            if value != default and not self.lora_r:
                raise ValueError(f"--{name} {value} without --lora_r: there will be no adapter.")
        if self.lora_r < 0 or (self.lora_alpha is not None and not self.lora_alpha > 0):
            raise ValueError(
                f"--lora_r is {self.lora_r} and --lora_alpha {self.lora_alpha}: a rank is a whole "
                "number from 1, and alpha above 0."
            )

    @property
    def fields(self):
        """Those of the configuration that are not the checkpoint's own."""
        return {} if self.semantics is None else {"nsa_semantics": self.semantics}


@dataclass
class DataArguments:
    _argument_group_name: ClassVar[str] = "the data"

    data: list[str] = field(
        metadata={
            "metavar": "SET",
            "help": "data sets to train on, each with an optional share: set.json%%50",
        }
    )
    eval_data: list[str] | None = field(
        default=None,
        metadata={
            "metavar": "SET",
            "help": "data sets to score: the loss, and exact match of generated answers",
        },
    )
    eval_answers: int = field(
        default=20, metadata={"help": "answers of --eval_data that are generated; 0 for the loss"}
    )
    data_root: str | None = field(
        default=None, metadata={"metavar": "DIR", "help": "where paths of media start from"}
    )
    max_tokens: int | None = field(
        default=None, metadata={"help": "of a conversation; videos give up frames to meet it"}
    )
    fps: float | None = field(default=None, metadata={"help": "frames a second (default 2)"})
    num_frames: int | None = field(default=None, metadata={"help": "frames, instead of a rate"})
    min_frames: int | None = field(default=None, metadata={"help": "of a video"})
    max_frames: int | None = field(default=None, metadata={"help": "of a video"})
    min_pixels: int | None = field(default=None, metadata={"help": "of a frame"})
    max_pixels: int | None = field(default=None, metadata={"help": "of a frame"})
    total_pixels: int | None = field(default=None, metadata={"help": "of a video"})
    video_readers: int | None = field(
        default=None, metadata={"help": "threads that read a video, at most"}
    )
    timestamps: bool = field(
        default=False,
        metadata={"help": "write the times of frames into the prompt; kept with the processor"},
    )
    dry_run: bool = field(
        default=False, metadata={"help": "measure all of the data, train nothing"}
    )

    def video_settings(self):
        names = ("fps", "num_frames", "min_frames", "max_frames")
        names += ("min_pixels", "max_pixels", "total_pixels", "video_readers")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}


@dataclass
class FinetuneArguments(TrainingArguments):
    _argument_group_name: ClassVar[str] = "the run (flags of the Trainer, and rates of the parts)"

    learning_rate: float = 1e-5
    gate_lr: float | None = field(default=None, metadata={"help": "learning rate of the gates"})
    merger_lr: float | None = field(default=None, metadata={"help": "of the merger"})
    vision_lr: float | None = field(default=None, metadata={"help": "of the vision tower"})
    sequence_parallel_size: int = field(
        default=1, metadata={"help": "processes that share out each conversation, with --fsdp"}
    )
    early_stopping_patience: int | None = field(
        default=None, metadata={"help": "stop after so many evaluations without a better one"}
    )
    gates_by_layer_every: int = field(
        default=10, metadata={"help": "every how many logs the gates are logged layer by layer"}
    )
    logging_steps: float = 10
    remove_unused_columns: bool = False  # the collator makes the inputs, there are no columns
    use_cache: bool = True  # goes into the saved config; batches ask for no cache themselves
    ddp_find_unused_parameters: bool | None = False  # every step uses every parameter

    def __post_init__(self):
        super().__post_init__()
        refuse_flags(self)
        if self.n_gpu > 1:
            raise ValueError(
                f"{self.n_gpu} GPUs are visible to one process. Start one process each: torchrun "
                f"--nproc_per_node {self.n_gpu} finetune.py ..., or set CUDA_VISIBLE_DEVICES=0."
            )
        self.parallelism_config = parallelism_config(self)

    def rate(self, part):
        own = {"gates": self.gate_lr, "merger": self.merger_lr, "vision": self.vision_lr}.get(part)
        return self.learning_rate if own is None else own


def parse(argv: list[str], description: str):
    """(ModelArguments, DataArguments, FinetuneArguments) of flags, after those of a settings file.

    Raises ValueError for a flag that there is not, or flags that contradict each other.
    """
    parser = HfArgumentParser(
        (ModelArguments, DataArguments, FinetuneArguments),
        prog="finetune.py",
        usage=USAGE,
        description=description,
        formatter_class=Help,
        add_help=False,
    )
    parser.add_argument("-h", "--help", action=ShowHelp, nargs="?", choices=("all",))
    if argv and argv[0].endswith((".yaml", ".yml", ".json")):
        settings = yaml.safe_load(Path(argv[0]).read_text(encoding="utf-8"))
        argv = [*_as_flags(settings), *argv[1:]]
    *arguments, unknown = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True)
    if unknown:
        known = [option for action in parser._actions for option in action.option_strings]
        near = difflib.get_close_matches(unknown[0].partition("=")[0], known, n=1)
        hint = f" Did you mean {near[0]}?" if near else " finetune.py --help all lists every flag."
        raise ValueError(f"there is no {' '.join(unknown)}.{hint}")
    return arguments


def _as_flags(settings):
    for name, value in settings.items():
        if value is None:
            continue
        yield f"--{name}"
        values = [] if value is True else value if isinstance(value, list) else [value]
        yield from (json.dumps(one) if isinstance(one, dict) else str(one) for one in values)


class Help(argparse.RawDescriptionHelpFormatter):
    """--help with finetune.py's text as it stands, one name a flag, and defaults that say much."""

    def __init__(self, prog):
        super().__init__(prog, max_help_position=34, width=100)

    def _format_action_invocation(self, action):
        shown = argparse.Action(action.option_strings[:1], action.dest, nargs=action.nargs)
        shown.metavar = action.metavar or action.dest.rpartition("_")[2].upper()
        if action.nargs == "?":  # true where it is given
            shown.nargs = 0
        return super()._format_action_invocation(shown)

    def _get_help_string(self, action):
        text = " ".join((action.help or "").split())
        shown = action.default not in (None, False, "", -1) and "default" not in text
        return f"{text} (default: %(default)s)" if shown else text


class ShowHelp(argparse.Action):
    """Prints --help, or with "all" every flag of the Trainer, too, and ends."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs | dict.fromkeys(("dest", "default", "help"), argparse.SUPPRESS))

    def __call__(self, parser, namespace, value, option=None):
        if value != "all":
            trainers = {one.name for one in fields(TrainingArguments)}
            for action in parser._actions:
                if action.dest in trainers:
                    action.help = COMMON.get(action.dest, argparse.SUPPRESS)
                if any(name.startswith("--no_") for name in action.option_strings):
                    action.help = argparse.SUPPRESS
        parser.print_help()
        parser.exit()
