"""The caller's tables (Parquet, CSV, JSON lines) as a stream of record batches of one schema.

Values pass through untouched: CSV has only text, so its columns are strings exactly as written; JSON
keeps the types of its values, so that a time or a date stays text, and a number that does not fit int64 is a
double; Parquet keeps its Arrow types, except that extension types (UUID, JSON) become the types that they are
stored as. Memory is a few batches, whatever the table's size. Also here: which column of a Parquet table
holds images, and what the others say about them without reading one.
"""

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet as pq

from pipelines.messages import InputError, redact
from pipelines.storage.storage import open_input
from pipelines.storage.uris import file_name

SUFFIXES = {
    ".parquet": "parquet",
    ".csv": "csv",
    ".tsv": "csv",
    ".jsonl": "json",
    ".ndjson": "json",
}
"""Table formats by file name; the text formats may carry a further `.gz`."""

BATCH_ROWS = 65_536
BLOCK_BYTES = 8 << 20
"""Text parsed at a time: large enough to keep both parser threads busy, small against the plan."""


def format_of(uri: str) -> str | None:
    """`parquet`, `csv` or `json` by the file's name, else None."""
    name = file_name(uri).lower()
    suffix = "." + name.removesuffix(".gz").rsplit(".", 1)[-1]
    if name.endswith(".gz") and suffix == ".parquet":
        return None
    return SUFFIXES.get(suffix)


def schema_of(uris: Sequence[str]) -> pa.Schema:
    """The schema that all the files fit: columns of every file, numbers widened where files differ.

    Raises:
        InputError: a file cannot be read, or two files hold one column in types that do not mix.
    """
    schemas = [_file_schema(uri) for uri in uris]
    try:
        merged = pa.unify_schemas(schemas, promote_options="permissive")
    except (pa.ArrowTypeError, pa.ArrowInvalid) as error:
        raise InputError(
            f"the tables in the folder of {redact(uris[0])} do not fit together: {error}"
        ) from error
    missing = {field.name for field in merged if not all(field.name in schema.names for schema in schemas)}
    fields = [field.with_nullable(True) if field.name in missing else field for field in merged]
    return pa.schema([field.with_type(_storable(field.type)).remove_metadata() for field in fields])


def read_batches(uris: Sequence[str], schema: pa.Schema, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
    """The rows of all files in order, `columns` only, each batch cast to `schema` (of `schema_of`)."""
    wanted = pa.schema([schema.field(name) for name in columns])
    for uri in uris:
        with _naming(uri):
            for batch in _file_batches(uri, columns, schema):
                yield _fit(batch, wanted)


@contextmanager
def _naming(uri: str) -> Iterator[None]:
    """Report what pyarrow raises for a file that it cannot read as an `InputError` with the file's name."""
    try:
        yield
    except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError, OSError) as error:
        raise InputError(f"{redact(uri)} cannot be read as {format_of(uri)}: {error}") from error


def _storable(kind: pa.DataType, *, nested: bool = False) -> pa.DataType:
    """The same values in a type that pyarrow 26 can nest in Parquet and make empty tables of."""
    if isinstance(kind, pa.BaseExtensionType):
        return _storable(kind.storage_type, nested=nested)
    if pa.types.is_dictionary(kind) and nested:
        return _storable(kind.value_type, nested=True)
    if pa.types.is_struct(kind):
        return pa.struct([field.with_type(_storable(field.type, nested=True)) for field in kind])
    if pa.types.is_list(kind):
        return pa.list_(kind.value_field.with_type(_storable(kind.value_type, nested=True)))
    if kind == pa.string_view():
        return pa.large_string()
    return pa.large_binary() if kind == pa.binary_view() else kind


def _open_parquet(uri: str) -> pq.ParquetFile:
    """The file, read without the memory that buffering ahead takes, and without extension types.

    pyarrow 26 cannot make an empty table of the latter (UUID and JSON columns, as DuckDB writes them).
    """
    return pq.ParquetFile(
        open_input(uri), buffer_size=1 << 20, pre_buffer=False, arrow_extensions_enabled=False
    )


def _fit(batch: pa.RecordBatch, wanted: pa.Schema) -> pa.RecordBatch:
    if batch.schema.equals(wanted):
        return batch
    arrays = [
        batch.column(field.name).cast(field.type)
        if field.name in batch.schema.names
        else pa.nulls(batch.num_rows, field.type)
        for field in wanted
    ]
    return pa.RecordBatch.from_arrays(arrays, schema=wanted)


def _file_schema(uri: str) -> pa.Schema:
    kind = format_of(uri)
    with _naming(uri):
        if kind == "parquet":
            return _open_parquet(uri).schema_arrow.remove_metadata()
        if kind == "csv":
            return pa.schema([pa.field(name, pa.string()) for name in _csv_header(uri)])
        if kind == "json":
            return _json_schema(uri)
    raise InputError(f"{redact(uri)} is not a table: the name must end in one of {', '.join(SUFFIXES)}")


def _file_batches(uri: str, columns: Sequence[str], schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    kind = format_of(uri)
    if kind == "parquet":
        file = _open_parquet(uri)
        present = [name for name in columns if name in file.schema_arrow.names]
        return file.iter_batches(BATCH_ROWS, columns=present)  # type: ignore[no-any-return]
    if kind == "csv":
        return _csv_batches(uri, columns)
    return _json_batches(uri, columns, schema)


def _csv_header(uri: str) -> list[str]:
    with open_input(uri) as stream, _csv_reader(uri, stream, pa.csv.ConvertOptions()) as reader:
        names: list[str] = reader.schema.names
    repeated = {name for name in names if names.count(name) > 1}
    if repeated:
        raise InputError(
            f"{redact(uri)} names a column twice: {', '.join(sorted(repeated))}; rename one of them"
        )
    return names


def _csv_reader(uri: str, stream: pa.NativeFile, convert: pa.csv.ConvertOptions) -> pa.csv.CSVStreamingReader:
    tabs = file_name(uri).lower().removesuffix(".gz").endswith(".tsv")
    return pa.csv.open_csv(
        stream,
        read_options=pa.csv.ReadOptions(block_size=BLOCK_BYTES),
        parse_options=pa.csv.ParseOptions(delimiter="\t" if tabs else ",", newlines_in_values=True),
        convert_options=convert,
    )


def _csv_batches(uri: str, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
    names = _csv_header(uri)
    present = [name for name in columns if name in names]
    convert = pa.csv.ConvertOptions(
        column_types=dict.fromkeys(names, pa.string()), strings_can_be_null=False, include_columns=present
    )
    with open_input(uri) as stream, _csv_reader(uri, stream, convert) as reader:
        yield from reader


def _json_schema(uri: str) -> pa.Schema:
    """The types of the whole file: a first block that holds only nulls or whole numbers decides nothing."""
    merged = pa.schema([])
    for block in _lines(uri):
        inferred = pa.json.read_json(io.BytesIO(block)).schema
        found = pa.schema([field.with_type(_as_in_json(field.type)) for field in inferred])
        merged = pa.unify_schemas([merged, found], promote_options="permissive")
    return merged


def _as_in_json(kind: pa.DataType) -> pa.DataType:
    """The type, with text where pyarrow takes text for a moment: its zone would go, and a day gain a time."""
    if pa.types.is_temporal(kind):
        return pa.string()
    if pa.types.is_list(kind):
        return pa.list_(kind.value_field.with_type(_as_in_json(kind.value_type)))
    if pa.types.is_struct(kind):
        return pa.struct([field.with_type(_as_in_json(field.type)) for field in kind])
    return kind


def _json_batches(uri: str, columns: Sequence[str], schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    parse = pa.json.ParseOptions(
        explicit_schema=pa.schema([schema.field(name) for name in columns]),
        unexpected_field_behavior="ignore",
    )
    for block in _lines(uri):
        yield from pa.json.read_json(io.BytesIO(block), parse_options=parse).to_batches()


def _lines(uri: str) -> Iterator[bytes]:
    """Blocks of whole lines."""
    rest = b""
    with open_input(uri) as stream:
        while block := stream.read(BLOCK_BYTES):
            whole, newline, tail = (rest + block).rpartition(b"\n")
            rest = tail
            if whole.strip():
                yield whole + newline
    if rest.strip():
        yield rest


def find_image_column(schema: pa.Schema) -> str | None:
    """The column that holds images, or None.

    Raises:
        InputError: there are several.
    """
    found = [field.name for field in schema if is_payload(field.type)]
    if len(found) > 1:
        raise InputError(
            f"columns {', '.join(found)} could all hold the images: choose with --image-column NAME"
        )
    return found[0] if found else None


def is_payload(kind: pa.DataType) -> bool:
    """Whether values of the type can be encoded images: binary, or a struct with binary `bytes`."""
    if pa.types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0 and is_payload(kind.field("bytes").type)
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def has_paths(schema: pa.Schema, column: str) -> bool:
    """Whether the images come with their original file names, as Hugging Face keeps them."""
    index = schema.get_field_index(column)
    kind = schema.field(index).type if index >= 0 else pa.null()
    return bool(pa.types.is_struct(kind) and kind.get_field_index("path") >= 0)


def read_other_columns(
    uri: str, described: pa.Schema, column: str, path: str
) -> Iterator[tuple[int, int, dict[str, pa.Array]]]:
    """What a file says about its images, without reading one: first row, number of rows, columns.

    Args:
        described: the columns wanted, where the file has them.
        path: the name for the original file names of the images.
    """
    with _naming(uri):
        file = _open_parquet(uri)
        names = [name for name in described.names if name in file.schema_arrow.names and name != column]
        named = path in described.names and path not in names and has_paths(file.schema_arrow, column)
        leaves = [f"{column}.path"] if named else []
        if not names and not leaves:
            yield 0, file.metadata.num_rows, {}
            return
        start = 0
        for batch in file.iter_batches(BATCH_ROWS, columns=[*names, *leaves]):
            others = {name: batch.column(name).cast(described.field(name).type) for name in names}
            if leaves:
                others[path] = pc.struct_field(batch.column(column), "path").cast(pa.string())
            yield start, batch.num_rows, others
            start += batch.num_rows
