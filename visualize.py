"""Show what an answer was read from, and where the model looked in a video.

    python visualize.py clip.mp4 "What colour is the last shape?" --out out/look

Answers one question as ask.py does, and writes into a folder

    index.html       one page that holds everything; opens from disk, without a network
    *.png            its pictures
    attention.npz    the numbers, attention.json and answer.json the short of them
                     (commands/attention_record.py describes the arrays)

Needs matplotlib: pip install matplotlib -c constraints.txt
"""

import argparse
import functools
import sys
from pathlib import Path

from transformers import AutoProcessor
from transformers.utils import logging

from commands.attention_view import MOST_FOR_SINKS, WatchedConversation
from commands.conversation import is_media
from commands.model_loading import prepare_model
from commands.options import add_options, conversation_options, model_options


def parse_arguments(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.error = fail
    parser.add_argument("files", nargs="+", metavar="FILE", help="videos and images")
    parser.add_argument("question")
    parser.add_argument("--out", required=True, type=Path, metavar="FOLDER", help="to write to")
    parser.add_argument(
        "--at",
        nargs="+",
        type=float,
        metavar="SECONDS",
        help="moments whose selected blocks are drawn (default: a few, spread over the video)",
    )
    parser.add_argument(
        "--sinks",
        action=argparse.BooleanOptionalAction,
        help="look for attention sinks, which takes a time that grows with the tokens' square "
        f"(default: up to {MOST_FOR_SINKS:,} vision tokens)",
    )
    add_options(parser)
    options = parser.parse_args(argv)
    if is_media(options.question):
        fail(f"{options.question} is a file; give the question after it")
    if options.out.exists() and not options.out.is_dir():
        fail(f"--out {options.out} is a file; give a folder")
    return options


def say(message):
    """One line on stderr."""
    print("visualize.py:", " ".join(str(message).split()), file=sys.stderr)


def fail(message):
    """Ends with exit code 2 and one line on stderr."""
    say(message)
    sys.exit(2)


def make_conversation(options):
    model = prepare_model(options.model, **model_options(options))
    conversation = WatchedConversation(
        AutoProcessor.from_pretrained(options.model, trust_remote_code=True),
        model.load,
        model.forecast_memory,
        max_position_embeddings=model.config.text_config.max_position_embeddings,
        **conversation_options(options),
        write=functools.partial(print, end="", flush=True),
        say=say,
    )
    conversation.sinks = options.sinks
    return conversation


def main(argv=None):
    options = parse_arguments(argv)
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    try:
        from commands.attention_page import write_page  # before the model runs: needs matplotlib

        view = make_conversation(options).view(options.files, options.question)
        written = write_page(view, options.out, options.at)
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        fail(error)
    except KeyboardInterrupt:
        sys.exit(130)
    print(view.verdict())
    print(f"wrote {written}")


if __name__ == "__main__":
    main()
