"""What the driver and a load actor have in hand at once, and what tasks read for the plan."""

import tarfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest

from jobs.engines import Choice, choose_spread
from pipelines.classify import on_ray
from pipelines.classify.steps import work_list
from pipelines.inventory.inventory import plan
from pipelines.inventory.plan import FoundFile
from pipelines.messages import InputError
from pipelines.storage.storage import open_storage


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


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_tars_are_read_in_tasks_and_a_damaged_one_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two tars a task, so that several are under way; what was found is not read again."""
    monkeypatch.setattr(on_ray, "SHARDS_AT_ONCE", 2)
    tars, state = tmp_path / "tars", open_storage(str(tmp_path / "state"))
    tars.mkdir()
    for number in range(40):
        with tarfile.open(tars / f"{number:02d}.tar", "w") as tar:
            tar.addfile(tarfile.TarInfo(f"{number:02d}.jpg"))
    whole = (tars / "39.tar").read_bytes()
    (tars / "39.tar").write_bytes(whole[:700])
    with pytest.raises(InputError, match=r"39\.tar cannot be read as a tar"):
        plan(str(tars), state, spread=on_ray.spread)
    assert len(list(state.list("plan/tars"))) == 39
    (tars / "39.tar").write_bytes(whole)
    frozen = plan(str(tars), state, spread=on_ray.spread)
    uris = frozen.read(0, frozen.n_items, ["uri"])["uri"].to_pylist()
    assert [uri[-6:] for uri in uris] == [f"{number:02d}.jpg" for number in range(40)]


@pytest.mark.parametrize(
    ("choice", "address", "spreads"),
    [("auto", "ray://head:10001", True), ("ray", "head:6379", True), ("local", "head:6379", False),
     ("auto", None, False), ("ray", None, False)],
)  # fmt: skip
def test_tars_are_planned_on_the_cluster_that_is_joined(
    choice: Choice, address: str | None, spreads: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Few tars, and local ones, by the driver all the same: this cluster is not there."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    spread = choose_spread(choice, address)
    assert (spread is not None) == spreads
    for files in ([FoundFile("s3://b/0.tar", 1, "")], [FoundFile(f"/b/{n}.tar", 1, "") for n in range(65)]):
        assert spread is None or list(spread(lambda file: file.uri, files)) == [file.uri for file in files]  # type: ignore[arg-type,return-value,comparison-overlap]
