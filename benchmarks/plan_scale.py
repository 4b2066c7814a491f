"""Planning at scale: seconds and peak memory to freeze a table of ten million URIs.

    python benchmarks/plan_scale.py --rows 10000000 --duplicates 0.1
    python benchmarks/plan_scale.py --tars s3://bucket/shards    # the S3 server of AWS_ENDPOINT_URL

Writes a Parquet table of that many rows (two carried columns), plans it in a process of its own, and reads
one chunk back from the far end, as a resume with nearly everything done does. On 2 cores of an AMD EPYC:
see BENCHMARKS.md.

With `--tars` it writes 200 shards of 20 members of 300 kB in that folder and plans them: how much of their
bytes it read.
"""

import argparse
import io
import json
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

ROWS_AT_ONCE = 500_000
SHARDS, MEMBERS, MEMBER_BYTES = 200, 20, 300_000


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--duplicates", type=float, default=0.1, help="share of rows that repeat a URI")
    parser.add_argument("--format", choices=["parquet", "csv"], default="parquet")
    parser.add_argument(
        "--folder", type=Path, default=None, help="where to work; a temporary folder if not given"
    )
    parser.add_argument("--tars", metavar="FOLDER", help="plan tars in this folder instead, of any storage")
    parser.add_argument("--child", nargs=2, metavar=("INVENTORY", "STATE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        measure(*arguments.child)
        return
    if arguments.tars:
        measure_tars(arguments.tars)
        return
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        inventory = Path(folder) / f"inventory.{arguments.format}"
        write_inventory(inventory, arguments.rows, arguments.duplicates)
        command = [sys.executable, __file__, "--child", str(inventory), str(Path(folder) / "state")]
        found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        size_mb = inventory.stat().st_size / 1e6
    print(f"| rows | {arguments.format}, MB | items | plan, s | s per million | peak MB | reopen, s |")
    print("|---|---|---|---|---|---|---|")
    print(
        f"| {found['rows']:,} | {size_mb:,.0f} | {found['items']:,} | {found['plan_s']:.1f} | "
        f"{found['plan_s'] / found['rows'] * 1e6:.2f} | {found['peak_mb']:,.0f} | {found['reopen_s']:.2f} |"
    )


def measure_tars(folder: str) -> None:
    """Write shards, plan them, print a table."""
    from pipelines.inventory.inventory import plan
    from pipelines.storage.storage import open_storage

    storage = open_storage(folder)
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w") as tar:
        for number in range(MEMBERS):
            member = tarfile.TarInfo(f"{number:04d}.jpg")
            member.size = MEMBER_BYTES
            tar.addfile(member, io.BytesIO(bytes(MEMBER_BYTES)))
    for number in range(SHARDS):
        storage.put(f"{number:04d}.tar", sink.getvalue())
    pieces: list[int] = []
    read_range = type(storage).read_range

    def counted(storage, path: str, start: int, stop: int) -> bytes:  # type: ignore[no-untyped-def]
        pieces.append(stop - start)
        return read_range(storage, path, start, stop)

    type(storage).read_range = counted  # type: ignore[method-assign]
    with tempfile.TemporaryDirectory() as state:
        began = time.perf_counter()
        frozen = plan(folder, open_storage(state))
        seconds = time.perf_counter() - began
    size = SHARDS * len(sink.getvalue())
    print("| tars | MB | items | plan, s | requests | read, share of the bytes |")
    print("|---|---|---|---|---|---|")
    planned = f"{frozen.n_items:,} | {seconds:.1f} | {len(pieces):,} | {sum(pieces) / size:.3f}"
    print(f"| {SHARDS} | {size / 1e6:,.0f} | {planned} |")


def write_inventory(path: Path, rows: int, duplicates: float) -> None:
    """URIs of some 75 characters with hashed names; repeats refer to any earlier row."""
    random = np.random.default_rng(0)
    numbers = np.arange(rows)
    repeats = random.random(rows) < duplicates
    repeats[0] = False
    numbers[repeats] = (random.random(repeats.sum()) * np.flatnonzero(repeats)).astype(np.int64)
    writer = None
    for start in range(0, rows, ROWS_AT_ONCE):
        table = inventory_rows(numbers[start : start + ROWS_AT_ONCE], start)
        if path.suffix == ".csv":
            with pa.OSFile(str(path), "ab") as file:
                pa.csv.write_csv(table, file, pa.csv.WriteOptions(include_header=start == 0))
            continue
        writer = writer or pq.ParquetWriter(path, table.schema, compression="zstd")
        writer.write_table(table)
    if writer:
        writer.close()


def inventory_rows(numbers: np.ndarray, start: int) -> pa.Table:
    # splitmix64: names as random as content hashes, or the table would compress like no real one
    mixed = numbers.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    scrambled = (mixed ^ (mixed >> np.uint64(31))) >> np.uint64(16)
    uris = [
        f"https://cdn{n % 97:02d}.publisher.example/media/2026/{n:015d}/original.jpg"
        for n in scrambled.tolist()
    ]
    pages = [f"https://publisher.example/articles/{n // 3}" for n in range(start, start + len(numbers))]
    return pa.table({"uri": uris, "publisher_id": pa.array(numbers % 500, pa.int32()), "page_url": pages})


def measure(inventory: str, state: str) -> None:
    """Plan in this process and report on it."""
    from pipelines.inventory.inventory import plan
    from pipelines.inventory.plan import open_plan
    from pipelines.storage.storage import open_storage

    began = time.perf_counter()
    frozen = plan(inventory, open_storage(state))
    planned = time.perf_counter()
    # Not ru_maxrss, which begins with the peak of the process that started this one.
    status = Path("/proc/self/status").read_text()
    peak_mb = int(status.partition("VmHWM:")[2].split()[0]) / 1024
    chunk = open_plan(open_storage(state)).items([(max(0, frozen.n_items - 256), frozen.n_items)])
    reopened = time.perf_counter()
    found = {
        "rows": frozen.n_rows,
        "items": frozen.n_items,
        "plan_s": planned - began,
        "peak_mb": peak_mb,
        "reopen_s": reopened - planned,
        "chunk": chunk.num_rows,
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
