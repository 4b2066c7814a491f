"""Many objects at once, from anywhere -> their payloads, or the status that says why not, as they arrive.

One event loop in a thread of its own keeps hundreds of remote requests in flight; local files are read by
plain threads, and images inside Parquet files by the caller's. Nothing here raises for an object, and the
payloads in memory are bounded by `FetchLimits`. It does not decode them.
"""

import asyncio
import atexit
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from itertools import chain, islice
from typing import Self

from pipelines.fetch import files
from pipelines.fetch.download import Downloader
from pipelines.fetch.memory import Memory, Reservation
from pipelines.fetch.parquet import EmbeddedReader, read_embedded
from pipelines.fetch.results import BATCH_BYTES, Result, ResultQueue, done
from pipelines.fetch.retry import FetchError, internal_error
from pipelines.fetch.settings import FetchLimits
from pipelines.fetch.source import Batch, Fetched, Source
from pipelines.status import Status
from pipelines.storage.places import Places, place_of
from pipelines.storage.uris import is_local

FILE_THREADS = 16
"""Threads for local files: enough to hide a network mount's latency."""

LOOKUP_THREADS = 32
"""Threads for name look-ups; fsspec has others, because a read may hang or wait for memory."""

WINDOWS = 4
"""Objects started but not yet taken by the caller, in multiples of the concurrency, so that one slow host
cannot hold every slot."""

REFILLS = 8
"""When one part in so many of the window is free, more are started: each start wakes the event loop."""


class Fetcher:
    """Owns the event loop, connections and threads of one process; any thread may use it.

    A context manager: leaving it closes it. `load_actors` fetchers share the limits per host. Objects outside
    of `places`, if given, are `blocked_address`.
    """

    def __init__(
        self, limits: FetchLimits | None = None, *, load_actors: int = 1, places: Places | None = None
    ) -> None:
        self._places = places
        self._limits = limits or FetchLimits()
        self._load_actors = load_actors
        self._memory = Memory(self._limits)
        self._tables = EmbeddedReader(self._limits.max_buffered_bytes)
        self._file_threads = ThreadPoolExecutor(FILE_THREADS, thread_name_prefix="fetch-files")
        self._lookup_threads = ThreadPoolExecutor(LOOKUP_THREADS, thread_name_prefix="fetch-lookup")
        self._tasks: set[asyncio.Task[None]] = set()
        self._loop = asyncio.new_event_loop()
        self._loop.set_default_executor(self._lookup_threads)
        self._thread = threading.Thread(target=self._loop.run_forever, name="fetch", daemon=True)
        self._thread.start()
        self._downloader = asyncio.run_coroutine_threadsafe(self._open(), self._loop).result()
        atexit.register(self.close)  # Ray does not tell an actor that it ends; aiohttp would warn on stderr

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End all requests and threads; the fetcher cannot be used afterwards."""
        if self._loop.is_closed():
            return
        atexit.unregister(self.close)
        asyncio.run_coroutine_threadsafe(self._shut(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        for threads in (self._file_threads, self._lookup_threads):
            threads.shutdown(wait=False, cancel_futures=True)

    async def _open(self) -> Downloader:
        return Downloader(self._limits, self._load_actors)

    async def _shut(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._downloader.close()

    def fetch(self, uri: str) -> Fetched:
        """Fetch one object."""
        return next(fetched for _, fetched in self.fetch_many([Source(uri)]))

    def fetch_many(self, sources: Iterable[Source]) -> Iterator[tuple[int, Fetched]]:
        """Yield each source's index and result, as they arrive; requests go on while the caller works."""
        return chain.from_iterable(self.fetch_batches(sources))

    def fetch_batches(
        self, sources: Iterable[Source], *, window: int | None = None, wait_s: float | None = None
    ) -> Iterator[Batch]:
        """Yield what `fetch_many` does, a few megabytes at a time, or nothing after `wait_s` without results.

        Asking for the next batch empties the last one and frees its memory: keep no payload of it. Sources
        are taken when there is room in the window of objects under way.
        """
        queue = ResultQueue()
        waiting = enumerate(sources)
        window = window or WINDOWS * self._limits.concurrency
        under_way, embedded = 0, list[tuple[int, Source]]()
        try:
            while True:
                room = window - under_way - len(embedded)
                if room >= max(1, window // REFILLS):
                    new = list(islice(waiting, room))
                    embedded += [(index, source) for index, source in new if source.payload_column]
                    under_way += self._start([(n, each) for n, each in new if not each.payload_column], queue)
                if under_way:
                    results = queue.take(min(under_way, self._limits.concurrency), wait_s)
                    under_way -= len(results)
                    yield from _yield_batch(results)
                elif embedded:  # they wait for memory in this thread, which must not hold any
                    yield from self._fetch_embedded(embedded)
                    embedded = []
                else:
                    return
        finally:
            if under_way:
                self._call_soon(queue.cancel)

    def _start(self, sources: Sequence[tuple[int, Source]], queue: ResultQueue) -> int:
        remote = []
        for index, source in sources:
            if known := self._find_known(source):
                queue.put(Result(index, known, Reservation(self._memory)))
            elif is_local(source.location):
                reading = self._file_threads.submit(self._read_file, index, source, queue)
                reading.add_done_callback(partial(self._put_if_cancelled, index, queue))
            else:
                remote.append((index, source))
        if remote:
            self._loop.call_soon_threadsafe(self._start_remote, remote, queue)
        return len(sources)

    def _find_known(self, source: Source) -> Fetched | None:
        """The result of an object that needs no request, or None."""
        if self._places and not self._places.permit(source.location):
            error = f"not a place of this inventory (--fetch.allow {place_of(source.location)})"
            return Fetched.of(FetchError(Status.BLOCKED_ADDRESS, error))
        return Fetched.of(b"") if source.length == 0 else None  # a byte range must have a byte

    def _read_file(self, index: int, source: Source, queue: ResultQueue) -> None:
        reservation = Reservation(self._memory)
        try:
            fetched = files.read_source(source, reservation)
        except Exception as error:  # a bug, or memory has run out: this object's result like any other
            fetched = Fetched.of(internal_error(error))
        queue.put(Result(index, fetched, reservation))

    def _put_if_cancelled(self, index: int, queue: ResultQueue, reading: Future[None]) -> None:
        """`close` cancels what has not begun: whoever waits for it must hear of it."""
        if reading.cancelled():
            queue.put(Result(index, None, Reservation(self._memory)))

    def _start_remote(self, sources: Sequence[tuple[int, Source]], queue: ResultQueue) -> None:
        for index, source in sources:
            task = self._loop.create_task(self._download(index, source, queue))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
            queue.tasks.add(task)
            task.add_done_callback(queue.tasks.discard)

    async def _download(self, index: int, source: Source, queue: ResultQueue) -> None:
        timeout = asyncio.timeout(self._limits.total_timeout_s)
        reservation = Reservation(self._memory, timeout)
        try:
            fetched = await self._downloader.fetch(source, timeout, reservation)
        except asyncio.CancelledError:
            reservation.release()
            queue.put(Result(index, None, reservation))
            raise
        except BaseException as error:  # as above; a panic of obstore's Rust code is not an Exception
            fetched = Fetched.of(internal_error(error))
        reservation.shrink(len(fetched.payload or b""))
        queue.put(Result(index, fetched, reservation))

    def _fetch_embedded(self, sources: Sequence[tuple[int, Source]]) -> Iterator[Batch]:
        """Read rows of Parquet files in the caller's thread; it holds no memory while it waits for more."""
        results: list[Result] = []
        held = 0
        try:
            for index, outcome in read_embedded(self._tables, sources, self._limits):
                fetched, reservation = Fetched.of(outcome), Reservation(self._memory)
                n_bytes = len(fetched.payload or b"")
                if held + n_bytes > BATCH_BYTES or not reservation.try_reserve(n_bytes):
                    yield from _yield_batch(results)
                    reservation.reserve_blocking(n_bytes)
                    held = 0
                held += n_bytes
                results.append(Result(index, fetched, reservation))
            yield from _yield_batch(results)
        finally:
            done(results)

    def _call_soon(self, call: Callable[[], object]) -> None:
        """Run on the event loop; after `close` nothing is left to do there."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(call)


def _yield_batch(results: list[Result]) -> Iterator[Batch]:
    """Yield the results as a batch, then empty both and release their memory; RuntimeError after `close`."""
    try:
        batch: Batch = []
        for result in results:
            if result.fetched is None:
                raise RuntimeError("the fetcher was closed")
            batch.append((result.index, result.fetched))
        yield batch
        batch.clear()
    finally:
        done(results)
        results.clear()
