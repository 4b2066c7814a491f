"""Images inside a Parquet table: bytes read and Arrow's memory, with 16 calls at once as a load actor has.

    python benchmarks/tables.py

Writes tables of 82 MB (images of 2 kB; row groups of 100, 1,000 and 16,384 rows) and one of 205 MB in a
single row group, plans each and reads every image once, each case in a process of its own. The calls take
blocks of rows in turn, of one batch (as in a short run) or of 16 (as in a long one), and pause at random
between batches, as those that decode do. Prints `pass` or `FAIL` with each figure, and ends with exit code 1
if one fails: at most 1.3 times the file is read, 2 times the one of a single row group, and Arrow holds at
most `--fetch.max-buffered-bytes`, here 64 MB, and one row group. On 2 cores about half a minute.
"""

import multiprocessing
import random
import sys
import tempfile
import threading
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from itertools import count
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.fetch.fetch import Fetcher
from pipelines.fetch.settings import FetchLimits
from pipelines.fetch.source import ContainerVersion, sources_of
from pipelines.inventory.inventory import plan
from pipelines.storage.storage import open_storage

CALLS = 16
BATCH_ROWS = 256
IMAGE_BYTES = 2_000
LIMITS = FetchLimits(max_bytes=1_000_000, max_buffered_bytes=64_000_000)
CASES = [(82_000_000, 100), (82_000_000, 1_000), (82_000_000, 16_384), (205_000_000, 1_000_000)]
"""Bytes of the table, rows of a row group."""
DEALINGS = {"single batches": 1, "blocks of 16 batches": 16}


def write_table(path: Path, n_bytes: int, group_rows: int) -> int:
    """A table of random images that begin with their row number; returns the bytes of a row group."""
    n_rows = n_bytes // IMAGE_BYTES
    payloads = np.random.default_rng(0).integers(0, 256, (n_rows, IMAGE_BYTES), np.uint8)
    payloads[:, :8] = np.arange(n_rows).view(np.uint8).reshape(-1, 8)
    images = pa.array([row.tobytes() for row in payloads], pa.binary())
    pq.write_table(pa.table({"image": images}), path, row_group_size=group_rows, compression="none")
    return min(n_rows, group_rows) * IMAGE_BYTES


def read_all(path: str, block_rows: int) -> tuple[int, int, float]:
    """Every image once: bytes read, Arrow's peak memory, seconds."""
    frozen = plan(path, open_storage(f"{path}-{block_rows}"))
    containers = {file.uri: ContainerVersion(file.size_bytes, file.version) for file in frozen.containers}
    n_rows = frozen.n_items
    blocks, taking = count(0, block_rows), threading.Lock()
    with Fetcher(LIMITS) as fetcher:
        before, began = bytes_read(), time.perf_counter()

        def call(seed: int) -> None:
            rng = random.Random(seed)
            while True:
                with taking:
                    block = next(blocks)
                if block >= n_rows:
                    return
                for start in range(block, min(block + block_rows, n_rows), BATCH_ROWS):
                    rows = range(start, min(start + BATCH_ROWS, n_rows))
                    sources = sources_of(frozen.items([(rows.start, rows.stop)]), containers)
                    for index, fetched in fetcher.fetch_many(sources):
                        number = int.from_bytes((fetched.payload or b"")[:8], "little")
                        assert number == rows[index], fetched
                    time.sleep(rng.random() * 0.05)

        with ThreadPoolExecutor(CALLS) as calls:
            list(calls.map(call, range(CALLS)))
        seconds = time.perf_counter() - began
        return bytes_read() - before, pa.default_memory_pool().max_memory(), seconds


def bytes_read() -> int:
    """Bytes that this process has read from files."""
    return int(Path("/proc/self/io").read_text().partition("rchar:")[2].split()[0])


def main() -> int:
    passed = True
    for n_bytes, group_rows in CASES:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "images.parquet"
            group_bytes = write_table(path, n_bytes, group_rows)
            size, limit = path.stat().st_size, 2.0 if group_bytes >= n_bytes - IMAGE_BYTES else 1.3
            for dealing, batches in DEALINGS.items():
                fresh = multiprocessing.get_context("spawn")
                with ProcessPoolExecutor(1, mp_context=fresh) as process:
                    found = process.submit(read_all, str(path), batches * BATCH_ROWS).result()
                n_read, peak, seconds = found
                right = n_read <= limit * size and peak <= LIMITS.max_buffered_bytes + group_bytes
                passed &= right
                print(
                    f"{'pass' if right else 'FAIL'}  {size / 1e6:.0f} MB, row groups of "
                    f"{group_bytes / 1e6:.1f} MB, {dealing}: read {n_read / size:.2f} times in "
                    f"{seconds:.1f} s, Arrow at most {peak / 1e6:.0f} MB",
                    flush=True,
                )
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
