"""The messages of a conversation in the forms that people write them, as Qwen's form.

`read_messages` makes of each message a role and parts: {"type": "text", "text": ...}, {"type":
"image", "image": ...} or {"type": "video", "video": ...}; media keep what else their part says of
them. What it cannot read it refuses by name, so that nothing vanishes from a prompt.
"""

import dataclasses
from collections.abc import Mapping

from .media_sources_videonsa import SOURCE_KEYS, describe_source, plain_source

# Types of parts as Qwen, OpenAI (chat and responses) and others name them.
KINDS = {"text": "text", "input_text": "text", "output_text": "text"}
KINDS |= {
    name: kind for kind in ("image", "video") for name in (kind, f"{kind}_url", f"input_{kind}")
}
# Keys under which a medium stands in its part, besides the names of its own kind.
GENERAL_KEYS = ("url", "path", "bytes", "base64", "source")


def read_messages(conversation) -> list[dict]:
    """The messages of one conversation, copied: {"role": ..., "content": text or list of parts}.

    conversation: a list of dicts or of message objects (dataclasses, pydantic). Other keys of a
    message stay, without those that are None, as a table writes them where there is nothing.

    Raises ValueError for what is no message.
    """
    conversation = getattr(conversation, "messages", conversation)
    if isinstance(conversation, (str, Mapping)) or not hasattr(conversation, "__iter__"):
        raise ValueError(
            f"A conversation is a list of messages, not {_short(conversation)}: put it into a list."
        )
    return [_read_message(message) for message in conversation]


def read_part(part) -> dict:
    """One part of a message in Qwen's form; media under their kind as `plain_source` gives them.

    A part of a medium may leave it out; it is then given beside the messages.

    Raises ValueError for a part of an unknown type, and where it is not plain what it brings.
    """
    if isinstance(part, str):
        return {"type": "text", "text": part}
    given = _as_dict(part)
    if given is None:
        raise ValueError(f"A part of a message is a dict or a text, not {_short(part)}.")
    part = {key: value for key, value in given.items() if value is not None}
    named = part.pop("type", None)
    kinds = {KINDS[key] for key in part if key in KINDS}
    if named is not None:
        kind = KINDS.get(named) if isinstance(named, str) else None
    else:
        kind = kinds.pop() if len(kinds) == 1 else None
    if kind is None:
        raise ValueError(
            f"A part of a message has type {named!r}; it is one of {', '.join(KINDS)}."
            if named is not None
            else f"A part of a message says by its type, or by one key, whether it is a text, an "
            f"image or a video; this one has {', '.join(map(repr, given)) or 'nothing'}."
        )
    if other := sorted(key for key in part if KINDS.get(key, kind) != kind):
        raise ValueError(
            f"A part of type {named or kind!r} also has {', '.join(other)}: give that in a part of "
            "its own."
        )
    return {"type": kind, **(_text(part) if kind == "text" else _medium(part, kind))}


def _read_message(message):
    """One message, its content a text or parts as `read_part` reads them."""
    given = _as_dict(message)
    if given is None:
        raise ValueError(f"A message is a dict with a role and content, not {_short(message)}.")
    message = {key: value for key, value in given.items() if value is not None}
    if "role" not in message:
        raise ValueError(
            f"A message has a role and content, but this one has {', '.join(map(str, message))}."
        )
    content = message.get("content", [])
    if not isinstance(content, str):
        parts = content if isinstance(content, (list, tuple)) else [content]
        content = [read_part(part) for part in parts]
    return {**message, "content": content}


def _text(part):
    text = part.get("text", "")
    if "text" not in part and part:
        raise ValueError(f"A part of type 'text' has no text, but {', '.join(part)}.")
    if not isinstance(text, (str, int, float)):
        raise ValueError(f"The text of a part is {_short(text)}; it must be a string.")
    return {**part, "text": str(text)}


def _medium(part, kind):
    """A part without its type: its medium under its kind, if it has one, and the rest."""
    names = [name for name in KINDS if KINDS[name] == kind and name in part]
    names += [name for name in GENERAL_KEYS if name in part]
    if names == ["path", "bytes"]:  # as data sets store a file
        return {**_without(part, names), kind: part["bytes"]}
    if len(names) > 1:
        raise ValueError(
            f"A part of type {kind!r} has {' and '.join(names)}: one of them is its {kind}."
        )
    if not names:
        return part
    rest, source = _without(part, names), part[names[0]]
    if names == ["base64"]:
        source = {"data": source}
    if isinstance(source, Mapping):
        # OpenAI's form may have settings beside the address.
        rest = {**_without(source, (*SOURCE_KEYS, "type", "media_type")), **rest}
        rest = {key: value for key, value in rest.items() if value is not None}
        if rest.get("detail") == "auto":
            del rest["detail"]
    return {**rest, kind: plain_source(source)}


def _without(items, keys):
    return {key: value for key, value in items.items() if key not in keys}


def _as_dict(item):
    """What has named fields as a dict, else None."""
    if isinstance(item, Mapping):
        return dict(item)
    if dataclasses.is_dataclass(item) and not isinstance(item, type):
        return {field.name: getattr(item, field.name) for field in dataclasses.fields(item)}
    return item.model_dump() if hasattr(item, "model_dump") else None


def _short(item):
    return describe_source(item) if not isinstance(item, (str, Mapping)) else repr(item)[:80]
