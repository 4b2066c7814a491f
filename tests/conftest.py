"""What several test modules share: one Ray cluster, and the real photographs when they are there."""

from collections.abc import Iterator
from pathlib import Path

import pytest

SHARED = Path(__file__).resolve().parents[2] / "shared"


def shared_folder(name: str) -> Path:
    folder = SHARED / name
    if not folder.is_dir():
        pytest.skip(f"../shared/{name} is not beside this checkout")
    return folder


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
