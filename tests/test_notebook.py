"""examples/start.ipynb runs from its first cell to its last, and shows what it promises."""

import sys

import pytest

from paths import ROOT

nbformat = pytest.importorskip("nbformat", reason="needs requirements-dev.txt")
nbclient = pytest.importorskip("nbclient", reason="needs requirements-dev.txt")
pytest.importorskip("ipykernel", reason="needs requirements-dev.txt")


def printed(cell):
    return "".join(
        output.get("text", "") + output.get("data", {}).get("text/plain", "")
        for output in cell.get("outputs", [])
    )


def test_the_notebook_teaches_the_toy_a_new_way_to_answer(tmp_path):
    notebook = nbformat.read(ROOT / "examples/start.ipynb", as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    cells[0].source = cells[0].source.replace('"out/start"', repr(str(tmp_path)))
    client = nbclient.NotebookClient(
        notebook, timeout=600, resources={"metadata": {"path": str(ROOT / "examples")}}
    )
    client.create_kernel_manager()
    client.km.kernel_cmd = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    client.execute()
    first, plan, converted, rows, tuning, again, score = map(printed, cells[1:])
    assert "green" in first and "shape" not in first
    assert "16 frames" in plan.splitlines()[0] and "64 tokens" in plan.splitlines()[1]
    assert "'added': " in converted and "VideoNSAForConditionalGeneration" in converted
    assert "70 clips" in rows
    assert "Tokens a conversation" in tuning and "The result is in" in tuning
    assert "A green shape." in again
    assert "held_out.jsonl: exact_match 100.0%" in score
