"""A request to stop becomes an exception in the main thread, so that a job can record its work."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from pipelines.messages import Stopped

STOPPING = (signal.SIGTERM, signal.SIGINT)


@contextmanager
def stoppable() -> Iterator[None]:
    """Raise `Stopped` here when asked to stop; asked a second time, end the process at once."""
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
        if not asked:  # else the handler stays: what follows records work
            for number, handler in previous.items():
                signal.signal(number, handler)


@contextmanager
def handlers_kept() -> Iterator[None]:
    """Put back the handlers that a library (`ray.init`) replaces with its own."""
    before = {number: signal.getsignal(number) for number in STOPPING}
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in before.items():
                signal.signal(number, handler)
