"""The rows of finetune.py's data sets: reading them, and the conversation that each one is.

Rows are one conversation each, in any of three layouts:

    {"video": "a.mp4", "conversations": [{"from": "human", "value": "<video>\\nWhat happens?"},
                                         {"from": "gpt", "value": "A cat sleeps."}]}
    {"videos": ["a.mp4"], "messages": [{"role": "user", "content": "<video>What happens?"},
                                       {"role": "assistant", "content": "A cat sleeps."}]}
    {"messages": [{"role": "user", "content": [{"type": "video", "video": "a.mp4"},
                                               {"type": "text", "text": "What happens?"}]},
                  {"role": "assistant", "content": [{"type": "text", "text": "A cat sleeps."}]}]}

The first also with LLaVA-Video's `<image>` as the video's place; each also with `image`, `images`.
A video may be a file, a folder of frames or a list of frames.
"""

import json
import os
import random
import re
from pathlib import Path

from PIL import Image

ROLES = {"human": "user", "gpt": "assistant"}
MEDIA = ("image", "video")
TAG = re.compile(r"\s*<(image|video)>\s*")


def read_rows(name):
    """The rows of one data set, a sequence of dicts, and the folder that its paths start from.

    name: a .json, .jsonl or .parquet file, a folder that `datasets` can load, or an id on the Hub,
    which may go on with a subset and a split: "org/name:subset:split", "org/name::split".
    """
    path = Path(name)
    if path.suffix in (".json", ".jsonl") and path.is_file():
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".json":
            return json.loads(text), path.parent
        return [json.loads(line) for line in text.split("\n") if line.strip()], path.parent
    try:
        import datasets
    except ImportError as error:
        raise ImportError(
            f"{name} is not a .json or .jsonl file; reading it needs: pip install datasets"
        ) from error
    if path.suffix == ".parquet" and path.is_file():
        return datasets.Dataset.from_parquet(str(path)), path.parent
    if path.suffix in (".json", ".jsonl", ".parquet"):
        raise FileNotFoundError(f"there is no file {name}.")
    source, subset, split = (*name.split(":"), "", "")[:3]
    rows = datasets.load_dataset(source, subset or None, split=split or "train")
    return rows, path if path.is_dir() else Path()


def read_set(name, seed):
    """(rows, folder, row numbers) of a data set, of which "name%50" takes a random half.

    The same seed takes the same rows. Past 100 %, rows come several times.
    """
    name, _, share = name.partition("%")
    rows, folder = read_rows(name)
    numbers = list(range(len(rows)))
    if share:
        wanted = round(len(numbers) * float(share) / 100)
        times, rest = divmod(wanted, max(len(numbers), 1))
        numbers = numbers * times + random.Random(seed).sample(numbers, rest)
    return rows, folder, numbers


def to_messages(row, folder):
    """The conversation of a row as messages in Qwen's form, media with their paths.

    Raises ValueError where the row is in none of the layouts, or its media do not fit its text.
    """
    messages = parse_row(row)
    for part in all_parts(messages):
        if part["type"] in MEDIA:
            part[part["type"]] = _located(part[part["type"]], folder)
    return messages


def parse_row(row):
    """The same with media as the row names them; looks at no file."""
    media = {kind: _listed(row, kind) for kind in MEDIA}
    has_media = any(media.values())
    turns = row.get("messages") or row.get("conversations")
    if isinstance(turns, dict):  # as `datasets` may store a list of turns: a dict of lists
        turns = [dict(zip(turns, turn, strict=True)) for turn in zip(*turns.values(), strict=True)]
    if not turns:
        raise ValueError(f"the row has neither messages nor conversations, only {sorted(row)}")
    messages = []
    for turn in turns:
        role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
        role = ROLES.get(role, role)
        if role not in ("system", "user", "assistant") or content is None:
            raise ValueError(f"a turn has a role (system, user, assistant) and text, not {turn}")
        messages.append({"role": role, "content": list(_parts(content, media, has_media))})
    if any(media.values()):
        user = next((one for one in messages if one["role"] == "user"), None)
        if user is None or any(part["type"] != "text" for part in all_parts(messages)):
            left = ", ".join(f"{len(items)} {kind}" for kind, items in media.items() if items)
            raise ValueError(f"the text has fewer <video> and <image> tags than media: {left} left")
        # No tag at all: the media come first.
        front = [{"type": kind, kind: item} for kind in MEDIA for item in media[kind]]
        user["content"] = front + user["content"]
    if not any(message["role"] == "assistant" for message in messages):
        raise ValueError("no turn is an assistant's, so there is nothing to learn")
    return messages


def _listed(row, kind):
    """The media of one kind that a row lists beside its text."""
    items = row.get(f"{kind}s") or row.get(kind) or []
    return list(items) if isinstance(items, (list, tuple)) else [items]


def _parts(content, media, has_tags):
    """Yields the parts of one turn; takes what it needs from the front of the lists in `media`."""
    if isinstance(content, str):
        # text, kind, text, kind, ..., text; in a row without media, a tag is what the text is about
        pieces = TAG.split(content) if has_tags else [content]
        for text, kind in zip(pieces[::2], [*pieces[1::2], None], strict=True):
            if text.strip():
                yield {"type": "text", "text": text.strip()}
            if kind is not None:
                # LLaVA-Video marks a video's place with <image>.
                kind = kind if media[kind] else "video"
                yield {"type": kind, kind: _next(media, kind)}
        return
    for part in content:
        part = {key: value for key, value in part.items() if value is not None}
        kind = part.get("type") or next((kind for kind in MEDIA if kind in part), "text")
        if kind in MEDIA:
            source = next((part.pop(key) for key in (kind, "path", "url") if key in part), None)
            part[kind] = _next(media, kind) if source is None else source
        yield {**part, "type": kind}


def _next(media, kind):
    if not media[kind]:
        raise ValueError(f"the text has more <{kind}> tags than the row has {kind}s")
    return media[kind].pop(0)


def _located(source, folder):
    """Paths start from `folder`; a folder of frames becomes the list of its pictures."""
    if isinstance(source, (list, tuple)):
        return [_located(frame, folder) for frame in source]
    if not isinstance(source, (str, os.PathLike)):
        return source
    source = os.fspath(source).removeprefix("file://")
    if "://" in source:
        return source
    path = Path(folder, source)
    if not path.exists():
        raise FileNotFoundError(f"there is no {path}")
    if path.is_dir():
        return [str(one) for one in sorted(path.iterdir()) if one.suffix.lower() in PICTURES]
    return str(path)


PICTURES = set(Image.registered_extensions())


def all_parts(messages):
    for message in messages:
        yield from message["content"]
