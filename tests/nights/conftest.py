"""A bundle, a server of images, and the nightly command over them."""

import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from jobs.cli import main
from tests.builders.etag_server import EtagServer
from tests.builders.models import small_bundle


def picture(number: int) -> bytes:
    """One of many distinct pictures."""
    buffer = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 255, (20, 30, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, "png")
    return buffer.getvalue()


@dataclass
class Nights:
    """A table of nights."""

    folder: Path
    bundle: Path

    @property
    def table(self) -> Path:
        return self.folder / "nights"

    def command(self, day: str, *settings: str, inventory: str = "inventory.parquet") -> list[str]:
        pictures = [] if "--report-images" in settings else ["--report-images", "0"]
        return [
            "nightly", "--inventory", str(self.folder / inventory), "--bundle", str(self.bundle),
            "--table", str(self.table), "--date", day, "--retry-pause-s", "0.1",
            "--fetch.allow-private-addresses", "--fetch.max-attempts", "1", "--max-error-rate", "1",
            *pictures, *settings,
        ]  # fmt: skip

    def make(self, day: str, *settings: str) -> int:
        return main(self.command(day, *settings))

    def list_images(self, uris: list[str], **columns: list[object]) -> None:
        pq.write_table(
            pa.table({"uri": pa.array(uris, pa.string()), **columns}), self.folder / "inventory.parquet"
        )

    def rows(self, day: str) -> list[dict[str, object]]:
        """The rows of a night, by URI and image."""
        files = f"{self.table}/images/run_date={day}/*.parquet"
        found = duckdb.sql(f"SELECT * FROM read_parquet('{files}') ORDER BY uri, image_id")
        return found.to_arrow_table().drop_columns(["run_date"]).to_pylist()

    def results(self, day: str) -> list[dict[str, object]]:
        """The rows without what says when they were made."""
        varying = ("classified_at", "carried_from", "run_id")
        return [{name: row[name] for name in row if name not in varying} for row in self.rows(day)]

    def report(self, day: str) -> dict[str, object]:
        return json.loads((self.table / "state" / f"run_date={day}" / "report.json").read_text())

    def carried(self, day: str) -> dict[str, str | None]:
        """Where each URI's row comes from, as text."""
        return {row["uri"]: row["carried_from"] and str(row["carried_from"]) for row in self.rows(day)}


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundle") / "bundle"
    small_bundle(folder)
    return folder


@pytest.fixture
def nights(tmp_path: Path, bundle: Path) -> Nights:
    return Nights(tmp_path, bundle)


@pytest.fixture
def server() -> Iterator[EtagServer]:
    server = EtagServer()
    yield server
    server.close()
