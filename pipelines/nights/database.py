"""DuckDB over the Parquet files of a night, in bounded memory: what does not fit goes to a local folder."""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import duckdb

from pipelines.machine import cores
from pipelines.messages import JobFailed, first_line
from pipelines.storage.storage import Storage
from pipelines.storage.uris import is_local, local_path

MEMORY_LIMIT = "1GB"
MOST_THREADS = 4
"""Each thread holds buffers of its own, so that more of them would need more memory."""


@contextmanager
def open_workspace() -> Iterator[tuple[duckdb.DuckDBPyConnection, Path]]:
    """An empty database, and the temporary local folder that it spills to.

    Raises:
        JobFailed: a file cannot be read, as where a night is replaced or pruned meanwhile.
    """
    settings: dict[str, str | bool | int | float | list[str]] = {
        "memory_limit": MEMORY_LIMIT,
        "threads": min(MOST_THREADS, cores()),
        "preserve_insertion_order": False,
    }
    with (
        _explain_reading(),
        tempfile.TemporaryDirectory(prefix="iab-vision-night-") as folder,
        duckdb.connect(config={**settings, "temp_directory": folder}) as database,
    ):
        database.execute("SET TimeZone = 'UTC'")
        yield database, Path(folder)


@contextmanager
def _explain_reading() -> Iterator[None]:
    try:
        yield
    except duckdb.IOException as error:
        raise JobFailed(
            f"{first_line(error)}; if a night was replaced or pruned meanwhile, the same command works again"
        ) from error


def create_view(
    database: duckdb.DuckDBPyConnection, name: str, storage: Storage, paths: Sequence[str]
) -> None:
    """Make Parquet files of a storage the view `name`; there is at least one."""
    if is_local(storage.uri):
        files = [str(local_path(storage.uri) / path) for path in paths]
        quoted = ", ".join("'" + file.replace("'", "''") + "'" for file in files)
        database.execute(f"CREATE OR REPLACE VIEW {name} AS SELECT * FROM read_parquet([{quoted}])")
        return
    import pyarrow.dataset as pads  # brings pandas along, which local runs do not need

    filesystem, folder = storage.filesystem_and_path()
    found = pads.dataset([f"{folder.rstrip('/')}/{path}" for path in paths], filesystem=filesystem)
    database.register(name, found)
