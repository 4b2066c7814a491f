"""An HTTP server that misbehaves on request: each path is one fault, and every request to it is counted.

Written on bare sockets, since no HTTP library sends a wrong length, a reset or one byte a second. It
listens on 127.0.0.2, so that a test may allow that address and see 127.0.0.1 refused.
"""

import asyncio
import contextlib
import gzip
import io
import math
import socket
import ssl
import struct
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator

from PIL import Image

BODY = b"\xff\xd8\xff" + bytes(range(256)) * 40
"""What a healthy path serves: ten kilobytes."""

_drawn = io.BytesIO()
Image.new("RGB", (30, 20), "teal").save(_drawn, "PNG")
IMAGE = _drawn.getvalue()

ADDRESS = "127.0.0.2"

Writer = asyncio.StreamWriter
Respond = Callable[["FaultServer", Writer, str, int], Awaitable[None]]


def head(status: str, **headers: object) -> bytes:
    lines = [f"HTTP/1.1 {status}", *(f"{name.replace('_', '-')}: {value}" for name, value in headers.items())]
    return ("\r\n".join(lines) + "\r\n\r\n").encode()


def whole(body: bytes, status: str = "200 OK", **headers: object) -> bytes:
    return head(status, Content_Length=len(body), **headers) + body


def s3_error(code: str) -> bytes:
    return f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>m</Message></Error>".encode()


def chunked(body: bytes) -> bytes:
    return (
        head("200 OK", Transfer_Encoding="chunked") + f"{len(body):x}\r\n".encode() + body + b"\r\n0\r\n\r\n"
    )


class FaultServer:
    """Runs on an event loop in a thread of its own; `requests` counts by path, `most_at_once` by overlap."""

    def __init__(self) -> None:
        self.requests: Counter[str] = Counter()
        self.paths_in_order: list[str] = []
        self.most_at_once = 0
        self.now = 0
        self.first_at: dict[str, float] = {}
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._servers: list[asyncio.Server] = []
        self.port = self.another_port()

    def another_port(self, tls: ssl.SSLContext | None = None) -> int:
        """One more port that leads here: another host to a client."""
        started = asyncio.start_server(self._serve, ADDRESS, 0, ssl=tls)
        self._servers.append(asyncio.run_coroutine_threadsafe(started, self._loop).result())
        port: int = self._servers[-1].sockets[0].getsockname()[1]
        return port

    @property
    def url(self) -> str:
        return f"http://{ADDRESS}:{self.port}"

    def close(self) -> None:
        asyncio.run_coroutine_threadsafe(self._shut(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _shut(self) -> None:
        for server in self._servers:
            server.close()
        answering = asyncio.all_tasks() - {asyncio.current_task()}
        for task in answering:
            task.cancel()
        await asyncio.gather(*answering, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: Writer) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            while True:
                request = await reader.readuntil(b"\r\n\r\n")
                path = request.split(b" ", 2)[1].decode()
                self.requests[path] += 1
                self.paths_in_order.append(path)
                self.now += 1
                self.most_at_once = max(self.most_at_once, self.now)
                try:
                    await self._answer(writer, path)
                finally:
                    self.now -= 1
        with contextlib.suppress(ConnectionError):
            writer.close()

    async def _answer(self, writer: Writer, path: str) -> None:
        fault = FAULTS.get(path.partition("?")[0].strip("/").partition("/")[0], not_found)
        await fault(self, writer, path, self.requests[path])
        await writer.drain()


@contextlib.contextmanager
def fault_server() -> Iterator[FaultServer]:
    server = FaultServer()
    try:
        yield server
    finally:
        server.close()


@contextlib.contextmanager
def witness() -> Iterator[tuple[int, list[object]]]:
    """A port on 127.0.0.1, and whoever connected to it."""
    seen: list[object] = []
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(0.05)
        stop = threading.Event()

        def listen() -> None:
            while not stop.is_set():
                with contextlib.suppress(TimeoutError, OSError):
                    seen.append(listener.accept())

        thread = threading.Thread(target=listen, daemon=True)
        thread.start()
        try:
            yield listener.getsockname()[1], seen
        finally:
            stop.set()
            thread.join()


class Forwarder:
    """A port that leads to another server, and can be cut off and restored."""

    def __init__(self, port: int, address: str = "127.0.0.1") -> None:
        self.down = False
        self.refused = 0
        """Connections reset because it was down."""
        self._target = (address, port)
        self._open: list[Writer] = []
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        started = asyncio.start_server(self._serve, "127.0.0.1", 0)
        self._server = asyncio.run_coroutine_threadsafe(started, self._loop).result()
        self.port = self._server.sockets[0].getsockname()[1]

    def cut(self) -> None:
        """Reset every connection, and every new one, until `down` is false again."""
        self.down = True
        self._loop.call_soon_threadsafe(self._abort)

    def close(self) -> None:
        asyncio.run_coroutine_threadsafe(self._shut(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _shut(self) -> None:
        self._server.close()
        self._abort()
        copying = asyncio.all_tasks() - {asyncio.current_task()}
        for task in copying:
            task.cancel()
        await asyncio.gather(*copying, return_exceptions=True)

    def _abort(self) -> None:
        for writer in self._open:
            writer.transport.abort()
        self._open.clear()

    async def _serve(self, reader: asyncio.StreamReader, writer: Writer) -> None:
        if self.down:
            self.refused += 1
            writer.transport.abort()
            return
        far_reader, far_writer = await asyncio.open_connection(*self._target)
        self._open += [writer, far_writer]
        await asyncio.gather(self._copy(reader, far_writer), self._copy(far_reader, writer))

    async def _copy(self, reader: asyncio.StreamReader, writer: Writer) -> None:
        with contextlib.suppress(ConnectionError, asyncio.CancelledError):
            while chunk := await reader.read(65_536):
                writer.write(chunk)
                await writer.drain()
            writer.close()


def fixed(response: bytes) -> Respond:
    async def respond(_server: FaultServer, writer: Writer, _path: str, _count: int) -> None:
        writer.write(response)

    return respond


def at_first(failing: int, first: bytes, then: bytes) -> Respond:
    """`first` for that many requests, `then` afterwards."""

    async def respond(_server: FaultServer, writer: Writer, _path: str, count: int) -> None:
        writer.write(first if count <= failing else then)

    return respond


def cut(response: bytes) -> Respond:
    async def respond(_server: FaultServer, writer: Writer, _path: str, _count: int) -> None:
        writer.write(response)
        await writer.drain()
        writer.close()

    return respond


async def silent(_server: FaultServer, _writer: Writer, _path: str, _count: int) -> None:
    await asyncio.sleep(30)


async def drip(_server: FaultServer, writer: Writer, _path: str, _count: int) -> None:
    """One byte a second would take three hours: never silent for long, never done."""
    writer.write(head("200 OK", Content_Length=len(BODY)))
    for byte in BODY:
        writer.write(bytes([byte]))
        await writer.drain()
        await asyncio.sleep(0.3)


async def trickle(_server: FaultServer, writer: Writer, _path: str, _count: int) -> None:
    """Claims 60 MB, sends 100 kB, and then goes on by bytes."""
    writer.write(head("200 OK", Content_Length=60_000_000) + bytes(100_000))
    while True:
        await writer.drain()
        await asyncio.sleep(0.3)
        writer.write(b"x")


async def endless(_server: FaultServer, writer: Writer, _path: str, _count: int) -> None:
    writer.write(head("200 OK", Transfer_Encoding="chunked"))
    while True:
        writer.write(b"10000\r\n" + bytes(0x10000) + b"\r\n")
        await writer.drain()


async def reset(_server: FaultServer, writer: Writer, _path: str, _count: int) -> None:
    """Half a body, and then a RST instead of an end."""
    writer.write(head("200 OK", Content_Length=len(BODY)) + BODY[:500])
    await writer.drain()
    await asyncio.sleep(0.05)
    connection = writer.get_extra_info("socket")
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


async def slow(_server: FaultServer, writer: Writer, _path: str, _count: int) -> None:
    await asyncio.sleep(0.05)
    writer.write(whole(BODY))


async def echo(_server: FaultServer, writer: Writer, path: str, _count: int) -> None:
    """The request's path as the body."""
    writer.write(whole(path.encode()))


async def four_at_once(server: FaultServer, writer: Writer, _path: str, _count: int) -> None:
    """429 for whoever comes while four are served."""
    if server.now > 4:
        writer.write(whole(b"", "429 Too Many Requests"))
        return
    await asyncio.sleep(0.02)
    writer.write(whole(BODY))


async def redirect(server: FaultServer, writer: Writer, path: str, _count: int) -> None:
    """`/redirect?target`, or `/redirect` to a healthy path, relative."""
    target = path.partition("?")[2] or "../ok"
    writer.write(whole(b"", "302 Found", Location=target))


async def hops(_server: FaultServer, writer: Writer, path: str, _count: int) -> None:
    """`/hops/3` redirects three times."""
    left = int(path.rpartition("/")[2])
    writer.write(whole(BODY) if left == 0 else whole(b"", "301 Moved", Location=f"/hops/{left - 1}"))


async def outage(server: FaultServer, writer: Writer, _path: str, _count: int) -> None:
    """Every request fails until 90 were made, to any path."""
    down = server.requests.total() <= 90
    writer.write(whole(b"", "503 Service Unavailable") if down else whole(IMAGE))


async def busy_for_3_s(server: FaultServer, writer: Writer, path: str, _count: int) -> None:
    """Asks for a pause of three seconds, and insists on it."""
    left_s = server.first_at.setdefault(path, time.monotonic()) + 3 - time.monotonic()
    busy = whole(b"", "503 Service Unavailable", Retry_After=math.ceil(left_s))
    writer.write(busy if left_s > 0 else whole(IMAGE))


not_found = fixed(whole(b"gone", "404 Not Found"))

FAULTS: dict[str, Respond] = {
    "ok": fixed(whole(BODY)),
    "echo": echo,
    "four-at-once": four_at_once,
    "429-without-advice": fixed(whole(b"", "429 Too Many Requests")),
    "slow": slow,
    "large": fixed(whole(bytes(900_000))),
    "large-chunked": fixed(chunked(bytes(900_000))),
    "403": fixed(whole(b"", "403 Forbidden")),
    "s3-expired-token": fixed(whole(s3_error("ExpiredToken"), "400 Bad Request")),
    "s3-skewed-clock": fixed(whole(s3_error("RequestTimeTooSkewed"), "403 Forbidden")),
    "s3-request-timeout": fixed(whole(s3_error("RequestTimeout"), "400 Bad Request")),
    "s3-denied": fixed(whole(s3_error("AccessDenied"), "403 Forbidden")),
    "404": not_found,
    "404-for-an-hour": fixed(whole(b"", "404 Not Found", Retry_After=3600)),
    "410": fixed(whole(b"", "410 Gone")),
    "418": fixed(whole(b"", "418 I'm a teapot")),
    "latin-1-reason": fixed(b"HTTP/1.1 404 Introuv\xe9\r\nContent-Length: 0\r\n\r\n"),
    "latin-1-location": fixed(b"HTTP/1.1 302 Found\r\nLocation: http://\xe9[\r\nContent-Length: 0\r\n\r\n"),
    "429-once": at_first(1, whole(b"", "429 Too Many Requests", Retry_After=1), whole(BODY)),
    "429-for-ever": fixed(whole(b"", "429 Too Many Requests", Retry_After=0)),
    "429-for-an-hour": fixed(whole(b"", "429 Too Many Requests", Retry_After=3600)),
    "500": fixed(whole(b"", "500 Internal Server Error")),
    "503-twice": at_first(2, whole(b"", "503 Service Unavailable"), whole(BODY)),
    "image": fixed(whole(IMAGE)),
    "image-after-503-twice": at_first(2, whole(b"", "503 Service Unavailable"), whole(IMAGE)),
    "outage": outage,
    "busy-for-3-s": busy_for_3_s,
    "silent": silent,
    "drip": drip,
    "large-headers": fixed(
        whole(BODY, Content_Security_Policy="x" * 20_000, **{f"X_{n}": n for n in range(200)})
    ),
    "truncated": cut(head("200 OK", Content_Length=len(BODY)) + BODY[:500]),
    "length-too-small": fixed(head("200 OK", Content_Length=500) + BODY),
    "length-of-terabytes": fixed(head("200 OK", Content_Length=10**13) + BODY),
    "length-is-text": fixed(head("200 OK", Content_Length="many") + BODY),
    "not-http": cut(b"220 smtp.example ESMTP\r\n"),
    "loop": fixed(whole(b"", "302 Found", Location="/loop")),
    "hops": hops,
    "redirect": redirect,
    "html": fixed(whole(b"<!doctype html><title>Not here</title>", Content_Type="text/html")),
    "empty": fixed(whole(b"")),
    "trickle": trickle,
    "endless": endless,
    "reset": reset,
    "gzip": fixed(whole(gzip.compress(BODY), Content_Encoding="gzip")),
    "gzip-bomb": fixed(whole(gzip.compress(bytes(50_000_000)), Content_Encoding="gzip")),
    "brotli": fixed(whole(BODY, Content_Encoding="br")),
}
