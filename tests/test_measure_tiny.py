"""What measures the tiny checkpoint asks as users do, and counts only whole answers."""

import json
from pathlib import Path

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


def question_of(row):
    return row["conversations"][0]["value"].removeprefix("<video>")


@pytest.fixture
def asked(clips, monkeypatch):
    """Whom `measure` asks instead of a model: all conversations, answered rightly but "count"."""
    rows, conversations = rows_of(clips), []
    by_question = {(row["video"], question_of(row)): row for row in rows}

    def almost(model, processor, asked):
        given = []
        for conversation in asked:
            shown = [
                part["video"]
                for turn in conversation
                for part in turn["content"]
                if part["type"] == "video"
            ]
            question = conversation[-1]["content"][-1]["text"]
            row = by_question["videos/" + Path(shown[-1]).name, question]
            answer = row["conversations"][1]["value"]
            given.append(answer + "!" if row["kind"] == "count" else answer)
            said = [{"type": "text", "text": given[-1]}]
            conversation.append({"role": "assistant", "content": said})
            if not any(conversation is other for other in conversations):
                conversations.append(conversation)
        return given

    monkeypatch.setattr(measure_tiny, "answer_all", almost)
    return conversations


def test_only_whole_answers_count(clips, asked):
    accuracy = measure_tiny.measure(None, None, clips)
    assert accuracy.pop("count") == 0.0 and len(accuracy) >= 8
    assert set(accuracy.values()) == {100.0}
    assert all(len(conversation) == 2 for conversation in asked)
    assert len(asked) == len(rows_of(clips))


def test_conversations_ask_everything_once_and_end_with_another_clip(clips, asked):
    accuracy = measure_tiny.measure(None, None, clips, turns=3, second=True)
    assert {"turn 1", "turn 2", "turn 3", "second clip"} <= set(accuracy)
    assert accuracy["count"] == 0.0 and accuracy["shape"] == 100.0
    texts = []
    for conversation in asked:
        users = conversation[::2]
        assert len(users) <= 4 and [len(turn["content"]) for turn in users[1:-1]] in (
            [],
            [1],
            [1, 1],
        )
        first, last = users[0]["content"][0]["video"], users[-1]["content"][0]["video"]
        assert first != last
        texts += [(first, turn["content"][-1]["text"]) for turn in users[:-1]]
    assert len(texts) == len(set(texts)) == len(rows_of(clips))


def test_questions_asked_together_are_answered_as_alone(clips, loaded):
    rows = [row for row in rows_of(clips) if row["video"] == "videos/000000.mp4"]
    conversations = [[] for _ in rows]
    for conversation, row in zip(conversations, rows, strict=True):
        measure_tiny.ask_next(conversation, clips / row["video"], question_of(row))
    alone = [measure_tiny.answer_all(*loaded, [list(x)])[0] for x in conversations]
    assert measure_tiny.answer_all(*loaded, conversations) == alone


def test_the_root_answers_every_bundled_question(loaded):
    accuracy = measure_tiny.measure(*loaded, ROOT / "examples" / "clips")
    assert accuracy == dict.fromkeys(make_clips.TRAINED_KINDS, 100.0)


@pytest.mark.parametrize("frames", [8, 64])
def test_the_root_holds_conversations_about_clips_that_it_never_saw(loaded, tmp_path, frames):
    """Three turns about each of two clips, then a question about the other one."""
    kinds = ["describe", "order", "digit", "when", "colour_of", "shape_of", "each_of", "unknown"]
    make = ["--out", tmp_path, "--seed", 100, "--count", 2, "--frames", frames]
    make_clips.main([str(part) for part in [*make, "--kinds", ",".join(kinds)]])
    accuracy = measure_tiny.measure(*loaded, tmp_path, turns=3, second=True)
    counted = [*kinds, "turn 1", "turn 2", "turn 3", "second clip"]
    assert accuracy == dict.fromkeys(counted, 100.0)


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
