"""Classification with everything in a bucket: images, plan, ledger, table. Against any S3, see conftest."""

import os
import signal
import time
from collections import Counter
from pathlib import Path

import boto3
import numpy as np
import pyarrow.dataset as pads
import pytest
from PIL import Image

from jobs.cli import main
from pipelines.storage.storage import Storage, open_storage
from tests.builders.drivers import start
from tests.builders.flaky_proxy import FlakyProxy
from tests.builders.models import small_bundle

pytestmark = [pytest.mark.s3, pytest.mark.slow]


@pytest.fixture
def images(bucket: str, tmp_path: Path) -> str:
    """300 small pictures under `images/` of the bucket, and one object that is none."""
    storage = open_storage(f"{bucket}/images")
    rng = np.random.default_rng(0)
    path = tmp_path / "picture.png"
    for number in range(300):
        Image.fromarray(rng.integers(0, 255, (12, 16, 3), dtype=np.uint8)).save(path)
        storage.put(f"{number:04d}.png", path.read_bytes())
    storage.put("9999.png", b"no picture")
    return f"{bucket}/images"


@pytest.fixture
def bundle(bucket: str) -> str:
    small_bundle(f"{bucket}/bundle")
    return f"{bucket}/bundle"


def command(images: str, bundle: str, output: str, *settings: str) -> list[str]:
    return [
        "classify", "--inventory", images, "--bundle", bundle, "--output", output, "--retry-pause-s", "1",
        "--workers.items-per-part", "20", "--workers.items-per-batch", "20", "--commit-interval-s", "0.1",
        *settings,
    ]  # fmt: skip


def entries(state: Storage) -> int:
    return len(state.list("ledger"))


def statuses(output: str) -> Counter[str]:
    filesystem, path = open_storage(f"{output}/table").filesystem_and_path()
    table = pads.dataset(path, filesystem=filesystem, format="parquet").to_table(columns=["uri", "status"])
    assert len(set(table["uri"].to_pylist())) == table.num_rows
    return Counter(table["status"].to_pylist())


def test_a_run_in_a_bucket_survives_a_kill_and_a_second_driver(images, bundle, bucket):
    output = f"{bucket}/predictions"
    state = open_storage(f"{output}/state")
    arguments = command(images, bundle, output)
    first = start(arguments)
    while entries(state) < 3 and first.poll() is None:
        time.sleep(0.05)
    first.send_signal(signal.SIGKILL)
    first.communicate()
    drivers = [start(arguments), start(arguments)]
    errors = [driver.communicate(timeout=240)[1] for driver in drivers]
    codes = sorted(driver.returncode for driver in drivers)
    assert codes in ([0, 0], [0, 1]), errors
    if codes == [0, 1]:
        assert any("another driver" in text for text in errors), errors
    assert statuses(output) == {"ok": 300, "not_an_image": 1}
    assert main(["verify", output]) == 0
    assert main(arguments) == 0


def test_an_outage_of_the_server_is_ridden_out(images, bundle, bucket, s3_server):
    output = f"{bucket}/predictions"
    state = open_storage(f"{output}/state")
    with FlakyProxy(s3_server) as proxy:
        driver = start(command(images, bundle, output), AWS_ENDPOINT_URL=proxy.url)
        while entries(state) < 2 and driver.poll() is None:
            time.sleep(0.05)
        proxy.take_down()
        time.sleep(8)
        proxy.bring_back()
        _, errors = driver.communicate(timeout=240)
    assert driver.returncode == 0, errors
    assert statuses(output) == {"ok": 300, "not_an_image": 1}


def test_a_wrong_key_starts_nothing_and_is_not_shown(images, bundle, bucket):
    driver = start(
        command(images, bundle, f"{bucket}/out"),
        AWS_ACCESS_KEY_ID="nobody",
        AWS_SECRET_ACCESS_KEY="wrong-secret",
    )
    _, errors = driver.communicate(timeout=120)
    if driver.returncode == 0:
        pytest.skip("this S3 server checks no keys")
    assert driver.returncode in (1, 2)
    assert "wrong-secret" not in errors
    assert len(errors.strip().splitlines()) == 1, errors


def test_a_missing_bucket_is_one_sentence(bundle, bucket, capsys):
    assert main(command("s3://no-such-bucket-of-ours/images", bundle, f"{bucket}/out")) in (1, 2)
    message = capsys.readouterr().err
    assert "no-such-bucket-of-ours" in message
    assert len(message.strip().splitlines()) == 1


def test_a_missing_object_is_a_row(images, bundle, bucket, tmp_path):
    inventory = tmp_path / "in.csv"
    inventory.write_text(f"uri\n{images}/0000.png\n{images}/gone.png\n")
    driver = start(command(str(inventory), bundle, f"{bucket}/out", "--fetch.allow", f"{bucket}/images"))
    _, errors = driver.communicate(timeout=120)
    assert driver.returncode == 0, errors
    assert statuses(f"{bucket}/out") == {"ok": 1, "not_found": 1}
    client = boto3.client("s3", endpoint_url=os.environ["AWS_ENDPOINT_URL"])
    run = client.get_object(Bucket=bucket.removeprefix("s3://"), Key="out/state/run.json")["Body"].read()
    assert os.environ["AWS_SECRET_ACCESS_KEY"].encode() not in run
