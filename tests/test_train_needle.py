"""The videos hold what their questions ask for, and both kinds of attention learn from them."""

import json
import sys

import pytest
import torch
from videonsa.configuration_videonsa import VideoNSAConfig
from videonsa.modeling_videonsa import VideoNSAForConditionalGeneration

import train_needle
from paths import ROOT
from train_needle import FIRST_KEY, FIRST_VALUE, KEYS, QUESTIONS

CPU = torch.device("cpu")
TOKENS, FRAME = 1024, 16
SMALL = {
    "hidden_size": 7 * 8,
    "intermediate_size": 32,
    "nsa_block_size": 16,
    "nsa_num_selected_blocks": 4,
    "nsa_window_size": 32,
    "rope_parameters": {"mrope_section": [2, 1, 1], "rope_theta": 1e6, "rope_type": "default"},
}


@pytest.fixture
def small(monkeypatch):
    """Heads of 8 features instead of 128, and a selection that leaves blocks out."""
    monkeypatch.setattr(train_needle, "TEXT", train_needle.TEXT | SMALL)


def test_the_model_has_the_heads_and_the_branches_of_the_7b():
    config, wanted = (
        VideoNSAConfig(**train_needle.config_of("sparse")).text_config,
        VideoNSAConfig(),
    )
    for name, value in wanted.text_config.to_dict().items():
        if name.startswith("nsa_"):
            assert getattr(config, name) == value, name
    assert config.hidden_size // config.num_attention_heads == 128
    assert config.num_attention_heads // config.num_key_value_heads == 7
    assert not train_needle.config_of("dense")["text_config"]["nsa_enabled"]


def test_every_question_asks_for_a_needle_that_is_in_the_video(small, monkeypatch):
    monkeypatch.setattr(train_needle, "NOISE", 0.0)
    ids = {"video_token_id": train_needle.Words().video}
    config = VideoNSAConfig(**train_needle.config_of("sparse"), **ids)
    model = VideoNSAForConditionalGeneration(config)
    layout = train_needle.make_layout(model, 3, TOKENS, CPU)
    vectors = train_needle.make_vectors(56, CPU)
    videos = train_needle.draw(vectors, layout, torch.Generator().manual_seed(0))
    frames = TOKENS // FRAME
    shown = videos.features.view(3, frames, FRAME, 56)
    assert torch.equal(shown, shown[:, :, :1].expand_as(shown))  # a frame's tokens show the same

    is_video = layout.ids == model.config.video_token_id
    video = int(is_video.nonzero()[0])
    assert is_video.sum() == TOKENS and is_video[layout.places[:QUESTIONS]].all()
    in_frame = layout.places[:QUESTIONS] - video + 1
    assert in_frame.tolist() == [(frames - 15 + i) * FRAME for i in range(QUESTIONS)]

    rows = torch.arange(3)[:, None]
    asked = videos.ids[:, layout.places[QUESTIONS:]] - FIRST_KEY
    assert torch.equal(videos.ids[:, layout.places[QUESTIONS:] + 1], videos.answers[:, QUESTIONS:])
    last = shown[:, -QUESTIONS:, 0] - vectors.asking
    keys = torch.cat([torch.cdist(last, vectors.keys.expand(3, KEYS, 56)).argmin(-1), asked], 1)
    places = (videos.depths * (frames - QUESTIONS)).round().long()
    assert places.max() < frames - QUESTIONS
    needles = vectors.keys[keys] + vectors.values[videos.answers - FIRST_VALUE]
    torch.testing.assert_close(shown[rows, places, 0], needles)
    for row in places:
        assert len(row.unique()) == 2 * QUESTIONS


@pytest.mark.parametrize("attention", ["sparse", "dense"])
def test_one_command_trains_measures_and_writes(small, tmp_path, attention, capsys, monkeypatch):
    arguments = ["--out", tmp_path, "--tokens", TOKENS, "--attention", attention, "--lr", 0.2]
    arguments += ["--steps", 8, "--step-tokens", TOKENS, "--log-every", 2, "--save-every", 4]
    train_needle.main([str(x) for x in [*arguments, "--measured-rows", 1]])
    lines = [json.loads(x) for x in (tmp_path / "log.jsonl").read_text().splitlines()]
    losses = [sum(x["loss"].values()) for x in lines if x.get("stage") == "training"]
    assert len(losses) == 4 and losses[-1] < losses[0] - 1
    measured = [x["right"]["1024"] for x in lines if x.get("stage") == "measured"]
    assert len(measured) == 3  # after steps 4 and 8, and at the end
    assert set(measured[-1]) == {"all", "by_depth", "loss"}
    assert [*map(set, measured[-1]["by_depth"])] == 5 * [{"shown", "asked"}]

    model = VideoNSAForConditionalGeneration.from_pretrained(tmp_path)
    assert model.config.text_config.nsa_enabled == (attention == "sparse")
    start = VideoNSAForConditionalGeneration(model.config).state_dict()
    assert model.state_dict().keys() == start.keys()

    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import sharing

    command = ["sharing.py", "--model", str(tmp_path), "--needle", "1024", "--count", "1"]
    monkeypatch.setattr(sys, "argv", command)
    if attention == "dense":
        with pytest.raises(ValueError, match="trained with dense attention"):
            sharing.main()
        return
    sharing.main()
    assert "1024 vision tokens, block 16, 4 chosen: 9 neighbours choose" in capsys.readouterr().out


def test_longer_videos_join_in_over_the_first_half():
    class Longest:
        random = staticmethod(lambda: 0.0)

    lengths = [128, 1024, 4096, 16384, 65536]
    found = [train_needle.length_at(Longest, lengths, progress / 10) for progress in range(11)]
    assert found == [*lengths, *[65536] * 6]
