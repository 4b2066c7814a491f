"""Proves that a published table is whole: every plan row once, no byte changed, nothing added.

Trusts only checksums and counts that it computes itself. The ledger's entries are chained and carry their own
checksum; each lists a table file with its sha256 and the items in it; the plan says which rows those items
are. Compared with the ledger, the plan and the report are the folder's listing, the files' bytes, their
schema, every `image_id` and `uri` in file order, and the counts; and the plan with the one that `run.json`
names.
"""

import binascii
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipelines import schema
from pipelines.inventory.plan import PLAN_JSON, NoPlan, Plan, hash_of, open_plan
from pipelines.ledger.entries import LedgerDamaged, Phase, TableFile, sum_counts
from pipelines.ledger.item_set import ItemSet, concat, overlap
from pipelines.ledger.layout import SUCCESS, detect_layout, sort_files
from pipelines.ledger.ledger import RUN_JSON, Ledger
from pipelines.ledger.parts import count_values
from pipelines.ledger.publish import row_groups
from pipelines.ledger.republish import item_batches
from pipelines.messages import InputError, first_line, redact
from pipelines.storage.storage import Storage, open_storage, sha256_of
from pipelines.storage.uris import join

UNCHECKED = "nothing is published that could be checked"
REPORT_JSON = "report.json"
_KEYS = schema.PREDICTIONS_HEAD
_UNREADABLE = (json.JSONDecodeError, UnicodeDecodeError, binascii.Error, pa.ArrowException)
"""What a damaged file of the state folder raises when it is parsed."""
_ROW_KEYS = pa.schema([*_KEYS, schema.PREDICTIONS_TAIL.field("status")])


class _StateDamaged(Exception):
    """A file of the state folder is not what was written; verify reports it as a failed check."""


@dataclass(frozen=True)
class Check:
    """One thing that was proved, or not."""

    name: str
    ok: bool
    detail: str


@dataclass(frozen=True)
class Predictions:
    """What is verified."""

    plan: Plan
    ledger: Ledger
    state: Storage
    table: Storage

    @property
    def files(self) -> list[TableFile]:
        """The listed files by name."""
        return sort_files(self.ledger.state)


def verify(predictions_uri: str) -> list[Check]:
    """Check a predictions folder with its `table/` and `state/`.

    Raises:
        InputError: classify did not write the folder, or another version of it did.
    """
    root = open_storage(predictions_uri).uri
    try:
        return verify_table(open_storage(join(root, "table")), open_storage(join(root, "state")))
    except InputError as error:
        above, _, name = root.rpartition("/")
        inside = name in ("table", "state")
        given = f"the folder above, {redact(above)}" if inside else "the folder that was --output"
        raise InputError(f"{error}; give {given}") from error


def verify_table(table: Storage, state: Storage) -> list[Check]:
    """Check a table against its state folder, wherever the two are. Raises InputError, as `verify` does."""
    if not any(state.exists(path) for path in (RUN_JSON, PLAN_JSON)):
        raise InputError(
            f"{state.uri} has no {RUN_JSON} and no {PLAN_JSON}: not written by classify, or not there"
        )
    try:
        plan = _open_checked_plan(state)
    except (_StateDamaged, NoPlan) as error:
        return [Check("plan", False, str(error))]
    begun = _find_other_plan(plan, state)
    checks = [
        Check("plan", True, f"{plan.n_items:,} images, {plan.n_rows:,} rows"),
        _make_check("run", begun, f"it was begun with the plan {plan.hash[:12]}"),
    ]
    try:
        ledger = Ledger(state, plan.n_items)
    except (LedgerDamaged, IndexError) as error:
        return [*checks, Check("ledger", False, str(error))]
    return checks + _check_table(Predictions(plan, ledger, state, table))


def _check_table(found: Predictions) -> list[Check]:
    """What can be checked once the plan and the ledger are read."""
    state, files = found.ledger.state, found.files
    n_bytes, n_rows = sum(file.bytes for file in files), sum(file.rows for file in files)
    unchanged = f"{n_bytes:,} bytes unchanged" if files else UNCHECKED
    as_planned = f"{n_rows:,}, each the plan's, schema as stated" if files else UNCHECKED
    return [
        _make_check("ledger", _find_repeats(found), f"{state.entries} entries, none missing or altered"),
        _make_check(
            "published", _find_unpublished(found), f"{SUCCESS} is there, generation {state.generation}"
        ),
        _make_check("files", _find_unlisted(found), f"{len(files)}, as the ledger lists them"),
        _make_check("images", _find_lost_items(found), f"all {found.plan.n_items:,}, each in one file"),
        _make_check("checksums", _find_changed_bytes(found), unchanged),
        _make_check("rows", _find_other_rows(found), as_planned),
        _make_check("report", _find_miscounts(found), "its counts are the table's"),
    ]


def _make_check(name: str, problems: Iterator[str], fine: str) -> Check:
    """A check that passes when there are no problems; of many, the first three are named."""
    try:
        found = list(problems)
    except _StateDamaged as error:
        found = [str(error)]
    more = f" (and {len(found) - 3} more)" if len(found) > 3 else ""
    return Check(name, not found, "; ".join(found[:3]) + more if found else fine)


def _open_checked_plan(state: Storage) -> Plan:
    """The plan, its files' bytes compared with what `plan.json` lists. Raises _StateDamaged or NoPlan."""
    try:
        plan = open_plan(state)
    except (*_UNREADABLE, KeyError, TypeError) as error:
        raise _StateDamaged(
            f"{PLAN_JSON} cannot be read: {type(error).__name__}: {first_line(error)}"
        ) from error
    for file in plan.files:
        if not state.exists(file.path):
            raise _StateDamaged(f"{file.path} is missing")
        if sha256_of(state, file.path) != file.sha256:
            raise _StateDamaged(f"{file.path} has changed since {PLAN_JSON} was written")
    if plan.hash != hash_of(plan.files, plan.carried):
        raise _StateDamaged(f"{PLAN_JSON} does not have the hash of what it lists")
    return plan


def _read_json(state: Storage, path: str) -> Mapping[str, Any]:
    """One JSON object. Raises _StateDamaged."""
    try:
        found = json.loads(state.read(path))
    except _UNREADABLE as error:
        raise _StateDamaged(f"{path} cannot be read: {first_line(error)}") from error
    if not isinstance(found, dict):
        raise _StateDamaged(f"{path} is not a JSON object")
    return found


def _find_other_plan(plan: Plan, state: Storage) -> Iterator[str]:
    """The plan is not the one that the ledger was begun with."""
    if not state.exists(RUN_JSON):
        yield f"{RUN_JSON} is missing"
        return
    run = _read_json(state, RUN_JSON)
    begun = run.get("identity", {}).get("plan"), run.get("n_items")
    if begun != (plan.hash, plan.n_items):
        yield (
            f"{RUN_JSON} names the plan {begun[0]} of {begun[1]} images, and {PLAN_JSON} is "
            f"{plan.hash} of {plan.n_items}: the plan was exchanged"
        )


def _find_repeats(found: Predictions) -> Iterator[str]:
    """Items are recorded twice. That the entries follow each other, reading them has shown."""
    if overlap(concat(part.items for part in found.ledger.state.parts)):
        yield "parts in the ledger repeat each other's items"


def _find_unpublished(found: Predictions) -> Iterator[str]:
    """The run is not finished, or does not say so to readers."""
    state = found.ledger.state
    if state.phase is not Phase.PUBLISHED:
        left = found.plan.n_items - len(found.ledger.done)
        yield f"generation {state.generation} is still {state.phase}, {left:,} images are not recorded"
    if not found.table.exists(SUCCESS):
        yield f"{SUCCESS} is missing"
    elif found.table.read(SUCCESS) != detect_layout(state.files).encode_marker(state):
        yield f"{SUCCESS} does not list the files of generation {state.generation}"


def _find_unlisted(found: Predictions) -> Iterator[str]:
    """The table's folder lacks a listed file, or holds another."""
    there = {entry.path for entry in found.table.list()} - {SUCCESS}
    listed = {file.name for file in found.files}
    yield from (f"{name} is missing" for name in sorted(listed - there))
    yield from (f"{name} is in no ledger entry" for name in sorted(there - listed))


def _find_lost_items(found: Predictions) -> Iterator[str]:
    """The listed files do not hold every item of the plan once."""
    seen = ItemSet(found.plan.n_items)
    for file in found.files:
        try:
            again = seen.present(file.items)
            seen.add(file.items)
        except IndexError as error:
            yield f"{file.name}: {error}"
            continue
        if again or overlap(file.items):
            yield f"{file.name} repeats images of another file or its own"
    if not seen.full:
        yield f"{found.plan.n_items - len(seen):,} images are in no file"


def _find_changed_bytes(found: Predictions) -> Iterator[str]:
    """A file does not have the bytes that were published."""
    for file in found.files:
        if not found.table.exists(file.name):
            yield f"{file.name} is missing"
        elif sha256_of(found.table, file.name) != file.sha256:
            yield f"{file.name} has changed since it was published"


def _find_other_rows(found: Predictions) -> Iterator[str]:
    """A file has another schema, or not the plan's rows in the listed order with the listed statuses."""
    for file in found.files:
        yield from (f"{file.name} {problem}" for problem in _find_row_problems(file, found))


def _find_row_problems(file: TableFile, found: Predictions) -> Iterator[str]:
    """What is wrong inside one file; one problem is enough."""
    fields = detect_layout(found.ledger.state.files).schema(found.plan.carried)
    try:
        source = pq.ParquetFile(found.table.open_input(file.name))
        if not source.schema_arrow.equals(fields):
            yield f"has the schema {source.schema_arrow}, expected {fields}"
            return
        statuses: Counter[str] = Counter()
        batches = (pa.table(batch) for batch in source.iter_batches(columns=[*_KEYS.names, "status"]))
        for actual, expected in zip_longest(
            row_groups(batches, _ROW_KEYS), row_groups(_read_planned_rows(file, found.plan), _KEYS)
        ):
            if actual is None or expected is None or not actual.select(_KEYS.names).equals(expected):
                yield f"does not hold the plan's rows in order ({source.metadata.num_rows:,} rows)"
                return
            statuses.update(count_values(actual["status"]))
        if statuses != Counter(file.statuses):
            yield f"counts {dict(statuses)}, the ledger says {dict(file.statuses)}"
    except (OSError, pa.ArrowException) as error:
        yield f"cannot be read: {first_line(error)}"


def _read_planned_rows(file: TableFile, plan: Plan) -> Iterator[pa.Table]:
    """`image_id` and `uri` of every row that a file must hold, in its order."""
    for items in item_batches(file.items, plan):
        rows = items["table_rows"].combine_chunks()
        owners = pc.list_parent_indices(rows)
        columns = [pc.struct_field(rows.flatten(), "image_id"), items["uri"].take(owners)]
        yield pa.table(columns, names=_KEYS.names)


def _find_miscounts(found: Predictions) -> Iterator[str]:
    """The report's counts are not those of the table."""
    if not found.state.exists(REPORT_JSON):
        yield f"{REPORT_JSON} is missing"
        return
    report = _read_json(found.state, REPORT_JSON)
    statuses = dict(sum_counts(file.statuses for file in found.files))
    if report.get("rows") != sum(statuses.values()) or report.get("statuses") != statuses:
        yield f"it says {report.get('rows')} rows, {report.get('statuses')}; the table has {statuses}"
    if sum(statuses.values()) != found.plan.n_rows:
        yield f"the table has {sum(statuses.values()):,} rows, the plan {found.plan.n_rows:,}"
