"""What fine-tuning writes and goes on from: checkpoints that are whole, and a result that loads.

A checkpoint folder gets the file `save_completed` once all processes have written all of it; only
then are older ones deleted and is it pushed. A run resumes from folders with that file, so one that
was killed in the middle of a save goes on from the checkpoint before.
"""

import json
import re
import shutil
from pathlib import Path
from typing import NamedTuple

import torch
import transformers
from accelerate import PartialState
from huggingface_hub import HfApi
from safetensors import safe_open
from transformers import AutoModelForImageTextToText, TrainerCallback
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy

from commands.checkpoint_files import (
    ADAPTER_WEIGHTS,
    INDEX,
    SINGLE,
    copy_code,
    indexed_files,
    listed_files,
    upload,
)
from commands.finetuning_model import run_dtype
from commands.model_card import HUB_ID, Score, add_scores, find_file, make_card

logger = transformers.utils.logging.get_logger("finetune")

COMPLETE = "save_completed"
# What a run goes on from besides weights, and the files that hold it; DeepSpeed has its own folder.
STATE = {
    "the optimizer": ("optimizer*", "global_step*"),
    "the learning rate": ("scheduler.pt", "global_step*"),
    "the random numbers": ("rng_state*.pth",),
    "its progress": ("trainer_state.json",),
}


class WholeCheckpoints(TrainerCallback):
    """Marks whole checkpoints, and deletes old ones and pushes instead of the Trainer.

    The Trainer does both before all processes have written their part of a checkpoint: its own
    settings for them are switched off here. repo_id: on the Hub, where checkpoints are pushed.
    """

    def __init__(self, args, repo_id):
        self.repo_id = repo_id
        self.limit, args.save_total_limit = args.save_total_limit, None
        self.strategy, args.hub_strategy = HubStrategy(args.hub_strategy), HubStrategy.END
        self.pushed, self.push = None, None  # the last folder to be pushed, and its future
        self.started_at = 0

    def on_train_begin(self, args, state, control, **kwargs):
        self.started_at = state.global_step

    def on_epoch_end(self, args, state, control, **kwargs):
        if state.global_step == self.started_at:  # resumed at its end: nothing new to save
            control.should_save = False

    def on_save(self, args, state, control, **kwargs):
        folder = Path(args.output_dir, f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")
        PartialState().wait_for_everyone()
        if not args.should_save:
            return
        (folder / COMPLETE).touch()
        self._delete_old(args.output_dir, {folder, Path(state.best_model_checkpoint or folder)})
        if args.push_to_hub and state.is_world_process_zero and self.strategy != HubStrategy.END:
            self._start_push(args, folder)

    def on_train_end(self, args, state, control, **kwargs):
        if self.push is not None:
            self._finish_push()

    def _delete_old(self, output_dir, kept):
        """Deletes the oldest beyond the limit, but none of `kept`: the newest and the best."""
        if not self.limit or self.limit < 0:
            return
        others = [one for one in whole_checkpoints(output_dir) if one not in kept]
        for folder in others[: max(len(others) - max(self.limit - len(kept), 0), 0)]:
            if self.push is not None and not self.push.done() and folder == self.pushed:
                continue
            delete_checkpoint(folder)

    def _start_push(self, args, folder):
        if not is_loadable(folder):
            logger.warning(f"{folder.name} is in shards and not pushed; the result will be.")
            return
        if self.push is not None:
            if not self.push.done() and not args.hub_always_push:
                return
            self._finish_push()
        self.pushed = folder
        self.push = HfApi().run_as_future(self._push, args, folder)

    def _push(self, args, folder):
        step = folder.name.rpartition("-")[2]
        access = {"token": args.hub_token, "revision": args.hub_revision}
        names, message = listed_files(folder), f"Training in progress, step {step}"
        upload(folder, self.repo_id, names, message, args.hub_private_repo, **access)
        if self.strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            last = self.strategy == HubStrategy.CHECKPOINT
            HfApi().upload_folder(
                repo_id=self.repo_id,
                folder_path=folder,
                path_in_repo="last-checkpoint" if last else folder.name,
                delete_patterns="*",
                commit_message=f"{message}, checkpoint",
                **access,
            )

    def _finish_push(self):
        try:
            self.push.result()
        except Exception as error:  # the run goes on: all is on disk, and the result is pushed anew
            logger.warning(f"Pushing {self.pushed} failed: {type(error).__name__}: {error}")
        self.push = None


def whole_checkpoints(folder: str | Path) -> list[Path]:
    """The checkpoints in a folder that were completely saved, by step."""
    found = [marker.parent for marker in Path(folder).glob(f"{PREFIX_CHECKPOINT_DIR}-*/{COMPLETE}")]
    found = [one for one in found if one.name.rpartition("-")[2].isdigit()]
    return sorted(found, key=lambda one: int(one.name.rpartition("-")[2]))


def delete_checkpoint(folder: Path):
    """Deletes a checkpoint; one that is cut off in the middle of that does not count as whole."""
    (folder / COMPLETE).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def find_checkpoint(wanted: str | None, output_dir: str) -> Path | None:
    """The folder that --resume_from_checkpoint means; None to start from the beginning.

    wanted: a folder, or "last" (or "true") for the last whole checkpoint of `output_dir`, if any.
    Raises ValueError for a folder that was not completely saved, and either way for one that lacks
    some of `STATE`: the Trainer would start the optimizer, the schedule or the dropout anew. None
    while there are checkpoints is a ValueError, too: a new run would write over them.
    """
    whole = whole_checkpoints(output_dir)
    if wanted is None:
        if there := sorted(Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*")):
            last = f"the last whole one is {whole[-1].name}" if whole else "none of them whole"
            raise ValueError(
                f"{output_dir} has checkpoints of an earlier run ({len(there)}; {last}). Go on "
                "from there? Add --resume_from_checkpoint last. Start anew? Name another "
                f"--output_dir, or delete {output_dir}."
            )
        return None
    if wanted in ("last", "true", "True"):
        if not whole:
            logger.warning("Starting from scratch.")
            return None
        folder = whole[-1]
    else:
        folder = Path(wanted)
        last = f" The last whole checkpoint of {output_dir} is {whole[-1]}." if whole else ""
        if not folder.is_dir():
            raise ValueError(f"--resume_from_checkpoint {wanted}: there is no such folder.{last}")
        if not (folder / COMPLETE).exists():
            raise ValueError(
                f"{folder} was not completely saved: it has no file {COMPLETE}, which is written "
                f"last.{last} If you know that it is whole, make that file."
            )
    if lacking := [
        what
        for what, patterns in STATE.items()
        if not any(any(folder.glob(pattern)) for pattern in patterns)
    ]:
        raise ValueError(
            f"{folder} has no state of {', '.join(lacking)} (--save_only_model leaves it out), so "
            "a run cannot go on from it. To start anew from its weights, give it as "
            "--model_name_or_path."
        )
    logger.warning(f"Resuming from {folder}.")
    return folder


def say_other_processes(checkpoint: Path, processes: int):
    """A warning where another number of processes goes on from a checkpoint than saved it."""
    saved = len(list(checkpoint.glob("rng_state*.pth")))  # one of each process
    if saved != processes:
        logger.warning(
            f"{checkpoint} was saved by {saved} processes, and {processes} go on: a step takes "
            "other conversations than it would have, of this epoch some twice and some not at all, "
            f"and random numbers are drawn anew. To go on exactly, start {saved}."
        )


def how_to_go_on(args, step: int) -> str:
    """What to do after an interruption at a step."""
    whole = whole_checkpoints(args.output_dir)
    if not whole:
        return (
            f"Interrupted at step {step}, before any checkpoint was saved (--save_strategy "
            f"{args.save_strategy.value}, --save_steps {args.save_steps:g}). The same command "
            "starts anew."
        )
    return (
        f"Interrupted at step {step}. {whole[-1]} is whole: the same command with "
        "--resume_from_checkpoint last goes on from there."
    )


def check_keys(model, checkpoint: Path):
    """Raises ValueError unless a checkpoint has exactly the weights that the model would resume.

    The Trainer would go on without those that are missing, and count an adapter of another alpha
    for more or less than it was trained to. Weights in shards of FSDP or DeepSpeed
    are compared when they are loaded.
    """
    adapter, is_adapter = checkpoint / ADAPTER_WEIGHTS, hasattr(model, "peft_config")
    index, single = checkpoint / INDEX, checkpoint / SINGLE
    if adapter.exists() != is_adapter and (adapter.exists() or index.exists() or single.exists()):
        raise ValueError(
            f"{checkpoint} has {'an adapter' if adapter.exists() else 'whole weights'}, but this "
            f"run trains {'an adapter' if is_adapter else 'whole weights'}. Resume with the "
            "settings that it was made with (--lora_r)."
        )
    tied = set()
    if adapter.exists():
        import peft

        made_with = json.loads((checkpoint / "adapter_config.json").read_text())
        for name, flag in (("r", "lora_r"), ("lora_alpha", "lora_alpha")):
            given = getattr(model.peft_config["default"], name)
            if made_with[name] != given:
                raise ValueError(
                    f"{checkpoint} was trained with --{flag} {made_with[name]:g}, and this run has "
                    f"{given:g}. Resume with the settings that it was made with."
                )
        own, saved = set(peft.get_peft_model_state_dict(model)), _keys(adapter)
    elif index.exists():
        own, saved = set(model.state_dict()), set(json.loads(index.read_text())["weight_map"])
        tied = set(model.all_tied_weights_keys)
    elif single.exists():
        own, saved = set(model.state_dict()), _keys(single)
        tied = set(model.all_tied_weights_keys)
    else:
        return
    missing, unexpected = sorted(own - saved - tied), sorted(saved - own)
    if missing or unexpected:
        raise ValueError(
            f"the checkpoint lacks {len(missing)} weights that this run trains "
            f"({', '.join(missing[:3])}) and has {len(unexpected)} others "
            f"({', '.join(unexpected[:3])}). Resume with the settings that it was made with."
        )


def _keys(path):
    with safe_open(path, "pt") as file:
        return set(file.keys())


class Papers(NamedTuple):
    """The texts that go with weights: a licence if there is one, a card for each kind."""

    licence: str | None
    card: str
    adapter_card: str


def make_papers(model_args, data_args, args) -> Papers:
    """The papers of all that a run saves, made once at its start.

    The card names the data: sets on the Hub by their ids, files by name, no path of this machine.
    """
    base, revision = model_args.model_name_or_path, model_args.model_revision
    called = base if _is_hub_id(base) else Path(base).resolve().name
    sources = [name.partition("%")[0] for name in data_args.data]
    on_hub = list(dict.fromkeys(s.partition(":")[0] for s in sources if _is_hub_id(s)))
    named = [f"[{one}](https://huggingface.co/datasets/{one})" for one in on_hub]
    named += dict.fromkeys(f"`{Path(one).name}`" for one in sources if not _is_hub_id(one))
    how = f"{', '.join(model_args.parts)} trained"
    if model_args.lora_r:
        how += f" with adapters of rank {model_args.lora_r}"
    name = (args.hub_model_id if args.push_to_hub else None) or Path(args.output_dir).resolve().name
    description = f"{called}, fine-tuned by VideoNSA's `finetune.py`: {how}, on {', '.join(named)}."
    description += f"\n\n{_settings_table(model_args, data_args, args)}"
    licence = find_file(base, "LICENSE", revision)
    common = {"revision": revision, "datasets": on_hub}
    return Papers(
        licence.read_text(encoding="utf-8") if licence else None,
        make_card(name, base, description, **common, relation="finetune"),
        make_card(name, base, description, **common, relation="adapter", adapter_of=called),
    )


def _settings_table(model_args, data_args, args):
    """What the run was asked for, as a table of the card."""
    rates = {part: args.rate(part) for part in model_args.parts}
    same = len(set(rates.values())) == 1
    rate = ", ".join(f"{part} {value:g}" for part, value in rates.items())
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    video = {**data_args.video_settings(), "max_tokens": data_args.max_tokens}
    video = ", ".join(f"{name} {value}" for name, value in video.items() if value is not None)
    steps = f"{args.max_steps} steps" if args.max_steps > 0 else f"{args.num_train_epochs:g} epochs"
    rows = {
        "trained for": f"{steps} of {batch} conversations",
        "learning rate": f"{args.learning_rate:g}" if same else rate,
        "schedule": f"{args.lr_scheduler_type.value}, warmup {args.warmup_steps:g}",
        "optimizer": f"{getattr(args.optim, 'value', args.optim)}, weight decay "
        f"{args.weight_decay:g}",
        "adapters": f"rank {model_args.lora_r}, alpha "
        f"{model_args.lora_alpha or 2 * model_args.lora_r:g}"
        if model_args.lora_r
        else None,
        "videos": video or "as the checkpoint's processor takes them",
        "computed in": str(run_dtype(args)).removeprefix("torch."),
        "seed": args.seed,
        "libraries": f"torch {torch.__version__}, transformers {transformers.__version__}",
    }
    lines = [f"| {name} | {value} |" for name, value in rows.items() if value is not None]
    return "\n".join(["| training | |", "| --- | --- |", *lines])


def with_scores(papers: Papers, metrics: dict, eval_data: list[str]) -> Papers:
    """The papers with the scores of --eval_data, where there are any."""
    if not metrics:
        return papers
    data = ", ".join(name if _is_hub_id(name) else Path(name).name for name in eval_data)
    scores = [Score(data, "loss", metrics["eval_loss"], metrics["eval_samples"])]
    if "eval_exact_match" in metrics:
        exact, count = metrics["eval_exact_match"], metrics["eval_answers"]
        scores.append(Score(data, "exact_match", exact, count))
    return papers._replace(
        card=add_scores(papers.card, scores), adapter_card=add_scores(papers.adapter_card, scores)
    )


def _is_hub_id(name):
    name = name.partition(":")[0]
    return bool(HUB_ID.fullmatch(name)) and not Path(name).exists()


def prepare_folder(folder: str | Path, args):
    """Before a save: removes what an earlier run left of the same checkpoint."""
    is_checkpoint = re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-\d+", Path(folder).name)
    if is_checkpoint and Path(folder).parent == Path(args.output_dir) and args.should_save:
        delete_checkpoint(Path(folder))
    PartialState().wait_for_everyone()


def is_loadable(folder: str | Path) -> bool:
    """Whether a folder has weights as `from_pretrained` reads them, not FSDP's or DeepSpeed's."""
    return any(Path(folder, name).exists() for name in ("config.json", "adapter_config.json"))


def complete_folder(folder: str | Path, whole: bool, papers: Papers):
    """After a save: adds what loading needs besides weights and processor, and the `papers`.

    whole: whether whole weights were saved, else an adapter. Weights of the other kind, or in other
    shards, that an earlier run left in the folder are removed: loading would take them instead.
    """
    folder = Path(folder)
    if not is_loadable(folder):
        return
    index, single = folder / INDEX, folder / SINGLE
    stale = [folder / "config.json", index, *folder.glob("model*.safetensors")]
    if whole:
        copy_code(folder)
        stale = [folder / "adapter_config.json", folder / ADAPTER_WEIGHTS]
        if index.exists():
            shards = [folder / name for name in indexed_files(index)]
            stale.append(single if all(shard.exists() for shard in shards) else index)
    for path in stale:
        path.unlink(missing_ok=True)
    card = papers.card if whole else papers.adapter_card
    (folder / "README.md").write_text(card, encoding="utf-8")
    if papers.licence:
        (folder / "LICENSE").write_text(papers.licence, encoding="utf-8")


def save_result(trainer, model_args):
    """Writes the result to the output folder, in the dtype of the run, and pushes it if asked."""
    args, out = trainer.args, Path(trainer.args.output_dir)
    if trainer.is_fsdp_enabled:
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    if not (trainer.is_deepspeed_enabled or model_args.lora_r):
        trainer.model.to(run_dtype(args))
    trainer.save_model(str(out / "adapter" if model_args.merge_lora else out), _internal_call=True)
    if model_args.merge_lora and args.should_save:
        merge(model_args, args, out / "adapter", out)
        trainer.processing_class.save_pretrained(out)
        complete_folder(out, True, trainer.papers)
    trainer.accelerator.wait_for_everyone()
    trainer.save_state()
    if args.push_to_hub:
        trainer.push_to_hub()


def merge(model_args, args, adapter, out):
    """Writes base and adapter as one checkpoint; on the CPU, as the model may be in shards."""
    import peft

    unset_hf_deepspeed_config()  # this process loads the base alone, and so whole
    base = AutoModelForImageTextToText.from_pretrained(
        model_args.model_name_or_path,
        revision=model_args.model_revision,
        dtype=run_dtype(args),
        trust_remote_code=True,
        **model_args.fields,
    )
    if getattr(base, "is_quantized", False):
        base = base.dequantize()
    merged = peft.PeftModel.from_pretrained(base, str(adapter)).merge_and_unload()
    merged.save_pretrained(out)
