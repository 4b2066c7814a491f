"""The image's recipe: what a change of the code repeats, who runs, and its cheap steps carried out."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from jobs import cli

ROOT = Path(cli.__file__).parents[1]


@pytest.fixture
def steps() -> list[tuple[str, str]]:
    """Instructions of the Dockerfile with their arguments, in order."""
    text = (ROOT / "jobs" / "cluster" / "Dockerfile").read_text()
    lines = re.sub(r"\\\n\s*", "", "\n".join(ln for ln in text.splitlines() if not ln.startswith("#")))
    return [(word, rest) for word, _, rest in (ln.partition(" ") for ln in lines.splitlines() if ln)]


def test_a_change_of_the_code_reinstalls_nothing(steps: list[tuple[str, str]]) -> None:
    final = steps[max(at for at, (word, _) in enumerate(steps) if word == "FROM") :]
    code = min(at for at, (word, rest) in enumerate(final) if word == "COPY" and "--from" not in rest)
    assert all("-r /tmp/" not in rest for word, rest in final[code:] if word == "RUN")
    after = [rest for word, rest in final[code:] if word == "RUN"]
    assert after == ["pip install --no-deps -e ."]
    installs = [rest for word, rest in final[:code] if word == "RUN" and "pip" in rest]
    assert "torch.txt" in installs[0] and "requirements.txt" in installs[1]


def test_the_container_runs_as_a_user_without_rights(steps: list[tuple[str, str]]) -> None:
    assert [rest for word, rest in steps if word == "USER"] == ["1000"]
    assert steps[-1] == ("USER", "1000")


def test_what_is_copied_exists(steps: list[tuple[str, str]]) -> None:
    copied = [rest.split()[:-1] for word, rest in steps if word == "COPY" and "--from" not in rest]
    assert all((ROOT / name).exists() for names in copied for name in names)


def test_the_pins_are_taken_out_of_the_projects_files_and_cover_every_dependency(
    steps: list[tuple[str, str]], tmp_path: Path
) -> None:
    (step,) = [
        rest for word, rest in steps if word == "RUN" and "/requirements.txt" in rest and "pip" not in rest
    ]
    for name in ("pyproject.toml", "constraints.txt"):
        (tmp_path / name).write_text((ROOT / name).read_text())
    here = re.sub(r"(?<=[ '])/(?=\w+\.(?:txt|toml))", f"{tmp_path}/", step)
    subprocess.run(["sh", "-c", here.replace("python -c", f"{sys.executable} -c", 1)], check=True)
    assert re.fullmatch(r"torch==[\d.]+\n", (tmp_path / "torch.txt").read_text())
    wanted = {re.match(r"[\w-]+", ln)[0] for ln in (tmp_path / "requirements.txt").read_text().splitlines()}
    pinned = {ln.partition("==")[0] for ln in (ROOT / "constraints.txt").read_text().splitlines()}
    plain = {name.lower().replace("_", "-") for name in pinned}
    assert {name.lower() for name in wanted} - plain <= {"onnxruntime"}  # the wheel of other platforms
