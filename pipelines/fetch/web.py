"""http(s) -> payloads: one request, to an address that SSRF protection allows; redirects are returned.

Bodies are streamed against the byte limit, also while they are decompressed; a Content-Length can only make
that limit stricter. No cookies, no proxies, and no authentication but the URL's own, which is not sent to
redirect targets.
"""

import re
import socket
import zlib
from collections.abc import AsyncIterator
from dataclasses import dataclass

import aiohttp
from yarl import URL

from pipelines.fetch.memory import Reservation
from pipelines.fetch.retry import FetchError, parse_retry_after, status_of_code
from pipelines.fetch.settings import FetchLimits
from pipelines.fetch.source import Earlier, Source, Span, Validator
from pipelines.fetch.ssrf import BLOCKED_ERRNO, ssrf_safe_socket
from pipelines.status import Status

REDIRECTS = frozenset({301, 302, 303, 307, 308})
NEEDS_QUOTING = re.compile(r"[^!-~]|[\"<>\\^`{|}]")
"""Characters that a URL must quote; a URL without any is sent as given, or a signature in it would break."""

GZIP_OR_ZLIB = 32 + zlib.MAX_WBITS
DECOMPRESS_STEP = 256 << 10
"""Bytes decompressed at a time, so that a bomb meets the byte limit before it fills memory."""

MAX_HEADER_BYTES = 64 << 10
MAX_HEADERS = 512
"""Longest header and most of them; content security policies and signed redirects exceed aiohttp's limits."""

RETRY_AFTER_CODES = frozenset({429, 503})
"""Status codes whose Retry-After is honoured; elsewhere it is ignored."""


@dataclass(frozen=True, slots=True)
class Redirect:
    """The server redirected the request."""

    target: str
    """An absolute http(s) URL."""


@dataclass(frozen=True, slots=True)
class Body:
    """The server sent the object."""

    payload: bytes
    validator: Validator


@dataclass(frozen=True, slots=True)
class NotModified:
    """The server says that the object is as an earlier response had it (HTTP 304)."""

    validator: Validator


class WebClient:
    """Owns the connection pool of one event loop."""

    def __init__(self, limits: FetchLimits) -> None:
        connector = aiohttp.TCPConnector(
            limit=0,  # concurrency is bounded by the caller, where waiting costs a request no time
            ttl_dns_cache=60,
            socket_factory=None
            if limits.allow_private_addresses
            else ssrf_safe_socket(limits.allowed_networks),
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
            max_line_size=MAX_HEADER_BYTES,
            max_field_size=MAX_HEADER_BYTES,
            max_headers=MAX_HEADERS,
        )

    async def close(self) -> None:
        await self._session.close()

    async def get(
        self, uri: str, source: Source, reservation: Reservation, earlier: Earlier | None = None
    ) -> Body | Redirect | NotModified:
        """One request: the payload, a span of it, a redirect, or that the object is still the earlier one.

        Raises FetchError.
        """
        url = parse(uri)
        span = source.span
        headers = {"Range": f"bytes={span[0]}-{span[0] + span[1] - 1}"} if span else {}
        if earlier:
            headers |= _condition(earlier.validator)
        try:
            async with self._session.get(url, headers=headers, allow_redirects=False) as response:
                if response.status in REDIRECTS and "Location" in response.headers:
                    return Redirect(str(follow(url, response.headers["Location"])))
                found = Validator(response.headers.get("ETag"), response.headers.get("Last-Modified"))
                if response.status == 304 and earlier:
                    return NotModified(found or earlier.validator)
                if source.planned and response.status == 206:
                    source.planned.check(_total_bytes(response), (found.etag, found.last_modified))
                return Body(await self._payload(response, reservation, span), found)
        except (aiohttp.ClientError, OSError, ValueError) as error:  # OSError: TimeoutError, resets
            raise to_fetch_error(error) from error

    async def _payload(
        self, response: aiohttp.ClientResponse, reservation: Reservation, span: Span | None
    ) -> bytes:
        if response.status not in ((206,) if span else (200, 203)):
            raise _error_of_response(response, span)
        pieces = []
        received = 0
        expected = response.content_length if _encoding(response) == "identity" else None
        await reservation.reserve_stream(0, expected)
        async for piece in _decompressed(response):
            received += len(piece)
            await reservation.reserve_stream(received, expected)
            pieces.append(piece)
        return b"".join(pieces)


def _condition(validator: Validator) -> dict[str, str]:
    """The headers that ask for the object only if it has changed; an ETag is preferred (RFC 9110)."""
    if validator.etag:
        return {"If-None-Match": validator.etag}
    return {"If-Modified-Since": validator.last_modified or ""}


def _total_bytes(response: aiohttp.ClientResponse) -> int | None:
    """The size of the file that this is a part of, if the server says it."""
    total = response.headers.get("Content-Range", "").rpartition("/")[2]
    return int(total) if total.isascii() and total.isdigit() else None


def parse(uri: str) -> URL:
    """An absolute http(s) URL. Raises FetchError (`invalid_uri`)."""
    try:
        url = URL(uri, encoded=not NEEDS_QUOTING.search(uri))
        if url.scheme in ("http", "https") and url.host and url.port is not None:
            return url
    except (ValueError, IndexError) as error:  # yarl's IndexError: brackets without a host
        raise FetchError(Status.INVALID_URI, f"not a URL: {error}") from error
    raise FetchError(Status.INVALID_URI, f"not an absolute http(s) URL: {uri}")


def follow(url: URL, location: str) -> URL:
    """Where a redirect leads. Raises FetchError for anything but http(s)."""
    try:
        target = url.join(URL(location, encoded=not NEEDS_QUOTING.search(location)))
        if target.scheme in ("http", "https") and target.host and target.port is not None:
            return target
    except (ValueError, IndexError) as error:
        raise FetchError(Status.HTTP_ERROR, f"redirect to an invalid URL: {location}") from error
    raise FetchError(Status.BLOCKED_ADDRESS, f"a redirect is followed to http(s) only, not to {location}")


def to_fetch_error(error: aiohttp.ClientError | OSError | ValueError) -> FetchError:
    """The status of a request that got no answer, or only a part of one."""
    text = f"{type(error).__name__}: {error}"
    if isinstance(error, TimeoutError):
        return FetchError(Status.TIMEOUT, text)
    if isinstance(error, aiohttp.ClientSSLError):  # before ValueError, which a certificate's error is too
        return FetchError(Status.TLS_FAILED, text, final=True)  # certificates are not renewed in seconds
    if isinstance(error, ValueError):  # aiohttp.InvalidURL, and names that IDNA cannot write
        return FetchError(Status.INVALID_URI, text)
    cause = error.os_error if isinstance(error, aiohttp.ClientConnectorError) else error
    if isinstance(cause, OSError) and cause.errno == BLOCKED_ERRNO:
        return FetchError(Status.BLOCKED_ADDRESS, str(cause.strerror))
    # A name that does not exist is not retried in this pass, unlike a resolver that does not answer.
    unknown_name = isinstance(cause, socket.gaierror) and cause.errno == socket.EAI_NONAME
    return FetchError(Status.CONNECTION_FAILED, text, final=unknown_name)


def _error_of_response(response: aiohttp.ClientResponse, span: Span | None) -> FetchError:
    if span and response.status == 200:
        return FetchError(Status.HTTP_ERROR, "the server does not serve byte ranges")
    honoured = response.status in RETRY_AFTER_CODES
    retry_after_s = parse_retry_after(response.headers.get("Retry-After")) if honoured else None
    return FetchError(
        status_of_code(response.status),
        f"HTTP {response.status} {response.reason or ''}",
        retry_after_s=retry_after_s,
    )


def _encoding(response: aiohttp.ClientResponse) -> str:
    return response.headers.get("Content-Encoding", "identity").strip().lower() or "identity"


async def _decompressed(response: aiohttp.ClientResponse) -> AsyncIterator[bytes]:
    """The body without its Content-Encoding: we ask for identity, but some servers compress all the same."""
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
                    unpacked = unpack.decompress(packed, DECOMPRESS_STEP)
                except zlib.error as error:
                    raise FetchError(Status.HTTP_ERROR, f"broken {encoding} body: {error}") from error
                yield unpacked
                packed = unpack.unconsumed_tail
    else:
        raise FetchError(
            Status.HTTP_ERROR, f"Content-Encoding {encoding[:40]}, though identity was asked for"
        )
