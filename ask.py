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
import json
import sys
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor
from transformers.utils import logging

from commands.conversation import Conversation, is_media
from commands.forecast import forecast


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


def prepare_model(options):
    """How to load the model, how to forecast its memory, and the tokens it was made for.

    The configuration is read now, so that what cannot work is refused before any video is opened.
    """
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

    def load_model():
        return AutoModelForImageTextToText.from_pretrained(
            options.model,
            config=config,
            trust_remote_code=True,
            dtype=dtype,
            device_map=device,
        )

    def forecast_memory(prompt_tokens, vision_tokens, new_tokens):
        return forecast(
            config,
            prompt_tokens,
            vision_tokens=vision_tokens,
            new_tokens=new_tokens,
            dtype=dtype,
            # What "auto" puts on which device is not known before it is done.
            device=None if device == "auto" else device,
        )

    return load_model, forecast_memory, text.max_position_embeddings


def read_questions():
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


def make_conversation(options):
    processor = AutoProcessor.from_pretrained(options.model, trust_remote_code=True)
    load_model, forecast_memory, max_position_embeddings = prepare_model(options)
    settings = {
        "fps": options.fps,
        "max_frames": options.max_frames,
        "max_pixels": options.max_pixels,
    }
    return Conversation(
        processor,
        load_model,
        forecast_memory,
        max_position_embeddings=max_position_embeddings,
        settings=settings,
        max_tokens=options.max_tokens,
        max_new_tokens=options.max_new_tokens,
        print_answer=not options.json,
    )


def answer(conversation, files, question, options):
    """Prints the answer to a question; returns whether it came, without an interruption."""
    try:
        report = (lambda line: None) if options.json else print
        record = conversation.ask(files, question, report)
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


def main():
    options = parse_arguments()
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    try:
        conversation, files = make_conversation(options), options.files
        if options.question is not None and answer(conversation, files, options.question, options):
            files = []
        for added, question in read_questions() if options.interactive else ():
            try:
                if answer(conversation, [*files, *added], question, options):
                    files = []
            except (ValueError, OSError) as error:  # a mistyped path does not end the conversation
                print("ask.py:", " ".join(str(error).split()), file=sys.stderr)
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        fail(error)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
