"""A predictions folder that the version before left: refused in one paragraph, nothing touched."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.cli import main
from pipelines.ledger.entries import encode
from tests.builders.models import small_bundle


def write_old_folder(output: Path, *, published: bool) -> None:
    """What format 1 had: rows of the plan numbered by `row_id`, entries that a driver of then wrote."""
    plan = {
        "format_version": 1, "inventory": "photos.parquet", "fingerprint": "f" * 16, "hash": "a" * 64,
        "n_items": 1, "n_rows": 1, "carried": "", "files": [],
    }  # fmt: skip
    kinds = ["start", "parts", "close", "published"] if published else ["start"]
    files = {"plan/plan.json": json.dumps(plan).encode(), "run.json": b'{"identity": {}, "n_items": 1}'}
    previous = ""
    for number, kind in enumerate(kinds):
        driver = {"id": "d", "host": "old", "pid": 1}
        entry = {"format_version": 1, "number": number, "previous": previous, "kind": kind, "driver": driver}
        files[f"ledger/{number:06d}.json"], previous = encode(entry)
    for path, payload in files.items():
        (output / "state" / path).parent.mkdir(parents=True, exist_ok=True)
        (output / "state" / path).write_bytes(payload)
    if published:
        (output / "table").mkdir()
        pq.write_table(pa.table({"image_id": ["1"]}), output / "table" / "part-00000.parquet")
        (output / "table" / "_SUCCESS").touch()


@pytest.mark.parametrize("published", [False, True])
@pytest.mark.parametrize("job", ["classify", "classify --keep-plan", "classify --retry-failed", "verify"])
def test_a_folder_of_the_version_before_is_refused_in_one_paragraph(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], published: bool, job: str
) -> None:
    output = tmp_path / "predictions"
    write_old_folder(output, published=published)
    before = {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}
    name, *flags = job.split()
    if name == "classify":
        small_bundle(tmp_path / "bundle")
        pq.write_table(pa.table({"uri": ["a.jpg"]}), tmp_path / "photos.parquet")
        flags += ["--inventory", str(tmp_path / "photos.parquet"), "--bundle", str(tmp_path / "bundle")]
        arguments = [name, *flags, "--output", str(output)]
    else:
        arguments = [name, str(output)]
    assert main(arguments) == 2
    said = capsys.readouterr().err.strip()
    assert len(said.splitlines()) == 1
    assert "plan of format 1, written by another version of iab-vision" in said
    assert "another output folder" in said
    assert {path: path.read_bytes() for path in output.rglob("*") if path.is_file()} == before
