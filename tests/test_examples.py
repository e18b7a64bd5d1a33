"""What docs/examples/ shows is what its commands print, on a CPU."""

import re
import shlex

import pytest
import torch

import make_clips
from paths import ROOT
from test_ask import ask, run  # noqa: F401

PAGES = sorted(ROOT.glob("docs/examples/*.md"))
RUN = re.compile(r"<!-- run -->\n```bash\n(.*?)```\n\n```\n(.*?)```", re.DOTALL)
BLOCKS = [(page.stem, *found) for page in PAGES for found in RUN.findall(page.read_text("utf-8"))]


@pytest.mark.skipif(torch.cuda.is_available(), reason="the pages show a CPU's run")
@pytest.mark.parametrize(("page", "commands", "shown"), BLOCKS, ids=[one[0] for one in BLOCKS])
def test_a_page_shows_what_its_commands_print(
    ask,  # noqa: F811
    page,
    commands,
    shown,
    tmp_path,
    monkeypatch,
    capsys,
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    for line in commands.splitlines():
        _, script, *arguments = shlex.split(line)
        if script == "ask.py":
            run(ask, monkeypatch, *arguments)
        else:
            assert script == "tools/make_clips.py"
            make_clips.main(arguments)
    assert capsys.readouterr().out == shown


def test_all_pages_are_listed_and_three_are_run():
    index = (ROOT / "docs" / "examples.md").read_text(encoding="utf-8")
    assert [page.name for page in PAGES if f"(examples/{page.name})" not in index] == []
    assert {one[0] for one in BLOCKS} == {"captions", "comparison", "long_videos"}
