"""What measures the tiny checkpoint asks as users do, and counts only whole answers."""

import json

import pytest
import torch

import make_clips
import measure_tiny
from paths import ROOT
from tiny import stock_twin


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    make_clips.main(["--out", str(folder), "--seed", "99", "--count", "2", "--frames", "8"])
    return folder


@pytest.fixture(scope="module")
def loaded():
    return measure_tiny.load(ROOT, "sparse")


def rows_of(clips):
    return [json.loads(line) for line in (clips / "clips.jsonl").read_text().splitlines()]


def test_only_whole_answers_count(clips, monkeypatch):
    rows = rows_of(clips)
    by_question = {
        (row["video"], row["conversations"][0]["value"].removeprefix("<video>")): row
        for row in rows
    }

    def almost(model, processor, video, questions):
        told = []
        for question in questions:
            row = by_question[f"videos/{video.name}", question]
            answer = row["conversations"][1]["value"]
            told.append(answer + "!" if row["kind"] == "count" else answer)
        return told

    monkeypatch.setattr(measure_tiny, "answers", almost)
    accuracy = measure_tiny.measure(None, None, clips)
    assert accuracy.pop("count") == 0.0 and len(accuracy) >= 8
    assert set(accuracy.values()) == {100.0}


def test_questions_asked_together_are_answered_as_alone(clips, loaded):
    rows = [row for row in rows_of(clips) if row["video"] == "videos/000000.mp4"]
    questions = [row["conversations"][0]["value"].removeprefix("<video>") for row in rows]
    video = clips / "videos" / "000000.mp4"
    together = measure_tiny.answers(*loaded, video, questions)
    alone = [measure_tiny.answers(*loaded, video, [question])[0] for question in questions]
    assert together == alone


def test_the_root_answers_every_bundled_question(loaded):
    accuracy = measure_tiny.measure(*loaded, ROOT / "examples" / "clips")
    assert accuracy == dict.fromkeys(make_clips.KINDS, 100.0)


def test_dense_attention_is_qwens(clips):
    model, processor = measure_tiny.load(ROOT, "dense")
    sparse, _ = measure_tiny.load(ROOT, "sparse")
    message = {
        "role": "user",
        "content": [
            {"type": "video", "video": str(clips / "videos" / "000001.mp4")},
            {"type": "text", "text": "How many shapes appear?"},
        ],
    }
    inputs = processor.apply_chat_template(
        [message], tokenize=True, return_dict=True, return_tensors="pt"
    )
    with torch.no_grad():
        got = model(**inputs).logits
        twin = stock_twin(sparse)
        positions, _ = sparse.model.get_rope_index(
            inputs["input_ids"],
            mm_token_type_ids=inputs["mm_token_type_ids"],
            video_grid_thw=inputs["video_grid_thw"],
            second_per_grid_ts=inputs["second_per_grid_ts"],
            attention_mask=inputs["attention_mask"],
        )
        wanted = twin(**inputs, position_ids=positions).logits
        other = sparse(**inputs).logits
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
    assert (got - other).abs().max() > 0.01
