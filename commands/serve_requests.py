"""What serve.py is asked: a request for a chat completion in OpenAI's form, read and checked.

Nothing of a request is left out silently: a field, a role or a setting that this server does not
follow is refused by name. Media come with the request, as data: addresses, or from below the folder
that the server was told of; no address is fetched and no other file is opened.
"""

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from commands.conversation import as_plain_text
from commands.finetuning_rows import PART_SETTINGS
from message_parts_videonsa import describe_source, is_address, read_messages

ROLES = ("system", "user", "assistant")
# Fields of OpenAI's that this server does not follow, with the values that ask for nothing.
NEUTRAL = {
    "n": (1,),
    "stop": ([],),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "logprobs": (False,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "response_format": ({"type": "text"},),
}


class StreamOptions(BaseModel):
    """What a streamed answer has besides: at its end, the numbers of tokens."""

    model_config = ConfigDict(extra="forbid", strict=True)

    include_usage: bool = False


class ChatRequest(BaseModel):
    """The body of a request; fields that are not here are in `NEUTRAL`, or refused."""

    model_config = ConfigDict(extra="allow", strict=True)

    model: str | None = None
    messages: list[dict]
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_completion_tokens: int | None = Field(None, ge=1)
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    seed: int | None = Field(None, ge=0, lt=2**63)
    user: str | None = None  # whom the answer is for, which changes nothing of it

    @property
    def new_tokens(self) -> int | None:
        """Tokens that the answer may have, by either name; None where that is not said."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def has_usage(self) -> bool:
        """Whether a streamed answer ends with the numbers of tokens."""
        return self.stream_options is not None and self.stream_options.include_usage


def read_request(body: bytes) -> ChatRequest:
    """The request of this JSON. Raises ValueError with all that is wrong with its fields."""
    try:
        request = ChatRequest.model_validate_json(body)
    except ValidationError as error:
        raise ValueError("; ".join(map(_describe, error.errors()))) from None
    for name, value in request.model_extra.items():
        if value is None or value in NEUTRAL.get(name, ()):
            continue
        known = ", ".join(ChatRequest.model_fields)
        raise ValueError(f"{name} is not supported here, leave it out; what is: {known}")
    if None not in (request.max_tokens, request.max_completion_tokens):
        raise ValueError("max_tokens and max_completion_tokens say the same: give one of them")
    return request


def read_chat(messages: list[dict], media_folder: str | None, tokenizer) -> list[dict]:
    """The messages of a request in Qwen's form, their media as bytes or paths that may be read.

    media_folder: below which files may be named; None allows no file.

    Raises ValueError for what is not understood, and for media that may not be read.
    """
    messages = read_messages(messages)
    for number, message in enumerate(messages):
        if message["role"] not in ROLES:
            raise ValueError(f"a message has role {message['role']!r}; it is one of {ROLES}")
        if unknown := sorted(message.keys() - {"role", "content"}):
            raise ValueError(
                f"message {number} has {', '.join(unknown)}, which is not supported: leave it out"
            )
        if isinstance(message["content"], str):
            message["content"] = [{"type": "text", "text": message["content"]}]
        for part in message["content"]:
            _check_part(part, media_folder, tokenizer)
    if messages[-1]["role"] != "user":
        raise ValueError("the last message is not a user's: end with what is to be answered")
    return messages


def _check_part(part, media_folder, tokenizer):
    kind = part["type"]
    if kind not in part:
        raise ValueError(f"a part of type {kind!r} brings no {kind}")
    settings = PART_SETTINGS["video"] if kind == "video" else set()
    if unknown := sorted(part.keys() - {"type", kind} - settings):
        known = ", ".join(sorted(settings)) or "none"
        raise ValueError(
            f"a part of type {kind!r} has {', '.join(unknown)}, which is not supported; settings "
            f"that it may have: {known}"
        )
    if kind == "text":
        part["text"] = as_plain_text(part["text"], tokenizer)
    else:
        part[kind] = _allowed(part[kind], kind, media_folder)


def _allowed(source, kind, media_folder):
    """A medium's bytes, or the path of a file below the folder."""
    if isinstance(source, bytes):
        return source
    name = describe_source(source)
    if not isinstance(source, str):
        raise ValueError(f"the {kind} is {name}; give its file, as a data: or a file:// address")
    if is_address(source):
        raise ValueError(
            f"this server fetches nothing, so not {name} either: send the {kind} itself, as "
            f"data:{kind}/...;base64,..."
        )
    if media_folder is None:
        raise ValueError(
            f"this server opens no files, so not {name} either: send the {kind} itself, as "
            f"data:{kind}/...;base64,..., or start the server with --allowed-local-media-path"
        )
    try:
        path = Path(source).resolve()
        is_below = path.is_relative_to(Path(media_folder).resolve())
    except (OSError, ValueError, RuntimeError):  # a loop of links, a zero byte
        is_below = False
    if not is_below:
        raise ValueError(
            f"{name} is not below the folder that this server opens files from: send the {kind} "
            f"itself, as data:{kind}/...;base64,..."
        )
    if not path.is_file():
        raise ValueError(f"there is no file {name}: check the address")
    return str(path)


def _describe(error):
    """One fault that pydantic found: "max_tokens: Input should be a valid integer, not '5'"."""
    field, given = ".".join(map(str, error["loc"])), repr(error["input"])
    if not field:  # of the JSON itself
        return error["msg"]
    return f"{field}: {error['msg']}" + (f", not {given}" if len(given) <= 50 else "")
