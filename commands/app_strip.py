"""The film strip of app.py's page: what an answer read, and what one moment looked back at.

A column stands for a moment of the video: above its picture a bar, how much of its reading the
answer did there; in the picture, not faded, the patches of the blocks that the chosen moment
selected. Columns are steps (two frames that share their tokens), or several of a long video.
"""

import base64
import html
import io

import numpy as np
from PIL import Image

from commands.app_answers import Answer

COLUMNS = 32  # at most
FADED = 0.75  # how much white lies over a patch that nothing selected


class Moments:
    """The steps of the last video of an answer, in order, by number of the record's steps."""

    def __init__(self, answer: Answer):
        self.answer, self.record = answer, answer.record
        layout = self.record.layout
        self.steps = np.flatnonzero(layout.medium == layout.medium.max())
        self.begin, self.end = layout.seconds[self.steps].T
        self.length = float(self.end[0] - self.begin[0])  # seconds, of the first one

    def at(self, second: float) -> int:
        """The place of the step that is on screen at this second."""
        return int(np.clip(np.searchsorted(self.begin, second + 1e-6) - 1, 0, len(self.steps) - 1))

    def reads(self, word: int | None, layer: int | None) -> np.ndarray:
        """float64 [steps]: the share of what was read in the video, for one word or all of them.

        layer: the mean of all for None. Heads are averaged. Adds up to 1.
        """
        reads = self.record.answer_reads()[:, : len(self.answer.words)]
        reads = reads if layer is None else reads[layer : layer + 1]
        reads = reads if word is None else reads[:, word : word + 1]
        reads = reads[..., self.steps].mean((0, 1), dtype=np.float64)
        return reads / max(reads.sum(), 1e-12)

    def selected(self, place: int, layer: int | None, group: int | None) -> list[np.ndarray]:
        """For each step float64 [height, width]: of the layers and head groups, the share that
        selected a token's block, for the token in the middle of the step at this place.

        In a long video neighbouring steps have one such token between them.
        """
        record, layout = self.record, self.record.layout
        bin_ = record.bin_of_step[self.steps[place]]
        query = record.chosen_tokens[bin_]
        blocks = record.chosen_blocks[:, :, bin_]  # [Y, K, S]
        blocks = blocks if layer is None else blocks[layer : layer + 1]
        blocks = blocks if group is None else blocks[:, group : group + 1]
        size = record.settings["block_size"]
        counts = np.bincount(blocks[blocks >= 0], minlength=-(-len(layout.packed) // size))
        of_packed = np.repeat(counts / (blocks.shape[0] * blocks.shape[1]), size)
        of_token = np.zeros(layout.length)
        of_token[layout.packed[: query + 1]] = of_packed[: query + 1]
        shapes = zip(layout.first_token, layout.height, layout.width, strict=True)
        grids = [of_token[first : first + h * w].reshape(h, w) for first, h, w in shapes]
        return [grids[step] for step in self.steps]


def film_strip(
    answer: Answer, word: int | None, layer: int | None, group: int | None, second: float
) -> str:
    """HTML of the columns. word, layer, group: numbers from 0, None for all; second: whose choices
    are shown."""
    moments = Moments(answer)
    reads, place = moments.reads(word, layer), moments.at(second)
    grids = moments.selected(place, layer, group)
    groups = np.array_split(np.arange(len(reads)), min(COLUMNS, len(reads)))
    sums = [reads[own].sum() for own in groups]
    most = max(sums)
    columns = []
    for own, share in zip(groups, sums, strict=True):
        shown = place if place in own else own[np.argmax([grids[step].sum() for step in own])]
        picture = light(answer.pictures[moments.steps[shown]], grids[shown])
        begin, end = moments.begin[own[0]], moments.end[own[-1]]
        kind = "moment asking" if place in own else "moment"
        title = f"{span(begin, end)}: {share:.0%} of what was read"
        columns.append(
            f'<button class="{kind}" data-from="{begin:.3f}" title="{title}">'
            f'<span class="read"><b>{share:.0%}</b>'
            f'<i style="height:{100 * share / most:.0f}%"></i></span>'
            f'<img alt="{title}" src="{data_address(picture)}">'
            f"<span>{moments.begin[own[0]]:.4g} s</span></button>"
        )
    return f'<div class="strip">{"".join(columns)}</div>'


def summary(answer: Answer, word: int | None, layer: int | None) -> str:
    """HTML that says in a line which moment the answer was read from."""
    moments = Moments(answer)
    reads = moments.reads(word, layer)
    most = int(reads.argmax())
    text = answer.text if word is None else answer.words[word].strip()
    where = span(moments.begin[most], moments.end[most])
    return (
        f"<p class='summary'><b>“{html.escape(text)}”</b> was read mostly at "
        f"<b>{where}</b>: {reads[most]:.0%} of its reading in the video, "
        f"where an even reading would give {1 / len(reads):.0%}.</p>"
    )


def span(begin, end):
    return f"{begin:.4g} to {end:.4g} s"


def light(picture: Image.Image, grid: np.ndarray) -> Image.Image:
    """A picture in which patches fade that are not selected; grid [rows, columns] of its tokens:
    1 leaves a patch as it is, 0 fades it most."""
    mask = Image.fromarray(grid.astype(np.float32)).resize(picture.size, Image.Resampling.NEAREST)
    cover = FADED * (1 - np.asarray(mask)[..., None])
    pixels = np.asarray(picture) * (1 - cover) + 255 * cover
    return Image.fromarray(pixels.round().astype(np.uint8))


def data_address(picture: Image.Image) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, "WEBP", quality=85)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()
