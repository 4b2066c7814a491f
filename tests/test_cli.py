"""The command line's contract: exit codes, one paragraph per error, precedence, nothing written."""

import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from jobs import cli
from jobs import config as configs
from jobs.config import ClassifyConfig, plain
from jobs.errors import InputError
from pipelines.specs import FetchLimits

REQUIRED = ["--inventory", "in.csv", "--bundle", "b", "--output", "out"]


def parse(*argv: str) -> ClassifyConfig:
    return ClassifyConfig.parse([*REQUIRED, *argv], command="classify")


def test_every_command_of_the_usage_has_a_config_and_a_module() -> None:
    for command in cli.COMMANDS.values():
        assert hasattr(configs, command.config)
        assert Path(f"{command.module.replace('.', '/')}.py").exists()


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_help_of_every_command_describes_every_setting(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main([name, "--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    config = getattr(configs, cli.COMMANDS[name].config)
    for field in config.model_fields.values():
        assert field.description, f"{name} has a setting without help"
    assert "--config" in text


def test_nested_limits_are_flags_and_travel_as_plain_dataclasses() -> None:
    fetch = plain(parse("--fetch.max-bytes", "1000").fetch)
    assert type(fetch) is FetchLimits
    assert fetch == FetchLimits(max_bytes=1000)


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
        (["--fetch.max-bytes", "0"], ["max_bytes", "at least 1"]),
        (["--precision", "fp8"], ["--precision", "fp8", "fp32"]),
        (["--config", "missing.yaml"], ["missing.yaml"]),
    ],
)
def test_a_wrong_setting_is_one_paragraph_and_exit_code_2(
    argv: list[str], words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["classify", *REQUIRED, *argv]) == 2
    message = capsys.readouterr().err
    assert len(message.strip().splitlines()) == 1
    assert all(word in message for word in words), message


def test_an_unknown_key_in_the_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "job.yaml"
    file.write_text("top_kk: 3\n")
    with pytest.raises(InputError, match="top_kk is not a setting"):
        parse("--config", str(file))


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
