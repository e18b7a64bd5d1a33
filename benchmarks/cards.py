"""What fits on which card: the 7B's size in 16, 8 and 4 bits, one GPU held to the sizes of smaller.

    python benchmarks/cards.py --forecast
    PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True python benchmarks/cards.py
    PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True python benchmarks/cards.py --rows edges

The first prints, without a GPU, the longest video that each card takes by the forecast. The others
measure some of its rows on one GPU of 80 GB, with random weights that are quantised layer by layer
on it, under `torch.cuda.set_per_process_memory_fraction`: seconds to the first token (one run after
a warm-up, or of one that compiles nothing new), milliseconds for each of 8 tokens after it, GiB at
the peak as they were allocated and as the forecast says. Rows that would begin after --seconds are
left out. 8bit and 4bit are bitsandbytes', as --load_in takes them.

--rows: "lengths" are of given lengths, "edges" of as many tokens as the forecast lets through,
"offloaded" have the cache, or the weights of the layers, in the host's memory, and "training" is a
step of examples/recipes/qlora.yaml: adapters over 4 bits and whole gates, with their optimizer.

A card of N GiB counts as N - 0.5: the driver and CUDA's own context take the rest. A prompt is a
video of 128 tokens for each two frames and a question.
"""

import argparse
import gc
import re
import time
from types import SimpleNamespace

import torch
import transformers
from accelerate import dispatch_model
from prefill import (
    CLASSES,
    QUESTION,
    make_config,
    make_inputs,
    make_labels,
    make_model,
    token_times,
)

from commands.finetuning_model import choose_trained
from commands.forecast import GIB, forecast
from commands.quantized_loading import bits_of, quantization_config

CARDS = 12, 16, 24, 48, 80  # GiB
WEIGHTS = "16bit", "8bit", "4bit"
HOST = "host"  # 16 bit, with the language model's layers in the host's memory
TAKEN = 0.5  # GiB of a card that no tensor gets
FRAMES = 144  # tokens of two frames of 252 x 448, as 360p is taken
OFFLOADED = {"cache_implementation": "offloaded"}
# Weights, card, tokens (None: as many as the forecast says), options of generate.
ROWS = {
    "lengths": [
        ("16bit", 80, 32768, {}),
        ("16bit", 80, 131072, {}),
        ("16bit", 24, 32768, {}),
        ("4bit", 80, 32768, {}),
        ("4bit", 80, 131072, {}),
        ("4bit", 24, 131072, {}),
        ("4bit", 12, 32768, {}),
        ("8bit", 80, 32768, {}),
        ("8bit", 16, 32768, {}),
        ("8bit", 24, 131072, {}),
    ],
    "edges": [
        ("16bit", 24, None, {}),
        ("4bit", 12, None, {}),
        ("4bit", 16, None, {}),
        ("4bit", 24, None, {}),
        ("8bit", 16, None, {}),
        ("8bit", 24, None, {}),
    ],
    "offloaded": [("host", 12, 32768, {}), ("4bit", 12, 131072, OFFLOADED)],
    "training": [("4bit", 24, 4096, {}), ("4bit", 24, 16384, {})],
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--forecast", action="store_true", help="the table, without a GPU")
    parser.add_argument("--weights", nargs="+", default=[*WEIGHTS, HOST], choices=[*WEIGHTS, HOST])
    parser.add_argument("--rows", nargs="+", default=["lengths", "edges"], choices=[*ROWS])
    parser.add_argument("--seconds", type=float, default=220)
    args = parser.parse_args()
    if args.forecast:
        print_forecast(make_config(CLASSES["ours"][0]))
    else:
        measure(args)


def print_forecast(config):
    print(f"{'card':>5s} {'weights':>8s} {'GiB':>6s} {'tokens':>9s} {'at 2 fps':>9s} {'at 1':>6s}")
    for card in CARDS:
        for weights in WEIGHTS:
            tokens = longest(config, weights, card)
            size = forecast_row(config, weights, card, 1024).weights
            pairs = tokens / FRAMES / 60  # minutes at 2 frames a second
            line = f"{card:5d} {weights:>8s} {size:6.1f} {tokens:9,d}"
            print(f"{line} {pairs:7.0f} m {2 * pairs:4.0f} m")


def forecast_row(config, weights, card, tokens, new_tokens=9):
    return forecast(
        config,
        tokens + QUESTION,
        vision_tokens=tokens,
        new_tokens=new_tokens,
        quantization=None if weights == "16bit" else bits_of(weights),
        available=int((card - TAKEN) * GIB),
    )


def longest(config, weights, card):
    """The most vision tokens that fit, in thousands."""
    seen = forecast_row(config, weights, card, 2**22)
    return max(seen.fitting_vision_tokens, 0) // 1024 * 1024


def measure(args):
    start = time.perf_counter()
    torch.cuda.init()
    total = torch.cuda.mem_get_info()[1]
    name, versions = torch.cuda.get_device_name(), (torch.__version__, transformers.__version__)
    print(f"{name}, torch {versions[0]}, transformers {versions[1]}", flush=True)
    print(
        f"{'weights':>8s} {'card':>5s} {'tokens':>8s} {'prefill s':>10s} {'ms/token':>9s} "
        f"{'GiB':>6s} {'reserved':>9s} {'forecast':>9s}"
    )
    model, loaded = None, None
    for group, weights, card, tokens, options in rows_of(args):
        if time.perf_counter() - start > args.seconds:
            print("the other rows are left out: --seconds are over")
            break
        if weights != loaded:
            del model
            gc.collect()
            torch.cuda.set_per_process_memory_fraction(1.0)
            model, loaded = make_loaded(weights), weights
            if group != "training":
                token_times(model, make_inputs(model, 4096), 4)  # compiles
            if group != "training" and weights != HOST:
                token_times(model, make_inputs(model, 20480), 4)
        tokens = tokens or longest(model.config, weights, card)
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(min(1.0, (card - TAKEN) * GIB / total))
        measure_one = measure_training if group == "training" else measure_row
        line = measure_one(model, weights, card, tokens, options)
        print(f"{weights:>8s} {card:5d} {tokens:8d}{line}", *options.values(), flush=True)
    print(f"{time.perf_counter() - start:.0f} s in all")


def rows_of(args):
    """(group, weights, card, tokens, options) of the rows that were asked for.

    Those of the same weights follow each other, training last, because it changes the model.
    """
    rows = [(group, *row) for group in args.rows for row in ROWS[group] if row[0] in args.weights]
    order = [*WEIGHTS, HOST]
    return sorted(rows, key=lambda row: (order.index(row[1]), row[0] == "training"))


def measure_row(model, weights, card, tokens, options):
    foreseen = float("nan")
    if weights != HOST and not options:
        foreseen = forecast_row(model.config, weights, card, tokens).peak
    slow = weights == HOST or bool(options)  # seconds a token
    again = not slow and (tokens <= 32768 or card == 80)
    torch.cuda.reset_peak_memory_stats()
    try:
        inputs = make_inputs(model, tokens, made=True)
        for _ in range(2 if again else 1):
            times = token_times(model, inputs, 3 if slow else 9, **options)
    except torch.OutOfMemoryError as error:
        return f" out of memory: {str(error)[:70]} {peaks()} {foreseen:9.1f}"
    each = (times[-1] - times[0]) / (len(times) - 1) * 1e3
    return f" {times[0]:10.2f} {each:9.1f} {peaks()} {foreseen:9.1f}"


def measure_training(model, weights, card, tokens, options):
    """Seconds of a training step after a first one, and the peak of both."""
    torch.cuda.reset_peak_memory_stats()
    try:
        step = make_training_step(model, tokens)
        for _ in range(2):
            torch.cuda.synchronize()
            start = time.perf_counter()
            loss = step()
            torch.cuda.synchronize()
            seconds = time.perf_counter() - start
    except torch.OutOfMemoryError as error:
        return f" a step of training, out of memory: {str(error)[:70]} {peaks()}"
    return f" {seconds:10.2f} {'':9s} {peaks()} a step of training, loss {loss:.3f}"


def make_training_step(model, tokens):
    """A function that does one step of examples/recipes/qlora.yaml and returns its loss."""
    if not hasattr(model, "trained"):
        asked = {"parts": ["llm", "gates"], "lora_r": 16, "lora_alpha": 32, "lora_dropout": 0.0}
        asked |= {"lora_modules": None, "model_revision": None, "model_name_or_path": "made"}
        adapted = choose_trained(
            model, SimpleNamespace(**asked), SimpleNamespace(deepspeed=None)
        ).train()
        adapted.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})
        trained = [weight for weight in adapted.parameters() if weight.requires_grad]
        model.trained = adapted, torch.optim.AdamW(trained, lr=1e-5)
    adapted, optimizer = model.trained
    inputs = make_inputs(model, tokens)
    inputs |= make_labels(inputs)

    def step():
        with torch.autocast(inputs["input_ids"].device.type, torch.bfloat16):
            loss = adapted(**inputs).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def peaks():
    """GiB at the peak, as they were allocated and reserved."""
    seen = torch.cuda.max_memory_allocated() / GIB, torch.cuda.max_memory_reserved() / GIB
    return f"{seen[0]:6.1f} {seen[1]:9.1f}"


def make_loaded(weights):
    model = make_model(*CLASSES["ours"])
    if weights == HOST:
        return put_layers_in_host(model)
    if weights != "16bit":
        quantization_config(weights)  # says what is missing, and quiets the library
        quantise(model, weights)
    return model


def put_layers_in_host(model):
    """As `from_pretrained` does with a device_map that has "cpu" for the layers."""
    places = {name: 0 for name, _ in model.model.language_model.named_children()}
    places = {f"model.language_model.{name}": 0 for name in places if name != "layers"}
    count = len(model.model.language_model.layers.to("cpu"))  # or dispatch_model keeps both
    places |= {f"model.language_model.layers.{index}": "cpu" for index in range(count)}
    return dispatch_model(model, {"model.visual": 0, "lm_head": 0, **places}, main_device=0)


def quantise(model, weights):
    """Replace its layers one after the other, where they are, by bitsandbytes' of 4 or 8 bits.

    The model then says of itself what `from_pretrained` would have it say.
    """
    import bitsandbytes

    model.is_quantized, model.is_loaded_in_4bit = True, weights == "4bit"

    kept = re.compile("|".join(model._keep_in_fp32_modules))
    for name, layer in list(model.named_modules()):
        if type(layer) is not torch.nn.Linear or kept.match(name):
            continue
        shape = layer.in_features, layer.out_features, layer.bias is not None
        with torch.device("meta"):
            if weights == "4bit":
                made = bitsandbytes.nn.Linear4bit(
                    *shape, torch.bfloat16, compress_statistics=True, quant_type="nf4"
                )
            else:
                made = bitsandbytes.nn.Linear8bitLt(*shape, has_fp16_weights=False, threshold=6.0)
        if weights == "4bit":
            options = {"compress_statistics": True, "quant_type": "nf4", "module": made}
            weight = bitsandbytes.nn.Params4bit(layer.weight.data, False, **options)
        else:
            weight = bitsandbytes.nn.Int8Params(layer.weight.data.cpu(), False)
        made.weight, made.bias = weight.to(layer.weight.device), layer.bias
        model.set_submodule(name, made.eval())


if __name__ == "__main__":
    main()
