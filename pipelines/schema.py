"""The Arrow schemas that flow between the steps and out to readers.

Tables are built against these constants, never inferred, so a file in which every image failed has
the same types as any other. This module computes nothing. The values of `status` are in `status.py`.
"""

import pyarrow as pa

LABELS_TYPE = pa.list_(pa.struct([pa.field("id", pa.string()), pa.field("score", pa.float32())]))

OUTCOME = pa.schema(
    [
        pa.field("status", pa.string(), nullable=False),
        pa.field("error", pa.string()),
        pa.field("sha256", pa.string()),
        pa.field("width_px", pa.int32()),
        pa.field("height_px", pa.int32()),
        pa.field("format", pa.string()),
    ]
)
"""What became of the image's bytes."""

LABELLED = pa.schema(
    [
        pa.field("top_id", pa.string()),
        pa.field("top_score", pa.float32()),
        pa.field("labels", LABELS_TYPE),
        pa.field("tier1_id", pa.string()),
        pa.field("tier1_score", pa.float32()),
        pa.field("cat", pa.list_(pa.string())),
    ]
)
"""What the model says about it; null where the status is not `ok`."""

RESPONSE = pa.schema([pa.field("etag", pa.string()), pa.field("last_modified", pa.string())])
"""The server's validators of the bytes, for a conditional request another night; null where it sent none."""

LOADED = pa.schema(
    [
        pa.field("item_id", pa.int64(), nullable=False),
        *OUTCOME,
        *RESPONSE,
        pa.field("retry_after_s", pa.float64()),
    ]
)
"""load -> infer, with the column `pixels` of `pixels_type`; `item_id` is the image's number in the plan, and
`retry_after_s` the wait that its server asked for."""


def pixels_type(height: int, width: int) -> pa.DataType:
    """Fixed-size binary of height * width * 3 bytes: uint8 RGB in row-major [height, width, channel] order.

    A row whose status is not `ok` holds zeros there.
    """
    return pa.binary(height * width * 3)


SCORED = pa.schema([*LOADED, *LABELLED])
"""infer -> write: one row per item, before it is joined with the rows of the caller's table."""

PREDICTIONS_HEAD = pa.schema(
    [pa.field("image_id", pa.string(), nullable=False), pa.field("uri", pa.string(), nullable=False)]
)
PREDICTIONS_TAIL = pa.schema(
    [
        *OUTCOME,
        *LABELLED,
        pa.field("cattax", pa.int32(), nullable=False),
        pa.field("model_id", pa.string(), nullable=False),
        pa.field("precision", pa.string(), nullable=False),
        pa.field("taxonomy", pa.string(), nullable=False),
        pa.field("run_id", pa.string(), nullable=False),
        pa.field("classified_at", pa.timestamp("us", tz="UTC"), nullable=False),
    ]
)
ITEM_ID = "__item_id"
"""The item's id in a part; `item_id` itself may be a carried column of the caller's."""
PART_HEAD = pa.schema(
    [
        pa.field(ITEM_ID, pa.int64(), nullable=False),
        pa.field("__validator", pa.string()),
        *[field.with_name(f"__{field.name}") for field in RESPONSE],
    ]
)
"""What a part has in front of the table's columns: the item, what the inventory and the server say that tells
whether its bytes have changed."""
CARRIED_FROM = pa.field("carried_from", pa.date32())
"""The night that classified the image; null: the night that the row belongs to."""
RESERVED = frozenset([*PART_HEAD.names, *PREDICTIONS_HEAD.names, *PREDICTIONS_TAIL.names, CARRIED_FROM.name])
"""Column names that belong to the predictions table and its parts; a carried column may not take one."""


def predictions_schema(carried: pa.Schema) -> pa.Schema:
    """The schema of every file of `table/`: key columns, the caller's carried columns untouched, results."""
    return pa.schema([*PREDICTIONS_HEAD, *carried, *PREDICTIONS_TAIL])


def nights_schema(carried: pa.Schema) -> pa.Schema:
    """The schema of every file of a night: that of predictions, and where the row comes from."""
    return predictions_schema(carried).append(CARRIED_FROM)


def part_schema(carried: pa.Schema) -> pa.Schema:
    """The schema of every part: what it is published from, either way."""
    return pa.schema([*PART_HEAD, *nights_schema(carried)])
