"""evaluation.py --data: questions of rows, scored and recorded without lmms-eval."""

import json
import os
import subprocess
import sys

import pytest

import evaluation
from commands.evaluation_model import EvaluatedModel
from commands.evaluation_rows import read_questions
from commands.finetuning_rows import LAYOUTS, RefusedRow
from commands.questions import is_exact, questions_of
from finetuning import ROW, TEXT_ROW, run, start, write_rows
from paths import ROOT

CLIP = str(ROOT / "examples/clips/circle.mp4")
CHOICES = "What colour is the shape?\nA. blue\nB. red"


def asked(question, answer, **more):
    return {"video": CLIP, "question": question, "answer": answer, **more}


def evaluate(data, out, *arguments):
    argv = ["--model", ROOT, "--data", data, "--output_path", out, *arguments]
    return evaluation.main([str(one) for one in argv])


def manifest_in(out):
    (path,) = out.rglob("*_manifest_*.json")
    return json.loads(path.read_text())


@pytest.fixture
def said(monkeypatch):
    """Makes the model's answers, by question; the rest is as it is."""
    answers, generate = {}, EvaluatedModel._generate

    def answering(model, batch, records):
        generate(model, batch, records)
        for index, sample, _ in batch:
            question = sample["messages"][-1]["content"][-1]["text"]
            records[index]["answer"] = answers.get(question, records[index]["answer"])

    monkeypatch.setattr(EvaluatedModel, "_generate", answering)
    return answers


def test_rows_are_asked_scored_and_recorded(tmp_path, capsys, said):
    rows = [
        asked("What colour is the shape?", "Red."),
        asked("What is the shape?", "square"),
        asked(CHOICES, "B"),
        asked(f"{CHOICES}\nC. green", "C. green"),
        {"video": "gone.mp4", "question": "What?", "answer": "none"},
    ]
    said |= {CHOICES: "It is red.", f"{CHOICES}\nC. green": "(A)"}
    data, out = write_rows(tmp_path / "mine.jsonl", rows), tmp_path / "out"
    assert evaluate(data, out, "--batch_size", 2, "--model_args", "fps=1") == 0
    assert "exact_match 20.0%, multiple_choice 50.0%" in capsys.readouterr().out
    manifest = manifest_in(out)
    assert manifest["task"]["name"] == "mine.jsonl" and manifest["preset"]["yours"] == {"fps": "1"}
    assert manifest["scores"] == {"exact_match": 0.2, "multiple_choice": 0.5}
    assert manifest["samples"]["scored"] == 5 and manifest["samples"]["undecodable"] == 1
    assert "gone.mp4" in manifest["undecodable"][0]["reason"]
    first, *_ = manifest["per_sample"]
    assert (first["row"], first["answer"], first["right"], first["exact"]) == (
        1,
        "red",
        "Red.",
        True,
    )
    assert first["videos"][0]["frames"] == 8
    assert manifest["proof"]["sparse_share_of_tokens"] == 1
    assert evaluation.main(["--compare", str(out)]) == 0
    assert "| mine.jsonl, fps 1 | exact_match | 0.2 |" in capsys.readouterr().out


def test_a_row_is_asked_for_each_answer_that_is_learned(tmp_path):
    turns = [("user", "<video>One?"), ("assistant", "1"), ("user", "Two?"), ("assistant", "2")]
    messages = [{"role": role, "content": text} for role, text in turns]
    messages[1]["loss"] = False
    data = write_rows(tmp_path / "turns.jsonl", [{"video": CLIP, "messages": messages}, TEXT_ROW])
    two, text = read_questions(str(data))
    assert [one["role"] for one in two["messages"]] == ["user", "assistant", "user"]
    assert (two["row"], two["right"], text["row"], text["right"]) == (1, "2", 2, "A tag.")
    del messages[1]["loss"]
    data = write_rows(tmp_path / "turns.jsonl", [{"video": CLIP, "messages": messages}])
    assert [one["right"] for one in read_questions(str(data))] == ["1", "2"]


def test_a_setting_of_a_row_wins_over_that_of_the_command(tmp_path):
    rows = [asked("What is the shape?", "circle", video_end=2.0), asked("What colour?", "red")]
    data = write_rows(tmp_path / "rows.jsonl", rows)
    assert evaluate(data, tmp_path / "out", "--model_args", "fps=2,max_frames=6") == 0
    frames = [one["videos"][0]["frames"] for one in manifest_in(tmp_path / "out")["per_sample"]]
    assert frames == [4, 6]


def test_a_row_that_cannot_be_read_ends_the_evaluation(tmp_path, capsys):
    data = write_rows(tmp_path / "odd.jsonl", [asked("What?", "red"), {"film": CLIP}])
    with pytest.raises(RefusedRow, match=r"odd.jsonl:2: the row has neither[^$]*A row is one of"):
        read_questions(str(data))
    assert evaluate(data, tmp_path / "out") == 1
    assert "odd.jsonl:2: the row has neither messages" in capsys.readouterr().err
    write_rows(data, [{"film": CLIP}])  # no line of it looks like a row
    assert evaluate(data, tmp_path / "out") == 1
    printed = capsys.readouterr().err
    assert "neither a list of rows nor one row" in printed and LAYOUTS[0] in printed


def test_an_adapter_is_evaluated_as_what_it_was_merged_to(folder, tmp_path):
    data = write_rows(folder / "two.jsonl", [ROW, TEXT_ROW])
    tuned = tmp_path / "tuned"
    run(data, tuned, max_steps=3, lora_r=4, gate_lr=1e-2, merge_lora=True)
    found = []
    for name in (tuned, tuned / "adapter"):
        out = tmp_path / f"of {name.name}"
        assert evaluate(data, out, "--model", name) == 0
        manifest = manifest_in(out)
        answers = [one["answer"] for one in manifest["per_sample"]]
        found.append((manifest["settings"]["checkpoint"]["weights"], answers))
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("answer", "right", "exact"),
    [
        ("Red.", "red", True),
        ("  a  red\nshape ", "A red shape.", True),
        ("A. red", "red", False),
        ("reds", "red", False),
        ("3.5", "3.", False),
        ("", ".", True),
    ],
)
def test_an_answer_is_right_but_for_capitals_space_and_a_full_stop(answer, right, exact):
    assert is_exact(answer, right) == exact


def test_questions_have_no_answer_in_them():
    text = [{"type": "text", "text": "What?"}]
    given = [{"type": "text", "text": " red "}]
    messages = [{"role": "user", "content": text}, {"role": "assistant", "content": given}]
    assert questions_of(messages) == [(messages[:1], "red")]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "."], "give --data with questions of your own, or --tasks"),
        (["--model", ".", "--data", "a", "--tasks", "b"], "give --data with questions"),
        (["--model", ".", "--data", "a", "--seed", "1"], "--seed 1: --data knows no such option"),
        (["--model", ".", "--data", "a", "--limit", "0.5"], "--limit is '0.5'; with --data"),
        (["--model", ".", "--tasks", "a", "--data_root", "x"], "--data_root is of --data"),
        (["--data", "a"], "give --model"),
    ],
)
def test_wrong_options_are_refused(arguments, message, capsys):
    with pytest.raises(SystemExit):
        evaluation.main(arguments)
    assert message in capsys.readouterr().err


def test_the_harness_is_asked_for_by_tasks_alone(tmp_path):
    (tmp_path / "lmms_eval.py").write_text("raise ImportError('none here', name='lmms_eval')")

    def ask(*arguments):
        return subprocess.run(
            [sys.executable, ROOT / "evaluation.py", *arguments],
            env={**os.environ, "PYTHONPATH": str(tmp_path)},
            capture_output=True,
            text=True,
        )

    missing = ask("--model", ROOT, "--tasks", "clips_8")
    assert missing.returncode == 1
    assert "pip install -r requirements-eval.txt -c constraints-eval.txt" in missing.stderr
    assert ask("--help").returncode == 0


# The second process cannot read the fourth question's file, which the first one can; and the first
# one alone has an answer to the first question in its cache.
TWO_THAT_DIFFER = """
import os, sys
sys.path.insert(0, sys.argv.pop(1))
import evaluation
from commands.evaluation_cache import AnswerCache
from commands.evaluation_model import EvaluatedModel

asked, encode = [], EvaluatedModel._encode

def encode_but_one(model, sample):
    inputs = encode(model, sample)
    if os.environ["RANK"] == "1" and sample["doc_id"] == 3:
        sample["error"] = "the disk is gone"
    return inputs

def get(cache, key):
    asked.append(key)
    return {"answer": "kept"} if os.environ["RANK"] == "0" and len(asked) == 1 else None

EvaluatedModel._encode, AnswerCache.get = encode_but_one, get
sys.exit(evaluation.main(sys.argv[1:]))
"""


def test_processes_that_share_questions_out_answer_as_one(tmp_path):
    rows = [asked(CHOICES, "B"), TEXT_ROW, asked("What is the shape?", "circle")]
    rows += [asked("Where is it?", "left"), {"video": "gone.mp4", "question": "?", "answer": "no"}]
    data = write_rows(tmp_path / "mine.jsonl", rows)
    script = tmp_path / "evaluation_of_two.py"
    script.write_text(TWO_THAT_DIFFER)
    argv = ["--model", ROOT, "--data", data, "--batch_size", 2, "--output_path", tmp_path / "two"]
    done = start(script, [ROOT, *argv, "--sequence_parallel_size", 2], processes=2)
    assert done.returncode == 0, done.stderr[-5000:]
    assert done.stdout.count("exact_match") == 1  # one of them says so
    assert evaluate(data, tmp_path / "one", "--batch_size", 2) == 0
    one, two = manifest_in(tmp_path / "one"), manifest_in(tmp_path / "two")
    assert (one["settings"]["processes"], two["settings"]["processes"]) == (1, 2)
    compared = ("answer", "prompt_tokens", "vision_tokens", "attention", "right", "videos")
    for number, (mine, theirs) in enumerate(zip(two["per_sample"], one["per_sample"], strict=True)):
        if number == 3:
            assert mine["error"] == "the disk is gone" and theirs["error"] is None
            continue
        for key in compared:
            assert mine.get(key) == theirs.get(key), (number, key)
        assert mine["error"] == theirs["error"]
    kept = list((tmp_path / "two" / "answers").rglob("*.jsonl"))
    assert len(kept) == 1 and len(kept[0].read_text().splitlines()) == len(rows)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--data", "x.jsonl"], "which are not groups of 2"),
        (["--tasks", "clips"], "--sequence_parallel_size is of --data"),
    ],
)
def test_processes_that_are_not_there_cannot_share(arguments, message, tmp_path, capsys):
    data = write_rows(tmp_path / "x.jsonl", [TEXT_ROW])
    argv = [str(data) if one == "x.jsonl" else one for one in arguments]
    try:
        code = evaluation.main(["--model", str(ROOT), "--sequence_parallel_size", "2", *argv])
    except SystemExit as ended:
        code = ended.code
    assert code and message in capsys.readouterr().err
