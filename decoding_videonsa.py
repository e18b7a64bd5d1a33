"""Decoding at the card's speed: one step of the language model, recorded once and replayed.

A token takes about a thousand launches, and the host needs longer for them than the GPU for the
work. While `generate` runs, a `Recorder` takes over the calls of the language model that bring one
token a row: it records the kernels of one step in a CUDA graph, and replays them for each further
token. What changes from step to step stands in tensors that the recorded kernels read: the token's
embedding, its position, the number of keys, which of them are padding. The keys and values go
straight into the buffers of the cache (cache_videonsa.py), to which the kernel of
nsa_kernels_decode.py attends.

A call that cannot be recorded (on a CPU, another kind of cache, hidden states asked for, a hook on
a layer, weights elsewhere) runs as any other.

Shapes: B batch rows, C the capacity of the cache in tokens, K key/value heads, D their size.
"""

import contextlib
import threading
from contextvars import ContextVar
from typing import NamedTuple

import torch
from transformers import DynamicCache
from transformers.utils import logging

from .cache_videonsa import BufferedLayer
from .fused_videonsa import recorded_launches
from .library_videonsa import cache_of, observed

logger = logging.get_logger(__name__)

RECORD_FROM = 3  # the call of one token that is recorded: an answer of a letter is not worth it
DEVICES = ("cuda",)

_recorder = ContextVar("recorder", default=None)
# What a recording leaves to the next one on its GPU: a stream, for which the libraries keep a
# workspace, and a graph that ended, which keeps the memory of its tensors.
_streams, _ended = {}, {}
_one_at_a_time = threading.Lock()


class DecodeStep(NamedTuple):
    """What the layers take in place of a cache and a mask, all on the device."""

    keys: list[torch.Tensor]  # [B, C, K, D] of each layer
    values: list[torch.Tensor]
    index: torch.Tensor  # int64 [1], where the new token's key and value go
    length: torch.Tensor  # int64 [1], that index + 1
    valid: torch.Tensor | None  # bool [B, C], False at padding


class Recorder:
    """Records and replays the decoding steps of one language model within one `generate`."""

    def __init__(self, language_model: torch.nn.Module):
        self.model = language_model
        self.calls = 0
        self.recording = None
        self.refused = not _can_record(language_model)
        if not self.refused and _waits_for_the_host(language_model):
            self.refused = True
            logger.warning_once(
                "Decoding is not recorded: bitsandbytes' layers of 8 bits wait for the host. Each "
                "token runs through the layers one by one, which takes longer; layers of 4 bits "
                "are recorded."
            )

    def replay(self, inputs_embeds, position_ids, attention_mask, options) -> torch.Tensor | None:
        """The last hidden states [B, 1, hidden] of one new token a row; None if not recorded.

        inputs_embeds [B, 1, hidden]; position_ids int64 [3 or 4, B, 1], the last three over time,
        height and width; attention_mask [B, cached + 1] or None; options: the call's further
        arguments, with the cache that gets the new tokens.
        """
        if self.refused or not _is_step(inputs_embeds, position_ids, attention_mask, options):
            return None
        cache = cache_of(options)
        self.calls += 1
        length = cache.get_seq_length() + 1
        if self.calls < RECORD_FROM or not all(x.has_room(length) for x in cache.layers):
            return None  # where there is no room, this call makes it for the next ones
        if self.recording is None or not self.recording.fits(inputs_embeds, attention_mask, cache):
            self.end()
            try:
                self.recording = _Recording(self.model, inputs_embeds, attention_mask, cache)
            except (RuntimeError, ValueError) as error:
                self.refused = True
                _free_generator(inputs_embeds.device)
                reason = str(error).partition("\n")[0]
                logger.warning_once(
                    f"Decoding could not be recorded ({reason}). Each token runs through the "
                    "layers one by one, which gives the same and takes longer."
                )
                return None
        hidden_states = self.recording.replay(inputs_embeds, position_ids, attention_mask, length)
        for layer in cache.layers:
            layer.show(length)
        return hidden_states

    def end(self):
        """Drop the recording, and leave its memory to the next one."""
        if self.recording is not None:
            _ended[self.recording.length.device] = self.recording.graph
            self.recording = None


@contextlib.contextmanager
def recording(language_model: torch.nn.Module):
    """Decoding steps of this model are recorded within, in this thread."""
    recorder = Recorder(language_model)
    token = _recorder.set(recorder)
    try:
        yield
    finally:
        _recorder.reset(token)
        recorder.end()


def recorder_of(language_model: torch.nn.Module) -> Recorder | None:
    """The recorder of the `generate` of this model that runs in this thread."""
    recorder = _recorder.get()
    return recorder if recorder is not None and recorder.model is language_model else None


class _Recording:
    """One step in a CUDA graph, for one set of buffers and one batch size."""

    def __init__(self, model, inputs_embeds, attention_mask, cache):
        device = inputs_embeds.device
        rows, capacity = cache.layers[0].buffers.keys.shape[:2]
        with torch.inference_mode(False):  # what is made in it cannot be written after it
            self.inputs_embeds = torch.empty_like(inputs_embeds)
            self.position_ids = torch.zeros(3, rows, 1, dtype=torch.long, device=device)
            self.length = torch.zeros(1, dtype=torch.long, device=device)
            self.valid = None
            if attention_mask is not None:
                self.valid = torch.zeros(rows, capacity, dtype=torch.bool, device=device)
        self.keys = [layer.buffers.keys for layer in cache.layers]
        self.values = [layer.buffers.values for layer in cache.layers]
        self.length.fill_(cache.get_seq_length() + 1)
        self._record(model)

    def _record(self, model):
        """Make `graph`, whose replay computes `hidden_states` anew."""
        device = self.length.device
        self.graph = torch.cuda.CUDAGraph()
        # Not by torch.cuda.graph, which empties the allocator's cache and waits for all streams.
        with _one_at_a_time, torch.cuda.device(device):
            if device not in _streams:
                _streams[device] = torch.cuda.Stream(device)
            stream, ended = _streams[device], _ended.pop(device, None)
            stream.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(stream):
                self._step(model)  # compiles kernels, and makes what the libraries keep
                pool = None if ended is None else ended.pool()
                self.graph.capture_begin(pool, capture_error_mode="thread_local")
                try:
                    self.hidden_states = self._step(model)
                finally:
                    self.graph.capture_end()
            torch.cuda.current_stream(device).wait_stream(stream)

    def fits(self, inputs_embeds, attention_mask, cache):
        """Whether the recorded kernels read these buffers, and take such inputs."""
        return (
            inputs_embeds.shape == self.inputs_embeds.shape
            and inputs_embeds.dtype == self.inputs_embeds.dtype
            and (attention_mask is None) == (self.valid is None)
            and len(cache.layers) == len(self.keys)
            and all(
                layer.buffers.keys is keys and layer.buffers.values is values
                for layer, keys, values in zip(cache.layers, self.keys, self.values, strict=True)
            )
        )

    def replay(self, inputs_embeds, position_ids, attention_mask, length):
        self.inputs_embeds.copy_(inputs_embeds)
        self.position_ids.copy_(position_ids[-3:])
        self.length.fill_(length)
        if attention_mask is not None:
            self.valid[:, :length] = attention_mask
        self.graph.replay()
        return self.hidden_states.clone()

    def _step(self, model):
        step = DecodeStep(self.keys, self.values, self.length - 1, self.length, self.valid)
        with recorded_launches():
            return run_step(model, self.inputs_embeds, self.position_ids, step)


def run_step(
    language_model: torch.nn.Module,
    inputs_embeds: torch.Tensor,
    position_ids: torch.Tensor,
    step: DecodeStep,
) -> torch.Tensor:
    """[B, 1, hidden] to the last hidden states [B, 1, hidden]; position_ids int64 [3, B, 1]."""
    return language_model(
        inputs_embeds=inputs_embeds,
        position_ids=position_ids,
        attention_mask={"full_attention": None},  # the step has it
        use_cache=False,
        decode_step=step,
    ).last_hidden_state


def _free_generator(device):
    """Let a GPU draw random numbers again: a recording that failed keeps its generator's state."""
    generator = torch.cuda.default_generators[device.index]
    generator.graphsafe_set_state(generator.clone_state())


def _can_record(language_model):
    """Whether this model's steps can be recorded, on a GPU and over a cache that allows it."""
    config = language_model.config
    return (
        config.nsa_backend != "reference"
        and config._attn_implementation != "eager"  # asked for to see the weights
        and not language_model.training
        and not observed(language_model)
    )


def _waits_for_the_host(language_model):
    """Whether a layer on a GPU reads on the host which features are outliers: LLM.int8() does."""
    return any(
        type(layer).__name__ == "Linear8bitLt" and layer.weight.device.type in DEVICES
        for layer in language_model.modules()
    )


def _is_step(inputs_embeds, position_ids, attention_mask, options):
    """Whether a call is one of one token a row that can be recorded."""
    cache = cache_of(options)
    others = ("decode_step", "output_hidden_states", "output_attentions")
    return (
        not any(options.get(name) for name in others)
        and inputs_embeds is not None
        and inputs_embeds.device.type in DEVICES
        and inputs_embeds.shape[1] == 1
        and position_ids is not None
        and position_ids.ndim == 3
        and (attention_mask is None or torch.is_tensor(attention_mask) and attention_mask.ndim == 2)
        and type(cache) is DynamicCache
        and all(type(layer) is BufferedLayer and layer.is_initialized for layer in cache.layers)
        and all(layer.keys.device == inputs_embeds.device for layer in cache.layers)
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cuda")
        and not torch.compiler.is_compiling()
    )
