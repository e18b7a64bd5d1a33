"""Where videos and pictures come from: the forms that people give them in, as one plain form.

`plain_source` makes a path, an address or bytes of what was given; pictures_videonsa.py and
video_reader_videonsa.py read those.
"""

import base64
import os
import re
from collections.abc import Mapping
from urllib.parse import unquote, unquote_to_bytes

# Keys under which a source may stand in a dict, as data sets and OpenAI's clients write it.
SOURCE_KEYS = ("bytes", "path", "url", "data")


def plain_source(source):
    """A path or address (str) or bytes of what was given; lists item by item, the rest unchanged.

    source: a path, a file:// or data: address, bytes, an open file, or a dict of one of them under
    one of SOURCE_KEYS, the first that is not None. Arrays, tensors and pictures are unchanged.
    """
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
        return f"{text[:40]!r}... ({len(text):,} characters)" if payload else text
    return f"an object of type {type(source).__name__}"


def _from_mapping(source):
    given = {key: value for key, value in source.items() if value is not None}
    key = next((key for key in SOURCE_KEYS if key in given), None)
    if key is None:
        raise ValueError(
            f"A source is given as a dict with one of {', '.join(SOURCE_KEYS)}, not with "
            f"{', '.join(map(str, given)) or 'nothing'}."
        )
    value = given[key]
    if key == "data" and isinstance(value, str):
        return _decode_base64(value, "data")
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
        return base64.b64decode(re.sub(r"\s", "", unquote(payload)), validate=True)
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
