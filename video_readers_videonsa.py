"""Several readers for one video: threads that decode and resize groups of its frames.

A frame is decoded from the key frame before it on, so the stretches between key frames can be
decoded at once. `read_frames` cuts the times that are wanted into groups that begin at key frames,
deals them to readers, each with a container of its own, and hands the frames on in order. Where a
reader fails, one reader goes on alone, with its own checks, notices and errors.
"""

import math
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers.utils import logging

from .video_reader_videonsa import ReadingEnded, VideoFile
from .video_source_videonsa import PYAV

logger = logging.get_logger(__name__)

THREAD_NAME = "VideoReader"
# Frames that have to be decoded for a group, at least. To open a container costs as much as to
# decode 30 to 65 frames of 640 x 360 pixels (docs/log.md).
GROUP_FRAMES = 64
# Pixels of a frame for each reader that pays: between two packets a reader needs Python's lock, and
# the less there is to decode, the sooner readers only wait for it (docs/log.md).
PIXELS_PER_READER = 640 * 360 // 8
# An H100 has seven decoders.
GPU_READERS = 8
# Bytes of resized frames that wait for those before them, over all readers.
AHEAD_BYTES = 128 << 20


def read_frames(
    file: VideoFile, seconds: list[float], fetch: Callable, readers: int, gpu: int | None = None
) -> Iterator[tuple[float, torch.Tensor]]:
    """Yields (time, `fetch(file, frame)`) of the frame on screen at each of the ascending times.

    fetch: makes a tensor of a decoded frame, in the thread of its reader.
    readers: how many read at most. They start when more is asked for than the first group, and end
        with this generator.
    gpu: the number of one whose decoder has GPU_READERS readers besides.

    Raises what `VideoFile.frames_at` raises.
    """
    groups = group_times(file, seconds)
    gpu_readers = 0 if gpu is None else min(GPU_READERS, len(groups) - 1)
    readers = min(readers, len(groups) - 1)
    done, several = 0, None
    if (readers > 1 or gpu_readers) and file.can_seek(seconds[groups[-1][0]]):
        for item in _read_alone(file, seconds[: groups[0][1]], fetch):
            yield item
            done += 1
        files = [file.closed_copy(gpu) for _ in range(gpu_readers)]
        if readers:
            files += [file.moved(), *(file.closed_copy() for _ in range(readers - 1))]
        ahead = max(len(files), AHEAD_BYTES // item[1].nbytes)
        several = _Readers(files, seconds, groups[1:], fetch, ahead)
        for item in several.frames():
            yield item
            done += 1
    rest = iter(())
    if done < len(seconds):
        if several is not None and several.gpu_failed:
            rest = read_frames(file, seconds[done:], fetch, readers)
        else:
            rest = _read_alone(file, seconds[done:], fetch)
        yield next(rest)  # where a reader failed; what is wrong with the file is said now
    if several is not None and several.error is not None:
        what = f"fewer than {readers} readers read it"
        if several.gpu_failed:
            what = "the GPU's decoder did not read it, the CPU did"
        logger.warning_once(f"{file.name}: {what} ({several.error!r}).")
    yield from rest


def group_times(file: VideoFile, seconds: list[float]) -> list[tuple[int, int]]:
    """Cuts ascending times into groups: (number of the first, number after the last) of each.

    A group begins where a key frame lies between its first time and the one before it, so that
    nothing is decoded twice, and where the group before it has GROUP_FRAMES frames to decode. All
    is one group where the file cannot be sought, is an address, or does not tell its key frames.
    """
    if file.in_order or file.source.is_url:
        return [(0, len(seconds))]
    # What leads to the first frame is not counted, so that the second is of its group: no reader
    # starts for a first temporal step, which is read before anybody wants the rest.
    starts, frames, last = [0], 0.0, seconds[0]
    for number, second in enumerate(seconds):
        key = file.key_before(second)
        if frames >= GROUP_FRAMES and key > last:
            starts.append(number)
            frames = 0.0
        frames += 1 + (second - max(key, last)) * file.rate
        last = second
    return list(zip(starts, [*starts[1:], len(seconds)], strict=True))


def gpu_of(decoder: str | None) -> int | None:
    """The number of the GPU that is to decode; None for the CPU.

    Raises ValueError where CUDA is asked for and cannot be used.
    """
    if decoder != "cuda":
        return None
    if PYAV < 18:
        raise ValueError("video_decoder is 'cuda', which needs PyAV 18 or later: pip install -U av")
    try:
        return torch.cuda.current_device()
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"video_decoder is 'cuda', but CUDA cannot be used here ({error}): leave it out."
        ) from error


def default_readers(pixels: int) -> int:
    """How many readers read a video whose frames have so many pixels.

    As many as pay and there are cores; one in a worker of a DataLoader, which has others beside it.
    """
    if torch.utils.data.get_worker_info() is not None:
        return 1
    return min(usable_cores(), math.ceil(pixels / PIXELS_PER_READER))


def usable_cores() -> int:
    """The cores that this process may use, by its affinity and its control groups' quotas."""
    affinity = getattr(os, "sched_getaffinity", None)  # Linux
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    return max(1, math.ceil(min(cores, *_quotas())))


def _quotas(root=Path("/sys/fs/cgroup"), own=Path("/proc/self/cgroup")) -> list[float]:
    """The cores that each control group of this process allows, and each above it."""
    quotas = [math.inf]
    try:
        groups = [line.split(":", 2)[1:] for line in own.read_text().splitlines()]
    except OSError:
        return quotas
    for controllers, path in groups:
        if controllers and "cpu" not in controllers.split(","):
            continue
        # In a container the path may be the host's, and what is seen begins at the own group.
        group = root / controllers / path.lstrip("/")
        for folder in (group, *group.parents):
            if folder.is_relative_to(root):
                quotas.append(_quota(folder, "cpu.max"))
                quotas.append(_quota(folder, "cpu.cfs_quota_us", "cpu.cfs_period_us"))
    return quotas


def _quota(folder, *names):
    """Microseconds of computing by those of a period: in one file (cgroup 2) or two (1)."""
    try:
        quota, period = " ".join((folder / name).read_text() for name in names).split()
        quota = float(quota)
    except (OSError, ValueError):  # no such group, or "max"
        return math.inf
    return quota / float(period) if quota > 0 else math.inf


@contextmanager
def one_thread_beside_readers():
    """PyTorch computes with one thread in here while there are readers, which need the cores.

    A pool of threads that share a computation would wait for the ones that get no core.
    """
    threads = torch.get_num_threads()
    if threads == 1 or not any(thread.name == THREAD_NAME for thread in threading.enumerate()):
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _read_alone(file, seconds, fetch):
    for time, frame in file.frames_at(seconds):
        yield time, fetch(file, frame)


class _Readers:
    """Threads that read groups of frames, each from a file of its own.

    A reader waits when it is `ahead` frames ahead of what was handed on.

    error: why a reader failed, if one did.  gpu_failed: whether that was one on the GPU.
    """

    def __init__(self, files, seconds, groups, fetch, ahead):
        self.seconds, self.fetch, self.ahead = seconds, fetch, ahead
        self.groups, self.next = iter(groups), groups[0][0]
        self.ready = {}  # by number, what has been read
        self.failed, self.error = set(), None  # numbers of frames that could not be read
        self.gpu_failed = False
        self.files, self.ended, self.running = files, False, len(files)
        self.changed, self.threads = threading.Condition(), []
        for file in files:
            file.one_of_several = True
            self.threads.append(
                threading.Thread(target=self._work, args=(file,), name=THREAD_NAME, daemon=True)
            )

    def frames(self):
        """Yields what `fetch` made, in order, up to the first frame that could not be read."""
        try:
            for thread in self.threads:
                thread.start()
            for number in range(self.next, len(self.seconds)):
                with self.changed:
                    while number not in self.ready:
                        if number in self.failed or not self.running:
                            return
                        self.changed.wait()
                    item = self.ready.pop(number)
                    self.next = number + 1
                    self.changed.notify_all()
                yield item
        finally:
            self._end()

    def _end(self):
        """Ends the threads; a packet that is being decoded is waited for."""
        with self.changed:
            self.ended = True
            self.changed.notify_all()
        for file in self.files:
            file.ended = True
        # Garbage can be collected in any thread.
        if threading.current_thread() not in self.threads:
            for thread in self.threads:
                if thread.ident is not None:
                    thread.join()

    def _work(self, file):
        number = None
        try:
            with file:
                file.ensure_open()
                while (group := self._take_group()) is not None:
                    number, end = group
                    for time, frame in file.frames_at(self.seconds[number:end]):
                        self._hand_on(number, (time, self.fetch(file, frame)))
                        number += 1
        except ReadingEnded:
            pass
        except BaseException as error:  # one reader meets it again, alone
            self.error, self.gpu_failed = error, self.gpu_failed or file.gpu is not None
            self.failed.add(number)
        with self.changed:
            self.running -= 1
            self.changed.notify_all()

    def _take_group(self):
        with self.changed:
            return next(self.groups, None)

    def _hand_on(self, number, item):
        with self.changed:
            while number >= self.next + self.ahead and not self.ended:
                self.changed.wait()
            if self.ended:
                raise ReadingEnded
            self.ready[number] = item
            self.changed.notify_all()
