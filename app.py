"""A web page that answers questions about videos and shows where the model looks.

    pip install -r requirements-demo.txt -c constraints-demo.txt
    python app.py
    python app.py --model VideoNSA-7B

Works on a CPU, on a GPU, and as a Space of the Hub, ZeroGPU too (docs/demo.md). Uploads go to a
temporary folder, which is emptied as time goes by and removed at the end.
"""

try:
    import spaces  # of ZeroGPU; before torch, whose use of CUDA it puts off
except ImportError:
    spaces = None

import argparse
import os
import signal
import sys
import tempfile
from pathlib import Path

from commands.ending import CANNOT_START, end

ROOT = Path(__file__).resolve().parent


def parse_arguments(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model",
        default=os.environ.get("VIDEONSA_MODEL", str(ROOT)),
        metavar="DIR|ID",
        help="a checkpoint; by default $VIDEONSA_MODEL, else the one beside this file",
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:1, or auto for all GPUs")
    parser.add_argument(
        "--max-tokens", type=int, metavar="N", help="of a video, at most; by default what fits"
    )
    parser.add_argument("--port", type=int, help="by default the first free one from 7860 on")
    return parser.parse_args(argv)


def make_page(options, uploads):
    """The page, its model loaded; uploads: a folder for what visitors send."""
    os.environ["GRADIO_TEMP_DIR"] = os.environ["GRADIO_EXAMPLES_CACHE"] = str(uploads)
    from transformers import AutoProcessor  # after the folder is known to Gradio

    from commands.app_answers import Answerer
    from commands.app_examples import EXAMPLES, load
    from commands.app_page import Page
    from commands.model_loading import prepare_model

    prepared = prepare_model(options.model, options.device)
    processor = AutoProcessor.from_pretrained(options.model, trust_remote_code=True)
    on_gpu = None if spaces is None else spaces.GPU
    answerer = Answerer(prepared, processor, options.max_tokens, on_gpu)
    is_toy = Path(options.model).resolve() == ROOT
    examples = [(one, load(one, processor)) for one in EXAMPLES] if is_toy else []
    return Page(answerer, examples)


def launch(page, options, **settings):
    """Starts the server; settings: what else Gradio's `launch` takes."""
    from commands.app_page import SESSIONS, UPLOAD_MB

    folder = ROOT / "commands"
    return page.blocks.launch(
        server_port=options.port,
        allowed_paths=[str(one.clip) for one, _ in page.examples],
        max_file_size=f"{UPLOAD_MB}mb",
        state_session_capacity=SESSIONS,
        css_paths=folder / "app_page.css",
        js=(folder / "app_page.js").read_text(encoding="utf-8"),
        footer_links=[],
        ssr_mode=False,
        enable_monitoring=False,
        **settings,
    )


def main():
    options = parse_arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())  # so that the folder is removed
    try:
        with tempfile.TemporaryDirectory(prefix="videonsa-") as uploads:
            launch(make_page(options, uploads), options)
    except CANNOT_START as error:
        end("app.py", error)


if __name__ == "__main__":
    main()
