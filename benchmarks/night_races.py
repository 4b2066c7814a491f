"""What readers and schedulers see of nights that are killed, replaced and started twice.

    python benchmarks/night_races.py --part readers --rounds 100  # three readers, a publisher that is killed
    python benchmarks/night_races.py --part races --rounds 20     # two schedulers at once; a late date

Options and exit code are those of `nights.py`. Figures: BENCHMARKS.md.
"""

import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.dataset as pads
import pyarrow.parquet as pq

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from changing_site import draw_jpeg
from nights import FIRST, SECOND, Limits, Part, nightly, run_part

from tests.builders.drivers import race
from tests.builders.publications import Publisher, publish_under_readers


def readers(folder: Path, rounds: int, bundle: Path) -> Limits:
    """Publications and replacements, each killed once or twice, while three readers look."""
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
    images = folder / "images"
    images.mkdir()
    for number in range(20):
        (images / f"{number}.jpg").write_bytes(draw_jpeg(number))
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


PARTS = {"readers": Part(readers, 100), "races": Part(races, 20)}

if __name__ == "__main__":
    run_part(PARTS, __doc__)
