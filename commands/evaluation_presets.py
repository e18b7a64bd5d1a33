"""What benchmarks are evaluated with: settings of a video, and the presets of VideoNSA's paper."""

from dataclasses import dataclass, field

# Settings of a video's message, by the names that users of lmms-eval's models know as well.
LIMITS = (
    "fps",
    "num_frames",
    "max_frames",
    "min_pixels",
    "max_pixels",
    "total_pixels",
    "max_tokens",
)
ALIASES = {"max_num_frames": "max_frames", "nframes": "num_frames"}
TOKEN = 28 * 28  # pixels of one token; two frames share theirs


@dataclass(frozen=True)
class Preset:
    """What one benchmark was evaluated with.

    paper: from VideoNSA's table 5. released: from the code that was released with it, where the
    paper is silent. ours: neither says.
    """

    paper: dict
    released: dict = field(default_factory=dict)
    ours: dict = field(default_factory=dict)


def paper_preset(frames, tokens_per_frame, new_tokens):
    # Neither says at which rate those frames are taken: we take that many, evenly.
    return Preset(
        paper={"max_pixels": tokens_per_frame * TOKEN, "max_new_tokens": new_tokens},
        released={
            "min_pixels": min(256, tokens_per_frame) * TOKEN,
            "total_pixels": 128000 * TOKEN * 9 // 10,
        },
        ours={"num_frames": frames},
    )


PRESETS = {
    "longvideobench": paper_preset(256, 512, 32),
    "longtimescope": paper_preset(512, 128, 16),
    "timescope": paper_preset(2048, 64, 16),
    "mlvu": paper_preset(512, 128, 16),
    "vsibench": paper_preset(128, 256, 16),
    # The table's columns are swapped here: 4 is the rate, 256 the tokens per frame.
    "tomato": Preset(
        paper={"fps": 4, "max_pixels": 256 * TOKEN, "max_new_tokens": 1024},
        released={"min_pixels": 256 * TOKEN, "total_pixels": 128000 * TOKEN * 9 // 10},
        ours={"max_frames": 2048},
    ),
    "clips": Preset(
        paper={},
        ours={
            "fps": 2,
            "max_frames": 1000,
            "min_pixels": 256 * TOKEN,
            "max_pixels": 256 * TOKEN,
            "total_pixels": 128000 * TOKEN,
        },
    ),
}
