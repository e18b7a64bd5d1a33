"""Messages and media in the forms that people write them, as one form.

`read_messages` makes of each message a role and parts: {"type": "text", "text": ...}, {"type":
"image", "image": ...} or {"type": "video", "video": ...}; media keep what else their part says of
them. `plain_source` makes a path, an address or bytes of where a medium comes from. What cannot be
read is refused by name, so that nothing vanishes from a prompt. No file is opened here.

Commands read their rows with it, too: it imports nothing of this package.
"""

import base64
import dataclasses
import math
import numbers
import os
import re
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import unquote, unquote_to_bytes

# Types of parts as Qwen, OpenAI (chat and responses) and others name them.
KINDS = {"text": "text", "input_text": "text", "output_text": "text"}
KINDS |= {
    name: kind for kind in ("image", "video") for name in (kind, f"{kind}_url", f"input_{kind}")
}
# Keys of a message under which others put its parts, beside the content.
BESIDE = {name + plural: kind for name, kind in KINDS.items() for plural in ("", "s")}
# Keys under which a medium stands in its part, besides the names of its own kind.
GENERAL_KEYS = ("url", "path", "bytes", "base64", "source")
# Keys under which a source may stand in a dict, as data sets and OpenAI's clients write it.
SOURCE_KEYS = ("bytes", "path", "url", "data")
# How files of pictures begin: PNG, JPEG, GIF, BMP, TIFF, WebP, AVIF and HEIC, JPEG 2000, icons.
SIGNATURES = re.compile(
    rb"\x89PNG|\xff\xd8\xff|GIF8|BM|II\*\0|MM\0\*|RIFF....WEBP|....ftyp(?:avi[fs]|hei|mif1|msf1)"
    rb"|\0\0\0\x0cjP  |\xff\x4f\xff\x51|\0\0\x01\0",
    re.DOTALL,
)

# Formats that may hold a sequence to be played; the several pictures of others (MPO, TIFF) are not.
ANIMATED = ("GIF", "WEBP", "PNG", "AVIF")


def read_messages(conversation) -> list[dict]:
    """The messages of one conversation, copied: {"role": ..., "content": text or list of parts}.

    conversation: a list of dicts or of message objects (dataclasses, pydantic). Other keys of a
    message stay, without those that are None, as a table writes them where there is nothing.

    Raises ValueError for what is no message, where there is none, and for parts that stand beside
    the content.
    """
    conversation = getattr(conversation, "messages", conversation)
    if isinstance(conversation, (str, Mapping)) or not hasattr(conversation, "__iter__"):
        raise ValueError(
            f"A conversation is a list of messages, not {_short(conversation)}: put it into a list."
        )
    messages = [_read_message(message) for message in conversation]
    if not messages:
        raise ValueError("A conversation is empty; it is a list of messages.")
    return messages


def read_part(part) -> dict:
    """One part of a message in Qwen's form; media under their kind as `plain_source` gives them.

    A part of a medium may leave it out; it is then given beside the messages.

    Raises ValueError for a part of an unknown type, and for one whose content is ambiguous.
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


def plain_source(source):
    """A path or address (str) or bytes of what was given; lists item by item, the rest unchanged.

    source: a path, a file:// or data: address, bytes, an open file, or a dict of one of them under
    one of SOURCE_KEYS, the first that is not None. Arrays, tensors and pictures are unchanged.
    """
    source = _as_list(source)
    if isinstance(source, Mapping):
        return _from_mapping(source)
    if isinstance(source, (list, tuple)):
        return [plain_source(item) for item in source]
    if isinstance(source, os.PathLike):
        return os.fsdecode(source)
    if isinstance(source, str):
        return _from_address(source)
    if isinstance(source, (bytearray, memoryview)):
        return bytes(source)
    if hasattr(source, "_hf_encoded"):  # a decoder that `datasets` made
        return plain_source(source._hf_encoded)
    if hasattr(source, "read") and hasattr(source, "seek"):
        return _from_open_file(source)
    return source


def is_file(source) -> bool:
    """Whether this plain source is a file: by its path, its address or its bytes."""
    return isinstance(source, (str, bytes))


def is_address(source) -> bool:
    """Whether this plain source is to be fetched from a server."""
    return isinstance(source, str) and re.match(r"https?://", source, re.I) is not None


def describe_source(source) -> str:
    """A source in a message: never its bytes."""
    if isinstance(source, (bytes, bytearray, memoryview)):
        return f"a file of {len(source):,} bytes"
    if isinstance(source, (str, os.PathLike)):
        text = os.fsdecode(source)
        payload = text[:5].lower() == "data:" or len(text) > 500
        payload = payload or re.fullmatch(r"[\w+/=-]{200,}", text)  # base64
        return f"{text[:40]!r}... ({len(text):,} characters)" if payload else text
    return f"an object of type {type(source).__name__}"


def decode_base64(text: str) -> bytes:
    """The bytes of base64 in its usual or its URL-safe alphabet, with white space or without.

    Raises ValueError for what is no base64.
    """
    text = re.sub(r"\s", "", text).rstrip("=").translate(str.maketrans("-_", "+/"))
    return base64.b64decode(text + "=" * (-len(text) % 4), validate=True)


def is_picture(source) -> bool:
    """Whether a path or bytes begin as a picture does; False for what cannot be read."""
    if not isinstance(source, bytes):
        if not os.path.isfile(source):
            return False
        with open(source, "rb") as file:
            source = file.read(16)
    return SIGNATURES.match(source) is not None


def is_animated(picture) -> bool:
    """Whether a picture that Pillow has opened is a sequence to be played."""
    return picture.format in ANIMATED and getattr(picture, "n_frames", 1) > 1


def frames_in_folder(folder) -> list[str]:
    """The pictures in a folder in their natural order: frame 2 before frame 10.

    Raises ValueError where there are none.
    """
    files = [one for one in Path(folder).iterdir() if not one.name.startswith(".")]
    pictures = [str(one) for one in sorted(files, key=_natural_order) if is_picture(str(one))]
    if not pictures:
        raise ValueError(f"The folder {folder} holds no pictures, so it is no video of frames.")
    return pictures


def _read_message(message):
    """One message, its content a text or parts as `read_part` reads them."""
    given = _as_dict(message)
    if given is None:
        raise ValueError(f"A message is a dict with a role and content, not {_short(message)}.")
    message = {key: value for key, value in given.items() if value is not None}
    # Calls of tools may stand alone, and a table has None where a turn says nothing.
    if "role" not in message or not {"content", "tool_calls"} & given.keys():
        raise ValueError(
            "A message has a role and content, but this one has "
            f"{', '.join(map(str, message)) or 'nothing'}."
        )
    if not isinstance(message["role"], str) or not message["role"]:
        raise ValueError(
            f"The role of a message is {_short(message['role'])}; it is a text, such as 'user'."
        )
    for key, kind in BESIDE.items():
        if key in message and not _is_empty(message[key]):
            raise ValueError(
                f"A message has {key!r} beside its content: put each into the content as a part, "
                f'{{"type": "{kind}", "{kind}": ...}}, where it stands in the text.'
            )
    content = _as_list(message.get("content", []))
    if not isinstance(content, str):
        parts = content if isinstance(content, (list, tuple)) else [content]
        content = [read_part(part) for part in parts]
    return {**message, "content": content}


def _text(part):
    text = part.get("text", "")
    if "text" not in part and part:
        raise ValueError(f"A part of type 'text' has no text, but {', '.join(part)}.")
    number = isinstance(text, numbers.Real) and not isinstance(text, bool)
    if not isinstance(text, str) and not (number and math.isfinite(text)):
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
    if names in (["base64"], ["bytes"]):
        source = {"data": source}
    if isinstance(source, Mapping):
        # OpenAI's form may have settings beside the address.
        rest = {**_without(source, (*SOURCE_KEYS, "type", "media_type")), **rest}
        rest = {key: value for key, value in rest.items() if value is not None}
        if rest.get("detail") == "auto":
            del rest["detail"]
    return {**rest, kind: plain_source(source)}


def _as_list(item):
    """A NumPy array of texts or objects, as tables give lists, as a list; others as they are."""
    kind = getattr(getattr(item, "dtype", None), "kind", None)
    return item.tolist() if kind in ("O", "U", "S") else item


def _is_empty(item):
    return hasattr(item, "__len__") and len(item) == 0


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
    """A number or a short text as it is; of all else its kind, and never a payload."""
    if isinstance(item, numbers.Number) or (isinstance(item, str) and len(item) <= 80):
        return repr(item)
    if isinstance(item, str):
        return f"a text of {len(item):,} characters"
    if isinstance(item, Mapping):
        return f"a dict with {', '.join(map(str, item)) or 'nothing'}"
    return describe_source(item)


def _from_mapping(source):
    given = {key: value for key, value in source.items() if value is not None}
    key = next((key for key in SOURCE_KEYS if key in given), None)
    if key is None:
        raise ValueError(
            f"A source is given as a dict with one of {', '.join(SOURCE_KEYS)}, not with "
            f"{', '.join(map(str, given)) or 'nothing'}."
        )
    value = given[key]
    if key in ("data", "bytes") and isinstance(value, str):  # as JSON writes bytes
        return _decode_base64(value, key)
    return plain_source(value)


def _from_address(source):
    scheme = source[:5].lower()
    if scheme == "data:":
        head, comma, payload = source.partition(",")
        if not comma:
            raise ValueError("A data: address has no comma, after which its content would stand.")
        if head.lower().endswith(";base64"):
            return _decode_base64(payload, head)
        return unquote_to_bytes(payload)
    if scheme == "file:":
        path = re.sub(r"^file:(//(localhost(?=/))?)?", "", source, flags=re.I)
        # Paths are also written after file:// as they are.
        return path if os.path.exists(path) else unquote(path)
    return source


def _decode_base64(payload, head):
    try:
        return decode_base64(unquote(payload))
    except ValueError as error:
        raise ValueError(f"What follows {head!r} is not base64 ({error}).") from None


def _from_open_file(file):
    """The path of a file that is open, or all its bytes where it has none."""
    if getattr(file, "closed", False):
        raise ValueError(f"{describe_source(file)} is a closed file; give its path.")
    path = getattr(file, "name", None)
    if isinstance(path, (str, os.PathLike)) and os.path.isfile(path):
        if getattr(file, "writable", lambda: False)():
            file.flush()
        return os.path.abspath(path)
    if getattr(file, "seekable", lambda: False)():
        file.seek(0)
    content = file.read()
    if not isinstance(content, (bytes, bytearray, memoryview)):
        raise ValueError(
            f"{describe_source(file)} gives {type(content).__name__} when it is read, not bytes; "
            "open files with mode 'rb'."
        )
    return bytes(content)


def _natural_order(path):
    """ "frame10" after "frame2": digits are compared as numbers."""
    pieces = re.split(r"(\d+)", path.name)
    return [int(piece) if n % 2 else piece.lower() for n, piece in enumerate(pieces)]
