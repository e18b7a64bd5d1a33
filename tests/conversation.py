"""A conversation that the checkpoint at the root holds: questions, answers, a second clip."""

from paths import ROOT

CLIPS = ROOT / "examples/clips"
TURNS = (  # the clip that a question brings with it, or None; the question; the answer
    (CLIPS / "shapes.mp4", "In which order do the colours appear?", "green, blue, orange"),
    (None, "What colour is the square?", "blue"),
    (None, "Which way does the orange shape move?", "down"),
    (None, "What is the dog doing?", "I do not know."),
    (CLIPS / "digit.mp4", "When does a digit flash?", "at 3 s"),
    (None, "What colour is the square?", "red"),
)
