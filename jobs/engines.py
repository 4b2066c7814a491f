"""Where classification runs: threads of this process, or a Ray cluster."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import pyarrow as pa

from jobs.cluster import LOGICAL_CPUS_PER_CORE, joins_cluster
from pipelines.classify.run import Engine
from pipelines.inventory.plan import FoundFile
from pipelines.inventory.shards import SHARDS_AT_ONCE, Spread, in_threads
from pipelines.machine import cores
from pipelines.messages import JobFailed, root_cause
from pipelines.specs import Provider
from pipelines.storage.uris import is_local, local_path

Choice = Literal["auto", "local", "ray"]


@contextmanager
def open_engine(
    choice: Choice,
    *,
    ray_address: str | None,
    num_cpus: int | None,
    provider: Provider,
    needed: Sequence[str],
) -> Iterator[Engine]:
    """Start the engine for the duration of a run.

    Args:
        choice: `auto` is `ray` where an address or `RAY_ADDRESS` (set in a Ray job) names a cluster.
        needed: folders and files that every node has to reach; a local one must exist on each.

    Raises:
        JobFailed: a node does not see one of them, or Ray itself failed.
    """
    if choice == "ray" or (choice == "auto" and joins_cluster(ray_address)):
        with _ray_engine(ray_address, num_cpus, needed) as engine:
            yield engine
        return
    from pipelines.bundle.providers import count_gpus
    from pipelines.classify.local import run_dataflow

    cpus, gpus = num_cpus or LOGICAL_CPUS_PER_CORE * cores(), 0 if provider == "cpu" else count_gpus()
    resources = {"CPU": float(cpus), "GPU": float(gpus)}
    yield Engine("local", run_dataflow, lambda: [resources], num_cpus or cores())


def choose_spread(choice: Choice, ray_address: str | None) -> Spread | None:
    """Where tars are read for the plan: by the nodes of the cluster that is joined, else None.

    Few tars, and those of this machine's own disks, are read by the driver all the same.
    """
    if choice == "local" or not joins_cluster(ray_address):
        return None

    def spread(call: Callable[[FoundFile], pa.Table], files: Sequence[FoundFile]) -> Iterator[pa.Table]:
        if len(files) <= SHARDS_AT_ONCE or is_local(files[0].uri):
            yield from in_threads(call, files)
            return
        with _connected(ray_address, None):
            from pipelines.classify import on_ray

            yield from on_ray.spread(call, files)

    return spread


@contextmanager
def _ray_engine(ray_address: str | None, num_cpus: int | None, needed: Sequence[str]) -> Iterator[Engine]:
    with _connected(ray_address, num_cpus):
        from jobs.cluster import find_unseen
        from pipelines.classify.on_ray import run_dataflow
        from pipelines.classify.watchdog import list_nodes

        unseen = find_unseen([str(local_path(uri)) for uri in needed if is_local(uri)])
        if unseen:
            raise JobFailed(
                "; ".join(f"{path} does not exist on {node}" for node, path in unseen.items())
                + ". Put output, bundle and images on storage that every node reaches (s3://, gs://, "
                "az://, or a mount that all share)"
            )
        local_cores = None if joins_cluster(ray_address) else cores()
        yield Engine("ray", run_dataflow, list_nodes, local_cores)


@contextmanager
def _connected(ray_address: str | None, num_cpus: int | None) -> Iterator[None]:
    """Connect to Ray, and report what Ray itself raises as a `JobFailed`."""
    from jobs.cluster import quieten, ray_cluster, use_token

    quieten()
    use_token()  # before the first import of Ray, or its clients send none
    from ray.exceptions import RayError

    try:
        with ray_cluster(ray_address, num_cpus=num_cpus):
            yield
    except RayError as error:
        message = root_cause(str(error))
        if "cancelled before it started" in message:
            message += (
                " A cluster without tokens does this to a driver that has one (~/.ray/auth_token): "
                "RAY_AUTH_MODE=disabled lets this one join it"
            )
        raise JobFailed(message) from error
