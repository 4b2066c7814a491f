"""Any accepted inventory -> the frozen plan: tables of URIs, folders of images, tables of images, tar shards.

A table of URIs is read three times in batches, everything else once, so memory stays flat. What a run works
on is decided here, once: a later run finds the plan and keeps to it, or refuses an inventory that has changed
since. No image is opened.
"""

import hashlib
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.inventory import dedupe, listing, shards, tables
from pipelines.inventory.listing import Found
from pipelines.inventory.plan import (
    LOCATION,
    PLAN_JSON,
    FoundFile,
    Origin,
    Plan,
    item_schema,
    open_plan,
    write_plan,
)
from pipelines.inventory.settings import InventoryOptions
from pipelines.inventory.strays import Strays
from pipelines.messages import InputError, OtherRun, redact
from pipelines.schema import RESERVED
from pipelines.storage.storage import Storage
from pipelines.storage.uris import scheme_of

KEYS = ("uri", "image_id")
ABSOLUTE = r"^([a-z][a-z0-9+.-]*://|(data|javascript|blob|about|mailto|https?):|$)"
"""How URIs begin that are not relative; other colons belong to names of files."""

TABLE_ROWS_AT_ONCE = 65_536


@dataclass(frozen=True)
class Columns:
    """Which of a table's columns become what: names in the plan -> names in the table."""

    source: dict[str, str]
    carried: pa.Schema

    @property
    def names(self) -> list[str]:
        return list(self.source.values())

    def pick(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        """The chosen columns under their new names; keys as strings, the rest untouched."""
        arrays = [
            _key(batch.column(old), new) if new in KEYS else batch.column(old)
            for new, old in self.source.items()
        ]
        return pa.RecordBatch.from_arrays(arrays, names=list(self.source))


def plan(
    inventory_uri: str,
    state: Storage,
    *,
    options: InventoryOptions | None = None,
    allowed: Sequence[str] = (),
    spread: shards.Spread | None = None,
) -> Plan:
    """Freeze what there is to do under `state`, or find it frozen there.

    Args:
        allowed: places where rows may name images, besides the web and the inventory's own.
        spread: reads tars on several machines, in place of threads of this process.

    Raises:
        InputError: there is no such inventory, it cannot be read, its columns do not serve, or many of its
            images are elsewhere; or `state` holds the plan of another inventory, or of this one as it was.
    """
    options = options or InventoryOptions()
    if options.keep_plan and state.exists(PLAN_JSON):
        return _kept(state, inventory_uri, options)
    found = listing.find(inventory_uri, options)
    fingerprint = fingerprint_of(found, options)
    if state.exists(PLAN_JSON):
        return _unchanged(open_plan(state), fingerprint, inventory_uri, len(found.files))
    with tempfile.TemporaryDirectory(prefix="iab-vision-plan-") as folder:
        strays = Strays(found.base, allowed)
        if found.form == "tars":
            carried, items, containers = _read_tars(found, options, state, spread)
        else:
            carried, items, containers = READERS[found.form](found, options, Path(folder), strays)
        base = redact(found.base) if scheme_of(found.base) in ("http", "https") else found.base
        origin = Origin(redact(listing.absolute(inventory_uri)), base, fingerprint)
        frozen = write_plan(items, state, carried=carried, origin=origin, containers=containers)
    shards.forget_members(state)
    return frozen


def _kept(state: Storage, inventory_uri: str, options: InventoryOptions) -> Plan:
    """The frozen plan; the inventory may have changed, but no file in which images are found by place."""
    frozen = open_plan(state)
    if frozen.containers:
        present = set(listing.find(inventory_uri, options).files)
        if changed := [file.uri for file in frozen.containers if file not in present]:
            raise InputError(
                f"{redact(changed[0])} has changed since it was planned ({len(changed):,} of "
                f"{len(frozen.containers):,} files have), and the plan finds images in it by their place: "
                "it would label other images. Classify into another output folder without --keep-plan"
            )
    return frozen


def _unchanged(frozen: Plan, fingerprint: str, inventory_uri: str, n_files: int) -> Plan:
    if frozen.origin.fingerprint == fingerprint:
        return frozen
    finish = "" if frozen.containers else ". --keep-plan finishes the frozen plan as it is"
    raise OtherRun(
        f"{frozen.state_uri} holds a plan of {frozen.n_rows:,} rows frozen from {frozen.origin.inventory}, "
        f"and {redact(inventory_uri)} ({n_files:,} files) is not, or no longer, that inventory{finish}"
    )


def fingerprint_of(found: Found, options: InventoryOptions) -> str:
    """sha256 over everything that the plan follows from: files with sizes and versions, and the options."""
    chosen = (options.all_files, sorted(options.rename.items()), options.drop_columns, options.image_column)
    digest = hashlib.sha256(repr((1, found.form, found.base, chosen)).encode())
    for file in found.files:
        digest.update(f"{redact(file.uri)}\0{file.size_bytes}\0{file.version}\n".encode())
    return digest.hexdigest()


Items = tuple[pa.Schema, Iterator[pa.Table], Sequence[FoundFile]]
"""What each form yields: the carried columns' schema, tables of items, the files of several images each."""


def _read_images(found: Found, _options: InventoryOptions, _folder: Path, _strays: Strays) -> Items:
    def items() -> Iterator[pa.Table]:
        for start in range(0, len(found.files), TABLE_ROWS_AT_ONCE):
            files = found.files[start : start + TABLE_ROWS_AT_ONCE]
            rows = pa.table({"uri": pa.array([file.uri for file in files], pa.string())})
            versions = [f"{file.version} size {file.size_bytes}" if file.version else None for file in files]
            places = pa.table({"validator": pa.array(versions, pa.string())})
            yield to_items(rows, np.arange(rows.num_rows + 1), pa.schema([]), places)

    return pa.schema([]), items(), ()


def _read_tars(
    found: Found, options: InventoryOptions, state: Storage, spread: shards.Spread | None
) -> Items:
    carried = pa.schema([shards.MEMBERS.field("key")])

    def items() -> Iterator[pa.Table]:
        for rows in shards.list_members(found.files, state, all_files=options.all_files, spread=spread):
            offsets = np.arange(rows.num_rows + 1)
            yield to_items(rows.select(["uri", "key"]), offsets, carried, rows.drop_columns(["uri", "key"]))

    return carried, items(), found.files


def _read_table(found: Found, options: InventoryOptions, folder: Path, strays: Strays) -> Items:
    uris = [file.uri for file in found.files]
    schema = tables.schema_of(uris)
    if column := _payload_column(schema, options):
        return _read_embedded(found, schema, column, options)
    columns = choose_columns(schema, options)

    def batches(names: Sequence[str]) -> Iterator[pa.RecordBatch]:
        return tables.read_batches(uris, schema, names)

    def read() -> Iterator[pa.RecordBatch]:
        return (columns.pick(batch) for batch in batches(columns.names))

    def read_uris() -> Iterator[pa.RecordBatch]:
        keys = Columns({"uri": columns.source["uri"]}, pa.schema([]))
        for batch in batches(keys.names):
            picked = keys.pick(batch)
            strays.count(picked.column(0), _containers(picked.column(0), found.base))
            yield picked
        strays.refuse_many()  # before anything is written

    def items() -> Iterator[pa.Table]:
        for rows, offsets in dedupe.group_rows(read, read_uris, folder):
            firsts = pa.array(offsets[:-1])
            places = {
                "container": _containers(rows["uri"].take(firsts), found.base),
                "validator": _find_validators(rows).take(firsts),
            }
            yield to_items(rows, offsets, columns.carried, pa.table(places))

    return columns.carried, items(), ()


def _find_validators(rows: pa.Table) -> pa.Array:
    """What the rows say that changes with the bytes: the ETag, else time and size of the last change."""
    missing = pa.nulls(rows.num_rows, pa.string())

    def text(name: str) -> pa.Array:
        if name not in rows.column_names or pa.types.is_nested(rows.schema.field(name).type):
            return missing
        found = pc.cast(rows[name].combine_chunks(), pa.string(), safe=False)
        return pc.if_else(pc.equal(found, ""), missing, found)

    modified = pc.binary_join_element_wise(text("last_modified"), text("size"), " size ")
    found = pc.coalesce(pc.binary_join_element_wise("etag ", text("etag"), ""), modified)
    return found.combine_chunks() if isinstance(found, pa.ChunkedArray) else found


def _payload_column(schema: pa.Schema, options: InventoryOptions) -> str | None:
    """The column of images: the one named, or the only one of a table that has no URIs."""
    if name := options.image_column:
        if name not in schema.names or not tables.is_payload(schema.field(name).type):
            raise InputError(f"--image-column {name} is no column of binaries; there are: {schema.names}")
        return name
    if "uri" in schema.names or "uri" in options.rename.values():
        return None
    return tables.find_image_column(schema)


def _read_embedded(found: Found, schema: pa.Schema, column: str, options: InventoryOptions) -> Items:
    """One item per row, whether or not two hold the same bytes: they are told apart without opening them."""
    described = schema.remove(schema.get_field_index(column))
    path = f"{column}_path"
    if (
        tables.has_paths(schema, column) and path not in described.names
    ):  # the caller's own column comes first
        described = described.append(pa.field(path, pa.string()))
    if "uri" not in described.names:
        described = described.append(pa.field("uri", pa.string()))
    columns = choose_columns(described, options)

    def items() -> Iterator[pa.Table]:
        for uri in (file.uri for file in found.files):
            for start, n_rows, others in tables.read_other_columns(uri, described, column, path):
                numbers = np.arange(start, start + n_rows)
                places = {"container": [uri] * n_rows, "offset": numbers, "payload_column": [column] * n_rows}
                rows = _named(others, uri, numbers, columns)
                yield to_items(rows, np.arange(n_rows + 1), columns.carried, pa.table(places))

    return columns.carried, items(), found.files


def _named(others: dict[str, pa.Array], file_uri: str, numbers: np.ndarray, columns: Columns) -> pa.Table:
    """A file's rows by the plan's names; the URI of a row that gives none is `<file>#<row>`."""
    text = pa.array(numbers).cast(pa.string())
    places = pc.binary_join_element_wise(file_uri, text, "#")
    given = others.get(columns.source["uri"])
    uris = places if given is None else pc.coalesce(_text(given), places)
    arrays = {new: others[old] for new, old in columns.source.items() if new != "uri" and old in others}
    if "image_id" in arrays:
        arrays["image_id"] = _key(arrays["image_id"], "image_id")
    return pa.table({"uri": uris, **arrays})


def _key(column: pa.Array, name: str) -> pa.Array:
    """A key as text. A missing URI is an empty one, whose row says `invalid_uri`; a blank id is the URI."""
    text = _text(column)
    if name == "uri":
        return pc.fill_null(text, "")
    return pc.if_else(pc.equal(text, ""), pa.scalar(None, pa.string()), text)


def _text(column: pa.Array) -> pa.Array:
    """The column as strings, U+FFFD for bytes that are not UTF-8: Parquet and JSON files may hold any."""
    text = column.cast(pa.string())
    try:
        text.validate(full=True)
    except pa.ArrowInvalid:
        values = (value.as_buffer() for value in text.cast(pa.binary()))
        decoded = [None if value is None else value.to_pybytes().decode(errors="replace") for value in values]
        return pa.array(decoded, pa.string())
    return text


def to_items(
    rows: pa.Table, offsets: np.ndarray, carried: pa.Schema, places: pa.Table | None = None
) -> pa.Table:
    """Rows, grouped by `offsets`, as items of the plan without their numbers.

    Args:
        rows: `uri`, and any of `image_id` and the columns of `carried`, whatever those are called.
        offsets: item i is rows offsets[i] to offsets[i + 1]; its URI is that of the first of them.
        places: for each item, the columns of `LOCATION` that say where its bytes are, if not at its URI.
    """
    rows = rows.combine_chunks()
    firsts = pa.array(offsets[:-1])
    located = {} if places is None else dict(zip(places.column_names, places.columns, strict=True))
    located["uri"] = rows["uri"] if len(firsts) == rows.num_rows else rows["uri"].take(firsts)
    arrays = [located.get(field.name, pa.nulls(len(firsts), field.type)) for field in list(LOCATION)[1:]]
    fields = [pa.field("image_id", pa.string()), *carried]
    children = [_column(rows, field) for field in fields]
    struct = pa.StructArray.from_arrays(children, fields=fields)
    lists = pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), struct)
    return pa.table([*arrays, lists], schema=pa.schema(list(item_schema(carried))[1:]))


def _column(rows: pa.Table, field: pa.Field) -> pa.Array:
    # pyarrow 26 takes too few rows of a chunked column of type null.
    if field.name not in rows.column_names or pa.types.is_null(field.type):
        return pa.nulls(rows.num_rows, field.type)
    column = rows[field.name]
    return column.combine_chunks() if column.num_chunks != 1 else column.chunk(0)


def _containers(uris: pa.Array, base: str) -> pa.Array:
    """Where relative URIs are, which start at the table's folder; null for the others."""
    path = pc.match_substring_regex(uris, r"^(/|~/|$)")
    # Without the white space around it, as fetching takes a URL that was copied from a page.
    url = pc.match_substring_regex(pc.utf8_trim_whitespace(uris), ABSOLUTE, ignore_case=True)
    joined = pc.binary_join_element_wise(base, uris, "/")
    return pc.if_else(pc.or_(path, url), pa.scalar(None, pa.string()), joined)


def choose_columns(schema: pa.Schema, options: InventoryOptions) -> Columns:
    """Apply renames and drops and check what is left.

    Raises:
        InputError: a column is missing, ambiguous, or has a name of the predictions table.
    """
    unknown = sorted({*options.rename, *options.drop_columns} - set(schema.names))
    if unknown:
        raise InputError(
            f"no column {', '.join(unknown)} to rename or drop; there are: {', '.join(schema.names)}"
        )
    kept = [name for name in schema.names if name not in options.drop_columns]
    names = [options.rename.get(name, name) for name in kept]
    _check_names(names, schema.names)
    source = dict(zip(names, kept, strict=True))
    for key in KEYS:
        if key in source:
            _check_key(key, schema.field(source[key]))
    carried = pa.schema([schema.field(old).with_name(new) for new, old in source.items() if new not in KEYS])
    return Columns(source, carried)


def _check_names(names: Sequence[str], given: Sequence[str]) -> None:
    if "uri" not in names:
        raise InputError(
            f"the inventory has no column uri; it has: {', '.join(given)}. Name one with --rename COLUMN=uri"
        )
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise InputError(f"two columns are called {', '.join(repeated)}; rename or drop one of them")
    # Readers such as DuckDB and Spark do not tell STATUS from status.
    taken = sorted(name for name in names if name not in KEYS and name.lower() in RESERVED)
    if taken:
        remedies = " ".join(f"--rename {name}=source_{name}" for name in taken)
        raise InputError(
            f"the predictions table and its parts have columns called {', '.join(taken)} of their own: "
            f"use {remedies} or --drop-columns {','.join(taken)}"
        )


def _check_key(key: str, field: pa.Field) -> None:
    kind = field.type.value_type if pa.types.is_dictionary(field.type) else field.type
    textual = pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_null(kind)
    if textual or (key == "image_id" and pa.types.is_integer(kind)):
        return
    raise InputError(f"column {field.name} is of type {field.type}, and {key} must be text")


READERS: dict[str, Callable[[Found, InventoryOptions, Path, Strays], Items]] = {
    "images": _read_images,
    "table": _read_table,
}
