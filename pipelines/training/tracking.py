"""What a training run reports while it runs: metrics.jsonl, TensorBoard, trackers, progress.

Only the leading worker writes. Storages cannot append, so files are written whole; after a restart the
history is the checkpoint's, and each evaluation is in it once.
"""

import hashlib
import importlib.util
import json
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self

from pipelines.messages import InputError, redact
from pipelines.storage import storage
from pipelines.training.runs import HISTORY

Line = dict[str, Any]
Listener = Callable[[Line], None]
POLL_S = 0.5
UPLOAD_EVERY_S = 30.0
"""Seconds between two copies of TensorBoard's file to the run folder, evaluations apart."""
NO_NUMBERS = ("epoch", "step")


def numbers(line: Line) -> dict[str, float]:
    """The curves of one line."""
    return {
        name: float(value)
        for name, value in line.items()
        if isinstance(value, (int, float)) and name not in NO_NUMBERS
    }


def refuse_missing(trackers: Sequence[str]) -> None:
    """Raise InputError before anything costly starts."""
    missing = [name for name in trackers if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(
            f"tracker {missing[0]} is not installed; pip install 'iab-vision[{missing[0]}]', or leave it out"
        )


class Tracker:
    """Owns the event writer and the trackers of one run."""

    def __init__(self, run_uri: str, trackers: Sequence[str], settings: dict[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.folder = Path(tempfile.mkdtemp(prefix="tensorboard-"))
        self.board = SummaryWriter(str(self.folder))
        self.storage = storage.open_storage(run_uri)
        self.logs = [TRACKERS[name](run_uri, settings) for name in trackers]
        self.uploaded = time.monotonic()

    def write(self, history: Sequence[Line]) -> None:
        """The whole history to metrics.jsonl, its last line to TensorBoard and the trackers."""
        text = "".join(json.dumps(line) + "\n" for line in history)
        self.storage.put(HISTORY, text.encode())
        self._log(numbers(history[-1]), history[-1]["step"])
        self._upload()

    def log_step(self, values: dict[str, float], step: int) -> None:
        """Curves of the training steps, named `train/…`."""
        self._log({f"train/{name}": value for name, value in values.items()}, step)
        if time.monotonic() - self.uploaded > UPLOAD_EVERY_S:
            self._upload()

    def _log(self, values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            self.board.add_scalar(name, value, step)
        for log in self.logs:
            log(values, step)

    def _upload(self) -> None:
        self.board.flush()
        for file in self.folder.iterdir():
            self.storage.put(f"tensorboard/{file.name}", file.read_bytes())
        self.uploaded = time.monotonic()


Log = Callable[[dict[str, float], int], None]


def _mlflow_log(run_uri: str, settings: dict[str, Any]) -> Log:
    """MLflow at MLFLOW_TRACKING_URI; a continued run goes on in the same MLflow run."""
    import mlflow

    run_uri = redact(run_uri)
    named = hashlib.sha256(run_uri.encode()).hexdigest()  # a filter has no way to say a quote in a path
    found = mlflow.search_runs(filter_string=f"tags.run_uri_sha256 = '{named}'", output_format="list")
    mlflow.start_run(
        run_id=found[0].info.run_id if found else None, tags={"run_uri": run_uri, "run_uri_sha256": named}
    )
    if not found:
        mlflow.log_params(settings)
    return lambda values, step: mlflow.log_metrics(
        {k.replace("@", "_at_"): v for k, v in values.items()}, step
    )


def _wandb_log(run_uri: str, settings: dict[str, Any]) -> Log:
    """Weights & Biases as its environment says; a continued run goes on under the same id."""
    import wandb

    run_uri = redact(run_uri)
    name = hashlib.sha256(run_uri.encode()).hexdigest()[:16]
    run = wandb.init(id=name, name=run_uri.rstrip("/").rsplit("/", 1)[-1], config=settings, resume="allow")
    return lambda values, step: run.log(values, step=step)


TRACKERS: dict[str, Callable[[str, dict[str, Any]], Log]] = {"mlflow": _mlflow_log, "wandb": _wandb_log}


class ProgressQueue:
    """A queue that the leading worker fills and a thread of the driver empties into `listen`."""

    def __init__(self, listen: Listener | None) -> None:
        self.listen = listen
        self.over = threading.Event()
        self.queue: Any = None

    def __enter__(self) -> Self:
        if self.listen is not None:
            from ray.util.queue import Queue

            self.queue = Queue(actor_options={"num_cpus": 0})
            self.thread = threading.Thread(target=self.relay, args=(self.listen,), daemon=True)
            self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.queue is not None:
            self.over.set()
            self.thread.join()
            self.queue.shutdown(force=True)

    def relay(self, listen: Listener) -> None:
        """Until it is over, and once more for what came last."""
        while True:
            over = self.over.wait(POLL_S)
            for message in self.queue.get_nowait_batch(self.queue.qsize()):
                listen(message)
            if over:
                return
