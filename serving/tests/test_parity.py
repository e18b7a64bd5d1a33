"""An engine's greedy tokens and log-probabilities are those of the checkpoint in float64."""

import pytest

from conversations import ask, clip, picture
from engines import greedy

QUESTIONS = {
    "one video": ask("circle.mp4", "What colour is the shape?"),
    "another question": ask("circle.mp4", "Which way does the shape move?"),
    "two videos": ask("circle.mp4", "and", "digit.mp4", "What digit is shown?"),
    "three videos": ask("digit.mp4", "shapes.mp4", clip("circle.mp4"), "What comes last?"),
    "a video in the message": ask(clip("shapes.mp4"), "What colour is the shape at the start?"),
    "an image": ask(picture("red"), "What colour is it?"),
    "images around a video": ask(picture("blue"), "shapes.mp4", picture("green", (56, 140)), "So?"),
    "text": ask("Describe the shape."),
}


@pytest.fixture(scope="module")
def llm(engine):
    with engine(block_size=32) as llm:
        yield llm


@pytest.mark.parametrize("name", QUESTIONS)
def test_a_conversation_alone(llm, reference, name):
    (output,) = llm.chat([QUESTIONS[name]], greedy(), use_tqdm=False)
    reference.check(output, QUESTIONS[name])


def test_a_batch_of_all(llm, reference):
    outputs = llm.chat(list(QUESTIONS.values()), greedy(), use_tqdm=False)
    for output, messages in zip(outputs, QUESTIONS.values(), strict=True):
        reference.check(output, messages)


def test_a_prefix_that_ends_inside_a_video(llm, reference):
    """The second conversation has the first one's first video, and its cached pages."""
    first = ask("digit.mp4", "shapes.mp4", "What digit was it?")
    second = ask("digit.mp4", "circle.mp4", "What digit was it?")
    llm.reset_prefix_cache()
    for messages, cached in ((first, False), (second, True)):
        (output,) = llm.chat([messages], greedy(), use_tqdm=False)
        ids = output.prompt_token_ids
        video = reference.model.config.video_token_id
        start = ids.index(video)
        hit = output.num_cached_tokens
        assert (start < hit and ids[hit - 1] == ids[hit] == video) if cached else hit == 0
        reference.check(output, messages)
