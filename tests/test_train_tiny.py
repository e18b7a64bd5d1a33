"""The trainer's way through the model, one clip for many questions, is the model's own."""

import random

import numpy as np
import pytest
import torch
from transformers import AutoProcessor

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


@pytest.mark.parametrize("seconds", [1, 4, 16])
def test_questions_about_one_clip_get_the_logits_of_each_alone(model, seconds):
    config, words = model.config, train_tiny.Words()
    prompt = torch.tensor(words.ids(train_tiny.PROMPT))
    batch = train_tiny.clip_batch(words, random.Random(seconds), seconds, clips=2)
    frames = train_tiny.pictures(batch["rows"], torch.Generator().manual_seed(0))
    with torch.no_grad():
        features = train_tiny.encode(model, frames).reshape(2, -1, config.text_config.hidden_size)
        logits = train_tiny.answer_logits(model, features, batch["ids"])
        patches = train_tiny.patches_of(frames)
        video = config.video_token_id
        for question in (0, train_tiny.QUESTIONS - 1):
            ids = torch.cat(
                [
                    prompt.expand(2, -1),
                    torch.full((2, seconds * train_tiny.TOKENS), video),
                    torch.full((2, 1), config.vision_end_token_id),
                    batch["ids"][:, question],
                ],
                dim=1,
            )
            wanted = model(
                input_ids=ids,
                pixel_values_videos=patches,
                video_grid_thw=torch.tensor([[seconds, 8, 8]] * 2),
                second_per_grid_ts=torch.tensor([1.0, 1.0]),
                mm_token_type_ids=2 * (ids == video).int(),
                logits_to_keep=train_tiny.QUESTION_ROWS,
            ).logits
            assert wanted.std() > 0.5
            torch.testing.assert_close(logits[:, question], wanted, rtol=1e-4, atol=1e-4)


def test_patches_are_the_processors():
    frames = np.random.default_rng(0).integers(0, 256, (6, 112, 112, 3), dtype=np.uint8)
    processor = AutoProcessor.from_pretrained(ROOT, trust_remote_code=True)
    wanted = processor.video_processor(
        videos=[frames], do_sample_frames=False, return_tensors="pt"
    ).pixel_values_videos
    patches = train_tiny.patches_of(torch.tensor(frames).unflatten(0, (-1, 2)))
    torch.testing.assert_close(patches, wanted, rtol=1e-4, atol=1e-4)


def test_every_part_of_the_language_model_gets_a_gradient(model):
    words = train_tiny.Words()
    batch = train_tiny.clip_batch(words, random.Random(0), 4, clips=1)
    logits, _ = train_tiny.clip_logits(model, batch, CPU, torch.Generator().manual_seed(0))
    logits.square().mean().backward()
    for name, x in model.model.language_model.named_parameters():
        last = f"layers.{model.config.text_config.num_hidden_layers - 1}.self_attn.g_proj"
        # The last layer's vision rows, which the gates weigh, are read by nothing.
        learns = x.grad is not None and bool(x.grad.any())
        assert learns == (last not in name), name


def test_labels_are_the_answer_and_its_end():
    words = train_tiny.Words()
    ids, labels = words.row("What colour is the first shape?", "red")
    answer = words.ids("red<|im_end|>")
    start = labels.index(answer[0])
    assert labels[start : start + len(answer)] == answer == ids[start + 1 : start + 1 + len(answer)]
    assert set(labels) - set(answer) == {-100}
    asked = words.tokenizer.decode(ids[: start + 1], skip_special_tokens=False)
    assert asked == "What colour is the first shape?<|im_end|>\n<|im_start|>assistant\n"
