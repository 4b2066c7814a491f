"""A disk that fills up at any moment: the error says so, and with space made the same run completes."""

import errno
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from jobs.cli import main
from tests.builders.models import small_bundle
from tests.builders.predictions import SmallRun, small_run
from tests.classify.test_classify import draw
from tests.ledger.test_crash_points import drive, published, verified

PAGE = 4096


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A filesystem of one megabyte."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("needs the right to mount a small tmpfs")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)  # plan files may be open


def leave_free(folder: Path, pages: int) -> Path:
    """Fill the disk up to so many free pages."""
    ballast = folder / "ballast"
    free = os.statvfs(folder)
    ballast.write_bytes(b"\1" * max(0, free.f_bavail * free.f_bsize - pages * PAGE))
    return ballast


def farthest(run: SmallRun) -> str:
    """The last thing that the ledger had when the disk filled up."""
    entries = run.state.list("ledger")
    return str(json.loads(run.state.read(entries[-1].path))["kind"]) if entries else "nothing"


def filled_up(run: SmallRun) -> bool:
    """Drive with what space there is; whether it was too little."""
    try:
        drive(run, run.state, run.table)
    except OSError as error:
        assert error.errno == errno.ENOSPC
        assert "No space left on device" in str(error)
        return True
    return False


def test_whatever_was_being_written_when_the_disk_filled_up_a_rerun_completes(small_disk: Path) -> None:
    whole, stopped_after, pages, full = [], set(), 0, True
    while full:
        run = small_run(small_disk / str(pages), 6)
        ballast = leave_free(small_disk, pages)
        full = filled_up(run)
        if full:
            stopped_after.add(farthest(run))
        ballast.unlink()
        drive(run, run.state, run.table)
        assert verified(run), pages
        whole.append(published(run))
        assert whole[-1] == whole[0]
        shutil.rmtree(run.uri)
        pages += 1
    print(f"\n{pages} amounts of free space; stopped after {sorted(stopped_after)}")
    assert stopped_after >= {"nothing", "start", "parts", "close"}


@pytest.mark.slow
def test_a_command_whose_disk_filled_up_says_so_and_completes_once_there_is_space(
    small_disk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small_bundle(tmp_path / "bundle")
    images = draw(tmp_path / "images", 30)
    stopped_after = set()
    for pages in (0, 4, 8, 9, 10, 11, 12, 13, 14):
        output = small_disk / str(pages)
        command = ["classify", "--inventory", str(images), "--bundle", str(tmp_path / "bundle"),
                   "--output", str(output), "--workers.items-per-part", "10"]  # fmt: skip
        ballast = leave_free(small_disk, pages)
        code = main(command)
        message = capsys.readouterr().err.strip()
        ballast.unlink()
        if code != 0:
            assert code == 1
            assert "No space left on device" in message.splitlines()[-1]
            entries = sorted((output / "state" / "ledger").glob("*.json"))
            stopped_after.add(json.loads(entries[-1].read_text())["kind"] if entries else "nothing")
            assert main(command) == 0
        assert main(["verify", str(output)]) == 0
        shutil.rmtree(output)
    print(stopped_after)
    assert stopped_after >= {"nothing", "start", "parts", "close"}
