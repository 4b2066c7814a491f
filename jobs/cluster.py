"""Joins the Ray cluster that a job was submitted to, or starts one on this machine.

A cluster on this machine gets more logical CPUs than it has cores: actors hold their CPU for the whole
run, and with none left the tasks between two pools would wait forever.
"""

import logging
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from jobs.signals import handlers_kept
from pipelines.machine import cores

log = logging.getLogger(__name__)

LOGICAL_CPUS_PER_CORE = 4
STARTS = 3
"""Attempts to start a cluster on this machine."""
QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_AUTO_CONNECT": "0",  # a thread that outlives its job must not start a cluster of its own
    "RAY_DATA_LOG_LEVEL": "ERROR",  # its plan and its own progress table; we show ours
    "HF_HUB_VERBOSITY": "error",  # each retry, twice over; the failure itself is told
    "RAY_BACKEND_LOG_LEVEL": "fatal",  # one error-like line per actor pool (ray #53727)
}
"""Environment of the driver, unless the user set it: what libraries say of a healthy run is not for users."""


def quieten() -> None:
    """Set `QUIET`; only before Ray is imported does it all take effect."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)


def use_token() -> None:
    """Send Ray's token where this user has one; Ray's clients do so only when `RAY_AUTH_MODE` says it.

    A cluster on this machine writes `~/.ray/auth_token`, and every `ray start --head` after that asks for it.
    Ray's clients read the mode when Ray is imported and its servers when they start: set in between, the two
    would disagree, so a process that has imported Ray is left as it is.
    """
    if "ray" in sys.modules:
        return
    file = Path(os.environ.get("RAY_AUTH_TOKEN_PATH", "~/.ray/auth_token")).expanduser()
    if "RAY_AUTH_TOKEN" in os.environ or file.is_file():
        os.environ.setdefault("RAY_AUTH_MODE", "token")


def joins_cluster(address: str | None) -> bool:
    """Whether a cluster that others started is joined, rather than one started on this machine."""
    return bool(address or os.environ.get("RAY_ADDRESS"))


@contextmanager
def without_log_level_line() -> Iterator[None]:
    """Drop the line that Ray's native code prints on the process's streams because its log level is set.

    What else arrives on standard error meanwhile is printed afterwards.
    """
    sys.stderr.flush()
    printed_on = os.dup(2)
    with tempfile.TemporaryFile() as held:
        os.dup2(held.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(printed_on, 2)
            os.close(printed_on)
            held.seek(0)
            os.write(2, b"".join(line for line in held if b"RAY_BACKEND_LOG_LEVEL" not in line))


def start_here(start: Callable[[], object]) -> None:
    """Start Ray on this machine, again where its node was not up within the 30 s that Ray gives it.

    That happens on a busy machine, as when a cluster that was killed is still ending.
    """
    for left in reversed(range(STARTS)):
        try:
            start()
            return
        except Exception as error:  # Ray raises nothing narrower
            if not left or "timed out during startup" not in str(error):
                raise
            log.warning("Ray was not up within 30 s: this machine is busy; starting it again")


@contextmanager
def ray_cluster(address: str | None = None, *, num_cpus: int | None = None) -> Iterator[None]:
    """Connect for the duration of a job, and disconnect; a cluster started here ends with it, or the process.

    Without an address, `RAY_ADDRESS` decides (set by `ray job submit`), else a local cluster is started.
    A process that is connected already is left as it is.
    """
    use_token()
    import ray
    import ray.data

    if ray.is_initialized():
        yield
        return
    logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)
    ray.data.DataContext.get_current().enable_progress_bars = False
    quiet = {"logging_level": logging.WARNING, "log_to_driver": False}
    with handlers_kept(), without_log_level_line():
        if joins_cluster(address):
            ray.init(address=address, **quiet)
        else:  # "local": without it Ray would join whatever cluster it finds on this machine
            cpus = num_cpus or LOGICAL_CPUS_PER_CORE * cores()
            # A process for each logical CPU would be started at once, most of them for nothing. And Ray warns
            # of four times as many as may start together, which are as many as there are cores unless set.
            workers = {
                "prestart_worker_first_driver": False,
                "worker_maximum_startup_concurrency": max(cpus, LOGICAL_CPUS_PER_CORE * cores()),
            }
            settings = {"num_cpus": cpus, "include_dashboard": False, "_system_config": workers, **quiet}
            start_here(lambda: ray.init(address="local", **settings))
    try:
        yield
    except BaseException:
        # A dataflow may still run in Ray's threads, and taking Ray down under them can crash the
        # interpreter: the end of the process, which is near, ends the cluster too (`cli.entry`).
        for name in ("ray", "ray.data"):
            logging.getLogger(name).setLevel(logging.CRITICAL + 1)
        raise
    ray.shutdown()


def find_unseen(paths: Sequence[str]) -> dict[str, str]:
    """Nodes, of a cluster of several, that lack one of the local paths -> the first that each lacks."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    nodes = [node for node in ray.nodes() if node["Alive"]]
    if len(nodes) == 1:
        return {}
    look = ray.remote(num_cpus=0)(lambda: next((path for path in paths if not Path(path).exists()), None))
    strategies = [NodeAffinitySchedulingStrategy(node["NodeID"], soft=True) for node in nodes]
    unseen = ray.get([look.options(scheduling_strategy=strategy).remote() for strategy in strategies])
    return {node["NodeManagerAddress"]: path for node, path in zip(nodes, unseen, strict=True) if path}
