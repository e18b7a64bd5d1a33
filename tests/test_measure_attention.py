"""The tables of tools/measure_attention.py are the numbers of the records they are made of."""

import json
import re

import numpy as np
import pytest

import measure_attention
import visualize
from nsa_rules import BRANCHES
from paths import ROOT

CLIPS = ROOT / "examples" / "clips"


def tables(text):
    """{title: [[label, numbers ...] of each row]} of what was printed."""
    found = {}
    for title, body in re.findall(r"\*\*(.+)\*\*\n\n((?:\|.*\n)+)", text):
        rows = [line.strip("| ").split(" | ") for line in body.splitlines()[2:]]
        found[title] = [[row[0], *map(float, row[1:])] for row in rows]
    return found


@pytest.fixture
def data(tmp_path):
    """Two questions about shapes.mp4 in two layouts, one about circle.mp4."""
    shapes, circle = str(CLIPS / "shapes.mp4"), str(CLIPS / "circle.mp4")
    talk = [{"from": "human", "value": "<video>What is the last shape?"}]
    talk += [{"from": "gpt", "value": "cross"}]
    rows = [
        {"video": shapes, "conversations": talk, "kind": "last"},
        {"video": shapes, "question": "What colour is the first shape?", "answer": "green"},
        {"video": circle, "question": "What is the shape?", "answer": "circle", "kind": "last"},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def view(*arguments):
    options = visualize.parse_arguments([*map(str, arguments), "--out", "unused"])
    conversation = visualize.make_conversation(options)
    return conversation.view(options.files, options.question, report=lambda line: None)


def test_tables_are_means_over_the_videos(data, capsys):
    measure_attention.main(["--data", str(data)])
    out = capsys.readouterr().out
    assert "2 videos of 128 to 128 vision tokens, 3 questions" in out
    printed = tables(out)
    last = view(CLIPS / "shapes.mp4", "What is the last shape?")
    shape = view(CLIPS / "circle.mp4", "What is the shape?")
    records = [last.record, shape.record]

    means, spreads = (
        np.mean(x, 0) for x in zip(*(r.gate_statistics() for r in records), strict=True)
    )
    for title, wanted in (("Gates, mean", means), ("Gates, standard deviation", spreads)):
        shown = [row[1:] for row in printed[title]]
        np.testing.assert_allclose(shown[:4], wanted, atol=0.006)
        np.testing.assert_allclose(shown[4], wanted.mean(0), atol=0.006)
    sinks = np.mean([100 * r.sink_ratios.mean(2) for r in records], 0)
    shown = [row[1:] for row in printed["Attention sinks, % of keys"][:4]]
    np.testing.assert_allclose(shown, sinks, atol=0.006)
    assert sinks.max() > 0.5

    keys = {row[0]: row[1:] for row in printed["Keys that a vision token reads"]}
    read = [record.keys_read() for record in records]
    for branch in BRANCHES:
        assert keys[branch][0] == round(np.mean([one[branch] for one in read]), 1)
    assert keys["dense"] == [64.5, 100]

    ((kind, mean, largest), other) = printed[
        "Attention of the answer at its most-read step, times even"
    ]
    shares = [8 * one.most_read()[1] for one in (last, shape)]
    assert kind == "last" and other[0] == "all"
    assert [mean, largest] == [round(np.mean(shares), 1), round(max(shares), 1)]


def test_pairs_of_heads_leave_a_head_and_itself_out():
    square = np.array([[[1, 0.5, 0], [0.5, 1, np.nan], [0.4, 0.1, 1]]])
    np.testing.assert_allclose(measure_attention.between_heads(square), [0.3])


def test_heads_whose_gates_never_change_count_for_no_likeness():
    """The root's first layer opens or closes a head for good."""
    square = np.full((2, 3, 3), np.nan)
    square[1] = 0.5
    alike = measure_attention.between_heads(square)
    np.testing.assert_equal(alike, [np.nan, 0.5])
    assert measure_attention.by_layer(alike[:, None])[-1] == ("mean", 0.5)


def test_a_row_with_settings_of_its_own_is_refused(data):
    row = {"video": "a.mp4", "question": "What?", "answer": "It.", "video_end": 3}
    row["video"] = str(CLIPS / "circle.mp4")
    data.write_text(json.dumps(row) + "\n")
    with pytest.raises(ValueError, match="row 0 of .*rows.jsonl has settings of its video"):
        measure_attention.main(["--data", str(data)])
