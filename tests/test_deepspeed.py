"""DeepSpeed ZeRO-3: two processes train, save and resume as one that accumulates.

Needs `pip install deepspeed`, which the tests' requirements leave out.
"""

import json

import pytest
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from finetuning import flags, losses, losses_on_disk, mixed_rows, run, start, write_clips
from paths import ROOT

pytest.importorskip("deepspeed")

# In order, so that of each step's two rows one has a video and one is text alone.
COMMON = {"train_sampling_strategy": "sequential", "per_device_train_batch_size": 1}
COMMON |= {"max_steps": 3, "learning_rate": 1e-4, "save_strategy": "steps", "save_steps": 2}
CASES = {
    "whole": {"train": "vision,merger,llm,gates"},
    "adapters": {"lora_r": 2, "merge_lora": True, "gradient_checkpointing": True},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_clips(folder, "clips.jsonl", ["colour", "shape", "count", "at"])
    return folder


@pytest.fixture(scope="module")
def two_processes(folder, tmp_path_factory):
    """The output folder of each case, and that of each resumed from its middle."""
    root, data = tmp_path_factory.mktemp("two"), mixed_rows(folder)
    shards = {"deepspeed": ROOT / "examples" / "recipes" / "zero3.json"}
    argvs = []
    for name, settings in CASES.items():
        settings = COMMON | settings | shards
        argvs.append(flags(data, root / name, **settings))
        resume = {"resume_from_checkpoint": root / name / "checkpoint-2"}
        argvs.append(flags(data, root / f"{name} resumed", **settings, **resume))
    done = start(ROOT / "tests" / "finetune_on_cpus.py", [json.dumps(argvs)], processes=2)
    assert done.returncode == 0, done.stderr[-9000:]
    return root


@pytest.mark.parametrize("name", CASES)
def test_two_processes_train_as_one_that_accumulates(folder, tmp_path, two_processes, name):
    settings = COMMON | CASES[name] | {"gradient_accumulation_steps": 2}
    one = run(folder / "mixed.jsonl", tmp_path, **settings)
    assert losses_on_disk(two_processes / name) == pytest.approx(losses(one), rel=1e-4)
    before = load_file(ROOT / "model.safetensors")
    mine, theirs = (load_file(f / "model.safetensors") for f in (tmp_path, two_processes / name))
    assert set(mine) == set(theirs)
    for key, weight in mine.items():
        moved = (weight - before[key].float()).abs().max()
        assert (theirs[key] - weight).abs().max() <= 0.02 * moved, key
    AutoModelForImageTextToText.from_pretrained(two_processes / name, trust_remote_code=True)


@pytest.mark.parametrize("name", CASES)
def test_a_run_resumes(two_processes, name):
    resumed = losses_on_disk(two_processes / f"{name} resumed")
    assert resumed == losses_on_disk(two_processes / name)
