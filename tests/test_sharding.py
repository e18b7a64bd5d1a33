"""One sequence over several processes: the results of one process, and work that is shared."""

import json
from types import SimpleNamespace

import pytest
import torch
from videonsa import sharding_videonsa as sharding
from videonsa.packing_videonsa import make_plan

import ask
from commands import processes
from finetuning import start
from paths import ROOT

CPU = torch.device("cpu")
# Of an even share of the work, and of 0 where something did not happen at all; the rest is float64.
ALLOWED = {"rows": 0.02, "patches": 0.02, "same tokens": 0, "another word": 0, "another length": 0}


def group(size, rank=0):
    return SimpleNamespace(size=lambda: size, rank=lambda: rank)


def wrong_results(argv, allowed):
    """What differs by more than `allowed`, or by more than its own measure in `ALLOWED`."""
    done = start(ROOT / "tests" / "shard_on_cpus.py", argv)
    assert done.returncode == 0, done.stderr[-5000:]
    return [
        f"{size} processes, {case}: {what} {error:.1e}"
        for size, cases in json.loads(done.stdout.splitlines()[-1]).items()
        for case, errors in cases.items()
        for what, error in errors.items()
        if not error <= ALLOWED.get(what, allowed)
    ]


def test_several_processes_compute_what_one_does():
    assert not wrong_results([], allowed=1e-12)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_compute_what_one_does():
    cases = "one_video padded_rows one_vision_token checkpointed_layers an_answer a_second_turn"
    cases += " sampling_with_seeds_of_their_own chunks_that_end_within_frames work_is_shared"
    argv = ["--device", "cuda", *cases.split(), "different_prompts"]
    assert not wrong_results(argv, allowed=1e-3)


@pytest.mark.parametrize("size", [2, 3, 8])
@pytest.mark.parametrize("pattern", ["ttvvvvvvvvvvvvvvvvvvvvvvvtttt", "v", "tvtvvtt", "vvvvvvv"])
def test_every_row_is_one_processes_and_no_process_has_many_more(pattern, size):
    vision = torch.tensor([[token == "v" for token in pattern]] * 2)
    valid = torch.ones_like(vision)
    valid[1, :1] = vision[1, 1:].any()
    plan = make_plan(vision, vision.shape[1], valid)
    parts = [
        sharding.shard_plan(plan, 2, group(size, rank), torch.device("cpu")) for rank in range(size)
    ]
    rows = torch.cat([part.shard.rows for part in parts])
    assert torch.equal(rows[parts[0].shard.order], torch.arange(vision.numel()))
    for name in ("cu_vision_queries", "cu_text_queries"):
        assert sum(int(getattr(part, name)[-1]) for part in parts) == getattr(plan, name)[-1]
    assert len({part.num_queries for part in parts}) == 1
    assert parts[0].num_queries <= -(-vision.numel() // size) + 4


def test_the_work_of_a_long_video_is_even():
    """By the keys that the queries of each process see."""
    vision = torch.ones(1, 4000, dtype=torch.bool)
    plan = make_plan(vision, 4000)
    seen = []
    for rank in range(4):
        part = sharding.shard_plan(plan, 1, group(4, rank), CPU)
        seen.append(part.shard.rows.sum().item() + len(part.shard.rows))
    assert max(seen) <= 1.01 * min(seen)


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("lengths", [[4] * 9, [100, 1, 1, 1], [1, 1, 1, 100], [1, 50, 1, 50]])
def test_every_process_has_frames_and_none_is_left_out(lengths, size):
    frames = torch.tensor([0, *lengths]).cumsum(0)
    shares = sharding.share_frames(frames, group(size))
    assert [first for first, _ in shares] == [0, *(last for _, last in shares[:-1])]
    assert shares[-1][1] == len(lengths) and all(first < last for first, last in shares)


def test_fewer_frames_than_processes_are_not_shared():
    assert sharding.share_frames(torch.tensor([0, 4, 8]), group(3)) is None
    assert sharding.share_frames(torch.tensor([0, 4, 8]), None) is None


def test_a_group_has_to_be_made_first(model):
    with pytest.raises(ValueError, match="before torch.distributed.init_process_group"):
        model.shard_sequences()


@pytest.mark.parametrize(
    "semantics, enabled, message",
    [("released", True, "tokens see later ones"), ("paper", False, "dense attention is not")],
)
def test_attention_that_is_not_shared_out_is_refused(monkeypatch, semantics, enabled, message):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    config = SimpleNamespace(nsa_semantics=semantics, nsa_enabled=enabled)
    with pytest.raises(ValueError, match=message):
        sharding.checked_group(config, None)


ONE_DIES_AT_THE_END = """
import os, signal, sys
sys.path.insert(0, sys.argv.pop(1))
import ask

def leave():
    if ask.processes.rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    ask.processes.dist.barrier()

ask.processes.leave = leave
ask.main()
"""


def test_ask_is_answered_once_and_a_process_that_dies_ends_the_others(
    tmp_path, capsys, monkeypatch
):
    script = tmp_path / "dying.py"
    script.write_text(ONE_DIES_AT_THE_END)
    argv = [ROOT / "examples" / "clips" / "shapes.mp4", "How many shapes are there?", "--json"]
    done = start(script, [ROOT, *argv], processes=2)
    [answer] = done.stdout.splitlines()
    assert done.returncode != 0 and "Signal 9 (SIGKILL)" in done.stderr

    monkeypatch.setattr("sys.argv", ["ask.py", *map(str, argv)])
    ask.main()
    alone, answer = json.loads(capsys.readouterr().out), json.loads(answer)
    for name in ("answering_seconds", "forecast_gib"):  # of one process, and of one of two
        del alone[name], answer[name]
    assert answer == alone


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--device", "cuda:1"], "each takes a GPU of its own"),
        (["--device", "auto"], "each takes a GPU of its own"),
        (["--interactive"], "--interactive is for one process"),
        (["--out", "answers.jsonl"], "--out is for one process"),
    ],
)
def test_what_several_processes_cannot_do_is_said(arguments, message, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    clip = str(ROOT / "examples" / "clips" / "shapes.mp4")
    monkeypatch.setattr("sys.argv", ["ask.py", clip, "How many?", *arguments])
    with pytest.raises(SystemExit):
        ask.main()
    assert message in capsys.readouterr().err


def test_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match="--nproc_per_node 1"):
        processes.join("cuda")
