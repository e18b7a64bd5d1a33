"""Pixels that are decoded while they are read: the same values, in bounded memory, and an end."""

import _thread
import copy
import gc
import queue
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.utils import logging

import clips
from paths import ROOT
from test_video_reading import count_decoded


@pytest.fixture(scope="module")
def processor():
    return AutoProcessor.from_pretrained(ROOT, trust_remote_code=True)


@pytest.fixture(scope="module")
def module(processor):
    """The module of the processor's own classes, which the loader made."""
    return sys.modules[type(processor).__module__]


@pytest.fixture(autouse=True)
def fresh_notices():
    logging.warning_once.cache_clear()


@pytest.fixture(autouse=True)
def no_thread_is_left():
    yield
    gc.collect()
    assert not running()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    clips.write_clip(folder / "plain.mp4", 50)
    clips.write_clip(folder / "long.mp4", 300, options={"g": "50"})
    return folder


def running():
    return [thread for thread in threading.enumerate() if thread.name == "PixelStream"]


def take(processor, *videos, settings=None, **kwargs):
    """All outputs for videos (paths or arrays) in one message, each with these settings."""
    parts = [{"type": "video", "video": video, **(settings or {})} for video in videos]
    messages = [{"role": "user", "content": [*parts, {"type": "text", "text": "What is shown?"}]}]
    return processor.apply_chat_template(
        messages,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"return_metadata": True, **kwargs},
    )


def check_equal(streamed, whole, grids=1):
    """Equal in everything, however the pixels are cut; reads the stream."""
    stream, pixels = streamed.pop("pixel_values_videos"), whole["pixel_values_videos"]
    assert streamed.keys() | {"pixel_values_videos"} == whole.keys()
    for key, value in streamed.items():
        if key != "video_metadata":
            assert torch.equal(value, whole[key]), key
    assert len(streamed["video_grid_thw"]) == grids
    assert (stream.shape, stream.dtype, len(stream)) == (pixels.shape, pixels.dtype, len(pixels))
    rows, start = len(pixels), 0
    while start < rows:  # slices of three lengths, now and then overlapping
        end = min(rows, start + (7, stream.overlap, 3 * stream.overlap + 1)[start % 3])
        assert torch.equal(stream[start:end], pixels[start:end])
        back = stream.overlap if start % 2 else 0
        assert torch.equal(stream[max(end - back, 0) : end], pixels[max(end - back, 0) : end])
        start = end


CLIPS = {
    "plain": lambda folder: folder / "plain.mp4",
    "mirrored": lambda folder: clips.displayed(folder, *clips.DISPLAYED["axes exchanged"]),
    "without a count": lambda folder: clips.no_frame_count(folder, ".mkv"),
    "changing rate": clips.changing_rate,
    "one frame": clips.one_frame,
    "boastful header": clips.boastful_header,
    "shuffled stamps": clips.shuffled_stamps,
    "odd size": clips.odd_size,
    "late start": lambda folder: clips.late_start(folder, ".mp4"),
    "frames": lambda folder: np.stack([clips.frame_image(n, 56, 84) for n in range(11)]),
}


@pytest.mark.parametrize("kind", CLIPS)
def test_the_values_are_those_of_the_tensor(processor, folder, kind):
    video = CLIPS[kind](folder)
    video = video if kind == "frames" else str(video)
    whole = take(processor, video)
    streamed = take(processor, video, stream=True)
    if kind != "changing rate":  # where nobody has looked yet
        assert streamed["video_metadata"] == whole["video_metadata"]
    assert streamed.to("cpu")["pixel_values_videos"].shape == whole["pixel_values_videos"].shape
    check_equal(streamed, whole)


SETTINGS = {
    "a part": {"video_start": 1.05, "video_end": 3.2},
    "every frame": {"do_sample_frames": False, "num_frames": None},
    "an odd number": {"do_sample_frames": False, "video_end": 1.5},
    "its own size": {"resized_height": 56, "resized_width": 112},
    "few": {"max_tokens": 32},
    "at the edges of frames": {"fps": 10.0},
    "just below the edges of frames": {"fps": 10.0, "video_start": 0.1, "video_end": 1.1},
}


@pytest.mark.parametrize("case", SETTINGS)
def test_settings_of_a_message(processor, folder, case):
    video, settings = str(folder / "plain.mp4"), SETTINGS[case]
    whole = take(processor, video, settings=settings)
    streamed = take(processor, video, settings=settings, stream=True)
    assert streamed["video_metadata"] == whole["video_metadata"]
    check_equal(streamed, whole)


def test_several_videos_are_one_stream(processor, folder):
    frames = np.stack([clips.frame_image(n, 112, 84) for n in range(5)])
    videos = [str(folder / "plain.mp4"), frames, str(clips.odd_size(folder))]
    whole = take(processor, *videos)
    assert len(set(whole["video_grid_thw"][:, 1:].prod(1).tolist())) > 1
    streamed = take(processor, *videos, stream=True)
    assert streamed["video_metadata"] == whole["video_metadata"]
    check_equal(streamed, whole, grids=3)


def test_other_ways_to_ask(processor, folder):
    path = str(folder / "plain.mp4")
    whole = processor.video_processor(videos=[path])
    out = processor.video_processor(videos=[path], stream=True)
    assert "video_metadata" not in out
    assert torch.equal(out["pixel_values_videos"][:], whole["pixel_values_videos"])
    text = "<|vision_start|><|video_pad|><|vision_end|>"
    out = processor(text=[text], videos=[path], videos_kwargs={"stream": True})
    assert torch.equal(out["pixel_values_videos"][0:300], whole["pixel_values_videos"])
    plain = processor.video_processor(videos=[path], do_normalize=False, do_rescale=False)
    out = processor.video_processor(
        videos=[path], do_normalize=False, do_rescale=False, stream=True
    )
    assert out["pixel_values_videos"].dtype == torch.uint8
    assert torch.equal(out["pixel_values_videos"][:], plain["pixel_values_videos"])


def test_what_a_stream_refuses(processor, folder):
    stream = take(processor, str(folder / "plain.mp4"), stream=True)["pixel_values_videos"]
    assert stream[:0].shape == (0, 1176) and not running()
    stream[0:180]
    stream[120:180]
    for rows in (slice(119, 180), slice(0, 60)):
        with pytest.raises(ValueError, match=r"gone after row 180 .* new stream, or for a tensor"):
            stream[rows]
    for rows in (3, slice(0, 9, 2), torch.tensor([True])):
        with pytest.raises(ValueError, match="is not a range of rows"):
            stream[rows]
    with pytest.raises(AttributeError, match=r"no 'to': it is no tensor"):
        stream.to("cpu")
    with pytest.raises(TypeError, match="cannot be copied"):
        copy.deepcopy(stream)
    assert torch.equal(stream[240:300], stream[240:300])  # rows may be left out
    stream.close()
    with pytest.raises(ValueError, match="it was closed"):
        stream[240:300]


@pytest.fixture
def small_steps(module, monkeypatch):
    """Groups of one temporal step (60 rows of 1176 float32), three of which may wait."""
    monkeypatch.setattr(module, "GROUP_STEPS", 1)
    monkeypatch.setattr(module, "AHEAD_BYTES", 3 * 60 * 1176 * 4)


def test_decoding_waits_for_the_reader(processor, folder, module, monkeypatch, small_steps):
    decoded, measured = [], module.VideoFile

    def counted(source):
        file = measured(source)
        decoded.append(count_decoded(file))
        return file

    monkeypatch.setattr(module, "VideoFile", counted)
    stream = take(processor, str(folder / "long.mp4"), stream=True)["pixel_values_videos"]
    shown = len(decoded[0])
    assert stream.shape[0] == 30 * 60 and shown < 15 and not running()
    for step in range(4):
        rows = stream[60 * step : 60 * step + 60]
        settle(decoded[0])
        # This step, three that wait, one in the thread's hands: ten frames of the file each.
        assert len(decoded[0]) <= 10 * (step + 5) + 5
        assert rows.untyped_storage().nbytes() == 60 * 1176 * 4
    assert sum(len(group) for _, group in stream._kept) <= 2 * stream.overlap
    assert len(running()) == 1


def settle(seen):
    """Waits until nothing more is decoded."""
    before = -1
    while before != len(seen):
        before = len(seen)
        time.sleep(0.2)


def test_the_end_of_a_stream(processor, folder, small_steps):
    def begun():
        stream = take(processor, str(folder / "long.mp4"), stream=True)["pixel_values_videos"]
        stream[0:10]
        assert len(running()) == 1
        return stream

    begun().close()
    assert not running()
    with begun():
        pass
    assert not running()
    stream = begun()
    stream.close()
    stream.close()
    del stream
    stream = begun()
    del stream  # nobody closes it
    gc.collect()
    assert not running()
    stream = begun()
    stream[10:]
    for thread in running():
        thread.join(5)
    assert not running()
    assert len(stream[len(stream) - 60 :]) == 60  # what was read last is there to its end


def test_a_group_that_takes_long_is_waited_for(processor, folder):
    """Longer than the second after which a reader looks whether the thread is still there."""
    path = str(folder / "plain.mp4")
    whole = take(processor, path)["pixel_values_videos"]
    stream = take(processor, path, stream=True)["pixel_values_videos"]
    get, waits = stream._ready.get, iter(range(3))

    def late(timeout):
        if next(waits, None) is not None:
            raise queue.Empty
        return get(timeout=timeout)

    stream._ready.get = late
    assert torch.equal(stream[:], whole)
    assert next(waits, None) is None


@pytest.mark.parametrize("then", ["", "stream.close()", "stream[0:8]"])
def test_a_process_ends_quietly_with_a_stream(folder, then):
    script = f"""
from transformers import AutoProcessor
processor = AutoProcessor.from_pretrained({str(ROOT)!r}, trust_remote_code=True)
out = processor.video_processor([{str(folder / "long.mp4")!r}], stream=True, return_tensors="pt")
stream = out["pixel_values_videos"]
{then}
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_an_error_in_the_thread_reaches_the_reader(processor, folder, small_steps):
    path = str(clips.with_a_hole(folder, "hole.mp4", 0.7, 1.0))
    with pytest.raises(ValueError) as whole:
        take(processor, path)
    out = take(processor, path, stream=True)
    stream = out["pixel_values_videos"]
    assert len(stream[0:60]) == 60
    with pytest.raises(ValueError, match=r"hole\.mp4 can be read only up to") as streamed:
        stream[60:]
    assert str(streamed.value) == str(whole.value)
    assert not running()
    with pytest.raises(ValueError, match="ended with an error"):
        stream[60:]


def test_what_is_refused_at_once(processor, folder):
    """What needs no decoding, or only that of the first frames, is wrong in the call already."""
    (folder / "empty.mp4").write_bytes(b"")
    with pytest.raises(ValueError, match=r"empty\.mp4 is empty"):
        take(processor, str(folder / "empty.mp4"), stream=True)
    with pytest.raises(ValueError, match=r"cut\.mp4 should last 10\.0 s"):
        take(processor, str(clips.cut_short(folder)), stream=True)
    with pytest.raises(ValueError, match="not multiples of 28"):
        take(processor, str(folder / "plain.mp4"), settings={"do_resize": False}, stream=True)


def test_a_file_that_is_shorter_than_it_was_measured(processor, folder, module, monkeypatch):
    """Found at its end only: the whole is planned again, the stream cannot be."""
    path = str(clips.write_clip(folder / "raw.h264", 60))

    class Longer(module.VideoFile):
        def _measure(self):
            super()._measure()
            self.frames, self.duration = 80, 8.0

    monkeypatch.setattr(module, "VideoFile", Longer)
    assert take(processor, path)["video_grid_thw"].tolist() == [[6, 6, 10]]
    out = take(processor, path, stream=True)
    assert out["video_grid_thw"].tolist() == [[8, 6, 10]]
    with pytest.raises(ValueError, match=r"raw\.h264 is not as long .* without stream=True"):
        out["pixel_values_videos"][:]


def test_ctrl_c_ends_a_read_that_waits(processor, folder, module, monkeypatch, heeding_sigint):
    """A signal comes while the reader waits for a frame that does not come."""
    here, go_on = threading.Event(), threading.Event()
    original = module.VideoFile.image

    def stuck(file, frame):
        if threading.current_thread().name == "PixelStream" and not here.is_set():
            here.set()
            threading.Timer(0.3, _thread.interrupt_main).start()
            go_on.wait(20)
        return original(file, frame)

    monkeypatch.setattr(module.VideoFile, "image", stuck)
    stream = take(processor, str(folder / "plain.mp4"), stream=True)["pixel_values_videos"]
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        stream[:]
    assert time.monotonic() - start < 10
    go_on.set()
    for thread in running():
        thread.join(5)


def test_progress_is_shown_when_asked_for(processor, folder, module, monkeypatch):
    bars, tqdm = [], module.logging.tqdm
    monkeypatch.setattr(
        module.logging, "tqdm", lambda frames, **kw: bars.append(kw) or tqdm(frames, **kw)
    )
    path = str(folder / "plain.mp4")
    take(processor, path, stream=True)["pixel_values_videos"][:]
    assert bars == []
    stream = take(processor, path, stream=True, progress=True)["pixel_values_videos"]
    assert bars == []  # a bar that stands still would say that something is read
    stream[:]
    assert bars == [{"total": 10, "initial": 2, "desc": "Reading plain.mp4", "leave": False}]


@pytest.mark.parametrize("chunk", [None, 25])
@pytest.mark.parametrize("samples", [1, 2])
def test_the_model_reads_a_stream_as_it_reads_a_tensor(processor, folder, chunk, samples):
    """Whole, in chunks, and where batch rows take turns, of which each has its own videos."""
    model = AutoModelForImageTextToText.from_pretrained(ROOT, trust_remote_code=True)
    videos = [str(folder / "plain.mp4"), str(folder / "long.mp4")]
    outputs = []
    for stream in (False, True):
        inputs = take_samples(processor, videos, samples, stream=stream)
        call = {"max_new_tokens": 4, "return_dict_in_generate": True, "output_logits": True}
        inputs = inputs.to(model.device)
        outputs.append(model.generate(**inputs, **call, prefill_chunk_size=chunk))
    tensor, streamed = outputs
    assert torch.equal(tensor["sequences"], streamed["sequences"])
    for one, other in zip(tensor["logits"], streamed["logits"], strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=0)


def test_a_stream_of_what_the_cache_has_is_refused(processor, folder):
    model = AutoModelForImageTextToText.from_pretrained(ROOT, trust_remote_code=True)
    turn = {"role": "user", "content": [{"type": "video", "video": str(folder / "plain.mp4")}]}
    answer = {"role": "assistant", "content": [{"type": "text", "text": "Yes."}]}
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    first, both = (
        processor.apply_chat_template(turns, **options, processor_kwargs={"stream": True})
        for turns in ([turn], [turn, answer, turn])
    )
    call = {"max_new_tokens": 1, "return_dict_in_generate": True}
    out = model.generate(**first, **call)
    cache = {name: out[name] for name in ("cache", "past_key_values") if name in out}
    with pytest.raises(ValueError, match="the cache has some of them"):
        model.generate(**both, **call, **cache)
    both["pixel_values_videos"].close()


def take_samples(processor, videos, samples, **kwargs):
    """All outputs for a batch that shares these videos out over so many samples."""
    batch = [videos[i::samples] for i in range(samples)]
    content = [[{"type": "video", "video": video} for video in share] for share in batch]
    messages = [[{"role": "user", "content": parts}] for parts in content]
    return processor.apply_chat_template(
        messages,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"padding": True, **kwargs},
    )
