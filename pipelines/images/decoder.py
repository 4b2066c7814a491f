"""Batches of payloads -> pixels, decoded in a process that may crash or hang without taking this one along.

Three processes share a block of memory. The caller's `DecoderProcess` puts payloads there. A supervisor
imports the decoders once; its fork, the worker, runs `images.prepare` on one image after the other and
records each outcome in the shared memory. A crash therefore costs one image and a fork of a few
milliseconds, not a batch and the start of an interpreter.

An image over which the worker died twice, the second time in a fresh process, is `decoder_crashed`: the
first death may be the late effect of an earlier image, or a kill from outside. One that takes longer than
`timeout_s` is `decode_timeout` at once.

Not `multiprocessing`'s fork server: its children import the caller's main module again, which in a Ray
worker is Ray.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Self

import numpy as np

from pipelines.images.prepare import Pixels, Prepared
from pipelines.images.shared_memory import (
    ANSWER,
    REQUEST,
    SharedMemory,
    anonymous_file,
    read_outcome,
    write_outcome,
)
from pipelines.messages import JobFailed
from pipelines.specs import DecodeLimits, ImageSpec
from pipelines.status import Status

PAYLOAD_BYTES_AT_ONCE = 32 << 20
"""Payloads in shared memory at a time; a larger one goes alone. It bounds the memory of a large batch."""


class DecoderUnavailable(JobFailed):
    """The supervisor does not start: this machine is at fault, not an image."""


class DecoderProcess:
    """Owns the decoding processes; they end with `close()`, or when the process that holds this ends."""

    def __init__(self, spec: ImageSpec, limits: DecodeLimits | None = None) -> None:
        self._memory = SharedMemory(anonymous_file(), spec)
        self._memory.grow(self._memory.payloads_start(0))
        self._spec, self._limits = spec, limits or DecodeLimits()
        self._requests = 0
        self._supervisor = self._start()

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
        for start, stop in split_by_bytes([len(payload) for payload in payloads]):
            self._place(payloads, start, stop)
            self._decode(batch, start, stop)
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

    def _decode(self, batch: int, start: int, stop: int) -> None:
        """Have every image of a range decoded, which takes a further attempt for each death of the worker."""
        slots = self._memory.slots(batch)
        suspect = None
        while start < stop and (failure := self._attempt(batch, start, stop)) is not None:
            start += int(slots["done"][start:stop].sum())  # they are decoded in order
            if start < stop and (start == suspect or failure.status is Status.DECODE_TIMEOUT):
                write_outcome(slots, start, failure)
                start += 1
            else:
                suspect = start

    def _attempt(self, batch: int, start: int, stop: int) -> Prepared | None:
        """Have a worker decode a range; if it died over an image, the outcome that this image may get."""
        if self._supervisor.returncode is not None:
            self._supervisor = self._start()
        self._requests += 1
        self._memory.header["request"] = self._requests
        code = None
        try:
            code = self._ask(REQUEST.pack(self._requests, batch, start, stop, self._memory.size))
        finally:  # an interrupt leaves a worker that still writes to the memory
            if code is None:
                self._end()
        return None if code == 0 else _explain_exit(code, self._limits)

    def _ask(self, request: bytes) -> int | None:
        """Send a request; 0 when it is done, else the worker's exit code, or None when nobody answers."""
        stdin, stdout = _pipes(self._supervisor)
        with contextlib.suppress(BrokenPipeError):
            os.write(stdin, request)
            while answer := os.read(stdout, ANSWER.size):
                number, code = ANSWER.unpack(answer)
                if number == self._requests:  # else a worker was killed between two requests
                    return int(code)
        return None

    def _start(self) -> "subprocess.Popen[bytes]":
        settings = {
            "spec": asdict(self._spec),
            "limits": asdict(self._limits),
            "fd": self._memory.fd,
            "size": self._memory.size,
        }
        process = subprocess.Popen(  # noqa: S603 (this interpreter, our own module)
            [sys.executable, "-P", "-m", "pipelines.images.decoder_worker", json.dumps(settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            pass_fds=[self._memory.fd],
            env=child_environment(),
            start_new_session=True,  # Ctrl-C is for the job, which ends its decoders itself
        )
        if not os.read(_pipes(process)[1], ANSWER.size):
            code = process.wait()
            raise DecoderUnavailable(f"the decoder process ended with code {code} as it started; see stderr")
        return process

    def _end(self) -> None:
        """Kill supervisor and worker: neither holds anything of value."""
        for pipe in (self._supervisor.stdin, self._supervisor.stdout):
            if pipe is not None:
                pipe.close()
        if self._supervisor.returncode is None:
            with contextlib.suppress(ProcessLookupError, PermissionError):  # both are gone already
                os.killpg(self._supervisor.pid, signal.SIGKILL)
        self._supervisor.wait()


def _explain_exit(code: int | None, limits: DecodeLimits) -> Prepared:
    """What an image gets whose worker ended with this exit code; None when the supervisor died too."""
    if code == -signal.SIGALRM:
        message = f"not decoded after {limits.timeout_s:g} s (timeout_s)"
        return Prepared(Status.DECODE_TIMEOUT, message)
    if code is None:
        return Prepared(Status.DECODER_CRASHED, "the decoder and its supervisor were killed, twice")
    reason = f"died of {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
    return Prepared(Status.DECODER_CRASHED, f"the decoder {reason}, twice")


def child_environment() -> dict[str, str]:
    """This process's module path, and one BLAS thread: a process that forks should have no others."""
    paths = [str(Path(__file__).resolve().parents[2]), *(path for path in sys.path if path)]
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OPENBLAS_NUM_THREADS": "1"}


def _pipes(process: "subprocess.Popen[bytes]") -> tuple[int, int]:
    """File descriptors to write to a child and to read from it."""
    if process.stdin is None or process.stdout is None:
        raise DecoderUnavailable("the decoder process was started without pipes")
    return process.stdin.fileno(), process.stdout.fileno()


def split_by_bytes(lengths: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Cut a batch into ranges of at most PAYLOAD_BYTES_AT_ONCE, or of one payload."""
    start = total = 0
    for index, length in enumerate(lengths):
        if index > start and total + length > PAYLOAD_BYTES_AT_ONCE:
            yield start, index
            start, total = index, 0
        total += length
    if lengths:
        yield start, len(lengths)
