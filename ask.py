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
import functools
import json
import re
import sys
import tempfile
from pathlib import Path

from transformers import AutoProcessor
from transformers.utils import logging

from commands.conversation import Conversation, is_media
from commands.model_loading import prepare_model, stock_as_converted
from commands.options import add_options, video_settings

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
    parser.add_argument(
        "--plan",
        action="store_true",
        help="only say what would be taken and what memory it needs; no weights are read",
    )

    add_options(parser)
    options = parser.parse_args(argv)

    if options.plan and options.interactive:
        fail("--plan answers nothing, so there is nothing to go on from: leave --interactive out")
    options.files, options.question = options.arguments, None
    if (options.interactive or options.plan) and is_media(options.arguments[-1]):
        options.question = "" if options.plan else None
    else:
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
    name = options.model
    with tempfile.TemporaryDirectory() as folder:
        if options.plan:  # nothing is loaded, so a stock model is read as it would be converted
            name = stock_as_converted(name, Path(folder))
        model = prepare_model(name, options.device, options.backend, options.attention)
        processor = AutoProcessor.from_pretrained(name, trust_remote_code=True)
    if not options.json:
        print(model.describe())
    return Conversation(
        processor,
        model.load,
        model.forecast_memory,
        max_position_embeddings=model.config.text_config.max_position_embeddings,
        settings=video_settings(options),
        max_tokens=options.max_tokens,
        max_new_tokens=options.max_new_tokens,
        write=None if options.json else functools.partial(print, end="", flush=True),
        say=say,
    )


def answer(conversation, files, question, options):
    """Prints the answer to a question; returns whether it came, without an interruption."""
    report = (lambda line: None) if options.json else print
    if options.plan:
        turn = conversation.prepare(files, question, report)
        if options.json:
            print(json.dumps({"question": question, **turn.record()}))
        elif remedies := turn.forecast.remedies(turn.frames):
            print(remedies)
        return True
    try:
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
