"""One answer of serve.py: limits before anything runs, then `generate`, its words handed on.

Each request is answered by one pass over its whole conversation; nothing of it stays behind.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from commands.conversation import Conversation, TooLarge, Turn, media_of
from commands.host_memory import with_host_memory
from commands.model_loading import PreparedModel
from commands.serve_requests import ChatRequest, read_chat
from message_parts_videonsa import describe_source

NEW_TOKENS = 1024  # of an answer at most, where neither the request nor the checkpoint says it
FEWER = '"max_frames", "fps", "max_pixels" or "max_tokens" beside its url takes less of a video'


@dataclass(frozen=True)
class Answer:
    """What an answer took, and why it ended: "stop", or "length" where it is cut off."""

    prompt_tokens: int
    completion_tokens: int
    finish_reason: str


class Answerer:
    """Answers requests with one model, which is loaded now, one at a time.

    media_folder: below which requests may name files; None allows no file.
    report: takes lines about what is taken of media and the memory that is needed.
    """

    def __init__(self, prepared: PreparedModel, processor, media_folder=None, report=print):
        self.processor, self.media_folder, self.report = processor, media_folder, report
        self.max_position_embeddings = prepared.config.text_config.max_position_embeddings
        self.forecast_memory = with_host_memory(prepared).forecast_memory
        self.model = prepared.load()
        self.usual_new_tokens = self.model.generation_config.max_new_tokens or NEW_TOKENS

    def answer(self, request: ChatRequest, write: Callable[[str], None]) -> Answer:
        """Answers a request; `write` takes the text piece by piece, and may end it by raising.

        The pieces together have no white space at their ends.

        Raises ValueError or OSError for what cannot be read, and TooLarge for what does not fit.
        """
        messages = read_chat(request.messages, self.media_folder, self.processor.tokenizer)
        conversation = Conversation(
            self.processor,
            lambda: self.model,
            self.forecast_memory,
            max_position_embeddings=self.max_position_embeddings,
            max_new_tokens=request.new_tokens or self.usual_new_tokens,
            write=Trimmed(write),
        )
        turn = self._plan(conversation, messages)
        new_tokens = self._new_tokens(request, turn)
        conversation.generation = {"max_new_tokens": new_tokens, **sampling(request)}
        if request.seed is not None:
            torch.manual_seed(request.seed)
        inputs = conversation.encode([turn])
        prompt = inputs["input_ids"].shape[1]
        output = conversation.generate(inputs)
        if output is None:
            raise TooLarge(f"the memory did not suffice: {what_would_fit(turn)}")
        ids = output["sequences"][0, prompt:]
        ends = self.model.generation_config.eos_token_id
        ended = ids[-1].item() in (ends if isinstance(ends, list) else [ends])
        return Answer(prompt, len(ids), "stop" if ended else "length")

    def _plan(self, conversation, messages) -> Turn:
        """The turn of these messages, of which nothing was decoded yet."""
        names = [describe_source(part[part["type"]]) for part in media_of(messages)]
        turn = conversation.make_turn(*conversation.plan(names, messages))
        for medium in turn.media:
            self.report(f"{medium['file']}: {medium['taken']}")
        self.report(turn.forecast.describe())
        if turn.is_too_large:
            raise TooLarge(f"this does not fit: {what_would_fit(turn)}")
        return turn

    def _new_tokens(self, request, turn) -> int:
        """Tokens that the answer may have: as was asked, else as many as there is room for."""
        most, prompt = self.max_position_embeddings, turn.prompt_tokens
        new_tokens = request.new_tokens or max(min(self.usual_new_tokens, most - prompt), 1)
        if prompt + new_tokens > most:
            raise TooLarge(
                f"the prompt has {prompt:,} tokens, {turn.vision_tokens:,} of them of images and "
                f"videos, and the answer may have {new_tokens:,}: more than the {most:,} that the "
                f"model was made for; {fewer(turn)}"
            )
        return new_tokens


class Trimmed:
    """Hands a text on that comes in pieces, without the white space at its ends."""

    def __init__(self, write):
        self.write, self.text, self.written = write, "", 0

    def __call__(self, piece):
        self.text += piece
        new = self.text.strip()[self.written :]
        self.written += len(new)
        self.write(new)


def what_would_fit(turn: Turn) -> str:
    fitting = turn.forecast.fitting_vision_tokens
    line = f"{turn.forecast.describe()}; "
    if fitting is not None and fitting < turn.vision_tokens:
        line += f"{fitting:,} of the {turn.vision_tokens:,} vision tokens would; "
    return line + fewer(turn)


def fewer(turn: Turn) -> str:
    """What gives a prompt fewer tokens."""
    return FEWER if turn.vision_tokens else "shorten the text"


def sampling(request: ChatRequest) -> dict:
    """How tokens are to be chosen, as `generate` takes it; empty for the checkpoint's own way."""
    if request.temperature == 0:
        return {"do_sample": False}
    asked = {"temperature": request.temperature, "top_p": request.top_p}
    asked = {name: value for name, value in asked.items() if value is not None}
    return {"do_sample": True, **asked} if asked else {}
