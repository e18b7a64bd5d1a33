"""Evaluate VideoNSA on questions of one's own or on the benchmarks of lmms-eval, with a record.

    python evaluation.py --model out/tuned --data mine.jsonl
    python evaluation.py --model . --tasks clips
    python evaluation.py --model VideoNSA-7B --tasks mlvu_test,videomme --preset mlvu
    accelerate launch --num_processes 8 evaluation.py --model VideoNSA-7B --tasks timescope \\
        --preset timescope --attention dense
    torchrun --nproc_per_node 2 evaluation.py --model VideoNSA-7B --data long.jsonl \\
        --sequence_parallel_size 2
    python evaluation.py --compare out/evaluation

--data takes the rows that finetune.py takes (docs/training.md), asks their questions and scores
exact match and, where options are listed, multiple choice. --tasks are lmms-eval's, with its own
prompts and scores, and need requirements-eval.txt in an environment of its own; every option that
is not listed below goes to it (--seed, ...). What is taken of a video comes from --preset, or from
--model_args: fps, num_frames, max_frames, min_pixels, max_pixels, total_pixels, max_tokens, as
README.md describes them. Other model_args: dtype, device_map, attn_implementation.

Beside each score a manifest says what was evaluated on what, how, and how many vision tokens went
through the sparse attention. Any other number than --attention asks for ends the run without a
score. Answers are kept one by one under OUTPUT_PATH/answers: the same command goes on where a
killed one was; an answer is taken again only if nothing that could change it has changed.
"""

import argparse
import ast
import sys
from pathlib import Path

from commands import ROOT, processes
from commands.evaluation_manifest import compare
from commands.evaluation_model import EvaluatedModel
from commands.evaluation_presets import ALIASES, PRESETS, Preset
from commands.evaluation_rows import evaluate_rows, read_questions
from commands.quantized_loading import HELP, LOAD_IN
from nsa_rules import BRANCHES


def parse_arguments(argv):
    """(our options, lmms-eval's arguments)"""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="For the options of --tasks: lmms-eval eval --help",
        allow_abbrev=False,
    )
    parser.add_argument("--model", metavar="DIR|ID", help="checkpoint, or an adapter")
    parser.add_argument("--revision", help="of a checkpoint on the Hub")
    parser.add_argument(
        "--data",
        nargs="+",
        metavar="SET",
        help="rows as for training: mine.jsonl%%50",
    )
    parser.add_argument("--data_root", metavar="DIR", help="where paths of --data's media start")
    parser.add_argument("--tasks", metavar="NAME,...", help="tasks of lmms-eval")
    parser.add_argument("--limit", metavar="N", help="questions of each, at most")
    parser.add_argument("--batch_size", default="1", metavar="N", help="questions at a time")
    parser.add_argument(
        "--sequence_parallel_size",
        type=int,
        default=1,
        metavar="N",
        help="processes that share out each question of --data, of those torchrun started",
    )
    parser.add_argument("--preset", choices=sorted(PRESETS), help="frames, pixels and new tokens")
    parser.add_argument("--attention", choices=("sparse", "dense"), default="sparse")
    parser.add_argument(
        "--branches",
        default=",".join(BRANCHES),
        help="branches whose gates stay open (default: all), comma-separated",
    )
    parser.add_argument("--blocks", type=int, metavar="N", help="selected blocks of a query")
    parser.add_argument("--window", type=int, metavar="N", help="keys in the sliding window")
    parser.add_argument(
        "--semantics", choices=("paper", "released"), help="other than the checkpoint's own"
    )
    parser.add_argument("--load_in", choices=LOAD_IN, help=HELP)
    parser.add_argument("--model_args", default="", metavar="NAME=VALUE,...")
    parser.add_argument("--gen_kwargs", default="", metavar="NAME=VALUE,...")
    parser.add_argument("--include_path", default=str(ROOT / "benchmarks" / "clips"))
    parser.add_argument("--output_path", default="out/evaluation", metavar="DIR")
    parser.add_argument("--compare", nargs="+", metavar="PATH", help="print a table of manifests")
    options, others = parser.parse_known_args(argv)
    if options.compare is not None:
        return options, others
    if options.model is None:
        parser.error("give --model, or --compare")
    if (options.data is None) == (options.tasks is None):
        parser.error("give --data with questions of your own, or --tasks of lmms-eval")
    if options.data is not None and others:
        parser.error(f"{' '.join(others)}: --data knows no such option, only --tasks may")
    if options.data is None and options.sequence_parallel_size != 1:
        parser.error("--sequence_parallel_size is of --data; lmms-eval deals its questions itself")
    if options.data is None and options.data_root is not None:
        parser.error("--data_root is of --data; --tasks know where their media are")
    for name in ("limit", "batch_size") if options.data else ():
        value = getattr(options, name)
        if value is not None and not (value.isdecimal() and int(value)):
            parser.error(f"--{name} is {value!r}; with --data it is a whole number from 1")
    for name in ("model_args", "gen_kwargs"):
        pairs = getattr(options, name)
        if not all("=" in pair for pair in filter(None, pairs.split(","))):
            parser.error(f"--{name} is {pairs!r}; give name=value, comma-separated")
    if any(argument.split("=")[0] in ("--use_cache", "-c") for argument in others):
        parser.error(
            "--use_cache gives old answers of other weights; evaluation.py keeps answers itself"
        )
    return options, others


def read_settings(options):
    """(arguments of `EvaluatedModel`, of `generate`, record of the preset for the manifest)."""
    preset = PRESETS[options.preset] if options.preset else Preset({})
    settings = {**preset.ours, **preset.released, **preset.paper}
    new_tokens = settings.pop("max_new_tokens", None)
    yours = read_pairs(options.model_args)
    yours = {ALIASES.get(name, name): value for name, value in yours.items()}
    if "fps" in yours or "max_frames" in yours:  # a rate and a number of frames exclude each other
        settings.pop("num_frames", None)
    if "num_frames" in yours:
        settings.pop("fps", None)
    model_args = {
        "pretrained": options.model,
        "revision": options.revision,
        "attention": options.attention,
        "branches": options.branches.replace(",", "+"),
        "blocks": options.blocks,
        "window": options.window,
        "semantics": options.semantics,
        "load_in": options.load_in,
        **settings,
        **yours,
    }
    model_args = {name: value for name, value in model_args.items() if value is not None}
    generation = {"max_new_tokens": new_tokens} if new_tokens else {}
    generation |= read_pairs(options.gen_kwargs)
    record = {
        "name": options.preset,
        "paper": preset.paper,
        "released": preset.released,
        "ours": preset.ours,
        "yours": yours,
    }
    return model_args, generation, record if options.preset or yours else None


def read_pairs(text):
    """{name: value} of "name=value,...", values as they are written."""
    return dict(pair.split("=", 1) for pair in filter(None, text.split(",")))


def harness_arguments(options, others):
    """lmms-eval's arguments, and the record of the preset for the manifest."""
    model_args, generation, record = read_settings(options)
    limit = ["--limit", options.limit] if options.limit else []
    arguments = [
        *("--model", "videonsa"),
        *("--model_args", ",".join(f"{k}={v}" for k, v in model_args.items())),
        *("--gen_kwargs", ",".join(f"{k}={v}" for k, v in generation.items())),
        *("--include_path", options.include_path),
        *("--output_path", options.output_path),
        *("--tasks", options.tasks),
        *("--batch_size", options.batch_size),
        "--log_samples",
        *others,
        *limit,
    ]
    return arguments, record


def ask_rows(options, argv):
    """Evaluates --data, prints the scores; returns the exit code."""
    model_args, generation, preset = read_settings(options)
    settings = {name: read_value(value) for name, value in model_args.items()}
    run = {
        "command": argv,
        "preset": preset,
        "generation": {name: read_value(value) for name, value in generation.items()},
    }
    limit = int(options.limit) if options.limit else None
    try:
        EvaluatedModel.folder = Path(options.output_path) / "answers"
        for name in options.data:  # what cannot be read is known before the model is loaded
            read_questions(name, options.data_root)
        settings |= {"sequence_parallel_size": options.sequence_parallel_size}
        model = EvaluatedModel(**settings | {"batch_size": int(options.batch_size)})
        results = evaluate_rows(
            model, options.data, options.output_path, run, options.data_root, limit
        )
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        print(f"evaluation.py: {error}", file=sys.stderr)
        return 1
    processes.leave()
    for name, scores, path in results:
        print(f"{name}: " + ", ".join(f"{metric} {score:.1%}" for metric, score in scores.items()))
        print(f"  answers and settings: {path}")
    return 0


def read_value(text):
    """A number, boolean or None of its text; other text as it is."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def run_tasks(options, others, argv):
    """Evaluates --tasks through lmms-eval; returns the exit code."""
    try:
        from commands import evaluation_harness
    except ImportError as error:
        print(
            f"evaluation.py: --tasks needs lmms-eval, and {error.name} is not installed. In an "
            "environment of its own (lmms-eval wants av < 16): "
            "pip install -r requirements-eval.txt -c constraints-eval.txt",
            file=sys.stderr,
        )
        return 1
    arguments, preset = harness_arguments(options, others)
    errors = evaluation_harness.run(arguments, Path(options.output_path), argv, preset)
    for error in errors:
        print(f"evaluation.py: {error}", file=sys.stderr)
    return 1 if errors else 0


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    options, others = parse_arguments(argv)
    if options.compare is not None:
        print(compare(options.compare))
        return 0
    if options.data is not None:
        return ask_rows(options, argv)
    return run_tasks(options, others, argv)


if __name__ == "__main__":
    sys.exit(main())
