"""How a table's files are named and what its `_SUCCESS` says. Pure, no I/O.

    PLAIN        part-00000.parquet, replaced in place by a rerun; `_SUCCESS` is empty, as Hadoop tools expect
    GENERATIONS  part-00000-g2.parquet, never rewritten; `_SUCCESS` is a JSON manifest of the files that
                 count, as S3A's committers write it

A night's rows have the column `carried_from` too.

A reader of a table of generations reads the files that the manifest lists, and the manifest again: if it is
unchanged, what was read is one generation, whole.
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from pipelines.ledger.entries import LedgerState, TableFile
from pipelines.schema import nights_schema, predictions_schema

SUCCESS = "_SUCCESS"
_FILE_NAME = re.compile(r"part-(?P<number>\d{5,})(-g(?P<generation>\d+))?\.parquet")


@dataclass(frozen=True)
class TableLayout:
    """The names, the marker and the columns of one kind of table."""

    name_file: Callable[[int, int], str]
    """File number and generation -> name."""
    encode_marker: Callable[[LedgerState], bytes]
    """Published state -> the bytes of `_SUCCESS`."""
    schema: Callable[[pa.Schema], pa.Schema]
    """The caller's carried columns -> the schema of every file."""
    complete: Callable[[pa.Table], pa.Table] = lambda rows: rows
    """Rows of a part -> the same rows with the results of earlier nights put in."""


def encode_manifest(state: LedgerState) -> bytes:
    """The generation, and each file that counts with its rows and sha256, by name."""
    files = [{"name": file.name, "rows": file.rows, "sha256": file.sha256} for file in sort_files(state)]
    return json.dumps(
        {"format_version": 1, "generation": state.generation, "files": files}, indent=1
    ).encode()


def decode_manifest(payload: bytes) -> Mapping[str, Any]:
    """The inverse of `encode_manifest`, for readers of a table of generations."""
    manifest: Mapping[str, Any] = json.loads(payload)
    return manifest


PLAIN = TableLayout(
    lambda number, generation: f"part-{number:05d}.parquet", lambda state: b"", predictions_schema
)
GENERATIONS = TableLayout(
    lambda number, generation: f"part-{number:05d}-g{generation}.parquet", encode_manifest, nights_schema
)


def detect_layout(names: Iterable[str]) -> TableLayout:
    """The layout that files of these names have."""
    return GENERATIONS if any(_is_of_layout(name, GENERATIONS) for name in names) else PLAIN


def sort_files(state: LedgerState) -> list[TableFile]:
    """The files that count, by name."""
    return sorted(state.files.values(), key=lambda file: file.name)


def rename_file(file: TableFile, generation: int, layout: TableLayout) -> str:
    """The name of the file that replaces this one in a later generation: the same in a plain table."""
    number, _ = _parse_name(file.name)
    return layout.name_file(number, generation)


def find_superseded(names: Iterable[str], state: LedgerState, layout: TableLayout) -> list[str]:
    """The names of earlier generations that no longer count; none in a plain table."""
    unlisted = [name for name in names if name not in state.files and _is_of_layout(name, layout)]
    return [name for name in unlisted if 0 < _parse_name(name)[1] < state.generation]


def _is_of_layout(name: str, layout: TableLayout) -> bool:
    return _FILE_NAME.fullmatch(name) is not None and layout.name_file(*_parse_name(name)) == name


def _parse_name(name: str) -> tuple[int, int]:
    """The number and the generation in a file's name; generation 0 if it has none."""
    found = _FILE_NAME.fullmatch(name)
    if found is None:
        raise ValueError(f"{name} is not the name of a table file")
    return int(found["number"]), int(found["generation"] or 0)
