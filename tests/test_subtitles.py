"""What is said in a video: SubRip and WebVTT, and how it reaches a question."""

import json

import pytest

import clips
from commands.subtitles import Spoken, read_subtitles, subtitles_of, with_subtitles
from test_ask import ask, run  # noqa: F401

SRT = """\
1
00:00:01,500 --> 00:00:02,750
<i>Good</i> {\\an8}morning,
everyone.

2
01:02:03,004 --> 01:02:05,000 X1:40 X2:600
- Is it?

3
00:00:09,000 --> 00:00:10,000

"""
VTT = """\
WEBVTT - a talk

NOTE This is --> no text
of the talk.

STYLE
::cue { color: red }

intro
00:01.500 --> 00:02.750 align:start
<v Ann><c.loud>Good</c> morning,
everyone.

01:02:03.004 --> 01:02:05.000
- <01:02:04.000>Is it?
"""
SPOKEN = [Spoken(1.5, 2.75, "Good morning, everyone."), Spoken(3723.004, 3725.0, "- Is it?")]


@pytest.mark.parametrize("content", [SRT, VTT])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_both_formats(tmp_path, content, end, mark):
    path = tmp_path / "talk.srt"
    path.write_bytes((mark + content.replace("\n", end)).encode())
    assert read_subtitles(path) == SPOKEN


def test_texts_come_in_the_order_of_their_times_before_the_question(tmp_path):
    path = tmp_path / "talk.vtt"
    path.write_text("0:9.0 --> 0:10.0\nlast\n\n0:1.0 --> 0:2.0\nfirst")
    assert [one.text for one in read_subtitles(path)] == ["first", "last"]
    assert with_subtitles(SPOKEN, "Who speaks?") == (
        "What is said in the video:\n[0:00:02] Good morning, everyone.\n[1:02:03] - Is it?\n\n"
        "Who speaks?"
    )
    assert with_subtitles([], "Who speaks?") == "Who speaks?"


def test_other_files_are_refused(tmp_path):
    (tmp_path / "latin.srt").write_bytes(SRT.replace("Good", "Où").encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin.srt is not UTF-8 .* iconv"):
        read_subtitles(tmp_path / "latin.srt")
    (tmp_path / "none.srt").write_text("1\n\nGood morning.")
    with pytest.raises(ValueError, match=r"none.srt has no texts with times"):
        read_subtitles(tmp_path / "none.srt")


def test_a_folder_has_them_by_the_videos_names(tmp_path):
    (tmp_path / "talk.vtt").touch()
    assert subtitles_of("videos/talk.mp4", tmp_path) == tmp_path / "talk.vtt"
    assert subtitles_of("videos/other.mp4", tmp_path) is None
    assert subtitles_of("videos/other.mp4", tmp_path / "talk.vtt") == tmp_path / "talk.vtt"


def test_they_stand_before_the_first_question(ask, tmp_path, monkeypatch, capsys):  # noqa: F811
    video = clips.write_clip(tmp_path / "five.mp4", 50)
    path = tmp_path / "talk.srt"
    path.write_text(SRT)
    options = ["--json", "--max-new-tokens", 1, "--interactive"]
    lengths = []
    for more in ([], ["--subtitles", path]):
        run(ask, monkeypatch, video, "What?", *options, *more, lines="And?")
        records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        lengths.append([record["prompt_tokens"] for record in records])
    (first, second), (first_with, second_with) = lengths
    assert first_with > first + 10
    assert second_with - first_with == second - first
    assert records[0]["question"] == "What?"

    with pytest.raises(SystemExit):
        run(ask, monkeypatch, video, video, "What?", "--subtitles", path)
    assert "talk.srt is of one video, but 2 files were given" in capsys.readouterr().err
    path.write_text("\n\n".join([SRT] * 300))
    with pytest.raises(SystemExit):
        run(ask, monkeypatch, video, "What?", "--subtitles", path)
    error = capsys.readouterr().err
    assert "ask.py: with its subtitles the prompt has" in error and "leave --subtitles" in error
