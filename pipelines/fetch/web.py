"""http(s) -> bytes, one request at a time: one hop at a time, every connection's address judged first.

Bodies are streamed against the byte limit, also while they are unpacked; what a server claims about its
body is believed only when it makes the limit stricter. No cookies, no proxies, no
authentication but what the URL itself holds, which no redirect takes along.
"""

import re
import socket
import zlib
from collections.abc import AsyncIterator
from dataclasses import dataclass

import aiohttp
from yarl import URL

from pipelines.fetch.memory import SMALL_BYTES, Reservation
from pipelines.fetch.retry import Failure, retry_after_s, status_of_code
from pipelines.fetch.ssrf import BLOCKED_ERRNO, guarded_socket
from pipelines.specs import FetchLimits
from pipelines.status import Status

REDIRECTS = frozenset({301, 302, 303, 307, 308})
NEEDS_QUOTING = re.compile(r"[^!-~]|[\"<>\\^`{|}]")
"""Characters that no URL holds as they are; one without any is sent as given, or its signature breaks."""

GZIP_OR_ZLIB = 32 + zlib.MAX_WBITS


ASKS_FOR_PEACE = frozenset({429, 503})
"""The answers that `Retry-After` is heeded of: on a page that is missing it speaks of nothing else."""


@dataclass(frozen=True, slots=True)
class Redirect:
    """The object is to be had elsewhere."""

    target: str
    """An absolute http(s) URL."""


class WebClient:
    """Owns the connection pool of one event loop."""

    def __init__(self, limits: FetchLimits) -> None:
        connector = aiohttp.TCPConnector(
            limit=0,  # concurrency is bounded by the caller, where waiting costs a request no time
            ttl_dns_cache=60,
            socket_factory=None
            if limits.allow_private_addresses
            else guarded_socket(limits.allowed_networks),
        )
        self._session = aiohttp.ClientSession(
            connector=connector,
            timeout=aiohttp.ClientTimeout(
                total=None, connect=limits.connect_timeout_s, sock_read=limits.read_timeout_s
            ),
            headers={
                "User-Agent": limits.user_agent,
                "Accept": "image/*,*/*;q=0.5",
                "Accept-Encoding": "identity",
            },
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
        )

    async def close(self) -> None:
        await self._session.close()

    async def get(
        self, uri: str, reservation: Reservation, span: tuple[int, int] | None = None
    ) -> "bytes | Redirect":
        """One request: the payload, or where the server sends us for it.

        Args:
            span: first byte and length of a part of the object.

        Raises:
            Failure: with the status that the row gets if this was the last attempt.
        """
        url = parse(uri)
        headers = {"Range": f"bytes={span[0]}-{span[0] + span[1] - 1}"} if span else {}
        try:
            async with self._session.get(url, headers=headers, allow_redirects=False) as response:
                if response.status not in REDIRECTS or "Location" not in response.headers:
                    return await self._payload(response, reservation, span)
                return Redirect(str(follow(url, response.headers["Location"])))
        except (aiohttp.ClientError, OSError, ValueError) as error:  # OSError: TimeoutError, resets
            raise failure_of(error) from error

    async def _payload(
        self, response: aiohttp.ClientResponse, reservation: Reservation, span: tuple[int, int] | None
    ) -> bytes:
        if response.status not in ((206,) if span else (200, 203)):
            raise _refused(response, span)
        pieces = []
        received = 0
        expected = response.content_length if _encoding(response) == "identity" else None
        await reservation.cover(0, expected)
        async for piece in _decoded(response):
            received += len(piece)
            await reservation.cover(received, expected)
            pieces.append(piece)
        return b"".join(pieces)


def parse(uri: str) -> URL:
    """An absolute http(s) URL. Raises Failure (`invalid_uri`)."""
    try:
        url = URL(uri, encoded=not NEEDS_QUOTING.search(uri))
        if url.scheme in ("http", "https") and url.host and url.port is not None:
            return url
    except ValueError as error:
        raise Failure(Status.INVALID_URI, f"not a URL: {error}") from error
    raise Failure(Status.INVALID_URI, f"not an absolute http(s) URL: {uri}")


def follow(url: URL, location: str) -> URL:
    """Where a redirect leads. Raises Failure for anything but http(s)."""
    try:
        target = url.join(URL(location, encoded=not NEEDS_QUOTING.search(location)))
        if target.scheme in ("http", "https") and target.host and target.port is not None:
            return target
    except ValueError as error:
        raise Failure(Status.HTTP_ERROR, f"redirect to what is not a URL: {location}") from error
    raise Failure(Status.BLOCKED_ADDRESS, f"a redirect is followed to http(s) only, not to {location}")


def failure_of(error: aiohttp.ClientError | OSError | ValueError) -> Failure:
    """The status of a request that got no answer, or only a part of one."""
    text = f"{type(error).__name__}: {error}"
    if isinstance(error, TimeoutError):
        return Failure(Status.TIMEOUT, text)
    if isinstance(error, ValueError):  # aiohttp.InvalidURL, and names that IDNA cannot write
        return Failure(Status.INVALID_URI, text)
    cause = error.os_error if isinstance(error, aiohttp.ClientConnectorError) else error
    if isinstance(cause, OSError) and cause.errno == BLOCKED_ERRNO:
        return Failure(Status.BLOCKED_ADDRESS, str(cause.strerror))
    # A name that does not exist, unlike a resolver that does not answer, is not asked for again at once.
    unknown_name = isinstance(cause, socket.gaierror) and cause.errno == socket.EAI_NONAME
    return Failure(Status.CONNECTION_FAILED, text, final=unknown_name)


def _refused(response: aiohttp.ClientResponse, span: tuple[int, int] | None) -> Failure:
    if span and response.status == 200:
        return Failure(Status.HTTP_ERROR, "the server does not serve byte ranges")
    asks = response.status in ASKS_FOR_PEACE
    wait_s = retry_after_s(response.headers.get("Retry-After")) if asks else None
    return Failure(
        status_of_code(response.status),
        f"HTTP {response.status} {response.reason or ''}",
        retry_after_s=wait_s,
    )


def _encoding(response: aiohttp.ClientResponse) -> str:
    return response.headers.get("Content-Encoding", "identity").strip().lower() or "identity"


async def _decoded(response: aiohttp.ClientResponse) -> AsyncIterator[bytes]:
    """The body as the image's bytes; identity was asked for, but some servers pack all the same.

    A packed body is unpacked in small steps, so that a bomb meets the byte limit before it fills memory.
    """
    encoding = _encoding(response)
    if encoding == "identity":
        async for piece in response.content.iter_any():
            yield piece
    elif encoding in ("gzip", "x-gzip", "deflate"):
        unpack = zlib.decompressobj(GZIP_OR_ZLIB)
        async for piece in response.content.iter_any():
            packed = piece
            while packed:
                try:
                    unpacked = unpack.decompress(packed, SMALL_BYTES)
                except zlib.error as error:
                    raise Failure(Status.HTTP_ERROR, f"broken {encoding} body: {error}") from error
                yield unpacked
                packed = unpack.unconsumed_tail
    else:
        raise Failure(Status.HTTP_ERROR, f"Content-Encoding {encoding[:40]}, though identity was asked for")
