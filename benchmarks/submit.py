"""`iab-vision submit` against real Ray heads on this machine: ends, races, a stop.

    python benchmarks/submit.py --part exits
    python benchmarks/submit.py --part races --rounds 50
    python benchmarks/submit.py --part stop

* exits: 30 submissions of a stand-in for `python -m jobs` that ends as it is told: with 0 to 3, the same
  through a connection that is cut, stopped, its driver killed, its head killed and started again.
* races: two `submit nightly` for one date at once: one job, the other attaches, both end alike.
* stop: `submit stop` in the middle of a real `classify`, then the same line again.

Exit code 1 if anything went otherwise.
"""

import argparse
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pyarrow.dataset as pads
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipelines.storage.storage import open_storage
from tests.builders import models
from tests.builders.flaky_proxy import FlakyProxy
from tests.builders.ray_head import Head, start_head

STAND_IN = """
import os, signal, sys, time

signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
print("pid", os.getpid(), flush=True)
for second in range(int(os.environ["SECONDS"])):
    print("second", second, flush=True)
    time.sleep(1)
sys.exit(int(os.environ["CODE"]))
"""
STOP_LIMIT_S = 60
Submitted = subprocess.Popen[str]
End = tuple[int, str, str]
"""Exit code of a submission, the job's log and its own."""
Found = Iterator[tuple[str, str, bool]]
"""What was done, what was seen, whether it was right."""


@dataclass
class Cluster:
    """A head that can be killed and started again at its address, and the stand-in's folder."""

    folder: Path
    head: Head

    def stand_in(self, *, code: int, seconds: int) -> list[str]:
        """Settings of submit for a job that lasts so long and ends so."""
        code_folder = self.folder / "code" / "jobs"
        code_folder.mkdir(parents=True, exist_ok=True)
        (code_folder / "__init__.py").touch()
        (code_folder / "__main__.py").write_text(STAND_IN)
        return ["--working-dir", str(code_folder.parent), "--env", f"CODE={code},SECONDS={seconds}"]

    def submit(self, name: str, *, code: int = 0, seconds: int = 2, through: Sequence[str] = ()) -> Submitted:
        """Submit the stand-in under this name."""
        return self.head.submit(*through, *self.stand_in(code=code, seconds=seconds), "taxonomy", name)

    def restart(self) -> None:
        """Kill the head and start another at the same address."""
        self.head.kill()
        self.head = start_head(self.folder / "home", port=int(self.head.address.rpartition(":")[2]))


def ended(process: Submitted) -> End:
    """The end of a submission, with the rest of the logs."""
    out, err = process.stdout.read(), process.stderr.read()  # `communicate` would lose what is buffered
    return process.wait(), out, err


def wait_for(process: Submitted, start: str) -> str:
    """The first line of a submission's output that starts so."""
    for line in process.stdout:
        if line.startswith(start):
            return line
    raise AssertionError(f"no line {start!r}: {process.stderr.read()}")


def plain(cluster: Cluster, name: str, code: int) -> End:
    return ended(cluster.submit(name, code=code))


def dropped(cluster: Cluster, name: str, code: int) -> End:
    """The connection is cut in the middle, and comes back once the submitter has said so."""
    with FlakyProxy(cluster.head.address) as proxy:
        process = cluster.submit(name, code=code, seconds=8, through=["--address", proxy.url])
        wait_for(process, "second 1")
        proxy.take_down()
        noticed = next((line for line in process.stderr if "asking again" in line), "")
        proxy.bring_back()
        status, out, err = ended(process)
    whole = re.findall(r"second (\d)", out) == list("234567")
    return status, out, noticed + err if whole else "a line of the log was lost or doubled"


def stopped(cluster: Cluster, name: str, _: int) -> End:
    process = cluster.submit(name, seconds=300)
    wait_for(process, "second 0")
    ended(cluster.head.submit("stop", "taxonomy", name))
    return ended(process)


def driver_killed(cluster: Cluster, name: str, _: int) -> End:
    process = cluster.submit(name, seconds=300)
    os.kill(int(wait_for(process, "pid").split()[1]), signal.SIGKILL)
    return ended(process)


def head_killed(cluster: Cluster, name: str, _: int) -> End:
    process = cluster.submit(name, seconds=300)
    wait_for(process, "second 0")
    cluster.restart()
    return ended(process)


Case = tuple[str, Callable[[Cluster, str, int], End], int, int, str]
CASES: list[tuple[Case, int]] = [
    *(((f"ends with {code}", plain, code, code, r"(?s)\A(?!.*(WARNING|ERROR))"), 3) for code in range(4)),
    *(((f"ends with {code}, connection cut", dropped, code, code, "asking again"), 2) for code in range(4)),
    (("stopped", stopped, 0, 130, "was stopped"), 4),
    (("driver killed", driver_killed, 0, 1, "exit code -9"), 4),
    (("head killed and back", head_killed, 0, 1, "knows no job"), 2),
]
"""What happens, how, the job's own code, the exit code and the words that it must end with; and how often."""


def exits(cluster: Cluster, _: argparse.Namespace) -> Found:
    """Every case, two at a time; those that need the head for themselves last."""

    def run(case: Case, number: int) -> tuple[int, bool]:
        title, act, code, wanted, words = case
        status, out, err = act(cluster, f"{title} {number}", code)
        right = status == wanted and re.search(words, err) is not None
        if not right:
            print(f"--- {title}: exit code {status}\n{out}\n{err}", file=sys.stderr)
        return status, right

    with ThreadPoolExecutor(2) as threads:
        for case, times in CASES:
            mapped = map if case[1] is head_killed else threads.map
            seen = list(mapped(run, [case] * times, range(times)))
            codes = ", ".join(str(status) for status, _ in seen)
            right = sum(right for _, right in seen)
            yield case[0], f"{right} of {times}: exit code {codes}", right == times


def races(cluster: Cluster, given: argparse.Namespace) -> Found:
    """Two submissions of one date at once: real nights; each fifth is a stand-in that ends with 1, 2 or 3."""
    folder = cluster.folder
    images = models.dataset(folder / "few", 20)
    models.small_bundle(folder / "bundle")
    night = ["nightly", "--inventory", str(images), "--inventory-type", "images", "--engine", "local"]
    night += ["--bundle", str(folder / "bundle"), "--table", str(folder / "nights")]
    days = [f"2026-{1 + number // 28:02}-{1 + number % 28:02}" for number in range(given.rounds)]
    good = 0
    for number, day in enumerate(days):
        code = 1 + number // 5 % 3 if number % 5 == 4 else 0
        through = cluster.stand_in(code=code, seconds=5) if code else []
        both = [cluster.head.submit(*through, *night, "--date", day) for _ in range(2)]
        ends = [ended(process) for process in both]
        attached = sum("attached" in err for _, _, err in ends)
        published = (folder / "nights" / "images" / f"run_date={day}" / "_SUCCESS").exists() or code
        alike = {(status, out) for status, out, _ in ends}
        right = len(alike) == 1 and ends[0][0] == code and attached == 1 and published
        good += bool(right)
        print(number, [status for status, _, _ in ends], flush=True)
        if not right:
            print(f"--- race {number}: {ends}", file=sys.stderr)
    yield "races", f"{good} of {len(days)}: one job, the other attached, both alike", good == len(days)
    jobs = ended(cluster.head.submit("status"))[1].count("iab-vision-nightly-")
    yield "jobs of all races", f"{jobs:,}", jobs == len(days)


def stop(cluster: Cluster, given: argparse.Namespace) -> Found:
    """Stop a real classification once its ledger has entries, and submit it again."""
    output, total = cluster.folder / "out", 3_000
    images = models.dataset(cluster.folder / "images", total)
    models.small_bundle(cluster.folder / "small")
    line = ["classify", "--inventory", str(images), "--inventory-type", "images", "--output", str(output)]
    line += ["--bundle", str(cluster.folder / "small")]
    line += ["--commit-interval-s", "0.5", "--workers.items-per-part", "50"]
    process = cluster.head.submit(*line)
    while len(list(output.glob("state/ledger/*.json"))) < 3 and process.poll() is None:
        time.sleep(0.1)
    begun = time.monotonic()
    ended(cluster.head.submit("stop", *line))
    seconds = time.monotonic() - begun
    status, out, _ = ended(process)
    recorded = re.search(r"([\d,]+) of [\d,]+ images are recorded", out)
    count = int(recorded[1].replace(",", "")) if recorded else 0
    seen = f"exit code {status} after {seconds:.0f} s, {count:,} of {total:,} recorded"
    yield "stop", seen, status == 130 and seconds <= STOP_LIMIT_S and 0 < count < total
    status, out, _ = ended(cluster.head.submit(*line))
    resumed = f"({total - count:,} to classify)" in out
    yield "the same line again", f"exit code {status}, resumed: {resumed}", status == 0 and resumed
    yield verified(str(output), total)


def verified(output: str, total: int) -> tuple[str, str, bool]:
    """Whether a published table holds each image once, and `verify` agrees."""
    filesystem, path = open_storage(f"{output}/table").filesystem_and_path()
    uris = pads.dataset(path, filesystem=filesystem, format="parquet").to_table(columns=["uri"])["uri"]
    distinct = len(set(uris.to_pylist()))
    code = subprocess.run([sys.executable, "-m", "jobs", "verify", output], check=False).returncode
    seen = f"{len(uris):,} rows, {distinct:,} distinct images, verify ends with {code}"
    return "published", seen, (len(uris), distinct, code) == (total, total, 0)


def show(found: Iterable[tuple[str, str, bool]]) -> int:
    """Print each finding as it comes, then all as a table; 1 if one is wrong."""
    table, right = Table("what", "seen", "as stated"), True
    for title, seen, good in found:
        print(f"{title}: {seen}", flush=True)
        table.add_row(title, seen, "yes" if good else "NO")
        right &= good
    Console().print(table)
    return 0 if right else 1


PARTS = {"exits": exits, "races": races, "stop": stop}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--part", choices=PARTS)
    parser.add_argument("--rounds", type=int, default=50, help="races")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="submit-", ignore_cleanup_errors=True) as folder:
        home = Path(folder, "home")
        home.mkdir()
        cluster = Cluster(Path(folder), start_head(home))
        try:
            parts = [given.part] if given.part else PARTS
            return show(found for part in parts for found in PARTS[part](cluster, given))
        finally:
            cluster.head.kill()


if __name__ == "__main__":
    sys.exit(main())
