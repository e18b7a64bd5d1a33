"""The data of finetune.py: rows in the layouts people have into batches with labels.

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
from dataclasses import dataclass, field
from pathlib import Path

import torch
from PIL import Image
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset
from transformers.image_utils import load_image

from nsa_reference import count_visits

ROLES = {"human": "user", "gpt": "assistant"}
MEDIA = ("image", "video")
TAG = re.compile(r"\s*<(image|video)>\s*")
IGNORE = -100


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
        if user is None or any(part["type"] != "text" for part in _all_parts(messages)):
            left = ", ".join(f"{len(items)} {kind}" for kind, items in media.items() if items)
            raise ValueError(f"the text has fewer <video> and <image> tags than media: {left} left")
        # No tag at all: the media come first.
        front = [{"type": kind, kind: item} for kind in MEDIA for item in media[kind]]
        user["content"] = front + user["content"]
    for message in messages:
        for part in message["content"]:
            if part["type"] != "text":
                part[part["type"]] = _located(part[part["type"]], folder)
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
RATES = {"fps", "sample_fps", "num_frames", "nframes"}  # a video is sampled by one of them


@dataclass
class Prepared:
    """A conversation before its videos are read.

    messages: with its videos planned and its images loaded.
    ids: of the text, each medium still one placeholder.  labelled: bool per id.
    sizes: tokens that each medium becomes, in the order of the placeholders.
    note: what was given up for the token budget, if anything.
    """

    messages: list
    ids: torch.Tensor
    labelled: torch.Tensor
    sizes: list[int]
    note: str = ""

    @property
    def tokens(self):
        return len(self.ids) + sum(self.sizes) - len(self.sizes)


@dataclass
class Conversations(Dataset):
    """Conversations of several data sets as the model's inputs and labels.

    names: data sets for `read_set`.  root: where paths start from, instead of each set's folder.
    settings: of every video, as the processor takes them (fps, max_pixels, ...).
    max_tokens: a conversation over it gives up frames of its videos.

    An item is a pure function of its index: one that cannot be read is replaced by the next one
    that can, and its "notes" say so, as (what, which row, why).
    """

    names: list[str]
    processor: object
    root: str | None = None
    settings: dict = field(default_factory=dict)
    max_tokens: int | None = None
    seed: int = 42

    MOST_TRIES = 50

    def __post_init__(self):
        self.sets = [read_set(name, self.seed) for name in self.names]
        self.places = [(i, n) for i, (_, _, numbers) in enumerate(self.sets) for n in numbers]
        if not self.places:
            raise ValueError(f"there are no rows in {', '.join(self.names)}.")
        tokenizer = self.processor.tokenizer
        tokens = (self.processor.image_token, self.processor.video_token)
        self.placeholders = torch.tensor(tokenizer.convert_tokens_to_ids(list(tokens)))

    def __len__(self):
        return len(self.places)

    def __getitem__(self, index):
        return self._first_usable(index, self.encode)

    def kinds_of_media(self):
        """How many of images and videos the data sets have: 0, 1 or 2."""
        kinds = set()
        for rows, _, _ in self.sets:
            for row in rows:
                kinds |= {kind for kind in MEDIA if _listed(row, kind)}
                for turn in row.get("messages") or ():
                    if isinstance(turn, dict) and isinstance(turn.get("content"), list):
                        kinds |= {part.get("type") for part in turn["content"]} & set(MEDIA)
                if len(kinds) == len(MEDIA):
                    break
        return len(kinds)

    def measured(self, index):
        """The lengths of an item, without reading more of its videos than one frame."""
        return self._first_usable(index, self.measure, tries=1)

    def _first_usable(self, index, make, tries=MOST_TRIES):
        notes = []
        for step in range(min(tries, len(self))):
            number, row = self.places[(index + step) % len(self)]
            rows, folder, _ = self.sets[number]
            place = f"{self.names[number].partition('%')[0]}:{row + 1}"
            try:
                prepared = self.prepare(to_messages(rows[row], self.root or folder))
                item = make(prepared)
            except Exception as error:  # whatever a damaged file makes a decoder raise
                notes.append(("skipped", place, f"{type(error).__name__}: {error}"))
                continue
            if prepared.note:
                notes.append(("shortened", place, prepared.note))
            return {**item, "notes": notes}
        if tries == 1:
            return {"notes": notes}
        raise RuntimeError(
            f"{len(notes)} rows in a row cannot be used. Check the data and --data_root. "
            f"The last one, {notes[-1][1]}: {notes[-1][2]}"
        )

    def prepare(self, messages):
        """Plans a conversation's videos within the token budget; returns `Prepared`."""
        image_tokens = self._load_images(messages)
        for part in _all_parts(messages):
            if part["type"] == "video":
                rated = not RATES.isdisjoint(part)
                part |= {
                    key: value
                    for key, value in self.settings.items()
                    if key not in part and not (rated and key in RATES)
                }
        ids, labelled = self.labelled_text(messages)
        videos = sum(part["type"] == "video" for part in _all_parts(messages))
        text = len(ids) - len(image_tokens) - videos
        note, fixed = "", text + sum(image_tokens)
        planned, plans = self.processor.plan_videos(messages)
        total = fixed + sum(plan.tokens for plan in plans)
        if self.max_tokens is not None and total > self.max_tokens:
            over = f"{total:,} tokens, over the limit of {self.max_tokens:,}"
            room = self.max_tokens - fixed
            if not plans or room <= 0:
                raise ValueError(f"{over}, and there is no video to shorten")
            try:
                planned, plans = self.processor.plan_videos(planned, max_tokens=room)
            except ValueError as error:
                raise ValueError(f"{over}: {error}") from error
            note = f"{over}: " + "; ".join(plan.describe() for plan in plans)
        sizes = {"image": iter(image_tokens), "video": iter(plan.tokens for plan in plans)}
        kinds = [part["type"] for part in _all_parts(messages) if part["type"] in MEDIA]
        return Prepared(planned, ids, labelled, [next(sizes[kind]) for kind in kinds], note)

    def _load_images(self, messages):
        """Loads the images of the messages, in place; returns the tokens of each."""
        images = self.processor.image_processor
        tokens = []
        for part in _all_parts(messages):
            if part["type"] == "image":
                image = part["image"] = load_image(part["image"])
                patches = images.get_number_of_image_patches(image.height, image.width, {})
                tokens.append(patches // images.merge_size**2)
        return tokens

    def labelled_text(self, messages):
        """(ids, bool per id): the text, and which tokens are an assistant's turn or end one.

        The spans are the template's: what it adds to the conversation so far for the next turn.
        """
        for message in messages:
            if message["role"] == "assistant":
                # The header ends in a new line, with which leading white space would merge.
                parts = [part["text"] for part in message["content"] if part["type"] == "text"]
                if not (answer := "".join(parts).strip()):
                    raise ValueError("an assistant's turn is empty")
                message["content"] = [{"type": "text", "text": answer}]
        render = self.processor.apply_chat_template
        whole, spans = render(messages, tokenize=False), []
        for end, message in enumerate(messages, start=1):
            if message["role"] != "assistant":
                continue
            before = render(messages[: end - 1], tokenize=False, add_generation_prompt=True)
            after = render(messages[:end], tokenize=False).rstrip()
            if not (whole.startswith(after) and after.startswith(before)):
                raise ValueError("the chat template changes earlier turns when later ones come")
            spans.append((len(before), len(after)))
        encoded = self.processor.tokenizer(whole, return_offsets_mapping=True)
        starts, ends = torch.tensor(encoded["offset_mapping"]).T
        labelled = torch.zeros(len(starts), dtype=torch.bool)
        for start, end in spans:
            labelled |= (starts >= start) & (ends <= end) & (ends > starts)
        return torch.tensor(encoded["input_ids"]), labelled

    def measure(self, prepared):
        return {
            "tokens": prepared.tokens,
            "vision_tokens": sum(prepared.sizes),
            "labels": int(prepared.labelled.sum()),
        }

    def encode(self, prepared):
        """The model's inputs, a batch of one, and their labels."""
        inputs = self.processor.apply_chat_template(
            prepared.messages, tokenize=True, return_dict=True, return_tensors="pt"
        )
        repeats = torch.ones_like(prepared.ids)
        places = torch.isin(prepared.ids, self.placeholders)
        if int(places.sum()) != len(prepared.sizes):
            raise ValueError("the text itself contains a placeholder of an image or video")
        repeats[places] = torch.tensor(prepared.sizes, dtype=repeats.dtype)
        ids, labelled = (x.repeat_interleave(repeats) for x in (prepared.ids, prepared.labelled))
        if not torch.equal(ids, inputs["input_ids"][0]):
            raise ValueError(
                f"the processor made {inputs['input_ids'].shape[1]:,} tokens of a plan of "
                f"{len(ids):,}, or other ones"
            )
        item = {"input_ids": ids, "labels": ids.masked_fill(~labelled, IGNORE)}
        for name in PIXELS:
            if inputs.get(name) is not None:
                item[name] = torch.as_tensor(inputs[name])
        return item


PIXELS = (
    "pixel_values",
    "image_grid_thw",
    "pixel_values_videos",
    "video_grid_thw",
    "second_per_grid_ts",
)


def _all_parts(messages):
    for message in messages:
        yield from message["content"]


class Collator:
    """Items of `Conversations` as one batch, padded on the right, with logits only where needed.

    The model computes logits in the columns `logits_to_keep`, those that have a label in some row,
    and compares them with `shift_labels`. "stats" holds plain numbers about the batch.
    """

    def __init__(self, processor, config):
        self.pad = processor.tokenizer.pad_token_id
        self.text = config.text_config
        kinds = {"image": config.image_token_id, "video": config.video_token_id}
        self.sparse = torch.tensor([kinds[kind] for kind in self.text.nsa_modalities])

    def __call__(self, items):
        ids = [item["input_ids"] for item in items]
        labels = [item["labels"] for item in items]
        batch = {
            "input_ids": pad_sequence(ids, batch_first=True, padding_value=self.pad),
            "attention_mask": pad_sequence([torch.ones_like(one) for one in ids], batch_first=True),
            "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORE),
        }
        for name in PIXELS:
            if own := [item[name] for item in items if name in item]:
                batch[name] = torch.cat(own)
        shifted = torch.nn.functional.pad(batch["labels"], (0, 1), value=IGNORE)[:, 1:]
        keep = (shifted != IGNORE).any(0).nonzero()[:, 0]
        batch |= {"logits_to_keep": keep, "shift_labels": shifted[:, keep], "use_cache": False}
        visits = [key_visits(torch.isin(one, self.sparse), self.text) for one in ids]
        batch["stats"] = {
            "tokens": sum(map(len, ids)),
            "attended": sum(attended for attended, _ in visits),
            "dense": sum(dense for _, dense in visits),
            "notes": [note for item in items for note in item["notes"]],
        }
        return batch


def key_visits(vision, config):
    """Keys that one conversation's queries visit: (in the three branches and by text, if dense).

    vision: bool per token. A key in several branches counts once in each.
    """
    dense = torch.arange(1, len(vision) + 1)
    sparse = count_visits(
        torch.arange(int(vision.sum())),
        block_size=config.nsa_block_size,
        num_selected=config.nsa_num_selected_blocks,
        window_size=config.nsa_window_size,
    )
    return int(sparse.sum() + dense[~vision].sum()), int(dense.sum())
