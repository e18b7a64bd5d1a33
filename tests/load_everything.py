"""Load a model the way users do and print what came of it as JSON: load_everything.py SOURCE.

Run by tests/test_loading.py in a process of its own, so that each load starts from nothing.
BLOCK_TRITON=1 in the environment makes Triton unavailable.
"""

import json
import os
import sys

if os.environ.get("BLOCK_TRITON"):
    sys.modules["triton"] = None

import numpy as np
import torch
import transformers
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoVideoProcessor,
    pipeline,
)

VIDEO = np.random.default_rng(0).integers(0, 255, (8, 56, 84, 3), dtype=np.uint8)
MESSAGES = [
    {
        "role": "user",
        "content": [
            {"type": "video", "video": VIDEO, "fps": 2.0},
            {"type": "text", "text": "What is shown?"},
        ],
    }
]


def answer(model, processor):
    """Greedy ids for a question about the frames."""
    inputs = processor.apply_chat_template(
        MESSAGES, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    assert (inputs["input_ids"] == model.config.video_token_id).any()
    ids = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    return ids[0, inputs["input_ids"].shape[1] :].tolist()


def main(source):
    remote = {"trust_remote_code": True}
    config = AutoConfig.from_pretrained(source, **remote)
    model, info = AutoModelForImageTextToText.from_pretrained(
        source, **remote, dtype=torch.float32, output_loading_info=True
    )
    generating = AutoModel.from_pretrained(source, **remote, dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(source, **remote)
    ids = answer(model, processor)
    assert ids == answer(generating, processor)
    pipe = pipeline("image-text-to-text", model=source, **remote)
    said = pipe(text=MESSAGES, max_new_tokens=4, return_full_text=False)
    result = {
        "transformers": transformers.__version__,
        "triton": sys.modules.get("triton") is not None,
        "config": type(config).__name__,
        "model": type(model).__name__,
        "auto_model": type(generating).__name__,
        "processor": type(processor).__name__,
        "video_processor": type(AutoVideoProcessor.from_pretrained(source, **remote)).__name__,
        "missing": sorted(info["missing_keys"]),
        "unexpected": sorted(info["unexpected_keys"]),
        "answer": ids,
        "pipeline": said[0]["generated_text"],
        "decoded": processor.decode(ids, skip_special_tokens=True),
    }
    if len(sys.argv) > 2:
        model.save_pretrained(sys.argv[2])
        processor.save_pretrained(sys.argv[2])
    print(json.dumps(result))


if __name__ == "__main__":
    main(sys.argv[1])
