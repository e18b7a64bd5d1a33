"""Every way to generate gives what one whole prefill, or the row alone, gives."""

import copy
import math
from types import SimpleNamespace

import pytest
import torch
from transformers import DynamicCache, StaticCache
from videonsa import generation_videonsa
from videonsa.media_features_videonsa import MediaFeatures, chunks_of

from tiny import VIDEO, make_model, stock_twin

CLOSE = {"atol": 5e-5, "rtol": 1e-4}
# A random model must not write placeholders: fed back with its media, they would stand for more.
GREEDY = {"max_new_tokens": 8, "do_sample": False, "suppress_tokens": list(range(5))}


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.fixture
def rows(prompts):
    """Text only; image, video, image; two videos of different sizes."""
    return [
        prompts.row(12),
        prompts.row(2, ("image", 2, 3), 3, ("video", 3, 2, 2), 1, ("image", 1, 2), 4),
        prompts.row(1, ("video", 2, 2, 4), 2, ("video", 5, 1, 3), 6),
    ]


def cache_of(outputs):
    """Outputs name their cache `cache` from transformers 5.24 on."""
    return outputs["cache"] if "cache" in outputs else outputs["past_key_values"]


def as_input(cache):
    """The keyword under which a cache is passed; the old one still works everywhere."""
    return {"past_key_values": cache}


def last_logits(model, inputs, **kwargs):
    with torch.no_grad():
        return model(**inputs, **kwargs).logits[:, -1]


def generate(model, inputs, **options):
    """(new tokens [B, n], the scores of each step)"""
    outputs = model.generate(
        **inputs, **GREEDY | options, return_dict_in_generate=True, output_logits=True
    )
    return outputs.sequences[:, inputs["input_ids"].shape[1] :], torch.stack(outputs.logits, 1)


def conversation_of(rows, turns):
    """Each row followed by its turn."""
    return [(a + b, media + new) for (a, media), (b, new) in zip(rows, turns, strict=True)]


def conversation(prompts, *turns):
    """Rows of a growing conversation: after turn 1, after turns 1 and 2, ..."""
    ids, media, grown = [], [], []
    for turn_ids, turn_media in turns:
        ids, media = [*ids, *turn_ids], [*media, *turn_media]
        grown.append((ids, media))
    return grown


def test_rows_of_a_mixed_batch_generate_as_alone(model, prompts, rows):
    tokens, logits = generate(model, prompts.batch(*rows))
    for index, row in enumerate(rows):
        alone_tokens, alone_logits = generate(model, prompts.batch(row))
        assert torch.equal(tokens[index : index + 1], alone_tokens)
        torch.testing.assert_close(logits[index : index + 1], alone_logits, **CLOSE)
    stock_tokens, _ = generate(stock_twin(model), prompts.batch(rows[0]))
    assert torch.equal(tokens[:1], stock_tokens)


def test_decoding_equals_a_whole_prefill(model, prompts, rows):
    inputs = prompts.batch(*rows)
    tokens, logits = generate(model, inputs)
    for step in range(tokens.shape[1]):
        longer = dict(inputs)
        longer["input_ids"] = torch.cat([inputs["input_ids"], tokens[:, :step]], dim=1)
        ones = torch.ones_like(tokens[:, :step])
        longer["attention_mask"] = torch.cat([inputs["attention_mask"], ones], dim=1)
        longer["mm_token_type_ids"] = torch.cat([inputs["mm_token_type_ids"], 0 * ones], dim=1)
        torch.testing.assert_close(logits[:, step], last_logits(model, longer), **CLOSE)


@pytest.mark.parametrize("padded", [False, True], ids=["one", "padded"])
@pytest.mark.parametrize(
    "options",
    [
        {"use_cache": False},
        {"cache_implementation": "static"},
        {"cache_implementation": "dynamic"},
        {"prefill_chunk_size": 1},
        {"prefill_chunk_size": 7},
        {"prefill_chunk_size": 7, "cache_implementation": "static"},
        {"prefill_chunk_size": 500},
    ],
    ids=lambda o: "-".join(f"{v}" for v in o.values()),
)
def test_caches_and_chunks_generate_the_same(model, prompts, rows, options, padded):
    inputs = prompts.batch(*rows) if padded else prompts.batch(rows[2])
    expected_tokens, expected_logits = generate(model, inputs)
    tokens, logits = generate(model, inputs, **options)
    assert torch.equal(tokens, expected_tokens)
    torch.testing.assert_close(logits, expected_logits, **CLOSE)


@pytest.mark.parametrize(
    "options",
    [{}, {"prefill_chunk_size": 7}, {"prefill_chunk_size": 7, "cache_implementation": "static"}],
    ids=str,
)
def test_disabled_attention_decodes_as_a_whole_prefill(prompts, rows, options):
    model = make_model(nsa_enabled=False)
    inputs = prompts.batch(*rows)
    tokens, logits = generate(model, inputs, **options)
    longer = {k: v for k, v in inputs.items() if k != "mm_token_type_ids"}
    longer["input_ids"] = torch.cat([inputs["input_ids"], tokens[:, :-1]], dim=1)
    ones = torch.ones_like(tokens[:, :-1])
    longer["attention_mask"] = torch.cat([inputs["attention_mask"], ones], dim=1)
    torch.testing.assert_close(logits[:, -1], last_logits(model, longer), **CLOSE)


@pytest.mark.parametrize("size", [None, 7])
def test_a_static_cache_makes_no_mask_of_all_pairs(model, prompts, rows, size):
    masks = []
    hook = model.model.register_forward_pre_hook(
        lambda model, args, kwargs: masks.append(kwargs["attention_mask"]), with_kwargs=True
    )
    try:
        inputs = prompts.batch(*rows)
        generate(model, inputs, cache_implementation="static", prefill_chunk_size=size)
    finally:
        hook.remove()
    assert torch.equal(masks[0], inputs["attention_mask"])
    full = [mask["full_attention"] if isinstance(mask, dict) else mask for mask in masks[1:]]
    assert full and all(mask.ndim == 4 and mask.shape[2] == 1 for mask in full)


def test_long_prompts_are_encoded_and_read_in_chunks_by_themselves(
    model, prompts, rows, monkeypatch
):
    calls = []
    hook = model.model.visual.register_forward_pre_hook(
        lambda tower, args, kwargs: calls.append(len(args[0])), with_kwargs=True
    )
    try:
        for batch in (prompts.batch(*rows), prompts.batch(rows[2])):
            monkeypatch.undo()
            expected_tokens, expected_logits = generate(model, batch)
            whole = max(calls)
            calls.clear()
            monkeypatch.setattr(generation_videonsa, "PREFILL_CHUNK_SIZE", 6)
            tokens, logits = generate(model, batch)
            assert torch.equal(tokens, expected_tokens)
            torch.testing.assert_close(logits, expected_logits, **CLOSE)
            assert len(calls) > 2 and max(calls) < whole
            calls.clear()
    finally:
        hook.remove()


def test_a_short_rest_of_a_prompt_joins_the_chunk_before(model, prompts):
    """Of less than an eighth of a chunk; the results are those of one pass."""
    assert chunks_of(131104, 16384)[-2:] == [(98304, 114688), (114688, 131104)]
    assert chunks_of(18433, 16384) == [(0, 16384), (16384, 18433)]
    assert chunks_of(7, 3) == [(0, 3), (3, 6), (6, 7)] and chunks_of(2, 3) == [(0, 2)]
    lengths = []
    hook = model.get_input_embeddings().register_forward_pre_hook(
        lambda module, args: lengths.append(args[0].shape[1])
    )
    try:
        inputs = prompts.batch(prompts.row(2, ("video", 7, 2, 2), 1))  # 33 tokens
        _, whole = generate(model, inputs, prefill_chunk_size=None)
        lengths.clear()
        _, read = generate(model, inputs, prefill_chunk_size=16)
    finally:
        hook.remove()
    torch.testing.assert_close(read, whole, **CLOSE)
    assert lengths[:2] == [16, 17] and set(lengths[2:]) == {1}


def test_a_slice_of_features_encodes_the_steps_that_hold_it():
    """An image of 6 tokens, a video of 3 steps of 2 tokens, an image of 4."""
    calls = []

    def encode(pixels, grid, return_dict):
        calls.append((pixels[:, 0].tolist(), grid.tolist()))
        return SimpleNamespace(pooler_output=[pixels[::4]])

    grid = torch.tensor([[1, 4, 6], [3, 2, 4], [1, 4, 4]])
    pixels = torch.arange(64.0)[:, None]
    features = MediaFeatures(encode, pixels, grid, 4, "cpu")
    assert len(features) == 16
    assert features[9:11].flatten().tolist() == [36, 40]
    assert features[10:14].flatten().tolist() == [40, 44, 48, 52]
    assert calls == [
        (list(range(32, 48)), [[2, 2, 4]]),
        (list(range(40, 64)), [[1, 2, 4], [1, 4, 4]]),
    ]


def test_hidden_states_are_those_of_the_whole_prompt(model, prompts, rows, monkeypatch):
    """A prompt that would be read in chunks is read whole where its states are asked for."""
    monkeypatch.setattr(generation_videonsa, "PREFILL_CHUNK_SIZE", 6)
    inputs = prompts.batch(rows[2])
    options = {"output_hidden_states": True, "return_dict_in_generate": True}
    outputs = model.generate(**inputs, max_new_tokens=1, **options)
    assert outputs.hidden_states[0][0].shape[1] == inputs["input_ids"].shape[1]


def test_prompt_lookup_generates_the_same(model, prompts):
    """Guesses from the prompt go through in one call, and wrong ones are cropped off the cache."""
    ids, media = prompts.row(("video", 3, 2, 2), 6)
    inputs = prompts.batch((ids + ids[-6:], media))
    expected, _ = generate(model, inputs)
    actual, _ = generate(model, inputs, prompt_lookup_num_tokens=3)
    assert torch.equal(actual, expected)


@pytest.mark.gpu
def test_chunks_err_no_more_than_the_whole_at_real_widths(prompts):
    """Against one pass in float32 of plain PyTorch, whose error in bfloat16 is the budget."""
    nsa = {"nsa_block_size": 64, "nsa_num_selected_blocks": 32, "nsa_window_size": 256}
    sizes = {"head_dim": 128, "intermediate_size": 18944, "initializer_range": 0.02}
    model = make_model(28, 4, **sizes, **nsa, dtype=torch.bfloat16).cuda()
    inputs = prompts.batch(prompts.row(3, ("image", 6, 9), ("video", 24, 8, 16), 20), device="cuda")
    length = inputs["input_ids"].shape[1]

    def run(model, backend, size):
        model.config.text_config.nsa_backend = backend
        with torch.no_grad():
            outputs = model.model(**inputs, **as_input(DynamicCache()), nsa_chunk_size=size)
        return outputs.last_hidden_state[0, -(length % 1000) :]

    chunked, whole = run(model, "triton", 1000), run(model, "triton", None)
    eager = run(model, "reference", None)
    exact = run(model.float(), "reference", None)
    error, budget = ((x.float() - exact).norm() for x in (chunked, eager))
    assert len(chunked) == length % 1000 > 100 and error <= 2 * budget
    assert (whole.float() - exact).norm() <= 2 * budget


@pytest.mark.gpu
def test_an_offloaded_cache_generates_the_same(prompts, rows):
    model = make_model(head_dim=16, nsa_block_size=8).cuda()
    inputs = prompts.batch(*rows, device="cuda")
    expected, _ = generate(model, inputs)
    # Layers are stored late, as on a busy GPU: fetching them must wait for it.
    model.model.language_model.layers[0].register_forward_pre_hook(
        lambda layer, args: torch.cuda._sleep(20_000_000)
    )
    assert torch.equal(generate(model, inputs, cache_implementation="offloaded")[0], expected)


def test_beams_and_several_sequences_start_from_the_same_prompt(model, prompts, rows):
    inputs = prompts.batch(*rows)
    together = model.generate(**inputs, **GREEDY, num_beams=3)
    start = inputs["input_ids"].shape[1]
    for index, row in enumerate(rows):
        own = prompts.batch(row)
        alone = model.generate(**own, **GREEDY, num_beams=3)
        assert torch.equal(alone[0, own["input_ids"].shape[1] :], together[index, start:])
    several = model.generate(
        **inputs, max_new_tokens=3, do_sample=True, top_k=1, num_return_sequences=2
    )
    greedy = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert torch.equal(several, greedy.repeat_interleave(2, dim=0))


def test_a_text_turn_on_a_filled_cache(model, prompts):
    first = prompts.row(3, ("video", 4, 2, 2), 4)
    once, twice = conversation(prompts, first, prompts.row(6))
    expected = last_logits(model, prompts.batch(twice))
    with torch.no_grad():
        cache = cache_of(model(**prompts.batch(once), use_cache=True))
        new = {"input_ids": torch.tensor([twice[0][len(once[0]) :]])}
        actual = model(**new, **as_input(cache)).logits[:, -1]
    torch.testing.assert_close(actual, expected, **CLOSE)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("second", [(4,), (2, ("video", 3, 2, 2), 3)], ids=["text", "video"])
def test_turns_after_a_text_only_first_turn(model, prompts, second, kind):
    config = model.config.text_config
    cache = DynamicCache(config=config)
    if kind == "static":
        cache = StaticCache(config=config, max_cache_len=128)
    rows = [prompts.row(9), prompts.row(6)]
    inputs = prompts.batch(*rows)
    answers, _ = generate(model, inputs, **as_input(cache), max_new_tokens=5)
    rows = [(ids + new.tolist(), []) for (ids, _), new in zip(rows, answers, strict=True)]
    rows = conversation_of(rows, [prompts.row(*second) for _ in rows])
    inputs = prompts.batch(*rows)
    expected_tokens, expected_logits = generate(model, inputs)
    tokens, logits = generate(model, inputs, **as_input(cache))
    assert torch.equal(tokens, expected_tokens)
    torch.testing.assert_close(logits, expected_logits, **CLOSE)


def test_an_interrupted_prefill_leaves_a_cache_that_knows_its_video(model, prompts):
    ids, media = prompts.row(2, ("video", 2, 2, 2), 20)  # the video is in the first two chunks
    cache, calls = DynamicCache(config=model.config.text_config), []

    def interrupt(layer, args):
        calls.append(layer)
        if len(calls) == 3:
            raise KeyboardInterrupt

    hook = model.model.language_model.layers[0].register_forward_pre_hook(interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            generate(model, prompts.batch((ids, media)), **as_input(cache), prefill_chunk_size=7)
    finally:
        hook.remove()
    new, _ = prompts.row(5)
    expected = last_logits(model, prompts.batch((ids[:14] + new, media)))
    actual = last_logits(model, {"input_ids": torch.tensor([new])}, **as_input(cache))
    torch.testing.assert_close(actual, expected, **CLOSE)


def test_an_emptied_cache_has_forgotten_its_videos(model, prompts):
    cache = StaticCache(config=model.config.text_config, max_cache_len=64)
    text, token = prompts.batch(prompts.row(9)), torch.tensor([[7]])
    with torch.no_grad():
        model(**prompts.batch(prompts.row(3, ("video", 6, 2, 2), 8)), **as_input(cache))
        cache.reset()
        model(**text, **as_input(cache))
        actual = model(input_ids=token, **as_input(cache)).logits[:, -1]
        whole = torch.cat([text["input_ids"], token], dim=1)
        expected = model(input_ids=whole).logits[:, -1]
    torch.testing.assert_close(actual, expected, **CLOSE)


@pytest.mark.parametrize("size", [None, 7])
def test_embeddings_alone_generate_as_one_call_reads_them(model, prompts, size):
    """Their positions are those of text, as in stock."""
    inputs = prompts.batch(prompts.row(3, ("video", 4, 2, 2), 5))
    inputs["inputs_embeds"] = model.get_input_embeddings()(inputs.pop("input_ids")).detach()
    with torch.no_grad():
        expected = model(**inputs).logits[:, -1]
    options = {"return_dict_in_generate": True, "output_logits": True}
    outputs = model.generate(**inputs, **GREEDY, **options, prefill_chunk_size=size)
    torch.testing.assert_close(outputs.logits[0], expected, **CLOSE)


@pytest.mark.parametrize("via", ["forward", "generate"])
def test_the_positions_of_a_second_video_turn(model, prompts, via):
    """Two seconds of a video, then a video of one step: each goes on one past what was largest."""
    first = prompts.row(3, ("video", 2, 2, 2), 2)
    once, twice = conversation(prompts, first, prompts.row(1, ("video", 1, 2, 2), 2))
    seen, cache = [], DynamicCache(config=model.config.text_config)
    hook = model.model.language_model.register_forward_pre_hook(
        lambda model, args, kwargs: seen.append(kwargs["position_ids"][-3:, 0]), with_kwargs=True
    )
    try:
        with torch.no_grad():
            model(**prompts.batch(once), **as_input(cache))
            if via == "forward":
                new = prompts.batch(prompts.row(1, ("video", 1, 2, 2), 2))
                del new["attention_mask"]
                model(**new, **as_input(cache))
            else:
                model.generate(**prompts.batch(twice), **as_input(cache), max_new_tokens=1)
    finally:
        hook.remove()
    assert seen[0].tolist() == [
        [0, 1, 2, 3, 4, 4, 4, 4, 6, 6, 6, 6, 7, 8, 9],
        [0, 1, 2, 3, 4, 4, 5, 5, 4, 4, 5, 5, 7, 8, 9],
        [0, 1, 2, 3, 4, 5, 4, 5, 4, 5, 4, 5, 7, 8, 9],
    ]
    assert seen[1].tolist() == [
        [10, 11, 12, 12, 12, 12, 14, 15, 16],
        [10, 11, 12, 12, 13, 13, 14, 15, 16],
        [10, 11, 12, 13, 12, 13, 14, 15, 16],
    ]


@pytest.mark.parametrize("given", ["everything", "new media", "new tokens"])
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_a_second_video_turn_on_a_filled_cache(model, prompts, given, kind):
    """`generate` goes on with the whole conversation, its new media, or its new tokens alone."""
    config = model.config.text_config
    cache = DynamicCache(config=config)
    if kind == "static":
        cache = StaticCache(config=config, max_cache_len=128)
    first = prompts.row(3, ("video", 4, 2, 2), 4)
    second_ids, second_media = prompts.row(2, ("video", 3, 1, 3), 1, ("image", 2, 2), 5)

    inputs = prompts.batch(first)
    answer, _ = generate(model, inputs, **as_input(cache), max_new_tokens=5)
    # The last token of the answer is not in the cache yet.
    ids = first[0] + answer[0].tolist()
    whole = (ids + second_ids, first[1] + second_media)
    expected_tokens, expected_logits = generate(model, prompts.batch(whole))

    inputs = prompts.batch(whole)
    if given != "everything":
        new = prompts.batch((second_ids, second_media))
        inputs |= {k: v for k, v in new.items() if "grid" in k or "pixel" in k}
        inputs["second_per_grid_ts"] = new["second_per_grid_ts"]
    if given == "new tokens":
        cached = len(ids) - 1
        inputs["input_ids"] = inputs["input_ids"][:, cached:]
        inputs["mm_token_type_ids"] = inputs["mm_token_type_ids"][:, cached:]
    tokens, logits = generate(model, inputs, **as_input(cache))
    assert torch.equal(tokens, expected_tokens)
    torch.testing.assert_close(logits, expected_logits, **CLOSE)


def test_a_second_video_turn_of_a_padded_batch(model, prompts):
    firsts = [prompts.row(3, ("video", 4, 2, 2), 4), prompts.row(2, ("image", 2, 2), 1)]
    seconds = [prompts.row(2), prompts.row(1, ("video", 3, 2, 2), 3)]
    inputs = prompts.batch(*firsts)
    cache = DynamicCache(config=model.config.text_config)
    answers, _ = generate(model, inputs, **as_input(cache), max_new_tokens=3)

    wholes = []
    for first, second, answer in zip(firsts, seconds, answers.tolist(), strict=True):
        wholes.append((first[0] + answer + second[0], first[1] + second[1]))
    new = prompts.batch(*seconds)
    ids = torch.cat([inputs["input_ids"], answers, new["input_ids"]], dim=1)
    mask = torch.cat(
        [inputs["attention_mask"], torch.ones_like(answers), new["attention_mask"]], dim=1
    )
    media = {k: v for k, v in prompts.batch(*wholes).items() if "grid" in k or "pixel" in k}
    media["second_per_grid_ts"] = torch.ones(2)
    # The left-padded second turns stand in the middle of the rows.
    tokens, _ = generate(
        model, {"input_ids": ids, "attention_mask": mask, **media}, **as_input(cache)
    )
    for index, whole in enumerate(wholes):
        alone, _ = generate(model, prompts.batch(whole))
        assert torch.equal(tokens[index : index + 1], alone)


def test_two_conversations_alternate_on_one_model(model, prompts):
    starts = [prompts.row(3, ("video", n, 2, 2), 4) for n in (4, 6)]
    turns = [prompts.row(5), prompts.row(2, ("video", 2, 2, 2), 3)]
    caches, histories = [], []
    for start in starts:
        cache = DynamicCache(config=model.config.text_config)
        answer, _ = generate(model, prompts.batch(start), **as_input(cache), max_new_tokens=3)
        caches.append(cache)
        histories.append((start[0] + answer[0].tolist(), start[1]))
    for turn in turns:
        for index, cache in enumerate(caches):
            ids, media = histories[index]
            whole = (ids + turn[0], media + turn[1])
            expected, _ = generate(model, prompts.batch(whole), max_new_tokens=3)
            actual, _ = generate(model, prompts.batch(whole), **as_input(cache), max_new_tokens=3)
            assert torch.equal(actual, expected)
            histories[index] = (whole[0] + actual[0].tolist(), whole[1])


def test_a_copied_cache_serves_several_questions(model, prompts):
    video = prompts.row(3, ("video", 4, 2, 2))
    questions = [prompts.row(4), prompts.row(7), prompts.row(1, ("image", 2, 2), 3)]
    with torch.no_grad():
        prefix = cache_of(model(**prompts.batch(video), use_cache=True))
    for question in questions:
        _, whole = conversation(prompts, video, question)
        inputs = prompts.batch(whole)
        expected, _ = generate(model, inputs)
        actual, _ = generate(model, inputs, **as_input(copy.deepcopy(prefix)))
        assert torch.equal(actual, expected)


def test_a_cropped_cache_goes_on_where_it_was_cut(model, prompts):
    """Cut back to before the second video, then fed another one, then text token by token."""
    first = prompts.row(3, ("video", 4, 2, 2), 4)
    _, long = conversation(prompts, first, prompts.row(2, ("video", 5, 2, 2), 3))
    with torch.no_grad():
        cache = cache_of(model(**prompts.batch(long), use_cache=True))
        cache.crop(len(first[0]) - len(long[0]))
        for turn in (prompts.row(2, ("video", 2, 1, 4), 2), prompts.row(9)):
            _, whole = conversation(prompts, first, turn)
            expected = last_logits(model, prompts.batch(whole))
            inputs = prompts.batch(turn)
            del inputs["attention_mask"]
            if turn[1]:
                other = copy.deepcopy(cache)
                actual = model(**inputs, **as_input(other)).logits[:, -1]
            else:
                for token in turn[0]:
                    step = {"input_ids": torch.tensor([[token]])}
                    actual = model(**step, **as_input(cache)).logits[:, -1]
            torch.testing.assert_close(actual, expected, **CLOSE)


def positions_after(model, cache, **inputs):
    """Positions over time of the new tokens of a call, [B, S]."""
    seen = []
    hook = model.model.language_model.register_forward_pre_hook(
        lambda model, args, kwargs: seen.append(kwargs["position_ids"][0]), with_kwargs=True
    )
    try:
        with torch.no_grad():
            model(**inputs, **as_input(cache))
    finally:
        hook.remove()
    return seen[0].tolist()


def test_text_goes_on_past_the_largest_position_of_a_row_padded_on_the_right(model, prompts):
    ids, media = prompts.row(2, ("image", 1, 6), 1)  # the image reaches position 8
    inputs = prompts.batch((ids, media), prompts.row(len(ids) + 3))
    for name in ("input_ids", "attention_mask", "mm_token_type_ids"):
        inputs[name][0] = inputs[name][0].roll(-3)
    cache = DynamicCache(config=model.config.text_config)
    with torch.no_grad():
        model(**inputs, **as_input(cache))
    mask = torch.cat([inputs["attention_mask"], torch.ones(2, 2, dtype=torch.long)], dim=1)
    new = {"input_ids": torch.full((2, 2), 9), "attention_mask": mask}
    assert positions_after(model, cache, **new) == [[11, 12], [14, 15]]


def test_a_turn_that_is_all_padding_moves_no_position(model, prompts):
    """A row without a second turn, beside one whose second turn is a video."""
    first, video = prompts.batch(prompts.row(4), prompts.row(4)), prompts.row(("video", 1, 2, 2))
    cache = DynamicCache(config=model.config.text_config)
    new = prompts.batch(video)
    new["input_ids"] = torch.cat([new["input_ids"], torch.zeros_like(new["input_ids"])])
    seen = torch.cat([torch.ones(2, 4), torch.tensor([[1.0], [0.0]]).expand(2, 6)], dim=1).long()
    new |= {"attention_mask": seen}
    del new["mm_token_type_ids"]
    with torch.no_grad():
        model(**first, **as_input(cache))
        model(**new, **as_input(cache))
    mask = torch.cat([seen, torch.ones(2, 2, dtype=torch.long)], dim=1)
    last = {"input_ids": torch.full((2, 2), 9), "attention_mask": mask}
    assert positions_after(model, cache, **last) == [[8, 9], [4, 5]]


def test_text_goes_on_past_the_largest_position_of_a_medium_that_was_cut(model, prompts):
    """The second row of a wide image starts again on the left, but not the positions."""
    ids, media = prompts.row(2, ("image", 2, 6), 1)
    cache = DynamicCache(config=model.config.text_config)
    with torch.no_grad():
        model(**prompts.batch((ids, media)), **as_input(cache))
    cache.crop(3 + 6 + 1 - len(ids))
    assert positions_after(model, cache, input_ids=torch.tensor([[9, 9]])) == [[9, 10]]


def test_one_token_that_was_cropped_is_forgotten(model, prompts):
    """The last token of an image, in whose place text comes and then another image."""
    ids, media = prompts.row(2, ("image", 1, 3))
    cache = DynamicCache(config=model.config.text_config)
    with torch.no_grad():
        model(**prompts.batch((ids[:-1], media)), **as_input(cache))
        cache.crop(-1)
        model(input_ids=torch.tensor([[9]]), **as_input(cache))
        new = prompts.batch(prompts.row(("image", 1, 1)))
        del new["attention_mask"]
        model(**new, **as_input(cache))
    assert cache.nsa_state.vision.int().tolist() == [[0, 0, 0, 1, 1, 0, 0, 1, 0]]


def test_a_prompt_fed_by_hand_in_chunks(model, prompts):
    """Chunks that cut a video: the caller gives the positions, the cache keeps the rest."""
    row = prompts.row(3, ("video", 6, 2, 2), 5)
    inputs = prompts.batch(row)
    with torch.no_grad():
        expected = model(**inputs).logits
        positions, _ = model.model.get_rope_index(
            inputs["input_ids"],
            video_grid_thw=inputs["video_grid_thw"],
            second_per_grid_ts=inputs["second_per_grid_ts"],
        )
        embeds = model.get_input_embeddings()(inputs["input_ids"])
        features = model.get_video_features(
            inputs["pixel_values_videos"], inputs["video_grid_thw"], return_dict=True
        ).pooler_output
        embeds[inputs["input_ids"] == VIDEO] = torch.cat(features)
        for size in (5, 16):
            cache, parts = DynamicCache(config=model.config.text_config), []
            for start in range(0, embeds.shape[1], size):
                end = min(start + size, embeds.shape[1])
                outputs = model(
                    inputs_embeds=embeds[:, start:end],
                    mm_token_type_ids=inputs["mm_token_type_ids"][:, start:end],
                    position_ids=positions[:, :, start:end],
                    **as_input(cache),
                )
                parts.append(outputs.logits)
            torch.testing.assert_close(torch.cat(parts, dim=1), expected, **CLOSE)
            # The last chunk was text; the state knows where the next token stands.
            follow = {"input_ids": torch.tensor([[9]])}
            after = model(**follow, **as_input(cache)).logits[:, -1]
            longer = prompts.batch(([*row[0], 9], row[1]))
            torch.testing.assert_close(after, last_logits(model, longer), **CLOSE)


def test_a_generated_placeholder_is_text(model, prompts):
    """An id alone does not make a token vision: nothing was shown for it."""
    row = prompts.row(3, ("video", 4, 2, 2), 4)
    with torch.no_grad():
        cache = cache_of(model(**prompts.batch(row), use_cache=True))
        new = torch.tensor([[7, VIDEO, VIDEO, 9]])
        together = model(input_ids=new, **as_input(copy.deepcopy(cache))).logits[:, -1]
        for token in new[0]:
            alone = model(input_ids=token.view(1, 1), **as_input(cache)).logits[:, -1]
    torch.testing.assert_close(together, alone, **CLOSE)


def test_media_that_fit_neither_part_are_refused(model, prompts):
    first = prompts.row(3, ("video", 4, 2, 2), 4)
    _, whole = conversation(prompts, first, prompts.row(2, ("video", 3, 2, 2), 3))
    with torch.no_grad():
        cache = cache_of(model(**prompts.batch(first), use_cache=True))
    inputs = prompts.batch(whole)
    other = prompts.batch(prompts.row(("video", 3, 2, 2), ("video", 5, 2, 2)))
    inputs |= {k: v for k, v in other.items() if "grid" in k or "pixel" in k}
    with pytest.raises(ValueError, match="the videos given have 32 tokens"):
        model.generate(**inputs, **as_input(cache), **GREEDY)


PIXELS, GRID, SECONDS = "pixel_values_videos", "video_grid_thw", "second_per_grid_ts"
FAULTS = {
    "rows too many": (
        lambda x: {PIXELS: torch.cat([torch.zeros_like(x[PIXELS]), x[PIXELS]])},
        r"is \[96, 1176\], but video_grid_thw \(1 videos\) stands for \[48, 1176\]",
    ),
    "rows too few": (
        lambda x: {PIXELS: x[PIXELS][:-4]},
        r"is \[44, 1176\], but video_grid_thw \(1 videos\) stands for \[48, 1176\]",
    ),
    "rows of another width": (lambda x: {PIXELS: x[PIXELS][:, :588]}, r"is \[48, 588\], but"),
    "a batch of rows": (lambda x: {PIXELS: x[PIXELS][None]}, r"is \[1, 48, 1176\], but"),
    "a list": (lambda x: {PIXELS: x[PIXELS].tolist()}, "is a list, but"),
    "a larger grid": (
        lambda x: {GRID: 2 * x[GRID], PIXELS: x[PIXELS].repeat(8, 1)},
        "1 videos given have 96 tokens.* hold 12 plac|videos given have 96 tokens.* and 12 after",
    ),
    "a smaller grid": (
        lambda x: {GRID: x[GRID] - torch.tensor([1, 0, 0]), PIXELS: x[PIXELS][:32]},
        "1 videos given have 8 tokens.* hold 12 plac|videos given have 8 tokens.* and 12 after",
    ),
    "a video too many": (
        lambda x: {GRID: x[GRID].repeat(2, 1), PIXELS: x[PIXELS].repeat(2, 1)},
        "2 videos given have 24 tokens.* hold 12 plac|videos given have 24 tokens.* and 12 after",
    ),
    "a flat grid": (lambda x: {GRID: x[GRID][0]}, r"video_grid_thw is \[3\] of .*; wanted an int"),
    "a grid of floats": (
        lambda x: {GRID: x[GRID].float()},
        r"is \[1, 3\] of torch.float32; ",
    ),
    "a grid of nothing": (lambda x: {GRID: x[GRID][:0], PIXELS: x[PIXELS][:0]}, r"is \[0, 3\] of"),
    "an odd grid": (lambda x: {GRID: x[GRID] + torch.tensor([0, 1, 0])}, "multiples of 2 patches"),
    "no grid": (lambda x: {GRID: None}, "pixel_values_videos came without video_grid_thw"),
    "seconds too many": (lambda x: {SECONDS: [1.0, 2.0]}, "has 2 numbers for the 1 videos"),
    "seconds of no number": (lambda x: {SECONDS: [math.nan]}, r"is \[nan\]; wanted a number for"),
    "seconds below zero": (
        lambda x: {SECONDS: torch.tensor([-1.0])},
        r"is tensor.*; wanted a ",
    ),
    "seconds alone": (lambda x: {SECONDS: 1.0}, "is 1.0; wanted a number for each video"),
}


class Stream:
    """What a `PixelStream` is to the model: rows by slices, and a shape."""

    def __init__(self, pixels):
        self.pixels, self.shape = pixels, pixels.shape

    def __getitem__(self, rows):
        return self.pixels[rows]


@pytest.mark.parametrize("via", ["forward", "generate", "chunks", "stream", "turn", "new turn"])
@pytest.mark.parametrize(("change", "message"), FAULTS.values(), ids=list(FAULTS))
def test_pixels_that_do_not_fit_are_refused(model, prompts, change, message, via):
    """Whichever way they come: with both numbers, and before anything is put into the cache."""
    row = prompts.row(3, ("video", 3, 2, 2), 4)
    inputs, cache = prompts.batch(row), DynamicCache(config=model.config.text_config)
    if via in ("turn", "new turn"):
        first = prompts.row(5)
        with torch.no_grad():
            model(**prompts.batch(first), **as_input(cache))
        new = inputs
        inputs = prompts.batch((first[0] + row[0], row[1]))
        if via == "new turn":
            inputs |= {"input_ids": new["input_ids"]}
            del inputs["mm_token_type_ids"]
    cached = cache.get_seq_length()
    inputs |= change(inputs)
    inputs = {name: x for name, x in inputs.items() if x is not None}
    if via == "stream" and torch.is_tensor(inputs[PIXELS]):
        inputs[PIXELS] = Stream(inputs[PIXELS])
    with pytest.raises(ValueError, match=message):
        if via == "forward":
            model(**inputs, **as_input(cache))
        else:
            size = 7 if via in ("chunks", "stream") else None
            model.generate(**inputs, **GREEDY, **as_input(cache), prefill_chunk_size=size)
    assert cache.get_seq_length() == cached and getattr(cache, "nsa_state", None) is None


@pytest.mark.parametrize("size", [0, -1, 1.5, "7", True])
def test_a_chunk_size_that_is_none_is_refused(model, prompts, size):
    inputs = prompts.batch(prompts.row(3, ("video", 3, 2, 2), 4))
    with pytest.raises(ValueError, match=f"is {size!r}; wanted a whole number of tokens"):
        model.generate(**inputs, **GREEDY, prefill_chunk_size=size)


@pytest.mark.parametrize("size", [None, 7])
def test_pixels_may_be_an_array(model, prompts, size):
    inputs = prompts.batch(prompts.row(3, ("video", 3, 2, 2), 4))
    expected, _ = generate(model, inputs)
    inputs[PIXELS] = inputs[PIXELS].numpy()
    assert torch.equal(generate(model, inputs, prefill_chunk_size=size)[0], expected)


def test_the_grids_of_a_conversation_may_come_again_without_pixels(model, prompts):
    """As `generate` passes them while it decodes, though a placeholder was written."""
    inputs = prompts.batch(prompts.row(3, ("video", 3, 2, 2), 4))
    cache, token = DynamicCache(config=model.config.text_config), torch.tensor([[VIDEO]])
    with torch.no_grad():
        model(**inputs, **as_input(cache))
        expected = model(input_ids=token, **as_input(copy.deepcopy(cache))).logits
        actual = model(input_ids=token, video_grid_thw=inputs[GRID], **as_input(cache)).logits
    assert torch.equal(actual, expected)


def test_no_layer_gets_a_mask_of_all_pairs_with_vision(model, prompts, rows):
    masks = []
    hook = model.model.language_model.layers[0].register_forward_pre_hook(
        lambda layer, args, kwargs: masks.append(kwargs["attention_mask"]), with_kwargs=True
    )
    try:
        with torch.no_grad():
            model(**prompts.batch(*rows))
    finally:
        hook.remove()
    assert masks == [None]


def test_a_grid_without_pixels_is_refused(model, prompts):
    inputs = prompts.batch(prompts.row(3, ("video", 3, 2, 2), 4))
    del inputs[PIXELS]
    for call in (model, model.generate):
        with pytest.raises(ValueError, match="video_grid_thw came without pixel_values_videos"):
            call(**inputs)


def test_chunks_without_a_cache_are_refused(model, prompts, rows):
    with pytest.raises(ValueError, match="without a cache"):
        model.generate(**prompts.batch(rows[1]), **GREEDY, prefill_chunk_size=4, use_cache=False)


@pytest.mark.parametrize("chunk", [None, 4])
def test_an_assistant_reads_the_media_and_changes_nothing(model, prompts, rows, chunk):
    inputs = prompts.batch(rows[1])
    expected, _ = generate(model, inputs)
    assistant, calls = make_model(), []
    assistant.generation_config.num_assistant_tokens = 3
    assistant.generation_config.num_assistant_tokens_schedule = "constant"
    assistant.generation_config.assistant_confidence_threshold = 0
    watch = model.register_forward_pre_hook(lambda *_: calls.append(1))
    actual, _ = generate(model, inputs, assistant_model=assistant, prefill_chunk_size=chunk)
    watch.remove()
    assert torch.equal(actual, expected)
    assert len(calls) == 2  # of 8 tokens: each call keeps three of the assistant's and adds one


@pytest.mark.parametrize("vision", [False, True], ids=["text", "video"])
@pytest.mark.parametrize("given", ["everything", "ids"])
@pytest.mark.parametrize("by", ["prompt lookup", "assistant"])
def test_a_second_turn_may_be_guessed(model, prompts, by, given, vision):
    """What is cached is not read again, and an assistant goes on without the cached media."""
    guesser = {"prompt_lookup_num_tokens": 3}
    if by == "assistant":
        guesser = {"assistant_model": make_model(seed=1)}
    first = prompts.row(3, ("video", 3, 2, 2), 4) if vision else prompts.row(20)
    inputs, cache = prompts.batch(first), DynamicCache(config=model.config.text_config)
    answer, _ = generate(model, inputs, **as_input(cache))
    ids = [*first[0], *answer[0].tolist(), *first[0][:3], 9]
    inputs = prompts.batch((ids, first[1]))
    expected, _ = generate(model, inputs)
    if given == "ids":
        inputs = {"input_ids": inputs["input_ids"]}
    actual, _ = generate(model, inputs, **as_input(cache), **guesser)
    assert torch.equal(actual, expected)
