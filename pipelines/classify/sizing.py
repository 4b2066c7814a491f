"""Sizes classify's two pools from what the cluster has, unless the user did.

On GPU nodes one session per GPU, and the CPUs fetch and decode. On CPU the model is the cost: a session
per core, and one load actor for every eight, since decoding a photo costs a fraction of running a ViT.
"""

from collections.abc import Callable, Mapping, Sequence

from pipelines.bundle.settings import RuntimeSpec
from pipelines.classify.settings import Workers
from pipelines.classify.steps import Pools
from pipelines.messages import JobFailed

CORES_PER_LOAD_ACTOR = 8
CPUS_TO_WRITE = 0.25
"""For the tasks that write parts: actors hold their CPUs for the whole run, and would leave none."""
CPU_CHUNK = 64
"""Most images that travel together on CPU: small, so that every session has work to the end."""
CHUNKS_PER_CORE = 16
"""Of a run too short for such chunks, so that its sessions begin early and end together."""
PARTS_PER_RUN = 20
"""A run is written in at least so many parts, so that a crash costs a small share even of a short one."""
SMALLEST_PART = 500
GROWTH = 1.25
"""How much larger a pool has to become for the pools to be started again: what is in flight is repeated."""
GROW_AFTER_S = 60.0
"""How long pools run before they are compared with the cluster, seconds: nodes seldom join alone."""

FEW_CPUS = (
    "Give it more (--num-cpus on this machine), or lower --workers.load-actors, --workers.infer-actors or "
    "--threads-per-session"
)
NO_CPUS = (
    "Give it nodes, or, where it grows from zero, say with --workers.load-actors and --workers.infer-actors "
    "what it will hold"
)

Node = Mapping[str, float]
"""A node's resources as Ray counts them: `CPU` and `GPU`."""


class ClusterChanged(JobFailed):
    """Nodes were lost and not replaced, or joined: what is left is better classified by other pools."""


def refuse_outgrown(pools: Pools, size: Callable[[], Pools]) -> None:
    """Raise ClusterChanged if the cluster has room for so much larger pools that starting them pays."""
    try:
        now = size()
    except JobFailed:  # a node was lost just now, which the engine notices
        return
    models, more_models = ((each.gpus_per_infer or 1) * each.infer_actors for each in (pools, now))
    actors, more_actors = models + pools.load_actors, more_models + now.load_actors
    if more_models >= GROWTH * models or more_actors >= GROWTH * actors:
        raise ClusterChanged(
            f"nodes have joined: starting again with {now.load_actors} load actors and {now.infer_actors} "
            f"sessions instead of {pools.load_actors} and {pools.infer_actors}"
        )


def size_pools(
    workers: Workers, nodes: Sequence[Node], runtime: RuntimeSpec, *, n_items: int, local_cores: int | None
) -> Pools:
    """The pools for a cluster of these nodes.

    Args:
        local_cores: this machine's cores when the cluster was started on it: logical CPUs outnumber them.

    Raises:
        JobFailed: the cluster cannot run the pools at once, so that the run would wait forever.
    """
    on_cpu = runtime.provider == "cpu"
    cpus, gpus = _sum(nodes, "CPU"), _sum(nodes, "GPU")
    per_core = n_items // (CHUNKS_PER_CORE * max(1, int(local_cores or cpus)))
    cpu_chunk = min(CPU_CHUNK, max(runtime.batch_size, per_core))
    items_per_batch = workers.items_per_batch or (cpu_chunk if on_cpu else runtime.batch_size)
    chunks = max(1, -(-n_items // items_per_batch))
    # A session on a GPU asks Ray for no CPU, which the load actors, started first, might have taken on its
    # node. One CPU per session is left over all the same, and the operating system shares out the rest.
    cpus_per_infer, gpus_per_infer = (float(runtime.threads), 0.0) if on_cpu else (0.0, 1.0)
    if on_cpu:
        cores = local_cores or cpus - CPUS_TO_WRITE
        load = workers.load_actors or max(1, int(cores) // CORES_PER_LOAD_ACTOR)
        most = int((cores - (0 if local_cores else load)) // cpus_per_infer)
        infer = workers.infer_actors or max(1, min(most, _room(nodes, load, runtime.threads)))
    else:
        if not gpus and not workers.infer_actors:
            raise JobFailed(
                f"provider {runtime.provider} needs a GPU and the cluster shows none; use provider cpu, or "
                "say with --workers.infer-actors how many GPUs it will have once it has grown"
            )
        infer = workers.infer_actors or gpus
        # a whole number of sessions per GPU: six of two thirds each would not fit on four GPUs
        gpus_per_infer = 1 / -(-infer // (gpus or infer))
        load = workers.load_actors or max(1, int(local_cores or cpus - CPUS_TO_WRITE) - infer)
    load, infer = min(load, chunks), min(infer, chunks)
    needed = load + infer * cpus_per_infer + CPUS_TO_WRITE
    will_grow = (
        not cpus and workers.load_actors and workers.infer_actors
    )  # nodes come once actors wait for them
    if (on_cpu or gpus) and needed > cpus and not will_grow:
        raise JobFailed(
            f"{load} load actors, {infer} sessions of {cpus_per_infer:g} CPUs, and the writing of parts need "
            f"{needed:g} CPUs at once; the cluster has {cpus:g}. {FEW_CPUS if cpus else NO_CPUS}"
        )
    return Pools(
        load_actors=load,
        infer_actors=infer,
        cpus_per_load=1,
        cpus_per_infer=cpus_per_infer,
        gpus_per_infer=gpus_per_infer,
        items_per_batch=items_per_batch,
        items_per_part=min(workers.items_per_part, max(SMALLEST_PART, n_items // PARTS_PER_RUN)),
        start_s=workers.start_s,
    )


def _sum(nodes: Sequence[Node], resource: str) -> int:
    """Whole units over all nodes: an actor does not stretch over two."""
    return sum(int(node.get(resource, 0)) for node in nodes)


def _room(nodes: Sequence[Node], load: int, threads: int) -> int:
    """Sessions of so many CPUs that surely fit next to load actors that are spread over the nodes."""
    sizes = [int(node.get("CPU", 0)) for node in nodes if node.get("CPU", 0) >= 1]
    if threads == 1 or len(sizes) < 2:
        return sum(sizes) // threads
    each_breaks_one = sum(size // threads for size in sizes) - load
    # Nodes take turns, and those that are full are left out.
    levels = (level for level in range(1, max(sizes)) if sum(min(size, level) for size in sizes) >= load)
    spread = next(levels, max(sizes))
    return max(each_breaks_one, sum(max(0, size - spread) // threads for size in sizes))
