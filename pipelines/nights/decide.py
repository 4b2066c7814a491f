"""Tonight's plan and what an earlier night knew of each URI -> a decision per item.

    carried          its validator is unchanged, and the earlier night has its labels
    carried_failure  it failed for good not long ago, and nothing says that it has changed
    changed          the inventory's validator is another
    asked            nothing in the inventory tells; a web server is asked whether it has changed
    retried          it failed, and the failure may have passed
    new              its URI was not in the earlier night

Images inside tars and tables are found by their place and never carried by it: they are read, and their bytes
may be known. DuckDB joins by a 128-bit hash of the URI and nothing wider, so that millions of rows fit.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date, timedelta

import duckdb
import numpy as np

from pipelines.inventory.plan import Plan
from pipelines.nights.database import create_view
from pipelines.nights.folders import Night
from pipelines.nights.validators import VALIDATORS
from pipelines.status import TRANSIENT
from pipelines.storage.storage import open_storage

DECISIONS = ("new", "carried", "carried_failure", "changed", "asked", "retried")
NEW, CARRIED, CARRIED_FAILURE, CHANGED, ASKED, RETRIED = range(len(DECISIONS))
ROWS_AT_ONCE = 1 << 20

_VALIDATOR = "CASE WHEN validator IS NOT NULL THEN hash(validator) END"
_DECIDED = f"""
CREATE TABLE decided AS
SELECT item_id, key, CASE
    WHEN seen.ok IS NULL THEN {NEW}
    WHEN inside THEN {ASKED}
    WHEN seen.ok AND tonight.validator = seen.validator THEN {CARRIED}
    WHEN NOT seen.ok AND lasting AND since > $oldest
         AND tonight.validator IS NOT DISTINCT FROM seen.validator THEN {CARRIED_FAILURE}
    WHEN NOT seen.ok THEN {RETRIED}
    WHEN tonight.validator <> seen.validator THEN {CHANGED}
    ELSE {ASKED} END::UTINYINT AS decision
FROM (
    SELECT item_id, md5_number(uri) AS key, {_VALIDATOR} AS validator,
           "offset" IS NOT NULL AS inside
    FROM items
) AS tonight
LEFT JOIN (
    SELECT md5_number(uri) AS key, {_VALIDATOR} AS validator,
           status = 'ok' AS ok, NOT list_contains($transient, status) AS lasting, since
    FROM seen
) AS seen USING (key)
"""


@dataclass(frozen=True)
class Decided:
    """What is done about each item, and how many URIs of the earlier night are gone."""

    codes: np.ndarray
    """uint8 [items]: indexes of `DECISIONS`."""
    removed: int

    def count(self) -> dict[str, int]:
        """Images by decision."""
        counts = np.bincount(self.codes, minlength=len(DECISIONS)).tolist()
        return dict(zip(DECISIONS, counts, strict=True))


def decide(
    database: duckdb.DuckDBPyConnection, plan: Plan, previous: Night, *, tonight: date, keep_failures: int
) -> Decided:
    """Decide for every item; leaves the table `decided` and the views `items` and `seen` in the database.

    Args:
        previous: the last night under the same model.
        keep_failures: nights for which a failure that does not pass by itself is carried.
    """
    create_view(database, "items", open_storage(plan.state_uri), [file.path for file in plan.files])
    create_view(database, "seen", previous.state, [VALIDATORS])
    oldest = tonight - timedelta(days=keep_failures)
    transient = sorted(status.value for status in TRANSIENT)
    database.execute(_DECIDED, {"oldest": oldest, "transient": transient})
    codes = np.zeros(plan.n_items, np.uint8)
    for batch in database.sql("SELECT item_id, decision FROM decided").to_arrow_reader(ROWS_AT_ONCE):
        codes[batch.column(0).to_numpy()] = batch.column(1).to_numpy()
    (n_seen,) = database.sql("SELECT count(*) FROM seen").fetchall()[0]
    return Decided(codes, max(0, n_seen - int(np.count_nonzero(codes))))


def count_removed(database: duckdb.DuckDBPyConnection, plan: Plan, nights: Sequence[Night]) -> int:
    """URIs of the last night, under whatever model, that are in tonight's plan no more."""
    earlier = [night for night in nights if night.state.exists(VALIDATORS)]
    if not earlier:
        return 0
    create_view(database, "seen", earlier[-1].state, [VALIDATORS])
    if not plan.files:
        (removed,) = database.sql("SELECT count(*) FROM seen").fetchall()[0]
        return int(removed)
    create_view(database, "items", open_storage(plan.state_uri), [file.path for file in plan.files])
    query = """
    SELECT count(*) FROM (SELECT md5_number(uri) AS key FROM seen)
    ANTI JOIN (SELECT md5_number(uri) AS key FROM items) USING (key)
    """
    (removed,) = database.sql(query).fetchall()[0]
    return int(removed)
