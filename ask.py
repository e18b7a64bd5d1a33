"""Ask about videos and images from a shell.

    python ask.py clip.mp4 "What happens?"
    python ask.py clip.mp4 other.webm picture.png "What do these have in common?" --fps 1
    python ask.py clip.mp4 --interactive

Prints what is taken of each video, how many tokens that is and what memory it will need before the
model runs, then streams the answer. Videos are decoded while the model reads them. With
--interactive, further questions are read line by line and answered on the same cache; a line
"/video PATH" or "/image PATH" adds a file to the question that follows, Ctrl-C drops a question.
"""

import argparse
import gc
import json
import math
import mimetypes
import os
import re
import sys
import time
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, TextStreamer
from transformers.image_utils import load_image
from transformers.utils import logging

from commands.forecast import forecast

ANSWER = "<answer>"  # stands for an earlier answer where a template is rendered around it
MARGIN = 1.1  # a forecast this much above the memory there is does not fit for sure
LESS = "take less of the videos with --max-tokens, --max-frames, --fps or --max-pixels"


def parse_arguments(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.error = fail
    parser.add_argument(
        "arguments",
        nargs="+",
        metavar="FILE... QUESTION",
        help="paths or addresses of videos and images, then the question",
    )
    parser.add_argument("--interactive", action="store_true", help="read further questions")
    parser.add_argument("--json", action="store_true", help="print one JSON object per answer")

    group = parser.add_argument_group("model")
    group.add_argument("--model", default=str(Path(__file__).resolve().parent), metavar="DIR|ID")
    group.add_argument("--device", help="cpu, cuda, cuda:1, or auto for all GPUs")
    group.add_argument("--backend", help="auto, triton or reference")
    group.add_argument("--max-new-tokens", type=int, metavar="N")

    group = parser.add_argument_group("what is taken of the videos")
    group.add_argument("--fps", type=float, metavar="F", help="frames per second")
    group.add_argument("--max-frames", type=int, metavar="N", help="of each video")
    group.add_argument("--max-pixels", type=int, metavar="N", help="of each frame")
    group.add_argument("--max-tokens", type=int, metavar="N", help="of all videos and images")
    options = parser.parse_args(argv)

    options.files, options.question = options.arguments, None
    if not (options.interactive and is_media(options.arguments[-1])):
        *options.files, options.question = options.arguments
        if is_media(options.question):
            fail(f"{options.question} is a file; give the question after it")
    if not options.files:
        fail("give at least one video or image before the question")
    return options


def fail(message):
    """Ends with exit code 2 and one line on stderr."""
    print("ask.py:", " ".join(str(message).split()), file=sys.stderr)
    sys.exit(2)


def is_media(argument):
    return os.path.isfile(argument) or re.fullmatch(r"\w+://\S+", argument) is not None


def is_image(path):
    kind = mimetypes.guess_type(path)[0] or ""
    return kind.startswith("image/") and kind != "image/gif"


class TooLarge(ValueError):
    """A question for which the device's memory does not suffice, or did not."""


class Conversation:
    """Turns of one conversation, answered on one cache.

    load_model: loads the model.  longest: tokens that it was made for.
    foresee: the `Forecast` of a prompt from its tokens, vision tokens and the answer's tokens.
    limits: what is taken of every video, as `plan_video` of the processor names it.
    max_tokens: vision tokens that one turn may bring.
    """

    def __init__(
        self, processor, load_model, longest, foresee, limits, max_tokens, max_new_tokens, stream
    ):
        self.processor, self.load_model, self.model = processor, load_model, None
        self.longest, self.foresee = longest, foresee
        self.limits, self.max_tokens, self.stream = limits, max_tokens, stream
        self.generation = {} if max_new_tokens is None else {"max_new_tokens": max_new_tokens}
        self.sequence = None  # ids [1, length] of all turns so far
        self.cache = {}  # under the name that generate takes it by

    def ask(self, files, question, say=print):
        """Answers one question about these files and what came before; returns a record of it.

        Raises TooLarge where memory does not suffice. After this and any other exception, Ctrl-C
        too, the conversation is as it was before the question.
        """
        content, images = [], []
        for path in files:
            if not is_media(path):
                raise FileNotFoundError(f"there is no file {path}")
            if is_image(path):
                images.append(load_image(path))
                content.append({"type": "image", "image": images[-1]})
            else:
                content.append({"type": "video", "video": path})
        content.append({"type": "text", "text": question})
        content, record = self.plan(files, content, images)
        for medium in record["media"]:
            say(f"{medium['file']}: {medium['taken']}")

        inputs = self.processor(
            text=[self.render(content)],
            images=images or None,
            videos=[part["video"] for part in content if part["type"] == "video"] or None,
            return_tensors="pt",
            videos_kwargs={"stream": True, "progress": True, **self.limits},
            text_kwargs={"verbose": False},  # the notice below says it when that is too long
        )
        # Those of the new turn only; the model makes its own.
        record["vision_tokens"] = vision = int((inputs.pop("mm_token_type_ids") > 0).sum())
        if self.sequence is not None:
            inputs["input_ids"] = torch.cat([self.sequence, inputs["input_ids"]], dim=1)
            inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        record["prompt_tokens"] = prompt = inputs["input_ids"].shape[1]
        say(f"{prompt:,} tokens in the prompt, {vision:,} of them new vision tokens")
        expected = self.foresee(prompt, vision, self.generation.get("max_new_tokens", 0))
        record["forecast_gib"] = round(expected.peak, 3)
        say(expected.describe())
        frames = sum(medium.get("frames", 0) for medium in record["media"])
        if expected.fits is False and expected.peak > MARGIN * expected.available:
            raise TooLarge(too_large("this does not fit", expected, frames))

        if prompt > self.longest:
            print(
                f"ask.py: notice: the model was made for {self.longest:,} tokens; --max-tokens "
                "takes less of the videos",
                file=sys.stderr,
            )
            self.longest = math.inf  # said once
        start = time.monotonic()
        output = self.generate(inputs, prompt)
        if output is None:
            raise TooLarge(too_large("out of memory", expected, frames))
        name = "cache" if "cache" in output else "past_key_values"  # before transformers 5.24
        self.cache = {name: output[name]}
        self.sequence = output["sequences"].cpu()
        answer = self.sequence[0, prompt:]
        tokenizer = self.processor.tokenizer
        record["answer"] = tokenizer.decode(answer, skip_special_tokens=True).strip()
        record["answer_tokens"] = len(answer)
        record["answering_seconds"] = round(time.monotonic() - start, 2)
        return record

    def generate(self, inputs, prompt):
        """The model's outputs, or None when it ran out of memory; the cache is then as before."""
        cached = next(iter(self.cache.values()), None)
        length = 0 if cached is None else cached.get_seq_length()
        streamer = TextStreamer(
            self.processor.tokenizer, skip_prompt=True, skip_special_tokens=True
        )
        pixels, output = inputs.get("pixel_values_videos"), None
        try:
            if self.model is None:
                self.model = self.load_model()
            output = self.model.generate(
                **inputs.to(self.model.device),
                **self.cache,
                **self.generation,
                streamer=streamer if self.stream else None,
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

    def plan(self, files, content, images):
        """The content with its token budget shared out, and a record of what is taken."""
        taken = [image_size(self.processor, image) for image in images]
        budget = self.max_tokens
        if budget is not None:
            budget -= sum(tokens for _, tokens in taken)
            if budget < 0:
                raise ValueError(
                    f"the images alone take {self.max_tokens - budget} tokens, more than "
                    f"--max-tokens {self.max_tokens}; allow more or give fewer"
                )
        turn = [{"role": "user", "content": content}]
        (turn, *_), plans = self.processor.plan_videos(turn, max_tokens=budget, **self.limits)
        images, videos = iter(taken), iter(plans)
        media = []
        for path in files:
            if is_image(path):
                size, tokens = next(images)
                medium = {"taken": f"{size}, {tokens:,} tokens", "tokens": tokens}
            else:
                plan = next(videos)
                medium = {"taken": plan.describe(), "tokens": plan.tokens, "frames": plan.frames}
            media.append({"file": path, **medium})
        return turn["content"], {"media": media}

    def render(self, content):
        """The text of a user's turn, which follows an answer unless it is the first turn."""
        turn = {"role": "user", "content": content}
        if self.sequence is None:
            return self.processor.apply_chat_template([turn], add_generation_prompt=True)
        earlier = [
            {"role": "user", "content": [{"type": "text", "text": "-"}]},
            {"role": "assistant", "content": [{"type": "text", "text": ANSWER}]},
        ]
        text = self.processor.apply_chat_template([*earlier, turn], add_generation_prompt=True)
        text = text.split(ANSWER, 1)[1]
        tokenizer = self.processor.tokenizer
        if self.sequence[0, -1] == tokenizer.eos_token_id:
            text = text.removeprefix(tokenizer.eos_token)
        return text


def crop(cache, length):
    """Cuts a cache to its first `length` tokens; its layers may differ after an interruption."""
    for layer in cache.layers:
        # Copies, because a part of a tensor would keep the memory of the whole.
        layer.keys = layer.keys[..., :length, :].clone()
        layer.values = layer.values[..., :length, :].clone()


def too_large(what, expected, frames):
    return f"{what}: {expected.describe()}; {expected.remedies(frames) or LESS}"


def image_size(processor, image):
    """("height x width" that an image is resized to, its tokens)."""
    grid = processor.image_processor(images=[image], return_tensors="pt")["image_grid_thw"][0]
    patch, merge = processor.image_processor.patch_size, processor.image_processor.merge_size
    return f"{grid[1] * patch}x{grid[2] * patch}", int(grid.prod()) // merge**2


def loader(options):
    """`load_model`, `longest` and `foresee` of a conversation."""
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device != "auto":
        try:
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(f"--device {device} cannot be used here: {reason}") from error
    config = AutoConfig.from_pretrained(options.model, trust_remote_code=True)
    text = config.text_config
    if options.backend is not None:
        # Made anew, so that an unknown backend is refused now.
        config.text_config = type(text).from_dict(
            {**text.to_dict(), "nsa_backend": options.backend}
        )

    dtype = torch.float32 if device == "cpu" else torch.bfloat16

    def foresee(prompt, vision, new):
        # What "auto" puts on which device is not known before it is done.
        where = None if device == "auto" else device
        return forecast(
            config, prompt, vision_tokens=vision, new_tokens=new, dtype=dtype, device=where
        )

    def load():
        return AutoModelForImageTextToText.from_pretrained(
            options.model,
            config=config,
            trust_remote_code=True,
            dtype=dtype,
            device_map=device,
        )

    return load, text.max_position_embeddings, foresee


def questions():
    """Yields (files, question) from the lines of stdin."""
    files = []
    while True:
        if sys.stdin.isatty():
            print("\n> ", end="", flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        command, _, rest = line.strip().partition(" ")
        if command in ("/video", "/image"):
            if rest.strip():
                files.append(rest.strip())
            else:
                print(f"ask.py: give a path after {command}", file=sys.stderr)
        elif command:
            yield files, line.strip()
            files = []


def main():
    options = parse_arguments()
    limits = {
        "fps": options.fps,
        "max_frames": options.max_frames,
        "max_pixels": options.max_pixels,
    }
    limits = {name: value for name, value in limits.items() if value is not None}
    say = (lambda line: None) if options.json else print
    if not sys.stderr.isatty():
        logging.disable_progress_bar()

    def answer(files, question):
        """Whether the question was answered, not interrupted."""
        try:
            record = conversation.ask(files, question, say)
        except KeyboardInterrupt:
            if not options.interactive:
                raise
            print(
                "\nask.py: interrupted; the conversation goes on as it was before this question",
                file=sys.stderr,
            )
            return False
        if options.json:
            print(json.dumps({"question": question, **record}), flush=True)
        return True

    try:
        processor = AutoProcessor.from_pretrained(options.model, trust_remote_code=True)
        conversation = Conversation(
            processor,
            *loader(options),
            limits,
            options.max_tokens,
            options.max_new_tokens,
            stream=not options.json,
        )
        files = options.files
        if options.question is not None:
            files = [] if answer(files, options.question) else files
        for added, question in questions() if options.interactive else ():
            try:
                files = [] if answer([*files, *added], question) else files
            except (ValueError, OSError) as error:  # a mistyped path does not end the conversation
                print("ask.py:", " ".join(str(error).split()), file=sys.stderr)
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        fail(error)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
