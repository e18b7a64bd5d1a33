"""What the tests of fine-tuning share: rows, clips, and runs of finetune.py in this process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState, PartialState

import finetune
import make_clips
from paths import ROOT

ROW = {
    "video": "videos/000000.mp4",
    "conversations": [
        {"from": "human", "value": "<video>\nWhat happens?"},
        {"from": "gpt", "value": "A shape moves."},
    ],
}
TEXT_ROW = {
    "messages": [
        {"role": "user", "content": "What is an <image> tag?"},
        {"role": "assistant", "content": "A tag."},
    ]
}


def write_clips(folder, name, kinds):
    with pytest.MonkeyPatch.context() as patch:
        argv = ["--out", folder, "--seed", 5, "--count", 2, "--frames", 8]
        argv += ["--kinds", ",".join(kinds)]
        patch.setattr(sys, "argv", ["make_clips.py", *map(str, argv)])
        make_clips.main()
    (folder / "clips.jsonl").rename(folder / name)


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def mixed_rows(folder):
    """Six rows, half of them text alone: with batches of one, two processes see different kinds."""
    rows = [json.loads(line) for line in (folder / "clips.jsonl").read_text().splitlines()[:6]]
    rows[1] = rows[2] = rows[4] = TEXT_ROW
    return write_rows(folder / "mixed.jsonl", rows)


def flags(data, out, **settings):
    settings = {"model_name_or_path": ROOT, "data": data, "output_dir": out} | settings
    settings = {"use_cpu": True, "report_to": "none", "disable_tqdm": "true"} | settings
    settings = {"logging_steps": 1, "learning_rate": 1e-3, "save_strategy": "no"} | settings
    argv = []
    for name, value in settings.items():
        argv += [f"--{name}"] + ([] if value is True else [str(value)])
    return argv


def run(data, out, **settings):
    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState._reset_state()
    return finetune.main(flags(data, out, **settings))


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def losses_on_disk(out):
    history = json.loads((Path(out) / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


def start(script, argv, processes=None):
    """Runs a script as users do; `processes` of them with torchrun."""
    command = [sys.executable]
    if processes:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", processes]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [str(part) for part in (*command, script, *argv)],
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
    )


def logits_of(model, batch):
    return model.eval()(**{k: v for k, v in batch.items() if k != "stats"}).logits
