"""Writes what a `View` holds into a folder: pictures, numbers, and one HTML page with all of it.

The page has its pictures in it (data URIs) and asks for nothing else: it opens from disk, can be
sent by mail, and runs no script.
"""

import base64
import html
import io
from pathlib import Path

import numpy as np

from commands.attention_pictures import (
    draw_gates,
    draw_heads,
    draw_selections,
    draw_sinks,
    draw_timeline,
    strips,
)
from commands.attention_view import View
from nsa_rules import BRANCHES

DPI = 100
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1f2328; max-width: 64rem; margin: 2rem auto;
       padding: 0 1rem; }
img { max-width: 100%; }
.answer { font-size: 1.4rem; }
.answer b { color: #c8641c; }
table { border-collapse: collapse; }
td, th { border-bottom: 1px solid #dfe3e8; padding: .2rem .8rem; text-align: right; }
th:first-child, td:first-child { text-align: left; }
figure { margin: 1.5rem 0; }
p.note, figcaption { color: #57606a; }
"""


def write_page(view: View, folder, seconds: list[float] | None = None) -> Path:
    """Writes index.html, its pictures as .png, and `View.save`'s files; returns the page's path.

    folder: is made; files of these names in it are replaced.
    seconds: the moments whose selections are drawn; by default a few that are spread over a video.
    """
    folder = Path(folder)
    drawn = pictures(view, seconds)  # before anything is written
    view.save(folder)
    for name, _, png in drawn:
        (folder / f"{name}.png").write_bytes(png)
    page = folder / "index.html"
    page.write_text(page_of(view, drawn), encoding="utf-8")
    return page


def pictures(view: View, seconds=None) -> list[tuple[str, str, bytes]]:
    """(file's name without ending, what a reader should know of it, PNG) of each picture."""
    rows, record = strips(view), view.record
    found = [
        (
            f"timeline{number}",
            "Time runs to the right; all rows share it. A column is one step: two frames that "
            "share their tokens. The dotted line is what an even reading would be.",
            draw_timeline(view, strip),
        )
        for number, strip in enumerate(rows, 1)
    ]
    if record.is_sparse:
        found += [
            (
                f"selections{number}",
                "Each row is one moment of the video (framed). Lit patches lie in blocks that this "
                "moment's middle token selected; the brighter, the more layers and head groups "
                "selected them. Its own block is always among them, later frames never are.",
                draw_selections(view, strip, None if strip.axis == "image" else seconds),
            )
            for number, strip in enumerate(rows, 1)
        ]
        found.append(
            (
                "gates",
                "Each vision token weighs its three branches with gates between 0 and 1, which "
                "need not add up to 1.",
                draw_gates(view),
            )
        )
        found.append(
            (
                "heads",
                "Left: whether two heads open their gates for the same tokens. Right: the part of "
                "the blocks that one key/value head selected which another selected too; a "
                "query's own block, which is always selected, does not count.",
                draw_heads(view),
            )
        )
    if record.sink_ratios is not None:
        found.append(
            (
                "sinks",
                "A sink is a key that gets more than a tenth of the attention of the queries that "
                "read it and has an unusually small value. Dense is what the same queries and keys "
                "would do without the branches.",
                draw_sinks(view),
            )
        )
    return [(name, text, _png(figure)) for name, text, figure in found]


def page_of(view: View, drawn) -> str:
    """The page's HTML."""
    record, parts = (
        view.record,
        [
            f"<p class='answer'>{html.escape(view.question)} <b>{html.escape(view.answer)}</b></p>",
            f"<p><b>{html.escape(view.verdict())}</b></p>",
        ],
    )
    if not record.is_sparse:
        parts.append(
            "<p>The vision tokens attended densely (nsa_enabled is false), so there are no blocks "
            "that were selected and no gates.</p>"
        )
    for name, text, png in drawn:
        image, text = base64.b64encode(png).decode(), html.escape(text, quote=True)
        parts.append(
            f"<figure id='{name}'><img alt='{text}' src='data:image/png;base64,{image}'>"
            f"<figcaption>{text}</figcaption></figure>"
        )
    if record.is_sparse:
        parts.append(_keys_table(record))
    parts.append(
        "<p class='note'>Attention says what was read, not why: a token may have been read and "
        "not used, and earlier layers carry what they read on into other frames.</p>"
    )
    title = html.escape(f"{view.question} {view.answer}")
    return (
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>"
        f"<title>{title}</title><style>{STYLE}</style></head><body>{''.join(parts)}</body></html>\n"
    )


def _keys_table(record):
    read = record.keys_read()
    dense = read.pop("dense")
    rows = "".join(
        f"<tr><td>{branch}</td><td>{read[branch]:,.1f}</td><td>{read[branch] / dense:.1%}</td></tr>"
        for branch in BRANCHES
    )
    total = np.sum([*read.values()])
    return (
        "<table><tr><th>keys that a vision token reads, on average</th><th>keys</th>"
        f"<th>of dense</th></tr>{rows}"
        f"<tr><td>all three</td><td>{total:,.1f}</td><td>{total / dense:.1%}</td></tr>"
        f"<tr><td>dense attention</td><td>{dense:,.1f}</td><td>100%</td></tr></table>"
    )


def _png(figure):
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI)
    return buffer.getvalue()
