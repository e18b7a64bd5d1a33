"""Times reading frames out of a two-hour file on the CPU, and the host memory that it takes.

    python benchmarks/video.py
    python benchmarks/video.py --readers tensor stream --frames 768 --threads 1 4 16 --b-frames 0 3

The files are made once and kept in the temporary folder: 640 x 360 pixels, h264, 24 frames a
second, a key frame every 240, up to three B-frames (x264's default) or none. From the path to
`pixel_values_videos` (252 x 448 pixels a frame, 144 tokens for two), every reader gives the same
number of frames, evenly spread:

    tensor      this repository's processor
    stream      the same with stream=True, read 16,384 tokens at a time as the model does
    cuda        the same as tensor, with NVIDIA's decoder beside the threads
    torchcodec, decord
                qwen-vl-utils with that decoder, then Qwen2.5-VL's own video processor

--threads are this repository's `video_readers`; the others choose theirs. Each measurement is a
process of its own, so that its peak memory is its own; "beyond imports" is
that peak less what the process had when its imports were done. CPU seconds are those of all
threads: on a machine with other work, compare these. A decoder that is not installed or
does not run here is left out with its error. torchcodec needs FFmpeg's shared libraries.
"""

import argparse
import importlib.metadata
import json
import math
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from fractions import Fraction
from functools import partial
from pathlib import Path

import av
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))
from videonsa import ROOT  # noqa: E402

HEIGHT, WIDTH, RATE, HOURS, KEY_GAP = 360, 640, 24, 2, 240
PIECE = 12 * KEY_GAP  # frames that are encoded; the file repeats them
SIZE = {"resized_height": 252, "resized_width": 448}
CHUNK = 16384 * 4  # rows: four patches to a token
READERS = ("tensor", "stream", "torchcodec", "decord")
ON_A_GPU = ("cuda",)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--readers", nargs="+", default=READERS, choices=READERS + ON_A_GPU)
    parser.add_argument("--frames", type=int, nargs="+", default=[64, 768])
    parser.add_argument("--threads", type=int, nargs="+", default=[None], help="default: cores")
    parser.add_argument("--b-frames", type=int, nargs="+", default=[3], choices=[0, 3])
    parser.add_argument("--runs", type=int, default=3, help="of which the median is printed")
    parser.add_argument("--file", help="another file to read")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        return print(
            json.dumps(measure(args.readers[0], args.threads[0], args.file, args.frames[0]))
        )
    paths = [args.file] if args.file else [two_hours(number) for number in args.b_frames]
    names = ("av", "torch", "transformers", "qwen-vl-utils", "torchcodec", "decord")
    print(f"{os.cpu_count()} CPU cores, Python {platform.python_version()}, {versions(names)}")
    for path in paths:
        print(f"{path}: {os.path.getsize(path) / 2**20:.0f} MiB\n")
        print_table(path, args)


def print_table(path, args):
    print(
        "| reader | frames | seconds | first rows after | CPU seconds | peak MiB | beyond imports |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- |")
    cases = []
    for reader in args.readers:
        cases += [(reader, threads) for threads in (args.threads if reader in OURS else [None])]
    for frames in args.frames:
        for reader, threads in cases:
            runs = [in_a_process(reader, threads, path, frames) for _ in range(args.runs)]
            name = reader if threads is None else f"{reader}, {threads} threads"
            if failed := next((run for run in runs if isinstance(run, str)), None):
                print(f"| {name} | {frames} | does not run: {failed} | | | | |", flush=True)
                continue
            seconds, first, cpu, peak, beyond = map(statistics.median, zip(*runs, strict=True))
            print(
                f"| {name} | {frames} | {seconds:.1f} | {first:.1f} | {cpu:.1f} | {peak:,.0f} | "
                f"{beyond:,.0f} |",
                flush=True,
            )
    print()


def versions(names):
    found = []
    for name in names:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            pass
    return ", ".join(found)


def two_hours(b_frames):
    """The path of the file with so many B-frames, which is made if it is not there."""
    options = {"preset": "veryfast", "g": str(KEY_GAP), "bf": str(b_frames)}
    options |= {"keyint_min": str(KEY_GAP), "sc_threshold": "0"}
    name = f"{HOURS}h-{HEIGHT}p-{RATE}fps-{KEY_GAP}-{b_frames}b"
    return make_file(name, drawn, options, math.ceil(HOURS * 3600 * RATE / PIECE))


def make_file(name, draw, options, repeats):
    """The path of a file of h264 in the temporary folder, which is made if it is not there.

    draw: gives its frames, HEIGHT x WIDTH pixels, which the file repeats so many times.
    options: of x264.
    """
    path = Path(tempfile.gettempdir()) / "videonsa-benchmark" / f"{name}.mp4"
    if path.exists():
        return str(path)
    path.parent.mkdir(exist_ok=True)
    start, part = time.monotonic(), path.with_suffix(".part.mp4")
    with av.open(str(part), "w") as file:
        stream = file.add_stream("libx264", rate=RATE)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        stream.options = options
        packets = [packet for frame in draw() for packet in stream.encode(frame)]
        packets += stream.encode()
        tick = packets[0].time_base
        later = int(len(packets) / RATE / tick)
        stamps = [(packet.pts, packet.dts) for packet in packets]
        for repeat in range(repeats):
            for packet, (pts, dts) in zip(packets, stamps, strict=True):
                packet.pts, packet.dts = pts + repeat * later, dts + repeat * later
                packet.time_base, packet.stream = tick, stream  # muxing changed them
                file.mux(packet)
    part.rename(path)
    print(f"made {path} in {time.monotonic() - start:.0f} s")
    return str(path)


def drawn():
    """Frames of a moving pattern with grain, and a square that crosses it."""
    rows, columns = np.mgrid[0:HEIGHT, 0:WIDTH]
    waves = (48 * np.sin(rows / 17) + 48 * np.sin(columns / 23) + 128).astype(np.uint8)
    grain = np.random.default_rng(0).integers(0, 17, (2 * HEIGHT, 2 * WIDTH), dtype=np.uint8)
    for number in range(PIECE):
        image = np.full((HEIGHT * 3 // 2, WIDTH), 128, np.uint8)
        dy, dx = number * 7 % HEIGHT, number * 13 % WIDTH
        image[:HEIGHT] = np.roll(waves, 2 * number, axis=1) + grain[dy:, dx:][:HEIGHT, :WIDTH]
        x = number * 5 % (WIDTH - 80)
        image[100:180, x : x + 80] = 235
        frame = av.VideoFrame.from_ndarray(image, format="yuv420p")
        frame.pts, frame.time_base = number, Fraction(1, RATE)
        yield frame


def in_a_process(reader, threads, path, frames):
    """What `measure` gives, or the last line of what went wrong."""
    command = [sys.executable, __file__, "--one", "--readers", reader, "--frames", str(frames)]
    command += [] if threads is None else ["--threads", str(threads)]
    done = subprocess.run(
        [*command, "--file", path],
        capture_output=True,
        text=True,
        env={**os.environ, "FORCE_QWENVL_VIDEO_READER": reader},
    )
    if done.returncode:
        return done.stderr.strip().splitlines()[-1][:100]
    return json.loads(done.stdout.splitlines()[-1])


def measure(reader, threads, path, frames):
    """Seconds for all rows, for the first, of CPU time; MiB at the peak, and since the imports."""
    read = OURS[reader](threads) if reader in OURS else qwens()
    before, cpu, start, rows = peak_mib(), time.process_time(), time.monotonic(), 0
    for first in read(path, frames):
        if not rows:
            first_seconds = time.monotonic() - start
        rows += len(first)
        del first
    seconds = time.monotonic() - start
    if rows != frames // 2 * 144 * 4:
        raise ValueError(f"{rows} rows of {frames} frames")
    return seconds, first_seconds, time.process_time() - cpu, peak_mib(), peak_mib() - before


def peak_mib():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def ours(stream, decoder, threads):
    from transformers import AutoVideoProcessor

    processor = AutoVideoProcessor.from_pretrained(ROOT, trust_remote_code=True)

    def read(path, frames):
        settings = {"num_frames": frames, **SIZE}
        settings |= {"video_readers": threads, "video_decoder": decoder}
        out = processor(videos=[path], **settings, stream=stream, return_tensors="pt")
        pixels = out["pixel_values_videos"]
        for start in range(0, len(pixels), CHUNK):
            yield pixels[start : start + CHUNK]

    return read


def qwens():
    from qwen_vl_utils import process_vision_info
    from transformers import Qwen2VLVideoProcessor

    processor = Qwen2VLVideoProcessor(cap_pixels_per_frame=False)

    def read(path, frames):
        video = {"type": "video", "video": path, "nframes": frames, **SIZE}
        _, videos = process_vision_info([{"role": "user", "content": [video]}])
        yield processor(videos=videos, do_resize=False, return_tensors="pt")["pixel_values_videos"]

    return read


OURS = {
    "tensor": partial(ours, False, "cpu"),
    "stream": partial(ours, True, "cpu"),
    "cuda": partial(ours, False, "cuda"),
}


if __name__ == "__main__":
    main()
