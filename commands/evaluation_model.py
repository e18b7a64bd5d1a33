"""A VideoNSA checkpoint that is evaluated: asks it, and records how it answered.

evaluation_rows.py asks it the questions of a file, evaluation_harness.py those of lmms-eval.
"""

import json
import time
from collections import defaultdict
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import gather_object
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, GenerationConfig

from commands import processes
from commands.checkpoint_files import ADAPTER_CONFIG
from commands.evaluation_attention import AttentionRecorder, check
from commands.evaluation_cache import AnswerCache
from commands.evaluation_manifest import (
    code_digest,
    describe_videos,
    device_name,
    digest,
    versions,
    weights_digest,
)
from commands.evaluation_presets import ALIASES, LIMITS
from commands.finetuning_rows import set_videos
from commands.model_card import check_source, find_file
from commands.quantized_loading import loading_of
from commands.questions import collate
from nsa_released import vision_by_position
from nsa_rules import BRANCHES

# What reading a video can fail with; tasks call sys.exit where a file is missing.
UNREADABLE = (OSError, ValueError, SystemExit)


class EvaluatedModel:
    """A checkpoint or adapter with the processor, settings, record and kept answers of a run.

    pretrained, revision: folder or Hub id.  attention: "sparse", or "dense" with the same weights.
    branches: those whose gates stay open, joined by "+".  blocks, window, semantics: in place of
    the checkpoint's nsa_num_selected_blocks, nsa_window_size and nsa_semantics.  load_in: a name of
    `LOAD_IN`, to quantise the weights.  sequence_parallel_size: of the processes that were started,
    how many answer a question together.  limits: LIMITS, of every video that does not set its own.
    """

    folder = Path("out/evaluation/answers")  # of kept answers; main() sets it

    def __init__(
        self,
        pretrained,
        revision=None,
        attention="sparse",
        branches="compressed+selected+window",
        blocks=None,
        window=None,
        semantics=None,
        load_in=None,
        dtype=None,
        device=None,
        device_map=None,
        attn_implementation=None,
        batch_size=1,
        sequence_parallel_size=1,
        **limits,
    ):
        self.accelerator = make_accelerator()
        self.group = processes.group_of(sequence_parallel_size)
        # Questions are dealt out to groups, of which the first process keeps the answers.
        index, size = self.accelerator.process_index, sequence_parallel_size
        self.share, self.shares = index // size, self.accelerator.num_processes // size
        self.keeps = index % size == 0
        self.device = torch.device(device) if device else self.accelerator.device
        self.attention, self.batch_size, self.load_in = attention, int(batch_size), load_in
        self.branches = tuple(branches.split("+"))
        self.limits = {ALIASES.get(name, name): value for name, value in limits.items()}
        if unknown := sorted(set(self.limits) - set(LIMITS)):
            raise ValueError(
                f"model_args have {', '.join(unknown)}, which nothing reads; choose from "
                f"{', '.join(LIMITS)}."
            )
        if attention not in ("sparse", "dense"):
            raise ValueError(f"attention is {attention!r}; choose sparse or dense.")
        if unknown := set(self.branches) - set(BRANCHES):
            raise ValueError(f"branches has {unknown}; choose from {', '.join(BRANCHES)}.")

        text = {"nsa_num_selected_blocks": blocks, "nsa_window_size": window}
        text = {name: value for name, value in text.items() if value is not None}
        text["nsa_enabled"] = attention == "sparse"
        if semantics is not None:
            text["nsa_semantics"] = semantics
        settings = {"dtype": getattr(torch, dtype) if dtype else None, "load_in": load_in}
        settings["device_map"] = device_map or self.device
        if attn_implementation:
            settings["attn_implementation"] = attn_implementation
        self.model = load_model(pretrained, revision, text, **settings)
        self.processor = AutoProcessor.from_pretrained(
            pretrained, revision=revision, trust_remote_code=True
        )
        if len(self.branches) < len(BRANCHES) and self._is_released:
            raise ValueError(
                "branches can be closed under the paper's semantics only: the released ones give "
                "text a share of every branch that no gate closes. Leave branches away."
            )
        if self.group is not None:
            self.model.shard_sequences(self.group)
        self.recorder = AttentionRecorder(self.model, self.branches, self.group)
        self.checkpoint_generation = clear_generation_config(self.model)
        self.settings = self._describe(pretrained, revision)
        # Where a checkpoint lies does not change what it answers.
        content = {**self.settings, "checkpoint": self.settings["checkpoint"]["weights"]}
        self.fingerprint = digest(content)
        self.cache = AnswerCache(type(self).folder / self.fingerprint)
        self.accelerator.wait_for_everyone()  # before one of them adds to it
        self.records = []  # of the last call, of all processes

    @property
    def _is_released(self):
        return self.model.config.text_config.nsa_semantics == "released"

    def _describe(self, pretrained, revision):
        config, processor = self.model.config, self.processor
        return {
            "checkpoint": {
                "name": str(pretrained),
                "revision": getattr(config, "_commit_hash", None) or revision,
                "weights": weights_digest(self.model),
            },
            "code": code_digest(self.model, self.processor),
            "libraries": versions(),
            "device": device_name(self.model.device),
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "load_in": self.load_in,
            "batch_size": self.batch_size,
            "processes": 1 if self.group is None else self.group.size(),
            "attention": {
                "asked": self.attention,
                "semantics": config.text_config.nsa_semantics,
                "backend": config.text_config.nsa_backend,
                "block_size": config.text_config.nsa_block_size,
                "selected_blocks": config.text_config.nsa_num_selected_blocks,
                "window": config.text_config.nsa_window_size,
                "gates": {
                    branch: self.attention == "sparse" and branch in self.branches
                    for branch in BRANCHES
                },
                "text": config._attn_implementation,
            },
            "video": self.limits,
            "special_tokens": self.checkpoint_generation["kept"],
            "config": digest({**config.to_dict(), "_name_or_path": None}),
            "processor": digest(
                [
                    processor.video_processor.to_dict(),
                    processor.image_processor.to_dict(),
                    processor.chat_template,
                ]
            ),
        }

    def answer_all(self, samples) -> list[dict]:
        """A record for each of this process's samples; from the cache where it has it.

        samples: dicts with "task", "doc_id", "split"; "messages", or None and the reason as
        "error"; "files", what tells its media from others; and "generation", as from
        `generation_settings`. `self.records` are those of all processes.
        """
        records, waiting, repeats = {}, [], defaultdict(int)
        for index, sample in enumerate(samples):
            self._set_key(sample, repeats)
            if (known := self._known(sample["key"])) is not None:
                records[index] = {**known, "again": True}
                continue
            inputs = self._encode(sample)
            if self.group is not None:
                sample["error"] = first_error(sample["error"], self.group)
            if sample["error"] is not None:
                self._keep(sample)
                records[index] = _record(sample)
                continue
            if waiting and sample["generation"] != waiting[0][1]["generation"]:
                self._generate(waiting, records)
                waiting = []
            waiting.append((index, sample, inputs))
            if len(waiting) == self.batch_size:
                self._generate(waiting, records)
                waiting = []
        if waiting:
            self._generate(waiting, records)
        mine = [records[index] for index in range(len(records))]
        several = self.accelerator.num_processes > 1
        self.records = gather_object(mine if self.keeps else []) if several else mine
        refuse_all_unreadable(self.records)
        return mine

    def _known(self, key):
        """The record of this key in the cache, if all processes of the group have it."""
        known = self.cache.get(key)
        if self.group is not None:
            every = [None] * self.group.size()
            dist.all_gather_object(every, known is not None, group=self.group)
            known = known if all(every) else None
        return known

    def _set_key(self, sample, repeats):
        """What the sample's answer is kept by: all that could change it, and which time it is."""
        texts = [
            part["text"]
            for message in sample["messages"] or []
            for part in message["content"]
            if part["type"] == "text"
        ]
        content = [sample["task"], sample["doc_id"], texts, sample.get("files")]
        content.append(sample["generation"])
        repeats[str(content)] += 1
        sample["key"] = digest([self.fingerprint, *content, repeats[str(content)]])

    def _encode(self, sample):
        """The model's inputs of a sample; None, with the reason in it, if it is unreadable."""
        if sample["error"] is not None:
            return None
        set_videos(sample["messages"], self.limits)
        try:
            inputs = self.processor.apply_chat_template(
                sample["messages"],
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
            )
        except UNREADABLE as error:
            sample["error"] = str(error) or type(error).__name__
            return None
        ids, config = inputs["input_ids"][0], self.model.config
        kinds = {"image": config.image_token_id, "video": config.video_token_id}
        vision = [kinds[kind] for kind in config.text_config.nsa_modalities]
        is_vision = torch.isin(ids, torch.tensor(vision))
        if self._is_released:
            media = {name: inputs.get(name) for name in ("image_grid_thw", "video_grid_thw")}
            positions, _ = self.model.model.get_rope_index(ids[None], **media)
            is_vision &= vision_by_position(positions)[0]
        sample["vision_tokens"] = int(is_vision.sum())
        sample["prompt_tokens"] = len(ids)
        sample["videos"] = describe_videos(inputs, self.processor.video_processor)
        return inputs

    @torch.no_grad()
    def _generate(self, batch, records):
        indices, samples, inputs = zip(*batch, strict=True)
        settings = samples[0]["generation"]["applied"]
        if settings["do_sample"]:  # so that a run that goes on draws what it would have drawn
            torch.manual_seed(int(samples[0]["key"][:15], 16))
        together = collate(inputs, self.processor.tokenizer.pad_token_id).to(self.model.device)
        started = time.monotonic()
        self.recorder.clear()
        with self.recorder:
            output = self.model.generate(**together, **settings)
        seconds = round((time.monotonic() - started) / len(batch), 3)
        reports = self.recorder.reports([sample["vision_tokens"] for sample in samples])
        for report in reports:
            check(report, self.attention)
        given = output[:, together["input_ids"].shape[1] :].cpu()
        for index, sample, report, tokens in zip(indices, samples, reports, given, strict=True):
            text = self.processor.tokenizer.decode(tokens, skip_special_tokens=True)
            for stop in sample["generation"]["until"]:
                text = text.split(stop)[0]
            sample["answer"] = text.strip()
            sample["answer_tokens"] = int((tokens != self.processor.tokenizer.pad_token_id).sum())
            sample["seconds"] = seconds
            sample["attention"] = report
            self._keep(sample)
            records[index] = _record(sample)

    def _keep(self, sample):
        if self.keeps:
            self.cache.add(sample)


def make_accelerator() -> Accelerator:
    """That of the processes that were started, several of them on CPUs where there is no GPU."""
    processes.turn_off_multicast()
    return Accelerator(cpu=processes.count() > 1 and not torch.cuda.is_available())


def first_error(error: str | None, group) -> str | None:
    """The error of the first process of a group that has one, so that all leave a sample out."""
    every = [None] * group.size()
    dist.all_gather_object(every, error, group=group)
    return next((one for one in every if one is not None), None)


def _record(sample):
    return {name: value for name, value in sample.items() if name != "messages"}


def load_model(pretrained, revision, text, *, device_map, dtype=None, load_in=None, **settings):
    """The model with other values of its text config, an adapter merged into its base.

    Over quantised weights an adapter stays beside them: merged, it would be rounded with them.
    dtype: None is bfloat16 on a GPU, else float32, and what quantised weights were saved in.

    Raises ValueError for another kind of model, and for what quantised weights cannot be loaded in.
    """
    check_source(pretrained)
    adapter = find_file(pretrained, ADAPTER_CONFIG, revision)
    if adapter is not None:
        import peft  # needed for adapters only

        of = json.loads(adapter.read_text(encoding="utf-8"))
        if not of.get("base_model_name_or_path"):
            raise ValueError(f"{adapter} names no base: give its base_model_name_or_path.")
        settings |= {"device_map": device_map, "dtype": dtype, "load_in": load_in}
        base = load_model(of["base_model_name_or_path"], of.get("revision"), text, **settings)
        model = peft.PeftModel.from_pretrained(base, pretrained, revision=revision)
        quantised = getattr(base, "is_quantized", False)
        return (model.get_base_model() if quantised else model.merge_and_unload()).eval()
    source = {"revision": revision, "trust_remote_code": True}
    asked = {name: text[name] for name in ("nsa_semantics",) if name in text}
    config = AutoConfig.from_pretrained(pretrained, **asked, **source)
    if config.model_type != "videonsa":
        raise ValueError(
            f"{pretrained} is a {config.model_type}, which has no sparse attention and would "
            "run dense. convert_checkpoint.py makes a VideoNSA of a Qwen2.5-VL; with "
            "--attention dense that is the Qwen2.5-VL it came from."
        )
    on_gpu = torch.cuda.is_available() and str(device_map) != "cpu"
    usual = torch.bfloat16 if on_gpu else torch.float32
    loading = loading_of(load_in, config, str(device_map), dtype or usual)
    if dtype not in (None, loading["dtype"]):
        raise ValueError(
            f"dtype is {dtype}, and {pretrained} was quantised in {loading['dtype']}: leave dtype "
            "away, or quantise the whole weights with it."
        )
    own = config.text_config
    config.text_config = type(own).from_dict({**own.to_dict(), **text})
    return AutoModelForImageTextToText.from_pretrained(
        pretrained, config=config, device_map=device_map, **loading, **settings, **source
    ).eval()


def clear_generation_config(model):
    """Leave the model no generation settings but its special tokens; returns what it had."""
    own = model.generation_config.to_diff_dict()
    own.pop("transformers_version", None)
    tokens = {name: own.pop(name) for name in list(own) if name.endswith("_token_id")}
    model.generation_config = GenerationConfig(**tokens)
    return {"kept": tokens, "overridden": own}


def generation_settings(asked):
    """What `generate` gets of a task's generation_kwargs, and what becomes of the others.

    Greedy unless a temperature above 0 or do_sample asks for more. Returns {"applied", "until",
    "without_effect"}.
    """
    asked = {name: value for name, value in asked.items() if value is not None}
    until = asked.pop("until", [])
    until = [until] if isinstance(until, str) else until
    temperature = asked.get("temperature")
    sample = bool(asked.get("do_sample", (temperature or 0) > 0)) and temperature != 0
    known = set(GenerationConfig().to_dict())
    sampling = {"temperature", "top_p", "top_k", "min_p", "typical_p"}
    applied = {"max_new_tokens": 128, "num_beams": 1, "do_sample": sample}
    without_effect = {}
    for name, value in asked.items():
        if name == "do_sample":
            continue
        if name not in known or (name in sampling and not sample):
            without_effect[name] = value
        else:
            applied[name] = value
    return {
        "applied": applied,
        # lmms-eval adds the blank line between few-shot examples to every task that names none;
        # an answer may hold one.
        "until": [stop for stop in until if stop != "\n\n"],
        "without_effect": without_effect,
    }


def refuse_all_unreadable(records):
    """Raise RuntimeError for a task none of whose samples could be read."""
    by_task = defaultdict(list)
    for record in records:
        by_task[record["task"]].append(record["error"])
    for task, errors in by_task.items():
        if all(error is not None for error in errors):
            raise RuntimeError(
                f"none of the {len(errors)} samples of {task} could be read; the first: {errors[0]}"
            )
