"""A conversation about videos and images, as ask.py holds it: turns answered on one cache.

A turn goes one way: its files become the parts of a message, the videos among them are opened and
planned within the token budget, what is taken and the memory it needs are reported, and `generate`
reads the planned videos as a stream while it answers.
"""

import gc
import http.client
import io
import math
import os
import re
import time
import urllib.request

import torch
from PIL import Image
from transformers import TextStreamer

from message_parts_videonsa import is_address, is_animated, is_picture, plain_source

ANSWER = "<answer>"  # stands for an earlier answer where a template is rendered around it
MARGIN = 1.1  # a forecast this much above the memory there is does not fit for sure
MOST_BYTES = 256 << 20  # of a picture that is fetched
REMEDY = "take less of the videos with --max-tokens, --max-frames, --fps or --max-pixels"


class TooLarge(ValueError):
    """A question for which the device's memory does not suffice, or did not."""


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
        self.sequence = None  # ids [1, length] of all turns so far
        self.cache = {}  # under the name that generate takes it by

    def ask(self, files, question, report=print):
        """Answers one question about these files and what came before; returns a record of it.

        report: takes a line about each file and about the whole, before the model runs.

        Raises TooLarge where memory does not suffice. After this and any other exception, Ctrl-C
        too, the conversation is as it was before the question.
        """
        messages = self.messages(files, question)
        files = [*(file for turn in self.earlier for file in turn[0]), *files]
        messages, media = self.plan(files, messages)
        for medium in media:
            report(f"{medium['file']}: {medium['taken']}")

        inputs = self.encode(messages)
        # Those of the new turn only; the model makes its own.
        vision = int((inputs.pop("mm_token_type_ids") > 0).sum())
        prompt = inputs["input_ids"].shape[1]
        report(f"{prompt:,} tokens in the prompt, {vision:,} of them new vision tokens")
        forecast = self.forecast_memory(prompt, vision, self.generation.get("max_new_tokens", 0))
        report(forecast.describe())
        frames = sum(medium.get("frames", 0) for medium in media)
        if forecast.fits is False and forecast.peak > MARGIN * forecast.available:
            raise TooLarge(too_large("this does not fit", forecast, frames))
        if prompt > self.max_position_embeddings:
            self.say(
                f"notice: the model was made for {self.max_position_embeddings:,} tokens; "
                "--max-tokens takes less of the videos"
            )
            self.max_position_embeddings = math.inf  # said once

        start = time.monotonic()
        output = self.generate(inputs)
        if output is None:
            raise TooLarge(too_large("out of memory", forecast, frames))
        name = "cache" if "cache" in output else "past_key_values"  # before transformers 5.24
        self.cache = {name: output[name]}
        self.sequence, self.earlier = output["sequences"].cpu(), []
        answer = self.sequence[0, prompt:]
        text = self.processor.tokenizer.decode(answer, skip_special_tokens=True)
        return {
            "media": media,
            "vision_tokens": vision,
            "prompt_tokens": prompt,
            "forecast_gib": round(forecast.peak, 3),
            "answer": text.strip(),
            "answer_tokens": len(answer),
            "answering_seconds": round(time.monotonic() - start, 2),
        }

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
        for file, part in zip(files, parts, strict=True):
            if part["type"] == "image":
                size, tokens = next(images)
                medium = {"taken": f"{size}, {tokens:,} tokens", "tokens": tokens}
            else:
                plan = next(plans)
                medium = {"taken": plan.describe(), "tokens": plan.tokens, "frames": plan.frames}
            media.append({"file": file, **medium})
        return messages, media

    def encode(self, messages):
        """The model's inputs for what is cached and these messages."""
        inputs = self.processor(
            text=[self.render(messages)],
            images=sources(messages, "image") or None,
            videos=sources(messages, "video") or None,
            return_tensors="pt",
            videos_kwargs={"stream": True, "progress": True},
            text_kwargs={"verbose": False},  # the notice of `ask` says it when that is too long
        )
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

    def generate(self, inputs):
        """The model's outputs, or None when it ran out of memory; the cache is then as before."""
        cached = next(iter(self.cache.values()), None)
        length = 0 if cached is None else cached.get_seq_length()
        streamer = None if self.write is None else Writer(self.processor.tokenizer, self.write)
        pixels, output = inputs.get("pixel_values_videos"), None
        try:
            if self.model is None:
                self.model = self.load_model()
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


def too_large(what, forecast, frames):
    return f"{what}: {forecast.describe()}; {forecast.remedies(frames) or REMEDY}"
