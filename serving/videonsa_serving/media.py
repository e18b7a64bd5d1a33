"""Files become pixels and placeholders by the checkpoint's own processor.

vLLM's other loaders decode a file before the model's processor sees it. Here the file itself is
handed on, so that the frames, their size and their times are those of `processor(...)`: chosen by
its settings and read by its PyAV reader. A request gives settings as `mm_processor_kwargs`, as it
would give them to the processor.
"""

import math
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
from transformers import BatchFeature
from vllm.model_executor.models.qwen2_5_vl import (
    Qwen2_5_VLDummyInputsBuilder,
    Qwen2_5_VLMultiModalProcessor,
    Qwen2_5_VLProcessingInfo,
)
from vllm.multimodal.processing import BaseMultiModalProcessor
from vllm.multimodal.video import VIDEO_LOADER_REGISTRY, VideoLoader
from vllm.transformers_utils.processor import cached_get_processor

from .checkpoint import code_of_checkpoint

# The number of frames where none was asked for, in place of vLLM's default of 32, which a request
# may ask for as well. Below zero, so that all frames of a video in JPEG pictures are taken.
UNASKED_FRAMES = -2
# Pixels that come while the model reads, and text between the steps of a video.
NOT_SERVED = ("stream", "timestamps")


@VIDEO_LOADER_REGISTRY.register("videonsa", video_processor="VideoNSAVideoProcessor")
class FileLoader(VideoLoader):
    """Hands on the bytes of a video file, as an array of them; nothing is decoded."""

    @classmethod
    def load_bytes(
        cls, data: bytes, num_frames=UNASKED_FRAMES, **kwargs
    ) -> tuple[np.ndarray, dict]:
        asked = {"num_frames": num_frames, **kwargs}
        if num_frames == UNASKED_FRAMES:
            del asked["num_frames"]
        if asked:
            settings = ", ".join(f"{name}={value!r}" for name, value in asked.items())
            raise ValueError(
                f"media_io_kwargs has {settings} for videos, which this model's processor reads "
                "itself: give its settings (fps, num_frames, max_tokens, ...) as "
                "mm_processor_kwargs."
            )
        return np.frombuffer(data, dtype=np.uint8), {}


class VideoNSAProcessingInfo(Qwen2_5_VLProcessingInfo):
    """What vLLM asks of a processor: the checkpoint's, whatever a request sets."""

    def get_hf_processor(self, **kwargs):
        # One for all settings, which go with each call.
        model = self.ctx.model_config
        return cached_get_processor(
            model.model, revision=model.revision, trust_remote_code=model.trust_remote_code
        )

    def get_max_video_tokens(self, seq_len: int, mm_counts: Mapping[str, int]) -> int:
        """Tokens that no video exceeds under the checkpoint's settings and those of the start."""
        processor = self.get_hf_processor().video_processor
        asked = self.ctx.get_merged_mm_kwargs({})
        asked |= asked.pop("videos_kwargs", {})

        def limit(name):
            return asked.get(name, getattr(processor, name, None))

        area = (processor.patch_size * processor.merge_size) ** 2
        frames = max(limit("max_frames"), limit("num_frames") or 0)
        tokens = math.ceil(frames / processor.temporal_patch_size) * (limit("max_pixels") // area)
        if (pixels := limit("total_pixels")) is not None:
            tokens = min(tokens, pixels // area)
        return min(tokens, seq_len, limit("max_tokens") or tokens)

    def largest_video(self, seq_len: int, mm_counts: Mapping[str, int]) -> tuple[int, int]:
        """(frames, pixels a side) of one of so many tokens, or little fewer."""
        processor = self.get_hf_processor().video_processor
        tokens = self.get_max_video_tokens(seq_len, mm_counts) // max(mm_counts["video"], 1)
        steps = max(1, min(processor.max_frames // processor.temporal_patch_size, tokens))
        side = max(1, math.isqrt(tokens // steps)) * processor.patch_size * processor.merge_size
        return steps * processor.temporal_patch_size, side


class VideoNSADummyInputs(Qwen2_5_VLDummyInputsBuilder):
    """The inputs by which vLLM measures, at the start, what memory encoding takes."""

    def get_dummy_mm_data(self, seq_len, mm_counts, mm_options):
        data = super().get_dummy_mm_data(seq_len, {**mm_counts, "video": 0}, mm_options)
        if mm_counts.get("video", 0):
            frames, side = self.info.largest_video(seq_len, mm_counts)
            data["video"] = self._get_dummy_videos(
                width=side,
                height=side,
                num_frames=frames,
                num_videos=mm_counts["video"],
                overrides=mm_options.get("video"),
            )
        return data


class VideoNSAMediaProcessor(Qwen2_5_VLMultiModalProcessor):
    """Calls the checkpoint's processor, with files as they came."""

    def _get_hf_mm_inputs(self, mm_items, hf_kwargs):
        # Not Qwen2.5-VL's, which takes every video for frames.
        inputs = BaseMultiModalProcessor._get_hf_mm_inputs(self, mm_items, hf_kwargs)
        if videos := inputs.hf_data.get("videos"):
            videos = [file_or_frames(*video) for video in videos]
            inputs.hf_data["videos"] = [video for video, _ in videos]
            inputs.hf_data["video_metadata"] = [metadata for _, metadata in videos]
        return inputs

    def _call_hf_processor(self, hf_data, hf_kwargs) -> BatchFeature:
        """The processor's outputs, its errors in their own words; pixels in the model's dtype."""
        settings = self.info.ctx.get_merged_mm_kwargs(hf_kwargs)
        refuse_settings({**settings, **(settings.get("videos_kwargs") or {})})
        outputs = self.info.get_hf_processor()(**hf_data, **settings, return_tensors="pt")
        for name in ("pixel_values", "pixel_values_videos"):
            if name in outputs:
                outputs[name] = outputs[name].to(self.info.ctx.model_config.dtype)
        return outputs

    def _maybe_apply_prompt_updates(self, mm_items, mm_res):
        """A prompt has as many placeholders as media, or somebody has typed one."""
        processor, model = self.info.get_hf_processor(), self.info.ctx.model_config
        check = code_of_checkpoint(model, "placeholders_videonsa.check_placeholders")
        text, counts = (
            self.info.get_tokenizer().decode(mm_res.prompt_ids),
            mm_items.get_all_counts(),
        )
        for kind in ("image", "video"):
            check(text, getattr(processor, f"{kind}_token"), kind, counts.get(kind, 0))
        return super()._maybe_apply_prompt_updates(mm_items, mm_res)

    def _get_mm_hashes(self, inputs):
        """Of what the media are, not of the names that a request gives them (`uuid`).

        A name that two clients happen to give would answer one with the other's pixels.
        """
        return super()._get_mm_hashes(replace(inputs, mm_uuid_items=None))


def file_or_frames(video: np.ndarray, metadata: dict) -> tuple[bytes | np.ndarray, dict]:
    """A video and its metadata as the processor takes them; bytes are a file."""
    if video.ndim == 1:
        return video.tobytes(), {}
    return video, {key: value for key, value in metadata.items() if key != "do_sample_frames"}


def refuse_settings(settings: Mapping) -> None:
    """Raise ValueError for settings of the processor that an engine cannot serve."""
    if asked := [name for name in NOT_SERVED if settings.get(name)]:
        raise ValueError(f"{' and '.join(asked)} cannot be served by vLLM: leave it out.")
