"""Small pictures of what the model saw, kept while its pixels pass on their way to the model.

Pixels come as rows of patches, several rows a token, two frames a temporal step; a picture is made
of the first frame of each step, as the model got it: resized, cut into the same tokens.
"""

import torch
from PIL import Image

SIDE = 160  # pixels, of the longer side of a picture that is kept


class SeenPixels:
    """Stands for the pixels of videos, a tensor or a `PixelStream`, and keeps a picture a step.

    pixels [rows, 1176]: `pixel_values_videos`.  grid int64 [videos, 3]: `video_grid_thw`.
    processor: the video processor that made them.

    pictures: a PIL image of each temporal step of all videos, None until its rows were read.
    """

    def __init__(self, pixels, grid: torch.Tensor, processor):
        self.pixels, self.processor = pixels, processor
        self.shape, self.dtype = pixels.shape, pixels.dtype
        self.steps, row = [], 0  # (first row, patches over height and width) of each step
        for time, height, width in grid.tolist():
            for _ in range(time):
                self.steps.append((row, height, width))
                row += height * width
        self.pictures = [None] * len(self.steps)

    def __len__(self):
        return len(self.pixels)

    def __getitem__(self, rows):
        """These rows, as the model asks for them."""
        taken = self.pixels[rows]
        first, last, _ = rows.indices(len(self))
        for number, (row, height, width) in enumerate(self.steps):
            inside = first <= row and row + height * width <= last
            if inside and self.pictures[number] is None:
                own = taken[row - first : row - first + height * width]
                self.pictures[number] = picture_of(own, height, width, self.processor)
        return taken

    def close(self):
        getattr(self.pixels, "close", lambda: None)()


def picture_of(rows: torch.Tensor, height: int, width: int, processor) -> Image.Image:
    """The first frame of one temporal step: rows [height * width, 1176] to a small RGB image."""
    patch, merge = processor.patch_size, processor.merge_size
    cut = (height // merge, width // merge, merge, merge, 3, -1, patch, patch)
    frame = rows.float().view(cut)[:, :, :, :, :, 0]
    frame = frame.permute(0, 2, 5, 1, 3, 6, 4).reshape(height * patch, width * patch, 3)
    frame = frame * torch.tensor(processor.image_std) + torch.tensor(processor.image_mean)
    frame = (frame * 255).round().clamp(0, 255).to(torch.uint8)
    picture = Image.fromarray(frame.numpy())
    picture.thumbnail((SIDE, SIDE))
    return picture
