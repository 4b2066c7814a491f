"""Read any accepted labelled input: one row per image with its labels as the dataset spells them.

An image folder, tables of files and labels (CSV, Parquet, JSON lines), or Hugging Face image Parquet. No
image is opened here, and labels stay text.
"""

import string
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import pyarrow as pa

from pipelines.datasets import splits, tars
from pipelines.datasets.errors import DatasetError
from pipelines.datasets.labels import Labels, find_label_columns, label_columns_of, parse_labels, read_labels
from pipelines.datasets.settings import Columns
from pipelines.images.formats import is_image_name
from pipelines.inventory import tables
from pipelines.inventory.listing import absolute
from pipelines.messages import redact
from pipelines.storage.storage import open_storage
from pipelines.storage.uris import join, split

IMAGE_COLUMNS = ("image", "img")
"""Names of a Parquet column of images; one of another name is found by its type."""
FILE_COLUMNS = ("uri", "file", "file_name")
METADATA_FILES = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
"""Tables in the folder of the images that they describe, as Hugging Face's ImageFolder has them."""
TAR = ".tar"
FOUND = pa.schema(
    [
        pa.field("uri", pa.string(), nullable=False),
        pa.field("container", pa.string()),
        pa.field("offset", pa.int64()),
        pa.field("length", pa.int64()),
        pa.field("payload_column", pa.string()),
        pa.field("labels", pa.list_(pa.string())),
        pa.field("split", pa.string()),
        pa.field("group", pa.string()),
        pa.field("slices", pa.map_(pa.string(), pa.string())),
    ]
)
"""One image as its dataset has it: where its bytes are (a `Source`), and its labels, null if unlabelled."""


def read(dataset_uri: str, columns: Columns) -> tuple[pa.Table, bool]:
    """Every image of the dataset in the schema FOUND, and whether an image can have several labels."""
    found, several = _read_all(absolute(dataset_uri), columns)
    if not columns.split:
        column = found.schema.get_field_index("split")
        found = found.set_column(column, FOUND.field("split"), pa.nulls(found.num_rows, pa.string()))
    return found, several


def _read_all(uri: str, columns: Columns) -> tuple[pa.Table, bool]:
    """The same with the splits that columns or the names of folders and files state."""
    paths = list_files(uri)
    found = paths if paths == [uri] else find_tables(paths, columns)
    refuse_missing_columns(uri, found, columns)
    if found:
        return _join([_read_file(path, columns, dataset_uri=uri) for path in found])
    return read_folder(uri, paths), False


def _read_file(uri: str, columns: Columns, *, dataset_uri: str) -> tuple[pa.Table, bool]:
    """One file of the dataset; metadata in a folder may lack the labels, which other metadata there has."""
    if uri.endswith(TAR):
        return read_tar(uri, columns)
    schema = tables.schema_of([uri])
    may_lack_labels = uri != dataset_uri and split(uri)[1] in METADATA_FILES
    find = label_columns_of if may_lack_labels else partial(find_label_columns, uri=uri)
    return read_table(uri, schema, columns, find(schema, columns))


def find_tables(paths: Sequence[str], columns: Columns) -> list[str]:
    """The files of a folder that say what its images are: metadata with labels, Parquet, or tars.

    Metadata of a public test split may lack the labels that the others have.
    """
    metadata = [path for path in paths if split(path)[1] in METADATA_FILES]
    if any(label_columns_of(tables.schema_of([path]), columns) for path in metadata):
        return metadata
    parquet = [path for path in paths if tables.format_of(path) == "parquet"]
    return parquet or [path for path in paths if path.endswith(TAR)]


def refuse_missing_columns(uri: str, files: Sequence[str], columns: Columns) -> None:
    """Raise DatasetError for a column that a setting names and none of the files has.

    Tars have no columns, nor has a folder without tables. A default or empty name asks for nothing;
    `columns.label` may name a field of a tar's `.json`, and a table is checked for it where it is read.
    """
    default = Columns()
    asked = {
        "columns.label": set() if files else {columns.label} - {default.label},
        "columns.one_hot": set(columns.one_hot),
        "columns.split": {columns.split} - {default.split, ""},
        "columns.group": {columns.group} - {default.group, ""},
        "slices": set(columns.slices),
    }
    if not any(asked.values()):
        return
    there = [name for file in files if tables.format_of(file) for name in tables.schema_of([file]).names]
    for setting, names in asked.items():
        if missing := sorted(names.difference(there)):
            raise DatasetError(
                f"{redact(uri)} has no column {missing[0]!r}, which {setting} names; {_describe(there)}"
            )


def _describe(there: Sequence[str]) -> str:
    """What columns there are, or what to do where there are none."""
    if there:
        return f"its columns are {', '.join(dict.fromkeys(there))}"
    return "folders named by labels and tars have no columns: give a table of the images, or unset it"


def list_files(uri: str) -> list[str]:
    """The table itself, or every file in the folder but hidden ones, by name.

    Raises:
        DatasetError: there is nothing, or no folder and no table.
    """
    folder, name = split(uri)
    if (tables.format_of(name) or name.endswith(TAR)) and open_storage(folder).exists(name):
        return [uri]
    try:
        entries = open_storage(uri).list()
    except NotADirectoryError as error:
        endings = ", ".join(tables.SUFFIXES)
        raise DatasetError(
            f"{redact(uri)} is no folder, no tar and no table; tables end in {endings}"
        ) from error
    if not entries:
        raise DatasetError(
            f"{redact(uri)} does not exist or is empty; give a folder or a table of labelled images"
        )
    return sorted(join(uri, one.path) for one in entries if not one.is_hidden)


def _join(found: Sequence[tuple[pa.Table, bool]]) -> tuple[pa.Table, bool]:
    return pa.concat_tables([table for table, _ in found]), any(several for _, several in found)


def read_folder(root: str, paths: Sequence[str]) -> pa.Table:
    """`root/<label>/…`, or `root/<split>/<label>/…`; folders that begin with `.` or `_` are skipped."""
    images = [(path, path.removeprefix(root).strip("/").split("/")) for path in filter(is_image_name, paths)]
    images = [(path, parts) for path, parts in images if len(parts) > 1 and parts[0][0] not in "._"]
    has_splits = bool(images) and all(len(p) > 2 and p[0].lower() in splits.ALIASES for _, p in images)
    level = int(has_splits)
    images = [(path, parts) for path, parts in images if parts[level][0] not in "._"]
    if not images:
        raise DatasetError(
            f"{redact(root)} holds no images in folders named by their label; "
            "give a folder `<label>/image.jpg`, or the table that names the labels"
        )
    if not has_splits and all(parts[0].lower() in splits.ALIASES for _, parts in images):
        raise DatasetError(
            f"the folders of {redact(root)} are named by splits, and no {METADATA_FILES[0]} there has "
            "a column of labels; give `<split>/<label>/image.jpg`, or name that column by --columns.label"
        )
    return make_found(
        {"uri": [path for path, _ in images]},
        [[parts[level]] for _, parts in images],
        split=[parts[0] if has_splits else None for _, parts in images],
    )


def make_found(
    location: Mapping[str, Any], labels: Labels, *, split: Any = None, group: Any = None, slices: Any = None
) -> pa.Table:
    """A table of the schema FOUND; columns that are missing are null."""
    given = {**location, "labels": labels, "split": split, "group": group, "slices": slices}
    columns = []
    for field in FOUND:
        values = given.get(field.name)
        if values is None:
            columns.append(pa.nulls(len(labels), field.type))
        else:
            columns.append(values if isinstance(values, pa.ChunkedArray) else pa.array(values, field.type))
    return pa.table(columns, FOUND)


def read_table(
    uri: str, schema: pa.Schema, columns: Columns, label_columns: Sequence[str]
) -> tuple[pa.Table, bool]:
    """A table of URIs and labels, or of image bytes and labels; whether it can have several per image.

    Without label columns its images are unlabelled, and belong to no slice.
    """
    slices = columns.slices if label_columns else ()
    wanted = {*label_columns, columns.split, columns.group, *FILE_COLUMNS, *parse_template(columns.file)}
    raw = read_columns(uri, schema, [name for name in schema.names if name in wanted.union(slices)])
    labels, several = read_labels(uri, raw, label_columns, columns)
    return make_found(
        locate(uri, schema, raw, columns),
        labels,
        split=text_of(raw, columns.split) or [split_of_path(uri)] * len(labels),
        group=text_of(raw, columns.group),
        slices=read_slices(uri, raw, slices),
    ), several


def read_slices(uri: str, raw: pa.Table, names: Sequence[str]) -> list[list[tuple[str, str]]] | None:
    """The columns to slice by and their values in each row; None where none is asked for."""
    columns = {name: text_of(raw, name) for name in names}
    if missing := [name for name, values in columns.items() if values is None]:
        raise DatasetError(f"{redact(uri)} has no column {missing[0]!r}, which slices names")
    values = zip(*(column.to_pylist() for column in columns.values() if column is not None), strict=True)
    return [list(zip(names, row, strict=True)) for row in values] if columns else None


def read_tar(uri: str, columns: Columns) -> tuple[pa.Table, bool]:
    """A WebDataset shard of images and labels, and whether an image can have several."""
    location, values = tars.read_samples(uri, columns.label_names)
    several = any(isinstance(value, list) for value in values)
    labels = [parse_labels(value, None, several=several) for value in values]
    return make_found(location, labels, split=[split_of_path(uri)] * len(labels)), several


def read_columns(uri: str, schema: pa.Schema, names: Sequence[str]) -> pa.Table:
    """These columns of all rows; image bytes, which may not fit in memory, are never among them."""
    wanted = pa.schema([schema.field(name) for name in names])
    return pa.Table.from_batches(tables.read_batches([uri], schema, names), wanted)


def text_of(raw: pa.Table, column: str) -> pa.ChunkedArray | None:
    """The column as text with null for the empty text, which is how CSV spells it; None without one."""
    if column not in raw.column_names:
        return None
    try:
        texts = raw[column].cast(pa.string())
    except pa.ArrowNotImplementedError as error:
        raise DatasetError(f"column {column!r} is {raw[column].type}; it must hold text") from error
    return pa.compute.if_else(pa.compute.equal(texts, ""), pa.scalar(None, pa.string()), texts)


def locate(uri: str, schema: pa.Schema, raw: pa.Table, columns: Columns) -> dict[str, Any]:
    """Where each image of a table is; a relative path is relative to the table."""
    image = find_image_column(schema)
    if image and not columns.file:
        n_rows = raw.num_rows
        return {
            "uri": [f"{uri}#{row}" for row in range(n_rows)],
            "container": [uri] * n_rows,
            "offset": list(range(n_rows)),
            "payload_column": [image] * n_rows,
        }
    names = build_file_names(uri, raw, columns)
    folder, _ = split(uri)
    return {"uri": [name if "://" in name or name.startswith("/") else join(folder, name) for name in names]}


def find_image_column(schema: pa.Schema) -> str | None:
    """The column with the images inside: `image`, `img`, or the only one of bytes in a table without files.

    A column of that name may also hold text.

    Raises:
        DatasetError: several columns hold bytes.
    """
    held = [field.name for field in schema if tables.is_payload(field.type)]
    named: str | None = next((name for name in IMAGE_COLUMNS if name in held), None)
    if named or not held or any(name in schema.names for name in FILE_COLUMNS):
        return named
    if len(held) > 1:
        raise DatasetError(f"columns {', '.join(held)} could all hold the images; name one of them `image`")
    return str(held[0])


def build_file_names(uri: str, raw: pa.Table, columns: Columns) -> list[str]:
    """Each image's path or URI, by the template or from the column that holds it."""
    if columns.file:
        missing = [name for name in parse_template(columns.file) if name not in raw.column_names]
        if missing:
            raise DatasetError(f"{columns.file!r} names {missing[0]!r}, which is no column of {redact(uri)}")
        return [columns.file.format_map(row) for row in raw.to_pylist()]
    column = next((name for name in FILE_COLUMNS if name in raw.column_names), None)
    if column is None:
        raise DatasetError(
            f"{redact(uri)} has no column {', '.join(map(repr, FILE_COLUMNS))} and no images inside; name "
            "one, or give a template such as `--columns.file 'images/{id}.jpg'`"
        )
    names = raw[column].to_pylist()
    if not all(names):
        empty = sum(not name for name in names)
        raise DatasetError(f"{empty} of {len(names)} rows of {redact(uri)} have no {column}")
    return [str(name) for name in names]


def parse_template(template: str) -> list[str]:
    """The columns that a template names.

    Raises:
        DatasetError: it is no template.
    """
    try:
        return [name for _, name, _, _ in string.Formatter().parse(template) if name]
    except ValueError as error:
        raise DatasetError(f"--columns.file {template!r}: {error}") from error


def split_of_path(uri: str) -> str | None:
    """`train` for `train-00000-of-00002.parquet` or `train/0000.parquet`, as Hugging Face names its files."""
    folder, name = split(uri)
    heads = (name.split("-")[0].split(".")[0].lower(), split(folder)[1].lower())
    return next((head for head in heads if head in splits.ALIASES), None)
