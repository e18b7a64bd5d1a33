"""vLLM's Qwen2.5-VL with VideoNSA's gates, and the checkpoint's own sparse attention.

Vision tower, layers, weights and cache are vLLM's; positions, gate weights and the attention of
vision rows are the checkpoint's code: its reference on a CPU, its Triton kernels on CUDA. One call
a layer and step serves the vision rows of all requests.
"""

from functools import partial

import torch
from torch import nn
from vllm.compilation.breakable_cudagraph import eager_break_during_capture
from vllm.config import VllmConfig
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.linear import ColumnParallelLinear, ReplicatedLinear
from vllm.model_executor.models.qwen2 import Qwen2Attention
from vllm.model_executor.models.qwen2_5_vl import Qwen2_5_VLForConditionalGeneration
from vllm.multimodal import MULTIMODAL_REGISTRY

from .backends import BACKENDS, SparseMetadata
from .checkpoint import code_of_checkpoint
from .media import VideoNSADummyInputs, VideoNSAMediaProcessor, VideoNSAProcessingInfo
from .pages import read_tokens
from .state import VideoNSAState
from .step import vision_mask


@MULTIMODAL_REGISTRY.register_processor(
    VideoNSAMediaProcessor, info=VideoNSAProcessingInfo, dummy_inputs=VideoNSADummyInputs
)
class VideoNSAForConditionalGeneration(Qwen2_5_VLForConditionalGeneration):
    """vLLM's Qwen2.5-VL over `GatedAttention`."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        for layer in self.language_model.model.layers:
            layer.self_attn = GatedAttention(layer.self_attn, vllm_config)
        self.rope_index = code_of_checkpoint(self.model_config, "positions_videonsa.rope_index")

    @staticmethod
    def get_model_state_cls() -> type[VideoNSAState]:
        return VideoNSAState

    def get_mrope_input_positions(self, input_tokens, mm_features):
        """The checkpoint's `rope_index`: int64 [3, tokens], and how far text goes on from there."""
        ids = torch.full((1, len(input_tokens)), -1)  # text, whatever tokens an answer repeats
        grids, seconds = {"image": [], "video": []}, []
        for feature in sorted(mm_features, key=lambda feature: feature.mm_position.offset):
            kind = feature.modality
            own = torch.from_numpy(vision_mask(len(input_tokens), [feature], [kind]))
            ids[0, own] = getattr(self.config, f"{kind}_token_id")
            grids[kind].append(feature.data[f"{kind}_grid_thw"].data)
            if kind == "video":
                seconds.append(feature.data["second_per_grid_ts"].data)
        positions, delta = self.rope_index(
            self.config,
            ids,
            image_grid_thw=torch.stack(grids["image"]) if grids["image"] else None,
            video_grid_thw=torch.stack(grids["video"]) if grids["video"] else None,
            second_per_grid_ts=seconds or None,
        )
        return positions[:, 0], int(delta)


class GatedAttention(nn.Module):
    """A layer's attention: vLLM's for text rows, three gated sparse branches for vision rows.

    stock: vLLM's layer, whose projections this takes over.
    """

    def __init__(self, stock: Qwen2Attention, vllm_config: VllmConfig):
        super().__init__()
        self.config = vllm_config.model_config.hf_config.text_config
        self.num_heads, self.scaling = stock.num_heads, stock.scaling
        self.sizes = (stock.q_size, stock.kv_size, stock.kv_size)
        self.qkv_proj, self.o_proj, self.rotary_emb = stock.qkv_proj, stock.o_proj, stock.rotary_emb
        self.attn = over_backend(stock.attn, vllm_config)
        hidden, name = stock.hidden_size, stock.attn.layer_name.removesuffix(".attn")
        # No quantizer has a part in the gates. Their rows are head by head, as the shards want.
        self.g_proj_1 = ReplicatedLinear(hidden, hidden, prefix=f"{name}.g_proj_1")
        self.g_proj_2 = ColumnParallelLinear(
            hidden, 3 * stock.total_num_heads, prefix=f"{name}.g_proj_2"
        )
        code = partial(code_of_checkpoint, vllm_config.model_config)
        self.gate_weights = code("nsa_rules.gate_weights")
        self.settings = code("attention_videonsa.branch_settings")(self.config)
        self.functions = code("attention_videonsa.attention_functions")(
            self.config.nsa_backend, vllm_config.device_config.device
        )

    def forward(self, positions: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        """positions [3, rows], hidden_states [rows, hidden] to [rows, hidden]."""
        qkv, _ = self.qkv_proj(hidden_states)
        query, key, value = qkv.split(self.sizes, dim=-1)
        query, key = self.rotary_emb(positions, query, key)
        output = torch.empty_like(query)
        attend(self, hidden_states, query, key, value, output)
        return self.o_proj(output)[0]

    def gates(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[N, hidden] to the weights of the branches of this process's heads, [N, H, 3]."""
        logits, _ = self.g_proj_2(nn.functional.gelu(self.g_proj_1(hidden_states)[0]))
        return self.gate_weights(logits, self.config.nsa_gate_temperature)

    def attend_sparse(
        self, hidden_states: torch.Tensor, query: torch.Tensor, step: SparseMetadata
    ) -> torch.Tensor:
        """The output of a step's vision rows, [N, H * D]; all of their keys are in the cache."""
        layout = self.attn.attn_backend.layout(self.attn.kv_cache)
        keys, values = read_tokens(layout, step.block_table, step.key_requests, step.key_places)
        return self.functions.nsa_attention(
            query[step.vision_rows].unflatten(-1, (self.num_heads, -1)),
            keys,
            values,
            self.gates(hidden_states[step.vision_rows]),
            step.vision_starts,
            step.key_starts,
            scale=self.scaling,
            **self.settings,
        ).flatten(1)


@eager_break_during_capture
def attend(
    layer: GatedAttention,
    hidden_states: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    output: torch.Tensor,
) -> None:
    """Writes the attention of all rows of a step into output [rows, H * D].

    Between the captured pieces of a CUDA graph, as vLLM's own attention is: which rows are vision
    rows changes from step to step.
    """
    output.copy_(layer.attn(query, key, value))
    metadata = get_forward_context().attn_metadata
    step = metadata.get(layer.attn.layer_name) if isinstance(metadata, dict) else None
    if isinstance(step, SparseMetadata):
        output[step.vision_rows] = layer.attend_sparse(hidden_states, query, step)


def over_backend(stock: Attention, vllm_config: VllmConfig) -> Attention:
    """The same layer of the cache over this package's backend, in the place of vLLM's own."""
    name = stock.attn_backend.get_name()
    if name not in BACKENDS:
        raise ValueError(
            f"vLLM chose the attention backend {name}, but VideoNSA's vision rows are read from "
            f"the caches of {' and '.join(BACKENDS)} only: start with --attention-backend "
            "FLASH_ATTN."
        )
    del vllm_config.compilation_config.static_forward_context[stock.layer_name]
    return Attention(
        stock.num_heads,
        stock.head_size,
        stock.impl.scale,
        num_kv_heads=stock.num_kv_heads,
        cache_config=vllm_config.cache_config,
        prefix=stock.layer_name,
        attn_backend=BACKENDS[name],
    )
