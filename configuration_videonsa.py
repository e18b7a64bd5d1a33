"""Configuration of VideoNSA: Qwen2.5-VL's, with the sparse attention's fields in its text config.

`VideoNSATextConfig` holds every `nsa_*` field, because the decoder layers read them there;
`VideoNSAConfig` is the whole model's. The defaults are those of VideoNSA-7B.
"""

import math

from huggingface_hub.dataclasses import strict
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLTextConfig, configuration_utils
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
from transformers.utils import logging

logger = logging.get_logger(__name__)

BACKENDS = ("auto", "triton", "reference")
MODALITIES = ("image", "video")
SEMANTICS = ("paper", "released")
RELEASED_MASKS = ("reversed", "causal")
RELEASED_FORCED = ("own", "first_and_last_two")
TEXT_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
)
VISION_SIZES = (
    "depth",
    "hidden_size",
    "intermediate_size",
    "num_heads",
    "in_channels",
    "patch_size",
    "spatial_merge_size",
    "temporal_patch_size",
    "tokens_per_second",
    "window_size",
    "out_hidden_size",
)


@strict
class VideoNSATextConfig(Qwen2_5_VLTextConfig):
    """Qwen2.5-VL's text config and the sparse attention of the vision tokens (VideoNSA, section 2).

    nsa_enabled: False lets vision tokens attend densely, as in Qwen2.5-VL; the gates have no part.
    nsa_block_size: tokens per compressed and per selected block.
    nsa_num_selected_blocks: blocks that a query selects, its own and the forced ones counted.
    nsa_window_size: keys in the sliding window, the query itself counted.
    nsa_num_initial_blocks: a sample's first blocks, which are always selected.
    nsa_num_local_blocks: blocks that end with the query's own and are always selected.
    nsa_gate_temperature: divisor of the gates' logits before the sigmoid.
    nsa_modalities: which placeholders are vision tokens: "image", "video" or both.
    nsa_semantics: "paper" is the method as published; "released" is what the original's code
        computes (nsa_released.py), for the weights that were trained with it.
    nsa_released_mask: which block means a query sees under "released": "reversed" is the original's
        code as it stands, and as it stood but for half an hour; "causal" was that half hour's. The
        weights are older than both, so the one that lasted is the likelier.
    nsa_released_forced: which blocks are sure of a place there: "own" as in the copy of
        flash-linear-attention that the original brings along to evaluate with; "first_and_last_two"
        as in that library's version 0.3.1, which its instructions for training may have installed.
    nsa_backend: "auto" (Triton on a CUDA device, the reference elsewhere), "triton", "reference".
        Under "released", the compressed branch and the choice of blocks are PyTorch with each.
    """

    model_type = "videonsa_text"
    base_model_tp_plan = {
        **Qwen2_5_VLTextConfig.base_model_tp_plan,
        "layers.*.self_attn.g_proj_2": "colwise",
    }

    vocab_size: int = 152064
    hidden_size: int = 3584
    intermediate_size: int = 18944
    num_hidden_layers: int = 28
    num_attention_heads: int = 28
    num_key_value_heads: int | None = 4
    max_position_embeddings: int = 128000
    rms_norm_eps: float = 1e-06
    max_window_layers: int | None = 28

    nsa_enabled: bool = True
    nsa_block_size: int = 64
    nsa_num_selected_blocks: int = 32
    nsa_window_size: int = 256
    nsa_num_initial_blocks: int = 0
    nsa_num_local_blocks: int = 1
    nsa_gate_temperature: float | int = 0.3
    nsa_modalities: list[str] | tuple[str, ...] | str = MODALITIES
    nsa_semantics: str = "paper"
    nsa_released_mask: str = "reversed"
    nsa_released_forced: str = "own"
    nsa_backend: str = "auto"

    def convert_rope_params_to_dict(self, **kwargs):
        kwargs = super().convert_rope_params_to_dict(**kwargs)
        # Qwen2.5-VL splits the rotary pairs of a head 2 : 3 : 3 over time, height and width.
        pairs = self.hidden_size // self.num_attention_heads // 2
        side = 3 * pairs // 8
        self.rope_parameters.setdefault("mrope_section", [pairs - 2 * side, side, side])
        return kwargs

    def __post_init__(self, **kwargs):
        _check_names(kwargs)
        _check_sizes(self, TEXT_SIZES)  # before anything is divided by them
        super().__post_init__(**kwargs)
        if isinstance(self.nsa_modalities, str):
            self.nsa_modalities = [self.nsa_modalities]
        self.nsa_modalities = list(self.nsa_modalities)
        self.validate_nsa()

    def validate_nsa(self):
        """Raise ValueError where fields are invalid or inconsistent.

        Called at construction, by `validate` and when a model is made, after fields were set.
        """
        self._validate_branches()
        self._validate_heads()
        if self.attention_dropout:
            raise ValueError(
                f"attention_dropout is {self.attention_dropout}; the sparse branches have no "
                "dropout, so it must be 0."
            )
        if "sliding_attention" in self.layer_types:
            raise ValueError(
                "use_sliding_window limits what text sees, which VideoNSA does not do: its text is "
                "dense over all earlier tokens. Set use_sliding_window to false; "
                "nsa_window_size is the window of the vision tokens."
            )

    def _validate_branches(self):
        _check_sizes(self, ("nsa_block_size", "nsa_num_selected_blocks", "nsa_window_size"))
        _check_sizes(self, ("nsa_num_initial_blocks",), least=0)
        _check_sizes(self, ("nsa_num_local_blocks",))
        _check_positive("nsa_gate_temperature", self.nsa_gate_temperature, 0.3)
        forced = self.nsa_num_initial_blocks + self.nsa_num_local_blocks
        if forced > self.nsa_num_selected_blocks:
            raise ValueError(
                f"nsa_num_initial_blocks ({self.nsa_num_initial_blocks}) and nsa_num_local_blocks "
                f"({self.nsa_num_local_blocks}) force {forced} blocks, more than "
                f"nsa_num_selected_blocks ({self.nsa_num_selected_blocks}) selects. "
                "Select more blocks or force fewer."
            )
        _check_choice("nsa_semantics", self.nsa_semantics, SEMANTICS)
        _check_choice("nsa_released_mask", self.nsa_released_mask, RELEASED_MASKS)
        _check_choice("nsa_released_forced", self.nsa_released_forced, RELEASED_FORCED)
        if self.nsa_semantics == "released":
            self._validate_released()
        _check_choice("nsa_backend", self.nsa_backend, BACKENDS)
        if not self.nsa_modalities:
            raise ValueError(f"nsa_modalities is empty; name at least one of {MODALITIES}.")
        for modality in self.nsa_modalities:
            _check_choice("nsa_modalities", modality, MODALITIES)

    def _validate_released(self):
        """What the original's code cannot do, or does not ask."""
        forced = (self.nsa_num_initial_blocks, self.nsa_num_local_blocks)
        if forced != (0, 1) or set(self.nsa_modalities) != set(MODALITIES):
            raise ValueError(
                f"nsa_num_initial_blocks, nsa_num_local_blocks and nsa_modalities are {forced[0]}, "
                f"{forced[1]} and {self.nsa_modalities}, which nothing reads when nsa_semantics is "
                "'released': leave them at 0, 1 and both modalities. nsa_released_forced says "
                "which blocks are forced there."
            )
        size, count = self.nsa_block_size, self.nsa_num_selected_blocks
        most = size if self.nsa_released_forced == "own" else size // 2
        if size & (size - 1) or count > most:
            raise ValueError(
                f"nsa_block_size is {size} and nsa_num_selected_blocks {count}; when nsa_semantics "
                "is 'released', the first must be a power of two, and the second at most that size "
                "(half of it with nsa_released_forced='first_and_last_two')."
            )

    def _validate_heads(self):
        _check_sizes(self, TEXT_SIZES)
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads ({self.num_attention_heads}) must be a multiple of "
                f"num_key_value_heads ({self.num_key_value_heads})."
            )
        if self.hidden_size % (2 * self.num_attention_heads):
            raise ValueError(
                f"hidden_size ({self.hidden_size}) must be an even number of features for each of "
                f"num_attention_heads ({self.num_attention_heads})."
            )
        _check_positive("rms_norm_eps", self.rms_norm_eps, 1e-6)
        _check_positive("rope_theta", self.rope_parameters["rope_theta"], self.default_theta)
        pairs = self.hidden_size // self.num_attention_heads // 2
        section = self.rope_parameters["mrope_section"]
        if len(section) != 3 or min(section) < 0 or sum(section) != pairs:
            raise ValueError(
                f"mrope_section is {section}; wanted three numbers, for time, height and width, "
                f"that add up to {pairs}, half of the features of a head."
            )


def _check_names(fields):
    known = _split_nsa(VideoNSATextConfig.__annotations__)[0]
    if unknown := sorted(_split_nsa(fields)[0].keys() - known.keys()):
        raise ValueError(f"there is no {', '.join(unknown)}; choose from {', '.join(known)}.")


def _check_sizes(config, names, least=1):
    for name in names:
        value = getattr(config, name)
        if isinstance(value, int) and value < least:
            raise ValueError(f"{name} is {value}; it must be at least {least}.")


def _check_positive(name, value, usual):
    if not 0 < value < math.inf:  # NaN is neither
        raise ValueError(
            f"{name} is {value}; it must be positive and finite (the published model uses {usual})."
        )


def _check_choice(name, value, choices):
    if value not in choices:
        raise ValueError(f"{name} holds {value!r}; choose from {', '.join(map(repr, choices))}.")


def _described(config_class):
    """A sub-config's class as the library wants it; 5.20 makes no SubConfigSpec of one itself."""
    spec = getattr(configuration_utils, "SubConfigSpec", None)
    return config_class if spec is None else spec(config_class=config_class)


@strict
class VideoNSAConfig(Qwen2_5_VLConfig):
    """Qwen2.5-VL's configuration with a `VideoNSATextConfig`, which holds every `nsa_*` field.

    `nsa_*` fields that are given to it, or to `from_pretrained`, go to the text config.
    quantize_vision_tower: whether the vision tower is quantised with the language model, where a
        quantization_config asks for that; gates and head never are.
    """

    model_type = "videonsa"
    # Older transformers read `sub_configs`, newer ones `sub_configs_defaults`.
    sub_configs = {"vision_config": Qwen2_5_VLVisionConfig, "text_config": VideoNSATextConfig}
    sub_configs_defaults = {name: _described(kind) for name, kind in sub_configs.items()}

    quantize_vision_tower: bool = False

    def __post_init__(self, **kwargs):
        nsa, kwargs = _split_nsa(kwargs)
        _check_names(nsa)
        if isinstance(self.text_config, dict):
            self.text_config = {**self.text_config, **nsa}
        elif self.text_config is None:
            kwargs |= nsa  # a flat layout, of which stock makes a text config
        elif nsa:
            self.text_config = type(self.text_config)(**{**self.text_config.to_dict(), **nsa})
        super().__post_init__(**kwargs)
        _check_sizes(self.vision_config, VISION_SIZES)
        if self.image_token_id == self.video_token_id:
            raise ValueError(
                f"image_token_id and video_token_id are both {self.image_token_id}; images and "
                "videos need placeholders of their own."
            )

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        """Stock, but for `nsa_*` among kwargs, which replace those of the text config."""
        nsa, kwargs = _split_nsa(kwargs)
        _announce_semantics(config_dict, nsa.get("nsa_semantics"))
        _check_tower(config_dict, kwargs.get("quantize_vision_tower"))
        return super().from_dict({**config_dict, **nsa}, **kwargs)


def _announce_semantics(config_dict, asked):
    """Say so where weights are to run with other semantics than they were trained with."""
    text = config_dict.get("text_config") or {}
    own = {"nsa_semantics": "paper", **text, **config_dict}["nsa_semantics"]
    if asked not in (None, own):
        logger.warning(
            f"these weights were trained with nsa_semantics={own!r}; as asked for, they run with "
            f"{asked!r}."
        )


def _check_tower(config_dict, asked):
    """Raise ValueError where weights that are quantised already are not as asked for."""
    own = config_dict.get("quantize_vision_tower", False)
    if config_dict.get("quantization_config") is not None and asked not in (None, own):
        raise ValueError(
            f"quantize_vision_tower is {asked}, and this checkpoint was quantised and saved with "
            f"{own}: its vision tower can only be loaded as it was saved. Leave "
            "quantize_vision_tower away, or quantise the 16-bit weights anew."
        )


def _split_nsa(kwargs):
    """(fields of the sparse attention, the others)"""
    nsa = {name: value for name, value in kwargs.items() if name.startswith("nsa_")}
    return nsa, {name: value for name, value in kwargs.items() if name not in nsa}


VideoNSAConfig.register_for_auto_class()
