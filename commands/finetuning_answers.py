"""Exact match during fine-tuning: how many answers the model generates as --eval_data has them."""

import random

import torch

from commands.finetuning_model import run_dtype
from commands.questions import collate, is_exact


def sample_questions(data, seed: int, at_most: int) -> list[tuple[list[dict], str]]:
    """Questions with right answers of `Conversations`, drawn by the seed, videos as in training.

    Rows that cannot be used ask nothing.
    """
    questions = []
    for index in random.Random(seed).sample(range(len(data)), len(data)):
        questions += data.questions(index)
        if len(questions) >= at_most:
            break
    return questions[:at_most]


@torch.no_grad()
def count_exact(model, processor, questions, args) -> tuple[int, int]:
    """(exactly right, asked) over all processes, each of which asks its share.

    model: in eval mode, whole on this process. An answer is cut off where it is longer than the
    right one and so wrong.
    """
    tokenizer, exact = processor.tokenizer, 0
    mine = questions[args.process_index :: args.world_size]
    for start in range(0, len(mine), args.per_device_eval_batch_size):
        batch = mine[start : start + args.per_device_eval_batch_size]
        inputs = [
            processor.apply_chat_template(
                messages,
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
            )
            for messages, _ in batch
        ]
        together = collate(inputs, tokenizer.pad_token_id).to(args.device)
        longest = max(len(tokenizer(right)["input_ids"]) for _, right in batch)
        with torch.autocast(args.device.type, run_dtype(args), enabled=args.bf16 or args.fp16):
            output = model.generate(
                **together,
                max_new_tokens=longest + 4,
                num_beams=1,
                do_sample=False,
                temperature=None,
                top_p=None,
                top_k=None,
            )
        answers = tokenizer.batch_decode(
            output[:, together["input_ids"].shape[1] :], skip_special_tokens=True
        )
        exact += sum(
            is_exact(answer, right) for answer, (_, right) in zip(answers, batch, strict=True)
        )
    return exact, len(mine)
