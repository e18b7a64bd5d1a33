"""Ask about videos and images from a shell.

    python ask.py clip.mp4 "What happens?"
    python ask.py clip.mp4 other.webm picture.png "What do these have in common?" --fps 1
    python ask.py clip.mp4 --interactive
    python ask.py videos/ "What happens?" --out answers.jsonl
    torchrun --nproc_per_node 2 ask.py clip.mp4 "What happens?"

Prints what is taken of each video, how many tokens that is and what memory it will need before the
model runs, then streams the answer. Videos are decoded while the model reads them. With
--interactive, further questions are read line by line and answered on the same cache, Ctrl-C drops
one, and lines that begin with a slash are commands:

    /video PATH, /image PATH   add a file to the question that follows
    /reset                     forget the conversation and its files
    /help, /quit

With --out, the question (or each line of --questions) is asked about every file by itself, and each
answer is a row of a .jsonl or .csv file. Files may then also be folders, quoted globs and lists
(.txt). The same command goes on after an interruption.

With torchrun, as many processes as GPUs read the prompt together.
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

from commands import processes
from commands.answers_file import Answers
from commands.asking_many import AskingMany, find_files, read_questions_file
from commands.conversation import Conversation, is_media
from commands.model_loading import prepare_model, stock_as_converted
from commands.options import add_options, conversation_options, model_options
from commands.subtitles import read_subtitles

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
        "--subtitles",
        metavar="FILE",
        help="SRT or WebVTT; puts what is said, with its times, before the question",
    )
    parser.add_argument(
        "--plan",
        action="store_true",
        help="only say what would be taken and what memory it needs; no weights are read",
    )

    group = parser.add_argument_group("asking many")
    group.add_argument("--out", metavar="FILE", help="rows, one per answer: .jsonl or .csv")
    group.add_argument("--questions", metavar="FILE", help="a question on each line")
    group.add_argument(
        "--batch-size",
        type=int,
        metavar="N",
        help="short prompts that are answered side by side, at most (default: 8)",
    )

    add_options(parser)
    options = parser.parse_args(argv)

    refuse_contradictions(options)
    options.files, options.question = options.arguments, None
    may_lack = options.interactive or options.plan
    if options.questions is None and not (may_lack and is_media(options.arguments[-1])):
        *options.files, options.question = options.arguments
        refuse_no_question(options.question)
    if options.plan and options.question is None:
        options.question = ""
    if not options.files:
        fail("give at least one video or image before the question")
    if options.subtitles is not None and options.out is None:
        if options.question is None:
            fail("--subtitles come before the question: give it after the files")
        refuse_shared_subtitles(options.subtitles, options.files)
    return options


def refuse_shared_subtitles(subtitles, files):
    if len(files) > 1 and not Path(subtitles).is_dir():
        fail(
            f"--subtitles {subtitles} is of one video, but {len(files)} files were given; with "
            "--out it may be a folder, which has NAME.srt or NAME.vtt for each"
        )


def refuse_contradictions(options):
    for name in ("interactive", "out"):
        if processes.count() > 1 and getattr(options, name) not in (None, False):
            fail(
                f"--{name} is for one process, and torchrun started {processes.count()}: they read "
                "one prompt together. Start ask.py without it"
            )
    if options.plan and options.interactive:
        fail("--plan answers nothing, so there is nothing to go on from: leave --interactive out")
    if options.out is None:
        if options.questions is not None or options.batch_size is not None:
            name = "--questions" if options.questions is not None else "--batch-size"
            fail(f"{name} is for asking many: say where the answers go, with --out FILE.jsonl")
        return
    for name in ("interactive", "json", "plan"):
        if getattr(options, name):
            fail(f"--{name} does not go with --out, which writes a row per answer: leave one out")
    if options.batch_size is not None and options.batch_size < 1:
        fail(f"--batch-size is {options.batch_size}; it must be at least 1")


def refuse_no_question(question):
    if is_media(question):
        what = "folder" if Path(question).is_dir() else "file"
        fail(f"{question} is a {what}; give the question after it")
    if not question.strip():
        fail("the question is empty; give it after the files")
    if is_command(question):
        fail(
            f"{question} is no question: commands are lines that are read with --interactive; "
            "python ask.py --help says more"
        )


def is_command(line):
    return re.fullmatch(r"/\w*", line.strip().partition(" ")[0]) is not None


def say(message):
    """One line on stderr."""
    name = f"ask.py, process {processes.rank()}:" if processes.rank() else "ask.py:"
    print(name, " ".join(str(message).split()), file=sys.stderr)


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
    """The conversation, and what its model runs on, in words."""
    name = options.model
    with tempfile.TemporaryDirectory() as folder:
        if options.plan:  # nothing is loaded, so a stock model is read as it would be converted
            name = stock_as_converted(name, Path(folder))
        model = prepare_model(name, **model_options(options))
        processor = AutoProcessor.from_pretrained(name, trust_remote_code=True)
    quiet = options.json or options.out is not None
    conversation = Conversation(
        processor,
        functools.partial(processes.load_shared, model),
        functools.partial(model.forecast_memory, processes=processes.count()),
        max_position_embeddings=model.config.text_config.max_position_embeddings,
        **conversation_options(options),
        write=None if quiet else functools.partial(print, end="", flush=True),
        say=say,
    )
    return conversation, model.describe() + processes.describe()


def ask_many(options):
    """Asks every question about every file; prints what there is to do, and what came of it."""
    (files, left_out), questions = find_files(options.files), [options.question]
    if options.questions is not None:
        questions = read_questions_file(options.questions)
    if options.subtitles is not None:
        refuse_shared_subtitles(options.subtitles, files)
    conversation, where = make_conversation(options)
    conversation.check_settings()
    answers = Answers(options.out, settings_of_answers(options))
    many = AskingMany(conversation, answers, where, options.batch_size or 8, options.subtitles)
    if left_out:
        names = ", ".join(left_out[:3]) + ", ..." * (len(left_out) > 3)
        say(f"notice: left out, by their names no videos or pictures: {names} ({len(left_out):,})")
    print(f"{len(files):,} files, questions to each: {len(questions):,}, {where}")
    try:
        many.run(files, questions)
    except KeyboardInterrupt:
        say(f"interrupted; {options.out} keeps its rows, and the same command goes on")
        raise
    if many.with_sound:
        print(f"{len(many.with_sound):,} of the files have sound, which is not heard")
    line = f"{options.out}: {len(answers.done):,} rows"
    if answers.without_answer:
        line += f", {answers.without_answer:,} of them with an error in place of an answer"
    print(line)


def settings_of_answers(options):
    """What a change of would change answers: all options that are set, but for these."""
    others = ("arguments", "files", "question", "questions", "out", "batch_size", "device")
    others += ("video_readers", "interactive", "json", "plan")
    settings = {name: value for name, value in vars(options).items() if name not in others}
    if Path(options.model).is_dir():
        settings["model"] = str(Path(options.model).resolve())
    return {name: value for name, value in settings.items() if value is not None}


def answer(conversation, files, question, options, spoken=()):
    """Prints the answer to a question; returns whether it came, without an interruption."""
    report = (lambda line: None) if options.json else print
    if options.plan:
        turn = conversation.prepare(files, question, report, spoken)
        if options.json:
            print(json.dumps({"question": question, **turn.record()}))
        elif remedies := turn.forecast.remedies(turn.frames):
            print(remedies)
        return True
    try:
        record = conversation.ask(files, question, report, spoken)
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
        options.device = processes.join(options.device)
        if options.out is not None:
            ask_many(options)
            return
        spoken = read_subtitles(options.subtitles) if options.subtitles is not None else ()
        with processes.first_alone():
            (conversation, where), files = make_conversation(options), options.files
        if not options.json:
            print(where)
        question = options.question
        if question is not None and answer(conversation, files, question, options, spoken):
            files.clear()
        for added, question in read_questions(conversation, files) if options.interactive else ():
            try:
                if answer(conversation, [*files, *added], question, options):
                    files.clear()
            except (ValueError, OSError) as error:  # a mistyped path does not end the conversation
                say(error)
                if len(added) > 1:
                    say(f"dropped with the question: {', '.join(added)}; add what is right again")
        processes.leave()
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        fail(error)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
