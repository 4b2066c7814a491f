"""An HTTP server that answers as Ray's job server does, for jobs whose states and faults a test sets."""

import json
import ssl
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

import ray

VERSION = {"version": "4", "ray_version": ray.__version__, "ray_commit": "", "session_name": ""}
Reply = tuple[int, Any]
"""Status code, and what the body is: JSON, or text."""


@dataclass
class JobServer:
    """Owns a listening port; jobs begin as RUNNING and stay so until a test ends them."""

    jobs: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Details by submission id."""
    logs: Callable[[str], Reply] = lambda name: (200, {"logs": f"log of {name}\n"})
    """The answer to a request for a job's log."""
    faults: list[Reply] = field(default_factory=list)
    """Answers to the next requests, whatever they ask."""
    tls: ssl.SSLContext | None = None

    def __post_init__(self) -> None:
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler(self))
        self._server.daemon_threads = True
        if self.tls:
            self._server.socket = self.tls.wrap_socket(self._server.socket, server_side=True)
        self.url = f"{'https' if self.tls else 'http'}://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def end(self, name: str, status: str = "SUCCEEDED", code: int | None = 0, message: str = "") -> None:
        """End a job."""
        self.jobs[name] |= {"status": status, "driver_exit_code": code, "message": message}

    def answer(self, method: str, path: str, body: Any) -> Reply:
        """What the server says to a request."""
        if self.faults:
            return self.faults.pop(0)
        if path == "/api/version":
            return 200, VERSION
        if path == "/api/jobs/":
            return self._submit(body) if method == "POST" else (200, list(self.jobs.values()))
        return self._answer_for_job(*path.removeprefix("/api/jobs/").partition("/")[::2])

    def _answer_for_job(self, name: str, action: str) -> Reply:
        if name not in self.jobs:
            return 404, f"Job {name} does not exist"
        if action == "logs":
            return self.logs(name)
        if action == "stop":
            if self.jobs[name]["status"] == "RUNNING":
                self.end(name, "STOPPED", None)
            return 200, {"stopped": True}
        return 200, self.jobs[name]

    def _submit(self, body: Any) -> Reply:
        name = body["submission_id"]
        if name in self.jobs:
            return 500, f"Job with submission_id {name} already exists."
        self.jobs[name] = {"type": "SUBMISSION", "status": "RUNNING", "driver_exit_code": None, **body}
        return 200, {"submission_id": name, "job_id": name}


def handler(server: JobServer) -> type[BaseHTTPRequestHandler]:
    """A class of handlers that ask this server."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            length = int(self.headers.get("Content-Length", 0))
            body = json.loads(self.rfile.read(length)) if length else None
            status, content = server.answer(self.command, self.path, body)
            payload = (content if isinstance(content, str) else json.dumps(content)).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(payload)))
            self.end_headers()
            self.wfile.write(payload)

        do_POST = do_GET

        def log_message(self, *args: object) -> None:
            pass

    return Handler
