"""Evaluate VideoNSA on the benchmarks of lmms-eval, and keep a record of exactly what ran.

    python evaluation.py --model . --tasks clips
    python evaluation.py --model VideoNSA-7B --tasks mlvu_test,videomme --preset mlvu
    accelerate launch --num_processes 8 evaluation.py --model VideoNSA-7B --tasks timescope \\
        --preset timescope --attention dense
    python evaluation.py --compare out/evaluation

Tasks, prompts and scores are lmms-eval's own; every option that is not listed below goes to it
(--limit, --batch_size, --gen_kwargs, --seed, ...). What is taken of a video comes from --preset, or
from --model_args: fps, num_frames, max_frames, min_pixels, max_pixels, total_pixels, max_tokens, as
README.md describes them. Other model_args: dtype, device_map, attn_implementation.

Beside each score a manifest says what was evaluated on what, how, and how many vision tokens went
through the sparse attention. Any other number than --attention asks for ends the run without a
score. Answers are kept one by one under OUTPUT_PATH/answers: the same command goes on where a
killed one was; an answer is taken again only if nothing that could change it has changed.
"""

import argparse
import sys
from pathlib import Path

from commands import ROOT
from commands.evaluation_manifest import compare, write_manifests
from commands.evaluation_presets import ALIASES, PRESETS, Preset
from nsa_rules import BRANCHES

try:
    import lmms_eval.__main__ as harness
    from lmms_eval.models import MODEL_REGISTRY_V2
    from lmms_eval.models.registry_v2 import ModelManifest
    from loguru import logger

    from commands.evaluation_model import VideoNSA
except ImportError as error:
    raise ImportError(
        f"evaluation.py needs lmms-eval, and {error.name} is not installed. In an environment of "
        "its own (lmms-eval wants av < 16): "
        "pip install -r requirements-eval.txt -c constraints-eval.txt"
    ) from error


def parse_arguments(argv):
    """(our options, lmms-eval's arguments)"""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="For lmms-eval's options: lmms-eval eval --help",
        allow_abbrev=False,
    )
    parser.add_argument("--model", metavar="DIR|ID", help="checkpoint")
    parser.add_argument("--revision", help="of a checkpoint on the Hub")
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
    parser.add_argument("--model_args", default="", metavar="NAME=VALUE,...")
    parser.add_argument("--gen_kwargs", default="", metavar="NAME=VALUE,...")
    parser.add_argument("--include_path", default=str(ROOT / "benchmarks" / "clips"))
    parser.add_argument("--output_path", default="out/evaluation", metavar="DIR")
    parser.add_argument("--compare", nargs="+", metavar="PATH", help="print a table of manifests")
    options, others = parser.parse_known_args(argv)
    if options.compare is None and options.model is None:
        parser.error("give --model, or --compare")
    for name in ("model_args", "gen_kwargs"):
        pairs = getattr(options, name)
        if not all("=" in pair for pair in filter(None, pairs.split(","))):
            parser.error(f"--{name} is {pairs!r}; give name=value, comma-separated")
    if any(argument.split("=")[0] in ("--use_cache", "-c") for argument in others):
        parser.error(
            "--use_cache gives old answers of other weights; evaluation.py keeps answers itself"
        )
    return options, others


def harness_arguments(options, others):
    """lmms-eval's arguments, and the record of the preset for the manifest."""
    preset = PRESETS[options.preset] if options.preset else Preset({})
    settings = {**preset.ours, **preset.released, **preset.paper}
    new_tokens = settings.pop("max_new_tokens", None)
    yours = dict(pair.split("=", 1) for pair in filter(None, options.model_args.split(",")))
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
        **settings,
        **yours,
    }
    generation = f"max_new_tokens={new_tokens}" if new_tokens else ""
    arguments = [
        *("--model", "videonsa"),
        *("--model_args", ",".join(f"{k}={v}" for k, v in model_args.items() if v is not None)),
        *("--gen_kwargs", ",".join(filter(None, (generation, options.gen_kwargs)))),
        *("--include_path", options.include_path),
        *("--output_path", options.output_path),
        "--log_samples",
        *others,
    ]
    record = {
        "name": options.preset,
        "paper": preset.paper,
        "released": preset.released,
        "ours": preset.ours,
        "yours": yours,
    }
    return arguments, record if options.preset or yours else None


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    options, others = parse_arguments(argv)
    if options.compare is not None:
        print(compare(options.compare))
        return 0
    arguments, preset_record = harness_arguments(options, others)
    MODEL_REGISTRY_V2.register_manifest(
        ModelManifest("videonsa", chat_class_path=f"{VideoNSA.__module__}.VideoNSA"), overwrite=True
    )
    VideoNSA.folder = Path(options.output_path) / "answers"
    errors, stock = [], harness.cli_evaluate_single

    def evaluate(args):
        try:
            results, samples = stock(args)
            if results is not None:  # on the first process
                args.command, args.preset_record = argv, preset_record
                for path in write_manifests(VideoNSA.loaded, args, results, samples):
                    logger.info(f"Manifest: {path}")
        except Exception as error:  # lmms-eval only logs it
            errors.append(error)
            raise
        return results, samples

    given, sys.argv = sys.argv, ["lmms-eval", *arguments]
    harness.cli_evaluate_single = evaluate
    try:
        harness.cli_evaluate()
    finally:
        harness.cli_evaluate_single, sys.argv = stock, given
    for error in errors:
        print(f"evaluation.py: {error}", file=sys.stderr)
    return 1 if errors else 0


if __name__ == "__main__":
    sys.exit(main())
