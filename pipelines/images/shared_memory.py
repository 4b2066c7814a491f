"""What the processes of `decoder.py` share: the memory, how outcomes are noted, and who is to blame."""

from __future__ import annotations

import json
import mmap
import os
import struct
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from pipelines.images.prepare import Pixels, Prepared
from pipelines.status import Status

if TYPE_CHECKING:  # the decoder's child starts without pydantic
    from pipelines.specs import ImageSpec

Records = npt.NDArray[np.void]

HEADER = np.dtype([("started_s", "<f8"), ("worker_pid", "<i8"), ("unused", "V48")])
"""When the worker took up the image in hand (monotonic clock, the same in all processes), and who it is."""

SLOT = np.dtype([("offset", "<i8"), ("length", "<i8"), ("done", "<i8"), ("outcome", "S2048")])
"""One image: where its payload lies, whether it is finished, and its outcome as JSON."""

REQUEST = struct.Struct("<qqqq")
"""Images in the batch, the first and the last + 1 to decode now, bytes of shared memory."""

MEMORY_STEP = 4 << 20
"""The file grows in steps, so that batches of like size map it once."""


@dataclass(frozen=True)
class Death:
    """How a decoding process ended before it finished, and what its image gets if that is to blame."""

    status: Status
    message: str
    certain: bool = False
    """The image in hand is to blame at the first time."""


class SharedMemory:
    """An anonymous file mapped by several processes: header, slots, pixels, payloads."""

    def __init__(self, fd: int, spec: ImageSpec) -> None:
        self.fd = fd
        self.size = 0
        self._pixels_shape = (spec.height, spec.width, 3)
        self._pixels_bytes = spec.height * spec.width * 3

    def payloads_start(self, batch: int) -> int:
        """Offset of the payloads, behind the results of a batch."""
        return HEADER.itemsize + batch * (SLOT.itemsize + self._pixels_bytes)

    def grow(self, size: int) -> None:
        """Make the file hold at least this many bytes."""
        if size > self.size:
            size = -(-size // MEMORY_STEP) * MEMORY_STEP
            os.ftruncate(self.fd, size)
            self.remap(size)

    def remap(self, size: int) -> None:
        """Follow the file to its new size; arrays made before keep the older mapping of the same bytes."""
        if size > self.size:
            self._map = mmap.mmap(self.fd, size)
            self.size = size

    @property
    def header(self) -> Records:
        """One `HEADER`."""
        return np.frombuffer(self._map, HEADER, count=1)

    def slots(self, batch: int) -> Records:
        """One `SLOT` per image of the batch."""
        return np.frombuffer(self._map, SLOT, count=batch, offset=HEADER.itemsize)

    def pixels_nhwc(self, batch: int) -> Pixels:
        """uint8 [batch, height, width, 3]."""
        start = HEADER.itemsize + batch * SLOT.itemsize
        flat = np.frombuffer(self._map, np.uint8, count=batch * self._pixels_bytes, offset=start)
        return flat.reshape(batch, *self._pixels_shape)

    def write(self, offset: int, payload: bytes | memoryview) -> None:
        """Put a payload where its slot says."""
        self._map[offset : offset + len(payload)] = payload

    def read(self, offset: int, length: int) -> bytes:
        """Take a payload out."""
        return self._map[offset : offset + length]


def anonymous_file() -> int:
    """A file without a name, in memory where the system has such."""
    if sys.platform == "linux":
        return os.memfd_create("iab-vision-decoder")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def write_outcome(slots: Records, index: int, prepared: Prepared) -> None:
    """Note what became of an image; `done` last, so that half a note is none."""
    size = (prepared.width_px, prepared.height_px)
    outcome = json.dumps((prepared.status.value, prepared.error, *size, prepared.format), ensure_ascii=False)
    slots["outcome"][index] = outcome.encode()
    slots["done"][index] = 1


def read_outcome(slots: Records, index: int) -> Prepared:
    """The inverse of `write_outcome`; pixels stay where they are."""
    status, error, width_px, height_px, name = json.loads(slots["outcome"][index])
    return Prepared(Status(status), error, None, width_px, height_px, name)


def carry_through(slots: Records, start: int, stop: int, attempt: Callable[[int, int], Death | None]) -> None:
    """Repeat `attempt(start, stop)`, skipping what is done, until every slot of the range has an outcome.

    An image gets the blame for a death that is certain to be its own, or for the second death over it.
    """
    suspect = None
    while start < stop and (death := attempt(start, stop)) is not None:
        pending = np.flatnonzero(slots["done"][start:stop] == 0)
        start = start + int(pending[0]) if len(pending) else stop
        if start == stop:
            return
        if death.certain or start == suspect:
            write_outcome(slots, start, Prepared(death.status, death.message))
            start += 1
        else:
            suspect = start
