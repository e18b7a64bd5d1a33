"""The answers of an evaluation, kept on disk one by one, so that a killed run goes on."""

import json
import uuid
from pathlib import Path


class AnswerCache:
    """Answers by key, in files of one JSON object a line; each process writes its own file."""

    def __init__(self, folder):
        self.folder, self.known = Path(folder), {}
        for file in sorted(self.folder.glob("*.jsonl")):
            for line in file.read_text(encoding="utf-8").splitlines():
                try:
                    record = json.loads(line)
                except json.JSONDecodeError:  # a process was killed while it wrote this
                    continue
                # What could not be read may be readable by now.
                if record["error"] is None:
                    self.known[record["key"]] = record
        self.file = None

    def get(self, key):
        return self.known.get(key)

    def add(self, sample):
        if self.file is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.file = open(self.folder / f"{uuid.uuid4().hex}.jsonl", "a", encoding="utf-8")
        record = {name: value for name, value in sample.items() if name != "messages"}
        self.file.write(json.dumps(record) + "\n")
        self.file.flush()
