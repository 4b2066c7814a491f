"""One remote object -> its payload or the status that says why not: attempts, redirects, time-out, slots."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Protocol

from pipelines.fetch import objects
from pipelines.fetch.files import FsspecClient
from pipelines.fetch.hosts import Host, Hosts
from pipelines.fetch.memory import Reservation, paused
from pipelines.fetch.objects import BucketClient
from pipelines.fetch.retry import FetchError, Retry
from pipelines.fetch.settings import FetchLimits
from pipelines.fetch.source import Fetched, Source, check_length
from pipelines.fetch.web import Body, NotModified, Redirect, WebClient, parse
from pipelines.status import Status
from pipelines.storage.objects import OBJECT_SCHEMES
from pipelines.storage.uris import scheme_of


class StorageClient(Protocol):
    """One request: the payload. Raises FetchError."""

    async def get(self, uri: str, source: Source, reservation: Reservation) -> bytes: ...


class Downloader:
    """Owns the remote clients of one event loop; every call is made on it."""

    def __init__(self, limits: FetchLimits, load_actors: int) -> None:
        self._limits = limits
        self._slots = asyncio.Semaphore(limits.concurrency)
        self._hosts = Hosts(limits, load_actors)
        self._web = WebClient(limits)
        self._buckets = BucketClient(limits)
        self._fsspec = FsspecClient(limits)

    async def close(self) -> None:
        self._fsspec.close()
        await self._web.close()

    async def fetch(self, source: Source, timeout: asyncio.Timeout, reservation: Reservation) -> Fetched:
        """Try until the payload is there or no attempt is left, within the total time-out."""
        retry = Retry(self._limits, timeout)
        try:
            async with timeout:
                while True:
                    try:
                        return await self._attempt(source, timeout, reservation)
                    except FetchError as error:
                        reservation.release()
                        if not await retry.sleep(error):
                            return Fetched.of(error)
        except TimeoutError:
            error_text = f"not complete within {self._limits.total_timeout_s:g} s (--fetch.total-timeout-s)"
            return Fetched(Status.TIMEOUT, error_text)

    async def _attempt(self, source: Source, timeout: asyncio.Timeout, reservation: Reservation) -> Fetched:
        """One attempt, through its redirects: each is a request to a host with limits of its own."""
        uri = source.location
        if scheme_of(uri) not in ("http", "https"):
            async with self._slot(None, timeout):
                return check_length(await self._client(uri).get(uri, source, reservation), source)
        earlier = source.earlier
        for _ in range(self._limits.max_redirects + 1):
            host = self._host(uri)
            async with self._slot(host, timeout):
                with host.record(timeout):
                    found = await self._web.get(uri, source, reservation, earlier)
            if not isinstance(found, Redirect):
                return _outcome(found, source, redirected=uri != source.location)
            uri, earlier = found.target, None  # an ETag is valid for one URL only
        raise FetchError(Status.REDIRECT_LOOP, f"more than {self._limits.max_redirects} redirects")

    @contextlib.asynccontextmanager
    async def _slot(self, host: Host | None, timeout: asyncio.Timeout) -> AsyncIterator[None]:
        """Hold a slot of the host and one of ours; waiting for them does not count as the object's time."""
        async with contextlib.AsyncExitStack() as slots:
            with paused(timeout):
                if host:
                    await slots.enter_async_context(host.slot())
                await slots.enter_async_context(self._slots)
            yield

    def _client(self, uri: str) -> StorageClient:
        if scheme_of(uri) in OBJECT_SCHEMES and not objects.is_odd(uri):
            return self._buckets
        return self._fsspec

    def _host(self, uri: str) -> Host:
        """The web host; an object store has no limits per host."""
        url = parse(uri)
        return self._hosts.get(url.host or "", url.port or 0)


def _outcome(found: Body | NotModified, source: Source, *, redirected: bool) -> Fetched:
    """What a web server's last answer comes to; a redirect may lead elsewhere another night."""
    validator = None if redirected else found.validator
    if isinstance(found, NotModified):
        return Fetched(Status.OK, validator=validator, not_modified=True)
    return replace(check_length(found.payload, source), validator=validator)
