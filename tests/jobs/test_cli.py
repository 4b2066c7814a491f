"""The command line's contract: exit codes, one paragraph per error, precedence, nothing written."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from jobs import cli
from jobs.classify_images import run_settings
from jobs.config import ClassifyConfig, TrainConfig
from jobs.errors import checking_input
from jobs.predict_images import PredictConfig
from jobs.settings import JobConfig
from pipelines.classify.run import identity
from pipelines.fetch.settings import FetchLimits
from pipelines.messages import InputError

JOBS = Path(cli.__file__).parent
REQUIRED = ["--inventory", "in.csv", "--bundle", "b", "--output", "out"]


def parse(*argv: str) -> ClassifyConfig:
    return ClassifyConfig.parse([*REQUIRED, *argv], command="classify")


def test_every_command_of_the_usage_has_a_config_and_a_module() -> None:
    for command in cli.COMMANDS.values():
        assert issubclass(command.settings(), JobConfig)
        assert (JOBS / f"{command.module}.py").exists()


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_help_of_every_command_describes_every_setting(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main([name, "--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    config = cli.COMMANDS[name].settings()
    for field in config.model_fields.values():
        assert field.description, f"{name} has a setting without help"
    assert "--config" in text


def test_nested_limits_are_flags() -> None:
    assert parse("--fetch.max-bytes", "1000").fetch == FetchLimits(max_bytes=1000)


@pytest.mark.parametrize(
    ("setting", "decides"),
    [
        (("--top-k", "2"), True),
        (("--decode.max-pixels", "1000"), True),
        (("--decode.max-side", "100"), True),
        (("--fetch.max-bytes", "1000"), True),
        (("--fetch.max-redirects", "1"), True),
        (("--fetch.allow-private-addresses",), True),
        (("--fetch.allowed-networks", '["10.0.0.0/8"]'), True),
        (("--fetch.max-attempts", "1"), False),
        (("--fetch.total-timeout-s", "9"), False),
        (("--decode.timeout-s", "9"), False),
    ],
)
def test_a_resume_must_agree_with_the_settings_that_decide_rows(
    setting: tuple[str, ...], decides: bool
) -> None:
    bundle: Any = SimpleNamespace(model_id="m")
    plan: Any = SimpleNamespace(hash="p")
    first, second = (identity(bundle, plan, run_settings(parse(*each), bundle)) for each in ((), setting))
    assert (first != second) == decides


def test_command_line_beats_environment_beats_file_beats_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "job.yaml"
    file.write_text(yaml.safe_dump({"top_k": 2, "retry_passes": 7, "fetch": {"max_bytes": 5, "per_host": 3}}))
    monkeypatch.setenv("IAB_VISION_TOP_K", "3")
    monkeypatch.setenv("IAB_VISION_FETCH__PER_HOST", "9")
    config = parse("--config", str(file))
    assert (config.top_k, config.retry_passes, config.fetch.max_bytes, config.fetch.per_host) == (3, 7, 5, 9)
    assert parse("--config", str(file), "--top-k", "4").top_k == 4
    assert config.max_error_rate == 0.5


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--top-k", "0"], ["--top-k", "0", "greater than or equal to 1"]),
        (["--topk", "3"], ["--topk", "did you mean --top-k"]),
        (["--fetch.max-bytes", "0"], ["--fetch.max-bytes is", "greater than 0"]),
        (["--precision", "fp8"], ["--precision", "fp8", "fp32"]),
        (["--config", "missing.yaml"], ["missing.yaml"]),
        (["--max-error-rate-of", "foo"], ["--max-error-rate-of", "name=value"]),
        (["--fetch.max-byte", "1"], ["did you mean --fetch.max-bytes"]),
    ],
)
def test_a_wrong_setting_is_one_paragraph_and_exit_code_2(
    argv: list[str], words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["classify", *REQUIRED, *argv]) == 2
    message = capsys.readouterr().err
    assert len(message.strip().splitlines()) == 1
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"top_kk: 3", "top_kk is not a setting (did you mean top_k?)"),
        (b"top-k: 3", "top-k is not a setting (did you mean top_k?)"),
        (b"fetch: {max-bytes: 3}", "fetch.max-bytes is not a setting (did you mean fetch.max_bytes?)"),
        (b"top_k: 0", "top_k in "),
        (b"inventory: 3.1", "inventory in "),
        (b"1: 3.1", "1 is not a setting"),
        (b"top_k: [1,\n  }", "cannot be read"),
        (b"\xff\xfe\0\1", "cannot be read"),
        (b"- top_k", "must be a mapping"),
    ],
)
def test_a_wrong_file_is_one_line_that_names_the_file_and_the_key(
    content: bytes, words: str, tmp_path: Path
) -> None:
    file = tmp_path / "job.yaml"
    file.write_bytes(content)
    with pytest.raises(InputError) as refused:
        ClassifyConfig.parse([*REQUIRED[2:], "--config", str(file)], command="classify")
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_number_for_a_text_is_to_be_quoted(tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text("taxonomy: 3.1\n")
    argv = ["--config", str(tmp_path / "job.yaml"), "--dataset", "d", "--output", "o"]
    with pytest.raises(InputError, match=r"taxonomy in .*job.yaml is 3.1; .*quote it: '3.1'"):
        TrainConfig.parse(argv, command="train")


def test_lists_and_mappings_are_written_alike_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IAB_VISION_DROP_COLUMNS", "a,b")
    monkeypatch.setenv("IAB_VISION_MAX_ERROR_RATE_OF", "timeout=0.1,not_found=0.2")
    config = parse("--rename", "x=uri,y=z")
    assert (config.drop_columns, config.rename) == (("a", "b"), {"x": "uri", "y": "z"})
    assert config.max_error_rate_of == {"timeout": 0.1, "not_found": 0.2}


def test_renames_may_be_a_mapping_in_yaml(tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text("rename: {photo_url: uri}\n")
    assert parse("--config", str(tmp_path / "job.yaml")).rename == {"photo_url": "uri"}


@pytest.mark.parametrize(
    ("yaml_text", "words"),
    [
        ("rename: [photo_url=uri]", "such as {photo_url: uri}"),
        ("rename: photo_url=uri", "such as {photo_url: uri}"),
        ("drop_columns: {a: 1}", "such as [a, b]"),
    ],
)
def test_wrong_list_or_mapping_is_answered_with_an_example(
    yaml_text: str, words: str, tmp_path: Path
) -> None:
    (tmp_path / "job.yaml").write_text(yaml_text)
    with pytest.raises(InputError) as refused:
        parse("--config", str(tmp_path / "job.yaml"))
    assert words in str(refused.value)


def test_a_wrong_variable_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IAB_VISION_TOP_K", "many")
    with pytest.raises(InputError, match="IAB_VISION_TOP_K is 'many'"):
        parse()


@pytest.mark.parametrize(
    ("name", "close"),
    [("IAB_VISION_TOPK", "IAB_VISION_TOP_K"), ("IAB_VISION_FETCH__PERHOST", "IAB_VISION_FETCH__PER_HOST")],
)
def test_misspelt_variable_is_refused_with_the_nearest_setting(
    name: str, close: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, "2")
    with pytest.raises(InputError, match=rf"{name} is not a setting \(did you mean {close}\?\)"):
        parse()


def test_variable_of_another_command_and_whole_sections_are_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IAB_VISION_EPOCHS", "3")
    monkeypatch.setenv("IAB_VISION_FETCH", '{"per_host": 3}')
    assert parse().fetch.per_host == 3


def test_what_takes_no_flag_is_said_to(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["verify", "--path", "x"]) == 2
    assert "give it without --path" in capsys.readouterr().err


def test_predict_prints_json_when_asked_so() -> None:
    assert PredictConfig.parse(["a.jpg", "--bundle", "b", "--json"], command="predict").as_json


def test_the_traceback_is_shown_wherever_debug_was_set(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("IAB_VISION_DEBUG", "1")
    assert cli.main(["verify", "/nowhere"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_usage_names_what_must_be_given_and_fits_a_narrow_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    for name in cli.COMMANDS:
        with pytest.raises(SystemExit):
            cli.main([name, "--help"])
        text = capsys.readouterr().out
        assert max(map(len, text.splitlines())) <= 80, name
        assert "None)" not in text and "default factory" not in text
    with pytest.raises(SystemExit):
        cli.main(["certify", "--help"])
    usage = " ".join(capsys.readouterr().out.split("\n\n")[0].split())
    assert usage == "usage: iab-vision certify --images … [settings] BUNDLE"


def test_an_unknown_command_names_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["clasify"]) == 2
    assert "classify" in capsys.readouterr().err


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from jobs import cli; cli.main(['--help']);"
        "heavy = {'ray', 'torch', 'transformers', 'onnxruntime', 'pyarrow', 'numpy'} & set(sys.modules);"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - started < 60


def test_what_code_asks_for_is_not_changed_by_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IAB_VISION_OUTPUT", "production")
    monkeypatch.setenv("IAB_VISION_TOP_K", "3")
    config = ClassifyConfig(inventory="in.csv", bundle="b", output="demo")
    assert (config.output, config.top_k) == ("demo", 5)


def test_the_environment_may_name_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "job.yaml").write_text("top_k: 2\n")
    monkeypatch.setenv("IAB_VISION_CONFIG", str(tmp_path / "job.yaml"))
    assert parse().top_k == 2


def test_a_budget_for_an_unknown_status_is_refused() -> None:
    with pytest.raises(InputError, match="did you mean not_found"):
        parse("--max-error-rate-of", "not_fund=0.1")


def test_secrets_in_a_uri_are_not_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        cli.main(["classify", "--bundle", "ftp://user:hunter2@host.invalid/b", *REQUIRED[:2], *REQUIRED[4:]])
        != 0
    )
    assert "hunter2" not in capsys.readouterr().err


def test_a_stopped_command_says_so_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stopped(config: object) -> int:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(10)
        return 0

    monkeypatch.setattr("jobs.verify_output.run", stopped)
    before = signal.getsignal(signal.SIGINT)
    assert cli.main(["verify", "x"]) == 1
    assert capsys.readouterr().err == ("iab-vision verify: stopped by SIGTERM; run the same command again\n")
    for number in (signal.SIGTERM, signal.SIGINT):  # the handler stays while work is put away
        signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else before)


def test_the_worked_classify_settings_are_accepted_whole() -> None:
    config = ClassifyConfig.parse(["--config", str(JOBS / "configs" / "classify.yaml")], command="classify")
    assert (config.provider, config.precision) == ("cuda", "fp16")


def test_an_unexpected_value_error_is_a_bug_and_not_wrong_input(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(uri: str) -> None:
        raise ValueError("operands could not be broadcast together")

    monkeypatch.setattr("pipelines.storage.storage.open_storage", broken)
    assert cli.main(["verify", "x"]) == 1
    message = capsys.readouterr().err
    assert "ValueError: operands could not be broadcast together" in message and "--debug" in message


def test_a_path_that_is_not_there_is_wrong_input() -> None:
    with (
        pytest.raises(InputError, match=r"/nowhere/labels\.csv: no such file or directory"),
        checking_input(),
    ):
        Path("/nowhere/labels.csv").read_text()


@pytest.mark.parametrize(
    ("command", "place"),
    [
        ("train --dataset d", "--output"), ("tune --dataset d", "--output"), ("inspect d", "--output"),
        ("export --checkpoint r --images d", "--output"), ("evaluate --bundle b", "--output"),
        ("classify --inventory i --bundle b", "--output"), ("compare a b", "--output"),
        ("nightly --inventory i --bundle b --date 2026-11-20", "--table"), ("demo", "--output"),
    ],
)  # fmt: skip
def test_a_file_in_the_place_of_an_output_folder_is_refused_first(
    command: str, place: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    assert cli.main([*command.split(), place, str(tmp_path / "file")]) == 2
    assert f"{place}: {tmp_path}/file is a file; name a folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("prune {}", "holds no night; give the folder that was --table"),
        ("compare {} {}/nowhere", "has neither manifest.json nor _SUCCESS"),
        ("classify --inventory {} --bundle {} --output s4://x/y", "is not a bundle"),
        (
            "export --checkpoint r --images d --output o --precisions fp33",
            "--precisions is 'fp33'; it must be",
        ),
        ("inspect {}", "does not exist or is empty; give a folder or a table"),
        ("verify {}", "not there; give the folder that was --output"),
    ],
)
def test_a_wrong_place_is_named_with_what_to_give(
    command: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keep = ["--keep-days", "3"] if command.startswith("prune") else []
    assert cli.main([*command.format(tmp_path, tmp_path).split(), *keep]) == 2
    assert words in capsys.readouterr().err


def test_a_mistyped_command_is_answered_with_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["clasify"]) == 2
    assert "did you mean classify?" in capsys.readouterr().err
