"""The options that ask.py and visualize.py share: which model runs, and what is taken of videos."""

from pathlib import Path

from commands.quantized_loading import HELP, LOAD_IN

ROOT = Path(__file__).resolve().parents[1]


def add_options(parser) -> None:
    """Adds them to a parser, in two groups."""
    group = parser.add_argument_group("model")
    group.add_argument("--model", default=str(ROOT), metavar="DIR|ID")
    group.add_argument("--device", help="cpu, cuda, cuda:1, or auto for all GPUs")
    group.add_argument("--backend", help="auto, triton or reference")
    group.add_argument(
        "--attention", choices=("sparse", "dense"), help="of vision tokens (default: the model's)"
    )
    group.add_argument("--load-in", "--load_in", choices=LOAD_IN, help=HELP)
    group.add_argument("--max-new-tokens", type=int, metavar="N")

    group = parser.add_argument_group("what is taken of the videos")
    group.add_argument("--fps", type=float, metavar="F", help="frames per second")
    group.add_argument("--max-frames", type=int, metavar="N", help="of each video")
    group.add_argument("--max-pixels", type=int, metavar="N", help="of each frame")
    group.add_argument("--max-tokens", type=int, metavar="N", help="of all videos and images")
    group.add_argument(
        "--video-readers", type=int, metavar="N", help="threads that read a video, at most"
    )
    group.add_argument("--video-decoder", metavar="cpu|cuda", help="what decodes videos")


def model_options(options) -> dict:
    """What they say of the model, as `prepare_model` takes it."""
    names = ("device", "backend", "attention", "load_in")
    return {name: getattr(options, name) for name in names}


def conversation_options(options) -> dict:
    """What they say of videos and answers, as a `Conversation` takes it."""
    names = ("fps", "max_frames", "max_pixels", "video_readers", "video_decoder")
    settings = {name: getattr(options, name) for name in names}
    lengths = {name: getattr(options, name) for name in ("max_tokens", "max_new_tokens")}
    return {"settings": settings, **lengths}
