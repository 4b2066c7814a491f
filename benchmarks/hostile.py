"""Classifies over HTTP from servers that misbehave: hostile answers, an outage, a host that trickles.

    python benchmarks/hostile.py
    python benchmarks/hostile.py --only outage
    python benchmarks/hostile.py --only answers --scale 0.1

Prints `pass` or `FAIL` with each figure, and ends with exit code 1 if one fails. Each part is a run of
`iab-vision classify --engine local` with a ViT so small that everything but the model shows, against servers
in this process on 127.0.0.2, a port for each host. On 2 cores about six minutes.

    answers  20,000 random status lines, headers, redirects, chunks, encodings and breaks from 200 hosts:
             every row gets a status, none `internal_error`, the images served are ok; no host is asked more
             than twice its limit at once. Fails where the machine is too busy for answers within 3 s
    outage   every request fails for a minute in the middle of 5,000: at most 5 % are recorded as failed, and
             none after `--retry-failed`; nothing is published meanwhile
    trickle  of 10,000 images one in a hundred from a host that claims 60 MB and sends 10 bytes/s: the rate of
             the others is within 10 % of a run without
"""

import argparse
import asyncio
import contextlib
import gzip
import io
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.dataset as pads
import pyarrow.parquet as pq
from inputs import VIT_MINIATURE, random_bundle
from PIL import Image

ADDRESS = "127.0.0.2"
PER_HOST = 16
"""Default of `--fetch.per-host`."""

Respond = Callable[["Server", asyncio.StreamWriter, str], Awaitable[None]]


def drawn_image() -> bytes:
    buffer = io.BytesIO()
    Image.linear_gradient("L").convert("RGB").resize((64, 48)).save(buffer, "JPEG")
    return buffer.getvalue()


IMAGE = drawn_image()


class Server:
    """One event loop, many ports; counts what each is asked at once."""

    def __init__(self, respond: Respond, n_hosts: int) -> None:
        self.respond = respond
        self.now: Counter[int] = Counter()
        self.most: Counter[int] = Counter()
        self.n_requests = 0
        self.good_at: list[float] = []
        """When each good image was served."""
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()
        opened = asyncio.run_coroutine_threadsafe(self._open(n_hosts), self._loop)
        self.ports: list[int] = opened.result()

    async def _open(self, n_hosts: int) -> list[int]:
        servers = [await asyncio.start_server(self._serve, ADDRESS, 0, backlog=512) for _ in range(n_hosts)]
        return [server.sockets[0].getsockname()[1] for server in servers]

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        port = writer.get_extra_info("sockname")[1]
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            while request := await reader.readuntil(b"\r\n\r\n"):
                self.n_requests += 1
                self.now[port] += 1
                self.most[port] = max(self.most[port], self.now[port])
                try:
                    await self.respond(self, writer, request.split(b" ", 2)[1].decode())
                    await writer.drain()
                finally:
                    self.now[port] -= 1
        writer.close()

    def serve_image(self, writer: asyncio.StreamWriter) -> None:
        self.good_at.append(time.monotonic())
        writer.write(response("200 OK", IMAGE))


def response(status: str, body: bytes = b"", *headers: str) -> bytes:
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", *headers]
    return "\r\n".join(lines).encode("latin-1", "replace") + b"\r\n\r\n" + body


STATUS_LINES = [
    "200 OK", "200", "99 Low", "600 High", "abc Text", "200 \xe9\xff", "206 Partial", "204 None",
    "304 Not Modified", "401 No", "403 No", "404 No", "410 Gone", "418 Teapot", "425 Early", "429 Slow",
    "451 Law", "500 Oh", "502 Bad", "503 Later", "504 Late",
]  # fmt: skip
HEADERS = [
    "Content-Length: 12", "Content-Length: -1", "Content-Length: 99999999999999", "Content-Length: x",
    "Transfer-Encoding: chunked", "Content-Encoding: gzip", "Content-Encoding: br",
    "Content-Encoding: deflate",
    "Retry-After: 1", "Retry-After: -5", "Retry-After: 1e999", "Retry-After: Fri, 31 Feb 2020", "X: \xe9\x7f",
    "X: " + "x" * 30_000, ": no name", "no colon", "Connection: close", "Location: /",
    "Set-Cookie: a=b; Domain=x",
]  # fmt: skip
LOCATIONS = [
    "/again", "//", "http://[x]@/", "https://[img]@/p.jpg", "javascript:alert(1)", "ftp://x/", "http://", "http://:0/",
    "http://169.254.169.254/", "file:///etc/passwd", "\xe9", "http://a:99999/", "?", "#", "http://no.invalid/x.jpg",
]  # fmt: skip


def draw(path: str) -> tuple[random.Random, int, bytes]:
    """The kind of the answer, and a body, drawn from the path: a request tried again gets the same."""
    rng = random.Random(path)
    body = rng.choice([IMAGE, IMAGE[: rng.randrange(len(IMAGE))], rng.randbytes(rng.randrange(5_000)), b""])
    return rng, rng.randrange(10), body


SERVED = (0, 1, 2, 9)
"""Kinds of answers that are an image."""


async def answer_anyhow(server: Server, writer: asyncio.StreamWriter, path: str) -> None:
    """One of many hostile answers."""
    rng, kind, body = draw(path)
    match kind:
        case 0 | 1 | 2:
            server.serve_image(writer)
        case 3:
            writer.write(response(rng.choice(STATUS_LINES), body, *rng.sample(HEADERS, rng.randrange(3))))
        case 4:
            writer.write(response("302 Found", b"", f"Location: {rng.choice(LOCATIONS)}"))
        case 5:
            chunk = f"{rng.choice(['5', 'fffffff', '-1', 'zz', '0'])}\r\n".encode() + body
            writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + chunk + b"\r\n0\r\n\r\n")
            writer.close()
        case 6:
            packed = rng.choice(
                [gzip.compress(body), gzip.compress(body)[:-9], gzip.compress(bytes(9_000_000))]
            )
            writer.write(response("200 OK", packed, "Content-Encoding: gzip"))
        case 7:
            writer.write(rng.randbytes(rng.randrange(1, 400)))
            writer.close()
        case 8:
            writer.write(response("200 OK", IMAGE)[: rng.randrange(1, 900)])
            writer.transport.abort()
        case _:
            await asyncio.sleep(rng.random())
            server.serve_image(writer)


def outage(after: int, seconds: float, published: Callable[[], bool], early: list[str]) -> Respond:
    """Connections are reset for so long, once so many images were served; `early` gets what came too soon."""
    began = 0.0

    async def respond(server: Server, writer: asyncio.StreamWriter, path: str) -> None:
        nonlocal began
        if not began and len(server.good_at) >= after:
            began = time.monotonic()
        if began and time.monotonic() < began + seconds:
            writer.transport.abort()
            if published():
                early.append(path)
        else:
            await asyncio.sleep(0.02)
            server.serve_image(writer)

    return respond


async def trickle(server: Server, writer: asyncio.StreamWriter, path: str) -> None:
    """Ten bytes a second of 60 MB under `/slow`, images elsewhere."""
    if not path.startswith("/slow"):
        await asyncio.sleep(0.02)
        server.serve_image(writer)
        return
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 60000000\r\n\r\n")
    while True:
        await writer.drain()
        writer.write(b"x")
        await asyncio.sleep(0.1)


def classify(folder: Path, uris: list[str], bundle: Path, *settings: str) -> int:
    folder.mkdir(exist_ok=True)
    if not (folder / "in.parquet").exists():  # written again it would be another inventory
        pq.write_table(pa.table({"uri": uris}), folder / "in.parquet")
    command = [
        sys.executable, "-m", "jobs", "classify", "--inventory", str(folder / "in.parquet"),
        "--bundle", str(bundle), "--output", str(folder / "out"), "--engine", "local",
        "--fetch.allow-private-addresses", *settings,
    ]  # fmt: skip
    return subprocess.run(command, check=False, stdout=subprocess.DEVNULL).returncode


def statuses(folder: Path) -> Counter[str]:
    if not (folder / "out" / "table" / "_SUCCESS").exists():
        return Counter()
    return Counter(pads.dataset(folder / "out" / "table", format="parquet").to_table()["status"].to_pylist())


Finding = tuple[bool, str, str]
"""Whether it is as it should be, what, and the figure."""


def run_answers(folder: Path, bundle: Path, scale: float) -> Iterator[Finding]:
    n_images, n_hosts = int(20_000 * scale), max(1, int(200 * scale))
    server = Server(answer_anyhow, n_hosts)
    uris = [f"http://{ADDRESS}:{server.ports[n % n_hosts]}/{n}.jpg" for n in range(n_images)]
    began = time.monotonic()
    limits = ["--fetch.total-timeout-s", "10", "--fetch.read-timeout-s", "3", "--outage-wait-s", "10"]
    code = classify(folder, uris, bundle, *limits, "--max-error-rate", "1", "--retry-pause-s", "1")
    took = f"exit {code} after {time.monotonic() - began:.0f} s"
    yield code == 0, f"{n_images:,} hostile answers, {n_hosts} hosts", took
    found = statuses(folder)
    yield found.total() == n_images, "rows with a status", f"{found.total():,}"
    n_served = sum(draw(f"/{n}.jpg")[1] in SERVED for n in range(n_images))
    yield found["ok"] >= 0.95 * n_served, "images served", f"{n_served:,}, and {found['ok']:,} rows ok"
    yield found["internal_error"] == 0, "internal_error", f"{found['internal_error']}"
    yield True, "by status", ", ".join(f"{status} {n:,}" for status, n in found.most_common())
    most = max(server.most.values(), default=0)
    asked = f"{server.n_requests:,}, at most {most} at once to a host ({PER_HOST})"
    yield most <= 2 * PER_HOST, "requests", asked


def run_outage(folder: Path, bundle: Path, scale: float) -> Iterator[Finding]:
    n_images, seconds = int(5_000 * scale), 60 * scale
    marker, early = folder / "out" / "table" / "_SUCCESS", list[str]()
    server = Server(outage(2 * n_images // 5, seconds, marker.exists, early), 5)
    uris = [f"http://{ADDRESS}:{server.ports[n % 5]}/{n}.jpg" for n in range(n_images)]
    began = time.monotonic()
    code = classify(folder, uris, bundle)
    what = f"outage of {seconds:.0f} s in {n_images:,} images"
    yield code == 0, what, f"exit {code} after {time.monotonic() - began:.0f} s"
    yield not early, "requests of the outage that found a published table", f"{len(early)}"
    failed = n_images - statuses(folder)["ok"]
    yield failed <= 0.05 * n_images, "recorded as failed", f"{failed:,} ({failed / n_images:.1%})"
    code = classify(folder, uris, bundle, "--retry-failed")
    failed = n_images - statuses(folder)["ok"]
    yield code == 0 and not failed, "after --retry-failed", f"exit {code}, {failed:,}"


def run_trickle(folder: Path, bundle: Path, scale: float) -> Iterator[Finding]:
    n_images, rates = int(10_000 * scale), []
    for name, n_slow in (("without", 0), ("with", n_images // 100)):
        server = Server(trickle, 51)
        uris = [f"http://{ADDRESS}:{server.ports[n % 50]}/{n}.jpg" for n in range(n_images)]
        for n in range(n_slow):
            uris[n * 100 + 7] = f"http://{ADDRESS}:{server.ports[50]}/slow/{n}.jpg"
        limits = ["--fetch.total-timeout-s", "20", "--retry-passes", "0"]
        code = classify(folder / name, uris, bundle, *limits)
        served = server.good_at[: n_images - n_slow]  # the run's page asks for some again
        rates.append(len(served) / (served[-1] - served[0]))
        what = f"{n_images:,} images, {n_slow} from a host that trickles"
        yield code == 0, what, f"exit {code}, {rates[-1]:.0f} others/s"
    yield rates[1] >= 0.9 * rates[0], "rate of the others", f"{rates[1] / rates[0] - 1:+.1%}"


PARTS = {"answers": run_answers, "outage": run_outage, "trickle": run_trickle}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=PARTS, help="one part")
    parser.add_argument("--scale", type=float, default=1.0, help="share of the images, hosts and seconds")
    arguments = parser.parse_args()
    passed = True
    with tempfile.TemporaryDirectory() as folder:
        bundle = random_bundle(Path(folder) / "model", VIT_MINIATURE)
        for name, part in PARTS.items():
            if arguments.only in (None, name):
                (Path(folder) / name).mkdir()
                for right, what, figure in part(Path(folder) / name, bundle, arguments.scale):
                    passed &= right
                    print(f"{'pass' if right else 'FAIL'}  {what}: {figure}", flush=True)
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
