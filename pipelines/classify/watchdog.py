"""Ends a dataflow on Ray whose actors find no place, instead of letting it wait forever.

Ray Data waits for its actors without limit and says nothing. This looks at its pools while it runs.
"""

import logging
import time
from collections import Counter
from typing import Any

import ray
from ray.data._internal.execution.execution_callback import ExecutionCallback
from ray.data.exceptions import ExecutionTimeoutError

from pipelines.classify.sizing import ClusterChanged, Node
from pipelines.messages import JobFailed

log = logging.getLogger(__name__)

START_S = 120.0
"""How long a pool may take to start its first actor, or all of them, seconds; opening a model included."""

REPLACE_S = 60.0
"""How long an actor that was lost may take to be started again, seconds; its work waits for it."""

LOOK_S = 2.0
"""Time between two looks at the pools, seconds."""

POOLS = {"Loader": "load actors", "Classifier": "sessions"}


class Watchdog(ExecutionCallback):  # type: ignore[misc]
    """Looks at the actor pools of one dataset while it runs; what it raises ends the dataset."""

    def __init__(self) -> None:
        self._began = self._looked_at = time.monotonic()
        self._lost_at: dict[str, float] = {}
        self._told: set[str] = set()

    def on_execution_step(self, executor: Any) -> None:
        """Raise ExecutionTimeoutError, caused by JobFailed or ClusterChanged, when waiting has no point."""
        if time.monotonic() < self._looked_at + LOOK_S:
            return
        self._looked_at = time.monotonic()
        try:
            for operator in executor._topology:
                pool = next((words for name, words in POOLS.items() if f"({name})" in operator.name), None)
                if pool and not operator.has_completed():
                    self._look_at(pool, operator)
        except JobFailed as failure:
            for operator in executor._topology:  # their places are wanted at once, whatever they are doing
                for actors in operator.get_autoscaling_actor_pools():
                    actors.shutdown(force=True)
            # the one exception that Ray Data does not report as a bug of its own
            raise ExecutionTimeoutError(str(failure)) from failure

    def _look_at(self, pool: str, operator: Any) -> None:
        info, now = operator.get_actor_info(), time.monotonic()
        alive = info.running - info.restarting
        if not info.restarting:
            self._lost_at.pop(pool, None)
        elif now - self._lost_at.setdefault(pool, now) > REPLACE_S:
            raise ClusterChanged(
                f"{info.restarting} {pool} were lost {REPLACE_S:g} s ago and found no place; the rest of the "
                "cluster goes on"
            )
        if not info.pending or now - self._began < START_S or pool in self._told:
            return
        self._told.add(pool)
        found = (
            f"{alive} of {alive + info.pending + info.restarting} {pool} started after {START_S:g} s: no "
            f"node has {_wants(operator)} free for another one. The cluster has {describe(list_nodes())}"
        )
        if not alive:
            raise JobFailed(f"{found}. Free some of it, or check that the model opens in that time")
        log.warning("%s. The run goes on with these", found)


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


def _wants(operator: Any) -> str:
    """What one actor of a pool asks for."""
    usage = operator.get_autoscaling_actor_pools()[0].per_actor_resource_usage()
    return " and ".join(f"{n:g} {unit}" for unit, n in (("GPU", usage.gpu), ("CPU", usage.cpu)) if n)
