"""The one place where a video is opened: which containers, which protocols, under what name.

What somebody uploads is not trusted: only containers of recordings are opened, never playlists and
scripts that name other files, and nothing but the file or address itself is read.
"""

import io
import os
import shlex
import stat

import torch

from .message_parts_videonsa import describe_source, is_address
from .video_plan_videonsa import MAX_FRAME_PIXELS

try:
    import av
    from av.codec.hwaccel import HWAccel
except ImportError:  # reading a file says so; frames that are given need no reader
    av = None

PYAV = int(av.__version__.split(".")[0]) if av is not None else 0

# Containers and streams that cameras, phones, recorders and encoders write (FFmpeg's names).
FORMATS = (
    "mov,mp4,matroska,webm,avi,mpegts,mpeg,flv,live_flv,asf,ogg,mxf,nut,rm,dv,wtv,dhav,"
    "h264,hevc,vvc,mpegvideo,m4v,h261,h263,vc1,obu,av1,ivf,dirac,"
    "gif,apng,mjpeg,mpjpeg,yuv4mpegpipe"
)
# An address may lead to another one, by http or https alone.
WEB = "http,https,tls,tcp,httpproxy"


class VideoSource:
    """A video that can be opened, any number of times.

    source: a path, an http(s) address or bytes, as `plain_source` makes them.
    name: for messages.  is_url: true of an address.

    Raises ValueError or FileNotFoundError for what cannot be a video, without reading it.
    """

    def __init__(self, source: str | bytes):
        self.source, self.is_url = source, is_address(source)
        self.name = described = describe_source(source)
        if self.is_url or isinstance(source, bytes):
            return
        self.name = os.path.basename(described) or described
        try:
            status = os.stat(source)
        except (OSError, ValueError):  # also too long for a name, or with a zero byte in it
            hint = " Addresses begin with http:// or https://." if "://" in source else ""
            raise FileNotFoundError(f"There is no video file {described}.{hint}") from None
        if not stat.S_ISREG(status.st_mode):
            kind = "a folder" if stat.S_ISDIR(status.st_mode) else "a pipe or a device"
            raise ValueError(f"{described} is {kind}; give a video file.")
        if not status.st_size:
            raise ValueError(f"{self.name} is empty (0 bytes): {self.convert_hint()}.")
        self.inode = status.st_dev, status.st_ino

    def open(self, gpu: int | None = None):
        """The container, with PyAV; decoded by the GPU of this number, if one is given."""
        if av is None:
            raise ImportError(
                "Reading a video file needs PyAV, which is not installed: pip install av. "
                "(Or pass the frames themselves.)"
            )
        place = self.source
        if isinstance(place, bytes):
            place = io.BytesIO(place)
        elif not self.is_url:
            # Whole, because FFmpeg takes what stands before a colon for a protocol.
            place = os.path.abspath(place)
            status = os.stat(place)
            if (status.st_dev, status.st_ino) != self.inode:
                raise ValueError(
                    f"{self.name} is another file than it was when it was first opened: plan it "
                    "again."
                )
        # FFmpeg decodes a first frame to find out its format. Before PyAV 18, options for that
        # overrun their memory in files whose tracks are found on the way.
        decoder = {"max_pixels": str(MAX_FRAME_PIXELS)} if PYAV >= 18 else {}
        gpu_decoder = {}
        if gpu is not None:
            # Frames stay on the GPU; those that are taken are fetched. In PyTorch's own context,
            # which this call gives to the thread: FFmpeg refuses it as the device's primary one,
            # because it would have set other flags, and one of its own takes memory.
            torch.cuda.Stream(gpu).synchronize()
            context = {"primary_ctx": "0", "current_ctx": "1"}
            kind = {"device": str(gpu), "allow_software_fallback": False, "is_hw_owned": True}
            gpu_decoder["hwaccel"] = HWAccel("cuda", options=context, **kind)
        return av.open(
            place,
            **gpu_decoder,
            options=decoder,
            container_options={
                "format_whitelist": FORMATS,
                "protocol_whitelist": WEB if self.is_url else "file",
            },
            metadata_errors="replace",
            timeout=30 if self.is_url else None,
        )

    def raw(self) -> io.RawIOBase:
        """The bytes, to be closed; of an address none, because asking for some takes long."""
        if self.is_url:
            return io.BytesIO()
        if isinstance(self.source, bytes):
            return io.BytesIO(self.source)
        return open(self.source, "rb", buffering=0)

    def convert_hint(self) -> str:
        """What to do with a file that a player shows and this does not read."""
        if self.is_url:
            return "check the address"
        hint = "use a complete video file; if a player shows this one, convert it first"
        if isinstance(self.source, bytes):
            return hint
        return f"{hint}: ffmpeg -i {shlex.quote(self.name)} -c:v libx264 converted.mp4"
