"""Configuration of VideoNSA: Qwen2.5-VL's, with the sparse attention's fields in its text config.

`VideoNSATextConfig` holds every `nsa_*` field, because the decoder layers read them there;
`VideoNSAConfig` is the whole model's. The defaults are those of VideoNSA-7B.
"""

from huggingface_hub.dataclasses import strict
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLTextConfig
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig

BACKENDS = ("auto", "triton", "reference")
MODALITIES = ("image", "video")
SEMANTICS = ("paper",)


@strict
class VideoNSATextConfig(Qwen2_5_VLTextConfig):
    """Qwen2.5-VL's text config and the sparse attention of the vision tokens (VideoNSA, section 2).

    nsa_enabled: False lets vision tokens attend densely, as in Qwen2.5-VL; the gates have no part.
    nsa_block_size: tokens per compressed and per selected block.
    nsa_num_selected_blocks: blocks that a query selects, its own and the forced ones counted.
    nsa_window_size: keys in the sliding window, the query itself counted.
    nsa_num_initial_blocks: first blocks of the stream that are always selected.
    nsa_num_local_blocks: blocks that end with the query's own and are always selected.
    nsa_gate_temperature: divisor of the gates' logits before the sigmoid.
    nsa_modalities: which placeholders are vision tokens: "image", "video" or both.
    nsa_semantics: "paper" is the method as published.
    nsa_backend: "auto" (Triton on a CUDA device, the reference elsewhere), "triton", "reference".
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
    nsa_gate_temperature: float = 0.3
    nsa_modalities: list[str] | tuple[str, ...] = MODALITIES
    nsa_semantics: str = "paper"
    nsa_backend: str = "auto"

    def convert_rope_params_to_dict(self, **kwargs):
        kwargs = super().convert_rope_params_to_dict(**kwargs)
        # Qwen2.5-VL splits the rotary pairs of a head 2 : 3 : 3 over time, height and width.
        pairs = self.hidden_size // self.num_attention_heads // 2
        side = 3 * pairs // 8
        self.rope_parameters.setdefault("mrope_section", [pairs - 2 * side, side, side])
        return kwargs

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        self.nsa_modalities = list(self.nsa_modalities)
        self._check_nsa()

    def _check_nsa(self):
        for name, least in (
            ("nsa_block_size", 1),
            ("nsa_num_selected_blocks", 1),
            ("nsa_window_size", 1),
            ("nsa_num_initial_blocks", 0),
            ("nsa_num_local_blocks", 1),
        ):
            value = getattr(self, name)
            if value < least:
                raise ValueError(f"{name} is {value}; it must be at least {least}.")
        if self.nsa_gate_temperature <= 0:
            raise ValueError(
                f"nsa_gate_temperature is {self.nsa_gate_temperature}; it must be positive "
                "(the published model uses 0.3)."
            )
        forced = self.nsa_num_initial_blocks + self.nsa_num_local_blocks
        if forced > self.nsa_num_selected_blocks:
            raise ValueError(
                f"nsa_num_initial_blocks ({self.nsa_num_initial_blocks}) and nsa_num_local_blocks "
                f"({self.nsa_num_local_blocks}) force {forced} blocks, more than "
                f"nsa_num_selected_blocks ({self.nsa_num_selected_blocks}) selects. "
                "Select more blocks or force fewer."
            )
        _check_choice("nsa_semantics", self.nsa_semantics, SEMANTICS)
        _check_choice("nsa_backend", self.nsa_backend, BACKENDS)
        if not self.nsa_modalities:
            raise ValueError(f"nsa_modalities is empty; name at least one of {MODALITIES}.")
        for modality in self.nsa_modalities:
            _check_choice("nsa_modalities", modality, MODALITIES)
        if self.attention_dropout:
            raise ValueError(
                f"attention_dropout is {self.attention_dropout}; the sparse branches have no "
                "dropout, so it must be 0."
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads ({self.num_attention_heads}) must be a multiple of "
                f"num_key_value_heads ({self.num_key_value_heads})."
            )
        if "sliding_attention" in self.layer_types:
            raise ValueError(
                "use_sliding_window limits what text sees, which VideoNSA does not do: its text is "
                "dense over all earlier tokens. Set use_sliding_window to false; "
                "nsa_window_size is the window of the vision tokens."
            )


def _check_choice(name, value, choices):
    if value not in choices:
        raise ValueError(f"{name} holds {value!r}; choose from {', '.join(map(repr, choices))}.")


@strict
class VideoNSAConfig(Qwen2_5_VLConfig):
    """Qwen2.5-VL's configuration with a `VideoNSATextConfig`; every `nsa_*` field is in it."""

    model_type = "videonsa"
    # Older transformers read `sub_configs`, newer ones (5.23 on) `sub_configs_defaults`.
    sub_configs = {"vision_config": Qwen2_5_VLVisionConfig, "text_config": VideoNSATextConfig}
    sub_configs_defaults = dict(sub_configs)


VideoNSAConfig.register_for_auto_class()
