"""The released semantics in the model: whole prompts, batches, decoding, and what is refused.

What the attention itself computes is held to the original's outputs by test_released_parity.py.
"""

import logging

import pytest
import torch
from transformers import AutoModelForImageTextToText, DynamicCache
from videonsa import nsa_kernels, nsa_reference, nsa_released
from videonsa.configuration_videonsa import VideoNSAConfig, VideoNSATextConfig
from videonsa.positions_videonsa import rope_index

from paths import ROOT
from tiny import Prompts, make_model


def released(**fields):
    return make_model(nsa_semantics="released", **fields)


def prompt(prompts, *rows):
    """The model's inputs of rows, each a list of parts as of `Prompts.row`."""
    return prompts.batch(*(prompts.row(*row) for row in rows))


FILM = (3, ("video", 4, 4, 4), 2, ("image", 2, 3), 4)


@torch.no_grad()
def test_a_batch_answers_as_its_rows_alone():
    model = released()
    rows = [FILM, (5, ("video", 3, 2, 4), 1)]
    together = model(**prompt(Prompts(), *rows)).logits
    prompts = Prompts()
    for row, ours in zip(rows, together, strict=True):
        alone = model(**prompt(prompts, row)).logits[0]
        assert torch.allclose(ours[-len(alone) :], alone, atol=1e-5)


@torch.no_grad()
def test_text_alone_is_the_papers():
    inputs = prompt(Prompts(), (9,))
    paper = make_model()
    ours = released()
    assert torch.equal(ours(**inputs).logits, paper(**inputs).logits)


@torch.no_grad()
def test_new_tokens_attend_densely_to_what_is_cached():
    """With all keys and values the same, a step is that of the paper's model."""
    inputs, step = prompt(Prompts(), FILM), torch.tensor([[7]])
    outputs = []
    for model in (released(), make_model()):
        cache = DynamicCache(config=model.config)
        released()(**inputs, past_key_values=cache, use_cache=True)
        outputs.append(model(input_ids=step, past_key_values=cache, use_cache=True).logits)
    assert torch.equal(*outputs)


@torch.no_grad()
def test_generate_goes_on_as_calls_do():
    model, inputs = released(), prompt(Prompts(), FILM)
    ids = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    cache = DynamicCache(config=model.config)
    step = inputs
    for token in ids[0, inputs["input_ids"].shape[1] :]:
        logits = model(**step, past_key_values=cache, use_cache=True).logits
        assert logits[0, -1].argmax() == token
        step = {"input_ids": token[None, None]}


@torch.no_grad()
def test_a_whole_prompt_is_wanted():
    model, inputs = released(), prompt(Prompts(), FILM)
    with pytest.raises(ValueError, match="in chunks of 16, but nsa_semantics is"):
        model.generate(**inputs, max_new_tokens=2, prefill_chunk_size=16)
    cache = DynamicCache(config=model.config)
    model(**inputs, past_key_values=cache, use_cache=True)
    with pytest.raises(ValueError, match="came after .* cached tokens"):
        turn = prompt(Prompts(1), (2, ("image", 2, 2), 1))
        del turn["attention_mask"]
        model(**turn, past_key_values=cache)


@torch.no_grad()
def test_later_tokens_change_earlier_rows():
    """Which is why chunks are refused: the compressed branch looks ahead."""
    model, inputs = released(), prompt(Prompts(), FILM)
    before = model(**inputs).logits[0]
    inputs["pixel_values_videos"][-4:] += 1
    changed = (model(**inputs).logits[0] - before).abs().amax(-1) > 1e-4
    assert changed[5] and changed[0]  # of the video and of the text before it


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_the_kernels_serve_its_branches(device, quick_interpreter):
    """The selected and the window branch of spread heads, and the dense rows."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(37, 14, 16), (37, 2, 16), (37, 2, 16), (28, 14, 3)]
    q, k, v, gates = (torch.randn(shape, generator=generator).to(device) for shape in shapes)
    vision = torch.ones(37, dtype=torch.bool, device=device)
    vision[:5] = vision[33:] = False
    sizes = {"block_size": 16, "num_selected": 2, "window_size": 9}
    with torch.no_grad():
        ours, theirs = (
            nsa_released.released_attention(
                q, k, v, gates.sigmoid(), vision, torch.tensor([0, 21, 37]), functions, **sizes
            )
            for functions in (nsa_kernels, nsa_reference)
        )
    assert torch.allclose(ours, theirs, atol=1e-5)


def test_gradients_reach_every_weight():
    model, inputs = released().train(), prompt(Prompts(), FILM)
    model(**inputs).logits.float().square().mean().backward()
    for name, weight in model.named_parameters():
        assert weight.grad is not None and weight.grad.isfinite().all(), name


def test_vision_is_told_by_unequal_positions():
    model, inputs = released(), prompt(Prompts(), (("video", 2, 3, 3), 2))
    grids = {"video_grid_thw": inputs["video_grid_thw"]}
    positions, _ = rope_index(model.config, inputs["input_ids"], **grids)
    vision = nsa_released.vision_by_position(positions)[0]
    # The video's first token has three equal positions, and so has (2, 2, 2), of its second step.
    assert vision.nonzero()[:, 0].tolist() == [*range(2, 10), *range(10, 18)]
    assert not nsa_released.vision_by_position(positions[0]).any()


def test_a_temporal_step_counts_one_second_whatever_it_lasts():
    paper, ours = make_model().config, released().config
    inputs = prompt(Prompts(), FILM)
    media = {name: inputs[name] for name in ("image_grid_thw", "video_grid_thw")}
    wanted, _ = rope_index(paper, inputs["input_ids"], **media)
    for seconds in ([0.25], [1.0], [3.5]):
        got, _ = rope_index(ours, inputs["input_ids"], second_per_grid_ts=seconds, **media)
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("asked", ["paper", "released"])
def test_a_switch_is_said_once(asked, caplog):
    with caplog.at_level(logging.WARNING):
        model = AutoModelForImageTextToText.from_pretrained(
            ROOT, trust_remote_code=True, nsa_semantics=asked
        )
    assert model.config.text_config.nsa_semantics == asked
    lines = [line for line in caplog.messages if "were trained with nsa_semantics='paper'" in line]
    assert len(lines) == (asked == "released")


@pytest.mark.parametrize("asked", ["paper", "released"])
@pytest.mark.parametrize("beside", [{}, {"text_config": {"nsa_semantics": "paper"}}])
def test_a_switch_is_told_from_what_a_flat_configuration_says(asked, beside, caplog):
    """A field beside text_config counts before the one in it."""
    with caplog.at_level(logging.WARNING):
        VideoNSAConfig.from_dict({"nsa_semantics": "released", **beside}, nsa_semantics=asked)
    assert ("trained with nsa_semantics='released'" in caplog.text) == (asked == "paper")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"nsa_released_mask": "none"}, "nsa_released_mask holds 'none'; choose from 'reversed'"),
        ({"nsa_released_forced": "all"}, "nsa_released_forced holds 'all'; choose from 'own'"),
        ({"nsa_num_local_blocks": 2}, "which nothing reads when nsa_semantics is 'released'"),
        ({"nsa_modalities": ["video"]}, "which nothing reads when nsa_semantics is 'released'"),
        ({"nsa_block_size": 48}, "the first must be a power of two"),
        ({"nsa_num_selected_blocks": 65}, "and the second at most that size"),
        (
            {"nsa_num_selected_blocks": 33, "nsa_released_forced": "first_and_last_two"},
            "half of it with nsa_released_forced",
        ),
    ],
)
def test_what_the_original_cannot_do_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        VideoNSATextConfig(nsa_semantics="released", **fields)
