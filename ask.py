"""Ask about videos and images from a shell.

    python ask.py clip.mp4 "What happens?"
    python ask.py clip.mp4 other.webm picture.png "What do these have in common?" --fps 1
    python ask.py clip.mp4 --interactive

Prints what is taken of each video, how many tokens that is and what memory it will need before the
model runs, then streams the answer. Videos are decoded while the model reads them. With
--interactive, further questions are read line by line and answered on the same cache, Ctrl-C drops
one, and lines that begin with a slash are commands:

    /video PATH, /image PATH   add a file to the question that follows
    /reset                     forget the conversation and its files
    /help, /quit
"""

import argparse
import json
import re
import shlex
import sys
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor
from transformers.utils import find_adapter_config_file, logging

from commands.conversation import Conversation, is_media
from commands.forecast import forecast

COMMANDS = (
    "/video PATH and /image PATH add a file to the question that follows, /reset forgets the "
    "conversation and its files, /quit ends"
)


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
    group.add_argument(
        "--video-readers", type=int, metavar="N", help="threads that read a video, at most"
    )
    group.add_argument("--video-decoder", metavar="cpu|cuda", help="what decodes videos")
    options = parser.parse_args(argv)

    options.files, options.question = options.arguments, None
    if not (options.interactive and is_media(options.arguments[-1])):
        *options.files, options.question = options.arguments
        if is_media(options.question):
            what = "folder" if Path(options.question).is_dir() else "file"
            fail(f"{options.question} is a {what}; give the question after it")
        if not options.question.strip():
            fail("the question is empty; give it after the files")
        if is_command(options.question):
            fail(
                f"{options.question} is no question: commands are lines that are read with "
                "--interactive; python ask.py --help says more"
            )
    if not options.files:
        fail("give at least one video or image before the question")
    return options


def is_command(line):
    return re.fullmatch(r"/\w*", line.strip().partition(" ")[0]) is not None


def say(message):
    """One line on stderr."""
    print("ask.py:", " ".join(str(message).split()), file=sys.stderr)


def fail(message):
    """Ends with exit code 2 and one line on stderr."""
    say(message)
    sys.exit(2)


def prepare_model(options):
    """How to load the model, how to forecast its memory, the tokens it was made for.

    The configuration is read now, so that what cannot work is refused before any video is opened.
    """
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device != "auto":
        try:
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(f"--device {device} cannot be used here: {reason}") from error
    config, base = read_config(options.model)
    text = config.text_config
    if options.backend is not None:
        # Made anew, so that an unknown backend is refused now.
        config.text_config = type(text).from_dict(
            {**text.to_dict(), "nsa_backend": options.backend}
        )
    dtype = torch.float32 if device == "cpu" else torch.bfloat16

    def load_model():
        model = AutoModelForImageTextToText.from_pretrained(
            base, config=config, trust_remote_code=True, dtype=dtype, device_map=device
        )
        if base == options.model:
            return model
        import peft  # needed for adapters only

        return peft.PeftModel.from_pretrained(model, options.model)

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


def read_config(model):
    """The configuration of a checkpoint or of an adapter's base, and where the base is.

    Raises ValueError for another kind of model, before anything large is read.
    """
    base = model
    if adapter := find_adapter_config_file(model):
        base = json.loads(Path(adapter).read_text(encoding="utf-8"))["base_model_name_or_path"]
    config = AutoConfig.from_pretrained(base, trust_remote_code=True)
    if config.model_type == "qwen2_5_vl":
        raise ValueError(
            f"{base} is a Qwen2.5-VL without gates: convert it first, with python "
            f"convert_checkpoint.py {shlex.quote(base)} FOLDER, and give that folder"
        )
    if config.model_type != "videonsa":
        raise ValueError(f"{base} is a {config.model_type} model, not a VideoNSA")
    return config, base


def read_questions(conversation, pending):
    """Yields (files, question) from the lines of stdin; does what the commands among them say.

    pending: files from before that no question has had yet.
    """
    files = []
    while True:
        if sys.stdin.isatty():
            print("\n> ", end="", flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        command, _, rest = line.strip().partition(" ")
        rest = rest.strip()
        if command in ("/video", "/image"):
            if rest:
                files.append(rest)
            else:
                say(f"give a path after {command}")
        elif command == "/help":
            say(COMMANDS)  # stdout holds answers only
        elif command in ("/quit", "/exit"):
            return
        elif command == "/reset":
            files = []
            pending.clear()
            conversation.reset()
            say("the conversation starts anew, without files")
        elif is_command(line):
            say(f"there is no command {command}; {COMMANDS}")
        elif is_media(line.strip()):
            say(f"{line.strip()} is a file: /video or /image before it adds it to a question")
        elif command:
            yield files, line.strip()
            files = []


def make_conversation(options):
    load_model, forecast_memory, max_position_embeddings = prepare_model(options)
    processor = AutoProcessor.from_pretrained(options.model, trust_remote_code=True)
    settings = {
        "fps": options.fps,
        "max_frames": options.max_frames,
        "max_pixels": options.max_pixels,
        "video_readers": options.video_readers,
        "video_decoder": options.video_decoder,
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
        print(file=sys.stderr)
        say("interrupted; the conversation goes on as it was before this question")
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
            files.clear()
        for added, question in read_questions(conversation, files) if options.interactive else ():
            try:
                if answer(conversation, [*files, *added], question, options):
                    files.clear()
            except (ValueError, OSError) as error:  # a mistyped path does not end the conversation
                say(error)
                if len(added) > 1:
                    say(f"dropped with the question: {', '.join(added)}; add what is right again")
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        fail(error)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
