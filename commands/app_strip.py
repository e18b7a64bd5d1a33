"""The film strip of app.py's page: what an answer read, and what one moment looked back at.

A column stands for a moment of the video: above its picture a bar, how much of its reading the
answer did there; in the picture, not faded, the patches of the blocks that the chosen moment
selected. Columns are steps (two frames that share their tokens), or several of a long video.
"""

import base64
import html
import io
import json

import numpy as np
from PIL import Image

from commands.attention_view import STANDS_OUT, View
from video_plan_videonsa import describe_clock

COLUMNS = 24  # at most
ROUNDED = 0.006  # seconds, that a moment chosen on the page may lie before its step
FADED = 0.75  # how much white lies over a patch that nothing selected


class Strip:
    """The steps of the last video of a view, and the columns that show them.

    steps: their numbers in the record.  begin, end: float64 [steps], seconds.
    columns: the places in `steps` that each column stands for.
    """

    def __init__(self, view: View):
        self.view, layout = view, view.record.layout
        is_last = layout.medium == layout.medium[~np.isnan(layout.seconds[:, 0])].max()
        self.steps = np.flatnonzero(is_last)
        self.begin, self.end = layout.seconds[self.steps].T
        self.columns = np.array_split(np.arange(len(self.steps)), min(COLUMNS, len(self.steps)))

    def at(self, second: float) -> int:
        """The place of the step that is on screen at this second."""
        after = np.searchsorted(self.begin, second + ROUNDED)
        return int(np.clip(after - 1, 0, len(self.steps) - 1))

    def reads(self, word: int | None, layer: int | None) -> np.ndarray:
        """float64 [columns]: the share of the attention to all videos that went there.

        word, layer: numbers of one word of the answer and of one layer; all of them for None.
        """
        reads = self.view.reads()
        reads = reads if layer is None else reads[layer : layer + 1]
        reads = reads if word is None else reads[:, word : word + 1]
        reads = reads.mean((0, 1))[self.steps]
        return np.array([reads[column].sum() for column in self.columns])

    def selected(self, place: int, layer: int | None, group: int | None) -> list[np.ndarray]:
        """What the token in the middle of the step at this place selected of each step; of a long
        video neighbouring steps have one such token between them. Dense attention reads all."""
        record, layout = self.view.record, self.view.record.layout
        if not record.is_sparse:
            return [np.ones((layout.height[step], layout.width[step])) for step in self.steps]
        shares = record.selected_patches(
            record.bin_of_step[self.steps[place]], layer=layer, group=group
        )
        return [shares[step] for step in self.steps]


def film_strip(
    view: View, word: int | None, layer: int | None, group: int | None, second: float
) -> str:
    """HTML of the columns.

    word, layer, group: numbers of a word of the answer, a layer and a key/value head; all of them
    for None.  second: the moment whose choices are shown.
    """
    strip = Strip(view)
    place = strip.at(second)
    selected, reads = strip.selected(place, layer, group), strip.reads(word, layer)
    columns = []
    for column, share in zip(strip.columns, reads, strict=True):
        asks = place in column
        shown = place if asks else max(column, key=lambda step: selected[step].sum())
        picture = fade(view.pictures[strip.steps[shown]], selected[shown])
        begin, end = strip.begin[column[0]], strip.end[column[-1]]
        title = f"{span(begin, end)}: {share:.0%} of what was read"
        columns.append(
            f'<button class="moment{" asking" * asks}" data-from="{begin:.3f}" title="{title}">'
            f'<span class="read"><b>{share:.0%}</b>'
            f'<i style="height:{100 * share / max(reads):.0f}%"></i></span>'
            f'<img alt="{title}" src="{data_address(picture)}">'
            f"<span>{clock(begin)}</span></button>"
        )
    begins = json.dumps(strip.begin.round(2).tolist())
    return f'<div class="strip" data-begins="{begins}">{"".join(columns)}</div>'


def summary(view: View, word: int | None, layer: int | None) -> str:
    """HTML that says in a line which moment the answer, or a word of it, was read from."""
    strip = Strip(view)
    reads = strip.reads(word, layer)
    most = int(reads.argmax())
    column = strip.columns[most]
    even = len(column) / view.record.layout.num_steps
    text = html.escape(view.answer if word is None else view.words[word].strip())
    where = span(strip.begin[column[0]], strip.end[column[-1]])
    shares = f"{reads[most]:.0%} of its reading; an even reading: {even:.0%}"
    if reads[most] < STANDS_OUT * even:
        return (
            f"<p class='summary'>No moment stands out: <b>“{text}”</b> was read most at {where} "
            f"({shares}).</p>"
        )
    return f"<p class='summary'><b>“{text}”</b> was read most at <b>{where}</b> ({shares}).</p>"


def span(begin, end):
    begin, end = clock(begin), clock(end)
    return f"{begin.removesuffix(' s') if end.endswith(' s') else begin} to {end}"


def clock(seconds):
    """As "2.8 s", from a minute on "01:07", from an hour on "1:00:07"."""
    return (
        f"{round(seconds, 1):g} s" if seconds < 60 else describe_clock(seconds).removeprefix("0:")
    )


def fade(picture: Image.Image, share: np.ndarray) -> Image.Image:
    """A picture whose patches fade that are not selected; share [rows, columns] of its tokens: 1
    leaves a patch as it is, 0 fades it most."""
    mask = Image.fromarray(share.astype(np.float32)).resize(picture.size, Image.Resampling.NEAREST)
    cover = FADED * (1 - np.asarray(mask)[..., None])
    pixels = np.asarray(picture) * (1 - cover) + 255 * cover
    return Image.fromarray(pixels.round().astype(np.uint8))


def data_address(picture: Image.Image) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, "WEBP", quality=85)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()
