"""Attention of Qwen2.5-VL's language model with gates: sparse for vision rows, dense for text.

`VideoNSAAttention` takes a call with new vision tokens by its `NSAPlan` (packing_videonsa.py), a
recorded decoding step by its `DecodeStep` (decoding_videonsa.py); any other call runs the stock
attention, untouched but for products in float8 (float8_videonsa.py). What the branches compute is
specified in nsa_reference.py.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLAttention

from .configuration_videonsa import VideoNSATextConfig
from .decoding_videonsa import DecodeStep
from .float8_videonsa import linears, takes_float8
from .fused_videonsa import rotary
from .library_videonsa import (
    ALL_ATTENTION_FUNCTIONS,
    cache_of,
    eager_attention_forward,
    order_offloaded_layers,
)
from .nsa_released import attend_released
from .nsa_rules import gate_weights
from .packing_videonsa import NSAPlan


class VideoNSAAttention(Qwen2_5_VLAttention):
    """Qwen2.5-VL's attention with gates, and a sparse path for calls that bring an `NSAPlan`.

    watch_blocks: None, or what is called with the blocks that the vision rows of a call select.
    """

    watch_blocks: Callable[[torch.Tensor], None] | None = None

    def __init__(self, config: VideoNSATextConfig, layer_idx: int | None = None):
        super().__init__(config, layer_idx)
        self.g_proj_1 = nn.Linear(self.hidden_size, self.hidden_size)
        self.g_proj_2 = nn.Linear(self.hidden_size, self.num_heads * 3)

    def gates(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """The weights of the branches, by `gate_weights`: [..., hidden] to [..., H, 3]."""
        logits = self.g_proj_2(nn.functional.gelu(self.g_proj_1(hidden_states)))
        return gate_weights(logits, self.config.nsa_gate_temperature)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        nsa_plan: NSAPlan | None = None,
        decode_step: DecodeStep | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """hidden_states [B, S, hidden] to ([B, S, hidden], attention weights or None)."""
        if decode_step is not None:
            return self._forward_step(hidden_states, position_embeddings, decode_step), None
        cache = cache_of(kwargs)
        order_offloaded_layers(cache, hidden_states.device)
        if nsa_plan is not None:
            return self._forward_sparse(hidden_states, position_embeddings, nsa_plan, cache), None
        if takes_float8(self.o_proj, hidden_states):
            states = (hidden_states, attention_mask, position_embeddings)
            return self._forward_float8(*states, cache, kwargs)
        output, weights = super().forward(
            hidden_states,
            attention_mask=attention_mask,
            position_embeddings=position_embeddings,
            **kwargs,
        )
        if self.training:
            # Distributed training wants every parameter in every graph, a text-only one too.
            output = output + 0 * self.gates(hidden_states[:, :1]).sum()
        return output, weights

    def _forward_float8(self, hidden_states, mask, position_embeddings, cache, kwargs):
        """Stock, but for products that do not go torchao's own way."""
        query, key, value = self._project(hidden_states, position_embeddings)
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        output, weights = attend(
            self,
            query,
            key,
            value,
            mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            sliding_window=self.sliding_window,
            **{name: x for name, x in kwargs.items() if x is not cache},
        )
        return linears(output.flatten(2), self.o_proj)[0], weights

    def _forward_sparse(self, hidden_states, position_embeddings, plan, cache):
        """[B, S, hidden] to [B, S, hidden], by the plan."""
        query, key, value = self._project(hidden_states, position_embeddings)
        if plan.shard is not None:
            key, value = plan.shard.gather_heads(key, value)
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
        if query.shape[2] != plan.num_queries or key.shape[2] < plan.num_keys:
            raise ValueError(
                f"layer {self.layer_idx} got {query.shape[2]} queries and {key.shape[2]} keys, but "
                f"its vision tokens were found among {plan.num_queries} and {plan.num_keys}: "
                "something else than the model's own shard_sequences cut the sequence into shards. "
                "Turn context or sequence parallelism off."
            )
        gates = self.gates(hidden_states[plan.vision_queries])
        device = query.device.type
        # As torch's own attention does: one dtype for all, and softmax in float32 under autocast.
        dtype = query.dtype
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        with torch.autocast(device, enabled=False):
            output = self._attend(*(x.to(dtype) for x in (query, key, value, gates)), plan)
        return linears(output.flatten(2), self.o_proj)[0]

    def _forward_step(self, hidden_states, position_embeddings, step):
        """[B, 1, hidden] to [B, 1, hidden]: one token a row, after the keys of the step's cache."""
        query, key, value = self._project(hidden_states, position_embeddings)
        keys, values = step.keys[self.layer_idx], step.values[self.layer_idx]
        keys.index_copy_(1, step.index, key.transpose(1, 2))
        values.index_copy_(1, step.index, value.transpose(1, 2))
        output = attention_functions(self.config.nsa_backend, query.device).decode_attention(
            query[:, :, 0], keys, values, step.length, step.valid, self.scaling
        )
        return linears(output.flatten(1)[:, None], self.o_proj)[0]

    def _project(self, hidden_states, position_embeddings):
        """[B, S, hidden] to query [B, H, S, D], key and value [B, K, S, D]."""
        heads = (*hidden_states.shape[:2], -1, self.head_dim)
        states = linears(hidden_states, self.q_proj, self.k_proj, self.v_proj)
        query, key, value = (x.view(heads).transpose(1, 2) for x in states)
        return *rotary(query, key, *position_embeddings), value

    def _attend(self, query, key, value, gates, plan):
        """query [B, H, S, D], key and value [B, K, L, D]; returns [B, S, H, D], padding zero."""
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        sparse = self.attend_sparse(query, key, value, gates, plan)
        if self.config.nsa_semantics == "released":
            return sparse
        if plan.is_all_vision:
            return sparse[None]
        output = torch.zeros_like(query)
        output[plan.vision_queries] = sparse
        output[plan.text_queries] = self.attend_dense(query, key, value, plan)
        return output

    def attend_sparse(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        gates: torch.Tensor,
        plan: NSAPlan,
    ) -> torch.Tensor:
        """The output of the vision rows: three sparse branches over vision keys, weighted by gates.

        query [B, S, H, D]; key and value [B, L, K, D], cached and new; gates [N, H, 3] as `gates`
        returns them, for the N rows of `plan.vision_queries`. Returns [N, H, D] in their order;
        `plan.cu_vision_queries` says how many of them each sample has. Under the released semantics
        text rows have a part in it, so that the output is that of all rows, [B, S, H, D].
        """
        config = self.config
        functions = attention_functions(config.nsa_backend, query.device)
        if config.nsa_semantics == "released":
            return attend_released(query, key, value, gates, plan, functions, config, self.scaling)
        return functions.nsa_attention(
            query[plan.vision_queries],
            key[plan.vision_keys],
            value[plan.vision_keys],
            gates,
            plan.cu_vision_queries,
            plan.cu_vision_keys,
            scale=self.scaling,
            watch_blocks=self.watch_blocks,
            **branch_settings(config),
        )

    def attend_dense(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, plan: NSAPlan
    ) -> torch.Tensor:
        """The output of the text rows, over all earlier keys; shapes as for `attend_sparse`."""
        return attention_functions(self.config.nsa_backend, query.device).dense_attention(
            query[plan.text_queries],
            key[plan.all_keys],
            value[plan.all_keys],
            plan.text_positions,
            plan.cu_text_queries,
            plan.cu_all_keys,
            scale=self.scaling,
        )


def branch_settings(config: VideoNSATextConfig) -> dict[str, int]:
    """The keyword arguments of `nsa_attention` that a configuration has fields for."""
    return {
        "block_size": config.nsa_block_size,
        "num_selected": config.nsa_num_selected_blocks,
        "window_size": config.nsa_window_size,
        "num_initial": config.nsa_num_initial_blocks,
        "num_local": config.nsa_num_local_blocks,
    }


class AttentionFunctions(NamedTuple):
    """The functions of nsa_reference.py, or their namesakes of nsa_kernels.py."""

    nsa_attention: Callable
    dense_attention: Callable
    decode_attention: Callable
    selected_attention: Callable
    window_attention: Callable


def attention_functions(backend: str, device: torch.device) -> AttentionFunctions:
    """The functions of a backend; "auto" is Triton on a CUDA device."""
    if backend == "triton" or (backend == "auto" and device.type == "cuda"):
        from .nsa_kernels import (
            decode_attention,
            dense_attention,
            nsa_attention,
            selected_attention,
            window_attention,
        )
    else:
        from .nsa_reference import (
            decode_attention,
            dense_attention,
            nsa_attention,
            selected_attention,
            window_attention,
        )
    return AttentionFunctions(
        nsa_attention, dense_attention, decode_attention, selected_attention, window_attention
    )
