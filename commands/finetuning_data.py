"""Conversations as finetune.py trains on them: token ids with labels, pixels, and batches.

A row is rendered and tokenised once, each medium one placeholder. Its videos are planned within the
token budget and read as planned, and each placeholder becomes as many tokens as its plan says.
"""

import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from commands.finetuning_rows import (
    MEDIA,
    SHOWN_LAYOUTS,
    RefusedRow,
    all_parts,
    parse_row,
    set_videos,
    to_messages,
    unread_keys,
)
from commands.finetuning_sets import read_set, split_share
from commands.questions import questions_of
from nsa_rules import count_visits

IGNORE = -100
REPORT = "data_report.jsonl"
MARK = "\ufdd0"  # a noncharacter, which no text should hold: answers are rendered between two
PIXELS = (
    "pixel_values",
    "image_grid_thw",
    "pixel_values_videos",
    "video_grid_thw",
    "second_per_grid_ts",
)


@dataclass
class Prepared:
    """A conversation before its videos are read.

    messages: with its videos planned and its images loaded.
    ids: of the text, each medium still one placeholder.  labelled: bool per id.
    media: (kind, tokens that it becomes) of each placeholder, in their order.
    stamp_tokens: those of the videos' timestamps, beside them.
    note: what was given up for the token budget, if anything.
    """

    messages: list
    ids: torch.Tensor
    labelled: torch.Tensor
    media: list[tuple[str, int]]
    stamp_tokens: int = 0
    note: str = ""

    @property
    def vision_tokens(self):
        return sum(tokens for _, tokens in self.media)

    @property
    def tokens(self):
        return len(self.ids) - len(self.media) + self.vision_tokens + self.stamp_tokens


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
        if empty := [name for name, one in zip(self.names, self.sets, strict=True) if not one[2]]:
            raise ValueError(f"there are no rows in {', '.join(empty)}.")
        tokenizer = self.processor.tokenizer
        tokens = (self.processor.image_token, self.processor.video_token)
        self.placeholders = torch.tensor(tokenizer.convert_tokens_to_ids(list(tokens)))
        self.before_answer, self.after_answer = self._answer_frame()

    def _answer_frame(self):
        """What the chat template writes from its prompt for an answer to it, and what ends it.

        Both are learned with the answer; in Qwen's template they are "" and "<|im_end|>".
        """
        render = self.processor.apply_chat_template
        question = {"role": "user", "content": [{"type": "text", "text": "?"}]}
        answer = {"role": "assistant", "content": [{"type": "text", "text": MARK}]}
        prompt = render([question], tokenize=False, add_generation_prompt=True)
        before, mark, after = render([question, answer], tokenize=False).partition(MARK)
        if not mark or not before.startswith(prompt):
            raise ValueError(
                f"the chat template prompts for an answer by {prompt!r}, but writes a conversation "
                f"with an answer as {before + mark + after!r}: what is learned would not be what "
                "is asked for. Give the processor a template that goes on from its prompt."
            )
        return before.removeprefix(prompt), after.rstrip()

    def __len__(self):
        return len(self.places)

    def __getitem__(self, index):
        return self._first_usable(index, self.encode)

    def kinds_of_media(self) -> int:
        """How many of images and videos the data sets have: 0, 1 or 2."""
        kinds = set()
        for rows, _, _ in self.sets:
            for row in rows:
                try:
                    kinds |= {part["type"] for part in all_parts(parse_row(row))} & set(MEDIA)
                except Exception:  # as where rows are read: it is skipped
                    continue
                if len(kinds) == len(MEDIA):
                    return len(kinds)
        return len(kinds)

    def unread_keys(self) -> list[str]:
        """Keys of the rows that nothing reads: notes, or something that people miss."""
        found = set()
        for rows, _, _ in self.sets:
            if hasattr(rows, "column_names"):  # a table, whose rows may hold whole files
                rows = [dict.fromkeys(rows.column_names, True)]
            found.update(*(unread_keys(row) for row in rows if isinstance(row, dict)))
        return sorted(found)

    def measured(self, index) -> dict:
        """The lengths of an item, without reading more of its videos than one frame.

        Of one that cannot be used only the "notes", and whether the row was "refused" for its form.
        """
        return self._first_usable(index, self.measure, tries=1)

    def questions(self, index) -> list[tuple[list, str]]:
        """(messages of the prompt, right answer) of an item; none where it cannot be used."""
        item = self._first_usable(
            index, lambda prepared: {"questions": questions_of(prepared.messages)}, tries=1
        )
        return item.get("questions", [])

    def _first_usable(self, index, make, tries=MOST_TRIES):
        notes, refused = [], False
        for step in range(min(tries, len(self))):
            number, row = self.places[(index + step) % len(self)]
            rows, folder, _ = self.sets[number]
            place = f"{split_share(self.names[number])[0]}:{row + 1}"
            try:
                prepared = self.prepare(to_messages(rows[row], self.root or folder))
                item = make(prepared)
            except RefusedRow as error:
                notes.append(("skipped", place, error.reason))
                refused = True
                continue
            except Exception as error:  # whatever a damaged file makes a decoder raise
                notes.append(("skipped", place, f"{type(error).__name__}: {error}"[:500]))
                continue
            if prepared.note:
                notes.append(("shortened", place, prepared.note))
            return {**item, "notes": notes}
        if tries == 1:
            return {"notes": notes, "refused": refused}
        raise RuntimeError(
            f"{len(notes)} rows in a row cannot be used. Check the data and --data_root. "
            f"The last one, {notes[-1][1]}: {notes[-1][2]}" + f"\n{SHOWN_LAYOUTS}" * refused
        )

    def prepare(self, messages) -> Prepared:
        """Plans a conversation's videos within the token budget."""
        set_videos(messages, self.settings)
        ids, labelled = self.labelled_text(messages)
        kinds = [part["type"] for part in all_parts(messages) if part["type"] in MEDIA]
        if int(torch.isin(ids, self.placeholders).sum()) != len(kinds):
            raise ValueError("the text itself contains a placeholder of an image or video")
        planned, plans = self.processor.plan_videos(messages)
        image_tokens = self._load_images(planned)
        note, fixed = "", len(ids) - len(kinds) + sum(image_tokens)
        stamps, vision = self._stamp_tokens(planned), sum(plan.tokens for plan in plans)
        total = fixed + stamps + vision
        if self.max_tokens is not None and total > self.max_tokens:
            over = f"{total:,} tokens, over the limit of {self.max_tokens:,}"
            room = (self.max_tokens - fixed) * vision // max(stamps + vision, 1)
            if not plans or room <= 0:
                raise ValueError(f"{over}, and there is no video to shorten")
            try:
                planned, plans = self.processor.plan_videos(planned, max_tokens=room)
            except ValueError as error:
                raise ValueError(f"{over}: {error}") from error
            stamps = self._stamp_tokens(planned)
            note = f"{over}: " + "; ".join(plan.describe() for plan in plans)
        sizes = {"image": iter(image_tokens), "video": iter(plan.tokens for plan in plans)}
        media = [(kind, next(sizes[kind])) for kind in kinds]
        return Prepared(planned, ids, labelled, media, stamps, note)

    def _stamp_tokens(self, messages):
        videos = [part["video"] for part in all_parts(messages) if part["type"] == "video"]
        return sum(map(self.processor.count_stamp_tokens, videos))

    def _load_images(self, messages):
        """Loads the images of the messages, in place; returns the tokens of each."""
        images = self.processor.image_processor
        tokens = []
        for part in all_parts(messages):
            if part["type"] == "image":
                image = part["image"] = self.processor.load_images(part["image"])
                patches = images.get_number_of_image_patches(image.height, image.width, {})
                tokens.append(patches // images.merge_size**2)
        return tokens

    def labelled_text(self, messages) -> tuple[torch.Tensor, torch.Tensor]:
        """(ids, bool per id): the text, and which tokens are an assistant's turn or end one.

        Answers are rendered between marks, which say where they are whatever else is in the text.
        """
        marked = []
        for message in messages:
            if message["role"] == "assistant":
                # The header ends in a new line, with which leading white space would merge.
                parts = [part["text"] for part in message["content"] if part["type"] == "text"]
                if not (answer := "".join(parts).strip()):
                    raise ValueError("an assistant's turn is empty")
                content = [{"type": "text", "text": f"{MARK}{answer}{MARK}"}]
                message = {**message, "content": content}
            marked.append(message)
        text = self.processor.apply_chat_template(marked, tokenize=False)
        # Text, answer, text, answer, ..., text.
        pieces = text.split(MARK)
        learned = [one.get("loss", True) for one in messages if one["role"] == "assistant"]
        if len(pieces) != 2 * len(learned) + 1:
            raise ValueError(f"the text holds U+{ord(MARK):X}, which is not a character: remove it")
        spans, end = [], 0
        for turn, is_learned in enumerate(learned):
            before, answer, after = pieces[2 * turn : 2 * turn + 3]
            if not (before.endswith(self.before_answer) and after.startswith(self.after_answer)):
                raise ValueError("the chat template wraps this answer differently from the others")
            start, end = end + len(before), end + len(before) + len(answer)
            if is_learned:
                spans.append((start - len(self.before_answer), end + len(self.after_answer)))
        encoded = self.processor.tokenizer("".join(pieces), return_offsets_mapping=True)
        starts, ends = torch.tensor(encoded["offset_mapping"]).T
        labelled = torch.zeros(len(starts), dtype=torch.bool)
        for start, end in spans:
            labelled |= (starts >= start) & (ends <= end) & (ends > starts)
        return torch.tensor(encoded["input_ids"]), labelled

    def measure(self, prepared) -> dict:
        return {
            "tokens": prepared.tokens,
            "vision_tokens": prepared.vision_tokens,
            "labels": int(prepared.labelled.sum()),
        }

    def encode(self, prepared) -> dict:
        """The model's inputs, a batch of one, and their labels."""
        item, written = {}, {}
        for kind in {kind for kind, _ in prepared.media}:
            given = [part[kind] for part in all_parts(prepared.messages) if part["type"] == kind]
            pixels = self.processor(
                **{f"{kind}s": given}, return_tensors="pt", return_metadata=True
            )
            item |= {name: torch.as_tensor(pixels[name]) for name in PIXELS if name in pixels}
            merged = self.processor.image_processor.merge_size**2
            made = (item[f"{kind}_grid_thw"].prod(-1) // merged).tolist()
            planned = [tokens for own, tokens in prepared.media if own == kind]
            if made != planned:
                raise ValueError(f"the {kind}s were planned as {planned} tokens, but became {made}")
            written[kind] = iter([self._written(kind, pixels, n) for n in range(len(made))])
        ids, labelled = self._with_media(prepared, written)
        return {"input_ids": ids, "labels": ids.masked_fill(~labelled, IGNORE), **item}

    def _written(self, kind, pixels, number):
        """The ids [tokens] that stand for an image or video in the text."""
        write = {"image": self.processor.replace_image_token}
        write["video"] = self.processor.replace_video_token
        text = write[kind](pixels, number)
        return torch.tensor(self.processor.tokenizer(text, verbose=False)["input_ids"])

    def _with_media(self, prepared, written):
        """(ids, bool per id) with each placeholder replaced by what is written for its medium."""
        ids, labelled, start = [], [], 0
        places = torch.isin(prepared.ids, self.placeholders).nonzero()[:, 0].tolist()
        for place, (kind, _) in zip(places, prepared.media, strict=True):
            medium = next(written[kind])
            ids += [prepared.ids[start:place], medium]
            labelled += [prepared.labelled[start:place], torch.zeros(len(medium), dtype=torch.bool)]
            start = place + 1
        ids, labelled = [*ids, prepared.ids[start:]], [*labelled, prepared.labelled[start:]]
        return torch.cat(ids), torch.cat(labelled)


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


def key_visits(vision: torch.Tensor, config) -> tuple[int, int]:
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


class DataReport:
    """data_report.jsonl: what happened to rows that were not taken whole, each once.

    All processes of a run append to the one file, and so does a run that is resumed.
    """

    SHOWN = 10

    def __init__(self, folder):
        self.path = Path(folder, REPORT)
        self.known = {line[:2] for line in self._read()}

    def _read(self):
        if not self.path.exists():
            return []
        lines = self.path.read_text(encoding="utf-8").splitlines()
        return [tuple(json.loads(line).values()) for line in lines]

    def add(self, notes) -> list[str]:
        """Appends the new ones of (what, row, why); returns what is to be shown of them."""
        shown = []
        for what, place, why in notes:
            if (what, place) in self.known:
                continue
            self.known.add((what, place))
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps({"what": what, "row": place, "why": why}) + "\n")
            if len(self.known) <= self.SHOWN:
                shown.append(f"{what} {place}: {why}")
        return shown

    def counts(self) -> Counter:
        """How many rows were "skipped" and "shortened", by all processes."""
        return Counter(what for what, _ in {line[:2] for line in self._read()})

    def clear(self):
        self.path.unlink(missing_ok=True)
        self.known = set()
