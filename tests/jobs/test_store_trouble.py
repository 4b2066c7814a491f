"""A store that refuses is wrong input, told at once; one that is silent is named within seconds."""

import socket
import threading
from collections.abc import Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jobs.cli import main
from pipelines.storage import objects
from pipelines.storage.uris import StorageError
from tests.builders.models import small_bundle

CODES = {"NoSuchBucket": 404, "AccessDenied": 403, "InvalidAccessKeyId": 403, "SignatureDoesNotMatch": 403}

LISTING = (
    "<ListBucketResult><KeyCount>1</KeyCount><Contents><Key>folder/a//b.jpg</Key><Size>1</Size>"
    "<LastModified>2026-01-01T00:00:00.000Z</LastModified></Contents></ListBucketResult>"
)


class Refuses(BaseHTTPRequestHandler):
    """A store that answers every request with the error named in its bucket."""

    def answer(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        code = self.path.split("/")[1].split("?")[0]
        body = (LISTING if code == "listing" else f"<Error><Code>{code}</Code></Error>").encode()
        self.send_response(CODES.get(code, 200))
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_GET = do_HEAD = do_PUT = do_POST = answer

    def log_message(self, *_: object) -> None:
        """Quiet."""


@pytest.fixture
def refusing(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Refuses)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    point_at(monkeypatch, server.server_address[1])
    yield
    server.shutdown()


def point_at(monkeypatch: pytest.MonkeyPatch, port: int) -> None:
    settings = {"ENDPOINT_URL": f"http://127.0.0.1:{port}", "ACCESS_KEY_ID": "k", "SECRET_ACCESS_KEY": "s"}
    for name, value in {**settings, "REGION": "us-east-1"}.items():
        monkeypatch.setenv(f"AWS_{name}", value)


@pytest.fixture
def places(tmp_path: Path) -> dict[str, str]:
    small_bundle(tmp_path / "bundle")
    (tmp_path / "images").mkdir()
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "images" / "a.png")
    return {name: str(tmp_path / name) for name in ("bundle", "output")} | {
        "inventory": str(tmp_path / "images")
    }


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("place", ["inventory", "bundle", "output"])
def test_a_store_that_refuses_is_wrong_input(code, place, places, refusing, capsys):
    places[place] = f"s3://{code}/folder"
    command = [word for name, uri in places.items() for word in (f"--{name}", uri)]
    assert main(["classify", *command]) == 2
    said = capsys.readouterr().err
    assert f"s3://{code}/folder" in said
    assert "continues" not in said


def test_a_key_that_a_listing_cannot_express_is_named(places, refusing, capsys):
    command = ["--bundle", places["bundle"], "--output", places["output"]]
    assert main(["classify", "--inventory", "s3://listing/folder", *command]) == 2
    said = capsys.readouterr().err
    assert "a//b.jpg" in said and "name them in a table" in said


@pytest.mark.parametrize("listens", [False, True], ids=["refused", "silent"])
@pytest.mark.parametrize("place", ["inventory", "bundle", "output"])
def test_an_endpoint_that_is_down_is_named_and_no_wrong_input(
    place, listens, places, monkeypatch, caplog, capsys
):
    patient = objects.store_settings
    monkeypatch.setattr(objects, "store_settings", lambda uri, *_: patient(uri, 1.0, 1.0))
    monkeypatch.setattr(objects, "SILENCE_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as server:
        point_at(monkeypatch, server.getsockname()[1])
        if not listens:
            server.close()
        places[place] = "s3://bucket/folder"
        command = [word for name, uri in places.items() for word in (f"--{name}", uri)]
        assert main(["classify", *command]) == 1
    assert "no answer from s3://bucket/folder" in caplog.text
    said = capsys.readouterr().err
    assert "s3://bucket/folder" in said
    assert "continues" not in said


def test_a_silent_store_is_named_before_it_is_given_up(monkeypatch, caplog):
    with socket.create_server(("127.0.0.1", 0)) as listening:
        point_at(monkeypatch, listening.getsockname()[1])
        monkeypatch.setattr(objects, "SILENCE_S", 0.2)
        monkeypatch.setattr(objects, "object_store", partial(objects.object_store, request_s=1.0))
        with pytest.raises(StorageError):
            objects.ObjectStorage("s3://bucket/folder", patience_s=1.0).read("file")
    assert "no answer from s3://bucket/folder/file" in caplog.text
    assert "http://127.0.0.1" in caplog.text
