"""The memory that the decoding processes share: its layout, and the messages that refer to it."""

from __future__ import annotations

import json
import mmap
import os
import struct
import sys
import tempfile
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from pipelines.images.prepare import Pixels, Prepared
from pipelines.status import Status

if TYPE_CHECKING:  # the decoder's child starts without pydantic
    from pipelines.specs import ImageSpec

Records = npt.NDArray[np.void]

HEADER = np.dtype([("request", "<i8"), ("unused", "V56")])
"""Number of the caller's latest request."""

SLOT = np.dtype([("offset", "<i8"), ("length", "<i8"), ("done", "<i8"), ("outcome", "S2048")])
"""One image: where its payload is, whether it is finished, and its outcome as JSON."""

REQUEST = struct.Struct("<qqqqq")
"""Number of the request, images in the batch, the first and the last + 1 to decode, size of the memory."""

ANSWER = struct.Struct("<qq")
"""Number of the request, and 0 or the exit code of the worker that died, negative for a signal."""

MEMORY_STEP = 4 << 20
"""The file grows in steps, so that batches of similar size map it once."""


class SharedMemory:
    """An anonymous file mapped by several processes: header, slots, pixels, payloads."""

    def __init__(self, fd: int, spec: ImageSpec) -> None:
        self.fd = fd
        self.size = 0
        self._pixels_shape = (spec.height, spec.width, 3)
        self._pixels_bytes = spec.height * spec.width * 3

    def payloads_start(self, batch: int) -> int:
        """Offset of the payloads, after the results of a batch."""
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
        """Copy a payload to an offset."""
        self._map[offset : offset + len(payload)] = payload

    def read(self, offset: int, length: int) -> bytes:
        """Copy a payload out."""
        return self._map[offset : offset + length]


def anonymous_file() -> int:
    """A file without a name; on Linux in memory."""
    if sys.platform == "linux":
        return os.memfd_create("iab-vision-decoder")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def write_outcome(slots: Records, index: int, prepared: Prepared) -> None:
    """Record an image's outcome; `done` last, so that half a record does not count."""
    size = (prepared.width_px, prepared.height_px)
    outcome = json.dumps((prepared.status.value, prepared.error, *size, prepared.format), ensure_ascii=False)
    slots["outcome"][index] = outcome.encode()
    slots["done"][index] = 1


def read_outcome(slots: Records, index: int) -> Prepared:
    """The inverse of `write_outcome`; pixels stay where they are."""
    status, error, width_px, height_px, name = json.loads(slots["outcome"][index])
    return Prepared(Status(status), error, None, width_px, height_px, name)
