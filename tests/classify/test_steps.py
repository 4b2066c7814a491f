"""Loading keeps plan order, stays within its memory and waits for no slow image."""

import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipelines.classify.steps import Loader, Source, work_list
from pipelines.fetch import load
from pipelines.fetch.settings import FetchLimits
from pipelines.inventory.inventory import plan
from pipelines.specs import DecodeLimits, ImageSpec
from pipelines.storage.places import place_of
from pipelines.storage.storage import open_storage
from tests.builders.fault_server import fault_server

MB = 1_000_000
BUDGET = 12 * MB
FETCH = FetchLimits(max_bytes=4 * MB, max_buffered_bytes=BUDGET, concurrency=16)
SPEC = ImageSpec(height=8, width=6)


def payload(number: int) -> bytes:
    """A bitmap of two megabytes in a shade of its own."""
    return b"BM" + bytes([number]) * (2 * MB)


@pytest.mark.parametrize("inside_a_table", [False, True])
def test_payloads_of_many_chunks_share_one_budget_until_they_are_decoded(
    tmp_path: Path, inside_a_table: bool
) -> None:
    """Eighty megabytes in eight chunks at once, twelve megabytes for them: all rows, in plan order."""
    inventory = tmp_path / "images"
    inventory.mkdir()
    if inside_a_table:
        table = pa.table({"image": [payload(number) for number in range(40)]})
        pq.write_table(table, inventory / "images.parquet", row_group_size=5)
        del table
    else:
        for number in range(40):
            (inventory / f"{number:02d}.bmp").write_bytes(payload(number))
    state = open_storage(str(tmp_path / "state"))
    plan(str(inventory), state)
    loader = Loader(Source(state.uri, SPEC, DecodeLimits(), FETCH))
    chunks = work_list([(0, 40)], items_per_batch=5)
    tracemalloc.start()
    with ThreadPoolExecutor(8) as threads:
        calls = [threads.submit(lambda at=at: list(loader(chunks.slice(at, 1)))) for at in range(8)]
        loaded = [table for call in calls for table in call.result(timeout=60)]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [row for table in loaded for row in table["item_id"].to_pylist()] == list(range(40))
    assert len({digest for table in loaded for digest in table["sha256"].to_pylist()}) == 40
    assert peak < BUDGET + 8 * 2 * MB * inside_a_table + 3 * MB
    memory = loader._fetcher._memory
    assert memory._small._free + memory._large._free == BUDGET
    loader._fetcher.close()


def test_pixels_and_reasons_lie_in_plan_order_whatever_arrives_first(tmp_path: Path) -> None:
    for number in range(20):
        Image.fromarray(np.full((9, 9, 3), number * 10, np.uint8)).save(tmp_path / f"{number:02d}.png")
    (tmp_path / "03.png").write_bytes(b"")
    state = open_storage(str(tmp_path / "state"))
    plan(str(tmp_path), state)
    (tmp_path / "05.png").unlink()
    loader = Loader(Source(state.uri, SPEC, DecodeLimits(), FETCH))
    (table,) = loader(work_list([(0, 20)], items_per_batch=20))
    loader._fetcher.close()
    expected = {3: "empty", 5: "not_found"}
    assert table["status"].to_pylist() == [expected.get(number, "ok") for number in range(20)]
    shades = [set(pixels) for pixels in table["pixels"].to_pylist()]
    assert shades == [{0 if number in expected else number * 10} for number in range(20)]


def test_slow_images_keep_no_others_waiting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One in each of the first batches, whose host sends nothing: they come last, in a table of their own."""
    slow = range(2, 24, 8)
    monkeypatch.setattr(load, "LATE_S", 1.0)
    with fault_server() as server:
        uris = [f"{server.url}/{'silent' if n in slow else 'image'}?{n}" for n in range(60)]
        pq.write_table(pa.table({"uri": uris}), tmp_path / "inventory.parquet")
        state = open_storage(str(tmp_path / "state"))
        plan(str(tmp_path / "inventory.parquet"), state)
        fetch = FetchLimits(read_timeout_s=3, max_attempts=1, allow_private_addresses=True)
        loader = Loader(Source(state.uri, SPEC, DecodeLimits(), fetch))
        batches = work_list([(0, 60)], items_per_batch=8)["ranges"].to_pylist()
        loaded = list(loader.load_ahead(batches, 8))
        loader.close()
    tables = [sorted(table["item_id"].to_pylist()) for table in loaded]
    assert tables[-1] == list(slow) and set(loaded[-1]["status"].to_pylist()) == {"timeout"}
    whole = {tuple(n for n in range(start, min(start + 8, 60)) if n not in slow) for start in range(0, 60, 8)}
    assert set(map(tuple, tables[:-1])) == whole, "a batch is a table"


def test_rows_outside_of_the_inventorys_places_are_not_read(tmp_path: Path) -> None:
    inside = [tmp_path / "own" / f"{number}.png" for number in range(30)]
    outside = [tmp_path / "secret.png", tmp_path / "own" / ".." / "secret.png"]
    (tmp_path / "own").mkdir()
    for path in (*inside, outside[0]):
        Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(path)
    uris = [*map(str, [*inside, *outside]), "../secret.png"]
    pq.write_table(pa.table({"uri": uris}), tmp_path / "own" / "inventory.parquet")
    state = open_storage(str(tmp_path / "state"))
    plan(str(tmp_path / "own" / "inventory.parquet"), state)
    for allow, status in (((), "blocked_address"), ((str(tmp_path),), "ok")):
        loader = Loader(Source(state.uri, SPEC, DecodeLimits(), replace(FETCH, allow=allow)))
        (table,) = loader(work_list([(0, 33)], items_per_batch=33))
        loader.close()
        assert table["status"].to_pylist() == ["ok"] * 30 + [status] * 3
        assert allow or f"--fetch.allow {place_of(str(outside[0]))}" in table["error"][31].as_py()


def test_bytes_of_a_local_file_that_is_no_image_are_not_told(tmp_path: Path) -> None:
    (tmp_path / "passwd.jpg").write_bytes(b"root:x:0:0:root:/root")
    state = open_storage(str(tmp_path / "state"))
    plan(str(tmp_path / "passwd.jpg"), state)
    loader = Loader(Source(state.uri, SPEC, DecodeLimits(), FETCH))
    (table,) = loader(work_list([(0, 1)], items_per_batch=1))
    loader.close()
    assert table["status"].to_pylist() == ["not_an_image"]
    assert "root" not in table["error"][0].as_py()
