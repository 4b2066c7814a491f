"""What `predict` prints on a terminal."""

import pytest

from jobs.predict_images import print_table

OK = {"status": "ok", "labels": [{"score": 0.5, "id": "483", "path": "Sports"}]}


def test_text_of_files_is_printed_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    """`:x:` is not an emoji, `[red]` is not a colour."""
    error = "starts with b'root:x:0:[red]"
    print_table([{"uri": "a:x:.jpg", "status": "not_an_image", "error": error, "labels": []}])
    shown = " ".join(capsys.readouterr().out.split())
    assert "a:x:.jpg" in shown and ":x:0:[red]" in shown


def test_long_paths_differ_on_a_narrow_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    folder = "/data/photos/of/a/publisher/by/sport/tennis"
    print_table([{**OK, "uri": f"{folder}/{name}.jpg"} for name in ("serve", "volley")])
    shown = capsys.readouterr().out
    assert "tennis/serve.jpg" in shown and "tennis/volley.jpg" in shown
