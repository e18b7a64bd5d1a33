"""The synthetic clips: the same from the same seed, and their answers true of their pixels."""

import json
import random
import re

import av
import numpy as np
import pytest
import torch

import make_clips
from make_clips import COLOURS, Flash, Scene, Story
from paths import ROOT

STORY = Story(
    seconds=4,
    scenes=(
        Scene(0, 1, "circle", "red", "right", x=30, y=40, radius=16, speed=20),
        Scene(1, 4, "square", "orange", "up", x=80, y=70, radius=16, speed=20),
    ),
    flash=Flash(start=2, end=3, digit=7, corner=2),
    background=((40, 40, 40), (60, 60, 60)),
    noise=0.0,
)


def run(out, *arguments):
    make_clips.main(["--out", str(out), *arguments])


@pytest.mark.parametrize(
    "kind, question, answer",
    [
        ("count", "How many shapes appear?", "2"),
        ("first", "What colour is the first shape?", "red"),
        ("last", "What colour is the last shape?", "orange"),
        ("order", "In which order do the colours appear?", "red, orange"),
        ("digit", "Which digit flashes?", "7"),
        ("when", "When does a digit flash?", "at 2 s"),
        ("starts", "When does each shape appear?", "at 0 s, at 1 s"),
    ],
)
def test_questions_about_the_whole_clip(kind, question, answer):
    assert make_clips.ask(random.Random(0), STORY, kind) == (question, answer)


@pytest.mark.parametrize(
    "kind, pairs",
    [
        ("shape", {"What is the first shape?": "circle", "What is the last shape?": "square"}),
        (
            "direction",
            {
                "Which way does the first shape move?": "right",
                "Which way does the last shape move?": "up",
            },
        ),
        (
            "describe",
            {
                "Describe the first shape.": "A red circle moves right.",
                "Describe the last shape.": "An orange square moves up.",
            },
        ),
        (
            "at",
            {
                "What colour is the shape at 0 s?": "red",
                "What colour is the shape at 1 s?": "orange",
                "What colour is the shape at 2 s?": "orange",
                "What colour is the shape at 3 s?": "orange",
            },
        ),
        (
            "origin",
            {
                "From where does the first shape come?": "from the left",
                "From where does the last shape come?": "from the bottom",
            },
        ),
        (
            "colour_of",
            {"What colour is the circle?": "red", "What colour is the square?": "orange"},
        ),
        ("shape_of", {"What is the red shape?": "circle", "What is the orange shape?": "square"}),
        (
            "direction_of",
            {
                "Which way does the circle move?": "right",
                "Which way does the red shape move?": "right",
                "Which way does the square move?": "up",
                "Which way does the orange shape move?": "up",
            },
        ),
        (
            "describe_of",
            {
                "Describe the circle.": "A red circle moves right.",
                "Describe the red shape.": "A red circle moves right.",
                "Describe the square.": "An orange square moves up.",
                "Describe the orange shape.": "An orange square moves up.",
            },
        ),
        (
            "each_of",
            {
                "What colour is each shape?": "The circle red, the square orange.",
                "Which way does each shape move?": "The circle right, the square up.",
            },
        ),
    ],
)
def test_questions_about_a_part_of_the_clip(kind, pairs):
    rng = random.Random(0)
    assert dict(make_clips.ask(rng, STORY, kind) for _ in range(40)) == pairs


@pytest.mark.parametrize(
    "kind, question, answer",
    [
        ("colour", "What colour is the shape?", "red"),
        ("shape", "What is the shape?", "circle"),
        ("direction", "Which way does the shape move?", "right"),
        ("describe", "Describe the video.", "A red circle moves right."),
        ("digit", "Which digit flashes?", "none"),
        ("origin", "From where does the shape come?", "from the left"),
    ],
)
def test_a_single_shape_needs_no_place(kind, question, answer):
    single = Story(4, STORY.scenes[:1], None, STORY.background, 0.0)
    assert make_clips.ask(random.Random(0), single, kind) == (question, answer)


def test_a_question_without_an_answer_is_not_asked():
    quiet = Story(4, STORY.scenes, None, STORY.background, 0.0)
    rng = random.Random(0)
    assert make_clips.ask(rng, quiet, "colour") is None  # which of the two?
    assert make_clips.ask(rng, quiet, "when") is None
    single = Story(4, STORY.scenes[:1], None, STORY.background, 0.0)
    for kind in make_clips.BINDING_KINDS:
        assert make_clips.ask(rng, single, kind) is None


def test_a_form_that_two_shapes_have_names_neither():
    twice = (*STORY.scenes, Scene(3, 4, "square", "blue", "left", x=50, y=70, radius=16, speed=20))
    story, rng = Story(4, twice, None, STORY.background, 0.0), random.Random(0)
    asked = [make_clips.ask(rng, story, kind) for kind in make_clips.BINDING_KINDS * 40]
    assert ("What colour is the circle?", "red") in asked
    assert ("What is the blue shape?", "square") in asked
    assert not any("the square" in question for question, _ in filter(None, asked))
    assert make_clips.ask(rng, story, "each_of") is None
    story = Story(4, twice[1:], None, STORY.background, 0.0)
    assert make_clips.ask(rng, story, "colour_of") is None


def test_what_no_clip_answers_is_refused():
    rng = random.Random(0)
    asked = {make_clips.ask(rng, STORY, "unknown") for _ in range(200)}
    assert len(asked) > 100 and {answer for _, answer in asked} == {"I do not know."}
    known = {*make_clips.SHAPES, "shape"}
    assert not any(known & set(re.findall(r"\w+", question)) for question, _ in asked)


def test_frames_show_the_story():
    frames = make_clips.render(STORY).int()
    assert frames.shape == (8, 112, 112, 3)
    centres = [(30, 40), (40, 40), (80, 70), (80, 60), (80, 50), (80, 40), (80, 30), (80, 20)]
    for frame, (x, y), colour in zip(frames, centres, ["red"] * 2 + ["orange"] * 6, strict=True):
        shown = (frame - torch.tensor(COLOURS[colour])).abs().amax(-1) < 3
        ys, xs = shown.nonzero(as_tuple=True)
        assert abs(xs.float().mean() + 0.5 - x) < 0.5 and abs(ys.float().mean() + 0.5 - y) < 0.5
        # A circle of radius 16, or a square of 0.85 * 16 each way, within its edge's softness.
        area = {"red": 804, "orange": 740}[colour]
        assert abs(int(shown.sum()) - area) < 100
    # The plate is black and white; nothing else is black, and here nothing else is white.
    black = [(frame.amax(-1) == 0).sum().item() for frame in frames]
    assert [count > 500 for count in black] == [False] * 4 + [True] * 2 + [False] * 2
    white = (frames[4].amin(-1) == 255).nonzero()
    left, top = make_clips.CORNERS[2]
    assert (white - torch.tensor([top, left])).amin() >= 0 and len(white) == 11 * 25


def test_a_shape_that_leaves_enters_on_the_other_side():
    scene = Scene(0, 4, "circle", "red", "left", x=10, y=50, radius=16, speed=20)
    assert scene.centre(1.0) == (102, 50)
    frame = make_clips.render(Story(4, (scene,), None, ((40,) * 3,) * 2, 0.0))[1].int()
    assert (frame[50, 1] - torch.tensor(COLOURS["red"])).abs().max() < 3
    assert (frame[50, 111] - torch.tensor(COLOURS["red"])).abs().max() < 3


def test_stories_start_whole_and_end_with_the_clip():
    rng = random.Random(3)
    for seconds in (1, 4, 16):
        for _ in range(50):
            story = make_clips.make_story(rng, seconds)
            edges = [scene.start for scene in story.scenes] + [story.scenes[-1].end]
            assert edges[0] == 0 and edges[-1] == seconds and edges == sorted(set(edges))
            assert len({scene.colour for scene in story.scenes}) == len(story.scenes)
            for scene in story.scenes:
                for time in (scene.start, scene.start + 0.5):
                    for at in scene.centre(time):
                        assert scene.radius <= at + 1e-6 and at - 1e-6 <= 112 - scene.radius
            if story.flash:
                assert 0 <= story.flash.start < story.flash.end <= seconds


def test_the_same_seed_gives_the_same_folder(tmp_path):
    for name, seed in (("one", "5"), ("two", "5"), ("other", "6")):
        run(tmp_path / name, "--seed", seed, "--count", "2", "--frames", "8")
    files = sorted(p.relative_to(tmp_path / "one") for p in (tmp_path / "one").rglob("*.*"))
    assert [str(path) for path in files] == [
        "clips.jsonl",
        "videos/000000.mp4",
        "videos/000001.mp4",
    ]
    for path in files:
        one, two, other = (
            (tmp_path / name / path).read_bytes() for name in ("one", "two", "other")
        )
        assert one == two and one != other


def test_files_hold_what_their_rows_say(tmp_path):
    run(tmp_path, "--seed", "1", "--count", "2", "--frames", "8", "--kinds", "first,origin")
    rows = [json.loads(line) for line in (tmp_path / "clips.jsonl").read_text().splitlines()]
    assert [row["kind"] for row in rows] == ["first", "origin"] * 2
    for row in rows[::2]:
        human, gpt = row["conversations"]
        assert human == {"from": "human", "value": "<video>What colour is the first shape?"}
        with av.open(str(tmp_path / row["video"])) as file:
            stream = file.streams.video[0]
            assert stream.codec.name == "h264" and stream.average_rate == 10
            frames = [frame.to_ndarray(format="rgb24") for frame in file.decode(stream)]
        assert len(frames) == 40 and frames[0].shape == (112, 112, 3)
        near = (torch.tensor(frames[0]).int() - torch.tensor(COLOURS[gpt["value"]])).abs().amax(-1)
        assert (near < 25).sum() > 150


def test_frames_must_come_in_pairs(tmp_path):
    with pytest.raises(SystemExit):
        run(tmp_path, "--seed", "1", "--count", "1", "--frames", "7")


def test_the_bundled_clips_are_the_ones_that_their_readme_says(tmp_path):
    bundle = ROOT / "examples" / "clips"
    (command,) = re.findall(r"make_clips\.py --out clips (.*)`", (bundle / "README.md").read_text())
    run(tmp_path, *command.replace("KINDS", ",".join(make_clips.TRAINED_KINDS)).split())
    for index, name in enumerate(("circle", "shapes", "digit")):
        frames = [
            [x.to_ndarray(format="rgb24") for x in av.open(str(path)).decode(video=0)]
            for path in (bundle / f"{name}.mp4", tmp_path / f"videos/{index:06d}.mp4")
        ]
        # Another x264 may encode otherwise, but shows the same.
        one, two = (torch.tensor(np.stack(x)).int() for x in frames)
        assert one.shape == (80, 112, 112, 3) and (one - two).abs().float().mean() < 3
        made = (
            (tmp_path / "clips.jsonl").read_text().replace(f"videos/{index:06d}.mp4", f"{name}.mp4")
        )
        made = {row["video"] + row["kind"]: row for row in map(json.loads, made.splitlines())}
        bundled = map(json.loads, (bundle / "clips.jsonl").read_text().splitlines())
        rows = [row for row in bundled if row["video"] == f"{name}.mp4"]
        assert rows
        for row in rows:
            assert made[row["video"] + row["kind"]]["conversations"] == row["conversations"]
