"""What a run attended to, as it is recorded: against brute force in float64, and in every call."""

import numpy as np
import pytest
import torch
from transformers import DynamicCache
from videonsa import attention_videonsa

from commands import attention_sinks
from commands.attention_layout import locate_vision
from commands.attention_record import AttentionRecord
from commands.attention_watch import CHUNK_ELEMENTS, AttentionWatch
from tiny import VIDEO, make_model

GREEDY = {"max_new_tokens": 4, "do_sample": False, "suppress_tokens": list(range(5))}
B, S = 4, 2  # of the tiny models


@pytest.fixture(scope="module")
def model():
    return make_model(dtype=torch.float64)


@pytest.fixture
def inputs(prompts):
    """18 + 2 + 10 vision tokens: blocks of 4 cross frames of 6, 2 and 5, and media."""
    row = prompts.row(3, ("video", 3, 2, 3), 2, ("image", 1, 2), 1, ("video", 2, 1, 5), 4)
    return in_float64(prompts.batch(row))


def in_float64(inputs):
    return {name: x.double() if x.is_floating_point() else x for name, x in inputs.items()}


def recorded(model, inputs, **options):
    layout = locate_vision(model.config, inputs)
    with AttentionWatch(model, layout) as watch:
        ids = model.generate(**inputs, **GREEDY | options)
    return watch.record(), ids


def assert_same(one, two):
    for name, value in vars(one).items():
        other = getattr(two, name)
        if isinstance(value, np.ndarray):
            np.testing.assert_allclose(value, other, atol=1e-5, rtol=1e-5, err_msg=name)
    assert one.num_question_rows == two.num_question_rows and one.settings == two.settings


def captured(model, inputs, monkeypatch):
    """Query, key and gates of every layer's sparse and dense rows, of one pass."""
    seen, own = [], attention_videonsa.VideoNSAAttention
    sparse, dense = own.attend_sparse, own.attend_dense

    def attend_sparse(self, query, key, value, gates, plan):
        q, k = query[plan.vision_queries], key[plan.vision_keys]
        seen.append({"q": q, "k": k, "v": value[plan.vision_keys], "gates": gates})
        return sparse(self, query, key, value, gates, plan)

    def attend_dense(self, query, key, value, plan):
        seen[-1] |= {"queries": query[0], "keys": key[0]}
        return dense(self, query, key, value, plan)

    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(own, "attend_sparse", attend_sparse)
        patch.setattr(own, "attend_dense", attend_dense)
        model(**inputs)
    return seen


def select(q, k, position):
    """The blocks that one query [H, D] selects of keys [N, K, D], by the paper's rule."""
    group = q.shape[0] // k.shape[1]
    own, chosen = position // B, []
    for head in range(k.shape[1]):
        complete = (position + 1) // B
        importance = torch.zeros(own + 1, dtype=torch.float64)
        if complete:
            means = k[: complete * B, head].unflatten(0, (-1, B)).mean(1)
            scores = q[head * group : (head + 1) * group] @ means.T * q.shape[1] ** -0.5
            importance[:complete] = scores.softmax(-1).sum(0)
        importance[own] = torch.inf
        chosen.append(sorted(importance.topk(min(S, own + 1)).indices.tolist()))
    return chosen


# 18 + 2 + 10 tokens in 30 places: three steps of 6, one of 2, two of 5.
STEPS = [0] * 6 + [1] * 6 + [2] * 6 + [3] * 2 + [4] * 5 + [5] * 5


def test_the_layout_knows_where_every_vision_token_stands(model, inputs):
    layout = locate_vision(model.config, inputs)
    assert layout.num_steps == 6 and layout.medium.tolist() == [0, 0, 0, 1, 2, 2]
    assert layout.packed_steps.tolist() == STEPS
    assert layout.height.tolist() == [2, 2, 2, 1, 1, 1]
    assert layout.width.tolist() == [3, 3, 3, 2, 5, 5]
    seconds = [[0, 1], [1, 2], [2, 3], [np.nan] * 2, [0, 1], [1, 2]]
    np.testing.assert_array_equal(layout.seconds, seconds)
    ids = inputs["input_ids"][0]
    assert (ids[layout.first_token] == torch.tensor([VIDEO] * 3 + [1] + [VIDEO] * 2)).all()
    shares = layout.block_steps(B)
    assert shares.shape == (8, 6)
    np.testing.assert_allclose(shares[1], [0.5, 0.5, 0, 0, 0, 0])  # tokens 4 to 7
    np.testing.assert_allclose(shares[4], [0, 0, 0.5, 0.5, 0, 0])
    np.testing.assert_allclose(shares[7], [0, 0, 0, 0, 0, 1])  # two tokens, none missing


def test_blocks_are_the_patches_that_they_hold(model, inputs):
    """Block 1 ends frame 0 and begins frame 1; block 7 has two tokens, of which one is seen."""
    record, _ = recorded(model, inputs)
    record.chosen_tokens[5], record.chosen_blocks[:, :, 5] = 28, torch.tensor([1, -1])
    record.chosen_blocks[1, :, 5] = torch.tensor([1, 7])
    lit = record.selected_patches(5)
    assert [x.tolist() for x in lit] == [
        [[0, 0, 0], [0, 1, 1]],
        [[1, 1, 0], [0, 0, 0]],
        [[0, 0, 0], [0, 0, 0]],
        [[0, 0]],
        [[0, 0, 0, 0, 0]],
        [[0, 0, 0, 0.5, 0]],
    ]
    assert [x.sum() for x in record.selected_patches(5, layer=0, group=1)] == [2, 2, 0, 0, 0, 0]


def test_a_head_whose_gate_hardly_changes_is_like_none(inputs):
    model = make_model(dtype=torch.float64)
    gates = model.model.language_model.layers[0].self_attn.g_proj_2
    gates.weight.data[0] *= 1e-6  # of head 0, compressed
    record, _ = recorded(model, inputs)
    undefined = np.isnan(record.gate_correlations[0])
    assert undefined[0, 0].all() and undefined[0, :, 0].all()
    assert not undefined[0, 1:, 1:].any() and not undefined[1:].any()


def test_timestamps_between_the_steps_of_a_video_are_text(model, prompts):
    """As `timestamps=True` of the processor writes them, before each step."""
    ids, media = prompts.row(2, ("video", 3, 1, 2), 4)
    start = ids.index(VIDEO)
    for step in range(3):
        ids[start + 4 * step : start + 4 * step] = prompts.words(2)
    inputs = in_float64(prompts.batch((ids, media)))
    layout = locate_vision(model.config, inputs)
    assert layout.first_token.tolist() == [start + 2, start + 6, start + 10]
    assert layout.packed_steps.tolist() == [0, 0, 1, 1, 2, 2] and layout.medium.tolist() == [0] * 3
    record, _ = recorded(model, inputs)
    assert (record.selections.sum((2, 3)) == 4 + 2 * 2).all()
    np.testing.assert_allclose(record.text_attention.sum(-1), 1, atol=1e-6)


def test_selections_and_gates_are_those_of_a_brute_force(model, inputs, monkeypatch):
    record, _ = recorded(model, inputs)
    assert record.bin_of_step.tolist() == [*range(6)]
    for layer, seen in enumerate(captured(model, inputs, monkeypatch)):
        counts = np.zeros((2, 6, 8), int)
        for position, q in enumerate(seen["q"]):
            chosen = select(q, seen["k"], position)
            for head, blocks in enumerate(chosen):
                counts[head, STEPS[position], blocks] += 1
            bins = np.flatnonzero(record.chosen_tokens == position)
            for place in bins:
                kept = [[b for b in row if b >= 0] for row in record.chosen_blocks[layer, :, place]]
                assert kept == chosen
        np.testing.assert_array_equal(record.selections[layer], counts)

        gates = seen["gates"].permute(2, 1, 0).numpy()  # [3, H, N]
        for step in range(6):
            mean = gates[..., np.array(STEPS) == step].mean(-1)
            np.testing.assert_allclose(record.gate_means[layer, ..., step], mean, atol=1e-6)
        np.testing.assert_allclose(record.gate_deviations[layer], gates.std(-1), atol=1e-5)
        for branch in range(3):
            wanted = np.corrcoef(gates[branch])
            np.testing.assert_allclose(record.gate_correlations[layer, branch], wanted, atol=1e-5)
    middle = [(STEPS.index(step) + 29 - STEPS[::-1].index(step)) // 2 for step in range(6)]
    assert record.chosen_tokens.tolist() == middle


def test_text_reads_what_a_softmax_over_all_keys_says(model, inputs, monkeypatch):
    record, ids = recorded(model, inputs)
    layout, prompt = record.layout, inputs["input_ids"].shape[1]
    assert record.num_question_rows == 5  # the end marker of the last video and four words
    assert record.text_positions.tolist() == [*range(prompt - 5, prompt + 3)]
    assert record.answer_reads().shape == (2, 4, 7)  # four tokens of an answer, one row for each
    whole = dict(inputs, input_ids=ids, attention_mask=torch.ones_like(ids))
    whole["mm_token_type_ids"] = None
    for layer, seen in enumerate(captured(model, whole, monkeypatch)):
        keys = seen["keys"].repeat_interleave(7, 1)
        for row, position in enumerate(record.text_positions):
            scores = torch.einsum("hd,lhd->hl", seen["queries"][position], keys[: position + 1])
            weights = (scores * 8**-0.5).softmax(-1).mean(0).numpy()
            steps = np.append(layout.step_of_token, [-1] * 4)[: position + 1]
            wanted = np.bincount(np.where(steps < 0, 6, steps), weights, minlength=7)
            np.testing.assert_allclose(record.text_attention[layer, row], wanted, atol=2e-6)


def attention_of(seen, head):
    """[5, queries, keys] of one query head, brute force: each branch, combined, and dense.

    The compressed branch's keys are the block means; combined spreads them over their tokens.
    """
    q, k = seen["q"][:, head], seen["k"][:, head // 7]
    n = len(q)
    means = k[: n // B * B].unflatten(0, (-1, B)).mean(1)
    found = [torch.zeros(n, len(means)), *(torch.zeros(n, n) for _ in range(4))]
    for position in range(n):
        blocks = select(seen["q"][position], seen["k"], position)[head // 7]
        own = [j for j in range(position + 1) if j // B in blocks]
        near = [*range(max(0, position - 4), position + 1)]
        for place, keys, read in (
            (0, means, [*range((position + 1) // B)]),
            (1, k, own),
            (2, k, near),
            (4, k, [*range(position + 1)]),
        ):
            if read:
                weights = (keys[read] @ q[position] * 8**-0.5).softmax(0)
                found[place][position, read] = weights.float()
        gates = seen["gates"][position, head].float()
        found[3][position, : n // B * B] = gates[0] * found[0][position].repeat_interleave(B) / B
        found[3][position] += gates[1] * found[1][position] + gates[2] * found[2][position]
    return found


def test_sinks_are_those_of_a_brute_force(model, inputs, monkeypatch):
    """With a wider net than the paper's, because a random model has none of its sinks."""
    monkeypatch.setattr(attention_sinks, "IQRS", -0.5)
    layout = locate_vision(model.config, inputs)
    with AttentionWatch(model, layout, sinks=True) as watch:
        model.generate(**inputs, **GREEDY)
    record, found = watch.record(), 0
    for layer, seen in enumerate(captured(model, inputs, monkeypatch)):
        ratios, counts = np.zeros((5, 14)), np.zeros((5, 6))
        for head in range(14):
            v = seen["v"][:, head // 7]
            for place, weights in enumerate(attention_of(seen, head)):
                values = v[:28].unflatten(0, (-1, B)).mean(1) if place == 0 else v
                norms = values.norm(dim=1).numpy()
                low, median, high = np.quantile(norms, [0.25, 0.5, 0.75])
                # Those that attend: all later ones, also to a weight that is all but zero.
                readers = (weights > 0).sum(0) if place not in (3, 4) else 30 - torch.arange(30)
                mean = (weights.sum(0) / readers.clamp(min=1)).numpy()
                sinks = (mean > 0.1) & (norms < median + 0.5 * (high - low))
                ratios[place, head] = sinks.mean()
                for key in np.flatnonzero(sinks):
                    places = range(key * B, key * B + B) if place == 0 else [key]
                    for token in places:
                        counts[place, STEPS[token]] += 1 / len(places)
        np.testing.assert_allclose(record.sink_ratios[layer], ratios, atol=1e-9)
        np.testing.assert_allclose(record.sink_counts[layer], counts, atol=1e-9)
        found += (ratios.sum(1) > 0).sum()
    assert found >= 8  # of two layers and five branches
    chunked = AttentionWatch(model, layout, sinks=True)
    with chunked:
        model.generate(**inputs, **GREEDY, prefill_chunk_size=7)
    np.testing.assert_allclose(chunked.record().sink_counts, record.sink_counts)


@pytest.mark.parametrize("chunk", [3, 7, 16, 44])
def test_in_chunks_it_is_the_same(model, inputs, chunk):
    """44: the last chunk is of text alone, and runs the stock attention."""
    whole, ids = recorded(model, inputs)
    assert inputs["input_ids"].shape[1] == 46
    chunked, same = recorded(model, inputs, prefill_chunk_size=chunk)
    assert torch.equal(ids, same)
    assert_same(whole, chunked)


def test_rows_are_taken_in_chunks_without_a_trace(model, inputs, monkeypatch):
    whole, _ = recorded(model, inputs)
    monkeypatch.setitem(CHUNK_ELEMENTS, "cpu", 1)
    assert_same(whole, recorded(model, inputs)[0])


def test_watching_changes_no_answer_and_leaves_nothing_behind(model, inputs):
    layers = [layer.self_attn for layer in model.model.language_model.layers]
    before = [dict(layer.__dict__) for layer in layers]
    plain = model.generate(**inputs, **GREEDY)
    _, ids = recorded(model, inputs)
    assert torch.equal(plain, ids)
    for layer, own in zip(layers, before, strict=True):
        assert layer.__dict__.keys() - {"watch_blocks"} == own.keys() - {"watch_blocks"}
        assert layer.watch_blocks is None and not layer._forward_hooks


def test_shares_rates_and_keys_add_up(model, inputs):
    record, _ = recorded(model, inputs)
    np.testing.assert_allclose(record.selection_shares().sum(-1), 1)
    rates = record.selection_rates()
    assert ((rates >= 0) & (rates <= 1) | np.isnan(rates)).all()
    # Of 30 queries those from the third block on choose one block besides their own; those of
    # the second one have one to choose from.
    could, forced = record._choices()
    assert could.tolist() == [26, 22, 18, 14, 10, 6, 2, 0] and forced.tolist() == [4] * 7 + [2]
    assert (record.selections.sum((2, 3)) == 4 + 26 * 2).all()
    keys = record.keys_read()
    own = sum(position % B + 1 for position in range(30))
    assert keys["selected"] == (26 * B + own) / 30
    assert keys["dense"] == 15.5 and keys["window"] == (1 + 2 + 3 + 4 + 26 * 5) / 30
    overlaps = record.overlaps()
    assert overlaps.shape == (2, 2, 2) and (overlaps[:, [0, 1], [0, 1]] == 1).all()


def test_it_comes_back_from_disk(model, inputs, tmp_path):
    record, _ = recorded(model, inputs)
    record.save(tmp_path / "new")
    again = AttentionRecord.load(tmp_path / "new")
    assert_same(record, again)
    for name, value in vars(record.layout).items():
        np.testing.assert_array_equal(value, getattr(again.layout, name))


def test_a_later_turn_reads_the_cached_video(model, prompts):
    """Of text alone: its rows are recorded, from the layout of the whole conversation."""
    row = prompts.row(2, ("video", 3, 2, 3), 4)
    first = in_float64(prompts.batch(row))
    out = model.generate(
        **first, **GREEDY, past_key_values=DynamicCache(), return_dict_in_generate=True
    )
    cache = out["cache"] if "cache" in out else out["past_key_values"]
    ids = torch.cat([out.sequences, torch.tensor([prompts.words(5)])], 1)
    grid = {"video_grid_thw": first["video_grid_thw"]}
    layout = locate_vision(model.config, {"input_ids": ids, **grid})
    with AttentionWatch(model, layout) as watch:
        model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), past_key_values=cache, **GREEDY
        )
    record = watch.record()
    new = range(out.sequences.shape[1] - 1, ids.shape[1] + 3)  # its last token was not cached
    assert record.text_positions.tolist() == [*new]
    assert not record.is_sparse
    np.testing.assert_allclose(record.text_attention.sum(-1), 1, atol=1e-6)
    assert record.text_attention[..., :3].sum(-1).min() > 0.01


def test_dense_vision_has_no_selections(inputs):
    model = make_model(dtype=torch.float64, nsa_enabled=False)
    record, _ = recorded(model, inputs)
    assert not record.is_sparse and np.isnan(record.gate_means).all()
    np.testing.assert_allclose(record.text_attention.sum(-1), 1, atol=1e-6)
    chunked, _ = recorded(model, inputs, prefill_chunk_size=7)
    np.testing.assert_allclose(record.text_attention, chunked.text_attention, atol=1e-6)


def test_images_that_attend_densely_are_no_part_of_a_block(inputs):
    model = make_model(dtype=torch.float64, nsa_modalities=["video"])
    record, _ = recorded(model, inputs)
    assert len(record.layout.packed) == 28 and record.selections.shape[-1] == 7
    assert record.chosen_tokens[3] == -1 and not record.selections[:, :, 3].any()
    assert record.selection_shares()[:, :, 3].sum() == 0
    assert record.text_attention[:, :, 3].min() > 0


def test_of_a_long_question_the_last_rows_are_kept(model, prompts):
    record, _ = recorded(model, in_float64(prompts.batch(prompts.row(("image", 2, 2), 300))))
    assert record.num_question_rows == 256 and record.text_attention.shape[1] == 256 + 3
    assert record.text_positions[0] == record.layout.length - 256
    assert record.answer_reads().shape[1] == 4


def test_many_steps_share_bins(prompts):
    model = make_model()
    record, _ = recorded(model, prompts.batch(prompts.row(("video", 100, 1, 2), 3)))
    assert record.selections.shape[2] == 64 and (record.selections.sum(-1) > 0).all()
    assert np.bincount(record.bin_of_step).max() == 2
    assert (record.bin_of_step[record.layout.packed_steps[record.chosen_tokens]] == range(64)).all()


REFUSED = {
    "text alone": ("no image and no video, so there is nothing to look at", {}),
    "two prompts": ("input_ids hold 2 prompts; attention is recorded of one alone", {}),
    "padding": ("the prompt is padded", {}),
    "beams": ("a batch of 2 rows ran", {"num_beams": 2}),
    "more steps": ("the video tokens up to token 46 do not fit video_grid_thw", {}),
    "fewer steps": ("the video tokens up to token 21 do not fit video_grid_thw", {}),
    "other seconds": ("seconds has 2 numbers for video 0; wanted one for each of its 3", {}),
    "another prompt": ("30 vision tokens ran, but the layout has 12", {}),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_recorded_is_refused(model, prompts, inputs, case):
    message, options = REFUSED[case]
    small = prompts.batch(prompts.row(("video", 2, 2, 3), 2))
    rows = {"text alone": [prompts.row(4)], "two prompts": [prompts.row(("image", 1, 2))] * 2}
    given = prompts.batch(*rows[case]) if case in rows else inputs
    if case == "padding":
        given = dict(inputs, attention_mask=(torch.arange(46) > 0).long()[None])
    if case in ("more steps", "fewer steps"):
        steps = [[3, 4, 6], [3, 2, 10]] if case == "more steps" else [[2, 4, 6], [2, 2, 10]]
        given = dict(inputs, video_grid_thw=torch.tensor(steps))
    layout, seconds = None, [[0, 1], [0, 1]] if case == "other seconds" else None
    with pytest.raises(ValueError, match=message):
        layout = locate_vision(model.config, small if case == "another prompt" else given, seconds)
        with AttentionWatch(model, layout):
            model.generate(**given, **GREEDY | options)
    assert (layout is None) == (case not in ("beams", "another prompt"))


def test_the_released_semantics_are_refused(prompts):
    model = make_model(nsa_semantics="released")
    layout = locate_vision(model.config, prompts.batch(prompts.row(("image", 2, 2))))
    with pytest.raises(ValueError, match="nsa_semantics is 'released'"):
        AttentionWatch(model, layout)


@pytest.mark.gpu
def test_the_kernels_are_recorded_as_the_reference(prompts):
    """With an answer long enough to be replayed, were it not watched."""
    inputs = prompts.batch(prompts.row(3, ("video", 9, 2, 3), 4), device="cuda")
    records = []
    for backend in ("triton", "reference"):
        model = make_model(head_dim=16, nsa_block_size=8, nsa_backend=backend).cuda()
        record, _ = recorded(model, inputs, max_new_tokens=12)
        assert len(record.text_positions) == 5 + 11
        np.testing.assert_allclose(record.text_attention.sum(-1), 1, atol=1e-5)
        records.append(record)
    ours, wanted = records
    np.testing.assert_allclose(ours.text_attention[:, :5], wanted.text_attention[:, :5], atol=0.01)
    np.testing.assert_allclose(ours.gate_means, wanted.gate_means, atol=0.01)
    # Rounding may exchange two blocks of all but equal importance.
    assert abs(ours.selections - wanted.selections).sum() <= 0.05 * wanted.selections.sum()
