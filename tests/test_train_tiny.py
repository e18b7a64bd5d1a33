"""The trainer's forward pass, written for one layout, is the model's."""

import json
import random

import pytest
import torch
from videonsa.configuration_videonsa import VideoNSAConfig
from videonsa.modeling_videonsa import VideoNSAForConditionalGeneration

import train_tiny
from paths import ROOT

CPU = torch.device("cpu")


@pytest.mark.parametrize("seconds", [1, 4, 16])
def test_the_trainers_logits_are_the_models(seconds):
    config = VideoNSAConfig(**json.loads((ROOT / "config.json").read_text()))
    torch.manual_seed(seconds)
    model = VideoNSAForConditionalGeneration(config).eval()
    with torch.no_grad():
        for x in model.parameters():
            x.normal_(0, 0.15) if x.ndim > 1 else x.add_(0.1 * torch.randn_like(x))
    p = dict(model.named_parameters())
    words = train_tiny.Words()
    prompt = torch.tensor(words.ids(train_tiny.PROMPT))
    batch = train_tiny.clip_batch(words, random.Random(seconds), seconds, clips=2)
    frames = train_tiny.pictures(batch["rows"], torch.Generator().manual_seed(0))
    layout = train_tiny.Layout(len(prompt), seconds, train_tiny.QUESTIONS, CPU)
    with torch.no_grad():
        features = train_tiny.encode(p, frames).reshape(2, -1, config.text_config.hidden_size)
        logits = train_tiny.answer_logits(p, layout, prompt, features, batch["ids"])
        patches = train_tiny.patches_of(frames).flatten(0, 1)
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


def test_labels_are_the_answer_and_its_end():
    words = train_tiny.Words()
    ids, labels = words.row("What colour is the first shape?", "red")
    answer = words.ids("red<|im_end|>")
    start = labels.index(answer[0])
    assert labels[start : start + len(answer)] == answer == ids[start + 1 : start + 1 + len(answer)]
    assert set(labels) - set(answer) == {-100}
    asked = words.tokenizer.decode(ids[: start + 1], skip_special_tokens=False)
    assert asked == "What colour is the first shape?<|im_end|>\n<|im_start|>assistant\n"
