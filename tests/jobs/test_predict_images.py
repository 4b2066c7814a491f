"""What `predict` prints on a terminal."""

from pathlib import Path

import numpy as np
import pytest

from jobs.predict_images import PredictConfig, predict, print_table
from pipelines.messages import InputError
from tests.builders import models

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


def test_a_checkpoint_labels_images_as_its_bundle_does(tmp_path: Path) -> None:
    checkpoint = models.checkpoint(tmp_path / "best")
    picture = tmp_path / "picture.png"
    models.picture(1, np.random.default_rng(0)).save(picture)
    [row] = predict(PredictConfig(images=[str(picture)], checkpoint=str(checkpoint), top_k=3))
    assert (row["status"], len(row["labels"]), row["certified"]) == ("ok", 3, None)
    assert row["labels"][0]["id"] == row["top_id"]
    with pytest.raises(InputError, match="either --bundle or --checkpoint"):
        predict(PredictConfig(images=[str(picture)]))
    with pytest.raises(InputError, match=f"{tmp_path} is a folder.*--inventory"):
        predict(PredictConfig(images=[str(tmp_path)], checkpoint=str(checkpoint)))
