"""What a run of the model will take: tokens, GiB and whether they fit, before anything runs.

    from transformers import AutoConfig
    from commands.forecast import forecast

    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    print(forecast(config, 131072, vision_tokens=131000, device="cuda").describe())

The sizes of weights and cache follow from the configuration. The memory that a prompt takes on top
is estimated with constants fitted to measurements on a GPU; on a CPU, where the reference runs, the
estimate is rough. Sizes of chunks are those that memory_videonsa.py gives the model.
"""

import dataclasses
from dataclasses import dataclass
from typing import NamedTuple

import torch
from transformers.quantizers.quantizers_utils import should_convert_module

from commands.quantized_loading import (
    bits_of,
    bytes_per_weight,
    is_int8_product,
    skipped_modules,
)
from media_features_videonsa import chunks_of
from memory_videonsa import (
    ATTENTION_HIDDEN_ROWS,
    CHUNK_QUERIES,
    COPIED_LAYERS,
    LEAST_PATCHES,
    LEAST_QUERIES,
    PATCHES_PER_CHUNK,
    PATCHES_SHARE,
    PREFILL_CHUNK_SIZE,
    QUERIES_SHARE,
    UNUSABLE_SHARE,
    cache_bytes,
    mlp_bytes,
    partial_bytes,
    patch_bytes,
    pixels_of_patch,
    prefill_tokens,
    units_that_fit,
    usable_memory,
)
from nsa_released import CHUNK_ELEMENTS, spread_width

GIB = 2**30

# Above KERNEL_FROM vision tokens the kernels hold partial results of the selected branch, and of
# as many queries at a time the importance of KERNEL_BLOCKS blocks for each key/value head, in
# float32. A test holds the first to nsa_kernels_tiles.py.
KERNEL_FROM, KERNEL_BLOCKS = 8192, 2048
# Under the released semantics a prompt is read whole, and a layer's attention keeps this many rows
# of spread heads per token, and float32 scores of so many chunks (docs/released.md has the peaks).
RELEASED_SPREAD_ROWS, RELEASED_SCORES = 4, 5
# What a process that shares a prompt out has of all tokens of a chunk, in rows of hidden_size:
# their embeddings, and what is gathered of them, before and after it is put in order. It also packs
# the keys and values of a layer twice, for its two parts of a chunk. Both are estimates.
SHARED_HIDDEN_ROWS = 3
# Bytes of an intermediate activation besides, while bitsandbytes multiplies in 8 bits: the product
# in int32 and in float16.
INT8_PRODUCT_BYTES = 6
# What a model may be loaded in instead, largest first.
LOADS = ("8bit", "4bit")


@dataclass(frozen=True)
class Forecast:
    """Tokens and GiB of one prompt and its answer.

    tokens: of the prompt and the answer.  vision_tokens: those of them that images and videos take.
    weights, cache: GiB of the parameters, and of all tokens' keys and values.
    peak: GiB at most at one time, weights and cache with it.
    available: GiB that the device has for this process, less what its allocator cannot give out
        beside quantised weights; None where that is not known.
    fitting_tokens: the largest number of tokens that fits; None where `available` is None.
    offloaded: whether the run would fit with its cache in the host's memory, a layer at a time on
        the device (cache_implementation="offloaded"); None where `available` is None.
    loads: names of `LOADS` (--load_in), smaller than these weights, in which all of it would fit.
    smallest_load: the last of `LOADS`, where it is smaller, and the tokens that would fit in it.
    """

    tokens: int
    vision_tokens: int
    weights: float
    cache: float
    peak: float
    available: float | None = None
    fitting_tokens: int | None = None
    offloaded: bool | None = None
    loads: tuple[str, ...] = ()
    smallest_load: tuple[str, int] | None = None

    @property
    def fits(self) -> bool | None:
        """Whether the peak is below what the device has; None where that is not known."""
        return None if self.available is None else self.peak <= self.available

    @property
    def fitting_vision_tokens(self) -> int | None:
        """Vision tokens that fit beside the same text; None where that is not known."""
        if self.fitting_tokens is None:
            return None
        return max(self.fitting_tokens - (self.tokens - self.vision_tokens), 0)

    def describe(self) -> str:
        """One line: "8,192 tokens: 16.1 GiB weights + 448.0 MiB cache, peak 21.1 GiB"."""
        line = (
            f"{self.tokens:,} tokens: {_gib(self.weights)} weights + {_gib(self.cache)} cache, "
            f"peak {_gib(self.peak)}"
        )
        if self.available is not None:
            line += f" of {_gib(self.available)}, " + ("fits" if self.fits else "does not fit")
        return line

    def remedies(self, frames=None) -> str:
        """What would fit, in words, when this does not; empty when it does or is not known.

        frames: frames of the videos that have the vision tokens, to say how many would fit.
        """
        if self.fits is not False:
            return ""
        ways, vision = [], self.fitting_vision_tokens
        share = vision / self.vision_tokens if self.vision_tokens else 0
        if share >= 0.01 and (not frames or int(frames * share) >= 2):
            fewer = f"at most {vision:,} vision tokens fit"
            if frames:
                fewer += f": {int(frames * share)} of the {frames} frames"
            ways.append(f"{fewer}, or frames of {share:.0%} of the pixels")
        elif self.fitting_tokens:
            ways.append(f"at most {self.fitting_tokens:,} tokens fit")
        if self.loads:
            ways.append(f"--load_in {self.loads[0]} makes all of it fit")
        elif self.smallest_load and self.smallest_load[1] > self.fitting_tokens:
            name, tokens = self.smallest_load
            ways.append(f"with --load_in {name} at most {tokens:,} tokens fit")
        if self.offloaded:
            ways.append('generate(..., cache_implementation="offloaded") keeps the cache off it')
        if not ways:
            return "not even the weights, a short prompt and the answer fit: use more memory"
        return "; ".join(ways)


def forecast(
    config,
    prompt_tokens,
    *,
    vision_tokens=0,
    new_tokens=0,
    dtype=torch.bfloat16,
    quantization=None,
    device=None,
    available=None,
    processes=1,
) -> Forecast:
    """A `Forecast` for one prompt of a VideoNSA model with this configuration.

    prompt_tokens: of the prompt with all that is cached before it.  vision_tokens: of those.
    new_tokens: of the answer.  dtype: of the weights and the cache.
    quantization: the quantization_config that it is loaded with; None is the checkpoint's own.
    device: a CUDA device whose free memory is asked for; what this process holds of it already
        counts as free, because weights that are loaded are part of the forecast.
    available: bytes, instead of a device.
    processes: that share the prompt out, each on a device; the forecast is of one of them.
    """
    if available is None and device is not None:
        available = usable_memory(device)
    own = getattr(config, "quantization_config", None)
    quantization = quantization or own
    if available is not None:
        available -= unusable_bytes(config, dtype, quantization)
    run = _Run(config, new_tokens, dtype, quantization, available, processes)
    peak = run.peak(prompt_tokens, vision_tokens)
    result = Forecast(
        tokens=prompt_tokens + new_tokens,
        vision_tokens=vision_tokens,
        weights=run.weights / GIB,
        cache=run.cached(prompt_tokens) / GIB,
        peak=peak / GIB,
    )
    if available is None:
        return result
    loaded = {}  # tokens that fit in smaller weights, by their names
    if peak > available and own is None:
        there, whole = available + unusable_bytes(config, dtype, quantization), run.weights
        for name in LOADS:
            bits = bits_of(name)
            left = there - unusable_bytes(config, dtype, bits)
            other = run._replace(quantization=bits, available=left)
            if other.weights < whole:
                loaded[name] = other.fitting_tokens(prompt_tokens, vision_tokens)
    return dataclasses.replace(
        result,
        available=available / GIB,
        fitting_tokens=run.fitting_tokens(prompt_tokens, vision_tokens),
        offloaded=run.peak(prompt_tokens, vision_tokens, on_device=2) <= available,
        loads=tuple(name for name, tokens in loaded.items() if tokens == result.tokens),
        smallest_load=next(reversed(loaded.items()), None),
    )


class _Run(NamedTuple):
    """What the peak of any prompt follows from; `available` bytes or None."""

    config: object
    new_tokens: int
    dtype: torch.dtype
    quantization: object
    available: int | None
    processes: int

    @property
    def weights(self):
        return weight_bytes(self.config, self.dtype, self.quantization)

    def cached(self, prompt):
        text = self.config.text_config
        return cache_bytes(text, prompt + self.new_tokens, self.dtype.itemsize)

    def peak(self, prompt, vision, on_device=None):
        """Bytes; on_device: the layers of the cache that are on it, where it is offloaded."""
        layers, cached = self.config.text_config.num_hidden_layers, self.cached(prompt)
        copies = (COPIED_LAYERS + (self.processes > 1)) * cached / layers
        # With an offloaded cache, one layer is used while the next one is fetched.
        cached = cached if on_device is None else on_device * cached / layers
        held = self.weights + cached + copies
        left = None if self.available is None else self.available - held
        run = (self.dtype, self.quantization, left, self.processes)
        return held + chunk_bytes(self.config, prompt, vision, *run)

    def fitting_tokens(self, prompt, vision):
        """The most tokens that fit, of a prompt with less vision and its answer; 0 for none."""
        text = prompt - vision
        low, high = 0, prompt  # the largest prompt that fits is in [low, high]
        while low < high:
            middle = (low + high + 1) // 2
            fits = self.peak(middle, max(middle - text, 0)) <= self.available
            low, high = (middle, high) if fits else (low, middle - 1)
        return low + self.new_tokens if low else 0


def count_parameters(config) -> int:
    """Parameters of the whole model."""
    text, vision = config.text_config, config.vision_config
    hidden, head = text.hidden_size, text.hidden_size // text.num_attention_heads
    keys = text.num_key_value_heads * head
    attention = 2 * hidden * hidden + hidden + 2 * (hidden * keys + keys)
    gates = hidden * hidden + hidden + (hidden + 1) * 3 * text.num_attention_heads
    layer = attention + gates + 3 * hidden * text.intermediate_size + 2 * hidden
    embeddings = text.vocab_size * hidden * (1 if config.tie_word_embeddings else 2)
    language = text.num_hidden_layers * layer + embeddings + hidden

    width, inner = vision.hidden_size, vision.intermediate_size
    patch = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    block = 4 * (width * width + width) + 3 * width * inner + 2 * inner + width + 2 * width
    merged = width * vision.spatial_merge_size**2
    merger = width + merged * merged + merged + (merged + 1) * vision.out_hidden_size
    return language + patch * width + vision.depth * block + merger


def count_quantized(config, skipped: tuple[str, ...] = ()) -> int:
    """Parameters that a quantizer takes: of the language model's linear layers, gates and biases
    left out, and with `quantize_vision_tower` of the tower's.

    skipped: patterns of names that it leaves out besides, as its configuration lists them.
    """
    sizes = quantizable_layers(config)
    return sum(size for name, size in sizes.items() if should_convert_module(name, skipped))


def quantizable_layers(config) -> dict[str, int]:
    """{name of a linear layer: parameters} of all layers that a quantizer may take."""
    text, vision = config.text_config, config.vision_config
    hidden, inner = text.hidden_size, text.intermediate_size
    keys = hidden // text.num_attention_heads * text.num_key_value_heads
    attention = {"q_proj": hidden * hidden, "o_proj": hidden * hidden}
    attention |= dict.fromkeys(("k_proj", "v_proj"), hidden * keys)
    names = [("model.language_model.layers", text.num_hidden_layers, "self_attn", attention)]
    mlp = ("gate_proj", "up_proj", "down_proj")
    names += [(*names[0][:2], "mlp", dict.fromkeys(mlp, hidden * inner))]
    if config.quantize_vision_tower:
        width, blocks = vision.hidden_size, ("model.visual.blocks", vision.depth)
        names += [(*blocks, "attn", {"qkv": 3 * width * width, "proj": width * width})]
        names += [(*blocks, "mlp", dict.fromkeys(mlp, width * vision.intermediate_size))]
    sizes = {
        f"{layers}.{number}.{part}.{name}": size
        for layers, count, part, linear in names
        for number in range(count)
        for name, size in linear.items()
    }
    if config.quantize_vision_tower:
        merged = vision.hidden_size * vision.spatial_merge_size**2
        sizes["model.visual.merger.mlp.0"] = merged * merged
        sizes["model.visual.merger.mlp.2"] = merged * vision.out_hidden_size
    return sizes


def weight_bytes(config, dtype, quantization=None) -> float:
    """Bytes of the parameters; quantization: a quantization_config or None."""
    total = count_parameters(config)
    if quantization is None:
        return total * dtype.itemsize
    quantized = count_quantized(config, skipped_modules(quantization))
    each = bytes_per_weight(quantization, dtype.itemsize)
    return (total - quantized) * dtype.itemsize + quantized * each


def unusable_bytes(config, dtype, quantization) -> int:
    """Bytes that the allocator holds beside quantised weights and cannot give out."""
    if quantization is None:
        return 0
    return int(UNUSABLE_SHARE * weight_bytes(config, dtype, quantization))


def chunk_bytes(
    config, prompt, vision_tokens, dtype, quantization=None, available=None, processes=1
) -> float:
    """Bytes beyond weights and cache while a prompt is read: of whichever part takes most.

    The vision tower is done with a chunk of frames before the language model reads it, and a
    layer's attention before its MLP. available: bytes beside weights, cache and copies, or None.
    Of `processes` that share a prompt out each has its part of a chunk, and `SHARED_HIDDEN_ROWS`.
    """
    text, vision, itemsize = config.text_config, config.vision_config, dtype.itemsize
    released = text.nsa_semantics == "released" and vision_tokens > 0
    tokens, held = prompt, 0
    if not released:
        size = PREFILL_CHUNK_SIZE
        if processes == 1:
            size = prefill_tokens(size, text, itemsize, available)
        tokens = longest_chunk(prompt, size)
    if processes > 1:
        held = SHARED_HIDDEN_ROWS * text.hidden_size * tokens * itemsize
        tokens = -(-tokens // processes)
    head, heads = text.hidden_size // text.num_attention_heads, text.num_attention_heads
    mlp = tokens * mlp_bytes(text, itemsize)
    if quantization is not None and is_int8_product(quantization):
        mlp += tokens * text.intermediate_size * INT8_PRODUCT_BYTES
    attention = ATTENTION_HIDDEN_ROWS * text.hidden_size * tokens * itemsize
    if released:
        heads = spread_width(heads, text.num_key_value_heads)
        attention += RELEASED_SPREAD_ROWS * heads * head * tokens * itemsize
        attention += RELEASED_SCORES * 4 * min(CHUNK_ELEMENTS["cuda"], prompt * heads)
    elif vision_tokens > KERNEL_FROM:
        partial = partial_bytes(heads, head, text.nsa_num_selected_blocks, itemsize)
        left = None if available is None else available - attention
        queries = units_that_fit(CHUNK_QUERIES, LEAST_QUERIES, partial, left, QUERIES_SHARE)
        importance = 4 * KERNEL_BLOCKS * text.num_key_value_heads
        attention += min(queries, tokens) * partial + min(CHUNK_QUERIES, tokens) * importance
    patch, unit = patch_bytes(vision, itemsize), vision.spatial_merge_size**2
    most = units_that_fit(PATCHES_PER_CHUNK, LEAST_PATCHES, patch, available, PATCHES_SHARE)
    if released:
        held += 4 * pixels_of_patch(vision) * vision_tokens * unit
    patches = min(-(-vision_tokens // processes) * unit, most)
    return held + max(mlp, attention, patches * patch)


def longest_chunk(prompt: int, size: int) -> int:
    """Tokens of the longest chunk of a prompt that is read `size` tokens at a time."""
    return max(end - start for start, end in chunks_of(prompt, size))


def _gib(amount):
    return f"{amount:.1f} GiB" if amount >= 1 else f"{amount * 1024:.1f} MiB"
