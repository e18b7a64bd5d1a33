"""The trainer's way through the model is the model's own, and its rows are the chat template's."""

import json
import random
import re

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoProcessor

import make_clips
import tiny_batches
import train_tiny
from paths import ROOT

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model():
    model = train_tiny.load(ROOT, CPU).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for x in model.parameters():
            x.normal_(0, 0.15) if x.ndim > 1 else x.add_(0.1 * torch.randn_like(x))
    return model


@pytest.fixture(scope="module")
def processor():
    return AutoProcessor.from_pretrained(ROOT, trust_remote_code=True)


def batch_of(seconds, rows=2):
    words, rng = tiny_batches.Words(), random.Random(str(seconds))
    return tiny_batches.conversation_batch(words, rng, seconds, rows)


@pytest.mark.parametrize("seconds", [(1,), (16,), (2, 4)])
@pytest.mark.parametrize("enabled", [True, False])
def test_conversations_get_the_logits_of_the_model(model, monkeypatch, seconds, enabled):
    monkeypatch.setattr(model.config.text_config, "nsa_enabled", enabled)
    batch = batch_of(seconds)
    frames = tiny_batches.pictures(batch["frames"], torch.Generator().manual_seed(0))
    with torch.no_grad():
        features = train_tiny.features_of(model, batch["frames"], torch.Generator().manual_seed(0))
        plan = train_tiny.plan_of(model, batch, CPU)
        logits = train_tiny.row_logits(model, batch["ids"], batch["positions"], features, plan)
        wanted = model(
            input_ids=batch["ids"],
            pixel_values_videos=train_tiny.patches_of(frames),
            video_grid_thw=torch.tensor([[second, 8, 8] for second in seconds] * 2),
            second_per_grid_ts=torch.ones(2 * len(seconds)),
            mm_token_type_ids=2 * (batch["ids"] == model.config.video_token_id).int(),
        ).logits
    assert wanted.std() > 0.5
    torch.testing.assert_close(logits, wanted, rtol=1e-4, atol=1e-4)


def test_rows_are_what_the_chat_template_makes_of_the_conversation(processor):
    batch, clip = batch_of((2, 4)), np.zeros((4, 112, 112, 3), np.uint8)
    text = processor.tokenizer.decode(batch["ids"][0], skip_special_tokens=False)
    text = text.split("<|endoftext|>")[0]
    text = re.sub(r"(<\|video_pad\|>)+", "<|video_pad|>", text)
    messages = []
    for turn in text.split("<|im_start|>")[2:]:
        role, content = turn.split("\n", 1)
        content = content.removesuffix("\n").removesuffix("<|im_end|>")
        parts, said = [], content.removeprefix("<|vision_start|><|video_pad|><|vision_end|>")
        if said != content:
            parts.append({"type": "video", "video": clip})
        messages.append({"role": role, "content": [*parts, {"type": "text", "text": said}]})
    assert [turn["role"] for turn in messages] == ["user", "assistant"] * (len(messages) // 2)
    assert sum(len(turn["content"]) == 2 for turn in messages) == 2
    assert processor.apply_chat_template(messages, tokenize=False) == text + "\n"


def test_labels_are_the_answers_and_their_ends():
    batch, words = batch_of((4, 4)), tiny_batches.Words()
    known = {kind: set() for kind in make_clips.TRAINED_KINDS}
    learned = torch.zeros_like(batch["ids"], dtype=torch.bool)
    for answer in batch["answers"]:
        labels = batch["labels"][answer.row, answer.start : answer.end]
        ids = batch["ids"][answer.row, answer.start : answer.end + 1]
        assert labels.tolist() == ids[1:].tolist()
        before = batch["ids"][answer.row, : answer.start + 1].tolist()
        opening = words.ids(tiny_batches.ANSWER_START)
        assert before[-len(opening) :] == opening
        text = words.tokenizer.decode(labels.tolist(), skip_special_tokens=False)
        assert text.endswith("<|im_end|>")
        known[answer.kind].add(text.removesuffix("<|im_end|>"))
        learned[answer.row, answer.start : answer.end] = True
    assert torch.equal(learned, batch["labels"] >= 0)
    assert known["colour"] | known["first"] <= set(make_clips.COLOURS)
    assert {answer.clip for answer in batch["answers"]} == {0, 1}
    assert max(answer.turn for answer in batch["answers"]) >= 2


def test_a_second_clip_comes_after_any_number_of_questions():
    answers = batch_of((2, 2), rows=24)["answers"]
    before = [max(x.turn for x in answers if x.row == row and x.clip == 0) for row in range(24)]
    assert {0, 1, 2, 3} <= set(before)


def test_patches_are_the_processors(processor):
    frames = np.random.default_rng(0).integers(0, 256, (6, 112, 112, 3), dtype=np.uint8)
    wanted = processor.video_processor(
        videos=[frames], do_sample_frames=False, return_tensors="pt"
    ).pixel_values_videos
    patches = train_tiny.patches_of(torch.tensor(frames).unflatten(0, (-1, 2)))
    torch.testing.assert_close(patches, wanted, rtol=1e-4, atol=1e-4)


def test_every_part_of_the_language_model_gets_a_gradient(model):
    batch = batch_of((4,), rows=1)
    features = train_tiny.features_of(model, batch["frames"], torch.Generator().manual_seed(0))
    plan = train_tiny.plan_of(model, batch, CPU)
    train_tiny.row_logits(
        model, batch["ids"], batch["positions"], features, plan
    ).square().mean().backward()
    for name, x in model.model.language_model.named_parameters():
        assert x.grad is not None and bool(x.grad.any()), name


def test_a_step_with_a_gradient_that_is_not_finite_changes_nothing():
    weight = torch.nn.Parameter(torch.ones(2, 2))
    trainer = train_tiny.Trainer([weight], lr=0.1)
    trainer.set_rate(step=1000, progress=0.5)
    trainer.update(weight.sum() * torch.inf)
    assert torch.equal(weight, torch.ones(2, 2)) and trainer.skipped == 1
    trainer.update(weight.sum())
    assert (weight < 1).all() and trainer.skipped == 1


def test_one_command_trains_measures_and_writes_and_gives_its_tower_to_another(tmp_path):
    small = ["--pairs", "8", "--tokens", "200", "--log-every", "1", "--measured-rows", "1"]
    small += ["--save-every", "1", "--language-steps", "1"]
    train_tiny.main(["--out", str(tmp_path / "one"), "--tower-steps", "1", *small])
    lines = [json.loads(x) for x in (tmp_path / "one" / "log.jsonl").read_text().splitlines()]
    stages = [line.get("stage", "settings") for line in lines]
    assert stages == ["settings", "tower", "language", "measured", "measured"]
    assert set(lines[-1]) >= {"8", "16", "32", "64", "16+16"}

    other = ["--out", str(tmp_path / "two"), "--tower", str(tmp_path / "one"), "--seed", "1"]
    train_tiny.main([*other, *small, "--attention", "dense"])
    one, two = (load_file(tmp_path / x / "model.safetensors") for x in ("one", "two"))
    assert one.keys() == two.keys() == load_file(ROOT / "model.safetensors").keys()
    same = {name for name in one if torch.equal(one[name], two[name])}
    assert {name for name in one if name.startswith("model.visual.")} <= same
    assert "model.language_model.embed_tokens.weight" not in same
    # It loads like any checkpoint.
    config = train_tiny.load(tmp_path / "two", CPU).config
    assert config.text_config.rope_parameters["mrope_section"] == [4, 2, 2]


def test_a_stage_that_runs_out_of_minutes_has_come_to_its_end():
    clock = train_tiny.Clock(steps=10, minutes=1)
    assert clock.progress(5) == 0.5 and not clock.is_over(9) and clock.is_over(10)
    clock.began -= 61
    assert clock.is_over(1)
