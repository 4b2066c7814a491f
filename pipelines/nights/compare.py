"""Two predictions of the same images -> which labels differ, where, and which side is right.

Images are matched by their bytes (sha256), so what changed on the web counts for neither side; each distinct
image counts once.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import duckdb
import pyarrow as pa

from pipelines.nights.counts import open_files
from pipelines.nights.pictures import LABELS_SHOWN
from pipelines.nights.report import name_of
from pipelines.storage.storage import Storage
from pipelines.taxonomy.taxonomy import Taxonomy

PAIRS_KEPT = 2_000
"""Pairs of categories that are counted, those with the most images."""

SIDE = """
CREATE TEMP TABLE {side} AS
SELECT sha256, any_value(uri) AS uri, any_value(top_id) AS top_id, any_value(top_score) AS top_score,
    any_value(tier1_id) AS tier1_id, any_value(labels) AS labels,
    any_value(list_sort(coalesce(cat, []))) AS cat, max(model_id) AS model_id
FROM rows_{side} WHERE status = 'ok' GROUP BY sha256
"""
BOTH = """
CREATE TEMP VIEW compared AS
SELECT a.sha256, a.uri, a.top_id AS a_id, b.top_id AS b_id, a.top_score AS a_score, b.top_score AS b_score,
    a.tier1_id AS a_tier1, b.tier1_id AS b_tier1, a.cat <> b.cat AS cat_differs, a.labels AS a_labels,
    b.labels AS b_labels, a.top_id <> b.top_id AS flips
FROM a JOIN b USING (sha256)
"""
TOTALS = """
SELECT count(*) AS images, count(*) FILTER (flips) AS flips,
    count(*) FILTER (a_tier1 <> b_tier1) AS tier1_flips, count(*) FILTER (cat_differs) AS cat_changes,
    avg(a_score) AS mean_score_a, avg(b_score) AS mean_score_b,
    avg(a_score) FILTER (flips) AS flips_score_a, avg(b_score) FILTER (flips) AS flips_score_b,
    coalesce(avg(flips::INT), 0) AS flip_share,
    (SELECT count(*) FROM a ANTI JOIN b USING (sha256)) AS only_a,
    (SELECT count(*) FROM b ANTI JOIN a USING (sha256)) AS only_b,
    [(SELECT max(model_id) FROM a), (SELECT max(model_id) FROM b)] AS models
FROM compared
"""
CATEGORIES = """
SELECT id, sum(in_a)::BIGINT AS a, sum(in_b)::BIGINT AS b,
    sum(lost)::BIGINT AS lost, sum(gained)::BIGINT AS gained,
    if(sum(in_a) = 0, NULL, sum(lost) / sum(in_a)) AS flip_share
FROM (
    SELECT a_id AS id, count(*) AS in_a, 0 AS in_b, count(*) FILTER (flips) AS lost, 0 AS gained
    FROM compared GROUP BY 1
    UNION ALL
    SELECT b_id, 0, count(*), 0, count(*) FILTER (flips) FROM compared GROUP BY 1
) GROUP BY 1 ORDER BY sum(lost) + sum(gained) DESC, sum(in_a) DESC, 1
"""
PAIRS = """
SELECT a_id AS a, b_id AS b, count(*) AS images
FROM compared WHERE flips GROUP BY ALL ORDER BY 3 DESC, 1, 2 LIMIT ?
"""
SURE_FLIPS = """
SELECT uri, a_labels, b_labels FROM compared WHERE flips
ORDER BY least(a_score, b_score) DESC, sha256 LIMIT ?
"""
TRUTH = """
SELECT count(*), count(*) FILTER (list_contains(ids, a_id)), count(*) FILTER (list_contains(ids, b_id)),
    count(*) FILTER (list_contains(ids, a_id) AND NOT list_contains(ids, b_id)),
    count(*) FILTER (list_contains(ids, b_id) AND NOT list_contains(ids, a_id))
FROM compared JOIN truth USING (uri)
"""


@dataclass(frozen=True)
class Side:
    """One of the two predictions."""

    name: str
    folder: Storage
    paths: Sequence[str]


@dataclass(frozen=True)
class Flip:
    """An image that the two sides label differently."""

    uri: str
    a: tuple[tuple[str, float], ...]
    """Ids and scores, best first."""
    b: tuple[tuple[str, float], ...]
    thumbnail: str | None = None


@contextmanager
def open_sides(a: Side, b: Side) -> Iterator[duckdb.DuckDBPyConnection]:
    """A database with the images that both sides labelled as `compared`."""
    with open_files({"rows_a": (a.folder, a.paths), "rows_b": (b.folder, b.paths)}) as database:
        for side in ("a", "b"):
            database.execute(SIDE.format(side=side))
        database.execute(BOTH)
        yield database


def compare(
    database: duckdb.DuckDBPyConnection, taxonomy: Taxonomy, truth: Mapping[str, Sequence[str]]
) -> dict[str, Any]:
    """What `open_sides` opened, as plain data.

    Args:
        truth: URI -> ids of its true labels, where they are known.
    """
    (totals,) = read_rows(database, TOTALS)
    pairs, categories = read_rows(database, PAIRS, PAIRS_KEPT), read_rows(database, CATEGORIES)
    for pair in pairs:
        pair |= {side: name_of(taxonomy, pair[side]) for side in ("a", "b")}
    for one in categories:
        one["name"] = name_of(taxonomy, one["id"])
    return {
        **totals,
        "categories": categories,
        "pairs": pairs,
        "truth": _agreement(database, truth) if truth else None,
    }


def read_rows(database: duckdb.DuckDBPyConnection, query: str, *parameters: object) -> list[dict[str, Any]]:
    """What a query finds, by column name."""
    rows: list[dict[str, Any]] = database.sql(query, params=list(parameters)).to_arrow_table().to_pylist()
    return rows


def choose_flips(database: duckdb.DuckDBPyConnection, n_pictures: int) -> list[Flip]:
    """The flips of which both sides are surest."""
    rows = database.execute(SURE_FLIPS, [n_pictures]).fetchall()
    return [Flip(uri, _best(a), _best(b)) for uri, a, b in rows]


def _best(labels: Sequence[Mapping[str, Any]]) -> tuple[tuple[str, float], ...]:
    return tuple((one["id"], one["score"]) for one in labels[:LABELS_SHOWN])


def _agreement(
    database: duckdb.DuckDBPyConnection, truth: Mapping[str, Sequence[str]]
) -> dict[str, Any] | None:
    """How often each side is right, and the p-value of McNemar's exact test that they are equally often."""
    from scipy import stats  # half a second that the pages of runs do not need

    ids = pa.array(list(truth.values()), pa.list_(pa.string()))
    database.register("truth", pa.table({"uri": pa.array(list(truth), pa.string()), "ids": ids}))
    images, right_a, right_b, a_alone, b_alone = database.execute(TRUTH).fetchall()[0]
    if not images:
        return None
    discordant = a_alone + b_alone
    return {
        "images": images,
        "accuracy_a": right_a / images,
        "accuracy_b": right_b / images,
        "only_a_right": a_alone,
        "only_b_right": b_alone,
        "p": float(stats.binomtest(b_alone, discordant).pvalue) if discordant else 1.0,
    }
