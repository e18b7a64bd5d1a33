"""What README.md and docs/ say of files is true, and their pictures show the tables' numbers."""

import os
import re
import shlex
import subprocess
import sys

import pytest
from PIL import Image
from videonsa.configuration_videonsa import VideoNSATextConfig
from videonsa.processing_videonsa import VideoNSAVideoProcessor

from commands.checkpoint_files import listed_files
from paths import ROOT

PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
PICTURES = ("docs/branches.png", "docs/attention.png", "docs/speed.png")


def anchors(page):
    """The names that headings are linked by, as GitHub and the Hub make them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8"))
    for link in links:
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_are_named_exist(page):
    names = re.findall(r"`([\w./-]+\.(?:py|md|txt|yaml|toml))`", page.read_text(encoding="utf-8"))
    for name in names:
        assert (ROOT / name).exists() or (page.parent / name).exists(), name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_names_stand_in_the_files_that_pages_send_to(page):
    """Every "`name` in `file.py`" of a page names what that file defines."""
    sent = re.findall(r"`(\w+)` in\s+`([\w/]+\.py)`", page.read_text(encoding="utf-8"))
    for name, file in sent:
        code = (ROOT / file).read_text(encoding="utf-8")
        assert re.search(rf"^\s*((def|class) {name}\b|{name}\b.* = )", code, re.MULTILINE), name


def test_pictures_go_to_the_hub_with_the_card():
    card = (ROOT / "README.md").read_text(encoding="utf-8")
    for picture in PICTURES:
        assert f"]({picture})" in card
        assert picture in listed_files(ROOT)
        assert (ROOT / picture).stat().st_size < 150_000


def test_pictures_and_card_have_the_numbers_of_the_tables():
    draw_pictures = pytest.importorskip("draw_pictures", reason="needs matplotlib")
    page = (ROOT / "docs/performance.md").read_text(encoding="utf-8")
    with Image.open(ROOT / "docs/speed.png") as picture:
        drawn = picture.info["Description"]
    assert drawn == draw_pictures.plotted_numbers(page), "run python tools/draw_pictures.py"

    card = (ROOT / "README.md").read_text(encoding="utf-8")
    _, model = draw_pictures.read_table(page, draw_pictures.MODEL_ROWS)
    for row in model.values():
        assert row[-1] in card
    _, layer = draw_pictures.read_times(page, draw_pictures.LAYER_ROWS)
    for name in ("VideoNSA, random choices", "dense, SDPA cuDNN"):
        assert f"{layer[name][-1]:g} ms" in card


def written(value):
    """A default as the tables write it."""
    if value is None or isinstance(value, (bool, str)):
        return str(value).lower()
    return ", ".join(value) if isinstance(value, list) else f"{round(value):,}"


@pytest.mark.parametrize("page", ["README.md", "docs/usage.md"])
def test_defaults_in_the_tables_are_those_of_the_code(page):
    sources = {"nsa": VideoNSATextConfig(), "video": VideoNSAVideoProcessor()}
    page = (ROOT / page).read_text(encoding="utf-8")
    rows = re.findall(r"^\| (`\w+`(?:, `\w+`)*) \| (\w[^|]*) \|", page, re.MULTILINE)
    assert len(rows) > 5
    for names, defaults in rows:
        names = re.findall(r"\w+", names)
        source = sources["nsa" if names[0].startswith("nsa_") else "video"]
        actual = [written(getattr(source, name, None)) for name in names]
        assert ", ".join(dict.fromkeys(actual)) == defaults, names


def test_the_card_shows_what_ask_prints():
    card = (ROOT / "README.md").read_text(encoding="utf-8")
    found = re.search(
        r"<!-- ask -->\n```bash\n.*?\npython (.*?)\n```\n\n```\n(.*?)```", card, re.DOTALL
    )
    command, shown = found.groups()
    run = subprocess.run(
        [sys.executable, *shlex.split(command)],
        cwd=ROOT,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert (run.returncode, run.stdout) == (0, shown), run.stderr[-2000:]


def test_the_card_stays_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) < 1000
