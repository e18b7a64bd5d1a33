"""Times the whole model beside stock Qwen2.5-VL: 7B's size, random weights, bfloat16, one GPU.

    python benchmarks/prefill.py
    python benchmarks/prefill.py --models ours --sizes 1048576
    python benchmarks/prefill.py --models ours float8 --sizes 131072
    python benchmarks/prefill.py --train --sizes 36864 65536 131072

A prompt is a video of 128 tokens for each two frames and a question. Prefill is the time that
`generate` takes to its first token, from pixels on the GPU; above 256K tokens, pixels are made as
they are read, which a `PixelStream` does with a file. Then decoding in milliseconds a token, the
whole answer, and the vision tower alone; with --static also with a static cache, for which the
library compiles decoding. "float8" is ours as --load_in float8-dynamic loads it. With --train:
forward and backward of the language model with LoRA and gates, layers checkpointed, loss on 28
tokens, and the whole step with a frozen tower. Seconds are medians after a warm-up, or of one run
(stock above 8K tokens, ours above 128K, training above 64K); GiB are the peak.
"""

import argparse
import gc
import sys
import time
from pathlib import Path

import torch
import transformers
from transformers import AutoConfig, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))
from videonsa import ROOT  # noqa: E402
from videonsa.configuration_videonsa import VideoNSAConfig  # noqa: E402
from videonsa.modeling_videonsa import VideoNSAForConditionalGeneration  # noqa: E402

from commands.forecast import forecast  # noqa: E402
from commands.quantized_loading import quantization_config  # noqa: E402

GRID = 16, 32  # patches of a frame: 128 tokens for two frames
STEP = GRID[0] * GRID[1]
QUESTION = 32
CLASSES = {
    "ours": (VideoNSAConfig, VideoNSAForConditionalGeneration),
    "stock": (Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[8192, 32768, 65536, 131072])
    parser.add_argument("--models", nargs="+", default=[*CLASSES], choices=[*CLASSES, "float8"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--new_tokens", type=int, default=33, help="of an answer, at least 2")
    parser.add_argument("--semantics", default="paper", choices=["paper", "released"], help="ours")
    parser.add_argument("--static", action="store_true")
    parser.add_argument("--train", action="store_true")
    args = parser.parse_args()
    if args.train and "float8" in args.models:
        parser.error("float8 does not train: leave it out of --models")
    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, transformers "
        f"{transformers.__version__}",
        flush=True,
    )
    for name in args.models:
        model = make_model(*CLASSES["ours" if name == "float8" else name])
        if name != "stock":
            model.config.text_config.nsa_semantics = args.semantics
        if name == "float8":
            quantise(model)
        train(name, model, args) if args.train else infer(name, model, args)
        del model
        gc.collect()
        torch.cuda.empty_cache()


def make_config(config_class):
    """A configuration of the 7B's sizes."""
    ids = AutoConfig.from_pretrained(ROOT, trust_remote_code=True).to_dict()
    ids = {name: value for name, value in ids.items() if name.endswith("_token_id")}
    text = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}
    text["rope_parameters"]["mrope_section"] = [16, 24, 24]
    text |= {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28}
    text |= {"num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064}
    text["max_position_embeddings"] = 2**21
    vision = {"depth": 32, "hidden_size": 1280, "out_hidden_size": 3584, "num_heads": 16}
    vision |= {"intermediate_size": 3420, "tokens_per_second": 2}
    vision |= {"fullatt_block_indexes": [7, 15, 23, 31]}
    return config_class(text_config=text, vision_config=vision, **ids)


def make_model(config_class, model_class):
    config = make_config(config_class)
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = model_class._from_config(config, dtype=torch.bfloat16).eval()
    model.generation_config.pad_token_id = 0
    return model


def quantise(model):
    """Make its linear layers, gates and head left out, torchao's float8 by the row."""
    from torchao.quantization import quantize_

    model.is_quantized = True
    quantize_(
        model.model.language_model,
        quantization_config("float8-dynamic").quant_type,
        lambda layer, name: type(layer) is torch.nn.Linear and ".g_proj_" not in name,
    )


class MadePixels:
    """Rows of pixels that are made when they are read."""

    dtype = torch.bfloat16

    def __init__(self, rows):
        self.shape = (rows, 1176)

    def __len__(self):
        return self.shape[0]

    def __getitem__(self, rows):
        first, last, _ = rows.indices(len(self))
        return torch.randn(last - first, 1176, device="cuda", dtype=self.dtype)


def make_inputs(model, tokens, made=False):
    """A prompt; made: whether its pixels are made as they are read, however short it is."""
    config, steps = model.config, tokens // (STEP // 4)
    ids = torch.full((1, steps * STEP // 4 + QUESTION), 9, device="cuda")
    ids[:, 4 : 4 + steps * STEP // 4] = config.video_token_id
    ids[:, 3] = config.vision_start_token_id
    pixels = MadePixels(steps * STEP)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": (ids == config.video_token_id) * 2,
        "pixel_values_videos": pixels if made or tokens > 262144 else pixels[:],
        "video_grid_thw": torch.tensor([[steps, *GRID]], device="cuda"),
        "second_per_grid_ts": torch.tensor([1.0]),
    }


def infer(name, model, args):
    print(
        f"{'':6s} {'tokens':>8s} {'prefill s':>10s} {'ms/token':>9s} {'answer s':>9s} {'GiB':>6s} "
        f"{'forecast':>9s} {'tower s':>8s}"
    )
    answer(model, make_inputs(model, 4096), 2)  # compiles
    for tokens in args.sizes:
        inputs = make_inputs(model, tokens)
        repeats = args.repeats if tokens <= (8192 if name == "stock" else 131072) else 1
        for option in [{}, {"cache_implementation": "static"}] if args.static else [{}]:
            try:
                line = infer_one(name, model, inputs, repeats, args.new_tokens, option)
            except torch.OutOfMemoryError as error:
                line = f" {str(error)[:80]}"
            print(f"{name:6s} {tokens:8d}{line}", *option.values(), flush=True)


def infer_one(name, model, inputs, repeats, new_tokens, option):
    start = time.perf_counter()
    if option or repeats > 1:
        answer(model, inputs, new_tokens, **option)
    first = time.perf_counter() - start
    torch.cuda.reset_peak_memory_stats()
    times = zip(*(answer(model, inputs, new_tokens, **option) for _ in range(repeats)), strict=True)
    prefill, each, whole = (sorted(x)[repeats // 2] for x in times)
    peak = torch.cuda.max_memory_allocated() / 2**30
    line = f" {prefill:10.2f} {each * 1e3:9.1f} {whole:9.2f} {peak:6.1f}"
    if option:
        return f"{line}, {first:.1f} s the first time"
    foreseen = float("nan")
    if name != "stock":
        length = inputs["input_ids"].shape[1]
        foreseen = forecast(
            model.config,
            length,
            vision_tokens=length - QUESTION,
            new_tokens=new_tokens,
            dtype=model.dtype,
            quantization=quantization_config("float8-dynamic") if name == "float8" else None,
        ).peak
    line += f" {foreseen:9.1f}"
    if torch.is_tensor(inputs["pixel_values_videos"]):
        line += f" {timed(lambda: tower(model, inputs), repeats)[0]:8.2f}"
    return line


class Clock:
    """A streamer that notes when the prompt, then each token is there."""

    def __init__(self):
        self.times = []

    def put(self, tokens):
        self.times.append(time.perf_counter())

    def end(self):
        pass


def answer(model, inputs, new_tokens, **options):
    """Seconds to the first of so many tokens, of each one after it, and of them all."""
    first, *_, last = token_times(model, inputs, new_tokens, **options)
    return first, (last - first) / (new_tokens - 1), last


def token_times(model, inputs, new_tokens, **options):
    """Seconds until each of so many tokens is on the host."""
    clock, start = Clock(), time.perf_counter()
    lengths = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens}
    model.generate(**inputs, **lengths, do_sample=False, streamer=clock, **options)
    return [each - start for each in clock.times[1:]]


@torch.no_grad()
def tower(model, inputs):
    model.model.get_video_features(inputs["pixel_values_videos"], inputs["video_grid_thw"])


def add_adapters(model):
    """The model with LoRA and gates to train, layers checkpointed, its tower frozen."""
    import peft

    options = {"r": 64, "target_modules": "model.language_model.*(q|k|v|o)_proj"}
    adapted = peft.get_peft_model(model, peft.LoraConfig(**options))
    for name, parameter in adapted.named_parameters():
        if "g_proj" in name:
            parameter.requires_grad_()
    adapted.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    adapted.train()
    model.model.visual.eval()
    return adapted


def make_labels(inputs):
    """What a training step takes besides: the question's tokens count as the answer."""
    labels = torch.full_like(inputs["input_ids"], -100)
    labels[:, -QUESTION + 4 :] = 9
    shifted = labels.roll(-1, 1)
    shifted[:, -1] = -100
    keep = (shifted[0] != -100).nonzero()[:, 0]
    labels = {"labels": labels, "shift_labels": shifted[:, keep], "logits_to_keep": keep}
    return labels | {"use_cache": False}


def train(name, base, args):
    model = add_adapters(base)
    print(f"{'':6s} {'tokens':>8s} {'LLM s':>7s} {'GiB':>6s} {'whole s':>8s} {'GiB':>6s}")
    for tokens in args.sizes:
        try:
            inputs = make_inputs(base, tokens)
            common, length = make_labels(inputs), inputs["input_ids"].shape[1]
            positions = torch.arange(length, device="cuda").expand(3, 1, -1)
            embeds = torch.randn(1, length, 3584, device="cuda", dtype=torch.bfloat16).mul_(0.02)
            alone = {"inputs_embeds": embeds.requires_grad_(), "position_ids": positions}
            alone["mm_token_type_ids"] = inputs["mm_token_type_ids"]
            repeats = 2 if tokens <= 65536 else 1
            times = [*timed(lambda call=alone | common: step(model, call), repeats)]
            del embeds, alone
            model.zero_grad(set_to_none=True)
            times += timed(lambda call=inputs | common: step(model, call), repeats)
            print(
                f"{name:6s} {tokens:8d} {times[0]:7.2f} {times[1]:6.1f} {times[2]:8.2f} "
                f"{times[3]:6.1f}",
                flush=True,
            )
        except torch.OutOfMemoryError as error:
            print(f"{name:6s} {tokens:8d} {str(error)[:80]}", flush=True)
        model.zero_grad(set_to_none=True)
        gc.collect()
        torch.cuda.empty_cache()


def step(model, call):
    model(**call).loss.backward()


def timed(function, repeats):
    """Median seconds of that many runs after one that does not count, if many; and peak GiB."""
    torch.cuda.synchronize()
    if repeats > 1:
        function()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return sorted(times)[len(times) // 2], torch.cuda.max_memory_allocated() / 2**30


if __name__ == "__main__":
    main()
