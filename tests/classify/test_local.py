"""The engine for one machine: back-pressure, failures and what it does not import."""

import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines.bundle.bundle import open_bundle
from pipelines.bundle.settings import RuntimeSpec
from pipelines.classify import local
from pipelines.classify.local import Channel
from pipelines.classify.steps import Model, Pools, Source, work_list
from pipelines.fetch.settings import FetchLimits
from pipelines.inventory.inventory import plan
from pipelines.ledger.parts import PartContext, read_result
from pipelines.specs import DecodeLimits
from pipelines.storage.storage import open_storage
from tests.builders.models import small_bundle


def test_a_full_channel_holds_its_writer_until_something_is_read() -> None:
    channel: Channel[int] = Channel(2, writers=1)
    sent = []

    def write() -> None:
        for number in range(5):
            channel.put(number)
            sent.append(number)
        channel.finish()

    writer = threading.Thread(target=write)
    writer.start()
    time.sleep(0.1)
    assert sent == [0, 1]
    assert list(channel) == [0, 1, 2, 3, 4]
    writer.join()


def test_a_channel_ends_when_its_last_writer_finished_and_fails_for_everyone() -> None:
    channel: Channel[int] = Channel(4, writers=2)
    channel.put(1)
    channel.finish()
    reader = iter(channel)
    assert next(reader) == 1
    channel.fail(OSError("disk full"))
    channel.fail(OSError("a later failure"))
    with pytest.raises(OSError, match="disk full"):
        next(reader)
    with pytest.raises(OSError, match="disk full"):
        channel.put(2)


class Dataflow:
    """A dataflow over ten pictures in two parts."""

    def __init__(self, folder: Path) -> None:
        images = folder / "images"
        images.mkdir()
        rng = np.random.default_rng(0)
        for number in range(10):
            pixels = rng.integers(0, 255, (20, 30, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(images / f"{number}.png")
        self.state = open_storage(str(folder / "state"))
        plan(str(images), self.state)
        small_bundle(folder / "bundle")
        self.bundle = open_bundle(str(folder / "bundle"))
        self.pools = Pools(1, 2, 1, 1, 0, items_per_batch=2, items_per_part=5, start_s=1)

    def run(self):
        source = Source(self.state.uri, self.bundle.spec.image_spec, DecodeLimits(), FetchLimits())
        model = Model(self.bundle.uri, self.bundle.manifest_sha256, RuntimeSpec(), 3)
        context = PartContext(self.state.uri, 1, "r", "m", "fp32", "t", 9, final=True)
        return local.run_dataflow(work_list([(0, 10)], 2), source, model, context, self.pools)


@pytest.fixture
def dataflow(tmp_path: Path) -> Dataflow:
    return Dataflow(tmp_path)


def test_every_item_is_in_exactly_one_part(dataflow: Dataflow) -> None:
    results = [read_result(row) for table in dataflow.run() for row in table.to_pylist()]
    items = [span for result in results for span in result.part.items]
    assert sorted(item for start, stop in items for item in range(start, stop)) == list(range(10))
    assert len(results) == 2


def test_a_failing_step_ends_the_dataflow_with_its_error(dataflow: Dataflow, monkeypatch) -> None:
    def fail(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("pipelines.ledger.parts.write_batch", fail)
    with pytest.raises(OSError, match="no space left"):
        list(dataflow.run())
    wait_for_threads()


def test_a_consumer_that_stops_ends_the_threads(dataflow: Dataflow) -> None:
    parts = dataflow.run()
    next(parts)
    parts.close()
    wait_for_threads()


def wait_for_threads() -> None:
    until = time.monotonic() + 20
    names = ("_load", "_infer", "_write")
    while any(thread.name in names for thread in threading.enumerate()):
        assert time.monotonic() < until, "threads of the dataflow go on"
        time.sleep(0.05)


def test_a_command_on_one_machine_imports_neither_ray_nor_torch(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    Image.new("RGB", (30, 20)).save(tmp_path / "images" / "a.png")
    small_bundle(tmp_path / "bundle")
    arguments = ["classify", "--inventory", str(tmp_path / "images"), "--bundle", str(tmp_path / "bundle"),
                 "--output", str(tmp_path / "out"), "--engine", "local"]  # fmt: skip
    code = (
        "import sys; from jobs.cli import main; code = main(sys.argv[1:]); "
        "heavy = ('ray', 'torch', 'transformers', 'sklearn', 'matplotlib'); "
        "print(code, [name for name in heavy if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "0 []"
