"""Joins the Ray cluster that a job was submitted to, or starts one on this machine.

A cluster on this machine gets more logical CPUs than it has cores: actors hold their CPU for the whole
run, and with none left the tasks between two pools would wait for ever.
"""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

LOGICAL_CPUS_PER_CORE = 4


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def joins_cluster(address: str | None) -> bool:
    """Whether a cluster that others started is joined, rather than one started on this machine."""
    return bool(address or os.environ.get("RAY_ADDRESS"))


@contextmanager
def ray_cluster(address: str | None = None, *, num_cpus: int | None = None) -> Iterator[None]:
    """Connect for the duration of a job, and disconnect; a cluster started here ends with it.

    Without an address, `RAY_ADDRESS` decides (set by `ray job submit`), else a local cluster is started.
    A process that is connected already is left as it is.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    if ray.is_initialized():
        yield
        return
    joins = address or os.environ.get("RAY_ADDRESS")
    local = (
        {} if joins else {"num_cpus": num_cpus or LOGICAL_CPUS_PER_CORE * cores(), "include_dashboard": False}
    )
    ray.init(
        address=address, configure_logging=True, logging_level=logging.WARNING, log_to_driver=False, **local
    )
    try:
        yield
    finally:
        ray.shutdown()
