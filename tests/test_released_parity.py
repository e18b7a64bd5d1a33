"""The released semantics against outputs of the original's own code, and each quirk against them.

tests/released/*.npz are outputs of the original release (Espere-1119-Song/VideoNSA at 377eeb9, with
its own copy of flash-linear-attention, or version 0.3.1 of it) for the numbers that are drawn here:
its `nsa_func` in the files that CASES names, its text model of two layers in two_layers.npz. They
ran in float32 in Triton's interpreter, with flash-attn's calls replaced by the same mathematics
and torch.compile off. docs/released.md has more.
"""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from videonsa import nsa_reference, nsa_released
from videonsa.configuration_videonsa import VideoNSAConfig
from videonsa.modeling_videonsa import VideoNSATextModel
from videonsa.nsa_released import vision_by_position
from videonsa.packing_videonsa import make_plan
from videonsa.positions_videonsa import rope_index

from numerics import assert_as_accurate
from paths import ROOT

HEADS, KEY_HEADS, HEAD_DIM, BLOCK, WINDOW = 28, 4, 16, 16, 40
KEPT_HEADS = [0, 5, 9, 15, 18, 20, 27]  # of which the files have the outputs
CASES = {  # tokens, selected blocks, spans of text, variant
    "small": (200, 3, [(0, 14), (90, 101), (180, 200)], {}),
    "tail": (100, 3, [(0, 14), (97, 100)], {}),  # a vision token in the incomplete last block
    "causal": (200, 3, [(0, 14), (90, 101), (180, 200)], {"mask": "causal"}),
    "streams": (420, 11, [(0, 14), (120, 190), (400, 420)], {}),
    "first_and_last_two": (
        300,
        3,
        [(0, 14), (90, 150), (280, 300)],
        {"forced": "first_and_last_two"},
    ),
}


def expected(name):
    return np.load(ROOT / "tests" / "released" / f"{name}.npz")


def draw(numbers, *shape, scale=1.0):
    return torch.from_numpy((numbers.standard_normal(shape) * scale).astype("float32"))


def inputs(name):
    """q, k, v, gates and which tokens are vision, as the original got them."""
    tokens, _, text, _ = CASES[name]
    numbers = np.random.default_rng(15)
    vision = torch.ones(tokens, dtype=torch.bool)
    for start, end in text:
        vision[start:end] = False
    q = draw(numbers, tokens, HEADS, HEAD_DIM, scale=1.5)
    k = draw(numbers, tokens, KEY_HEADS, HEAD_DIM, scale=1.5)
    v = draw(numbers, tokens, KEY_HEADS, HEAD_DIM)
    logits = draw(numbers, tokens, HEADS, 3)
    return q, k, v, (logits / 0.3).sigmoid()[vision], vision


def ours(name, dtype, **variant):
    """The branches as the original's `nsa_func` gives them: without what is dense."""
    q, k, v, gates, vision = inputs(name)
    q, k, v, gates = (x.to(dtype) for x in (q, k, v, gates))
    functions = SimpleNamespace(
        selected_attention=nsa_reference.selected_attention,
        window_attention=nsa_reference.window_attention,
        dense_attention=lambda q, *others, **settings: torch.zeros_like(q),
    )
    leak = nsa_released.mean_of_earlier
    nsa_released.mean_of_earlier = torch.zeros_like
    try:
        o = nsa_released.released_attention(
            q,
            k,
            v,
            gates,
            vision,
            torch.tensor([0, len(q)]),
            functions,
            block_size=BLOCK,
            num_selected=CASES[name][1],
            window_size=WINDOW,
            **{**CASES[name][3], **variant},
        )
    finally:
        nsa_released.mean_of_earlier = leak
    return o[:, KEPT_HEADS]


@pytest.mark.parametrize("name", CASES)
def test_the_branches_are_the_originals(name):
    theirs = torch.from_numpy(expected(name)["o"])
    assert_as_accurate(name, theirs, ours(name, torch.float32), ours(name, torch.float64))


# What each quirk would be without it, by the name of its function, and a case that shows it.
PAPERS = {
    "spread_heads": lambda q, num_key_heads: torch.cat([q, q], dim=1)[:, own_key_heads()],
    "joined_heads": lambda o, num_heads: o[:, :num_heads],
    "zero_text": lambda x, vision: x,
    "gates_of_all": lambda gates, vision: gates.new_zeros(len(vision), HEADS, 3).index_put(
        (vision,), gates
    ),
    "block_means": lambda x, block_size: block_sums(x, block_size) / block_size,
    "visible_means": lambda positions, num_blocks, block_size, mask: (
        torch.arange(1, num_blocks + 1) * block_size - 1 <= positions[:, None].clamp(min=15)
    ),
    "misread_sums": lambda sums: sums.t(),
    "rounded_count": lambda count: count,
    "largest_of_streams": lambda importance, blocks, first, width: blocks.gather(
        2, importance.masked_fill(blocks < 0, -1).topk(min(width, blocks.shape[2]), dim=2).indices
    ),
}


def own_key_heads():
    """Rows of 28 heads twice, so that head h of 64 over 4 key heads is one of h // 16 * 7 + ...."""
    own = [key * 7 + index % 7 for key in range(KEY_HEADS) for index in range(16)]
    return torch.tensor(own)


def block_sums(x, block_size):
    return torch.stack([block.sum(0) for block in x.split(block_size)])


@pytest.mark.parametrize("quirk", PAPERS)
def test_without_a_quirk_the_outputs_are_others(quirk, monkeypatch):
    name = {"largest_of_streams": "streams", "block_means": "tail"}.get(quirk, "small")
    monkeypatch.setattr(nsa_released, quirk, PAPERS[quirk])
    theirs = torch.from_numpy(expected(name)["o"])
    assert (ours(name, torch.float32) - theirs).abs().max() > 0.01


@pytest.mark.parametrize("variant", [{"mask": "causal"}, {"forced": "first_and_last_two"}])
def test_a_variant_is_another_output(variant):
    theirs = torch.from_numpy(expected("small")["o"])
    assert (ours("small", torch.float32, **variant) - theirs).abs().max() > 0.01


# Two layers of the text model, with positions.

IMAGE, VIDEO, START = 60, 61, 62
IMAGE_GRID, VIDEO_GRID = (1, 12, 16), (5, 12, 12)
IDS = [
    *[*range(1, 14), START, *[IMAGE] * 48],
    *[*range(1, 10), START, *[VIDEO] * 180],
    *[*range(1, 30), START],
]


def two_layers(dtype, types=vision_by_position):
    """Hidden states [1, S, hidden] of our text model, and the positions [3, 1, S]."""
    text = {
        "vocab_size": 64,
        "hidden_size": 448,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "mrope_section": [2, 3, 3],
        },
        "nsa_semantics": "released",
        "nsa_num_selected_blocks": 3,
        "nsa_window_size": 40,
    }
    config = VideoNSAConfig(
        text_config=text,
        vision_config={"tokens_per_second": 2},
        image_token_id=IMAGE,
        video_token_id=VIDEO,
    )
    model = VideoNSATextModel._from_config(config.text_config).eval()
    numbers, weights = np.random.default_rng(15), {}
    for name, value in sorted(model.state_dict().items()):
        noise = draw(numbers, *value.shape, scale=0.4 if "g_proj_2" in name else 0.08)
        weights[name] = 1 + noise if "norm" in name else noise
    model.load_state_dict(weights)
    x = draw(numbers, 1, len(IDS), 448).to(dtype)
    grids = {
        "image_grid_thw": torch.tensor([IMAGE_GRID]),
        "video_grid_thw": torch.tensor([VIDEO_GRID]),
    }
    positions, _ = rope_index(config, torch.tensor([IDS]), **grids)
    plan = make_plan(types(positions), len(IDS))
    with torch.no_grad():
        output = model.to(dtype)(
            inputs_embeds=x, position_ids=positions, nsa_plan=plan, use_cache=False
        )
    return output.last_hidden_state, positions


def test_positions_and_types_are_the_originals():
    theirs = expected("two_layers")
    _, positions = two_layers(torch.float32)
    assert np.array_equal(positions[:, 0], theirs["positions"])
    types = vision_by_position(positions)[0]
    assert np.array_equal(types, theirs["types"])
    media = torch.tensor([token in (IMAGE, VIDEO) for token in IDS])
    assert not types[~media].any() and not types[media].all()


def test_two_layers_are_the_originals():
    theirs = torch.from_numpy(expected("two_layers")["y"])
    eager, exact = (two_layers(dtype)[0][0, :, ::7] for dtype in (torch.float32, torch.float64))
    assert_as_accurate("two layers", theirs, eager, exact)


def test_without_the_dense_leak_two_layers_are_others(monkeypatch):
    monkeypatch.setattr(nsa_released, "mean_of_earlier", torch.zeros_like)
    theirs = torch.from_numpy(expected("two_layers")["y"])
    assert (two_layers(torch.float32)[0][0, :, ::7] - theirs).abs().max() > 0.01


def test_without_types_by_position_two_layers_are_others():
    theirs = torch.from_numpy(expected("two_layers")["y"])
    media = torch.tensor([[token in (IMAGE, VIDEO) for token in IDS]])
    output, _ = two_layers(torch.float32, types=lambda positions: media)
    assert (output[0, :, ::7] - theirs).abs().max() > 0.01
