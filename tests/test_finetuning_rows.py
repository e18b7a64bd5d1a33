"""What a row is and where rows come from: taken as it is meant, or refused by name."""

import io
import json
import re
import shutil
from decimal import Decimal

import numpy as np
import pytest
from PIL import Image

from commands.finetuning_data import Conversations
from commands.finetuning_rows import LAYOUTS, RefusedRow, parse_row, to_messages
from commands.finetuning_sets import read_rows, split_share
from finetuning import ROW, TEXT_ROW, run, write_rows
from paths import ROOT


def user(content):
    return {"role": "user", "content": content}


def answer(content, **more):
    return {"role": "assistant", "content": content, **more}


def text(value):
    return {"type": "text", "text": value}


def video(source="a.mp4", **settings):
    return {"type": "video", "video": source, **settings}


def said(row):
    """A row's messages in short: (role, text and <sources>), "-" before an answer not learned."""
    lines = []
    for message in parse_row(row):
        parts = [p.get("text", f"<{p.get('video', p.get('image'))}>") for p in message["content"]]
        role = message["role"] if message.get("loss", True) else f"-{message['role']}"
        lines.append((role, "".join(map(str, parts))))
    return lines


def test_the_rows_that_are_shown_say_the_same_and_stand_in_the_docs():
    rows = [json.loads(layout) for layout in LAYOUTS]
    expected = [("user", "<a.mp4>What happens?"), ("assistant", "A cat sleeps.")]
    assert [said(row) for row in rows] == [expected] * 4
    page = (ROOT / "docs/training.md").read_text(encoding="utf-8")
    shown = page.partition("## What a row of data may be")[2].partition("```json\n")[2]
    shown, decoder = shown.partition("```")[0].strip(), json.JSONDecoder()
    for row in rows:
        in_docs, end = decoder.raw_decode(shown)
        assert in_docs == row
        shown = shown[end:].strip()
    assert not shown


def test_a_refusal_says_why_and_shows_a_row_of_each_layout():
    with pytest.raises(RefusedRow) as refused:
        parse_row({"video": "a.mp4", "text": "What happens?"})
    assert refused.value.reason.startswith("the row has neither messages nor conversations")
    assert all(layout in str(refused.value) for layout in LAYOUTS)


ASKED = [("user", "<a.mp4>What?"), ("assistant", "red")]
TURNS = [user("<video>What?"), answer("red")]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"videos": ["a.mp4"], "messages": json.dumps(TURNS)}, ASKED),
        ({"videos": '["a.mp4"]', "messages": TURNS}, ASKED),
        ({"videos": [{"path": "a.mp4", "bytes": None}], "messages": TURNS},
         [("user", "<{'path': 'a.mp4', 'bytes': None}>What?"), ("assistant", "red")]),
        ({"video": "a.mp4", "conversation": [{"human": "<video>What?", "assistant": "red"}]},
         ASKED),
        ({"video": "a.mp4", "conversations": [{"from": "Human", "value": "<VIDEO>What?"},
                                              {"from": "GPT", "value": "red"}]}, ASKED),
        ({"video": "a.mp4", "query": "What?", "response": "red"}, ASKED),
        ({"video": "a.mp4", "question": "What?", "answer": "red"}, ASKED),
        ({"video": "a.mp4", "instruction": "What?", "input": "", "output": "red"}, ASKED),
        ({"video": "a.mp4", "instruction": "What", "input": "is it?", "output": 3},
         [("user", "<a.mp4>What\nis it?"), ("assistant", "3")]),
        ({"video": "a.mp4", "query": "Sure?", "response": "yes",
          "history": [["<video>What?", "red"]]},
         [*ASKED, ("user", "Sure?"), ("assistant", "yes")]),
        ({"prompt": [user([video(), text("What?")]), answer("blue"), user("Sure?")],
          "completion": [answer("red")]},
         [ASKED[0], ("-assistant", "blue"), ("user", "Sure?"), ("assistant", "red")]),
        ({"video": "a.mp4", "system": "Be brief.", "messages": TURNS},
         [("system", "Be brief."), *ASKED]),
        ({"video": "a.mp4", "messages": [*TURNS[:1], answer("blue", loss=False), user("Sure?"),
                                         answer("red", loss=True)]},
         [ASKED[0], ("-assistant", "blue"), ("user", "Sure?"), ("assistant", "red")]),
        ({"video": "a.mp4", "messages": [*TURNS[:1], answer("blue", weight=0.0), user("Sure?"),
                                         answer("red", weight=None)]},
         [ASKED[0], ("-assistant", "blue"), ("user", "Sure?"), ("assistant", "red")]),
        ({"video": "a.mp4", "messages": [user("<video>How many?"), answer(3)]},
         [("user", "<a.mp4>How many?"), ("assistant", "3")]),
        ({"messages": [user([{"type": "video_url", "video_url": {"url": "a.mp4"}}, text("What?")]),
                       answer("red")]}, ASKED),
        ({"messages": [user([{"type": "input_video", "input_video": "a.mp4"},
                             {"type": "input_text", "text": "What?"}]), answer("red")]}, ASKED),
        ({"messages": [user([{"type": "image_url", "image_url": {"url": "b.png", "detail": "auto"}},
                             text("What?")]), answer("red")]},
         [("user", "<b.png>What?"), ("assistant", "red")]),
        ({"messages": [user([{"video": "a.mp4"}, {"text": "What?"}]), answer("red")]}, ASKED),
        ({"messages": [user([{"type": "text", "text": "What?", "video": None, "image": None},
                             {"type": "video", "text": None, "video": "a.mp4", "image": None}]),
                       answer([{"type": "text", "text": "red", "video": None}])]},
         [("user", "What?<a.mp4>"), ("assistant", "red")]),
        ({"videos": ["a.mp4"], "messages": [user([text("<video>What?")]), answer("red")]}, ASKED),
        ({"videos": ["a.mp4"], "messages": [
            user("<|vision_start|><|video_pad|><|vision_end|>What?"), answer("red")]}, ASKED),
        ({"videos": ["1.png", "2.png"], "messages": [user("<video>What?"), answer("red")]},
         [("user", "<['1.png', '2.png']>What?"), ("assistant", "red")]),
        ({"video": ["1.png", "2.png"], "messages": [user("What?"), answer("red")]},
         [("user", "<['1.png', '2.png']>What?"), ("assistant", "red")]),
        ({"images": ["1.png", "2.png"], "messages": [user("<image><image>?"), answer("red")]},
         [("user", "<1.png><2.png>?"), ("assistant", "red")]),
        ({"videos": ["a.mp4"], "messages": [user("<video>Which tag?"), answer("The <video> tag.")]},
         [("user", "<a.mp4>Which tag?"), ("assistant", "The <video> tag.")]),
        ({"video": "", "messages": [user("1 + 1?"), answer("2")]},
         [("user", "1 + 1?"), ("assistant", "2")]),
        *(
            ({"video": "a.mp4", "messages": [user(f"{tag}What?"), answer("red")]}, ASKED)
            for tag in ("<video></video>", "<Video> </Video>\n", "<VideoHere>", "<ImageHere>",
                        "<Video><VideoHere></Video>\n", "<|video|>", "<|image|>")
        ),
        *(
            ({"video": "a.mp4", "question": "What?", "answer": number},
             [ASKED[0], ("assistant", learned)])
            for number, learned in ((np.int64(3), "3"), (np.float32(2.5), "2.5"), (Decimal(3), "3"),
                                 (Decimal("3.50"), "3.50"), (np.str_("red"), "red"), (3.0, "3"))
        ),
        *(
            ({"video": "a.mp4", "question": "What? A. red B. blue 2", "answer": "A", **options},
             [("user", "<a.mp4>What? A. red B. blue 2"), ("assistant", "A")])
            for options in ({"options": ["A. red", "(B) blue 2"]}, {"choices": {"A": "red"}},
                            {"a0": "red", "a1": "blue"}, {"candidates": [2, "red"]})
        ),
        ({"images": [{"bytes": None, "path": None}], "question": "Which?", "answer": "b.mp4"},
         [("user", "Which?"), ("assistant", "b.mp4")]),
        ({"videos": np.array(["a.mp4"], object), "messages": np.array(TURNS)}, ASKED),
        ({"video": "a.mp4", "messages": [*TURNS[:1], answer(np.array(["red"], object))]}, ASKED),
        ({"video": np.float64("nan"), "a": "x", "messages": [user("1 + 1?"), answer("2")]},
         [("user", "1 + 1?"), ("assistant", "2")]),
        ({"video": "a.mp4", "video_name": "a.mp4", "id": 7, "duration": 3.5, "messages": TURNS},
         ASKED),
    ],
)  # fmt: skip
def test_rows_as_people_have_them_are_taken(row, expected):
    assert said(row) == expected


def test_settings_beside_a_video_are_the_videos():
    row = {"video": "a.mp4", "video_start": 1.0, "video_end": 2.0, "max_pixels": 50176}
    [part, _] = parse_row({**row, "messages": TURNS})[0]["content"]
    assert part == video(video_start=1.0, video_end=2.0, max_pixels=50176)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (None, "a row is an object .* not None"),
        ("x", "not 'x'"),
        ([ROW, ROW], "a row is an object"),
        ({"video": "a.mp4", "conversations": ["a", "b"]}, "list of turns, not \\['a', 'b'\\]"),
        ({"messages": TURNS, "conversations": ROW["conversations"]}, "messages and conversations"),
        ({"video": "a.mp4", "question": "What?"}, "the row has question, where"),
        ({"video": "a.mp4", "question": "?", "answer": "A", "options": ["x"]}, "has options"),
        ({"video": "a.mp4", "messages": TURNS, "objects": {"ref": ["x"]}}, "has objects"),
        ({"video": "a.mp4", "audio": "a.wav", "messages": TURNS}, "has audio"),
        ({"video": "a.mp4", "start": 1, "end": 2, "messages": TURNS}, "name them video_start"),
        ({"video": "a.mp4", "nframes": 8, "messages": TURNS}, "has nframes"),
        *(
            ({"video": "a.mp4", key: 8, "messages": TURNS}, f"has {key}: as settings")
            for key in ("start_timestamp", "clip_end_sec", "begin_time", "time_range", "end_s",
                        "video_start_time", "clip_start_time", "Start", "segment_start", "span",
                        "n_frames", "target_fps", "frame_rate", "frame_indices", "timestamps",
                        "relevant_windows")
        ),
        ({"video": "a.mp4", "prompt": "<|im_start|>user\n<video>What?<|im_end|>\n",
          "completion": "red"}, "begins with <\\|im_start\\|>"),
        ({"video": "a.mp4", "question": "A. red\nB. blue", "answer": "A", "options": ["red", "bl"]},
         "has not all"),
        ({"videos": ["a.mp4", "b.mp4"], "video_start": 1, "messages": [user("<video><video>?"),
                                                                      answer("x")]},
         "video_start for 2 videos"),
        ({"video_start": 1, "messages": [user([video(video_start=2), text("?")]), answer("x")]},
         "both have video_start"),
        ({"video": "a.mp4", "system": "A",
          "messages": [{"role": "system", "content": "B"}, *TURNS]},
         "a system text and a turn"),
        ({"video": "a.mp4", "messages": [TURNS[0], answer("red", loss=0.5)]}, "loss 0.5"),
        ({"video": "a.mp4", "messages": [TURNS[0], answer("red", loss=False)]}, "nothing to learn"),
        ({"video": "a.mp4", "messages": [*TURNS[:1], answer("red", tool_calls=[{"x": 1}])]},
         "tool_calls, which is not supported"),
        ({"video_path": "a.mp4", "conversations": ROW["conversations"]}, "has video_path"),
        ({"video": "a.mp4", "image_path": "b.png", "messages": TURNS}, "has image_path"),
        ({"frames": ["1.jpg"], "messages": TURNS}, "has frames"),
        ({"video_link": "https://a.org/a.mp4", "messages": TURNS}, "has video_link"),
        ({"video": None, "messages": TURNS}, "text has <video>, but its video is empty"),
        ({"messages": TURNS}, "text has <video>, but it has no image or video"),
        ({"video": "a.mp4", "videos": ["b.mp4"], "messages": TURNS}, "both video and videos"),
        ({"videos": ["1.png", "2.png"], "messages": [user("<video><video>?"), answer("x")]},
         "2 pictures as videos, and its text has 2 tags"),
        ({"videos": ["a.mp4"], "messages": [answer("<video> is a circle.")]}, "a user's turn"),
        ({"messages": [user("?"), answer([video(), text("red")])]}, "put it into a user's turn"),
        ({"messages": [user([{"type": "audio", "audio": "a.wav"}]), answer("x")]},
         "has type 'audio'"),
        ({"messages": [user([{"type": "image_url",
                              "image_url": {"url": "b.png", "detail": "low"}}]), answer("x")]},
         "an image has detail"),
        ({"messages": [user([{"type": "image", "image": "b.png", "max_frames": 1}]),
                       answer("x")]},
         "an image has max_frames"),
        *(
            ({"video": "a.mp4", "question": "?", "answer": "A", **dict.fromkeys(keys, "x")},
             f"has {', '.join(keys)}, as options")
            for keys in (["a0", "a1"], ["option_a", "option_b"], ["A", "B"], ["choices"],
                         ["option"], ["candidates"], ["answer_choices"], ["option1"],
                         ["mc_options"], ["wrong_answers"], ["possible_answers"],
                         ["multi_choice"], ["alternatives"], ["answerA", "answerB"],
                         ["ending0", "ending1"],
                ["option 0", "option 1"], ["choice_list"])
        ),
        *(
            ({"video": "a.mp4", "messages": [user(f"{tag}What?"), answer("x")]},
             f"the text has {re.escape(tag[:5])}.*not read")
            for tag in ("<img>b.png</img>", "<image 1>", "<|image_1|>", "<Frame 2>", "<video_0>",
                        "<img src='b.png'>", "<VIDEO_PLACEHOLDER>", "<start_of_image>",
                        "<__media__>", "<mm_placeholder>", "[video]", "{image 1}",
                        "&lt;video&gt;")
        ),
        ({"video": "a.mp4", "messages": [user("<video>b.mp4</video>?"), answer("x")]},
         "the text has </video>"),
        ({"messages": [user("<VideoHere>What?"), answer("x")]}, "no image or video"),
        ({"messages": [user("<img>b.png</img>What?"), answer("x")]}, "no image or video"),
        ({"video": "a.mp4", "messages": [{"role": "system", "content": "<video>"}, *TURNS]},
         "the system's turn has a tag"),
        ({"messages": [user("?"), answer(float("nan"))]}, "a turn has a role .* and text"),
        ({"video": 4010069381, "question": "?", "answer": "x"}, "a video is given as 4010069381"),
        ({"videos": [["1.png", float("nan")]], "question": "?", "answer": "x"},
         "a video is given as None"),
        ({"messages": [user([video(float("nan")), text("?")]), answer("x")]}, "more <video> tags"),
        ({"videos": [None], "messages": TURNS}, "its videos is empty"),
        *(
            ({key: "v_1QIUV7WYKXg", "question": "?", "answer": "x"}, f"has {key}, which is not")
            for key in ("video_name", "video_id", "vid", "videoID", "Video", "clip_uid", "image_id",
                        "youtube_id", "source_video")
        ),
        ({"messages": [user([{"type": "video", "video": "a.mp4", "path": "b.mp4"}]), answer("x")]},
         "has video and path"),
        ({"messages": [user([video(), text("<video>\nWhat?")]), answer("x")]}, "more <video> tags"),
        ({"videos": ["a.mp4"],
          "messages": [user([text("<video>"), text("<video>?")]), answer("x")]},
         "more <video> tags"),
        ({"videos": ["1.png", "2.png"],
          "messages": [user([text("<video>"), text("<video>Which?")]), answer("x")]},
         "2 pictures as videos"),
        ({"video": {"path": "a.mp4", "video_start": 1}, "messages": TURNS},
         "the row's video has video_start"),
        ({"messages": [user([video(start=1, end=2), text("?")]), answer("x")]},
         "a video has end, start"),
        ({"video": "a.mp4", "start_frame": 8, "messages": TURNS}, "has start_frame"),
        ({"messages": [user("?"), answer("x")], "img": "b.png"}, "has img"),
        ({"messages": [user("?"), answer("x")], "local_path": "a.mp4"}, "has local_path"),
        ({"messages": [user("?"), answer("x")], "image_bytes": b"x"}, "has image_bytes"),
        ({"messages": [user("?"), answer("x")], "video_url": "https://a.org/watch?v=1"},
         "has video_url"),
        ({"video": "a.mp4", "video2": "b.mp4", "messages": TURNS}, "has video2"),
        ({"video": "a.mp4", "messages": TURNS[:1], "answer": "red"}, "put all turns into messages"),
        ({"video": "a.mp4", "question": "?", "input": "more", "answer": "x"}, "question and input"),
        ({"video": "a.mp4", "question": "?", "answer": "x", "context": "y"}, "has context"),
        ({"video": "a.mp4", "question": "?", "answer": "x", "subtitles": "y"}, "has subtitles"),
        *(
            ({key: "a/b.mp4", "question": "?", "answer": "x"}, f"has {key}, which is not read")
            for key in ("data", "source", "visual_input", "media", "path", "filename")
        ),
        ({"video": "a.mp4", "messages": TURNS, "loss": False}, "has loss"),
        ({"video": "a.mp4", "messages": [{**TURNS[0], "value": "y"}, TURNS[1]]},
         "content and value: leave one"),
        ({"video": "a.mp4", "messages": [TURNS[0], answer("x<|im_end|>\n<|im_start|>user\nhi")]},
         "an assistant's text has <\\|im_end\\|>"),
        ({"video": "a.mp4", "question": "?", "answer": float("nan")}, "has question, where"),
        *(
            ({"video": "a.mp4", "question": "?", "answer": f"red{token}"},
             "an assistant's text has .*, which the chat template writes")
            for token in ("</s>", "<eos>", "<end_of_turn>", "<|eot_id|>", "<|vision_start|>!")
        ),
        ({"prompt": [user([video(), text("?")])], "completion": [answer("x")], "label": False},
         "has label False"),
        ({"video": "a.mp4", "question": "?", "answer": {"text": "red", "answer_start": 3}},
         "a text has answer_start"),
        ({"messages": [user([video(), text("?")]), answer([{**text("x"), "loss": False}])]},
         "a text has loss"),
        *(
            ({"video": "a.mp4", "question": "Is it red or blue?", "options": ["red", "blue"],
              "answer": given}, f"the answer {given} counts the options in options")
            for given in (1, "B", "0")
        ),
        ({"video": "a.mp4", "messages": {"role": ["user", "assistant"], "content": ["?"]}},
         "messages has lists of different lengths: \\[1, 2\\]"),
        ({"messages": [user([True]), answer("x")]}, "text and parts, not True"),
    ],
)  # fmt: skip
def test_what_is_not_read_is_refused_by_name(row, words):
    with pytest.raises(ValueError, match=words):
        parse_row(row)


def test_frames_of_a_folder_come_by_their_numbers(processor, tmp_path):
    (tmp_path / "frames").mkdir()
    for number in (1, 2, 9, 10):
        Image.new("RGB", (56, 56), (20 * number,) * 3).save(tmp_path / "frames" / f"{number}.png")
    (tmp_path / "empty").mkdir()
    rows = [{"video": name, "messages": TURNS} for name in ("frames", "empty")]
    data = Conversations([str(write_rows(tmp_path / "rows.jsonl", rows))], processor)
    pixels = data[0]["pixel_values_videos"].view(2, 16, 3, 2, -1).mean((1, 2, 4)).flatten()
    assert len(pixels) == 4 and pixels.tolist() == sorted(pixels.tolist())
    [(what, _, why)] = data.measured(1)["notes"]
    assert what == "skipped" and "empty" in why


def test_media_that_are_stored_in_a_row(processor, folder):
    picture = io.BytesIO()
    Image.new("RGB", (56, 28), "red").save(picture, "png")
    stored = {"bytes": picture.getvalue(), "path": None}
    films = [[stored, stored], {"bytes": (folder / ROW["video"]).read_bytes(), "path": "gone.mp4"}]
    row = {"images": [stored], "videos": films, "messages": [
        user("<image><video><video>?"), answer("x"),
    ]}  # fmt: skip
    data = Conversations([str(write_rows(folder / "one.jsonl", [ROW]))], processor)
    item = data.encode(data.prepare(to_messages(row, folder)))
    assert item["image_grid_thw"].tolist() == [[1, 2, 4]]
    assert item["video_grid_thw"].tolist() == [[1, 2, 4], data[0]["video_grid_thw"][0].tolist()]
    remote = {**ROW, "video": {"url": "https://a.org/a.mp4"}}
    assert to_messages(remote, folder)[0]["content"][0]["video"] == "https://a.org/a.mp4"
    address = {**ROW, "video": (folder / ROW["video"]).as_uri().replace("videos", "%76ideos")}
    assert to_messages(address, folder) == to_messages(ROW, folder)


def test_answers_that_are_not_learned_have_no_labels(processor, folder):
    row = {"messages": [user("?"), answer("blue", loss=False), user("Sure?"), answer("red")]}
    data = Conversations([str(write_rows(folder / "loss.jsonl", [row]))], processor)
    labels = data[0]["labels"]
    assert processor.tokenizer.decode(labels[labels != -100]) == "red<|im_end|>"
    assert "blue" in processor.tokenizer.decode(data[0]["input_ids"])


# Where rows come from.


@pytest.mark.parametrize(
    ("name", "content", "count"),
    [
        ("bom.jsonl", b"\xef\xbb\xbf" + json.dumps(ROW).encode(), 1),
        ("list.jsonl", json.dumps([ROW, ROW]).encode(), 2),
        ("lines.json", "\n".join([json.dumps(ROW)] * 2).encode(), 2),
        ("one.json", json.dumps(ROW).encode(), 1),
        ("keyed.json", json.dumps({"version": 1, "data": [ROW, ROW]}).encode(), 2),
        (
            "info.json",
            json.dumps({"info": [{"by": "us"}], "rows": {"a": ROW, "b": ROW}}).encode(),
            2,
        ),
        ("dict.json", json.dumps({"a": ROW, "b": ROW}).encode(), 2),
        ("set.JSONL", json.dumps(ROW).encode(), 1),
    ],
)
def test_json_is_read_by_its_content(tmp_path, name, content, count):
    (tmp_path / name).write_bytes(content)
    rows, folder = read_rows(str(tmp_path / name))
    assert list(rows) == [ROW] * count and folder == tmp_path


def test_files_that_hold_no_rows_say_so(tmp_path):
    (tmp_path / "broken.json").write_text('{"a": 1}\n{"b": ')
    with pytest.raises(ValueError, match="neither JSON .* nor JSON Lines .*line 2"):
        read_rows(str(tmp_path / "broken.json"))
    (tmp_path / "none.json").write_text('{"a": 1}')
    with pytest.raises(ValueError, match="neither a list of rows nor one row"):
        read_rows(str(tmp_path / "none.json"))
    (tmp_path / "two.json").write_text(json.dumps({"train": [ROW], "test": {"a": ROW}}))
    with pytest.raises(ValueError, match="rows in each of train, test"):
        read_rows(str(tmp_path / "two.json"))
    for content, words in (
        ("video,question,answer\na.mp4,What?\n", "row 1 and the header differ"),
        ("video,answer,question,answer\na.mp4,red,What?,blue\n", "several columns answer"),
        ('question,answer\n"What" is it?,red\n', "no CSV"),
        ('question,answer\n"What is it?,red\n', "no CSV"),
    ):
        (tmp_path / "odd.csv").write_text(content)
        with pytest.raises(ValueError, match=words):
            read_rows(str(tmp_path / "odd.csv"))
    (tmp_path / "wide.csv").write_text("question,answer\n", encoding="utf-16")
    with pytest.raises(ValueError, match="wide.csv is not in UTF-8"):
        read_rows(str(tmp_path / "wide.csv"))


@pytest.mark.parametrize("empty", ["", "NaN", "nan", "None", "null", "NULL", "<NA>"])
def test_what_a_table_writes_for_nothing_is_nothing(tmp_path, empty):
    (tmp_path / "a.csv").write_text(f"video, question,answer\n{empty},?,x\na.mp4,?,{empty}\n")
    rows, _ = read_rows(str(tmp_path / "a.csv"))
    assert rows[0] == {"video": None, "question": "?", "answer": "x"}
    with pytest.raises(ValueError, match="the row has question, where"):
        parse_row(rows[1])


def test_a_quote_in_a_tsv_is_a_quote_unless_all_are_in_pairs(tmp_path):
    (tmp_path / "a.tsv").write_text('question\tanswer\n"Hi" he said?\t"x\n\ny\tz\n')
    rows = [list(row.values()) for row in read_rows(str(tmp_path / "a.tsv"))[0]]
    assert rows == [['"Hi" he said?', '"x'], ["y", "z"]]
    (tmp_path / "a.tsv").write_text('question\tanswer\n"a\tb ""c"""\tx\n')
    assert read_rows(str(tmp_path / "a.tsv"))[0] == [{"question": 'a\tb "c"', "answer": "x"}]


def test_an_image_may_have_bounds_of_its_size(processor, folder):
    Image.new("RGB", (280, 280), "red").save(folder / "large.png")
    data = Conversations([str(write_rows(folder / "one.jsonl", [ROW]))], processor)
    for settings, grid in (
        ({}, [1, 8, 8]),
        ({"max_pixels": 56 * 56}, [1, 4, 4]),
        ({"resized_height": 56, "resized_width": 84}, [1, 4, 6]),
    ):
        part = {"type": "image", "image": "large.png", **settings}
        row = {"messages": [user([part, text("?")]), answer("x")]}
        item = data.encode(data.prepare(to_messages(row, folder)))
        assert item["image_grid_thw"].tolist() == [grid]
        image = processor.tokenizer.convert_tokens_to_ids(processor.image_token)
        assert (item["input_ids"] == image).sum() == item["image_grid_thw"].prod() // 4


def test_tables_with_questions_need_no_other_library(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    (tmp_path / "a.csv").write_text(
        '\ufeffvideo,question,answer\na.mp4,"What, then?",3\n,1 + 1?,2\n'
    )
    (tmp_path / "a.tsv").write_text("video\tquestion\tanswer\na.mp4\tWhat, then?\t3\n\t1 + 1?\t2\n")
    for name in ("a.csv", "a.tsv"):
        rows, _ = read_rows(str(tmp_path / name))
        assert [said(row) for row in rows] == [
            [("user", "<a.mp4>What, then?"), ("assistant", "3")],
            [("user", "1 + 1?"), ("assistant", "2")],
        ]


def test_data_sets_with_media_inside_are_read_undecoded(folder, tmp_path):
    import datasets

    films = tmp_path / "films"
    films.mkdir()
    shutil.copy(folder / ROW["video"], films / "a.mp4")
    (films / "metadata.csv").write_text("file_name,question,answer\na.mp4,What?,red\n")
    [row] = read_rows(str(films))[0]
    assert said({**row, "video": "a.mp4"}) == ASKED
    assert to_messages(row, tmp_path)[0]["content"][0]["video"] == str(films / "a.mp4")

    picture = str(folder / "red.png")
    row = {"messages": [user("<image>What?"), answer("red")], "images": [picture]}
    stored = datasets.Dataset.from_list([row]).cast_column(
        "images", datasets.List(datasets.Image())
    )
    stored.to_parquet(str(tmp_path / "a.parquet"))
    stored.save_to_disk(str(tmp_path / "disk"))
    for name in ("a.parquet", "disk"):
        [read] = read_rows(str(tmp_path / name))[0]
        assert set(read["images"][0]) == {"bytes", "path"}
        [image, _] = to_messages(read, folder)[0]["content"]
        assert image["image"] in (picture, (folder / "red.png").read_bytes())


def test_classes_are_read_by_their_names(tmp_path):
    import datasets

    rows = [
        {**dict.fromkeys(("video", "question"), "x"), "answer": one} for one in (1, 0, None, -1)
    ]
    stored = datasets.Dataset.from_list(rows)
    stored = stored.cast_column("answer", datasets.ClassLabel(names=["red", "blue"]))
    stored.to_parquet(str(tmp_path / "a.parquet"))
    read = read_rows(str(tmp_path / "a.parquet"))[0]
    assert [row["answer"] for row in read] == ["blue", "red", None, None]
    assert set(read[0]) == {"video", "question", "answer"}


def test_a_split_that_is_not_there_is_named(tmp_path):
    import datasets

    rows = datasets.Dataset.from_list([ROW])
    rows.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict(validation=rows).save_to_disk(str(tmp_path / "several"))
    assert len(read_rows(f"{tmp_path / 'several'}::validation")[0]) == 1
    with pytest.raises(ValueError, match="no split 'train', but validation: .*::validation"):
        read_rows(str(tmp_path / "several"))
    with pytest.raises(ValueError, match="without subsets and splits"):
        read_rows(f"{tmp_path / 'one'}::validation")


def test_a_set_without_rows_is_named_among_others(processor, folder):
    write_rows(folder / "a.jsonl", [ROW])
    write_rows(folder / "none.jsonl", [])
    for name in ("none.jsonl", "a.jsonl%10"):
        names = [str(folder / "a.jsonl"), str(folder / name)]
        with pytest.raises(ValueError, match=f"no rows in [^ ]*{name}"):
            Conversations(names, processor)


def test_keys_that_nothing_reads_are_named(processor, folder, tmp_path, caplog):
    import datasets

    notes = {"transcript": "He speaks.", "pre_prompt": "Be brief.", "empty": None}
    datasets.Dataset.from_list([{**ROW, "origin": "x"}]).to_parquet(str(folder / "a.parquet"))
    path = write_rows(folder / "notes.jsonl", [TEXT_ROW, {**ROW, **notes}])
    names = [str(path), str(folder / "a.parquet")]
    assert Conversations(names, processor).unread_keys() == ["origin", "pre_prompt", "transcript"]
    run(path, tmp_path, dry_run=True)
    assert "Nothing reads pre_prompt, transcript of the rows" in caplog.text


def test_a_share_is_a_number_after_the_last_percent_sign(tmp_path):
    assert split_share("a%20b.json%50") == ("a%20b.json", 50)
    assert split_share("a%20b.json") == ("a%20b.json", None)
    (tmp_path / "a%20").mkdir()
    assert split_share(str(tmp_path / "a%20")) == (str(tmp_path / "a%20"), None)


ODD = [
    None,
    "x",
    {"video": ROW["video"], "conversations": ["a", "b"]},
    {"messages": 7},
    {**ROW, "video": {"a": 1}},
    {"messages": [user([{"type": ["video"]}]), answer("x")]},
    {"messages": [user([{"video": ROW["video"]}, {"text": "What?"}]), answer("red")]},
]


def test_one_function_decides_what_a_row_is(processor, folder, tmp_path):
    """The dry run, training and the count of kinds agree on rows that are odd in any way."""
    path = write_rows(folder / "odd.jsonl", [TEXT_ROW, *ODD])
    data = Conversations([str(path)], processor)
    assert data.kinds_of_media() == 1  # the last one has a video, the others are skipped
    skipped = [bool(data.measured(index)["notes"]) for index in range(len(data))]
    assert skipped == [False, *[True] * 6, False]
    trainer = run(path, tmp_path, max_steps=1, per_device_train_batch_size=8)
    assert trainer.state.log_history[0]["skipped_samples"] == 6


def test_arrays_of_frames_may_stand_in_a_row(processor, folder):
    frames = np.zeros((4, 56, 56, 3), np.uint8)
    data = Conversations([str(write_rows(folder / "one.jsonl", [ROW]))], processor)
    row = {"messages": [user([video(frames, fps=2.0), text("?")]), answer("x")]}
    item = data.encode(data.prepare(to_messages(row, folder)))
    assert item["video_grid_thw"].tolist() == [[2, 4, 4]]


def test_text_in_parts_keeps_its_spaces_but_at_the_ends_and_beside_media():
    row = {
        "videos": ["a.mp4"],
        "messages": [
            user([text(" <video> \n What is "), text("this? ")]),
            answer([text("A red "), text("car.<|im_end|>\n")]),
        ],
    }
    asked, answered = parse_row(row)
    assert [part.get("text") for part in asked["content"]] == [None, "What is ", "this?"]
    assert "".join(part["text"] for part in answered["content"]) == "A red car."


def test_parts_may_be_stored_as_one_json_string():
    parts = [video(), text("What?")]
    asked, _ = parse_row({"messages": [user(json.dumps(parts)), answer("x")]})
    assert asked["content"] == parts
    asked, _ = parse_row({"messages": [user("[1, 2] or [{}]?"), answer("x")]})
    assert asked["content"] == [text("[1, 2] or [{}]?")]
