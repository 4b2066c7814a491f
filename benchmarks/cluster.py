"""Submitted jobs on a Ray cluster of several nodes of this machine, with everything in a bucket.

    AWS_ENDPOINT_URL=http://… python benchmarks/cluster.py --part nodes --images photos
    AWS_ENDPOINT_URL=http://… python benchmarks/cluster.py --part late
    AWS_ENDPOINT_URL=http://… python benchmarks/cluster.py --part commands

* nodes: a head without CPUs and two nodes; `submit classify` over `--count` photos, one node killed and
  another added in the middle.
* late: a node of 16 CPUs classifies images whose servers take half a second for each, and one of 32 joins in
  the middle; the rate must follow, from one load actor to five.
* commands: train, tune, export, certify, classify, evaluate and nightly, each submitted, over drawn pictures.

Exit code 1 if anything went otherwise.
"""

import argparse
import asyncio
import os
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import boto3
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from hostile import ADDRESS, Server
from inputs import image_files
from submit import Found, ended, show, verified

from jobs import demo_images
from pipelines.storage.storage import open_storage
from tests.builders import models
from tests.builders.ray_head import Head, kill, start_head

N_SLOW, SLOW_S, WINDOW_S = 3_000, 0.5, 10.0


class Watched:
    """A submitted classification of the bucket's photos, whose lines are kept as they come."""

    def __init__(self, head: Head, bucket: str, *settings: str) -> None:
        self.began, self.lines, self.output = time.monotonic(), list[str](), f"{bucket}/out"
        self._ledger = open_storage(f"{self.output}/state")
        line = ["classify", "--inventory", f"{bucket}/images", "--bundle", f"{bucket}/bundle"]
        line += ["--output", self.output, "--commit-interval-s", "2", "--workers.items-per-part", "50"]
        self._process = head.submit(*line, *settings)
        streams = (self._process.stdout, self._process.stderr)
        self._readers = [threading.Thread(target=self.lines.extend, args=(each,)) for each in streams]
        for reader in self._readers:
            reader.start()

    def wait_for_entries(self, count: int) -> bool:
        """Wait until the ledger has so many entries; False if the job has ended before."""
        while len(self._ledger.list("ledger")) < count and self._process.poll() is None:
            time.sleep(0.5)
        return self._process.poll() is None

    def end(self) -> str:
        """Wait for the end, and say what it was."""
        for reader in self._readers:
            reader.join()
        print("".join(self.lines))
        return f"exit code {self._process.wait()} after {time.monotonic() - self.began:.0f} s"


def nodes(head: Head, folder: Path, bucket: str, given: argparse.Namespace) -> Found:
    """A classification that loses one of its two nodes and gets another."""
    total = upload_photos(bucket, given)
    models.small_bundle(f"{bucket}/bundle")
    victim, _ = head.add_node(2), head.add_node(2)
    run = Watched(head, bucket)
    running = run.wait_for_entries(4)
    struck, shown = time.monotonic() - run.began, len(run.lines)
    kill(victim)
    head.add_node(2)
    ended_with = run.end()
    seen = f"{ended_with}, {shown} lines of log shown by then"
    yield (
        f"node killed after {struck:.0f} s",
        seen,
        running and shown > 1 and ended_with.startswith("exit code 0"),
    )
    yield verified(run.output, total)


def late(head: Head, folder: Path, bucket: str, _: argparse.Namespace) -> Found:
    """A classification that one node begins; it waits for servers, since the nodes share two cores."""

    async def slow(server: Server, writer: asyncio.StreamWriter, path: str) -> None:
        await asyncio.sleep(SLOW_S)
        server.serve_image(writer)

    server = Server(slow, 40)
    uris = [f"http://{ADDRESS}:{server.ports[n % 40]}/{n}.jpg" for n in range(N_SLOW)]
    pq.write_table(pa.table({"uri": uris}), folder / "uris.parquet")
    upload({"images/uris.parquet": folder / "uris.parquet"}, bucket)
    models.small_bundle(f"{bucket}/bundle")
    head.add_node(16)
    settings = ["--fetch.allow-private-addresses", "--fetch.concurrency", "8", "--workers.infer-actors", "2"]
    run = Watched(head, bucket, *settings)
    running = run.wait_for_entries(3)
    head.add_node(32)
    joined = time.monotonic()
    ended_with = run.end()
    yield "classify", ended_with, running and ended_with.startswith("exit code 0")
    served = np.array(server.good_at)
    before, after = best_rate(served[served < joined]), best_rate(served[served >= joined])
    yield (
        "begins before all nodes are there",
        f"{(served < joined).sum():,} of {N_SLOW:,} images were served before the second node",
        bool((served < joined).any()),
    )
    yield "rate follows", f"{before:.0f} images/s, then {after:.0f}", after > 2 * before
    yield verified(run.output, N_SLOW)


def best_rate(times: np.ndarray) -> float:
    """Most images per second within `WINDOW_S`."""
    return max((np.searchsorted(times, times + WINDOW_S) - np.arange(len(times))), default=0) / WINDOW_S


def upload_photos(bucket: str, given: argparse.Namespace) -> int:
    """Put so many photos into the bucket; their number."""
    photos = image_files(given.images)[: given.count]
    upload({f"images/{number:05d}{path.suffix}": path for number, path in enumerate(photos)}, bucket)
    return len(photos)


def commands(head: Head, folder: Path, bucket: str, _: argparse.Namespace) -> Found:
    """Every command that makes sense on a cluster, each with what the one before left."""
    head.add_node(4)
    demo_images.draw_dataset(folder / "dataset", per_class=20, seed=0)
    upload(below(folder / "dataset", "dataset"), bucket)
    dataset, bundle = ["--dataset", f"{bucket}/dataset"], ["--bundle", f"{bucket}/bundle"]
    model = ["--model", "scratch:tiny", "--image-size", "32", "--patch-size", "8", "--layers", "2"]
    inventory = ["--inventory", f"{bucket}/dataset"]
    lines = {
        "run/run.json": ["train", *dataset, *model, "--epochs", "2", "--output", f"{bucket}/run"],
        "search/tune.json": [
            *("tune", *dataset, *model, "--epochs", "1", "--trials", "2"),
            *("--max-concurrent", "1", "--output", f"{bucket}/search"),
        ],
        "bundle/manifest.json": [
            *("export", "--checkpoint", f"{bucket}/run", "--images", f"{bucket}/dataset"),
            *("--output", f"{bucket}/bundle"),
        ],
        "bundle/certificates/cpu-fp32.json": [
            *("certify", f"{bucket}/bundle", "--images", f"{bucket}/dataset"),
            *("--checkpoint", f"{bucket}/run"),
        ],
        "out/table/_SUCCESS": ["classify", *inventory, *bundle, "--output", f"{bucket}/out"],
        "evaluation/evaluation.json": [
            *("evaluate", *bundle, *dataset, "--split", "all", "--output", f"{bucket}/evaluation"),
        ],
        "nights/images/run_date=2026-01-01/_SUCCESS": [
            *("nightly", *inventory, *bundle, "--table", f"{bucket}/nights", "--date", "2026-01-01"),
        ],
    }
    for made, line in lines.items():
        began = time.monotonic()
        code, out, err = ended(head.submit(*line))
        found = open_storage(bucket).exists(made)
        yield (
            line[0],
            f"exit code {code} after {time.monotonic() - began:.0f} s, {made}: {found}",
            found and not code,
        )
        if code:
            print(out, err, file=sys.stderr)


def below(folder: Path, name: str) -> dict[str, Path]:
    """The files below a folder by the keys that they get."""
    return {f"{name}/{path.relative_to(folder)}": path for path in folder.rglob("*") if path.is_file()}


def upload(files: dict[str, Path], bucket: str) -> None:
    storage = open_storage(bucket)
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda key: storage.put(key, files[key].read_bytes()), files))


@contextmanager
def fresh_bucket() -> Iterator[str]:
    made = boto3.resource("s3").create_bucket(Bucket=f"cluster-{os.getpid()}")
    yield f"s3://{made.name}"
    made.objects.all().delete()
    made.delete()


PARTS = {"nodes": nodes, "late": late, "commands": commands}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--part", choices=PARTS, required=True)
    parser.add_argument("--images", type=Path, default=Path("photos"), help="folder of photos, for nodes")
    parser.add_argument("--count", type=int, default=2_000, help="photos")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="cluster-", ignore_cleanup_errors=True) as folder:
        home = Path(folder, "home")
        home.mkdir()
        head = start_head(home, num_cpus=0)
        try:
            with fresh_bucket() as bucket:
                return show(PARTS[given.part](head, Path(folder), bucket, given))
        finally:
            head.kill()


if __name__ == "__main__":
    sys.exit(main())
