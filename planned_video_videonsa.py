"""One video of a call, from its source to the sampled frames.

`VideoPart` is a video with the settings of its message, not looked at yet. Planning opens it, once:
`PlannedFile` holds the measured file, `PlannedFrames` the frames that were given, and both their
`VideoPlan`. The plan that was shown is the plan that is read.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from itertools import groupby

import numpy as np
import torch
from PIL import Image
from transformers.image_utils import ChannelDimension, infer_channel_dimension_format
from transformers.utils import logging
from transformers.video_utils import VideoMetadata

from .message_parts_videonsa import (
    describe_source,
    is_file,
    is_picture,
    plain_source,
    read_part,
)
from .pictures_videonsa import as_tensor, checked_array, load_picture
from .video_plan_videonsa import VideoPlan
from .video_reader_videonsa import Remeasure, VideoFile
from .video_readers_videonsa import default_readers, gpu_of, read_frames
from .video_settings_videonsa import VideoSettings, as_number, resolve_settings

logger = logging.get_logger(__name__)


class VideoPart:
    """A video that is not planned yet.

    No dataclass: the library turns a dataclass in a message into a dict.

    source: path, address, bytes, array or tensor [frames, ...], or list of frames.
    settings: what the message says of this video.
    """

    def __init__(self, source, settings: dict | None = None):
        self.source, self.settings = source, settings or {}

    def __deepcopy__(self, memo):
        return self  # the library copies a call's keyword arguments; nothing here changes


class _Planned:
    """What is alike in the two kinds of planned videos.

    part: the `VideoPart` that was planned.  settings: all that was asked of it.
    plan: what is taken.  sizes: (pixels per token and side, frames per token).
    """

    def __init__(self, part: VideoPart, settings: VideoSettings, sizes: tuple[int, int]):
        self.part, self.settings, self.sizes = part, settings, sizes
        self.plan = self.make_plan()

    def __deepcopy__(self, memo):
        return self  # as for VideoPart; what is open has one owner

    def __reduce_ex__(self, protocol):
        raise TypeError(
            "A planned video holds an open file and cannot be sent to another process or saved: "
            "send the messages as they were before plan_videos, and plan them where they are read."
        )


class PlannedFile(_Planned):
    """A video file that is open and measured, and what is taken of it.

    The file is closed when its frames have been read and when this is dropped. Read again, it is
    opened again, but not measured.
    """

    def __init__(self, file: VideoFile, *args):
        self.file = file
        super().__init__(*args)

    def make_plan(self) -> VideoPlan:
        file, settings = self.file, self.settings
        gpu_of(settings.video_decoder)  # what cannot be is refused before anything is read
        start = self.start = settings.video_start or 0
        end = file.duration
        if settings.video_end is not None:
            end = min(settings.video_end, end)
        if not start < end:
            raise ValueError(
                f"video_start {start:g} and video_end {end:g} leave nothing of {file.name}, which "
                f"lasts {file.duration:.1f} s."
            )
        shape = (file.height, file.width, *self.sizes)
        frames = max(1, round(file.frames * (end - start) / file.duration))
        plan = settings.plan(end - start, frames, *shape)
        self.seconds = [start + second for second in plan.seconds]
        every = settings.do_sample_frames is False
        if every:
            _warn_of_unused_rate(settings, settings.fps_given, "do_sample_frames is False")
        if every or 2 * plan.frames > frames:
            # Headers also count frames that are not shown; so many are counted one by one.
            times = [time for time in file.frame_times() if start <= time < end] or [start]
            plan = settings.plan(end - start, len(times), *shape)
            self.seconds = [start + second for second in plan.seconds]
            if every:
                self.seconds = [times[i] for i in _spread(len(times), plan.frames)]
        return plan

    def planned_again(self, settings=None):
        """The same file under other settings, or after its measures have changed."""
        return PlannedFile(self.take_file(), self.part, settings or self.settings, self.sizes)

    def take_file(self) -> VideoFile:
        """The open file; the caller owns it, and this has only its measures left."""
        file, self.file = self.file, self.file.closed_copy()
        return file

    def close(self):
        self.file.close()

    def read(self, times, resize):
        """Yields `resize(frame)` for the frames of the plan; adds their times to `times`.

        resize: takes and gives uint8 [3, height, width], in the thread of the frame's reader.

        Raises Remeasure where the file is not as it was measured; plan it again then.
        """

        def fetch(file, frame):
            frame = torch.from_numpy(file.image(frame).copy()).permute(2, 0, 1)
            # In the reader's thread: the one that stacks frames is alone, and copies these fast.
            return resize(frame).contiguous()

        readers = self.settings.video_readers or default_readers(math.prod(self.file.stored))
        gpu = gpu_of(self.settings.video_decoder)
        with self.take_file() as file:
            try:
                for time, frame in read_frames(file, self.seconds, fetch, readers, gpu):
                    times.append(time)
                    yield frame
            except Remeasure:
                self.file = file.closed_copy()
                raise
        self._say_if_held(times)

    def _say_if_held(self, times):
        """Says where one picture stands for more than half of the frames of a plan."""
        time, run = max(((t, list(same)) for t, same in groupby(times)), key=lambda x: len(x[1]))
        if len(run) > max(len(times) / 2, 4):
            later = times[times.index(time) + len(run) :]
            logger.warning_once(
                f"{self.file.name}: {len(run)} of {len(times)} frames are one picture, on screen "
                f"from {time:.1f} to {later[0] if later else self.file.duration:.1f} s. If it did "
                "not stand still there, the recording paused or its clock was set: cut the gap out."
            )

    def metadata(self, times=None) -> VideoMetadata:
        """Of the frames on screen at these times, or where the plan looks for them."""
        file, plan = self.file, self.plan
        every = self.settings.do_sample_frames is False
        if times is None and every:
            times = self.seconds
        elif times is None:
            # Times at the file's own rate; which frames there are has not been seen.
            close = min(file.CLOSE, 0.5 / file.rate)
            times = [int((s + close) * file.rate) / file.rate for s in self.seconds]
        # A rate at which the frames taken are what the plan says apart.
        total = max(1, round(plan.duration * file.rate))
        rate = total / plan.duration
        indices = [round(time * rate) for time in times]
        close = min(0.25 / rate, 0.02)
        even = all(abs(i / rate - time) <= close for time, i in zip(times, indices, strict=True))
        # A file of changing rate has no frame number for a time.
        if not even and every:  # count in milliseconds
            total, rate = max(1, round(plan.duration * 1000)), 1000.0
            indices = [round(time * rate) for time in times]
        elif not even:
            # Count on an even grid of about its mean rate that holds every sampled time exactly.
            step = max(1, round(file.frames * plan.duration / file.duration / plan.frames))
            total, rate = step * plan.frames, step * plan.frames / plan.duration
            indices = [round(self.start * rate) + i for i in range(0, total, step)]
        return VideoMetadata(
            total_num_frames=total,
            fps=rate,
            height=file.height,
            width=file.width,
            duration=plan.duration,
            video_backend="pyav",
            frames_indices=indices,
        )


class PlannedFrames(_Planned):
    """Frames that are given, [frames, channels, height, width], and which of them are taken."""

    def __init__(self, frames: torch.Tensor, metadata, *args):
        self.frames, self.given = frames, metadata
        super().__init__(*args)

    def make_plan(self) -> VideoPlan:
        count, (height, width) = len(self.frames), self.frames.shape[-2:]
        settings, metadata = self.settings, self.given
        if settings.video_start is not None or settings.video_end is not None:
            raise ValueError(
                "video_start and video_end are times in a file, but frames were given: give those "
                "of the part that is wanted."
            )
        sample = bool(settings.do_sample_frames)
        if settings.do_sample_frames is None:
            asked = settings.fps_given and bool(metadata)  # else it is the rate of these frames
            _warn_of_unused_rate(settings, asked, "Frames are given without do_sample_frames=True")
        if not metadata:
            if not settings.fps_given:
                logger.warning_once(
                    "Frames were given without metadata or fps; taking them for 2 a second."
                )
            rate = settings.fps if settings.fps_given else 2.0
            # At their own rate there is nothing to choose from; a number of frames can be asked.
            sample = sample and settings.num_frames is not None
            metadata = {"fps": rate}
        metadata = _read_metadata(metadata, count)
        duration = metadata.total_num_frames / metadata.fps
        plan = settings.plan(duration, count, height, width, *self.sizes, sample=sample)
        self.kept = _spread(count, plan.frames)
        metadata.frames_indices = [metadata.frames_indices[i] for i in self.kept]
        self._metadata = metadata
        return plan

    def planned_again(self, settings=None):
        return PlannedFrames(
            self.frames, self.given, self.part, settings or self.settings, self.sizes
        )

    def close(self):
        pass

    def read(self, times, resize):
        """Yields `resize(frame)` for the frames of the plan, uint8 [3, height, width]."""
        for i in self.kept:
            yield resize(self.frames[i])

    def metadata(self, times=None) -> VideoMetadata:
        return replace(self._metadata)


def _warn_of_unused_rate(settings, rate_is_asked, reason):
    unused = ["fps"] * rate_is_asked + ["num_frames"] * (settings.num_frames is not None)
    if unused:
        values = ", ".join(f"{name}={getattr(settings, name):g}" for name in unused)
        logger.warning_once(f"{reason}, so all are taken, whatever {values} says.")


def _read_metadata(given, count) -> VideoMetadata:
    """The video_metadata of `count` frames that are given, every number of it checked.

    total_num_frames may be a fraction, as qwen-vl-utils has it, and is `count` where it is missing;
    frames_indices are then spread over it.

    Raises ValueError for what is no metadata, or not of these frames, by its field.
    """
    given = {key: value for key, value in dict(given).items() if value is not None}
    if unknown := given.keys() - {field.name for field in fields(VideoMetadata)}:
        raise ValueError(
            f"video_metadata has {', '.join(sorted(map(str, unknown)))}, but its fields are "
            f"{', '.join(field.name for field in fields(VideoMetadata))}."
        )
    if "fps" not in given:
        raise ValueError("video_metadata has no fps; give the rate of the video.")
    rate = _number_of("fps", given["fps"])
    if rate <= 0:
        raise ValueError(f"fps of video_metadata is {given['fps']!r}; it must be positive.")
    total = _number_of("total_num_frames", given.get("total_num_frames", count))
    if round(total) < count:
        raise ValueError(
            f"total_num_frames of video_metadata is {total:g}, but {count} frames were given: "
            "it counts all frames of the video that they were taken from."
        )
    total = int(total) if total == int(total) else total
    indices = given.get("frames_indices")
    indices = _spread(total, count) if indices is None else _read_indices(indices, count)
    return VideoMetadata(
        **given | {"fps": rate, "total_num_frames": total, "frames_indices": indices}
    )


def _read_indices(given, count) -> list[int]:
    """The frames_indices of `count` frames: whole numbers that do not descend."""
    if isinstance(given, str) or not hasattr(given, "__iter__"):
        raise ValueError(f"frames_indices of video_metadata is {given!r}; it must be a list.")
    indices = [_number_of("frames_indices", index) for index in given]
    if len(indices) != count:
        raise ValueError(
            f"video_metadata counts {len(indices)} frames (frames_indices), but {count} were given."
        )
    whole = [int(index) for index in indices]
    if whole != indices or whole != sorted(whole) or whole[0] < 0:
        raise ValueError(
            f"frames_indices of video_metadata are {str(indices)[:80]}; they are whole numbers "
            "from 0, in order."
        )
    return whole


def _number_of(field, value) -> float:
    number = as_number(value)
    if number is None or not math.isfinite(number):
        raise ValueError(f"{field} of video_metadata is {value!r}; it must be a finite number.")
    return number


def list_metadata(metadata, count: int) -> list:
    """One entry of video_metadata for each of so many videos; {} where there is None.

    The library's type of video_metadata has no None in a list.
    """
    if metadata is None:
        return [{}] * count
    if not isinstance(metadata, (list, tuple)):
        metadata = [metadata]
    nested = [item if isinstance(item, (list, tuple)) else [item] for item in metadata]
    metadata = [entry for item in nested for entry in item]
    for entry in metadata:
        if entry is not None and not isinstance(entry, (dict, VideoMetadata)):
            raise ValueError(
                f"An entry of video_metadata is {describe_source(entry)}; it is a dict with the "
                "video's fps, or None."
            )
    if len(metadata) != count:
        raise ValueError(
            f"{count} videos were given with {len(metadata)} entries of video_metadata; give one "
            "per video."
        )
    return [{} if entry is None else entry for entry in metadata]


def list_videos(videos) -> list:
    """The videos of a call, flat: each a `VideoPart` or planned already.

    videos: one or (nested) lists of what `plain_source` takes, arrays, tensors, lists of frames and
    of what this returns. Pictures that are listed are the frames of one video.

    Raises ValueError for what is none of these.
    """
    if isinstance(videos, Mapping):  # may have settings beside the source, as in a message
        part = read_part({"type": "video", "video": videos})
        settings = {key: value for key, value in part.items() if key not in ("type", "video")}
        return [with_settings(part["video"], settings)]
    given = videos
    if not _is_own(videos):
        videos = plain_source(videos)
    if _is_own(videos):
        return [videos]
    if is_file(videos):
        return [VideoPart(videos)]
    if isinstance(videos, (np.ndarray, torch.Tensor)):
        if videos.ndim == 5:
            return [VideoPart(video) for video in videos]
        return [VideoPart(videos if videos.ndim == 4 else videos[None])]
    if isinstance(videos, (list, tuple)):
        if are_frames(videos):
            return [VideoPart(videos)]
        if isinstance(given, (list, tuple)):
            pairs = zip(given, videos, strict=True)
            videos = [one if isinstance(one, Mapping) else plain for one, plain in pairs]
        return [video for item in videos for video in list_videos(item)]
    raise _no_video(videos)


def with_settings(source, settings: dict):
    """The video that a part of a message brings with these settings."""
    if _is_own(source):
        if not settings or isinstance(source, VideoPart):
            return source
        return source.planned_again(resolve_settings(settings, {}, asdict(source.settings)))
    source = plain_source(source)
    if not is_file(source) and not isinstance(source, (np.ndarray, torch.Tensor, list)):
        raise _no_video(source)
    return VideoPart(source, settings)


def _no_video(source):
    return ValueError(
        "A video is a path, an address, bytes, an array of frames or a list of frames, not "
        f"{describe_source(source)}."
    )


def stack_frames(source) -> torch.Tensor:
    """The frames of a message or call, [frames, channels, height, width].

    Raises ValueError where there are none, or of several sizes or types of numbers.
    """
    if isinstance(source, (np.ndarray, torch.Tensor)):
        return _channels_first(as_tensor(source))
    frames = [_frame(item) for item in source]
    if not frames:
        raise ValueError("A video was given as an empty list: it has no frames.")
    sizes = {tuple(frame.shape) for frame in frames}
    if len(sizes) != 1:
        raise ValueError(f"The frames of a video must have one size, not {sorted(sizes)}.")
    types = {str(frame.dtype) for frame in frames}
    if len(types) != 1:  # whose black and white may differ, too
        raise ValueError(f"The frames of a video must have one dtype, not {sorted(types)}.")
    return _channels_first(torch.stack(frames))


def _frame(item):
    """One frame, [height, width, 3] or as an array has it."""
    if isinstance(item, (np.ndarray, torch.Tensor)):
        return as_tensor(item)
    return torch.from_numpy(np.array(load_picture(item)))


def _is_own(item):
    # By name, because the loader makes a copy of these classes for every folder that it loads.
    return type(item).__name__ in ("VideoPart", "PlannedFile", "PlannedFrames")


def are_frames(items):
    """Whether a list holds the frames of one video: pictures, arrays, or files of pictures."""
    if any(map(_is_own, items)):
        return False
    arrays = [item for item in items if isinstance(item, (np.ndarray, torch.Tensor))]
    files = [item for item in items if is_file(item)]
    if len(items) > 1 and len(files) == len(items):
        return all(map(is_picture, files))
    pictures = sum(isinstance(item, Image.Image) for item in items)
    return bool(items) and len(items) == pictures + sum(array.ndim == 3 for array in arrays)


def _channels_first(video):
    """[frames, height, width, channels] or [frames, channels, height, width] to the latter."""
    if video.ndim != 4 or not video.numel():
        raise ValueError(f"A video must be [frames, height, width, 3], not {list(video.shape)}.")
    video = checked_array(video, "Frames")
    kind = infer_channel_dimension_format(video, num_channels=(1, 3))
    return video.permute(0, 3, 1, 2) if kind == ChannelDimension.LAST else video


def _spread(total, count) -> list[int]:
    """`count` of the indices below `total`, evenly."""
    return [int(i * total / count + 1e-6) for i in range(count)]
