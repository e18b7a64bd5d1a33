"""What manifests say of media and weights, and which of several manifests a table shows."""

import json

import pytest
import torch

from commands.evaluation_manifest import compare, content_of, describe_medium, describe_videos
from nsa_rules import BRANCHES


def manifest(score, scored, date):
    attention = {
        "asked": "sparse",
        "semantics": "paper",
        "gates": dict.fromkeys(BRANCHES, True),
        "selected_blocks": 4,
        "window": 32,
    }
    return {
        "task": {"name": "clips_8"},
        "preset": None,
        "date": date,
        "scores": {"accuracy": score},
        "samples": {"scored": scored, "of": 80, "undecodable": 0},
        "multiple_choice": {"questions": 0},
        "settings": {
            "checkpoint": {"name": "tiny", "weights": "w"},
            "code": "c",
            "attention": attention,
        },
    }


def table(folder, *manifests):
    for index, one in enumerate(manifests):
        (folder / f"{index}_manifest_clips_8.json").write_text(json.dumps(one))
    return compare([folder])


def test_semantics_have_columns_of_their_own(tmp_path):
    paper, released = manifest(0.1, 80, "20260101"), manifest(0.2, 80, "20260102")
    released["settings"]["attention"]["semantics"] = "released"
    text = table(tmp_path, paper, released)
    assert "| clips_8 | accuracy | 0.1 | 0.2 |" in text
    assert "sparse, released semantics, all branches" in text


def test_the_newest_of_the_largest_runs_counts(tmp_path):
    first, second = manifest(0.1, 80, "20260101"), manifest(0.2, 80, "20260102")
    limited = manifest(0.3, 4, "20260103")
    text = table(tmp_path, second, first, limited)
    assert "| clips_8 | accuracy | 0.2 |" in text
    assert "| clips_8 | samples | 80 of 80 |" in text
    assert "0.1" not in text and "0.3" not in text


@pytest.mark.parametrize("part", ["code", "weights"])
def test_other_code_or_weights_are_another_column(tmp_path, part):
    first, second = manifest(0.1, 80, "20260101"), manifest(0.2, 80, "20260101")
    settings = second["settings"]
    (settings["checkpoint"] if part == "weights" else settings)[part] = "a"  # before the other
    text = table(tmp_path, first, second)
    assert "| clips_8 | accuracy | 0.2 | 0.1 |" in text


def test_no_manifest_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="there is no manifest in"):
        compare([tmp_path])


def test_a_medium_is_told_by_both_ends_and_its_size(tmp_path):
    path = tmp_path / "a.mp4"

    def told(content, **span):
        path.write_bytes(content)
        return describe_medium({"type": "video", "video": str(path), **span})

    long = bytes(2**18)
    first = told(long)
    assert first["file"] == "a.mp4"
    for other in (b"x" + long[1:], long[:-1] + b"x", long + b"\0", long[:100], b""):
        assert told(other)["content"] != first["content"]
    assert told(long) == first != told(long, video_start=1.0)
    array = torch.zeros(2, 3).numpy()
    described = describe_medium({"type": "image", "image": array})
    assert described["file"] == "image" and described["content"]
    assert describe_medium({"type": "video", "video": "https://a/b.mp4"})["content"] is None


def test_a_videos_numbers_are_those_of_its_grid():
    class Processor:
        temporal_patch_size, patch_size, merge_size = 2, 14, 2

    inputs = {"video_grid_thw": torch.tensor([[3, 4, 6]]), "second_per_grid_ts": [0.5]}
    wanted = {"frames": 6, "height": 56, "width": 84, "fps": 4.0, "tokens": 18}
    assert describe_videos(inputs, Processor) == [wanted]
    assert describe_videos({}, Processor) == []


def test_the_order_of_values_is_part_of_a_digest():
    values = torch.arange(10.0)
    for dtype in (torch.float32, torch.bfloat16, torch.float64, torch.uint8):
        tensor = values.to(dtype)
        assert content_of(tensor) == content_of(tensor.clone()) == content_of(tensor[None])
        assert content_of(tensor) != content_of(tensor.flip(0))
        assert content_of(tensor, chunk=3) != content_of(tensor.roll(3), chunk=3)
