"""A key/value cache with room to grow, laid out as the kernels read it.

The library's `DynamicLayer` copies all of itself whenever tokens come. A `BufferedLayer` writes
them behind those that it has, into buffers of a larger capacity; in all else it is a DynamicLayer.
`use_buffers` puts such layers into a `DynamicCache`, which is what `generate` makes by itself.

Shapes: B batch rows, C the capacity in tokens, K key/value heads, D their size.
"""

import functools

import torch
from transformers import DynamicCache

from .library_videonsa import DynamicLayer

SPARE = 256  # tokens that a buffer is made larger by than it has to be


class Buffers:
    """Keys and values [B, C, K, D], of which the first `written` tokens are somebody's."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, written: int):
        self.keys, self.values, self.written = keys, values, written


class BufferedLayer(DynamicLayer):
    """One layer's keys and values, [B, K, tokens, D], as views of buffers [B, C, K, D].

    Only places that were never written are written, so that other views (of a cropped cache, of a
    shallow copy) keep what they show; whoever replaced `keys` or `values`, or cropped them, makes
    the next update copy them into new buffers.
    """

    def __init__(self, reserved: int = 0):
        """reserved: tokens that there will be room for at least, however few come at first."""
        super().__init__()
        self.reserved = reserved
        self.buffers: Buffers | None = None
        self._shown = None, None  # the keys and values that were made of the buffers last

    def update(self, key_states, value_states, *args, **kwargs):
        """Append [B, K, S, D] each; returns all keys and values, [B, K, tokens, D]."""
        if not self._can_hold(key_states, value_states):
            return super().update(key_states, value_states, *args, **kwargs)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        length = self.get_seq_length()
        tokens = length + key_states.shape[-2]
        if not self.has_room(tokens):
            self._make_buffers(tokens, key_states, value_states)
        self.buffers.keys[:, length:tokens] = key_states.transpose(1, 2)
        self.buffers.values[:, length:tokens] = value_states.transpose(1, 2)
        self.show(tokens)
        return self.keys, self.values

    def has_room(self, tokens: int) -> bool:
        """Whether the buffers are this cache's, hold what is cached, and take `tokens` in all."""
        if self.keys is not self._shown[0] or self.values is not self._shown[1]:
            return False
        written = -1 if self.buffers is None else self.buffers.written
        return written == self.get_seq_length() and tokens <= self.buffers.keys.shape[1]

    def show(self, tokens: int) -> None:
        """Make `keys` and `values` the first `tokens` tokens of the buffers."""
        buffers = self.buffers
        buffers.written = tokens
        self.keys = buffers.keys[:, :tokens].transpose(1, 2)
        self.values = buffers.values[:, :tokens].transpose(1, 2)
        self._shown = self.keys, self.values

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """As the library's, but in place: the next token finds its room."""
        if not self.has_room(0) or len(beam_idx) != len(self.keys):
            super().reorder_cache(beam_idx)
            return
        for shown in self._shown:
            shown.copy_(shown.index_select(0, beam_idx.to(shown.device)))

    def _can_hold(self, key_states, value_states):
        """Whether these can be written in place: no gradient flows, and they are as the cached."""
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return False
        if key_states.shape[:3] != value_states.shape[:3]:
            return False
        return not self.get_seq_length() or all(
            (old.shape[:2], old.shape[3], old.dtype, old.device)
            == (new.shape[:2], new.shape[3], new.dtype, new.device)
            for old, new in ((self.keys, key_states), (self.values, value_states))
        )

    def _make_buffers(self, tokens, key_states, value_states):
        """New buffers with room for `tokens` tokens and some more, that begin with the cached."""
        length, old = self.get_seq_length(), (self.keys, self.values)
        capacity = self.reserved if tokens <= self.reserved else tokens + SPARE
        made = []
        for cached, new in zip(old, (key_states, value_states), strict=True):
            rows, heads, _, size = new.shape
            with torch.inference_mode(False):  # what is made in it cannot be written after it
                buffer = new.new_empty(rows, capacity, heads, size)
            if length:
                buffer[:, :length] = cached.transpose(1, 2)
            made.append(buffer)
        self.buffers = Buffers(*made, written=length)


def use_buffers(cache, tokens: int = 0) -> None:
    """Let a DynamicCache write in place from here on, with room for at least `tokens` tokens.

    Caches of other kinds, offloaded ones with them, and layers of other kinds stay as they are.
    """
    if torch.compiler.is_compiling():
        return
    if type(cache) is not DynamicCache or cache.offloading:
        return
    if cache.layer_class_to_replicate is DynamicLayer:
        cache.layer_class_to_replicate = functools.partial(BufferedLayer, tokens)
    for index, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer:
            buffered = BufferedLayer()
            vars(buffered).update(vars(layer))
            cache.layers[index] = layer = buffered
        if type(layer) is BufferedLayer:
            layer.reserved = max(layer.reserved, tokens)
