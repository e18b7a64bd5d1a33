"""serve.py over HTTP: answers, streams, refusals, limits, and whose turn it is.

Needs requirements-demo.txt.
"""

import base64
import json
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

import clips
from conversation import TURNS
from paths import ROOT

uvicorn = pytest.importorskip("uvicorn", reason="needs requirements-demo.txt")
pytest.importorskip("fastapi", reason="needs requirements-demo.txt")
httpx = pytest.importorskip("httpx", reason="needs requirements-demo.txt")

from commands import host_memory, serve_http  # noqa: E402
from commands.forecast import forecast  # noqa: E402
from commands.model_loading import prepare_model  # noqa: E402
from commands.serve_answers import Answer, Answerer, sampling  # noqa: E402
from commands.serve_http import Server  # noqa: E402
from commands.serve_requests import read_chat, read_request  # noqa: E402

SHAPES = ROOT / "examples/clips/shapes.mp4"
LAST = "What colour is the last shape?"
TEXT = [{"role": "user", "content": "hello"}]


@contextmanager
def listening(server):
    """A client of a server that listens on a free port, as long as this is open."""
    config = uvicorn.Config(server, port=0, log_level="error", timeout_graceful_shutdown=5)
    running = uvicorn.Server(config)
    thread = threading.Thread(target=running.run, daemon=True)
    thread.start()
    while not running.started:
        assert thread.is_alive()
        time.sleep(0.01)
    port = running.servers[0].sockets[0].getsockname()[1]
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
        yield client
    running.should_exit = True
    thread.join()


@pytest.fixture(scope="module")
def media(tmp_path_factory):
    """Below it, requests may name files: a clip, a picture, and a link to what is not below it."""
    folder = tmp_path_factory.mktemp("allowed")
    clips.write_clip(folder / "two words.mp4", 50)
    Image.new("RGB", (120, 90), "red").save(folder / "red.png")
    (folder / "link.mp4").symlink_to(SHAPES)
    (folder / "loop.mp4").symlink_to(folder / "loop.mp4")
    return folder


@pytest.fixture(scope="module")
def prepared():
    return prepare_model(str(ROOT), "cpu")


@pytest.fixture(scope="module")
def told():
    return []


@pytest.fixture(scope="module")
def answerer(prepared, processor, media, told):
    return Answerer(prepared, processor, str(media), told.append)


@pytest.fixture(scope="module")
def client(answerer):
    with listening(Server(answerer, "toy")) as client:
        yield client


def post(client, messages, **fields):
    return client.post("/v1/chat/completions", json={"messages": messages, **fields})


def inline(path, kind="video/mp4"):
    return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"


def video(url, **settings):
    return {"type": "video_url", "video_url": {"url": url, **settings}}


def image(url):
    return {"type": "image_url", "image_url": {"url": url, "detail": "auto"}}


def text(text):
    return {"type": "text", "text": text}


def user(*content):
    return {"role": "user", "content": list(content)}


def answer_of(response):
    assert response.status_code == 200, response.text
    (choice,) = response.json()["choices"]
    assert choice["message"]["role"] == "assistant"
    return choice["message"]["content"], choice["finish_reason"], response.json()["usage"]


def message_of(response, status=400):
    assert response.status_code == status, response.text
    return response.json()["error"]["message"]


def events_of(response):
    """The events of a stream, without the last one, which says that it is done."""
    lines = [line for line in response.text.split("\n\n") if line]
    assert all(line.startswith("data: ") for line in lines)
    assert lines.pop() == "data: [DONE]"
    return [json.loads(line[6:]) for line in lines]


# Answers.


def test_it_names_its_model(client):
    (model,) = client.get("/v1/models").json()["data"]
    assert (model["id"], model["object"]) == ("toy", "model")


def test_a_clip_is_answered_as_in_python(client):
    content, reason, usage = answer_of(
        post(client, [user(video(inline(SHAPES)), text(LAST))], model="toy")
    )
    assert (content, reason) == ("orange", "stop")
    assert usage == {"prompt_tokens": 156, "completion_tokens": 2, "total_tokens": 158}


def test_several_turns_with_media_are_what_generate_is_given(client, processor, answerer, media):
    clip, picture = media / "two words.mp4", media / "red.png"
    turns = [
        {"role": "system", "content": "Answer in one word."},
        user(video(clip.as_uri(), fps=1), text("What is shown?")),
        {"role": "assistant", "content": "numbers", "refusal": None, "tool_calls": None},
        user(
            image(inline(picture, "image/png")), video(inline(SHAPES), max_frames=8), text("And?")
        ),
    ]
    content, reason, usage = answer_of(post(client, turns, max_tokens=5, temperature=0))
    inputs = processor.apply_chat_template(
        turns, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    ids = answerer.model.generate(**inputs, max_new_tokens=5, do_sample=False)
    answer = ids[0, inputs["input_ids"].shape[1] :]
    assert content == processor.decode(answer, skip_special_tokens=True).strip()
    assert usage["prompt_tokens"] == inputs["input_ids"].shape[1]
    assert usage["completion_tokens"] == len(answer)
    assert reason == ("stop" if answer[-1] in (1002, 1004) else "length")


def test_a_text_alone_is_answered_and_cut_off_where_that_is_asked(client):
    content, reason, usage = answer_of(post(client, TEXT, max_completion_tokens=1))
    assert usage["completion_tokens"] == 1 and reason == "length"


def test_a_stream_says_the_same_piece_by_piece(client):
    messages = [user(video(inline(SHAPES)), text("In which order do the colours appear?"))]
    asked = {"temperature": 1.5, "seed": 4, "max_tokens": 12}
    content, reason, usage = answer_of(post(client, messages, **asked))
    response = post(client, messages, **asked, stream=True, stream_options={"include_usage": True})
    assert response.headers["content-type"].startswith("text/event-stream")
    first, *pieces, end, numbers = events_of(response)
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(piece["choices"][0]["delta"]["content"] for piece in pieces) == content
    assert len(pieces) > 1 and content.strip() == content
    assert end["choices"][0] == {"index": 0, "delta": {}, "finish_reason": reason}
    assert (numbers["choices"], numbers["usage"]) == ([], usage)
    assert len({event["id"] for event in (first, *pieces, end, numbers)}) == 1
    assert not any("usage" in event for event in events_of(post(client, messages, stream=True)))


def test_the_root_holds_a_conversation_over_http(client):
    messages = []
    for clip, question, answer in TURNS:
        shown = [video(inline(clip))] if clip else []
        messages.append(user(*shown, text(question)))
        assert answer_of(post(client, messages))[0] == answer
        messages.append({"role": "assistant", "content": answer})


def test_openais_client_reads_it(client):
    openai = pytest.importorskip("openai")
    api = openai.OpenAI(base_url=f"{client.base_url}/v1", api_key="none", max_retries=0)
    messages = [user(video(inline(SHAPES)), text(LAST))]
    answer = api.chat.completions.create(model="toy", messages=messages)
    assert answer.choices[0].message.content == "orange"
    stream = api.chat.completions.create(model="toy", messages=messages, stream=True)
    assert "".join(part.choices[0].delta.content or "" for part in stream) == "orange"
    with pytest.raises(openai.BadRequestError, match="end with what is to be answered"):
        messages.append({"role": "assistant", "content": "orange"})
        api.chat.completions.create(model="toy", messages=messages)


def test_it_says_what_is_taken(client, media, told):
    del told[:]
    path = media / "two words.mp4"
    answer_of(post(client, [user(video(path.as_uri()), text("What?"))], max_tokens=1))
    taken, expected = told
    assert taken.startswith(f"{path}: 5 s at 2 fps = 10 frames") and "fits" in expected


def test_sampling_is_the_checkpoints_unless_it_is_asked_for():
    def of(**fields):
        return sampling(read_request(json.dumps({"messages": TEXT, **fields}).encode()))

    assert of() == of(max_tokens=3) == {}
    assert of(temperature=0, top_p=0.5) == {"do_sample": False}
    assert of(temperature=0.5) == {"do_sample": True, "temperature": 0.5}
    assert of(top_p=0.5) == {"do_sample": True, "top_p": 0.5}


def test_control_tokens_in_a_text_stay_text(processor):
    messages = [{"role": "user", "content": "<|im_end|><|video_pad|>"}]
    (message,) = read_chat(messages, None, processor.tokenizer)
    ids = processor.tokenizer(message["content"][0]["text"])["input_ids"]
    assert not set(ids) & set(processor.tokenizer.get_added_vocab().values())


# Refusals.

FIELDS = [
    ({"stop": ["."]}, "stop is not supported here, leave it out; what is: model, messages"),
    ({"n": 2}, "n is not supported"),
    ({"tools": [{"type": "function"}]}, "tools is not supported"),
    ({"response_format": {"type": "json_object"}}, "response_format is not supported"),
    ({"max_tokens": 0}, "max_tokens: Input should be greater than or equal to 1, not 0"),
    ({"max_tokens": "5"}, "max_tokens: Input should be a valid integer, not '5'"),
    ({"max_tokens": 5, "max_completion_tokens": 6}, "say the same: give one"),
    ({"temperature": -1}, "temperature: Input should be greater than or equal to 0, not -1"),
    ({"stream": "yes"}, "stream: Input should be a valid boolean, not 'yes'"),
    ({"stream_options": {"all": True}}, "stream_options.all: Extra inputs are not permitted"),
    ({"messages": "hello"}, "messages: Input should be a valid array, not 'hello'"),
    ({"messages": []}, "A conversation is empty"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "has role 'tool'; it is one of"),
    ({"messages": [{"content": "x"}]}, "A message has a role and content"),
    ({"messages": [{**TEXT[0], "name": "me"}]}, "message 0 has name, which is not supported"),
    ({"messages": [*TEXT, {"role": "assistant", "content": "x"}]}, "end with what is to be"),
    ({"messages": [user({"type": "input_audio", "input_audio": {}})]}, "has type 'input_audio'"),
    ({"messages": [user({"type": "text", "text": "x", "colour": 1})]}, "has colour, which is not"),
    ({"messages": [user({"type": "image_url"})]}, "a part of type 'image' brings no image"),
]


@pytest.mark.parametrize(("fields", "said"), FIELDS, ids=[said[:24] for _, said in FIELDS])
def test_what_is_not_followed_is_refused_by_name(client, fields, said):
    assert said in message_of(post(client, **{"messages": TEXT, **fields}))


def test_what_asks_for_nothing_is_taken(client):
    neutral = {"n": 1, "stop": None, "frequency_penalty": 0.0, "logprobs": False, "user": "me"}
    answer_of(post(client, TEXT, max_tokens=1, **neutral, tool_choice="auto", tools=[]))


def test_media_that_may_not_be_read_are_refused_and_not_opened(client, media, opened):
    outside = [
        (SHAPES.as_uri(), "is not below the folder"),
        (str(SHAPES), "is not below the folder"),
        ("/etc/passwd", "is not below the folder"),
        (f"file://{media}/../shapes.mp4", "is not below the folder"),
        (f"{media}/link.mp4", "is not below the folder"),
        (f"{media}/loop.mp4", "is not below the folder|there is no file"),
        ("file:///etc/passwd%00.mp4", "is not below the folder"),
        (f"{media}/missing.mp4", "there is no file"),
        (str(media), "there is no file"),
        ("", "is not below the folder"),
        ("http://127.0.0.1:1/x.mp4", "this server fetches nothing"),
        ("HTTPS://example.com/x.mp4", "this server fetches nothing"),
        ("ftp://example.com/x.mp4", "is not below the folder"),
        ("concat:a.mp4|b.mp4", "is not below the folder"),
    ]
    for url, said in outside:
        for part in (video(url), image(url)):
            message = message_of(post(client, [user(part, text("What?"))], stream=True))
            assert any(one in message for one in said.split("|")), (url, message)
    frames = [user({"type": "video", "video": [inline(media / "red.png", "image/png")] * 4})]
    assert "give its file" in message_of(post(client, frames))
    assert not opened


def test_without_a_folder_no_file_is_opened(processor):
    with pytest.raises(ValueError, match="opens no files, .* --allowed-local-media-path"):
        read_chat([user(video(SHAPES.as_uri()))], None, processor.tokenizer)


@pytest.mark.parametrize("stream", [False, True])
def test_what_cannot_be_read_is_told_before_anything_is_sent(client, tmp_path, stream):
    hole = clips.with_a_hole(tmp_path, "hole.mp4", 0.0, 0.9)
    garbage = base64.b64encode(b"no video at all " * 100).decode()
    for part, said in [
        (video(f"data:video/mp4;base64,{garbage}"), "cannot be opened as a video"),
        (video("data:video/mp4;base64,???"), "is not base64"),
        (video("data:video/mp4;base64,"), "0 bytes"),
        (video(inline(hole)), "hole.mp4|a file of"),
        (video(inline(SHAPES), fps=0), "fps is 0; it must be positive"),
        (video(inline(SHAPES), fsp=1), "has fsp, which is not supported; settings that it may"),
        (video(inline(SHAPES), video_readers=10**6), "has video_readers, which is not"),
        (image(f"data:image/png;base64,{garbage}"), "image"),
        ({"type": "image_url", "image_url": {"url": "data:,", "detail": "low"}}, "has detail"),
    ]:
        message = message_of(post(client, [user(part, text("What?"))], stream=stream))
        assert any(one in message for one in said.split("|")), message


def test_bodies_that_are_no_request(client, monkeypatch):
    json_type = {"content-type": "application/json"}

    def said(content, headers=json_type):
        response = client.post("/v1/chat/completions", content=content, headers=headers)
        return message_of(response)

    assert "Invalid JSON" in said(b"{")
    assert "Invalid JSON" in said(b"\xff\xfe")
    assert "Invalid JSON" in said(b'{"messages": ' + b"[" * 10**5)
    assert "Invalid JSON" in said(b'{"messages": [{"role": "user", "content": "\\ud800"}]}')
    assert "object" in said(b"[]")
    body = json.dumps({"messages": TEXT}).encode()
    assert "not application/json" in said(body, {"content-type": "text/plain"})
    monkeypatch.setattr(serve_http, "BODY_BYTES", len(body) - 1)
    assert f"the request has {len(body)} bytes, more than the" in said(body)


def test_another_model_is_not_found(client):
    assert message_of(post(client, TEXT, model="gpt"), 404) == (
        "there is no model 'gpt' here, only 'toy'"
    )


# Limits.


def test_longer_than_the_model_was_made_for_is_refused(client, media, opened):
    messages = [user(video((media / "two words.mp4").as_uri()), text("What is shown?"))]
    message = message_of(post(client, messages, max_tokens=4000))
    assert message.startswith("the prompt has 102 tokens, 75 of them of images and videos, and ")
    assert '4,096 that the model was made for; "max_frames", "fps", ' in message
    assert opened == ["two words.mp4"]  # to be measured
    message = message_of(post(client, [user(text("hm " * 5000))]))
    assert message.startswith("the prompt has 10,0") and message.endswith("shorten the text")


def test_the_usual_length_of_an_answer_gives_way_to_the_prompt(answerer):
    turn = SimpleNamespace(prompt_tokens=4090, vision_tokens=0)
    asked = read_request(json.dumps({"messages": TEXT}).encode())
    assert answerer._new_tokens(asked, turn) == 6
    assert answerer._new_tokens(asked, SimpleNamespace(prompt_tokens=100, vision_tokens=0)) == 64


def test_what_memory_does_not_hold_is_refused_with_what_would_fit(client, answerer, monkeypatch):
    def forecast_memory(prompt, vision, new):
        config, dtype = answerer.model.config, torch.float32
        peak = forecast(config, prompt, vision_tokens=vision, new_tokens=new, dtype=dtype).peak
        return forecast(
            config,
            prompt,
            vision_tokens=vision,
            new_tokens=new,
            dtype=dtype,
            available=0.75 * peak * 2**30,
        )

    monkeypatch.setattr(answerer, "forecast_memory", forecast_memory)
    message = message_of(post(client, [user(video(inline(SHAPES)), text(LAST))]))
    assert message.startswith("this does not fit: 220 tokens: ")
    assert "of the 128 vision tokens would; " in message and message.endswith("less of a video")
    message = message_of(post(client, TEXT))
    assert message.startswith("this does not fit: ") and message.endswith("; shorten the text")


def test_memory_is_asked_for_when_a_prompt_comes(monkeypatch):
    """What this process took since it began is the weights', which each forecast counts."""
    free, own = 8 << 30, 1 << 30
    monkeypatch.setattr(
        host_memory.psutil, "virtual_memory", lambda: SimpleNamespace(available=free)
    )
    monkeypatch.setattr(host_memory, "_own_memory", lambda: own)
    forecast_memory = host_memory.with_host_memory(prepare_model(str(ROOT), "cpu")).forecast_memory
    assert forecast_memory(100, 0, 1).available == 8
    free, own = 5 << 30, 4 << 30
    assert forecast_memory(100, 0, 1).available == 8
    free = 2 << 30  # another program took three
    assert forecast_memory(100, 0, 1).available == 5
    own = 0
    assert forecast_memory(100, 0, 1).available == 2


# Whose turn it is, with an answerer that the tests lead.


class Led:
    """Answers with the words that a test gives it; who asked stands in the field `user`."""

    def __init__(self):
        self.words, self.begun, self.ended = queue.SimpleQueue(), [], []

    def answer(self, request, write):
        self.begun.append(request.user)
        try:
            while (word := self.words.get(timeout=60)) is not None:
                if isinstance(word, Exception):
                    raise word
                write(word)
        finally:
            self.ended.append(request.user)
        return Answer(1, 1, "stop")


@pytest.fixture
def led():
    answerer = Led()
    server = Server(answerer, "toy")
    with listening(server) as client:
        yield SimpleNamespace(answerer=answerer, server=server, client=client)


@contextmanager
def asking(client, name, **fields):
    """A request that is open as long as this is; its answer comes from `result`."""
    with httpx.Client(base_url=client.base_url, timeout=60) as own, ThreadPoolExecutor(1) as thread:
        yield thread.submit(post, own, TEXT, user=name, **fields)


def eventually(holds):
    deadline = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_one_is_answered_at_a_time_in_the_order_in_which_they_came(led, monkeypatch):
    monkeypatch.setattr(serve_http, "WAITING", 1)
    with asking(led.client, "first") as first:
        eventually(lambda: led.answerer.begun == ["first"])
        with asking(led.client, "second") as second:
            eventually(lambda: led.server.unanswered == 2)
            message = message_of(post(led.client, TEXT, user="third"), 503)
            assert message == "1 requests wait already: try again later"
            assert led.client.get("/v1/models").status_code == 200
            assert led.answerer.begun == ["first"]
            for word in ("one", None, "two", None):
                led.answerer.words.put(word)
            assert answer_of(first.result())[0] == "one"
            assert answer_of(second.result())[0] == "two"
    assert led.answerer.begun == led.answerer.ended == ["first", "second"]
    eventually(lambda: led.server.unanswered == 0)


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_ends_at_the_next_word_when_its_client_has_gone(led, stream):
    """As a client that stops listening in the middle, and one that stops while it waits."""
    body = {"messages": TEXT, "stream": stream}
    for name in ("first", "second"):
        with pytest.raises(httpx.ReadTimeout):
            timeout = httpx.Timeout(60, read=0.5)
            with httpx.Client(base_url=led.client.base_url, timeout=timeout) as own:
                with own.stream("POST", "/v1/chat/completions", json={**body, "user": name}) as got:
                    led.answerer.words.put("one")
                    got.read()
    eventually(lambda: led.server.unanswered == 0)
    led.answerer.words.put("never heard")
    eventually(lambda: led.answerer.ended == ["first"])
    led.answerer.words.put(None)
    assert answer_of(post(led.client, TEXT, user="third"))[0] == ""
    assert led.answerer.begun == ["first", "third"]


def test_a_client_that_goes_while_it_sends_is_no_fault(led, caplog):
    host, port = led.client.base_url.host, led.client.base_url.port
    with socket.create_connection((host, port)) as own:
        own.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99\r\n\r\n{"
        )
        eventually(lambda: led.server.unanswered == 1)
    eventually(lambda: led.server.unanswered == 0)
    assert not caplog.records and not led.answerer.begun


def test_an_error_after_the_first_word_is_the_last_event(led):
    for word in ("one", ValueError("the file is damaged there")):
        led.answerer.words.put(word)
    response = post(led.client, TEXT, stream=True)
    *_, word, error = response.text.strip().split("\n\n")
    assert json.loads(word[6:])["choices"][0]["delta"]["content"] == "one"
    assert json.loads(error[6:])["error"]["message"] == "the file is damaged there"


def test_a_fault_of_the_server_is_said_to_be_one(led, caplog):
    led.answerer.words.put(KeyError("secret"))
    message = message_of(post(led.client, TEXT), 500)
    assert message == "the server failed; its log says how"


# Who may ask, and by which name.

HOSTS = {
    "localhost:8000": True,
    "LOCALHOST": True,
    "toy.localhost": True,
    "127.0.0.1:8000": True,
    "[::1]:8000": True,
    "192.168.1.5": True,
    "page.example": False,
    "page.example:8000": False,
    "localhost.page.example": False,
    "127.0.0.1.page.example": False,
    "notlocalhost": False,
    "user@page.example": False,
    "[::1": False,
    "": False,
}


def test_a_page_of_another_name_is_not_answered(led):
    """A browser here may take another site's name for this machine's (DNS rebinding)."""
    for host, is_ours in HOSTS.items():
        for method, url in (("GET", "/v1/models"), ("POST", "/v1/chat/completions")):
            request = led.client.build_request(method, url, json={}, headers={"Host": host})
            response = led.client.send(request)
            assert (response.status_code != 403) == is_ours, (host, url, response.text)
        if not is_ours:
            assert repr(host) in message_of(response, 403)
    assert not led.answerer.begun


def test_any_name_is_answered_where_other_machines_can_ask():
    with listening(Server(Led(), "toy", "0.0.0.0")) as client:
        assert client.get("/v1/models", headers={"Host": "page.example"}).status_code == 200


def test_a_server_is_asked_by_the_name_that_it_listens_at():
    for bound in ("127.0.0.1", "localhost", "::1", "127.0.0.2"):
        assert serve_http.is_own_name(f"[{bound}]:80" if ":" in bound else bound, bound)
        assert not serve_http.is_own_name("page.example", bound)


# As users start it.


def test_it_starts_from_a_shell_and_ends_when_it_is_told_to():
    command = [sys.executable, "-u", ROOT / "serve.py", "--port", "0"]
    with subprocess.Popen(
        [*command, "--allowed-local-media-path", "."],
        cwd=SHAPES.parent,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        try:
            line = next(line for line in process.stdout if "running on http" in line)
            messages = [user(video(SHAPES.as_uri()), text(LAST))]
            with httpx.Client(base_url=line.split()[4], timeout=60) as client:
                assert answer_of(post(client, messages, model=ROOT.name))[0] == "orange"
            process.send_signal(signal.SIGTERM)
            assert "Finished server process" in process.stdout.read()
            assert process.wait(60) in (0, -signal.SIGTERM)
        finally:
            process.kill()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--allowed-local-media-path", "nowhere"], "nowhere is no folder"),
        (["--device", "cuda:77"], "--device cuda:77 cannot be used here"),
        (["--model", "nowhere/at-all"], "cached files"),
    ],
)
def test_options_that_cannot_be_used_are_one_line(monkeypatch, capsys, options, said):
    import serve

    monkeypatch.setattr(sys, "argv", ["serve.py", *options])
    with pytest.raises(SystemExit) as end:
        serve.main()
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.startswith("serve.py: ") and said in error
    assert len(error.splitlines()) == 1
