"""What a run of the model will take: tokens, GiB and whether they fit, before anything runs.

    from transformers import AutoConfig
    from commands.forecast import forecast

    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    print(forecast(config, 131072, vision_tokens=131000, device="cuda").describe())

The sizes of weights and cache follow from the configuration. The memory that a prompt takes on top
is estimated with constants fitted to measurements on a GPU; on a CPU, where the reference runs, the
estimate is rough.
"""

import dataclasses
from dataclasses import dataclass

import torch

from nsa_released import CHUNK_ELEMENTS, spread_width

GIB = 2**30

# Tokens of one prefill chunk; tests hold it to media_features_videonsa.py.
PREFILL_CHUNK_TOKENS = 16384
# Memory of one layer per token of a chunk, in rows of hidden_size and of intermediate_size
# activations: while its MLP runs, and while its attention runs.
MLP_HIDDEN_ROWS, MLP_INTERMEDIATE_ROWS = 4, 3
ATTENTION_HIDDEN_ROWS = 8
# Above KERNEL_FROM vision tokens the kernels keep two buffers for KERNEL_QUERIES queries: partial
# results of the selected branch, in bfloat16 or float16, and the importance of KERNEL_BLOCKS blocks
# for each key/value head, in float32. Tests hold them to nsa_kernels_tiles.py.
KERNEL_FROM, KERNEL_QUERIES, KERNEL_BLOCKS = 8192, 9216, 2048
# Tokens of one chunk of the vision tower, four patches each, and its memory per patch while a block
# runs, in rows of the tower's hidden_size and intermediate_size; the patch's pixels come on top, in
# float32 and in the tower's dtype.
VISION_CHUNK_TOKENS = 8192
VISION_HIDDEN_ROWS, VISION_INTERMEDIATE_ROWS = 6, 3
# Under the released semantics a prompt is read whole, and a layer's attention keeps this many rows
# of spread heads per token, and float32 scores of so many chunks (docs/released.md has the peaks).
RELEASED_SPREAD_ROWS, RELEASED_SCORES = 4, 5
# Layers whose keys and values exist twice: one whose cache grows, and one packed for the branches.
COPIED_LAYERS = 2


@dataclass(frozen=True)
class Forecast:
    """Tokens and GiB of one prompt and its answer.

    tokens: of the prompt and the answer.  vision_tokens: those of them that images and videos take.
    weights, cache: GiB of the parameters, and of all tokens' keys and values.
    peak: GiB at most at one time, weights and cache with it.
    available: GiB that the device has for this process; None where that is not known.
    fitting_tokens: the largest number of tokens that fits; None where `available` is None.
    offloaded: whether the run would fit with its cache in the host's memory, a layer at a time on
        the device (cache_implementation="offloaded"); None where `available` is None.
    """

    tokens: int
    vision_tokens: int
    weights: float
    cache: float
    peak: float
    available: float | None = None
    fitting_tokens: int | None = None
    offloaded: bool | None = None

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
    device=None,
    available=None,
) -> Forecast:
    """A `Forecast` for one prompt of a VideoNSA model with this configuration.

    prompt_tokens: of the prompt with all that is cached before it.  vision_tokens: of those.
    new_tokens: of the answer.  dtype: of the weights and the cache.
    device: a CUDA device whose free memory is asked for; what this process holds of it already
        counts as free, because weights that are loaded are part of the forecast.
    available: bytes, instead of a device.
    """
    if available is None and device is not None and torch.device(device).type == "cuda":
        available = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    weights = count_parameters(config) * dtype.itemsize

    def peak(prompt, vision, on_device=None):
        layers = config.text_config.num_hidden_layers
        cached = cache_bytes(config, prompt + new_tokens, dtype)
        copies = COPIED_LAYERS * cached / layers
        # With an offloaded cache, one layer is used while the next one is fetched.
        cached = cached if on_device is None else on_device * cached / layers
        return weights + cached + copies + chunk_bytes(config, prompt, vision, dtype)

    result = Forecast(
        tokens=prompt_tokens + new_tokens,
        vision_tokens=vision_tokens,
        weights=weights / GIB,
        cache=cache_bytes(config, prompt_tokens + new_tokens, dtype) / GIB,
        peak=peak(prompt_tokens, vision_tokens) / GIB,
    )
    if available is None:
        return result
    text = prompt_tokens - vision_tokens
    low, high = 0, prompt_tokens  # the largest prompt that fits is in [low, high]
    while low < high:
        middle = (low + high + 1) // 2
        fits = peak(middle, max(middle - text, 0)) <= available
        low, high = (middle, high) if fits else (low, middle - 1)
    return dataclasses.replace(
        result,
        available=available / GIB,
        fitting_tokens=low + new_tokens if low else 0,
        offloaded=peak(prompt_tokens, vision_tokens, on_device=2) <= available,
    )


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


def cache_bytes(config, tokens, dtype) -> int:
    """Bytes of the keys and values of so many tokens."""
    text = config.text_config
    head = text.hidden_size // text.num_attention_heads
    row = 2 * text.num_key_value_heads * head * dtype.itemsize
    return tokens * text.num_hidden_layers * row


def chunk_bytes(config, prompt, vision_tokens, dtype) -> int:
    """Bytes beyond weights and cache while a prompt is read: of whichever part takes most.

    The vision tower is done with a chunk of frames before the language model reads it, and a
    layer's attention before its MLP.
    """
    text, vision = config.text_config, config.vision_config
    released = text.nsa_semantics == "released" and vision_tokens > 0
    tokens = prompt if released else longest_chunk(prompt)
    head, heads = text.hidden_size // text.num_attention_heads, text.num_attention_heads
    mlp = MLP_HIDDEN_ROWS * text.hidden_size + MLP_INTERMEDIATE_ROWS * text.intermediate_size
    mlp *= tokens * dtype.itemsize
    attention = ATTENTION_HIDDEN_ROWS * text.hidden_size * tokens * dtype.itemsize
    if released:
        heads = spread_width(heads, text.num_key_value_heads)
        attention += RELEASED_SPREAD_ROWS * heads * head * tokens * dtype.itemsize
        attention += RELEASED_SCORES * 4 * min(CHUNK_ELEMENTS["cuda"], prompt * heads)
    elif vision_tokens > KERNEL_FROM:
        partial = 2 * (head + 2) * heads * text.nsa_num_selected_blocks
        importance = 4 * KERNEL_BLOCKS * text.num_key_value_heads
        attention += KERNEL_QUERIES * (partial + importance)
    pixels = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    patch = (
        VISION_HIDDEN_ROWS * vision.hidden_size
        + VISION_INTERMEDIATE_ROWS * vision.intermediate_size
    ) * dtype.itemsize + pixels * (4 + dtype.itemsize)
    patches = min(vision_tokens, VISION_CHUNK_TOKENS) * vision.spatial_merge_size**2
    held = 4 * pixels * vision_tokens * vision.spatial_merge_size**2 if released else 0
    return held + max(mlp, attention, patches * patch)


def longest_chunk(prompt: int) -> int:
    """Tokens of the longest chunk of a prompt; a rest of up to an eighth of one joins the last."""
    rest = prompt % PREFILL_CHUNK_TOKENS
    joins = rest <= PREFILL_CHUNK_TOKENS // 8
    return min(prompt, PREFILL_CHUNK_TOKENS + (rest if joins else 0))


def _gib(amount):
    return f"{amount:.1f} GiB" if amount >= 1 else f"{amount * 1024:.1f} MiB"
