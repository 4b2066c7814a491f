"""What a night costs, by what changed since the last one.

    python benchmarks/nights.py --part three-nights      # 20,000 rows over HTTP with ETags: half an hour
    python benchmarks/nights.py --part unchanged --rows 1000000
    python benchmarks/nights.py --part plan --rows 10000000
    python benchmarks/nights.py --part distinct          # ten times more rows than images, against no cache

Each part prints its table and one line per limit; the exit code is 1 where a limit is missed. `unchanged` and
`plan` begin with a night whose results no model gave. Figures: BENCHMARKS.md.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.dataset as pads
import pyarrow.parquet as pq
from process_tree import ProcessTree

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from changing_site import change, draw_jpeg, lay_out, serve

from pipelines.inventory import inventory
from pipelines.nights.contents import History, write_contents, write_earlier
from pipelines.nights.database import open_workspace
from pipelines.nights.decide import decide
from pipelines.nights.folders import find_nights
from pipelines.storage.storage import open_storage
from tests.builders.etag_server import EtagServer

Limits = dict[str, bool]
"""What must hold -> whether it does."""

CHILD = "--plan-in-this-process"
ROWS_AT_ONCE = 200_000
FIRST, SECOND, THIRD = "2026-11-19", "2026-11-20", "2026-11-21"
MOST_SHARE, MOST_SECONDS, MOST_MB, LEAST_SPEEDUP = 0.15, 90.0, 2048.0, 5.0
"""Limits: a later night against the first; an unchanged night and a plan; rows/s against no cache."""


@dataclass(frozen=True)
class Part:
    """A measurement of a folder, rows (or rounds) and a bundle; and how many of these by default."""

    measure: Callable[[Path, int, Path], Limits]
    size: int
    real_model: bool = False
    """Whether its limits hold for a model of some cost: ViT-tiny at 224, unless a bundle is given."""


def run_part(parts: dict[str, Part], description: str | None) -> None:
    """Run the part that the command line names, and end the process by its limits."""
    from inputs import VIT_TINY, random_bundle  # torch, which would count as memory of the plan

    from tests.builders.models import small_bundle

    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--part", choices=list(parts), required=True)
    parser.add_argument("--rows", "--rounds", type=int, default=0, help="0: the part's own default")
    parser.add_argument("--bundle", type=Path, help="a bundle of iab-vision; one is made if not given")
    parser.add_argument("--folder", type=Path, help="where to work; a temporary folder if not given")
    arguments = parser.parse_args()
    part = parts[arguments.part]
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        if not (bundle := arguments.bundle) and part.real_model:
            bundle = random_bundle(Path(name) / "model", VIT_TINY)
        elif not bundle:
            small_bundle(bundle := Path(name) / "bundle")
        limits = part.measure(Path(name), arguments.rows or part.size, bundle)
    for limit, kept in limits.items():
        print(f"{'pass' if kept else 'FAIL'}: {limit}")
    sys.exit(0 if all(limits.values()) else 1)


def publish_first(folder: Path, bundle: Path) -> None:
    """A first night over the inventory, with results that no model gave."""
    from tests.builders.made_up_night import publish_made_up_night

    day = datetime.fromisoformat(FIRST).date()
    publish_made_up_night(folder / "inventory.parquet", bundle, folder / "nights", day)


def unchanged(folder: Path, rows: int, bundle: Path) -> Limits:
    """A night in which nothing changed, by its wall time and peak memory."""
    write_inventory(folder / "inventory.parquet", rows, changed=0.0)
    publish_first(folder, bundle)
    write_inventory(folder / "inventory.parquet", rows, changed=0.0)
    found = time_command(nightly(folder, bundle, SECOND, "--engine", "ray", "--ray-address", "nowhere:1"))
    report = read_report(folder, SECOND)
    again = time_command(nightly(folder, bundle, SECOND))
    print("| rows | carried | wall, s | peak MB | the same again, s | seconds by stage |")
    print("|---|---|---|---|---|---|")
    print(
        f"| {rows:,} | {report['night']['rows']['carried']:,} | {found[0]:.1f} | {found[1]:,.0f} | "
        f"{again[0]:.1f} | {report['last_session']['seconds']} |"
    )
    return {
        f"{found[0]:.1f} s of at most {MOST_SECONDS:.0f} s": found[0] <= MOST_SECONDS,
        f"{found[1]:,.0f} MB of at most {MOST_MB:,.0f} MB": found[1] <= MOST_MB,
        "every row carried over, no engine started": report["night"]["rows"]["carried"] == rows,
    }


def plan(folder: Path, rows: int, bundle: Path) -> Limits:
    """The decision for every row, with 5 % new and 2 % changed: seconds and peak memory."""
    write_inventory(folder / "inventory.parquet", rows, changed=0.0)
    publish_first(folder, bundle)
    write_inventory(folder / "inventory.parquet", rows, changed=0.02, new=0.05)
    command = [sys.executable, __file__, CHILD, str(folder)]
    found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    print("| rows | inventory, s | decide, s | workers' files, s | in all, s | peak MB | decisions |")
    print("|---|---|---|---|---|---|---|")
    total = found["inventory"] + found["decide"] + found["known"]
    print(
        f"| {rows:,} | {found['inventory']:.1f} | {found['decide']:.1f} | {found['known']:.1f} | "
        f"{total:.1f} | {found['peak_mb']:,.0f} | {found['counts']} |"
    )
    return {
        f"{total:.1f} s of at most {MOST_SECONDS:.0f} s": total <= MOST_SECONDS,
        f"{found['peak_mb']:,.0f} MB of at most {MOST_MB:,.0f} MB": found["peak_mb"] <= MOST_MB,
    }


def plan_in_this_process(folder: str) -> None:
    """Plan in a process of its own, whose peak memory is the planning's alone; prints JSON."""
    state = open_storage(f"{folder}/planned")
    began = time.perf_counter()
    frozen = inventory.plan(f"{folder}/inventory.parquet", state)
    planned = time.perf_counter()
    (night,) = find_nights(f"{folder}/nights")
    tonight = datetime.fromisoformat(SECOND).date()
    with open_workspace() as (database, spill):
        decided = decide(database, frozen, night, tonight=tonight, keep_failures=7)
        done = time.perf_counter()
        write_earlier(database, [], state, spill)
        write_contents(database, History([night], tonight), state, spill)
    known = time.perf_counter()
    found = {
        "inventory": planned - began,
        "decide": done - planned,
        "known": known - done,
        "counts": decided.count() | {"removed": decided.removed},
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }
    print(json.dumps(found))


def three_nights(folder: Path, rows: int, bundle: Path) -> Limits:
    """Three nights over HTTP against a run of classify each; every row must be equal."""
    server = EtagServer()
    print("| night | wall, s | of night 1 | answers | rows | copies classified | rows of a full run |")
    print("|---|---|---|---|---|---|---|")
    limits, first, known = {}, 0.0, set[bytes]()
    uris, served = lay_out(server, rows), dict[str, bytes]()
    for number, day in enumerate((FIRST, SECOND, THIRD), start=1):
        if number > 1:
            served = serve(server, uris)
            uris = change(server, uris, number - 1, rows)
        pq.write_table(pa.table({"uri": uris}), folder / "inventory.parquet")
        server.forget()
        wall, _ = time_command(nightly(folder, bundle, day))
        answers, night = dict(server.answers), read_report(folder, day)["night"]
        rows_by_origin, copies = night["rows"], night["classified_copies"]
        first = first or wall
        equal = compare_with_full_run(folder, bundle, day)
        tonight = serve(server, uris)
        print(
            f"| {number} | {wall:.1f} | {wall / first:.2f} | {answers} | {rows_by_origin} | {copies} | "
            f"{equal} |",
            flush=True,
        )
        limits[f"night {number}: every row equals a full run's"] = equal
        new = set(tonight.values()) - known
        ran = rows_by_origin["tonight"] - copies
        limits[f"night {number}: the model ran on {ran} of {len(new)} new contents, {copies} copies more"] = (
            ran == len(new)
        )
        known |= new
        if number > 1:
            same = sum(
                served.get(uri) == body
                for uri, body in tonight.items()
                if uri.startswith(server.url("", "etag"))
            )
            told = answers.get(304, 0)
            limits[f"night {number}: {told} answers 304 for {same} unchanged images with an ETag"] = (
                told == same
            )
            share = wall / first
            limits[f"night {number}: {share:.3f} of night 1, at most {MOST_SHARE}"] = share <= MOST_SHARE
    server.close()
    return limits


def compare_with_full_run(folder: Path, bundle: Path, day: str) -> bool:
    """Whether the night has the rows that classify writes for the same inventory."""
    output = folder / f"full-{day}"
    command = [
        *(sys.executable, "-m", "jobs", "classify", "--inventory", str(folder / "inventory.parquet")),
        *("--bundle", str(bundle), "--output", str(output), "--fetch.allow-private-addresses"),
        *("--retry-pause-s", "0.1", "--max-error-rate", "1"),
    ]
    subprocess.run(command, check=True, capture_output=True)
    full, night = (
        pads.dataset(path, format="parquet").to_table().sort_by("uri")
        for path in (output / "table", folder / "nights" / "images" / f"run_date={day}")
    )
    same = [name for name in full.column_names if name not in ("classified_at", "run_id")]
    return bool(full.select(same).equals(night.select(same)))


def distinct(folder: Path, rows: int, bundle: Path) -> Limits:
    """Ten rows per image, as in Daft's and Ray's benchmark; against a run that does not know it."""
    images = folder / "images"
    images.mkdir()
    for number in range(rows // 10):
        (images / f"{number}.jpg").write_bytes(draw_jpeg(number))
    uris = [str(images / f"{number % (rows // 10)}.jpg") for number in range(rows)]
    pq.write_table(pa.table({"uri": uris}), folder / "inventory.parquet")
    cached, _ = time_command(nightly(folder, bundle, FIRST))
    report = read_report(folder, FIRST)
    statuses, ran = report["statuses"], report["last_session"]["images"]
    # The same rows without the cache: each image is a file of its own.
    alone = folder / "alone"
    alone.mkdir()
    for number in range(rows):
        (alone / f"{number}.jpg").hardlink_to(images / f"{number % (rows // 10)}.jpg")
    pq.write_table(
        pa.table({"uri": [str(alone / f"{number}.jpg") for number in range(rows)]}),
        folder / "inventory.parquet",
    )
    plain, _ = time_command(nightly(folder, bundle, SECOND, table="other"))
    print("| rows | images | wall, s | without the cache, s | rows/s: ratio | statuses |")
    print("|---|---|---|---|---|---|")
    print(f"| {rows:,} | {rows // 10:,} | {cached:.1f} | {plain:.1f} | {plain / cached:.1f} | {statuses} |")
    return {
        f"{ran:,} images ran through the model, {rows // 10:,} distinct URIs": ran == rows // 10,
        f"{plain / cached:.1f} times the rows/s, at least {LEAST_SPEEDUP}": plain / cached >= LEAST_SPEEDUP,
    }


def write_inventory(path: Path, rows: int, *, changed: float, new: float = 0.0) -> None:
    """URIs of some 75 characters with ETags; the new ones take the place of the first."""
    draws = np.random.default_rng(5)
    with pq.ParquetWriter(path, INVENTORY, compression="zstd") as writer:
        for start in range(0, rows, ROWS_AT_ONCE):
            numbers = np.arange(start, min(rows, start + ROWS_AT_ONCE))
            other = np.where(draws.random(len(numbers)) < new, numbers + rows, numbers)
            versions = (draws.random(len(numbers)) < changed).astype(int)
            uris = [
                f"https://cdn{n % 97:02d}.publisher.example/media/{n * 2654435761 % 10**15:015d}/original.jpg"
                for n in other.tolist()
            ]
            etags = [
                f'"{n:016x}-{version}"' for n, version in zip(other.tolist(), versions.tolist(), strict=True)
            ]
            pages = [f"https://publisher.example/articles/{n // 3}" for n in numbers.tolist()]
            columns = [uris, etags, pa.array(numbers % 500, pa.int32()), pages]
            writer.write_table(pa.table(columns, schema=INVENTORY))


INVENTORY = pa.schema(
    [("uri", pa.string()), ("etag", pa.string()), ("publisher_id", pa.int32()), ("page_url", pa.string())]
)


def nightly(folder: Path, bundle: Path, day: str, *settings: str, table: str = "nights") -> list[str]:
    """The arguments of the command."""
    return [
        *("nightly", "--inventory", str(folder / "inventory.parquet")),
        *("--bundle", str(bundle), "--table", str(folder / table), "--date", day),
        *("--fetch.allow-private-addresses", "--retry-pause-s", "0.1", "--max-error-rate", "1", *settings),
    ]


def time_command(arguments: list[str]) -> tuple[float, float]:
    """Wall seconds and peak memory in MB of the command and what it starts, taken together."""
    began = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", "jobs", *arguments], stdout=subprocess.DEVNULL)
    with ProcessTree(process.pid) as tree:
        code = process.wait()
    assert code == 0, f"exit code {code}"
    return time.perf_counter() - began, sum(tree.peak_bytes.values()) / 1e6


def read_report(folder: Path, day: str) -> dict:
    return json.loads((folder / "nights" / "state" / f"run_date={day}" / "report.json").read_text())


PARTS = {
    "three-nights": Part(three_nights, 20_000, real_model=True),
    "unchanged": Part(unchanged, 100_000),
    "plan": Part(plan, 100_000),
    "distinct": Part(distinct, 10_000, real_model=True),
}

if __name__ == "__main__":
    if sys.argv[1:2] == [CHILD]:
        plan_in_this_process(sys.argv[2])
    else:
        run_part(PARTS, __doc__)
