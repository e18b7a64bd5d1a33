"""The model: equal to Qwen2.5-VL where it should be, sparse where it should be, and stateless."""

import subprocess
import sys
from types import SimpleNamespace

import accelerate
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import DynamicCache, StaticCache
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
    Qwen2_5_VLAttention,
    apply_rotary_pos_emb,
)
from videonsa import modeling_videonsa as modeling
from videonsa.media_features_videonsa import PlacedFeatures
from videonsa.nsa_reference import nsa_attention
from videonsa.packing_videonsa import make_plan, packed_samples
from videonsa.positions_videonsa import positions_of_new_tokens, state_of

from paths import ROOT
from tiny import GROUPS, IMAGE, VIDEO, Prompts, make_model, stock_twin

CLOSE = {"atol": 2e-5, "rtol": 1e-5}


@pytest.fixture(scope="module")
def model():
    return make_model()


def logits(model, inputs, **kwargs):
    with torch.no_grad():
        return model(**inputs, **kwargs).logits


# Text is Qwen2.5-VL


@pytest.mark.parametrize(("heads", "kv_heads"), GROUPS)
def test_text_only_equals_stock_bit_for_bit(heads, kv_heads, prompts):
    model = make_model(heads, kv_heads)
    stock = stock_twin(model)
    inputs = prompts.batch(prompts.row(20), prompts.row(9))
    assert torch.equal(logits(model, inputs), logits(stock, inputs))
    options = {"max_new_tokens": 8, "do_sample": False}
    assert torch.equal(model.generate(**inputs, **options), stock.generate(**inputs, **options))


def test_text_only_training_equals_stock_and_reaches_the_gates(prompts):
    model = make_model().train()
    stock = stock_twin(model).train()
    inputs = prompts.batch(prompts.row(12))
    losses = [m(**inputs, labels=inputs["input_ids"]).loss for m in (model, stock)]
    assert torch.equal(*losses)
    losses[0].backward()
    gates = model.model.language_model.layers[0].self_attn.g_proj_1.weight
    assert gates.grad is not None and not gates.grad.any()


def attention_inputs(config, vision, seed=1):
    torch.manual_seed(seed)
    hidden = torch.randn(*vision.shape, config.hidden_size, dtype=torch.float64)
    angles = torch.randn(*vision.shape, 8, dtype=torch.float64)
    return hidden, (angles.cos(), angles.sin())


@pytest.mark.parametrize(("heads", "kv_heads"), GROUPS)
@pytest.mark.parametrize("length", [1, 3, 4, 5, 17])
def test_text_rows_of_a_layer_equal_stock_and_vision_rows_the_specification(
    length, heads, kv_heads
):
    model = make_model(heads, kv_heads, dtype=torch.float64)
    attention = model.model.language_model.layers[0].self_attn
    vision = torch.zeros(2, length + 6, dtype=torch.bool)
    vision[0, 3 : 3 + length] = True
    vision[1, 1 : 1 + length : 2] = True
    hidden, rotary = attention_inputs(attention.config, vision)
    with torch.no_grad():
        actual, _ = attention(
            hidden, position_embeddings=rotary, nsa_plan=make_plan(vision, vision.shape[1])
        )
        dense, _ = Qwen2_5_VLAttention.forward(attention, hidden, position_embeddings=rotary)
    torch.testing.assert_close(actual[~vision], dense[~vision], atol=1e-12, rtol=0)

    # The vision rows, from the layer's own projections, one sample after the other.
    with torch.no_grad():
        q, k, v = (
            getattr(attention, name)(hidden).unflatten(-1, (-1, 8))
            for name in ("q_proj", "k_proj", "v_proj")
        )
        q, k = apply_rotary_pos_emb(q, k, *rotary, unsqueeze_dim=2)
        for row, mask in enumerate(vision):
            cu = torch.tensor([0, int(mask.sum())], dtype=torch.int32)
            gates = attention.gates(hidden[row, mask])
            packed = (q[row, mask], k[row, mask], v[row, mask], gates, cu, cu)
            o = nsa_attention(*packed, block_size=4, num_selected=2, window_size=5)
            expected = attention.o_proj(o.flatten(1))
            torch.testing.assert_close(actual[row, mask], expected, atol=1e-12, rtol=0)


def test_gates_follow_the_published_layout(model):
    """Two linear layers with an exact GELU, logits over 0.3, heads first and branches fastest."""
    attention = model.model.language_model.layers[0].self_attn
    x = torch.randn(3, attention.hidden_size)
    inner = x @ attention.g_proj_1.weight.T + attention.g_proj_1.bias
    inner = inner * 0.5 * (1 + torch.erf(inner / 2**0.5))
    flat = inner @ attention.g_proj_2.weight.T + attention.g_proj_2.bias
    expected = torch.sigmoid(flat / 0.3).reshape(3, 14, 3)
    torch.testing.assert_close(attention.gates(x), expected)


# What a token can see


def test_a_later_frame_changes_nothing_before_it(model, prompts):
    ids, media = prompts.row(3, ("video", 6, 2, 2), 5)
    before = logits(model, prompts.batch((ids, media)))
    media[0][2][4 * 16 :] += 1.0  # frames 4 and 5
    after = logits(model, prompts.batch((ids, media)))
    first = ids.index(VIDEO) + 4 * 4
    torch.testing.assert_close(before[:, :first], after[:, :first], atol=1e-6, rtol=0)
    assert (before[:, first:] - after[:, first:]).abs().amax(-1).min() > 1e-3


def test_every_block_and_open_gates_are_dense_attention_over_vision(prompts):
    """Gates (0, 1, 0) and S * B >= N: the model is one whose vision rows see all vision."""
    model = make_model(nsa_num_selected_blocks=16)
    for layer in model.model.language_model.layers:
        layer.self_attn.gates = lambda x: torch.tensor([0.0, 1.0, 0.0]).expand(len(x), 14, 3)
    ids, media = prompts.row(("video", 5, 2, 3), 4)  # no text before, so vision sees all it could
    ids, media = ids[1:], media  # the start marker is text
    stock = stock_twin(model)
    inputs = prompts.batch((ids, media))
    positions, _ = model.model.get_rope_index(
        inputs["input_ids"],
        video_grid_thw=inputs["video_grid_thw"],
        second_per_grid_ts=inputs["second_per_grid_ts"],
    )
    expected = logits(stock, inputs, position_ids=positions)
    torch.testing.assert_close(logits(model, inputs), expected, **CLOSE)


def test_text_sees_the_vision_before_it(model, prompts):
    ids, media = prompts.row(3, ("video", 2, 2, 2), 5)
    before = logits(model, prompts.batch((ids, media)))
    media[0][2][0] += 1.0
    after = logits(model, prompts.batch((ids, media)))
    assert (before - after)[:, -1].abs().max() > 1e-3


def test_vision_does_not_see_text(model, prompts):
    """Nor its position: what a frame becomes depends on frames alone."""
    ids, media = prompts.row(3, ("video", 4, 2, 2), 5)
    outputs = {}
    for name, change in (("before", 0), ("after", 1)):
        changed = [ids[0] + change, *ids[1:]]
        outputs[name] = logits(model, prompts.batch((changed, media)))
    vision = torch.tensor(ids) == VIDEO
    assert torch.equal(outputs["before"][:, vision], outputs["after"][:, vision])
    assert not torch.equal(outputs["before"][:, ~vision], outputs["after"][:, ~vision])


def test_rows_and_padding_do_not_touch_each_other(model, prompts):
    rows = [
        prompts.row(12),
        prompts.row(2, ("image", 2, 3), 3, ("video", 3, 2, 2), 1, ("image", 1, 2), 4),
        prompts.row(1, ("video", 2, 2, 4), 2, ("video", 5, 1, 3), 6),
    ]
    together = logits(model, prompts.batch(*rows))
    for index, row in enumerate(rows):
        alone = logits(model, prompts.batch(row))
        torch.testing.assert_close(together[index : index + 1, -alone.shape[1] :], alone, **CLOSE)
    stock = logits(stock_twin(model), prompts.batch(rows[0]))
    torch.testing.assert_close(together[:1, -12:], stock, **CLOSE)


def test_right_padding_equals_left_padding(model, prompts):
    row = prompts.row(2, ("video", 3, 2, 2), 4)
    left = prompts.batch(row, prompts.row(30))
    right = dict(left)
    shift = 30 - len(row[0])
    for name in ("input_ids", "attention_mask", "mm_token_type_ids"):
        right[name] = left[name].clone()
        right[name][0] = left[name][0].roll(-shift)
    expected = logits(model, left)[0, shift:]
    torch.testing.assert_close(logits(model, right)[0, :-shift], expected, **CLOSE)


def test_only_the_named_modalities_are_sparse(prompts):
    model = make_model(nsa_modalities=["video"])
    inputs = prompts.batch(prompts.row(3, ("image", 4, 4), 5))
    positions, _ = model.model.get_rope_index(
        inputs["input_ids"], image_grid_thw=inputs["image_grid_thw"]
    )
    stock = logits(stock_twin(model), inputs, position_ids=positions)
    torch.testing.assert_close(logits(model, inputs), stock, **CLOSE)
    both = make_model()
    assert (logits(both, inputs) - stock).abs().max() > 1e-3


def own_positions(model, inputs):
    """Positions by the model's own rule, which the library's differs from."""
    media = {k: v for k, v in inputs.items() if "grid" in k}
    positions, _ = model.model.get_rope_index(
        inputs["input_ids"], attention_mask=inputs["attention_mask"], **media
    )
    return positions


def test_disabled_it_is_stock_whatever_the_gates_are(prompts):
    model = make_model(nsa_enabled=False)
    inputs = prompts.batch(
        prompts.row(2, ("image", 2, 3), 3, ("video", 3, 2, 2), 5), prompts.row(9)
    )
    stock = logits(stock_twin(model), inputs, position_ids=own_positions(model, inputs))
    for layer in model.model.language_model.layers:
        layer.self_attn.g_proj_2.bias.data.fill_(torch.nan)
    actual, seen = logits(model, inputs), inputs["attention_mask"].bool()
    torch.testing.assert_close(actual[seen], stock[seen], **CLOSE)


def test_it_can_be_disabled_and_enabled_again(prompts):
    model, inputs = make_model(), prompts.batch(prompts.row(3, ("video", 5, 2, 3), 5))
    before = logits(model, inputs)
    model.config.text_config.nsa_enabled = False
    dense = logits(model, inputs)
    model.config.text_config.nsa_enabled = True
    assert torch.equal(logits(model, inputs), before)
    assert (dense - before).abs().max() > 1e-3


def test_packed_samples_equal_separate_ones(model, prompts):
    rows = [prompts.row(2, ("video", 3, 2, 2), 3), prompts.row(6), prompts.row(("image", 2, 3), 4)]
    separate = [logits(model, prompts.batch(row)) for row in rows]
    positions = []
    for row in rows:
        inputs = prompts.batch(row)
        media = {k: v for k, v in inputs.items() if "grid" in k}
        own, _ = model.model.get_rope_index(inputs["input_ids"], **media)
        positions.append(torch.cat([torch.arange(own.shape[2])[None, None], own]))
    ids = [token for ids, _ in rows for token in ids]
    packed = prompts.batch((ids, [medium for _, media in rows for medium in media]))
    del packed["attention_mask"]
    actual = logits(model, packed, position_ids=torch.cat(positions, dim=2), use_cache=False)
    torch.testing.assert_close(actual, torch.cat(separate, dim=1), **CLOSE)


def test_a_packed_sample_may_be_one_token(model, prompts):
    rows = [prompts.row(1), prompts.row(("video", 2, 2, 2), 2), prompts.row(1), prompts.row(1)]
    separate = [logits(model, prompts.batch(row)) for row in rows]
    own = [own_positions(model, prompts.batch(row)) for row in rows]
    own = [torch.cat([torch.arange(x.shape[2])[None, None], x]) for x in own]
    packed = prompts.batch((sum((ids for ids, _ in rows), []), rows[1][1]))
    del packed["attention_mask"]
    actual = logits(model, packed, position_ids=torch.cat(own, dim=2), use_cache=False)
    torch.testing.assert_close(actual, torch.cat(separate, dim=1), **CLOSE)


@pytest.mark.parametrize("kind", ["whole", "chunks", "chunks onto a static cache"])
@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
@pytest.mark.parametrize("wrapped", [False, True], ids=["tensor", "dict"])
def test_a_mask_of_all_pairs_equals_one_of_tokens(model, prompts, wrapped, dtype, kind):
    rows = [prompts.row(2, ("video", 3, 2, 2), 3), prompts.row(24)]
    inputs = prompts.batch(*rows)
    length, config = inputs["input_ids"].shape[1], model.config.text_config
    static = "static" in kind
    inputs["position_ids"] = own_positions(model, inputs)

    def run():
        with torch.no_grad():
            cache = StaticCache(config, max_cache_len=length) if static else DynamicCache()
            size = None if kind == "whole" else 7
            outputs = model.model(**inputs, past_key_values=cache, nsa_chunk_size=size)
        return outputs.last_hidden_state[:, -3:]

    expected = run()
    seen = inputs["attention_mask"].bool()[:, None, None, :]
    mask = seen & torch.ones(length, length, dtype=torch.bool).tril()
    if dtype != torch.bool:
        mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(dtype).min)
    inputs["attention_mask"] = {"full_attention": mask} if wrapped else mask
    torch.testing.assert_close(run(), expected, **CLOSE)


# The layers


def test_device_maps_and_fsdp_find_the_layers_by_the_stock_names(model):
    names = {type(module).__name__ for module in model.modules()}
    assert set(model._no_split_modules) == {"Qwen2_5_VLDecoderLayer", "Qwen2_5_VLVisionBlock"}
    assert set(model._no_split_modules) <= names


def test_a_hook_on_the_second_norm_sees_the_sum_and_its_norm(model, prompts):
    layer, seen = model.model.language_model.layers[0], []
    hook = layer.post_attention_layernorm.register_forward_hook(lambda *call: seen.append(call[2]))
    states = logits_and_states(model, prompts.batch(prompts.row(9)))
    hook.remove()
    total, normed = seen[0]
    with torch.no_grad():
        torch.testing.assert_close(normed, layer.post_attention_layernorm(total))
        torch.testing.assert_close(states[1], total + layer.mlp(normed))


def logits_and_states(model, inputs):
    with torch.no_grad():
        return model(**inputs, output_hidden_states=True).hidden_states


# How a batch is laid out


def test_the_plan_of_one_row_copies_nothing():
    """Two cached text tokens; three vision and two text tokens are new."""
    plan = make_plan(torch.tensor([[0, 0, 1, 1, 1, 0, 0]]).bool(), 5)
    assert plan.vision_queries == (0, slice(0, 3)) and plan.vision_keys == (0, slice(2, 5))
    assert plan.text_queries == (0, slice(3, 5)) and plan.all_keys == (0, slice(0, 7))
    assert plan.text_positions.tolist() == [5, 6] and not plan.is_all_vision
    assert make_plan(torch.tensor([[1, 1, 0]]).bool(), 1) is None


def test_queries_that_are_all_vision_run_no_dense_attention(model, monkeypatch):
    dense = []
    monkeypatch.setattr(
        modeling.VideoNSAAttention,
        "attend_dense",
        lambda self, query, key, value, plan: dense.append(1) or query[plan.text_queries],
    )
    attention = model.model.language_model.layers[0].self_attn
    hidden, rotary = torch.randn(1, 4, 112), (torch.ones(1, 4, 8), torch.zeros(1, 4, 8))
    valid = torch.tensor([[1, 1, 1, 0]]).bool()
    for vision, called in ((torch.ones(1, 4).bool(), 0), (valid, 1)):
        plan = make_plan(vision, 4, valid if called else None)
        assert plan.is_all_vision == (not called)
        with torch.no_grad():
            output, _ = attention(hidden, position_embeddings=rotary, nsa_plan=plan)
        assert output.shape == hidden.shape and len(dense) == called


def test_the_plan_of_padded_rows():
    vision = torch.tensor([[0, 0, 1, 1], [1, 0, 1, 0]]).bool()
    valid = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]]).bool()
    plan = make_plan(vision, 4, valid)
    assert [x.tolist() for x in plan.vision_queries] == [[0, 0, 1, 1], [2, 3, 0, 2]]
    assert [x.tolist() for x in plan.text_queries] == [[0, 1, 1], [1, 1, 3]]
    assert plan.text_positions.tolist() == [0, 1, 3]
    assert plan.cu_vision_queries.tolist() == [0, 2, 4]
    assert plan.cu_text_queries.tolist() == [0, 1, 3]
    assert plan.cu_all_keys.tolist() == [0, 3, 7]


def test_samples_of_a_packed_row_count_from_zero():
    positions = torch.tensor([[0, 0, 1, 2, 0, 1]]).expand(4, 1, 6)
    assert packed_samples(None, positions).tolist() == [[0, 1, 1, 1, 2, 2]]
    assert packed_samples(torch.ones(1, 6), positions) is None
    assert packed_samples(None, positions[1:]) is None


@pytest.mark.parametrize("rows", [1, 2])
def test_a_prompt_is_read_in_chunks_without_waiting_for_the_device(prompts, rows, monkeypatch):
    """Of the "meta" device nothing can be read; what the loop has to know it knows before."""
    batch = [prompts.row(3, ("video", 24 - 5 * n, 2, 4), 5) for n in range(rows)]
    inputs, cpu, model = prompts.batch(*batch), make_model().model, make_model().to("meta").model
    ids, chunks = inputs["input_ids"], []

    def take_media(*args):
        for placeholders, before, features in modeling_take_media(cpu, ids, None, dict(inputs)):
            features.encode, features.device = model.get_video_features, "meta"
            yield PlacedFeatures(placeholders.to("meta"), before, features)

    def attend(self, hidden_states, nsa_plan, **kwargs):
        chunks.append(nsa_plan)
        return torch.empty_like(hidden_states), None

    modeling_take_media = modeling.take_media
    monkeypatch.setattr(modeling, "take_media", lambda *args: list(take_media(*args)))
    monkeypatch.setattr(modeling.VideoNSAAttention, "forward", attend)
    mask = inputs["attention_mask"]
    with torch.no_grad():
        outputs = model._forward_in_chunks(
            16, 0, ids == VIDEO, mask.bool(), ids.to("meta"), attention_mask=mask.to("meta"),
            position_ids=torch.zeros(3, *ids.shape, device="meta"), past_key_values=DynamicCache(),
        )  # fmt: skip
    assert outputs.last_hidden_state.is_meta and len(chunks) > 20
    assert all(plan is None or plan.cu_all_keys.is_meta for plan in chunks)


# Positions


def golden(time, height, width, step, text_before=0):
    """(t, h, w) positions of a video, then four of text, by the rule of Qwen2.5-VL's paper."""
    t, h, w = (int(i * step) for i in range(time)), range(height), range(width)
    cells = [(a, b, c) for a in t for b in h for c in w]
    last = max(max(cell) for cell in cells) + 1
    cells += [(last + i,) * 3 for i in range(4)]
    return torch.tensor(cells).T + text_before


@pytest.mark.parametrize(
    ("seconds", "step"), [(2.0, 4), (1.0, 2), (0.5, 1), (1 / 3, 2 / 3), (0.25, 0.5)]
)
def test_positions_of_text_after_a_video(model, seconds, step):
    """Text starts after the video's time; 4 fps (0.5 s a grid step) is not cut to zero."""
    ids = torch.tensor([[7, 8] + [VIDEO] * 8 * 4 + [9] * 4])
    positions, deltas = model.model.get_rope_index(
        ids, video_grid_thw=torch.tensor([[8, 4, 4]]), second_per_grid_ts=torch.tensor([seconds])
    )
    assert positions[:, 0, :2].tolist() == [[0, 1]] * 3
    assert torch.equal(positions[:, 0, 2:], golden(8, 2, 2, step, text_before=2))
    assert deltas.tolist() == [[int(positions.max()) + 1 - ids.shape[1]]]


def test_the_golden_positions_of_an_eight_step_video(model):
    """Three words, a grid of 8x4x4 patches at 2 s a step, four words, as transformers 4.57 does."""
    ids = torch.tensor([[7, 8, 9] + [VIDEO] * 32 + [9] * 4])
    positions, deltas = model.model.get_rope_index(
        ids, video_grid_thw=torch.tensor([[8, 4, 4]]), second_per_grid_ts=[2.0]
    )
    assert positions[0, 0, 31:].tolist() == [31, 31, 31, 31, 32, 33, 34, 35]
    assert deltas.tolist() == [[-3]]


def test_positions_of_a_wide_image_and_of_neighbouring_videos(model):
    ids = torch.tensor([[IMAGE] * 10 + [5] + [VIDEO] * 2 + [VIDEO] * 3])
    positions, _ = model.model.get_rope_index(
        ids,
        image_grid_thw=torch.tensor([[1, 2, 20]]),
        video_grid_thw=torch.tensor([[2, 2, 2], [3, 2, 2]]),
        second_per_grid_ts=[1.0, 0.5],
    )
    assert positions[:, 0, :11].amax(0).tolist() == [*range(10), 10]
    assert positions[0, 0, 11:].tolist() == [11, 13, 14, 15, 16]


def test_padding_does_not_shift_positions(model, prompts):
    rows = [prompts.row(2, ("video", 3, 2, 2), 3), prompts.row(30)]
    inputs = prompts.batch(*rows)
    media = {k: inputs[k] for k in ("video_grid_thw", "second_per_grid_ts")}
    padded, _ = model.model.get_rope_index(
        inputs["input_ids"], attention_mask=inputs["attention_mask"], **media
    )
    alone, _ = model.model.get_rope_index(torch.tensor([rows[0][0]]), **media)
    assert torch.equal(padded[:, :1, -alone.shape[2] :], alone)
    assert torch.equal(padded[0, 1], torch.arange(30))


def test_padding_has_position_zero(model):
    valid = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]]).bool()
    state = state_of(None, 0, None, valid)
    positions = positions_of_new_tokens(model.config, state, 4, valid)
    assert positions[0].tolist() == [[0, 0, 0, 1], [0, 1, 2, 3]]


def test_a_placeholder_without_a_grid_is_named(model):
    with pytest.raises(ValueError, match="hold 4 tokens with id 2 that no grid accounts for"):
        model.model.get_rope_index(torch.tensor([[5, VIDEO, VIDEO, VIDEO, VIDEO]]))


def test_missing_seconds_are_one_second_a_step(model, prompts):
    row = prompts.row(2, ("video", 4, 2, 2), 3, ("video", 2, 2, 2), 2)
    inputs = prompts.batch(row, seconds=1.0)
    expected = logits(model, inputs)
    del inputs["second_per_grid_ts"]
    assert torch.equal(logits(model, inputs), expected)
    assert not torch.equal(logits(model, prompts.batch(row, seconds=0.5)), expected)


# Training


def test_gradients_reach_every_branch_and_survive_checkpointing(prompts):
    inputs = prompts.batch(prompts.row(3, ("video", 6, 2, 2), 5), prompts.row(8))
    gradients = []
    for checkpointing in (False, True):
        model = make_model().train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert gradient is not None, name
        assert torch.equal(gradient, gradients[1][name]), name
    last = gradients[0]["model.language_model.layers.1.self_attn.g_proj_2.bias"].view(14, 3)
    assert (last.abs().sum(0) > 0).all()
    for name in ("q_proj", "k_proj", "v_proj"):
        assert gradients[0][f"model.language_model.layers.0.self_attn.{name}.weight"].any()


def test_autocast_trains_and_keeps_the_softmax_exact(prompts):
    """float32 weights under bfloat16 autocast, as the Trainer's bf16=True runs them."""
    inputs = prompts.batch(prompts.row(3, ("video", 6, 2, 2), 5))
    model = make_model().train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(**inputs, labels=inputs["input_ids"]).loss
    loss.backward()
    assert all(p.grad is not None for p in model.parameters())

    attention = model.model.language_model.layers[0].self_attn
    vision = torch.arange(20)[None] % 4 > 0
    hidden, rotary = (
        x.float() if torch.is_tensor(x) else x for x in attention_inputs(attention.config, vision)
    )
    seen = {}
    attention._attend = lambda *tensors: (
        seen.update(
            dtypes={x.dtype for x in tensors[:4]}, autocast=torch.is_autocast_enabled("cpu")
        )
        or torch.zeros(1, 20, 14, 8)
    )
    attention.q_proj.register_forward_hook(lambda *args: args[-1].float())  # as some adapters do
    with torch.autocast("cpu", dtype=torch.bfloat16):
        attention(hidden, position_embeddings=rotary, nsa_plan=make_plan(vision, 20))
    assert seen == {"dtypes": {torch.bfloat16}, "autocast": False}


def test_a_forward_after_generate_does_not_remember_it(prompts):
    rows = [prompts.row(2, ("video", n + 2, 2, 2), 3) for n in range(4)]
    used, fresh = make_model(), make_model()
    used.generate(**prompts.batch(*rows), max_new_tokens=3, do_sample=False)
    assert used.model.rope_deltas is None  # where stock keeps it
    text, vision = prompts.batch(prompts.row(7), prompts.row(5)), prompts.batch(*rows[1:3])
    for inputs in (vision, text):
        outputs = [m(**inputs, labels=inputs["input_ids"]) for m in (used, fresh)]
        assert torch.equal(outputs[0].loss, outputs[1].loss)
        assert torch.equal(outputs[0].logits, outputs[1].logits)


def test_offloaded_layers_give_the_same(prompts, tmp_path):
    """Accelerate's hooks carry the plan to each layer's device."""
    model = make_model()
    inputs = prompts.batch(prompts.row(3, ("video", 4, 2, 2), 5))
    expected = logits(model, inputs)
    offloaded = accelerate.disk_offload(model, tmp_path, execution_device="cpu")
    assert torch.equal(logits(offloaded, inputs), expected)


# Embeddings instead of ids


def test_embeddings_with_types_equal_ids(model, prompts):
    inputs = prompts.batch(prompts.row(3, ("video", 4, 2, 2), 5))
    expected = logits(model, inputs)
    with torch.no_grad():
        embeds = model.get_input_embeddings()(inputs["input_ids"])
        features = model.get_video_features(
            inputs["pixel_values_videos"], inputs["video_grid_thw"], return_dict=True
        ).pooler_output
        embeds[inputs["input_ids"] == VIDEO] = torch.cat(features)
    positions, _ = model.model.get_rope_index(
        inputs["input_ids"],
        video_grid_thw=inputs["video_grid_thw"],
        second_per_grid_ts=inputs["second_per_grid_ts"],
    )
    actual = logits(
        model,
        {"inputs_embeds": embeds, "mm_token_type_ids": inputs["mm_token_type_ids"]},
        position_ids=positions,
    )
    torch.testing.assert_close(actual, expected, **CLOSE)


def test_types_tell_images_from_videos(prompts):
    """Where only videos are sparse, an image among embeddings attends as text."""
    model = make_model(nsa_modalities=["video"])
    inputs = prompts.batch(prompts.row(1, ("image", 4, 4), 2, ("video", 4, 2, 2), 3))
    positions = own_positions(model, inputs)
    seen = []
    hook = model.model.language_model.register_forward_pre_hook(
        lambda model, args, kwargs: seen.append(kwargs), with_kwargs=True
    )
    expected = logits(model, inputs)
    hook.remove()
    embedded = {"inputs_embeds": seen[0]["inputs_embeds"]}
    embedded["mm_token_type_ids"] = inputs["mm_token_type_ids"]
    actual = logits(model, embedded, position_ids=positions)
    torch.testing.assert_close(actual, expected, **CLOSE)


def test_missing_token_types_change_nothing(model, prompts):
    inputs = prompts.batch(prompts.row(3, ("video", 4, 2, 2), 5))
    expected = logits(model, inputs)
    del inputs["mm_token_type_ids"]
    assert torch.equal(logits(model, inputs), expected)


@pytest.mark.parametrize("vision", [False, True])
def test_outputs_as_a_tuple_are_those_by_name(model, prompts, vision):
    inputs = prompts.batch(prompts.row(3, ("video", 4, 2, 2), 5) if vision else prompts.row(8))
    for part in (model, model.model):
        with torch.no_grad():
            named = part(**inputs, output_hidden_states=True)
            plain = part(**inputs, output_hidden_states=True, return_dict=False)
        assert isinstance(plain, tuple)
        torch.testing.assert_close(plain[0], named[0], rtol=0, atol=0)
        assert len(plain) == len(named.to_tuple())


def test_attention_weights_are_given_for_text_and_announced_as_missing_with_vision(
    prompts, monkeypatch
):
    model, said = make_model(), []
    model.set_attn_implementation("eager")
    monkeypatch.setattr(modeling.logger, "warning_once", said.append)
    text = model(**prompts.batch(prompts.row(8)), output_attentions=True)
    assert len(text.attentions) == 2 and not said
    inputs = prompts.batch(prompts.row(3, ("video", 4, 2, 2), 5))
    assert not model(**inputs).attentions and not said
    assert not model(**inputs, output_attentions=True).attentions
    assert said and "output_attentions" in said[0]


def test_it_is_saved_under_the_names_of_its_state_dict(model, tmp_path):
    model.save_pretrained(tmp_path)
    assert load_file(tmp_path / "model.safetensors").keys() == model.state_dict().keys()


def test_weights_under_their_published_names_are_loaded(model, tmp_path):
    """`visual.*` and `model.*`, as Qwen2.5-VL was published before the library renamed them."""
    published = {"model.visual.": "visual.", "model.language_model.": "model."}
    weights = {}
    for name, weight in model.state_dict().items():
        for ours, theirs in published.items():
            name = theirs + name.removeprefix(ours) if name.startswith(ours) else name
        weights[name] = weight.clone()
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    model.config.save_pretrained(tmp_path)
    loaded, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    for name, weight in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight), name


# Refusals


@pytest.mark.parametrize("name", ["vllm", "sglang", "paged|sdpa"])
def test_an_implementation_that_would_replace_the_attention_is_refused(name):
    model = make_model()
    model.model.language_model.config._attn_implementation_internal = name
    inputs = Prompts().batch(Prompts().row(2, ("video", 2, 2, 2), 3))
    with pytest.raises(ValueError, match="in place of VideoNSA's sparse one"):
        model(**inputs)


@pytest.mark.gpu
def test_the_triton_backend_equals_the_reference(prompts):
    fields = {"head_dim": 16, "nsa_block_size": 8, "nsa_window_size": 12}
    rows = [prompts.row(2, ("video", 5, 2, 3), 3, ("image", 2, 2), 4), prompts.row(7)]
    inputs = prompts.batch(*rows, device="cuda")
    results = []
    for backend in ("reference", "triton"):
        model = make_model(**fields, nsa_backend=backend).cuda().train()
        loss = model(**inputs, labels=inputs["input_ids"]).loss
        loss.backward()
        results.append([loss.detach()] + [p.grad for p in model.parameters()])
    for expected, actual in zip(*results, strict=True):
        assert (actual - expected).norm() <= 1e-4 * expected.norm() + 1e-6


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 2])
def test_the_host_prepares_a_chunk_while_the_gpu_runs_the_one_before(prompts, rows):
    """From the second chunk on nothing waits for the GPU."""
    model = make_model(head_dim=16, nsa_block_size=8).cuda()
    batch = [prompts.row(3, ("video", 40 - 9 * n, 2, 2), 5) for n in range(rows)]
    inputs = prompts.batch(*batch, device="cuda")
    chunks, embed = [], model.get_input_embeddings()

    def refuse_to_wait(module, args):
        chunks.append(args[0].shape[1])
        if len(chunks) == 2:
            torch.cuda.set_sync_debug_mode("error")

    logits(model, inputs, past_key_values=DynamicCache(), nsa_chunk_size=32)  # compiles
    hook = embed.register_forward_pre_hook(refuse_to_wait)
    try:
        logits(model, inputs, past_key_values=DynamicCache(), nsa_chunk_size=32)
    finally:
        torch.cuda.set_sync_debug_mode("default")
        hook.remove()
    assert len(chunks) > 3


def test_triton_on_a_cpu_is_refused():
    """The backend that was asked for runs, or nothing does; outside of Triton's interpreter."""
    script = """
import os, sys
os.environ.pop("TRITON_INTERPRET", None)
sys.path[:0] = sys.argv[1:]
from tiny import Prompts, make_model
model, prompts = make_model(head_dim=16, nsa_block_size=8, nsa_backend="triton"), Prompts()
model(**prompts.batch(prompts.row(3, ("video", 4, 2, 2), 5)))
"""
    command = [sys.executable, "-c", script, str(ROOT / "tests"), str(ROOT / "tools")]
    run = subprocess.run(command, capture_output=True, text=True)
    assert "ValueError" in run.stderr and "the Triton kernels need a CUDA device" in run.stderr


@pytest.mark.parametrize("static", [False, True])
def test_a_sharded_sequence_is_refused(model, prompts, static):
    """A hook that hands each rank its part of the sequence, as context parallelism does.

    A static cache has keys enough for the whole of it.
    """
    cache = StaticCache(model.config.text_config, max_cache_len=64) if static else None
    shard = model.model.language_model.layers[0].register_forward_pre_hook(
        lambda module, args, kwargs: (
            tuple(x[:, :10] for x in args),
            {**kwargs, "position_embeddings": [x[:, :10] for x in kwargs["position_embeddings"]]},
        ),
        with_kwargs=True,
    )
    try:
        with pytest.raises(ValueError, match="cut the sequence into shards"):
            model(**prompts.batch(prompts.row(3, ("video", 4, 2, 2), 5)), past_key_values=cache)
    finally:
        shard.remove()


def test_a_paged_cache_with_vision_is_refused(model, prompts):
    class PagedAttentionCache(SimpleNamespace):
        def get_seq_length(self):
            return 0

    inputs = prompts.batch(prompts.row(3, ("video", 4, 2, 2), 5))
    with pytest.raises(ValueError, match="continuous batching serves text only"):
        model(**inputs, past_key_values=PagedAttentionCache())


def test_a_mask_of_another_length_is_refused(model, prompts):
    inputs = prompts.batch(prompts.row(3, ("video", 4, 2, 2), 5))
    mask = inputs["attention_mask"]
    inputs["attention_mask"] = mask[:, :-2]
    with pytest.raises(ValueError, match="attention_mask covers 24 tokens"):
        model(**inputs)
    for shape in (mask[0], mask[None]):
        inputs["attention_mask"] = shape
        with pytest.raises(ValueError, match="attention_mask has shape .* wanted .batch, tokens"):
            model(**inputs)
