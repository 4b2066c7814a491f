"""The OpenLineage event next to a report."""

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from jobs import cli
from jobs.lineage import EVENT_JSON, SERVER, describe_dataset
from tests.builders import models


@pytest.fixture
def server():
    told = []

    class Server(BaseHTTPRequestHandler):
        def do_POST(self):
            told.append((self.path, json.loads(self.rfile.read(int(self.headers["Content-Length"])))))
            self.send_response(201)
            self.end_headers()

        def log_message(self, *_):
            """Quiet."""

    with HTTPServer(("127.0.0.1", 0), Server) as http:
        threading.Thread(target=http.serve_forever, args=(0.02,), daemon=True).start()
        yield f"http://127.0.0.1:{http.server_port}", told
        http.shutdown()


def test_a_finished_run_says_what_it_read_and_wrote(tmp_path, monkeypatch, server) -> None:
    monkeypatch.setenv(SERVER, server[0])
    images = models.dataset(tmp_path / "images", 4)
    models.small_bundle(tmp_path / "bundle")
    out = tmp_path / "out"
    argv = ["classify", "--inventory", str(images), "--inventory-type", "images", "--bundle"]
    assert cli.main([*argv, str(tmp_path / "bundle"), "--output", str(out)]) == 0
    event = json.loads((out / "state" / EVENT_JSON).read_text())
    assert server[1] == [("/api/v1/lineage", event)]
    assert (event["eventType"], event["job"]["name"]) == ("COMPLETE", "classify")
    assert [one["name"] for one in event["inputs"]] == [str(images), str(tmp_path / "bundle")]
    (output,) = event["outputs"]
    assert output["name"].endswith("out/table")
    assert output["outputFacets"]["outputStatistics"]["rowCount"] == 4


def test_a_location_is_named_by_its_store_without_credentials() -> None:
    assert describe_dataset("s3://bucket/a/b") == {"namespace": "s3://bucket", "name": "a/b"}
    assert describe_dataset("s3://key:secret@bucket/a")["namespace"] == "s3://bucket"
    assert describe_dataset("/data/x") == {"namespace": "file", "name": "/data/x"}
