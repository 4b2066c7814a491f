"""What a night costs, and what readers and schedulers see of it.

    python benchmarks/nights.py --part three-nights      # 20,000 rows from a local HTTP server with ETags
    python benchmarks/nights.py --part unchanged --rows 1000000
    python benchmarks/nights.py --part plan --rows 10000000
    python benchmarks/nights.py --part distinct          # ten times more rows than images, against no cache
    python benchmarks/nights.py --part readers --rounds 100    # the publisher is killed, three readers look
    python benchmarks/nights.py --part races --rounds 20       # two schedulers at once; a late date

Each part prints its table and one line per limit; the exit code is 1 where a limit is missed. `unchanged`,
`plan` and `readers` begin with a night whose results no model gave. Figures: BENCHMARKS.md.
"""

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.dataset as pads
import pyarrow.parquet as pq

if TYPE_CHECKING:
    from tests.builders.etag_server import EtagServer

Limits = dict[str, bool]
"""What must hold -> whether it does."""

ROWS_AT_ONCE = 200_000
FIRST, SECOND, THIRD = "2026-11-19", "2026-11-20", "2026-11-21"
DEFAULT_SIZES = {
    "three-nights": 20_000, "unchanged": 100_000, "plan": 100_000,
    "distinct": 10_000, "readers": 100, "races": 20,
}  # fmt: skip
MOST_SHARE, MOST_SECONDS, MOST_MB, LEAST_SPEEDUP = 0.15, 90.0, 2048.0, 5.0
"""Limits: a later night against the first; an unchanged night and a plan; rows/s against no cache."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--part", choices=list(DEFAULT_SIZES), required=True)
    parser.add_argument("--rows", "--rounds", type=int, default=0, help="0: the part's own default")
    parser.add_argument("--bundle", type=Path, help="a bundle of iab-vision; a tiny one is made if not given")
    parser.add_argument("--folder", type=Path, help="where to work; a temporary folder if not given")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        plan_in_this_process(*arguments.child)
        return
    size = arguments.rows or DEFAULT_SIZES[arguments.part]
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        bundle = arguments.bundle or make_bundle(folder / "bundle")
        limits = PARTS[arguments.part](folder, size, bundle)
    for limit, kept in limits.items():
        print(f"{'pass' if kept else 'FAIL'}: {limit}")
    sys.exit(0 if all(limits.values()) else 1)


def make_bundle(folder: Path) -> Path:
    from tests.builders.models import small_bundle

    small_bundle(folder)
    return folder


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
    command = [sys.executable, __file__, "--part", "plan", "--child", str(folder), str(bundle)]
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


def three_nights(folder: Path, rows: int, bundle: Path) -> Limits:
    """Three nights over HTTP against a run of classify each; every row must be equal."""
    from tests.builders.etag_server import EtagServer

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


def serve(server: "EtagServer", uris: list[str]) -> dict[str, bytes]:
    """URI -> what the server holds."""
    return {uri: server.images["/" + uri.rpartition("/")[2]] for uri in uris}


def lay_out(server: "EtagServer", rows: int) -> list[str]:
    """Rows of which 30 % are another's image; a tenth each on hosts without and with random validators."""
    draws = np.random.default_rng(0)
    for number in range(rows):
        origin = int(draws.integers(0, number)) if number and draws.random() < 0.3 else None
        server.images[f"/{number}.jpg"] = (
            server.images[f"/{origin}.jpg"] if origin is not None else draw(number)
        )
    return [server.url(f"/{number}.jpg", kind_of(number)) for number in range(rows)]


def change(server: "EtagServer", uris: list[str], night: int, rows: int) -> list[str]:
    """1 % removed, 2 % other bytes, 5 % new, of which 30 % are known images."""
    draws = np.random.default_rng(night)
    paths = list(server.images)
    kept = [uri for uri in uris if draws.random() >= 0.01]
    for uri in kept:
        if draws.random() < 0.02:
            server.images["/" + uri.rpartition("/")[2]] = draw(int(draws.integers(1 << 40, 1 << 41)))
    for number in range(rows // 20):
        path = f"/{night}-{number}.jpg"
        known = draws.random() < 0.3
        server.images[path] = (
            server.images[paths[int(draws.integers(0, len(paths)))]]
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


def distinct(folder: Path, rows: int, bundle: Path) -> Limits:
    """Ten rows per image, as in Daft's and Ray's benchmark; against a run that does not know it."""
    images = folder / "images"
    images.mkdir()
    for number in range(rows // 10):
        (images / f"{number}.jpg").write_bytes(draw(number))
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


def readers(folder: Path, rounds: int, bundle: Path) -> Limits:
    """Publications and replacements, each killed once or twice, while three readers look."""
    from tests.builders.publications import Publisher, publish_under_readers

    publisher = Publisher(folder, bundle, random.Random(0))
    found = publish_under_readers(publisher, rounds)
    print(f"{rounds} publications and replacements, {publisher.kills} kills")
    print("| reader | whole reads | repeated: `_SUCCESS` changed or absent | faults |")
    print("|---|---|---|---|")
    for reader in found:
        print(f"| {reader.name} | {reader.whole:,} | {reader.repeated:,} | {reader.faults or 0} |")
    limits = {f"{reader.name}: 0 mixed, 0 missing reads": not reader.faults for reader in found}
    return limits | {"every reader saw whole publications": all(reader.whole for reader in found)}


def races(folder: Path, rounds: int, bundle: Path) -> Limits:
    """Two schedulers on one date, and yesterday's late job during today's."""
    from tests.builders.drivers import race

    images = folder / "images"
    images.mkdir()
    for number in range(20):
        (images / f"{number}.jpg").write_bytes(draw(number))
    uris = [str(path) for path in sorted(images.iterdir())]
    pq.write_table(pa.table({"uri": uris}), folder / "inventory.parquet")
    both, late = Counter[str](), Counter[str]()
    for number in range(rounds):
        table, pause = f"together-{number}", random.Random(number).uniform(0, 3)
        commands = [nightly(folder, bundle, SECOND, table=table)] * 2
        both[race(commands, 0.0) + describe_dates(folder / table, {SECOND: {None}})] += 1
        table = f"late-{number}"
        commands = [nightly(folder, bundle, day, table=table) for day in (SECOND, FIRST)]
        either = {FIRST: {None}, SECOND: {None, FIRST}}  # whichever began first
        late[race(commands, pause) + describe_dates(folder / table, either)] += 1
    print("| two schedulers on one date | times |\n|---|---|")
    print("\n".join(f"| {what} | {times} |" for what, times in both.items()))
    print("| yesterday's job during today's | times |\n|---|---|")
    print("\n".join(f"| {what} | {times} |" for what, times in late.items()))
    return {
        "one of two finishes, the other does too or names it": all("wrong" not in what for what in both),
        "both dates are right": set(late) == {"both finish"},
    }


def describe_dates(table: Path, carried_from: dict[str, set[str | None]]) -> str:
    """Nothing if each date has its 20 rows, carried from no other night than these, and verify agrees."""
    for day, allowed in carried_from.items():
        rows = pads.dataset(table / "images" / f"run_date={day}", format="parquet").to_table()
        found = {value and str(value) for value in rows["carried_from"].to_pylist()}
        if rows.num_rows != 20 or not found <= allowed:
            return f"; wrong: {day} has {rows.num_rows} rows, carried from {found}"
    verify = [sys.executable, "-m", "jobs", "verify", str(table)]
    code = subprocess.run(verify, check=False, capture_output=True).returncode
    return f"; wrong: verify ends with {code}" if code else ""


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
    from benchmarks.process_tree import ProcessTree

    began = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", "jobs", *arguments], stdout=subprocess.DEVNULL)
    with ProcessTree(process.pid) as tree:
        code = process.wait()
    assert code == 0, f"exit code {code}"
    return time.perf_counter() - began, sum(tree.peak_bytes.values()) / 1e6


def read_report(folder: Path, day: str) -> dict:
    return json.loads((folder / "nights" / "state" / f"run_date={day}" / "report.json").read_text())


PARTS = {
    "three-nights": three_nights,
    "unchanged": unchanged,
    "plan": plan,
    "distinct": distinct,
    "readers": readers,
    "races": races,
}

if __name__ == "__main__":
    main()
