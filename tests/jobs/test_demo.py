"""The nights of the demo show what its text says of them."""

import json
from pathlib import Path

import pytest

from jobs import run_demo
from tests.builders.models import small_bundle


@pytest.mark.slow
def test_nights_show_carried_known_changed_and_removed_rows(tmp_path: Path) -> None:
    small_bundle(tmp_path / "bundle")
    run_demo.write_inventory(tmp_path)
    run_demo.make_nights(tmp_path)
    reports = sorted((tmp_path / "nights" / "state").glob("run_date=*/report.json"))
    first, second, third = (json.loads(path.read_text()) for path in reports)
    assert first["night"]["rows"]["tonight"] == first["rows"] == 126
    assert (second["night"]["rows"]["same_bytes"], second["night"]["images"]["removed"]) == (5, 4 + 5)
    assert (third["night"]["images"]["new"], third["night"]["images"]["changed"]) == (60, 6)
    assert third["night"]["rows"]["carried"] == third["rows"] - 66
    assert run_demo.pages(tmp_path)[-1].exists()
