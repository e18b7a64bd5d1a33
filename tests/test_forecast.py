"""The forecast of a run: exact where it can be, and what it says when a run does not fit."""

import dataclasses
import re

import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText
from transformers.quantizers.quantizers_utils import should_convert_module
from videonsa.configuration_videonsa import VideoNSAConfig
from videonsa.modeling_videonsa import VideoNSAForConditionalGeneration
from videonsa.nsa_kernels_tiles import ALL_HOT_UP_TO

from commands.forecast import (
    GIB,
    KERNEL_FROM,
    chunk_bytes,
    count_parameters,
    count_quantized,
    forecast,
    longest_chunk,
)
from commands.quantized_loading import bits_of
from memory_videonsa import cache_bytes
from paths import ROOT

VISION_7B = {"hidden_size": 1280, "out_hidden_size": 3584, "intermediate_size": 3420, "depth": 32}
TEXT_3B = {
    "hidden_size": 2048,
    "intermediate_size": 11008,
    "num_hidden_layers": 36,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "vocab_size": 151936,
}


def seven_billion():
    return VideoNSAConfig(vision_config=VISION_7B, tie_word_embeddings=False)


CONFIGS = {
    "7B": seven_billion,
    "3B": lambda: VideoNSAConfig(
        vision_config={**VISION_7B, "out_hidden_size": 2048},
        text_config={**TEXT_3B, "tie_word_embeddings": True},
        tie_word_embeddings=True,
    ),
    "at the root": lambda: AutoConfig.from_pretrained(ROOT, trust_remote_code=True),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_parameters_are_counted_exactly(name):
    config = CONFIGS[name]()
    with torch.device("meta"):
        model = VideoNSAForConditionalGeneration(config)
    model.tie_weights()
    assert count_parameters(config) == sum(weight.numel() for weight in model.parameters())
    assert name != "7B" or round(count_parameters(config) / 1e9, 2) == 8.66


def test_the_kernels_hold_partial_results_from_as_many_keys_as_the_forecast_says():
    assert KERNEL_FROM == ALL_HOT_UP_TO
    assert [longest_chunk(tokens, 16384) for tokens in (7, 18432, 18433)] == [7, 18432, 16384]


def test_the_cache_is_counted_exactly():
    model = AutoModelForImageTextToText.from_pretrained(ROOT, trust_remote_code=True)
    cache = model(torch.arange(10, 17)[None], use_cache=True, return_dict=True)
    cache = cache["cache" if "cache" in cache else "past_key_values"]
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert cache_bytes(model.config.text_config, 7, model.dtype.itemsize) == held


def test_seven_billion_at_128k():
    seen = forecast(seven_billion(), 131072, vision_tokens=131000, new_tokens=256)
    assert (seen.tokens, seen.vision_tokens) == (131328, 131000)
    assert seen.weights == pytest.approx(16.13, abs=0.01)
    assert seen.cache == pytest.approx(28 * 2048 * 131328 / GIB)
    assert seen.weights + seen.cache < seen.peak < seen.weights + seen.cache + 8
    assert seen.fits is None and seen.remedies() == ""
    assert seen.describe() == (
        f"131,328 tokens: 16.1 GiB weights + 7.0 GiB cache, peak {seen.peak:.1f} GiB"
    )


@pytest.mark.parametrize(
    ("tokens", "peak", "measured"),  # GiB on an H100 or H200, as docs/performance.md has them
    [
        (8192, 17.9, 17.8),
        (32768, 21.2, 21.2),
        (65536, 23.0, 23.3),
        (131072, 26.8, 27.5),
        (262144, 34.3, 35.9),
        (524288, 49.3, 48.1),
        (1048576, 79.3, 77.2),
    ],
)
def test_the_peak_is_near_what_was_measured(tokens, peak, measured):
    seen = forecast(seven_billion(), tokens + 32, vision_tokens=tokens, new_tokens=33)
    assert seen.peak == pytest.approx(peak, abs=0.05)
    assert seen.peak == pytest.approx(measured, rel=0.05)


def test_a_short_video_takes_what_the_vision_tower_does():
    """Up to a chunk of the tower, its part is larger than the language model's; here by hand."""
    config = seven_billion()
    seen = forecast(config, 64, vision_tokens=64)
    patch = 2 * (6 * 1280 + 3 * 3420) + (2 + 4) * 3 * 2 * 14 * 14
    tower, mlp = 4 * 64 * patch, 64 * 2 * (4 * 3584 + 3 * 18944)
    assert tower > mlp
    copies = 2 * seen.cache / config.text_config.num_hidden_layers
    assert seen.peak == pytest.approx(seen.weights + seen.cache + copies + tower / GIB, rel=1e-9)


def test_an_offloaded_cache_keeps_two_layers_on_the_device():
    config, tokens = seven_billion(), 500_000
    whole = forecast(config, tokens, vision_tokens=tokens)
    layer = whole.cache / config.text_config.num_hidden_layers
    chunk = chunk_bytes(config, tokens, tokens, torch.bfloat16, available=0) / GIB
    # One in use and the one that is fetched, and two that exist twice.
    least = whole.weights + 2 * layer + 2 * layer + chunk
    for available, fits in ((least + layer / 2, True), (least - layer / 2, False)):
        asked = {"vision_tokens": tokens, "available": int(available * GIB)}
        assert forecast(config, tokens, **asked).offloaded is fits


def test_hardly_any_vision_tokens_are_no_remedy():
    """Below a hundredth of the video, or two frames of it, other words are of more use."""

    def remedy(fitting, frames=None):
        text = 100_000
        seen = forecast(seven_billion(), text + 100_000, vision_tokens=100_000, available=GIB)
        seen = dataclasses.replace(seen, fitting_tokens=text + fitting)
        return seen.remedies(frames).split(";")[0]

    assert remedy(1100) == "at most 1,100 vision tokens fit, or frames of 1% of the pixels"
    assert remedy(900) == "at most 100,900 tokens fit"
    assert remedy(2000, 100).startswith("at most 2,000 vision tokens fit: 2 of the 100 frames")
    assert remedy(1900, 100) == "at most 101,900 tokens fit"


def test_a_peak_grows_with_the_chunk_until_it_is_full_and_then_with_the_cache():
    config = seven_billion()
    peaks = [
        forecast(config, tokens, vision_tokens=tokens).peak
        - forecast(config, tokens, vision_tokens=tokens).cache
        for tokens in (64, 4096, 32768, 65536)
    ]
    assert peaks[0] < peaks[1] < peaks[2]
    assert peaks[3] - peaks[2] < 0.2
    text, video = forecast(config, 65536), forecast(config, 65536, vision_tokens=65536)
    assert text.peak < video.peak


def test_what_would_fit_does_and_a_little_more_does_not():
    config, text = seven_billion(), 500
    asked = {"new_tokens": 100, "available": 40 * GIB}
    large = forecast(config, 10**6, vision_tokens=10**6 - text, **asked)
    assert large.fits is False and large.offloaded
    assert large.describe().endswith("GiB of 40.0 GiB, does not fit")
    vision = large.fitting_vision_tokens
    assert forecast(config, vision + text, vision_tokens=vision, **asked).fits
    assert not forecast(config, vision + text + 1, vision_tokens=vision + 1, **asked).fits
    share = vision / (10**6 - text)
    assert large.remedies(frames=1000) == (
        f"at most {vision:,} vision tokens fit: {int(1000 * share)} of the 1000 frames, or frames "
        f"of {share:.0%} of the pixels; with --load_in 4bit at most {large.smallest_load[1]:,} "
        "tokens fit; "
        'generate(..., cache_implementation="offloaded") keeps the cache off it'
    )
    small = forecast(config, 1000, vision_tokens=500, **asked)
    assert small.fits and small.remedies() == "" and small.fitting_vision_tokens == 500
    none = forecast(config, 1000, vision_tokens=500, new_tokens=100, available=GIB)
    assert none.fitting_tokens == 0 and none.offloaded is False
    assert none.remedies(8).startswith("not even the weights, a short prompt and the answer fit")
    sizes = (part * GIB / 100 for part in range(1600, 1800))
    runs = (forecast(config, 60000, vision_tokens=59500, available=size) for size in sizes)
    little = next(run for run in runs if run.fitting_vision_tokens)
    assert little.remedies(100).startswith(f"at most {little.fitting_tokens:,} tokens fit")
    text_only = forecast(config, 10**6, available=40 * GIB)
    assert text_only.remedies().startswith(f"at most {text_only.fitting_tokens:,} tokens fit;")


def test_the_dtype_is_that_of_weights_and_cache():
    half, full = (forecast(seven_billion(), 8192, dtype=x) for x in (torch.bfloat16, torch.float32))
    assert (full.weights, full.cache) == (2 * half.weights, 2 * half.cache)
    assert dataclasses.asdict(half)["tokens"] == 8192


@pytest.mark.gpu
def test_a_device_is_asked_for_its_free_memory():
    seen = forecast(seven_billion(), 1000, device="cuda")
    assert 0 < seen.available <= torch.cuda.mem_get_info()[1] / GIB


@pytest.mark.parametrize(("tokens", "measured"), [(32768, 23.0), (65536, 29.8)])
def test_a_prompt_that_is_read_whole_takes_more(tokens, measured):
    """Under the released semantics; the peaks of docs/released.md."""
    paper, released = seven_billion(), seven_billion()
    released.text_config.nsa_semantics = "released"
    assert forecast(released, tokens).peak == forecast(paper, tokens).peak  # text alone
    peak = forecast(released, tokens, vision_tokens=tokens).peak
    assert peak == pytest.approx(measured, rel=0.02)
    assert peak > forecast(paper, tokens, vision_tokens=tokens).peak


@pytest.mark.parametrize("tower", [False, True])
@pytest.mark.parametrize("skipped", [[], [r"model.language_model.layers.\d+.mlp", "q_proj"]])
def test_quantised_parameters_are_counted_exactly(tower, skipped):
    config = seven_billion()
    config.quantize_vision_tower = tower
    with torch.device("meta"):
        model = VideoNSAForConditionalGeneration(config)
    kept = [*model._keep_in_fp32_modules, *skipped]
    layers = {name: x for name, x in model.named_modules() if isinstance(x, torch.nn.Linear)}
    taken = [x.weight.numel() for name, x in layers.items() if should_convert_module(name, kept)]
    assert count_quantized(config, skipped) == sum(taken)
    assert len(taken) == 28 * (3 if skipped else 7) + tower * (32 * 5 + 2)


def test_quantised_weights_take_what_their_bits_and_scales_do():
    config = seven_billion()
    seen = {name: forecast(config, 8192, quantization=bits_of(name)) for name in ("4bit", "8bit")}
    seen["16bit"] = forecast(config, 8192)
    assert {name: round(one.weights, 2) for name, one in seen.items()} == {
        "16bit": 16.13,
        "8bit": 10.05,
        "4bit": 7.11,
    }
    config.quantization_config = bits_of("4bit")
    assert forecast(config, 8192) == seen["4bit"]  # the checkpoint's own
    assert seen["4bit"].cache == seen["16bit"].cache
    for name in ("llm_int8_skip_modules", "modules_to_not_convert"):  # bitsandbytes', others'
        config.quantization_config = bits_of("4bit") | {name: [".*mlp"]}
        assert forecast(config, 8192).weights > seen["8bit"].weights + 3


def test_a_full_card_is_worked_on_in_smaller_chunks_and_says_what_would_fit():
    config, tokens = seven_billion(), 131072
    asked = {"vision_tokens": tokens, "new_tokens": 32}
    large = forecast(config, tokens, **asked, available=80 * GIB)
    assert large.peak == forecast(config, tokens, **asked).peak
    tight = forecast(config, tokens, **asked, available=large.peak * GIB - 2 * GIB)
    assert tight.fits and tight.peak < large.peak - 2
    refused = forecast(config, tokens, **asked, available=int(23.5 * GIB))
    assert not refused.fits and refused.loads == ("8bit", "4bit")
    assert "; --load_in 8bit makes all of it fit; " in refused.remedies()
    assert forecast(
        config, tokens, **asked, available=int(23.5 * GIB), quantization=bits_of("8bit")
    ).fits


@pytest.mark.parametrize(
    ("bits", "card", "tokens", "measured"),  # GiB on an H200 held to the card; docs/cards.md
    [
        (None, 80, 32768, 20.9),
        (None, 80, 131072, 26.1),
        (None, 24, 32768, 20.5),
        (None, 24, 120832, 23.0),
        ("4bit", 80, 32768, 11.8),
        ("4bit", 80, 131072, 17.1),
        ("4bit", 24, 131072, 17.1),
        ("4bit", 12, 32768, 10.2),
        ("4bit", 12, 69632, None),
        ("4bit", 16, 139264, None),
        ("8bit", 80, 32768, 15.6),
        ("8bit", 16, 32768, 13.7),
        ("8bit", 24, 131072, 20.9),
        ("8bit", 16, 59392, 13.9),  # the last five: as many tokens as were said to fit
        ("8bit", 24, 199680, 21.4),
        ("4bit", 12, 50176, 10.4),
        ("4bit", 16, 120832, 14.2),
        ("4bit", 24, 260096, 21.7),
    ],
)
def test_what_ran_on_a_card_was_said_to_fit_and_what_ran_out_was_not(bits, card, tokens, measured):
    seen = forecast(
        seven_billion(),
        tokens + 32,
        vision_tokens=tokens,
        new_tokens=9,
        quantization=None if bits is None else bits_of(bits),
        available=int((card - 0.5) * GIB),
    )
    assert seen.fits is (measured is not None)
    if measured is not None:
        assert seen.peak == pytest.approx(measured, rel=0.1)


@pytest.mark.parametrize("bits", [None, "8bit"])
def test_a_small_card_is_told_of_smaller_weights_even_where_they_hold_a_part(bits):
    config, asked = seven_billion(), {"available": int(11.5 * GIB)}
    quantization = None if bits is None else bits_of(bits)

    def remedy(tokens):
        prompt = {"vision_tokens": tokens, "new_tokens": 9, "quantization": quantization}
        return forecast(config, tokens, **prompt, **asked).remedies()

    assert remedy(32768) == "--load_in 4bit makes all of it fit"
    said = re.fullmatch("with --load_in 4bit at most (.*) tokens fit", remedy(131072))[1]
    most = int(said.replace(",", ""))
    for tokens, fits in ((most, True), (most + 1, False)):
        prompt = {"vision_tokens": tokens - 9, "new_tokens": 9, "quantization": bits_of("4bit")}
        assert forecast(config, tokens - 9, **prompt, **asked).fits is fits
    config.quantization_config = bits_of("8bit")  # its weights in whole are not there
    assert remedy(131072).startswith("not even the weights")


def test_everything_that_is_said_to_fit_does_on_any_card():
    """Between the smallest chunk and the largest there is no size where a longer prompt fits."""
    config = seven_billion()
    for available in range(12 * GIB, 30 * GIB, GIB):
        asked = {"available": available, "quantization": bits_of("4bit")}
        most = forecast(config, 10**6, vision_tokens=10**6, **asked).fitting_tokens
        for tokens in range(most // 10, most, most // 10):
            assert forecast(config, tokens, vision_tokens=tokens, **asked).fits, (available, tokens)


def test_processes_that_share_a_prompt_out_have_parts_of_its_chunks():
    """Not of its cache, which all of them have whole."""
    prompt = {"prompt_tokens": 131072, "vision_tokens": 131000}
    alone, shared = (forecast(seven_billion(), **prompt, processes=n) for n in (1, 2))
    assert (shared.weights, shared.cache) == (alone.weights, alone.cache)
    assert alone.weights + alone.cache < shared.peak < alone.peak
