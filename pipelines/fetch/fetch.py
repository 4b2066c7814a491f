"""Many objects at once, from anywhere -> their bytes or the status that says why not, as they arrive.

One event loop in a thread of its own keeps hundreds of requests in flight for a few CPU cycles each; local
files go through plain threads. Nothing here raises for an object, and what is in memory is bounded by
`FetchLimits`, however large the objects are. What the bytes mean is `images.py`'s business.
"""

import asyncio
import atexit
import contextlib
import hashlib
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain, islice
from typing import Protocol

import pyarrow as pa

from pipelines.fetch import files, objects
from pipelines.fetch.hosts import Host, Hosts
from pipelines.fetch.memory import ByteBudget, Reservation, paused
from pipelines.fetch.objects import BucketClient
from pipelines.fetch.parquet import EmbeddedReader, Place, read_embedded
from pipelines.fetch.results import BATCH_BYTES, Arrival, Delivery
from pipelines.fetch.retry import Attempts, Failure
from pipelines.fetch.web import Redirect, WebClient, parse
from pipelines.specs import FetchLimits
from pipelines.status import Status
from pipelines.storage.objects import OBJECT_SCHEMES
from pipelines.storage.uris import is_local, scheme_of

FILE_THREADS = 16
"""Threads for local files: enough to hide a network mount's latency."""

OTHER_THREADS = 32
"""Threads for name look-ups, and as many for fsspec; apart, because a read may hang or wait for memory."""

WINDOWS = 4
"""Objects under way or waiting for the caller, in multiples of the concurrency: a crowded host leaves slots
to the others that are in sight."""

Span = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Source:
    """Where one object's bytes are; the columns of `plan.LOCATION`."""

    uri: str
    container: str | None = None
    offset: int | None = None
    length: int | None = None
    payload_column: str | None = None

    @property
    def location(self) -> str:
        """Where to look; white space around a URL comes from the page that it was copied from."""
        place = self.container or self.uri
        return place if is_local(place) else place.strip()

    @property
    def span(self) -> Span | None:
        return (self.offset, self.length) if self.offset is not None and self.length is not None else None


@dataclass(frozen=True, slots=True)
class Fetched:
    """What became of one object: its payload, or why there is none."""

    status: Status
    error: str | None
    payload: bytes | None
    attempts: int
    final_uri: str

    @property
    def sha256(self) -> str | None:
        """Of the payload, in hexadecimal; computed anew at each use."""
        return hashlib.sha256(self.payload).hexdigest() if self.payload is not None else None


Batch = list[tuple[int, Fetched]]
"""Indexes of sources, and what became of them."""


class Client(Protocol):
    """One request for one object: its payload, or where else it is to be had. Raises Failure."""

    async def get(self, uri: str, reservation: Reservation, span: Span | None = None) -> bytes | Redirect: ...


class ThreadClient:
    """Schemes that only fsspec knows, in threads."""

    def __init__(self, limits: FetchLimits) -> None:
        self._limits = limits
        self._threads = ThreadPoolExecutor(OTHER_THREADS, thread_name_prefix="fetch-fsspec")

    async def get(self, uri: str, reservation: Reservation, span: Span | None = None) -> bytes:
        files.check_scheme(uri, self._limits.allow_private_addresses)
        loop = asyncio.get_running_loop()
        n_bytes = span[1] if span else await loop.run_in_executor(self._threads, files.size_of, uri)
        max_bytes = self._limits.max_bytes
        await reservation.cover(0, max_bytes if n_bytes is None else n_bytes)
        return await loop.run_in_executor(self._threads, files.read_any, uri, max_bytes, span)

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)


class Fetcher:
    """Owns the event loop, the connection pools and the threads of one process; any thread may use it."""

    def __init__(self, limits: FetchLimits | None = None) -> None:
        self._limits = limits or FetchLimits()
        self._file_threads = ThreadPoolExecutor(FILE_THREADS, thread_name_prefix="fetch-files")
        self._other_threads = ThreadPoolExecutor(OTHER_THREADS, thread_name_prefix="fetch-other")
        self._loop = asyncio.new_event_loop()
        self._loop.set_default_executor(self._other_threads)
        self._thread = threading.Thread(target=self._loop.run_forever, name="fetch", daemon=True)
        self._thread.start()
        self._tables = EmbeddedReader()
        self._running: set[asyncio.Task[None]] = set()
        asyncio.run_coroutine_threadsafe(self._open(), self._loop).result()
        atexit.register(self.close)  # Ray tells no actor that it ends; aiohttp would complain on stderr

    async def _open(self) -> None:
        self._slots = asyncio.Semaphore(self._limits.concurrency)
        self._budget = ByteBudget(self._limits.max_buffered_bytes)
        self._hosts = Hosts(self._limits)
        self._web = WebClient(self._limits)
        self._buckets = BucketClient(self._limits)
        self._any = ThreadClient(self._limits)

    def close(self) -> None:
        """End all requests and threads; the fetcher is of no use afterwards."""
        if self._loop.is_closed():
            return
        atexit.unregister(self.close)
        asyncio.run_coroutine_threadsafe(self._shut(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        self._any.close()
        for threads in (self._file_threads, self._other_threads):
            threads.shutdown(wait=False, cancel_futures=True)

    async def _shut(self) -> None:
        for task in self._running:
            task.cancel()
        await asyncio.gather(*self._running, return_exceptions=True)
        await self._web.close()

    def fetch(self, uri: str) -> Fetched:
        """One object."""
        return next(fetched for _, fetched in self.fetch_many([Source(uri)]))

    def fetch_many(self, sources: Sequence[Source]) -> Iterator[tuple[int, Fetched]]:
        """Each source's index and outcome, as they arrive; requests go on while the caller works."""
        return chain.from_iterable(self.fetch_batches(sources))

    def fetch_batches(self, sources: Sequence[Source]) -> Iterator[Batch]:
        """What `fetch_many` yields, a few megabytes at a time.

        A batch is emptied when the next is asked for, and its payloads count as freed: keep none of them.
        """
        inside = [
            Place(source.location, source.payload_column, source.offset or 0, index)
            for index, source in enumerate(sources)
            if source.payload_column
        ]
        apart = [(index, source) for index, source in enumerate(sources) if not source.payload_column]
        yield from self._fetch_apart(apart)
        yield from self._fetch_inside(inside, sources)

    def _fetch_inside(self, places: Sequence[Place], sources: Sequence[Source]) -> Iterator[Batch]:
        batch: Batch = []
        held = 0
        try:
            for index, outcome in read_embedded(self._tables, places, self._limits.max_bytes):
                n_bytes = 0 if isinstance(outcome, Failure) else len(outcome)
                if held + n_bytes > BATCH_BYTES or not self._budget.take_now(n_bytes):
                    yield batch
                    batch.clear()
                    self._budget.give(held)
                    held = 0
                    self._budget.take(n_bytes)
                held += n_bytes
                batch.append((index, embedded_row(outcome, sources[index])))
            yield batch
        finally:
            self._budget.give(held)

    def _fetch_apart(self, sources: Sequence[tuple[int, Source]]) -> Iterator[Batch]:
        delivery: Delivery[Fetched] = Delivery(self._budget.give)
        waiting = iter(sources)
        window = WINDOWS * self._limits.concurrency
        under_way = 0
        try:
            while True:
                if under_way <= window // 2:  # not one by one: each start wakes the event loop
                    started = list(islice(waiting, window - under_way))
                    self._start(started, delivery)
                    under_way += len(started)
                if not under_way:
                    return
                arrived = delivery.take(most=min(under_way, self._limits.concurrency))
                under_way -= len(arrived)
                try:
                    batch = outcomes_of(arrived)
                    yield batch
                    batch.clear()
                finally:
                    delivery.consumed(arrived)
        finally:
            if under_way:
                self._soon(delivery.abandon)

    def _soon(self, call: Callable[..., object], *values: object) -> None:
        """Run on the event loop; nothing is left to do there once the fetcher was closed."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(call, *values)

    def _start(self, sources: Sequence[tuple[int, Source]], delivery: Delivery[Fetched]) -> None:
        remote = []
        for index, source in sources:
            if is_local(source.location):
                self._file_threads.submit(self._arrive_from_disk, index, source, delivery)
            else:
                remote.append((index, source))
        if remote:
            self._loop.call_soon_threadsafe(self._start_remote, remote, delivery)

    def _start_remote(self, sources: Sequence[tuple[int, Source]], delivery: Delivery[Fetched]) -> None:
        for index, source in sources:
            task = self._loop.create_task(self._arrive(index, source, delivery))
            self._running.add(task)
            task.add_done_callback(self._running.discard)
            delivery.tasks.append(task)

    def _arrive_from_disk(self, index: int, source: Source, delivery: Delivery[Fetched]) -> None:
        held = 0

        def reserve(n_bytes: int) -> None:
            nonlocal held
            if not self._budget.take_now(n_bytes):
                self._budget.take(n_bytes)
            held = n_bytes

        try:
            delivery.put(Arrival(index, read_file(source, self._limits.max_bytes, reserve), held))
        except Exception as error:  # ours, not the file's: the consumer shall raise it, not wait for ever
            delivery.put(Arrival(index, error, held))

    async def _arrive(self, index: int, source: Source, delivery: Delivery[Fetched]) -> None:
        try:
            fetched, reservation = await self._fetch(source)
        except asyncio.CancelledError:
            delivery.put(Arrival(index, RuntimeError("the fetcher was closed")))
            raise
        except Exception as error:  # ours, not the object's: as above
            delivery.put(Arrival(index, error))
        else:
            reservation.shrink(len(fetched.payload or b""))
            delivery.put(Arrival(index, fetched, reservation.held))

    async def _fetch(self, source: Source) -> tuple[Fetched, Reservation]:
        timeout = asyncio.timeout(self._limits.total_timeout_s)
        reservation = Reservation(self._budget, timeout, self._limits.max_bytes)
        made = Attempts(self._limits, timeout)
        try:
            async with timeout:
                return await self._attempt_all(source, made, reservation), reservation
        except TimeoutError:
            error = f"not complete within {self._limits.total_timeout_s:g} s (--fetch.total-timeout-s)"
            return Fetched(Status.TIMEOUT, error, None, made.number, source.location), reservation
        except asyncio.CancelledError:
            reservation.release()
            raise

    async def _attempt_all(self, source: Source, made: Attempts, reservation: Reservation) -> Fetched:
        while True:
            try:
                payload, final_uri = await self._attempt(source, made, reservation)
                return complete(payload, source, made.number, final_uri)
            except Failure as failure:
                reservation.release()
                if not await made.wait_after(failure):
                    return Fetched(failure.status, failure.error, None, made.number, source.location)

    async def _attempt(self, source: Source, made: Attempts, reservation: Reservation) -> tuple[bytes, str]:
        """The payload and where it came from in the end; each redirect is a request to a host of its own."""
        uri = source.location
        client = self._client(uri)
        for hop in range(self._limits.max_redirects + 1):
            host = self._host(uri)
            async with self._turn(host, made.timeout):
                made.number += hop == 0
                with host.watched(made.timeout):
                    found = await client.get(uri, reservation, source.span)
            if isinstance(found, bytes):
                return found, uri
            uri = found.target
        raise Failure(Status.REDIRECT_LOOP, f"more than {self._limits.max_redirects} redirects")

    @contextlib.asynccontextmanager
    async def _turn(self, host: Host, timeout: asyncio.Timeout) -> AsyncIterator[None]:
        """A place at the host and one of our own; the object's clock stands still until both are free."""
        async with contextlib.AsyncExitStack() as places:
            with paused(timeout):
                await places.enter_async_context(host.place())
                await places.enter_async_context(self._slots)
            yield

    def _client(self, uri: str) -> Client:
        scheme = scheme_of(uri)
        if scheme in ("http", "https"):
            return self._web
        if scheme in OBJECT_SCHEMES and not objects.is_odd(uri):
            return self._buckets
        return self._any

    def _host(self, uri: str) -> Host:
        """The web host; a bucket's service is no host to be polite to, and its requests share no gate."""
        if scheme_of(uri) not in ("http", "https"):
            return Host(self._limits)
        url = parse(uri)
        return self._hosts.of(url.host or "", url.port or 0)


def sources_of(items: pa.Table) -> list[Source]:
    """Where the items of a plan are (`plan.LOCATION`)."""
    columns = [items[name].to_pylist() for name in Source.__slots__]
    return [Source(*values) for values in zip(*columns, strict=True)]


def outcomes_of(arrived: Sequence[Arrival[Fetched]]) -> Batch:
    """Each arrival's index and outcome. Raises the first that is a mistake of ours."""
    batch: Batch = []
    for arrival in arrived:
        if isinstance(arrival.outcome, Exception):
            raise arrival.outcome
        batch.append((arrival.index, arrival.outcome))
    return batch


def embedded_row(outcome: bytes | Failure, source: Source) -> Fetched:
    """A row of a table that holds the images themselves."""
    if isinstance(outcome, Failure):
        return Fetched(outcome.status, outcome.error, None, 1, source.uri)
    return Fetched(Status.OK, None, outcome, 1, source.uri)


def read_file(source: Source, max_bytes: int, reserve: Callable[[int], None]) -> Fetched:
    """A file of this machine."""
    if not source.location:
        return Fetched(Status.INVALID_URI, "the URI is empty", None, 0, "")
    try:
        payload = files.read_local(source.location, max_bytes, source.span, reserve)
    except Failure as failure:
        return Fetched(failure.status, failure.error, None, 1, source.location)
    return complete(payload, source, 1, source.location)


def complete(payload: bytes, source: Source, attempts: int, final_uri: str) -> Fetched:
    """A payload that is there, unless it is shorter than the part of its container that it should be."""
    if source.length is not None and len(payload) != source.length:
        error = f"{len(payload):,} of {source.length:,} bytes: the container ends before this member does"
        return Fetched(Status.TRUNCATED, error, None, attempts, final_uri)
    return Fetched(Status.OK, None, payload, attempts, final_uri)
