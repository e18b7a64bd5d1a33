"""Tiny models with random weights, and prompts made of text, images and videos."""

import itertools

import torch
from transformers import Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLConfig
from videonsa.configuration_videonsa import VideoNSAConfig
from videonsa.modeling_videonsa import VideoNSAForConditionalGeneration

PAD, IMAGE, VIDEO, VISION_START, VISION_END, FIRST_WORD = 0, 1, 2, 3, 4, 5
GROUPS = [(4, 4), (14, 2), (16, 2), (16, 1)]  # G = 1, 7, 8, 16


def config_fields(heads=14, kv_heads=2, head_dim=8, **nsa):
    """Fields of a tiny config; the sparse branches are sparse at a dozen tokens."""
    text = {
        "vocab_size": 64,
        "hidden_size": heads * head_dim,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": 4096,
        "initializer_range": 0.3,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1000.0,
            "mrope_section": [head_dim // 4, head_dim // 8, head_dim // 8],
        },
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": PAD,
    }
    text |= {"nsa_block_size": 4, "nsa_num_selected_blocks": 2, "nsa_window_size": 5} | nsa
    vision = {
        "depth": 2,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_heads": 2,
        "out_hidden_size": heads * head_dim,
        "window_size": 56,
        "fullatt_block_indexes": [1],
        "tokens_per_second": 2,
        "initializer_range": 0.3,
    }
    ids = {
        "image_token_id": IMAGE,
        "video_token_id": VIDEO,
        "vision_start_token_id": VISION_START,
        "vision_end_token_id": VISION_END,
    }
    return {"text_config": text, "vision_config": vision, **ids}


def make_model(heads=14, kv_heads=2, dtype=torch.float32, seed=0, **fields):
    """A VideoNSA model in eval mode; `fields` as for `config_fields`."""
    torch.manual_seed(seed)
    config = VideoNSAConfig(**config_fields(heads, kv_heads, **fields))
    model = VideoNSAForConditionalGeneration._from_config(config, dtype=dtype)
    return model.eval()


def stock_twin(model):
    """Stock Qwen2.5-VL with the weights of `model`, its gates left out."""
    text, vision = model.config.text_config.to_dict(), model.config.vision_config.to_dict()
    text = {k: v for k, v in text.items() if not k.startswith("nsa_") and k != "model_type"}
    ids = {k: v for k, v in model.config.to_dict().items() if k.endswith("token_id")}
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, **ids)
    twin = Qwen2_5_VLForConditionalGeneration._from_config(config, dtype=model.dtype)
    missing, unexpected = twin.load_state_dict(model.state_dict(), strict=False)
    assert not missing and all(".g_proj_" in key for key in unexpected)
    return twin.eval()


class Prompts:
    """Makes rows of ids and the pixels that belong to them; equal arguments give equal pixels.

    A row is a list of ints (so many words of text) and tuples: ("image", h, w) or
    ("video", t, h, w) in merged tokens.
    """

    def __init__(self, seed=0):
        self.generator = torch.Generator().manual_seed(seed)
        self.pixels = {}

    def words(self, count):
        return torch.randint(FIRST_WORD, 64, (count,), generator=self.generator).tolist()

    def row(self, *parts):
        """(ids, media) of one row; media are (modality, grid, pixels)."""
        ids, media = [], []
        for part in parts:
            if isinstance(part, int):
                ids += self.words(part)
                continue
            modality, *grid = part
            time, height, width = grid if modality == "video" else (1, *grid)
            token = VIDEO if modality == "video" else IMAGE
            ids += [VISION_START, *[token] * (time * height * width), VISION_END]
            patches = time * height * width * 4
            pixels = torch.randn(patches, 3 * 2 * 14 * 14, generator=self.generator)
            media.append((modality, [time, 2 * height, 2 * width], pixels))
        return ids, media

    def batch(self, *rows, seconds=1.0, device="cpu"):
        """The processor's output for rows as `row` returns them, padded on the left."""
        length = max(len(ids) for ids, _ in rows)
        ids = [[PAD] * (length - len(ids)) + ids for ids, _ in rows]
        mask = [[0] * (length - len(ids)) + [1] * len(ids) for ids, _ in rows]
        inputs = {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}
        inputs["mm_token_type_ids"] = (inputs["input_ids"] == IMAGE).int()
        inputs["mm_token_type_ids"] += 2 * (inputs["input_ids"] == VIDEO).int()
        media = list(itertools.chain.from_iterable(media for _, media in rows))
        for modality, name in (("image", "pixel_values"), ("video", "pixel_values_videos")):
            own = [(grid, pixels) for kind, grid, pixels in media if kind == modality]
            if own:
                inputs[name] = torch.cat([pixels for _, pixels in own])
                inputs[f"{modality}_grid_thw"] = torch.tensor([grid for grid, _ in own])
                if modality == "video":
                    inputs["second_per_grid_ts"] = torch.full((len(own),), seconds)
        return {name: value.to(device) for name, value in inputs.items()}
