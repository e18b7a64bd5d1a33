"""An answer with what was attended to while it was made, and small pictures of what was seen.

    conversation = WatchedConversation(processor, load_model, forecast_memory, ...)
    view = conversation.view(["clip.mp4"], "What happens?")
    view.save("folder")

attention_pictures.py draws a `View`, attention_page.py makes a page of it.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from commands.attention_frames import SeenPixels
from commands.attention_layout import locate_vision
from commands.attention_record import AttentionRecord
from commands.attention_watch import AttentionWatch
from commands.conversation import Conversation, media_of

MOST_FOR_SINKS = 16384  # vision tokens; looking for sinks takes a time that grows with the square
STANDS_OUT = 2.0  # times what an even reading would give


@dataclass
class View:
    """What a question was answered from.

    words: the text of each token of the answer, as `record.answer_reads` counts them.
    question_words: the text of each token of the record's `num_question_rows`; "" for a control
        token.
    media: names of the videos and images, as the layout's `medium` counts them.
    record: what was attended to.
    pictures: a small one of each step.
    """

    question: str
    answer: str
    words: list[str]
    question_words: list[str]
    media: list[str]
    record: AttentionRecord
    pictures: list[Image.Image]

    def reads(self) -> np.ndarray:
        """float64 [Y, words, steps]: of the attention that each token of the answer paid to images
        and videos, the share of each step; mean over heads."""
        return _shares(self.record.answer_reads()[:, : len(self.words)])

    def question_reads(self) -> tuple[list[str], np.ndarray]:
        """The words of the question that are no control tokens, and the same of those."""
        rows = [row for row, word in enumerate(self.question_words) if word.strip()]
        words = [self.question_words[row] for row in rows]
        return words, _shares(self.record.text_attention[:, rows])

    def most_read(self) -> tuple[int, float]:
        """The step that the answer read most, over all layers and words, and its share."""
        reads = self.reads().mean((0, 1))
        return int(reads.argmax()), float(reads.max())

    def stands_out(self) -> bool:
        """Whether the answer read that step far more than an even reading would."""
        return self.most_read()[1] >= STANDS_OUT / self.record.layout.num_steps

    def verdict(self) -> str:
        """A sentence on where the answer was read from."""
        (step, share), even = self.most_read(), 1 / self.record.layout.num_steps
        shares = f"{share:.0%} of its attention to images and videos; an even reading: {even:.0%}"
        if not self.stands_out():
            return f"No moment stands out: the answer read most at {self.when(step)} ({shares})."
        return f"The answer was read most at {self.when(step)} ({shares})."

    def when(self, step: int) -> str:
        """Where a step is: "7 to 8 s" or "picture.png"; of one file in many with its name."""
        begin, end = self.record.layout.seconds[step]
        name = self.media[self.record.layout.medium[step]]
        if np.isnan(begin):
            return name
        return f"{begin:.4g} to {end:.4g} s" + (f" of {name}" if len(self.media) > 1 else "")

    def save(self, folder) -> None:
        """Writes attention.npz and attention.json (AttentionRecord) and answer.json."""
        self.record.save(folder)
        kept = ("question", "answer", "words", "question_words", "media")
        text = {name: getattr(self, name) for name in kept} | {"verdict": self.verdict()}
        text = json.dumps(text, indent=1, ensure_ascii=False)
        Path(folder, "answer.json").write_text(text + "\n", encoding="utf-8")


class WatchedConversation(Conversation):
    """A conversation of one question, answered while it is recorded what is attended to; turns of
    before (`earlier`) are read again with it.

    sinks: as for `AttentionWatch`; None looks for them in at most MOST_FOR_SINKS vision tokens, and
        says so where there are more.
    """

    sinks = False

    def view(self, files, question, report=print) -> View:
        """Answers a question about files as `ask` does.

        Raises ValueError where nothing can be recorded, besides what `ask` raises.
        """
        names = [Path(file).name for turn in self.earlier for file in turn[0]]
        names += [Path(file).name for file in files]
        self.ask(files, question, report)
        record, tokenizer = self.watch.record(), self.processor.tokenizer
        tokens = self.sequence[0, record.layout.length :].tolist()
        while len(tokens) > 1 and tokens[-1] in tokenizer.all_special_ids:
            tokens.pop()
        control = set(tokenizer.get_added_vocab().values())
        asked = self.sequence[0, record.text_positions[: record.num_question_rows]].tolist()
        return View(
            question=question,
            answer=tokenizer.decode(tokens, skip_special_tokens=True).strip(),
            words=[tokenizer.decode([token]) for token in tokens],
            question_words=[
                "" if token in control else tokenizer.decode([token]) for token in asked
            ],
            media=names,
            record=record,
            pictures=self.pictures(record.layout),
        )

    def plan(self, files, messages):
        messages, media = super().plan(files, messages)
        pair = self.processor.video_processor.temporal_patch_size
        videos = [part["video"] for part in media_of(messages) if part["type"] == "video"]
        self.seconds = [video.seconds[::pair] for video in videos]
        return messages, media

    def generate(self, inputs):
        if self.model is None:
            self.model = self.load_model()
        steps = [] if "video_grid_thw" not in inputs else inputs["video_grid_thw"][:, 0].tolist()
        # Others where a file was not as it was measured, and was planned again.
        seconds = self.seconds if [*map(len, self.seconds)] == steps else None
        layout = locate_vision(self.model.config, inputs, seconds)
        sinks, tokens = self.sinks, len(layout.packed)
        if sinks is None:
            sinks = tokens <= MOST_FOR_SINKS
            if not sinks:
                self.say(
                    f"notice: attention sinks are left out, because of {tokens:,} vision tokens; "
                    "--sinks looks for them all the same"
                )
        self.watch, self.seen = AttentionWatch(self.model, layout, sinks), {}
        for kind, pixels, processor in (
            ("image", "pixel_values", self.processor.image_processor),
            ("video", "pixel_values_videos", self.processor.video_processor),
        ):
            if inputs.get(pixels) is not None:
                grid = inputs[f"{kind}_grid_thw"]
                inputs[pixels] = self.seen[kind] = SeenPixels(inputs[pixels], grid, processor)
        with self.watch:
            return super().generate(inputs)

    def pictures(self, layout):
        """The pictures of all steps, in their order."""
        kinds = {kind: iter(seen.pictures) for kind, seen in self.seen.items()}
        of_image = np.isnan(layout.seconds[:, 0])
        return [next(kinds["image" if image else "video"]) for image in of_image]


def _shares(attention):
    """[..., steps + 1] of a record to float64 [..., steps], which adds up to 1 without the text."""
    reads = attention[..., :-1].astype(np.float64)
    return reads / np.maximum(reads.sum(-1, keepdims=True), 1e-12)
