"""Times what recording a prompt's attention costs: 7B's size, random weights, bfloat16, one GPU.

    python benchmarks/visualize.py
    python benchmarks/visualize.py --sizes 32768 --sinks

The prompts are those of prefill.py. "prefill" is the time that `generate` takes to its first token,
"recorded" the same within an `AttentionWatch` of gates, selections and the question's rows, in turn
with it; "record" is what its `record()` takes after that, and the file's size as it is saved. The
last column is the time with attention sinks, of one run. Seconds are medians after a warm-up; GiB
are the GPU's peak, and the most that the process ever had of the host's memory, up to that line.
"""

import argparse
import resource
import statistics
import tempfile
import time
from pathlib import Path

import torch
import transformers
from prefill import CLASSES, make_inputs, make_model, token_times

from commands.attention_layout import locate_vision
from commands.attention_watch import AttentionWatch


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[32768, 131072])
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--sinks", action="store_true")
    args = parser.parse_args()
    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, transformers "
        f"{transformers.__version__}"
    )
    model = make_model(*CLASSES["ours"])
    print(
        f"{'tokens':>8s} {'prefill s':>10s} {'recorded s':>11s} {'more %':>7s} {'record s':>9s} "
        f"{'MiB':>6s} {'GiB':>6s} {'GiB rec.':>9s} {'host GiB':>9s} {'sinks s':>8s}",
        flush=True,
    )
    run(model, make_inputs(model, 4096), watch=True)  # compiles
    for tokens in args.sizes:
        print(f"{tokens:8d} {measure(model, make_inputs(model, tokens), args)}", flush=True)


def measure(model, inputs, args):
    """The line of one prompt."""
    run(model, inputs, watch=True)
    times, peaks = {False: [], True: []}, {}
    for _ in range(args.repeats):
        for watch in (False, True):
            torch.cuda.reset_peak_memory_stats()
            seconds, watched = run(model, inputs, watch)
            times[watch].append(seconds)
            peaks[watch] = torch.cuda.max_memory_allocated() / 2**30
    start = time.perf_counter()
    record = watched.record()
    taken = time.perf_counter() - start
    with tempfile.TemporaryDirectory() as folder:
        record.save(folder)
        size = Path(folder, "attention.npz").stat().st_size / 2**20
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts in KiB
    plain, recorded = (statistics.median(times[watch]) for watch in (False, True))
    line = (
        f"{plain:10.2f} {recorded:11.2f} {100 * (recorded / plain - 1):7.1f} {taken:9.2f} "
        f"{size:6.1f} {peaks[False]:6.1f} {peaks[True]:9.1f} {host:9.2f}"
    )
    if args.sinks:
        line += f" {run(model, inputs, watch=True, sinks=True)[0]:8.2f}"
    return line


def run(model, inputs, watch, sinks=False):
    """(seconds to the first token, the watch or None)"""
    if not watch:
        return token_times(model, inputs, 1)[0], None
    with AttentionWatch(model, locate_vision(model.config, inputs), sinks) as watched:
        seconds = token_times(model, inputs, 1)[0]
    return seconds, watched


if __name__ == "__main__":
    main()
