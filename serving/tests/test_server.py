"""The OpenAI server as `vllm serve` starts it: answers, streams, errors, whose pixels are whose."""

import functools
import http.server
import os
import shutil
import signal
import socket
import subprocess
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest

from conversations import CLIPS, ask, clip

COLOUR = "What colour is the last shape?"
ANSWERS = {"circle.mp4": "red", "shapes.mp4": "orange", "digit.mp4": "yellow"}
START_S = 300  # of a server that starts while others use the cores; it takes 25 s alone


@pytest.fixture(scope="module")
def client(trained):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = ["vllm", "serve", trained, "--served-model-name", "toy", "--trust-remote-code"]
    command += ["--dtype", "float32", "--enforce-eager", "--skip-mm-profiling"]
    command += ["--max-model-len", "2048", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--allowed-local-media-path", "/", "--trust-request-mm-kwargs"]
    server = subprocess.Popen(command, env=os.environ, start_new_session=True)
    try:
        wait_for(f"http://127.0.0.1:{port}/health", server)
        yield openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait()


def wait_for(address, server):
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline and server.poll() is None:
        try:
            with urllib.request.urlopen(address):
                return
        except OSError:
            time.sleep(0.5)
    raise RuntimeError(f"the server did not start; it ended with {server.poll()}")


def complete(client, messages, stream=False, **extra):
    return client.chat.completions.create(
        model="toy", messages=messages, temperature=0, stream=stream, extra_body=extra
    )


def text_of(response):
    return response.choices[0].message.content


@pytest.mark.parametrize("name", ANSWERS)
def test_a_file_and_its_bytes_are_answered_alike(client, reference_of_trained, name):
    messages = ask(name, COLOUR)
    by_path, by_bytes = complete(client, messages), complete(client, ask(clip(name), COLOUR))
    assert text_of(by_path) == text_of(by_bytes) == reference_of_trained.answer(messages)
    assert by_path.usage.prompt_tokens == by_bytes.usage.prompt_tokens


def test_the_bundled_clip_is_answered_right(client):
    response = complete(client, ask("circle.mp4", COLOUR))
    assert (text_of(response), response.usage.prompt_tokens) == ("red", 156)


def test_a_file_is_fetched_from_its_address(client):
    folder = functools.partial(http.server.SimpleHTTPRequestHandler, directory=CLIPS)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), folder) as files:
        threading.Thread(target=files.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{files.server_port}/circle.mp4"
        part = {"type": "video_url", "video_url": {"url": address}}
        messages = [{"role": "user", "content": [part, {"type": "text", "text": COLOUR}]}]
        assert text_of(complete(client, messages)) == "red"
        files.shutdown()


def test_an_answer_comes_as_a_stream(client):
    messages = ask("circle.mp4", "Which way does the shape move?")
    chunks = [chunk.choices[0] for chunk in complete(client, messages, stream=True)]
    assert "".join(choice.delta.content or "" for choice in chunks) == "left"
    assert chunks[-1].finish_reason == "stop"


def test_settings_of_a_request_are_the_processors(client, reference_of_trained):
    messages = ask("circle.mp4", COLOUR)
    for settings in ({"fps": 1}, {"max_tokens": 50}, {"num_frames": 6}, {"video_start": 4}):
        prompt = reference_of_trained.prompt(messages, **settings)
        response = complete(client, messages, mm_processor_kwargs=settings)
        assert response.usage.prompt_tokens == len(prompt["input_ids"][0]) < 156


def frames_by_loader(count):
    return {"media_io_kwargs": {"video": {"num_frames": count}}}


REFUSED = {
    "cannot be opened as a video": (ask("data:video/mp4;base64,bm90IGEgdmlkZW8=", COLOUR), {}),
    "did you mean 'fps'": (ask("circle.mp4"), {"mm_processor_kwargs": {"fsp": 1}}),
    "are 16 tokens, more than": (ask("circle.mp4"), {"mm_processor_kwargs": {"max_tokens": 3}}),
    "stream cannot be served": (ask("circle.mp4"), {"mm_processor_kwargs": {"stream": True}}),
    "timestamps cannot be": (ask("circle.mp4"), {"mm_processor_kwargs": {"timestamps": True}}),
    "as mm_processor_kwargs": (ask("circle.mp4"), {"media_io_kwargs": {"video": {"fps": 1}}}),
    "num_frames=32 for videos": (ask("circle.mp4"), frames_by_loader(32)),
    "num_frames=-1 for videos": (ask("circle.mp4"), frames_by_loader(-1)),
    "give one of them": (ask("circle.mp4"), {"mm_processor_kwargs": {"fps": 1, "num_frames": 4}}),
    "take it out of the text": (ask("circle.mp4", "What is <|video_pad|>?"), {}),
    "cannot identify image file": (ask("data:image/png;base64,bm90IGEgcGljdHVyZQ==", COLOUR), {}),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_cannot_be_done_is_a_400_that_says_why(client, message):
    messages, extra = REFUSED[message]
    with pytest.raises(openai.BadRequestError) as error:
        complete(client, messages, **extra)
    assert message in error.value.body["message"]
    assert text_of(complete(client, ask("circle.mp4", COLOUR))) == "red"  # it goes on


def test_nobodys_pixels_are_anothers(client):
    """Clips of one size, asked at once, under one name, and at several rates."""
    requests = []
    for name, answer in ANSWERS.items():
        for extra in ({}, {"mm_processor_kwargs": {"fps": 1}}):
            messages = ask(name, COLOUR)
            messages[0]["content"][0]["uuid"] = "mine"
            requests.append((messages, extra, answer))
    with ThreadPoolExecutor(len(requests)) as pool:
        responses = list(pool.map(lambda x: complete(client, x[0], **x[1]), requests * 2))
    for response, (_, _, answer) in zip(responses, requests * 2, strict=True):
        assert text_of(response) == answer


def test_a_file_that_was_overwritten_is_read_again(client, tmp_path):
    path = tmp_path / "clip.mp4"
    for name in ("circle.mp4", "shapes.mp4"):
        shutil.copyfile(CLIPS / name, path)
        assert text_of(complete(client, ask(str(path), COLOUR))) == ANSWERS[name]
