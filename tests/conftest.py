"""What several test modules share: one Ray cluster, an S3 server, the real photographs if they are there."""

import os
import uuid
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

hypothesis.settings.register_profile("untimed", deadline=None)  # a loaded machine is no failure
hypothesis.settings.load_profile("untimed")

MOTO_SECRET = "testing-secret"
"""Secret key for moto's server, by which tests know that nothing checks signatures."""

for name, value in {
    "OMP_NUM_THREADS": "1",  # threads that share a tiny tensor wait for each other, and at full speed
    "OMP_WAIT_POLICY": "PASSIVE",  # where training sets more
    "RAY_prestart_worker_first_driver": "0",  # else a process for each logical CPU at once, most for nothing
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # a process for each run, which watches for what never comes
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # how soon the end of a run, or of a worker, is noticed: 2 s
}.items():
    os.environ.setdefault(name, value)

SHARED = Path(__file__).resolve().parents[2] / "shared"


def shared_folder(name: str) -> Path:
    folder = SHARED / name
    if not folder.is_dir():
        pytest.skip(f"../shared/{name} is missing")
    return folder


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Say which tests stay in one process, and begin with what takes longest.

    Tests that start Ray are two groups, each with a cluster of its own: two cores carry no more. A slow test
    runs wherever there is time for it; the others stay with their file, which makes its fixtures once.
    """
    for item in items:
        if item.get_closest_marker("ray"):
            room = "training" if "training" in item.path.parts else "classification"
            item.add_marker(pytest.mark.xdist_group(f"ray-{room}"))
        elif not item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.xdist_group(f"{item.path.parent.name}/{item.path.stem}"))
    items.sort(key=lambda item: [item.get_closest_marker(name) is None for name in ("ray", "slow")])


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what needs a GPU where ONNX Runtime finds none."""
    if item.get_closest_marker("gpu"):
        from pipelines.bundle import providers

        try:
            providers.gpu_name(0)
        except providers.ProviderUnavailable as error:
            pytest.skip(str(error))


@pytest.fixture(scope="session")
def photos() -> Path:
    """5,611 real photographs in folders named by IAB id, with labels.csv."""
    return shared_folder("photos")


@pytest.fixture(scope="session")
def tricky() -> Path:
    """299 real broken or odd image files, with files.csv."""
    return shared_folder("tricky")


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """One Ray cluster on this machine for the whole session."""
    from jobs.cluster import quieten
    from jobs.cluster import ray_cluster as cluster

    quieten()
    with cluster(num_cpus=8):
        yield


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """Endpoint of the S3 server that the usual AWS variables name, else of moto's in a thread."""
    if endpoint := os.environ.get("AWS_ENDPOINT_URL"):
        yield endpoint
        return
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(port=0)
    server.start()
    host, port = server.get_host_and_port()
    settings = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": MOTO_SECRET,
        "AWS_REGION": "us-east-1",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ALLOW_HTTP": "true",
    }
    with pytest.MonkeyPatch.context() as environment:
        for name, value in settings.items():
            environment.setenv(name, value)
        yield settings["AWS_ENDPOINT_URL"]
    server.stop()


@pytest.fixture
def bucket(request: pytest.FixtureRequest) -> Iterator[str]:
    """URI of a bucket: a fresh one that is gone afterwards, or the one that IAB_VISION_TEST_BUCKET names."""
    if given := os.environ.get("IAB_VISION_TEST_BUCKET"):
        yield given
        return
    import boto3

    endpoint = request.getfixturevalue("s3_server")
    name = f"iab-vision-test-{uuid.uuid4().hex[:12]}"
    made = boto3.resource("s3", endpoint_url=endpoint).create_bucket(Bucket=name)
    yield f"s3://{name}"
    made.objects.all().delete()
    made.delete()
