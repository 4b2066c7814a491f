"""What `submit` sends to the cluster, and how a job's end becomes an exit code."""

import io
import itertools
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from jobs import cli, ray_jobs
from jobs.signals import handlers_kept
from jobs.submit_job import SubmitConfig, base_id, parse_command, submission
from tests.builders.flaky_proxy import FlakyProxy
from tests.builders.job_server import VERSION, JobServer, Reply
from tests.builders.tls import self_signed

REQUIRED = ["--inventory", "in.csv", "--bundle", "b", "--output", "s3://b/out"]


def job(*argv: str) -> ray_jobs.Submission:
    config = SubmitConfig.parse(argv, command="submit")
    return submission(config, config.job[0], config.job[1:])


def test_settings_before_the_command_are_submits_own_and_those_after_it_the_commands() -> None:
    config = SubmitConfig.parse(
        ["--detach", "--address", "http://head:8265", "classify", *REQUIRED, "--debug"], command="submit"
    )
    assert (config.detach, config.address, config.debug) == (True, "http://head:8265", False)
    assert config.job == ["classify", *REQUIRED, "--debug"]


def test_the_same_command_and_settings_make_the_same_id() -> None:
    first, again = job("classify", *REQUIRED), job("classify", *REQUIRED, "--debug")
    other = job("classify", *REQUIRED, "--top-k", "3")
    assert first.base_id == again.base_id != other.base_id
    assert first.base_id.startswith("iab-vision-classify-")


def test_settings_of_the_file_and_the_environment_travel_with_the_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "job.yaml").write_text("top_k: 2\nfetch: {per_host: 3}\nbundle: b\n")
    monkeypatch.setenv("IAB_VISION_FETCH__MAX_BYTES", "1000")
    monkeypatch.setenv("IAB_VISION_TOP_K", "4")
    sent = job("classify", "--config", str(tmp_path / "job.yaml"), "--inventory", "a b.csv", "--output", "o")
    assert sent.entrypoint == "exec python -m jobs classify --inventory 'a b.csv' --output o"
    variables = sent.runtime_env["env_vars"]
    assert (variables["IAB_VISION_TOP_K"], variables["IAB_VISION_BUNDLE"]) == ("4", "b")
    assert json.loads(variables["IAB_VISION_FETCH"]) == {"per_host": 3, "max_bytes": "1000"}
    assert "IAB_VISION_CONFIG" not in variables


@pytest.mark.parametrize("date", ["2026-01-01", "'2026-01-01'"])
def test_the_file_of_the_variable_is_the_commands_and_its_dates_travel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, date: str
) -> None:
    (tmp_path / "n.yaml").write_text(f"date: {date}\ninventory: in.csv\nbundle: b\ntable: s3://b/n\n")
    monkeypatch.setenv("IAB_VISION_CONFIG", str(tmp_path / "n.yaml"))
    sent = job("nightly")
    monkeypatch.delenv("IAB_VISION_CONFIG")
    for name, value in sent.runtime_env["env_vars"].items():
        monkeypatch.setenv(name, value)
    assert sent.base_id == base_id("nightly", parse_command("nightly", []))
    assert sent.base_id.startswith("iab-vision-nightly-2026-01-01-")


def test_a_job_started_with_these_variables_gets_the_same_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "job.yaml").write_text(
        "top_k: 2\nfetch: {per_host: 3}\ndrop_columns: [a, b]\nrename: {x: uri}\nkeep_plan: true\n"
    )
    argv = ["--config", str(tmp_path / "job.yaml"), *REQUIRED]
    here, sent = parse_command("classify", argv), job("classify", *argv)
    for name, value in sent.runtime_env["env_vars"].items():
        monkeypatch.setenv(name, value)
    there = parse_command("classify", REQUIRED)
    assert base_id("classify", there) == base_id("classify", here)


def test_working_folder_environment_and_resources_are_passed_on() -> None:
    sent = job(
        "--working-dir", ".", "--requirements", "more.txt", "--env", "AWS_REGION=eu-west-1",
        "--entrypoint.num-cpus", "2", "--entrypoint.resources", "head=1", "classify", *REQUIRED,
    )  # fmt: skip
    assert (sent.runtime_env["working_dir"], sent.runtime_env["pip"]) == (".", "more.txt")
    assert sent.runtime_env["env_vars"]["AWS_REGION"] == "eu-west-1"
    assert (sent.resources["entrypoint_num_cpus"], sent.resources["entrypoint_num_gpus"]) == (2, None)
    assert sent.resources["entrypoint_resources"] == {"head": 1.0}


def test_wrong_settings_are_refused_before_the_cluster_is_asked(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["submit", "--address", "http://127.0.0.1:1", "classify", "--inventory", "x"]) == 2
    assert "--bundle is required" in capsys.readouterr().err


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[JobServer]:
    """A job server that no test needs to wait a second for."""
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "")  # put back afterwards: `submit` sets it
    monkeypatch.setattr(ray_jobs, "POLL_S", 0.05)
    with handlers_kept(), JobServer() as server:
        yield server


def submit(server: JobServer | FlakyProxy, *argv: str) -> int:
    return cli.main(["submit", "--address", server.url, "--reconnect-s", "60", *argv])


def once_it_waits(caplog: pytest.LogCaptureFixture, act: Callable[[], None]) -> None:
    """Do something, in a thread, when the log says that the server is asked again."""

    def wait() -> None:
        while "asking again" not in caplog.text:
            time.sleep(0.02)
        act()

    threading.Thread(target=wait, daemon=True).start()


def test_a_head_that_is_not_up_yet_is_waited_for(server: JobServer, caplog: pytest.LogCaptureFixture) -> None:
    with FlakyProxy(server.url) as proxy:
        proxy.take_down()
        once_it_waits(caplog, proxy.bring_back)
        assert submit(proxy, "--detach", "classify", *REQUIRED) == 0
    waiting = next(line for line in caplog.messages if "asking again" in line)
    assert all(part in waiting for part in (proxy.url, "Connection refused", "60 s"))
    assert len(server.jobs) == 1


def test_a_head_behind_a_proxy_that_has_no_backend_yet_is_waited_for(server: JobServer) -> None:
    server.faults += [(503, "no healthy upstream")] * 3
    assert submit(server, "--detach", "classify", *REQUIRED) == 0


def test_a_head_that_has_no_agent_yet_is_asked_again(server: JobServer) -> None:
    said = "No available agent to submit job, please try again later."
    server.faults += [(200, VERSION), (200, VERSION), (404, "does not exist"), (500, said)]
    assert submit(server, "--detach", "classify", *REQUIRED) == 0
    assert not server.faults and len(server.jobs) == 1


def test_a_server_that_never_comes_is_a_failure_that_schedulers_repeat(
    server: JobServer, capsys: pytest.CaptureFixture[str]
) -> None:
    with FlakyProxy(server.url) as proxy:
        proxy.take_down()
        assert submit(proxy, "--reconnect-s", "0.2", "classify", *REQUIRED) == 1
    err = capsys.readouterr().err
    assert f"no Ray job server answers at {proxy.url}" in err and "--reconnect-s" in err


def test_a_server_that_is_silent_from_the_start_is_not_waited_for_without_end(
    server: JobServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ray_jobs, "ANSWER_S", 0.3)
    with FlakyProxy(server.url) as proxy:
        proxy.fall_silent()
        assert submit(proxy, "--reconnect-s", "0.5", "classify", *REQUIRED) == 1
    assert "timed out" in capsys.readouterr().err


def test_a_server_that_falls_silent_is_asked_again_and_the_job_ends_as_it_did(
    server: JobServer,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(ray_jobs, "ANSWER_S", 0.3)
    with FlakyProxy(server.url) as proxy:

        def end_and_speak() -> None:
            server.end(next(iter(server.jobs)), "FAILED", 3)
            server.logs = lambda _: (200, {"logs": "one line\nand another\n"})
            proxy.speak_again()

        def hang(name: str) -> Reply:
            proxy.fall_silent()
            return 200, {"logs": "one line\n"}

        server.logs = hang
        once_it_waits(caplog, end_and_speak)
        assert submit(proxy, "classify", *REQUIRED) == 3
    assert capsys.readouterr().out == "one line\nand another\n"


def test_a_job_whose_node_is_lost_ends_as_failed_with_the_clusters_words(
    server: JobServer, caplog: pytest.LogCaptureFixture
) -> None:
    """Its log is on the lost node: the head answers 500, already before it knows of the loss."""
    asked = itertools.count()

    def answer(name: str) -> Reply:
        if next(asked) == 2:
            server.end(name, "FAILED", None, "node lost")
        return 500, "Traceback\n  at\nClientConnectorError: Cannot connect to host 10.0.0.9:52365"

    server.logs = answer
    assert submit(server, "classify", *REQUIRED) == 1
    assert "node lost" in caplog.text and "asking again" not in caplog.text
    assert sum("cannot be read now: ClientConnectorError" in line for line in caplog.messages) == 1


def test_a_log_that_fails_once_at_the_end_is_read_again(
    server: JobServer, capsys: pytest.CaptureFixture[str]
) -> None:
    answers = iter([(500, "not now"), (200, {"logs": "all of it\n"})])

    def answer(name: str) -> Reply:
        server.end(name)
        return next(answers)

    server.logs = answer
    assert submit(server, "classify", *REQUIRED) == 0
    assert capsys.readouterr().out == "all of it\n"


@pytest.mark.usefixtures("server")
def test_a_certificate_that_is_not_trusted_is_wrong_input_until_its_file_is_given(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, tls = self_signed(tmp_path, "-subj", "/CN=test", "-addext", "subjectAltName=IP:127.0.0.1")
    with JobServer(tls=tls) as server:
        assert submit(server, "--detach", "classify", *REQUIRED) == 2
        assert "--ca-file" in capsys.readouterr().err
        assert submit(server, "--ca-file", str(file), "--detach", "classify", *REQUIRED) == 0


def interrupt(server: JobServer, *, then: Callable[[str], None] = lambda name: None) -> None:
    """Have this process interrupted, as by Ctrl-C, while it follows a job; and something done at once."""

    def answer(name: str) -> Reply:
        then(name)
        os.kill(os.getpid(), signal.SIGINT)
        return 200, {"logs": ""}

    server.logs = answer


def type_at_terminal(monkeypatch: pytest.MonkeyPatch, typed: str) -> None:
    """Standard input is a terminal, at which this is typed; Ctrl-D without a word ends it."""
    terminal = io.StringIO(typed)
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr("sys.stdin", terminal)


@pytest.mark.parametrize("typed", ["n\n", "\n", ""])
def test_an_interrupted_submitter_leaves_the_job_unless_it_is_told_to_stop_it(
    server: JobServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], typed: str
) -> None:
    type_at_terminal(monkeypatch, typed)
    interrupt(server)
    assert submit(server, "classify", *REQUIRED) == 1
    printed = capsys.readouterr()
    assert "Stop iab-vision-classify-" in printed.out and "runs on" in printed.err
    assert [job["status"] for job in server.jobs.values()] == ["RUNNING"]


def test_an_interrupted_submitter_stops_the_job_when_told_to(
    server: JobServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    type_at_terminal(monkeypatch, "y\n")
    interrupt(server)
    assert submit(server, "classify", *REQUIRED) == 130
    assert [job["status"] for job in server.jobs.values()] == ["STOPPED"]


@pytest.mark.parametrize(("status", "code"), [("SUCCEEDED", 0), ("FAILED", 3)])
def test_a_job_that_ended_before_it_could_be_stopped_keeps_its_exit_code(
    server: JobServer, monkeypatch: pytest.MonkeyPatch, status: str, code: int
) -> None:
    type_at_terminal(monkeypatch, "y\n")
    interrupt(server, then=lambda name: server.end(name, status, code))
    assert submit(server, "classify", *REQUIRED) == code


NIGHT = ("nightly", "--inventory", "in.csv", "--bundle", "b", "--table", "s3://b/n", "--date", "2026-01-01")


@pytest.mark.parametrize("line", [NIGHT, ("prune", "s3://b/n", "--keep-days", "30"), ("classify", *REQUIRED)])
def test_a_line_whose_job_succeeded_starts_another_attempt(server: JobServer, line: tuple[str, ...]) -> None:
    for attempt in range(1, 4):
        assert submit(server, "--detach", *line) == 0
        assert submit(server, "--detach", *line) == 0  # attaches
        assert len(server.jobs) == attempt
        server.end(list(server.jobs)[-1])
    first, *others = server.jobs
    assert others == [f"{first}-a2", f"{first}-a3"]


def test_an_export_that_succeeded_is_done(server: JobServer) -> None:
    line = ("export", "--checkpoint", "run", "--images", "photos", "--output", "s3://b/bundle")
    assert submit(server, "--detach", *line) == 0
    server.end(next(iter(server.jobs)))
    assert submit(server, *line) == 0 and len(server.jobs) == 1
    assert submit(server, "--detach", "--again", *line) == 0 and len(server.jobs) == 2


@pytest.mark.parametrize("more", [["--retry-failed"], ["--replace"], ["--bundle", "b2"]])
def test_a_night_with_other_settings_follows_the_one_that_runs(server: JobServer, more: list[str]) -> None:
    assert submit(server, "--detach", *NIGHT) == 0
    assert submit(server, "--detach", *NIGHT, *more) == 1
    assert len(server.jobs) == 1
    seen = []

    def end(name: str) -> Reply:
        seen.append((name, len(server.jobs)))
        server.end(name, *(("FAILED", 3) if name.endswith("-a2") else ("SUCCEEDED", 0)))
        return 200, {"logs": ""}

    server.logs = end
    assert submit(server, *NIGHT, *more) == 3
    first, second = server.jobs
    assert dict(seen) == {first: 1, second: 2} and second == f"{first}-a2"


@pytest.mark.usefixtures("server")
@pytest.mark.parametrize("address", ["http://", "http://127.0.0.1:x", "nothing://head"])
def test_an_address_that_cannot_be_one_is_wrong_input(
    address: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["submit", "--address", address, "classify", *REQUIRED]) == 2
    assert "no Ray job server answers" in capsys.readouterr().err


@pytest.mark.parametrize("fault", [(403, "Forbidden"), (404, "not here"), (200, "<html>sign in</html>")])
def test_a_server_that_refuses_or_is_another_is_wrong_input(server: JobServer, fault: Reply) -> None:
    server.faults += [fault]
    assert submit(server, "classify", *REQUIRED) == 2


@pytest.mark.parametrize("word", ["submit", "clasify"])
def test_words_that_are_no_job_are_refused(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["submit", "--address", "http://127.0.0.1:1", word]) == 2
    assert capsys.readouterr().err


@pytest.mark.parametrize(
    ("status", "driver", "code"),
    [("SUCCEEDED", 0, 0), ("FAILED", 1, 1), ("FAILED", 2, 2), ("FAILED", 3, 3), ("FAILED", -9, 1),
     ("FAILED", None, 1), ("STOPPED", None, 130)],
)  # fmt: skip
def test_a_jobs_end_keeps_the_exit_code_of_the_command(status: str, driver: int | None, code: int) -> None:
    assert ray_jobs.exit_code(SimpleNamespace(status=status, driver_exit_code=driver)) == code
