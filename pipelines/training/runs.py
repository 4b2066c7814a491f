"""The run folder: whose it is, whether it is finished, and what `run.json` says.

`splits.parquet` and `recipe.json` are written first: which image is in which split, and what tells a
continuation from a mistake. `run.json` is written last and is the marker of a finished run.
No file here holds credentials.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from pipelines.datasets import splits
from pipelines.datasets.dataset import LabelledData
from pipelines.datasets.settings import DataSettings
from pipelines.machine import git_revision, package_versions
from pipelines.messages import InputError, first_line, redacted
from pipelines.storage import storage, uris
from pipelines.training.recipe import Recipe

RECIPE, MARKER, BEST, REPORT = "recipe.json", "run.json", "best", "report"
CHECKPOINTS, HISTORY, SPLITS = "checkpoints", "metrics.jsonl", "splits.parquet"


@dataclass(frozen=True)
class Run:
    """A finished run."""

    uri: str
    content: Mapping[str, Any]
    """What run.json says."""


def identity(recipe: Recipe, data: LabelledData) -> dict[str, Any]:
    """What makes two runs the same run."""
    names = (splits.TRAIN, splits.VALIDATION, splits.TEST)
    return {
        "recipe": asdict(recipe),
        "dataset": asdict(data.settings),
        "taxonomy": data.taxonomy.name,
        "classes": list(data.classes),
        "images": {name: len(data.indices(name)) for name in names},
        "assignment_sha256": _assignment_sha256(data),
    }


def _assignment_sha256(data: LabelledData) -> str:
    """Over every image's URI, classes and split, in order: equal settings may meet a changed dataset."""
    digest = hashlib.sha256()
    for row in zip(data.recorded_uris(), data.rows["classes"].to_pylist(), data.splits.tolist(), strict=True):
        digest.update((json.dumps(row) + "\n").encode())
    return digest.hexdigest()


def finished(output: str, recipe: Recipe, data: LabelledData) -> Run | None:
    """The run that is already complete in the folder; None when there is none, or one to continue.

    Raises:
        InputError: the folder holds a run, finished or not, of another recipe or dataset.
    """
    folder = storage.open_storage(output)
    if not folder.exists(RECIPE):
        return None
    refuse_mismatch(output, read_json(folder, RECIPE), identity(recipe, data))
    return Run(output, read_json(folder, MARKER)) if folder.exists(MARKER) else None


def read_json(folder: storage.Storage, name: str) -> dict[str, Any]:
    """The content of a JSON file of a run or a search.

    Raises:
        InputError: it is not JSON.
    """
    try:
        content: dict[str, Any] = json.loads(folder.read(name))
    except ValueError as error:
        raise InputError(
            f"{folder.uri}/{name} is not JSON ({error}); restore it, or give another folder"
        ) from error
    return content


def refuse_mismatch(output: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise InputError naming the first setting in which a folder's run differs from the one asked for."""
    expected = json.loads(as_json(now))
    different = next((key for key in expected if before.get(key) != expected[key]), None)
    if different is not None:
        raise InputError(
            f"{output} holds a run with another {different}: "
            f"{_difference(before.get(different), expected[different])}; "
            "give another --output, or the settings of that run to continue it. To train its best model "
            f"further: --model {uris.join(output, BEST)} and another --output"
        )


def _difference(before: Any, now: Any) -> str:
    """The first setting in which two nested values differ."""
    if isinstance(before, dict) and isinstance(now, dict):
        key = next(key for key in [*now, *before] if before.get(key) != now.get(key))
        return f"{key} {_difference(before.get(key), now.get(key))}"
    return f"was {before!r}, now {now!r}"


def begin(output: str, recipe: Recipe, data: LabelledData) -> None:
    """Claim the folder for this run."""
    folder = storage.open_storage(output)
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"uri": data.recorded_uris(), "split": data.rows["split"]}), sink)
    folder.put(SPLITS, sink.getvalue().to_pybytes())
    folder.put(RECIPE, as_json(identity(recipe, data)))


def run_folder(checkpoint_uri: str) -> str:
    """The run of a checkpoint given as the run itself or its `best/`."""
    return checkpoint_uri.rstrip("/").removesuffix(f"/{BEST}")


def recorded_data_settings(output: str) -> DataSettings | None:
    """The data settings that a run was given, without credentials; None where there is no run."""
    folder = storage.open_storage(output)
    return DataSettings(**read_json(folder, RECIPE)["dataset"]) if folder.exists(RECIPE) else None


def recorded_splits(output: str) -> dict[str, str] | None:
    """Recorded URI -> split of every image that a run was given; None where none are recorded.

    Of a file that was listed in several splits, ingest keeps the one that measures, and so does this.
    """
    folder = storage.open_storage(output)
    if not folder.exists(SPLITS):
        return None
    payload = folder.read(SPLITS)
    try:
        table = pq.read_table(pa.BufferReader(payload)).select(["uri", "split"])
    except (pa.ArrowException, OSError, KeyError) as error:  # OSError: a damaged footer
        raise InputError(f"{output}/{SPLITS} cannot be read: {first_line(error)}") from error
    found: dict[str, str] = {}
    for split in (splits.TRAIN, splits.VALIDATION, splits.TEST):
        of_split = table.filter(pa.compute.equal(table["split"], split))
        found.update(dict.fromkeys(of_split["uri"].to_pylist(), split))
    return found


def finish(output: str, content: Mapping[str, Any]) -> Run:
    """Write the marker."""
    whole = {
        **content,
        "git_revision": git_revision(),
        "versions": package_versions(),
    }
    storage.open_storage(output).put(MARKER, as_json(whole))
    return Run(output, whole)


def history(output: str) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl."""
    folder = storage.open_storage(output)
    text = folder.read(HISTORY).decode() if folder.exists(HISTORY) else ""
    return [json.loads(line) for line in text.splitlines()]


def as_json(content: Any) -> bytes:
    """Readable JSON without the credentials of the URIs in it."""
    plain = redacted(json.loads(json.dumps(content, default=str)))
    return (json.dumps(plain, indent=2, ensure_ascii=False) + "\n").encode()


def ray_storage(output: str) -> tuple[pafs.FileSystem, str]:
    """The folder as Ray Train and Ray Tune take it: a filesystem that they write to, and a path on it.

    Not the storage's own obstore one: its files refuse the buffers in which pyarrow writes (tried, obstore
    0.12). Listings are not cached, for other processes write here too.
    """
    if uris.is_local(output):
        return pafs.LocalFileSystem(), str(uris.local_path(output))
    filesystem, path = fsspec.core.url_to_fs(output, use_listings_cache=False)
    return pafs.PyFileSystem(pafs.FSSpecHandler(filesystem)), path
