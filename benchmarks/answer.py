"""Times a question about a long video, from the path of its file to the last token of the answer.

    python benchmarks/answer.py
    python benchmarks/answer.py --minutes 10 --frames 16 --new_tokens 17

The files are made once and kept in the temporary folder: 640 x 360 pixels, h264, 24 frames a
second, a key frame every 240, without B-frames or with three in a row. The frames that are taken
become 252 x 448 pixels, 144 tokens for two. On a GPU the models have 7B's size and random weights
in bfloat16; on a CPU they are the tiny checkpoint and stock Qwen2.5-VL with its weights. Seconds of
each part:

    open      the file is opened, measured and planned (stock: within "read")
    read      frames are decoded, resized and made into patches, the prompt into ids
    copy      the inputs go to the model's device
    encode    the vision tower runs
    prefill   what else `generate` does until the first token is on the host
    decode    from there to the last token

"first token" and the answers of so many tokens count from the path; GiB are the GPU's peak. The
device is waited for at the ends of the parts, but not in "ours, streamed", where all of them up to
the first token overlap. Stock reads as many frames, spread as evenly, through qwen-vl-utils with
torchcodec or else decord, whichever runs here; where neither does, `load_video` of transformers
decodes with PyAV and qwen-vl-utils resizes. Ours are medians after a warm-up, stock is one run
after one on 64 frames.
"""

import argparse
import gc
import importlib
import os
import platform
import statistics
import sys
import time
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import product
from pathlib import Path

import av
import numpy as np
import torch
from PIL import Image
from prefill import CLASSES, make_model, token_times
from transformers import AutoProcessor, Qwen2_5_VLProcessor, Qwen2VLVideoProcessor
from transformers.video_utils import load_video
from video import HEIGHT, RATE, SIZE, WIDTH, make_file, versions

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))
from videonsa import ROOT  # noqa: E402
from videonsa.video_readers_videonsa import usable_cores  # noqa: E402

KEY_GAP = 240
PIECE = 2 * KEY_GAP  # frames that are encoded, which the file repeats
QUESTION = {"type": "text", "text": "What happens in this video?"}
PARTS = ("open", "read", "copy", "encode", "prefill", "decode")
DECODERS = {"torchcodec": "torchcodec.decoders", "decord": "decord"}  # in qwen-vl-utils' order


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=[*CLASSES], choices=[*CLASSES])
    parser.add_argument("--b_frames", type=int, nargs="+", default=[0, 3], help="of each file")
    parser.add_argument("--minutes", type=float, default=120, help="that a file lasts")
    parser.add_argument("--frames", type=int, default=768, help="that are taken of it")
    parser.add_argument("--new_tokens", type=int, nargs="+", default=[17, 500])
    parser.add_argument("--readers", type=int, help="threads that read a file, at most (ours)")
    parser.add_argument("--decoder", help="as the setting video_decoder: cpu or cuda (ours)")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    decoder = stock_decoder()
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    print(f"{card}, {usable_cores()} CPU cores, Python {platform.python_version()}, ", end="")
    packages = ("torch", "triton", "transformers", "av", "qwen-vl-utils", *DECODERS)
    print(f"{versions(packages)}; stock decodes with {decoder or 'load_video and PyAV'}")
    files = {f"{count} B-frames": make_video(args.minutes, count) for count in args.b_frames}
    columns = ["tokens", *PARTS, "first token", *map("{} tokens".format, args.new_tokens), "GiB"]
    print("", line("", "", columns), line("---", "---", ["---"] * len(columns)), sep="\n")
    for name in args.models:
        model, repeats, warm_up = load(name), args.repeats, args.frames
        processor = AutoProcessor.from_pretrained(ROOT, trust_remote_code=True)
        if name == "ours":
            settings = {"video_readers": args.readers, "video_decoder": args.decoder}
            read = partial(read_ours, processor, settings)
            ways = {"ours": read, "ours, streamed": partial(read, stream=True)}
        else:
            ways = {"stock": partial(read_stock, stock_processor(processor), decoder=decoder)}
            repeats, warm_up = 1, min(args.frames, 64)
        ask(model, next(iter(ways.values())), next(iter(files.values())), warm_up, [17])
        for (file, path), (way, read) in product(files.items(), ways.items()):
            runs = [ask(model, read, path, args.frames, args.new_tokens) for _ in range(repeats)]
            print(line(way, file, medians(runs, columns)), flush=True)
        del model
        clean()


def make_video(minutes, b_frames):
    """The path of such a file: blocks of colours that move as a whole."""
    options = {"preset": "medium", "g": str(KEY_GAP), "keyint_min": str(KEY_GAP)}
    options |= {"sc_threshold": "0", "bf": str(b_frames)}
    name = f"{minutes:g}min-{HEIGHT}p-{RATE}fps-{b_frames}b"
    return make_file(name, draw, options, max(1, round(minutes * 60 * RATE / PIECE)))


def draw():
    shape = (HEIGHT // 8, WIDTH // 8, 3)
    blocks = np.random.default_rng(0).integers(0, 255, shape, dtype=np.uint8)
    blocks = blocks.repeat(8, 0).repeat(8, 1)
    for number in range(PIECE):
        moved = np.roll(blocks, (number, 3 * number), (0, 1))
        yield av.VideoFrame.from_ndarray(moved, format="rgb24")


def load(name):
    config_class, model_class = CLASSES[name]
    if torch.cuda.is_available():
        return make_model(config_class, model_class)
    fields = CLASSES["ours"][0].from_pretrained(ROOT).to_dict()
    del fields["model_type"], fields["text_config"]["model_type"]
    config = config_class(**fields)
    return model_class.from_pretrained(ROOT, config=config, dtype=torch.float32).eval()


def stock_processor(ours):
    video_processor = Qwen2VLVideoProcessor(cap_pixels_per_frame=False)
    template = {"chat_template": ours.chat_template}
    return Qwen2_5_VLProcessor(ours.image_processor, ours.tokenizer, video_processor, **template)


def stock_decoder():
    """The decoder that qwen-vl-utils takes, of those that run here, or None."""
    for name, module in DECODERS.items():
        try:
            importlib.import_module(module)
        except (ImportError, OSError, RuntimeError):  # missing, or its libraries are
            continue
        os.environ["FORCE_QWENVL_VIDEO_READER"] = name
        return name
    return None


@contextmanager
def timed(seconds, part):
    start = now()
    yield
    seconds[part] = now() - start


@contextmanager
def timed_calls(seconds, part, module):
    """All calls of a module together."""
    calls = []
    hooks = [
        module.register_forward_pre_hook(lambda *_: calls.append(now())),
        module.register_forward_hook(lambda *_: calls.append(now() - calls.pop())),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
    seconds[part] = sum(calls)


def now():
    """Seconds, once the device has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def read_ours(processor, settings, path, frames, seconds, stream=False):
    video = {"type": "video", "video": path, "num_frames": frames, **SIZE}
    with timed(seconds, "open"):
        messages, _ = processor.plan_videos(messages_with(video), **settings)
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    options |= {"add_generation_prompt": True, "processor_kwargs": {"stream": stream}}
    with timed(seconds, "read"):
        return processor.apply_chat_template(messages, **options)


def read_stock(processor, path, frames, seconds, decoder):
    from qwen_vl_utils import process_vision_info

    with timed(seconds, "read"):
        video = {"type": "video", "video": path, "nframes": frames, **SIZE}
        if decoder is None:
            taken, metadata = load_video(path, num_frames=frames, backend="pyav")
            video["video"] = [Image.fromarray(image) for image in taken]
            video["sample_fps"] = frames / metadata.duration
        messages = messages_with(video)
        text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        _, videos, options = process_vision_info(messages, return_video_kwargs=True)
        # One rate a video, where transformers 5 takes a number.
        options |= {"fps": options["fps"][0], "do_resize": False, "return_tensors": "pt"}
        return processor(text=[text], videos=videos, **options)


def messages_with(video):
    return [{"role": "user", "content": [video, QUESTION]}]


def ask(model, read, path, frames, new_tokens):
    """Seconds by column, and GiB, of one question; None where memory does not suffice."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    try:
        seconds = ask_within_memory(model, read, path, frames, new_tokens)
    except torch.OutOfMemoryError:
        seconds = None
    clean()  # not above, where the error still holds memory
    if seconds and torch.cuda.is_available():
        seconds["GiB"] = torch.cuda.max_memory_allocated() / 2**30
    return seconds


def ask_within_memory(model, read, path, frames, new_tokens):
    seconds, start = {}, now()
    inputs = read(path, frames, seconds)
    with timed(seconds, "copy"):
        inputs = inputs.to(model.device)
    before = now() - start
    streamed = not torch.is_tensor(inputs["pixel_values_videos"])
    with nullcontext() if streamed else timed_calls(seconds, "encode", model.model.visual):
        times = token_times(model, inputs, max(new_tokens))
    if streamed:
        seconds = {"open": seconds["open"]}
    else:
        seconds["prefill"] = times[0] - seconds["encode"]
        seconds["decode"] = times[-1] - times[0]
    seconds |= {"tokens": inputs["input_ids"].shape[1], "first token": before + times[0]}
    return seconds | {f"{count} tokens": before + times[count - 1] for count in new_tokens}


def medians(runs, columns):
    """A cell for each column."""
    if None in runs:
        return ["out of memory", *[""] * (len(columns) - 1)]
    middle = {column: statistics.median(run[column] for run in runs) for column in runs[0]}
    middle = {
        column: f"{x:.2f}" if column != "tokens" else f"{x:,}" for column, x in middle.items()
    }
    return [middle.get(column, "") for column in columns]


def line(way, file, cells):
    return f"| {way} | {file} | {' | '.join(cells)} |"


def clean():
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
