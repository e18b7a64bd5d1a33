"""Draw the pictures that README.md shows: docs/branches.png and docs/speed.png.

    python tools/draw_pictures.py

branches.png shows which keys one query reads in each of the three branches. speed.png plots the
times in the tables of docs/performance.md, which is the only place where they are typed; the file
keeps the plotted numbers in its description, so that a test notices when the tables have moved on.
"""

import json
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

DOCS = Path(__file__).resolve().parents[1] / "docs"

PAPER, INK, GREY, FAINT = "#ffffff", "#1f2328", "#6e7781", "#dfe3e8"
BLUE, ORANGE, GREEN = "#2f6fb7", "#c8641c", "#2f8f5b"
STYLE = {
    "font.size": 9.5,
    "figure.facecolor": PAPER,
    "axes.facecolor": PAPER,
    "axes.edgecolor": GREY,
    "text.color": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
}

# Rows of the tables in docs/performance.md: the label, colour and line that each is drawn with.
LAYER_ROWS = {
    "dense, SDPA flash": ("dense, flash attention 2", GREY, ":"),
    "dense, SDPA cuDNN": ("dense, cuDNN", INK, "--"),
    "VideoNSA, random choices": ("VideoNSA, random choices", BLUE, "-"),
    "VideoNSA, 18 neighbours share 75 %": ("VideoNSA, neighbours share 75 %", GREEN, "-"),
}
MODEL_ROWS = {
    "stock, prefill": ("Qwen2.5-VL", INK, "--"),
    "VideoNSA, prefill": ("VideoNSA", BLUE, "-"),
}


def read_table(page: str, rows) -> tuple[list[str], dict[str, list[str]]]:
    """The first table of a Markdown page with all these rows: (columns, cells of each row)."""
    for paragraph in page.split("\n\n"):
        lines = [line for line in paragraph.splitlines() if line.startswith("|")]
        cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
        table = {row[0]: row[1:] for row in cells}
        if all(name in table for name in rows):
            return cells[0][1:], {name: table[name] for name in rows}
    raise ValueError(f"docs/performance.md has no table with the rows {', '.join(rows)}.")


def read_times(page: str, rows) -> tuple[list[int], dict[str, list[float]]]:
    """Thousands of tokens of each column, and the first number of each cell of these rows."""
    columns, table = read_table(page, rows)
    thousands = [int(column.removesuffix("K")) for column in columns]
    return thousands, {n: [float(cell.split()[0]) for cell in row] for n, row in table.items()}


def plotted_numbers(page: str) -> str:
    """What speed.png shows, as the JSON that its description holds."""
    return json.dumps([read_times(page, LAYER_ROWS), read_times(page, MODEL_ROWS)])


def draw_speed(page: str):
    """Forward time of one attention layer, and time to the first token, against tokens."""
    figure, (layer, model) = plt.subplots(1, 2, figsize=(9.6, 3.7))
    plot_times(layer, page, LAYER_ROWS)
    layer.set_title("One attention layer of the 7B's size, forward", fontsize=10.5, loc="left")
    layer.set_ylabel("milliseconds")
    plot_times(model, page, MODEL_ROWS)
    model.set_title("Whole model of the 7B's size, to the first token", fontsize=10.5, loc="left")
    model.set_ylabel("seconds")
    note = "one H100 80 GB, bfloat16, random weights; docs/performance.md"
    figure.text(0.995, 0.012, note, color=GREY, fontsize=8, ha="right")
    figure.tight_layout(rect=(0, 0.03, 1, 1), w_pad=2.5)
    return figure


def plot_times(axes, page, rows):
    thousands, times = read_times(page, rows)
    for name, values in times.items():
        label, colour, line = rows[name]
        axes.plot(thousands, values, line, color=colour, label=label, marker="o", markersize=4)
        last = (thousands[-1], values[-1])
        offset = {"xytext": (6, 0), "textcoords": "offset points", "va": "center"}
        axes.annotate(f"{values[-1]:g}", last, color=colour, **offset)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(thousands, [f"{count}K" for count in thousands])
    axes.minorticks_off()
    axes.yaxis.set_major_formatter(matplotlib.ticker.FormatStrFormatter("%g"))
    axes.set_xlim(thousands[0] * 0.9, thousands[-1] * 1.45)
    axes.set_xlabel("tokens in the prompt")
    axes.grid(color=FAINT, linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8.5, loc="upper left")


def draw_branches():
    """One query over a stream of vision tokens, and the keys that it reads in each branch."""
    block, blocks, query, window, chosen = 4, 9, 33, 6, (1, 5, 8)
    figure, axes = plt.subplots(figsize=(9.6, 4.2))
    axes.set_axis_off()
    axes.set_xlim(-8.6, 51)
    axes.set_ylim(-1.4, 18.2)

    def left(token):
        return token + 0.6 * (token // block)

    def box(x, y, width, colour):
        shape = "round,pad=0,rounding_size=0.18"
        axes.add_patch(FancyBboxPatch((x + 0.1, y), width - 0.2, 1.3, shape, color=colour))

    def tokens(y, colour, is_read):
        for token in range(block * blocks):
            box(left(token), y, 1, colour if is_read(token) else FAINT)

    def arrow(start, end, colour):
        style = {"arrowstyle": "-|>", "mutation_scale": 9, "linewidth": 1.1}
        axes.add_patch(FancyArrowPatch(start, end, color=colour, **style))

    def label(y, title, below, colour):
        axes.text(-8.4, y + 1.25, title, color=colour, fontsize=10.5, weight="bold", va="center")
        axes.text(-8.4, y + 0.7, below, color=GREY, fontsize=8.5, va="top", linespacing=1.15)

    stream, compressed, selected, near = 15.2, 10.4, 5.6, 0.8
    label(stream, "vision tokens", "of the whole video", INK)
    tokens(stream, INK, lambda token: token == query)
    axes.text(left(query) + 0.5, stream + 1.9, "query", ha="center")
    axes.text(left(0) + 0.1, stream + 1.9, "one block", color=GREY, fontsize=8.5)

    label(compressed, "compressed", "means of the\ncomplete blocks", BLUE)
    for number in range(blocks):
        is_complete = (number + 1) * block - 1 <= query
        box(left(number * block), compressed, block, BLUE if is_complete else FAINT)

    label(selected, "selected", "its own block and\nthe best-scored", ORANGE)
    tokens(selected, ORANGE, lambda token: token // block in chosen and token <= query)
    for number in chosen[:-1]:
        middle = left(number * block) + block / 2
        arrow((middle, compressed - 0.2), (middle, selected + 1.5), ORANGE)
    note = "attention to a mean\nscores its block"
    middle = {"x": left(3 * block) + block / 2, "y": (compressed + selected + 1.3) / 2}
    axes.text(s=note, **middle, color=ORANGE, fontsize=8.5, ha="center", va="center")

    label(near, "window", "the last tokens", GREEN)
    tokens(near, GREEN, lambda token: query - window < token <= query)

    gate, total, middle = left(block * blocks) + 1.4, 47.2, selected + 0.65
    for y, name, colour in (
        (compressed, "cmp", BLUE),
        (selected, "slc", ORANGE),
        (near, "win", GREEN),
    ):
        weight = rf"$\times\ g_\mathrm{{{name}}}$"
        axes.text(gate, y + 0.65, weight, color=colour, fontsize=11, ha="center", va="center")
        side = (y > selected) - (y < selected)
        arrow((gate + 2, y + 0.65), (total - 0.9, middle + 0.7 * side), GREY)
    axes.text(total, middle, r"$\Sigma$", fontsize=15, ha="center", va="center")
    arrow((total + 0.9, middle), (total + 2.5, middle), INK)
    axes.text(total + 2.8, middle, "o", fontsize=12, style="italic", va="center")

    note = "Grey keys are not read. Text tokens attend densely to everything before them."
    axes.text(left(block * blocks) / 2, -1.1, note, color=GREY, fontsize=8.5, ha="center")
    figure.tight_layout(pad=0.4)
    return figure


def save(figure, name, description=""):
    metadata = {"Description": description, "Software": None}
    figure.savefig(DOCS / name, dpi=144, metadata=metadata)
    print(f"docs/{name}: {(DOCS / name).stat().st_size:,} bytes")


def main():
    matplotlib.use("agg")
    matplotlib.rcParams.update(STYLE)
    save(draw_branches(), "branches.png")
    page = (DOCS / "performance.md").read_text(encoding="utf-8")
    save(draw_speed(page), "speed.png", plotted_numbers(page))


if __name__ == "__main__":
    main()
