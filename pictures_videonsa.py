"""Pictures, loaded upright and refused by their header where too large.

`load_picture` takes what `plain_source` takes. `ImagePart` is an image of a message with what the
message says of it.
"""

import io
import os
import string
import urllib.parse
import urllib.request

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from transformers.image_utils import ChannelDimension, infer_channel_dimension_format
from transformers.utils import logging

from .message_parts_videonsa import (
    decode_base64,
    describe_source,
    is_address,
    is_animated,
    is_picture,
    plain_source,
)
from .video_plan_videonsa import check_frame_size, fit_size
from .video_settings_videonsa import read_setting, refuse_typos

logger = logging.get_logger(__name__)

# Pillow runs another program for EPS, and takes MPEG recordings for pictures that it cannot load.
NO_PICTURES = ("EPS", "MPEG")
# What a message may say of an image, as in qwen-vl-utils.
IMAGE_SETTINGS = ("min_pixels", "max_pixels", "resized_height", "resized_width")


class ImagePart:
    """An image of a message, not loaded yet, and what the message says of it.

    settings: bounds of its area, or its size, before the image processor has it; that keeps the
    bounds of its own.
    """

    def __init__(self, source, settings: dict):
        refuse_typos(settings, IMAGE_SETTINGS, "an image")
        if unknown := sorted(set(settings) - set(IMAGE_SETTINGS)):
            logger.warning_once(f"Not a setting of an image, ignored: {', '.join(unknown)}.")
        self.source = source
        self.settings = {
            name: read_setting(name, settings[name]) for name in IMAGE_SETTINGS if name in settings
        }
        if ("resized_height" in settings) != ("resized_width" in settings):
            raise ValueError("An image has resized_height or resized_width alone; give both.")

    def load(self, image_processor):
        """The picture, or the array that was given, in the size that was asked for."""
        picture = load_image_or_array(self.source)
        if getattr(picture, "ndim", 3) > 3:
            raise ValueError(
                f"An image of a message is [height, width, channels], not {list(picture.shape)}: "
                "give each in a part of its own."
            )
        if not self.settings:
            return picture
        if not isinstance(picture, Image.Image):
            raise ValueError(
                f"A message asks for {', '.join(self.settings)} of an image that is an array; give "
                "the array in that size, or a picture."
            )
        own, size = self.settings, image_processor.size
        factor = image_processor.patch_size * image_processor.merge_size
        least = own.get("min_pixels", size["shortest_edge"])
        most = own.get("max_pixels", size["longest_edge"])
        if not size["shortest_edge"] <= most or not least <= size["longest_edge"]:
            logger.warning_once(
                f"A message asks for an image of {least:,} to {most:,} pixels, but the image "
                f"processor takes {size['shortest_edge']:,} to {size['longest_edge']:,}."
            )
        height, width = picture.height, picture.width
        if "resized_height" in own:
            height, width = own["resized_height"], own["resized_width"]
        height, width = fit_size(height, width, min(least, most), most, factor)
        return picture.resize((width, height))


def as_image_part(source, settings: dict) -> ImagePart:
    """The image that a part of a message brings with these settings; it may have some already."""
    if type(source).__name__ != "ImagePart":  # by name: the loader makes copies of this class
        return ImagePart(source, settings)
    return ImagePart(source.source, {**source.settings, **settings}) if settings else source


def open_picture(source) -> Image.Image:
    """A picture of which only the header has been read.

    source: as `plain_source` takes it, or base64.

    Raises FileNotFoundError where there is no file, and ValueError for what is no picture, or one
    of more pixels than `check_frame_size` allows.
    """
    source = plain_source(source)
    name = describe_source(source)
    try:
        if isinstance(source, Image.Image):
            picture = source
        elif is_address(source):
            picture = Image.open(_fetch(source))
        else:
            picture = Image.open(_picture_file(source, name))
        if picture.format in NO_PICTURES:
            raise ValueError(f"{picture.format} is not taken")
    except FileNotFoundError:
        raise
    except Image.DecompressionBombError as error:
        raise ValueError(f"The image {name} is too large: {error} Scale it down first.") from None
    except Exception as error:  # whatever a damaged file, a server or its address makes them raise
        reason = str(error) if len(str(error)) < 300 else type(error).__name__
        if isinstance(error, UnidentifiedImageError):  # it would name the bytes by their address
            reason = "it is damaged, or of no format that Pillow reads"
        raise ValueError(
            f"{name} cannot be read as an image ({reason}): give a picture, or a video as a video."
        ) from error
    check_frame_size(picture.height, picture.width, f"the image {name}")
    return picture


def load_picture(source) -> Image.Image:
    """A picture from any source, upright, RGB, as transformers' `load_image` makes it.

    Raises ValueError for one that `open_picture` refuses, is damaged, or has no 8 bits a channel.
    """
    picture = open_picture(source)
    name = describe_source(source)
    if picture.mode == "F" or picture.mode.startswith("I"):
        kind = "floating-point numbers" if picture.mode == "F" else "numbers of more than 8 bits"
        raise ValueError(
            f"The image {name} holds {kind} (mode {picture.mode}), whose black and white are not "
            "known: convert it to 8 bits first."
        )
    if picture is not source and is_animated(picture):
        logger.warning_once(
            f"{name} holds {picture.n_frames} pictures, of which an image is the first; give it as "
            "a video for all of them."
        )
    elif picture is not source and picture.format == "TIFF" and picture.n_frames > 1:
        logger.warning_once(
            f"{name} holds {picture.n_frames} pages, of which an image is the first; give each as "
            "an image of its own for all of them."
        )
    try:
        return ImageOps.exif_transpose(picture).convert("RGB")
    except Exception as error:  # Pillow raises many kinds for a damaged file
        raise ValueError(f"The image {name} is damaged ({error}).") from error


def load_image_or_array(source):
    """A picture from any source, or an array or tensor as `checked_array` has it."""
    if isinstance(source, (np.ndarray, torch.Tensor)):
        array = as_tensor(source)
        if array.ndim not in (2, 3, 4) or not array.numel():
            raise ValueError(
                f"An image is [height, width, channels], or several in one array, not "
                f"{list(array.shape)}; give the bytes of a file as bytes."
            )
        return checked_array(array, "Images")
    return load_picture(source)


def checked_array(array: torch.Tensor, what: str) -> torch.Tensor:
    """Pixels, [..., height, width, channels] or channels first, without how transparent they are.

    Raises ValueError, which says `what` they are, for values that are not those of 8 bits.
    """
    if array.dtype == torch.bool or array.is_complex():
        raise ValueError(f"{what} are numbers from 0 to 255, not {array.dtype}.")
    if array.dtype != torch.uint8 and array.numel():
        if not array.is_floating_point():
            array = array.to(torch.int64)  # not all is defined for others
        low, high = array.min().item(), array.max().item()
        # Those that are normalized already may be below 0. NaN fails this, too.
        if not (-low <= 255 and high <= 255):
            raise ValueError(
                f"{what} hold values from {low:g} to {high:g}; they are numbers from 0 to 255."
            )
    if array.ndim < 3:
        return array
    if not {1, 3, 4} & {array.shape[-1], array.shape[-3]}:
        raise ValueError(
            f"{what} have 1, 3 or 4 channels, first or last; these are {list(array.shape)}."
        )
    kind = infer_channel_dimension_format(array, num_channels=(1, 3, 4))
    return array[..., :3] if kind == ChannelDimension.LAST else array[..., :3, :, :]


def warn_of_scale(pixels, what: str, rescale: bool, normalize: bool):
    """Says of pixels, in lists or alone, that their values are not those that the settings take.

    pixels: arrays as `checked_array` has them; pictures and files, which have 8 bits.
    rescale: values of 0 to 255 are divided by 255.  normalize: the mean of values up to 1 is taken
    off. Floating-point numbers up to 1 become almost black where they are rescaled.
    """
    if isinstance(pixels, (list, tuple)):
        for item in pixels:
            warn_of_scale(item, what, rescale, normalize)
        return
    low, high, fractions = 0, 255, False
    if isinstance(pixels, torch.Tensor) and not (rescale and pixels.dtype == torch.uint8):
        low, high = pixels.min().item(), pixels.max().item()
        fractions = pixels.is_floating_point()
    if low < 0 and (rescale or normalize):
        logger.warning_once(
            f"{what} hold values below 0, as normalized ones do, and would be normalized once "
            "more: say do_rescale=False and do_normalize=False, or give 0 to 255."
        )
    elif rescale and fractions and 0 < high <= 1:
        logger.warning_once(
            f"{what} hold floating-point numbers up to 1, which are taken for values of 0 to "
            "255 and so for almost black: say do_rescale=False, or give 0 to 255."
        )
    elif not rescale and normalize and high > 1:
        logger.warning_once(
            f"{what} hold values of 0 to 255, which do_rescale=False leaves so, but do_normalize "
            "takes values up to 1: leave do_rescale out, or say do_normalize=False too."
        )


def playable(source):
    """A path, address or bytes as FFmpeg reads it: an animated WebP becomes an animated PNG."""
    if is_address(source) or not is_picture(source):
        return source
    frames, lasting, file = [], [], io.BytesIO()
    with open_picture(source) as picture:
        if picture.format != "WEBP" or not is_animated(picture):
            return source
        for number in range(picture.n_frames):
            picture.seek(number)
            frames.append(picture.convert("RGB"))
            lasting.append(picture.info["duration"])
    options = {"save_all": True, "append_images": frames[1:], "duration": lasting}
    frames[0].save(file, "PNG", compress_level=1, **options)
    return file.getvalue()


def as_tensor(array) -> torch.Tensor:
    """An array or tensor as a tensor; a view that runs backwards or of foreign bytes is copied."""
    if isinstance(array, np.ndarray):
        array = np.ascontiguousarray(array, array.dtype.newbyteorder("="))
    return torch.as_tensor(array)


def _fetch(address):
    """What is at an address. The library's load_image would convert it before it is looked at."""
    plain = urllib.parse.quote(address, safe=string.punctuation)  # as browsers take them
    request = urllib.request.Request(plain, headers={"User-Agent": "videonsa"})
    with urllib.request.urlopen(request, timeout=60) as response:
        return io.BytesIO(response.read())


def _picture_file(source, name):
    """What Pillow opens for a path, bytes or base64."""
    if source == b"":
        raise ValueError("it is empty")
    if isinstance(source, bytes):
        return io.BytesIO(source)
    if not isinstance(source, str):
        raise TypeError("a picture is a path, an address, bytes or an open file")
    if not source:
        raise FileNotFoundError("An image was given by an empty text; give its path or address.")
    if os.path.isfile(source):
        return source
    try:
        content = decode_base64(source)
    except ValueError:
        content = b""
    if len(content) < 26:  # less than the smallest GIF: it was a name
        raise FileNotFoundError(f"There is no image file {name}.")
    return io.BytesIO(content)
