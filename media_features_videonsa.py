"""The images and videos of a prompt: which tokens they are, and their features, a part at a time.

A long video's patches and features would take more memory than the model. `MediaFeatures` stands
for the features and encodes the frames that a slice of them needs; `VideoNSAModel` reads a prompt
in chunks of tokens and puts in their features with `put_features`.
"""

import torch

PIXELS = {"image": "pixel_values", "video": "pixel_values_videos"}

_HOW_TO_CALL = (
    "Pass pixels, grids and input_ids as the processor returned them together. With a cache, "
    "generate takes the media of the whole conversation or of the new turn, and forward those of "
    "the new tokens alone."
)

# Tokens of a longer prompt with images or videos that `generate` reads at a time.
PREFILL_CHUNK_SIZE = 16384


def check_chunk_size(size) -> None:
    """Raise ValueError unless a prompt can be cut into chunks of `size` tokens; None cuts none."""
    if size is not None and (type(size) is not int or size < 1):
        raise ValueError(
            f"prefill_chunk_size (of generate; nsa_chunk_size of forward) is {size!r}; wanted a "
            "whole number of tokens, at least 1, or None."
        )


def has_media(kwargs: dict) -> bool:
    """Whether a call brings images or videos, as pixels or as features that are encoded already."""
    encoded = kwargs.get("mm_encoder_outputs") or {}
    given = [kwargs.get(pixels) for pixels in PIXELS.values()] + list(encoded.values())
    return any(x is not None for x in given)


def placeholders_of(
    model, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None
) -> dict[str, torch.Tensor]:
    """bool [B, S] by modality: the tokens that stand for images and for videos.

    Without ids they are the embeddings of the placeholders, as in stock Qwen2.5-VL.
    """
    if input_ids is not None:
        return {kind: input_ids == getattr(model.config, f"{kind}_token_id") for kind in PIXELS}
    masks = model.get_placeholder_mask(None, inputs_embeds=inputs_embeds)
    return {kind: mask.squeeze(-1) for kind, mask in zip(PIXELS, masks, strict=True)}


def check_pixels(config, call: dict) -> None:
    """Raise ValueError unless the pixels and grids among a call's arguments fit each other.

    Pixels are [patches, pixels of a patch], grids int64 [media, 3], patches over time, height and
    width; the patches of all images, or of all videos, follow each other.
    """
    vision = config.vision_config
    width = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    for modality, name in PIXELS.items():
        pixels, grid = call.get(name), call.get(f"{modality}_grid_thw")
        if pixels is None:
            continue
        if grid is None:
            raise ValueError(f"{name} came without {modality}_grid_thw. {_HOW_TO_CALL}")
        whole = torch.is_tensor(grid) and not grid.is_floating_point()
        if not whole or grid.ndim != 2 or not len(grid) or grid.shape[1] != 3:
            kind = grid.dtype if torch.is_tensor(grid) else type(grid).__name__
            raise ValueError(
                f"{modality}_grid_thw is {_shape(grid)} of {kind}; wanted an integer tensor "
                f"[{modality}s, 3] of patches over time, height and width. {_HOW_TO_CALL}"
            )
        grid = grid.cpu()
        odd = (grid < 1).any(1) | (grid[:, 1:] % vision.spatial_merge_size).any(1)
        if odd.any():
            raise ValueError(
                f"{modality}_grid_thw holds {grid[odd][0].tolist()}; wanted at least one temporal "
                f"step, and a height and width in multiples of {vision.spatial_merge_size} patches."
                f" {_HOW_TO_CALL}"
            )
        wanted = [int(grid.prod(-1).sum()), width]
        if _shape(pixels) != wanted:
            raise ValueError(
                f"{name} is {_shape(pixels)}, but {modality}_grid_thw ({len(grid)} {modality}s) "
                f"stands for {wanted}: {wanted[0]} patches of {width} numbers. {_HOW_TO_CALL}"
            )


def _shape(x):
    return list(x.shape) if hasattr(x, "shape") else f"a {type(x).__name__}"


def check_media(model, call: dict, cached: int | torch.Tensor) -> None:
    """Raise ValueError unless a call's images and videos fit their placeholders in its tokens.

    cached: tokens in the cache. With some, grids of earlier turns may come without their pixels, as
    `generate` passes them while it decodes.
    """
    check_pixels(model.config, call)
    encoded = call.get("mm_encoder_outputs") or {}
    grids = {kind: call.get(f"{kind}_grid_thw") for kind in PIXELS if encoded.get(kind) is None}
    grids = {kind: grid for kind, grid in grids.items() if grid is not None}
    first = not torch.is_tensor(cached) and cached == 0
    if not (has_media(call) or (first and grids)):
        return
    placeholders = placeholders_of(model, call.get("input_ids"), call.get("inputs_embeds"))
    for kind, grid in grids.items():
        found = int(placeholders[kind].sum())
        tokens = int(grid.prod(-1).sum()) // model.config.vision_config.spatial_merge_size**2
        if call.get(PIXELS[kind]) is None:
            if found:
                raise ValueError(f"{kind}_grid_thw came without {PIXELS[kind]}. {_HOW_TO_CALL}")
        elif found != tokens:
            raise ValueError(
                f"the {len(grid)} {kind}s given have {tokens} tokens, but the new tokens hold "
                f"{found} placeholders of {kind}s. {_HOW_TO_CALL}"
            )


class MediaFeatures:
    """Features of images or videos, [tokens, hidden], encoded when a slice of them is read.

    encode: `get_image_features` or `get_video_features` of the model.
    pixels: the rows that it takes, a tensor or a `PixelStream`; they may lie on another device.
    grid: int64 [media, 3], patches over time, height and width.
    patches: of a token.
    device: where to encode.
    """

    def __init__(self, encode, pixels, grid, patches, device):
        self.encode, self.pixels, self.grid = encode, pixels, grid.tolist()
        self.patches, self.device = patches, device

    def __len__(self):
        return sum(time * height * width for time, height, width in self.grid) // self.patches

    def __getitem__(self, tokens):
        """Encodes the temporal steps that hold these tokens; frames do not see each other."""
        first, last, _ = tokens.indices(len(self))
        starts, grid, position = [], [], 0  # position: the tokens of earlier images or videos
        for time, height, width in self.grid:
            step = height * width // self.patches  # tokens of a temporal step
            start = max((first - position) // step, 0)
            end = min(-((position - last) // step), time)
            if start < end:
                starts.append(position + start * step)
                grid.append([end - start, height, width])
            position += time * step
        row = starts[0] * self.patches
        rows = sum(time * height * width for time, height, width in grid)
        pixels = torch.as_tensor(self.pixels[row : row + rows]).to(self.device)
        grid = torch.tensor(grid, device=pixels.device)
        features = torch.cat(self.encode(pixels, grid, return_dict=True).pooler_output)
        return features[first - starts[0] : last - starts[0]]


def take_media(
    model, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None, kwargs: dict
) -> list[tuple[torch.Tensor, torch.Tensor | MediaFeatures]]:
    """Pairs of placeholders, bool [B, S], and their features, [tokens, hidden] by slices.

    Takes what describes the images and videos out of kwargs. Raises ValueError where features that
    were encoded before are more or fewer than their placeholders.
    """
    encoded = kwargs.pop("mm_encoder_outputs", None) or {}
    encode = {"image": model.get_image_features, "video": model.get_video_features}
    placeholders = placeholders_of(model, input_ids, inputs_embeds)
    device = (inputs_embeds if input_ids is None else input_ids).device
    media = []
    for modality, pixels in PIXELS.items():
        pixels, grid = kwargs.pop(pixels, None), kwargs.pop(f"{modality}_grid_thw", None)
        if encoded.get(modality) is not None:
            features = torch.cat(encoded[modality].pooler_output)
        elif pixels is not None:
            patches = model.visual.spatial_merge_size**2
            features = MediaFeatures(encode[modality], pixels, grid, patches, device)
        else:
            continue
        mask = placeholders[modality]
        if mask.sum() != len(features):
            raise ValueError(
                f"{modality.capitalize()} features and {modality} tokens do not match, tokens: "
                f"{int(mask.sum())}, features: {len(features)}"
            )
        if len(mask) > 1 and isinstance(features, MediaFeatures):
            features.pixels = features.pixels[:]  # batch rows take turns, a stream does not
        media.append((mask, features))
    return media


def put_features(embeds: torch.Tensor, media: list, start: int, end: int) -> torch.Tensor:
    """Embeddings [B, end - start, hidden] of the tokens from start to end, media's features in.

    media as from `take_media`; of them only what these tokens stand for is encoded.
    """
    for placeholders, features in media:
        here = placeholders[:, start:end]
        if not here.any():
            continue
        counts = placeholders.sum(1)
        firsts = counts.cumsum(0) - counts + placeholders[:, :start].sum(1)
        lasts = firsts + here.sum(1)
        pieces = [
            features[first:last].to(embeds.device, embeds.dtype)
            for first, last in zip(firsts.tolist(), lasts.tolist(), strict=True)
            if last > first
        ]
        embeds = embeds.masked_scatter(here[..., None], torch.cat(pieces))
    return embeds
