"""What training keeps on disk besides the model: the state to continue from, and Ray's list of checkpoints.

The state of a run is one file, read without unpickling code.
"""

import json
import tempfile
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from pipelines.specs import ModelSpec
from pipelines.storage import storage
from pipelines.training import lora, model_files

MODEL_FOLDER = "model"
STATE_FILE = "state.pt"
REPORT_FILE = "report.json"
INDEX = "checkpoint_manager_snapshot.json"
"""Ray Train's name for its list of checkpoints."""


def report(line: Mapping[str, Any], state: Mapping[str, Any], *, model: Any, model_spec: ModelSpec) -> None:
    """Hand Ray Train metrics and a checkpoint: the state, and the model's folder where there is a model."""
    import ray.train

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        torch.save(dict(state), folder / STATE_FILE)
        if model is not None:
            model_files.write_model(lora.merge_adapters(model), folder / MODEL_FOLDER, model_spec)
        write_report(folder, line)
        ray.train.report(dict(line), checkpoint=ray.train.Checkpoint.from_directory(folder))


def report_metrics(line: Mapping[str, Any]) -> None:
    """What the other workers hand in when one reports a checkpoint: Ray waits for all."""
    import ray.train

    ray.train.report(dict(line))


def write_report(folder: Path, line: Mapping[str, Any]) -> None:
    """The last file of a checkpoint: the metrics reported with it, and the sizes that its files must have."""
    files = [file for file in folder.rglob("*") if file.is_file()]
    sizes = {str(file.relative_to(folder)): file.stat().st_size for file in files}
    (folder / REPORT_FILE).write_text(json.dumps({"line": dict(line), "files": sizes}))


def load_state(folder: Path, device: torch.device) -> dict[str, Any]:
    """The state in a checkpoint's folder, read without unpickling code."""
    state: dict[str, Any] = torch.load(folder / STATE_FILE, map_location=device, weights_only=True)
    return state


def repair_index(checkpoints_uri: str) -> None:
    """Leave a list that Ray can continue from; does nothing where there is one, or no whole checkpoint."""
    folder = storage.open_storage(checkpoints_uri)
    if folder.exists(INDEX) and _is_json(folder.read(INDEX)):
        return
    lines = _find_complete_checkpoints(folder)
    if lines:
        folder.put(INDEX, json.dumps(_build_index(lines)).encode())
    else:
        folder.delete(INDEX)


def _find_complete_checkpoints(folder: storage.Storage) -> dict[str, dict[str, Any]]:
    """Name -> reported line of the checkpoints that have all their files whole, oldest first."""
    sizes = {entry.path: entry.size for entry in folder.list()}
    found = {}
    for path in sorted(sizes):
        name, _, file = path.rpartition("/")
        if file != REPORT_FILE or not _is_json(text := folder.read(path)):
            continue
        report = json.loads(text)
        if all(sizes.get(f"{name}/{part}") == size for part, size in report["files"].items()):
            found[name] = report["line"]
    return found


def _build_index(lines: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Ray's list of these checkpoints, given from the oldest to the newest: the worst score first."""
    order = {name: index for index, name in enumerate(lines)}
    ranked = sorted(order, key=lambda name: lines[name]["score"])
    results = {
        name: {"version": 0, "checkpoint_dir_name": name, "metrics": dict(line)}
        for name, line in lines.items()
    }
    return {
        "ray_version": version("ray"),
        "checkpoint_results": [results[name] for name in ranked],
        "checkpoint_report_indices": [order[name] for name in ranked],
        "latest_checkpoint_result": results[list(order)[-1]],
        "pending_training_results": [],
        "pending_validation_specs": [],
        "current_report_index": len(order),
        "validated_checkpoint_dir_names": [],
        "timed_out_validation_checkpoint_dir_names": [],
        "failed_validation_checkpoint_dir_names": [],
    }


def _is_json(text: bytes) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True
