"""Sizes classify's two pools from what the cluster has, unless the user did.

On GPU nodes one session per GPU, and the CPUs fetch and decode. On CPU the model is the cost: a session
per core, and one load actor for every eight, since decoding a photo costs a fraction of running a ViT.
"""

from collections.abc import Mapping

from pipelines.inference import Pools
from pipelines.specs import Provider, Workers

CORES_PER_LOAD_ACTOR = 8
SPARE_CPUS = 1
"""Left for the tasks that write parts: actors hold theirs for the whole run."""
PARTS_PER_RUN = 20
"""A run is written in at least so many parts, so that a crash costs a small share even of a short one."""
SMALLEST_PART = 500


def size_pools(
    workers: Workers,
    resources: Mapping[str, float],
    *,
    provider: Provider,
    threads: int,
    n_items: int,
    local_cores: int | None,
) -> Pools:
    """The pools for a cluster with these Ray resources.

    Args:
        local_cores: this machine's cores when the cluster was started on it: logical CPUs outnumber them.

    Raises:
        ValueError: a GPU provider on a cluster without GPUs.
    """
    gpus = int(resources.get("GPU", 0))
    cores = local_cores or max(1, int(resources.get("CPU", 1)) - SPARE_CPUS)
    if provider == "cpu":
        infer = workers.infer_actors or max(1, cores // threads)
        load = workers.load_actors or max(1, cores // CORES_PER_LOAD_ACTOR)
        infer = infer if local_cores or workers.infer_actors else max(1, (cores - load) // threads)
    else:
        if gpus == 0:
            raise ValueError(
                f"--provider {provider} needs a GPU, and the cluster has none; use --provider cpu"
            )
        infer = workers.infer_actors or gpus
        load = workers.load_actors or max(1, cores - gpus)
    chunks = max(1, -(-n_items // workers.rows_per_chunk))
    return Pools(
        load_actors=min(load, chunks),
        infer_actors=min(infer, chunks),
        cpus_per_load=1,
        cpus_per_infer=threads if provider == "cpu" else 1,
        gpus_per_infer=0 if provider == "cpu" else min(1.0, gpus / infer),
        rows_per_part=min(workers.rows_per_part, max(SMALLEST_PART, n_items // PARTS_PER_RUN)),
    )
