"""Read any accepted labelled input: one row per image with its labels as the dataset spells them.

An image folder, tables of files and labels (CSV, Parquet, JSON lines), or Hugging Face image Parquet. What
the labels mean is `datasets.py`'s part.
"""

import json
import posixpath
from collections.abc import Sequence
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet as pq

from pipelines.datasets import splits
from pipelines.datasets.settings import Columns
from pipelines.images.prepare import is_image_name
from pipelines.inventory.tables import is_payload

TABLE_SUFFIXES = (".csv", ".parquet", ".jsonl", ".json")
IMAGE_COLUMN = "image"
"""Column of Hugging Face image Parquet that holds the bytes."""
LABEL_SEPARATOR = "|"
"""Between the labels of one image where a table has no list type (CSV)."""

FOUND = pa.schema(
    [
        pa.field("uri", pa.string(), nullable=False),
        pa.field("container", pa.string()),
        pa.field("position", pa.int64()),
        pa.field("labels", pa.list_(pa.string()), nullable=False),
        pa.field("split", pa.string()),
        pa.field("group", pa.string()),
    ]
)
"""One image as its dataset has it; `container` and `position` are the Parquet file and row with its bytes."""


class DatasetError(ValueError):
    """The dataset cannot be trained on: what is wrong, and what to do."""


def read(dataset_uri: str, columns: Columns) -> tuple[pa.Table, bool]:
    """Every image of the dataset in the schema FOUND, and whether an image can have several labels."""
    found, several = read_all(dataset_uri, columns)
    if not columns.split:
        column = found.schema.get_field_index("split")
        found = found.set_column(column, FOUND.field("split"), pa.nulls(found.num_rows, pa.string()))
    return found, several


def read_all(dataset_uri: str, columns: Columns) -> tuple[pa.Table, bool]:
    """The same with the splits that columns or the names of folders and files state."""
    fs, path = fsspec.core.url_to_fs(dataset_uri)
    if not fs.exists(path):
        raise DatasetError(f"{dataset_uri} does not exist; give a folder or a table of labelled images")
    if not fs.isdir(path):
        return read_tables(fs, [path], columns)
    names = sorted(fs.find(path))
    tables = [name for name in names if name.endswith(".parquet")]
    if tables:
        return read_tables(fs, tables, columns)
    return read_folder(fs, path, names), False


def read_folder(fs: Any, root: str, names: Sequence[str]) -> pa.Table:
    """`root/<label>/…`, or `root/<split>/<label>/…`; folders that begin with `.` or `_` are skipped."""
    images = filter(is_image_name, names)
    paths = [(name, posixpath.relpath(name, root).split("/")) for name in images]
    paths = [(name, parts) for name, parts in paths if len(parts) > 1 and parts[0][0] not in "._"]
    has_splits = bool(paths) and all(len(p) > 2 and p[0].lower() in splits.ALIASES for _, p in paths)
    level = int(has_splits)
    paths = [(name, parts) for name, parts in paths if parts[level][0] not in "._"]
    if not paths:
        raise DatasetError(
            f"{root} holds no images in folders named by their label; "
            "give a folder `<label>/image.jpg`, or the table that names the labels"
        )
    return pa.table(
        {
            "uri": [fs.unstrip_protocol(name) for name, _ in paths],
            "container": pa.nulls(len(paths), pa.string()),
            "position": pa.nulls(len(paths), pa.int64()),
            "labels": [[parts[level]] for _, parts in paths],
            "split": [parts[0] if has_splits else None for _, parts in paths],
            "group": pa.nulls(len(paths), pa.string()),
        },
        schema=FOUND,
    )


def read_tables(fs: Any, paths: Sequence[str], columns: Columns) -> tuple[pa.Table, bool]:
    """Tables of URIs and labels, or of image bytes and labels."""
    found = [read_table(fs, path, columns) for path in paths]
    return pa.concat_tables([table for table, _ in found]), any(multi for _, multi in found)


def read_table(fs: Any, path: str, columns: Columns) -> tuple[pa.Table, bool]:
    raw = open_table(fs, path)
    label_column = "labels" if "labels" in raw.column_names else columns.label
    if label_column not in raw.column_names:
        raise DatasetError(f"{path} has no column {columns.label!r} among {', '.join(raw.column_names)}")
    if holds_images(raw.schema) and not columns.file:
        location = embedded(fs, path, raw.num_rows)
    else:
        location = located(fs, path, raw, columns)
    labels = label_lists(raw, label_column)
    split = raw[columns.split] if columns.split in raw.column_names else [split_of_name(path)] * len(labels)
    group = raw[columns.group] if columns.group in raw.column_names else pa.nulls(len(labels))
    table = pa.table(
        {
            **location,
            "labels": labels,
            "split": as_column(split),
            "group": without_empty(as_column(group)),
        },
        schema=FOUND,
    )
    return table, label_column == "labels"


def as_column(values: Any) -> Any:
    return pa.array(values, pa.string()) if isinstance(values, list) else values.cast(pa.string())


def without_empty(texts: Any) -> Any:
    """Null for the empty text, which is how CSV spells it."""
    return pa.compute.if_else(pa.compute.equal(texts, ""), pa.scalar(None, pa.string()), texts)


def open_table(fs: Any, path: str) -> pa.Table:
    """A CSV (every column as text: ids such as `007` survive), JSON-lines or Parquet table."""
    with fs.open(path, "rb") as file:
        try:
            if path.endswith(".csv"):
                header = file.readline().decode("utf-8-sig").strip().split(",")
                file.seek(0)
                types = {name.strip('"'): pa.string() for name in header}
                options = pa.csv.ConvertOptions(column_types=types, strings_can_be_null=False)
                return pa.csv.read_csv(file, convert_options=options)
            if path.endswith((".jsonl", ".json")):
                return pa.json.read_json(file)
            if path.endswith(".parquet"):
                return read_parquet(file)
        except pa.ArrowInvalid as error:
            raise DatasetError(f"{path} cannot be read as a table: {error}") from error
    raise DatasetError(f"{path} is no folder and no table; tables end in {', '.join(TABLE_SUFFIXES)}")


def read_parquet(file: Any) -> pa.Table:
    """Every column but image bytes, of which only the presence is kept: they may not fit in memory."""
    parquet = pq.ParquetFile(file)
    schema = parquet.schema_arrow
    if not holds_images(schema):
        return parquet.read()
    table = parquet.read(columns=[name for name in schema.names if name != IMAGE_COLUMN])
    absent = pa.nulls(table.num_rows, schema.field(IMAGE_COLUMN).type)
    return table.append_column(IMAGE_COLUMN, absent).replace_schema_metadata(schema.metadata)


def holds_images(schema: pa.Schema) -> bool:
    """Whether the table has the images inside; a column of that name may also hold text."""
    return IMAGE_COLUMN in schema.names and is_payload(schema.field(IMAGE_COLUMN).type)


def embedded(fs: Any, path: str, count: int) -> dict[str, Any]:
    container = fs.unstrip_protocol(path)
    return {
        "uri": [f"{container}#{row}" for row in range(count)],
        "container": [container] * count,
        "position": list(range(count)),
    }


def located(fs: Any, path: str, raw: pa.Table, columns: Columns) -> dict[str, Any]:
    """The URI of each image; a relative path is relative to the table."""
    folder = posixpath.dirname(path)
    if columns.file:
        try:
            names = [columns.file.format_map(row) for row in raw.to_pylist()]
        except KeyError as error:
            raise DatasetError(f"{columns.file!r} names {error}, which is no column of {path}") from error
    else:
        column = next((name for name in ("uri", "file") if name in raw.column_names), None)
        if column is None:
            raise DatasetError(
                f"{path} has no column `uri` or `file`; name one, or give a template such as "
                "`--columns.file 'images/{id}.jpg'`"
            )
        names = raw[column].to_pylist()
    uris = [
        name if "://" in name or name.startswith("/") else fs.unstrip_protocol(posixpath.join(folder, name))
        for name in names
    ]
    return {"uri": uris, "container": pa.nulls(len(uris)), "position": pa.nulls(len(uris))}


def label_lists(raw: pa.Table, column: str) -> list[list[str]]:
    """The labels of each row as text; integer labels of Hugging Face Parquet by their names."""
    names = class_names(raw.schema, column)
    values = raw[column].to_pylist()
    rows = [several(value) for value in values] if column == "labels" else [[value] for value in values]
    return [[names[v] if names else str(v) for v in row if v not in (None, "")] for row in rows]


def several(value: str | list[Any] | None) -> list[Any]:
    """One row's labels: a list, or a text of them with separators; none where it is null."""
    if isinstance(value, str):
        return [part.strip() for part in value.split(LABEL_SEPARATOR)]
    return value or []


def class_names(schema: pa.Schema, column: str) -> list[str] | None:
    """The names that a Hugging Face dataset stores for an integer label column."""
    metadata = (schema.metadata or {}).get(b"huggingface")
    features = json.loads(metadata)["info"]["features"] if metadata else {}
    feature = features.get(column, {})
    feature = feature.get("feature", feature) if isinstance(feature, dict) else {}
    names = feature.get("names")
    return list(names) if names else None


def split_of_name(path: str) -> str | None:
    """`train` for `train-00000-of-00002.parquet`, as Hugging Face names its files."""
    head = posixpath.basename(path).split("-")[0].split(".")[0].lower()
    return head if head in splits.ALIASES else None
