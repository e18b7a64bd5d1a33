"""vLLM's own attention for text rows, and where its cache keeps the keys of vision rows.

A step without vision rows goes to vLLM's backend untouched. In one that has some, that backend gets
the text rows alone, each run of them as a request of its own that ends where the run does; the
vision rows of `output` are left for model.py. Keys and values of all rows are written to the cache
before either, by vLLM.

Backends differ in how a page of their cache is laid out: `layout` says how, see pages.py.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.attention.backend import AttentionCGSupport, CommonAttentionMetadata
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadataBuilder,
)
from vllm.v1.attention.backends.flash_attn import (
    FlashAttentionBackend,
    FlashAttentionImpl,
    FlashAttentionMetadataBuilder,
)

from .pages import cpu_layout, flash_layout
from .step import Step


@dataclass
class SparseMetadata:
    """What the layers know of a step with vision rows; tensors on the device, as `Step` has them.

    text: what vLLM's own backend knows of the text rows; None where there are none.
    """

    block_table: torch.Tensor  # [requests, pages]
    vision_rows: torch.Tensor
    vision_starts: torch.Tensor
    key_starts: torch.Tensor
    key_requests: torch.Tensor
    key_places: torch.Tensor
    text_rows: torch.Tensor
    text: Any


class SparseBuilder:
    """Makes `SparseMetadata` of a step with vision rows; before vLLM's builder of a backend."""

    @classmethod
    def get_cudagraph_support(cls, vllm_config, kv_cache_spec) -> AttentionCGSupport:
        # A last chunk of one vision token has the shape of a decoding step, but is none.
        return AttentionCGSupport.NEVER

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
        step: Step | None = None,
    ):
        if step is None:
            return super().build(common_prefix_len, common_attn_metadata, fast_build)
        on_device = Step(*(async_tensor_h2d(torch.from_numpy(x), self.device) for x in step))
        text = None
        if len(step.text_rows):
            requests = text_requests(common_attn_metadata, step, on_device)
            text = super().build(common_prefix_len, requests, fast_build)
        return SparseMetadata(
            block_table=common_attn_metadata.block_table_tensor,
            text=text,
            **{
                name: getattr(on_device, name)
                for name in SparseMetadata.__dataclass_fields__
                if name in Step._fields
            },
        )


def text_requests(
    common: CommonAttentionMetadata, step: Step, on_device: Step
) -> CommonAttentionMetadata:
    """The runs of a step's text rows as a batch of requests."""
    return replace(
        common,
        query_start_loc=on_device.text_starts,
        query_start_loc_cpu=torch.from_numpy(step.text_starts),
        seq_lens=on_device.text_lengths,
        seq_lens_cpu_upper_bound=torch.from_numpy(step.text_lengths),
        num_reqs=len(step.text_requests),
        num_actual_tokens=len(step.text_rows),
        max_query_len=int((step.text_starts[1:] - step.text_starts[:-1]).max()),
        max_seq_len=int(step.text_lengths.max()),
        block_table_tensor=common.block_table_tensor[on_device.text_requests],
        slot_mapping=common.slot_mapping[on_device.text_rows],
        positions=None,
        is_prefilling=None,
        req_idx=None,
    )


class TextRows:
    """Attends for the text rows of a step; before vLLM's implementation of a backend."""

    def forward(self, layer, query, key, value, kv_cache, attn_metadata, output, **kwargs):
        if not isinstance(attn_metadata, SparseMetadata):
            return super().forward(
                layer, query, key, value, kv_cache, attn_metadata, output, **kwargs
            )
        if attn_metadata.text is not None:
            rows = attn_metadata.text_rows
            attended = output.new_empty(len(rows), *output.shape[1:])
            own = (query[rows], key[rows], value[rows], kv_cache, attn_metadata.text, attended)
            super().forward(layer, *own, **kwargs)
            output[rows] = attended
        return output


class CPUBackend(CPUAttentionBackend):
    """vLLM's attention on a CPU; in float32 only, of which the layout is known."""

    layout = staticmethod(cpu_layout)

    class Builder(SparseBuilder, CPUAttentionMetadataBuilder):
        pass

    class Impl(TextRows, CPUAttentionBackendImpl):
        pass

    @staticmethod
    def get_name() -> str:
        return "VIDEONSA_CPU"

    @staticmethod
    def get_builder_cls():
        return CPUBackend.Builder

    @staticmethod
    def get_impl_cls():
        return CPUBackend.Impl


class FlashBackend(FlashAttentionBackend):
    """FlashAttention."""

    layout = staticmethod(flash_layout)

    class Builder(SparseBuilder, FlashAttentionMetadataBuilder):
        pass

    class Impl(TextRows, FlashAttentionImpl):
        pass

    @staticmethod
    def get_name() -> str:
        return "VIDEONSA_FLASH_ATTN"

    @staticmethod
    def get_builder_cls():
        return FlashBackend.Builder

    @staticmethod
    def get_impl_cls():
        return FlashBackend.Impl


BACKENDS = {"CPU_ATTN": CPUBackend, "FLASH_ATTN": FlashBackend}
