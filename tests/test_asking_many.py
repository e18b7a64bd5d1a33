"""ask.py --out: the files that are found, the rows that are kept, and questions side by side."""

import csv
import json
import shutil

import pytest
from PIL import Image
from transformers import AutoProcessor

import clips
from commands.answers_file import COLUMNS, Answers
from commands.asking_many import AskingMany, find_files, read_questions_file
from commands.conversation import Conversation
from commands.model_loading import prepare_model
from paths import ROOT
from test_ask import ask, run  # noqa: F401

ROW = {"file": "a.mp4", "question": "Why?\n“So”, then?", "answer": 'a "b",\nc', "where": "here"}
SETTINGS = {"model": "m", "fps": 1.0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("videos")
    for name, frames in (("clip2.mp4", 20), ("clip10.mp4", 40), ("deep/er/clip1.webm", 20)):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        codec = "libvpx-vp9" if name.endswith("webm") else "libx264"
        clips.write_clip(folder / name, frames, codec=codec)
    Image.fromarray(clips.frame_image(3, 56, 84)).save(folder / "picture.of", "png")
    (folder / "notes.mkv").write_text("no video at all " * 100)
    (folder / "readme.md").write_text("Not asked about.")
    (folder / ".hidden.mp4").touch()
    return folder


@pytest.fixture(scope="module")
def model():
    """The tiny model and its processor, loaded once."""
    prepared = prepare_model(str(ROOT), "cpu")
    loaded = prepared.load()
    processor = AutoProcessor.from_pretrained(ROOT, trust_remote_code=True)
    return prepared._replace(load=lambda: loaded), processor


def make_conversation(model, **options):
    prepared, processor = model
    tokens = prepared.config.text_config.max_position_embeddings
    options = {"max_position_embeddings": tokens, "max_new_tokens": 4, **options}
    return Conversation(processor, prepared.load, prepared.forecast_memory, **options)


def ask_about(model, files, questions, out, batch_size=8, subtitles=None, **options):
    chat = make_conversation(model, **options)
    answers = Answers(out, SETTINGS)
    many = AskingMany(chat, answers, "on a CPU", batch_size, subtitles)
    many.run([str(file) for file in files], questions)
    return read(out)


def read(out):
    if str(out).endswith(".jsonl"):
        return [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    with open(out, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_folders_globs_and_lists_name_files(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(folder)
    inside = ["clip2.mp4", "clip10.mp4", "deep/er/clip1.webm", "notes.mkv", "picture.of"]
    assert find_files(["."]) == (inside, ["readme.md"])
    assert find_files(["./clip10.mp4", "clip10.mp4", "http://host/a.mp4"])[0] == [
        "clip10.mp4",
        "http://host/a.mp4",
    ]
    assert find_files(["clip*.mp4"])[0] == ["clip2.mp4", "clip10.mp4"]
    assert find_files(["**/*.webm"])[0] == ["deep/er/clip1.webm"]
    names = tmp_path / "names.txt"
    names.write_text("clip10.mp4\n\n lost.mp4 \ndeep\n*2.mp4\n")
    assert find_files([str(names)])[0] == [
        "clip10.mp4",
        "lost.mp4",
        "deep/er/clip1.webm",
        "clip2.mp4",
    ]
    (tmp_path / "clip[1].mp4").touch()  # a name, though it looks like a glob
    assert len(find_files([str(tmp_path / "clip[1].mp4")])[0]) == 1


def test_what_names_no_file_is_refused(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(folder)
    for lost in ("lost.mp4", "lost*.mp4", "lost/"):
        with pytest.raises(ValueError, match="there is no file, folder or list lost"):
            find_files(["clip2.mp4", lost])
    with pytest.raises(ValueError, match="holds no videos or pictures"):
        find_files([str(tmp_path)])
    (tmp_path / "none.txt").write_text("\n \n")
    with pytest.raises(ValueError, match="none.txt holds no questions"):
        read_questions_file(tmp_path / "none.txt")
    (tmp_path / "latin.txt").write_bytes("Où?".encode("latin-1"))
    with pytest.raises(ValueError, match="latin.txt is not UTF-8"):
        read_questions_file(tmp_path / "latin.txt")


@pytest.mark.parametrize("suffix", ["jsonl", "csv"])
def test_rows_survive_a_kill_at_every_byte(tmp_path, suffix):
    out = tmp_path / f"rows.{suffix}"
    answers = Answers(out, SETTINGS)
    lengths = [out.stat().st_size]
    for number in range(2):
        answers.write({**ROW, "file": f"{number}.mp4"})
        lengths.append(out.stat().st_size)
    whole = out.read_bytes()
    for length in range(len(whole) + 1):
        out.write_bytes(whole[:length])
        again = Answers(out, SETTINGS)
        # A row is there once all of it is but for its line's end.
        kept = sum(length >= end - 1 for end in lengths[1:])
        assert len(again.done) == kept, length
        for number in range(kept, 2):
            again.write({**ROW, "file": f"{number}.mp4"})
        assert out.read_bytes() == whole, length


@pytest.mark.parametrize("suffix", ["jsonl", "csv"])
def test_other_settings_are_refused(tmp_path, suffix):
    out = tmp_path / f"rows.{suffix}"
    Answers(out, SETTINGS).write(ROW)
    before = out.read_bytes()
    with pytest.raises(ValueError, match=r"other settings \(fps was 1.0, now 2.0; max_tok.* now 9"):
        Answers(out, {"model": "m", "fps": 2.0, "max_tokens": 9})
    with pytest.raises(ValueError, match=r"\(fps was 1.0, now None\)"):
        Answers(out, {"model": "m"})
    assert out.read_bytes() == before
    assert Answers(out, SETTINGS).done == {(ROW["file"], ROW["question"])}


OTHERS = {
    "rows.jsonl": ["hello", "hello\n", '{"file": 1}\n', "[1]\n", '{"id": 3', "\n\n"],
    "rows.csv": ["hello", "hello\n", "file,question\na,b\n", "a,b\n1,2", "\n"],
}


@pytest.mark.parametrize(("name", "content"), [(n, c) for n in OTHERS for c in OTHERS[n]])
def test_a_file_of_something_else_is_left_alone(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=f"line 1 of .*{name} is no answer of ask.py: give --out"):
        Answers(tmp_path / name, SETTINGS)
    assert (tmp_path / name).read_text() == content


def test_columns_that_a_user_adds_stay(tmp_path):
    out = tmp_path / "rows.csv"
    Answers(out, SETTINGS).write(ROW)
    header, rest = out.read_text().split("\n", 1)
    out.write_text(f"right,{header}\nyes,{rest}")
    Answers(out, SETTINGS).write({**ROW, "file": "b.mp4"})
    assert [(row["right"], row["file"]) for row in read(out)] == [("yes", "a.mp4"), ("", "b.mp4")]
    with pytest.raises(ValueError, match=r"--out is a.txt; its name must end in .jsonl or .csv"):
        Answers("a.txt", SETTINGS)


def test_every_question_to_every_file_is_a_row(folder, model, tmp_path, opened):
    files = [folder / "clip2.mp4", folder / "notes.mkv", folder / "picture.of", folder / "lost.mp4"]
    questions = ["What is shown?", "Which colour is it?"]
    rows = ask_about(model, files, questions, tmp_path / "rows.jsonl")
    assert [(row["file"], row["question"]) for row in rows] == [
        (str(file), question) for file in files for question in questions
    ]
    errors = [row.get("error", "") for row in rows]
    assert [bool(error) for error in errors] == [False, False, True, True, False, False, True, True]
    assert "notes.mkv cannot be opened as a video" in errors[2] and "no file" in errors[6]
    for row in (rows[0], rows[4]):
        assert row["answer_tokens"] <= 4 and row["settings"] == SETTINGS
        assert row["prompt_tokens"] > row["vision_tokens"] > 0 and row["answering_seconds"] > 0
    assert rows[0]["taken"].startswith("2 s at 2 fps = 4 frames")
    assert set(rows[0]) | {"error", "subtitles"} == set(COLUMNS)
    # Measured once; read by two readers of one batch.
    assert opened.count("notes.mkv") == 1


def test_side_by_side_as_alone(folder, model, tmp_path):
    """Prompts of several lengths, padded, give the answers that each gives alone."""
    files = [folder / "clip2.mp4", folder / "clip10.mp4", folder / "picture.of"]
    questions = ["What is shown?", "How many shapes are there, and which way does each move?"]
    settings = {"max_new_tokens": 12}
    alone = ask_about(model, files, questions, tmp_path / "alone.jsonl", 1, **settings)
    many = ask_about(model, files, questions, tmp_path / "many.jsonl", 4, **settings)
    assert [row["side_by_side"] for row in alone] == [1] * 6
    assert [row["side_by_side"] for row in many] == [4] * 4 + [2] * 2
    for name in ("file", "question", "answer", "answer_tokens", "prompt_tokens"):
        assert [row[name] for row in many] == [row[name] for row in alone], name


def test_long_prompts_are_answered_alone(folder, model, tmp_path, monkeypatch):
    files = [folder / "clip2.mp4", folder / "clip10.mp4"]
    monkeypatch.setattr("commands.asking_many.BATCH_TOKENS", 150)
    rows = ask_about(model, files, ["What?"], tmp_path / "rows.jsonl")
    assert [row["side_by_side"] for row in rows] == [1, 1]


def test_it_goes_on_where_it_was_stopped(folder, model, tmp_path, monkeypatch):
    files = [folder / "clip2.mp4", folder / "clip10.mp4", folder / "picture.of"]
    generate, calls = Conversation.generate, []

    def interrupted(self, inputs):
        calls.append(len(inputs["input_ids"]))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return generate(self, inputs)

    monkeypatch.setattr(Conversation, "generate", interrupted)
    out = tmp_path / "rows.jsonl"
    with pytest.raises(KeyboardInterrupt):
        ask_about(model, files, ["What?"], out, batch_size=1)
    first = out.read_text()
    assert len(read(out)) == 1
    rows = ask_about(model, files, ["What?", "Why?"], out, batch_size=1)
    assert out.read_text().startswith(first)
    assert len(rows) == 6 == len({(row["file"], row["question"]) for row in rows})
    assert len(calls) == 2 + 5  # what had its row was not asked again


def test_damage_is_a_row_and_spoils_no_other(folder, model, tmp_path):
    """It is met while the model reads, in the middle of a batch."""
    broken = clips.with_a_hole(tmp_path, "broken.mp4", 0.5, 0.6)
    files = [folder / "clip2.mp4", broken, folder / "clip10.mp4"]
    rows = ask_about(model, files, ["What?"], tmp_path / "rows.jsonl")
    assert ["error" in row for row in rows] == [False, True, False]
    assert "broken.mp4 is damaged around" in rows[1]["error"] and rows[1]["taken"]
    assert [row.get("side_by_side") for row in rows] == [1, None, 1]


def test_what_does_not_fit_together_is_asked_alone(folder, model, tmp_path, monkeypatch):
    generate = Conversation.generate

    def out_of_memory(self, inputs):
        return generate(self, inputs) if len(inputs["input_ids"]) == 1 else None

    monkeypatch.setattr(Conversation, "generate", out_of_memory)
    rows = ask_about(model, [folder / "clip2.mp4"], ["What?", "Why?"], tmp_path / "two.jsonl")
    assert [row["side_by_side"] for row in rows] == [1, 1]
    monkeypatch.setattr(Conversation, "generate", lambda self, inputs: None)
    rows = ask_about(model, [folder / "clip2.mp4"], ["What?"], tmp_path / "none.jsonl")
    assert rows[0]["error"].startswith("out of memory: ") and "answer" not in rows[0]


def test_a_full_disk_ends_it(folder, model, tmp_path, monkeypatch):
    def full(self, line):
        raise OSError(28, "No space left on device")

    out = tmp_path / "rows.jsonl"
    monkeypatch.setattr(Answers, "_append", full)
    with pytest.raises(OSError, match="No space left"):
        ask_about(model, [folder / "clip2.mp4"], ["What?"], out)


def test_a_model_that_cannot_be_loaded_ends_it(folder, model, tmp_path):
    def lost():
        raise OSError("no file named model.safetensors")

    out = tmp_path / "rows.jsonl"
    with pytest.raises(OSError, match="no file named model.safetensors"):
        ask_about((model[0]._replace(load=lost), model[1]), [folder / "clip2.mp4"], ["What?"], out)
    assert read(out) == []


def test_it_is_asked_from_a_shell(ask, folder, tmp_path, monkeypatch, capsys):  # noqa: F811
    out = tmp_path / "new" / "rows.csv"
    command = [folder, "What is shown?", "--out", out, "--max-new-tokens", 2, "--max-frames", 4]
    run(ask, monkeypatch, *command)
    shown, error = capsys.readouterr()
    where, last = shown.splitlines()
    assert where.startswith("5 files, questions to each: 1, on ")
    assert last == f"{out}: 5 rows, 1 of them with an error in place of an answer"
    assert "readme.md (1)" in error
    rows = read(out)
    assert len(rows) == 5 and sum(bool(row["error"]) for row in rows) == 1
    settings = json.loads(rows[0]["settings"])
    assert settings == {"model": str(ROOT), "max_frames": 4, "max_new_tokens": 2}
    run(ask, monkeypatch, *command)  # nothing is left to ask
    assert read(out) == rows
    with pytest.raises(SystemExit):
        run(ask, monkeypatch, *command, "--fps", 1)
    assert "other settings (fps was None, now 1.0)" in capsys.readouterr().err


REFUSED = {
    "json": (["What?", "--out", "a.jsonl", "--json"], "--json does not go with --out"),
    "plan": (["What?", "--out", "a.jsonl", "--plan"], "--plan does not go with --out"),
    "questions": (["--questions", "q.txt"], "say where the answers go, with --out"),
    "rate": (["What?", "--out", "a.jsonl", "--fps", "0"], "fps is 0.0; it must be positive"),
    "tokens": (["What?", "--out", "a.jsonl", "--max-tokens", "-1"], "max_tokens is -1"),
    "name": (["What?", "--out", "a.xlsx"], "its name must end in .jsonl or .csv"),
    "batch": (["What?", "--out", "a.csv", "--batch-size", "0"], "--batch-size is 0; it must be"),
    "lost": (["lost", "What?", "--out", "a.csv"], "no file, folder or list lost"),
    "no question": (["--out", "a.csv"], "give at least one video or image before the question"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_refused_at_once(ask, folder, monkeypatch, capsys, case):  # noqa: F811
    monkeypatch.chdir(folder)
    arguments, message = REFUSED[case]
    first = [] if case == "no question" else ["clip2.mp4"]
    if case == "no question":
        arguments = ["What?", *arguments]
    with pytest.raises(SystemExit) as stopped:
        run(ask, monkeypatch, *first, *arguments)
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and message in error and len(error.splitlines()) == 1
    assert not list(folder.glob("a.*"))


def test_subtitles_of_a_folder(folder, model, tmp_path):
    for name in ("clip2.mp4", "clip10.mp4"):
        shutil.copy(folder / name, tmp_path)
    (tmp_path / "clip2.srt").write_text("1\n00:00:01,000 --> 00:00:02,000\nLook, a circle.\n")
    files = [tmp_path / "clip2.mp4", tmp_path / "clip10.mp4"]
    with_them = ask_about(model, files, ["What?"], tmp_path / "s.jsonl", subtitles=tmp_path)
    without = ask_about(model, files, ["What?"], tmp_path / "n.jsonl")
    assert with_them[0]["subtitles"] == str(tmp_path / "clip2.srt")
    assert with_them[0]["prompt_tokens"] > without[0]["prompt_tokens"]
    assert "subtitles" not in with_them[1]
    assert with_them[1]["prompt_tokens"] == without[1]["prompt_tokens"]
    lines = "\n\n".join(f"0:{n // 60}:{n % 60}.0 --> 0:0:59.0\nSo it goes." for n in range(600))
    (tmp_path / "clip2.srt").write_text(lines)
    rows = ask_about(model, files, ["What?"], tmp_path / "long.jsonl", subtitles=tmp_path)
    assert rows[0]["error"].startswith("with its subtitles the prompt has ")
    assert "4,096 that the model was made for: take less" in rows[0]["error"]
    assert rows[1]["answer_tokens"]
