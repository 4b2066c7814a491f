"""The finished model goes to a private repository of the hub (here a stand-in), again after a failure."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from huggingface_hub import constants

from jobs import train_vit
from jobs.config import TrainConfig
from jobs.settings import part_of
from pipelines.messages import InputError, JobFailed
from pipelines.training import fit, runs
from pipelines.training.recipe import Recipe
from pipelines.training.resources import Resources
from tests.builders.training import image_folder


class Hub(ThreadingHTTPServer):
    """Takes a repository and commits to it; refuses everything while `out_of_order`."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answers)
        self.out_of_order = False
        self.repositories: list[dict] = []
        self.committed: list[str] = []


class Answers(BaseHTTPRequestHandler):
    server: Hub

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        if self.server.out_of_order:
            return self.answer(403, {"error": "you have no business here"})
        if self.path == "/api/repos/create":
            self.server.repositories.append(json.loads(body))
            return self.answer(200, {"url": "https://huggingface.co/somebody/model", "id": "somebody/model"})
        if self.path == "/api/validate-yaml":
            return self.answer(200, {"errors": [], "warnings": []})
        if "/preupload/" in self.path:
            files = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False}
                for f in json.loads(body)["files"]
            ]
            return self.answer(200, {"files": files})
        lines = [json.loads(line) for line in body.splitlines()]
        self.server.committed += [line["value"]["path"] for line in lines if line["key"] == "file"]
        commit = {
            "commitUrl": "https://huggingface.co/somebody/model/commit/1",
            "commitOid": "1",
            "success": True,
        }
        return self.answer(200, {**commit, "pullRequestUrl": None})

    def do_GET(self) -> None:
        self.answer(200, {"id": "somebody/model", "siblings": [], "sha": "1"})

    def answer(self, status: int, content: dict) -> None:
        self.send_response(status)
        self.end_headers()
        self.wfile.write(json.dumps(content).encode())

    def log_message(self, *_: object) -> None:
        """Silence."""


@pytest.fixture
def hub(monkeypatch) -> Iterator[Hub]:
    server = Hub()
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def finished(tmp_path: Path) -> TrainConfig:
    """The settings of a run that is finished already."""
    config = TrainConfig(
        dataset=str(image_folder(tmp_path / "images")),
        output=str(tmp_path / "run"),
        model="scratch:tiny",
        image_size=16,
        patch_size=8,
        layers=1,
        batch_size=4,
        push_to_hub="somebody/model",
    )
    job = fit.plan_job(
        train_vit.load_labelled(config),
        part_of(config, Recipe),
        config.output,
        part_of(config, Resources, use_gpu=False),
    )
    runs.begin(job.output, job.recipe, job.data)
    best = tmp_path / "run" / "best"
    best.mkdir()
    for name in ("config.json", "README.md"):
        (best / name).write_text("{}")
    content = {
        "test": {"accuracy": 0.5},
        "best": {"epoch": 1},
        "recipe": {"epochs": 1, "target_precision": 0.9},
    }
    content |= {"classes": list(job.data.classes), "thresholds": {}}
    runs.finish(job.output, {**content, "seconds": 1.0, "temperature": 1.0})
    return config


def test_a_failed_upload_says_what_to_do_and_the_same_command_repeats_it(hub: Hub, finished: TrainConfig):
    hub.out_of_order = True
    with pytest.raises(JobFailed, match=r"somebody/model failed.*without training again"):
        train_vit.run(finished)
    hub.out_of_order = False
    assert train_vit.run(finished) == 0
    made = hub.repositories[0]
    assert made.get("private") or made.get("visibility") == "private"
    assert sorted(hub.committed) == ["README.md", "config.json"]


def test_an_impossible_repository_is_refused_before_training(finished: TrainConfig):
    with pytest.raises(InputError, match="no/such/name"):
        train_vit.run(finished.model_copy(update={"push_to_hub": "no/such/name"}))
