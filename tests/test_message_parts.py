"""The forms that people write messages and media in: taken as meant, or refused by name."""

import base64
import dataclasses
import functools
import http.server
import io
import tempfile
import threading
import traceback
import types

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor
from transformers.utils import logging
from videonsa.message_parts_videonsa import (
    describe_source,
    frames_in_folder,
    plain_source,
    read_messages,
    read_part,
)
from videonsa.pictures_videonsa import load_picture
from videonsa.processing_videonsa import CAN_SANITIZE

import clips
from paths import ROOT
from test_video_reading import frames_of


@pytest.fixture(scope="module")
def processor():
    return AutoProcessor.from_pretrained(ROOT, trust_remote_code=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A clip of 5 s, a picture, and frames 1 to 12 without zeros before their numbers."""
    folder = tmp_path_factory.mktemp("media")
    clips.write_clip(folder / "clip.mp4", 50)
    clips.write_clip(folder / "my clip #1.mp4", 50)
    Image.fromarray(clips.frame_image(3, 56, 84)).save(folder / "picture.png")
    (folder / "frames").mkdir()
    for number in range(1, 13):
        picture = Image.fromarray(clips.frame_image(number, 56, 84))
        picture.save(folder / "frames" / f"frame{number}.png")
    (folder / "frames" / "notes.txt").write_text("no picture")
    return folder


@pytest.fixture(autouse=True)
def fresh_notices():
    logging.warning_once.cache_clear()


def message(*parts):
    return [{"role": "user", "content": [*parts, {"type": "text", "text": "What is shown?"}]}]


def take(processor, messages, **kwargs):
    return processor.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_tensors="pt", processor_kwargs=kwargs
    )


def assert_same(processor, messages, expected):
    out = take(processor, messages)
    assert out.keys() == expected.keys()
    for key in out:
        assert torch.equal(torch.as_tensor(out[key]), torch.as_tensor(expected[key])), key


def data_uri(path, kind):
    return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"


FORMS = [
    lambda kind, path: {"type": f"{kind}_url", f"{kind}_url": {"url": path}},
    lambda kind, path: {"type": f"{kind}_url", f"{kind}_url": {"url": path, "detail": "auto"}},
    lambda kind, path: {"type": f"{kind}_url", f"{kind}_url": path},
    lambda kind, path: {"type": f"input_{kind}", f"{kind}_url": path},
    lambda kind, path: {"type": f"input_{kind}", f"input_{kind}": path},
    lambda kind, path: {"type": kind, "url": path},
    lambda kind, path: {"type": kind, "path": path, "url": None},
    lambda kind, path: {kind: path},
    lambda kind, path: {"type": kind, kind: path, "text": None, "image_url": None, "fps": None},
    lambda kind, path: {"type": kind, kind: {"path": path, "bytes": None}},
    lambda kind, path: {"type": kind, kind: {"path": "x", "bytes": open(path, "rb").read()}},
    lambda kind, path: {"type": kind, "path": "x", "bytes": open(path, "rb").read()},
    lambda kind, path: {"type": kind, "bytes": base64.b64encode(open(path, "rb").read()).decode()},
    lambda kind, path: {
        "type": kind,
        "source": {
            "type": "base64",
            "media_type": "x/y",
            "data": base64.b64encode(open(path, "rb").read()).decode(),
        },
    },
]


@pytest.mark.parametrize("form", range(len(FORMS)))
@pytest.mark.parametrize("kind", ["image", "video"])
def test_a_medium_is_taken_in_every_form_of_its_part(processor, folder, kind, form):
    path = str(folder / {"image": "picture.png", "video": "clip.mp4"}[kind])
    expected = take(processor, message({"type": kind, kind: path}))
    assert_same(processor, message(FORMS[form](kind, path)), expected)


SOURCES = {
    "a path": lambda path, kind: path,
    "file://": lambda path, kind: f"file://{path}",
    "file:///%20": lambda path, kind: path.as_uri(),
    "file://localhost": lambda path, kind: path.as_uri().replace("file://", "file://localhost"),
    "bytes": lambda path, kind: path.read_bytes(),
    "bytearray": lambda path, kind: bytearray(path.read_bytes()),
    "BytesIO at its end": lambda path, kind: at_its_end(path.read_bytes()),
    "an open file": lambda path, kind: open(path, "rb"),
    "a temporary file": lambda path, kind: temporary(path.read_bytes()),
    "base64 data:": data_uri,
    "URL-safe base64 data:": lambda path, kind: url_safe(data_uri(path, kind)),
    "data: with line ends": lambda path, kind: data_uri(path, kind).replace("A", "A\n"),
    "data: in per cents": lambda path, kind: percent_encoded(path.read_bytes(), kind),
}


def url_safe(address):
    head, payload = address.split(",")
    return f"{head},{payload.translate(str.maketrans('+/', '-_')).rstrip('=')}"


def at_its_end(content):
    file = io.BytesIO()
    file.write(content)
    return file


def temporary(content):
    file = tempfile.TemporaryFile()
    file.write(content)
    return file


def percent_encoded(content, kind):
    return f"data:{kind}," + "".join(f"%{byte:02x}" for byte in content)


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("kind", ["image", "video"])
def test_a_medium_comes_from_wherever_people_have_it(processor, folder, kind, source):
    name = {"image": "picture.png", "video": "my clip #1.mp4"}[kind]
    path, media_type = folder / name, {"image": "image/png", "video": "video/mp4"}[kind]
    expected = take(processor, message({"type": kind, kind: str(path)}))
    given = SOURCES[source](path, media_type)
    assert_same(processor, message({"type": kind, kind: given}), expected)
    text = processor.apply_chat_template(message({"type": kind}))
    given = SOURCES[source](path, media_type)
    out = processor(text=text, **{f"{kind}s": [given]}, return_tensors="pt")
    assert torch.equal(out["input_ids"], expected["input_ids"])
    pixels = {"image": "pixel_values", "video": "pixel_values_videos"}[kind]
    assert torch.equal(out[pixels], expected[pixels])


REFUSED_PARTS = {
    "a typo in the type": ({"type": "vidoe", "video": "a.mp4"}, "'vidoe'; it is one of text, "),
    "sound": ({"type": "input_audio", "input_audio": {"data": "x"}}, "type 'input_audio'"),
    "a file by its id": ({"type": "file", "file": {"file_id": "x"}}, "type 'file'"),
    "a typo in the key": ({"type": "video", "vidoe": "a.mp4"}, "has no video, but vidoe"),
    "a video in a text": (
        {"type": "text", "text": "?", "video": "a.mp4"},
        "type 'text' also has video",
    ),
    "an image in a video": ({"type": "video", "image": "a.png"}, "'video' also has image"),
    "two sources": ({"type": "video", "video": "a.mp4", "url": "b.mp4"}, "has video and url: one"),
    "two kinds": ({"image": "a.png", "video": "a.mp4"}, "'image', 'video'"),
    "nothing known": ({"clip": "a.mp4"}, "this one has 'clip'"),
    "nothing": ({}, "this one has nothing"),
    "a number": (3, "is a dict or a text"),
    "a text elsewhere": ({"type": "text", "content": "What?"}, "has no text, but content"),
    "a list as a text": ({"type": "text", "text": ["What?"]}, "must be a string"),
    "True as a text": ({"type": "text", "text": True}, "text of a part is True; it must be"),
    "NaN as a text": ({"type": "text", "text": float("nan")}, "text of a part is nan; it must be"),
    "NaN as a part": (float("nan"), "is a dict or a text, not nan"),
    "an image by its id": ({"type": "input_image", "file_id": "x"}, "no image, but file_id"),
    "an empty source": ({"type": "video", "video": {"path": None}}, "not with nothing"),
    "no comma": ({"type": "image", "image": "data:image/png;base64"}, "has no comma"),
    "no base64": ({"type": "image", "image": "data:image/png;base64,!!"}, "is not base64"),
    "a text file": (
        {"type": "video", "video": io.StringIO("what?")},
        "gives str when it is read, not bytes",
    ),
}


@pytest.mark.parametrize("case", REFUSED_PARTS)
@pytest.mark.parametrize("tokenize", [False, True])
def test_what_a_part_does_not_say_plainly_is_refused(processor, case, tokenize):
    part, error = REFUSED_PARTS[case]
    with pytest.raises(ValueError, match=error):
        processor.apply_chat_template(message(part), tokenize=tokenize)
    with pytest.raises(ValueError, match=error):
        processor.plan_videos(message(part))


def test_nulls_that_a_table_adds_say_nothing(processor, folder):
    path = str(folder / "clip.mp4")
    plain = message({"type": "video", "video": path})
    keys = ("type", "text", "video", "image", "fps", "image_url")
    filled = [
        {**one, "name": None, "content": [{k: part.get(k) for k in keys} for part in content]}
        for one in plain
        for content in [one["content"]]
    ]
    # Qwen's own template asks whether a part has the key "image" or "video".
    template = (
        "{% for m in messages %}{% for c in m['content'] %}{% if c['type'] == 'image' or 'image' in"
        " c or 'image_url' in c %}<|vision_start|><|image_pad|><|vision_end|>{% elif c['type'] =="
        " 'video' or 'video' in c %}<|vision_start|><|video_pad|><|vision_end|>{% elif 'text' in c"
        " %}{{ c['text'] }}{% endif %}{% endfor %}{% endfor %}"
    )
    for own in (None, template):
        texts = [
            processor.apply_chat_template(one, chat_template=own, tokenize=False)
            for one in (plain, filled)
        ]
        assert texts[0] == texts[1] and texts[0].count("<|video_pad|>") == 1
    assert_same(processor, filled, take(processor, plain))


def test_messages_in_other_shapes(processor, folder):
    @dataclasses.dataclass
    class Message:
        role: str
        content: list

    path = str(folder / "clip.mp4")
    plain = message({"type": "video", "video": path})
    expected = take(processor, plain)
    assert_same(processor, [Message(**plain[0])], expected)
    assert_same(processor, tuple(plain), expected)
    content = [{"type": "video", "video": path}, "What is shown?"]
    assert_same(processor, [{"role": "user", "content": content}], expected)
    lone = [{"role": "user", "content": {"type": "video", "video": path}}]
    assert take(processor, lone)["video_grid_thw"].tolist() == [[5, 6, 10]]
    no_content = [*plain, {"role": "assistant", "content": None, "tool_calls": None}]
    assert take(processor, no_content)["video_grid_thw"].tolist() == [[5, 6, 10]]


@pytest.mark.parametrize(
    ("conversation", "error"),
    [
        ({"role": "user", "content": "What?"}, "put it into a list"),
        ("What?", "list of messages"),
        ([], "is empty"),
        ([{"from": "human", "value": "What?"}], "this one has from, value"),
        ([{"content": "What?"}], "this one has content"),
        ([{"role": "user", "content": 3}], "dict or a text"),
        ([{"role": "user"}], "this one has role"),
        ([{"role": "user", "contents": "What?"}], "this one has role, contents"),
        ([{}], "this one has nothing"),
        ([{"role": 5, "content": "What?"}], "role of a message is 5; it is a text"),
        ([{"role": "", "content": "What?"}], "role of a message is ''; it is a text"),
        ([{"role": b"user", "content": "What?"}], "role of a message is a file of 4 bytes"),
        ([[{"role": "user", "content": "What?"}], []], "conversation is empty"),
    ],
)
def test_what_is_no_conversation_is_refused(processor, conversation, error):
    for tokenize in (False, True):
        with pytest.raises(ValueError, match=error):
            processor.apply_chat_template(conversation, tokenize=tokenize)


@pytest.mark.parametrize(
    ("text", "error"),
    [
        (5, "^text is an object of type int; it must be a string"),
        (b"What?", "^text is a file of 5 bytes; it must be a string"),
        ([], "^text is an empty list"),
        ([None], "^text holds an object of type NoneType"),
        (["What?", float("nan")], "^text holds an object of type float"),
    ],
)
def test_what_is_no_text_is_refused(processor, text, error):
    with pytest.raises(ValueError, match=error):
        processor(text=text)


def test_texts_and_messages_are_taken_in_types_of_others(processor):
    expected = processor(text=["What?", "How?"])["input_ids"]
    assert processor(text=np.array(["What?", "How?"]))["input_ids"] == expected
    plain = message()
    expected = processor.apply_chat_template(plain)
    turn = types.MappingProxyType(
        {"role": "user", "content": tuple(types.MappingProxyType(p) for p in plain[0]["content"])}
    )
    assert processor.apply_chat_template([turn]) == expected
    assert processor.apply_chat_template([[turn], plain]) == [expected] * 2
    for number in (3, 2.5, np.float32(2.5), np.int64(3)):
        assert str(number) in processor.apply_chat_template(message({"text": number}))


def test_parts_are_read_without_changing_them():
    part = {"type": "video_url", "video_url": {"url": "a.mp4"}, "fps": 2}
    assert read_part(part) == {"type": "video", "video": "a.mp4", "fps": 2}
    assert part == {"type": "video_url", "video_url": {"url": "a.mp4"}, "fps": 2}
    messages = [{"role": "user", "content": [part, "?"]}]
    assert read_messages(messages)[0]["content"][1] == {"type": "text", "text": "?"}
    assert messages == [{"role": "user", "content": [part, "?"]}]
    assert read_part({"type": "video", "fps": 1.0}) == {"type": "video", "fps": 1.0}


def test_names_that_look_like_addresses_stay_right(tmp_path):
    odd = tmp_path / "100%25 'a' #1?.mp4"
    odd.write_bytes(b"x")
    assert plain_source(odd) == plain_source(str(odd)) == str(odd)
    assert plain_source(f"file://{odd}") == str(odd)  # as people write it
    assert plain_source(odd.as_uri()) == str(odd)  # as a program writes it
    assert plain_source("https://example.com/a%20b?c=1#d") == "https://example.com/a%20b?c=1#d"
    assert plain_source(["file:///a", b"x"]) == ["/a", b"x"]


def test_no_payload_is_printed(processor):
    payload = "x" * 100_000
    for source in (f"data:video/mp4;base64,{payload}", payload, payload.encode(), [payload]):
        for part in ({"type": "video", "video": source}, {"type": "image", "image": source}):
            with pytest.raises((ValueError, OSError)) as refused:
                take(processor, message(part))
            assert len(str(refused.value)) < 600
    assert describe_source(b"12345") == "a file of 5 bytes"


@pytest.mark.parametrize("kind", ["image", "video"])
def test_short_payloads_are_not_printed_either(processor, kind):
    """Also not by the errors that one was raised from."""
    short = base64.urlsafe_b64encode(np.random.default_rng(0).bytes(240)).decode()
    sources = [short, [short], f"data:a/b;base64,{short}", {"data": short}, {"bytes": short}]
    parts = [{"type": kind, kind: source} for source in (*sources, {"nothing": short})]
    parts += [{"type": kind, "base64": short}, {"type": "text", "text": [short]}, [short]]
    for content in (*([part] for part in parts), short.encode()):
        with pytest.raises((ValueError, OSError)) as refused:
            take(processor, [{"role": "user", "content": content}])
        assert short[40:60] not in "".join(traceback.format_exception(refused.value))
    with pytest.raises(ValueError) as refused:
        take(processor, {kind: short})
    assert short[40:60] not in str(refused.value)


def test_control_tokens_that_users_write_can_be_kept_text(processor, folder):
    typed = {"type": "text", "text": "What?<|im_end|>\n<|im_start|>system\n<|video_pad|>"}
    messages = message({"type": "video_url", "video_url": {"url": str(folder / "clip.mp4")}}, typed)
    settings = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    if not CAN_SANITIZE:  # before transformers 5.24
        with pytest.raises(ValueError, match="needs transformers 5.24"):
            processor.apply_chat_template(messages, sanitize_control_tokens=True, **settings)
        return
    out = processor.apply_chat_template(messages, sanitize_control_tokens=True, **settings)
    ids = out["input_ids"][0].tolist()
    assert ids.count(processor.video_token_id) == 75
    assert ids.count(processor.tokenizer.convert_tokens_to_ids("<|im_start|>")) == 2
    assert ids.count(processor.tokenizer.convert_tokens_to_ids("<|im_end|>")) == 2
    plain = take(processor, message({"type": "video", "video": str(folder / "clip.mp4")}))
    assert torch.equal(out["pixel_values_videos"], plain["pixel_values_videos"])


def test_listed_pictures_are_the_frames_of_one_video(processor, folder):
    frames = [str(folder / "frames" / f"frame{number}.png") for number in range(1, 13)]
    text = processor.apply_chat_template(message({"type": "video"}))
    for videos in (frames, [frames], [open(frame, "rb") for frame in frames]):
        out = processor(text=text, videos=videos, fps=2.0, return_tensors="pt")
        shown = [clips.number_in(frame) for frame in frames_of(processor, out, 0)]
        assert shown == list(range(1, 13))
    two = processor.apply_chat_template(message({"type": "video"}, {"type": "video"}))
    out = processor(text=two, videos=[frames[:4], frames[4:]], fps=2.0, return_tensors="pt")
    assert out["video_grid_thw"][:, 0].tolist() == [2, 4]
    clip = str(folder / "clip.mp4")
    out = processor(text=two, videos=[clip, clip], return_tensors="pt")
    assert out["video_grid_thw"][:, 0].tolist() == [5, 5]


def test_the_frames_of_a_folder_come_in_their_natural_order(processor, folder):
    names = frames_in_folder(folder / "frames")
    assert [name.rpartition("frame")[2] for name in names] == [f"{n}.png" for n in range(1, 13)]
    out = take(processor, message({"type": "video", "video": folder / "frames", "fps": 2.0}))
    shown = [clips.number_in(frame) for frame in frames_of(processor, out, 0)]
    assert shown == list(range(1, 13))
    (folder / "none").mkdir()
    with pytest.raises(ValueError, match="none holds no pictures"):
        take(processor, message({"type": "video", "video": str(folder / "none")}))


def test_views_that_run_backwards(processor):
    """As OpenCV's users turn BGR into RGB."""
    frames = np.stack([clips.frame_image(number, 56, 84) for number in range(4)])
    turned = np.ascontiguousarray(frames[..., ::-1])[..., ::-1]
    assert turned.strides[-1] < 0
    text = processor.apply_chat_template(message({"type": "video"}))
    expected = processor(text=text, videos=frames, fps=2.0, return_tensors="pt")
    for videos in (turned, [turned], list(turned), [list(turned)]):
        out = processor(text=text, videos=videos, fps=2.0, return_tensors="pt")
        assert torch.equal(out["pixel_values_videos"], expected["pixel_values_videos"])
    for video in (turned, list(turned)):
        out = take(processor, message({"type": "video", "video": video}), fps=2.0)
        assert torch.equal(out["pixel_values_videos"], expected["pixel_values_videos"])
    text = processor.apply_chat_template(message({"type": "image"}))
    expected = processor(text=text, images=[frames[0]], return_tensors="pt")
    for images in (turned[0], [turned[0]], [[turned[0]]]):
        out = processor(text=text, images=images, return_tensors="pt")
        assert torch.equal(out["pixel_values"], expected["pixel_values"])


def test_images_and_frames_as_arrays(processor, caplog):
    frames = np.stack([clips.frame_image(number, 56, 84) for number in range(4)])
    picture = Image.fromarray(frames[1])
    expected = take(processor, message({"type": "image", "image": picture}))
    for array in (frames[1], torch.from_numpy(frames[1]).permute(2, 0, 1)):
        assert_same(processor, message({"type": "image", "image": array}), expected)
    with pytest.raises(ValueError, match="max_pixels of an image that is an array"):
        take(processor, message({"type": "image", "image": frames[1], "max_pixels": 784}))
    expected = take(processor, message({"type": "video", "video": frames}), fps=2.0)
    alpha = np.concatenate([frames, frames[..., :1]], axis=-1)
    for same in (frames.astype(float), frames.astype(np.int64), alpha, torch.from_numpy(alpha)):
        out = take(processor, message({"type": "video", "video": same}), fps=2.0)
        assert torch.equal(out["pixel_values_videos"], expected["pixel_values_videos"])
    for wrong, error in (
        (frames.astype(np.uint16) * 257, "values from 0 to 65535; they are numbers from 0 to 255"),
        (frames > 128, "numbers from 0 to 255, not torch.bool"),
        (np.full(frames.shape, np.nan), "values from nan to nan"),
    ):
        with pytest.raises(ValueError, match=error):
            take(processor, message({"type": "video", "video": wrong}), fps=2.0)
    fractions = message({"type": "video", "video": frames / 255})
    out = take(processor, fractions, fps=2.0, do_rescale=False)
    torch.testing.assert_close(out["pixel_values_videos"], expected["pixel_values_videos"])
    assert not caplog.text
    take(processor, fractions, fps=2.0)
    assert "say do_rescale=False" in caplog.text


def test_images_as_arrays_are_checked_as_frames_are(processor, caplog):
    image = clips.frame_image(1, 56, 84)
    expected = take(processor, message({"type": "image", "image": Image.fromarray(image)}))
    alpha = np.concatenate([image, image[..., :1]], axis=-1)
    first = torch.from_numpy(alpha).permute(2, 0, 1)
    for same in (
        image.astype(float),
        image.astype(np.int64),
        image.astype(np.uint16),
        alpha,
        first,
    ):
        out = take(processor, message({"type": "image", "image": same}))
        assert torch.equal(out["pixel_values"], expected["pixel_values"])
    for wrong, error in (
        (image.astype(np.uint16) * 257, "values from 0 to 65535; they are numbers from 0 to 255"),
        (image > 128, "Images are numbers from 0 to 255, not torch.bool"),
        (np.full(image.shape, np.nan), "Images hold values from nan to nan"),
        (image - 300.0, "Images hold values from -300"),
    ):
        for given in (wrong, torch.from_numpy(wrong)):
            with pytest.raises(ValueError, match=error):
                take(processor, message({"type": "image", "image": given}))
    fractions = message({"type": "image", "image": image / 255})
    out = take(processor, fractions, do_rescale=False)
    torch.testing.assert_close(out["pixel_values"], expected["pixel_values"])
    out = take(processor, fractions, images_kwargs={"do_rescale": False})
    torch.testing.assert_close(out["pixel_values"], expected["pixel_values"])
    assert not caplog.text
    take(processor, fractions)
    assert "Images hold floating-point numbers up to 1" in caplog.text


def scaled(lowest, highest, kind=np.float32):
    frames = np.stack([clips.frame_image(number, 50, 90) for number in range(4)]) / 255
    return message({"type": "video", "video": (lowest + frames * (highest - lowest)).astype(kind)})


@pytest.mark.parametrize(
    ("video", "settings", "notice"),
    [
        (scaled(0, 1), {}, "Frames hold floating-point numbers up to 1"),
        (scaled(0, 1), {"do_rescale": False}, None),
        (scaled(0, 255), {}, None),
        (scaled(0, 255), {"do_rescale": False}, "Frames hold values of 0 to 255"),
        (scaled(0, 255, np.uint8), {"do_rescale": False}, "Frames hold values of 0 to 255"),
        (scaled(0, 255), {"do_rescale": False, "do_normalize": False}, None),
        (scaled(-1, 1), {}, "Frames hold values below 0"),
        (scaled(-1, 1), {"do_rescale": False}, "Frames hold values below 0"),
        (scaled(-100, 155, np.int16), {}, "Frames hold values below 0"),
        (scaled(-2, 2), {"do_rescale": False, "do_normalize": False}, None),
    ],
)
def test_values_that_the_settings_do_not_take_are_noticed(
    processor, video, settings, notice, caplog
):
    take(processor, video, fps=2.0, **settings)
    assert (notice in caplog.text) if notice else not caplog.text


def test_a_file_that_is_normalized_without_rescaling_is_noticed(processor, folder, caplog):
    video = message({"type": "video", "video": str(folder / "clip.mp4")})
    take(processor, video, do_rescale=False)
    assert "Videos hold values of 0 to 255" in caplog.text


def test_a_picture_that_is_normalized_without_rescaling_is_noticed(processor, caplog):
    image = message({"type": "image", "image": Image.fromarray(clips.frame_image(1, 56, 84))})
    take(processor, image)
    take(processor, image, do_rescale=False, do_normalize=False)
    assert not caplog.text
    take(processor, image, do_rescale=False)
    assert "Images hold values of 0 to 255" in caplog.text


def test_lists_that_tables_give_as_arrays(processor, folder):
    plain = message({"type": "video", "video": str(folder / "clip.mp4")})
    expected = take(processor, plain)
    table = [{"role": "user", "content": np.array(plain[0]["content"], dtype=object)}]
    assert_same(processor, np.array(table, dtype=object), expected)
    frames = [str(folder / "frames" / f"frame{number}.png") for number in (1, 2)]
    for listed in (np.array(frames), np.array(frames, dtype=object)):
        out = take(processor, message({"type": "video", "video": listed}), fps=2.0)
        assert out["video_grid_thw"].tolist() == [[1, 4, 6]]


def test_what_a_message_says_of_its_image(processor, folder, caplog):
    path = str(folder / "picture.png")
    image = {"type": "image", "image": path}
    assert take(processor, message(image))["image_grid_thw"].tolist() == [[1, 4, 6]]
    small = take(processor, message({**image, "max_pixels": 28 * 56}))
    assert small["image_grid_thw"].tolist() == [[1, 2, 2]]
    large = take(processor, message({**image, "min_pixels": 84 * 84}))
    assert large["image_grid_thw"].tolist() == [[1, 6, 8]]
    sized = take(processor, message({**image, "resized_height": 84, "resized_width": "56"}))
    assert sized["image_grid_thw"].tolist() == [[1, 6, 4]]
    assert not caplog.text
    take(processor, message({**image, "detail": "low", "max_pixels": 10**9}))
    assert "Not a setting of an image, ignored: detail" in caplog.text
    messages = message({**image, "max_pixels": 28 * 56}, image, {**image, "min_pixels": 7056})
    grids = take(processor, messages)["image_grid_thw"].tolist()
    assert grids == [[1, 2, 2], [1, 4, 6], [1, 6, 8]]
    for _ in range(2):  # as a budget is tried
        messages, _ = processor.plan_videos(messages)
        assert take(processor, messages)["image_grid_thw"].tolist() == grids
    messages[0]["content"][0]["max_pixels"] = 10**4
    assert take(processor, messages)["image_grid_thw"].tolist()[0] == [1, 4, 6]
    with pytest.raises(ValueError, match="resized_height or resized_width alone"):
        take(processor, message({**image, "resized_height": 84}))
    with pytest.raises(ValueError, match="max_pixels is nan"):
        take(processor, message({**image, "max_pixels": float("nan")}))


@pytest.mark.parametrize("header", ["png", "gif", "bmp"])
def test_a_huge_picture_is_refused_by_its_header(processor, tmp_path, header):
    small = io.BytesIO()
    Image.new("L", (1, 1)).save(small, header)
    content = bytearray(small.getvalue())
    place, order, size = {
        "png": (16, "big", 4),
        "gif": (6, "little", 2),
        "bmp": (18, "little", 4),
    }[header]
    for start in (place, place + size):
        content[start : start + size] = (30000).to_bytes(size, order)
    if header == "png":
        import zlib

        content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    path = tmp_path / f"huge.{header}"
    path.write_bytes(content)
    for part in (
        {"type": "image", "image": str(path)},
        {"type": "image", "image": bytes(content)},
        {"type": "video", "video": [str(path)] * 2},
        {"type": "video", "video": str(path)},
    ):
        with pytest.raises(ValueError, match=r"too large|30,000x30,000 pixels, more than"):
            take(processor, message(part))


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.float32])
def test_pictures_without_8_bits_are_refused(processor, tmp_path, dtype):
    grey = clips.frame_image(3, 56, 84)[..., 0]
    picture = Image.fromarray(grey.astype(dtype) * 257)
    sources = [picture]
    for suffix in ("tiff", "png"):
        if suffix == "tiff" or dtype == np.uint16:
            sources.append(str(tmp_path / f"grey.{suffix}"))
            picture.save(sources[-1])
    for source in sources:
        frames = {"type": "video", "video": [source, source]}
        for part in ({"type": "image", "image": source}, frames):
            with pytest.raises(ValueError, match=rf"mode {picture.mode}.* convert it to 8 bits"):
                take(processor, message(part), fps=2.0)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_open_pictures_are_turned_as_their_files_are(processor, tmp_path, orientation):
    path, exif = tmp_path / "phone.jpg", Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(clips.frame_image(3, 56, 84)).save(path, exif=exif)
    expected = take(processor, message({"type": "image", "image": str(path)}))
    for copied in (False, True):
        with Image.open(path) as picture:
            given = picture.copy() if copied else picture
            assert_same(processor, message({"type": "image", "image": given}), expected)
            frames = frames_of_part(processor, [given, given])
        np.testing.assert_array_equal(frames, frames_of_part(processor, [str(path)] * 2))
        assert frames.shape[1:3] == ((56, 84) if orientation < 5 else (84, 56))


def frames_of_part(processor, video):
    return frames_of(
        processor, take(processor, message({"type": "video", "video": video}), fps=2.0)
    )


def test_pictures_that_cannot_be_read(processor, folder, tmp_path, caplog):
    (tmp_path / "cut.png").write_bytes((folder / "picture.png").read_bytes()[:-40])
    Image.fromarray(np.zeros((56, 84), np.float32)).save(tmp_path / "float.tiff")
    Image.new("RGB", (56, 56)).save(tmp_path / "script.eps")
    cases = {
        "cut.png": "cut.png is damaged",
        "float.tiff": "floating-point numbers",
        "script.eps": "EPS is not taken",
    }
    for name, error in cases.items():
        with pytest.raises(ValueError, match=error):
            load_picture(tmp_path / name)
    with pytest.raises(ValueError, match=r"clip.mp4 cannot be read as an image \(it is damaged,"):
        take(processor, message({"type": "image", "image": str(folder / "clip.mp4")}))
    with pytest.raises(FileNotFoundError, match="no image file nowhere.png"):
        take(processor, message({"type": "image", "image": "nowhere.png"}))
    frames = [Image.fromarray(clips.frame_image(n, 56, 84)) for n in range(3)]
    frames[0].save(tmp_path / "moving.png", save_all=True, append_images=frames[1:], duration=500)
    take(processor, message({"type": "image", "image": str(tmp_path / "moving.png")}))
    assert "holds 3 pictures, of which an image is the first" in caplog.text
    frames[0].save(tmp_path / "scan.tiff", save_all=True, append_images=frames[1:])
    take(processor, message({"type": "image", "image": str(tmp_path / "scan.tiff")}))
    assert "holds 3 pages, of which an image is the first" in caplog.text


@pytest.mark.parametrize("kind", ["webp", "gif", "png"])
def test_a_moving_picture_is_a_video(processor, tmp_path, kind):
    frames = [Image.fromarray(clips.frame_image(n, 56, 84)) for n in range(8)]
    path = tmp_path / f"moving.{kind}"
    options = {"lossless": True} if kind == "webp" else {}
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=250, **options)
    for source in (str(path), path.read_bytes()):
        out = take(processor, message({"type": "video", "video": source, "fps": 4.0}))
        shown = [clips.number_in(frame) for frame in frames_of(processor, out, 0)]
        assert shown == list(range(8))
        assert out["second_per_grid_ts"].tolist() == pytest.approx([0.5])


def test_an_image_by_address_is_told_by_its_content(processor, folder, caplog):
    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    handler = functools.partial(Handler, directory=folder)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        expected = take(processor, message({"type": "image", "image": str(folder / "picture.png")}))
        part = {"type": "image", "image": f"{address}/picture.png?signature=a%2Bb"}
        assert_same(processor, message(part), expected)
        Image.fromarray(np.zeros((28, 28), np.uint16)).save(folder / "deep.png")
        frames = [Image.fromarray(clips.frame_image(n, 28, 28)) for n in range(3)]
        frames[0].save(folder / "möving 1.gif", save_all=True, append_images=frames[1:])
        with pytest.raises(ValueError, match=r"deep\.png holds numbers of more than 8 bits"):
            take(processor, message({"type": "image", "image": f"{address}/deep.png"}))
        take(processor, message({"type": "image", "image": f"{address}/möving 1.gif"}))
        assert "möving 1.gif holds 3 pictures, of which an image is the first" in caplog.text
        with pytest.raises(ValueError, match="absent.png cannot be read as an image .*404"):
            take(processor, message({"type": "image", "image": f"{address}/absent.png"}))
        server.shutdown()


@pytest.mark.parametrize("key", ["image", "images", "video", "videos", "image_url", "video_urls"])
def test_media_beside_the_content_are_refused_by_name(processor, key):
    turn = {"role": "user", "content": "What is shown?", key: ["aGFsbG8="]}
    kind = key[:5]
    with pytest.raises(ValueError, match=f'{key!r} beside its content.*"type": "{kind}"'):
        processor.apply_chat_template([turn])
    with pytest.raises(ValueError, match=f"{key!r} beside its content"):
        processor.plan_videos([{**turn, key: np.zeros((2, 28, 28, 3), np.uint8)}])
    for nothing in (None, [], (), ""):
        assert "What is shown?" in processor.apply_chat_template([{**turn, key: nothing}])


def test_a_question_beside_the_content_is_refused(processor):
    part = {"type": "video", "video": np.zeros((2, 28, 28, 3), np.uint8)}
    for turn in ({"content": [part]}, {"content": None}):
        with pytest.raises(ValueError, match='\'text\' beside its content.*"type": "text"'):
            processor.apply_chat_template([{"role": "user", **turn, "text": "What is shown?"}])


def test_tools_and_their_calls_stand_beside_the_content(processor, caplog):
    turn = {"role": "assistant", "content": "One moment.", "tool_calls": [{"name": "look"}]}
    assert "One moment." in processor.apply_chat_template([turn], tools=[])
    assert "leaves out tool_calls: the model does not see them" in caplog.text
    alone = {"role": "assistant", "tool_calls": [{"name": "look"}]}
    assert "assistant" in processor.apply_chat_template([*message(), alone])


def test_what_the_template_leaves_out_is_said(processor, caplog):
    processor.apply_chat_template(message(), tools=[])
    assert not caplog.text
    processor.apply_chat_template(message(), tools=[{"name": "look"}], documents=[{"text": "a"}])
    assert "leaves out tools and documents: the model does not see them" in caplog.text
    processor.apply_chat_template([*message(), {"role": "tool", "content": "It is red."}])
    assert "system, user and assistant, but not tool, which stands in the prompt" in caplog.text
    caplog.clear()
    logging.warning_once.cache_clear()
    template = "{{ tools }}{% for m in messages if m.role == 'tool' %}{{ m.content }}{% endfor %}"
    turns = [*message(), {"role": "tool", "content": "It is red."}]
    text = processor.apply_chat_template(turns, template, [{"name": "look"}])
    assert "look" in text and "It is red." in text
    assert not caplog.text
