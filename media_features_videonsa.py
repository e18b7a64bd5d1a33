"""The images and videos of a prompt: which tokens they are, and their features, a part at a time.

A long video's patches and features would take more memory than the model. `MediaFeatures` stands
for the features and encodes the frames that a slice of them needs; `VideoNSAModel` reads a prompt
in chunks of tokens and puts in their features with `put_features`.
"""

from typing import NamedTuple

import torch

PIXELS = {"image": "pixel_values", "video": "pixel_values_videos"}


def chunks_of(length: int, size: int) -> list[tuple[int, int]]:
    """First and last (excluded) of the tokens of each chunk of a prompt of `length` tokens.

    `size` tokens each; a rest of less than an eighth of that joins the chunk before, because a
    chunk of few tokens takes the host longer than the GPU.
    """
    starts = range(0, max(1, length - size // 8), size)
    return list(zip(starts, [*starts[1:], length], strict=True))


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
        # The grid stays on the CPU, where it is read: the GPU may still run what came before.
        encoded = self.encode(pixels, torch.tensor(grid), return_dict=True)
        features = torch.cat(encoded.pooler_output)
        return features[first - starts[0] : last - starts[0]]


class PlacedFeatures(NamedTuple):
    """The features of all images, or of all videos, and the tokens that they stand at."""

    placeholders: torch.Tensor  # bool [B, S]
    before: torch.Tensor  # int64 [B, S + 1] on the CPU: placeholders before each token, of all rows
    features: torch.Tensor | MediaFeatures  # [tokens, hidden], by slices


def take_media(
    model, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None, kwargs: dict
) -> list[PlacedFeatures]:
    """The features of a call's images and of its videos, at their placeholders.

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
        mask = placeholders[modality].cpu()
        until = mask.flatten().cumsum(0).view_as(mask)
        if until[-1, -1] != len(features):
            raise ValueError(
                f"{modality.capitalize()} features and {modality} tokens do not match, tokens: "
                f"{int(until[-1, -1])}, features: {len(features)}"
            )
        if len(mask) > 1 and isinstance(features, MediaFeatures):
            features.pixels = features.pixels[:]  # batch rows take turns, a stream does not
        before = torch.cat([until[:, :1] - mask[:, :1].long(), until], dim=1)
        media.append(PlacedFeatures(placeholders[modality], before, features))
    return media


def put_features(
    embeds: torch.Tensor, media: list[PlacedFeatures], start: int, end: int
) -> torch.Tensor:
    """Embeddings [B, end - start, hidden] of the tokens from start to end, media's features in.

    media as from `take_media`; of them only what these tokens stand for is encoded.
    """
    for placeholders, before, features in media:
        pieces = [
            features[first:last].to(embeds.device, embeds.dtype)
            for first, last in before[:, [start, end]].tolist()
            if last > first
        ]
        if pieces:
            embeds = embeds.masked_scatter(placeholders[:, start:end, None], torch.cat(pieces))
    return embeds
