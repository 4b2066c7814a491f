"""WebDataset tar shards with labels -> where each image is in its shard, and its label.

A sample is the files of one name: the image, and its label in `.cls` (text: an index or a name) or in `.json`
(an object with the label's field). Images stay packed; they are fetched by their byte ranges.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pipelines.datasets.pixels import fetcher
from pipelines.fetch.source import LOCATION, Source
from pipelines.images.formats import is_image_name
from pipelines.inventory import shards
from pipelines.messages import InputError, redact


def read_samples(uri: str, label_names: Sequence[str]) -> tuple[dict[str, list[Any]], list[Any]]:
    """The location of each image of a shard, column by column, and its label as written, None without one.

    Args:
        label_names: fields of a `.json` file that may hold the label, the preferred one first.

    Raises:
        InputError: the shard is damaged or has no image, or a label cannot be read.
    """
    members = shards.members_of(uri, all_files=True)
    rows = members.to_pylist()
    images = [row for row in rows if is_image_name(row["uri"])]
    if not images:
        raise InputError(f"{redact(uri)} holds no image")
    described = [row for row in rows if row["uri"].endswith((".cls", ".json"))]
    labels = dict(_read_labels(described, label_names))
    return (
        {name: [row.get(name) for row in images] for name in LOCATION},
        [labels.get(row["key"]) for row in images],
    )


def _read_labels(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> Iterator[tuple[str, Any]]:
    sources = [Source(row["uri"], row["container"], row["offset"], row["length"]) for row in rows]
    for index, fetched in fetcher().fetch_many(sources):
        uri = rows[index]["uri"]
        if fetched.payload is None:
            raise InputError(f"the label {redact(uri)} cannot be read: {fetched.status} {fetched.error}")
        yield rows[index]["key"], _parse(uri, bytes(fetched.payload), names)


def _parse(uri: str, payload: bytes, names: Sequence[str]) -> Any:
    try:
        if uri.endswith(".cls"):
            return payload.decode().strip()
        content = json.loads(payload)
    except ValueError as error:
        raise InputError(f"the label {redact(uri)} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise InputError(f"the label {redact(uri)} is {type(content).__name__}; it must be a JSON object")
    return next((content[name] for name in names if name in content), None)
