"""How much is worked on at once: everything on a large card, less where it is nearly full."""

import pytest
import torch
from videonsa import generation_videonsa, memory_videonsa, vision_videonsa
from videonsa.memory_videonsa import prefill_tokens, units_that_fit

from tiny import make_model


def test_units_that_fit_are_bounded_on_both_sides():
    assert units_that_fit(100, 10, 3.0, None, 0.5) == 100
    assert units_that_fit(100, 10, 3.0, 10_000, 0.5) == 100
    assert units_that_fit(100, 10, 3.0, 300, 0.5) == 50
    assert units_that_fit(100, 10, 3.0, -5, 0.5) == 10
    assert units_that_fit(6, 10, 3.0, 0, 0.5) == 6


def test_a_prompt_is_read_in_halves_of_chunks_down_to_the_smallest():
    text = make_model().config.text_config
    row = memory_videonsa.mlp_bytes(text, 2)
    sizes = [prefill_tokens(16384, text, 2, 2 * row * tokens) for tokens in (10**6, 16384, 16383)]
    assert sizes == [16384, 16384, 8192]
    assert prefill_tokens(16384, text, 2, 0) == 2048
    assert prefill_tokens(6, text, 2, 0) == 6 and prefill_tokens(16384, text, 2, None) == 16384


def test_a_full_device_changes_the_chunks_and_not_the_answer(prompts, monkeypatch):
    model = make_model()
    inputs = prompts.batch(prompts.row(3, ("video", 6, 4, 4), 5))
    options = {"max_new_tokens": 4, "do_sample": False, "output_logits": True}
    options |= {"return_dict_in_generate": True}
    expected = model.generate(**inputs, **options)
    lengths = []
    model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(kwargs["inputs_embeds"].shape[1]),
        with_kwargs=True,
    )
    patches = []
    model.model.visual.blocks[0].register_forward_pre_hook(
        lambda module, args: patches.append(len(args[0]))
    )
    for module in (generation_videonsa, vision_videonsa):
        monkeypatch.setattr(module, "free_memory", lambda device: 0)
    monkeypatch.setattr(memory_videonsa, "LEAST_CHUNK_SIZE", 32)
    monkeypatch.setattr(vision_videonsa, "LEAST_PATCHES", 64)
    full = model.generate(**inputs, **options)
    assert lengths[:4] == [32, 32, 32, 10] and max(patches) == 64
    assert torch.equal(full.sequences, expected.sequences)
    for one, other in zip(full.logits, expected.logits, strict=True):
        torch.testing.assert_close(one, other, atol=5e-5, rtol=1e-4)


def test_a_device_without_a_number_is_the_current_one(monkeypatch):
    """Devices by number alone, as some of torch's calls take them."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    values = {"mem_get_info": {0: (50, 1000), 1: (60, 100)}}
    values |= {"memory_reserved": {0: 0, 1: 20}, "memory_allocated": {0: 0, 1: 15}}
    values |= {"get_per_process_memory_fraction": {0: 1.0, 1: 0.7}}
    for name, by_number in values.items():
        monkeypatch.setattr(torch.cuda, name, by_number.__getitem__, raising=False)
    for device in ("cuda", torch.device("cuda"), "cuda:1"):
        assert memory_videonsa.usable_memory(device) == 70
    assert memory_videonsa.usable_memory("cuda:0") == 50


@pytest.mark.gpu
def test_memory_that_is_free_heeds_a_limit_of_the_process():
    device = torch.device("cuda", torch.cuda.current_device())
    total = torch.cuda.mem_get_info(device)[1]
    held = torch.empty(2**20, device=device)
    try:
        torch.cuda.set_per_process_memory_fraction(0.1, device)
        assert memory_videonsa.usable_memory(device) <= 0.1 * total + 1
        assert memory_videonsa.free_memory(device) < memory_videonsa.usable_memory(device)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)
    assert memory_videonsa.free_memory("cpu") is None
    del held
