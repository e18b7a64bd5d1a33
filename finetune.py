"""Fine-tune VideoNSA on conversations about videos and images, with the Hugging Face Trainer.

    python finetune.py --model_name_or_path . --data clips/clips.jsonl --output_dir out/tuned
    python finetune.py examples/recipes/lora_one_gpu.yaml --data train.json%50 more.parquet
    torchrun --nproc_per_node 8 finetune.py examples/recipes/fsdp2.yaml --learning_rate 2e-6

Settings come as flags, from a YAML or JSON file, or both, where flags win. Beside those below there
are all of the Trainer's (--per_device_train_batch_size, --gradient_accumulation_steps, --bf16,
--gradient_checkpointing, --report_to, --push_to_hub, ...).

--data takes .json, .jsonl and .parquet files, folders and ids on the Hub; "name%50" takes a random
half of one; commands/finetuning_data.py describes the layouts. Paths of media start from the folder
of their file, or from --data_root. Media that cannot be read are skipped; those and conversations
that gave up frames for --max_tokens are listed in data_report.jsonl in the output folder. --dry_run
goes through the data, says what training on it would take, and trains nothing.

--train names what trains: vision (the tower), merger, llm, gates. With --lora_r, vision and llm get
adapters, and merger and gates train whole beside them. What trains is kept in float32; the rest is
in bfloat16 with --bf16. --resume_from_checkpoint last goes on from the last checkpoint, if any.
"""

import argparse
import functools
import json
import math
import os
import shutil
import statistics
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import torch
import transformers
import yaml
from safetensors import safe_open
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
)
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.trainer_utils import get_last_checkpoint, rotate_checkpoints

from commands.finetuning_data import Collator, Conversations

logger = transformers.utils.logging.get_logger("finetune")

PARTS = ("llm", "gates", "merger", "vision")
BRANCHES = ("compressed", "selected", "window")
REPORT = "data_report.jsonl"
INCOMPLETE = "_incomplete"  # pushes to the Hub leave out what starts with an underscore


@dataclass
class ModelArguments:
    model_name_or_path: str = field(metadata={"help": "folder or Hub id of a VideoNSA checkpoint"})
    model_revision: str = field(default="main", metadata={"help": "branch, tag or commit"})
    train: str = field(default="llm,gates", metadata={"help": f"any of {','.join(PARTS)}"})
    lora_r: int = field(default=0, metadata={"help": "rank of the adapters; 0 trains whole parts"})
    lora_alpha: float | None = field(default=None, metadata={"help": "default: twice the rank"})
    lora_dropout: float = 0.0
    lora_modules: str = field(
        default="q_proj,k_proj,v_proj,o_proj,qkv,proj",
        metadata={"help": "linear layers with adapters, in the llm and in the vision tower"},
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
        if self.merge_lora and not self.lora_r:
            raise ValueError("--merge_lora without --lora_r: there will be no adapter to merge.")


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
    dry_run: bool = field(default=False, metadata={"help": "measure the data, train nothing"})

    def video_settings(self):
        names = ("fps", "num_frames", "min_frames", "max_frames")
        names += ("min_pixels", "max_pixels", "total_pixels")
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


# The model: what trains, and how.


def part_of(name):
    """The part of the model that a parameter belongs to, by its name."""
    if ".g_proj_" in name:
        return "gates"
    if ".visual." in name:
        return "merger" if ".visual.merger." in name else "vision"
    return "llm"


def load_model(model_args, args):
    """The checkpoint with its trainable parts chosen; frozen weights in the dtype of the run."""
    model = AutoModelForImageTextToText.from_pretrained(
        model_args.model_name_or_path,
        revision=model_args.model_revision,
        dtype=run_dtype(args),
        trust_remote_code=True,
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
    if not args.deepspeed:  # which keeps its own copies in float32
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
    run_frozen_tower_without_graph(base.model.visual)
    return model


def add_adapters(model, model_args, parts):
    import peft

    stems = {"llm": r"language_model\.layers", "vision": r"visual\.blocks"}
    stems = "|".join(stem for part, stem in stems.items() if part in parts)
    modules = "|".join(model_args.lora_modules.replace(" ", "").split(","))
    whole = {"gates": ["g_proj_1", "g_proj_2"], "merger": ["merger"]}
    config = peft.LoraConfig(
        r=model_args.lora_r,
        lora_alpha=model_args.lora_alpha or 2 * model_args.lora_r,
        lora_dropout=model_args.lora_dropout,
        target_modules=rf".*({stems})\.\d+\.(.*\.)?({modules})",
        modules_to_save=[name for part in PARTS if part in parts for name in whole.get(part, [])],
        revision=model_args.model_revision,
    )
    if os.path.isdir(model_args.model_name_or_path):  # the adapter may be loaded from elsewhere
        model.name_or_path = os.path.abspath(model_args.model_name_or_path)
    return peft.get_peft_model(model, config)


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
    """Makes every training step run the vision tower `calls` times, once per kind of medium.

    Processes that share sharded parameters must use them in step: one whose batch has no video
    while another's has would hang. What is missing is made up by the smallest picture, whose
    features are multiplied by zero. One process does the same, so that it trains the same.
    """
    inner, vision = model.model, model.config.vision_config
    side = vision.spatial_merge_size
    patch = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    missing = 0

    def count(module, args, kwargs):
        nonlocal missing
        given = [kwargs.get(name) for name in ("pixel_values", "pixel_values_videos")]
        missing = calls - sum(pixels is not None for pixels in given) if module.training else 0

    def make_up(module, args, embeddings):
        for _ in range(missing):
            pixels = torch.zeros(side * side, patch, device=embeddings.device)
            grid = torch.tensor([[1, side, side]], device=embeddings.device)
            features = inner.visual(pixels, grid_thw=grid).pooler_output
            embeddings = embeddings + 0 * features.sum().to(embeddings.dtype)
        return embeddings

    inner.register_forward_pre_hook(count, with_kwargs=True)
    inner.get_input_embeddings().register_forward_hook(make_up)


# Training.


class GateMeter:
    """Means of the gates over vision tokens and heads, per layer and branch.

    Sums stay on the device until they are read, so that no step waits for them.
    """

    def __init__(self, language_model):
        self.layers = language_model.layers
        self.temperature = language_model.config.nsa_gate_temperature
        for index, layer in enumerate(self.layers):
            add = functools.partial(self._add, index)
            layer.self_attn.g_proj_2.register_forward_hook(add)
        self._reset()

    def _reset(self):
        self.sums, self.counts = [0.0] * len(self.layers), [0] * len(self.layers)

    def _add(self, index, module, args, logits):
        if logits.ndim != 2:  # text alone, where the gates have no part in the result
            return
        gates = (logits.detach().float() / self.temperature).sigmoid().unflatten(-1, (-1, 3))
        self.sums[index] = self.sums[index] + gates.sum((0, 1))
        self.counts[index] += gates.shape[0] * gates.shape[1]

    def read(self, accelerator):
        """[layers, 3] means over all processes since the last call; NaN where none was used."""
        device = accelerator.device
        zero = torch.zeros(3, device=device)
        sums = torch.stack([zero + total for total in self.sums])
        counts = torch.tensor(self.counts, device=device, dtype=torch.float)[:, None]
        total = accelerator.reduce(torch.cat([sums, counts], dim=1))
        self._reset()
        return (total[:, :3] / total[:, 3:]).cpu()


class VideoNSATrainer(Trainer):
    """The Trainer with learning rates by part, the gates in its log, and only whole checkpoints.

    A checkpoint is written in a folder of another name and renamed when it is complete, so that a
    folder checkpoint-N can always be resumed from.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        model = self.accelerator.unwrap_model(self.model)
        self.base = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.gates = GateMeter(self.base.model.language_model)
        self.writing_to = None
        self.report = Path(self.args.output_dir, REPORT)
        self.reported = {(what, place) for what, place, _ in read_report(self.report)}
        self.seen, self.logs, self.since = Counter(), 0, time.perf_counter()

    def create_optimizer(self, model=None):
        optimizer = super().create_optimizer(model)
        names = {id(p): name for name, p in (model or self.model).named_parameters()}
        groups = []
        for group in optimizer.param_groups:
            for part in PARTS:
                own = [p for p in group["params"] if part_of(names[id(p)]) == part]
                if own:
                    groups.append({**group, "params": own, "lr": self.args.rate(part)})
        optimizer.param_groups[:] = groups
        return optimizer

    def _prepare_inputs(self, inputs):
        stats = inputs.pop("stats", None)
        if stats is not None:
            self.note(stats.pop("notes"))
            self.seen.update(stats)
        return super()._prepare_inputs(inputs)

    def note(self, notes):
        """Lists what happened to the data, each row once, and says the first of it."""
        for what, place, why in notes:
            if (what, place) in self.reported:
                continue
            self.reported.add((what, place))
            write_report(self.report, [(what, place, why)])
            if len(self.reported) <= 10:
                logger.warning(f"{what} {place}: {why}")

    def log(self, logs, start_time=None):
        if "loss" in logs:
            logs.update(self._measurements())
        super().log(logs, start_time)

    def _measurements(self):
        names = ("tokens", "attended", "dense")
        mine = torch.tensor([float(self.seen[name]) for name in names], device=self.args.device)
        tokens, attended, dense = self.accelerator.reduce(mine.double()).tolist()
        seconds, self.since = time.perf_counter() - self.since, time.perf_counter()
        self.seen.clear()
        gates = self.gates.read(self.accelerator)
        listed = Counter(what for what, _ in {line[:2] for line in read_report(self.report)})
        means = zip(BRANCHES, gates.nanmean(0).tolist(), strict=True)
        measured = {f"gate_{branch}": mean for branch, mean in means} | {
            "keys_attended": attended / dense,
            "tokens_per_second": tokens / seconds,
            "skipped_samples": listed["skipped"],
            "shortened_samples": listed["shortened"],
        }
        if torch.cuda.is_available():
            measured["peak_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
        if self.logs % self.args.gates_by_layer_every == 0:
            for layer, means in enumerate(gates.tolist()):
                for branch, mean in zip(BRANCHES, means, strict=True):
                    measured[f"gates_by_layer/{layer:02d}_{branch}"] = mean
        self.logs += 1
        return {name: value for name, value in measured.items() if not math.isnan(value)}

    def _save_checkpoint(self, model, trial):
        folder = Path(self.args.output_dir)
        final = folder / f"checkpoint-{self.state.global_step}"
        self.writing_to = folder / INCOMPLETE
        if self.args.should_save:
            shutil.rmtree(self.writing_to, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()
        written, self.writing_to = self.writing_to / final.name, None
        if self.args.should_save:
            shutil.rmtree(final, ignore_errors=True)
            os.rename(written, final)
            os.rmdir(written.parent)
            rotate_checkpoints(str(folder), self.args.save_total_limit, use_mtime=True)
        self.accelerator.wait_for_everyone()
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(final))

    def _save(self, output_dir=None, state_dict=None):
        # FSDP2 gives the model a class of its own; what is saved names its class and copies its
        # code, and both have to be the model's.
        own = type(self.base)
        model = next(one for one in own.__mro__ if not one.__module__.startswith("torch."))
        own.__name__, own.__module__ = model.__name__, model.__module__
        super()._save(output_dir, state_dict)

    def _get_output_dir(self, trial):
        return str(self.writing_to) if self.writing_to else super()._get_output_dir(trial)

    def _push_from_checkpoint(self, checkpoint_folder):
        if self.writing_to is None:  # else too early: it is about to be renamed
            super()._push_from_checkpoint(checkpoint_folder)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        adapter = Path(resume_from_checkpoint, "adapter_model.safetensors")
        if adapter.exists():
            import peft

            with safe_open(adapter, "pt") as file:
                saved = set(file.keys())
            own = set(peft.get_peft_model_state_dict(self.accelerator.unwrap_model(self.model)))
            self._refuse_other_keys(sorted(own - saved), sorted(saved - own))
        super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _issue_warnings_after_load(self, load_result):
        tied = set(self.base.all_tied_weights_keys)
        missing = [key for key in load_result.missing_keys if key not in tied]
        self._refuse_other_keys(missing, load_result.unexpected_keys)

    def _refuse_other_keys(self, missing, unexpected):
        if missing or unexpected:
            raise ValueError(
                f"the checkpoint lacks {len(missing)} weights that this run trains "
                f"({', '.join(missing[:3])}) and has {len(unexpected)} others "
                f"({', '.join(unexpected[:3])}). Resume with the settings that it was made with."
            )


def read_report(path):
    """The (what, place, why) of every line of a data report; none where there is no file."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines()
    return [tuple(json.loads(line).values()) for line in lines]


def write_report(path, notes):
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", encoding="utf-8") as file:
        for what, place, why in notes:
            file.write(json.dumps({"what": what, "row": place, "why": why}) + "\n")


def save_result(trainer, model_args):
    """Writes the result to the output folder, in the dtype of the run, with the code to load it."""
    args, out = trainer.args, Path(trainer.args.output_dir)
    if trainer.is_fsdp_enabled:
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    if not (trainer.is_deepspeed_enabled or model_args.lora_r):
        trainer.model.to(run_dtype(args))
    trainer.save_model(str(out / "adapter") if model_args.merge_lora else None, _internal_call=True)
    if model_args.merge_lora and args.should_save:
        merge(model_args, args, out / "adapter", out)
        trainer.processing_class.save_pretrained(out)
    trainer.accelerator.wait_for_everyone()
    trainer.save_state()
    if args.push_to_hub:
        trainer.push_to_hub(
            finetuned_from=model_args.model_name_or_path, tags=["videonsa", "video-text-to-text"]
        )


def merge(model_args, args, adapter, out):
    """Writes base and adapter as one checkpoint; on the CPU, as the model may be in shards."""
    import peft

    base = AutoModelForImageTextToText.from_pretrained(
        model_args.model_name_or_path,
        revision=model_args.model_revision,
        dtype=run_dtype(args),
        trust_remote_code=True,
    )
    merged = peft.PeftModel.from_pretrained(base, str(adapter)).merge_and_unload()
    merged.save_pretrained(out)


# What training would take.


class Measured(Dataset):
    """The lengths of the items of `Conversations`."""

    def __init__(self, data):
        self.data = data

    def __len__(self):
        return len(self.data)

    def __getitem__(self, index):
        return self.data.measured(index)


def dry_run(data, config, model_args, args):
    """Goes through the data and prints its lengths and what training on it would take."""
    loader = DataLoader(
        Measured(data), batch_size=None, num_workers=args.dataloader_num_workers, shuffle=False
    )
    items = list(tqdm(loader, desc="Measuring", unit=" rows", disable=args.disable_tqdm))
    notes = [note for item in items for note in item["notes"]]
    usable = [item for item in items if "tokens" in item]
    Path(args.output_dir, REPORT).unlink(missing_ok=True)
    write_report(Path(args.output_dir, REPORT), notes)
    counts = Counter(what for what, _, _ in notes)
    print(f"{len(data):,} conversations in {', '.join(data.names)}")
    print(
        f"{counts['skipped']:,} would be skipped, {counts['shortened']:,} give up frames to meet "
        f"--max_tokens: see {Path(args.output_dir, REPORT)}"
    )
    for what, place, why in notes[:5]:
        print(f"  {what} {place}: {why}")
    if not usable:
        raise SystemExit("No conversation can be used.")
    tokens = sorted(item["tokens"] for item in usable)
    vision, labels = (sum(item[name] for item in usable) for name in ("vision_tokens", "labels"))
    print(
        f"Tokens a conversation: {tokens[0]:,} to {tokens[-1]:,}, median "
        f"{statistics.median(tokens):,.0f}, 95 % up to {tokens[int(0.95 * (len(tokens) - 1))]:,}; "
        f"{sum(tokens):,} in all, {vision / sum(tokens):.1%} of them vision, {labels:,} labels"
    )
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    steps = math.ceil(len(data) / batch)
    epochs = args.num_train_epochs
    if args.max_steps > 0:
        epochs = args.max_steps / steps
    print(
        f"{math.ceil(steps * epochs):,} steps of {batch} conversations ({epochs:g} epochs), about "
        f"{sum(tokens) / len(usable) * len(data) * epochs:,.0f} tokens"
    )
    longest = max(usable, key=lambda item: item["tokens"])
    forecast_memory(config, model_args, args, longest)


def forecast_memory(config, model_args, args, longest):
    """Prints parameters by part and an estimate of one device's memory, nothing being sharded."""
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config, trust_remote_code=True)
        model = choose_trained(model, model_args, args)
    every, trained = Counter(), Counter()
    for name, parameter in model.named_parameters():
        if ".original_module." in name:
            continue  # PEFT's frozen copy of what it trains whole
        every[part_of(name)] += parameter.numel()
        trained[part_of(name)] += parameter.numel() * parameter.requires_grad
    print("Trained: " + ", ".join(f"{trained[p]:,} of {every[p]:,} in {p}" for p in PARTS))
    text, width = config.text_config, run_dtype(args).itemsize
    tokens = longest["tokens"] * args.per_device_train_batch_size
    # A trained weight: itself, its gradient and AdamW's two moments, in float32.
    weights = 16 * trained.total() + width * (every.total() - trained.total())
    layer = tokens * width * (4 * text.intermediate_size + 16 * text.hidden_size) * 1.4
    if args.gradient_checkpointing:
        layer += tokens * width * text.hidden_size * text.num_hidden_layers
    else:
        layer *= text.num_hidden_layers
    logits = 10 * longest["labels"] * args.per_device_train_batch_size * text.vocab_size
    print(
        f"Memory for batches of the longest conversation, an estimate without sharding: "
        f"{(weights + layer + logits) / 2**30:.2f} GiB (weights and optimizer "
        f"{weights / 2**30:.2f}, activations {layer / 2**30:.2f}, logits {logits / 2**30:.2f})"
    )


def main(argv=None):
    """Runs with the flags of a command line; returns the trainer, or None after a dry run."""
    model_args, data_args, args = parse(sys.argv[1:] if argv is None else argv)
    if model_args.lora_r and (args.fsdp_config or {}).get("activation_checkpointing"):
        raise ValueError(
            "fsdp_config's activation_checkpointing renames modules, and then adapters cannot be "
            "saved. With --lora_r, use --gradient_checkpointing instead."
        )
    transformers.utils.logging.set_verbosity(args.get_process_log_level())
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
        seed=args.data_seed or args.seed,
    )
    if data_args.dry_run:
        dry_run(data, config, model_args, args)
        return None

    checkpoint = args.resume_from_checkpoint
    if checkpoint in ("last", "true", "True"):
        os.makedirs(args.output_dir, exist_ok=True)
        checkpoint = get_last_checkpoint(args.output_dir)
        logger.warning(f"Resuming from {checkpoint}." if checkpoint else "Starting from scratch.")
    if checkpoint is None and args.should_save:
        Path(args.output_dir, REPORT).unlink(missing_ok=True)
    model = load_model(model_args, args)
    trainer = VideoNSATrainer(
        model=model,
        args=args,
        train_dataset=data,
        data_collator=Collator(processor, config),
        processing_class=processor,
    )
    keep_vision_calls_equal(trainer.base, data.kinds_of_media())
    trainer.train(resume_from_checkpoint=checkpoint)
    save_result(trainer, model_args)
    return trainer


if __name__ == "__main__":
    main()
