"""Fine-tune VideoNSA on conversations about videos and images, with the Hugging Face Trainer.

    python finetune.py --model_name_or_path . --data clips/clips.jsonl --output_dir out/tuned
    python finetune.py examples/recipes/lora_one_gpu.yaml --data train.json%50 more.parquet
    torchrun --nproc_per_node 8 finetune.py examples/recipes/fsdp2.yaml --learning_rate 2e-6

Settings come as flags, from a YAML or JSON file, or both, where flags win. Beside those below there
are all of the Trainer's (--per_device_train_batch_size, --gradient_accumulation_steps, --bf16,
--gradient_checkpointing, --report_to, --push_to_hub, ...).

--data takes .json, .jsonl, .csv, .tsv and .parquet files, folders and ids on the Hub; "name%50"
takes a random half of one; docs/training.md lists the layouts of rows. Paths of media start from
the folder of their file, or from --data_root. Rows that cannot be read are skipped; those and
conversations that gave up frames for --max_tokens are listed in data_report.jsonl in the output
folder. --dry_run goes through the data, says what training on it would take, and trains nothing.

--train names what trains: vision (the tower), merger, llm, gates. With --lora_r, vision and llm get
adapters, and merger and gates train whole beside them. What trains is kept in float32; the rest is
in bfloat16 with --bf16. --resume_from_checkpoint last goes on from the last checkpoint, if any.
"""

import argparse
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path

import transformers
import yaml
from transformers import AutoConfig, AutoProcessor, HfArgumentParser, TrainingArguments
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from commands.finetuning_data import Collator, Conversations, DataReport
from commands.finetuning_dry_run import dry_run
from commands.finetuning_flags import refuse_flags, refuse_together
from commands.finetuning_model import PARTS, keep_vision_calls_equal, load_model
from commands.finetuning_saving import check_keys, find_checkpoint, make_papers, save_result
from commands.finetuning_trainer import VideoNSATrainer

logger = transformers.utils.logging.get_logger("finetune")


@dataclass
class ModelArguments:
    model_name_or_path: str = field(metadata={"help": "folder or Hub id of a VideoNSA checkpoint"})
    model_revision: str = field(default="main", metadata={"help": "branch, tag or commit"})
    semantics: str | None = field(
        default=None,
        metadata={"help": "paper or released: nsa_semantics to train with and to save"},
    )
    train: str = field(default="llm,gates", metadata={"help": f"any of {','.join(PARTS)}"})
    lora_r: int = field(default=0, metadata={"help": "rank of the adapters; 0 trains whole parts"})
    lora_alpha: float | None = field(default=None, metadata={"help": "default: twice the rank"})
    lora_dropout: float = 0.0
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
    data: list[str] = field(
        metadata={"help": "data sets, each with an optional share: set.json%%50"}
    )
    data_root: str | None = field(
        default=None, metadata={"help": "where paths of media start from"}
    )
    max_tokens: int | None = field(
        default=None, metadata={"help": "of a conversation; videos give up frames to meet it"}
    )
    fps: float | None = field(default=None, metadata={"help": "frames a second (default 2)"})
    num_frames: int | None = field(default=None, metadata={"help": "frames, instead of a rate"})
    min_frames: int | None = None
    max_frames: int | None = None
    min_pixels: int | None = field(default=None, metadata={"help": "of a frame"})
    max_pixels: int | None = field(default=None, metadata={"help": "of a frame"})
    total_pixels: int | None = field(default=None, metadata={"help": "of a video"})
    video_readers: int | None = field(
        default=None, metadata={"help": "threads that read a video, at most"}
    )
    dry_run: bool = field(default=False, metadata={"help": "measure the data, train nothing"})

    def video_settings(self):
        names = ("fps", "num_frames", "min_frames", "max_frames")
        names += ("min_pixels", "max_pixels", "total_pixels", "video_readers")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}


@dataclass
class FinetuneArguments(TrainingArguments):
    learning_rate: float = 1e-5
    gate_lr: float | None = field(default=None, metadata={"help": "of the gates"})
    merger_lr: float | None = field(default=None, metadata={"help": "of the merger"})
    vision_lr: float | None = field(default=None, metadata={"help": "of the vision tower"})
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

    def rate(self, part):
        own = {"gates": self.gate_lr, "merger": self.merger_lr, "vision": self.vision_lr}.get(part)
        return self.learning_rate if own is None else own


class Help(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """--help with this file's text as it stands."""


def parse(argv):
    """The three groups of arguments from flags, a settings file, or one followed by flags."""
    parser = HfArgumentParser(
        (ModelArguments, DataArguments, FinetuneArguments),
        description=__doc__,
        formatter_class=Help,
    )
    if argv and argv[0].endswith((".yaml", ".yml", ".json")):
        settings = yaml.safe_load(Path(argv[0]).read_text(encoding="utf-8"))
        argv = [*_as_flags(settings), *argv[1:]]
    return parser.parse_args_into_dataclasses(argv)


def _as_flags(settings):
    for name, value in settings.items():
        if value is None:
            continue
        yield f"--{name}"
        values = [] if value is True else value if isinstance(value, list) else [value]
        yield from (json.dumps(one) if isinstance(one, dict) else str(one) for one in values)


def main(argv=None):
    """Runs with the flags of a command line; returns the trainer, or None after a dry run."""
    model_args, data_args, args = parse(sys.argv[1:] if argv is None else argv)
    refuse_together(model_args, args)
    transformers.utils.logging.set_verbosity(args.get_process_log_level())
    base_is_local = Path(model_args.model_name_or_path).is_dir()
    if args.push_to_hub and base_is_local and model_args.lora_r and not model_args.merge_lora:
        logger.warning(
            f"The adapter that is pushed names {model_args.model_name_or_path} as its base, which "
            "only this machine has. Push the base and train from its id, or add --merge_lora."
        )
    transformers.set_seed(args.seed)
    name, revision = model_args.model_name_or_path, model_args.model_revision
    load = {"revision": revision, "trust_remote_code": True}
    with args.main_process_first(desc="loading the checkpoint's code"):
        config = AutoConfig.from_pretrained(name, **load)
        processor = AutoProcessor.from_pretrained(name, **load)
        if code := getattr(config, "auto_map", {}).get("AutoModelForImageTextToText"):
            get_class_from_dynamic_module(code, name, revision=revision)
    data = Conversations(
        data_args.data,
        processor,
        root=data_args.data_root,
        settings=data_args.video_settings(),
        max_tokens=data_args.max_tokens,
        seed=args.seed if args.data_seed is None else args.data_seed,
    )
    if args.process_index == 0 and (unread := data.unread_keys()):
        logger.warning(f"Nothing reads {', '.join(unread)} of the rows: they are taken as notes.")
    if data_args.dry_run:
        dry_run(data, config, model_args, args)
        return None

    checkpoint = find_checkpoint(args.resume_from_checkpoint, args.output_dir)
    papers = make_papers(model_args, data_args.data, args)
    if checkpoint is None and args.should_save:
        DataReport(args.output_dir).clear()
    model = load_model(model_args, args)
    if checkpoint is not None:
        check_keys(model, checkpoint)
    trainer = VideoNSATrainer(
        model=model,
        args=args,
        papers=papers,
        train_dataset=data,
        data_collator=Collator(processor, config),
        processing_class=processor,
    )
    keep_vision_calls_equal(trainer.base, data.kinds_of_media())
    trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
    save_result(trainer, model_args)
    return trainer


if __name__ == "__main__":
    main()
