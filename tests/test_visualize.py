"""visualize.py: what it writes, and that the patches it lights are those that were selected."""

import json
import re
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor

import clips
import visualize
from commands import attention_view
from commands.attention_record import AttentionRecord
from paths import ROOT

pytest.importorskip("matplotlib")

from commands import attention_pictures as drawing  # noqa: E402
from commands.attention_page import write_page  # noqa: E402

CLIPS = ROOT / "examples" / "clips"
GREY = (100, 100, 100)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    clips.write_clip(folder / "five.mp4", 50)  # 84x140: 5 steps of 3 x 5 tokens, blocks of 16
    clips.write_clip(folder / "two.webm", 20, codec="libvpx-vp9")
    Image.fromarray(clips.frame_image(3, 56, 84)).save(folder / "picture.png")
    return folder


def look(*arguments):
    options = visualize.parse_arguments([*map(str, arguments), "--out", "unused"])
    conversation = visualize.make_conversation(options)
    return conversation.view(options.files, options.question)


def force(monkeypatch, model, choose):
    """Make every query of a model select the blocks `choose(its own block)`, ascending."""

    def select_blocks(q, k_cmp, lse, cu_q, cu_k, *, block_size, num_selected, **kwargs):
        blocks = torch.full((len(q), k_cmp.shape[1], num_selected), -1, dtype=torch.int32)
        first = int(cu_k[-1]) - len(q)
        for query in range(len(q)):
            own = sorted(choose((first + query) // block_size))
            blocks[query, :, : len(own)] = torch.tensor(own, dtype=torch.int32)
        return blocks

    attention = sys.modules[type(model.model.language_model.layers[0].self_attn).__module__]
    functions = attention.attention_functions("reference", model.device)
    monkeypatch.setitem(functions.nsa_attention.__globals__, "select_blocks", select_blocks)


@pytest.fixture
def forced(folder, monkeypatch):
    """A view of five.mp4 whose queries select blocks 1 and 3, where they can, and their own."""
    options = ["five.mp4", "What?", "--max-new-tokens", "2", "--out", "unused"]
    monkeypatch.chdir(folder)
    options = visualize.parse_arguments(options)
    conversation = visualize.make_conversation(options)
    conversation.model = conversation.load_model()
    force(monkeypatch, conversation.model, lambda own: {own} | {b for b in (1, 3) if b < own})
    view = conversation.view(options.files, options.question)
    view.pictures = [Image.new("RGB", picture.size, GREY) for picture in view.pictures]
    return view


def lit_by_hand(query):
    """bool [5, 84, 140]: the pixels of tokens that this query's blocks hold, up to itself."""
    lit = np.zeros((5, 84, 140), bool)
    for token in range(query + 1):
        if token // 16 in {1, 3, query // 16}:
            step, row, column = token // 15, token % 15 // 5, token % 5
            lit[step, row * 28 : row * 28 + 28, column * 28 : column * 28 + 28] = True
    return lit


def test_a_forced_choice_lights_exactly_its_patches(forced):
    """Blocks of 16 over frames of 15 tokens: block 1 is frame 1 but for a token, and two more."""
    record = forced.record
    assert record.chosen_tokens.tolist() == [7, 22, 37, 52, 67]
    full = np.round(np.array(GREY) * 0.4 + drawing.LIT * 0.6)
    for place, query in enumerate(record.chosen_tokens):
        pictures = np.stack(drawing.lit_pictures(forced, place))
        lit = lit_by_hand(int(query))
        assert (pictures[lit] == full).all() and (pictures[~lit] == GREY).all()
    assert lit_by_hand(67).any((1, 2)).tolist() == [False, True, True, True, True]

    (strip,) = drawing.strips(forced)
    figure = drawing.draw_selections(forced, strip, [4.5])
    shown = np.stack([axis.images[0].get_array() for axis in figure.axes])
    assert ((shown == full).all(-1) == lit_by_hand(67)).all()


def test_one_layer_and_head_group_can_be_lit_alone(forced):
    blocks = forced.record.chosen_blocks
    blocks[1, 0, 4] = [0, -1, -1, -1]
    first = drawing.lit_pictures(forced, 4, layer=1, group=0)
    assert (first[0] != GREY).any(-1).all()  # 15 of its 16 tokens
    assert [(x != GREY).any(-1).sum() for x in first[1:]] == [28 * 28, 0, 0, 0]
    assert (drawing.lit_pictures(forced, 4, layer=1, group=1)[0] == GREY).all()


def test_counts_of_a_forced_choice(forced):
    """75 queries; own blocks 0 to 4 of 16, 16, 16, 16 and 11 tokens."""
    selections = forced.record.selections.sum(2)
    assert (selections == [16, 16 + 43, 16, 16 + 11, 11]).all()


def test_the_command_writes_a_page_that_needs_nothing_else(tmp_path, monkeypatch, capsys):
    out = tmp_path / "new" / "look"
    visualize.main([str(CLIPS / "shapes.mp4"), "What is the last shape?", "--out", str(out)])
    verdict, wrote = capsys.readouterr().out.splitlines()[-2:]
    assert verdict.startswith("The answer was read most at 6 to 7 s (")
    assert wrote == f"wrote {out / 'index.html'}"
    pictures = ["gates", "heads", "selections1", "sinks", "timeline1"]
    assert sorted(path.stem for path in out.glob("*.png")) == pictures
    for path in out.glob("*.png"):
        assert Image.open(path).width == 1000

    page = (out / "index.html").read_text()
    assert "What is the last shape? <b>cross</b>" in page and verdict in page
    assert not re.search(r"https?:|<script|<link|url\(", page)
    sources = re.findall(r"src='([^']{22})", page)
    assert sources == ["data:image/png;base64,"] * 5

    record = AttentionRecord.load(out)
    assert record.layout.seconds.tolist() == [[s, s + 1] for s in range(8)]
    answer = json.loads((out / "answer.json").read_text())
    assert answer["answer"] == "cross" and answer["verdict"] == verdict
    assert answer["words"] == ["cross"]
    summary = json.loads((out / "attention.json").read_text())
    assert len(summary["steps"]) == 8 and summary["selection_rate_by_step"][-1] is None


def test_the_pictures_are_what_the_model_saw(folder):
    view = look(folder / "five.mp4", "What?", "--max-new-tokens", 2)
    assert len(view.pictures) == 5
    for step, picture in enumerate(view.pictures):
        assert picture.size == (140, 84)
        assert clips.number_in(np.asarray(picture)) == 10 * step


def test_seconds_are_those_of_the_file(folder):
    view = look(folder / "five.mp4", "What?", "--fps", 0.8, "--max-new-tokens", 2)
    np.testing.assert_allclose(view.record.layout.seconds, [[0, 2.5], [2.5, 5]])


def test_seconds_of_a_part_are_those_of_the_whole_file(folder):
    options = visualize.parse_arguments(
        [str(folder / "five.mp4"), "What?", "--max-new-tokens", "2", "--out", "unused"]
    )
    conversation = visualize.make_conversation(options)
    conversation.settings["video_start"] = 2.0
    view = conversation.view(options.files, options.question)
    np.testing.assert_allclose(view.record.layout.seconds, [[2, 3], [3, 4], [4, 5]])
    assert view.when(2) == "4 to 5 s"


def test_several_videos_and_an_image(folder, tmp_path):
    files = [folder / name for name in ("five.mp4", "picture.png", "two.webm")]
    view = look(*files, "What?", "--max-new-tokens", 2)
    assert view.media == ["five.mp4", "picture.png", "two.webm"]
    assert [strip.title for strip in drawing.strips(view)] == ["five.mp4", "two.webm", "images"]
    sizes = [picture.size for picture in view.pictures]
    assert sizes == [(140, 84)] * 5 + [(84, 56)] + [(140, 84)] * 2
    assert clips.number_in(np.asarray(view.pictures[6])) == 0
    assert view.when(0) == "0 to 1 s of five.mp4" and view.when(5) == "picture.png"
    page = write_page(view, tmp_path, [1.5])
    names = ["timeline1", "timeline2", "timeline3", "selections1", "selections2", "selections3"]
    assert [f"<figure id='{name}'>" in page.read_text() for name in names] == [True] * 6


def test_a_long_video_shows_some_frames_and_all_numbers(folder, tmp_path):
    clips.write_clip(tmp_path / "long.mp4", 700, 28, 28)
    view = look(tmp_path / "long.mp4", "What?", "--fps", 2, "--max-new-tokens", 2)
    (strip,) = drawing.strips(view)
    assert len(strip.steps) == 32 and len(strip.shown) == drawing.MOST_FRAMES
    figure = drawing.draw_timeline(view, strip)
    frames, answer = figure.axes[:2]
    assert len(frames.images) == drawing.MOST_FRAMES and len(answer.patches) == 32
    write_page(view, tmp_path / "out")


def test_sinks_of_many_tokens_are_left_out_and_that_is_said(folder, monkeypatch, capsys):
    monkeypatch.setattr(attention_view, "MOST_FOR_SINKS", 74)
    options = [folder / "five.mp4", "What?", "--max-new-tokens", 2]
    assert look(*options).record.sink_ratios is None
    assert "visualize.py: notice: attention sinks are left out, because of 75" in (
        capsys.readouterr().err
    )
    assert look(*options, "--sinks").record.sink_ratios is not None
    assert look(*options, "--no-sinks").record.sink_ratios is None
    assert "sinks" not in capsys.readouterr().err


def test_dense_vision_has_no_blocks_to_show(folder, tmp_path):
    view = look(folder / "five.mp4", "What?", "--attention", "dense", "--max-new-tokens", 2)
    page = write_page(view, tmp_path).read_text()
    assert "attended densely" in page and "timeline1" in page
    assert sorted(path.stem for path in tmp_path.glob("*.png")) == ["timeline1"]
    json.loads((tmp_path / "attention.json").read_text())


ERRORS = {
    "no question": (["five.mp4", "two.webm"], "two.webm is a file; give the question after it"),
    "no file": (["nowhere.mp4", "What?"], "there is no file nowhere.mp4"),
    "another moment": (
        ["five.mp4", "What?", "--at", "7"],
        "second 7 is not in five.mp4, which was",
    ),
    "a file to write to": (["five.mp4", "What?", "--out", "two.webm"], "--out two.webm is a file"),
    "no folder": (["five.mp4", "What?"], "the following arguments are required: --out"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_are_one_line_and_nothing_is_written(folder, tmp_path, monkeypatch, capsys, case):
    arguments, message = ERRORS[case]
    monkeypatch.chdir(folder)
    out = [] if "--out" in arguments or case == "no folder" else ["--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as stopped:
        visualize.main([*arguments, *out, "--max-new-tokens", "2"])
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and len(error.splitlines()) == 1
    assert error.startswith("visualize.py: ") and message in error
    assert not (tmp_path / "out").exists()


def test_without_matplotlib_it_says_how_to_get_it(folder, tmp_path, monkeypatch, capsys):
    """Before the model runs."""
    for name in ("commands.attention_page", "commands.attention_pictures"):
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SystemExit):
        visualize.main([str(folder / "five.mp4"), "What?", "--out", str(tmp_path)])
    out, error = capsys.readouterr()
    assert "pip install matplotlib -c constraints.txt" in error and not out


def test_the_processor_serves_pictures_of_any_size():
    """The picture of a step is its first frame, whatever its sides."""
    from commands.attention_frames import SeenPixels

    processor = AutoProcessor.from_pretrained(ROOT, trust_remote_code=True).video_processor
    frames = np.stack([clips.frame_image(number, 56, 196) for number in range(6)])
    out = processor(videos=[frames], do_sample_frames=False, max_pixels=10**6, return_tensors="pt")
    seen = SeenPixels(out["pixel_values_videos"], out["video_grid_thw"], processor)
    for start in range(0, len(seen), 56):  # one step at a time
        seen[start : start + 56]
    for step, picture in enumerate(seen.pictures):
        wide = np.asarray(picture.resize((196, 56)))
        assert picture.width == 160 and clips.number_in(wide) == 2 * step
