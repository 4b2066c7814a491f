"""`classify` against the bare loop, on the same images, the same ONNX bytes and the same cores, in one run.

    python benchmarks/classify_throughput.py --images photos

The bare loop is what one would write without any framework: as many processes as cores, each reading a file,
decoding it with `images.prepare` and running the graph in one thread, sixteen images at a time. It keeps no
row when something fails, survives nothing and writes nothing. It runs before and after `classify`, so that a
machine that drifts does so for both. Five thousand images and a ViT-tiny take about three minutes on 2 cores.

Steady is, for the bare loop, from loaded models to the last image; for `classify`, from a load actor's first
call to the last part written, all images over that time. (From the first part to the last it would leave out
what was decoded ahead of the first.)
"""

import argparse
import json
import multiprocessing as mp
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parent))  # read as a module, too
from inputs import VIT_TINY, given_or_drawn, inventory, random_bundle
from process_tree import ProcessTree

from pipelines.bundle import session
from pipelines.bundle.bundle import open_bundle
from pipelines.bundle.settings import RuntimeSpec
from pipelines.images.prepare import prepare
from pipelines.machine import cores

BATCH = 16
IMAGES_AT_ONCE = 32
"""What a process of the bare loop takes from the common pile: little, so that both end together."""
console = Console(width=130)


@dataclass(frozen=True)
class Timing:
    """One way of classifying a number of images."""

    way: str
    images: int
    steady_s: float
    steady_images: int
    whole_s: float
    first_row_s: float
    cpu_s: dict[str, float]
    """Seconds of user and system time in the steady state, by what the processes do."""
    whole_cpu_s: float
    model_s: float = 0.0
    """Thread time inside the ONNX session; known for the bare loop."""

    @property
    def steady(self) -> float:
        return self.steady_images / self.steady_s

    @property
    def cpu_ms(self) -> float:
        return sum(self.cpu_s.values()) / self.steady_images * 1000


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=Path, help="folder of images; drawn at 500 x 375 if not given")
    parser.add_argument("--count", type=int, default=5_000)
    parser.add_argument("--bare-count", type=int, default=2_000, help="images of each of the two bare runs")
    parser.add_argument("--bundle", type=Path, help="a certified bundle; a random ViT-tiny if not given")
    parser.add_argument("further", nargs="*", help="after --: further arguments of classify")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="throughput-"))
    try:
        files = given_or_drawn(arguments.images, folder)
        table = inventory(folder, files, arguments.count)
        bundle = arguments.bundle or random_bundle(folder, VIT_TINY)
        paths = [str(files[number % len(files)]) for number in range(arguments.bare_count)]
        before = bare_loop(paths, bundle)
        ours = classify(table, bundle, folder / "predictions", arguments.count, arguments.further)
        after = bare_loop(paths, bundle)
        show([before, ours, after])
    finally:
        shutil.rmtree(folder)


def bare_loop(paths: Sequence[str], bundle: Path) -> Timing:
    """Read, decode and run in as many processes as there are cores."""
    context = mp.get_context("spawn")
    taken, ready = context.Value("q", 0), context.Barrier(cores() + 1)
    results: Any = context.SimpleQueue()
    started = time.monotonic()
    processes = [
        context.Process(target=bare_worker, args=(paths, bundle, taken, ready, results))
        for _ in range(cores())
    ]
    for process in processes:
        process.start()
    ready.wait()
    began = time.monotonic()
    found = [results.get() for _ in processes]
    ended = time.monotonic()
    for process in processes:
        process.join()
    return Timing(
        way="bare loop",
        images=len(paths),
        steady_s=ended - began,
        steady_images=len(paths),
        whole_s=time.monotonic() - started,
        first_row_s=min(work.first_at for work in found) - started,
        cpu_s={"processes": sum(work.cpu_s for work in found)},
        whole_cpu_s=sum(work.whole_cpu_s for work in found),
        model_s=sum(work.model_s for work in found),
    )


@dataclass
class Work:
    """What one process of the bare loop did; times are monotonic."""

    first_at: float = 0.0
    cpu_s: float = 0.0
    whole_cpu_s: float = 0.0
    model_s: float = 0.0


def bare_worker(paths: Sequence[str], bundle: Path, taken: Any, ready: Any, results: Any) -> None:
    """One process of the bare loop."""
    import numpy as np

    opened = open_bundle(str(bundle), verify=False)
    model = session.load(opened, RuntimeSpec(batch_size=BATCH, threads=1))
    work = Work()
    ready.wait()
    began = time.process_time()
    while True:
        with taken.get_lock():
            start = taken.value
            taken.value += IMAGES_AT_ONCE
        if start >= len(paths):
            break
        stop = min(start + IMAGES_AT_ONCE, len(paths))
        for at in range(start, stop, BATCH):
            payloads = [Path(path).read_bytes() for path in paths[at : min(at + BATCH, stop)]]
            prepared = [prepare(payload, opened.spec.image_spec) for payload in payloads]
            pixels = [image.pixels_hwc for image in prepared if image.pixels_hwc is not None]
            before = time.thread_time()
            model.run(np.stack(pixels))
            work.model_s += time.thread_time() - before
            work.first_at = work.first_at or time.monotonic()
    work.whole_cpu_s = time.process_time()
    work.cpu_s = work.whole_cpu_s - began
    results.put(work)


def classify(table: Path, bundle: Path, output: Path, images: int, further: Sequence[str]) -> Timing:
    """The whole command in a process of its own."""
    command = [
        sys.executable, "-m", "jobs", "classify", "--inventory", str(table), "--bundle", str(bundle),
        "--output", str(output), *further,
    ]  # fmt: skip
    started, started_at = time.monotonic(), time.time()
    process = subprocess.Popen(command)
    with ProcessTree(process.pid) as tree, arrivals(output / "state" / "parts") as arrived:
        code = process.wait()
    whole_s = time.monotonic() - started
    if code != 0:
        raise SystemExit(f"classify ended with exit code {code}")
    rows = rows_of_parts(output / "state")
    times = sorted((at, rows[path]) for path, at in arrived.items() if path in rows)
    first_to_last = sum(count for _, count in times[1:]) / (times[-1][0] - times[0][0])
    console.print(f"classify, from its first part to its last: {first_to_last:.1f} images/s")
    began, ended = tree.loading_since, times[-1][0]
    return Timing(
        way="classify",
        images=images,
        steady_s=ended - began,
        steady_images=images,
        whole_s=whole_s,
        first_row_s=times[0][0] - started_at,
        cpu_s=tree.cpu_s(began, ended),
        whole_cpu_s=sum(tree.cpu_s().values()),
    )


@contextmanager
def arrivals(folder: Path) -> Iterator[dict[str, float]]:
    """When each part below a folder was written; looked for often, since publishing clears them away."""
    seen: dict[str, float] = {}
    over = threading.Event()

    def watch() -> None:
        while not over.wait(0.1):
            for path in folder.glob("*/*.parquet"):
                if path.name not in seen:
                    try:
                        seen[path.name] = path.stat().st_mtime
                    except FileNotFoundError:
                        continue

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield seen
    finally:
        over.set()
        thread.join()


def rows_of_parts(state: Path) -> dict[str, int]:
    """Rows of each recorded part by its file name."""
    entries = [json.loads(path.read_bytes()) for path in (state / "ledger").glob("*.json")]
    parts = [part for entry in entries for part in entry.get("parts", [])]
    return {Path(part["path"]).name: part["rows"] for part in parts}


def show(timings: Sequence[Timing]) -> None:
    bare = [timing for timing in timings if timing.model_s]
    bare_rate = sum(timing.steady for timing in bare) / len(bare)
    bare_whole = sum(timing.images / timing.whole_s for timing in bare) / len(bare)
    model_ms = sum(timing.model_s for timing in bare) / sum(timing.images for timing in bare) * 1000
    bare_cpu_ms = sum(timing.cpu_ms for timing in bare) / len(bare)
    table = Table("way", "images", "steady, images/s", "to bare loop", "CPU ms per image", "less the model")
    for header in ("to bare loop", "whole run, images/s", "to bare loop", "first row after, s", "CPU ms"):
        table.add_column(header)
    for timing in timings:
        whole = timing.images / timing.whole_s
        table.add_row(
            timing.way,
            f"{timing.images:,}",
            f"{timing.steady:.1f}",
            f"{timing.steady / bare_rate:.3f}",
            f"{timing.cpu_ms:.2f}",
            f"{timing.cpu_ms - model_ms:.2f}",
            f"{bare_cpu_ms / timing.cpu_ms:.3f}",
            f"{whole:.1f}",
            f"{whole / bare_whole:.3f}",
            f"{timing.first_row_s:.1f}",
            f"{timing.whole_cpu_s / timing.images * 1000:.2f}",
        )
    table.caption = f"the model itself: {model_ms:.2f} ms of thread time per image in the bare loop"
    console.print(table)
    ours = next(timing for timing in timings if not timing.model_s)
    shares = Table(*ours.cpu_s, title="classify, steady: CPU ms per image")
    shares.add_row(*(f"{s / ours.steady_images * 1000:.2f}" for s in ours.cpu_s.values()))
    console.print(shares)


if __name__ == "__main__":
    main()
