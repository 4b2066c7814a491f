"""Classifies on Ray clusters of local nodes with chosen resources; GPUs are only counted, not there.

A process of its own, because a process knows one cluster. It keeps the head, which has no CPU, from one
request to the next: a request names the other nodes, which are removed when it is done.
"""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

NODE_START_S = 180
"""Ray gives a node 30 s to register, which is short on a machine that does other things too."""


class Clusters:
    """The process, started again should it have ended."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None

    def classify(
        self, shape: dict[str, Any], arguments: Sequence[str], log: Path
    ) -> subprocess.CompletedProcess[str]:
        """Run `iab-vision classify` on a cluster of this shape; standard error is kept in `log` meanwhile.

        Args:
            shape: `nodes`, pairs of CPUs and GPUs; `remove`, the node that is removed once the first part
                is recorded; `add`, the CPUs and GPUs of a node that joins then, or, where there are no nodes,
                once the pools are sized; `sessions`, after so many no further ones are waited for;
                `mounted`, a folder and the descriptor by which only this process sees it.
        """
        if self._process is None:
            command = [sys.executable, "-m", "tests.builders.clusters"]
            self._process = subprocess.Popen(
                command,
                env=os.environ | {"RAY_agent_register_timeout_ms": str(1000 * NODE_START_S)},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
        assert self._process.stdin and self._process.stdout
        request = {**shape, "arguments": list(arguments), "log": str(log)}
        print(json.dumps(request), file=self._process.stdin, flush=True)
        answer = self._process.stdout.readline()
        code = int(answer) if answer.strip() else -1
        if not answer:
            self.close()
        return subprocess.CompletedProcess(list(arguments), code, "", log.read_text())

    def close(self) -> None:
        if self._process is not None:
            with suppress(BrokenPipeError):
                self._process.communicate()
            self._process = None


def serve() -> None:
    """Answer each request on standard input, a line of JSON, with its exit code."""
    from jobs.cluster import quieten

    quieten()
    import ray
    from ray.cluster_utils import Cluster

    from pipelines.classify import on_ray, watchdog

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    look_at, watchdog.LOOK_S, watchdog.REPLACE_S = watchdog.Watchdog._look_at, 0.2, 2.0
    on_ray.run_dataflow = on_cpu(on_ray.run_dataflow)
    ray._private.services.get_node = patient(ray._private.services.get_node)
    unused = {"include_dashboard": False, "include_log_monitor": False}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **unused})
    try:
        for line in sys.stdin:
            request = json.loads(line)
            watchdog.Watchdog._look_at = impatient(look_at, request.get("sessions"))
            with Path(request["log"]).open("wb") as log:
                os.dup2(log.fileno(), 2)
            print(run(cluster, request), file=answers, flush=True)
    finally:
        cluster.shutdown()


def on_cpu(run_dataflow: Any) -> Any:
    """The dataflow with sessions on the CPU, whatever the pools were sized for."""

    def run(batches: Any, source: Any, model: Any, *rest: Any) -> Any:
        runtime = replace(model.runtime, provider="cpu")
        return run_dataflow(batches, source, replace(model, runtime=runtime), *rest)

    return run


def patient(get_node: Any) -> Any:
    """`get_node` that waits until the node has registered."""

    def get(*args: Any) -> Any:
        deadline = time.monotonic() + NODE_START_S
        while True:
            try:
                return get_node(*args)
            except RuntimeError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.1)

    return get


def run(cluster: Any, request: dict[str, Any]) -> int:
    import ray

    from jobs.cli import main
    from pipelines.classify import sizing

    arguments = request["arguments"]
    nodes = [cluster.add_node(num_cpus=cpus, num_gpus=gpus) for cpus, gpus in request["nodes"]]
    sizing.GROW_AFTER_S = 0.0 if "add" in request else NODE_START_S
    if "remove" in request or "add" in request:
        ledger = Path(arguments[arguments.index("--output") + 1]) / "state" / "ledger"
        lost = nodes[request["remove"]] if "remove" in request else None
        has_begun = has_entries(ledger) if nodes else says(Path(request["log"]), "engine ray")
        changing = (cluster, lost, request.get("add"), has_begun)
        threading.Thread(target=change_later, args=changing, daemon=True).start()
    if "mounted" in request:
        folder, descriptor = request["mounted"]
        os.dup2(os.open(folder, os.O_RDONLY), descriptor, inheritable=False)
    try:
        return main([*arguments, "--ray-address", cluster.address])
    finally:
        ray.shutdown()
        for node in list(cluster.worker_nodes):
            cluster.remove_node(node)


def impatient(look_at: Any, sessions: int | None) -> Any:
    """The watchdog's look, with patience until so many sessions have started."""

    def look(self: Any, pool: str, operator: Any) -> None:
        enough = sessions is not None and pool == "sessions" and operator.get_actor_info().running >= sessions
        self._start_s = 1.0 if enough else NODE_START_S
        look_at(self, pool, operator)

    return look


def has_entries(ledger: Path) -> Callable[[], bool]:
    """Whether the first part is recorded."""
    return lambda: len(list(ledger.glob("*.json"))) >= 2


def says(log: Path, words: str) -> Callable[[], bool]:
    """Whether the log has these words."""
    return lambda: words in log.read_text()


def change_later(cluster: Any, lost: Any, joins: Sequence[int] | None, has_begun: Callable[[], bool]) -> None:
    """Remove a node, or add one, once the run has begun."""
    while not has_begun():
        time.sleep(0.1)
    if lost:
        cluster.remove_node(lost, allow_graceful=False)
        print("a node was removed", file=sys.stderr, flush=True)
    if joins:
        cluster._shutdown_at_exit = False  # its hooks can be set by the main thread alone
        cluster.add_node(num_cpus=joins[0], num_gpus=joins[1])
        cluster._shutdown_at_exit = True
        print("a node was added", file=sys.stderr, flush=True)


if __name__ == "__main__":
    serve()
