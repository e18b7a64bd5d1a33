"""Conversations as the OpenAI API writes them, which vLLM and the checkpoint's processor read."""

import base64
import io

from PIL import Image

from widen_checkpoint import ROOT

CLIPS = ROOT / "examples" / "clips"


def ask(*parts):
    """A conversation of one question: clips by name or path, pictures by `picture`, and text."""
    return [{"role": "user", "content": [part_of(part) for part in parts]}]


def part_of(part: str) -> dict:
    if part.endswith(".mp4"):
        return {"type": "video_url", "video_url": {"url": (CLIPS / part).as_uri()}}
    if part.startswith("data:"):
        kind = part.removeprefix("data:").partition("/")[0] + "_url"
        return {"type": kind, kind: {"url": part}}
    return {"type": "text", "text": part}


def picture(colour: str, size=(112, 84)) -> str:
    file = io.BytesIO()
    Image.linear_gradient("L").resize(size).convert("RGB").save(file, "PNG")
    image = Image.blend(Image.open(file).convert("RGB"), Image.new("RGB", size, colour), 0.6)
    image.save(file := io.BytesIO(), "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def clip(name: str) -> str:
    """A clip's bytes in the message itself."""
    data = base64.b64encode((CLIPS / name).read_bytes()).decode()
    return f"data:video/mp4;base64,{data}"
