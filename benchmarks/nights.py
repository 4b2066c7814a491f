"""What a night costs: nothing changed, a plan of millions, three nights over HTTP, ten rows per image.

    python benchmarks/nights.py --part three-nights      # 20,000 rows from a local HTTP server with ETags
    python benchmarks/nights.py --part unchanged --rows 1000000
    python benchmarks/nights.py --part plan --rows 10000000
    python benchmarks/nights.py --part distinct          # ten times more rows than images, against no cache

Each part prints its own table. `unchanged` and `plan` need a first night of so many rows: it is published by
the ledger's own functions, with made-up results, and no image is drawn. Figures: BENCHMARKS.md.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pads
import pyarrow.parquet as pq

ROWS_AT_ONCE = 200_000
FIRST, SECOND, THIRD = "2026-11-19", "2026-11-20", "2026-11-21"
DEFAULT_ROWS = {"three-nights": 20_000, "unchanged": 100_000, "plan": 100_000, "distinct": 10_000}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--part", choices=list(DEFAULT_ROWS), required=True)
    parser.add_argument("--rows", type=int, default=0, help="0: the part's own default")
    parser.add_argument("--bundle", type=Path, help="a bundle of iab-vision; a tiny one is made if not given")
    parser.add_argument("--folder", type=Path, help="where to work; a temporary folder if not given")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        plan_in_this_process(*arguments.child)
        return
    rows = arguments.rows or DEFAULT_ROWS[arguments.part]
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        PARTS[arguments.part](folder, rows, arguments.bundle or make_bundle(folder / "bundle"))


def make_bundle(folder: Path) -> Path:
    from tests.builders.models import small_bundle

    small_bundle(folder)
    return folder


def unchanged(folder: Path, rows: int, bundle: Path) -> None:
    """A night in which nothing changed, by its wall time and peak memory."""
    write_inventory(folder / "inventory.parquet", rows, changed=0.0)
    publish_made_up_night(folder, bundle)
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


def plan(folder: Path, rows: int, bundle: Path) -> None:
    """The decision for every row, with 5 % new and 2 % changed: seconds and peak memory."""
    write_inventory(folder / "inventory.parquet", rows, changed=0.0)
    publish_made_up_night(folder, bundle)
    write_inventory(folder / "inventory.parquet", rows, changed=0.02, new=0.05)
    command = [sys.executable, __file__, "--part", "plan", "--child", str(folder), str(bundle)]
    found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    print("| rows | inventory, s | decide, s | workers' files, s | in all, s | peak MB | decisions |")
    print("|---|---|---|---|---|---|---|")
    total = found["inventory"] + found["decide"] + found["known"]
    print(
        f"| {rows:,} | {found['inventory']:.1f} | {found['decide']:.1f} | {found['known']:.1f} | "
        f"{total:.1f} | {found['peak_mb']:,.0f} | {found['counts']} |"
    )


def plan_in_this_process(folder: str, bundle: str) -> None:
    from pipelines.inventory import inventory
    from pipelines.nights.contents import History, write_contents, write_earlier
    from pipelines.nights.database import open_database
    from pipelines.nights.decide import decide
    from pipelines.nights.folders import find_nights
    from pipelines.storage.storage import open_storage

    state = open_storage(f"{folder}/planned")
    began = time.perf_counter()
    frozen = inventory.plan(f"{folder}/inventory.parquet", state)
    planned = time.perf_counter()
    (night,) = find_nights(f"{folder}/nights")
    tonight = datetime.fromisoformat(SECOND).date()
    with tempfile.TemporaryDirectory(dir=folder) as spill, open_database(Path(spill)) as database:
        decided = decide(database, frozen, night, tonight=tonight, keep_failures=7)
        done = time.perf_counter()
        write_earlier(database, [], state, Path(spill))
        write_contents(database, History([night], tonight), state, Path(spill))
    known = time.perf_counter()
    found = {
        "inventory": planned - began,
        "decide": done - planned,
        "known": known - done,
        "counts": decided.count() | {"removed": decided.removed},
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }
    print(json.dumps(found))


def three_nights(folder: Path, rows: int, bundle: Path) -> None:
    """Three nights over HTTP against a run of classify each; every row must be equal."""
    from tests.builders.etag_server import EtagServer

    server = EtagServer()
    print("| night | wall, s | of night 1 | answers | rows | copies classified | rows of a full run |")
    print("|---|---|---|---|---|---|---|")
    first = 0.0
    uris = lay_out(server, rows)
    for number, day in enumerate((FIRST, SECOND, THIRD)):
        if number:
            uris = change(server, uris, number, rows)
        pq.write_table(pa.table({"uri": uris}), folder / "inventory.parquet")
        server.forget()
        wall, _ = time_command(nightly(folder, bundle, day))
        answers, night = dict(server.answers), read_report(folder, day)["night"]
        first = first or wall
        equal = compare_with_full_run(folder, bundle, day)
        print(
            f"| {number + 1} | {wall:.1f} | {wall / first:.2f} | {answers} | {night['rows']} | "
            f"{night['classified_copies']} | {equal} |",
            flush=True,
        )
    server.close()


def lay_out(server: object, rows: int) -> list[str]:
    """Rows of which 30 % are another's image; a tenth each on hosts without and with random validators."""
    random = np.random.default_rng(0)
    for number in range(rows):
        origin = int(random.integers(0, number)) if number and random.random() < 0.3 else None
        server.images[f"/{number}.jpg"] = (
            server.images[f"/{origin}.jpg"] if origin is not None else draw(number)
        )
    return [server.url(f"/{number}.jpg", kind_of(number)) for number in range(rows)]


def change(server: object, uris: list[str], night: int, rows: int) -> list[str]:
    """1 % removed, 2 % other bytes, 5 % new, of which 30 % are known images."""
    random = np.random.default_rng(night)
    paths = list(server.images)
    kept = [uri for uri in uris if random.random() >= 0.01]
    for uri in kept:
        if random.random() < 0.02:
            server.images["/" + uri.rpartition("/")[2]] = draw(int(random.integers(1 << 40, 1 << 41)))
    for number in range(rows // 20):
        path = f"/{night}-{number}.jpg"
        known = random.random() < 0.3
        server.images[path] = (
            server.images[paths[int(random.integers(0, len(paths)))]]
            if known
            else draw((night << 32) + number)
        )
        kept.append(server.url(path, kind_of(number)))
    return kept


def kind_of(number: int) -> str:
    return {0: "plain", 1: "random"}.get(number % 10, "etag")


def draw(number: int) -> bytes:
    import io

    from PIL import Image

    pixels = np.random.default_rng(number).integers(0, 255, (12, 16, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).resize((320, 240)).save(buffer, "jpeg", quality=85)
    return buffer.getvalue()


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


def distinct(folder: Path, rows: int, bundle: Path) -> None:
    """Ten rows per image, as in Daft's and Ray's benchmark; against a run that does not know it."""
    images = folder / "images"
    images.mkdir()
    for number in range(rows // 10):
        (images / f"{number}.jpg").write_bytes(draw(number))
    uris = [str(images / f"{number % (rows // 10)}.jpg") for number in range(rows)]
    pq.write_table(pa.table({"uri": uris}), folder / "inventory.parquet")
    cached, _ = time_command(nightly(folder, bundle, FIRST))
    ran = Counter(read_report(folder, FIRST)["statuses"])
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
    print(f"| {rows:,} | {rows // 10:,} | {cached:.1f} | {plain:.1f} | {plain / cached:.1f} | {dict(ran)} |")


def write_inventory(path: Path, rows: int, *, changed: float, new: float = 0.0) -> None:
    """URIs of some 75 characters with ETags; the new ones take the place of the first."""
    random = np.random.default_rng(5)
    with pq.ParquetWriter(path, INVENTORY, compression="zstd") as writer:
        for start in range(0, rows, ROWS_AT_ONCE):
            numbers = np.arange(start, min(rows, start + ROWS_AT_ONCE))
            other = np.where(random.random(len(numbers)) < new, numbers + rows, numbers)
            versions = (random.random(len(numbers)) < changed).astype(int)
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


def publish_made_up_night(folder: Path, bundle: Path) -> None:
    """A first night over the inventory, as a run would leave it, with results that no model gave."""
    from jobs.config import NightlyConfig
    from jobs.run_nightly import open_run
    from pipelines.classify import run as runs
    from pipelines.ledger.parts import Committer, join_plan_rows, store_part
    from pipelines.nights import night as nights
    from pipelines.nights.folders import DateFolders

    config = NightlyConfig(
        inventory=str(folder / "inventory.parquet"),
        bundle=str(bundle),
        table=str(folder / "nights"),
        date=FIRST,
    )
    folders = DateFolders(str(folder / "nights"), config.date)
    night = open_run(config, folders, 1)
    run = night.run
    runs.announce(run)
    nights.carry_over(night)
    context = runs.part_context(run, final=True)
    committer = Committer(run.ledger, run.state)
    for start in range(0, run.plan.n_items, ROWS_AT_ONCE // 2):
        scored = make_up_results(start, min(run.plan.n_items, start + ROWS_AT_ONCE // 2))
        committer.add(store_part(join_plan_rows(scored, run.plan, context), run.state, 1))
    committer.flush()
    nights.publish_night(night)
    nights.finish_night(night, 0, "not judged")


def make_up_results(start: int, stop: int) -> pa.Table:
    from pipelines import schema

    random = np.random.default_rng(start)
    n = stop - start
    ids = pa.array(["483", "1", "v9i3On", "425", "552"])
    ranks = pa.array(random.integers(0, 5, (n, 5)).reshape(-1))
    scores = pa.array(random.random(5 * n), pa.float32())
    labels = pa.StructArray.from_arrays([ids.take(ranks), scores], fields=list(schema.LABELS_TYPE.value_type))
    top = ids.take(ranks.take(pa.array(np.arange(n) * 5)))
    score = scores.take(pa.array(np.arange(n) * 5))
    columns = {
        "item_id": pa.array(np.arange(start, stop)),
        "status": pa.repeat("ok", n),
        "error": pa.nulls(n, pa.string()),
        "sha256": pa.array([random.bytes(32).hex() for _ in range(n)]),
        "width_px": pa.repeat(pa.scalar(500, pa.int32()), n),
        "height_px": pa.repeat(pa.scalar(375, pa.int32()), n),
        "format": pa.repeat("jpeg", n),
        "etag": pa.nulls(n, pa.string()),
        "last_modified": pa.nulls(n, pa.string()),
        "top_id": top,
        "top_score": score,
        "labels": pa.ListArray.from_arrays(pa.array(np.arange(0, 5 * n + 1, 5), pa.int32()), labels),
        "tier1_id": top,
        "tier1_score": score,
        "cat": pa.ListArray.from_arrays(pa.array(np.arange(n + 1), pa.int32()), top),
        "classified_at": pa.repeat(pa.scalar(datetime.now(UTC), pa.timestamp("us", "UTC")), n),
    }
    assert not pc.any(pc.is_null(columns["sha256"])).as_py()
    return pa.table(columns)


def nightly(folder: Path, bundle: Path, day: str, *settings: str, table: str = "nights") -> list[str]:
    return [
        *(sys.executable, "-m", "jobs", "nightly", "--inventory", str(folder / "inventory.parquet")),
        *("--bundle", str(bundle), "--table", str(folder / table), "--date", day),
        *("--fetch.allow-private-addresses", "--retry-pause-s", "0.1", "--max-error-rate", "1", *settings),
    ]


def time_command(command: list[str]) -> tuple[float, float]:
    """Wall seconds and peak memory in MB of the command and what it starts, taken together."""
    from benchmarks.process_tree import ProcessTree

    began = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    with ProcessTree(process.pid) as tree:
        code = process.wait()
    assert code == 0, f"exit code {code}"
    return time.perf_counter() - began, sum(tree.peak_bytes.values()) / 1e6


def read_report(folder: Path, day: str) -> dict:
    return json.loads((folder / "nights" / "state" / f"run_date={day}" / "report.json").read_text())


PARTS = {"three-nights": three_nights, "unchanged": unchanged, "plan": plan, "distinct": distinct}

if __name__ == "__main__":
    main()
