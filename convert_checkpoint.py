"""Convert a Qwen2.5-VL checkpoint into a VideoNSA checkpoint, with untrained gates or its own.

    python convert_checkpoint.py Qwen/Qwen2.5-VL-7B-Instruct VideoNSA-7B
    python convert_checkpoint.py ../Qwen2.5-VL-3B-Instruct VideoNSA-3B --gates random --seed 1
    python convert_checkpoint.py Enxin/VideoNSA VideoNSA-released --semantics released
    python convert_checkpoint.py ../trained-gates VideoNSA-4bit --semantics paper --load-in 4bit

SOURCE is a Hub id or a folder with safetensors weights of any size, sharded or not. Everything is
checked before anything is written: every key and shape, against the model that OUT's own code
builds. The weights go to OUT.partial, shard by shard; only a complete checkpoint is renamed to
OUT. After an interruption the same command goes on where it stopped and ends in the same bytes.

A source that has gates keeps them: the checkpoint of the original release, whose code computes what
only `--semantics released` repeats.

Runs on a CPU. Memory stays near one shard (2 GB) and the largest tensor, whatever the model's size.
"""

import argparse
import hashlib
import json
import os
import re
import shutil
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch
from huggingface_hub import snapshot_download, split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForImageTextToText, Qwen2_5_VLConfig

from commands import ROOT
from commands.checkpoint_files import (
    INDEX,
    SINGLE,
    TOKENIZER_FILES,
    copy_code,
    file_inside,
    indexed_files,
    listed_files,
    upload,
)
from commands.model_card import HUB_ID, write_card
from commands.quantized_loading import (
    HELP,
    LOAD_IN,
    check_device,
    check_savable,
    loading_options,
)
from nsa_rules import gate_logit

COPIED_FILES = (*TOKENIZER_FILES, "special_tokens_map.json", "generation_config.json", "LICENSE")
SOURCE_PATTERNS = ("*.json", "*.safetensors", "merges.txt", "*.jinja", "README.md", "LICENSE")
WEIGHTS = "model*.safetensors"
RECORD, QUANTISED = "conversion.json", "quantisation.json"
SHARD_BYTES = 2 * 10**9

# What a video shares with an image; how many frames and pixels it gets is VideoNSA's own matter.
VIDEO_KEYS = ("patch_size", "temporal_patch_size", "merge_size", "image_mean", "image_std")

DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
EMBEDDING, HEAD = "model.language_model.embed_tokens.weight", "lm_head.weight"
GATE = re.compile(r"\.self_attn\.g_proj_[12]\.(weight|bias)$")
GATE_STD = 0.02
# The original's names of two settings, which its configuration may have.
RELEASED_SETTINGS = {"block_counts": "nsa_num_selected_blocks", "window_size": "nsa_window_size"}

DESCRIPTION = """\
{source} with the attention of VideoNSA: in every layer of the language model, vision tokens attend
through three gated sparse branches (compressed blocks, selected blocks, a sliding window); text
tokens attend densely.

{gates}
"""
UNTRAINED = """\
**The gates are untrained.** {gates}
All other weights are the source's. Answers to text alone are the source's; before you rely on
answers about videos, train the gates (`g_proj_1`, `g_proj_2` in each layer's `self_attn`) with the
repository's `finetune.py --model_name_or_path {name}`.\
"""
KEPT = """\
All weights, the gates too, are the source's. `nsa_semantics` in its configuration says what they
run with: {semantics}.\
"""


def convert(
    source,
    out,
    *,
    gates=None,
    gate_value=None,
    semantics=None,
    dtype="auto",
    seed=0,
    load_in=None,
    push_to_hub=None,
):
    """Write the VideoNSA checkpoint of `source` (Hub id or folder) to the folder `out`.

    gates: of a source without any. "even", the default, starts every gate at `gate_value` for every
    token (1/3 unless given, so that the three branches sum to one); "random" draws them as the
    paper does: N(0, 0.02), zero bias.
    semantics: of a source with gates, which it keeps: what they were trained with, "released" for
    those of the original release, or "paper".
    dtype: "auto" keeps each tensor's own; else "bfloat16", "float16" or "float32" for all.
    load_in: a name of `LOAD_IN`, to write quantised weights, which takes the memory that they take.
    push_to_hub: a repository id to upload the finished folder to, as one commit.

    Returns the report, lists of keys under "copied", "copied (gates)" and "added", or None if `out`
    was complete already. Raises ValueError or OSError, with nothing written, if the source does not
    fit exactly.
    """
    if load_in is not None:
        settings = {"gates": gates, "gate_value": gate_value, "semantics": semantics}
        settings |= {"dtype": dtype, "seed": seed}
        return convert_quantised(source, out, load_in, push_to_hub, settings)
    given = {"--gates": gates, "--gate-value": gate_value}
    gates = gates or "even"
    if gates == "random" and gate_value is not None:
        raise ValueError(f"gate value {gate_value} was given, but only even gates take one.")
    gate_value = 1 / 3 if gate_value is None else gate_value
    if not 0 < gate_value < 1:
        raise ValueError(f"gate value is {gate_value}; it must lie between 0 and 1.")
    out = Path(os.path.abspath(out))
    folder, name = find_source(str(source))
    files = weight_files(folder)
    tensors = read_headers(files)
    if any(GATE.search(key) for key in tensors):
        check_kept_gates(name, semantics, given)
        gates = "copied"
    elif semantics == "released":
        raise ValueError(
            f"{name} has no gates (self_attn.g_proj_1, g_proj_2), and only weights that were "
            "trained with the original release's code run with its semantics: leave --semantics "
            "away."
        )
    record = {"source": name, "weights": fingerprint(files), "shard_bytes": SHARD_BYTES}
    record |= {"gates": gates, "gate_value": gate_value, "dtype": dtype, "seed": seed}
    record["semantics"] = semantics or "paper"
    partial = out.with_name(f"{out.name}.partial")
    if is_complete(out, partial, record):
        report = None
        print(f"{out} is complete already, with these settings: nothing to convert.")
    else:
        report = build(folder, tensors, partial, out, record)
        kept, added = len(report["copied (gates)"]), len(report["added"])
        own = f"copied (gates) {kept}" if kept else f"added {added} ({gates} gates)"
        state = f"it runs with {semantics} semantics" if kept else "its gates are untrained"
        print(
            f"copied {len(report['copied'])}, {own}, missing 0, unexpected 0\n"
            f"{out} is complete; {state}."
        )
    if push_to_hub:
        state = f"{semantics} semantics" if gates == "copied" else "gates untrained"
        upload(out, push_to_hub, listed_files(out), f"VideoNSA from {name}, {state}")
        print(f"pushed to {push_to_hub}")
    return report


def convert_quantised(source, out, load_in, push_to_hub, settings):
    """`convert` with these settings, then its result loaded quantised and saved as `out`.

    Returns the report of the conversion. What lies between is in OUT.whole, and removed at the end.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    check_savable(load_in)
    check_device(load_in, device)
    loading, out = loading_options(load_in), Path(os.path.abspath(out))
    record = {"load_in": load_in, "source": str(source), **settings}
    if (out / QUANTISED).is_file() and read_json(out / QUANTISED) == record:
        print(f"{out} is complete already, with these settings: nothing to convert.")
        report = None
    elif out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise FileExistsError(
            f"{out} exists and is not the result of this conversion. Delete it or name another."
        )
    else:
        whole, partial = (out.with_name(f"{out.name}.{end}") for end in ("whole", "partial"))
        report = convert(source, whole, **settings)
        model = AutoModelForImageTextToText.from_pretrained(
            whole, trust_remote_code=True, dtype="auto", device_map=device, **loading
        )
        shutil.rmtree(partial, ignore_errors=True)
        model.save_pretrained(partial, max_shard_size=SHARD_BYTES)
        for path in whole.iterdir():
            is_weights = path.match(WEIGHTS) or path.name == INDEX
            if path.is_file() and not is_weights and not (partial / path.name).exists():
                shutil.copyfile(path, partial / path.name)
        write_json(partial / QUANTISED, record)
        os.replace(partial, out)
        shutil.rmtree(whole)
        print(f"{out} is complete, with the language model's weights in {load_in}.")
    if push_to_hub:
        upload(out, push_to_hub, listed_files(out), f"VideoNSA from {source}, {load_in}")
        print(f"pushed to {push_to_hub}")
    return report


def check_kept_gates(name, semantics, given):
    """Raise ValueError unless kept gates' semantics are given, and nothing of new gates."""
    if semantics is None:
        raise ValueError(
            f"{name} has gates, which are kept, but its files do not say what they were trained "
            "with. Give --semantics released for weights of the original release (Enxin/VideoNSA), "
            "--semantics paper for weights of an exact implementation."
        )
    if asked := [name for name, value in given.items() if value is not None]:
        raise ValueError(f"{name} has gates, which are kept: leave {' and '.join(asked)} away.")


def build(folder, tensors, partial, out, record):
    """Check the whole source, then fill `partial` and rename it to `out`; return the report."""
    with tempfile.TemporaryDirectory() as staging:
        staging = Path(staging)
        write_small_files(folder, staging, tensors, out.name, record)
        expected, config = read_expected(staging)
        report = compare(tensors, expected, config, record["source"])

        partial.mkdir(parents=True, exist_ok=True)
        write_file(partial / RECORD, lambda path: write_json(path, record))
        planned = plan_dtypes(tensors, expected, record["dtype"])
        shards = split_torch_state_dict_into_shards(
            planned, filename_pattern="model{suffix}.safetensors", max_shard_size=SHARD_BYTES
        )
        if shards.is_sharded:
            index = {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}
            write_json(staging / INDEX, index)
        temperature = config.text_config.nsa_gate_temperature
        write_weights(partial, tensors, planned, shards.filename_to_tensors, record, temperature)
        written = {key: stored.shape for key, stored in read_headers(partial.glob(WEIGHTS)).items()}
        if written != {key: tensor.shape for key, tensor in expected.items()}:
            raise OSError(f"{partial} does not hold what was written to it: delete it, run again.")
        for path in staging.iterdir():
            shutil.copyfile(path, partial / path.name)
            sync(partial / path.name)
    sync(partial)
    os.replace(partial, out)
    sync(out.parent)
    return report


def find_source(source):
    """Return the folder of `source`, downloaded if it is a Hub id, and the name to call it by."""
    folder = Path(source).expanduser().resolve()
    if folder.is_dir():
        check_files(folder)
        return folder, folder.name
    if not HUB_ID.fullmatch(source):
        raise FileNotFoundError(f"{source} is neither a folder nor a Hub id (owner/name).")
    check_files(Path(snapshot_download(source, allow_patterns="config.json")))
    folder = Path(snapshot_download(source, allow_patterns=SOURCE_PATTERNS))
    check_files(folder)
    return folder, source


def check_files(folder):
    """Raise unless this is a Qwen2.5-VL whose files, those that are read, lie in its folder."""
    for path in folder.iterdir():
        if any(path.match(pattern) for pattern in SOURCE_PATTERNS):
            file_inside(folder, path.name)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} has no config.json: it is not a checkpoint's folder.")
    model_type = read_json(folder / "config.json").get("model_type")
    if model_type != "qwen2_5_vl":
        raise ValueError(
            f"{folder} holds a {model_type} checkpoint; only Qwen2.5-VL (qwen2_5_vl) is converted. "
            "To write a VideoNSA in 8 or 4 bits, load it so and call save_pretrained "
            "(docs/cards.md)."
        )


def weight_files(folder):
    """Paths of the weight files; raises unless all of them exist."""
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    if not (folder / INDEX).is_file():
        raise FileNotFoundError(
            f"{folder} has neither {SINGLE} nor {INDEX}. Other formats (.bin, .pt, .gguf) are not "
            "read: load the source in transformers and save it with save_pretrained first."
        )
    names = sorted(indexed_files(folder / INDEX))
    lost = [name for name in names if not file_inside(folder, name).is_file()]
    if lost:
        raise FileNotFoundError(
            f"{folder} lacks {', '.join(lost)}, which its {INDEX} names. Nothing was written; "
            "complete the source and run again."
        )
    return [folder / name for name in names]


def fingerprint(files):
    """Digest of the weight files' names, sizes and times: a resumed run must meet the same ones."""
    stats = [(path.name, path.stat()) for path in files]
    listing = [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]
    return hashlib.sha256(json.dumps(listing).encode()).hexdigest()


def is_complete(out, partial, record):
    """True if `out` is this very conversion, finished; raises if it or `partial` is another."""
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        if read_record(out) == record:
            return True
        raise FileExistsError(
            f"{out} exists and is not the result of this conversion. Delete it or name another."
        )
    begun = read_record(partial)
    if begun != record and any(partial.glob("[!.]*")):
        changes = [f"{key} {begun.get(key)}" for key in record if begun.get(key) != record[key]]
        raise FileExistsError(
            f"{partial} was begun with other settings: {', '.join(changes)}. "
            "Finish it with those, or delete it to start over."
        )
    return False


def read_record(folder):
    return read_json(folder / RECORD) if (folder / RECORD).is_file() else {}


class Stored(NamedTuple):
    """Where a tensor lies, and what its file's header says of it."""

    path: Path
    key: str
    shape: tuple
    dtype: torch.dtype


def read_headers(files):
    """Return {key as transformers' modules name it: Stored} over safetensors files."""
    tensors = {}
    for path in files:
        try:
            with safe_open(path, "pt") as file:
                slices = {key: file.get_slice(key) for key in file.keys()}
                headers = {k: (tuple(s.get_shape()), s.get_dtype()) for k, s in slices.items()}
        except SafetensorError as error:
            raise OSError(f"{path} is damaged or incomplete ({error}): fetch it again.") from error
        for key, (shape, dtype) in headers.items():
            if key.endswith("rotary_emb.inv_freq"):
                continue  # some files carry it; the model computes it
            if dtype not in DTYPES:
                raise ValueError(
                    f"{key} in {path} is {dtype}; only {', '.join(DTYPES)} are converted. "
                    "Start from the checkpoint that is not quantised."
                )
            name = library_key(key)
            if name in tensors:
                raise ValueError(f"{path} holds {key}, but {tensors[name].path} has it already.")
            tensors[name] = Stored(path, key, shape, DTYPES[dtype])
    return tensors


def library_key(key):
    """Turn the Hub's names, visual.* and model.layers.*, into those of transformers' modules."""
    if key.startswith("visual."):
        return f"model.{key}"
    if key.startswith("model.") and not key.startswith(("model.visual.", "model.language_model.")):
        return key.replace("model.", "model.language_model.", 1)
    return key


def read_expected(staging):
    """Return {key: meta tensor} of the model that the staged code builds, and its config."""
    config = AutoConfig.from_pretrained(staging, trust_remote_code=True)
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config, trust_remote_code=True)
    expected = model.state_dict()
    if config.tie_word_embeddings:
        del expected[HEAD]
    return expected, config


def compare(tensors, expected, config, source):
    """Return the report; raise ValueError unless the source's keys and shapes fit exactly."""
    if config.tie_word_embeddings and HEAD in tensors and EMBEDDING in tensors:
        if not torch.equal(read_tensor(tensors[HEAD]), read_tensor(tensors[EMBEDDING])):
            raise ValueError(
                f"{source} has tie_word_embeddings, but its {HEAD} differs from its embedding. "
                "Set tie_word_embeddings to false in its config.json to keep both."
            )
        del tensors[HEAD]
    gates = [key for key in expected if GATE.search(key)]
    added = [] if any(key in tensors for key in gates) else gates
    kept = [key for key in gates if key in tensors]
    copied = [key for key in expected if key in tensors and key not in gates]
    faults = {
        "missing": [key for key in expected if key not in tensors and key not in added],
        "unexpected": [key for key in tensors if key not in expected],
        "of another shape": [
            f"{key} {list(tensors[key].shape)} (by config.json {list(expected[key].shape)})"
            for key in copied + kept
            if tensors[key].shape != expected[key].shape
        ],
    }
    found = [
        f"{len(keys)} {fault} ({', '.join(keys[:4])})" for fault, keys in faults.items() if keys
    ]
    if found:
        raise ValueError(
            f"{source} does not fit its config.json, nothing was written: {'; '.join(found)}"
        )
    return {"copied": copied, "copied (gates)": kept, "added": added}


def plan_dtypes(tensors, expected, dtype):
    """Return {key: meta tensor} of the model, each in the dtype that it will be written in."""
    if dtype != "auto":
        return {key: tensor.to(getattr(torch, dtype)) for key, tensor in expected.items()}
    gate = tensors[EMBEDDING]
    return {key: tensor.to(tensors.get(key, gate).dtype) for key, tensor in expected.items()}


def write_weights(partial, tensors, planned, shards, record, temperature):
    """Write the shards that `partial` lacks, each under its name only once it is whole."""

    def value(key):
        if key in tensors:
            tensor = read_tensor(tensors[key])
        else:
            tensor = gate_tensor(key, planned[key].shape, record, temperature)
        progress.update()
        return cast(key, tensor, planned[key].dtype)

    def write_shard(path):
        save_file({key: value(key) for key in keys}, path, {"format": "pt"})
        shutil.copymode(partial / RECORD, path)  # else only its owner could read it

    with tqdm(total=len(planned), unit="tensor", desc="converting") as progress:
        for name, keys in shards.items():
            if (partial / name).exists():
                progress.update(len(keys))
            else:
                write_file(partial / name, write_shard)


def read_tensor(stored):
    # Opened for this one tensor: a file kept open keeps in memory all that was read of it.
    with safe_open(stored.path, "pt") as file:
        return file.get_tensor(stored.key)


def cast(key, tensor, dtype):
    result = tensor.to(dtype)
    if dtype is torch.float16 and not result.isfinite().all():
        raise ValueError(f"{key} does not fit float16's range: use bfloat16 or float32.")
    return result


def gate_tensor(key, shape, record, temperature):
    """The first value of a gate's parameter, float32; the same in every run and any order."""
    even = record["gates"] == "even" and "g_proj_2" in key
    if key.endswith("bias"):
        # Zero weights leave the bias as the logit.
        return torch.full(shape, gate_logit(record["gate_value"], temperature) if even else 0.0)
    if even:
        return torch.zeros(shape)
    digest = hashlib.sha256(f"{record['seed']} {key}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    return torch.empty(shape).normal_(0, GATE_STD, generator=generator)


def write_small_files(folder, staging, tensors, name, record):
    """Write all of OUT but its weights: code, config, tokenizer, processor, card."""
    copy_code(staging)
    for file in COPIED_FILES:
        if (folder / file).is_file():
            shutil.copyfile(folder / file, staging / file)
    if not any((staging / file).exists() for file in TOKENIZER_FILES):
        raise FileNotFoundError(f"{folder} has no tokenizer; copy its base model's files into it.")
    dtype = record["dtype"]
    if dtype == "auto" and EMBEDDING in tensors:
        dtype = str(tensors[EMBEDDING].dtype).removeprefix("torch.")
    own = read_json(ROOT / "config.json")
    write_config(folder, staging, dtype, own, record["semantics"])
    write_processor(folder, staging, own["auto_map"])
    if record["gates"] == "copied":
        gates = KEPT.format(semantics=record["semantics"])
    elif record["gates"] == "even":
        gates = f"They start even: each branch counts {record['gate_value']:.3g} in every head."
    else:
        gates = f"They start random, as in the paper: N(0, {GATE_STD}), seed {record['seed']}."
    if record["gates"] != "copied":
        gates = UNTRAINED.format(gates=gates, name=name)
    description = DESCRIPTION.format(source=record["source"], gates=gates)
    write_card(staging, name, folder, description)


def write_config(folder, staging, dtype, own, semantics):
    """Write config.json, nested whether the source's was or not, and a generation_config.json."""
    base = Qwen2_5_VLConfig.from_pretrained(folder)
    settings = base.to_diff_dict()
    for part in ("text_config", "vision_config"):
        settings[part].pop("dtype", None)
    settings["text_config"]["model_type"] = own["text_config"]["model_type"]
    settings["text_config"]["nsa_semantics"] = semantics
    for theirs, ours in RELEASED_SETTINGS.items():
        if semantics == "released" and theirs in settings["text_config"]:
            settings["text_config"][ours] = settings["text_config"].pop(theirs)
    classes = {key: own[key] for key in ("model_type", "architectures", "auto_map")}
    write_json(staging / "config.json", {**settings, **classes, "dtype": dtype})
    # Read and written once more, so that every nsa_* field is there to be seen and edited.
    config = AutoConfig.from_pretrained(staging, trust_remote_code=True)
    write_json(staging / "config.json", {**config.to_diff_dict(), **classes})
    if not (staging / "generation_config.json").exists():
        ids = {"bos_token_id": base.text_config.bos_token_id}
        ids["eos_token_id"] = base.text_config.eos_token_id
        write_json(staging / "generation_config.json", ids)


def write_processor(folder, staging, auto_map):
    """Write the processor's files for VideoNSA's classes, from either layout of the source."""

    def read(file):
        return read_json(folder / file) if (folder / file).is_file() else {}

    nested = read("processor_config.json")  # where transformers 5 saves them all
    image = nested.get("image_processor") or read("preprocessor_config.json")
    if not image:
        raise FileNotFoundError(
            f"{folder} has no preprocessor_config.json; copy its base model's files into it."
        )
    tokenizer = read("tokenizer_config.json")
    if "auto_map" in tokenizer:
        raise ValueError(
            f"the tokenizer of {folder} needs code of its own ({tokenizer['auto_map']}), which a "
            "converted checkpoint would run unseen. Only Qwen2.5-VL's own tokenizer is converted."
        )
    template = tokenizer.pop("chat_template", None)
    template = read("chat_template.json").get("chat_template", template)
    if (folder / "chat_template.jinja").is_file():
        template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    if isinstance(template, list):  # as older tokenizers keep several
        template = {one["name"]: one["template"] for one in template}.get("default")
    if not template:
        raise FileNotFoundError(
            f"{folder} has no chat template; copy its base model's chat_template.json into it."
        )
    (staging / "chat_template.jinja").write_text(template, encoding="utf-8")

    video = {key: image[key] for key in VIDEO_KEYS if key in image}
    video["video_processor_type"] = "VideoNSAVideoProcessor"
    video["auto_map"] = {key: auto_map[key] for key in ("AutoProcessor", "AutoVideoProcessor")}
    image["image_processor_type"] = "Qwen2VLImageProcessor"
    image["auto_map"] = {"AutoProcessor": auto_map["AutoProcessor"]}
    tokenizer["padding_side"] = "left"  # as generate() needs it
    for file, settings in (
        ("preprocessor_config.json", image),
        ("video_preprocessor_config.json", video),
        ("tokenizer_config.json", tokenizer),
    ):
        write_json(staging / file, {**settings, "processor_class": "VideoNSAProcessor"})


def read_json(path):
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}): fetch it again.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no JSON object: fetch it again.")
    return content


def write_json(path, data):
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_file(path, write):
    """Call write(temporary path), then rename the result to `path`: it is whole or not there."""
    temporary = path.with_name(f".{path.name}.tmp")
    write(temporary)
    sync(temporary)
    os.replace(temporary, path)
    sync(path.parent)


def sync(path):
    if os.name == "posix":  # elsewhere a folder cannot be opened
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("source", help="Hub id or folder of a Qwen2.5-VL checkpoint (safetensors)")
    parser.add_argument("out", help="folder to write; it appears when the checkpoint is complete")
    parser.add_argument("--gates", choices=("even", "random"), help="new ones (default even)")
    parser.add_argument("--gate-value", type=float, help="what each even gate counts (default 1/3)")
    parser.add_argument(
        "--semantics",
        choices=("paper", "released"),
        help="what a source's own gates were trained with",
    )
    parser.add_argument(
        "--dtype", choices=("auto", "bfloat16", "float16", "float32"), default="auto"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the gates' random weights")
    parser.add_argument("--load-in", "--load_in", choices=LOAD_IN, help=HELP)
    parser.add_argument("--push-to-hub", metavar="REPO_ID", help="upload OUT in one commit")
    try:
        convert(**vars(parser.parse_args(arguments)))
    except (ValueError, OSError, SafetensorError) as error:  # the last if the disk is full
        print(f"convert_checkpoint: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
