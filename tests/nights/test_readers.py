"""Readers that go by `_SUCCESS` never see a mixture of publications, wherever the publisher is killed."""

import random
from pathlib import Path

import pytest

from jobs.cli import main
from tests.builders.publications import Publisher, publish_under_readers


@pytest.mark.slow
def test_readers_see_publications_whole_while_the_publisher_is_killed(tmp_path: Path, bundle: Path) -> None:
    publisher = Publisher(tmp_path, bundle, random.Random(0))
    readers = publish_under_readers(publisher, rounds=5)
    assert [reader.faults for reader in readers] == [[], [], []]
    assert all(reader.whole for reader in readers)
    assert publisher.kills
    assert main(["verify", str(publisher.table)]) == 0
