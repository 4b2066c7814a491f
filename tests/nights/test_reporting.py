"""A night leaves its page and its verdict on drift; replaced pictures end it with exit code 3."""

import json
from pathlib import Path

import duckdb
import numpy as np
import pytest
from PIL import Image

from jobs.cli import main
from pipelines.nights import reporting
from tests.nights.conftest import Nights

PICTURES = 130


def draw(folder: Path, colour: tuple[int, int, int], seed: int) -> list[str]:
    """Distinct pictures of one colour."""
    folder.mkdir()
    rng = np.random.default_rng(seed)
    for at in range(PICTURES):
        pixels = np.clip(np.array(colour) + rng.integers(-20, 20, (20, 30, 3)), 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{at}.png")
    return sorted(str(path) for path in folder.glob("*.png"))


@pytest.fixture
def two_nights(nights: Nights, tmp_path: Path) -> Nights:
    """A published night of red pictures, and an inventory of green ones for the next."""
    nights.list_images(draw(tmp_path / "red", (230, 20, 20), 1))
    assert nights.make("2026-11-20") == 0
    nights.list_images(draw(tmp_path / "green", (20, 230, 20), 2))
    return nights


def state(nights: Nights, day: str) -> Path:
    return nights.table / "state" / f"run_date={day}"


def test_night_of_replaced_pictures_is_published_and_fails_with_the_flag(two_nights, capsys):
    assert two_nights.make("2026-11-21", "--fail-on-drift", "alarm", "--report-images", "6") == 3
    said = capsys.readouterr().out
    assert "drift alarm" in said
    assert said.endswith("/state/run_date=2026-11-21/report.html\n")
    assert (two_nights.table / "images" / "run_date=2026-11-21" / "_SUCCESS").exists()
    found = two_nights.report("2026-11-21")["drift"]
    assert found["level"] == "alarm"
    assert found["signals"][0]["movers"]
    page = (state(two_nights, "2026-11-21") / "report.html").read_text()
    assert "data:image/jpeg" in page
    assert "Night of 2026-11-21" in page
    assert two_nights.make("2026-11-21", "--fail-on-drift", "alarm") == 3, "the verdict is repeated"


def test_held_night_is_not_published_until_the_flag_is_gone(two_nights, capsys):
    assert two_nights.make("2026-11-21", "--hold-on-drift", "warning") == 3
    assert "nothing was published" in (said := capsys.readouterr().err)
    assert "--replace" in said
    assert not list((two_nights.table / "images").glob("run_date=2026-11-21/*"))
    assert two_nights.make("2026-11-21") == 0
    assert len(two_nights.rows("2026-11-21")) == PICTURES


def test_misspelt_column_of_drift_by_is_refused(nights, tmp_path, capsys):
    (uri,) = draw(tmp_path / "red", (230, 20, 20), 1)[:1]
    nights.list_images([uri], publisher=["p"])
    assert nights.make("2026-11-21", "--drift-by", "publsher") == 2
    assert "did you mean publisher?" in capsys.readouterr().err
    assert nights.make("2026-11-21", "--drift-by", "publisher") == 0


def test_classify_leaves_a_page_without_comparisons(nights, tmp_path):
    draw(tmp_path / "red", (230, 20, 20), 1)
    command = ["classify", "--inventory", str(tmp_path / "red"), "--bundle", str(nights.bundle)]
    for output, more in (("shown", []), ("plain", ["--report-images", "0"])):
        assert main([*command, "--output", str(tmp_path / output), *more]) == 0
        page = (tmp_path / output / "state" / "report.html").read_text()
        assert ("data:image/jpeg" in page) is (output == "shown")
        assert "last night" not in page
        assert json.loads((tmp_path / output / "state" / "report.json").read_text())["rows"] == PICTURES
    assert main(["verify", str(tmp_path / "shown")]) == 0


def break_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError("no room for the page")

    monkeypatch.setattr(reporting, "render_night", fail)


def test_page_that_fails_is_a_warning_and_made_by_the_same_command(
    two_nights: Nights, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with monkeypatch.context() as patched:
        break_pages(patched)
        assert two_nights.make("2026-11-21", "--fail-on-drift", "alarm") == 3
    assert "no room for the page" in caplog.text
    page = state(two_nights, "2026-11-21") / "report.html"
    assert not page.exists()
    for _ in range(2):
        assert two_nights.make("2026-11-21", "--fail-on-drift", "alarm") == 3
        assert "Night of 2026-11-21" in page.read_text()


def test_night_whose_drift_cannot_be_counted_is_published_with_a_warning(
    two_nights: Nights, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Only who asked for an exit code by the drift gets one for its failure."""

    def fail(*_: object, **__: object) -> None:
        raise duckdb.OutOfMemoryException("no memory left")

    with monkeypatch.context() as patched:
        patched.setattr(reporting, "count_night", fail)
        assert two_nights.make("2026-11-21", "--fail-on-drift", "alarm") == 1
        assert two_nights.make("2026-11-21") == 0
    assert "no memory left" in caplog.text
    assert len(two_nights.rows("2026-11-21")) == PICTURES
    assert two_nights.make("2026-11-21", "--fail-on-drift", "alarm") == 3
    assert (state(two_nights, "2026-11-21") / "report.html").exists()


def test_classify_makes_a_missing_page_when_it_is_repeated(
    nights: Nights, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    draw(tmp_path / "red", (230, 20, 20), 1)
    command = ["classify", "--inventory", str(tmp_path / "red"), "--bundle", str(nights.bundle)]
    command += ["--output", str(tmp_path / "out"), "--report-images", "0"]
    with monkeypatch.context() as patched:
        break_pages(patched)
        assert main(command) == 0
    assert "no room for the page" in caplog.text
    page = tmp_path / "out" / "state" / "report.html"
    assert not page.exists()
    assert main(command) == 0
    assert page.exists()
