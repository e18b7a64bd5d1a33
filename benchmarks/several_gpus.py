"""Times one prompt, and one training step, shared out over GPUs, beside one of them alone.

    torchrun --nproc_per_node 2 benchmarks/several_gpus.py
    torchrun --nproc_per_node 2 benchmarks/several_gpus.py --sizes 131072 --train_sizes 131072

7B's size, random weights, bfloat16, every GPU with all of the model. Prompts and columns are those
of benchmarks/prefill.py: prefill until the first token; a training step with LoRA and gates, layers
checkpointed, a frozen tower, and gradients averaged over the GPUs. Before each row, a few layers
run at its size, which compiles. Seconds are medians, above 128K of one run; GiB are the first
GPU's peak. Above 128K, training is timed over all GPUs only; "-" stands where one GPU has not
enough memory. Behind a prefill: how far its logits are from those of one GPU, relative to the
largest; as a measure of that, the same of one GPU in chunks of 8K.
"""

import argparse
import contextlib
import datetime
import gc
import os
import time

import torch
import torch.distributed as dist
import transformers
from prefill import CLASSES, add_adapters, make_inputs, make_labels, make_model

from commands.processes import turn_off_multicast


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="*", default=[36864, 131072, 262144])
    parser.add_argument("--train_sizes", type=int, nargs="*", default=[36864, 131072])
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    turn_off_multicast()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    timeout = datetime.timedelta(minutes=5)
    dist.init_process_group("nccl", timeout=timeout, device_id=device)
    say(
        f"{dist.get_world_size()} x {torch.cuda.get_device_name()}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}"
    )
    model = make_model(*CLASSES["ours"])
    say(f"{'':8s} {'tokens':>8s} {'GPUs':>5s} {'s':>7s} {'GiB':>6s} {'logits apart':>13s}")
    for tokens in args.sizes:
        compare_prefill(model, tokens, args.repeats if tokens <= 131072 else 1)
    trained = add_adapters(model)
    for tokens in args.train_sizes:
        compare_training(model, trained, tokens, args.repeats if tokens <= 131072 else 1)
    dist.destroy_process_group()


def say(line):
    if dist.get_rank() == 0:
        print(line, flush=True)


def report(what, tokens, group, seconds, gib, rest=""):
    say(f"{what:8s} {tokens:8d} {group.size() if group else 1:5d} {seconds:7.2f} {gib:6.1f} {rest}")


def share(model, group):
    """Share out over a group from here on, or over none."""
    inner = model.get_base_model().model if hasattr(model, "get_base_model") else model.model
    inner.language_model.nsa_group = inner.visual.nsa_group = group


@contextlib.contextmanager
def few_layers(model):
    """One layer of the language model and eight of the tower, which compile as much as all do."""
    inner, tower = model.model.language_model, model.model.visual
    layers, blocks = inner.layers, tower.blocks
    inner.layers, tower.blocks = layers[:1], blocks[:8]
    try:
        yield
    finally:
        inner.layers, tower.blocks = layers, blocks


def alone_and_shared(alone=True):
    """Yields None, while the first process alone has work to do, then the group of all."""
    if alone and dist.get_rank() == 0:
        yield None
    dist.barrier()
    yield dist.group.WORLD


def same_inputs(model, tokens):
    torch.manual_seed(0)
    return make_inputs(model, tokens)


def prefill(model, inputs, group, **options):
    """(seconds to the first token, the logits [vocabulary] that it was chosen by)."""
    share(model, group)
    if group is not None:
        dist.barrier()
    start = time.perf_counter()
    output = model.generate(
        **inputs,
        max_new_tokens=1,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        **options,
    )
    logits = output.logits[0][0].float()
    torch.cuda.synchronize()
    return time.perf_counter() - start, logits


def compare_prefill(model, tokens, repeats):
    wanted = None
    for group in alone_and_shared():
        inputs, rest = same_inputs(model, tokens), ""
        try:
            if group is None and tokens <= 131072:
                chunked = prefill(model, inputs, None, prefill_chunk_size=8192)[1]
            with few_layers(model):
                prefill(model, inputs, group)
            torch.cuda.reset_peak_memory_stats()
            runs = [prefill(model, inputs, group) for _ in range(repeats)]
        except torch.OutOfMemoryError:
            if group is not None:
                raise
            say(f"prefill  {tokens:8d}     1       -")
            continue
        if group is None:
            wanted = runs[0][1]
            rest = f"{apart(chunked, wanted):13.4f} in chunks of 8K" if tokens <= 131072 else ""
        elif wanted is not None:
            rest = f"{apart(runs[0][1], wanted):13.4f}"
        gib = torch.cuda.max_memory_allocated() / 2**30
        seconds = sorted(time for time, _ in runs)[repeats // 2]
        report("prefill", tokens, group, seconds, gib, rest)
        del inputs, runs
        empty()


def apart(logits, wanted):
    return ((logits - wanted).abs().max() / wanted.abs().max()).item()


def compare_training(model, trained, tokens, repeats):
    for group in alone_and_shared(alone=tokens <= 131072):
        share(model, group)
        call = same_inputs(model, tokens)
        call |= make_labels(call)
        try:
            with few_layers(model):
                step(trained, call, group)
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            seconds = sorted(timed_step(trained, call, group) for _ in range(repeats))
            gib = torch.cuda.max_memory_allocated() / 2**30
            report("training", tokens, group, seconds[repeats // 2], gib)
        except torch.OutOfMemoryError:
            if group is not None:
                raise
            say(f"training {tokens:8d}     1       -")
        trained.zero_grad(set_to_none=True)
        del call
        empty()


def timed_step(model, call, group):
    """Seconds of a step."""
    if group is not None:
        dist.barrier()
    start = time.perf_counter()
    step(model, call, group)
    torch.cuda.synchronize()
    return time.perf_counter() - start


def step(model, call, group):
    model(**call).loss.backward()
    if group is not None:
        for parameter in model.parameters():
            if parameter.grad is not None:
                dist.all_reduce(parameter.grad, dist.ReduceOp.AVG, group=group)


def empty():
    gc.collect()
    torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
