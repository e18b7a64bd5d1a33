"""Rows of data as questions with right answers: evaluation.py --data, finetune.py --eval_data.

A row is asked for each answer that training would learn, with all that stands before it, right
answers included. `collate` makes a batch of prompts.
"""

import torch


def questions_of(messages: list[dict]) -> list[tuple[list[dict], str]]:
    """(messages of the prompt, right answer) of each answer of a row that counts in the loss."""
    return [
        (messages[:turn], "".join(part["text"] for part in message["content"]).strip())
        for turn, message in enumerate(messages)
        if message["role"] == "assistant" and message.get("loss", True)
    ]


def is_exact(answer: str, right: str) -> bool:
    """Whether an answer is the right one, but for capitals, white space and a final full stop."""
    return _words(answer) == _words(right)


def _words(text):
    return " ".join(text.casefold().split()).removesuffix(".").strip()


def collate(inputs: list, pad: int):
    """Inputs of single prompts, as the processor makes them, as one batch padded on the left."""
    if len(inputs) == 1:
        return inputs[0]
    batch, longest = type(inputs[0])(), max(one["input_ids"].shape[1] for one in inputs)
    for name in {name: None for one in inputs for name in one}:
        parts = [torch.as_tensor(one[name]) for one in inputs if name in one]
        if name in ("input_ids", "attention_mask", "mm_token_type_ids"):
            value = pad if name == "input_ids" else 0
            parts = [
                torch.nn.functional.pad(part, (longest - part.shape[1], 0), value=value)
                for part in parts
            ]
        batch[name] = torch.cat(parts)
    return batch
