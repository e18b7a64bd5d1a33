"""What app.py runs for a question: limits, the answer while it is made, and what was looked at.

A question is answered by one pass over its whole conversation, so that nothing of a visitor stays
on the GPU between two questions and the record covers all that was seen. What the GPU's part takes
and gives can be pickled: ZeroGPU runs it in a process of its own.
"""

import html
import os
import queue
import threading
from dataclasses import dataclass

import gradio as gr

from commands.attention_view import View, WatchedConversation
from commands.conversation import Conversation, media_part
from commands.host_memory import with_host_memory
from commands.model_loading import PreparedModel

TEXT_TOKENS = 1024  # of a prompt, that are not left to the video
NEW_TOKENS = 256  # of an answer, at most
GPU_SECONDS = 120  # that ZeroGPU lends a GPU for one question


class Stopped(Exception):
    """The visitor does not want the answer any more."""


@dataclass
class Answer:
    """An answer and how it came about.

    taken: lines about the video, the tokens and the memory.
    view: what was attended to; None where that cannot be recorded.
    """

    text: str
    taken: list[str]
    view: View | None


class Answerer:
    """Answers questions about one video with one model, one at a time.

    prepared: the model, which is loaded now.  processor: the checkpoint's.
    max_tokens: vision tokens that are taken of a video at most; never more than fit.
    on_gpu: what decorates a function that needs the GPU, as `spaces.GPU` does.

    is_recorded: whether what is attended to can be recorded, which takes the paper's semantics.

    Raises ValueError where not even a short video fits, or is to be taken.
    """

    def __init__(self, prepared: PreparedModel, processor, max_tokens=None, on_gpu=None):
        self.processor, self.forecast_memory = processor, prepared.forecast_memory
        self.max_position_embeddings = prepared.config.text_config.max_position_embeddings
        self.is_recorded = prepared.config.text_config.nsa_semantics == "paper"
        self.busy = threading.Lock()
        if max_tokens is not None and max_tokens < 1:
            raise ValueError(f"--max-tokens is {max_tokens}; it must be at least 1")
        fitting = most_tokens(prepared)
        self.max_tokens = fitting if max_tokens is None else min(fitting, max_tokens)
        self.model = prepared.load()
        self._run = self._answer if on_gpu is None else on_gpu(duration=GPU_SECONDS)(self._answer)

    def plan(self, video: str, max_tokens: int) -> str:
        """What would be taken of a video. Raises ValueError where it cannot be read."""
        refuse_picture(video)
        conversation = self._conversation(max_tokens)
        messages = [{"role": "user", "content": [media_part(video)]}]
        _, (medium,) = conversation.plan([video], messages)
        return f"{os.path.basename(video)}: {medium['taken']}"

    def answer(self, turns: list, video: str | None, question: str, max_tokens: int):
        """Yields ("taken", line), ("text", piece) and at last ("answer", Answer).

        turns: (files, question, answer) of each earlier question.
        video: a new one; None where the question is about those of the turns.

        Raises gr.Error, with what is wrong in its text.
        """
        yield from self._run(turns, video, question, min(max_tokens, self.max_tokens))

    def _answer(self, turns, video, question, max_tokens):
        """The part that needs the GPU: a thread answers, and this hands on what it tells."""
        told, stopped = queue.SimpleQueue(), threading.Event()

        def tell(kind, value):
            if stopped.is_set():
                raise Stopped
            told.put((kind, value))

        def work():
            try:
                with self.busy:  # a stopped answer may still be at its prompt
                    tell("answer", self._ask(turns, video, question, max_tokens, tell))
            except BaseException as error:  # raised again below
                told.put(("error", error))

        threading.Thread(target=work, name="answer", daemon=True).start()
        try:
            kind = None
            while kind != "answer":
                kind, value = told.get()
                if kind == "error":
                    raise as_message(value, [video, *files_of(turns)])
                yield kind, value
        finally:
            stopped.set()  # not waited for: Gradio closes generators in its event loop

    def _ask(self, turns, video, question, max_tokens, tell):
        if video is not None:
            refuse_picture(video)
        conversation = self._conversation(max_tokens)
        conversation.write = lambda text: tell("text", text)
        conversation.say = lambda line: tell("taken", line)
        conversation.earlier = turns
        files, lines = [] if video is None else [video], []

        def report(line):
            for file in [*files_of(turns), *files]:
                line = line.replace(file, os.path.basename(file))
            lines.append(line)
            tell("taken", line)

        if self.is_recorded:
            view = conversation.view(files, question, report)
            return Answer(view.answer, lines, view)
        return Answer(conversation.ask(files, question, report)["answer"], lines, None)

    def _conversation(self, max_tokens):
        kind = WatchedConversation if self.is_recorded else Conversation
        return kind(
            self.processor,
            lambda: self.model,
            self.forecast_memory,
            max_position_embeddings=self.max_position_embeddings,
            max_tokens=max_tokens,
            max_new_tokens=NEW_TOKENS,
        )


def refuse_picture(file):
    """Raises ValueError for a picture, which has no moments to be shown; GIFs that move have."""
    if media_part(file)["type"] == "image":
        raise ValueError(f"{os.path.basename(file)} is a picture: upload a video")


def files_of(turns):
    return [file for files, *_ in turns for file in files]


def most_tokens(prepared: PreparedModel) -> int:
    """Vision tokens that a prompt may have: what the model was made for, and what memory holds."""
    most = prepared.config.text_config.max_position_embeddings - TEXT_TOKENS - NEW_TOKENS
    expected = with_host_memory(prepared).forecast_memory(most + TEXT_TOKENS, most, NEW_TOKENS)
    fitting = expected.fitting_vision_tokens
    if fitting == 0:
        raise ValueError(f"no video fits: {expected.describe()}; {expected.remedies()}")
    return most if fitting is None else min(most, fitting)


def as_message(error, files=()):
    """An error as the page shows it: in its own words, without the folders of the server."""
    if not isinstance(error, (ValueError, OSError, ImportError, RuntimeError)):
        return error
    text = str(error)
    for file in filter(None, files):
        text = text.replace(file, os.path.basename(file))
    text = html.escape(text)  # the page would render what a file's name may hold
    return gr.Error(text, duration=None, title="This did not work", print_exception=False)
