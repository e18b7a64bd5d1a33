"""The card (README.md) of a checkpoint that was made from another: licence, lineage and use."""

import json
import re
from pathlib import Path
from typing import NamedTuple

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData, hf_hub_download, metadata_load
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

from commands.checkpoint_files import file_inside

SCORES = "## Scores"
HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
CARD = """\
---
{header}
---

# {name}

{description}

```python
{usage}
```

needs {needs}. {commands}
"""
USAGE = """\
from transformers import AutoModelForImageTextToText, AutoProcessor

processor = AutoProcessor.from_pretrained("{name}", trust_remote_code=True)
model = AutoModelForImageTextToText.from_pretrained("{name}", trust_remote_code=True, dtype="auto")\
"""
COMMANDS = """\
This checkpoint carries what loading it needs; the commands
live in the repository of the code and take it by `--model`, as in

    python ask.py --model {name} VIDEO "QUESTION"\
"""
ADAPTER_USAGE = """\
from peft import PeftModel
from transformers import AutoModelForImageTextToText, AutoProcessor

processor = AutoProcessor.from_pretrained("{name}", trust_remote_code=True)
model = AutoModelForImageTextToText.from_pretrained("{base}", trust_remote_code=True, dtype="auto")
model = PeftModel.from_pretrained(model, "{name}")\
"""


def write_card(folder: str | Path, name: str, source: str | Path, description: str, **settings):
    """Write the README.md of the checkpoint in `folder`, as `make_card` makes it."""
    card = make_card(name, source, description, **settings)
    (Path(folder) / "README.md").write_text(card, encoding="utf-8")


def make_card(
    name: str,
    source: str | Path,
    description: str,
    *,
    revision: str | None = None,
    datasets: list[str] | None = None,
    adapter_of: str | None = None,
    relation: str | None = None,
) -> str:
    """The text of the README.md of a checkpoint that was made from `source`.

    name: what to load it by: the name of its folder, or its id on the Hub.  source: the folder or
    Hub id, with `revision`, whose card gives the licence and, for a folder, the base model.
    description: Markdown on what was done to the source.  datasets: Hub ids of its training data.
    adapter_of: for an adapter, what to load its base by.  relation: to its base, as the Hub has it:
    finetune or adapter.
    """
    source_card = read_metadata(source, revision)
    own = {key: source_card[key] for key in source_card if key.startswith("license")}
    own = own or {"license": "other", "license_name": "as-the-source"}
    header = ModelCardData(
        **own,
        base_model=(base := base_model(source, revision)),
        base_model_relation=relation if base else None,
        datasets=datasets or None,
        library_name="transformers",
        pipeline_tag="video-text-to-text",
        tags=["videonsa", "sparse-attention"],
    ).to_yaml()
    if adapter_of is None:
        usage, commands = USAGE.format(name=name), COMMANDS.format(name=name)
    else:
        usage, commands = ADAPTER_USAGE.format(name=name, base=adapter_of), "The base has the code."
    return CARD.format(
        header=header,
        name=name,
        description=description.strip(),
        usage=usage,
        needs="`pip install -r requirements.txt`" if adapter_of is None else "`pip install peft`",
        commands=commands,
    )


class Score(NamedTuple):
    """One number of a card: `value` of `metric` on the data set `data`, over `samples`."""

    data: str
    metric: str
    value: float
    samples: int
    note: str = ""


def add_scores(card: str, scores: list[Score]) -> str:
    """The text of a card with a table of scores, and in its metadata, where the Hub reads them."""
    card = ModelCard(card)
    name = _title(card.text)
    results = [
        EvalResult(
            task_type="video-text-to-text",
            dataset_type=one.data,
            dataset_name=one.data,
            metric_type=one.metric,
            metric_value=round(one.value, 4),
        )
        for one in scores
    ]
    card.data.model_name, card.data.eval_results = name, (card.data.eval_results or []) + results
    rows = [f"| {s.data} | {s.metric} | {s.value:.4g} | {s.samples} | {s.note} |" for s in scores]
    if SCORES not in card.text:
        head = "| data | metric | score | of | settings |\n| --- | --- | --- | --- | --- |"
        rows = ["", SCORES, "", head, *rows]
    card.text = card.text.rstrip("\n") + "\n" + "\n".join(rows) + "\n"
    return str(card)


def read_scores(manifest: Path) -> tuple[str, list[Score]]:
    """(what the checkpoint was given as, its scores) of a manifest of evaluation.py."""
    told = json.loads(Path(manifest).read_text(encoding="utf-8"))
    taken, settings = told["settings"]["video"], told["settings"]["attention"]
    note = ", ".join([settings["asked"], *(f"{name} {value}" for name, value in taken.items())])
    counted = told["samples"]["scored"]
    if told["samples"]["of"] > counted:
        note += f", of {told['samples']['of']}"
    scores = [
        Score(told["task"]["name"], metric, value, counted, note)
        for metric, value in told["scores"].items()
    ]
    return told["settings"]["checkpoint"]["name"], scores


def rename_card(card: str, name: str, base: str | None = None) -> str:
    """The text of a card that `make_card` made, for a checkpoint that is loaded as `name`.

    base: for an adapter, what its base is loaded by. Other cards stay as they are.
    """
    old = _title(card)
    if f'from_pretrained("{old}"' not in card:
        return card
    card = ModelCard(card)
    text = card.text.replace(f"# {old}\n", f"# {name}\n", 1).replace(f'"{old}"', f'"{name}"')
    text = text.replace(f"--model {old} ", f"--model {name} ")
    if base is not None:
        loads = "AutoModelForImageTextToText.from_pretrained("
        text = re.sub(re.escape(loads) + r'"[^"]*"', f'{loads}"{base}"', text)
        card.data.base_model, card.data.base_model_relation = base, "adapter"
    card.text = text
    if card.data.eval_results:
        card.data.model_name = name
    return str(card)


def _title(text):
    found = re.search(r"^# (.+)$", text, re.MULTILINE)
    return found[1] if found else "checkpoint"


def base_model(source: str | Path, revision: str | None = None) -> str | None:
    """The Hub id of the model that `source` is or was made from; None where nothing tells it.

    A folder of the Hub's cache names its repository; any other goes by its card, or by its config
    where that names one of Qwen's models, as older transformers wrote there what was loaded. A
    local path is never given: it says nothing to anybody else.
    """
    folder = Path(source).expanduser()
    if not folder.is_dir():
        return str(source) if HUB_ID.fullmatch(str(source)) else None
    cached = re.search(r"/models--([^/]+)--([^/]+)/snapshots/[^/]+$", folder.resolve().as_posix())
    if cached:
        return f"{cached[1]}/{cached[2]}"
    named = read_metadata(source, revision).get("base_model")
    named = named[0] if isinstance(named, list) and named else named
    if isinstance(named, str) and HUB_ID.fullmatch(named):
        return named
    config = find_file(folder, "config.json")
    text = config.read_text(encoding="utf-8") if config else ""
    loaded = re.search(r'"_name_or_path": "(Qwen/[\w.-]+)"', text)
    return loaded[1] if loaded else None


def check_source(source: str | Path):
    """Raises ValueError for what is neither a folder nor could be an id on the Hub."""
    if not Path(source).expanduser().is_dir() and not HUB_ID.fullmatch(str(source)):
        raise ValueError(f"there is no folder {source}, and an id on the Hub would be OWNER/NAME.")


def find_file(source: str | Path, name: str, revision: str | None = None) -> Path | None:
    """The file `name` of a folder or Hub id, downloaded if need be; None where it has none."""
    folder = Path(source).expanduser()
    if folder.is_dir():
        path = file_inside(folder, name)
    else:
        try:
            path = Path(hf_hub_download(str(source), name, revision=revision))
        except (EntryNotFoundError, LocalEntryNotFoundError):
            return None
    return path if path.is_file() else None


def read_metadata(source: str | Path, revision: str | None = None) -> dict:
    """The metadata of the card of a folder or Hub id; empty where it has no card."""
    path = find_file(source, "README.md", revision)
    if path is None:
        return {}
    try:
        return metadata_load(path) or {}
    except yaml.YAMLError as error:
        raise ValueError(
            f"the metadata of {path} are not YAML ({' '.join(str(error).split())}), and the new "
            "card takes its licence from them: mend or remove that README.md."
        ) from error
