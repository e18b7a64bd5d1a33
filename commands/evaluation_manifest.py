"""What an evaluation leaves: a manifest beside each score, and one table of many manifests."""

import hashlib
import inspect
import json
import platform
import subprocess
from collections import defaultdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from commands import ROOT
from commands.evaluation_answers import read_answer
from commands.evaluation_attention import check
from commands.evaluation_options import options_of, right_letter
from commands.quantized_loading import plain_state_dict
from nsa_rules import BRANCHES

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


def write_manifests(model, args, results, samples):
    """A manifest beside lmms-eval's results for each task; returns their paths.

    results and samples are what lmms-eval's cli_evaluate_single returns.
    """
    folder, paths = Path(args.output_path) / results["model_name_sanitized"], []
    for task, logged in samples.items():
        records = {r["doc_id"]: r for r in model.records if r["task"] == task}
        described = {
            "name": task,
            "version": results["versions"].get(task),
            "config": digest(results["configs"][task]),
            "settings": results["configs"][task].get("dataset_kwargs"),
            "documents": results.get("task_hashes", {}).get(task),
            "dataset": results["configs"][task].get("dataset_path"),
            "revision": revision_of(model.task_dict[task]),
        }
        scores = scores_of(results["results"][task])
        counted = summarize(logged, records, model.task_dict[task])
        run = {
            "date": results["date"],
            "command": args.command,
            "preset": args.preset_record,
        }
        paths.append(write_manifest(folder, model, described, run, scores, counted, records))
    return paths


def write_manifest(folder, model, task, run, scores, counted, records) -> Path:
    """Writes the manifest of one task to `folder`; returns its path.

    task: what was asked.  run: "date", "command" and "preset".  counted: from `summarize`.
    records: of `EvaluatedModel`, by doc_id.
    """
    manifest = {
        "task": task,
        "date": run["date"],
        "command": run["command"],
        "scores": scores,
        **counted,
        "proof": prove(records.values(), model.attention),
        "preset": run["preset"],
        "generation": {
            "from_checkpoint": model.checkpoint_generation,
            "by_task": distinct(r["generation"] for r in records.values()),
        },
        "fingerprint": model.fingerprint,
        "settings": {**model.settings, "commit": commit()},
        "per_sample": [records[doc_id] for doc_id in sorted(records)],
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{run['date'].replace(':', '-')}_manifest_{task['name']}.json"
    path.write_text(json.dumps(manifest, indent=1, default=str) + "\n", encoding="utf-8")
    return path


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
    """The sum of all samples' counts; raises WrongAttention where one had other attention."""
    reports = [record["attention"] for record in records if record["error"] is None]
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
    """One table of manifests, files or folders of them: a row per score, a column per model.

    A model is a checkpoint with its attention; what is taken of the videos stands in the row. Of
    several manifests for one place the one over the most samples counts, then the newest.
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
        settings = manifest["settings"]
        # Models of one name are told apart by their weights and code.
        column = name_of_model(settings), settings["checkpoint"]["weights"], settings["code"]
        place = column, name_of_task(manifest)
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
    names, weights, codes = zip(*columns, strict=True)
    lines = [["task", "", *names], ["---"] * (len(columns) + 2)]
    lines += [["", "weights", *weights], ["", "code", *codes]]
    for (task, _, metric), row in sorted(cells.items()):
        lines.append([task, metric, *(row.get(column, "") for column in columns)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def name_of_model(settings):
    """A column's name: checkpoint, attention and what is not as the checkpoint has it."""
    attention = settings["attention"]
    parts = [Path(settings["checkpoint"]["name"]).resolve().name, attention["asked"]]
    if settings.get("load_in"):
        parts.append(settings["load_in"])
    if attention["asked"] == "sparse":
        if attention["semantics"] != "paper":
            parts.append(f"{attention['semantics']} semantics")
        gates = [branch for branch, is_open in attention["gates"].items() if is_open]
        parts.append("+".join(gates) if len(gates) < len(BRANCHES) else "all branches")
        parts.append(f"b{attention['selected_blocks']} w{attention['window']}")
    return ", ".join(parts)


def name_of_task(manifest):
    """A row's name: task and what was asked of its videos."""
    preset = manifest["preset"] or {"name": None, "yours": {}}
    parts = [manifest["task"]["name"]]
    parts += [f"preset {preset['name']}"] if preset["name"] else []
    return ", ".join([*parts, *(f"{name} {value}" for name, value in preset["yours"].items())])


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
    """A digest of the weights that are loaded, wherever they came from and lie."""
    tensors = [
        (name, str(x.dtype), list(x.shape), content_of(x))
        for name, x in plain_state_dict(model).items()
        if x.numel()
    ]
    return digest(tensors)


def content_of(tensor, chunk=2**24):
    """A number that changes with the bytes of a tensor and their order, computed where it lies."""
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    total = 0
    for part in tensor.contiguous().view(-1).view(integers[tensor.itemsize]).split(chunk):
        weights = torch.arange(1, len(part) + 1, device=part.device)
        total = (total * 31 + int((part * weights).sum())) % 2**61
    return total


def code_digest(*loaded):
    """A digest of the code of a loaded model and processor, as loaded, and of this script."""
    folders = {Path(inspect.getfile(type(item))).parent for item in loaded}
    files = sorted(file for folder in folders for file in folder.glob("*.py"))
    files += [ROOT / "evaluation.py", *sorted(ROOT.glob("commands/evaluation_*.py"))]
    return digest([(file.name, file.read_text(encoding="utf-8")) for file in files])


def commit():
    """The commit of the repository that this script is in, with "+" where files were changed."""
    git = ["git", "-C", str(ROOT)]
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
