"""Ends a dataflow on Ray whose actors find no place, instead of letting it wait forever.

Ray Data waits for its actors without limit and says nothing. This looks at its pools while it runs.
"""

import logging
import time
from collections import Counter
from collections.abc import Collection
from typing import Any

import ray
from ray.data._internal.execution.execution_callback import ExecutionCallback
from ray.data.exceptions import ExecutionTimeoutError

from pipelines.classify.sizing import CPUS_TO_WRITE, ClusterChanged, Node
from pipelines.messages import JobFailed

log = logging.getLogger(__name__)

REPLACE_S = 60.0
"""How long an actor that was lost may take to be started again, seconds; its work waits for it."""

LOOK_S = 2.0
"""Time between two looks at the pools, seconds."""

TELL_S = 60.0
"""Time between two lines about what a pool waits for, seconds."""

POOLS = {"Loader": "load actors", "Classifier": "sessions"}


class Watchdog(ExecutionCallback):  # type: ignore[misc]
    """Looks at the actor pools of one dataset while it runs; what it raises ends the dataset."""

    def __init__(self, start_s: float) -> None:
        """Wait so many seconds for the first actor of each pool, and for the others without a warning."""
        self._start_s = start_s
        self._began = self._looked_at = time.monotonic()
        self._lost_at: dict[str, float] = {}
        self._tell_at: dict[str, float] = {}
        self._told: set[str] = set()
        self._may_write = False

    def on_execution_step(self, executor: Any) -> None:
        """Raise ExecutionTimeoutError, caused by JobFailed or ClusterChanged, when waiting has no point."""
        if time.monotonic() < self._looked_at + LOOK_S:
            return
        self._looked_at = time.monotonic()
        try:
            pools = {
                pool: operator
                for operator in executor._topology
                if (pool := _pool(operator)) and not operator.has_completed()
            }
            self._refuse_no_cpu_to_write(pools.values())
            for pool, operator in pools.items():
                self._look_at(pool, operator)
        except JobFailed as failure:
            for operator in executor._topology:  # their places are wanted at once, whatever they are doing
                for actors in operator.get_autoscaling_actor_pools():
                    actors.shutdown(force=True)
            # the one exception that Ray Data does not report as a bug of its own
            raise ExecutionTimeoutError(str(failure)) from failure

    def _look_at(self, pool: str, operator: Any) -> None:
        info, now = operator.get_actor_info(), time.monotonic()
        if not info.restarting:
            self._lost_at.pop(pool, None)
        elif now - self._lost_at.setdefault(pool, now) > REPLACE_S:
            raise ClusterChanged(
                f"{info.restarting} {pool} were lost {REPLACE_S:g} s ago and found no place; the rest of the "
                "cluster goes on"
            )
        if info.pending and pool not in self._told:
            self._tell(pool, operator, waited=now - self._began)

    def _tell(self, pool: str, operator: Any, *, waited: float) -> None:
        """Say each minute what a pool waits for, and end the dataset if it has no actor in time."""
        if waited < min(self._start_s, self._tell_at.get(pool, TELL_S)):
            return
        self._tell_at[pool] = waited + TELL_S
        info, alive = operator.get_actor_info(), _alive(operator)
        found = (
            f"{alive} of {alive + info.pending + info.restarting} {pool} started after "
            f"{min(waited, self._start_s):.0f} s: no node has {_wants(operator)} free for another one. "
            f"The cluster has {describe(list_nodes())}"
        )
        if waited < self._start_s:
            log.info("%s. The run waits for nodes up to %g s (--workers.start-s)", found, self._start_s)
            return
        self._told.add(pool)
        if not alive:
            raise JobFailed(
                f"{found}. Free some of it, check that the model opens in that time, or give nodes longer to "
                "come with --workers.start-s"
            )
        log.warning("%s. The run goes on with these", found)

    def _refuse_no_cpu_to_write(self, operators: Collection[Any]) -> None:
        """Pools that were sized before their nodes came may hold every CPU: no part would ever be written."""
        if self._may_write or time.monotonic() < self._began + self._start_s:
            return
        self._may_write = True
        held, nodes = sum(_alive(operator) * _usage(operator).cpu for operator in operators), list_nodes()
        if operators and held + CPUS_TO_WRITE > sum(node.get("CPU", 0) for node in nodes):
            raise ClusterChanged(
                f"load actors and sessions hold {held:g} CPUs, the writing of parts needs {CPUS_TO_WRITE:g}, "
                f"and the cluster has {describe(nodes)}. Give it more, or lower --workers.load-actors or "
                "--workers.infer-actors"
            )


def list_nodes() -> list[Node]:
    """The resources of each live node."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def describe(nodes: list[Node]) -> str:
    """The nodes by their size, as `2 nodes of 16 CPU and 1 GPU, 1 node of 8 CPU`."""
    sizes = Counter(
        " and ".join(f"{node[unit]:g} {unit}" for unit in ("CPU", "GPU") if node.get(unit)) or "no CPU"
        for node in nodes
    )
    return ", ".join(f"{n} node{'s' * (n > 1)} of {size}" for size, n in sizes.items())


def _pool(operator: Any) -> str | None:
    """The pool whose actors an operator runs."""
    return next((words for name, words in POOLS.items() if f"({name})" in operator.name), None)


def _alive(operator: Any) -> int:
    """Actors of a pool that have started and were not lost."""
    info = operator.get_actor_info()
    return int(info.running - info.restarting)


def _usage(operator: Any) -> Any:
    """CPUs and GPUs of one actor of a pool."""
    return operator.get_autoscaling_actor_pools()[0].per_actor_resource_usage()


def _wants(operator: Any) -> str:
    """What one actor of a pool asks for."""
    usage = _usage(operator)
    return " and ".join(f"{n:g} {unit}" for unit, n in (("GPU", usage.gpu), ("CPU", usage.cpu)) if n)
