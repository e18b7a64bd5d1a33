"""evaluation.py --data: the questions of rows that training takes, scored and recorded.

Two scores, each a share of all questions, in which what cannot be read is wrong:

- exact_match: the answer is the right one, but for capitals, white space and a final full stop.
- multiple_choice: of questions that list options ("A. a cat"), those whose answer means the right
  one, by its letter or its words. Where an answer is none of them, it is wrong: nothing is guessed.
"""

from datetime import datetime
from pathlib import Path

from tqdm import tqdm

from commands.evaluation_manifest import describe_medium, digest, summarize, write_manifest
from commands.evaluation_model import UNREADABLE, EvaluatedModel, generation_settings
from commands.finetuning_rows import MEDIA, RefusedRow, all_parts, parse_row, to_messages
from commands.finetuning_sets import read_set
from commands.questions import is_exact, questions_of

SPLIT = "data"  # lmms-eval's tasks have splits, a file has one


def read_questions(name: str, root: str | None = None) -> list[dict]:
    """The questions of a data set, in its order, each with its "row" number, from 1.

    A question has "messages" of the prompt and the "right" answer. Raises RefusedRow where a row
    cannot be read, as a score without it would be another set's; media that are not there are a
    question's "error".
    """
    rows, folder, numbers = read_set(name, seed=42)
    questions = []
    for number in numbers:
        try:
            messages, error = to_messages(rows[number], root or folder), None
        except RefusedRow as refused:
            raise RefusedRow(f"{name}:{number + 1}: {refused.reason}") from None
        except OSError as missing:
            messages, error = parse_row(rows[number]), str(missing)
        for prompt, right in questions_of(messages):
            question = {"row": number + 1, "messages": prompt, "right": right, "error": error}
            questions.append(question)
    if not questions:
        raise ValueError(f"there are no rows in {name}.")
    return questions


def evaluate_rows(model: EvaluatedModel, names, output_path, run, root=None, limit=None):
    """Asks the questions of data sets; returns [(name, scores, path of the manifest)].

    run: the manifests' "command", "preset" and the "generation" settings that were asked for. Only
    the first process has something to return.
    """
    results = []
    for name in names:
        every = read_questions(name, root)
        questions = every[:limit]
        ours = range(model.share, len(questions), model.shares)
        task = Path(name).name
        shown = tqdm(ours, desc=f"Answering {task}", disable=model.accelerator.process_index > 0)
        model.answer_all(_sample(task, n, questions[n], run["generation"]) for n in shown)
        if not model.accelerator.is_main_process:
            continue
        records = {record["doc_id"]: record for record in model.records}
        for number, question in enumerate(questions):
            records[number] |= {
                "row": question["row"],
                "right": question["right"],
                "exact": is_exact(records[number].get("answer", ""), question["right"]),
            }
        counted = _count(questions, records, len(every))
        scores = {"exact_match": sum(r["exact"] for r in records.values()) / len(questions)}
        if counted["multiple_choice"]["questions"]:
            scores["multiple_choice"] = counted["multiple_choice"]["accuracy"]
        described = {
            "name": task,
            "version": None,
            "config": None,
            "settings": {"limit": limit},
            "documents": digest([[str(q["messages"]), q["right"]] for q in questions]),
            "dataset": str(name),
            "revision": None,
        }
        when = {"date": datetime.now().strftime("%Y%m%d_%H%M%S")}
        folder = Path(output_path) / Path(model.settings["checkpoint"]["name"]).resolve().name
        path = write_manifest(folder, model, described, run | when, scores, counted, records)
        results.append((name, scores, path))
    return results


def _sample(task, number, question, generation):
    sample = {"task": task, "doc_id": number, "split": SPLIT, "messages": None}
    sample |= {"error": question["error"], "generation": generation_settings(generation)}
    if question["error"] is None:
        # Prompts of one row share their parts, and each is set up by itself.
        messages = [
            {**one, "content": [dict(part) for part in one["content"]]}
            for one in question["messages"]
        ]
        media = [part for part in all_parts(messages) if part["type"] in MEDIA]
        try:
            sample |= {"messages": messages, "files": [describe_medium(part) for part in media]}
        except UNREADABLE as error:
            sample["error"] = str(error)
    return sample


def _count(questions, records, of):
    """`summarize` for questions of rows: how many, what was not read, and the multiple choice."""
    logged = [
        {
            "doc_id": number,
            "input": "\n".join(
                part.get("text", "") for part in question["messages"][-1]["content"]
            ),
            "target": question["right"],
        }
        for number, question in enumerate(questions)
    ]
    return summarize(logged, records, {SPLIT: [{}] * of})
