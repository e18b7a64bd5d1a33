"""The HTTP side of serve.py: what clients of OpenAI's chat completions send and get.

GET /v1/models names the model; POST /v1/chat/completions answers, as JSON or as a stream. Requests
are answered one at a time, in the order in which they came, by the only worker of a pool. When a
client goes, its answer ends at the next word, or is not begun.

A server that listens to its own machine alone does not answer to other names than that machine's: a
page in a browser here could have its site's name lead here, and send and read what it likes.

What is wrong with a request is HTTP 400 with a message. That holds for streams, too: nothing is
sent before the first word, and by then everything of the prompt was read.
"""

import asyncio
import ipaddress
import json
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from urllib.parse import urlsplit

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect

from commands.serve_answers import Answer, Answerer
from commands.serve_requests import ChatRequest, read_request

BODY_BYTES = 256 << 20  # of a request, at most; base64 writes three bytes as four
WAITING = 16  # requests that wait for their turn, at most


class Gone(Exception):
    """The client does not wait for its answer any more."""


class Server:
    """An ASGI application.

    answerer: answers requests.  name: of its model, as clients say it.  host: where it listens.
    """

    def __init__(self, answerer: Answerer, name: str, host: str = "127.0.0.1"):
        self.answerer, self.name, self.started = answerer, name, int(time.time())
        self.host = host
        self.worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="answer")
        self.unanswered = 0  # requests that are being read or answered, or wait
        self.routes = FastAPI(title="VideoNSA", openapi_url=None)
        self.routes.get("/v1/models")(self.list_models)
        self.routes.post("/v1/chat/completions")(self.complete_chat)
        self.routes.exception_handler(Exception)(
            lambda request, error: failure(500, "the server failed; its log says how")
        )

    async def __call__(self, scope, receive, send):
        counted = scope["type"] == "http"
        asked = self.routes
        if counted and not is_own_name(host := Headers(scope=scope).get("host", ""), self.host):
            asked = failure(
                403,
                f"the request's Host header is {host!r}, but this server listens to its own "
                f"machine alone: ask it as localhost or {self.host}",
            )
        self.unanswered += counted
        try:
            await asked(scope, receive, send)
        finally:
            self.unanswered -= counted

    async def list_models(self):
        one = {"id": self.name, "object": "model", "created": self.started, "owned_by": "videonsa"}
        return {"object": "list", "data": [one]}

    async def complete_chat(self, request: Request):
        if self.unanswered > 1 + WAITING:
            return failure(503, f"{WAITING} requests wait already: try again later")
        try:
            asked = read_request(await read_body(request))
            if asked.model not in (None, self.name):
                return failure(404, f"there is no model {asked.model!r} here, only {self.name!r}")
            items = self.answer(asked, request)
            first = await anext(items)
            if asked.stream:
                events = self.events(asked, first, items)
                return StreamingResponse(events, media_type="text/event-stream")
            *pieces, answer = [first, *[item async for item in items]]
        except (Gone, ClientDisconnect):
            return Response(status_code=499)  # which nobody reads
        except (ValueError, OSError) as error:
            return failure(400, str(error))
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": "".join(pieces)},
            "finish_reason": answer.finish_reason,
        }
        return {**self.new_head("chat.completion"), "choices": [choice], "usage": usage(answer)}

    async def answer(self, asked: ChatRequest, request: Request):
        """Yields the pieces of an answer while it is made, and at last its `Answer`.

        Raises what the answerer raises, and Gone.
        """
        loop, items, gone = asyncio.get_running_loop(), asyncio.Queue(), threading.Event()

        def tell(item):
            if gone.is_set():
                raise Gone
            if item:
                loop.call_soon_threadsafe(items.put_nowait, item)

        def work():
            try:
                tell("")  # the client may have gone while it waited
                tell(self.answerer.answer(asked, tell))
            except BaseException as error:  # raised again below
                loop.call_soon_threadsafe(items.put_nowait, error)

        async def watch():
            while (await request.receive())["type"] != "http.disconnect":
                pass
            gone.set()
            items.put_nowait(Gone())

        watching = asyncio.create_task(watch())
        self.worker.submit(work)
        try:
            while True:
                item = await items.get()
                if isinstance(item, BaseException):
                    raise item
                yield item
                if isinstance(item, Answer):
                    return
        finally:
            gone.set()
            watching.cancel()

    async def events(self, asked, item, items):
        """Yields an answer's events; item: the first of `items`, which is out already."""
        head = self.new_head("chat.completion.chunk")

        def choice(delta, finish_reason=None):
            one = {"index": 0, "delta": delta, "finish_reason": finish_reason}
            return event({**head, "choices": [one]})

        try:
            async with aclosing(items):
                yield choice({"role": "assistant", "content": ""})
                while not isinstance(item, Answer):
                    yield choice({"content": item})
                    item = await anext(items)
            yield choice({}, item.finish_reason)
            if asked.has_usage:
                yield event({**head, "choices": [], "usage": usage(item)})
            yield "data: [DONE]\n\n"
        except Gone:
            pass
        except (ValueError, OSError) as error:
            yield event(error_body(str(error), 400))

    def new_head(self, kind):
        """What every answer and every event of one begins with."""
        name = f"chatcmpl-{uuid.uuid4().hex}"
        return {"id": name, "object": kind, "created": int(time.time()), "model": self.name}


def is_own_name(asked: str, host: str) -> bool:
    """Whether a Host header may name a server that listens at `host`.

    Any may where other machines can ask. An address of numbers is never that of a page elsewhere.
    """
    try:
        name = urlsplit(f"//{asked}").hostname or ""
    except ValueError:
        return False
    is_local = _is_localhost(host) or (_is_address(host) and ipaddress.ip_address(host).is_loopback)
    return not is_local or name == host.lower() or _is_localhost(name) or _is_address(name)


def _is_localhost(name):
    return name.lower() == "localhost" or name.lower().endswith(".localhost")


def _is_address(name):
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


async def read_body(request: Request) -> bytes:
    """The body of a request. Raises ValueError where it is too large or says it is no JSON."""
    pieces, size = [], 0
    async for piece in request.stream():  # to its end: a client reads no answer before
        size += len(piece)
        if size <= BODY_BYTES:
            pieces.append(piece)
    if size > BODY_BYTES:
        raise ValueError(
            f"the request has {size:,} bytes, more than the {BODY_BYTES:,} that are taken: send a "
            "smaller file, or name it by a file:// address where the server allows that"
        )
    # A page of another site could send others without its visitor's browser asking this server.
    if not request.headers.get("content-type", "").startswith("application/json"):
        raise ValueError("the request is not application/json: say so in its Content-Type")
    return b"".join(pieces)


def usage(answer: Answer) -> dict:
    return {
        "prompt_tokens": answer.prompt_tokens,
        "completion_tokens": answer.completion_tokens,
        "total_tokens": answer.prompt_tokens + answer.completion_tokens,
    }


def event(content: dict) -> str:
    return f"data: {json.dumps(content)}\n\n"


def failure(status: int, message: str) -> JSONResponse:
    return JSONResponse(error_body(message, status), status_code=status)


def error_body(message: str, status: int) -> dict:
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"message": message, "type": kind, "param": None, "code": status}}
