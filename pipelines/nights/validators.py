"""What tonight's parts say of each URI -> `validators.parquet`, by which the next night decides.

One row per item: what the inventory and the server said that changes with the bytes, the bytes' sha256, and
what became of them. Also here: the hosts whose validators are unreliable.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipelines import schema
from pipelines.ledger.entries import Part
from pipelines.schema import CARRIED_FROM, ITEM_ID
from pipelines.status import CARRIED, NOT_MODIFIED, Status
from pipelines.storage.storage import Storage

VALIDATORS = "validators.parquet"
HOSTS = "hosts.json"
SEEN = pa.schema(
    [
        pa.field("uri", pa.string(), nullable=False),
        pa.field("validator", pa.string()),
        *schema.RESPONSE,
        pa.field("sha256", pa.string()),
        pa.field("status", pa.string(), nullable=False),
        pa.field("since", pa.date32(), nullable=False),
    ]
)
"""The columns of `VALIDATORS`; `since` is the night that this status is of."""
_READ = [*schema.PART_HEAD.names, "uri", "sha256", "status", CARRIED_FROM.name]
LEAST_IMAGES = 10
"""Fewer images of a host say nothing of its validators."""
MOST_UNRELIABLE = 0.5
"""Share of a host's changed validators without changed bytes beyond which they are unreliable."""

HOST = r"^[A-Za-z][A-Za-z0-9+.-]*://(?:[^/@?#]*@)?([^/?#]+)"

_UNRELIABLE = f"""
SELECT host, count(*) AS images, count(*) FILTER (same_bytes AND changed) AS unreliable
FROM (
    SELECT regexp_extract(tonight.uri, '{HOST}', 1) AS host, tonight.sha256 = seen.sha256 AS same_bytes,
           coalesce(tonight.etag <> seen.etag, tonight.validator <> seen.validator,
                    tonight.last_modified <> seen.last_modified) AS changed
    FROM fetched AS tonight JOIN seen USING (uri)
    WHERE tonight.sha256 IS NOT NULL AND seen.sha256 IS NOT NULL
)
WHERE changed IS NOT NULL AND host <> ''
GROUP BY host HAVING images >= {LEAST_IMAGES} AND unreliable > {MOST_UNRELIABLE} * images
ORDER BY host
"""


@dataclass(frozen=True)
class Gathered:
    """What the parts of a night say; the files are local."""

    counts: Mapping[str, int]
    """Rows by where their results come from."""
    validators: Path
    fetched: Path
    """As `validators`, of what was sent tonight; where the bytes were known, the status says so."""
    reused: Path
    """The sha256 of every row whose result is an earlier night's."""


def gather(parts: Sequence[Part], state: Storage, folder: Path, *, tonight: date) -> Gathered:
    """Read every recorded part once, in bounded memory."""
    counts = Counter(carried=0, not_modified=0, same_bytes=0, tonight=0)
    paths = [folder / name for name in ("validators.parquet", "fetched.parquet", "reused.parquet")]
    digests = pa.schema([SEEN.field("sha256")])
    with (
        pq.ParquetWriter(paths[0], SEEN, compression="zstd") as validators,
        pq.ParquetWriter(paths[1], SEEN) as fetched,
        pq.ParquetWriter(paths[2], digests) as reused,
    ):
        for part in parts:
            rows = pq.read_table(state.open_input(part.path), columns=_READ)
            counts.update(_count(rows))
            reused.write_table(rows.filter(_is_known(rows)).select(digests.names))
            _, first = np.unique(rows[ITEM_ID].to_numpy(), return_index=True)
            seen = _to_seen(rows.take(first), tonight)
            validators.write_table(_publish_status(seen))
            fetched.write_table(seen.filter(_was_sent(rows.take(first))))
    return Gathered(counts, *paths)


def _count(rows: pa.Table) -> dict[str, int]:
    """Rows by where their results come from, as `report.ORIGINS` explains."""
    known = {status: pc.sum(pc.equal(rows["status"], status)).as_py() or 0 for status in sorted(CARRIED)}
    carried = len(rows) - rows[CARRIED_FROM.name].null_count
    return {"carried": carried, **known, "tonight": len(rows) - carried - sum(known.values())}


def _is_known(rows: pa.Table) -> pa.ChunkedArray:
    return pc.is_in(rows["status"], pa.array(sorted(CARRIED)))


def _was_sent(rows: pa.Table) -> pa.ChunkedArray:
    """Whether the bytes were sent tonight."""
    asked = pc.and_(pc.is_null(rows[CARRIED_FROM.name]), pc.not_equal(rows["status"], NOT_MODIFIED))
    return pc.and_(asked, pc.is_valid(rows["sha256"]))


def _to_seen(rows: pa.Table, tonight: date) -> pa.Table:
    """The first row of each item as rows of `SEEN`."""
    columns = {name: rows[f"__{name}"] for name in ("validator", *schema.RESPONSE.names)}
    columns |= {name: rows[name] for name in ("uri", "sha256", "status")}
    columns["since"] = pc.fill_null(rows[CARRIED_FROM.name], pa.scalar(tonight, pa.date32()))
    return pa.table([columns[name] for name in SEEN.names], schema=SEEN)


def _publish_status(seen: pa.Table) -> pa.Table:
    """Only results with labels are reused."""
    status = pc.if_else(_is_known(seen), Status.OK.value, seen["status"])
    return seen.set_column(SEEN.get_field_index("status"), SEEN.field("status"), status)


def store_validators(gathered: Gathered, state: Storage, *, rerun: bool) -> None:
    """Store the table for the next night; after a rerun of failed rows it replaces those rows alone."""
    local = gathered.validators
    if rerun:
        local = local.with_name("merged.parquet")
        fresh = pq.read_table(gathered.validators)
        with pq.ParquetWriter(local, SEEN, compression="zstd") as merged:
            for batch in pq.ParquetFile(state.open_input(VALIDATORS)).iter_batches():
                kept = pc.invert(pc.is_in(batch.column("uri"), fresh["uri"].combine_chunks()))
                merged.write_table(pa.Table.from_batches([batch.filter(kept)]).cast(SEEN))
            merged.write_table(fresh)
    state.put_file(VALIDATORS, local)


def find_unreliable_hosts(database: duckdb.DuckDBPyConnection) -> list[dict[str, object]]:
    """Hosts whose validators changed since the view `seen` though their bytes did not, with counts.

    The view `fetched` is what was sent tonight.
    """
    found = database.sql(_UNRELIABLE).fetchall()
    return [{"host": host, "images": images, "unreliable": n} for host, images, n in found]


def read_unreliable_hosts(state: Storage) -> list[str]:
    """The hosts whose validators that night found unreliable."""
    if not state.exists(HOSTS):
        return []
    return [found["host"] for found in json.loads(state.read(HOSTS))]
