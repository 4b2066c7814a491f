"""`taxonomy` finds categories by words of their paths."""

import pytest

from jobs.cli import main


def test_words_find_categories_with_their_ids(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["taxonomy", "auto", "racing"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines and all("auto" in line.casefold() and "racing" in line.casefold() for line in lines)
    assert main(["taxonomy"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 704


def test_words_that_find_nothing_are_wrong_input(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["taxonomy", "qwertz"]) == 2
    assert "no category of" in capsys.readouterr().err
