"""Answers that were kept are found again, but for those that were none."""

from commands.evaluation_cache import AnswerCache


def sample(key, error=None, **fields):
    return {"key": key, "error": error, "messages": ["of video"], **fields}


def test_what_was_answered_is_kept_and_what_was_unreadable_is_tried_again(tmp_path):
    first = AnswerCache(tmp_path / "answers")
    assert first.get("a") is None and not (tmp_path / "answers").exists()
    first.add(sample("a", answer="red"))
    first.add(sample("b", error="b.mp4 is empty"))
    second = AnswerCache(tmp_path / "answers")
    assert second.get("a") == {"key": "a", "error": None, "answer": "red"}
    assert second.get("b") is None
    second.add(sample("b", answer="blue"))
    assert len(list((tmp_path / "answers").iterdir())) == 2  # each process writes its own
    third = AnswerCache(tmp_path / "answers")
    assert third.get("b")["answer"] == "blue" and third.get("a")["answer"] == "red"
