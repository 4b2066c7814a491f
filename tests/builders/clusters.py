"""Classifies on a Ray cluster of local nodes with chosen resources; GPUs are only counted, not there.

    python -m tests.builders.clusters '{"nodes": [[2, 1], [6, 0]], "remove": null}' classify …

A process of its own, because a process knows one cluster. `remove` names a node that is removed once the
first part is recorded; `mounted` a folder and the descriptor by which only this process sees it.
"""

import json
import os
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from jobs.cluster import quieten

quieten()

import ray  # noqa: E402
from ray.cluster_utils import Cluster  # noqa: E402

from jobs.cli import main  # noqa: E402
from pipelines.classify import on_ray, watchdog  # noqa: E402

run_dataflow = on_ray.run_dataflow


def on_cpu(batches: Any, source: Any, model: Any, *rest: Any) -> Any:
    """The dataflow with sessions on the CPU, whatever the pools were sized for."""
    runtime = replace(model.runtime, provider="cpu")
    return run_dataflow(batches, source, replace(model, runtime=runtime), *rest)


def remove_later(cluster: Cluster, node: Any, ledger: Path) -> None:
    while len(list(ledger.glob("*.json"))) < 2:
        time.sleep(0.1)
    cluster.remove_node(node, allow_graceful=False)
    print("a node was removed", file=sys.stderr, flush=True)


def classify(shape: dict[str, Any], arguments: list[str]) -> int:
    watchdog.START_S, watchdog.REPLACE_S = shape.get("start_s", 60.0), 5.0
    on_ray.run_dataflow = on_cpu
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    nodes = [cluster.add_node(num_cpus=cpus, num_gpus=gpus) for cpus, gpus in shape["nodes"]]
    if shape.get("remove") is not None:
        ledger = Path(arguments[arguments.index("--output") + 1]) / "state" / "ledger"
        removing = (cluster, nodes[shape["remove"]], ledger)
        threading.Thread(target=remove_later, args=removing, daemon=True).start()
    if "mounted" in shape:
        folder, descriptor = shape["mounted"]
        os.dup2(os.open(folder, os.O_RDONLY), descriptor, inheritable=False)
    try:
        return main([*arguments, "--ray-address", cluster.address])
    finally:
        ray.shutdown()
        cluster.shutdown()


if __name__ == "__main__":
    sys.exit(classify(json.loads(sys.argv[1]), sys.argv[2:]))
