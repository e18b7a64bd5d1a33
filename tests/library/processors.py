"""The library's suites of processors: calls, chat templates, saving and loading."""

import unittest

import numpy as np
from transformers import (
    AutoProcessor,
    AutoTokenizer,
    AutoVideoProcessor,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
)
from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize
from transformers_tests.test_processing_common import ProcessorTesterMixin
from transformers_tests.test_video_processing_common import (
    VideoProcessingTestMixin,
    prepare_video_inputs,
)
from videonsa.configuration_videonsa import VideoNSAConfig
from videonsa.processing_videonsa import VideoNSAProcessor, VideoNSAVideoProcessor

from paths import ROOT
from suites import AgainstStock

# So that the suites' Auto classes load these, and not a second copy from what they saved.
AutoProcessor.register(VideoNSAConfig, VideoNSAProcessor)
AutoVideoProcessor.register(VideoNSAConfig, VideoNSAVideoProcessor)


class ProcessorTests(ProcessorTesterMixin):
    @classmethod
    def _setup_tokenizer(cls):
        return AutoTokenizer.from_pretrained(ROOT)

    @classmethod
    def _setup_image_processor(cls):
        return Qwen2VLImageProcessor.from_pretrained(ROOT)

    @classmethod
    def _setup_video_processor(cls):
        return cls.video_processor_class.from_pretrained(ROOT)

    @staticmethod
    def prepare_processor_dict():
        return {"chat_template": (ROOT / "chat_template.jinja").read_text()}

    @staticmethod
    def does_processor_return_mm_offsets(processor_class, method_name):
        return True  # the suite's own answer leaves out what is inherited


class StockProcessor(ProcessorTests, unittest.TestCase):
    __test__ = False
    processor_class = Qwen2_5_VLProcessor
    video_processor_class = Qwen2VLVideoProcessor


class TestProcessor(AgainstStock, ProcessorTests, unittest.TestCase):
    stock = StockProcessor
    processor_class = VideoNSAProcessor
    video_processor_class = VideoNSAVideoProcessor


class VideoProcessorTester:
    """What the suite asks of a video processor: its settings, videos and their patches."""

    batch_size = 2
    num_frames = 8
    num_channels = 3
    settings = {"size": {"shortest_edge": 20 * 20, "longest_edge": 100 * 100}}

    def prepare_video_inputs(self, **kwargs):
        sizes = {"min_resolution": 30, "max_resolution": 80}
        return prepare_video_inputs(
            self.batch_size, self.num_frames, self.num_channels, **sizes, **kwargs
        )

    def expected_output_video_shape(self, videos):
        patches = 0
        for video in videos:
            sides = sorted(np.shape(video[0]))[1:]  # without the channels, wherever they stand
            short, long = smart_resize(*sides, 28, *self.settings["size"].values())
            patches += self.num_frames // 2 * (short // 14) * (long // 14)
        return patches, 3 * 2 * 14 * 14


class VideoProcessorTests(VideoProcessingTestMixin):
    video_processor_dict = VideoProcessorTester.settings

    def setUp(self):
        super().setUp()
        self.video_processor_tester = VideoProcessorTester()

    def assert_expected_videos_shape(self, encoded_videos, expected_output_video_shape, num_videos):
        self.assertEqual(tuple(encoded_videos.shape), expected_output_video_shape)


class StockVideoProcessor(VideoProcessorTests, unittest.TestCase):
    __test__ = False
    fast_video_processing_class = Qwen2VLVideoProcessor


class TestVideoProcessor(AgainstStock, VideoProcessorTests, unittest.TestCase):
    stock = StockVideoProcessor
    fast_video_processing_class = VideoNSAVideoProcessor
