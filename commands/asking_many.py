"""Many questions about many files, each asked about each file by itself.

    python ask.py videos/ "What happens?" --out answers.jsonl

`find_files` makes files of what a command line names, and `AskingMany` asks: a file is opened and
planned once for all questions about it, and neighbours are answered side by side where that pays.
What cannot be read or does not fit is a row with its reason. The rows are answers_file.py's.
"""

import glob
import mimetypes
import os
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from commands.answers_file import Answers
from commands.conversation import (
    Conversation,
    TooLarge,
    Turn,
    as_plain_text,
    is_media,
    too_large,
)
from commands.subtitles import read_subtitles, subtitles_of, with_subtitles
from message_parts_videonsa import is_picture

# Prompts are answered side by side up to so many tokens, their padding with them: a longer one
# keeps a device busy alone.
BATCH_TOKENS = 16384
# Ends of videos' names that Python's table of types lacks on some systems.
VIDEO_SUFFIXES = (".mkv", ".m4v", ".m2ts", ".mts", ".ts", ".flv", ".wmv", ".vob", ".ogv", ".3gp")
LISTS = (".txt", ".lst")


def find_files(arguments: list[str]) -> tuple[list[str], list[str]]:
    """The files that arguments name, each once, and what of their folders is left out.

    arguments: files, addresses, folders, globs and lists. A folder gives the videos and pictures in
    it and below it, by their names or content; hidden files are passed over. A list is a text file
    (.txt, .lst) with one of all these on each line.

    Raises ValueError for an argument that names nothing. A file of a list need not exist: its rows
    will say so.
    """
    files, left_out = [], []
    for argument in arguments:
        path = Path(argument)
        if path.is_dir():
            every = [one for one in sorted(path.rglob("*"), key=_natural_order) if one.is_file()]
            shown = [one for one in every if not one.name.startswith(".")]
            watchable = [str(one) for one in shown if _is_watchable(one)]
            if not watchable:
                raise ValueError(f"the folder {argument} holds no videos or pictures")
            files += watchable
            left_out += [str(one) for one in shown if str(one) not in set(watchable)]
        elif path.suffix.lower() in LISTS and path.is_file():
            for line in filter(None, map(str.strip, _read_lines(path))):
                if os.path.isfile(line) or not (os.path.isdir(line) or glob.has_magic(line)):
                    files.append(line)
                    continue
                found = find_files([line])
                files, left_out = files + found[0], left_out + found[1]
        elif is_media(argument):
            files.append(argument)
        elif glob.has_magic(argument) and (matches := glob.glob(argument, recursive=True)):
            matches = sorted(filter(os.path.isfile, matches), key=_natural_order)
            files += matches
        else:
            raise ValueError(
                f"there is no file, folder or list {argument}, and nothing that it matches"
            )
    return list(dict.fromkeys(map(_normal, files))), left_out


def read_questions_file(path: str) -> list[str]:
    """The questions of a text file, one on each line."""
    questions = list(dict.fromkeys(filter(None, map(str.strip, _read_lines(path)))))
    if not questions:
        raise ValueError(f"{path} holds no questions; it has one on each line")
    return questions


def _read_lines(path):
    try:
        return Path(path).read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 ({error}): save it as UTF-8") from error


def _is_watchable(path):
    """Whether a file is a video or a picture by its name, or a picture by its content."""
    kind, _ = mimetypes.guess_type(path.name)
    named = (kind or "").startswith(("video/", "image/")) or path.suffix.lower() in VIDEO_SUFFIXES
    return named or is_picture(str(path))


def _natural_order(path):
    """ "clip10" after "clip2": digits are compared as numbers."""
    pieces = re.split(r"(\d+)", str(path))
    return [int(piece) if n % 2 else piece.lower() for n, piece in enumerate(pieces)]


def _normal(name):
    return name if "://" in name or name.startswith("data:") else os.path.normpath(name)


@dataclass(frozen=True)
class Asked:
    """One question about one file: its turn, or why there is none."""

    file: str
    question: str
    turn: Turn | None
    subtitles: str = ""
    error: str = ""

    def row(self) -> dict:
        """The row of this question, without an answer."""
        row = {"file": self.file, "question": self.question}
        if self.turn is not None:
            row["taken"] = self.turn.media[0]["taken"]
            row["vision_tokens"] = self.turn.vision_tokens
            row["prompt_tokens"] = self.turn.prompt_tokens
        if self.subtitles:
            row["subtitles"] = self.subtitles
        return row


class AskingMany:
    """Asks every question about every file, and writes a row for each into `answers`.

    conversation: one that prints nothing, of which no question was asked.
    where: what the model runs on, in words.  batch_size: prompts side by side, at most.
    subtitles: a file of subtitles, or a folder of them by their videos' names.
    """

    def __init__(
        self,
        conversation: Conversation,
        answers: Answers,
        where: str,
        batch_size: int,
        subtitles: str | None = None,
    ):
        self.chat, self.answers, self.where = conversation, answers, where
        self.batch_size, self.subtitles = batch_size, subtitles
        self.with_sound = set()

    def run(self, files: list[str], questions: list[str]):
        """Asks what `answers` has no row of; the device's faults and a full disk end it."""
        left = [
            (file, [q for q in questions if (file, q) not in self.answers.done]) for file in files
        ]
        total, open_questions = len(files) * len(questions), sum(len(qs) for _, qs in left)
        bar = tqdm(total=total, initial=total - open_questions, unit="row", disable=None)
        with bar:
            for batch in self._batches(asked for item in left for asked in self._ask(*item)):
                bar.set_postfix_str(os.path.basename(batch[0].file)[-40:])
                for row in self._rows(batch):
                    self.answers.write(row)
                    bar.update()

    def _ask(self, file, questions) -> Iterator[Asked]:
        """The questions about one file, which is opened and planned once."""
        if not questions:
            return
        try:
            messages, media = self.chat.plan([file], self.chat.messages([file], ""))
            where = self.subtitles and subtitles_of(file, self.subtitles)
            spoken = read_subtitles(where) if where else []
        except (ValueError, OSError) as error:
            for question in questions:
                yield Asked(file, question, None, error=_one_line(error))
            return
        if media[0].get("has_sound"):
            self.with_sound.add(file)
        for question in questions:
            text = as_plain_text(with_subtitles(spoken, question), self.chat.processor.tokenizer)
            content = [*messages[-1]["content"][:-1], {"type": "text", "text": text}]
            turn = self.chat.make_turn([{**messages[-1], "content": content}], media)
            error = too_large("this does not fit", turn) if turn.is_too_large else ""
            try:
                if spoken:
                    self.chat.refuse_length(turn)
            except TooLarge as too_long:
                error = _one_line(too_long)
            yield Asked(file, question, turn, str(where or ""), error)

    def _batches(self, every: Iterator[Asked]) -> Iterator[list[Asked]]:
        """What is answered side by side: neighbours while that pays and fits."""
        batch = []
        for asked in every:
            if batch and not self._goes_with(asked, batch):
                yield batch
                batch = []
            batch.append(asked)
        if batch:
            yield batch

    def _goes_with(self, asked, batch):
        if asked.error or batch[0].error or len(batch) >= self.batch_size:
            return False
        turns = [*(one.turn for one in batch), asked.turn]
        tokens = len(turns) * max(turn.prompt_tokens for turn in turns)
        if tokens > BATCH_TOKENS:
            return False
        new_tokens = len(turns) * self.chat.generation.get("max_new_tokens", 0)
        vision = sum(turn.vision_tokens for turn in turns)
        return self.chat.forecast_memory(tokens, vision, new_tokens).fits is not False

    def _rows(self, batch) -> Iterator[dict]:
        """The rows of a batch; where it cannot be answered, each is asked alone."""
        reason = batch[0].error
        if not reason:
            for asked in batch:
                self.chat.notice_length(asked.turn)
            self.chat.load()  # what fails here is no file's fault, and ends it
            try:
                yield from self._answer(batch)
                return
            except (ValueError, OSError) as error:  # TooLarge and damage that is met while reading
                reason = _one_line(error)
        if len(batch) == 1:
            yield {**batch[0].row(), "error": reason}
            return
        for asked in batch:
            yield from self._rows([asked])

    def _answer(self, batch) -> list[dict]:
        start, turns = time.monotonic(), [asked.turn for asked in batch]
        output = self.chat.generate(self.chat.encode(turns))
        if output is None:
            raise TooLarge(too_large("out of memory", turns[0]))
        seconds, tokenizer = round(time.monotonic() - start, 2), self.chat.processor.tokenizer
        width, rows = max(turn.prompt_tokens for turn in turns), []
        for asked, ids in zip(batch, output["sequences"][:, width:].cpu(), strict=True):
            row = asked.row()
            row["answer"] = tokenizer.decode(ids, skip_special_tokens=True).strip()
            row["answer_tokens"] = int((ids != tokenizer.pad_token_id).sum())
            row |= {"answering_seconds": seconds, "side_by_side": len(batch), "where": self.where}
            rows.append(row)
        return rows


def _one_line(error):
    return " ".join(str(error).split())
