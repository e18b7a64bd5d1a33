"""Video and text into what the model takes: Qwen2.5-VL's processor with a budget and a reader.

`VideoNSAVideoProcessor` puts a plan (video_plan_videonsa.py) and the reading of files
(video_reader_videonsa.py) behind Qwen2.5-VL's calls, with pixels as a tensor or as a stream
(pixel_stream_videonsa.py). `VideoNSAProcessor` lets each video of a message have settings of its
own.
"""

import importlib
import math
import os
from itertools import chain, islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from transformers import Qwen2_5_VLProcessor, Qwen2VLVideoProcessor
from transformers.image_utils import (
    ChannelDimension,
    SizeDict,
    infer_channel_dimension_format,
    load_image,
)
from transformers.utils import logging
from transformers.video_utils import VideoMetadata, load_video

from .pixel_stream_videonsa import AHEAD_BYTES, GROUP_BYTES, GROUP_STEPS, PixelStream
from .video_plan_videonsa import VideoPlan, plan_video
from .video_reader_videonsa import Remeasure, VideoFile

logger = logging.get_logger(__name__)

BACKENDS = ("pyav", "torchcodec", "decord")


class _Video(str):
    """One video of a call with the settings of its message.

    It is a string because the library passes strings on to the video processor as they are,
    through the chat template's messages and the checks of the processor alike.

    source: path, URL, array or tensor [frames, ...], or list of frames.
    settings: what the message says of this video.
    """

    source: object
    settings: dict

    @classmethod
    def of(cls, source, settings=None):
        settings = dict(settings or {})
        if isinstance(source, cls):
            source, settings = source.source, {**source.settings, **settings}
        source = _path(source)
        video = cls(source if isinstance(source, str) else f"{len(source)} frames")
        video.source, video.settings = source, settings
        return video


def _path(item):
    """Paths and file:// addresses as plain paths, everything else as it is."""
    return os.fspath(item).removeprefix("file://") if isinstance(item, (str, Path)) else item


def _flatten(videos) -> list[_Video]:
    """The videos of a call: one, a list or nested lists of paths, arrays or lists of frames."""
    if isinstance(videos, (str, Path)):
        return [_Video.of(videos)]
    if isinstance(videos, (np.ndarray, torch.Tensor)):
        if videos.ndim == 5:
            return [_Video.of(video) for video in videos]
        return [_Video.of(videos if videos.ndim == 4 else videos[None])]
    if isinstance(videos, (list, tuple)):
        if videos and all(_is_frame(item) for item in videos):
            return [_Video.of(videos)]
        return [video for item in videos for video in _flatten(item)]
    raise ValueError(
        f"A video is a path, a URL, an array of frames or a list of frames, not {type(videos)}."
    )


def _is_frame(item):
    return isinstance(item, Image.Image) or (
        isinstance(item, (np.ndarray, torch.Tensor)) and item.ndim == 3
    )


class VideoNSAVideoProcessorKwargs(Qwen2VLVideoProcessor.valid_kwargs, total=False):
    """Qwen2.5-VL's, and:

    total_pixels, max_tokens: see `plan_video`.
    resized_height, resized_width: the size of every frame, whatever the pixel bounds say.
    video_start, video_end: seconds, to take a part of a file.
    video_backend: "pyav", "torchcodec" or "decord".
    progress: whether a bar shows how far a file is decoded.
    stream: whether the pixels come as a `PixelStream` (files are then read with PyAV).
    """

    total_pixels: int | None
    max_tokens: int | None
    resized_height: int | None
    resized_width: int | None
    video_start: float | int | None
    video_end: float | int | None
    video_backend: str | None
    progress: bool | None
    stream: bool | None


class VideoNSAVideoProcessor(Qwen2VLVideoProcessor):
    """Qwen2.5-VL's video processor, which plans with `plan_video` and reads files with PyAV.

    The defaults are qwen-vl-utils': 2 fps, 4 to 768 frames, 100,352 to 602,112 pixels a frame
    (`size`, whose two numbers are `min_pixels` and `max_pixels`), 90,316,800 pixels (115,200
    tokens) a video. Files are always sampled, unless do_sample_frames=False asks for every frame;
    frames that are given are taken as they are, unless do_sample_frames=True and metadata come
    with them.
    """

    valid_kwargs = VideoNSAVideoProcessorKwargs
    fps = 2.0
    total_pixels = 128000 * 28 * 28 * 9 // 10
    max_tokens = None
    video_backend = "pyav"
    stream = False
    cap_pixels_per_frame = False  # total_pixels does it

    # What a message may say of its video besides these, and is not a setting.
    MESSAGE_KEYS = ("type", "video", "url", "path", "raw_fps")
    SETTINGS = (
        "fps",
        "num_frames",
        "min_frames",
        "max_frames",
        "min_pixels",
        "max_pixels",
        "total_pixels",
        "max_tokens",
        "resized_height",
        "resized_width",
        "do_sample_frames",
        "do_resize",
        "video_backend",
        "video_start",
        "video_end",
        "progress",
    )
    ALIASES = {"nframes": "num_frames", "sample_fps": "fps"}

    @property
    def min_pixels(self):
        return self.size["shortest_edge"]

    @property
    def max_pixels(self):
        return self.size["longest_edge"]

    def _standardize_kwargs(self, size=None, min_pixels=None, max_pixels=None, **kwargs):
        # The parent warns of the pixel bounds, which are no longer wanted there but are here.
        return super()._standardize_kwargs(size=size, **kwargs)

    def plan(self, video, video_metadata=None, **settings) -> VideoPlan:
        """What `video` would become under these settings (see `plan_video`); decodes one frame."""
        video = _Video.of(video) if isinstance(video, (str, Path)) else _flatten(video)[0]
        limits = self._limits(video, settings)
        if not isinstance(video.source, str):
            return self._plan_frames(self._given_frames(video), video_metadata, limits)[0]
        with VideoFile(video.source) as file:
            return self._plan_file(file, limits)

    def preprocess(self, videos, **kwargs):
        """Qwen2.5-VL's outputs; with stream=True the pixels are a `PixelStream` over all videos.

        The files are then opened and planned in this call, and decoded while the stream is read.
        frames_indices of video_metadata are then where frames are looked for: in a file of changing
        rate, what is on screen there may have started earlier.
        """
        metadata = kwargs.pop("video_metadata", None)
        stream = kwargs.pop("stream", None)
        settings = {name: kwargs.pop(name, None) for name in (*self.SETTINGS, "size")}
        kwargs.pop("input_data_format", None)
        videos = _flatten(videos)
        if metadata is None:
            metadata = [None] * len(videos)
        elif isinstance(metadata, (dict, VideoMetadata)):
            metadata = [metadata]
        metadata = [entry for item in metadata for entry in _as_list(item)]
        if len(metadata) != len(videos):
            raise ValueError(
                f"{len(videos)} videos were given with {len(metadata)} entries of video_metadata; "
                "give one per video."
            )
        pairs = zip(videos, metadata, strict=True)
        if self.stream if stream is None else stream:
            return self._stream([self._open(*pair, settings) for pair in pairs], kwargs)
        taken = [self._take(*pair, settings) for pair in pairs]
        frames, metadata = (list(column) for column in zip(*taken, strict=True))
        return self._to_patches(frames, metadata, kwargs)

    def _to_patches(self, frames, metadata, kwargs):
        """The parent's outputs for videos of the right size, uint8 [frames, 3, height, width]."""
        return super().preprocess(
            frames,
            video_metadata=metadata,
            do_sample_frames=False,
            do_resize=False,
            input_data_format=ChannelDimension.FIRST,
            **kwargs,
        )

    def _stream(self, videos, kwargs):
        """The outputs for videos that are open, their pixels as a stream."""
        pair, grids, overlap, group_bytes = self.temporal_patch_size, [], 0, 1
        steps = []  # of each video, temporal steps to a group
        for video in videos:
            out = self._to_patches([torch.stack(video.first)], [video.metadata], kwargs)
            pixels, (_, height, width) = out["pixel_values_videos"], out["video_grid_thw"][0]
            grids.append([-(-video.count // pair), int(height), int(width)])
            steps.append(max(1, min(GROUP_STEPS, GROUP_BYTES // pixels.nbytes)))
            group_bytes = max(group_bytes, steps[-1] * pixels.nbytes)
            overlap = max(overlap, len(pixels))

        def groups(stop):
            for video, together in zip(videos, steps, strict=True):
                frames = chain(video.first, video.rest)
                while group := list(islice(frames, together * pair)):
                    if stop.is_set():
                        return
                    out = self._to_patches([torch.stack(group)], [video.metadata], kwargs)
                    yield out["pixel_values_videos"]

        rows = sum(math.prod(grid) for grid in grids)
        shape, ahead = (rows, pixels.shape[1]), max(2, AHEAD_BYTES // group_bytes)
        out["pixel_values_videos"] = PixelStream(groups, shape, pixels.dtype, overlap, ahead)
        out["video_grid_thw"] = torch.tensor(grids)
        if "video_metadata" in out:
            out["video_metadata"] = [video.metadata for video in videos]
        return out

    def _limits(self, video, call):
        """Settings of one video: the message's before the call's before the processor's own."""
        own = {
            self.ALIASES.get(key, key): value
            for key, value in video.settings.items()
            if value is not None
        }
        if unknown := sorted(set(own) - set(self.SETTINGS)):
            logger.warning_once(f"Not a setting of a video, ignored: {', '.join(unknown)}.")
        call = {key: value for key, value in call.items() if value is not None}
        if (size := call.pop("size", None)) is not None:
            call.setdefault("min_pixels", size["shortest_edge"])
            call.setdefault("max_pixels", size["longest_edge"])
        for asked in (own, call):
            if asked.get("fps") is not None and asked.get("num_frames") is not None:
                raise ValueError("fps and num_frames exclude each other; give one of them.")
        limits = {name: getattr(self, name, None) for name in self.SETTINGS}
        limits["do_sample_frames"] = None
        for asked in (call, own):
            if asked.get("num_frames") is not None:
                limits["fps"] = None
            elif asked.get("fps") is not None:
                limits["num_frames"] = None
            limits.update(asked)
        limits["fps_given"] = limits["fps"] is not None and ("fps" in own or "fps" in call)
        if limits["video_backend"] not in BACKENDS:
            raise ValueError(
                f"video_backend is {limits['video_backend']!r}; choose from {', '.join(BACKENDS)}."
            )
        return limits

    def _plan(self, duration, frames, height, width, limits, sample=True):
        size = (limits["resized_height"], limits["resized_width"])
        names = ("fps", "num_frames", "min_frames", "max_frames", "min_pixels", "max_pixels")
        return plan_video(
            duration,
            frames,
            height,
            width,
            sample=sample and limits["do_sample_frames"] is not False,
            size=size if all(size) else None,
            factor=self.patch_size * self.merge_size,
            pair=self.temporal_patch_size,
            **{name: limits[name] for name in (*names, "total_pixels", "max_tokens")},
        )

    def _take(self, video, metadata, call):
        """The frames of one video, uint8 [frames, 3, height, width], and their metadata."""
        limits = self._limits(video, call)
        if not isinstance(video.source, str):
            frames = self._given_frames(video)
            plan, frames, metadata = self._plan_frames(frames, metadata, limits)
            return torch.stack(list(self._sized(frames, plan, limits))), metadata
        if limits["video_backend"] != "pyav":
            return self._read_elsewhere(video.source, limits)
        with VideoFile(video.source) as file:
            while True:
                plan, times = self._plan_file(file, limits), []
                shown = self._images(file, plan, limits, times)
                if limits["progress"]:
                    shown = logging.tqdm(shown, **self._bar(file, plan))
                try:
                    frames = torch.stack(list(self._sized(shown, plan, limits)))
                except Remeasure:
                    continue
                return frames, self._metadata(file, plan, limits, times)

    def _open(self, video, metadata, call):
        """One video of which the first temporal step is there and the others are read later."""
        limits = self._limits(video, call)
        pair = self.temporal_patch_size
        if not isinstance(video.source, str):
            frames = self._given_frames(video)
            plan, frames, metadata = self._plan_frames(frames, metadata, limits)
            frames = self._sized(frames, plan, limits)
            return _OpenVideo(list(islice(frames, pair)), frames, plan.frames, metadata)
        if limits["video_backend"] != "pyav":
            raise ValueError(
                f"stream=True needs video_backend='pyav', not {limits['video_backend']!r}."
            )
        file = VideoFile(video.source)
        while True:
            plan = self._plan_file(file, limits)
            frames = self._sized(self._images(file, plan, limits, []), plan, limits)
            try:
                # Here, so that a file that cannot be decoded is refused now, and one whose time
                # stamps are out of order is planned again.
                first = list(islice(frames, pair))
            except Remeasure:
                continue
            rest = self._rest(file, plan, limits, frames)
            # Times at the file's own rate; which frames there are has not been seen.
            rate, start = file.rate, limits["video_start"] or 0
            times = [int((start + s + file.CLOSE) * rate) / rate for s in plan.seconds]
            metadata = self._metadata(file, plan, limits, times)
            return _OpenVideo(first, rest, plan.frames, metadata)

    def _rest(self, file, plan, limits, frames):
        """The frames that `frames` still has, for a thread that reads them in the background."""
        with file:
            if limits["progress"]:
                bar = self._bar(file, plan)
                frames = logging.tqdm(frames, initial=self.temporal_patch_size, **bar)
            try:
                yield from frames
            except Remeasure:
                raise ValueError(
                    f"{file.name} is not as long as its header says, or its time stamps are out of "
                    "order, which was seen only after frames of it had been given out: read it "
                    "without stream=True."
                ) from None

    def _bar(self, file, plan):
        return {"total": plan.frames, "desc": f"Reading {file.name}", "leave": False}

    def _plan_file(self, file, limits):
        start, end = limits["video_start"] or 0, limits["video_end"] or file.duration
        end = min(end, file.duration)
        if not 0 <= start < end:
            raise ValueError(
                f"video_start {start} and video_end {end} leave nothing of {file.name}, which "
                f"lasts {file.duration:.1f} s."
            )
        frames = max(1, round(file.frames * (end - start) / file.duration))
        return self._plan(end - start, frames, file.height, file.width, limits)

    def _images(self, file, plan, limits, times):
        """Yields the frames of a plan, uint8 [3, height, width]; adds their times to `times`."""
        start = limits["video_start"] or 0
        for time, frame in file.frames_at([start + second for second in plan.seconds]):
            times.append(time)
            yield torch.from_numpy(file.image(frame).copy()).permute(2, 0, 1)

    def _metadata(self, file, plan, limits, times):
        """Of the frames of a plan, which are on screen at these times."""
        start = limits["video_start"] or 0
        # A rate at which the frames taken are what the plan says apart.
        total = max(1, round(plan.duration * file.rate))
        rate = total / plan.duration
        indices = [round(time * rate) for time in times]
        if any(abs(time * rate - i) > 0.25 for time, i in zip(times, indices, strict=True)):
            # A file of changing rate has no frame number for a time: count on an even grid of
            # about its mean rate that holds every sampled time exactly.
            step = max(1, round(file.frames * plan.duration / file.duration / plan.frames))
            total, rate = step * plan.frames, step * plan.frames / plan.duration
            indices = [round(start * rate) + i for i in range(0, total, step)]
        return VideoMetadata(
            total_num_frames=total,
            fps=rate,
            height=file.height,
            width=file.width,
            duration=plan.duration,
            video_backend="pyav",
            frames_indices=indices,
        )

    def _read_elsewhere(self, source, limits):
        """The same with another decoder, by frame number."""
        backend, plans, chosen = limits["video_backend"], [], []
        if limits["video_start"] or limits["video_end"]:
            raise ValueError(
                f"video_start and video_end need video_backend='pyav', not {backend!r}."
            )
        try:
            importlib.import_module(backend)
        except (ImportError, OSError, RuntimeError) as error:
            raise ImportError(
                f"video_backend is {backend!r}, which cannot be imported here "
                f"({str(error).splitlines()[0]}). Install it, or leave video_backend out."
            ) from error

        def choose(metadata, **unused):
            total, size = metadata.total_num_frames, (metadata.height, metadata.width)
            if None in size:  # decord does not tell
                with VideoFile(source) as file:
                    size = (file.height, file.width)
            plans.append(self._plan(total / metadata.fps, total, *size, limits))
            chosen.extend(_spread(total, plans[0].frames))
            return chosen

        frames, metadata = load_video(source, backend=backend, sample_indices_fn=choose)
        metadata.frames_indices = chosen
        frames = self._sized(_channels_first(torch.as_tensor(frames)), plans[0], limits)
        return torch.stack(list(frames)), metadata

    def _given_frames(self, video):
        """The frames of a message or call, [frames, channels, height, width]."""
        if isinstance(video.source, (np.ndarray, torch.Tensor)):
            return _channels_first(torch.as_tensor(video.source))
        frames = [
            load_image(frame) if isinstance(frame, str) else frame
            for frame in map(_path, video.source)
        ]
        frames = [
            torch.from_numpy(np.array(frame.convert("RGB")))
            if isinstance(frame, Image.Image)
            else torch.as_tensor(frame)
            for frame in frames
        ]
        sizes = {tuple(frame.shape) for frame in frames}
        if len(sizes) != 1:
            raise ValueError(f"The frames of a video must have one size, not {sorted(sizes)}.")
        return _channels_first(torch.stack(frames))

    def _plan_frames(self, frames, metadata, limits):
        """The plan of given frames, the frames that it takes and the metadata of those."""
        count, (height, width) = len(frames), frames[0].shape[-2:]
        if metadata is None:
            if not limits["fps_given"]:
                logger.warning_once(
                    "Frames were given without metadata or fps; taking them for 2 a second."
                )
            rate = limits["fps"] if limits["fps_given"] else 2.0
            # At their own rate there is nothing to choose from; a number of frames can be asked.
            sample = bool(limits["do_sample_frames"]) and limits["num_frames"] is not None
            metadata = VideoMetadata(total_num_frames=count, fps=rate)
        else:
            metadata = VideoMetadata(**dict(metadata))
            sample = bool(limits["do_sample_frames"])
        total, rate = metadata.total_num_frames or count, metadata.fps
        if not rate:
            raise ValueError("video_metadata has no fps; give the rate of the video.")
        indices = metadata.frames_indices
        indices = _spread(total, count) if indices is None else [int(i) for i in indices]
        if len(indices) != count:
            raise ValueError(
                f"video_metadata counts {len(indices)} frames (frames_indices), but {count} were "
                "given."
            )
        plan = self._plan(total / rate, count, height, width, limits, sample)
        kept = _spread(count, plan.frames)
        frames = frames if len(kept) == count else frames[kept]
        metadata.total_num_frames, metadata.fps = total, rate
        metadata.frames_indices = [indices[i] for i in kept]
        return plan, frames, metadata

    def _sized(self, frames, plan, limits):
        """Yields each frame resized as it comes, so that large ones do not pile."""
        size = SizeDict(height=plan.height, width=plan.width)
        factor = self.patch_size * self.merge_size
        for frame in frames:
            height, width = frame.shape[-2:]
            if limits["do_resize"] is not False:
                frame = self._resize(frame, size)
            elif height % factor or width % factor:
                raise ValueError(
                    f"do_resize is False, but {height}x{width} pixels are not multiples of "
                    f"{factor}; resize the frames to such a size or leave do_resize out."
                )
            yield frame

    def _resize(self, frame, size):
        """One frame [channels, height, width], as the parent resizes a whole video."""
        if frame.shape[-2:] == (size.height, size.width):
            return frame
        # Two classes up: the parent's own method works out a size first.
        return super(Qwen2VLVideoProcessor, self).resize(frame, size=size, resample=self.resample)


class _OpenVideo(NamedTuple):
    """A video that is read later.

    first: the frames of its first temporal step, uint8 [3, height, width] each.
    rest: an iterator over the frames after those.  count: of all frames.
    """

    first: list
    rest: object
    count: int
    metadata: VideoMetadata


def _spread(total, count) -> list[int]:
    """`count` of the indices below `total`, evenly."""
    return [int(i * total / count + 1e-6) for i in range(count)]


def _as_list(item):
    return item if isinstance(item, (list, tuple)) else [item]


def _channels_first(video):
    """[frames, height, width, channels] or [frames, channels, height, width] to the latter."""
    if video.ndim != 4 or not len(video):
        raise ValueError(f"A video must be [frames, height, width, 3], not {list(video.shape)}.")
    kind = infer_channel_dimension_format(video, num_channels=(1, 3, 4))
    return video.permute(0, 3, 1, 2) if kind == ChannelDimension.LAST else video


class VideoNSAProcessor(Qwen2_5_VLProcessor):
    """Qwen2.5-VL's processor; each video of a message may carry settings of its own."""

    def apply_chat_template(self, conversation, *args, **kwargs):
        """As Qwen2.5-VL's; a video's message may set what `plan_video` takes, for that video."""
        if (
            isinstance(conversation, (list, tuple))
            and conversation
            and not _is_message(conversation[0])
        ):
            conversation = [self._bind_settings(one) for one in conversation]
        else:
            conversation = self._bind_settings(conversation)
        return super().apply_chat_template(conversation, *args, **kwargs)

    def plan_videos(self, messages, max_tokens=None, **settings):
        """Plans the videos of one conversation: returns (messages, plans), a plan per video.

        max_tokens: what all videos together may take. A conversation over it gets back messages
            in which each video has its share of the budget, in proportion to what it would take.
        settings: as for a call of the processor.
        """
        messages = self._bind_settings(messages)
        videos = [part["video"] for part in _parts(messages) if _source(part) is not None]
        plan = self.video_processor.plan
        plans = [plan(video, **settings) for video in videos]
        total = sum(one.tokens for one in plans)
        if max_tokens is not None and total > max_tokens:
            for video, one in zip(videos, plans, strict=True):
                video.settings["max_tokens"] = one.tokens * max_tokens // total
            plans = [plan(video, **settings) for video in videos]
        return messages, plans

    def __call__(self, images=None, text=None, videos=None, **kwargs):
        if videos is not None:
            videos = _flatten(videos)
            rates = kwargs.get("fps")
            if isinstance(rates, (list, tuple)):  # as qwen-vl-utils gives them, one per video
                kwargs.pop("fps")
                if len(rates) != len(videos):
                    raise ValueError(f"fps has {len(rates)} values for {len(videos)} videos.")
                for video, rate in zip(videos, rates, strict=True):
                    video.settings.setdefault("fps", rate)
        if text is not None and not kwargs.get("sanitize_control_tokens"):
            self._check_placeholders(text, self.image_token, "image", _count_images(images))
            self._check_placeholders(text, self.video_token, "video", len(videos or []))
        return super().__call__(images=images, text=text, videos=videos, **kwargs)

    def _check_placeholders(self, text, token, kind, given):
        texts = [text] if isinstance(text, str) else text
        found = sum(one.count(token) for one in texts)
        if found == given:
            return
        # What the chat template writes stands between markers; what a user types does not.
        typed = "\n".join(texts).replace(f"<|vision_start|>{token}<|vision_end|>", "")
        line = next((line for line in typed.splitlines() if token in line), None)
        hint = f"give as many {kind}s as there are placeholders."
        if line is not None:
            at = line.index(token)
            excerpt = line[max(at - 60, 0) : at + len(token) + 60].replace("<|im_end|>", "")
            hint = f"take it out of the text {excerpt!r}, or break it up there."
        raise ValueError(
            f"The text has {found} {token} placeholder{'s' * (found != 1)} for {given} "
            f"{kind}{'s' * (given != 1)}: {hint}"
        )

    def _bind_settings(self, conversation):
        """A copy of the messages in which every video has its settings with it."""
        known = VideoNSAVideoProcessor.MESSAGE_KEYS
        messages = []
        for message in getattr(conversation, "messages", conversation):
            if isinstance(message, dict) and isinstance(message.get("content"), (list, tuple)):
                content = []
                for part in message["content"]:
                    if isinstance(part, dict) and _source(part) is not None:
                        settings = {k: v for k, v in part.items() if k not in known}
                        part = {"type": "video", "video": _Video.of(_source(part), settings)}
                    content.append(part)
                message = {**message, "content": content}
            messages.append(message)
        return messages


def _count_images(images):
    if isinstance(images, (list, tuple)):
        return sum(map(_count_images, images))
    if images is None:
        return 0
    return len(images) if getattr(images, "ndim", 3) == 4 else 1


def _is_message(item):
    return isinstance(item, dict) or hasattr(item, "content")


def _source(part):
    """The video that a part of a message brings, or None."""
    if part.get("type") != "video" and ("type" in part or "video" not in part):
        return None
    return next((part[key] for key in ("video", "url", "path") if part.get(key) is not None), None)


def _parts(messages):
    for message in messages:
        if isinstance(message.get("content"), (list, tuple)):
            yield from message["content"]


VideoNSAVideoProcessor.register_for_auto_class()
VideoNSAProcessor.register_for_auto_class()
