"""The path for CUDA, as far as a CPU goes: FlashAttention's backend and cache, kernels in Triton.

FlashAttention's two compiled functions are replaced by the same in PyTorch, everything around them
is vLLM's, and the checkpoint's kernels run in Triton's interpreter. CUDA graphs are not seen here.
"""

import pytest
import torch
from vllm.v1.attention.backends import flash_attn

from conversations import ask, picture
from engines import greedy
from videonsa_serving import backends

REQUESTS = (
    ask("circle.mp4", "What colour is the shape?"),
    ask("Describe the shape."),
    ask(picture("red"), "digit.mp4", "So?"),
)


def attend(*, q, k, v, out, cu_seqlens_q, seqused_k, block_table, softmax_scale, causal, **unused):
    """flash_attn_varlen_func over pages: q [rows, H, D], k and v [pages, page size, K, D]."""
    assert causal is True
    starts = cu_seqlens_q.tolist()
    for request, length in enumerate(seqused_k.tolist()):
        rows = slice(starts[request], starts[request + 1])
        count = rows.stop - rows.start
        pages = block_table[request, : -(-length // k.shape[1])].long()
        keys, values = (x[pages].flatten(0, 1)[:length].transpose(0, 1)[None] for x in (k, v))
        seen = torch.ones(count, length, dtype=torch.bool).tril(length - count)
        out[rows] = torch.nn.functional.scaled_dot_product_attention(
            q[rows].transpose(0, 1)[None],
            keys,
            values,
            attn_mask=seen,
            scale=softmax_scale,
            enable_gqa=True,
        )[0].transpose(0, 1)


def write(key, value, key_cache, value_cache, slot_mapping, *unused):
    """reshape_and_cache_flash; the slots of padding are negative."""
    slots = slot_mapping[slot_mapping >= 0]
    place = (slots // key_cache.shape[1], slots % key_cache.shape[1])
    key_cache[place], value_cache[place] = key[: len(slots)], value[: len(slots)]


@pytest.fixture
def flash(monkeypatch):
    monkeypatch.setitem(backends.BACKENDS, "CPU_ATTN", backends.FlashBackend)
    monkeypatch.setattr(flash_attn, "get_flash_attn_version", lambda **unused: 2)
    monkeypatch.setattr(flash_attn, "_FA4_DENSE_ATTENTION_KERNEL", attend)
    monkeypatch.setattr(flash_attn, "reshape_and_cache_flash", write, raising=False)


def test_flash_attention(engine, reference, flash):
    with engine(max_num_batched_tokens=101) as llm:
        outputs = llm.chat(list(REQUESTS), greedy(), use_tqdm=False)
    for output, messages in zip(outputs, REQUESTS, strict=True):
        reference.check(output, messages)


def test_flash_attention_and_the_kernels(engine, reference, flash):
    """Few tokens, since an interpreter runs every one of them, for a minute."""
    settings = {"max_tokens": 48, "fps": 0.5}
    kernels = {"text_config": {"nsa_backend": "triton"}}
    with engine(hf_overrides=kernels, mm_processor_kwargs=settings) as llm:
        (output,) = llm.chat([REQUESTS[0]], greedy(2), use_tqdm=False)
    reference.check(output, REQUESTS[0], processor_kwargs=settings)
