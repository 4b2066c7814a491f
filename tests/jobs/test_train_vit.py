"""What `train` says when it is stopped."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from jobs import train_vit
from jobs.config import TrainConfig
from pipelines.messages import InputError, JobFailed, Stopped
from pipelines.taxonomy import taxonomy


@pytest.mark.parametrize("signal", [Stopped("SIGINT"), SystemExit(1), KeyboardInterrupt()])
@pytest.mark.parametrize(
    ("epochs", "words"), [(4, "the model of epoch 4 is kept"), (0, "no epoch was finished")]
)
def test_a_stopped_run_says_what_is_kept(
    signal: BaseException, epochs: int, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextmanager
    def stopped(*_: object, **__: object) -> Iterator[None]:
        raise signal
        yield

    monkeypatch.setattr(train_vit.cluster, "ray_cluster", stopped)
    (tmp_path / "metrics.jsonl").write_text("".join(f'{{"epoch": {n + 1}}}\n' for n in range(epochs)))
    config = TrainConfig(dataset="images", output=str(tmp_path))
    with pytest.raises(JobFailed, match=f"{words}, and the same command continues"):
        train_vit.train(config, None)


def test_the_last_lines_say_what_can_be_published_and_what_comes_next(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    content = {
        "test": {"accuracy": 0.31},
        "best": {"epoch": 3},
        "recipe": {"epochs": 5, "target_precision": 0.9},
        "seconds": 60.0,
        "temperature": 1.2,
        "classes": ["518", "425"],
        "thresholds": {"518": 2.0, "425": 2.0, "483": 0.7, "422": 2.0},
    }
    train_vit.tell(content, TrainConfig(dataset="photos", output="run/"), taxonomy.load("3.1"))
    published, report, further = caplog.messages[-3:]
    assert published == "published at precision 0.90: 1 of 4 categories (Sports), 0 of the 2 classes"
    assert report.endswith("/run/report/report.html")
    assert further.startswith("next: iab-vision export --checkpoint ")


def test_wrong_settings_are_found_before_the_dataset_is_read(tmp_path: Path) -> None:
    config = TrainConfig(
        dataset=str(tmp_path / "missing"), output=str(tmp_path), batch_size=64, num_workers=3
    )
    with pytest.raises(InputError, match="multiple of 3"):
        train_vit.run(config)
