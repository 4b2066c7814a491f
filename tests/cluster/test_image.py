"""The image's recipe: what a change of the code repeats, who runs, and what it installs."""

import platform
import re
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from jobs import cli

ROOT = Path(cli.__file__).parents[1]


@pytest.fixture
def steps() -> list[tuple[str, str]]:
    """Instructions of the Dockerfile with their arguments, in order."""
    text = (ROOT / "jobs" / "cluster" / "Dockerfile").read_text()
    lines = re.sub(r"\\\n\s*", "", "\n".join(ln for ln in text.splitlines() if not ln.startswith("#")))
    return [(word, rest) for word, _, rest in (ln.partition(" ") for ln in lines.splitlines() if ln)]


def test_a_change_of_the_code_reinstalls_nothing(steps: list[tuple[str, str]]) -> None:
    code = min(at for at, (word, rest) in enumerate(steps) if word == "COPY" and ".lock" not in rest)
    after = [rest for word, rest in steps[code:] if word == "RUN"]
    assert after == ["pip install --no-deps --no-build-isolation -e ."]
    installs = [rest for word, rest in steps[:code] if word == "RUN" and "pip" in rest]
    assert "torch" in installs[0] and "--require-hashes" in installs[1]


def test_the_container_runs_as_a_user_without_rights(steps: list[tuple[str, str]]) -> None:
    assert [rest for word, rest in steps if word == "USER"] == ["1000"]
    assert steps[-1] == ("USER", "1000")


def test_what_is_copied_exists(steps: list[tuple[str, str]]) -> None:
    copied = [rest.split()[:-1] for word, rest in steps if word == "COPY"]
    assert all((ROOT / name).exists() for names in copied for name in names)


def pins(file: str) -> dict[str, str]:
    """Package -> version in a file of requirements."""
    lines = re.findall(r"^([\w.-]+)==([^\s;]+)", (ROOT / file).read_text(), re.MULTILINE)
    return {canonicalize_name(name): version for name, version in lines}


def test_the_lock_agrees_with_the_constraints_and_so_does_torch(steps: list[tuple[str, str]]) -> None:
    constrained, locked = pins("constraints.txt"), pins("requirements.lock")
    assert {name: constrained[name] for name in locked if name != "setuptools"} == {
        name: version for name, version in locked.items() if name != "setuptools"
    }
    assert ("ARG", f"TORCH={constrained['torch']}") in steps


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the image's platform")
def test_the_lock_holds_all_that_the_project_needs_but_torch(steps: list[tuple[str, str]]) -> None:
    """Else pip would refuse, in the middle of a build, a requirement that has no hash."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    locked, left, seen = pins("requirements.lock"), [(one, "") for one in project["dependencies"]], set()
    while left:
        text, extra = left.pop()
        wanted = Requirement(text)
        name = canonicalize_name(wanted.name)
        if name == "torch" or (wanted.marker and not wanted.marker.evaluate({"extra": extra})):
            continue
        assert wanted.specifier.contains(locked[name], prereleases=True), text
        for each in ("", *wanted.extras):
            if (name, each) not in seen:
                seen.add((name, each))
                left += [(one, each) for one in metadata.requires(name) or ()]
