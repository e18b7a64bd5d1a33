"""Draws what a `View` holds, with matplotlib: one function a picture, each returns a Figure.

Moments are drawn at their seconds: a column is as wide as its step lasts. Images, which stand at no
second, are drawn side by side. A video of many steps shows as many of its frames as there is room
for, and all of its numbers.
"""

from typing import NamedTuple

import numpy as np
from PIL import Image

from commands.attention_sinks import SINK_BRANCHES
from commands.attention_view import View
from nsa_rules import BRANCHES

try:
    import matplotlib
    from matplotlib.figure import Figure
except ImportError as error:
    raise ImportError(
        "matplotlib is needed to draw pictures: pip install matplotlib -c constraints.txt"
    ) from error

matplotlib.rcParams["font.size"] = 9
INK, FAINT, ACCENT = "#1f2328", "#dfe3e8", "#c8641c"
COLOURS = dict(zip(BRANCHES, ("#2f6fb7", "#c8641c", "#2f8f5b"), strict=True))
LIT = np.array([255, 140, 0])  # over selected patches
COVER = 0.6  # how much of a patch it covers where every layer and head group selected it
MOST_FRAMES = 16  # side by side
MOST_WORDS = 24  # of the question, its last, and of the answer, its first
MOST_ROWS = 4  # moments whose selections are drawn


class Strip(NamedTuple):
    """Steps that are drawn in a row: those of a video, or all images.

    steps: their numbers.  edges: where they begin and end on the axis, one more than steps.
    """

    title: str
    steps: np.ndarray
    edges: np.ndarray
    axis: str

    @property
    def shown(self) -> list[np.ndarray]:
        """Places of neighbouring steps that share a picture, as evenly as it goes."""
        return np.array_split(np.arange(len(self.steps)), min(MOST_FRAMES, len(self.steps)))


def strips(view: View) -> list[Strip]:
    """One for each video, in their order, and one for all images."""
    layout, found = view.record.layout, []
    is_image = np.isnan(layout.seconds[:, 0])
    for medium, name in enumerate(view.media):
        steps = np.flatnonzero((layout.medium == medium) & ~is_image)
        if len(steps):
            begin, end = layout.seconds[steps].T
            found.append(Strip(name, steps, np.append(begin, end[-1]), "seconds"))
    if is_image.any():
        steps = np.flatnonzero(is_image)
        found.append(Strip("images", steps, np.arange(len(steps) + 1.0), "image"))
    return found


def draw_timeline(view: View, strip: Strip) -> Figure:
    """The frames of a strip over what the answer read of them, and how often they were selected."""
    record = view.record
    words, asked = view.question_reads()
    words, asked = words[-MOST_WORDS:], asked[:, -MOST_WORDS:]
    answer = view.reads()[:, :MOST_WORDS]
    picture = view.pictures[strip.steps[0]]
    rows = {"frames": 0.2 + min(9.1 / len(strip.shown) * picture.height / picture.width, 2.5)}
    rows |= {"answer": 1.6, "layers": 0.9}
    rows["words"] = 0.5 + 0.16 * (len(words) + answer.shape[1])
    if record.is_sparse:
        rows |= {"selected": 1.1, "choices": 1.0, "gates": 1.1}
    figure = Figure(figsize=(10, sum(rows.values()) + 1), layout="constrained")
    axes = figure.subplots(len(rows), sharex=True, height_ratios=[*rows.values()])
    axes = dict(zip(rows, axes, strict=True))
    most = view.most_read()[0] if view.stands_out() else None
    _draw_frames(view, strip, axes["frames"], most)

    reads = view.reads()[..., strip.steps]  # [Y, words, steps]
    ours = [INK if step != most else ACCENT for step in strip.steps]
    width = np.diff(strip.edges)
    axes["answer"].bar(strip.edges[:-1], 100 * reads.mean((0, 1)), width, align="edge", color=ours)
    even = 100 / record.layout.num_steps
    axes["answer"].axhline(even, color=INK, linewidth=0.8, linestyle=":")
    axes["answer"].set_title("What the answer read, % of its attention to images and videos")
    axes["answer"].tick_params(labelbottom=True)
    axes["answer"].text(strip.edges[-1], even, " even", va="center", fontsize=7)
    _heat(axes["layers"], strip.edges, reads.mean(1), "The same by layer")
    layers = np.unique(np.linspace(0, len(reads) - 1, min(len(reads), 4)).round().astype(int))
    axes["layers"].set_yticks(layers + 0.5, layers)
    axes["layers"].set_ylabel("layer")
    tokens = np.concatenate([asked, answer], 1).mean(0)[..., strip.steps]
    _heat(axes["words"], strip.edges, tokens, "Each token, of the question and of the answer")
    labels = [_printable(word) for word in [*words, *view.words[:MOST_WORDS]]]
    axes["words"].set_yticks(np.arange(len(labels)) + 0.5, labels, fontsize=7)
    axes["words"].axhline(len(words), color=ACCENT)
    if record.is_sparse:
        _draw_selected(record, strip, axes["selected"])
        _draw_choices(record, strip, axes["choices"])
        _draw_gates_over_time(record, strip, axes["gates"])
    if strip.axis == "image":
        names = [view.when(step) for step in strip.steps]
        axes["answer"].set_xticks(strip.edges[:-1] + 0.5, names)
    axes[list(axes)[-1]].set_xlabel(strip.axis)
    figure.suptitle(f"{strip.title}   “{view.question}”   {view.answer}", fontsize=11)
    return figure


def _draw_frames(view, strip, axis, most):
    for places in strip.shown:
        steps = strip.steps[places]
        step = most if most in steps else steps[0]
        left, right = strip.edges[places[0]], strip.edges[places[-1] + 1]
        axis.imshow(
            view.pictures[step], extent=(left, right, 0, 1), aspect="auto", interpolation="nearest"
        )
        if step == most:
            frame = {"fill": False, "edgecolor": ACCENT, "linewidth": 4}
            axis.add_patch(matplotlib.patches.Rectangle((left, 0), right - left, 1, **frame))
    axis.set(xlim=(strip.edges[0], strip.edges[-1]), ylim=(0, 1), yticks=[])
    axis.set_title(
        "What the model saw" + (" (framed: read most by the answer)" if most is not None else "")
    )


def _draw_selected(record, strip, axis):
    rates = record.selection_rates()[..., strip.steps].reshape(-1, len(strip.steps))
    known = ~np.isnan(rates).all(0)
    mean = np.full(rates.shape[1], np.nan)
    mean[known] = np.nanmean(rates[:, known], 0)
    axis.stairs(100 * mean, strip.edges, baseline=None, color=COLOURS["selected"], linewidth=1.5)
    low, high = (np.where(known, 100 * np.nan_to_num(x), 0) for x in (rates.min(0), rates.max(0)))
    axis.bar(
        strip.edges[:-1],
        high - low,
        np.diff(strip.edges),
        low,
        align="edge",
        color=COLOURS["selected"],
        alpha=0.2,
    )
    axis.set_ylim(0, 105)
    axis.set_title(
        "How often later frames selected it, % of those that could (band: layers and head groups)"
    )


def _draw_choices(record, strip, axis):
    rates = record.selection_rates()[..., strip.steps]
    layers, groups, _ = rates.shape
    _heat(axis, strip.edges, rates.reshape(layers * groups, -1), "The same by layer and head group")
    shown = np.unique(np.linspace(0, layers - 1, min(layers, 4)).round().astype(int))
    axis.set_yticks((shown + 0.5) * groups, shown)
    axis.set_ylabel("layer")


def _draw_gates_over_time(record, strip, axis):
    places = record.bin_of_step[strip.steps]
    for branch, name in enumerate(BRANCHES):
        gates = record.gate_means[:, branch].mean((0, 1))[places]
        axis.stairs(
            gates, strip.edges, baseline=None, color=COLOURS[name], label=name, linewidth=1.5
        )
    axis.set_ylim(0, 1)
    axis.legend(ncols=3, loc="upper right", fontsize=7)
    axis.set_title("Gates of the frame's own tokens, mean of layers and heads")


def draw_selections(view: View, strip: Strip, seconds: list[float] | None = None) -> Figure:
    """The frames, a row for each moment, with the patches lit that this moment's token selected.

    seconds: the moments; by default a few that are spread over the strip. The brighter a patch, the
    more layers and head groups selected its block.
    """
    record = view.record
    tokens = moments(view, strip, seconds)
    shown = strip.shown
    height = 10 / len(shown) * view.pictures[strip.steps[0]].height
    height = 0.8 + len(tokens) * (height / view.pictures[strip.steps[0]].width + 0.1)
    figure = Figure(figsize=(10, height), layout="constrained")
    axes = figure.subplots(len(tokens), len(shown), squeeze=False)
    for row, place in zip(axes, tokens, strict=True):
        lit = lit_pictures(view, place)
        own = record.layout.packed_steps[record.chosen_tokens[place]]
        for axis, places in zip(row, shown, strict=True):
            steps = strip.steps[places]
            step = own if own in steps else steps[0]
            axis.imshow(lit[step], interpolation="nearest")
            axis.set(xticks=[], yticks=[])
            for spine in axis.spines.values():
                spine.set(edgecolor=ACCENT if step == own else FAINT, linewidth=3)
        row[0].set_ylabel(view.when(own).split(" to ")[0] + (" s" * (strip.axis == "seconds")))
    for axis, places in zip(axes[-1], shown, strict=True):
        axis.set_xlabel(f"{strip.edges[places[0]]:.4g}")
    figure.suptitle(
        f"{strip.title}: the blocks (lit) that the framed moment's middle token selected"
    )
    return figure


def moments(view: View, strip: Strip, seconds: list[float] | None = None) -> list[int]:
    """Numbers of the record's bins whose token lies in the strip, at these seconds, or spread."""
    record = view.record
    bins = np.unique(record.bin_of_step[strip.steps])
    bins = bins[record.chosen_tokens[bins] >= 0]
    if seconds is None:
        places = np.linspace(0, len(bins) - 1, min(MOST_ROWS, len(bins)))
        return bins[np.unique(places.round().astype(int))].tolist()
    outside = [s for s in seconds if not strip.edges[0] <= s <= strip.edges[-1]]
    if outside:
        raise ValueError(
            f"second {outside[0]:g} is not in {strip.title}, which was seen from "
            f"{strip.edges[0]:g} to {strip.edges[-1]:g} s."
        )
    steps = np.searchsorted(strip.edges, seconds, side="right") - 1
    steps = strip.steps[steps.clip(0, len(strip.steps) - 1)]
    return record.bin_of_step[steps].tolist()


def lit_pictures(
    view: View, place: int, layer: int | None = None, group: int | None = None
) -> list[np.ndarray]:
    """The pictures of all steps, uint8 [height, width, 3], with the patches lit that lie in blocks
    which the token of bin `place` selected, in this layer and key/value head or in all of them."""
    shares = view.record.selected_patches(place, layer, group)
    return [light(x, share) for x, share in zip(view.pictures, shares, strict=True)]


def light(picture: Image.Image, share: np.ndarray) -> np.ndarray:
    """A picture with its patches coloured; share [rows, columns] of tokens, 0 to 1."""
    mask = Image.fromarray(share.astype(np.float32)).resize(picture.size, Image.Resampling.NEAREST)
    cover = COVER * np.asarray(mask)[..., None]
    pixels = np.asarray(picture) * (1 - cover) + LIT * cover
    return pixels.round().astype(np.uint8)


def draw_gates(view: View) -> Figure:
    """Mean and spread of the gates by layer and branch."""
    means, spread = view.record.gate_statistics()
    figure = Figure(figsize=(10, 2.8), layout="constrained")
    axes = figure.subplots(1, 3, sharey=True)
    layers = np.arange(len(means))
    for branch, (axis, name) in enumerate(zip(axes, BRANCHES, strict=True)):
        axis.bar(layers, means[:, branch], yerr=spread[:, branch], color=COLOURS[name], capsize=2)
        axis.set(title=name, xlabel="layer", ylim=(0, 1.05))
        axis.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(integer=True))
    axes[0].set_ylabel("gate")
    figure.suptitle("Gates: mean over heads and vision tokens, with one standard deviation")
    return figure


def draw_heads(view: View) -> Figure:
    """How alike heads are: correlations of gates in three layers, and choices in common."""
    record = view.record
    layers = sorted({0, len(record.selections) // 2, len(record.selections) - 1})
    figure = Figure(figsize=(10, 0.9 + 2.3 * len(layers)), layout="constrained")
    axes = figure.subplots(len(layers), 4, squeeze=False)
    for row, layer in zip(axes, layers, strict=True):
        for branch, (axis, name) in enumerate(zip(row, BRANCHES, strict=False)):
            shown = axis.imshow(
                record.gate_correlations[layer, branch], vmin=-1, vmax=1, cmap="RdBu_r"
            )
            axis.set(title=f"gates, {name}", xticks=[], yticks=[])
        shared = row[3].imshow(record.overlaps()[layer], vmin=0, vmax=1, cmap="viridis")
        row[3].set(title="choices in common", xticks=[], yticks=[])
        row[0].set_ylabel(f"layer {layer}")
    figure.colorbar(shown, ax=axes[:, :3], shrink=0.6, label="correlation of heads")
    figure.colorbar(shared, ax=axes[:, 3], shrink=0.6, label="of the row's blocks")
    figure.suptitle("How alike the heads are; right: key/value heads")
    return figure


def draw_sinks(view: View) -> Figure:
    """Attention sinks by branch and layer, and where they stand."""
    record = view.record
    figure = Figure(figsize=(10, 2.8), layout="constrained")
    by_layer, by_step = figure.subplots(1, 2)
    ratios = 100 * record.sink_ratios.mean(2)  # [Y, 5]
    for branch, name in enumerate(SINK_BRANCHES):
        colour = COLOURS.get(name, INK if name == "dense" else "#8250df")
        line = ":" if name == "dense" else "-"
        style = {"color": colour, "linestyle": line, "label": name}
        by_layer.plot(ratios[:, branch], marker="o", markersize=3, **style)
        by_step.plot(record.sink_counts[:, branch].sum(0), **style)
    by_layer.set(title="% of a head's keys that are sinks", xlabel="layer", ylim=(0, None))
    by_layer.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(integer=True))
    by_step.set(title="sinks of all layers and heads", xlabel="step", ylim=(0, None))
    by_layer.legend(fontsize=7)
    return figure


def _printable(word):
    return repr(word.strip() or word)[1:-1]


def _heat(axis, edges, values, title):
    """values [rows, steps] over the seconds, the first row on top."""
    rows = np.arange(len(values) + 1)
    most = np.nanmax(values, initial=1e-9)
    axis.pcolormesh(edges, rows, values, cmap="Greys", vmin=0, vmax=most)
    axis.invert_yaxis()
    axis.set_title(title)
