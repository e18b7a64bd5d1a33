"""What `forward` and `generate` refuse before they compute anything, and what they do not."""

import copy
import re

import pytest
import torch
from transformers import DynamicCache, GenerationConfig, StaticCache
from transformers.utils import logging

from tiny import FIRST_WORD, IMAGE, VIDEO, make_model, stock_twin

CLOSE = {"atol": 5e-5, "rtol": 1e-4}
GREEDY = {"max_new_tokens": 3, "do_sample": False, "suppress_tokens": list(range(5))}
MEDIA = ("pixel_values", "pixel_values_videos", "image_grid_thw", "video_grid_thw")


@pytest.fixture(scope="module")
def model():
    return make_model()


def call(model, via, inputs):
    if via == "generate":
        return model.generate(**inputs, **GREEDY)
    with torch.no_grad():
        return model(**inputs).logits


def embeddings(model, ids):
    return model.get_input_embeddings()(ids).detach()


def another(words):
    """Another word for each."""
    return FIRST_WORD + (words - FIRST_WORD + 1) % (64 - FIRST_WORD)


def text_of(model, prompts):
    return prompts.batch(prompts.row(9))["input_ids"]


BOTH_WAYS = pytest.mark.parametrize("via", ["forward", "generate"])
ODD_TOKENS = {
    "one row": (
        lambda ids: ids[0],
        r"input_ids is \[9\] of torch.int64; .* give input_ids\[N",
    ),
    "three axes": (lambda ids: ids[None], r"input_ids is \[1, 1, 9\] of"),
    "floats": (lambda ids: ids.float(), r"input_ids is \[1, 9\] of torch.float32"),
    "truth": (lambda ids: ids.bool(), r"input_ids is \[1, 9\] of torch.bool"),
    "a list": (lambda ids: ids.tolist(), "input_ids is a list; wanted a tensor of integers"),
    "an array": (lambda ids: ids.numpy(), "input_ids is a ndarray; wanted a tensor of integers"),
    "no rows": (lambda ids: ids[:0], r"input_ids is \[0, 9\] .*; wanted at least one row"),
    "no tokens": (lambda ids: ids[:, :0], r"input_ids is \[1, 0\] .*; wanted at least one row"),
    "past the vocabulary": (lambda ids: 0 * ids + 64, "hold 64, but the vocabulary has .* 0 to 63"),
    "of a label": (lambda ids: 0 * ids - 100, "hold -100, but the vocabulary has the ids from 0"),
}


@BOTH_WAYS
@pytest.mark.parametrize(("change", "message"), ODD_TOKENS.values(), ids=list(ODD_TOKENS))
def test_tokens_that_are_none_are_refused(model, prompts, change, message, via):
    with pytest.raises(ValueError, match=message):
        call(model, via, {"input_ids": change(text_of(model, prompts))})


@BOTH_WAYS
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x[0], r"inputs_embeds is \[9, 112\] .*; wanted .* \[batch, tokens, 112\]"),
        (lambda x: x[..., :7], r"inputs_embeds is \[1, 9, 7\]"),
        (lambda x: x.int(), r"inputs_embeds is \[1, 9, 112\] of torch.int32"),
        (lambda x: x[:0], r"inputs_embeds is \[0, 9, 112\] .*; wanted at least one row"),
    ],
    ids=["one row", "narrow", "integers", "empty"],
)
def test_embeddings_that_are_none_are_refused(model, prompts, change, message, via):
    embeds = change(embeddings(model, text_of(model, prompts)))
    with pytest.raises(ValueError, match=message):
        call(model, via, {"inputs_embeds": embeds})


def test_a_call_without_tokens_is_refused(model):
    with pytest.raises(ValueError, match="neither input_ids nor inputs_embeds came"):
        model()


@pytest.mark.parametrize("types", [0, 1], ids=["too short", "of a row"])
def test_types_that_do_not_fit_embeddings_are_refused(model, prompts, types):
    embeds = embeddings(model, text_of(model, prompts))
    given = torch.zeros(1, 8).long() if types == 0 else torch.zeros(9).long()
    with pytest.raises(ValueError, match=r"mm_token_type_ids is \[.*; wanted \[1, 9\], a type"):
        model(inputs_embeds=embeds, mm_token_type_ids=given)


@BOTH_WAYS
@pytest.mark.parametrize("vision", [False, True], ids=["text", "video"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda mask: mask[:, 2:], "attention_mask covers (7|19) tokens, but .* are (9|21)"),
        (lambda mask: torch.cat([mask, mask], 1), "covers (18|42) tokens, but .* are (9|21)"),
        (lambda mask: mask.repeat(2, 1), "attention_mask has 2 rows, but there are 1 of tokens"),
        (lambda mask: mask[0], r"attention_mask has shape \[(9|21)\]; wanted \[batch, tokens\]"),
        (lambda mask: mask.tolist(), r"attention_mask is a list; wanted \[batch, tokens\]"),
    ],
    ids=["short", "long", "rows", "one row", "a list"],
)
def test_masks_that_do_not_fit_are_refused(model, prompts, change, message, vision, via):
    inputs = prompts.batch(prompts.row(3, ("video", 3, 2, 2), 4) if vision else prompts.row(9))
    inputs["attention_mask"] = change(inputs["attention_mask"])
    with pytest.raises(ValueError, match=message):
        call(model, via, inputs)


@BOTH_WAYS
@pytest.mark.parametrize("vision", [False, True], ids=["text", "video"])
@pytest.mark.parametrize("shape", [(1, 5), (2, 1, 5), (3, 2, 21), (21,)], ids=str)
def test_positions_that_do_not_fit_are_refused(model, prompts, shape, vision, via):
    inputs = prompts.batch(prompts.row(3, ("video", 3, 2, 2), 4) if vision else prompts.row(21))
    inputs["position_ids"] = torch.zeros(shape).long()
    with pytest.raises(ValueError, match=r"position_ids is \[.* for 1 rows of 21 new tokens"):
        call(model, "forward", inputs)


# Placeholders and media


@BOTH_WAYS
@pytest.mark.parametrize("kind", ["image", "video"])
def test_placeholders_without_media_are_refused_or_noticed(model, prompts, kind, via, caplog):
    medium = ("image", 3, 4) if kind == "image" else ("video", 3, 2, 2)
    inputs = prompts.batch(prompts.row(3, medium, 4))
    ids = {"input_ids": inputs["input_ids"]}
    message = f"hold 12 placeholders of {kind}s, but no pixel_values.* Pass pixels, grids and"
    for given in ({k: v for k, v in inputs.items() if k not in MEDIA}, ids):
        if via == "forward":  # stock's takes them for text
            logging.warning_once.cache_clear()
            caplog.clear()
            call(model, via, given)
            assert re.search(message, caplog.text)
            continue
        with pytest.raises(ValueError, match=message):
            call(model, via, given)


@BOTH_WAYS
def test_placeholders_of_one_kind_without_media_beside_another_are_refused(model, prompts, via):
    inputs = prompts.batch(prompts.row(3, ("video", 3, 2, 2), 1, ("image", 2, 2), 4))
    for name in ("pixel_values", "image_grid_thw"):
        del inputs[name]
    inputs["position_ids"] = torch.arange(inputs["input_ids"].shape[1])[None]
    with pytest.raises(ValueError, match="hold 4 placeholders of images, but no pixel_values came"):
        call(model, via, inputs)


def test_placeholders_of_a_new_turn_without_media_are_refused(model, prompts):
    """Where a user gives them; those that a call continues with may be generated."""
    first, second = prompts.row(3, ("video", 2, 2, 2), 2), prompts.row(2, ("video", 1, 2, 2), 3)
    cache = DynamicCache(config=model.config.text_config)
    model.generate(**prompts.batch(first), past_key_values=cache, max_new_tokens=1)
    whole = prompts.batch((first[0] + second[0], first[1] + second[1]))
    ids = whole["input_ids"]
    with pytest.raises(ValueError, match="hold 4 placeholders of videos, but no pixel_values_v"):
        model.generate(input_ids=ids, past_key_values=cache, **GREEDY)
    new = {"input_ids": ids[:, len(first[0]) :], "attention_mask": torch.ones_like(ids)}
    with pytest.raises(ValueError, match="hold 4 placeholders of videos, but no pixel_values_v"):
        model.generate(**new, past_key_values=cache, **GREEDY)


@BOTH_WAYS
def test_placeholders_under_padding_are_not_counted(model, prompts, via):
    """Else another row's video would be taken for them."""
    inputs = prompts.batch(prompts.row(3, ("video", 3, 2, 2), 4))
    inputs["attention_mask"] = 0 * inputs["attention_mask"]
    with pytest.raises(ValueError, match="12 tokens, but the new tokens hold 0 placeholders"):
        call(model, via, inputs)


@BOTH_WAYS
def test_a_text_that_names_the_placeholders_is_text_where_types_say_so(model, prompts, via):
    ids = torch.tensor([[9, VIDEO, 8, IMAGE, 7]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    inputs["mm_token_type_ids"] = torch.zeros_like(ids)
    expected = call(stock_twin(model), via, inputs)
    assert torch.equal(call(model, via, inputs), expected)


def test_embeddings_may_hold_the_features_already(model, prompts):
    """Whether ids come beside them or not, with the grids that tell their positions."""
    inputs = prompts.batch(prompts.row(3, ("video", 3, 2, 2), 4))
    with torch.no_grad():
        expected = model(**inputs).logits
        embeds = embeddings(model, inputs["input_ids"])
        pixels = inputs.pop("pixel_values_videos")
        features = model.get_video_features(pixels, inputs["video_grid_thw"], return_dict=True)
        embeds[inputs["input_ids"] == VIDEO] = torch.cat(features.pooler_output)
        actual = model(**inputs, inputs_embeds=embeds).logits
    torch.testing.assert_close(actual, expected, **CLOSE)


@BOTH_WAYS
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64])
def test_pixels_that_are_colours_are_refused(model, prompts, dtype, via):
    inputs = prompts.batch(prompts.row(3, ("video", 3, 2, 2), 4))
    inputs["pixel_values_videos"] = inputs["pixel_values_videos"].to(dtype)
    with pytest.raises(ValueError, match=f"pixel_values_videos is of {dtype}; wanted the floats"):
        call(model, via, inputs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_pixels_may_be_of_another_float_type(model, prompts, dtype):
    inputs = prompts.batch(prompts.row(3, ("video", 3, 2, 2), 4))
    inputs["pixel_values_videos"] = inputs["pixel_values_videos"].to(dtype)
    exact = inputs | {"pixel_values_videos": inputs["pixel_values_videos"].float()}
    assert torch.equal(call(model, "forward", inputs), call(model, "forward", exact))


@BOTH_WAYS
@pytest.mark.parametrize("change", [lambda g: g.tolist(), lambda g: g[0], lambda g: g.numpy()])
def test_a_grid_of_another_form_is_refused_without_pixels_too(model, prompts, change, via):
    inputs = prompts.batch(prompts.row(9))
    inputs["video_grid_thw"] = change(torch.tensor([[1, 2, 2]]))
    with pytest.raises(ValueError, match="video_grid_thw is .*; wanted an integer tensor"):
        call(model, via, inputs)


# Caches


def cache_of(model, kind="dynamic", room=64):
    config = model.config.text_config
    if kind == "static":
        return StaticCache(config, max_cache_len=room)
    return DynamicCache(config=config)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("vision", [False, True], ids=["text", "video"])
def test_a_cache_of_another_conversation_is_refused(model, prompts, vision, kind):
    cache = cache_of(model, kind)
    first = prompts.row(3, ("video", 2, 2, 2), 4) if vision else prompts.row(17)
    answered = model.generate(**prompts.batch(first), past_key_values=cache, **GREEDY)
    good = torch.cat([answered, torch.tensor([[9, 8, 7]])], dim=1)
    other = good.clone()
    other[0, 1] = another(other[0, 1])
    before, used = cache.get_seq_length(), copy.deepcopy(cache)
    message = f"token 1 of row 0 of input_ids is {other[0, 1]}, but the cache, of 19 tokens, was "
    with pytest.raises(ValueError, match=f"{message}filled with {good[0, 1]} there"):
        model.generate(input_ids=other, past_key_values=cache, **GREEDY)
    assert cache.get_seq_length() == before == 19
    expected = model.generate(input_ids=good, past_key_values=used, **GREEDY)
    assert torch.equal(model.generate(input_ids=good, past_key_values=cache, **GREEDY), expected)
    # The second turn is remembered as well.
    last = torch.cat([expected, torch.tensor([[6]])], dim=1)
    last[0, 21] = another(last[0, 21])
    with pytest.raises(ValueError, match="token 21 of row 0"):
        model.generate(input_ids=last, past_key_values=cache, **GREEDY)


def test_an_answer_may_come_back_in_other_tokens(model, prompts):
    """As a tokenizer may cut its text again; only what a user gave is compared."""
    cache = cache_of(model)
    ids = model.generate(**prompts.batch(prompts.row(9)), past_key_values=cache, **GREEDY)
    ids[0, 10] = another(ids[0, 10])
    ids = torch.cat([ids, ids[:, :2]], dim=1)
    model.generate(input_ids=ids, past_key_values=cache, **GREEDY)


def test_what_was_cropped_is_not_compared(model, prompts):
    """Other tokens came in its place, by forward."""
    cache = cache_of(model)
    ids = prompts.batch(prompts.row(9))["input_ids"]
    model.generate(input_ids=ids, past_key_values=cache, **GREEDY)
    cache.crop(4 - cache.get_seq_length())
    other = torch.cat([ids[:, :4], another(ids[:, 4:])], dim=1)
    with torch.no_grad():
        model(input_ids=other[:, 4:-1], past_key_values=cache)
    expected = model.generate(input_ids=other, **GREEDY)
    assert torch.equal(model.generate(input_ids=other, past_key_values=cache, **GREEDY), expected)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("masked", [False, True], ids=["no mask", "mask"])
@pytest.mark.parametrize("length", [5, 9])
def test_a_cache_that_holds_the_prompt_already_is_refused(model, prompts, length, masked, kind):
    cache, inputs = cache_of(model, kind), prompts.batch(prompts.row(9))
    with torch.no_grad():
        model(**inputs, past_key_values=cache)
    inputs = {k: v[:, :length] for k, v in inputs.items() if masked or k == "input_ids"}
    message = rf"{length} tokens came, but the cache has 9 already.* \[1, {9 + length}\]"
    with pytest.raises(ValueError, match=message):
        model.generate(**inputs, past_key_values=cache, **GREEDY)


@pytest.mark.parametrize("columns", [4, 9, 10, 30])
def test_a_mask_that_fits_neither_turn_nor_conversation_is_refused(model, prompts, columns):
    cache = cache_of(model)
    with torch.no_grad():
        model(**prompts.batch(prompts.row(9)), past_key_values=cache)
    new = {"input_ids": torch.full((1, 5), 9), "attention_mask": torch.ones(1, columns).long()}
    message = f"attention_mask covers {columns} tokens, but the cached and the new ones are 5 or 14"
    with pytest.raises(ValueError, match=message):
        model.generate(**new, past_key_values=cache, **GREEDY)


@BOTH_WAYS
@pytest.mark.parametrize("vision", [False, True], ids=["text", "video"])
@pytest.mark.parametrize("rows", [2, 3])
def test_a_cache_of_other_rows_is_refused(model, prompts, rows, vision, via):
    cache = cache_of(model)
    row = prompts.row(3, ("video", 2, 2, 2), 4) if vision else prompts.row(9)
    with torch.no_grad():
        model(**prompts.batch(row, row), past_key_values=cache)
    ids = torch.full((rows + 1, 20), 9)
    with pytest.raises(ValueError, match=f"the cache has 2 rows, but there are {rows + 1} of toke"):
        call(model, via, {"input_ids": ids, "past_key_values": cache})


def test_a_cache_whose_rows_were_repeated_goes_on(model, prompts):
    cache = cache_of(model)
    first = prompts.batch(prompts.row(3, ("video", 2, 1, 4), 4), prompts.row(9))
    ones = torch.ones(2, 3).long()
    new = {"input_ids": torch.tensor([[7, 9, 8], [6, 5, 7]])}
    new["attention_mask"] = torch.cat([first["attention_mask"], ones], dim=1)
    with torch.no_grad():
        model(**first, past_key_values=cache)
        expected = model(**new, past_key_values=copy.deepcopy(cache)).logits
        cache.batch_repeat_interleave(2)
        new = {name: x.repeat_interleave(2, dim=0) for name, x in new.items()}
        actual = model(**new, past_key_values=cache).logits
    torch.testing.assert_close(actual, expected.repeat_interleave(2, dim=0), **CLOSE)


@pytest.mark.parametrize("options", [{"use_cache": False}, {"generation_config": False}], ids=str)
def test_a_cache_that_is_not_to_be_used_is_refused(model, prompts, options):
    if "generation_config" in options:
        options = {"generation_config": GenerationConfig(use_cache=False)}
    inputs = prompts.batch(prompts.row(9))
    with pytest.raises(ValueError, match="past_key_values came with use_cache=False"):
        model.generate(**inputs, **GREEDY, **options, past_key_values=cache_of(model))


@BOTH_WAYS
def test_what_is_no_cache_is_refused(model, prompts, via):
    inputs = prompts.batch(prompts.row(9))
    with pytest.raises(ValueError, match="past_key_values is a tuple; wanted a cache"):
        call(model, via, {**inputs, "past_key_values": ()})


@BOTH_WAYS
@pytest.mark.parametrize("vision", [False, True], ids=["text", "video"])
def test_a_static_cache_without_room_is_refused(model, prompts, vision, via):
    inputs = prompts.batch(prompts.row(3, ("video", 3, 2, 2), 4) if vision else prompts.row(21))
    with pytest.raises(ValueError, match="has room for 20 tokens, but 0 are in it and 21 are new"):
        call(model, via, {**inputs, "past_key_values": cache_of(model, "static", room=20)})


@pytest.mark.parametrize("left", [0, 4])
def test_a_static_cache_that_was_cut_is_noticed_by_single_tokens(model, prompts, left):
    """Emptied, or cut before its video: positions go on from what is left, past the old end too."""
    ids, media = prompts.row(3, ("video", 2, 1, 4), 8)
    short, cut = cache_of(model), cache_of(model, "static")
    with torch.no_grad():
        model(**prompts.batch((ids, media)), past_key_values=cut)
        for layer in cut.layers:
            layer.cumulative_length.fill_(left)
        if left:
            model(input_ids=torch.tensor([ids[:left]]), past_key_values=short)
        for token in [9, 8, 7, 6] * 6:
            step = torch.tensor([[token]])
            expected = model(input_ids=step, past_key_values=short).logits
            actual = model(input_ids=step, past_key_values=cut).logits
            torch.testing.assert_close(actual, expected, **CLOSE)
