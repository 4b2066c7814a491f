"""A request to stop becomes an exception in the main thread, so that a job can put its work away."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

STOPPING = (signal.SIGTERM, signal.SIGINT)


class Stopped(BaseException):
    """SIGTERM or SIGINT arrived; its text is the signal's name."""


@contextmanager
def stoppable() -> Iterator[None]:
    """Raise `Stopped` here when asked to stop. A second signal, after this ends, kills as usual."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Stopped(signal.Signals(number).name)

    previous = {number: signal.signal(number, stop) for number in STOPPING}
    try:
        yield
    finally:
        for number in STOPPING:
            signal.signal(number, signal.SIG_DFL if number is signal.SIGTERM else previous[number])
