"""The classify command as its users meet it: every row once, whatever happens to the images or the driver."""

import hashlib
import json
import re
import signal
import time
from collections import Counter
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.dataset as pads
import pyarrow.parquet as pq
import pytest
from PIL import Image

from jobs.cli import main
from pipelines.classify import passes
from pipelines.classify.steps import work_list
from pipelines.fetch import hosts
from pipelines.inventory import inventory
from tests.builders import decoder_faults
from tests.builders.drivers import start
from tests.builders.fault_server import FaultServer
from tests.builders.models import small_bundle


@pytest.fixture(params=["local", pytest.param("ray", marks=pytest.mark.ray)])
def engine(request: pytest.FixtureRequest) -> str:
    """Each engine in turn; the Ray one on the session's cluster."""
    if request.param == "ray":
        request.getfixturevalue("ray_cluster")
    return str(request.param)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundle") / "bundle"
    small_bundle(folder)
    return folder


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return draw(tmp_path / "images", 60)


def draw(folder: Path, count: int) -> Path:
    """`count` distinct small pictures, one in ten of them no picture at all."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(count):
        path = folder / f"{number:05d}.jpg"
        if number % 10 == 9:
            path.write_bytes(b"<html>not found</html>")
        else:
            Image.fromarray(rng.integers(0, 255, (20, 30, 3), dtype=np.uint8)).save(path)
    return folder


def command(inventory: Path, bundle: Path, output: Path, *settings: str) -> list[str]:
    return [
        "classify", "--inventory", str(inventory), "--bundle", str(bundle), "--output", str(output),
        "--retry-pause-s", "0.1", *settings,
    ]  # fmt: skip


def published(output: Path) -> pa.Table:
    return pads.dataset(output / "table", format="parquet").to_table()


def statuses_by_uri(output: Path) -> dict[str, str]:
    table = published(output)
    return dict(zip(table["uri"].to_pylist(), table["status"].to_pylist(), strict=True))


def written_at(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def wait_for(condition, seconds: float = 180) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "waited too long"
        time.sleep(0.02)


def test_folder_in_rows_out_each_with_a_status_and_a_rerun_does_nothing(
    engine, images, bundle, tmp_path, caplog, capsys
):
    output = tmp_path / "out"
    assert main(command(images, bundle, output, "--engine", engine)) == 0
    assert f"60 rows, 60 images (60 to classify) of {images}; bundle {bundle}" in caplog.text
    assert f"engine {engine}: " in caplog.text
    assert f"report: {output}/state/report.html" in capsys.readouterr().out
    rows = published(output)
    assert Counter(rows["status"].to_pylist()) == {"ok": 54, "not_an_image": 6}
    assert sorted(rows["uri"].to_pylist()) == sorted(str(path) for path in images.iterdir())
    first = rows.filter(pa.compute.equal(rows["uri"], str(images / "00000.jpg"))).to_pylist()[0]
    assert first["sha256"] == hashlib.sha256((images / "00000.jpg").read_bytes()).hexdigest()
    assert (first["width_px"], first["height_px"], first["format"]) == (30, 20, "jpeg")
    assert first["top_id"] == first["labels"][0]["id"] and first["cattax"] == 9
    run_id = hashlib.sha256((output / "state/run.json").read_bytes()).hexdigest()[:16]
    assert (first["precision"], first["run_id"]) == ("fp32", run_id)
    assert (output / "table" / "_SUCCESS").exists()
    before = written_at(output)
    assert main(command(images, bundle, output)) == 0
    assert "complete already, nothing was done" in capsys.readouterr().out
    assert written_at(output) == before
    assert main(["verify", str(output)]) == 0


def test_queries_of_the_readme_name_every_id(images, bundle, tmp_path, monkeypatch):
    """Each query runs as it is printed, and the joins lose no row."""
    assert main(command(images, bundle, tmp_path / "predictions")) == 0
    monkeypatch.chdir(tmp_path)
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    queries = re.search(r"```sql\n(.*?)```", readme, re.DOTALL)[1].split(";\n")[:-1]
    tier1, published, outcomes, labels, _ = [duckdb.sql(query).fetchall() for query in queries]
    assert sum(row[1] for row in tier1) == sum(row[1] for row in outcomes) == 54
    assert len(labels) == 54 * 5
    assert all(path for path, *_ in (*tier1, *published))
    assert {outcome for outcome, _ in outcomes} <= {"published", "below threshold", "no threshold"}
    used = """SELECT DISTINCT id FROM (
        SELECT unnest(cat) AS id FROM 'predictions/table/*.parquet' UNION ALL
        SELECT unnest(labels).id FROM 'predictions/table/*.parquet' UNION ALL
        SELECT unnest([top_id, tier1_id]) FROM 'predictions/table/*.parquet' WHERE status = 'ok')"""
    unnamed = duckdb.sql(f"FROM ({used}) WHERE id NOT IN (SELECT id FROM 'predictions/categories.parquet')")
    assert unnamed.fetchall() == []


def test_carried_columns_and_repeated_uris_reach_every_row(images, bundle, tmp_path):
    uri = str(images / "00000.jpg")
    table = pa.table(
        {
            "uri": [uri, str(images / "gone.jpg"), uri],
            "image_id": ["a", "b", "c"],
            "page": pa.array([{"url": "p", "rank": 1}, None, {"url": "q", "rank": 2}]),
        }
    )
    pq.write_table(table, tmp_path / "in.parquet")
    assert main(command(tmp_path / "in.parquet", bundle, tmp_path / "out")) == 0
    rows = {row["image_id"]: row for row in published(tmp_path / "out").to_pylist()}
    assert [rows[key]["status"] for key in "abc"] == ["ok", "not_found", "ok"]
    assert rows["c"]["page"] == {"url": "q", "rank": 2}
    assert rows["a"]["labels"] == rows["c"]["labels"]


def test_a_decoder_that_crashes_or_hangs_costs_its_own_rows_only(engine, images, bundle, tmp_path):
    provoked = {"00003.jpg": "segv", "00014.jpg": "abort", "00035.jpg": "hang"}
    faults = {(images / name).read_bytes(): fault for name, fault in provoked.items()}
    arguments = command(images, bundle, tmp_path / "out", "--decode.timeout-s", "1", "--engine", engine)
    driver = start(arguments, **decoder_faults.environment(faults))
    assert driver.wait(120) == 0, driver.stderr.read()
    statuses = {Path(row["uri"]).name: row["status"] for row in published(tmp_path / "out").to_pylist()}
    assert [statuses[name] for name in provoked] == ["decoder_crashed", "decoder_crashed", "decode_timeout"]
    assert Counter(statuses.values()) == {
        "ok": 51, "not_an_image": 6, "decoder_crashed": 2, "decode_timeout": 1,
    }  # fmt: skip


def test_passing_failures_are_tried_again_before_they_are_recorded(engine, bundle, tmp_path):
    server = FaultServer()
    try:
        uris = [f"{server.url}/503-twice", f"{server.url}/404", f"{server.url}/500"]
        pq.write_table(pa.table({"uri": uris}), tmp_path / "in.parquet")
        settings = ["--fetch.allow-private-addresses", "--fetch.max-attempts", "1", "--max-error-rate", "1"]
        arguments = command(tmp_path / "in.parquet", bundle, tmp_path / "out", *settings)
        assert main([*arguments, "--engine", engine]) == 0
        statuses = statuses_by_uri(tmp_path / "out")
        assert server.requests["/503-twice"] == 3
        assert server.requests["/404"] == 1
        assert statuses[uris[1]] == "not_found"
        assert statuses[uris[2]] == "server_error"
        assert statuses[uris[0]] not in ("server_error", "timeout")
        report = json.loads((tmp_path / "out" / "state" / "report.json").read_text())
        failed = sum(status != "ok" for status in statuses.values())
        assert report["failing_hosts"] == {"127.0.0.2": failed}
    finally:
        server.close()


def test_failed_rows_are_run_again_and_the_rest_is_kept(images, bundle, tmp_path):
    server = FaultServer()
    try:
        uris = [str(images / "00000.jpg"), f"{server.url}/503-twice", f"{server.url}/500"]
        pq.write_table(pa.table({"uri": uris}), tmp_path / "in.parquet")
        settings = ["--fetch.allow-private-addresses", "--fetch.max-attempts", "1", "--retry-passes", "0"]
        arguments = command(
            tmp_path / "in.parquet", bundle, tmp_path / "out", *settings, "--max-error-rate", "0.7"
        )
        assert main(arguments) == 0
        before = statuses_by_uri(tmp_path / "out")
        assert [before[uri] for uri in uris] == ["ok", "server_error", "server_error"]
        assert main([*arguments, "--retry-failed"]) == 0  # one server_error more: all that is rerun fails
        assert main([*arguments, "--retry-failed"]) == 0
        after = statuses_by_uri(tmp_path / "out")
        assert after[uris[0]] == "ok"
        assert after[uris[1]] not in ("server_error", "timeout")
        assert after[uris[2]] == "server_error"
        assert main(["verify", str(tmp_path / "out")]) == 0
    finally:
        server.close()


def test_a_failing_inventory_is_not_published_and_a_higher_budget_publishes_it(
    images, bundle, tmp_path, capsys
):
    arguments = command(images, bundle, tmp_path / "out", "--max-error-rate", "0.05")
    assert main(arguments) == 3
    message = capsys.readouterr().err
    assert "10.0%" in message and "not_an_image 6" in message
    assert not (tmp_path / "out" / "table").exists()
    assert main([*arguments[:-1], "0.2"]) == 0
    assert published(tmp_path / "out").num_rows == 60


def test_a_refused_run_is_mended_without_publishing(images, bundle, tmp_path, capsys):
    """Two of three rows fail for a passing reason, and one of them for good."""
    server = FaultServer()
    try:
        uris = [str(images / "00000.jpg"), f"{server.url}/image-after-503-twice", f"{server.url}/404"]
        pq.write_table(pa.table({"uri": uris}), tmp_path / "in.parquet")
        settings = ["--fetch.allow-private-addresses", "--fetch.max-attempts", "2", "--retry-passes", "0"]
        arguments = command(tmp_path / "in.parquet", bundle, tmp_path / "out", *settings)
        assert main(arguments) == 3
        assert "--retry-failed" in capsys.readouterr().err
        assert main(arguments) == 3
        assert not (tmp_path / "out" / "table").exists()
        assert server.requests["/image-after-503-twice"] == 2
        assert main([*arguments, "--retry-failed"]) == 0
        assert server.requests["/404"] == 1
        assert statuses_by_uri(tmp_path / "out")[uris[2]] == "not_found"
        assert main(["verify", str(tmp_path / "out")]) == 0
    finally:
        server.close()


def test_an_outage_is_waited_out_before_failures_are_recorded(bundle, tmp_path, monkeypatch):
    """Every request fails until 90 were made: more than two passes over 30 images."""
    for module, name in ((passes, "PROBE_EVERY_S"), (hosts, "PROBE_INTERVAL_S"), (hosts, "GRACE_S")):
        monkeypatch.setattr(module, name, 0.0)
    server = FaultServer()
    try:
        uris = [f"{server.url}/outage?{n}" for n in range(30)]
        pq.write_table(pa.table({"uri": uris}), tmp_path / "in.parquet")
        settings = ["--fetch.allow-private-addresses", "--fetch.max-attempts", "1", "--retry-passes", "2"]
        settings += ["--fetch.backoff-s", "0"]  # the host's pauses double with every failure
        arguments = command(tmp_path / "in.parquet", bundle, tmp_path / "out", *settings)
        assert main(arguments) == 0
        assert set(statuses_by_uri(tmp_path / "out").values()) == {"ok"}
    finally:
        server.close()


def test_a_pause_that_a_server_asks_for_outlasts_the_pass(bundle, tmp_path):
    server = FaultServer()
    try:
        pq.write_table(pa.table({"uri": [f"{server.url}/busy-for-3-s"]}), tmp_path / "in.parquet")
        settings = ["--fetch.allow-private-addresses", "--fetch.total-timeout-s", "1", "--retry-passes", "1"]
        settings += ["--report-images", "0"]  # the page would fetch the image once more
        arguments = command(
            tmp_path / "in.parquet", bundle, tmp_path / "out", *settings, "--max-error-rate", "1"
        )
        assert main(arguments) == 0
        assert set(statuses_by_uri(tmp_path / "out").values()) == {"ok"}
        assert server.requests["/busy-for-3-s"] == 2
    finally:
        server.close()


def test_rejected_credentials_stop_the_run_with_the_remedy(bundle, tmp_path, capsys, monkeypatch):
    server = FaultServer()
    try:
        for name, value in {"AWS_ENDPOINT_URL": server.url, "AWS_ACCESS_KEY_ID": "a"}.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "b")
        uris = [f"s3://s3-expired-token/{n}.jpg" for n in range(5)]
        pq.write_table(pa.table({"uri": uris}), tmp_path / "in.parquet")
        settings = ["--max-error-rate", "1", "--retry-passes", "0", "--fetch.allow", "s3://s3-expired-token/"]
        assert main(command(tmp_path / "in.parquet", bundle, tmp_path / "out", *settings)) == 1
        assert "Renew the credentials" in capsys.readouterr().err
        entries = list((tmp_path / "out" / "state" / "ledger").glob("*.json"))
        assert len(entries) == 1  # the start
    finally:
        server.close()


def test_verify_tells_images_that_are_other_ones_by_now(images, bundle, tmp_path, capsys):
    assert main(command(images, bundle, tmp_path / "out")) == 0
    verify = ["verify", str(tmp_path / "out"), "--sample", "60"]
    assert main(verify) == 0
    assert "60 of 60 images have the recorded bytes" in capsys.readouterr().out
    (images / "00001.jpg").unlink()
    assert main(verify) == 0
    (images / "00002.jpg").write_bytes((images / "00003.jpg").read_bytes())
    assert main(verify) == 1
    found = " ".join(capsys.readouterr().out.split())
    assert "58 of 60" in found
    assert "1 could" in found


def test_rows_of_a_table_that_was_overwritten_during_the_run_say_so(bundle, tmp_path, monkeypatch):
    path = tmp_path / "latest.parquet"
    payloads = [bytes([n]) * 99 for n in range(5)]
    pq.write_table(pa.table({"image": payloads}), path)
    really_plan = inventory.plan

    def overwrite_later(*args, **kwargs):
        planned = really_plan(*args, **kwargs)
        pq.write_table(pa.table({"image": payloads[::-1]}), path)
        return planned

    monkeypatch.setattr(inventory, "plan", overwrite_later)
    assert main(command(path, bundle, tmp_path / "out", "--max-error-rate", "1")) == 0
    assert set(published(tmp_path / "out")["status"].to_pylist()) == {"source_changed"}


@pytest.mark.slow
@pytest.mark.parametrize(
    "engines", [("local", "local"), pytest.param(("ray", "local"), marks=pytest.mark.ray),
                pytest.param(("local", "ray"), marks=pytest.mark.ray)],
)  # fmt: skip
def test_a_killed_driver_continues_with_any_engine_and_a_stopped_one_says_how(engines, bundle, tmp_path):
    images = draw(tmp_path / "images", 240)
    grain = ["--workers.items-per-part", "20", "--workers.items-per-batch", "20"]
    arguments = command(images, bundle, tmp_path / "out", *grain, "--commit-interval-s", "0.05")
    ledger = tmp_path / "out" / "state" / "ledger"

    driver = start([*arguments, "--engine", engines[0]])
    wait_for(lambda: len(list(ledger.glob("*.json"))) >= 3 or driver.poll() is not None)
    driver.kill()
    driver.communicate()
    killed_at = len(list(ledger.glob("*.json")))

    driver = start([*arguments, "--engine", engines[1]])
    wait_for(lambda: len(list(ledger.glob("*.json"))) >= killed_at + 2 or driver.poll() is not None)
    driver.send_signal(signal.SIGTERM)
    _, errors = driver.communicate(timeout=60)
    if driver.returncode != 0:  # it may have been done already
        assert driver.returncode == 1
        assert "the same command continues" in errors
        assert "stopped by SIGTERM" in errors
        assert main(arguments) == 0
    rows = published(tmp_path / "out")
    assert sorted(rows["uri"].to_pylist()) == sorted(str(path) for path in images.iterdir())
    assert main(["verify", str(tmp_path / "out")]) == 0


@pytest.mark.slow
def test_of_two_drivers_one_finishes_and_the_other_says_why(images, bundle, tmp_path):
    arguments = command(images, bundle, tmp_path / "out")
    drivers = [start(arguments), start(arguments)]
    errors = [driver.communicate(timeout=180)[1] for driver in drivers]
    codes = sorted(driver.returncode for driver in drivers)
    assert codes in ([0, 0], [0, 1]), errors  # [0, 0]: one came after the other had finished
    if codes == [0, 1]:
        assert any("another driver" in text for text in errors)
    assert main(["verify", str(tmp_path / "out")]) == 0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("--top-k", "2"), "top_k was 5 and is now 2"),
        (("--inventory", "other"), "frozen from"),
    ],
)
def test_another_run_on_the_same_folder_is_refused(images, bundle, tmp_path, capsys, change, words):
    draw(tmp_path / "other", 3)
    assert main(command(images, bundle, tmp_path / "out")) == 0
    flag, value = change
    value = str(tmp_path / value) if flag == "--inventory" else value
    arguments = command(images, bundle, tmp_path / "out")
    if flag in arguments:
        arguments[arguments.index(flag) + 1] = value
    else:
        arguments += [flag, value]
    assert main(arguments) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"inventory": "nowhere"}, "nowhere"),
        ({"bundle": "nowhere"}, "not a bundle"),
        ({"output": "full"}, "files that are not of this run"),
    ],
)
def test_wrong_inputs_start_nothing(images, bundle, tmp_path, capsys, wrong, words):
    (tmp_path / "full" / "table").mkdir(parents=True)
    (tmp_path / "full" / "table" / "mine.parquet").touch()
    paths = {"inventory": images, "bundle": bundle, "output": tmp_path / "out"}
    paths |= {name: tmp_path / value for name, value in wrong.items()}
    assert main(command(paths["inventory"], paths["bundle"], paths["output"])) == 2
    message = capsys.readouterr().err.strip()
    assert words in message
    assert len(message.splitlines()) == 1
    assert not (tmp_path / "out" / "table").exists()


def test_an_altered_bundle_is_refused(images, bundle, tmp_path, capsys):
    small_bundle(tmp_path / "altered")
    model = tmp_path / "altered" / "model.onnx"
    payload = bytearray(model.read_bytes())
    payload[len(payload) // 2] ^= 1
    model.write_bytes(payload)
    assert main(command(images, tmp_path / "altered", tmp_path / "out")) == 2
    assert "model.onnx" in capsys.readouterr().err


def test_batches_that_no_certificate_covers_are_refused_like_a_missing_one(images, bundle, tmp_path, capsys):
    assert main(command(images, bundle, tmp_path / "out", "--batch-size", "64")) == 3
    assert "--parity.batch-size 64" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_report_lost_with_its_driver_is_written_by_the_next(images, bundle, tmp_path):
    assert main(command(images, bundle, tmp_path / "out")) == 0
    report = tmp_path / "out" / "state" / "report.json"
    report.unlink()
    assert main(command(images, bundle, tmp_path / "out")) == 0
    written = json.loads(report.read_text())
    assert written["statuses"] == {"not_an_image": 6, "ok": 54}
    assert written["certified"]


def test_every_tricky_file_has_a_row_with_a_sensible_status(tricky, bundle, tmp_path):
    names = [row["file"] for row in pads.dataset(tricky / "files.csv", format="csv").to_table().to_pylist()]
    pq.write_table(pa.table({"uri": [str(tricky / name) for name in names]}), tmp_path / "in.parquet")
    allow = ["--fetch.allow", str(tricky)]
    assert main(command(tmp_path / "in.parquet", bundle, tmp_path / "out", *allow)) == 0
    rows = {Path(row["uri"]).name: row["status"] for row in published(tmp_path / "out").to_pylist()}
    assert sorted(rows) == sorted(names)
    assert not {"decoder_crashed", "decode_timeout", "not_found"} & set(rows.values())


def test_scattered_rows_share_chunks_and_none_is_left_out():
    missing = [(number, number + 1) for number in range(0, 1000, 2)] + [(5000, 5600)]
    chunks = work_list(missing, 256)["ranges"].to_pylist()
    rows = [row for chunk in chunks for span in chunk for row in range(span["start"], span["stop"])]
    assert rows == [row for start, stop in missing for row in range(start, stop)]
    assert max(sum(span["stop"] - span["start"] for span in chunk) for chunk in chunks) <= 256
    assert len(chunks) == 5


def test_verify_tells_damage_from_a_folder_that_is_something_else(images, bundle, tmp_path):
    assert main(command(images, bundle, tmp_path / "out")) == 0
    assert main(["verify", str(images)]) == 2
    (tmp_path / "out" / "state" / "plan" / "plan.json").write_text("{")
    assert main(["verify", str(tmp_path / "out")]) == 1
    assert main(["verify", str(bundle)]) == 0
