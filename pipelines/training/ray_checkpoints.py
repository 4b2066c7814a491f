"""Ray Train's list of checkpoints, rebuilt from the checkpoints when a kill tore or lost it.

Ray 2.60 writes the list in place: cut off it stops every continuation, and without it a run would begin
anew. What each checkpoint was reported with stands in a file of its own (`checkpoints.write_report`).
"""

import json
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

from pipelines.storage import storage
from pipelines.training.checkpoints import REPORT_FILE

SNAPSHOT = "checkpoint_manager_snapshot.json"
"""Ray Train's name for its list."""


def mend(checkpoints_uri: str) -> None:
    """Leave a list that Ray can continue from; does nothing where there is one, or no whole checkpoint."""
    folder = storage.open_storage(checkpoints_uri)
    if folder.exists(SNAPSHOT) and is_json(folder.read(SNAPSHOT)):
        return
    lines = whole_checkpoints(folder)
    if lines:
        folder.put(SNAPSHOT, json.dumps(snapshot_of(lines)).encode())
    else:
        folder.delete(SNAPSHOT)


def whole_checkpoints(folder: storage.Storage) -> dict[str, dict[str, Any]]:
    """Name -> reported line of the checkpoints that have all their files whole, oldest first."""
    sizes = {entry.path: entry.size for entry in folder.list()}
    found = {}
    for path in sorted(sizes):
        name, _, file = path.rpartition("/")
        if file != REPORT_FILE or not is_json(text := folder.read(path)):
            continue
        report = json.loads(text)
        if all(sizes.get(f"{name}/{part}") == size for part, size in report["files"].items()):
            found[name] = report["line"]
    return found


def snapshot_of(lines: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
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


def is_json(text: bytes) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True
