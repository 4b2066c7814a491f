"""Dates published and replaced again and again, killed at random steps, while readers look at them.

Every row of a publication has its number in the column `round` and the number of its rows in `of`, so that
a reader can tell a mixture of two publications from one. All rows are carried over from a night whose results
no model gave: a publication takes about a second, and its steps are those of `nightly`.
"""

import multiprocessing
import os
import random
import signal
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import duckdb
import polars as pl
import pyarrow as pa
import pyarrow.dataset as pads
import pyarrow.parquet as pq

from pipelines.ledger.layout import decode_manifest
from pipelines.storage.local import LocalStorage
from tests.builders.made_up_night import publish_made_up_night

IMAGES = 300
ROWS_PER_FILE = 50
"""So few that every publication has several files."""
FIRST = date(2026, 1, 1)
"""Early enough that no later date of many rounds is in the future."""
STEPS = 90
"""What a publication has, about: the beginning and the end of each write."""
REPLACED = 4
"""Publications of a date before the next date is begun."""
PAUSE_S = 0.01
"""Of a reader between two looks, so that the publisher has time to work."""
WRITES = ("put", "put_file", "put_file_over", "create", "delete")

Seen = tuple[int, int, int, int]
"""Rows, the smallest and the largest `round`, and the rows that the publication has."""


@dataclass
class Publisher:
    """One table, and the processes that publish its dates."""

    folder: Path
    bundle: Path
    random: random.Random
    kills: int = 0

    @property
    def table(self) -> Path:
        return self.folder / "nights"

    def begin(self) -> None:
        """Publish the night that all others are carried from."""
        self._write_inventory(0)
        publish_made_up_night(self.folder / "0.parquet", self.bundle, self.table, FIRST)

    def publish(self, number: int) -> None:
        """Publish or replace a date: killed once or twice, then started again and left alone."""
        inventory = self._write_inventory(number)
        day = FIRST + timedelta(days=1 + number // REPLACED)
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__, "jobs.run_nightly"])
        steps = [self.random.randrange(1, STEPS) for _ in range(self.random.randint(1, 2))]
        for step in (*steps, None):
            process = context.Process(
                target=replace_date, args=(inventory, self.bundle, self.table, day, step)
            )
            process.start()
            process.join()
            assert process.exitcode == 0 or (step and process.exitcode == -signal.SIGKILL), process.exitcode
            self.kills += process.exitcode != 0

    def _write_inventory(self, number: int) -> Path:
        """The same images each time, a changing number of rows."""
        images = [*range(IMAGES), *range(self.random.randrange(IMAGES))]
        columns = {
            "uri": [f"https://cdn.publisher.example/{image}.jpg" for image in images],
            "etag": [f'"{image}"' for image in images],
            "round": pa.repeat(number, len(images)),
            "of": pa.repeat(len(images), len(images)),
        }
        path = self.folder / f"{number}.parquet"
        pq.write_table(pa.table(columns), path)
        return path


def replace_date(inventory: Path, bundle: Path, table: Path, day: date, step: int | None) -> None:
    """`nightly --replace` in this process, which kills itself at the n-th beginning or end of a write.

    Args:
        step: None lets it end.
    """
    from jobs import run_nightly
    from jobs.config import NightlyConfig
    from pipelines.classify.settings import Workers
    from pipelines.nights import carry

    carry.ITEMS_PER_PART = ROWS_PER_FILE
    kill_at(step)
    config = NightlyConfig(
        inventory=str(inventory),
        bundle=str(bundle),
        table=str(table),
        date=day,
        replace=True,
        report_images=0,
        workers=Workers(rows_per_file=ROWS_PER_FILE),
    )
    assert run_nightly.run(config) == 0


def kill_at(step: int | None) -> None:
    """Kill this process at the n-th beginning or end of a write to local storage."""
    steps = 0

    def count() -> None:
        nonlocal steps
        steps += 1
        if steps == step:
            os.kill(os.getpid(), signal.SIGKILL)

    def counting(proceed: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            count()
            result = proceed(*arguments)
            count()
            return result

        return call

    for name in WRITES:
        setattr(LocalStorage, name, counting(getattr(LocalStorage, name)))


@dataclass
class Reader:
    """Reads random dates as their `_SUCCESS` lists them, and then looks whether it is unchanged."""

    name: str
    read: Callable[[list[str]], Seen]
    images: Path
    whole: int = 0
    repeated: int = 0
    """Reads during which `_SUCCESS` changed, or was not there: they say nothing."""
    faults: list[str] = field(default_factory=list)

    def read_until(self, ended: threading.Event) -> None:
        while not ended.wait(PAUSE_S):
            markers = sorted(self.images.glob("run_date=*/_SUCCESS"))
            if markers:
                self.read_once(random.choice(markers))

    def read_once(self, marker: Path) -> None:
        before = read_marker(marker)
        if before is None:
            self.repeated += 1
            return
        files = decode_manifest(before)["files"]
        try:
            seen = self.read([str(marker.with_name(file["name"])) for file in files])
            rows, low, high, of = seen
            fault = (
                "" if low == high and rows == of == sum(file["rows"] for file in files) else f"mixed: {seen}"
            )
        except Exception as error:  # each library has its own for a file that is missing
            fault = f"missing: {error}"
        if read_marker(marker) != before:
            self.repeated += 1
        elif fault:
            self.faults.append(f"{marker.parent.name}: {fault}")
        else:
            self.whole += 1


def read_marker(marker: Path) -> bytes | None:
    try:
        return marker.read_bytes()
    except FileNotFoundError:
        return None


def read_with_duckdb(files: list[str]) -> Seen:
    query = "SELECT count(*), min(round), max(round), max(of) FROM read_parquet(?)"
    with duckdb.connect() as database:
        return database.execute(query, [files]).fetchall()[0]


def read_with_pyarrow(files: list[str]) -> Seen:
    return summarise(pads.dataset(files, format="parquet").to_table(columns=["round", "of"]))


def read_with_polars(files: list[str]) -> Seen:
    return summarise(pl.read_parquet(files, columns=["round", "of"]).to_arrow())


def summarise(rows: pa.Table) -> Seen:
    rounds = rows["round"].to_pylist()
    return rows.num_rows, min(rounds), max(rounds), max(rows["of"].to_pylist())


READERS = {"DuckDB": read_with_duckdb, "pyarrow": read_with_pyarrow, "polars": read_with_polars}


def publish_under_readers(publisher: Publisher, rounds: int) -> Sequence[Reader]:
    """Publish so many times while three readers look."""
    publisher.begin()
    readers = [Reader(name, read, publisher.table / "images") for name, read in READERS.items()]
    ended = threading.Event()
    threads = [threading.Thread(target=reader.read_until, args=(ended,)) for reader in readers]
    for thread in threads:
        thread.start()
    try:
        for number in range(1, rounds + 1):
            publisher.publish(number)
            if number % 10 == 0:
                whole, faults = sum(one.whole for one in readers), sum(len(one.faults) for one in readers)
                print(f"{number} of {rounds} rounds: {whole:,} whole reads, {faults} faults", flush=True)
    finally:
        ended.set()
        for thread in threads:
            thread.join()
    return readers
