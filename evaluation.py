"""Evaluate VideoNSA on the benchmarks of lmms-eval, and keep a record that proves what ran.

    python evaluation.py --model . --tasks clips
    python evaluation.py --model VideoNSA-7B --tasks mlvu_test,videomme --preset mlvu
    accelerate launch --num_processes 8 evaluation.py --model VideoNSA-7B --tasks timescope \\
        --preset timescope --attention dense
    python evaluation.py --compare out/evaluation

Tasks, prompts and scores are lmms-eval's own; every option that is not listed below goes to it
(--limit, --batch_size, --gen_kwargs, --seed, ...). What is taken of a video comes from --preset, or
from --model_args: fps, num_frames, max_frames, min_pixels, max_pixels, total_pixels, max_tokens, as
README.md describes them. Other model_args: dtype, device_map, attn_implementation.

Beside each score a manifest says what was evaluated on what, how, and how many vision tokens went
through the sparse attention. Any other number than --attention asks for ends the run without a
score. Answers are kept one by one under OUTPUT_PATH/answers: the same command goes on where a
killed one was; an answer is taken again only if nothing that could change it has changed.
"""

import argparse
import hashlib
import inspect
import json
import platform
import subprocess
import sys
import time
import uuid
from collections import defaultdict
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, GenerationConfig

from evaluation_answers import options_of, read_answer, right_letter
from evaluation_attention import BRANCHES, Witness, check, make_dense

try:
    import lmms_eval.__main__ as harness
    from accelerate import Accelerator
    from accelerate.utils import gather_object
    from lmms_eval.api.instance import GenerationResult, TokenCounts
    from lmms_eval.api.model import lmms
    from lmms_eval.models import MODEL_REGISTRY_V2
    from lmms_eval.models.registry_v2 import ModelManifest
    from lmms_eval.protocol import ChatMessages
    from loguru import logger
    from tqdm import tqdm
except ImportError as error:
    raise ImportError(
        f"evaluation.py needs lmms-eval, and {error.name} is not installed. In an environment of "
        "its own (lmms-eval wants av < 16): "
        "pip install -r requirements-eval.txt -c constraints-eval.txt"
    ) from error

HERE = Path(__file__).resolve().parent
PACKAGES = (
    "lmms_eval",
    "torch",
    "torchvision",
    "transformers",
    "accelerate",
    "datasets",
    "av",
    "triton",
)
# Settings of a video's message, by the names that users of lmms-eval's models know as well.
LIMITS = (
    "fps",
    "num_frames",
    "max_frames",
    "min_pixels",
    "max_pixels",
    "total_pixels",
    "max_tokens",
)
ALIASES = {"max_num_frames": "max_frames", "nframes": "num_frames"}
TOKEN = 28 * 28  # pixels of one token; two frames share theirs
# What reading a video can fail with; tasks call sys.exit where a file is missing.
UNREADABLE = (OSError, ValueError, SystemExit)


@dataclass(frozen=True)
class Preset:
    """What one benchmark was evaluated with.

    paper: from VideoNSA's table 5. released: from the code that was released with it, where the
    paper is silent. ours: neither says.
    """

    paper: dict
    released: dict = field(default_factory=dict)
    ours: dict = field(default_factory=dict)


def paper_preset(frames, tokens_per_frame, new_tokens):
    # Neither says at which rate those frames are taken: we take that many, evenly.
    return Preset(
        paper={"max_pixels": tokens_per_frame * TOKEN, "max_new_tokens": new_tokens},
        released={
            "min_pixels": min(256, tokens_per_frame) * TOKEN,
            "total_pixels": 128000 * TOKEN * 9 // 10,
        },
        ours={"num_frames": frames},
    )


PRESETS = {
    "longvideobench": paper_preset(256, 512, 32),
    "longtimescope": paper_preset(512, 128, 16),
    "timescope": paper_preset(2048, 64, 16),
    "mlvu": paper_preset(512, 128, 16),
    "vsibench": paper_preset(128, 256, 16),
    # The table's columns are swapped here: 4 is the rate, 256 the tokens per frame.
    "tomato": Preset(
        paper={"fps": 4, "max_pixels": 256 * TOKEN, "max_new_tokens": 1024},
        released={"min_pixels": 256 * TOKEN, "total_pixels": 128000 * TOKEN * 9 // 10},
        ours={"max_frames": 2048},
    ),
    "clips": Preset(
        paper={},
        ours={
            "fps": 2,
            "max_frames": 1000,
            "min_pixels": 256 * TOKEN,
            "max_pixels": 256 * TOKEN,
            "total_pixels": 128000 * TOKEN,
        },
    ),
}


class VideoNSA(lmms):
    """A VideoNSA checkpoint as a chat model of lmms-eval.

    pretrained, revision: folder or Hub id.  attention: "sparse", or "dense" with the same weights.
    branches: those whose gates stay open, joined by "+".  blocks, window: in place of the
    checkpoint's nsa_num_selected_blocks and nsa_window_size.  limits: LIMITS, of every video.
    """

    is_simple = False
    answers = HERE / "out" / "evaluation" / "answers"  # folder; main() sets it
    loaded = None  # the last one made, which lmms-eval does not hand out

    def __init__(
        self,
        pretrained,
        revision=None,
        attention="sparse",
        branches="compressed+selected+window",
        blocks=None,
        window=None,
        dtype=None,
        device=None,
        device_map=None,
        attn_implementation=None,
        batch_size=1,
        max_batch_size=None,
        **limits,
    ):
        super().__init__()
        self.accelerator = Accelerator()
        self._rank, self._world_size = (
            self.accelerator.process_index,
            self.accelerator.num_processes,
        )
        self.device = torch.device(device) if device else self.accelerator.device
        self.attention, self.batch_size = attention, int(batch_size)
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

        source = {"trust_remote_code": True, "revision": revision}
        config = AutoConfig.from_pretrained(pretrained, **source)
        if config.model_type != "videonsa":
            raise ValueError(
                f"{pretrained} is a {config.model_type}, which has no sparse attention and would "
                "run dense. convert_checkpoint.py makes a VideoNSA of a Qwen2.5-VL; with "
                "--attention dense that is the Qwen2.5-VL it came from."
            )
        changed = {"nsa_num_selected_blocks": blocks, "nsa_window_size": window}
        changed = {name: value for name, value in changed.items() if value is not None}
        text = config.text_config
        config.text_config = type(text).from_dict({**text.to_dict(), **changed})
        default = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        self.model = AutoModelForImageTextToText.from_pretrained(
            pretrained,
            config=config,
            dtype=getattr(torch, dtype) if dtype else default,
            device_map=device_map or self.device,
            **({"attn_implementation": attn_implementation} if attn_implementation else {}),
            **source,
        ).eval()
        self.processor = AutoProcessor.from_pretrained(pretrained, **source)
        self.witness = Witness(self.model, self.branches)
        if attention == "dense":
            make_dense(self.model.model.language_model)
        self.brought = take_over_generation(self.model)
        self.settings = self._describe(pretrained, revision)
        # Where a checkpoint lies does not change what it answers.
        content = {**self.settings, "checkpoint": self.settings["checkpoint"]["weights"]}
        self.fingerprint = digest(content)
        self.journal = Journal(type(self).answers / self.fingerprint)
        self.records = []  # of the last call, of all processes
        type(self).loaded = self

    def _describe(self, pretrained, revision):
        config, processor = self.model.config, self.processor
        return {
            "checkpoint": {
                "name": str(pretrained),
                "revision": getattr(config, "_commit_hash", None) or revision,
                "weights": weights_digest(self.model),
            },
            "code": code_digest(self.model),
            "libraries": versions(),
            "device": device_name(self.model.device),
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "batch_size": self.batch_size,
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
            "config": digest(config.to_dict()),
            "processor": digest(
                [
                    processor.video_processor.to_dict(),
                    processor.image_processor.to_dict(),
                    processor.chat_template,
                ]
            ),
        }

    def generate_until(self, requests):
        """One answer per request; from the journal where it has it."""
        answers, waiting, repeats = [None] * len(requests), [], defaultdict(int)
        self.records = []
        for index, request in enumerate(tqdm(requests, disable=self.rank > 0, desc="Answering")):
            if request.metadata.get("__padding_only__"):  # nobody scores it
                answers[index] = GenerationResult("")
                continue
            sample = self._prepare(request, repeats)
            if (known := self.journal.get(sample["key"])) is not None:
                self._answer(answers, index, {**known, "again": True})
                continue
            inputs = self._encode(sample)
            if inputs is None:
                self.journal.add(sample)
                self._answer(answers, index, sample)
                continue
            if waiting and sample["generation"] != waiting[0][1]["generation"]:
                self._generate(waiting, answers)
                waiting = []
            waiting.append((index, sample, inputs))
            if len(waiting) == self.batch_size:
                self._generate(waiting, answers)
                waiting = []
        if waiting:
            self._generate(waiting, answers)
        self.records = gather_object(self.records) if self.world_size > 1 else self.records
        refuse_all_unreadable(self.records)
        return answers

    def _prepare(self, request, repeats):
        """A sample of a request: what it asks, its key, and its record so far."""
        _, to_messages, asked, doc_id, task, split = request.args
        doc = self.task_dict[task][split][doc_id]
        sample = {"task": task, "doc_id": doc_id, "split": split, "messages": None, "error": None}
        try:
            messages = ChatMessages(messages=to_messages(doc)).to_hf_messages()
            media = [part for one in messages for part in one["content"] if part["type"] != "text"]
            if not media and any("video" in name for name in doc):
                raise OSError("the task found no video for this sample")
            sample["messages"] = messages
            sample["files"] = [describe_medium(part) for part in media]
        except UNREADABLE as error:
            sample["error"] = str(error) or type(error).__name__
        sample["generation"] = generation_settings(asked)
        texts = [
            part["text"]
            for message in sample["messages"] or []
            for part in message["content"]
            if part["type"] == "text"
        ]
        content = [task, doc_id, texts, sample.get("files"), sample["generation"]]
        repeats[str(content)] += 1
        sample["key"] = digest([self.fingerprint, *content, repeats[str(content)]])
        return sample

    def _encode(self, sample):
        """The model's inputs of a sample; None, with the reason in it, if it is unreadable."""
        if sample["error"] is not None:
            return None
        for message in sample["messages"]:
            for part in message["content"]:
                if part["type"] == "video":
                    part.update(self.limits)
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
        sample["vision_tokens"] = int(torch.isin(ids, torch.tensor(vision)).sum())
        sample["prompt_tokens"] = len(ids)
        sample["videos"] = describe_videos(inputs, self.processor.video_processor)
        return inputs

    @torch.no_grad()
    def _generate(self, batch, answers):
        indices, samples, inputs = zip(*batch, strict=True)
        settings = samples[0]["generation"]["applied"]
        if settings["do_sample"]:  # so that a run that goes on draws what it would have drawn
            torch.manual_seed(int(samples[0]["key"][:15], 16))
        together = collate(inputs, self.processor.tokenizer.pad_token_id).to(self.model.device)
        started = time.monotonic()
        self.witness.clear()
        with self.witness:
            output = self.model.generate(**together, **settings)
        seconds = round((time.monotonic() - started) / len(batch), 3)
        reports = self.witness.reports([sample["vision_tokens"] for sample in samples])
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
            sample["witness"] = report
            self.journal.add(sample)
            self._answer(answers, index, sample)

    def _answer(self, answers, index, sample):
        record = {name: value for name, value in sample.items() if name != "messages"}
        self.records.append(record)
        counts = TokenCounts(record.get("prompt_tokens"), record.get("answer_tokens"))
        answers[index] = GenerationResult(record.get("answer", ""), counts)

    def loglikelihood(self, requests):
        raise NotImplementedError("VideoNSA answers in words; choose a generate_until task.")

    def generate_until_multi_round(self, requests):
        raise NotImplementedError("evaluation.py asks one question a sample, not several rounds.")


class Journal:
    """Answers by key, in files of one JSON object a line; each process writes its own file."""

    def __init__(self, folder):
        self.folder, self.known = Path(folder), {}
        for file in sorted(self.folder.glob("*.jsonl")):
            for line in file.read_text(encoding="utf-8").splitlines():
                try:
                    record = json.loads(line)
                except json.JSONDecodeError:  # a process was killed while it wrote this
                    continue
                # What could not be read may be readable by now.
                if record["error"] is None:
                    self.known[record["key"]] = record
        self.file = None

    def get(self, key):
        return self.known.get(key)

    def add(self, sample):
        if self.file is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.file = open(self.folder / f"{uuid.uuid4().hex}.jsonl", "a", encoding="utf-8")
        record = {name: value for name, value in sample.items() if name != "messages"}
        self.file.write(json.dumps(record) + "\n")
        self.file.flush()


def take_over_generation(model):
    """Leave the model no generation settings but its special tokens; returns what it had."""
    brought = model.generation_config.to_diff_dict()
    brought.pop("transformers_version", None)
    tokens = {name: brought.pop(name) for name in list(brought) if name.endswith("_token_id")}
    model.generation_config = GenerationConfig(**tokens)
    return {"kept": tokens, "overridden": brought}


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
    drawing = {"temperature", "top_p", "top_k", "min_p", "typical_p"}
    applied = {"max_new_tokens": 128, "num_beams": 1, "do_sample": sample}
    without_effect = {}
    for name, value in asked.items():
        if name == "do_sample":
            continue
        if name not in known or (name in drawing and not sample):
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


def collate(inputs, pad):
    """Inputs of single samples as one batch, padded on the left."""
    if len(inputs) == 1:
        return inputs[0]
    batch, longest = type(inputs[0])(), max(one["input_ids"].shape[1] for one in inputs)
    for name in {name: None for one in inputs for name in one}:
        parts = [torch.as_tensor(one[name]) for one in inputs if name in one]
        if name in ("input_ids", "attention_mask", "mm_token_type_ids"):
            value = pad if name == "input_ids" else 0
            parts = [
                torch.nn.functional.pad(part, (longest - part.shape[1], 0), value=value)
                for part in parts
            ]
        batch[name] = torch.cat(parts)
    return batch


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


def describe_medium(part):
    """Name and digest of an image or video of a message."""
    medium = part.get("video", part.get("image"))
    span = {name: part[name] for name in ("video_start", "video_end") if name in part}
    if isinstance(medium, (str, Path)) and Path(medium).is_file():
        with open(medium, "rb") as file:
            # The ends of a file and its size tell it from another without reading it whole.
            start, size = file.read(2**16), file.seek(0, 2)
            file.seek(max(0, size - 2**16))
            content = hashlib.sha256(start + file.read() + str(size).encode()).hexdigest()[:16]
        return {"file": Path(medium).name, "content": content, **span}
    if hasattr(medium, "tobytes"):
        return {"file": part["type"], "content": hashlib.sha256(medium.tobytes()).hexdigest()[:16]}
    return {"file": str(medium), "content": None, **span}


def describe_videos(inputs, processor):
    """Frames, size, sampled rate and tokens of each video, as the model gets it."""
    grids, seconds = inputs.get("video_grid_thw"), inputs.get("second_per_grid_ts")
    pair, patch, merge = processor.temporal_patch_size, processor.patch_size, processor.merge_size
    return [
        {
            "frames": time * pair,
            "height": height * patch,
            "width": width * patch,
            "fps": round(pair / float(step), 4),
            "tokens": time * height * width // merge**2,
        }
        for (time, height, width), step in zip(
            [] if grids is None else grids.tolist(), [] if seconds is None else seconds, strict=True
        )
    ]


def digest(value):
    """16 hexadecimal digits of anything JSON can hold; other objects count by what they print."""
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def weights_digest(model):
    """A digest of the weights that are loaded, wherever they came from."""
    tensors = [
        (name, str(x.dtype), list(x.shape), int(x.contiguous().view(torch.uint8).sum()))
        for name, x in model.state_dict().items()
        if x.numel()
    ]
    return digest(tensors)


def code_digest(model):
    """A digest of the checkpoint's code as loaded, and of this script with its commit."""
    loaded = Path(inspect.getfile(type(model))).parent
    own = sorted(HERE.glob("evaluation*.py"))
    sources = {path.name: path.read_text(encoding="utf-8") for path in [*loaded.glob("*.py"), *own]}
    return digest(sources)


def commit():
    """The commit of the repository that this script is in, with "+" where files were changed."""
    git = ["git", "-C", str(HERE)]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True)
        dirty = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True)
    except OSError:
        return None
    return head.stdout.strip() + "+" * bool(dirty.stdout) if head.returncode == 0 else None


def versions():
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            pass
    return found


def device_name(device):
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device.type)


def write_manifests(model, args, results, samples):
    """A manifest beside lmms-eval's results for each task; returns their paths.

    results and samples are what lmms-eval's cli_evaluate_single returns.
    """
    folder = Path(args.output_path) / results["model_name_sanitized"]
    date, paths = results["date"].replace(":", "-"), []
    for task, logged in samples.items():
        records = {r["doc_id"]: r for r in model.records if r["task"] == task}
        manifest = {
            "task": {
                "name": task,
                "version": results["versions"].get(task),
                "config": digest(results["configs"][task]),
                "settings": results["configs"][task].get("dataset_kwargs"),
                "documents": results.get("task_hashes", {}).get(task),
                "dataset": results["configs"][task].get("dataset_path"),
                "revision": revision_of(model.task_dict[task]),
            },
            "date": results["date"],
            "command": args.command,
            "scores": scores_of(results["results"][task]),
            **summarize(logged, records, model.task_dict[task]),
            "proof": prove(records.values(), model.attention),
            "preset": args.preset_record,
            "generation": {
                "from_checkpoint": model.brought,
                "by_task": distinct(r["generation"] for r in records.values()),
            },
            "fingerprint": model.fingerprint,
            "settings": {**model.settings, "commit": commit()},
            "per_sample": [records[doc_id] for doc_id in sorted(records)],
        }
        path = folder / f"{date}_manifest_{task}.json"
        path.write_text(json.dumps(manifest, indent=1, default=str) + "\n", encoding="utf-8")
        paths.append(path)
    return paths


def scores_of(results):
    """Metric to score, without lmms-eval's filter names and errors."""
    return {
        name.removesuffix(",none"): value
        for name, value in results.items()
        if isinstance(value, (int, float)) and "stderr" not in name and name != "samples"
    }


def distinct(items):
    return list({json.dumps(item, sort_keys=True): item for item in items}.values())


def revision_of(dataset):
    """The commit that a task's documents came from on the Hub; None for others."""
    sources = list(next(iter(dataset.values())).info.download_checksums or {})
    found = {s.split("@", 1)[1].split("/")[0] for s in sources if s.startswith("hf://")}
    return ", ".join(sorted(found)) or None


def summarize(logged, records, dataset):
    """Over how many samples a score is, what could not be read, and our own reading of letters.

    lmms-eval's score counts a sample without a readable video as answered with nothing.
    """
    logged = {sample["doc_id"]: sample for sample in logged}
    undecodable = [r for r in records.values() if r["error"] is not None]
    right, unreadable, choices = 0, [], 0
    docs = dataset[next(iter(records.values()))["split"]]
    for doc_id, sample in logged.items():
        options = options_of(str(sample["input"]))
        letter = right_letter(sample["target"], docs[doc_id], options)
        if not options or letter is None:
            continue
        choices += 1
        answer = records[doc_id].get("answer", "")
        said = read_answer(answer, options)
        right += said == letter
        if said is None and records[doc_id]["error"] is None:
            unreadable.append({"doc_id": doc_id, "answer": answer})
    return {
        "samples": {
            "scored": len(logged),
            "of": len(docs),
            "answered": len(records) - len(undecodable),
            "undecodable": len(undecodable),
            "from_an_earlier_run": sum(bool(r.get("again")) for r in records.values()),
        },
        "undecodable": [
            {"doc_id": r["doc_id"], "files": r.get("files"), "reason": r["error"]}
            for r in undecodable
        ],
        "multiple_choice": {
            "questions": choices,
            "accuracy": right / choices if choices else None,
            "unreadable": unreadable,
        },
    }


def prove(records, attention):
    """The sum of all samples' witnesses; raises WrongAttention where one saw other attention."""
    reports = [record["witness"] for record in records if record["error"] is None]
    for report in reports:
        check(report, attention)
    total = sum(report["vision_tokens"] for report in reports)
    columns = zip(*(report["sparse_tokens_by_layer"] for report in reports), strict=True)
    layers = [sum(column) for column in columns]
    return {
        "vision_tokens": total,
        "sparse_tokens_by_layer": layers,
        "sparse_share_of_layers": sum(map(bool, layers)) / len(layers),
        "sparse_share_of_tokens": sum(layers) / (total * len(layers)) if total else 0.0,
        "functions": sorted({name for report in reports for name in report["functions"]}),
        "settings": distinct(r["settings"] for r in reports if r["settings"]),
        "mean_gates": {
            branch: round(sum(r["mean_gates"][branch] for r in reports) / len(reports), 4)
            for branch in BRANCHES
        },
    }


def compare(paths):
    """One table of manifests, files or folders of them: a row per score, a column per setting.

    Of several manifests of one setting and task the one over the most samples counts, then the
    newest.
    """
    files = [
        file
        for path in map(Path, paths)
        for file in (sorted(path.rglob("*_manifest_*.json")) if path.is_dir() else [path])
    ]
    if not files:
        raise ValueError(f"there is no manifest in {', '.join(map(str, paths))}")
    best = {}
    for file in files:
        manifest = json.loads(file.read_text(encoding="utf-8"))
        place = (label(manifest), manifest["fingerprint"]), manifest["task"]["name"]
        rank = (manifest["samples"]["scored"], manifest["date"])
        if place not in best or rank > best[place][0]:
            best[place] = rank, manifest
    cells, columns = defaultdict(dict), sorted({column for column, _ in best})
    for (column, task), (_, manifest) in best.items():
        count, multiple = manifest["samples"], manifest["multiple_choice"]
        for metric, score in manifest["scores"].items():
            cells[task, 1, metric][column] = f"{score:.4g}"
        if multiple["questions"]:
            unread = len(multiple["unreadable"])
            cells[task, 2, "read alike"][column] = f"{multiple['accuracy']:.4g} ({unread} unread)"
        cells[task, 3, "samples"][column] = f"{count['scored']} of {count['of']}" + (
            f", {count['undecodable']} undecodable" if count["undecodable"] else ""
        )
    lines = [["task", "", *(name for name, _ in columns)], ["---"] * (len(columns) + 2)]
    for (task, _, metric), row in sorted(cells.items()):
        lines.append([task, metric, *(row.get(column, "") for column in columns)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def label(manifest):
    """A column's name: checkpoint, attention and what is not as the checkpoint has it."""
    settings = manifest["settings"]
    attention = settings["attention"]
    parts = [Path(settings["checkpoint"]["name"]).resolve().name, attention["asked"]]
    if attention["asked"] == "sparse":
        gates = [branch for branch, is_open in attention["gates"].items() if is_open]
        parts.append("+".join(gates) if len(gates) < len(BRANCHES) else "all branches")
        parts.append(f"b{attention['selected_blocks']} w{attention['window']}")
    if manifest["preset"]:
        parts.append(f"preset {manifest['preset']['name']}")
    parts += [
        f"{name} {value}" for name, value in (manifest["preset"] or {}).get("yours", {}).items()
    ]
    return ", ".join(parts)


def parse_arguments(argv):
    """(our options, lmms-eval's arguments)"""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="For lmms-eval's options: lmms-eval eval --help",
        allow_abbrev=False,
    )
    parser.add_argument("--model", metavar="DIR|ID", help="checkpoint")
    parser.add_argument("--revision", help="of a checkpoint on the Hub")
    parser.add_argument("--preset", choices=sorted(PRESETS), help="frames, pixels and new tokens")
    parser.add_argument("--attention", choices=("sparse", "dense"), default="sparse")
    parser.add_argument(
        "--branches",
        default=",".join(BRANCHES),
        help="branches whose gates stay open (default: all), comma-separated",
    )
    parser.add_argument("--blocks", type=int, metavar="N", help="selected blocks of a query")
    parser.add_argument("--window", type=int, metavar="N", help="keys in the sliding window")
    parser.add_argument("--model_args", default="", metavar="NAME=VALUE,...")
    parser.add_argument("--gen_kwargs", default="", metavar="NAME=VALUE,...")
    parser.add_argument("--include_path", default=str(HERE / "benchmarks" / "clips"))
    parser.add_argument("--output_path", default="out/evaluation", metavar="DIR")
    parser.add_argument("--compare", nargs="+", metavar="PATH", help="print a table of manifests")
    options, others = parser.parse_known_args(argv)
    if options.compare is None and options.model is None:
        parser.error("give --model, or --compare")
    if any(argument.split("=")[0] in ("--use_cache", "-c") for argument in others):
        parser.error(
            "--use_cache gives old answers of other weights; evaluation.py keeps answers itself"
        )
    return options, others


def harness_arguments(options, others):
    """lmms-eval's arguments, and the record of the preset for the manifest."""
    preset = PRESETS[options.preset] if options.preset else Preset({})
    settings = {**preset.ours, **preset.released, **preset.paper}
    new_tokens = settings.pop("max_new_tokens", None)
    yours = dict(pair.split("=", 1) for pair in filter(None, options.model_args.split(",")))
    yours = {ALIASES.get(name, name): value for name, value in yours.items()}
    if "fps" in yours or "max_frames" in yours:  # a rate and a number of frames exclude each other
        settings.pop("num_frames", None)
    if "num_frames" in yours:
        settings.pop("fps", None)
    model_args = {
        "pretrained": options.model,
        "revision": options.revision,
        "attention": options.attention,
        "branches": options.branches.replace(",", "+"),
        "blocks": options.blocks,
        "window": options.window,
        **settings,
        **yours,
    }
    generation = f"max_new_tokens={new_tokens}" if new_tokens else ""
    arguments = [
        *("--model", "videonsa"),
        *("--model_args", ",".join(f"{k}={v}" for k, v in model_args.items() if v is not None)),
        *("--gen_kwargs", ",".join(filter(None, (generation, options.gen_kwargs)))),
        *("--include_path", options.include_path),
        *("--output_path", options.output_path),
        "--log_samples",
        *others,
    ]
    record = {
        "name": options.preset,
        "paper": preset.paper,
        "released": preset.released,
        "ours": preset.ours,
        "yours": yours,
    }
    return arguments, record if options.preset or yours else None


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    options, others = parse_arguments(argv)
    if options.compare is not None:
        print(compare(options.compare))
        return 0
    arguments, preset_record = harness_arguments(options, others)
    MODEL_REGISTRY_V2.register_manifest(
        ModelManifest("videonsa", chat_class_path=f"{__name__}.VideoNSA"), overwrite=True
    )
    VideoNSA.answers = Path(options.output_path) / "answers"
    errors, stock = [], harness.cli_evaluate_single

    def evaluate(args):
        try:
            results, samples = stock(args)
            if results is not None:  # on the first process
                args.command, args.preset_record = argv, preset_record
                for path in write_manifests(VideoNSA.loaded, args, results, samples):
                    logger.info(f"Manifest: {path}")
        except Exception as error:  # lmms-eval only logs it
            errors.append(error)
            raise
        return results, samples

    given, sys.argv = sys.argv, ["lmms-eval", *arguments]
    harness.cli_evaluate_single = evaluate
    try:
        harness.cli_evaluate()
    finally:
        harness.cli_evaluate_single, sys.argv = stock, given
    for error in errors:
        print(f"evaluation.py: {error}", file=sys.stderr)
    return 1 if errors else 0


if __name__ == "__main__":
    sys.exit(main())
