"""Pixels of videos that are decoded while the model reads them.

`PixelStream` stands for the tensor `pixel_values_videos`; a thread of its own fills it, a bounded
number of bytes ahead of what is read.
"""

import queue
import threading
import weakref

import torch

# A stream decodes so many temporal steps at a time, fewer where they are large, and is so many
# bytes of pixels ahead of what is read, or two such groups. As many bytes again may be frames that
# its readers have decoded ahead (video_readers_videonsa.py).
GROUP_STEPS, GROUP_BYTES = 8, 16 << 20
AHEAD_BYTES = 128 << 20


class PixelStream:
    """The rows of `pixel_values_videos`, decoded in the background while they are read.

    shape and dtype are those of the tensor that this stands for: (rows, columns), float.
    `stream[first:last]` is these rows of it, on the CPU. Slices are taken in ascending order; one
    may start up to `overlap` rows, a temporal step of the largest video, before the end of what
    was read. A stream is read once.

    From the first slice on a thread decodes, and waits when it is 128 MiB of pixels ahead (two
    groups of temporal steps, where those take more). With the slice itself, the overlap, the group
    being made, and 128 MiB of frames where several readers decode, that is the host memory of a
    stream, however long its videos are. `close()`, the end of a `with` block, an error, Ctrl-C and
    garbage collection stop the thread.

    Raises ValueError for rows that are gone, and where it is reached for what is wrong with a
    video and could not be known before.
    """

    def __init__(self, groups, shape, dtype, overlap, groups_ahead):
        """groups: a generator function of an event; it yields rows, in order, until that is set."""
        self.shape, self.dtype, self.overlap = tuple(shape), dtype, overlap
        self._kept = []  # pairs (number of the first row, rows) of what may still be asked for
        self._decoded = self._read = 0  # rows
        self._ready, stop = queue.Queue(groups_ahead), threading.Event()
        groups = groups(stop)
        self._thread = threading.Thread(
            target=_decode_groups, args=(groups, self._ready, stop), name="PixelStream", daemon=True
        )
        self._stop = weakref.finalize(self, _stop_decoding, self._thread, groups, self._ready, stop)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.close()

    def close(self):
        """Stops decoding; nothing can be read afterwards."""
        self._stop()
        self._kept = []

    def __len__(self):
        return self.shape[0]

    def __getitem__(self, rows):
        if not isinstance(rows, slice) or rows.step not in (None, 1):
            raise self._refusal(f"{rows!r} is not a range of rows")
        first, last, _ = rows.indices(len(self))
        if not self._stop.alive:
            raise self._refusal("it was closed, or ended with an error")
        if first < self._read - self.overlap:
            raise self._refusal(f"row {first} is gone after row {self._read} was read")
        pixels = torch.empty(max(last - first, 0), self.shape[1], dtype=self.dtype, device="cpu")
        self._read, position = max(self._read, first), first
        try:
            while position < last:
                while self._decoded <= position:
                    self._take_group()
                for start, group in self._kept:
                    piece = group[max(position - start, 0) : last - start]
                    if start <= position < start + len(group):
                        pixels[position - first :][: len(piece)] = piece
                        position += len(piece)
                self._read = max(self._read, position)
                self._forget()
        except BaseException:  # Ctrl-C too: what was taken from the queue may be lost
            self.close()
            raise
        return pixels

    def _take_group(self):
        if self._thread.ident is None:
            self._thread.start()
        group = None
        while group is None:
            try:
                group = self._ready.get(timeout=1)
            except queue.Empty:
                if not self._thread.is_alive() and self._ready.empty():
                    raise RuntimeError("The thread that decodes a PixelStream is gone.") from None
        if isinstance(group, BaseException):
            raise group
        self._kept.append((self._decoded, group))
        self._decoded += len(group)
        self._forget()

    def _forget(self):
        oldest = self._read - self.overlap
        self._kept = [(start, group) for start, group in self._kept if start + len(group) > oldest]

    def _refusal(self, what):
        return ValueError(
            f"A PixelStream is read once, in slices that go up, but {what}: ask the processor for "
            "a new stream, or for a tensor (without stream=True)."
        )

    def __getattr__(self, name):
        raise AttributeError(
            f"A PixelStream has no {name!r}: it is no tensor, only slices [first:last] of it are. "
            "Ask the processor for a tensor (without stream=True)."
        )

    def __reduce_ex__(self, protocol):
        raise TypeError(
            "A PixelStream cannot be copied or sent to another process; make it where it is read."
        )


# What a stream's thread runs does not refer to the stream, so that this can be garbage.
def _decode_groups(groups, ready, stop):
    """Puts the groups of rows into the queue `ready`, and the error that ended them, if any."""
    try:
        for group in groups:
            _put(group, ready, stop)
    except BaseException as error:  # raised again by the reader
        _put(error, ready, stop)


def _put(item, ready, stop):
    while not stop.is_set():
        try:
            return ready.put(item, timeout=0.1)
        except queue.Full:
            pass


def _stop_decoding(thread, groups, ready, stop):
    stop.set()
    if thread.ident is None:
        groups.close()  # closes the files, which at the interpreter's end would be too late
    while not ready.empty():
        ready.get_nowait()
    # A frame that is being decoded is waited for, an address that does not answer is not.
    if thread.is_alive() and thread is not threading.current_thread():
        thread.join(timeout=2)
