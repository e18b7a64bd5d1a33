"""Video and text into what the model takes: Qwen2.5-VL's processor with a budget and a reader.

A video goes from `VideoNSAProcessor` (messages, a budget for all videos of a conversation) to
`VideoNSAVideoProcessor`, which plans it (video_plan_videonsa.py), opens and reads it
(planned_video_videonsa.py, video_reader_videonsa.py) and makes patches of its frames: a tensor, or
a stream of them (pixel_stream_videonsa.py).
"""

import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from functools import partial
from inspect import signature
from itertools import chain, islice
from typing import NamedTuple

import torch
from transformers import BatchFeature, ProcessorMixin, Qwen2_5_VLProcessor, Qwen2VLVideoProcessor
from transformers.image_utils import ChannelDimension, ImageInput, SizeDict
from transformers.processing_utils import ProcessingKwargs, TextKwargs
from transformers.utils import logging
from transformers.video_utils import VideoInput

from .message_parts_videonsa import (
    describe_source,
    frames_in_folder,
    is_file,
    is_picture,
    read_messages,
)
from .pictures_videonsa import (
    IMAGE_SETTINGS,
    as_image_part,
    load_image_or_array,
    playable,
    warn_of_scale,
)
from .pixel_stream_videonsa import AHEAD_BYTES, GROUP_BYTES, GROUP_STEPS, PixelStream
from .placeholders_videonsa import (
    check_placeholders,
    check_samples,
    count_by_sample,
    count_images,
    count_videos,
    read_texts,
    write_video,
)
from .planned_video_videonsa import (
    PlannedFile,
    PlannedFrames,
    VideoPart,
    list_metadata,
    list_videos,
    stack_frames,
    with_settings,
)
from .video_plan_videonsa import VideoPlan, share_tokens
from .video_reader_videonsa import Remeasure, VideoFile
from .video_readers_videonsa import one_thread_beside_readers
from .video_settings_videonsa import (
    ALIASES,
    SETTINGS,
    SWITCHES,
    call_settings,
    read_setting,
    refuse_typos,
    resolve_settings,
)

logger = logging.get_logger(__name__)


class VideoNSAVideoProcessorKwargs(Qwen2VLVideoProcessor.valid_kwargs, total=False):
    """Qwen2.5-VL's, and:

    total_pixels, max_tokens: see `plan_video`.
    resized_height, resized_width: the size of every frame, whatever the pixel bounds say.
    video_start, video_end: seconds, to take a part of a file.
    video_readers: how many threads read a file at most.
    video_decoder: "cuda" where NVIDIA's decoder is to help them; "cpu".
    video_backend: "pyav", which reads all files.
    progress: whether a bar shows how far a file is decoded.
    stream: whether the pixels come as a `PixelStream`.
    timestamps: whether the time of each temporal step stands before its tokens in the text.
    video_parts: what `VideoNSAProcessor` passes, the videos with their own settings and plans.
    """

    total_pixels: int | None
    max_tokens: int | None
    resized_height: int | None
    resized_width: int | None
    video_start: float | int | None
    video_end: float | int | None
    video_readers: int | None
    video_decoder: str | None
    video_backend: str | None
    progress: bool | None
    stream: bool | None
    timestamps: bool | None
    video_parts: list | None


class VideoNSAVideoProcessor(Qwen2VLVideoProcessor):
    """Qwen2.5-VL's video processor, which plans with `plan_video` and reads files with PyAV.

    The defaults are qwen-vl-utils': 2 fps, 4 to 768 frames, 100,352 to 602,112 pixels a frame
    (`size`, whose two numbers are `min_pixels` and `max_pixels`), 90,316,800 pixels (115,200
    tokens) a video. Files are sampled, unless a call or message asks for every frame with
    do_sample_frames=False; frames that are given are taken as they are, unless do_sample_frames is
    True and metadata or num_frames say how to choose.
    """

    valid_kwargs = VideoNSAVideoProcessorKwargs
    fps = 2.0
    total_pixels = 128000 * 28 * 28 * 9 // 10
    max_tokens = None
    video_readers = None
    video_decoder = "cpu"
    stream = False
    timestamps = False  # Qwen2.5-VL was not trained with any
    cap_pixels_per_frame = False  # total_pixels does it

    def __init__(self, size=None, **kwargs):
        # A copy, because transformers before 5.24 writes min_pixels into the class's own.
        size = dict(type(self).size) if size is None else size
        super().__init__(size=size, **_read_settings(kwargs))

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
        planned = self.plan_and_open(video, video_metadata, **settings)
        planned.close()
        return planned.plan

    def plan_and_open(self, video, video_metadata=None, **settings) -> PlannedFile | PlannedFrames:
        """As `plan`, and keeps the file open for `preprocess`, which reads what was planned.

        A video that is planned already is planned again if settings are given, on the same file.
        """
        video = with_settings(video, {})
        if hasattr(video, "plan"):
            _refuse_metadata(video_metadata, "a video that was planned before")
            if all(value is None for value in settings.values()):
                return video
            base = asdict(video.settings)
            return video.planned_again(resolve_settings(video.part.settings, settings, base))
        defaults = {name: getattr(self, name, None) for name in (*SETTINGS, "video_backend")}
        # False is what the library saves without being asked, so it says nothing.
        defaults["do_sample_frames"] = self.do_sample_frames or None
        settings = resolve_settings(video.settings, settings, defaults)
        sizes = (self.patch_size * self.merge_size, self.temporal_patch_size)
        source = video.source
        if is_file(source) and os.path.isdir(source):
            source = frames_in_folder(source)
        if is_file(source):
            _refuse_metadata(video_metadata, describe_source(source))
            file = playable(source)
            try:
                file = VideoFile(file)
            except ValueError as error:
                if not is_picture(source):
                    raise
                raise ValueError(
                    f"{describe_source(source)} is a picture, not a video: give it as an image, or "
                    "in a list of the frames of a video."
                ) from error
            return PlannedFile(file, video, settings, sizes)
        return PlannedFrames(stack_frames(source), video_metadata, video, settings, sizes)

    def preprocess(self, videos, **kwargs):
        """Qwen2.5-VL's outputs; with stream=True the pixels are a `PixelStream` over all videos.

        The files are then opened and planned in this call, and decoded while the stream is read.
        frames_indices of video_metadata are then where frames are looked for: in a file of changing
        rate, what is on screen there may have started earlier.
        """
        metadata, kwargs = kwargs.pop("video_metadata", None), _read_settings(kwargs)
        stream, progress = kwargs.pop("stream", None), kwargs.pop("progress", None)
        settings = {name: kwargs.pop(name, None) for name in (*SETTINGS, "size", "video_backend")}
        for name in ("input_data_format", "timestamps"):  # the second is of the text
            kwargs.pop(name, None)
        videos = kwargs.pop("video_parts", None) or list_videos(videos)
        if not videos:
            raise ValueError("videos is an empty list; give at least one video.")
        metadata = list_metadata(metadata, len(videos))
        scale = _scale(self, kwargs)

        def begin(video, entry):
            planned = self.planned(video, entry, settings)
            if isinstance(planned, PlannedFrames):
                # Before they are resized, which can go beyond 1.
                warn_of_scale(planned.frames, "Frames", **scale)
            else:
                warn_of_scale(planned.file, "Videos", **scale)
            return self._begin(video, planned, progress)

        readings = map(begin, videos, metadata)
        if self.stream if stream is None else stream:
            return self._stream(list(readings), kwargs)
        return self._whole(readings, kwargs)

    def planned(self, video, metadata, settings):
        """The planned video of a call; of one that was planned before it, the plan is kept."""
        if not hasattr(video, "plan"):
            return self.plan_and_open(video, metadata, **settings)
        _refuse_metadata(metadata, "a video that was planned before")
        late = [
            f"{name}={value}"
            for name, value in call_settings(settings).items()
            if hasattr(video.settings, name)
            and name not in video.part.settings
            and value != getattr(video.settings, name)
        ]
        if late:
            logger.warning_once(
                f"A video was planned before this call, which ignores {', '.join(late)}; give that "
                "to plan_videos."
            )
        return video

    def _begin(self, video, planned, progress):
        """Reads the first temporal step.

        So a file that cannot be decoded is refused at once, and one that is not as it was measured
        is planned again while nobody has seen the plan.
        """
        while True:
            times = []
            frames = planned.read(times, partial(self._fit, planned))
            try:
                first = list(islice(frames, self.temporal_patch_size))
            except Remeasure:
                planned = _plan_again(video, planned)
                continue
            rest = self._with_bar(planned, frames) if progress else frames
            return _Reading(video, planned, times, first, rest)

    def _with_bar(self, planned, frames):
        """The frames after the first temporal step, under a bar that shows how many were read."""
        if isinstance(planned, PlannedFile):
            frames = logging.tqdm(
                frames,
                total=planned.plan.frames,
                initial=self.temporal_patch_size,
                desc=f"Reading {planned.file.name}",
                leave=False,
            )
        yield from frames

    def _whole(self, readings, kwargs):
        """The outputs for videos that have begun to be read, their pixels as a tensor."""
        kind = kwargs.get("return_tensors", self.return_tensors)
        parts = [self._finish(reading, {**kwargs, "return_tensors": "pt"}) for reading in readings]
        pixels, grids, metadata = (list(part) for part in zip(*parts, strict=True))
        data = {
            "pixel_values_videos": pixels[0] if len(pixels) == 1 else torch.cat(pixels),
            "video_grid_thw": torch.tensor(grids),
        }
        out = BatchFeature(data, tensor_type=kind)
        if kwargs.get("return_metadata", self.return_metadata):
            out["video_metadata"] = metadata
        return out

    def _finish(self, reading, kwargs):
        """(patches, grid, metadata) of a video; its patches are made while the rest is read."""
        while True:
            planned, frames = reading.planned, chain(reading.first, reading.rest)
            entry, pixels, row = planned.metadata(), None, 0
            try:
                while group := list(islice(frames, GROUP_STEPS * self.temporal_patch_size)):
                    out = self._to_patches([torch.stack(group)], [entry], kwargs)
                    part, (steps, *grid) = (
                        out["pixel_values_videos"],
                        out["video_grid_thw"][0].tolist(),
                    )
                    if pixels is None:
                        total = -(-planned.plan.frames // self.temporal_patch_size)
                        pixels = part.new_empty(len(part) // steps * total, part.shape[1])
                    pixels[row : row + len(part)] = part
                    row += len(part)
            except Remeasure:
                planned = _plan_again(reading.video, planned)
                reading = self._begin(reading.video, planned, progress=False)
                continue
            return pixels, [total, *grid], planned.metadata(reading.times)

    def _to_patches(self, frames, metadata, kwargs):
        """The parent's outputs for videos of the right size, [frames, 3, height, width]."""
        with one_thread_beside_readers():
            return super().preprocess(
                frames,
                video_metadata=metadata,
                do_sample_frames=False,
                do_resize=False,
                input_data_format=ChannelDimension.FIRST,
                **kwargs,
            )

    def _stream(self, readings, kwargs):
        """The outputs for videos that have begun to be read, their pixels as a stream."""
        metadata = [reading.planned.metadata() for reading in readings]
        grids, overlap, group_bytes = [], 0, 1
        steps = []  # of each video, temporal steps to a group
        for reading, entry in zip(readings, metadata, strict=True):
            out = self._to_patches([torch.stack(reading.first)], [entry], kwargs)
            pixels, (_, height, width) = out["pixel_values_videos"], out["video_grid_thw"][0]
            count = reading.planned.plan.frames
            grids.append([-(-count // self.temporal_patch_size), int(height), int(width)])
            steps.append(max(1, min(GROUP_STEPS, GROUP_BYTES // pixels.nbytes)))
            group_bytes = max(group_bytes, steps[-1] * pixels.nbytes)
            overlap = max(overlap, len(pixels))

        def groups(stop):
            for reading, entry, number in zip(readings, metadata, steps, strict=True):
                frames = chain(reading.first, reading.rest)
                count = number * self.temporal_patch_size
                while group := _next_frames(frames, count, reading, stop):
                    if stop.is_set():
                        return
                    out = self._to_patches([torch.stack(group)], [entry], kwargs)
                    yield out["pixel_values_videos"]

        rows = sum(math.prod(grid) for grid in grids)
        shape, ahead = (rows, pixels.shape[1]), max(2, AHEAD_BYTES // group_bytes)
        out["pixel_values_videos"] = PixelStream(groups, shape, pixels.dtype, overlap, ahead)
        out["video_grid_thw"] = torch.tensor(grids)
        if "video_metadata" in out:
            out["video_metadata"] = metadata
        return out

    def _fit(self, planned, frame):
        """A frame [channels, height, width] in the size that was planned."""
        height, width = frame.shape[-2:]
        if planned.settings.do_resize is not False:
            return self._resize(
                frame, SizeDict(height=planned.plan.height, width=planned.plan.width)
            )
        factor = self.patch_size * self.merge_size
        if height % factor or width % factor:
            raise ValueError(
                f"do_resize is False, but {height}x{width} pixels are not multiples of "
                f"{factor}; resize the frames to such a size or leave do_resize out."
            )
        return frame

    def _resize(self, frame, size):
        """One frame [channels, height, width], as the parent resizes a whole video."""
        if frame.shape[-2:] == (size.height, size.width):
            return frame
        # Two classes up: the parent's own method works out a size first.
        return super(Qwen2VLVideoProcessor, self).resize(frame, size=size, resample=self.resample)


class _Reading(NamedTuple):
    """A video of a call whose first temporal step has been read.

    video: as the call got it.  times: of the frames read so far, in seconds.
    first: the frames of the first step, uint8 [3, height, width].  rest: yields the others.
    """

    video: VideoPart | PlannedFile | PlannedFrames
    planned: PlannedFile | PlannedFrames
    times: list
    first: list
    rest: Iterator


def _scale(processor, given):
    """Whether values are rescaled and normalized, by a call's settings or else the processor's."""
    scale = {}
    for name in ("rescale", "normalize"):
        own = given.get(f"do_{name}")
        scale[name] = bool(getattr(processor, f"do_{name}") if own is None else own)
    return scale


def _next_frames(frames, count, reading, stop):
    """Up to `count` frames of a stream, whose plan can no longer change; fewer after `stop`."""
    taken = []
    try:
        for frame in islice(frames, count):
            taken.append(frame)
            if stop.is_set():
                break
        return taken
    except Remeasure:
        raise _not_as_measured(reading.planned, "frames of it had been given out") from None


def _plan_again(video, planned):
    """A new plan for a file that is not as it was measured, unless its plan was shown before."""
    if video is planned:
        raise _not_as_measured(planned, "its plan had been given out") from None
    return planned.planned_again()


def _not_as_measured(planned, when):
    return ValueError(
        f"{planned.file.name} is not as long as its header says, or its time stamps are out of "
        f"order, which was seen only after {when}: read it without stream=True and plan_videos, or "
        f"{planned.file.source.convert_hint()}."
    )


def _read_settings(given):
    """Keyword arguments of a call, in the exact types that the library wants."""
    names = [name for name in (*SETTINGS, *SWITCHES) if name in given]
    given = {**given, **{name: read_setting(name, given[name]) for name in names}}
    # The library would take a switch that is None for False.
    left_out = [name for name in SWITCHES if name in given and given[name] is None]
    return {name: value for name, value in given.items() if name not in left_out}


def _read_asked(given):
    """`_read_settings` of what a user gives, where a setting that is None is not asked."""
    read = _read_settings(given)
    return {
        name: value for name, value in read.items() if value is not None or name not in SETTINGS
    }


def _refuse_metadata(metadata, name):
    if metadata:
        raise ValueError(
            f"video_metadata was given for {name}, which has its own; it tells of frames that are "
            "given. Leave it out, or give None for this video."
        )


# What a part of a message may say, and is not a setting; and what is one.
NO_SETTINGS = ("type", "image", "video", "raw_fps")
KNOWN_SETTINGS = {
    "image": set(IMAGE_SETTINGS),
    "video": {*SETTINGS, *ALIASES, "video_backend"},
}

# Older versions of the library would take it for a variable of the template.
CAN_SANITIZE = "sanitize_control_tokens" in signature(ProcessorMixin.apply_chat_template).parameters


class VideoNSAProcessor(Qwen2_5_VLProcessor):
    """Qwen2.5-VL's processor; each video of a message may carry settings of its own."""

    def apply_chat_template(
        self, conversation, chat_template=None, tools=None, documents=None, *args, **kwargs
    ):
        """As Qwen2.5-VL's; a video's message may set what `plan_video` takes, for that video."""
        if kwargs.get("sanitize_control_tokens") and not CAN_SANITIZE:
            raise ValueError(
                "sanitize_control_tokens needs transformers 5.24 or later; without it, take tokens "
                "such as <|im_end|> out of what users type."
            )
        if batched := _is_batch(conversation):
            conversations = [self._bind_settings(one) for one in conversation]
        else:
            conversations = [self._bind_settings(conversation)]
        _warn_of_unread(conversations, str(chat_template or self.chat_template), tools, documents)
        conversation = conversations if batched else conversations[0]
        return super().apply_chat_template(
            conversation, chat_template, tools, documents, *args, **kwargs
        )

    def plan_videos(self, messages, max_tokens: int | None = None, **settings):
        """Plans the videos of one conversation: returns (messages, plans), a plan per video.

        The messages bring the videos as they were opened and planned, for `apply_chat_template`, a
        call of this processor or of this method.

        max_tokens: what all videos together may take. Where they would take more, each has its
            share of the budget, in proportion to what it would take, two frames at least.
        settings: as for a call of the processor.
        """
        max_tokens = read_setting("max_tokens", max_tokens)
        messages = self._bind_settings(messages)
        parts = [part for part in _parts(messages) if "video" in part]
        metadata = list_metadata(settings.pop("video_metadata", None), len(parts))
        videos = [
            self.video_processor.plan_and_open(part["video"], entry, **settings)
            for part, entry in zip(parts, metadata, strict=True)
        ]
        total = sum(video.plan.tokens for video in videos)
        if max_tokens is not None and total > max_tokens:
            shares = share_tokens(max_tokens, [video.plan for video in videos])
            videos = [
                video.planned_again(replace(video.settings, max_tokens=share))
                for video, share in zip(videos, shares, strict=True)
            ]
        for part, video in zip(parts, videos, strict=True):
            part["video"] = video
        return messages, [video.plan for video in videos]

    def load_images(self, images):
        """Images from wherever a call or message has them, as pictures and arrays; lists as lists.

        Raises ValueError for what is no image, is damaged, or is too large by its header.
        """
        if isinstance(images, (list, tuple)):
            return [self.load_images(image) for image in images]
        if type(images).__name__ == "ImagePart":  # by name, as for videos
            return images.load(self.image_processor)
        return load_image_or_array(images)

    def __call__(
        self,
        images: ImageInput | None = None,
        text: str | list[str] | None = None,
        videos: VideoInput | None = None,
        **kwargs,
    ) -> BatchFeature:
        """As Qwen2.5-VL's; `fps` may be a list, a rate for each video, as qwen-vl-utils has it."""
        text, rates = read_texts(text), kwargs.get("fps")
        if isinstance(rates, (list, tuple)):  # as qwen-vl-utils gives them, one per video
            del kwargs["fps"]
        else:
            rates = None
        kwargs = self._read_call(kwargs)
        nested = {
            (self.image_token, "image"): count_by_sample(images, text, count_images),
            (self.video_token, "video"): count_by_sample(videos, text, count_videos),
        }
        if not count_images(images):  # an empty list is none
            images = None
        if images is not None:
            images = self.load_images(images)
            own = {**kwargs, **(kwargs.get("images_kwargs") or {})}
            warn_of_scale(images, "Images", **_scale(self.image_processor, own))
        if videos is not None:
            videos = list_videos(videos) or None
        if rates is not None:
            if len(rates) != len(videos or []):
                raise ValueError(f"fps has {len(rates)} values for {len(videos or [])} videos.")
            pairs = zip(videos or [], rates, strict=True)
            videos = [self._at_rate(video, rate) for video, rate in pairs] or None
        if videos is not None:
            for given in (kwargs, kwargs.get("videos_kwargs") or {}):
                if given.get("video_metadata") is not None:
                    given["video_metadata"] = list_metadata(given["video_metadata"], len(videos))
            # The library counts what stands in `videos`, and knows only strings and arrays.
            kwargs["video_parts"], videos = videos, ["video"] * len(videos)
        if text is not None and not kwargs.get("sanitize_control_tokens"):
            check_placeholders(text, self.image_token, "image", count_images(images))
            check_placeholders(text, self.video_token, "video", len(videos or []))
            for (token, kind), counts in nested.items():
                check_samples(text, token, kind, counts)
        return super().__call__(images=images, text=text, videos=videos, **kwargs)

    def replace_video_token(self, video_inputs, video_idx, timestamps=None, **kwargs):
        """What stands for a video in the text; video_inputs as the video processor gives them.

        timestamps: whether the times of its frames do, too; None as the video processor says.
        """
        timestamps = self.video_processor.timestamps if timestamps is None else timestamps
        times = video_inputs["video_metadata"][video_idx].timestamps if timestamps else None
        grid, merge_size = (
            video_inputs["video_grid_thw"][video_idx],
            self.video_processor.merge_size,
        )
        return write_video(self.video_token, grid, merge_size, times)

    def count_stamp_tokens(self, planned) -> int:
        """Tokens that the timestamps of a planned video take in the text, beside its own."""
        size, merge_size = self.video_processor.temporal_patch_size, self.video_processor.merge_size
        grid = [math.ceil(planned.plan.frames / size), merge_size, merge_size]  # a token to a step
        inputs = {"video_grid_thw": [grid], "video_metadata": [planned.metadata()]}
        text = self.replace_video_token(inputs, 0)
        return len(self.tokenizer(text, verbose=False)["input_ids"]) - grid[0]

    def _read_call(self, kwargs):
        """Keyword arguments of a call, copied, their settings in the types that are wanted."""
        library = {*TextKwargs.__annotations__, *ProcessingKwargs.__annotations__}
        library |= set(VideoNSAVideoProcessorKwargs.__annotations__)
        library |= set(self.image_processor.valid_kwargs.__annotations__)
        nested = {key: kwargs[key] for key in ("images_kwargs", "videos_kwargs") if kwargs.get(key)}
        for given in (kwargs, *nested.values()):
            refuse_typos(given.keys() - library, SETTINGS, "a video")
        kwargs = _read_asked({**kwargs, **{k: _read_asked(v) for k, v in nested.items()}})
        for given in (kwargs, kwargs.get("videos_kwargs") or {}):
            if given.get("return_metadata") is False:  # Qwen2.5-VL's needs them, and has a default
                del given["return_metadata"]
        return kwargs

    def _at_rate(self, video, rate):
        if hasattr(video, "plan"):  # too late: says so
            return self.video_processor.planned(video, None, {"fps": rate})
        return with_settings(video.source, {"fps": rate, **video.settings})

    def _bind_settings(self, conversation):
        """A copy of the messages in Qwen's form, in which media have their settings with them."""
        messages = read_messages(conversation)
        for part in _parts(messages):
            kind = part["type"]
            if kind == "text":
                continue
            settings = {key: value for key, value in part.items() if key not in NO_SETTINGS}
            unread = sorted(set(settings) - KNOWN_SETTINGS[kind])
            if kind not in part and unread:
                raise ValueError(f"A part of type {kind!r} has no {kind}, but {', '.join(unread)}.")
            if kind in part:
                bind = with_settings if kind == "video" else as_image_part
                media = {"type": kind, kind: bind(part[kind], settings)}
                part.clear()
                part |= media
        return messages


def _is_batch(conversation):
    """Whether this is a list of conversations, and not of messages."""
    if not isinstance(conversation, (list, tuple)) or not conversation:
        return False
    return not isinstance(conversation[0], Mapping) and not hasattr(conversation[0], "content")


def _warn_of_unread(conversations, template, tools, documents):
    """Says what of a call a chat template leaves out, as Qwen2.5-VL's does with tools."""
    messages = [message for messages in conversations for message in messages]
    given = {
        "tools": tools,
        "documents": documents,
        "tool_calls": any(message.get("tool_calls") for message in messages),
    }
    if unread := [name for name, value in given.items() if value and name not in template]:
        logger.warning_once(
            f"The chat template, like Qwen2.5-VL's, leaves out {' and '.join(unread)}: the model "
            "does not see them. Say in the text of a message what it should know."
        )
    roles = {message["role"] for message in messages} - {"system", "user", "assistant"}
    if unknown := sorted(role for role in roles if role not in template):
        logger.warning_once(
            "Qwen2.5-VL knows the roles system, user and assistant, but not "
            f"{', '.join(unknown)}, which stands in the prompt as it is."
        )


def _parts(messages):
    for message in messages:
        if isinstance(message["content"], list):
            yield from message["content"]


VideoNSAVideoProcessor.register_for_auto_class()
VideoNSAProcessor.register_for_auto_class()
