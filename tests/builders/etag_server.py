"""An HTTP server of images with ETags: what it holds may change between nights, and it counts its answers.

It listens on 127.0.0.2 on several ports, since a port is a host of its own: one answers conditional requests,
one gives no validators, one gives a new ETag with every answer, one serves byte ranges, if given over TLS.
"""

import hashlib
import itertools
import ssl
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

ADDRESS = "127.0.0.2"


class EtagServer:
    """Owns a server thread per kind of host; `images` maps a path to bytes."""

    def __init__(self, tls: ssl.SSLContext | None = None) -> None:
        self._tls = tls
        self.images: dict[str, bytes] = {}
        self.dates: dict[str, str] = {}
        """Last-Modified by path, instead of an ETag."""
        self.answers: Counter[int] = Counter()
        """Answers by status code."""
        self.asked: list[str] = []
        """Paths in the order of their requests."""
        self._numbers = itertools.count()
        self._servers = {kind: self._start(kind) for kind in ("etag", "plain", "random", "ranges")}

    def url(self, path: str, kind: str = "etag") -> str:
        """Where an image is, on the host of this kind."""
        scheme = "https" if self._tls and kind == "ranges" else "http"
        return f"{scheme}://{ADDRESS}:{self._servers[kind].server_port}{path}"

    def forget(self) -> None:
        """Start counting from zero."""
        self.answers.clear()
        self.asked.clear()

    def close(self) -> None:
        for server in self._servers.values():
            server.shutdown()
            server.server_close()

    def _start(self, kind: str) -> ThreadingHTTPServer:
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                outer._answer(self, kind)

            def log_message(self, *args: object) -> None:
                pass

        server = ThreadingHTTPServer((ADDRESS, 0), Handler)
        server.daemon_threads = True
        if self._tls and kind == "ranges":
            server.socket = self._tls.wrap_socket(server.socket, server_side=True)
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        return server

    def _answer(self, request: BaseHTTPRequestHandler, kind: str) -> None:
        self.asked.append(request.path)
        body = self.images.get(request.path)
        headers = {} if body is None else self._validators(request.path, body, kind)
        code = 404 if body is None else 200
        given = {"ETag": "If-None-Match", "Last-Modified": "If-Modified-Since"}
        if any(request.headers.get(given[name]) == value for name, value in headers.items()):
            code, body = 304, b""
        if kind == "ranges" and body and (given_range := request.headers.get("Range")):
            first, last = map(int, given_range.removeprefix("bytes=").split("-"))
            headers["Content-Range"] = f"bytes {first}-{min(last, len(body) - 1)}/{len(body)}"
            code, body = 206, body[first : last + 1]
        self.answers[code] += 1
        request.send_response(code)
        for name, value in headers.items():
            request.send_header(name, value)
        if code != 304:
            request.send_header("Content-Length", str(len(body or b"")))
        request.end_headers()
        request.wfile.write(body or b"")

    def _validators(self, path: str, body: bytes, kind: str) -> dict[str, str]:
        if kind == "plain":
            return {}
        if kind == "random":
            return {"ETag": f'"{next(self._numbers)}"'}
        if path in self.dates:
            return {"Last-Modified": self.dates[path]}
        return {"ETag": f'"{hashlib.md5(body).hexdigest()}"'}
