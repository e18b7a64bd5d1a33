"""Two tensor-parallel ranks answer as the checkpoint in float64 does."""

from conversations import ask, picture
from engines import greedy

REQUESTS = (
    ask("circle.mp4", "What colour is the shape?"),
    ask("circle.mp4", "and", picture("red"), "digit.mp4", "What digit is shown?"),
    ask("Describe the shape."),
)


def test_two_ranks(engine, reference, monkeypatch):
    """In processes of their own: each has half of the heads, and of the gates."""
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # of two cores, any
    options = {"tensor_parallel_size": 2, "max_num_batched_tokens": 101}
    with engine(**options, distributed_executor_backend="mp") as llm:
        outputs = llm.chat(list(REQUESTS), greedy(), use_tqdm=False)
    for output, messages in zip(outputs, REQUESTS, strict=True):
        reference.check(output, messages)
