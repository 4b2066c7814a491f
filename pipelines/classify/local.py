"""The engine for one machine: the steps of classification in threads of this process, without Ray.

plan -> load -> infer -> write part, with a bounded channel between steps: a fast one waits for a slow one.
Threads suffice because the costly work runs outside Python's lock: sockets, the decoder's own process, ONNX
Runtime, Arrow. A crash of this process is a driver's crash, which the ledger survives.
"""

import itertools
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Generic, TypeVar

import pyarrow as pa

from pipelines.classify.steps import Classifier, Loader, Model, Pools, Source
from pipelines.ledger import parts

CALLS_PER_LOADER = 16
"""Calls of a loader at once, which take batches as they have room: while some fetch, others decode."""

T = TypeVar("T")


class Cancelled(Exception):
    """The dataflow has ended, by a failure elsewhere or by its consumer."""


class Channel(Generic[T]):
    """A bounded queue between two steps: ends when every writer has finished, fails when any step fails."""

    def __init__(self, size: int, writers: int) -> None:
        self._size, self._writers = size, writers
        self._waiting: deque[T] = deque()
        self._changed = threading.Condition()
        self._failure: BaseException | None = None

    def put(self, value: T) -> None:
        """Append, once there is room. Raises the failure of the dataflow, if it has failed."""
        with self._changed:
            self._changed.wait_for(lambda: self._failure or len(self._waiting) < self._size)
            if self._failure:
                raise self._failure
            self._waiting.append(value)
            self._changed.notify_all()

    def __iter__(self) -> Iterator[T]:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._failure or self._waiting or not self._writers)
                if self._failure:
                    raise self._failure
                if not self._waiting:
                    return
                value = self._waiting.popleft()
                self._changed.notify_all()
            yield value

    def finish(self) -> None:
        """One writer less."""
        with self._changed:
            self._writers -= 1
            self._changed.notify_all()

    def fail(self, failure: BaseException) -> None:
        """Raise this in every reader and writer from now on; the first failure counts."""
        with self._changed:
            self._failure = self._failure or failure
            self._changed.notify_all()


def run_dataflow(
    batches: pa.Table, source: Source, model: Model, target: parts.PartContext, pools: Pools
) -> Iterator[pa.Table]:
    """Classify a `work_list`; yields a row per written part, as `parts.read_result` reads it."""
    n_loading = min(pools.load_actors * CALLS_PER_LOADER, batches.num_rows)
    loaded: Channel[pa.Table] = Channel(pools.infer_actors + 1, writers=n_loading)
    scored: Channel[pa.Table] = Channel(2 * pools.infer_actors, writers=pools.infer_actors)
    written: Channel[pa.Table] = Channel(1, writers=1)
    numbers = itertools.count()
    with ThreadPoolExecutor(pools.load_actors + pools.infer_actors, "open") as opening:
        loaders = [opening.submit(Loader, source) for _ in range(pools.load_actors)]
        sessions = [opening.submit(Classifier, _on_device(model, at)) for at in range(pools.infer_actors)]

        def start(step: Callable[..., Iterable[pa.Table]], out: Channel[pa.Table], *args: object) -> None:
            steps = (loaded, scored, written)
            threading.Thread(
                target=_run, args=(step, args, out, steps), name=step.__name__, daemon=True
            ).start()

        for at in range(n_loading):
            start(_load, loaded, loaders[at % len(loaders)], batches, numbers, pools.items_per_batch)
        for session in sessions:
            start(_infer, scored, session, loaded)
        start(_write, written, scored, target, pools.items_per_part)
    try:
        yield from written
    finally:
        for channel in (loaded, scored, written):
            channel.fail(Cancelled())
        for loader in loaders:
            if not loader.exception():
                loader.result().close()


def _on_device(model: Model, session: int) -> Model:
    """A GPU session each for this machine's GPUs, in turn; CPU sessions have no device."""
    if model.runtime.provider == "cpu":
        return model
    return replace(model, runtime=replace(model.runtime, device_id=session))


def _run(
    step: Callable[..., Iterable[pa.Table]],
    args: tuple[object, ...],
    out: Channel[pa.Table],
    channels: tuple[Channel[pa.Table], ...],
) -> None:
    """Run one thread of a step into its channel; its failure ends all of them."""
    try:
        for table in step(*args):
            out.put(table)
        out.finish()
    except BaseException as error:  # raised again by the consumer of the dataflow
        for channel in channels:
            channel.fail(error)


def _load(
    loader: Future[Loader], batches: pa.Table, numbers: Iterator[int], items_per_batch: int
) -> Iterator[pa.Table]:
    mine = itertools.takewhile(lambda number: number < batches.num_rows, numbers)
    return loader.result().load_ahead((batches["ranges"][number].as_py() for number in mine), items_per_batch)


def _infer(session: Future[Classifier], loaded: Channel[pa.Table]) -> Iterator[pa.Table]:
    classify = session.result()
    return map(classify, loaded)


def _write(scored: Channel[pa.Table], target: parts.PartContext, items_per_part: int) -> Iterator[pa.Table]:
    waiting: list[pa.Table] = []
    for table in scored:
        waiting.append(table)
        if sum(each.num_rows for each in waiting) >= items_per_part:
            yield parts.write_batch(pa.concat_tables(waiting), target)
            waiting = []
    if waiting:
        yield parts.write_batch(pa.concat_tables(waiting), target)
