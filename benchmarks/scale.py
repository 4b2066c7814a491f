"""Cost linear in the number of images and memory flat, on both engines; a kill at 60 %; a late resume.

    python benchmarks/scale.py --images photos --counts 10000 100000 1000000 --engines local ray

Every image is a small JPEG with bytes of its own: the photos at 64 to 96 pixels, packed into WebDataset
tars of 10,000 (with `--container parquet` into Parquet with the bytes inside). The model is a ViT so small
that everything else shows. After each run the published table is verified. With `--kill` one more run of
the smallest count is killed at 60 % on each engine and started again. Then a plan of `--resume-rows`, of
which all but one row in a hundred is in the ledger, is continued until its first new part is written.

On 2 cores a million images take about half an hour an engine; the defaults ten minutes.
"""

import argparse
import io
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parent))  # read as a module, too
from classify_throughput import arrivals, rows_of_parts
from inputs import VIT_MINIATURE, given_or_drawn, inventory, random_bundle
from process_tree import ProcessTree

from jobs import classify_images
from jobs.config import ClassifyConfig
from pipelines.classify import run as runs
from pipelines.classify.sizing import CPU_CHUNK
from pipelines.classify.steps import work_list
from pipelines.ledger.entries import Part
from pipelines.ledger.item_set import Range

PER_CONTAINER = 10_000
VARIANTS = 20
"""Encodings of each photo; further images repeat one of them with a JPEG comment of their own."""
ROWS_OF_A_PART = 78 * 256
"""What one part of the finished share held, in whole gaps."""
HOLE = 256
"""Rows of each gap in what is done: chunks that were in hand when the driver died."""
console = Console(width=150)


@dataclass(frozen=True)
class Run:
    """One classification: how long, how much of memory and disk."""

    engine: str
    rows: int
    whole_s: float
    steady_s: float
    """Seconds per million images between the first part and the last; not a number for a single part."""
    private_mb: dict[str, float]
    """Peak of one process of each role, without what it shares with others."""
    spilled_mb: float
    ledger_mb: float
    table_mb: float
    verify_s: float


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=Path, help="folder of images; drawn at 500 x 375 if not given")
    parser.add_argument("--counts", type=int, nargs="*", default=[10_000, 100_000])
    parser.add_argument("--engines", nargs="+", choices=["local", "ray"], default=["local", "ray"])
    parser.add_argument("--container", choices=["tar", "parquet"], default="tar")
    parser.add_argument("--kill", action="store_true", help="kill a run at 60 %% and start it again")
    parser.add_argument("--resume-rows", type=int, default=1_000_000, help="0 leaves that part out")
    parser.add_argument("--bundle", type=Path, help="a certified bundle; random weights if not given")
    parser.add_argument("--folder", type=Path, help="where to work; a temporary folder if not given")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="scale-", dir=arguments.folder))
    try:
        run_all(arguments, folder)
    finally:
        shutil.rmtree(folder)


def run_all(arguments: argparse.Namespace, folder: Path) -> None:
    files = given_or_drawn(arguments.images, folder)
    bundle = arguments.bundle or random_bundle(folder, VIT_MINIATURE)
    found = []
    for count in arguments.counts:
        packed = pack(folder / f"{count}", files, count, arguments.container)
        for engine in arguments.engines:
            classify, output = command(packed, bundle, folder / "out", engine), folder / "out"
            found.append(measure(classify, output, engine, count))
            show(found)
            if arguments.kill and count == min(arguments.counts):
                kill_and_resume(classify, output, engine, count)
        shutil.rmtree(packed)
    if arguments.resume_rows:
        resume(folder / "resume", files[:200], bundle, arguments.resume_rows)


def pack(folder: Path, files: Sequence[Path], count: int, container: str) -> Path:
    """Containers of `PER_CONTAINER` small JPEGs each."""
    folder.mkdir()
    began = time.monotonic()
    payloads = small_jpegs(files, count)
    for number in range(-(-count // PER_CONTAINER)):
        some = list(islice(payloads, PER_CONTAINER))
        if container == "tar":
            write_tar(folder / f"{number:05d}.tar", some)
        else:
            pq.write_table(pa.table({"image": pa.array(some, pa.binary())}), folder / f"{number:05d}.parquet",
                           row_group_size=1_000)  # fmt: skip
    console.print(f"packed {count:,} images in {time.monotonic() - began:.0f} s")
    return folder


def write_tar(path: Path, payloads: Sequence[bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for number, payload in enumerate(payloads):
            member = tarfile.TarInfo(f"{number:06d}.jpg")
            member.size = len(payload)
            tar.addfile(member, io.BytesIO(payload))


def small_jpegs(files: Sequence[Path], count: int) -> Iterator[bytes]:
    """`count` JPEGs with bytes of their own: photos at several sizes, then those with a comment each."""
    rng = np.random.default_rng(0)
    encoded: list[bytes] = []
    for _ in range(VARIANTS):
        for path in files:
            if len(encoded) == count:
                break
            with Image.open(path) as photo:
                photo.draft("RGB", (192, 192))
                small = photo.convert("RGB").resize(tuple(rng.integers(64, 97, 2)), Image.Resampling.BILINEAR)
            buffer = io.BytesIO()
            small.save(buffer, "JPEG", quality=int(rng.integers(75, 95)))
            encoded.append(buffer.getvalue())
            yield encoded[-1]
    for number in range(len(encoded), count):
        comment = f"image {number}".encode()
        marker = b"\xff\xfe" + (len(comment) + 2).to_bytes(2, "big") + comment
        payload = encoded[number % len(encoded)]
        yield payload[:2] + marker + payload[2:]


def command(images: Path, bundle: Path, output: Path, engine: str) -> list[str]:
    pattern = f"{images}/*.tar" if list(images.glob("*.tar")) else str(images)
    return [
        sys.executable, "-m", "jobs", "classify", "--inventory", pattern, "--bundle", str(bundle),
        "--output", str(output), "--engine", engine,
    ]  # fmt: skip


def measure(classify: list[str], output: Path, engine: str, rows: int) -> Run:
    """One run in a process of its own, and its verification."""
    spilled_before = spilled_bytes()
    started = time.monotonic()
    process = subprocess.Popen(classify)
    state = output / "state"
    with ProcessTree(process.pid) as tree, arrivals(state / "parts") as arrived:
        code = process.wait()
    whole_s = time.monotonic() - started
    parts = rows_of_parts(state)
    if code != 0 or sum(parts.values()) != rows:
        raise SystemExit(f"classify ended with exit code {code}, {sum(parts.values()):,} of {rows:,} rows")
    times = sorted((at, parts[path]) for path, at in arrived.items() if path in parts)
    later = sum(n for _, n in times[1:])
    began = time.monotonic()
    subprocess.run([sys.executable, "-m", "jobs", "verify", str(output)], check=True, capture_output=True)
    run = Run(
        engine=engine,
        rows=rows,
        whole_s=whole_s,
        steady_s=(times[-1][0] - times[0][0]) / later * 1e6 if later else float("nan"),
        private_mb={role: size / 1e6 for role, size in tree.peak_private_bytes.items()},
        spilled_mb=(spilled_bytes() - spilled_before) / 1e6,
        ledger_mb=size_of(state) / 1e6,
        table_mb=size_of(output / "table") / 1e6,
        verify_s=time.monotonic() - began,
    )
    shutil.rmtree(output)
    return run


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def spilled_bytes() -> int:
    """What Ray's sessions on this machine have spilled and not yet taken back."""
    return sum(size_of(folder) for folder in Path("/tmp/ray").glob("session_*/ray_spilled_objects*"))


def kill_and_resume(classify: list[str], output: Path, engine: str, rows: int) -> None:
    """Kill the process once 60 % of the rows are recorded; the same command must finish, each row once."""
    process = subprocess.Popen(classify)
    while process.poll() is None and sum(rows_of_parts(output / "state").values()) < 0.6 * rows:
        time.sleep(0.1)
    kept = sum(rows_of_parts(output / "state").values())
    process.kill()
    process.wait()
    began = time.monotonic()
    subprocess.run(classify, check=True)
    seconds = time.monotonic() - began
    subprocess.run([sys.executable, "-m", "jobs", "verify", str(output)], check=True, capture_output=True)
    published = sum(pq.read_metadata(path).num_rows for path in (output / "table").glob("*.parquet"))
    console.print(
        f"{engine}: killed with {kept:,} of {rows:,} rows recorded; finished by the same command in "
        f"{seconds:.0f} s, {published:,} rows, verified"
    )
    if published != rows:
        raise SystemExit(f"{published:,} rows instead of {rows:,}")
    shutil.rmtree(output)


def show(runs: Sequence[Run]) -> None:
    table = Table(
        "engine", "images", "whole, s", "s per million, whole", "s per million, steady", "verify, s"
    )
    for header in ("ledger and plan, MB", "table, MB", "spilled, MB", "peak memory of one process, MB"):
        table.add_column(header)
    for run in runs:
        table.add_row(
            run.engine,
            f"{run.rows:,}",
            f"{run.whole_s:.0f}",
            f"{run.whole_s / run.rows * 1e6:,.0f}",
            f"{run.steady_s:,.0f}",
            f"{run.verify_s:.1f}",
            f"{run.ledger_mb:.1f}",
            f"{run.table_mb:.1f}",
            f"{run.spilled_mb:.0f}",
            ", ".join(f"{role} {mb:,.0f}" for role, mb in sorted(run.private_mb.items()) if mb > 60),
        )
    console.print(table)


def resume(folder: Path, files: Sequence[Path], bundle: Path, rows: int) -> None:
    """Record all but a hundredth of a plan as done, and wait for the first new part."""
    table, output = inventory(folder, files, rows), folder / "predictions"
    config = ClassifyConfig(inventory=str(table), bundle=str(bundle), output=str(output))
    record_most(config)
    before_ray_s = time_to_work_list(config)
    parts = output / "state" / "parts"
    started = time.time()
    process = subprocess.Popen([*command(table, bundle, output, "ray"), "--take-over"])
    with ProcessTree(process.pid) as tree:
        while process.poll() is None and not list(parts.glob("*/*.parquet")):
            time.sleep(0.05)
        part_s = time.time() - started
        process.send_signal(signal.SIGTERM)
        process.wait()
    if not tree.loading_since:
        raise SystemExit("classify ended before it loaded anything; its log is above")
    load_s, driver_mb = tree.loading_since - started, tree.peak_private_bytes["driver"] / 1e6
    console.print(
        f"resume of {rows:,} rows, 99 % of them recorded: work list after {before_ray_s:.2f} s; "
        f"with Ray's start, first load after {load_s:.1f} s, first part after {part_s:.1f} s; "
        f"driver {driver_mb:.0f} MB"
    )


def record_most(config: ClassifyConfig) -> None:
    """Plan the run as the command would, and enter parts into its ledger; no file is behind them."""
    began = time.monotonic()
    run = classify_images.prepare(config)
    console.print(f"planned {run.plan.n_items:,} images in {time.monotonic() - began:.1f} s")
    runs.announce(run)
    run.ledger.record([finished(number, items) for number, items in enumerate(done_items(run.plan.n_items))])


def time_to_work_list(config: ClassifyConfig) -> float:
    """Seconds from nothing to the first chunk that a load actor would take."""
    began = time.monotonic()
    run = classify_images.prepare(config)
    chunks = work_list(run.ledger.done.missing(), CPU_CHUNK)
    run.plan.items([(span["start"], span["stop"]) for span in chunks["ranges"][0].as_py()])
    seconds = time.monotonic() - began
    console.print(f"{chunks.num_rows:,} chunks are left; known after {seconds:.2f} s")
    return seconds


def done_items(n_items: int) -> Iterator[tuple[Range, ...]]:
    """The items of each finished part: everything but a gap now and then, a hundredth in all."""
    gaps = np.random.default_rng(0).permutation(n_items // HOLE)[: n_items // (100 * HOLE)]
    missing = set(gaps.tolist())
    for start in range(0, n_items, ROWS_OF_A_PART):
        stop = min(start + ROWS_OF_A_PART, n_items)
        spans: list[Range] = []
        for first in range(start, stop, HOLE):
            if first // HOLE in missing:
                continue
            last = min(first + HOLE, stop)
            if spans and spans[-1][1] == first:
                spans[-1] = (spans[-1][0], last)
            else:
                spans.append((first, last))
        yield tuple(spans)


def finished(number: int, items: tuple[Range, ...]) -> Part:
    rows = sum(stop - start for start, stop in items)
    path = f"parts/g0001/{number:032x}.parquet"
    return Part(path, f"{number:064x}", 1, items, rows, {"ok": rows}, {})


if __name__ == "__main__":
    main()
