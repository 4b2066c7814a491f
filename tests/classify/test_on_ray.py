"""What the driver and a load actor have in hand at once, whatever the size of the inventory."""

from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest

from pipelines.classify import on_ray
from pipelines.classify.steps import work_list


def test_hundred_million_images_are_bounded_datasets_of_bounded_blocks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    datasets: list[list[int]] = []

    def build_dataset(batches: pa.Table, *_: Any) -> SimpleNamespace:
        blocks = on_ray.blocks_of(batches)
        datasets.append([block.num_rows for block in blocks])
        return SimpleNamespace(iter_batches=lambda **_: [batches])

    monkeypatch.setattr(on_ray, "build_dataset", build_dataset)
    batches = work_list([(0, 100_000_000)], 256)
    nothing: Any = None
    done = list(on_ray.run_dataflow(batches, nothing, nothing, nothing, nothing))
    assert pa.concat_tables(done).equals(batches)
    assert max(len(blocks) for blocks in datasets) <= 2_000
    assert max(rows for blocks in datasets for rows in blocks) * 256 <= 4_096
