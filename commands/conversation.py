"""A conversation about videos and images, as ask.py holds it: turns answered on one cache.

A turn goes one way: its files become the parts of a message, the videos among them are opened and
planned within the token budget, what is taken and the memory it needs are reported, and `generate`
reads the planned videos as a stream while it answers.
"""

import gc
import http.client
import io
import os
import re
import time
import urllib.request
from dataclasses import dataclass

import torch
from PIL import Image
from transformers import TextStreamer

from commands.forecast import Forecast
from commands.subtitles import with_subtitles
from message_parts_videonsa import is_address, is_animated, is_picture, plain_source
from video_plan_videonsa import describe_clock

ANSWER = "<answer>"  # stands for an earlier answer where a template is rendered around it
MARGIN = 1.1  # a forecast this much above the memory there is does not fit for sure
MOST_BYTES = 256 << 20  # of a picture that is fetched
REMEDY = "take less of the videos with --max-tokens, --max-frames, --fps or --max-pixels"


class TooLarge(ValueError):
    """A question for which the device's memory does not suffice, or did not."""


@dataclass(frozen=True)
class Turn:
    """A question with its media, planned and not answered yet.

    messages: those that no cache holds, their videos planned.  media: what is taken of each file.
    text: the messages as the chat template writes them.
    vision_tokens: of these messages.  prompt_tokens: of them and all that is cached.
    forecast: of the memory that answering it needs.
    """

    messages: list[dict]
    media: list[dict]
    text: str
    vision_tokens: int
    prompt_tokens: int
    forecast: Forecast

    @property
    def frames(self) -> int:
        return sum(medium.get("frames", 0) for medium in self.media)

    @property
    def is_too_large(self) -> bool:
        """Whether it does not fit for sure."""
        forecast = self.forecast
        return forecast.fits is False and forecast.peak > MARGIN * forecast.available

    def record(self) -> dict:
        return {
            "media": self.media,
            "vision_tokens": self.vision_tokens,
            "prompt_tokens": self.prompt_tokens,
            "forecast_gib": round(self.forecast.peak, 3),
        }


class Conversation:
    """Turns of one conversation, answered on one cache.

    load_model: loads the model; called at the first question that fits.
    forecast_memory: the `Forecast` of a prompt from its tokens, vision tokens and the answer's.
    max_position_embeddings: tokens that the model was made for.
    settings: what is asked of every video, as a call of the processor takes it.
    max_tokens: vision tokens that one turn may bring.
    write: takes the answer piece by piece, while it is made.
    say: takes a notice that no answer waits for.
    earlier: turns of before, (files, question, answer) each, which no cache holds: the first
        question is answered by one pass over all of them. Files are taken as those of a question.
    """

    def __init__(
        self,
        processor,
        load_model,
        forecast_memory,
        *,
        max_position_embeddings,
        settings=None,
        max_tokens=None,
        max_new_tokens=None,
        write=None,
        say=print,
        earlier=(),
    ):
        self.processor, self.load_model, self.model = processor, load_model, None
        self.forecast_memory = forecast_memory
        self.max_position_embeddings = max_position_embeddings
        self.settings, self.max_tokens = settings or {}, max_tokens
        self.generation = {} if max_new_tokens is None else {"max_new_tokens": max_new_tokens}
        self.write, self.say, self.earlier = write, say, list(earlier)
        self.said_length = False
        self.sequence = None  # ids [1, length] of all turns so far
        self.cache = {}  # under the name that generate takes it by

    def ask(self, files, question, report=print, spoken=()):
        """Answers one question about these files and what came before; returns a record of it.

        report: takes a line about each file and about the whole, before the model runs.
        spoken: what is said in the video, from `read_subtitles`, to be put before the question.

        Raises TooLarge where memory does not suffice. After this and any other exception, Ctrl-C
        too, the conversation is as it was before the question.
        """
        turn = self.prepare(files, question, report, spoken)
        if turn.is_too_large:
            raise TooLarge(too_large("this does not fit", turn))
        self.notice_length(turn)

        start = time.monotonic()
        output = self.generate(self.encode([turn]))
        if output is None:
            raise TooLarge(too_large("out of memory", turn))
        name = "cache" if "cache" in output else "past_key_values"  # before transformers 5.24
        self.cache = {name: output[name]}
        self.sequence, self.earlier = output["sequences"].cpu(), []
        answer = self.sequence[0, turn.prompt_tokens :]
        text = self.processor.tokenizer.decode(answer, skip_special_tokens=True)
        return {
            **turn.record(),
            "answer": text.strip(),
            "answer_tokens": len(answer),
            "answering_seconds": round(time.monotonic() - start, 2),
        }

    def prepare(self, files, question, report=print, spoken=()) -> Turn:
        """The turn of a question about these files, reported as for `ask` and not answered."""
        messages = self.messages(files, with_subtitles(spoken, question))
        files = [*(file for turn in self.earlier for file in turn[0]), *files]
        turn = self.make_turn(*self.plan(files, messages))
        for medium in turn.media:
            report(f"{medium['file']}: {medium['taken']}")
        if with_sound := [medium["file"] for medium in turn.media if medium.get("has_sound")]:
            report(f"the sound of {', '.join(with_sound)} is not heard")
        report(
            f"{turn.prompt_tokens:,} tokens in the prompt, {turn.vision_tokens:,} of them new "
            "vision tokens"
        )
        report(turn.forecast.describe())
        if spoken:
            self.refuse_length(turn)
        return turn

    def make_turn(self, messages, media) -> Turn:
        """The turn of these planned messages: its text, its tokens and the memory it needs."""
        text = self.render(messages)
        tokens = [medium["tokens"] for medium in media]
        # In the text, one token stands for all those of a medium.
        ids = self.processor.tokenizer(text, verbose=False)["input_ids"]
        prompt = len(ids) - len(tokens) + sum(tokens)
        prompt += sum(map(self.processor.count_stamp_tokens, sources(messages, "video")))
        prompt += 0 if self.sequence is None else self.sequence.shape[1]
        new_tokens = self.generation.get("max_new_tokens", 0)
        forecast = self.forecast_memory(prompt, sum(tokens), new_tokens)
        return Turn(messages, media, text, sum(tokens), prompt, forecast)

    def check_settings(self):
        """Raises ValueError for a setting that no video can be read with."""
        settings = {**self.settings, "max_tokens": self.max_tokens}
        given = {name: value for name, value in settings.items() if value is not None}
        type(self.processor.video_processor)(**given)

    def notice_length(self, turn):
        """Says once where a prompt is longer than the model was made for."""
        if turn.prompt_tokens > self.max_position_embeddings and not self.said_length:
            self.say(
                f"notice: the model was made for {self.max_position_embeddings:,} tokens; "
                "--max-tokens takes less of the videos"
            )
            self.said_length = True

    def refuse_length(self, turn):
        """Raises TooLarge where subtitles make a prompt longer than the model was made for."""
        if turn.prompt_tokens > self.max_position_embeddings:
            raise TooLarge(
                f"with its subtitles the prompt has {turn.prompt_tokens:,} tokens, more than the "
                f"{self.max_position_embeddings:,} that the model was made for: {REMEDY}, or leave "
                "--subtitles out"
            )

    def reset(self):
        """Starts anew, with the model as it is."""
        self.sequence, self.cache, self.earlier = None, {}, []

    def messages(self, files, question):
        """The turns that no cache holds: the earlier ones, and this question about these files."""
        messages = []
        for own, text, answer in [*self.earlier, (files, question, None)]:
            text = as_plain_text(text, self.processor.tokenizer)
            content = [*map(media_part, own), {"type": "text", "text": text}]
            messages.append({"role": "user", "content": content})
            if answer is not None:
                content = [{"type": "text", "text": answer}]
                messages.append({"role": "assistant", "content": content})
        return messages

    def plan(self, files, messages):
        """The messages with their videos planned within the budget, and what each file gives."""
        parts = media_of(messages)
        for part in parts:
            if part["type"] == "image":
                part["image"] = self.processor.load_images(part["image"])
        images = [image_size(self.processor, image) for image in sources(messages, "image")]
        budget = self.max_tokens
        if budget is not None:
            budget -= sum(tokens for _, tokens in images)
            if images and budget < 0:
                raise ValueError(
                    f"the images alone take {self.max_tokens - budget} tokens, more than "
                    f"--max-tokens {self.max_tokens}; allow more or give fewer"
                )
        messages, plans = self.processor.plan_videos(messages, max_tokens=budget, **self.settings)
        images, plans = iter(images), iter(plans)
        media = []
        for file, part in zip(files, media_of(messages), strict=True):
            if part["type"] == "image":
                size, tokens = next(images)
                medium = {"taken": f"{size}, {tokens:,} tokens", "tokens": tokens}
            else:
                plan, video = next(plans), part["video"]
                taken = f"{plan.describe()}, {describe_times(video.seconds)}"
                medium = {"taken": taken, "tokens": plan.tokens, "frames": plan.frames}
                medium |= {"has_sound": True} if video.file.has_sound else {}
            media.append({"file": file, **medium})
        return messages, media

    def encode(self, turns):
        """The model's inputs for what is cached and a turn; or for several, side by side.

        The types of the tokens are left to the model, which knows those of what is cached.
        """
        messages = [message for turn in turns for message in turn.messages]
        inputs = self.processor(
            text=[turn.text for turn in turns],
            images=sources(messages, "image") or None,
            videos=sources(messages, "video") or None,
            return_tensors="pt",
            videos_kwargs={"stream": True, "progress": True},
            # `notice_length` says it when that is too long.
            text_kwargs={"verbose": False, "padding": True, "padding_side": "left"},
        )
        del inputs["mm_token_type_ids"]
        if self.sequence is not None:
            inputs["input_ids"] = torch.cat([self.sequence, inputs["input_ids"]], dim=1)
            inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        return inputs

    def render(self, messages):
        """The text of these messages; after a cached answer they are one user's turn."""
        if self.sequence is None:
            return self.processor.apply_chat_template(messages, add_generation_prompt=True)
        earlier = [
            {"role": "user", "content": [{"type": "text", "text": "-"}]},
            {"role": "assistant", "content": [{"type": "text", "text": ANSWER}]},
        ]
        text = self.processor.apply_chat_template([*earlier, *messages], add_generation_prompt=True)
        text = text.split(ANSWER, 1)[1]
        tokenizer = self.processor.tokenizer
        if self.sequence[0, -1] == tokenizer.eos_token_id:
            text = text.removeprefix(tokenizer.eos_token)
        return text

    def load(self):
        """Loads the model's weights, if that was not done."""
        if self.model is None:
            self.model = self.load_model()

    def generate(self, inputs):
        """The model's outputs, or None when it ran out of memory; the cache is then as before."""
        cached = next(iter(self.cache.values()), None)
        length = 0 if cached is None else cached.get_seq_length()
        streamer = None if self.write is None else Writer(self.processor.tokenizer, self.write)
        pixels, output = inputs.get("pixel_values_videos"), None
        try:
            self.load()
            output = self.model.generate(
                **inputs.to(self.model.device),
                **self.cache,
                **self.generation,
                streamer=streamer,
                return_dict_in_generate=True,
            )
        except torch.OutOfMemoryError:
            pass  # as long as it is handled, it holds on to the memory that is to be freed
        finally:
            getattr(pixels, "close", lambda: None)()  # a stream that was not read to its end
            if output is None:
                gc.collect()
                if cached is not None:
                    crop(cached, length)
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()
        return output


class Writer(TextStreamer):
    """Hands an answer on piece by piece, while it is made, with a line's end after the last."""

    def __init__(self, tokenizer, write):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.write = write

    def on_finalized_text(self, text, stream_end=False):
        self.write(f"{text}\n" if stream_end else text)


def is_media(argument):
    return os.path.exists(argument) or re.fullmatch(r"(\w+://|data:)\S+", argument) is not None


def media_part(file):
    """The part of a message that brings this file, told by its content; nothing is loaded yet."""
    source = plain_source(file)
    if is_address(source):
        source = fetch_picture(source) or source
    elif isinstance(source, str) and os.path.isdir(source):
        raise ValueError(f"{file} is a folder; give the videos and images in it")
    elif isinstance(source, str) and not os.path.exists(source):
        raise FileNotFoundError(f"there is no file {source}")
    kind = "image" if is_picture(source) and not moves(source) else "video"
    return {"type": kind, kind: source}


def moves(source):
    """Whether a picture, by its path or bytes, is a sequence to be played."""
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as picture:
            return is_animated(picture)
    except (OSError, Image.DecompressionBombError):
        return False  # loading it will say what is wrong


def fetch_picture(address) -> bytes | None:
    """The content of an address that begins as a picture does, else None."""
    request = urllib.request.Request(address, headers={"User-Agent": "videonsa"})
    try:
        with urllib.request.urlopen(request, timeout=30) as response:
            content = response.read(16)
            if not is_picture(content):
                return None
            content += response.read(MOST_BYTES)
    except (OSError, ValueError, http.client.HTTPException):
        return None  # the reader of videos says what is wrong with the address
    if len(content) > MOST_BYTES:
        raise ValueError(f"{address} holds a picture of over {MOST_BYTES:,} bytes")
    return content


def as_plain_text(text, tokenizer):
    """What a user types, in which the names of control tokens, as <|im_end|>, stay text.

    A zero-width space breaks them. The library's sanitize_control_tokens would do it, too, but is
    not in transformers 5.17.
    """
    for token in tokenizer.get_added_vocab():
        text = text.replace(token, f"{token[0]}\u200b{token[1:]}")
    return text


def media_of(messages):
    """The parts of messages that are images or videos."""
    return [part for turn in messages for part in turn["content"] if part["type"] != "text"]


def sources(messages, kind):
    return [part[kind] for part in media_of(messages) if part["type"] == kind]


def image_size(processor, image):
    """("height x width" that an image is resized to, its tokens)."""
    grid = processor.image_processor(images=[image], return_tensors="pt")["image_grid_thw"][0]
    patch, merge = processor.image_processor.patch_size, processor.image_processor.merge_size
    return f"{grid[1] * patch}x{grid[2] * patch}", int(grid.prod()) // merge**2


def crop(cache, length):
    """Cuts a cache to its first `length` tokens; its layers may differ after an interruption."""
    for layer in cache.layers:
        # Copies, because a part of a tensor would keep the memory of the whole.
        layer.keys = layer.keys[..., :length, :].clone()
        layer.values = layer.values[..., :length, :].clone()


def describe_times(seconds):
    """The times of frames: "at 0, 0.5 ... 7.5 s", of long videos "at 0:00:00 ... 1:59:51"."""
    if seconds[-1] >= 600:
        times, unit = [describe_clock(second) for second in seconds], ""
    else:
        times, unit = [f"{round(second, 2):g}" for second in seconds], " s"
    shown = times if len(times) < 4 else [*times[:2], f"... {times[-1]}"]
    return f"at {', '.join(shown).replace(', ...', ' ...')}{unit}"


def too_large(what, turn):
    forecast = turn.forecast
    return f"{what}: {forecast.describe()}; {forecast.remedies(turn.frames) or REMEDY}"
