"""app.py as visitors meet it: answers, limits, messages, what is served, and the page in Chromium.

Needs requirements-demo.txt; the page itself, Chromium and playwright besides.
"""

import argparse
import functools
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from PIL import Image
from transformers import AutoProcessor

import clips
from conversation import TURNS
from paths import ROOT

gr = pytest.importorskip("gradio", reason="needs requirements-demo.txt")

from commands import app_answers, app_examples, app_page, app_strip, ending  # noqa: E402
from commands.app_answers import Answerer, as_message, most_tokens  # noqa: E402
from commands.app_page import Page, Session  # noqa: E402
from commands.conversation import TooLarge  # noqa: E402
from commands.forecast import forecast  # noqa: E402
from commands.model_loading import prepare_model  # noqa: E402

SHAPES = str(ROOT / "examples/clips/shapes.mp4")
LAST = "What colour is the last shape?"
VISITOR = SimpleNamespace(session_hash="visitor")


@pytest.fixture(scope="module")
def processor():
    return AutoProcessor.from_pretrained(ROOT, trust_remote_code=True)


@pytest.fixture(scope="module")
def prepared():
    return prepare_model(str(ROOT), "cpu")


@pytest.fixture(scope="module")
def answerer(prepared, processor):
    return Answerer(prepared, processor)


@pytest.fixture(scope="module")
def stored(processor):
    return [(example, app_examples.load(example, processor)) for example in app_examples.EXAMPLES]


@pytest.fixture(scope="module")
def page(answerer, stored):
    return Page(answerer, stored)


@pytest.fixture
def folder(tmp_path):
    clips.write_clip(tmp_path / "five.mp4", 50)
    for name in ("notes.mp4", "notes.txt"):
        (tmp_path / name).write_text("no video at all " * 100)
    return tmp_path


def answer_of(answerer, *arguments):
    *told, (kind, answer) = answerer.answer(*arguments)
    assert kind == "answer"
    return answer, told


# Answers.


def test_stored_results_are_what_the_checkpoint_answers(answerer, stored):
    for example, kept in stored:
        answer, told = answer_of(answerer, [], str(example.clip), example.question, 10**6)
        assert (answer.text, answer.taken) == (kept.text, kept.taken)
        view, other = answer.view, kept.view
        for name in ("question", "answer", "words", "question_words", "media"):
            assert getattr(view, name) == getattr(other, name)
        assert "".join(text for kind, text in told if kind == "text").strip() == kept.text
        assert [line for kind, line in told if kind == "taken"] == kept.taken
        for name in ("chosen_blocks", "selections", "chosen_tokens"):
            np.testing.assert_array_equal(getattr(view.record, name), getattr(other.record, name))
        found = view.record.text_attention
        np.testing.assert_allclose(found, other.record.text_attention, atol=1e-4)
        assert all(map(np.array_equal, view.pictures, other.pictures))


def test_an_example_says_from_which_second_it_was_answered(stored):
    """The last shape, an orange cross, is seen from 5 s on."""
    (example, answer), *_ = stored
    assert (example.question, answer.text) == (LAST, "orange")
    assert "“orange”</b> was read most at <b>6 to 7 s</b>" in app_strip.summary(
        answer.view, None, None
    )


def test_pictures_are_what_the_model_saw(answerer, folder):
    """Of five seconds at two frames a second, the frames 0, 10, 20, ... begin a step."""
    answer, _ = answer_of(answerer, [], str(folder / "five.mp4"), "What is shown?", 10**6)
    assert len(answer.view.pictures) == 5
    for number, picture in enumerate(answer.view.pictures):
        frame = Image.fromarray(clips.frame_image(10 * number, 56, 84)).resize((140, 84))
        difference = np.abs(np.asarray(picture, float) - np.asarray(frame, float))
        assert picture.size == (140, 84) and np.median(difference) < 12, number


def test_further_questions_read_the_whole_conversation_again(answerer, folder):
    first, _ = answer_of(answerer, [], SHAPES, LAST, 10**6)
    turns = [([SHAPES], LAST, first.text)]
    second, _ = answer_of(answerer, turns, None, "And now?", 10**6)
    assert second.view.record.layout.num_steps == 8 and len(second.view.pictures) == 8
    assert second.taken[0] == first.taken[0]
    third, _ = answer_of(answerer, turns, str(folder / "five.mp4"), "And here?", 10**6)
    assert third.view.record.layout.num_steps == 8 + 5
    assert third.view.media == ["shapes.mp4", "five.mp4"]
    assert [line.partition(":")[0] for line in third.taken[:2]] == ["shapes.mp4", "five.mp4"]
    strip = app_strip.Strip(third.view)
    assert len(strip.steps) == 5 and strip.reads(None, None).sum() < 0.99


def test_a_video_of_one_moment_is_shown(page, folder):
    """Two frames, which share their tokens."""
    clips.write_clip(folder / "short.mp4", 2)
    session, *_ = [
        update[page.session]
        for update in page.on_ask(
            Session(), str(folder / "short.mp4"), "What is shown?", False, 100, VISITOR
        )
        if page.session in update
    ]
    shown = page.show(session.view)
    assert shown[page.second].value == 0 < shown[page.second].maximum
    assert shown[page.strip].count("<img") == 1 and "<iframe" in page.on_draw(session)
    page.on_choice(session, -1, -1, -1, shown[page.second].maximum)


def test_a_picture_is_refused_before_it_is_answered(answerer, folder):
    path = folder / "still.png"
    Image.new("RGB", (60, 60), "red").save(path)
    with pytest.raises(ValueError, match="still.png is a picture: upload a video"):
        answerer.plan(str(path), 100)
    with pytest.raises(gr.Error, match="still.png is a picture: upload a video"):
        answer_of(answerer, [], str(path), "What?", 100)
    frames = [Image.new("RGB", (60, 60), colour) for colour in ("red", "blue", "red")]
    frames[0].save(folder / "moves.gif", save_all=True, append_images=frames[1:], duration=500)
    assert answer_of(answerer, [], str(folder / "moves.gif"), "What?", 100)[0].text


def test_a_budget_of_one_token_has_a_slider(prepared, processor):
    assert Page(Answerer(prepared, processor, max_tokens=1), []).budget.minimum == 0


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--max-tokens", "0"], "--max-tokens is 0; it must be at least 1"),
        (["--device", "cuda:77"], "--device cuda:77 cannot be used here"),
        (["--model", str(ROOT / "docs")], "Unrecognized model in"),
    ],
)
def test_options_that_cannot_be_used_are_one_line(monkeypatch, capsys, options, said):
    import app

    for name in ("GRADIO_TEMP_DIR", "GRADIO_EXAMPLES_CACHE"):
        monkeypatch.setenv(name, "")  # so that it is as before afterwards
    monkeypatch.setattr(sys, "argv", ["app.py", *options])
    handler = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit) as end:
            app.main()
    finally:
        signal.signal(signal.SIGTERM, handler)
    error = capsys.readouterr().err.splitlines()[-1]
    assert end.value.code == 2 and error.startswith("app.py: ") and said in error


def test_a_package_that_is_missing_is_named_with_what_installs_it(capsys):
    with pytest.raises(SystemExit):
        ending.end("app.py", ModuleNotFoundError("No module named 'gradio'"))
    error = capsys.readouterr().err
    assert error.startswith(
        "app.py: No module named 'gradio': pip install -r requirements-demo.txt"
    )


class Endless:
    """Stands for `Answerer._ask`: tells twenty words a second until the visitor stops it."""

    def __init__(self):
        self.stopped = threading.Event()

    def __call__(self, turns, video, question, max_tokens, tell):
        try:
            for _ in range(1000):
                tell("text", "again ")
                time.sleep(0.05)
        except app_answers.Stopped:
            self.stopped.set()
            raise


def test_stopping_ends_the_answer_and_leaves_nothing_running(answerer, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(answerer, "_ask", endless := Endless())
        told = answerer.answer([], SHAPES, LAST, 10**6)
        assert next(told) == ("text", "again ")
        told.close()
        assert endless.stopped.wait(30)
    assert answer_of(answerer, [], SHAPES, LAST, 10**6)[0].text == "orange"


def test_what_the_gpu_part_takes_and_gives_can_be_pickled(prepared, processor):
    """As on ZeroGPU, where it runs in a process of its own."""

    def on_gpu(duration):
        def decorate(function):
            @functools.wraps(function)
            def elsewhere(*arguments):
                for told in function(*pickle.loads(pickle.dumps(arguments))):
                    yield pickle.loads(pickle.dumps(told))

            return elsewhere

        assert duration == app_answers.GPU_SECONDS
        return decorate

    answerer = Answerer(prepared, processor, on_gpu=on_gpu)
    answer, _ = answer_of(answerer, [([SHAPES], LAST, "orange")], None, "And now?", 10**6)
    assert "moment" in app_strip.film_strip(answer.view, None, None, None, 3.0)


def test_under_other_semantics_it_answers_without_a_record(processor, page):
    prepared = prepare_model(str(ROOT), "cpu")
    prepared.config.text_config.nsa_semantics = "released"
    answer, _ = answer_of(Answerer(prepared, processor), [], SHAPES, LAST, 10**6)
    assert answer.text and answer.view is None
    assert "the paper's semantics only" in page.show(None, app_page.UNRECORDED)[page.summary]


# Limits.


def with_memory(prepared, available):
    def forecast_memory(prompt, vision, new):
        return forecast(
            prepared.config,
            prompt,
            vision_tokens=vision,
            new_tokens=new,
            dtype=prepared.dtype,
            available=available,
        )

    return prepared._replace(device="cuda", forecast_memory=forecast_memory)


def test_a_video_is_cut_down_to_what_fits(prepared, processor):
    whole = most_tokens(prepared)
    assert whole == 4096 - app_answers.TEXT_TOKENS - app_answers.NEW_TOKENS
    peak = prepared.forecast_memory(whole, whole, 0).peak * 2**30
    fitting = most_tokens(with_memory(prepared, 0.4 * peak))
    assert 64 < fitting < whole / 2
    answerer = Answerer(prepared, processor, max_tokens=64)
    answer, _ = answer_of(answerer, [], SHAPES, LAST, 10**6)
    assert "= 8 of 16 frames (token budget), 112x112, 64 tokens" in answer.taken[0]
    with pytest.raises(ValueError, match="no video fits: .* use more memory"):
        most_tokens(with_memory(prepared, 2**20))


def test_what_does_not_fit_after_all_is_a_message(prepared, processor):
    answerer = Answerer(prepared, processor)
    answerer.forecast_memory = with_memory(prepared, 2**20).forecast_memory
    with pytest.raises(gr.Error, match="this does not fit: .* MiB weights"):
        answer_of(answerer, [], SHAPES, LAST, 10**6)


def test_errors_keep_their_words_and_lose_the_servers_folders():
    error = as_message(TooLarge("/tmp/x1/<b>.mp4: damaged"), ["/tmp/x1/<b>.mp4", None])
    assert isinstance(error, gr.Error) and error.message == "&lt;b&gt;.mp4: damaged"
    other = KeyError("a fault of the page's own")
    assert as_message(other) is other


# The handlers.


def ask(page, session, video, question, remember=True, budget=10**6):
    *_, last = page.on_ask(session, video, question, remember, budget, VISITOR)
    return last


def test_the_root_holds_a_conversation_on_the_page(page):
    session = Session()
    for clip, question, answer in TURNS:
        shown = str(clip) if clip else session.video
        last = ask(page, session, shown, question)
        session = last[page.session]
        assert session.turns[-1] == ([str(clip)] if clip else [], question, answer)
    assert len(session.turns) == len(TURNS)


def test_several_turns_of_the_page(page, tmp_path):
    copy = shutil.copy(SHAPES, tmp_path)  # as Gradio hands an example out
    last = ask(page, Session(), SHAPES, LAST)
    session = last[page.session]
    assert session.turns == [([SHAPES], LAST, "orange")]
    later = ask(page, session, copy, "And now?")[page.session]
    assert [files for files, *_ in later.turns] == [[SHAPES], []]
    assert len(app_page.chat_of(later.turns)) == 4
    alone = ask(page, later, copy, LAST, remember=False)[page.session]
    assert alone.turns == [([copy], LAST, "orange")]
    assert page.on_new()[page.session].turns == []


@pytest.mark.parametrize(
    ("video", "question", "message"),
    [
        (None, LAST, "there is no video"),
        (SHAPES, "  ", "the question is empty"),
        (SHAPES, "a" * 501, "more than 500 letters"),
    ],
)
def test_questions_that_cannot_be_asked(page, video, question, message):
    with pytest.raises(gr.Error, match=message):
        ask(page, Session(), video, question)


def test_a_file_that_is_no_video_is_said_to_be_none(page, folder):
    uploads = page.on_upload(Session(), str(folder / "notes.mp4"), 10**6)
    said = next(uploads)[page.taken]
    assert said.startswith("notes.mp4 cannot be opened as a video")
    with pytest.raises(gr.Error):
        next(uploads)
    asking = page.on_ask(Session(), str(folder / "notes.mp4"), LAST, True, 10**6, VISITOR)
    assert next(asking)[page.taken] == said
    with pytest.raises(gr.Error):
        next(asking)
    taken = next(page.on_upload(Session(), str(folder / "five.mp4"), 10**6))[page.taken]
    assert taken.startswith("five.mp4: 5 s at 2 fps = 10 frames, 84x140, 75 tokens")


def test_another_model_has_no_examples_and_remembers(answerer):
    page = Page(answerer, [])
    assert page.remember.value and not page.samples.visible
    texts = [one.value for one in page.blocks.blocks.values() if isinstance(one, gr.Markdown)]
    assert texts == [app_page.HEADER.strip()]


# The film strip.


@pytest.fixture
def view(stored):
    """A copy of the first example's, to be changed: 8 steps of 4 x 4 tokens in blocks of 16."""
    return pickle.loads(pickle.dumps(stored[0][1].view))


def test_exactly_the_selected_patches_are_not_faded(view):
    """Blocks 0 and 2 are the first and the third step; the third asks, from its middle."""
    view.record.chosen_blocks[:] = [0, 2, -1, -1]
    selected = app_strip.Strip(view).selected(2, 1, 0)
    assert [share.sum() for share in selected] == [16, 0, 8, 0, 0, 0, 0, 0]
    assert selected[0].all() and selected[2][:2].all()
    before = np.asarray(view.pictures[2], float)
    after = np.asarray(app_strip.fade(view.pictures[2], selected[2]), float)
    assert np.array_equal(after[:56], before[:56])
    np.testing.assert_allclose(after[56:], before[56:] * 0.25 + 255 * 0.75, atol=0.51)

    view.record.chosen_blocks[0, 0, 2] = [1, -1, -1, -1]  # one of the 4 x 2 layers and groups
    selected = app_strip.Strip(view).selected(2, None, None)
    assert [share.sum() for share in selected] == [14, 2, 7, 0, 0, 0, 0, 0]
    view.record.selections[:] = 0  # as with dense attention
    assert all(share.all() for share in app_strip.Strip(view).selected(2, None, None))


def test_bars_add_up_and_follow_word_and_layer(stored):
    order = stored[1][1].view
    strip = app_strip.Strip(order)
    for word, layer in ((None, None), (2, None), (2, 1)):
        reads = strip.reads(word, layer)
        np.testing.assert_allclose(reads.sum(), 1)
    kept = order.record.answer_reads()[1, 2, :8]
    np.testing.assert_allclose(reads, kept / kept.sum(), rtol=1e-5)
    assert "No moment stands out" in app_strip.summary(order, None, None)


def test_a_long_video_has_as_many_columns_as_fit(view, monkeypatch):
    html = app_strip.film_strip(view, None, None, None, 7.0)
    assert html.count("<button") == 8 and html.count("moment asking") == 1
    monkeypatch.setattr(app_strip, "COLUMNS", 3)
    html = app_strip.film_strip(view, None, None, None, 4.0)
    assert html.count("<button") == 3
    assert 'class="moment asking" data-from="3.000" title="3 to 6 s: ' in html


def test_moments_are_found_by_seconds_as_the_slider_rounds_them(view):
    view.record.layout.seconds[:, 0] = [0, 2.8125, 5.625, 8.4375, 11.25, 14.0625, 16.875, 19.6875]
    strip = app_strip.Strip(view)
    for place, begin in enumerate(strip.begin):
        assert strip.at(round(begin, 2)) == strip.at(begin + 1) == place
    assert strip.at(-1) == 0 and strip.at(100) == 7
    times = [(2.81, "2.8 s"), (59.94, "59.9 s"), (67, "01:07"), (3607.4, "1:00:07")]
    assert [app_strip.clock(second) for second, _ in times] == [text for _, text in times]
    assert app_strip.span(3, 4) == "3 to 4 s" and app_strip.span(50, 70) == "50 s to 01:10"


def test_what_a_visitor_or_a_model_writes_is_no_html(view, page):
    view.answer, view.words, view.question = "<script>", ["<script>"], "<script>"
    for word in (None, 0):
        assert "<script>" not in app_strip.summary(view, word, None)
    assert "<script>" not in page.on_draw(Session(view=view))


# What the server gives away.


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """The page as app.py launches it: its address, its blocks and the folder of uploads."""
    import app

    uploads = tmp_path_factory.mktemp("uploads")
    options = argparse.Namespace(model=str(ROOT), device="cpu", max_tokens=None, port=None)
    patch = pytest.MonkeyPatch()
    for name in ("GRADIO_TEMP_DIR", "GRADIO_EXAMPLES_CACHE"):
        patch.setenv(name, "")  # so that it is as before afterwards
    patch.setattr(app_page, "UPLOAD_MB", 1)
    page = app.make_page(options, uploads)
    _, address, _ = app.launch(page, options, quiet=True, prevent_thread_lock=True)
    yield SimpleNamespace(
        address=address, blocks=page.blocks, uploads=uploads, answerer=page.answerer
    )
    page.blocks.close()
    patch.undo()
    assert not [path for path in uploads.rglob("*") if path.is_file() and "five" in path.name]


def status(address):
    try:
        with urllib.request.urlopen(address, timeout=30) as response:
            return response.status
    except urllib.error.HTTPError as error:
        return error.code


def test_no_file_is_served_but_the_clips_and_uploads(server):
    secret = server.uploads.parent / "secret.txt"
    secret.write_text("secret")
    relative = ["app.py", "config.json", ".git", "README.md", "./ask.py", "examples/../app.py"]
    paths = [str(ROOT / name) for name in relative] + relative
    paths += [
        "/etc/passwd",
        str(secret),
        f"{server.uploads}/../secret.txt",
        f"{ROOT}/examples/clips/../../config.json",
        f"{ROOT}/examples/clips",
        "file:///etc/passwd",
    ]
    for path in paths:
        for way in ("gradio_api/file=", "file=", "gradio_api/file/", "static/", "assets/"):
            for written in (path, urllib.parse.quote(path, safe="")):
                assert status(server.address + way + written) in (403, 404, 405), (way, written)
    assert status(f"{server.address}gradio_api/file={SHAPES}") == 200


def test_its_folder_goes_with_it(tmp_path):
    """As users start it, from elsewhere, and as a server ends it."""
    process = subprocess.Popen(
        [sys.executable, "-u", ROOT / "app.py"],
        cwd=tmp_path,
        env={**os.environ, "TMPDIR": str(tmp_path), "CUDA_VISIBLE_DEVICES": ""},
        stdout=subprocess.PIPE,
        text=True,
    )
    for line in process.stdout:
        if "Running on local URL" in line:
            break
    assert [path.name[:9] for path in tmp_path.iterdir()] == ["videonsa-"]
    assert [*tmp_path.rglob("shapes.mp4")]
    process.terminate()
    process.stdout.read()
    process.wait(60)
    assert not [*tmp_path.iterdir()]


def upload(server, path):
    """Posts a file as the page does; its path on the server."""
    import httpx

    with open(path, "rb") as file:
        answer = httpx.post(f"{server.address}gradio_api/upload", files={"files": file})
    return answer


def test_uploads_have_a_limit_and_their_folder(server, folder):
    (uploaded,) = upload(server, folder / "five.mp4").json()
    assert server.uploads in Path(uploaded).parents
    assert status(f"{server.address}gradio_api/file={uploaded}") == 200
    (folder / "large.mp4").write_bytes(bytes(2 << 20))
    assert upload(server, folder / "large.mp4").status_code in (400, 413)
    assert not [*server.uploads.rglob("large.mp4")]
    assert server.blocks.delete_cache == (600, app_page.KEPT_SECONDS)
    assert server.blocks._queue.max_size == app_page.WAITING


def test_handlers_take_no_path_that_was_not_uploaded(server):
    import httpx

    asking = next(number for number, fn in server.blocks.fns.items() if fn.name == "on_upload")
    for path in (str(ROOT / "config.json"), SHAPES, "/etc/passwd", f"{server.address}config"):
        video = {"path": path, "meta": {"_type": "gradio.FileData"}}
        call = {"data": [None, video, 100], "fn_index": asking, "session_hash": "visitor"}
        joined = httpx.post(f"{server.address}gradio_api/queue/join", json=call)
        assert joined.status_code == 200
        told = httpx.get(
            f"{server.address}gradio_api/queue/data?session_hash=visitor", timeout=30
        ).text
        assert '"success":false' in told.replace(" ", "") and "taken" not in told


def test_the_spaces_card_starts_what_was_tested():
    card = (ROOT / "examples/space/README.md").read_text(encoding="utf-8")
    front = yaml.safe_load(card.split("---")[1])
    assert front["sdk"] == "gradio" and (ROOT / front["app_file"]).exists()
    pins = (ROOT / "constraints-demo.txt").read_text(encoding="utf-8")
    assert f"gradio=={front['sdk_version']}\n" in pins
    assert len(front["short_description"]) <= 60  # the Hub's limit


# The page in a browser.


@pytest.fixture(scope="module")
def chromium():
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    path = shutil.which("chromium")
    if path is None:
        pytest.skip("needs Chromium (apt-get install chromium)")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


def test_the_page_as_a_person_uses_it(server, chromium, folder):
    from playwright.sync_api import expect

    tab = chromium.new_page(viewport={"width": 1280, "height": 1000})
    errors, outside = [], []
    tab.on("pageerror", lambda error: errors.append(error))
    tab.on("request", lambda sent: outside.append(sent.url))
    tab.goto(server.address)
    summary, moments = tab.locator("#summary"), tab.locator(".strip .moment")
    expect(summary).to_contain_text("“orange” was read most at 6 to 7 s", timeout=60_000)
    expect(moments).to_have_count(8)

    tab.locator("#examples").get_by_text("In which order do the colours appear?").click()
    expect(summary).to_contain_text("No moment stands out: “green, blue, orange”")
    tab.locator("#word").get_by_text("blue").click()
    expect(summary).to_contain_text("“blue” was read most at 3 to 4 s")

    bars = tab.locator("#strip").inner_text()
    tab.locator("#layer input[type=number]").fill("2")
    tab.locator("#layer input[type=number]").press("Enter")
    expect(tab.locator("#strip")).not_to_have_text(bars)

    moments.nth(3).click()  # the player goes there, and the slider with it
    expect(moments.nth(3)).to_have_class("moment asking")
    assert abs(tab.locator("#player video").evaluate("video => video.currentTime") - 3) < 0.1
    expect(tab.locator("#second input[type=number]")).to_have_value("3")
    tab.locator("#player video").evaluate("video => { video.currentTime = 5.5 }")
    expect(moments.nth(5)).to_have_class("moment asking")

    tab.locator("#question").locator("input, textarea").fill("What colour is the first shape?")
    tab.locator("#ask").click()
    expect(tab.locator("#chat")).to_contain_text("green", timeout=60_000)
    expect(summary).to_contain_text("“green” was read most at 0 to 1 s")

    tab.locator("#player").get_by_label("Clear").click()
    tab.locator("#player input[type=file]").set_input_files(folder / "five.mp4")
    taken = tab.locator("#taken textarea")
    expect(taken).to_have_value(
        "five.mp4: 5 s at 2 fps = 10 frames, 84x140, 75 tokens, at 0, 0.5 ... 4.5 s"
    )
    expect(moments).to_have_count(0)
    tab.locator("#question").locator("input, textarea").fill("What is shown?")
    tab.locator("#ask").click()
    expect(moments).to_have_count(5, timeout=60_000)

    tab.locator("#draw").click()
    report = tab.frame_locator("#report iframe")
    expect(report.locator("#timeline1 img")).to_be_visible(timeout=60_000)

    tab.locator("#player").get_by_label("Clear").click()
    tab.locator("#player input[type=file]").set_input_files(folder / "notes.txt")
    expect(tab.get_by_text("Invalid file type: notes.txt")).to_be_visible()
    tab.locator("#player input[type=file]").set_input_files(folder / "notes.mp4")
    expect(tab.get_by_text("notes.mp4 cannot be opened as a video").first).to_be_visible()
    expect(taken).to_have_value(re.compile("^notes.mp4 cannot be opened as a video"))
    assert not errors
    assert {urllib.parse.urlsplit(url).netloc for url in outside} - {""} == {
        urllib.parse.urlsplit(server.address).netloc
    }


def test_stop_ends_an_answer_and_the_next_one_comes(server, chromium, monkeypatch):
    from playwright.sync_api import expect

    tab = chromium.new_page()
    tab.goto(server.address)
    chat, ask = tab.locator("#chat"), tab.locator("#ask")
    expect(chat).to_contain_text("orange", timeout=60_000)
    with monkeypatch.context() as patch:
        patch.setattr(server.answerer, "_ask", endless := Endless())
        ask.click()
        expect(chat).to_contain_text("again again")
        tab.locator("#stop").click()
        expect(chat).not_to_contain_text("again again")
        assert endless.stopped.wait(30)
    tab.locator("#question").locator("input, textarea").fill("What colour is the first shape?")
    ask.click()
    expect(chat).to_contain_text("green", timeout=60_000)
