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
folder. A run first says what training on the data will take; --dry_run measures all of it, says
that, and trains nothing.

--eval_data is scored at the end, and by --eval_strategy on the way: its loss, and exact match of
answers that are generated for a sample. --load_best_model_at_end and --early_stopping_patience go
by these.

--train names what trains: vision (the tower), merger, llm, gates. With --lora_r, vision and llm get
adapters, and merger and gates train whole beside them. What trains is kept in float32; the rest is
in bfloat16 with --bf16. --resume_from_checkpoint last goes on from the last checkpoint, if any.
"""

import functools
import sys
from pathlib import Path

import transformers
from transformers import AutoConfig, AutoProcessor
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from commands import finetuning_arguments
from commands.finetuning_data import Collator, Conversations, DataReport
from commands.finetuning_flags import refuse_evaluation, refuse_quantised, refuse_together
from commands.finetuning_model import keep_vision_calls_equal, load_model
from commands.finetuning_saving import (
    check_keys,
    find_checkpoint,
    how_to_go_on,
    make_papers,
    save_result,
    say_other_processes,
    with_scores,
)
from commands.finetuning_summary import print_next_steps, summarize
from commands.finetuning_trainer import VideoNSATrainer
from commands.processes import turn_off_multicast

logger = transformers.utils.logging.get_logger("finetune")


def parse(argv):
    """The model's, the data's and the Trainer's arguments of a command line."""
    return finetuning_arguments.parse(argv, __doc__)


def prepare(argv):
    """(trainer, checkpoint to go on from, model's and data's arguments); None after a dry run.

    Raises ValueError, OSError or ImportError for all that can be known to fail before training.
    """
    turn_off_multicast()
    model_args, data_args, args = parse(argv)
    refuse_together(model_args, args)
    refuse_evaluation(data_args, args)
    checkpoint = None
    if not data_args.dry_run:
        checkpoint = find_checkpoint(args.resume_from_checkpoint, args.output_dir)
    transformers.utils.logging.set_verbosity(args.get_process_log_level())
    base_is_local = Path(model_args.model_name_or_path).is_dir()
    if args.push_to_hub and base_is_local and model_args.lora_r and not model_args.merge_lora:
        logger.warning(
            f"The adapter that is pushed names {model_args.model_name_or_path} as its base, which "
            "only this machine has. Push the base and train from its id, or add --merge_lora."
        )
    name, revision = model_args.model_name_or_path, model_args.model_revision
    load = {"revision": revision, "trust_remote_code": True}
    with args.main_process_first(desc="loading the checkpoint's code"):
        config = AutoConfig.from_pretrained(name, **load)
        processor = AutoProcessor.from_pretrained(name, **load)
        if data_args.timestamps:
            processor.video_processor.timestamps = True
        if code := getattr(config, "auto_map", {}).get("AutoModelForImageTextToText"):
            get_class_from_dynamic_module(code, name, revision=revision)
    refuse_quantised(config, model_args, args)
    read = functools.partial(
        Conversations,
        processor=processor,
        root=data_args.data_root,
        settings=data_args.video_settings(),
        max_tokens=data_args.max_tokens,
        seed=args.seed if args.data_seed is None else args.data_seed,
    )
    data = read(data_args.data)
    eval_data = read(data_args.eval_data) if data_args.eval_data else None
    if args.process_index == 0:
        if unread := data.unread_keys():
            logger.warning(
                f"Nothing reads {', '.join(unread)} of the rows: they are taken as notes."
            )
        if checkpoint is None:
            DataReport(args.output_dir).clear()
        at_most = {"at_most": None} if data_args.dry_run else {}
        summarize(data, eval_data, config, model_args, args, **at_most)
    if data_args.dry_run:
        return None

    transformers.set_seed(args.seed)
    papers = make_papers(model_args, data_args, args)
    model = load_model(model_args, args)
    if checkpoint is not None:
        check_keys(model, checkpoint)
        say_other_processes(checkpoint, args.world_size)
    trainer = VideoNSATrainer(
        model=model,
        args=args,
        papers=papers,
        eval_answers=data_args.eval_answers if eval_data else 0,
        train_dataset=data,
        eval_dataset=eval_data,
        data_collator=Collator(processor, config),
        processing_class=processor,
    )
    kinds = max(one.kinds_of_media() for one in (data, eval_data) if one is not None)
    keep_vision_calls_equal(trainer.base, kinds)
    return trainer, checkpoint, model_args, data_args


def train(trainer, checkpoint, model_args, data_args):
    """Trains, saves the result, and says where it is; after Ctrl-C, how to go on."""
    is_first = trainer.is_world_process_zero()
    try:
        trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
    except KeyboardInterrupt:
        if is_first:
            print(f"\n{how_to_go_on(trainer.args, trainer.state.global_step)}")
        sys.exit(130)
    scores = trainer.last_evaluation()
    trainer.papers = with_scores(trainer.papers, scores, data_args.eval_data)
    save_result(trainer, model_args)
    if is_first:
        print_next_steps(trainer.args, scores)


def main(argv=None):
    """Runs with the flags of a command line; returns the trainer, or None after a dry run."""
    prepared = prepare(sys.argv[1:] if argv is None else argv)
    if prepared is None:
        return None
    train(*prepared)
    return prepared[0]


if __name__ == "__main__":
    try:
        prepared = prepare(sys.argv[1:])
    except (ValueError, OSError, ImportError) as error:
        print(f"finetune.py: {error}", file=sys.stderr)
        sys.exit(2)
    if prepared is not None:
        train(*prepared)
