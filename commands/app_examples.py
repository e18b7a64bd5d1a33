"""The examples of app.py's page: bundled clips, a question about each, and the stored results.

    python -m commands.app_examples      # asks the root checkpoint again and stores what it answers

A result is a folder of examples/space/results: what `View.save` writes, and taken.json. Pictures
are made of the clip again.
"""

import json
from pathlib import Path
from typing import NamedTuple

from commands.app_answers import Answer, Answerer
from commands.attention_frames import SeenPixels
from commands.attention_record import AttentionRecord
from commands.attention_view import View

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "examples/space/results"


class Example(NamedTuple):
    """A bundled clip and a question about it."""

    name: str
    clip: Path
    question: str


CLIPS = ROOT / "examples/clips"
EXAMPLES = [
    Example("last", CLIPS / "shapes.mp4", "What colour is the last shape?"),
    Example("order", CLIPS / "shapes.mp4", "In which order do the colours appear?"),
    Example("flash", CLIPS / "digit.mp4", "When does a digit flash?"),
    Example("direction", CLIPS / "circle.mp4", "Which way does the shape move?"),
]


def store(answerer: Answerer) -> None:
    """Asks every example and writes its result."""
    for example in EXAMPLES:
        told = answerer.answer([], str(example.clip), example.question, answerer.max_tokens)
        ((_, answer),) = (one for one in told if one[0] == "answer")
        answer.view.save(RESULTS / example.name)
        text = json.dumps(answer.taken, indent=1) + "\n"
        (RESULTS / example.name / "taken.json").write_text(text, encoding="utf-8")


def load(example: Example, processor) -> Answer:
    """The stored result of an example."""
    folder = RESULTS / example.name
    taken, kept = (
        json.loads((folder / name).read_text(encoding="utf-8"))
        for name in ("taken.json", "answer.json")
    )
    videos = processor.video_processor(videos=[str(example.clip)], return_tensors="pt")
    pixels, grid = videos["pixel_values_videos"], videos["video_grid_thw"]
    seen = SeenPixels(pixels, grid, processor.video_processor)
    seen[:]
    del kept["verdict"]  # follows from the rest
    view = View(**kept, record=AttentionRecord.load(folder), pictures=seen.pictures)
    return Answer(view.answer, taken, view)


if __name__ == "__main__":
    from transformers import AutoProcessor

    from commands.model_loading import prepare_model

    processor = AutoProcessor.from_pretrained(ROOT, trust_remote_code=True)
    store(Answerer(prepare_model(str(ROOT), "cpu"), processor))
