"""Answers about videos over HTTP, in OpenAI's form: one model, one request at a time, no engine.

    pip install -r requirements-demo.txt -c constraints-demo.txt
    python serve.py --model VideoNSA-7B

docs/serving_one_gpu.md has requests, limits and what this is not.
"""

import argparse
import sys
from pathlib import Path

from transformers import AutoProcessor
from transformers.utils import logging

from commands.ending import CANNOT_START, end
from commands.model_loading import prepare_model
from commands.quantized_loading import HELP, LOAD_IN

ROOT = Path(__file__).resolve().parent


def parse_arguments(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=str(ROOT), metavar="DIR|ID")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, or auto for all GPUs")
    parser.add_argument("--load-in", "--load_in", choices=LOAD_IN, help=HELP)
    parser.add_argument(
        "--allowed-local-media-path",
        metavar="FOLDER",
        help="requests may name files below it, as file:// addresses; by default none",
    )
    parser.add_argument("--host", default="127.0.0.1", help="default: %(default)s")
    parser.add_argument("--port", type=int, default=8000, help="default: %(default)s")
    return parser.parse_args(argv)


def make_server(options):
    """The `Server` with its model loaded. Raises ValueError for options that cannot be used."""
    from commands.serve_answers import Answerer
    from commands.serve_http import Server

    folder = options.allowed_local_media_path
    if folder is not None and not Path(folder).is_dir():
        raise ValueError(f"--allowed-local-media-path {folder} is no folder")
    prepared = prepare_model(options.model, options.device, load_in=options.load_in)
    processor = AutoProcessor.from_pretrained(options.model, trust_remote_code=True)
    path = Path(options.model)
    name = path.resolve().name if path.is_dir() else options.model
    print(f"{name} {prepared.describe()}", flush=True)
    answerer = Answerer(prepared, processor, folder, lambda line: print(line, flush=True))
    return Server(answerer, name, options.host)


def main():
    options = parse_arguments()
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    try:
        import uvicorn

        server = make_server(options)
    except CANNOT_START as error:
        end("serve.py", error)
    uvicorn.run(server, host=options.host, port=options.port, timeout_graceful_shutdown=5)


if __name__ == "__main__":
    main()
