"""A cache with buffers holds what the library's own would hold, whatever is done to it."""

import copy

import pytest
import torch
from transformers import DynamicCache, StaticCache
from videonsa.cache_videonsa import SPARE, BufferedLayer, use_buffers

from tiny import make_model

LAYERS, ROWS, HEADS, SIZE = 2, 3, 2, 4


def tokens(number, rows=ROWS):
    return [torch.randn(rows, HEADS, number, SIZE) for _ in range(2)]


def both():
    """A cache with buffers and one without."""
    buffered = DynamicCache()
    use_buffers(buffered)
    return buffered, DynamicCache()


@torch.no_grad()
def append(caches, number, rows=ROWS):
    """The same new tokens to each; what every update returned, per cache."""
    returned = [[] for _ in caches]
    for layer in range(LAYERS):
        new = tokens(number, rows)
        for cache, results in zip(caches, returned, strict=True):
            results.extend(cache.update(*(x.clone() for x in new), layer))
    return returned


def assert_equal(buffered, plain):
    assert buffered.get_seq_length() == plain.get_seq_length()
    for ours, theirs in zip(buffered.layers, plain.layers, strict=True):
        assert type(ours) is BufferedLayer
        torch.testing.assert_close(ours.keys, theirs.keys, rtol=0, atol=0)
        torch.testing.assert_close(ours.values, theirs.values, rtol=0, atol=0)


CHANGES = {
    "nothing": lambda cache: None,
    "crop": lambda cache: cache.crop(-2),
    "reorder": lambda cache: cache.reorder_cache(torch.tensor([2, 0, 0])),
    "select": lambda cache: cache.batch_select_indices(torch.tensor([0, 2, 1])),
    "reset": lambda cache: cache.reset(),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("sizes", [(5, 1, 1), (1, SPARE + 1, 3), (63, 65, 1), (SPARE, 1, 1)])
def test_it_holds_what_the_library_s_holds(sizes, change):
    torch.manual_seed(0)
    caches = both()
    for size in sizes:
        for ours, theirs in zip(*append(caches, size), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
        for cache in caches:
            CHANGES[change](cache)
        assert_equal(*caches)


def test_the_number_of_rows_may_change():
    caches = both()
    append(caches, 5)
    for cache in caches:
        cache.batch_repeat_interleave(2)
    append(caches, 2, rows=2 * ROWS)
    assert_equal(*caches)


def test_tokens_are_written_in_place():
    cache, _ = both()
    append([cache], 5)
    where = cache.layers[0].keys.data_ptr()
    for _ in range(SPARE):
        append([cache], 1)
        assert cache.layers[0].keys.data_ptr() == where
    append([cache], 1)
    assert cache.layers[0].keys.data_ptr() != where


def test_there_is_room_for_as_many_tokens_as_were_announced():
    cache = DynamicCache(config=make_model().config.text_config)
    use_buffers(cache, 1000)
    append([cache], 5)
    assert cache.layers[1].buffers.keys.shape == (ROWS, 1000, HEADS, SIZE)


@pytest.mark.parametrize("copied", [copy.deepcopy, copy.copy])
def test_copies_of_a_layer_go_their_own_ways(copied):
    torch.manual_seed(0)
    cache, plain = both()
    append([cache, plain], 5)
    twin, plain_twin = DynamicCache(), DynamicCache()
    twin.layers = [copied(layer) for layer in cache.layers]
    plain_twin.layers = [copied(layer) for layer in plain.layers]
    append([cache, plain], 2)
    append([twin, plain_twin], 3)
    append([cache, plain], 1)
    assert_equal(cache, plain)
    assert_equal(twin, plain_twin)


def test_what_a_cropped_cache_had_is_not_overwritten():
    cache, _ = both()
    append([cache], 5)
    keys = cache.layers[0].keys
    before = keys.clone()
    cache.crop(-3)
    append([cache], 3)
    torch.testing.assert_close(keys, before, rtol=0, atol=0)


def test_tokens_that_do_not_fit_are_refused_as_by_the_library():
    for cache in both():
        append([cache], 5)
        with pytest.raises(RuntimeError):
            append([cache], 1, rows=1)


def test_gradients_flow_through_cached_keys():
    cache, _ = both()
    append([cache], 5)
    key, value = (x.requires_grad_() for x in tokens(2))
    keys, _ = cache.update(key, value, 0)
    loss = keys.square().sum() / 2
    cache.update(*tokens(1), 0)  # which must not write where the loss looks
    loss.backward()
    torch.testing.assert_close(key.grad, key.detach())


def test_a_conversation_goes_on_outside_of_inference_mode():
    caches = both()
    with torch.inference_mode():
        append(caches, 5)
    append(caches, 2)
    assert_equal(*caches)


def test_other_caches_stay_as_they_are():
    config = make_model().config.text_config
    static = StaticCache(config=config, max_cache_len=8)
    use_buffers(static, 5)
    assert not any(type(layer) is BufferedLayer for layer in static.layers)
    use_buffers(None)


def test_the_model_gives_every_cache_buffers():
    model, cache = make_model(), DynamicCache()
    with torch.no_grad():
        model(torch.full((1, 4), 9), past_key_values=cache)
    assert [type(layer) for layer in cache.layers] == 2 * [BufferedLayer]
