"""The data sets of finetune.py: files, folders and ids on the Hub into rows.

A row is what one line, object or record holds, as Python values; what it means is in
finetuning_rows.py. Pictures and videos that a data set holds inside stay as they are stored,
{"bytes": ..., "path": ...}: nothing here decodes.
"""

import csv
import dataclasses
import io
import json
import random
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from commands.finetuning_rows import ANSWERS, LISTS, QUESTIONS, SHOWN_LAYOUTS

# What a table may write where there is nothing.
NO_VALUE = {"", "NaN", "nan", "None", "null", "NULL", "<NA>"}
FILES = (".json", ".jsonl", ".csv", ".tsv", ".parquet")


def split_share(name: str) -> tuple[str, float | None]:
    """("set.json", 50.0) of "set.json%50"; (name, None) where there is no share."""
    match = re.fullmatch(r"(.+)%(\d+(?:\.\d+)?)", name)
    return (match[1], float(match[2])) if match and not Path(name).exists() else (name, None)


def read_set(name: str, seed: int) -> tuple[Sequence, Path, list[int]]:
    """(rows, folder, row numbers) of a data set, of which "name%50" takes a random half.

    The same seed takes the same rows. Past 100 %, rows come several times.
    """
    name, share = split_share(name)
    rows, folder = read_rows(name)
    numbers = list(range(len(rows)))
    if share is not None:
        wanted = round(len(numbers) * share / 100)
        times, rest = divmod(wanted, max(len(numbers), 1))
        numbers = numbers * times + random.Random(seed).sample(numbers, rest)
    return rows, folder, numbers


def read_rows(name: str) -> tuple[Sequence, Path]:
    """The rows of one data set, and the folder that its paths start from.

    name: a .json, .jsonl, .csv, .tsv or .parquet file, a folder that `datasets` can load, or an id
    on the Hub, maybe with a subset and a split: "org/name:subset:split", "org/name::split".
    """
    path, suffix = Path(name), Path(name).suffix.lower()
    if suffix in FILES and not path.is_file():
        raise FileNotFoundError(f"there is no file {name}.")
    if suffix in (".json", ".jsonl"):
        return _read_json(path), path.parent
    if suffix in (".csv", ".tsv"):
        return _read_table(path, "\t" if suffix == ".tsv" else ","), path.parent
    try:
        import datasets
    except ImportError as error:
        raise ImportError(
            f"{name} is not a .json, .jsonl, .csv or .tsv file; reading it needs: "
            "pip install datasets"
        ) from error
    if suffix == ".parquet":
        return _undecoded(datasets.Dataset.from_parquet(str(path)), datasets), path.parent
    source, subset, split = (*name.split(":"), "", "")[:3]
    if Path(source, "state.json").is_file() or Path(source, "dataset_dict.json").is_file():
        rows = datasets.load_from_disk(source)  # as save_to_disk wrote it
        if isinstance(rows, dict):
            if (split or "train") not in rows:
                raise ValueError(
                    f"{source} has no split {split or 'train'!r}, but {', '.join(rows)}: name one, "
                    f"as in {source}::{next(iter(rows))}"
                )
            rows = rows[split or "train"]
        elif split or subset:
            raise ValueError(f"{source} was saved as one data set, without subsets and splits.")
    else:
        rows = datasets.load_dataset(source, subset or None, split=split or "train")
    return _undecoded(rows, datasets), path if path.is_dir() else Path()


def _read_text(path):
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            return file.read()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not in UTF-8 ({error}): save it anew.") from error


def _read_json(path):
    """Rows of a JSON file, or of JSON Lines, whichever the file's name says."""
    text = _read_text(path)
    try:
        content = json.loads(text)
    except json.JSONDecodeError as whole:
        lines = [(n, line) for n, line in enumerate(text.split("\n"), start=1) if line.strip()]
        rows = []
        for number, line in lines:
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise ValueError(
                    f"{path} is neither JSON ({whole}) nor JSON Lines (line {number}: {error})."
                ) from error
        return rows
    if isinstance(content, list):
        return content
    if _is_row(content):
        return [content]  # JSON Lines of one row
    # {"id": row, ...}, {"info": ..., "data": [rows]} or {"info": ..., "data": {"id": row, ...}}
    named = {"": content, **content} if isinstance(content, dict) else {}
    found = {name: rows for name, value in named.items() if (rows := _rows_in(value))}
    if len(found) == 1:
        return next(iter(found.values()))
    what = f"rows in each of {', '.join(found)}" if found else "neither a list of rows nor one row"
    raise ValueError(
        f"{path} holds {what}: give a list of objects, each with messages or conversations, or one "
        f"object a line.\n{SHOWN_LAYOUTS}"
    )


def _is_row(value):
    return isinstance(value, dict) and not value.keys().isdisjoint((*LISTS, *QUESTIONS, *ANSWERS))


def _rows_in(value):
    """The objects that a list or an object holds, if any of them is a row; else none."""
    values = list(value.values()) if isinstance(value, dict) else value
    is_list = isinstance(values, list) and all(isinstance(one, dict) for one in values)
    return values if is_list and any(map(_is_row, values)) else []


def _read_table(path, delimiter):
    """Rows of a .csv or .tsv file with a header; cells that pandas reads as empty are None."""
    csv.field_size_limit(sys.maxsize)
    text = _read_text(path)
    try:
        rows = list(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True))
    except csv.Error as error:
        if delimiter != "\t":
            raise ValueError(f"{path} is no CSV: {error}. Put quotes in cells twice.") from error
        # Then its quotes are no more than that.
        rows = [line.split("\t") for line in re.split(r"\r\n|\r|\n", text)]
    header, *rows = [row for row in rows if row not in ([], [""])] or [[]]
    header = [name.strip() for name in header]
    if twice := sorted({name for name in header if name and header.count(name) > 1}):
        raise ValueError(f"{path} has several columns {', '.join(twice)}: leave one of each.")
    for number, row in enumerate(rows, start=1):
        if len(row) != len(header):
            raise ValueError(f"{path}: row {number} and the header differ in their cells.")
    return [
        {key: None if value in NO_VALUE else value for key, value in zip(header, row, strict=True)}
        for row in rows
    ]


def _undecoded(rows, datasets):
    """The same rows with media as they are stored, and the names of classes for their numbers."""
    import pyarrow  # comes with datasets

    media = (datasets.Image, datasets.Video, datasets.Audio)

    def plain(feature):
        if isinstance(feature, datasets.ClassLabel):
            return datasets.Value("string")
        if isinstance(feature, media):
            return dataclasses.replace(feature, decode=False)
        if isinstance(feature, dict):
            return type(feature)({name: plain(one) for name, one in feature.items()})
        if hasattr(feature, "feature"):  # a list
            return dataclasses.replace(feature, feature=plain(feature.feature))
        return feature

    features = plain(rows.features)
    if features == rows.features:
        return rows
    table = rows.data
    for place, (name, feature) in enumerate(rows.features.items()):
        if isinstance(feature, datasets.ClassLabel):
            known = dict(enumerate(feature.names))  # without a class are None and -1
            names = [known.get(number) for number in table[name].to_pylist()]
            table = table.set_column(place, name, pyarrow.array(names, pyarrow.string()))
    # Not by `rows.cast`, which writes a copy to the disk: the storage is the same.
    table = table.cast(features.arrow_schema)
    return datasets.Dataset(table, info=datasets.DatasetInfo(features=features))
