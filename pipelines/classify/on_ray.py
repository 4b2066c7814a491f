"""The engine for a cluster: the steps of classification as one Ray Dataset over two pools of actors.

Arrow batches all the way. Ray may run any step again; which written parts count is decided by the ledger.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TypeVar

import pyarrow as pa
import ray
import ray.data
from ray.data import ActorPoolStrategy, Dataset, ExecutionResources
from ray.data.exceptions import ExecutionTimeoutError
from ray.exceptions import RayTaskError

from pipelines.classify.steps import Classifier, Loader, Model, Pools, Source
from pipelines.classify.watchdog import Watchdog
from pipelines.inventory.shards import SHARDS_AT_ONCE, in_threads
from pipelines.ledger import parts

CALLS_PER_LOAD_ACTOR = 16
"""Batches loaded at once per load actor: while some wait for a slow host's last image, others are decoded.

What they may hold in memory is bounded by `FetchLimits`, not by this.
"""

BLOCKS_PER_CALL = 2
"""Blocks that Ray counts for each call in hand, finished or not."""

STEPS = 3
"""Ray shares a limit among the steps; the share of loading, the largest, must keep all its calls busy."""

STARTS_LOST = 4
"""Actors of a pool that may die in a row while they start, as when nodes are lost; Ray's default is 0."""

BATCHES_PER_BLOCK = 16
"""Most batches of one task of a load actor, which repeats them from the first if the actor is lost."""

BLOCKS_AT_ONCE = 2_000
"""Most blocks of one dataset, which the driver keeps in memory; a longer work list is several datasets."""


T = TypeVar("T")
R = TypeVar("R")


def spread(call: Callable[[T], R], inputs: Sequence[T]) -> Iterator[R]:
    """Like `map`, in tasks of the cluster, each of which calls for some inputs at once in threads."""
    task = ray.remote(num_cpus=1)(lambda some: list(in_threads(call, some)))
    ahead = 2 * int(ray.cluster_resources().get("CPU", 1))
    started: deque[ray.ObjectRef] = deque()
    try:
        for start in range(0, len(inputs), SHARDS_AT_ONCE):
            if len(started) >= ahead:
                yield from ray.get(started.popleft())
            started.append(task.remote(inputs[start : start + SHARDS_AT_ONCE]))
        while started:
            yield from ray.get(started.popleft())
    except RayTaskError as error:
        raise error.cause from None


def run_dataflow(
    batches: pa.Table, source: Source, model: Model, target: parts.PartContext, pools: Pools
) -> Iterator[pa.Table]:
    """Classify a `work_list`; yields a row per written part, as `parts.read_result` reads it."""
    for at_once in cut(batches, BLOCKS_AT_ONCE * BATCHES_PER_BLOCK):
        written = build_dataset(at_once, source, model, target, pools)
        try:
            yield from written.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0)
        except ExecutionTimeoutError as stalled:
            raise stalled.__cause__ or stalled from None


def build_dataset(
    batches: pa.Table, source: Source, model: Model, target: parts.PartContext, pools: Pools
) -> Dataset:
    """The whole dataflow, in the order the data moves."""
    # not from_arrow, which has a task of its own look at every block before anything starts
    work = ray.data.from_blocks(blocks_of(batches))
    block_bytes = pools.items_per_batch * source.image_spec.pixel_bytes
    # Of this dataset alone: the process's own context would carry them into the next job.
    work.context.custom_execution_callback_classes = [partial(Watchdog, pools.start_s)]
    work.context.max_consecutive_actor_init_deaths = STARTS_LOST
    work.context.target_max_block_size = max(block_bytes, 1 << 20)
    work.context.execution_options.resource_limits = ExecutionResources(
        object_store_memory=memory_ahead(block_bytes, pools)
    )
    return (
        work.map_batches(
            Loader,
            fn_constructor_args=(source,),
            batch_size=1,
            batch_format="pyarrow",
            num_cpus=pools.cpus_per_load,
            compute=ActorPoolStrategy(
                size=pools.load_actors,
                max_tasks_in_flight_per_actor=CALLS_PER_LOAD_ACTOR + 1,  # a slow actor holds no more
                max_concurrent_calls_per_actor=CALLS_PER_LOAD_ACTOR,
                enable_true_multi_threading=True,
            ),
        )
        .map_batches(
            Classifier,
            fn_constructor_args=(model,),
            batch_size=pools.items_per_batch,  # a block of the loader; Ray demands it where there are GPUs
            batch_format="pyarrow",
            num_cpus=pools.cpus_per_infer,
            num_gpus=pools.gpus_per_infer or None,
            compute=ActorPoolStrategy(size=pools.infer_actors),
        )
        .map_batches(
            parts.write_batch,
            fn_args=(target,),
            batch_size=pools.items_per_part,
            batch_format="pyarrow",
            num_cpus=0.25,
        )
    )


def memory_ahead(block_bytes: int, pools: Pools) -> int:
    """Bytes of the object store that the run may use: what its actors hold, and as much again in between.

    Without a limit decoding runs ahead of the model until half the store is full, gigabytes on any machine.
    """
    calls = pools.load_actors * CALLS_PER_LOAD_ACTOR + pools.infer_actors
    return STEPS * BLOCKS_PER_CALL * calls * max(block_bytes, 1 << 20)


def blocks_of(batches: pa.Table) -> list[pa.Table]:
    """As many blocks as a dataset may have, so that every load actor finds work to the end."""
    return cut(batches, -(-batches.num_rows // BLOCKS_AT_ONCE))


def cut(batches: pa.Table, rows: int) -> list[pa.Table]:
    """Slices of at most `rows` rows."""
    return [batches.slice(start, rows) for start in range(0, batches.num_rows, rows)]
