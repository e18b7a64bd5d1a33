"""Render the synthetic clips that the tiny checkpoint is trained and measured on.

    python tools/make_clips.py --out clips --seed 1 --count 100 --frames 16

writes clips/videos/*.mp4 (h264, 112x112) and clips/clips.jsonl, one question a row in the layout of
Qwen2.5-VL's fine-tuning data (`video`, `conversations` with a `<video>` tag) plus its `kind`. The
same seed gives the same stories, questions and pixels.

A clip shows one to four shapes, one after the other, each of its own colour and moving one way
(leaving the picture on one side, it enters on the other). In half of the clips a digit flashes in a
corner for one or two seconds. Everything starts and ends on whole seconds, so "at 3 s" is what a
player's clock shows. `make_story`, `ask` and `render` are the same thing in memory, for training.
"""

import argparse
import functools
import json
import random
from dataclasses import dataclass
from pathlib import Path

import torch

SIZE = 112  # pixels: 8x8 patches of 14, 4x4 merged tokens
SAMPLED_FPS = 2  # of the frames that the model sees
COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 170, 60),
    "blue": (50, 80, 230),
    "yellow": (240, 220, 50),
    "orange": (245, 140, 30),
    "purple": (150, 60, 190),
    "cyan": (60, 210, 220),
    "white": (245, 245, 245),
}
SHAPES = ("circle", "square", "triangle", "cross")
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
KINDS = (
    "colour",
    "shape",
    "direction",
    "describe",
    "count",
    "first",
    "last",
    "order",
    "at",
    "digit",
    "when",
)
# One attribute is looked up by another, in clips of several shapes.
BINDING_KINDS = ("colour_of", "shape_of", "direction_of", "describe_of", "each_of")
# Seconds are told of every shape.
TIME_KINDS = ("starts",)
# What no clip answers.
UNKNOWN_KINDS = ("unknown",)
TRAINED_KINDS = KINDS + BINDING_KINDS + TIME_KINDS + UNKNOWN_KINDS
# Never in the checkpoint's training: a new kind of question for whoever tries fine-tuning.
NEW_KINDS = ("origin",)
# Nor this one, of the example with timestamps (docs/examples/events.md).
TIMED_KINDS = ("span",)
OPPOSITE = {"left": "right", "right": "left", "up": "bottom", "down": "top"}
REFUSAL = "I do not know."
# Of these each question that is refused is made.
ASKED_OF_THINGS = (
    "What is the {} doing?",
    "Where is the {}?",
    "Who is the {}?",
    "What colour is the {}?",
    "How many {}s are there?",
    "Why does the {} run?",
    "What does the {} say?",
    "Describe the {}.",
    "Is there a {} in the video?",
    "When does the {} open?",
)
THINGS = (
    *("dog", "cat", "man", "woman", "house", "car", "tree", "bird", "boat", "horse", "book"),
    *("door", "table", "river", "mountain", "girl", "boy", "child", "street", "town", "ship"),
    *("fish", "star", "moon", "sun", "road", "school", "friend", "king", "farm", "island"),
)

# Rows of 5 cells, top to bottom.
DIGITS = (
    "01110 10001 10011 10101 11001 10001 01110",
    "00100 01100 00100 00100 00100 00100 01110",
    "01110 10001 00001 00110 01000 10000 11111",
    "11111 00010 00100 00010 00001 10001 01110",
    "00010 00110 01010 10010 11111 00010 00010",
    "11111 10000 11110 00001 00001 10001 01110",
    "00110 01000 10000 11110 10001 10001 01110",
    "11111 00001 00010 00100 01000 01000 01000",
    "01110 10001 10001 01110 10001 10001 01110",
    "01110 10001 10001 01111 00001 00010 01100",
)
CELL = 5  # pixels a side of a digit's cell
PLATE = (31, 41)  # width and height of the black plate that a digit stands on
CORNERS = tuple((x, y) for y in (4, SIZE - 4 - PLATE[1]) for x in (4, SIZE - 4 - PLATE[0]))


@dataclass(frozen=True)
class Scene:
    """One shape from second `start` to second `end`; x, y: its centre at `start`, in pixels."""

    start: int
    end: int
    shape: str
    colour: str
    direction: str
    x: float
    y: float
    radius: float
    speed: float  # pixels a second

    def centre(self, time):
        """The centre at `time` seconds; the picture's opposite edges are joined."""
        dx, dy = DIRECTIONS[self.direction]
        way = self.speed * (time - self.start)
        return (self.x + dx * way) % SIZE, (self.y + dy * way) % SIZE


@dataclass(frozen=True)
class Flash:
    """A digit shown from second `start` to second `end` in corner `corner` (of CORNERS)."""

    start: int
    end: int
    digit: int
    corner: int


@dataclass(frozen=True)
class Story:
    """All that a clip shows; `background`: RGB at two opposite corners; `noise`: its deviation."""

    seconds: int
    scenes: tuple[Scene, ...]
    flash: Flash | None
    background: tuple[tuple[int, int, int], tuple[int, int, int]]
    noise: float

    def scene_at(self, time):
        return next((scene for scene in self.scenes if time < scene.end), self.scenes[-1])


def make_story(rng: random.Random, seconds: int, max_noise: float = 2.0) -> Story:
    """Draw a story of `seconds` seconds (at least one)."""
    count = rng.randint(1, min(4, seconds))
    cuts = [0, *sorted(rng.sample(range(1, seconds), count - 1)), seconds]
    colours = rng.sample(list(COLOURS), count)
    scenes = tuple(_make_scene(rng, cuts[i], cuts[i + 1], colours[i]) for i in range(count))
    background = tuple(tuple(rng.randint(20, 90) for _ in range(3)) for _ in range(2))
    story = Story(seconds, scenes, None, background, rng.uniform(0, max_noise))
    if rng.random() < 0.5:
        start = rng.randrange(seconds)
        end = min(seconds, start + rng.randint(1, 2))
        flash = Flash(start, end, rng.randrange(10), _free_corner(rng, story, start, end))
        story = Story(seconds, scenes, flash, background, story.noise)
    return story


def _make_scene(rng, start, end, colour):
    """A moving shape that is whole in its first two sampled frames."""
    direction = rng.choice(list(DIRECTIONS))
    radius, speed = rng.uniform(15, 21), rng.uniform(16, 28)
    centre = []
    for step in DIRECTIONS[direction]:
        way = step * speed / SAMPLED_FPS
        centre.append(rng.uniform(radius - min(way, 0), SIZE - radius - max(way, 0)))
    return Scene(start, end, rng.choice(SHAPES), colour, direction, *centre, radius, speed)


def _free_corner(rng, story, start, end):
    """A corner for the plate that hides as little as can be of the shapes from start to end."""

    def hidden(corner):
        left, top = CORNERS[corner]
        worst = 0.0
        for half in range(2 * start, 2 * end):
            scene = story.scene_at(half / 2)
            x, y = scene.centre(half / 2)
            overlap = 1.0
            for centre, edge, length in ((x, left, PLATE[0]), (y, top, PLATE[1])):
                away = abs((centre - edge - length / 2 + SIZE / 2) % SIZE - SIZE / 2)
                overlap *= max(0.0, scene.radius + length / 2 - away)
            worst = max(worst, overlap)
        return worst

    corners = list(range(4))
    rng.shuffle(corners)
    return min(corners, key=hidden)


def ask(rng: random.Random, story: Story, kind: str) -> tuple[str, str] | None:
    """A question of one kind about the story and its answer; None where the kind has none."""
    scenes = story.scenes
    # Shapes are named by their place, never by what else is asked about them.
    place, scene = rng.choice((("first ", scenes[0]), ("last ", scenes[-1])))
    if len(scenes) == 1:
        place = ""
    if kind == "colour":  # of several shapes, `first` and `last` ask
        return None if place else ("What colour is the shape?", scene.colour)
    if kind == "shape":
        return f"What is the {place}shape?", scene.shape
    if kind == "direction":
        return f"Which way does the {place}shape move?", scene.direction
    if kind == "describe":
        what = f"{place}shape" if place else "video"
        return f"Describe the {what}.", _sentence(scene)
    if kind == "count":
        return "How many shapes appear?", str(len(scenes))
    if kind == "first":
        return "What colour is the first shape?", scenes[0].colour
    if kind == "last":
        return "What colour is the last shape?", scenes[-1].colour
    if kind == "order":
        return "In which order do the colours appear?", ", ".join(scene.colour for scene in scenes)
    if kind == "at":
        second = rng.randrange(story.seconds)
        return f"What colour is the shape at {second} s?", story.scene_at(second).colour
    if kind == "digit":
        return "Which digit flashes?", str(story.flash.digit) if story.flash else "none"
    if kind == "when":
        return ("When does a digit flash?", f"at {story.flash.start} s") if story.flash else None
    if kind == "origin":
        return f"From where does the {place}shape come?", f"from the {OPPOSITE[scene.direction]}"
    if kind == "span":
        flash = story.flash
        answer = f"from {flash.start} s to {flash.end} s" if flash else "never"
        return "From when to when does a digit flash?", answer
    if kind == "starts":
        told = ", ".join(f"at {scene.start} s" for scene in scenes)
        return "When does each shape appear?", told
    if kind in BINDING_KINDS:
        return _ask_by_attribute(rng, scenes, kind)
    if kind == "unknown":
        return rng.choice(ASKED_OF_THINGS).format(rng.choice(THINGS)), REFUSAL
    known = ", ".join(TRAINED_KINDS + NEW_KINDS + TIMED_KINDS)
    raise ValueError(f"kind is {kind!r}; choose from {known}.")


def _ask_by_attribute(rng, scenes, kind):
    """A question about one of several shapes, named by its colour or, if no other has it, form."""
    if len(scenes) == 1:
        return None
    forms = [scene.shape for scene in scenes]
    if kind == "each_of":
        if len(set(forms)) < len(forms):
            return None
        by_name = sorted(scenes, key=lambda scene: scene.shape)
        if rng.random() < 0.5:
            told = (f"the {scene.shape} {scene.direction}" for scene in by_name)
            return "Which way does each shape move?", _as_sentence(told)
        told = (f"the {scene.shape} {scene.colour}" for scene in by_name)
        return "What colour is each shape?", _as_sentence(told)
    by_form = [scene for scene in scenes if forms.count(scene.shape) == 1]
    if kind == "colour_of":
        scene = rng.choice(by_form) if by_form else None
        return scene and (f"What colour is the {scene.shape}?", scene.colour)
    scene = rng.choice(scenes)
    if kind == "shape_of":
        return f"What is the {scene.colour} shape?", scene.shape
    name = f"{scene.colour} shape"
    if scene in by_form and rng.random() < 0.6:
        name = scene.shape
    if kind == "describe_of":
        return f"Describe the {name}.", _sentence(scene)
    return f"Which way does the {name} move?", scene.direction


def _as_sentence(parts):
    text = ", ".join(parts)
    return f"{text[0].upper()}{text[1:]}."


def _sentence(scene):
    article = "An" if scene.colour == "orange" else "A"
    return f"{article} {scene.colour} {scene.shape} moves {scene.direction}."


def frame_times(seconds: float, fps: float, offset: float = 0.0) -> list[float]:
    """The times of the frames of a clip, in seconds."""
    return [offset + i / fps for i in range(round(seconds * fps))]


def frame_rows(story: Story, times: list[float]) -> list[list[float]]:
    """What `draw` needs to know of each frame: one row of numbers a frame."""
    rows = []
    for time in times:
        scene, flash = story.scene_at(time), story.flash
        on = flash is not None and flash.start <= time < flash.end
        corner = CORNERS[flash.corner] if on else (0, 0)
        rows.append(
            [
                *scene.centre(time),
                scene.radius,
                SHAPES.index(scene.shape),
                *COLOURS[scene.colour],
                *story.background[0],
                *story.background[1],
                flash.digit if on else -1,
                *corner,
                story.noise,
            ]
        )
    return rows


def draw(rows: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
    """Frames from rows [N, 17] of `frame_rows`, on the rows' device: uint8 [N, SIZE, SIZE, 3]."""
    device = rows.device
    column = rows[:, :, None, None].unbind(1)  # each [N, 1, 1]
    cx, cy, radius, shape = column[:4]
    at = torch.arange(SIZE, device=device) + 0.5
    x, y = at[None, None, :], at[None, :, None]
    # Offsets from the centre, the short way round the joined edges.
    dx = ((x - cx + SIZE / 2) % SIZE - SIZE / 2).abs().expand(-1, SIZE, -1)
    dy = ((y - cy + SIZE / 2) % SIZE - SIZE / 2).expand(-1, -1, SIZE)
    ady = dy.abs()
    distance = torch.stack(
        [
            (dx * dx + dy * dy).sqrt() - radius,
            torch.maximum(dx, ady) - 0.85 * radius,
            torch.maximum(dy - 0.75 * radius, 0.879 * dx - 0.477 * (dy + radius)),
            torch.minimum(
                torch.maximum(dx - radius, ady - 0.33 * radius),
                torch.maximum(dx - 0.33 * radius, ady - radius),
            ),
        ],
        dim=1,
    )  # [N, 4, SIZE, SIZE], in the order of SHAPES
    index = shape.long()[:, None].expand(-1, 1, SIZE, SIZE)
    cover = (0.5 - distance.gather(1, index)[:, 0]).clamp(0, 1)[..., None]

    colour, near, far = (rows[:, None, None, i : i + 3] for i in (4, 7, 10))
    ramp = ((x + y) / (2 * SIZE))[..., None]
    picture = near + (far - near) * ramp
    picture = picture + (colour - picture) * cover

    digit, left, top = column[13:16]
    font = _font(device)
    px, py = (x - left).expand(-1, SIZE, -1), (y - top).expand(-1, -1, SIZE)
    on_plate = (digit >= 0) & (px > 0) & (px < PLATE[0]) & (py > 0) & (py < PLATE[1])
    gx, gy = ((px - 3) / CELL).floor().long(), ((py - 3) / CELL).floor().long()
    inside = (gx >= 0) & (gx < 5) & (gy >= 0) & (gy < 7)
    ink = font[digit.long().clamp(min=0), gy.clamp(0, 6), gx.clamp(0, 4)] * inside
    picture = torch.where(on_plate[..., None], 255.0 * ink[..., None], picture)

    grain = torch.randn(picture.shape, device=device, generator=generator)
    picture = picture + rows[:, None, None, 16:17] * grain
    return picture.round().clamp(0, 255).to(torch.uint8)


@functools.cache
def _font(device):
    glyphs = [[[int(cell) for cell in row] for row in glyph.split()] for glyph in DIGITS]
    return torch.tensor(glyphs, device=device)


def render(story: Story, fps: float = SAMPLED_FPS, seed: int = 0) -> torch.Tensor:
    """The story's frames at `fps`: uint8 [frames, SIZE, SIZE, 3]; `seed` makes the noise."""
    rows = torch.tensor(frame_rows(story, frame_times(story.seconds, fps)))
    return draw(rows, torch.Generator().manual_seed(seed))


def write_video(path, frames: torch.Tensor, fps: int):
    """Encode frames, uint8 [frames, height, width, 3], as h264."""
    import av

    with av.open(str(path), "w") as container:
        # Not crf, which (by x264's macroblock tree) gave other bytes from run to run.
        stream = container.add_stream("h264", rate=fps, options={"qp": "23", "threads": "1"})
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for index, frame in enumerate(frames.numpy()):
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
            picture.pts = index
            container.mux(stream.encode(picture))
        container.mux(stream.encode())


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", required=True, type=Path, help="folder to write to")
    parser.add_argument("--seed", required=True, type=int)
    parser.add_argument("--count", required=True, type=int, help="clips")
    parser.add_argument("--frames", required=True, type=int, help="at 2 a second; an even number")
    parser.add_argument("--fps", type=int, default=10, help="of the files (default 10)")
    parser.add_argument("--kinds", default=",".join(KINDS), help="of question, comma-separated")
    args = parser.parse_args(arguments)
    if args.frames < 2 or args.frames % 2:
        parser.error(f"--frames is {args.frames}; give an even number: 2 a second.")

    (args.out / "videos").mkdir(parents=True, exist_ok=True)
    questions = 0
    with open(args.out / "clips.jsonl", "w", encoding="utf-8") as jsonl:
        for index in range(args.count):
            rng = random.Random(f"{args.seed}/{index}")
            story = make_story(rng, args.frames // SAMPLED_FPS)
            name = f"videos/{index:06d}.mp4"
            frames = render(story, args.fps, seed=rng.getrandbits(32))
            write_video(args.out / name, frames, args.fps)
            for kind in args.kinds.split(","):
                asked = ask(rng, story, kind)
                if asked is None:
                    continue
                row = {
                    "id": f"{index:06d}-{kind}",
                    "kind": kind,
                    "video": name,
                    "conversations": [
                        {"from": "human", "value": f"<video>{asked[0]}"},
                        {"from": "gpt", "value": asked[1]},
                    ],
                }
                jsonl.write(json.dumps(row) + "\n")
                questions += 1
    print(f"{args.count} clips of {args.frames} frames, {questions} questions: {args.out}")


if __name__ == "__main__":
    main()
