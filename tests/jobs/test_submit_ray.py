"""`submit` against a real head that asks for a token: exit codes, races, stops, outages, metrics."""

import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import requests

from tests.builders import models
from tests.builders.flaky_proxy import FlakyProxy
from tests.builders.prometheus import panels, prometheus
from tests.builders.ray_head import Head, start_head

pytestmark = [pytest.mark.ray, pytest.mark.slow]

SCRIPTED = """
import os, signal, sys, time

def put_away(number, frame):
    time.sleep(5)  # longer than the 3 s that Ray waits by itself
    print("put away", flush=True)
    sys.exit(1)

signal.signal(signal.SIGTERM, put_away)
print("pid", os.getpid(), flush=True)
for second in range(int(os.environ["SECONDS"])):
    print("second", second, flush=True)
    time.sleep(1)
sys.exit(int(os.environ["CODE"]))
"""
"""Stands in for `python -m jobs`, by way of the job's working folder."""


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    head = start_head(tmp_path_factory.mktemp("home"))
    yield head
    head.kill()


@pytest.fixture(scope="module")
def scripted(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[str]]:
    """The arguments of a job that lasts so long and ends so."""
    folder = tmp_path_factory.mktemp("code")
    (folder / "jobs").mkdir()
    (folder / "jobs" / "__init__.py").touch()  # or the installed package would come first
    (folder / "jobs" / "__main__.py").write_text(SCRIPTED)

    def arguments(word: str, *, code: int = 0, seconds: int = 0) -> list[str]:
        env = f"CODE={code},SECONDS={seconds}"
        return ["--working-dir", str(folder), "--env", env, "taxonomy", word]

    return arguments


def wait_for_line(process, start: str) -> str:
    """The first line of a job's log that starts so."""
    for line in process.stdout:
        if line.startswith(start):
            return line
    raise AssertionError(f"no line {start!r}: {process.stderr.read()}")


def finish(process) -> tuple[str, str]:
    """The rest of both streams, when the process has ended; `communicate` would lose what is buffered."""
    streams = process.stdout.read(), process.stderr.read()
    process.wait()
    return streams


def test_the_exit_code_is_the_commands_own(head, scripted) -> None:
    """2 and 3 are those of the jobs whose server goes away, and to which a second command attaches."""
    processes = [head.submit(*scripted(f"code{code}", code=code, seconds=1)) for code in range(2)]
    for code, process in enumerate(processes):
        out, err = finish(process)
        assert process.returncode == code, out + err
        assert out.count("second 0") == 1


def test_a_driver_that_is_killed_has_failed(head, scripted) -> None:
    process = head.submit(*scripted("killed", seconds=60))
    os.kill(int(wait_for_line(process, "pid").split()[1]), signal.SIGKILL)
    _, err = finish(process)
    assert process.returncode == 1 and "iab-vision-taxonomy" in err


def test_a_stopped_job_puts_its_work_away_and_ends_as_stopped_and_the_same_command_starts_it_again(
    head, scripted
) -> None:
    process = head.submit(*scripted("stopped", seconds=60))
    wait_for_line(process, "second 1")
    stopping = head.submit("stop", "taxonomy", "stopped")
    assert "STOPPED" in finish(stopping)[0]
    out, err = finish(process)
    assert (process.returncode, stopping.returncode) == (130, 0), err
    assert "put away" in out
    again = head.submit(*scripted("stopped", seconds=0))
    assert finish(again) and again.returncode == 0


def test_a_second_submission_attaches_and_both_end_alike(head, scripted) -> None:
    both = [head.submit(*scripted("raced", code=3, seconds=4)) for _ in range(2)]
    outputs = [finish(process) for process in both]
    assert [process.returncode for process in both] == [3, 3]
    assert sum("attached" in err for _, err in outputs) == 1
    assert all(out.count("second 3") == 1 for out, _ in outputs)


def test_an_outage_of_the_server_costs_no_line_of_the_log(head, scripted) -> None:
    with FlakyProxy(head.address) as proxy:
        process = head.submit("--address", proxy.url, *scripted("outage", code=2, seconds=12))
        wait_for_line(process, "second 1")
        proxy.take_down()
        assert any("asking again" in line for line in process.stderr)
        proxy.bring_back()
        out, err = finish(process)
    assert process.returncode == 2, err
    assert [line for line in out.splitlines() if line.startswith("second")] == [
        f"second {number}" for number in range(2, 12)
    ]


def test_a_submitter_that_is_ended_leaves_the_job_running(head, scripted) -> None:
    process = head.submit(*scripted("left", seconds=8))
    wait_for_line(process, "second 0")
    process.send_signal(signal.SIGTERM)
    _, err = finish(process)
    assert process.returncode == 1 and "runs on" in err
    again = head.submit("logs", "taxonomy", "left")
    out, _ = finish(again)
    assert again.returncode == 0 and "second 7" in out


METRICS = (
    "rows_total", "bytes_fetched_total", "run_images", "run_images_recorded", "run_images_carried",
    "run_images_deferred", "commit_time_seconds", "stage_seconds_bucket",
)  # fmt: skip


def scraped(head: Head) -> str:
    try:
        return requests.get(head.metrics, timeout=10).text
    except requests.RequestException:
        return ""


def test_a_real_classification_runs_on_the_cluster_and_prometheus_sees_it(head, tmp_path: Path) -> None:
    images = models.dataset(tmp_path / "images", 1500)
    models.small_bundle(tmp_path / "bundle")
    classify = ["classify", "--inventory", str(images), "--bundle", str(tmp_path / "bundle"), "--output"]
    settings = ["--inventory-type", "images", "--commit-interval-s", "1", "--workers.rows-per-file", "100"]
    process = head.submit(*classify, str(tmp_path / "out"), *settings)
    missing = {f"ray_iab_vision_{name}" for name in METRICS}
    until = float("inf")
    while missing and time.monotonic() < until:
        text = scraped(head)
        missing = {name for name in missing if name not in text}
        if process.poll() is not None:  # the agent keeps what a process exported last
            until = min(until, time.monotonic() + 30)
        time.sleep(0.2)
    out, err = finish(process)
    assert process.returncode == 0, out + err
    assert pq.read_table(tmp_path / "out" / "table").num_rows == 1500
    assert not missing
    refused = head.submit(*classify, str(tmp_path / "strict"), "--bundle", str(tmp_path / "nowhere"))
    out, _ = finish(refused)
    assert refused.returncode == 2


@pytest.mark.skipif(shutil.which("prometheus") is None, reason="Prometheus is not installed")
def test_every_panel_of_the_dashboard_has_data_during_a_healthy_run(head, tmp_path: Path) -> None:
    images = models.dataset(tmp_path / "images", 1500)
    models.small_bundle(tmp_path / "bundle")
    files = [
        "--inventory",
        str(images),
        "--bundle",
        str(tmp_path / "bundle"),
        "--output",
        str(tmp_path / "out"),
    ]
    missing = {title: set(asked) for title, asked in panels().items()}
    missing["CPU and GPU by node"] = {query for query in missing["CPU and GPU by node"] if "cpu" in query}
    with prometheus(head, tmp_path / "prometheus") as server:
        process = head.submit(
            "classify", *files, "--inventory-type", "images", "--commit-interval-s", "1",
            "--workers.items-per-part", "50",
        )  # fmt: skip
        while process.poll() is None and any(missing.values()):
            missing = {
                title: {one for one in asked if not server.values(one)} for title, asked in missing.items()
            }
            time.sleep(0.2)
        _, err = finish(process)
        rules = server.rules()
    assert process.returncode == 0, err
    assert not any(missing.values()), missing
    assert {rule["health"] for rule in rules} == {"ok"}


def test_without_the_token_the_cluster_refuses_and_the_message_says_where_it_goes(
    head, scripted, tmp_path
) -> None:
    stranger = replace(head, environment={**head.environment, "HOME": str(tmp_path)})
    process = stranger.submit(*scripted("stranger"))
    _, err = finish(process)
    assert process.returncode == 2 and "RAY_AUTH_TOKEN" in err


def test_the_probes_of_the_manifests_need_no_token(head) -> None:
    assert requests.get(f"{head.address}/api/gcs_healthz", timeout=10).ok
    assert requests.get(f"{head.agent}/api/local_raylet_healthz", timeout=10).ok
