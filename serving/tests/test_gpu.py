"""On a CUDA device: FlashAttention, the kernels and CUDA graphs, in bfloat16 against float64.

transformers' own bfloat16 is within 0.03 of float64 on these; attending densely is 0.1 or more off.
"""

import pytest
import torch

from conversations import ask
from engines import greedy
from test_parity import QUESTIONS

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

TOLERANCE = 0.05
ON_CUDA = {"dtype": "bfloat16", "enforce_eager": False, "gpu_memory_utilization": 0.5}


@pytest.mark.parametrize("size", [2048, 101], ids=["whole", "in chunks"])
def test_a_batch_of_all(engine, reference, size):
    with engine(**ON_CUDA, max_num_batched_tokens=size) as llm:
        outputs = llm.chat(list(QUESTIONS.values()), greedy(), use_tqdm=False)
    for output, messages in zip(outputs, QUESTIONS.values(), strict=True):
        reference.check(output, messages, TOLERANCE)


def test_the_bundled_clip_is_answered_right(engine, trained):
    messages = ask("circle.mp4", "What colour is the shape?")
    with engine(**ON_CUDA, model=trained) as llm:
        (output,) = llm.chat([messages], greedy(1), use_tqdm=False)
    assert output.outputs[0].text == "red"
