"""The contents that earlier nights labelled -> what workers search, and the results of what they found.

    state/known/contents.arrow    sha256 of every labelled image, for the workers (`classify.known`)
    state/known/earlier.arrow     what servers said of tonight's URIs the last time, likewise
    state/known/reused-g1.arrow   the results of the contents that were found tonight, by sha256

The published tables are the cache. A night's own results are its rows without `carried_from`; carried rows
count where the night that they come from is gone, or was replaced and no longer has the content.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.classify.known import CONTENTS, EARLIER, WORDS, Digests, map_arrow
from pipelines.messages import JobFailed
from pipelines.nights.carry import RESULTS
from pipelines.nights.database import create_view
from pipelines.nights.decide import ASKED, CHANGED, RETRIED
from pipelines.nights.folders import Night
from pipelines.nights.validators import HOST
from pipelines.status import CARRIED
from pipelines.storage.storage import Storage

_DIGEST = ", ".join(
    f"('0x' || substr(sha256, {1 + 16 * at}, 16))::UBIGINT AS {name}" for at, name in enumerate(WORDS)
)
_EARLIER = f"""
SELECT item_id, etag, last_modified, sha256
FROM (SELECT item_id, key FROM decided WHERE decision IN ({CHANGED}, {ASKED}, {RETRIED}))
JOIN (SELECT md5_number(uri) AS key, * FROM seen WHERE uri ~ '^[ \\t]*[hH][tT][tT][pP][sS]?://') USING (key)
WHERE status = 'ok' AND sha256 IS NOT NULL AND (etag IS NOT NULL OR last_modified IS NOT NULL)
      AND NOT list_contains($hosts, regexp_extract(uri, '{HOST}', 1))
ORDER BY item_id
"""


@dataclass(frozen=True)
class History:
    """The nights whose results may be reused, and tonight."""

    nights: Sequence[Night]
    tonight: date

    def create_views(self, database: duckdb.DuckDBPyConnection) -> str:
        """Make the nights' files views; returns SQL for the rows that hold contents, empty without nights.

        `repeated` rows are carried from a night that is kept, and mostly found there too.
        """
        kept = ", ".join(f"DATE '{night.date}'" for night in self.nights)
        selects = []
        for number, night in enumerate(night for night in self.nights if night.n_rows):
            create_view(database, f"night{number}", night.table, night.files)
            selects.append(
                f"SELECT * REPLACE (coalesce(carried_from, DATE '{night.date}') AS carried_from), "
                f"coalesce(carried_from IN ({kept}), false) AS repeated "
                f"FROM (SELECT {', '.join(RESULTS.names)} FROM night{number}) "
                "WHERE status = 'ok' AND sha256 IS NOT NULL"
            )
        return " UNION ALL ".join(selects)


def write_contents(
    database: duckdb.DuckDBPyConnection, history: History, state: Storage, folder: Path
) -> None:
    """Write what the workers search for bytes that were labelled before."""
    if not (rows := history.create_views(database)):
        return
    query = f"SELECT DISTINCT {_DIGEST} FROM (SELECT sha256 FROM ({rows}) WHERE NOT repeated) ORDER BY word0"
    _store(database.sql(query).to_arrow_table(), state, CONTENTS, folder)


def write_earlier(
    database: duckdb.DuckDBPyConnection, unreliable: Sequence[str], state: Storage, folder: Path
) -> None:
    """Write what servers said of the items that are requested again; not of unreliable hosts."""
    found = database.sql(_EARLIER, params={"hosts": list(unreliable)}).to_arrow_table()
    _store(found, state, EARLIER, folder)


def write_reused(
    database: duckdb.DuckDBPyConnection, history: History, state: Storage, path: str, reused: Path
) -> pa.ChunkedArray:
    """Write the results of the contents in the local table `reused`, each once, by digest.

    The oldest of several results is taken; one of tonight's own date has no `carried_from`. Repeated rows are
    read for contents that are nowhere else: reading all of them takes 50 s instead of 3 for 300,000 contents
    in 28 nights.

    Returns:
        The sha256 of which no night has a result.
    """
    database.execute(f"CREATE TEMP TABLE wanted AS SELECT DISTINCT sha256 FROM read_parquet('{reused}')")
    rows = history.create_views(database)
    found: list[pa.Table] = []
    for chosen in ("NOT repeated", "repeated") if rows else ():
        if _count_wanted(database):
            found.append(_take_wanted(database, f"SELECT * FROM ({rows}) WHERE {chosen}", history.tonight))
    if found:
        results = found[0] if len(found) == 1 else pa.concat_tables(found).sort_by("word0")
        _store(results, state, path, reused.parent)
    return database.sql("SELECT sha256 FROM wanted").to_arrow_table()["sha256"]


def _count_wanted(database: duckdb.DuckDBPyConnection) -> int:
    (n_wanted,) = database.sql("SELECT count(*) FROM wanted").fetchall()[0]
    return int(n_wanted)


def _take_wanted(database: duckdb.DuckDBPyConnection, rows: str, tonight: date) -> pa.Table:
    """The results of the contents in the table `wanted`, which are then removed from it."""
    query = f"""
    SELECT * EXCLUDE (rank, repeated)
           REPLACE (nullif(carried_from, DATE '{tonight}') AS carried_from), {_DIGEST}
    FROM (SELECT *, row_number() OVER (PARTITION BY sha256 ORDER BY carried_from) AS rank
          FROM ({rows}) SEMI JOIN wanted USING (sha256))
    WHERE rank = 1 ORDER BY word0
    """
    found = database.sql(query).to_arrow_table()
    database.register("found", found.select(["sha256"]))
    database.execute("DELETE FROM wanted WHERE sha256 IN (SELECT sha256 FROM found)")
    return found


def forget_contents(state: Storage) -> None:
    """Let workers take every image that is left for a new one."""
    for path in (CONTENTS, EARLIER):  # each by itself: some stores stop at the first that is not there
        state.delete(path)


def _store(table: pa.Table, state: Storage, path: str, folder: Path) -> None:
    """Store an Arrow file of one batch, so that its columns can be mapped as they are."""
    local = folder / "known.arrow"
    with pa.OSFile(str(local), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table.combine_chunks())
    state.put_file(path, local)


def name_reused(generation: int) -> str:
    """Where the results that a generation takes over are."""
    return f"known/reused-g{generation}.arrow"


def make_completer(state: Storage, generation: int) -> Callable[[pa.Table], pa.Table]:
    """What puts the results of earlier nights into the rows of a part that name them by sha256."""
    reused = map_arrow(state, name_reused(generation))
    digests = None if reused is None else Digests(reused)

    def complete(rows: pa.Table) -> pa.Table:
        known = pc.is_in(rows["status"], pa.array(sorted(CARRIED))).to_numpy()
        if not known.any():
            return rows
        sha256s = rows["sha256"].filter(pa.array(known)).to_pylist()
        places = np.full(len(sha256s), -1) if digests is None else digests.find_all(sha256s)
        if reused is None or (places < 0).any():
            raise JobFailed(
                f"{state.uri}: the results of {np.count_nonzero(places < 0):,} images were removed since they"
                " were found in an earlier night; start the date again with --replace"
            )
        return _put(rows, known, reused.take(pa.array(places)))

    return complete


def _put(rows: pa.Table, known: np.ndarray, results: pa.Table) -> pa.Table:
    """The rows with these results where `known`, in order."""
    places = np.arange(rows.num_rows)
    places[known] = rows.num_rows + np.arange(results.num_rows)
    for field in RESULTS:
        at = rows.schema.get_field_index(field.name)
        earlier = results[field.name].cast(field.type)
        both = pa.chunked_array([*rows[field.name].chunks, *earlier.chunks], field.type)
        rows = rows.set_column(at, rows.schema.field(at), both.take(pa.array(places)))
    return rows
