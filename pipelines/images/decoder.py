"""Batches of payloads -> pixels, decoded in a process that may crash or hang without taking this one along.

Three processes. The caller's `DecoderProcess` puts payloads into memory that all three share. A supervisor
(`decoder_worker.py`) imports the decoders once and never touches a payload. Its fork, the worker, runs
`images.prepare` on one image after the other and notes each outcome in the shared memory, so that its death
costs one image and a fork of a few milliseconds, not a batch and the start of an interpreter.

Who is to blame: an image over which the worker died twice, the second time in a fresh process (the first
death may be the late effect of an earlier image, or a kill from outside), is `decoder_crashed`; one that
takes longer than `timeout_s` is `decode_timeout` at once. For tests, `IAB_VISION_TEST_FAULTS` in the
environment (`3f5a=segv,77=hang`) has payloads whose SHA-256 begins so provoke `segv`, `abort` or `hang`.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Self

import numpy as np

from pipelines.images.prepare import Pixels, Prepared
from pipelines.images.shared_memory import (
    REQUEST,
    Death,
    SharedMemory,
    anonymous_file,
    carry_through,
    read_outcome,
)
from pipelines.specs import DecodeLimits, ImageSpec
from pipelines.status import Status

PAYLOAD_BYTES_AT_ONCE = 32 << 20
"""Payloads in shared memory at a time; a larger one goes alone. It bounds the memory of a large batch."""


class DecoderUnavailable(RuntimeError):
    """The supervisor does not start: this machine is at fault, not an image."""


class DecoderProcess:
    """Owns the decoding processes; they end with `close()`, or when the process that holds this ends."""

    def __init__(self, spec: ImageSpec, limits: DecodeLimits | None = None) -> None:
        self._memory = SharedMemory(anonymous_file(), spec)
        self._settings = {
            "spec": asdict(spec),
            "limits": asdict(limits or DecodeLimits()),
            "fd": self._memory.fd,
        }
        self._supervisor = self._started()

    def prepare_batch(self, payloads: Sequence[bytes | memoryview]) -> tuple[list[Prepared], Pixels]:
        """Decode a batch: an outcome per payload (without its pixels), and uint8 [n, height, width, 3].

        Rows whose status is not `ok` hold zeros. The array is read-only and shows shared memory: the next
        call overwrites it. Not for several threads at once.

        Raises:
            DecoderUnavailable: the supervisor was lost and cannot be started again.
        """
        batch = len(payloads)
        self._memory.grow(self._memory.payloads_start(batch))
        self._memory.slots(batch)["done"] = 0
        for start, stop in by_bytes([len(payload) for payload in payloads]):
            self._place(payloads, start, stop)
            slots = self._memory.slots(batch)
            carry_through(slots, start, stop, lambda first, last: self._attempt(batch, first, last))
        return self._results(batch)

    def close(self) -> None:
        """End the decoding processes."""
        self._end()
        os.close(self._memory.fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _place(self, payloads: Sequence[bytes | memoryview], start: int, stop: int) -> None:
        """Copy some payloads into shared memory."""
        offset = self._memory.payloads_start(len(payloads))
        self._memory.grow(offset + sum(len(payload) for payload in payloads[start:stop]))
        slots = self._memory.slots(len(payloads))
        for index in range(start, stop):
            payload = payloads[index]
            self._memory.write(offset, payload)
            slots["offset"][index], slots["length"][index] = offset, len(payload)
            offset += len(payload)

    def _results(self, batch: int) -> tuple[list[Prepared], Pixels]:
        slots, pixels_nhwc = self._memory.slots(batch), self._memory.pixels_nhwc(batch)
        prepared = [read_outcome(slots, index) for index in range(batch)]
        pixels_nhwc[np.array([image.status is not Status.OK for image in prepared], dtype=bool)] = 0
        pixels_nhwc.flags.writeable = False
        return prepared, pixels_nhwc

    def _attempt(self, batch: int, start: int, stop: int) -> Death | None:
        """Have the supervisor see a range through; it outlives its workers, so it ended from outside."""
        if self._supervisor.returncode is not None:
            self._supervisor = self._started()
        stdin, stdout = pipes(self._supervisor)
        answer = b""
        try:
            os.write(stdin, REQUEST.pack(batch, start, stop, self._memory.size))
            answer = os.read(stdout, 1)
        except BrokenPipeError:
            pass
        finally:  # after an interrupt too: its answer would be taken for the next request's
            if not answer:
                self._end()
        if answer:
            return None
        return Death(Status.DECODER_CRASHED, "the decoder and its supervisor were killed, twice")

    def _started(self) -> "subprocess.Popen[bytes]":
        process = subprocess.Popen(  # noqa: S603 (this interpreter, our own module)
            [sys.executable, "-P", "-m", "pipelines.images.decoder_worker", json.dumps(self._settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            pass_fds=[self._memory.fd],
            env=child_environment(),
            start_new_session=True,  # Ctrl-C is for the job, which ends its decoders itself
        )
        if not os.read(pipes(process)[1], 1):
            code = process.wait()
            raise DecoderUnavailable(f"the decoder process ended with code {code} as it started; see stderr")
        return process

    def _end(self) -> None:
        for pipe in (self._supervisor.stdin, self._supervisor.stdout):
            if pipe is not None:
                pipe.close()
        try:
            self._supervisor.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self._supervisor.kill()
            self._supervisor.wait()


def child_environment() -> dict[str, str]:
    """This process's module path, and one BLAS thread: a process that forks should have no others."""
    paths = [str(Path(__file__).resolve().parents[2]), *(path for path in sys.path if path)]
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OPENBLAS_NUM_THREADS": "1"}


def pipes(process: "subprocess.Popen[bytes]") -> tuple[int, int]:
    """File descriptors to write to a child and to read from it."""
    if process.stdin is None or process.stdout is None:
        raise DecoderUnavailable("the decoder process was started without pipes")
    return process.stdin.fileno(), process.stdout.fileno()


def by_bytes(lengths: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Cut a batch into ranges of at most PAYLOAD_BYTES_AT_ONCE, or of one payload."""
    start = total = 0
    for index, length in enumerate(lengths):
        if index > start and total + length > PAYLOAD_BYTES_AT_ONCE:
            yield start, index
            start, total = index, 0
        total += length
    if lengths:
        yield start, len(lengths)
