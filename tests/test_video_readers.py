"""Several readers of one file give what one gives: frames, times, notices, errors, and an end."""

import _thread
import math
import os
import subprocess
import sys
import threading

import av
import pytest
import torch
from transformers import AutoProcessor
from transformers.utils import logging
from videonsa import video_readers_videonsa
from videonsa.video_reader_videonsa import Remeasure, VideoFile
from videonsa.video_readers_videonsa import default_readers, read_frames, usable_cores

import clips
from paths import ROOT
from test_video_reading import FORMATS, HOLES, IN_ORDER, JOINED, count_decoded


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("clips")


@pytest.fixture(autouse=True)
def small_groups(monkeypatch):
    """A group for every key frame, so that short clips are shared out."""
    monkeypatch.setattr(video_readers_videonsa, "GROUP_FRAMES", 1)


@pytest.fixture(autouse=True)
def no_thread_is_left():
    yield
    assert not running()


def running():
    return [thread for thread in threading.enumerate() if thread.name == "VideoReader"]


def fetch(file, frame):
    return torch.from_numpy(file.image(frame).copy())


def by(readers):
    return lambda file, seconds: read_frames(file, seconds, fetch, readers)


def every_frame(file, seconds):
    """What one reader gives that skips no frame on its way."""
    file.skips = False
    for time, frame in file.frames_at(seconds):
        yield time, fetch(file, frame)


def read(path, count, how, caplog):
    """(what was read at so many times, how it ended, notices) of a file that is opened for it."""
    logging.warning_once.cache_clear()
    caplog.clear()
    items, end = [], None
    with VideoFile(str(path)) as file:
        seconds = [file.duration * i / count for i in range(count)]
        try:
            items += how(file, seconds)
        except (ValueError, Remeasure) as error:
            end = repr(error)
    return items, end, caplog.messages.copy()


def check_equal(path, count, caplog, how=every_frame):
    items, end, notices = read(path, count, how, caplog)
    for readers in (1, 2, 3, 8):
        read_again, end_again, notices_again = read(path, count, by(readers), caplog)
        assert (end_again, notices_again) == (end, notices), readers
        assert [time for time, _ in read_again] == [time for time, _ in items], readers
        for (time, one), (_, again) in zip(items, read_again, strict=True):
            assert torch.equal(one, again), (readers, time)


B_FRAMES = {
    "three": {"bf": "3", "g": "48"},
    "fixed": {"bf": "3", "g": "48", "b_strategy": "0", "b-pyramid": "none"},
    "pyramid": {"bf": "5", "g": "48", "b_strategy": "0", "b-pyramid": "normal", "refs": "4"},
    "strict pyramid": {"bf": "3", "g": "48", "b_strategy": "0", "b-pyramid": "strict"},
    "open": {"bf": "3", "g": "48", "b_strategy": "0", "x264-params": "open-gop=1"},
    "sixteen": {"bf": "16", "g": "48", "b_strategy": "0"},
    "long": {"bf": "3", "g": "240", "keyint_min": "240", "sc_threshold": "0"},
    "refreshed": {"bf": "3", "g": "48", "x264-params": "intra-refresh=1"},
    "none": {"bf": "0", "g": "48"},
}


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".ts"])
@pytest.mark.parametrize("kind", B_FRAMES)
def test_b_frames(folder, caplog, kind, suffix):
    path = clips.write_clip(folder / f"{kind}{suffix}", 300, options=B_FRAMES[kind])
    for count in (5, 23, 100):
        check_equal(path, count, caplog)


MAKERS = {
    "turned": lambda folder: clips.displayed(folder, 0, 1, -1, 0),
    "no count.mkv": lambda folder: clips.no_frame_count(folder, ".mkv"),
    "no count.webm": lambda folder: clips.no_frame_count(folder, ".webm"),
    "changing rate": clips.changing_rate,
    "one frame": clips.one_frame,
    "boastful header": clips.boastful_header,
    "long sound": clips.long_sound,
    "late.mp4": lambda folder: clips.late_start(folder, ".mp4"),
    "late.mkv": lambda folder: clips.late_start(folder, ".mkv"),
    "stopped.mp4": lambda folder: clips.stopped_after_stillness(folder, ".mp4", 10),
    "stopped.mkv": lambda folder: clips.stopped_after_stillness(folder, ".mkv", 1),
    "bursts": clips.two_bursts,
    "hidden start": clips.hidden_start,
    "matrix": lambda folder: clips.of_another_matrix(folder, "matrix.mp4", 9),
    "ten bit": clips.ten_bit,
    "shuffled": clips.shuffled_stamps,
    "odd size": clips.odd_size,
    "cover": clips.cover_first,
    "two": lambda folder: clips.two_pictures(folder, ".mkv", (0, 1)),
}
MAKERS |= {
    f"joined {kind}": lambda folder, kind=kind: clips.joined(
        folder, f"_{kind}", 30, 20, **JOINED[kind]
    )
    for kind in JOINED
}
MAKERS |= {
    name: lambda folder, name=name, options=options: clips.write_clip(folder / name, 200, **options)
    for name, options in {**FORMATS, **IN_ORDER}.items()
}


@pytest.mark.parametrize("kind", MAKERS)
def test_every_kind_of_file(folder, caplog, kind):
    path = MAKERS[kind](folder)
    for count in (7, 60):
        check_equal(path, count, caplog)


@pytest.mark.parametrize("hole", HOLES, ids=str)
@pytest.mark.parametrize("options", [{"g": "12"}, {"g": "12", "bf": "0"}], ids=["B", "no B"])
def test_a_hole(folder, caplog, hole, options):
    """Where only a frame that is skipped is damaged, one that skips none ends earlier."""
    path = clips.with_a_hole(folder, "hole.mp4", *hole, options=options)
    for count in (9, 40, 100):
        check_equal(path, count, caplog, by(1))
        right, *_ = read(path, count, every_frame, caplog)
        found = read(path, count, by(1), caplog)[0][: len(right)]
        for (time, one), (again, other) in zip(right, found, strict=True):
            assert time == again and torch.equal(one, other)


def test_a_frame_that_stands_long_is_not_skipped(folder, caplog):
    """Nothing refers to it, and it is far before the time at which it is on screen."""
    times, now = [], 0
    for number in range(120):
        times.append(now)
        now += 900 if number % 7 == 3 else 20
    options = {"bf": "3", "g": "40", "b_strategy": "0", "b-pyramid": "none"}
    path = clips.write_clip(folder / "stills.mp4", 120, rate=50, times_ms=times, options=options)
    for count in (5, 40, 200):
        check_equal(path, count, caplog)


def test_frames_are_skipped(folder):
    options = {"bf": "3", "g": "100", "b_strategy": "0", "b-pyramid": "none"}
    path = clips.write_clip(folder / "skipped.mp4", 300, options=options)
    with VideoFile(str(path)) as file:
        decoded = count_decoded(file)
        list(file.frames_at([9.5, 19.5, 29.5]))
    assert 75 <= len(decoded) < 100  # of 300, and a quarter are B-frames' references


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_b_frames_whose_stamps_are_in_decoding_order(folder, caplog, suffix):
    """Which is seen as soon as frames come out, though some could be skipped."""
    options = {"bf": "3", "g": "50", "b_strategy": "0", "b-pyramid": "none"}
    path = clips.write_clip(folder / "right.mp4", 200, options=options)
    odd = folder / f"odd{suffix}"
    with av.open(str(path)) as source, av.open(str(odd), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.size:
                packet.dts += 2 * packet.duration  # the first ones have negative stamps
                packet.pts, packet.stream = packet.dts, stream
                target.mux(packet)
    for count in (5, 40):
        check_equal(odd, count, caplog)
        assert "its time stamps are missing or not in order" in caplog.text
    # The frames shortly before this time are in order.
    with VideoFile(str(odd)) as file, pytest.raises(Remeasure):
        list(file.frames_at([1.05]))


@pytest.fixture
def keyed(folder):
    """60 s with a key frame for every second."""
    path = folder / "keyed.mp4"
    return path if path.exists() else clips.write_clip(path, 600, options={"g": "10", "bf": "0"})


def seconds_of(count):
    return [60 * i / count for i in range(count)]


@pytest.mark.parametrize("readers", [2, 3, 8])
def test_every_reader_reads(keyed, opened, readers):
    met, here = set(), threading.Barrier(readers, timeout=30)

    def meet(file, frame):
        """Waits until every reader is here."""
        if threading.current_thread().name == "VideoReader" and file not in met:
            met.add(file)
            here.wait()
        return fetch(file, frame)

    with VideoFile(str(keyed)) as file:
        assert opened == ["keyed.mp4"]
        assert len(list(read_frames(file, seconds_of(60), meet, readers))) == 60
    assert len(met) == readers and opened == ["keyed.mp4"] * readers


def test_readers_wait_for_what_is_taken(keyed, monkeypatch):
    """Five frames are handed over ahead of what is taken, and each reader holds one more."""
    monkeypatch.setattr(video_readers_videonsa, "AHEAD_BYTES", 5 * 96 * 160 * 3)
    fetched, full = [], threading.Event()

    def count(file, frame):
        fetched.append(frame)
        if len(fetched) == 2 + 5 + 3:
            full.set()
        return fetch(file, frame)

    with VideoFile(str(keyed)) as file:
        frames = read_frames(file, seconds_of(60), count, 3)
        next(frames), next(frames)
        assert full.wait(30)
        for taken in range(2, 40):
            assert len(fetched) <= taken + 5 + 3
            next(frames)
        frames.close()


@pytest.mark.parametrize("taken", [1, 2, 30])
@pytest.mark.parametrize("way", ["close", "garbage", "error"])
def test_an_end_before_the_last_frame(keyed, monkeypatch, way, taken):
    monkeypatch.setattr(video_readers_videonsa, "AHEAD_BYTES", 5 * 96 * 160 * 3)  # they wait
    with VideoFile(str(keyed)) as file:
        frames = read_frames(file, seconds_of(60), fetch, 3)
        for _ in range(taken):
            next(frames)
        assert len(running()) in ((0,) if taken == 1 else (1, 2, 3))
        if way == "close":
            frames.close()
        elif way == "garbage":
            del frames
        else:
            with pytest.raises(KeyError):
                frames.throw(KeyError)
        assert not running()


def test_ctrl_c_ends_the_readers(keyed, heeding_sigint):
    here, go_on = threading.Event(), threading.Event()

    def stuck(file, frame):
        if threading.current_thread().name == "VideoReader" and not here.is_set():
            here.set()
            threading.Timer(0.3, _thread.interrupt_main).start()
            threading.Timer(0.6, go_on.set).start()
            go_on.wait(20)
        return fetch(file, frame)

    with VideoFile(str(keyed)) as file, pytest.raises(KeyboardInterrupt):
        list(read_frames(file, seconds_of(60), stuck, 3))
    assert not running()


@pytest.mark.parametrize("at", [1, 2, 17, 59])
def test_an_error_in_a_reader(keyed, at):
    """It comes after the frames before it, as from one reader."""

    def failing(file, frame):
        if round(float(frame.time)) == at:
            raise ValueError(f"no picture at {at}")
        return fetch(file, frame)

    items = []
    with VideoFile(str(keyed)) as file, pytest.raises(ValueError, match=f"no picture at {at}"):
        for item in read_frames(file, seconds_of(60), failing, 3):
            items.append(item)
    assert len(items) == at and not running()


def test_what_only_a_reader_fails_at_is_said(keyed, caplog):
    def failing(file, frame):
        if file.one_of_several and round(float(frame.time)) == 20:
            raise MemoryError("no memory left")
        return fetch(file, frame)

    logging.warning_once.cache_clear()
    with VideoFile(str(keyed)) as file:
        items = list(read_frames(file, seconds_of(60), failing, 3))
        assert [round(time) for time, _ in items] == list(range(60))
    assert caplog.messages == [
        "keyed.mp4: fewer than 3 readers read it (MemoryError('no memory left'))."
    ]


def test_another_file_under_the_same_name_is_not_read(keyed, tmp_path, caplog):
    path = tmp_path / "replaced.mp4"
    path.write_bytes(keyed.read_bytes())
    with VideoFile(str(path)) as file:
        wanted = list(read_frames(file, seconds_of(60), fetch, 1))
    with VideoFile(str(path)) as file:
        path.rename(tmp_path / "gone.mp4")
        clips.write_clip(
            path, 600, options={"g": "10"}, paint=lambda n, h, w: clips.frame_image(0, h, w)
        )
        items = list(read_frames(file, seconds_of(60), fetch, 3))
    assert all(torch.equal(one, other) for (_, one), (_, other) in zip(items, wanted, strict=True))
    assert "fewer than 3 readers read it (ValueError('replaced.mp4 is another file" in caplog.text


def test_what_the_gpu_does_not_read_the_cpu_reads(keyed, caplog, monkeypatch):
    """Readers on a GPU that fail in the middle, stood in for by readers on the CPU."""
    open_file, threads = VideoFile._open, set()

    def open_on_the_cpu(file):
        gpu, file.gpu = file.gpu, None
        open_file(file)
        file.gpu = gpu

    def failing(file, frame):
        if file.gpu is not None and frame.time > 20:
            raise av.FFmpegError(1, "out of memory")
        threads.add(threading.current_thread().name)
        return fetch(file, frame)

    monkeypatch.setattr(VideoFile, "_open", open_on_the_cpu)
    logging.warning_once.cache_clear()
    for readers in (0, 1, 3):
        with VideoFile(str(keyed)) as file:
            items = list(read_frames(file, seconds_of(60), failing, readers, gpu=0))
        assert [round(time) for time, _ in items] == list(range(60))
    assert set(caplog.messages) == {
        "keyed.mp4: the GPU's decoder did not read it, the CPU did "
        "(FFmpegError(1, 'out of memory'))."
    }


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_no_gpu(keyed, processor, caplog):
    with pytest.raises(ValueError, match="video_decoder is 'cuda', but CUDA cannot be used here"):
        processor.video_processor([str(keyed)], video_decoder="cuda")
    with pytest.raises(ValueError, match="video_decoder is 'gpu'; it must be 'cpu' or 'cuda'"):
        processor.video_processor([str(keyed)], video_decoder="gpu")
    logging.warning_once.cache_clear()
    with VideoFile(str(keyed)) as file:
        assert len(list(read_frames(file, seconds_of(60), fetch, 2, gpu=0))) == 60
    assert "keyed.mp4: the GPU's decoder did not read it, the CPU did (" in caplog.text


ON_A_GPU = {
    "b.mp4": {"options": {"g": "48", "bf": "3", "b_strategy": "0"}},
    "plain.mkv": {"options": {"g": "48", "bf": "0"}},
    "open.mkv": {"options": {"g": "48", "bf": "3", "x264-params": "open-gop=1"}},
    "full.mp4": {"options": {"g": "48"}, "pixels": "yuvj420p"},
    "hd.mp4": {"options": {"g": "48"}, "context": {"colorspace": 1, "color_range": 1}},
    "hevc.mp4": {"codec": "libx265", "options": {"x265-params": "log-level=none:keyint=48"}},
    "vp9.webm": {"codec": "libvpx-vp9", "options": {"g": "48", "cpu-used": "8"}},
}


@pytest.mark.gpu
@pytest.mark.parametrize("name", ON_A_GPU)
def test_the_gpu_gives_the_pixels_of_the_cpu(folder, caplog, name):
    path = clips.write_clip(folder / f"gpu_{name}", 300, 240, 426, **ON_A_GPU[name])
    kinds = set()

    def noting(file, frame):
        kinds.add(frame.format.name)
        return fetch(file, frame)

    for count in (23, 100):
        wanted, end, _ = read(path, count, every_frame, caplog)
        for readers in (0, 2):
            items, again, notices = read(
                path, count, lambda f, s, n=readers: read_frames(f, s, noting, n, gpu=0), caplog
            )
            assert again == end and not notices
            assert [time for time, _ in items] == [time for time, _ in wanted]
            for (time, one), (_, other) in zip(items, wanted, strict=True):
                assert torch.equal(one, other), (time, readers)
    assert "cuda" in kinds


@pytest.mark.parametrize(
    ("codec", "options"),
    [
        ("libx264", {"g": "48"}),
        ("libx265", {"x265-params": "log-level=none:keyint=48"}),
    ],
)
def test_what_the_gpu_does_not_decode_bit_for_bit(folder, caplog, codec, options):
    """Ten bits: the CPU decodes them, and that is said once."""
    path = clips.write_clip(
        folder / f"ten_{codec}.mp4",
        300,
        240,
        426,
        codec=codec,
        pixels="yuv420p10le",
        options=options,
    )
    wanted, _, _ = read(path, 40, every_frame, caplog)
    items, end, notices = read(path, 40, lambda f, s: read_frames(f, s, fetch, 2, 0), caplog)
    assert end is None and len(notices) == 1 and "yuv420p10le pixels" in notices[0]
    for (_, one), (_, other) in zip(items, wanted, strict=True):
        assert torch.equal(one, other)


@pytest.fixture(scope="module")
def processor():
    return AutoProcessor.from_pretrained(ROOT, trust_remote_code=True)


@pytest.fixture
def readers_of(processor, monkeypatch):
    """The numbers of readers that the processor's videos are read by."""
    planned, readers = loaded(processor, "planned_video"), loaded(processor, "video_readers")
    seen = []
    monkeypatch.setattr(
        planned, "read_frames", lambda *args: seen.append(args[3]) or readers.read_frames(*args)
    )
    monkeypatch.setattr(readers, "GROUP_FRAMES", 1)
    return seen


def loaded(processor, name):
    """A module of the processor's own, which the loader made."""
    package = type(processor).__module__.rpartition(".")[0]
    return sys.modules[f"{package}.{name}_videonsa"]


@pytest.mark.parametrize("stream", [False, True])
def test_video_readers_says_how_many(processor, keyed, readers_of, opened, stream):
    one, two = (
        processor.video_processor([str(keyed)], video_readers=readers, stream=stream)
        for readers in (1, 2)
    )
    one, two = one["pixel_values_videos"][:], two["pixel_values_videos"][:]
    assert torch.equal(one, two)
    part = {"type": "video", "video": str(keyed), "video_readers": 3}
    call = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    kwargs = {"processor_kwargs": {"stream": stream, "video_readers": 2}}
    out = processor.apply_chat_template([{"role": "user", "content": [part]}], **call, **kwargs)
    assert torch.equal(out["pixel_values_videos"][:], one)
    assert readers_of == [1, 2, 3] and len(opened) == 1 + 2 + 3


def test_a_stream_with_readers_ends(processor, keyed, readers_of):
    stream = processor.video_processor([str(keyed)], video_readers=3, stream=True)
    stream = stream["pixel_values_videos"]
    stream[:60]
    stream.close()
    assert not running()


def test_no_reader_starts_before_a_stream_is_read(processor, folder, monkeypatch):
    """Also of a part that begins far from a key frame."""
    monkeypatch.setattr(loaded(processor, "video_readers"), "AHEAD_BYTES", 1)
    path = clips.write_clip(folder / "part.mp4", 900, options={"g": "100", "keyint_min": "100"})
    settings = {"video_start": 8, "num_frames": 10, "video_readers": 2, "stream": True}
    out = processor.video_processor([str(path)], **settings)
    assert not running()
    out["pixel_values_videos"].close()


@pytest.mark.parametrize("readers", [1, 3])
def test_patches_are_made_while_frames_are_read(processor, keyed, readers_of, monkeypatch, readers):
    monkeypatch.setattr(loaded(processor, "processing"), "GROUP_STEPS", 1)
    monkeypatch.setattr(loaded(processor, "video_readers"), "AHEAD_BYTES", 1)
    file, kind = loaded(processor, "video_reader").VideoFile, type(processor.video_processor)
    done, image, to_patches = [], file.image, kind._to_patches
    monkeypatch.setattr(file, "image", lambda *args: done.append("frame") or image(*args))
    monkeypatch.setattr(
        kind, "_to_patches", lambda *args: done.append("patches") or to_patches(*args)
    )
    out = processor.video_processor([str(keyed)], video_readers=readers, num_frames=40)
    assert out["video_grid_thw"][0][0] == 20
    assert (done.count("frame"), done.count("patches")) == (40, 20)
    # Two frames a step, as many as readers that wait, and one in the hands of each.
    for step in range(20):
        at = [i for i, what in enumerate(done) if what == "patches"][step]
        assert done[:at].count("frame") <= 2 * (step + 1) + 2 * readers


def test_readers_lay_frames_out_for_the_thread_that_stacks_them(processor, keyed, monkeypatch):
    stack, laid_out = torch.stack, []
    monkeypatch.setattr(
        torch, "stack", lambda x: laid_out.extend(y.is_contiguous() for y in x) or stack(x)
    )
    processor.video_processor([str(keyed)], num_frames=8)
    assert laid_out == [True] * 8


def test_one_thread_computes_beside_readers():
    end = threading.Event()
    reader = threading.Thread(target=end.wait, name=video_readers_videonsa.THREAD_NAME)
    torch.set_num_threads(2)
    try:
        with video_readers_videonsa.one_thread_beside_readers():
            assert torch.get_num_threads() == 2
        reader.start()
        with video_readers_videonsa.one_thread_beside_readers():
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
        end.set()
        reader.join()


def test_a_process_ends_quietly_with_readers(keyed):
    script = f"""
import sys
from transformers import AutoProcessor
processor = AutoProcessor.from_pretrained({str(ROOT)!r}, trust_remote_code=True)
out = processor.video_processor([{str(keyed)!r}], stream=True, video_readers=3)
stream = out["pixel_values_videos"]
stream[0:8]
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


class Defaults(torch.utils.data.Dataset):
    def __len__(self):
        return 2

    def __getitem__(self, index):
        return default_readers(10**9)


def test_there_are_readers_for_large_frames_on_all_cores(monkeypatch):
    monkeypatch.setattr(video_readers_videonsa, "usable_cores", lambda: 16)
    sizes = ((1, 1), (160, 120), (640, 360), (1280, 720), (3840, 2160))
    assert [default_readers(height * width) for height, width in sizes] == [1, 1, 8, 16, 16]


def test_a_worker_of_a_loader_has_one_reader():
    assert default_readers(10**9) == usable_cores()
    loader = torch.utils.data.DataLoader(Defaults(), num_workers=1, batch_size=None)
    assert list(loader) == [1, 1]


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="cores cannot be chosen here")
def test_cores_are_those_of_the_process():
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(before)})
        assert usable_cores() == 1
    finally:
        os.sched_setaffinity(0, before)


QUOTAS = {
    "version 2, above": ("0::/jobs/one\n", {"jobs/cpu.max": "150000 100000\n"}, 1.5),
    "version 2, a container": ("0::/../host\n", {"cpu.max": "400000 100000\n"}, 4),
    "version 2, none": ("0::/jobs\n", {"jobs/cpu.max": "max 100000\n"}, math.inf),
    "version 1": (
        "4:memory:/jobs\n3:cpu,cpuacct:/jobs\n",
        {
            "cpu,cpuacct/jobs/cpu.cfs_quota_us": "200000\n",
            "cpu,cpuacct/jobs/cpu.cfs_period_us": "100000\n",
            "cpu,cpuacct/cpu.cfs_quota_us": "-1\n",
            "cpu,cpuacct/cpu.cfs_period_us": "100000\n",
        },
        2,
    ),
    "another controller": ("4:cpuset:/\n", {"cpuset/cpu.max": "1 1"}, math.inf),
    "no groups": (None, {}, math.inf),
}


@pytest.mark.parametrize("kind", QUOTAS)
def test_quotas_of_control_groups(tmp_path, monkeypatch, kind):
    own, files, cores = QUOTAS[kind]
    root, of_process = tmp_path / "cgroup", tmp_path / "own"
    if own is not None:
        of_process.write_text(own)
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    quotas = video_readers_videonsa._quotas(root, of_process)
    assert min(quotas) == cores
    monkeypatch.setattr(video_readers_videonsa, "_quotas", lambda: quotas)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)), raising=False)
    assert usable_cores() == min(16, math.ceil(min(cores, 16)))
