"""The rows that asking many questions writes, in a .jsonl or .csv file that goes on after a kill.

A row is appended when its answer is there, and is never changed afterwards. A run that finds rows
from before keeps them; of a row that was cut off, what is there is taken out of the file. All rows
of a file are asked with the same settings.
"""

import csv
import io
import json
import os
from pathlib import Path

COLUMNS = ("file", "question", "answer", "error", "taken", "subtitles", "vision_tokens")
COLUMNS += ("prompt_tokens", "answer_tokens", "answering_seconds", "side_by_side", "where")
COLUMNS += ("settings",)


class Answers:
    """The rows of a .jsonl or .csv file, which grows by one per answer.

    settings: what all of its rows are asked with.
    done: (file, question) of the rows that it has.

    Raises ValueError for a file of another kind, and for rows that were asked with other settings;
    the file is then left as it is.
    """

    def __init__(self, path: str | Path, settings: dict):
        self.path, self.settings = Path(path), settings
        if self.path.suffix.lower() not in (".csv", ".jsonl"):
            raise ValueError(f"--out is {path}; its name must end in .jsonl or .csv")
        self.is_csv, self.columns = self.path.suffix.lower() == ".csv", list(COLUMNS)
        rows = self._take_up()
        self.done = {(row["file"], row["question"]) for row in rows}
        self.without_answer = sum(bool(row.get("error")) for row in rows)

    def write(self, row: dict):
        """Adds a row, with the settings."""
        self.done.add((row["file"], row["question"]))
        self.without_answer += "error" in row
        row = {**row, "settings": self.settings}
        if self.is_csv:
            row["settings"] = json.dumps(self.settings, ensure_ascii=False)
            self._append(_csv_line(row.get(column, "") for column in self.columns))
        else:
            self._append(json.dumps(row, ensure_ascii=False) + "\n")

    def _append(self, line):
        with open(self.path, "a", encoding="utf-8", newline="") as file:
            file.write(line)

    def _take_up(self):
        """The rows that the file has; a last one that was cut off is taken out of it."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.touch()  # so that what cannot be written is refused now
        content = self.path.read_bytes()
        lines, rows, length = list(_lines(content, self.is_csv)), [], 0
        for number, line in enumerate(lines):
            text, whole = line.decode("utf-8-sig", errors="replace"), _is_whole(line, self.is_csv)
            row = self._read_header(text) if self.is_csv and number == 0 else self._read_row(text)
            if row is None:
                if whole or not (rows or _BEGINNING[self.is_csv].startswith(text[:9])):
                    raise ValueError(
                        f"line {number + 1} of {self.path} is no answer of ask.py: give --out "
                        "another name"
                    )
                os.truncate(self.path, length)
                break
            length += len(line)
            rows.append(row)
            if not whole:
                self._append("\n")
        if self.is_csv and not length:
            self._append(_csv_line(self.columns))
        return rows[1:] if self.is_csv else rows

    def _read_header(self, text):
        """The columns of a .csv, which may be more than ours; None where some of ours lack."""
        columns = next(csv.reader([text]), [])
        if not set(COLUMNS) <= set(columns):
            return None
        self.columns = columns
        return columns

    def _read_row(self, text):
        """The row of a line; None where it is none, or not whole."""
        try:
            if self.is_csv:
                cells = next(csv.reader(io.StringIO(text, newline=""), strict=True), [])
                if len(cells) != len(self.columns):
                    return None
                row = dict(zip(self.columns, cells, strict=True))
                row["settings"] = json.loads(row["settings"])
            else:
                row = json.loads(text)
            self._check_settings(row["settings"])
            return row if row["file"] and row["question"] else None
        except (csv.Error, json.JSONDecodeError, KeyError, TypeError, AttributeError):
            return None

    def _check_settings(self, before):
        changed = [
            f"{name} was {before.get(name)}, now {self.settings.get(name)}"
            for name in {**before, **self.settings}
            if before.get(name) != self.settings.get(name)
        ]
        if changed:
            raise ValueError(
                f"{self.path} has answers that were asked with other settings "
                f"({'; '.join(changed)}): ask with those, or give --out another name"
            )


def _lines(content, is_csv):
    """The lines of a file with their ends, the last one whole or not."""
    line = b""
    for piece in content.splitlines(keepends=True):
        line += piece
        if _is_whole(line, is_csv):
            yield line
            line = b""
    if line:
        yield line


def _is_whole(line, is_csv):
    """Whether a line has its end, which is none inside the quotes of a .csv."""
    return line.endswith(b"\n") and not (is_csv and line.count(b'"') % 2)


def _csv_line(cells):
    line = io.StringIO()
    csv.writer(line, lineterminator="\n").writerow(cells)
    return line.getvalue()


# How the two kinds of files begin, .jsonl and .csv.
_BEGINNING = ('{"file": ', _csv_line(COLUMNS))
