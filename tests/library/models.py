"""The library's suites of models: outputs, gradients, saving and loading, training, configs.

Its suites of FSDP and tensor parallelism skip Qwen2.5-VL, so they are not here.
"""

import unittest

from transformers import (
    AutoModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLModel,
    Qwen2_5_VLTextConfig,
)
from transformers.models.auto import modeling_auto
from transformers_tests.generation.test_utils import GenerationTesterMixin
from transformers_tests.test_configuration_common import ConfigTester
from transformers_tests.test_modeling_common import ModelTesterMixin
from transformers_tests.test_training_mixin import TrainingTesterMixin
from videonsa.configuration_videonsa import VideoNSAConfig, VideoNSATextConfig
from videonsa.modeling_videonsa import VideoNSAForConditionalGeneration, VideoNSAModel

from suites import AgainstStock
from tiny import Prompts, config_fields

# Where the suites look up which class does what.
AutoModel.register(VideoNSAConfig, VideoNSAModel)
modeling_auto.MODEL_MAPPING_NAMES["videonsa"] = "VideoNSAModel"
modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES["videonsa"] = (
    "VideoNSAForConditionalGeneration"
)


class ModelTester:
    """What the suites ask of a model: a config, inputs, and their sizes."""

    batch_size = 3
    num_hidden_layers = 2
    num_attention_heads = 4
    hidden_size = 32
    is_training = True

    def __init__(self, config_class):
        self.config_class = config_class
        # One image a row: the suites count them, and call the vision tower once.
        prompts = Prompts()
        rows = [prompts.row(3, ("image", 4, 3), 5) for _ in range(self.batch_size)]
        self.inputs = prompts.batch(*rows)
        self.seq_length = self.inputs["input_ids"].shape[1]

    def get_config(self):
        fields = config_fields(self.num_attention_heads, kv_heads=2, head_dim=8)
        fields["text_config"]["initializer_range"] = 0.02
        fields["vision_config"]["hidden_size"] = self.hidden_size
        if self.config_class is Qwen2_5_VLConfig:
            text = fields["text_config"].items()
            fields["text_config"] = {k: v for k, v in text if not k.startswith("nsa_")}
        return self.config_class(**fields)

    def prepare_config_and_inputs_for_common(self):
        return self.get_config(), {name: value.clone() for name, value in self.inputs.items()}


class ModelTests(ModelTesterMixin):
    _is_composite = True
    test_can_init_all_missing_weights_before_2023 = True

    def setUp(self):
        self.model_tester = ModelTester(self.config_class)


class StockModel(ModelTests, unittest.TestCase):
    __test__ = False
    config_class = Qwen2_5_VLConfig
    all_model_classes = (Qwen2_5_VLModel,)


class TestModel(AgainstStock, ModelTests, unittest.TestCase):
    stock = StockModel
    config_class = VideoNSAConfig
    all_model_classes = (VideoNSAModel,)


class StockForConditionalGeneration(ModelTests, GenerationTesterMixin, unittest.TestCase):
    __test__ = False
    config_class = Qwen2_5_VLConfig
    all_model_classes = (Qwen2_5_VLForConditionalGeneration,)


class TestForConditionalGeneration(
    AgainstStock, ModelTests, GenerationTesterMixin, unittest.TestCase
):
    stock = StockForConditionalGeneration
    config_class = VideoNSAConfig
    all_model_classes = (VideoNSAForConditionalGeneration,)


class TrainingTester(ModelTester):
    def get_config(self):
        config = super().get_config()
        config.vocab_size = config.text_config.vocab_size  # where the suite reads it
        return config


class TrainingTests(TrainingTesterMixin):
    model_tester = None

    def setUp(self):
        self.model_tester = TrainingTester(self.config_class)


class StockTraining(TrainingTests, unittest.TestCase):
    __test__ = False
    config_class = Qwen2_5_VLConfig
    all_model_classes = (Qwen2_5_VLForConditionalGeneration,)


class TestTraining(AgainstStock, TrainingTests, unittest.TestCase):
    stock = StockTraining
    config_class = VideoNSAConfig
    all_model_classes = (VideoNSAForConditionalGeneration,)


class ConfigTests:
    def test_config(self):
        ConfigTester(self, self.config_class, has_text_modality=False).run_common_tests()

    def test_text_config(self):
        ConfigTester(self, self.text_config_class).run_common_tests()


class StockConfig(ConfigTests, unittest.TestCase):
    __test__ = False
    config_class = Qwen2_5_VLConfig
    text_config_class = Qwen2_5_VLTextConfig
    model_tester = ModelTester(Qwen2_5_VLConfig)


class TestConfig(AgainstStock, ConfigTests, unittest.TestCase):
    stock = StockConfig
    config_class = VideoNSAConfig
    text_config_class = VideoNSATextConfig
    model_tester = ModelTester(VideoNSAConfig)
