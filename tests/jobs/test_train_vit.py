"""What `train` says when it is stopped."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from jobs import train_vit
from jobs.config import TrainConfig
from pipelines.messages import InputError, JobFailed, Stopped


@pytest.mark.parametrize("signal", [Stopped("SIGINT"), SystemExit(1), KeyboardInterrupt()])
@pytest.mark.parametrize(("epochs", "words"), [(4, "epochs 1 to 4 are kept"), (0, "no epoch was finished")])
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
        train_vit.trained(config, None)


def test_wrong_settings_are_found_before_the_dataset_is_read(tmp_path: Path) -> None:
    config = TrainConfig(
        dataset=str(tmp_path / "missing"), output=str(tmp_path), batch_size=64, num_workers=3
    )
    with pytest.raises(InputError, match="multiple of 3"):
        train_vit.run(config)
