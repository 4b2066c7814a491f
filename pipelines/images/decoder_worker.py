"""The child side of `decoder.py`: a supervisor that forks, times and replaces a worker that decodes.

The supervisor never touches a payload, so nothing in one can harm it; it ends when its caller does. Started
as `python -m pipelines.images.decoder_worker SETTINGS`. It imports no more than numpy and Pillow's decoders.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import json
import os
import resource
import select
import signal
import sys
import time
from collections.abc import Mapping
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NoReturn

from pipelines.images import prepare
from pipelines.images.shared_memory import REQUEST, Death, SharedMemory, carry_through, write_outcome
from pipelines.status import Status

if TYPE_CHECKING:  # the decoder's child starts without pydantic
    from pipelines.specs import DecodeLimits, ImageSpec

FAULTS_VARIABLE = "IAB_VISION_TEST_FAULTS"
"""For tests: `3f5a=segv,77=hang` provokes a fault when a payload's SHA-256 begins with the prefix."""

CALLER_IN, CALLER_OUT = 0, 1
PR_SET_PDEATHSIG = 1


class Supervisor:
    """Owns the worker: its process and the two pipes to it."""

    def __init__(self, memory: SharedMemory, spec: ImageSpec, limits: DecodeLimits) -> None:
        self._memory = memory
        self._spec = spec
        self._limits = limits
        self._faults = provoked_faults(os.environ.get(FAULTS_VARIABLE, ""))
        self._pid: int | None = None

    def serve(self) -> None:
        """Answer the caller's requests until it is gone."""
        os.write(CALLER_OUT, b"+")
        while request := os.read(CALLER_IN, REQUEST.size):
            batch, start, stop, size = REQUEST.unpack(request)
            self._memory.remap(size)
            slots = self._memory.slots(batch)
            carry_through(slots, start, stop, lambda first, last: self._attempt(batch, first, last))  # noqa: B023
            os.write(CALLER_OUT, b"+")
        self._kill()

    def _attempt(self, batch: int, start: int, stop: int) -> Death | None:
        """Have the worker decode a range; None when it finished."""
        self._memory.header["started_s"] = time.monotonic()
        if self._pid is None:
            self._fork()
        try:
            os.write(self._requests, REQUEST.pack(batch, start, stop, self._memory.size))
        except BrokenPipeError:
            return self._death()
        return self._watch()

    def _watch(self) -> Death | None:
        """Wait for the worker to finish, die or take too long over one image."""
        timeout_s = self._limits.timeout_s
        while (left_s := float(self._memory.header["started_s"][0]) + timeout_s - time.monotonic()) > 0:
            ready, _, _ = select.select([self._replies, CALLER_IN], [], [], left_s)
            if CALLER_IN in ready:  # it never writes while it waits for us: it is gone
                self._kill()
                sys.exit(0)
            if self._replies in ready:
                return None if os.read(self._replies, 1) else self._death()
        self._kill()
        message = f"not decoded after {timeout_s:g} s (timeout_s)"
        return Death(Status.DECODE_TIMEOUT, message, certain=True)

    def _death(self) -> Death:
        code = self._reap()
        reason = f"died of {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
        return Death(Status.DECODER_CRASHED, f"the decoder {reason}, twice")

    def _fork(self) -> None:
        requests_in, self._requests = os.pipe()
        self._replies, replies_out = os.pipe()
        supervisor = os.getpid()
        self._pid = os.fork()
        if self._pid == 0:
            os.close(self._requests)
            os.close(self._replies)
            confine(supervisor, self._limits)
            work(requests_in, replies_out, self._memory, Decoding(self._spec, self._limits, self._faults))
        os.close(requests_in)
        os.close(replies_out)
        self._memory.header["worker_pid"] = self._pid

    def _kill(self) -> None:
        if self._pid is not None:
            os.kill(self._pid, signal.SIGKILL)
            self._reap()

    def _reap(self) -> int:
        """Collect the dead worker; return its exit code, negative for a signal."""
        if self._pid is None:
            return 0
        _, status = os.waitpid(self._pid, 0)
        self._pid = None
        os.close(self._requests)
        os.close(self._replies)
        return os.waitstatus_to_exitcode(status)


class Decoding:
    """How the worker turns one payload into an outcome: `images.prepare`, after any provoked fault."""

    def __init__(self, spec: ImageSpec, limits: DecodeLimits, faults: Mapping[str, str]) -> None:
        self._spec = spec
        self._limits = limits
        self._faults = faults

    def __call__(self, payload: bytes) -> prepare.Prepared:
        if self._faults:
            provoke(payload, self._faults)
        return prepare.prepare(payload, self._spec, self._limits)


def work(requests: int, replies: int, memory: SharedMemory, decode: Decoding) -> NoReturn:
    """The worker's life: decode what is asked, note each outcome, end when the supervisor does."""
    code = 1
    try:
        while request := os.read(requests, REQUEST.size):
            batch, start, stop, size = REQUEST.unpack(request)
            memory.remap(size)
            decode_range(memory, batch, range(start, stop), decode)
            os.write(replies, b"+")
        code = 0
    finally:
        os._exit(code)  # a fork must not run what its parent registered for the exit


def decode_range(memory: SharedMemory, batch: int, indexes: range, decode: Decoding) -> None:
    """Decode images of a batch in shared memory."""
    header, slots, pixels_nhwc = memory.header, memory.slots(batch), memory.pixels_nhwc(batch)
    for index in indexes:
        header["started_s"] = time.monotonic()
        prepared = decode(memory.read(int(slots["offset"][index]), int(slots["length"][index])))
        if prepared.pixels_hwc is not None:
            pixels_nhwc[index] = prepared.pixels_hwc
        write_outcome(slots, index, prepared)


def confine(supervisor: int, limits: DecodeLimits) -> None:
    """Limit what the worker may take, and tie its life to the supervisor's."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != supervisor:
        os._exit(1)
    nothing = os.open(os.devnull, os.O_RDWR)
    for fd in (CALLER_IN, CALLER_OUT, 2):  # libtiff and others print about every broken file
        os.dup2(nothing, fd)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with contextlib.suppress(ValueError, OSError):  # macOS refuses RLIMIT_AS
        resource.setrlimit(resource.RLIMIT_AS, (limits.max_memory_bytes, limits.max_memory_bytes))


def provoked_faults(text: str) -> dict[str, str]:
    """SHA-256 prefix -> fault, from the environment variable."""
    return dict(pair.split("=", 1) for pair in text.split(",") if pair)


def provoke(payload: bytes, faults: Mapping[str, str]) -> None:
    """Break the worker as a decoder would, if this payload is one to do so."""
    digest = hashlib.sha256(payload).hexdigest()
    for prefix, fault in faults.items():
        if not digest.startswith(prefix):
            continue
        if fault == "segv":
            ctypes.string_at(0)
        elif fault == "abort":
            os.abort()
        while fault == "hang":
            pass


def main() -> None:
    """Start the supervisor with the settings of the command line."""
    settings: Any = json.loads(sys.argv[1], object_hook=lambda fields: SimpleNamespace(**fields))
    prepare.plugins()  # imported before the fork, so that every worker has them
    with contextlib.suppress(BrokenPipeError):  # the caller went away
        Supervisor(SharedMemory(settings.fd, settings.spec), settings.spec, settings.limits).serve()


if __name__ == "__main__":
    main()
