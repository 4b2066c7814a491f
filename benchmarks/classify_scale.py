"""Memory flat and cost linear in the number of images, and how soon a nearly finished run goes on.

    python benchmarks/classify_scale.py --rows 10000 100000

Each run classifies that many distinct URIs (symbolic links to a few drawn files) with a ViT so small that
everything but the model shows. Then a plan of `--resume-rows`, of which all but one row in a hundred is in
the ledger, is continued until its first new part is written. On 2 cores about six minutes for the defaults.
"""

import argparse
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parent))  # read as a module, too
from classify_throughput import arrivals, rows_of_parts
from inputs import VIT_MINIATURE, drawn_files, inventory, random_bundle
from process_tree import ProcessTree

from jobs import classify_images
from jobs.config import ClassifyConfig
from pipelines.classify import run as runs
from pipelines.classify.sizing import CPU_CHUNK
from pipelines.classify.steps import work_list
from pipelines.ledger.entries import Part
from pipelines.ledger.item_set import Range

ROWS_OF_A_PART = 78 * 256
"""What one part of the finished share held, in whole gaps."""
HOLE = 256
"""Rows of each gap in what is done: chunks that were in hand when the driver died."""
SHOWN = ("driver", "load actors", "decoders", "infer actors", "writing tasks")
console = Console(width=130)


@dataclass(frozen=True)
class Run:
    """One classification: how long, and how much of memory."""

    rows: int
    whole_s: float
    working_s: float
    """From the first call of a load actor to the last part."""
    private_mb: dict[str, float]
    store_mb: float
    """Largest resident memory of the process that owns Ray's object store."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, nargs="*", default=[10_000, 100_000])
    parser.add_argument("--resume-rows", type=int, default=1_000_000, help="0 leaves that part out")
    parser.add_argument("--bundle", type=Path, help="a certified bundle; random weights if not given")
    parser.add_argument("--folder", type=Path, help="where to work; a temporary folder if not given")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="scale-", dir=arguments.folder))
    try:
        files = drawn_files(folder / "drawn", count=200, size=None)
        bundle = arguments.bundle or random_bundle(folder, VIT_MINIATURE)
        runs = [measure(folder / str(rows), files, bundle, rows) for rows in arguments.rows]
        if runs:
            show(runs)
        if arguments.resume_rows:
            resume(folder / "resume", files, bundle, arguments.resume_rows)
    finally:
        shutil.rmtree(folder)


def command(table: Path, bundle: Path, output: Path) -> list[str]:
    return [
        sys.executable, "-m", "jobs", "classify", "--inventory", str(table), "--bundle", str(bundle),
        "--output", str(output),
    ]  # fmt: skip


def measure(folder: Path, files: Sequence[Path], bundle: Path, rows: int) -> Run:
    """Classify `rows` distinct URIs in a process of its own."""
    table = inventory(folder, files, rows)
    started = time.monotonic()
    process = subprocess.Popen(command(table, bundle, folder / "predictions"))
    state = folder / "predictions" / "state"
    with ProcessTree(process.pid) as tree, arrivals(state / "parts") as arrived:
        code = process.wait()
    whole_s = time.monotonic() - started
    recorded = rows_of_parts(state)
    if code != 0 or sum(recorded.values()) != rows:
        raise SystemExit(f"classify ended with exit code {code}, {sum(recorded.values()):,} of {rows:,} rows")
    shutil.rmtree(folder)
    return Run(
        rows=rows,
        whole_s=whole_s,
        working_s=max(arrived.values()) - tree.loading_since,
        private_mb={role: tree.peak_private_bytes[role] / 1e6 for role in SHOWN},
        store_mb=tree.peak_bytes["raylet"] / 1e6,
    )


def show(runs: Sequence[Run]) -> None:
    table = Table("rows", "whole, s", "s per million, working", *(f"{role}, MB" for role in SHOWN))
    table.add_column("object store, MB")
    for run in runs:
        table.add_row(
            f"{run.rows:,}",
            f"{run.whole_s:.0f}",
            f"{run.working_s / run.rows * 1e6:,.0f}",
            *(f"{run.private_mb[role]:,.0f}" for role in SHOWN),
            f"{run.store_mb:,.0f}",
        )
    table.caption = "peak resident memory of one process of each kind, without what it shares with others"
    console.print(table)


def resume(folder: Path, files: Sequence[Path], bundle: Path, rows: int) -> None:
    """Record all but a hundredth of a plan as done, and wait for the first new part."""
    table, output = inventory(folder, files, rows), folder / "predictions"
    config = ClassifyConfig(inventory=str(table), bundle=str(bundle), output=str(output))
    record_most(config)
    before_ray_s = time_to_work_list(config)
    parts = output / "state" / "parts"
    started = time.time()
    process = subprocess.Popen(command(table, bundle, output))
    with ProcessTree(process.pid) as tree:
        while process.poll() is None and not list(parts.glob("*/*.parquet")):
            time.sleep(0.05)
        part_s = time.time() - started
        process.send_signal(signal.SIGTERM)
        process.wait()
    if not tree.loading_since:
        raise SystemExit("classify ended before it loaded anything; what it said stands above")
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
