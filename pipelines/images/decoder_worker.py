"""The child side of `DecoderProcess`: a supervisor that imports the decoders, and the worker that it forks.

The worker answers the caller's requests itself. The supervisor waits for the worker to die, answers the
request in hand with the worker's exit code, and forks the next one; it never touches a payload, so no
payload can harm it. Both end when the caller does. Started as `python -m pipelines.images.decoder_worker
SETTINGS`; imports no more than numpy and Pillow's decoders.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import select
import signal
import sys
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NoReturn

from pipelines.images import prepare
from pipelines.images.shared_memory import ANSWER, REQUEST, SharedMemory, write_outcome

if TYPE_CHECKING:  # the decoder's child starts without pydantic
    from pipelines.specs import DecodeLimits, ImageSpec

CALLER_IN, CALLER_OUT = 0, 1


def supervise(memory: SharedMemory, spec: ImageSpec, limits: DecodeLimits) -> None:
    """Replace each worker that dies, until one ends because the caller is gone."""
    os.write(CALLER_OUT, ANSWER.pack(0, 0))
    while True:
        pid = os.fork()
        if pid == 0:
            work(memory, spec, limits)
        _, status = os.waitpid(pid, 0)
        code = os.waitstatus_to_exitcode(status)
        if code == 0:
            return
        os.write(CALLER_OUT, ANSWER.pack(memory.header["request"][0], code))


def work(memory: SharedMemory, spec: ImageSpec, limits: DecodeLimits) -> NoReturn:
    """Decode what the caller requests and record each outcome; exit when the caller is gone."""
    code = 1
    try:
        answers = os.dup(CALLER_OUT)
        confine(limits)
        while request := os.read(CALLER_IN, REQUEST.size):
            number, batch, start, stop, size = REQUEST.unpack(request)
            memory.remap(size)
            decode_range(memory, batch, range(start, stop), spec, limits)
            os.write(answers, ANSWER.pack(number, 0))
        code = 0
    finally:
        os._exit(code)  # a fork must not run its parent's exit handlers


def decode_range(
    memory: SharedMemory, batch: int, indexes: range, spec: ImageSpec, limits: DecodeLimits
) -> None:
    """Decode images of a batch in shared memory; SIGALRM ends this process when one takes too long."""
    slots, pixels_nhwc = memory.slots(batch), memory.pixels_nhwc(batch)
    hang_up = select.poll()
    hang_up.register(CALLER_IN, 0)
    for index in indexes:
        if hang_up.poll(0):
            os._exit(0)
        signal.setitimer(signal.ITIMER_REAL, limits.timeout_s)
        payload = memory.read(int(slots["offset"][index]), int(slots["length"][index]))
        prepared = prepare.prepare(payload, spec, limits)
        if prepared.pixels_hwc is not None:
            pixels_nhwc[index] = prepared.pixels_hwc
        signal.setitimer(signal.ITIMER_REAL, 0)
        write_outcome(slots, index, prepared)


def confine(limits: DecodeLimits) -> None:
    """Limit this process's memory, silence its output, and let SIGALRM end it whatever it inherited."""
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (CALLER_OUT, 2):  # libtiff and others print about every broken file
        os.dup2(null, fd)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGALRM})
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with contextlib.suppress(ValueError, OSError):  # macOS refuses RLIMIT_AS
        resource.setrlimit(resource.RLIMIT_AS, (limits.max_memory_bytes, limits.max_memory_bytes))


def main() -> None:
    """Start the supervisor with the settings of the command line."""
    settings: Any = json.loads(sys.argv[1], object_hook=lambda fields: SimpleNamespace(**fields))
    memory = SharedMemory(settings.fd, settings.spec)
    memory.remap(settings.size)
    prepare.register_plugins()  # imported before the fork, so that every worker has them
    with contextlib.suppress(BrokenPipeError):  # the caller is gone
        supervise(memory, settings.spec, settings.limits)


if __name__ == "__main__":
    main()
