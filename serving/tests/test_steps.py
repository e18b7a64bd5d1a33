"""Whatever steps an engine cuts requests into, the answers stay what they are."""

import pytest

from conversations import ask, clip, picture
from engines import greedy
from videonsa_serving import state

REQUESTS = (
    ask("circle.mp4", "and", "digit.mp4", "What digit is shown?"),
    ask(picture("red"), "shapes.mp4", "What colour is the shape at the start?"),
    ask("Describe the shape."),
    ask(clip("circle.mp4"), "Which way does the shape move?"),
)


@pytest.fixture
def steps(monkeypatch):
    """(rows, vision rows, requests) of each step that has vision rows, as engines run them."""
    seen, make_step = [], state.make_step

    def watching(masks, starts, computed):
        step = make_step(masks, starts, computed)
        if step is not None:
            seen.append((int(starts[len(masks)]), len(step.vision_rows), len(masks)))
        return step

    monkeypatch.setattr(state, "make_step", watching)
    return seen


def scheduler(llm):
    return llm.llm_engine.engine_core.engine_core.scheduler


def answer(llm, reference):
    outputs = llm.chat(list(REQUESTS), greedy(), use_tqdm=False)
    for output, messages in zip(outputs, REQUESTS, strict=True):
        reference.check(output, messages)


@pytest.mark.parametrize("size", [7, 37, 101])
def test_chunks_of_odd_sizes(engine, reference, steps, size):
    options = {"max_num_batched_tokens": size, "enable_chunked_prefill": True}
    with engine(**options, max_num_seqs=4, enable_prefix_caching=False) as llm:
        answer(llm, reference)
    assert max(rows for rows, _, _ in steps) == size
    assert any(0 < vision < rows for rows, vision, _ in steps)


def test_a_cache_too_small_for_all_requests(engine, reference, monkeypatch):
    """Some are put aside while they answer, and begin again with what they have said."""
    small = {"max_model_len": 512, "num_gpu_blocks_override": 17}
    with engine(block_size=32, max_num_seqs=4, **small) as llm:
        aside, preempt = [], scheduler(llm)._preempt_request

        def counting(request, *args, **kwargs):
            aside.append(request.request_id)
            return preempt(request, *args, **kwargs)

        monkeypatch.setattr(scheduler(llm), "_preempt_request", counting)
        llm.reset_prefix_cache()
        outputs = llm.chat(list(REQUESTS), greedy(80), use_tqdm=False)
        for output, messages in zip(outputs, REQUESTS, strict=True):
            reference.check(output, messages)
        assert aside


def test_a_request_that_is_aborted_while_its_prompt_is_read(engine, reference, steps):
    with engine(max_num_batched_tokens=64, max_num_seqs=4, enable_prefix_caching=False) as llm:
        core = llm.llm_engine
        llm.enqueue_chat([REQUESTS[0]], greedy(), use_tqdm=False)
        core.step()
        assert len(steps) == 1
        (request,) = scheduler(llm).requests
        core.abort_request([request], internal=True)
        answer(llm, reference)
        assert not scheduler(llm).requests
        runner = core.model_executor.driver_worker.worker.model_runner
        assert runner.model_state.masks.keys() <= set(runner.req_states.req_id_to_index)
