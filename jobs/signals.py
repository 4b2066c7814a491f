"""A request to stop becomes an exception in the main thread, so that a job can put its work away."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

STOPPING = (signal.SIGTERM, signal.SIGINT)


class Stopped(BaseException):
    """SIGTERM or SIGINT arrived; its text is the signal's name."""


@contextmanager
def stoppable() -> Iterator[None]:
    """Raise `Stopped` here when asked to stop; asked a second time, end the process at once.

    Enter it again after `ray.init`, which puts a handler of its own in place.
    """
    asked = False

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        if asked:
            os._exit(1)
        asked = True
        raise Stopped(signal.Signals(number).name)

    previous = {number: signal.signal(number, stop) for number in STOPPING}
    try:
        yield
    finally:
        if not asked:  # else the handler stays: what follows is putting work away
            for number, handler in previous.items():
                signal.signal(number, handler)
