"""What a row of finetune.py's data is: one conversation, in any layout that people have.

`LAYOUTS` has a row of each. `parse_row` alone decides; what it cannot read it refuses by name with
a `RefusedRow`, and such a row is skipped. docs/training.md lists all that is taken.
"""

import json
import math
import re
from decimal import Decimal
from pathlib import Path

import numpy as np
from PIL import Image

from message_parts_videonsa import SOURCE_KEYS, plain_source, read_part

# A row of each layout, as a line of a .jsonl file.
LAYOUTS = (
    '{"video": "a.mp4", "question": "What happens?", "answer": "A cat sleeps."}',
    '{"video": "a.mp4", "conversations": [{"from": "human", "value": "<video>\\nWhat happens?"}, '
    '{"from": "gpt", "value": "A cat sleeps."}]}',
    '{"videos": ["a.mp4"], "messages": [{"role": "user", "content": "<video>What happens?"}, '
    '{"role": "assistant", "content": "A cat sleeps."}]}',
    '{"messages": [{"role": "user", "content": [{"type": "video", "video": "a.mp4"}, '
    '{"type": "text", "text": "What happens?"}]}, '
    '{"role": "assistant", "content": [{"type": "text", "text": "A cat sleeps."}]}]}',
)
SHOWN_LAYOUTS = "A row is one of:\n" + "\n".join(LAYOUTS)
MEDIA = ("image", "video")
ARTICLES = {"text": "a text", "image": "an image", "video": "a video"}
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
ROLES |= {"model": "assistant", "bot": "assistant", "system": "system"}
# Keys with a list of turns, of which a row has one; else it has a question and an answer.
LISTS = ("messages", "conversations", "conversation")
QUESTIONS = ("query", "question", "instruction", "prompt", "problem")
ANSWERS = ("response", "answer", "output", "completion", "solution")
TEXTS = {*QUESTIONS, *ANSWERS, "input", "system"}
MEDIA_KEYS = {f"{kind}{s}" for kind in MEDIA for s in ("", "s")}
# Settings that a row may give for its one video, as a part of a message may.
SETTINGS = {"video_start", "video_end", "min_frames", "max_frames", "min_pixels", "max_pixels"}
SETTINGS |= {"total_pixels", "resized_height", "resized_width"}
READ = {*LISTS, *TEXTS, "history", *MEDIA_KEYS, *SETTINGS}
# What would change the meaning of a row and is not read.
REFUSED = {"audio", "audios", "objects", "tools", "chosen", "rejected", "rejected_response"}
REFUSED |= {"context", "passage", "hint", "subtitle", "subtitles", "system_prompt"}
REFUSED |= {"loss", "weight"}
# Options of a question in columns of their own: "options", "option_a", "choice1", ...
OPTIONS = re.compile(
    r"(?:mcq?[_ ]?|(?:possible_)?answer_?|multi(?:ple)?_?(?:choice_?)?)?"
    r"(?:option|opt|choice|candidate|alternative|distractor)s?"
    r"(?:[_ ]?(?:\d+|[a-z]|text|list)s?)?"
    r"|(?:wrong|incorrect|false|possible)_?(?:answer|option)s?_?\d*",
    re.I,
)
# ... or as NExT-QA and tables of letters have them; such a name alone may be anything.
NUMBERED_OPTION = re.compile(r"(?:a|ans|answer|ending)_?\d|(?:(?:ans|answer|ending)_?)?[A-H]", re.I)
RATES = {"fps", "sample_fps", "num_frames", "nframes"}  # a video is sampled by one of them
# What might be a setting or a note about the file.
UNCLEAR = re.compile(
    r"(?:(?:sampl(?:e|ed|ing)|target)_)?fps|frame_?rate|(?:num|n)_?frames|frame_(?:indices|idx|ids)|clip|segment|span|interval"
    r"|(?:time|clip|segment)_?range|(?:relevant_)?windows?|timestamps|time_?(?:span|window)s?"
    r"|(?:clip|segment|scene|shot|moment|video)?_?(?:start|end|begin)"
    r"(?:_?(?:time|timestamp|sec|second|frame|ms|s)s?)*",
    re.I,
)
# What a part of a video may say besides.
PART_SETTINGS = {
    "text": set(),
    "image": {"min_pixels", "max_pixels", "resized_height", "resized_width"},
}
PART_SETTINGS["video"] = SETTINGS | {"fps", "sample_fps", "num_frames", "nframes", "max_tokens"}
PART_SETTINGS["video"] |= {"do_sample_frames", "do_resize"}
# Names under which people keep media, and which are not read.
FILE_KEY = re.compile(
    r"(?:video|vid|image|img|picture|frame|media|clip|file)s?_?\d*"
    r"(?:_?(?:path|file|name|url|uri|link|src|bytes|id)s?)?|paths?|urls?|mp4|webm",
    re.I,
)
# Words of a name that is about a medium, whatever stands under it: "video_id", "imageFile".
MEDIUM_WORD = re.compile(
    r"(?:^|[\W_])(?:media|videos?|vid|clips?|frames?|images?|img|pictures?|photos?|youtube|yt)(?:[\W_\d]|id|$)"
    r"|^(?:video|vid|image|img)(?=[A-Z])",
    re.I,
)
# A medium's place in a text, also as LLaVA, VideoChat and Qwen's own template write it.
TAG = re.compile(
    r"\s*(?:<(image|video)>(?:<\1here>)?(?:\s*</\1>)?|<(image|video)here>|<\|(image|video)\|>"
    r"|<\|vision_start\|><\|(image|video)_pad\|><\|vision_end\|>)\s*",
    re.I,
)
# What else might be one: "<image 1>", "<img>a.png</img>", "<frame_3>".
ODD_TAG = re.compile(
    r"(?:<|&lt;)[|/]?(?:\w*_)?(?:image|img|video|vid|vision|frame|media|mm|clip|picture|audio|sound)"
    r"[^<>\n]{0,100}?(?:>|&gt;)|[\[{](?:image|img|video|vid)[ _]?\d*[\]}]",
    re.I,
)
# What chat templates write, ours anywhere in a text and others' at its end.
CONTROL = re.compile(
    r"<\|(?:im_start|im_end|endoftext|vision_start|vision_end)\|>"
    r"|(?:</s>|<eos>|<end_of_turn>|<\|(?:eot_id|end|end_of_text)\|>)$"
)
PICTURES = set(Image.registered_extensions())
FILMS = {".mp4", ".mkv", ".webm", ".avi", ".mov", ".m4v", ".mpg", ".mpeg", ".flv", ".wmv", ".ts"}


class RefusedRow(ValueError):
    """A row that cannot be read: its `reason`; the message shows a row of each layout, too."""

    def __init__(self, reason):
        super().__init__(f"{reason}\n{SHOWN_LAYOUTS}")
        self.reason = reason


def to_messages(row, folder) -> list[dict]:
    """The conversation of a row as messages in Qwen's form, media with their paths.

    folder: where relative paths start. An assistant's message may have "loss": False, which is
    not learned. Raises RefusedRow for a row that cannot be read, FileNotFoundError for its files.
    """
    messages = parse_row(row)
    for part in all_parts(messages):
        if part["type"] in MEDIA:
            part[part["type"]] = _located(part[part["type"]], folder)
    return messages


def set_videos(messages, settings: dict):
    """Gives every video of messages the settings that it does not have itself, in place.

    A video that says how it is sampled, by a rate or a number of frames, keeps that.
    """
    for part in all_parts(messages):
        if part["type"] == "video":
            rated = not RATES.isdisjoint(part)
            part |= {
                key: value
                for key, value in settings.items()
                if key not in part and not (rated and key in RATES)
            }


def unread_keys(row) -> set[str]:
    """The keys of a row that say something and that nothing reads: notes, or something missed."""
    return {str(key) for key, value in row.items() if key not in READ and not _is_empty(value)}


def all_parts(messages):
    for message in messages:
        yield from message["content"]


def parse_row(row) -> list[dict]:
    """The messages of a row with media as it names them; looks at no file.

    Raises RefusedRow for a row that cannot be read.
    """
    try:
        return _parse(row)
    except ValueError as error:
        raise RefusedRow(str(error)) from None


def _parse(row):
    if not isinstance(row, dict):
        raise ValueError(f"a row is an object with messages or conversations, not {_short(row)}")
    given = {key: _plain(_decoded(key, value)) for key, value in row.items()}
    row = {key: value for key, value in given.items() if not _is_empty(value)}
    if refused := sorted(REFUSED & row.keys()):
        raise ValueError(f"the row has {', '.join(refused)}, which is not supported: remove it")
    if isinstance(row.get("label"), bool):
        raise ValueError(
            f"the row has label {row['label']}, as data of good and bad answers: keep the "
            "good ones, and remove it"
        )
    turns = _turns(row)
    media = {kind: _listed(row, kind, _count_tags(turns)) for kind in MEDIA}
    has_media = any(media.values())
    messages = [_message(turn, media, has_media) for turn in turns]
    _place_first(messages, media)
    _check_lost_media(messages, row, given)
    _check_sources(messages)
    _check_options(messages, row)
    _set_for_one_video(messages, row)
    _check_control_tokens(messages)
    if not any(one["role"] == "assistant" and one.get("loss", True) for one in messages):
        raise ValueError("no assistant's turn counts in the loss, so there is nothing to learn")
    return messages


def _decoded(key, value):
    """A value of a row; a list that is stored as a JSON string as what it says."""
    if (
        key in {*LISTS, "history", *MEDIA_KEYS}
        and isinstance(value, str)
        and value.lstrip()[:1] in ("[", "{")
    ):
        try:
            return json.loads(value)
        except json.JSONDecodeError:
            return value
    return value


def _parts_in_json(content):
    """The parts of a turn that are stored as one JSON string; other content as it is."""
    if not (isinstance(content, str) and content.lstrip().startswith("[{")):
        return content
    try:
        parts = json.loads(content)
    except json.JSONDecodeError:
        return content
    return parts if all(isinstance(part, dict) and "type" in part for part in parts) else content


def _plain(value):
    """What libraries of arrays and tables hold as Python's own types; NaN and NA as None.

    Arrays of numbers are pixels, and stay.
    """
    if isinstance(value, np.generic) or (
        isinstance(value, np.ndarray) and value.dtype.kind in "OUS"
    ):
        value = value.tolist()
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    if isinstance(value, (float, Decimal)) and math.isnan(value):
        return None
    if isinstance(value, Decimal):
        return int(value) if value == value.to_integral_value() else str(value)
    if isinstance(value, float) and value.is_integer():
        return int(value)  # as pandas makes floats of whole numbers beside an empty cell
    return None if type(value).__name__ in ("NAType", "NaTType") else value


def _is_empty(value):
    """Whether a cell of a table holds nothing."""
    if isinstance(value, dict):  # as Arrow stores a file that is not there
        value = list(value.values())
    if isinstance(value, list):
        return all(one is None for one in value)
    return value is None or (isinstance(value, str) and not value)


def _check_options(messages, row):
    """Raises ValueError for options in columns of their own, which the question does not have."""
    found = [key for key in row if OPTIONS.fullmatch(str(key))]
    numbered = [key for key in row if NUMBERED_OPTION.fullmatch(str(key))]
    found += numbered if len(numbered) > 1 else []
    users = [part for one in messages if one["role"] == "user" for part in one["content"]]
    asked = "\n".join(part.get("text", "") for part in users)
    options = [option for key in found for option in _leaves(row[key])]
    options = [re.sub(r"^\s*\(?[A-Za-z][.):]\s*", "", str(option)).strip() for option in options]
    if not all(_has_words(asked, option) for option in options):
        raise ValueError(
            f"the row has {', '.join(found)}, as options of its question, which has not all of "
            "them: write them into its text ('A. ...'), and the answer as it is to be given there"
        )
    answers = [one for one in messages if one["role"] == "assistant"] if found else []
    for text in (part["text"] for part in all_parts(answers)):
        if re.fullmatch(r"[A-Za-z]|\d+", text) and not _has_words(asked, text):
            raise ValueError(
                f"the answer {text} counts the options in {', '.join(found)}, but is not in the "
                "question: give it as it is to be said"
            )


def _has_words(text, words):
    return re.search(rf"(?<!\w){re.escape(words)}(?!\w)", text) is not None


def _leaves(value):
    """The single values in a list or dict of any depth."""
    if isinstance(value, (list, dict)):
        values = value.values() if isinstance(value, dict) else value
        return [leaf for one in values for leaf in _leaves(one)]
    return [value]


def _short(value):
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


# The turns.


def _turns(row):
    """The turns of a row as dicts, in order, the system's first."""
    found, question, answer = (
        [key for key in keys if key in row] for keys in (LISTS, QUESTIONS, ANSWERS)
    )
    if len(found) == 1:
        turns = _list_of_turns(row[found[0]], found[0])
        if beside := [key for key in ("history", *answer) if key in row]:
            if beside[0] == "history" or not turns or _role(turns[-1]) != "assistant":
                raise ValueError(
                    f"the row has {found[0]} and {beside[0]}: put all turns into {found[0]}"
                )
    elif not found and len(question) == len(answer) == 1:
        turns = _pair(row, question[0], answer[0])
    else:
        found = [*found, *question, *answer]
        what = f"{' and '.join(found)}" if found else "neither messages nor conversations"
        raise ValueError(
            f"the row has {what}, where one list of turns was wanted, or one question with one "
            f"answer; its keys are {', '.join(map(str, row)) or 'none'}"
        )
    if "system" in row:
        if any(_role(turn) == "system" for turn in turns):
            raise ValueError("the row has a system text and a turn of the system: leave one")
        turns = [{"role": "system", "content": row["system"]}, *turns]
    return turns


def _list_of_turns(turns, key):
    turns = _from_columns(turns, key)
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise ValueError(f"{key} is a list of turns, not {_short(turns)}")
    listed = []
    for turn in turns:
        turn = {name: value for name, value in turn.items() if value is not None}
        if "role" in turn or "from" in turn:
            listed.append(turn)
        else:  # one turn each under the names of their roles
            listed += [{"role": name, "content": text} for name, text in turn.items()]
    return listed


def _from_columns(items, key):
    """A list of dicts that `datasets` may store as a dict of lists; others as they are."""
    if not (_is_dict(items) and all(isinstance(column, list) for column in items.values())):
        return items
    if len(lengths := {len(column) for column in items.values()}) > 1:
        raise ValueError(f"{key} has lists of different lengths: {sorted(lengths)}")
    return [dict(zip(items, one, strict=True)) for one in zip(*items.values(), strict=True)]


def _pair(row, question_key, answer_key):
    """The turns of a question and its answer, after those of "history"."""
    question, answer = row[question_key], row[answer_key]
    if isinstance(question, list) or isinstance(answer, list):  # of turns; the answer's are learned
        asked = question if isinstance(question, list) else [_user(question)]
        asked = _list_of_turns(asked, question_key)
        given = answer if isinstance(answer, list) else [_assistant(answer)]
        asked = [turn | ({"loss": False} if _role(turn) == "assistant" else {}) for turn in asked]
        return asked + _list_of_turns(given, answer_key)
    turns = []
    for pair in row.get("history", []):
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            raise ValueError(f"history is a list of [question, answer], not {_short(pair)}")
        turns += [_user(pair[0]), _assistant(pair[1])]
    if "input" in row:
        if question_key != "instruction":
            raise ValueError(f"the row has {question_key} and input: put all of it into one")
        question = f"{question}\n{row['input']}"
    return [*turns, _user(question), _assistant(answer)]


def _user(text):
    return {"role": "user", "content": text}


def _assistant(text):
    return {"role": "assistant", "content": text}


def _role(turn):
    return ROLES.get(str(turn.get("role", turn.get("from"))).lower())


def _message(turn, media, has_media):
    """One message of a turn; takes the media that it places from the front of those in `media`."""
    role, content = _role(turn), turn.get("content", turn.get("value"))
    if role is None or content is None:
        raise ValueError(
            f"a turn has a role (system, user, assistant) and text, not {_short(turn)}"
        )
    for names in (("role", "from"), ("content", "value"), ("loss", "weight", "train")):
        if len(twice := [name for name in names if name in turn]) > 1:
            raise ValueError(f"a turn has {' and '.join(twice)}: leave one")
    known = {"role", "from", "content", "value", "loss", "weight", "train", "name", "id"}
    if unknown := sorted(turn.keys() - known):
        raise ValueError(f"a turn has {', '.join(unknown)}, which is not supported: remove it")
    content = _parts_in_json(content)
    content = content if isinstance(content, (list, tuple)) else [content]
    parts = _strip([part for item in content for part in _parts(item, role, media, has_media)])
    if role == "assistant" and any(part["type"] != "text" for part in parts):
        raise ValueError("an assistant's turn has an image or video: put it into a user's turn")
    message = {"role": role, "content": parts}
    for key in ("loss", "weight", "train"):
        if key in turn:
            if turn[key] not in (0, 1) or (role != "assistant" and turn[key]):
                raise ValueError(f"a {role}'s turn has {key} {turn[key]}; only 0 and 1 are taken")
            if role == "assistant":
                message["loss"] = bool(turn[key])
    return message


def _check_control_tokens(messages):
    """Drops the token that ends a turn at the end of an answer; refuses the template's in it.

    They would be learned, and end a turn or begin one that the row does not have. A user's text is
    not learned, whatever it holds, but is not the whole prompt as the template writes it.
    """
    for message in messages:
        texts = [part for part in message["content"] if part["type"] == "text"]
        if texts and texts[0]["text"].startswith("<|im_start|>"):
            raise ValueError(
                "a turn's text begins with <|im_start|>, as the chat template writes it: give the "
                "turns themselves, as messages"
            )
        if message["role"] != "assistant" or not texts:
            continue
        texts[-1]["text"] = texts[-1]["text"].removesuffix("<|im_end|>").rstrip()
        for part in texts:
            if token := CONTROL.search(part["text"]):
                raise ValueError(
                    f"an assistant's text has {token[0]}, which the chat template writes: remove it"
                )


# The parts of a turn.


def _parts(item, role, media, has_media):
    """Yields the parts, text or media, of a text or of one part as the row has it."""
    if isinstance(item, (int, float)) and not isinstance(item, bool):
        item = str(item)
    if isinstance(item, str):
        yield from _split(item.removeprefix("\ufeff"), role, media, has_media)
        return
    if not isinstance(item, dict):
        raise ValueError(f"a turn has text and parts, not {_short(item)}")
    part = read_part({key: value for key, value in item.items() if not _is_empty(value)})
    kind = part.pop("type")
    source = part.pop(kind, None)
    if unknown := sorted(part.keys() - PART_SETTINGS[kind]):
        raise ValueError(
            f"{ARTICLES[kind]} has {', '.join(unknown)}, which is not supported: remove it"
        )
    if kind == "text":
        yield from _split(source or "", role, media, has_media and any(media.values()))
        return
    yield {"type": kind, **part, kind: _next(media, kind) if source is None else source}


def _split(text, role, media, has_media):
    """Yields a text's pieces and the media at its tags; a tag of a row without media is text."""
    if role != "user":  # an answer may speak of tags, once all media have their place
        if TAG.search(text) and any(media.values()):
            article = "an" if role == "assistant" else "the"
            raise ValueError(
                f"{article} {role}'s turn has a tag of an image or video: put it into a user's turn"
            )
        has_media = False
    place = 0
    for tag in TAG.finditer(text) if has_media else ():
        if piece := text[place : tag.start()]:
            yield {"type": "text", "text": piece}
        kind = tag[tag.lastindex].lower()
        kind = kind if media[kind] else "video"  # LLaVA-Video marks a video's place with <image>
        yield {"type": kind, kind: _next(media, kind)}
        place = tag.end()
    if piece := text[place:]:
        yield {"type": "text", "text": piece}


def _strip(parts):
    """The parts of a turn without white space at its ends and beside media."""
    stripped = []
    for index, part in enumerate(parts):
        if part["type"] == "text":
            text = part["text"]
            if index == 0 or parts[index - 1]["type"] != "text":
                text = text.lstrip()
            if index == len(parts) - 1 or parts[index + 1]["type"] != "text":
                text = text.rstrip()
            part = {"type": "text", "text": text}
        if part.get("text") != "":
            stripped.append(part)
    return stripped


def _next(media, kind):
    if not media[kind]:
        raise ValueError(f"the text has more <{kind}> tags than the row has {kind}s")
    return media[kind].pop(0)


# The media of a row.


def _count_tags(turns):
    texts = [turn.get("content", turn.get("value")) for turn in turns if _role(turn) == "user"]
    items = [item for text in texts for item in (text if isinstance(text, list) else [text])]
    texts = [item.get("text") if isinstance(item, dict) else item for item in items]
    return sum(len(TAG.findall(text)) for text in texts if isinstance(text, str))


def _listed(row, kind, tags):
    """The media of one kind that a row lists beside its text."""
    if kind in row and f"{kind}s" in row:
        raise ValueError(f"the row has both {kind} and {kind}s: leave one")
    items = _from_columns(row.get(f"{kind}s", row.get(kind, [])), f"{kind}s")
    items = list(items) if isinstance(items, (list, tuple)) else [items]
    items = [item for item in items if not _is_empty(item)]
    for item in items:
        own = {key for key, value in item.items() if value is not None} if _is_dict(item) else set()
        if unknown := sorted(own - {*SOURCE_KEYS, "type", "media_type"}):
            raise ValueError(
                f"the row's {kind} has {', '.join(unknown)}: give that in a part of a message"
            )
    if kind == "video" and len(items) > 1 and all(map(_is_picture, items)):
        if tags > 1:
            raise ValueError(
                f"the row lists {len(items)} pictures as videos, and its text has {tags} tags: put "
                "the frames of each video into a list of its own, or give pictures as images"
            )
        return [items]  # the frames of one video
    return items


def _is_dict(item):
    return isinstance(item, dict)


def _is_picture(item):
    path = item.get("path") if isinstance(item, dict) else item
    return isinstance(path, str) and Path(path).suffix.lower() in PICTURES - {".gif"}


def _place_first(messages, media):
    """Puts media for which no text has a tag before the first question."""
    if not any(media.values()):
        return
    user = next((one for one in messages if one["role"] == "user"), None)
    if user is None or any(part["type"] != "text" for part in all_parts(messages)):
        left = ", ".join(f"{len(items)} {kind}" for kind, items in media.items() if items)
        raise ValueError(f"the text has fewer <video> and <image> tags than media: {left} left")
    front = [{"type": kind, kind: item} for kind in MEDIA for item in media[kind]]
    user["content"] = front + user["content"]


def _check_lost_media(messages, row, given):
    """Raises ValueError where a row seems to have media that were not found."""
    has_media = any(part["type"] != "text" for part in all_parts(messages))
    for key in row.keys() - MEDIA_KEYS:
        noted = has_media and key.lower().endswith(("name", "id"))  # beside the medium itself
        named = FILE_KEY.fullmatch(key) and not noted and _looks_like_media(row[key])
        if not has_media and key not in TEXTS:  # then it may be under any name, or be named alone
            named = _looks_like_media(row[key]) or (row[key] and MEDIUM_WORD.search(key))
        if named:
            raise ValueError(
                f"the row has {key}, which is not read: give its file as {', '.join(MEDIA)} "
                "or their plurals"
            )
    empty = sorted(key for key in given.keys() & MEDIA_KEYS if _is_empty(given[key]))
    for message in messages:
        if message["role"] == "assistant":
            continue
        text = "\n".join(part.get("text", "") for part in message["content"])
        tag = TAG.search(text)
        if tag and has_media:
            raise ValueError(f"the text has more {tag[0].strip()} tags than the row has media")
        tag = tag or ODD_TAG.search(text)
        if tag and has_media:
            raise ValueError(
                f"the text has {tag[0]}, which is not read: mark the place of each medium with "
                "<video> or <image>, in the order in which the row has them"
            )
        if tag and (empty or tag.start() == 0 or tag.end() == len(text)):
            what = f"its {empty[0]} is empty" if empty else "it has no image or video"
            raise ValueError(f"the row's text has {tag[0].strip()}, but {what}")


def _looks_like_media(value):
    if isinstance(value, (list, tuple)):
        return any(map(_looks_like_media, value))
    if isinstance(value, dict):
        return bool(value.get("bytes")) or _looks_like_media(value.get("path"))
    if isinstance(value, bytes):
        return True
    return isinstance(value, str) and Path(value).suffix.lower() in PICTURES | FILMS


def _check_sources(messages):
    for part in all_parts(messages):
        if part["type"] in MEDIA:
            source = part[part["type"]]
            for one in source if isinstance(source, list) else [source]:
                if one is None or isinstance(one, (bool, int, float)):
                    raise ValueError(
                        f"{ARTICLES[part['type']]} is given as {one}; a path, an address or the "
                        "file's content was wanted"
                    )


def _set_for_one_video(messages, row):
    """Gives the video of a row the settings that stand beside it."""
    videos = [part for part in all_parts(messages) if part["type"] == "video"]
    unclear = sorted(str(key) for key in row if UNCLEAR.fullmatch(str(key)) and key not in SETTINGS)
    if videos and unclear:
        raise ValueError(
            f"the row has {', '.join(unclear)}: as settings, name them video_start and video_end, "
            "or give them in the part of the video; as notes on the file, take them out"
        )
    if not (settings := {key: row[key] for key in sorted(SETTINGS & row.keys())}):
        return
    if len(videos) != 1:
        raise ValueError(
            f"the row has {', '.join(settings)} for {len(videos)} videos: give settings of one of "
            "several videos in its part of the message"
        )
    if twice := settings.keys() & videos[0].keys():
        raise ValueError(f"the row and the part of its video both have {', '.join(sorted(twice))}")
    videos[0].update(settings)


# Where they are.


def _located(source, folder):
    """A medium as the processor takes it, its path from `folder`: a file or a folder of frames."""
    if isinstance(source, (list, tuple)):
        return [_located(frame, folder) for frame in source]
    source = plain_source(source)
    if not isinstance(source, str) or "://" in source:
        return source
    path = Path(folder, source)
    if not path.exists():
        raise FileNotFoundError(f"there is no {path}")
    return str(path)
