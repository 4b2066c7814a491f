"""Ray's list of checkpoints, torn or lost, is rebuilt so that the run goes on and its best epoch survives."""

import json
from pathlib import Path

import pytest
from ray.train.v2._internal.execution.checkpoint.checkpoint_manager import _CheckpointManagerState

from pipelines.training import checkpoints


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three whole checkpoints, the second the best, and a fourth that a kill cut off."""
    for number, score in enumerate((0.5, 0.9, 0.6, 0.7), 1):
        one = tmp_path / f"checkpoint_{number}"
        (one / "model").mkdir(parents=True)
        (one / "state.pt").write_bytes(b"s" * 100)
        (one / "model" / "model.safetensors").write_bytes(b"m" * 50)
        checkpoints.write_report(one, {"score": score, "epoch": number})
    (tmp_path / "checkpoint_4" / "model" / "model.safetensors").write_bytes(b"m" * 49)
    return tmp_path


@pytest.mark.parametrize("torn", ["", '{"checkpoint_results": [{"vers', None])
def test_a_torn_or_missing_list_is_rebuilt_with_the_best_and_the_newest_whole_checkpoint(folder, torn):
    file = folder / checkpoints.INDEX
    if torn is not None:
        file.write_text(torn)
    checkpoints.repair_index(str(folder))
    first = file.read_bytes()
    found = _CheckpointManagerState.parse_obj(json.loads(first))
    assert found.latest_checkpoint_result.checkpoint_dir_name == "checkpoint_3"
    best = found.checkpoint_results[-1]
    assert (best.checkpoint_dir_name, best.metrics) == ("checkpoint_2", {"score": 0.9, "epoch": 2})
    assert len(found.checkpoint_results) == 3 and found.checkpoint_report_indices == [0, 2, 1]
    file.write_text(torn or "")
    checkpoints.repair_index(str(folder))
    assert file.read_bytes() == first, "a second kill finds what the first did"


def test_a_whole_list_is_left_alone(folder):
    (folder / checkpoints.INDEX).write_text('{"checkpoint_results": []}')
    checkpoints.repair_index(str(folder))
    assert (folder / checkpoints.INDEX).read_text() == '{"checkpoint_results": []}'


def test_a_torn_list_without_a_whole_checkpoint_makes_way_for_a_new_start(tmp_path):
    (tmp_path / checkpoints.INDEX).write_text("")
    checkpoints.repair_index(str(tmp_path))
    assert not (tmp_path / checkpoints.INDEX).exists()
