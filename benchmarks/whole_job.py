"""The whole job on real files while something outside it goes wrong: the decoder, the files, the storage.

    python benchmarks/whole_job.py --photos photos --tricky tricky

* faults: 5,000 photographs, of which three make the decoder crash, abort and hang.
* damaged: the tricky files and 2,000 seeded mutations of them, against as many whole photographs.
* bucket: 5,000 photographs in a bucket (`AWS_ENDPOINT_URL` and keys in the environment, left out without);
  the driver is killed in the middle, two are started in its place, and the server is gone for 30 seconds.

Every part ends with `iab-vision verify` and a count of the rows. The model is so small that everything but
the model shows. About five minutes on 2 cores; exit code 1 if a figure is not what it must be.
"""

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path

import pyarrow as pa
import pyarrow.dataset as pads
import pyarrow.parquet as pq
from inputs import VIT_MINIATURE, image_files, random_bundle
from process_tree import ProcessTree
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from pipelines.storage.storage import Storage, open_storage
from tests.builders import decoder_faults
from tests.builders.flaky_proxy import FlakyProxy
from tests.builders.mutations import mutations

PHOTOS, MUTATIONS, OUTAGE_S = 5_000, 2_000, 30
PROVOKED = {"segv": "decoder_crashed", "abort": "decoder_crashed", "hang": "decode_timeout"}
SMALL_PARTS = ["--workers.items-per-part", "200", "--commit-interval-s", "0.5"]
console = Console(width=130)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--photos", type=Path, required=True, help="a folder of at least 5,000 images")
    parser.add_argument("--tricky", type=Path, help="a folder of odd files; without it no mutations")
    parser.add_argument("--bundle", type=Path, help="a certified bundle; random weights if not given")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="whole-job-"))
    table = Table("part", "rows by status", "images/s", "seconds", "as it must be")
    try:
        bundle = arguments.bundle or random_bundle(folder, VIT_MINIATURE)
        photos = image_files(arguments.photos)[:PHOTOS]
        fine = [faults(folder / "faults", photos, bundle, table)]
        if arguments.tricky:
            fine.append(damaged(folder / "damaged", photos, arguments.tricky, bundle, table))
        if os.environ.get("AWS_ENDPOINT_URL"):
            fine.append(bucket(folder, photos, bundle, table))
        console.print(table)
    finally:
        shutil.rmtree(folder)
    return 0 if all(fine) else 1


def faults(folder: Path, photos: Sequence[Path], bundle: Path, table: Table) -> bool:
    """Three photographs break their decoder; the same photographs without, for comparison."""
    clean = Run(folder / "clean", photos, bundle)
    clean.finish()
    payloads = [path.read_bytes() for path in photos]
    chosen = [payload for payload, copies in Counter(payloads).items() if copies == 1][1000:4000:1000]
    broken = dict(zip(chosen, PROVOKED, strict=True))
    run = Run(folder / "broken", photos, bundle)
    run.finish(**decoder_faults.environment(broken))
    found = {row["sha256"]: row["status"] for row in run.rows() if row["status"] != "ok"}
    expected = {sha256(payload).hexdigest(): PROVOKED[fault] for payload, fault in broken.items()}
    wanted = Counter({"ok": len(photos) - len(broken)}) + Counter(PROVOKED.values())
    fine = run.statuses() == wanted and found == expected
    table.add_row("whole photographs", *clean.cells(), str(clean.statuses() == {"ok": len(photos)}))
    table.add_row("three of them break the decoder", *run.cells(), str(fine))
    return fine and run.verified() and clean.verified()


def damaged(folder: Path, photos: Sequence[Path], tricky: Path, bundle: Path, table: Table) -> bool:
    """Broken and odd files against as many whole photographs."""
    odd = sorted(path for path in tricky.rglob("*") if path.is_file() and path.name != "files.csv")
    (folder / "mutations").mkdir(parents=True)
    files = list(odd)
    for number, payload in enumerate(mutations([path.read_bytes() for path in odd], MUTATIONS)):
        files.append(folder / "mutations" / f"{number:04d}")
        files[-1].write_bytes(payload)
    clean = Run(folder / "clean", photos[: len(files)], bundle)
    clean.finish()
    run = Run(folder / "broken", files, bundle, "--max-error-rate", "1")
    run.finish()
    deaths = sum(run.statuses()[status] for status in set(PROVOKED.values()))
    ratio = clean.working_s / run.working_s
    fine = run.statuses().total() == len(files) and not deaths and ratio > 0.5
    table.add_row(f"as many whole photographs ({len(files):,})", *clean.cells(), "")
    table.add_row(f"tricky files and mutations: {ratio:.2f} of that rate", *run.cells(), str(fine))
    return fine and run.verified()


def bucket(folder: Path, photos: Sequence[Path], bundle: Path, table: Table) -> bool:
    """Everything in a bucket; a killed driver, two in its place, and a server that goes away."""
    import boto3

    endpoint = os.environ["AWS_ENDPOINT_URL"]
    name = f"whole-job-{os.getpid()}"
    held = boto3.resource("s3", endpoint_url=endpoint).create_bucket(Bucket=name)
    try:
        images = open_storage(f"s3://{name}/photos")
        for number, path in enumerate(photos):
            images.put(f"{number % 100:02d}/{number:05d}{path.suffix}", path.read_bytes())
        for path in bundle.rglob("*"):
            if path.is_file():
                open_storage(f"s3://{name}/bundle").put(str(path.relative_to(bundle)), path.read_bytes())
        with FlakyProxy(endpoint) as proxy:
            return endured(name, proxy, table, len(photos))
    finally:
        held.objects.all().delete()
        held.delete()


def endured(name: str, proxy: FlakyProxy, table: Table, images: int) -> bool:
    output = f"s3://{name}/predictions"
    state = open_storage(f"{output}/state")
    command = classify(f"s3://{name}/photos", f"s3://{name}/bundle", output, *SMALL_PARTS)
    environment = os.environ | {"AWS_ENDPOINT_URL": proxy.url}
    began = time.monotonic()
    first = subprocess.Popen(command, env=environment)
    wait_for_entries(state, 5, first)
    first.send_signal(signal.SIGKILL)
    first.wait()
    drivers = [subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) for _ in "ab"]
    wait_for_entries(state, 12, *drivers)
    proxy.take_down()
    time.sleep(OUTAGE_S)
    proxy.bring_back()
    said = [driver.communicate()[1] for driver in drivers]
    codes = sorted(driver.returncode for driver in drivers)
    seconds = time.monotonic() - began
    filesystem, path = open_storage(f"{output}/table").filesystem_and_path()
    rows = pads.dataset(path, filesystem=filesystem, format="parquet").to_table(columns=["uri", "status"])
    statuses = Counter(rows["status"].to_pylist())
    fine = (
        codes == [0, 1]
        and any("another driver" in text for text in said)
        and statuses == {"ok": images}
        and len(set(rows["uri"].to_pylist())) == images
        and verified(output)
    )
    table.add_row(
        f"bucket: driver killed, two started (exit codes {codes}), server gone {OUTAGE_S} s",
        counted(statuses), "", f"{seconds:.0f}", str(fine),
    )  # fmt: skip
    return fine


def wait_for_entries(state: Storage, count: int, *drivers: subprocess.Popen) -> None:
    """Until the ledger has so many entries more than now, or no driver is left."""
    wanted = len(state.list("ledger")) + count
    while len(state.list("ledger")) < wanted and any(driver.poll() is None for driver in drivers):
        time.sleep(0.1)


class Run:
    """One classification of local files."""

    def __init__(self, folder: Path, files: Sequence[Path], bundle: Path, *further: str) -> None:
        folder.mkdir(parents=True)
        self.output = folder / "predictions"
        inventory = folder / "inventory.parquet"
        pq.write_table(pa.table({"uri": [str(path.resolve()) for path in files]}), inventory)
        self._images = len(files)
        allow = ("--fetch.allow", os.path.commonpath([path.resolve().parent for path in files]))
        self._command = classify(str(inventory), str(bundle), str(self.output), *allow, *further)

    def finish(self, **environment: str) -> None:
        began, began_at = time.monotonic(), time.time()
        process = subprocess.Popen(self._command, env=os.environ | environment)
        with ProcessTree(process.pid) as tree:
            code = process.wait()
        self.seconds = time.monotonic() - began
        self.working_s = self.seconds - (tree.loading_since - began_at)
        if code != 0:
            raise SystemExit(f"classify ended with exit code {code}")

    def rows(self) -> list[dict[str, str]]:
        table = pads.dataset(self.output / "table", format="parquet").to_table(columns=["sha256", "status"])
        return list(table.to_pylist())

    def statuses(self) -> Counter[str]:
        return Counter(row["status"] for row in self.rows())

    def verified(self) -> bool:
        return verified(str(self.output))

    def cells(self) -> list[str]:
        rate = self._images / self.working_s
        return [counted(self.statuses()), f"{rate:.0f}", f"{self.seconds:.0f}"]


def classify(inventory: str, bundle: str, output: str, *further: str) -> list[str]:
    return [
        sys.executable, "-m", "jobs", "classify", "--inventory", inventory, "--bundle", bundle,
        "--output", output, *further,
    ]  # fmt: skip


def counted(statuses: Counter[str]) -> str:
    return ", ".join(f"{status} {n:,}" for status, n in statuses.most_common())


def verified(output: str) -> bool:
    """Whether `iab-vision verify` says so."""
    command = [sys.executable, "-m", "jobs", "verify", output]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


if __name__ == "__main__":
    sys.exit(main())
