"""Figures of a run for Prometheus: Ray exports them as `ray_iab_vision_*`, a counter with `_total`.

Where Ray does not run, nothing happens and Ray is not imported. Tags are few and closed (a status, a step):
a host or a URI would make a series of its own each.
"""

import functools
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

PREFIX = "iab_vision_"
COUNTERS = {
    "rows": ("status",),
    "bytes_fetched": (),
    "retries": (),
    "hosts_given_up": (),
    "images_run": (),
    "batch_places": (),
}
"""Name -> tags: rows recorded in the ledger; payload bytes; attempts after the first; circuits opened; images
through the model, and how many would have filled the same batches."""

GAUGES = (
    "run_images",
    "run_images_carried",
    "run_images_recorded",
    "run_images_deferred",
    "commit_time_seconds",
)
"""Images of the run in hand: all, recorded before it began, recorded by now, waiting for a later pass; and
the Unix time of the last ledger entry or check."""

STAGE_SECONDS = "stage_seconds"
BOUNDARIES_S = [0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 180.0]
"""A batch on a GPU takes tenths of a second; one that waits for slow hosts, minutes."""

_made = threading.Lock()


def count(name: str, amount: float = 1, **tags: str) -> None:
    """Add to a counter; adding 0 exports it, so that a rate also counts the first event."""
    if _on_ray():
        _metric("Counter", name, COUNTERS[name])._record(amount, tags)  # `inc` refuses 0


def put(name: str, value: float) -> None:
    """Set a gauge of `GAUGES`."""
    if _on_ray():
        _metric("Gauge", name, ()).set(value)


@contextmanager
def timed(stage: str) -> Iterator[None]:
    """Record how long a batch took in a stage."""
    started = time.monotonic()
    yield
    if _on_ray():
        _metric("Histogram", STAGE_SECONDS, ("stage",)).observe(time.monotonic() - started, {"stage": stage})


def _on_ray() -> bool:
    ray = sys.modules.get("ray")
    return ray is not None and bool(getattr(ray, "is_initialized", bool)())


def _metric(kind: str, name: str, tags: tuple[str, ...]) -> Any:
    with _made:
        return _make(kind, name, tags)


@functools.cache
def _make(kind: str, name: str, tags: tuple[str, ...]) -> Any:
    from ray.util import metrics

    more: dict[str, Any] = {"boundaries": BOUNDARIES_S} if kind == "Histogram" else {}
    return getattr(metrics, kind)(PREFIX + name, tag_keys=tags, **more)
