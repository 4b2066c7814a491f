"""The labels of a table's rows: which columns hold them, and what their values mean.

Whole numbers are indices of the names that a Hugging Face dataset stores; labels stay text otherwise.
"""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.datasets.errors import DatasetError
from pipelines.datasets.settings import Columns
from pipelines.inventory import tables
from pipelines.messages import redact
from pipelines.storage.storage import open_input

UNLABELLED = ("-1", "-1.0")
"""How Hugging Face datasets mark an image without a label, as in public test splits; -1.0 is by pandas."""
ONE_HOT = {"0": False, "0.0": False, "false": False, "": False, "1": True, "1.0": True, "true": True}
LABEL_SEPARATOR = "|"
"""Between the labels of one image where a table has no list type (CSV)."""

Labels = Sequence[list[str] | None]


def read_labels(
    uri: str, raw: pa.Table, label_columns: Sequence[str], columns: Columns
) -> tuple[Labels, bool]:
    """Each row's labels, and whether there can be several."""
    if not label_columns:
        return [None] * raw.num_rows, False
    if columns.one_hot:
        return [parse_one_hot(row, uri) for row in raw.select(label_columns).to_pylist()], True
    (column,) = label_columns
    several, names = allows_several(raw.schema, column), read_class_names(uri, column)
    return [parse_labels(value, names, several=several) for value in raw[column].to_pylist()], several


def find_label_columns(schema: pa.Schema, columns: Columns, uri: str) -> list[str]:
    """The column of the labels, or the one-hot ones.

    Raises:
        DatasetError: the table lacks it.
    """
    found = label_columns_of(schema, columns)
    if found:
        return found
    missing = next((name for name in columns.one_hot if name not in schema.names), columns.label)
    raise DatasetError(
        f"{redact(uri)} has no column {missing!r} among {', '.join(schema.names)}; name the column of the "
        "labels with --columns.label, or columns of 0 and 1 with --columns.one-hot"
    )


def label_columns_of(schema: pa.Schema, columns: Columns) -> list[str]:
    if columns.one_hot:
        return list(columns.one_hot) if set(columns.one_hot) <= set(schema.names) else []
    return [name for name in columns.label_names if name in schema.names][:1]


def allows_several(schema: pa.Schema, column: str) -> bool:
    """Whether an image can have several labels: a list, or a column `labels` of text."""
    kind = schema.field(column).type
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        return True
    return column == "labels" and bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def parse_labels(value: Any, names: Sequence[str] | None, *, several: bool) -> list[str] | None:
    """The labels of one image as text, integers by their names; None for an image without a label.

    Null and -1, also as text, mean that the label is not known; an empty list means that no label applies.
    """
    if isinstance(value, str) and several:
        value = [part.strip() for part in value.split(LABEL_SEPARATOR)]
    entries = value if isinstance(value, list) else [value]
    if any(map(is_unlabelled, entries)):
        return None
    texts = [_name_of(entry, names) for entry in entries if entry != ""]
    return texts if texts or several else None


def is_unlabelled(value: Any) -> bool:
    """Whether the value is null, NaN or -1, as a number or, as CSV has it, as text."""
    is_nan = isinstance(value, float) and math.isnan(value)
    return value is None or is_nan or str(value).strip() in UNLABELLED


def parse_one_hot(row: Mapping[str, Any], uri: str) -> list[str] | None:
    """The columns that hold 1; None where one of them is null or -1."""
    if any(map(is_unlabelled, row.values())):
        return None
    texts = {name: str(value).strip().lower() for name, value in row.items()}
    unknown = next((name for name, text in texts.items() if text not in ONE_HOT), None)
    if unknown:
        raise DatasetError(f"column {unknown!r} of {redact(uri)} holds {row[unknown]!r}; it must hold 0 or 1")
    return [name for name, text in texts.items() if ONE_HOT[text]]


def _name_of(value: Any, names: Sequence[str] | None) -> str:
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # pandas makes integers with nulls floats
    if names is None:
        return str(value)
    if not isinstance(value, int) or not 0 <= value < len(names):
        raise DatasetError(f"label {value} has no name; the dataset names {len(names)} labels, from 0 on")
    return str(names[value])


def read_class_names(uri: str, column: str) -> list[str] | None:
    """The names that a Hugging Face dataset stores for an integer label column."""
    if tables.format_of(uri) != "parquet":
        return None
    metadata = (pq.ParquetFile(open_input(uri)).schema_arrow.metadata or {}).get(b"huggingface")
    if metadata is None:
        return None
    try:
        feature = json.loads(metadata)["info"]["features"].get(column, {})
        feature = feature[0] if isinstance(feature, list) else feature.get("feature", feature)
        names = feature.get("names")
    except (ValueError, LookupError, TypeError, AttributeError) as error:  # JSON of any other shape
        raise DatasetError(
            f"the Hugging Face metadata of {redact(uri)} cannot be read: {type(error).__name__} {error}; "
            "write the file again with the datasets library, or without that metadata"
        ) from error
    return list(names) if names else None
