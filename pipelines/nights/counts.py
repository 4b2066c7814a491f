"""Predictions files -> the counts of one night. DuckDB, in bounded memory.

Rows are counted for the table: statuses, failing hosts, carried rows. Labels are counted once per distinct
image (sha256) classified that night: one picture on a thousand pages is one observation, not a thousand.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import duckdb
import pyarrow as pa

from pipelines.ledger.parts import HOST
from pipelines.nights.database import create_view, open_workspace
from pipelines.nights.drift import SeriesCounts, find_series_effect
from pipelines.schema import CARRIED_FROM
from pipelines.storage.storage import Storage
from pipelines.taxonomy.taxonomy import Taxonomy

UNCERTAIN_BELOW = 0.5
"""Best score below which an image counts as uncertain."""
SEGMENTS_KEPT = 20
"""Values of a column that are counted on their own: those with the most images."""
HOSTS_KEPT = 50
"""Failing hosts that are kept: those with the most rows."""
TIER1, TIER2, SCORE, UNCERTAIN, NO_CATEGORY = (
    "tier 1",
    "tier 2",
    "best score",
    "uncertain",
    "without category",
)
"""The signals, as the report names them."""
ALL = ""
"""The segment of all images."""
MOST_IN_SERIES = 50
"""Images of one page or folder beyond which it is a section of the site, and no series of alike pictures."""

CLASSIFIED = """
CREATE TEMP TABLE classified AS
SELECT sha256, any_value(top_id) AS top_id, any_value(tier1_id) AS tier1_id,
    any_value(top_score)::FLOAT AS top_score, any_value(coalesce(len(cat), 0)) AS n_cat,
    min(coalesce({page}, regexp_replace(uri, '[^/]*$', ''))) AS page{values}
FROM rows WHERE {labelled} GROUP BY sha256{by}
"""
"""Distinct images classified that night; one row for each segment that an image is in."""

COUNTED = "SELECT count(*), {carried}, max(model_id) FROM rows"
MEAN = (
    "SELECT count(*), avg(score) FROM (SELECT any_value(top_score) AS score FROM classified GROUP BY sha256)"
)
STATUSES = "SELECT status, count(*) FROM rows GROUP BY 1 ORDER BY 2 DESC, 1"
HOSTS = f"""
SELECT regexp_extract(uri, '{HOST}', 1) AS host, count(*)
FROM rows WHERE status <> 'ok' AND host <> '' GROUP BY 1 ORDER BY 2 DESC, 1 LIMIT ?
"""
SEGMENTS = """
SELECT {value} FROM classified WHERE {value} IS NOT NULL
GROUP BY 1 ORDER BY count(DISTINCT sha256) DESC, 1 LIMIT ?
"""
SIGNALS = """
SELECT segment, signal, cell, sum(n)::BIGINT, sum(n * n)::BIGINT, sum(n * n_series)::BIGINT FROM (
    SELECT *, sum(n) OVER (PARTITION BY segment, signal, series) AS n_series FROM (
        SELECT segment, series, signal, cell, count(*) AS n FROM (
            SELECT segment, series, unnest([
                {{'signal': $tier1, 'cell': tier1_id}},
                {{'signal': $tier2, 'cell': tier2_id}},
                {{'signal': $score, 'cell': printf('%.1f', least(floor(top_score * 10) / 10, 0.9))}},
                {{'signal': $uncertain, 'cell': if(top_score < $below, 'yes', 'no')}},
                {{'signal': $no_category, 'cell': if(n_cat = 0, 'yes', 'no')}}
            ], recursive := true)
            FROM (
                SELECT *, if(count(*) OVER (PARTITION BY segment, page) > $most, sha256, page) AS series
                FROM (
                    SELECT sha256, {value} AS segment, any_value(top_id) AS top_id,
                        any_value(tier1_id) AS tier1_id, any_value(top_score) AS top_score,
                        any_value(n_cat) AS n_cat, min(page) AS page
                    FROM classified GROUP BY 1, 2
                )
            ) LEFT JOIN tiers ON tiers.id = top_id
            WHERE segment IN (SELECT unnest($segments))
        ) WHERE cell IS NOT NULL GROUP BY ALL
    )
) GROUP BY ALL
"""

Signals = dict[str, dict[str, int]]
Segments = dict[str, dict[str, dict[str, SeriesCounts]]]
"""Segment -> signal -> cell -> counts."""


@dataclass(frozen=True)
class NightCounts:
    """What the rows of one night come to."""

    model_id: str
    generation: int
    rows: int
    carried: int
    """Rows whose result is that of an earlier night."""
    images: int
    """Distinct images classified that night."""
    mean_top_score: float | None
    statuses: Mapping[str, int]
    hosts: Mapping[str, int]
    """Rows without a label by host."""
    signals: Mapping[str, Signals] = field(default_factory=dict)
    """Segment -> signal -> cell -> images; the segment `""` is all of them."""
    series_effects: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """Segment -> signal -> the design effect of the series that its images come in."""

    def to_json(self) -> bytes:
        return json.dumps(vars(self), indent=1).encode()


def read_counts(payload: bytes) -> NightCounts:
    """The inverse of `NightCounts.to_json`."""
    return NightCounts(**json.loads(payload))


@contextmanager
def open_files(views: Mapping[str, tuple[Storage, Sequence[str]]]) -> Iterator[duckdb.DuckDBPyConnection]:
    """A database with views over Parquet files: name -> folder and paths below it."""
    with open_workspace() as (database, _):
        for name, (folder, paths) in views.items():
            create_view(database, name, folder, paths)
        yield database


@contextmanager
def open_night(
    folder: Storage, paths: Sequence[str], *, by: Sequence[str] = ()
) -> Iterator[duckdb.DuckDBPyConnection]:
    """A database with these predictions files as `rows`, and the images classified that night, `classified`.

    Args:
        by: carried columns that images are counted by; one that the files lack is left out.
    """
    with open_files({"rows": (folder, paths)}) as database:
        names = _list_columns(database)
        counted_by = {name: f"{_quote(name)}::VARCHAR" for name in by if name in names}
        labelled = "status = 'ok'" + (" AND carried_from IS NULL" if CARRIED_FROM.name in names else "")
        values = "".join(f", {value} AS {_quote(name)}" for name, value in counted_by.items())
        keys = "".join(f", {value}" for value in counted_by.values())
        page = "page_url::VARCHAR" if "page_url" in names else "NULL"
        database.execute(CLASSIFIED.format(values=values, by=keys, labelled=labelled, page=page))
        yield database


def count_night(
    database: duckdb.DuckDBPyConnection, taxonomy: Taxonomy, *, by: Sequence[str] = (), generation: int = 1
) -> NightCounts:
    """Count what `open_night` opened."""
    carried = f"count({CARRIED_FROM.name})" if CARRIED_FROM.name in _list_columns(database) else "0"
    rows, n_carried, model_id = _first(database, COUNTED.format(carried=carried))
    images, mean = _first(database, MEAN)
    segments = _count_signals(database, taxonomy, by)
    return NightCounts(
        model_id=model_id or "",
        generation=generation,
        rows=rows,
        carried=n_carried,
        images=images,
        mean_top_score=mean,
        statuses=dict(database.execute(STATUSES).fetchall()),
        hosts=dict(database.execute(HOSTS, [HOSTS_KEPT]).fetchall()),
        signals={
            segment: {
                signal: {cell: counts.images for cell, counts in cells.items()}
                for signal, cells in signals.items()
            }
            for segment, signals in segments.items()
        },
        series_effects={
            segment: {signal: find_series_effect([*cells.values()]) for signal, cells in signals.items()}
            for segment, signals in segments.items()
        },
    )


def _count_signals(database: duckdb.DuckDBPyConnection, taxonomy: Taxonomy, by: Sequence[str]) -> Segments:
    """Counts by segment, signal and cell."""
    ids = [row[0] for row in database.execute("SELECT DISTINCT top_id FROM classified").fetchall()]
    database.register("tiers", _list_tiers(taxonomy, ids))
    found = {ALL: _count_segments(database, "''", [ALL]).get(ALL, {})}
    for name in _list_columns(database, "classified"):
        if name in by:
            value = _quote(name)
            kept = database.execute(SEGMENTS.format(value=value), [SEGMENTS_KEPT]).fetchall()
            counted = _count_segments(database, value, [row[0] for row in kept])
            found |= {f"{name}={segment}": signals for segment, signals in counted.items()}
    return found


def _count_segments(database: duckdb.DuckDBPyConnection, value: str, segments: Sequence[str]) -> Segments:
    parameters = {
        "tier1": TIER1,
        "tier2": TIER2,
        "score": SCORE,
        "uncertain": UNCERTAIN,
        "no_category": NO_CATEGORY,
        "below": UNCERTAIN_BELOW,
        "most": MOST_IN_SERIES,
        "segments": list(segments),
    }
    found: Segments = {}
    rows = database.execute(SIGNALS.format(value=value), parameters).fetchall()
    for segment, signal, cell, *counts in rows:
        found.setdefault(segment, {}).setdefault(signal, {})[cell] = SeriesCounts(*counts)
    return found


def _list_tiers(taxonomy: Taxonomy, ids: Sequence[str]) -> pa.Table:
    """`id` and `tier2_id`, its ancestor of Tier 2; the id itself in Tier 1 and of no taxonomy."""
    tiers = [(one, *taxonomy.ancestors(one))[-2:][0] if one in taxonomy else one for one in ids]
    return pa.table({"id": pa.array(ids, pa.string()), "tier2_id": pa.array(tiers, pa.string())})


def _list_columns(database: duckdb.DuckDBPyConnection, table: str = "rows") -> list[str]:
    return [row[0] for row in database.execute(f"DESCRIBE {table}").fetchall()]


def _first(database: duckdb.DuckDBPyConnection, query: str) -> tuple[Any, ...]:
    return database.execute(query).fetchone() or ()


def _quote(name: str) -> str:
    """A column's name in SQL."""
    return '"' + name.replace('"', '""') + '"'
