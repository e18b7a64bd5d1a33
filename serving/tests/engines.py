"""What engines are started with, and what their answers are held to: the checkpoint in float64."""

import os

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor
from vllm import SamplingParams

TOLERANCE = 1e-5  # of a log-probability, float32 against float64
worst_of = {}  # of each test, printed at the end for docs/serving.md
OPTIONS = {
    "trust_remote_code": True,
    "dtype": "float32",
    "enforce_eager": True,
    "max_model_len": 2048,
    "max_num_seqs": 8,
    "limit_mm_per_prompt": {"video": 3, "image": 3},
    "skip_mm_profiling": True,
    "disable_log_stats": True,
    "allowed_local_media_path": "/",
}


class Reference:
    """The checkpoint as transformers runs it, in float64."""

    def __init__(self, folder):
        self.model = AutoModelForImageTextToText.from_pretrained(
            folder, trust_remote_code=True, dtype=torch.float64
        )
        self.processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)

    def prompt(self, messages, **settings):
        return self.processor.apply_chat_template(
            messages,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            **settings,
        )

    def answer(self, messages):
        inputs = self.prompt(messages)
        ids = self.model.generate(**inputs, max_new_tokens=64)[0, inputs["input_ids"].shape[1] :]
        return self.processor.decode(ids, skip_special_tokens=True)

    def check(self, output, messages, tolerance=TOLERANCE, **settings):
        """The prompt of an engine's output, its greedy tokens and their log-probabilities."""
        self.check_inputs(output, self.prompt(messages, **settings), tolerance)

    def check_inputs(self, output, inputs, tolerance=TOLERANCE):
        prompt = inputs["input_ids"][0].tolist()
        assert output.prompt_token_ids == prompt
        answer = output.outputs[0]
        inputs["input_ids"] = torch.tensor([prompt + list(answer.token_ids[:-1])])
        # The placeholders of the prompt are all that there are.
        length = inputs["input_ids"].shape[1]
        inputs["attention_mask"] = torch.ones(1, length, dtype=torch.long)
        kinds = torch.zeros(1, length, dtype=inputs["mm_token_type_ids"].dtype)
        kinds[:, : len(prompt)] = inputs["mm_token_type_ids"]
        inputs["mm_token_type_ids"] = kinds
        with torch.no_grad():
            logits = self.model(**inputs).logits[0, len(prompt) - 1 :].log_softmax(-1)
        expected = logits[torch.arange(len(logits)), torch.tensor(answer.token_ids)]
        # No token is likelier, but for what the engine's dtype cannot tell from it.
        assert (logits.max(-1).values - expected).max() <= 2 * tolerance
        given = [
            step[token].logprob
            for step, token in zip(answer.logprobs, answer.token_ids, strict=True)
        ]
        worst = (torch.tensor(given, dtype=torch.float64) - expected).abs().max().item()
        name = os.environ["PYTEST_CURRENT_TEST"].partition("::")[2].removesuffix(" (call)")
        worst_of[name] = max(worst, worst_of.get(name, 0.0))
        assert worst < tolerance


def greedy(tokens=6):
    return SamplingParams(max_tokens=tokens, temperature=0, logprobs=0, ignore_eos=True)
