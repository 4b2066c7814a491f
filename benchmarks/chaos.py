"""Kills parts of a running classification at random moments, and checks that nothing was lost or doubled.

    python benchmarks/chaos.py --rounds 50
    python benchmarks/chaos.py --rounds 20 --engines local --images 8000
    python benchmarks/chaos.py --rounds 20 --engines local ray --images 8000    # by turns

Each round classifies the same drawn images into a fresh folder, on a Ray cluster of two nodes on this
machine or in threads of one process, and SIGKILLs one victim: an ONNX actor, a load actor, a task worker,
the second node (these with Ray alone), the driver at a random moment, or the driver while it plans, writes
the ledger or publishes; or it starts a rival driver on the same output, which must refuse, or take over when
told to. A killed driver's command is run again; whatever else dies, the driver itself must finish the run. A
round passes when its victim was struck, the command ended with 0, `iab-vision verify` passes, and the
published table holds every row of the inventory exactly once.
"""

import argparse
import collections
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.dataset as pads
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table

from jobs import demo_images
from jobs.cluster import use_token

ATTEMPTS = 5
TIMEOUT_S = 300
DRIVERS = {"driver", "planning", "ledger", "publishing", "rival", "take over"}
"""Strikes after which the command is run again: it was killed, or gave way."""


@dataclass
class Round:
    """One classification and what was done to it."""

    output: Path
    inventory: Path
    bundle: Path
    engines: tuple[tuple[str, ...], ...]
    """Flags of each engine; starts take them in turn."""
    kills: list[str] = field(default_factory=list)
    codes: list[int] = field(default_factory=list)
    """Exit code of each start of the command."""
    starts: int = 0

    def start(self, *settings: str) -> subprocess.Popen[bytes]:
        command = [
            sys.executable, "-m", "jobs", "classify", "--inventory", str(self.inventory),
            "--bundle", str(self.bundle), "--output", str(self.output),
            *self.engines[self.starts % len(self.engines)],
            "--workers.load-actors", "2", "--workers.infer-actors", "2", "--workers.items-per-part", "150",
            "--workers.items-per-batch", "64", "--commit-interval-s", "0.3", "--retry-pause-s", "0.1",
            *settings,
        ]  # fmt: skip
        self.starts += 1
        log = self.output.with_suffix(".log").open("ab")
        return subprocess.Popen(command, stdout=log, stderr=log)


Strike = Callable[[Round, subprocess.Popen[bytes], random.Random], str | None]
"""Waits for its moment and kills a process; returns what it did, or None when the moment never came."""


def ray_workers(words: str) -> Iterator[psutil.Process]:
    """Worker processes of this machine's cluster whose title holds `words`."""
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):  # gone meanwhile
            title = " ".join(process.cmdline())
            if title.startswith("ray::") and words in title:
                yield process


def kill_worker(words: str, *, within_s: float) -> Strike:
    """Kill one such worker, up to `within_s` after the first was seen."""

    def strike(_: Round, driver: subprocess.Popen[bytes], rng: random.Random) -> str | None:
        delay = rng.uniform(0, within_s)
        until = time.monotonic() + 60
        while time.monotonic() < until and driver.poll() is None:
            if victims := list(ray_workers(words)):
                if delay > 0:
                    time.sleep(delay)
                    delay = 0
                    continue
                rng.choice(victims).kill()
                return words
            time.sleep(0.02)
        return None

    return strike


def kill_driver_at_random(*, within_s: float) -> Strike:
    def strike(_: Round, driver: subprocess.Popen[bytes], rng: random.Random) -> str | None:
        time.sleep(rng.uniform(0.5, within_s))
        return kill_driver(driver, "driver")

    return strike


def kill_driver_when(name: str, moment: Callable[[Path], bool]) -> Strike:
    def strike(round_: Round, driver: subprocess.Popen[bytes], rng: random.Random) -> str | None:
        while driver.poll() is None:
            if moment(round_.output):
                time.sleep(rng.choice([0, 0, rng.uniform(0, 0.05)]))
                return kill_driver(driver, name)
            time.sleep(0.0005)
        return None

    return strike


def kill_driver(driver: subprocess.Popen[bytes], name: str) -> str | None:
    if driver.poll() is not None:
        return None
    driver.send_signal(signal.SIGKILL)
    return name


def planning(output: Path) -> bool:
    return (output / "state" / "plan").is_dir()


def writing_ledger(output: Path) -> bool:
    return len(list((output / "state" / "ledger").glob("*.json"))) >= 3


def publishing(output: Path) -> bool:
    return (output / "table").is_dir()


def start_rival(round_: Round, driver: subprocess.Popen[bytes], _: random.Random) -> str | None:
    """A second driver on the same output, at the same moment; one of the two must give way and say why."""
    rival = round_.start()
    code = rival.wait(TIMEOUT_S)
    driver.wait(TIMEOUT_S)
    gave_way = "another driver" in read_log(round_)
    return "rival" if {code, driver.returncode} == {0, 1} and gave_way else None


def take_over(round_: Round, driver: subprocess.Popen[bytes], _: random.Random) -> str | None:
    """A second driver that is told to replace the first one at work."""
    while not writing_ledger(round_.output):
        if driver.poll() is not None:
            return None
        time.sleep(0.01)
    rival = round_.start("--take-over")
    codes = rival.wait(TIMEOUT_S), driver.wait(TIMEOUT_S)
    said = read_log(round_)
    replaced = "replacing the driver" in said and "another driver" in said
    return "take over" if codes == (0, 1) and replaced else None


def read_log(round_: Round) -> str:
    return round_.output.with_suffix(".log").read_text(errors="replace")


class TwoNodes:
    """A Ray cluster of a head and one more node on this machine; the second can be shot and replaced."""

    def __init__(self) -> None:
        use_token()  # as the drivers do
        from ray.cluster_utils import Cluster

        self._cluster = Cluster(
            initialize_head=True, head_node_args={"num_cpus": 4, "include_dashboard": False}
        )
        self.address = self._cluster.address
        self.second = self._add()

    def _add(self) -> object:
        node = self._cluster.add_node(num_cpus=4)
        self._cluster.wait_for_nodes()
        return node

    def kill_second(self, _: Round, driver: subprocess.Popen[bytes], rng: random.Random) -> str | None:
        time.sleep(rng.uniform(2, 9))
        if driver.poll() is not None:
            return None
        self._cluster.remove_node(self.second, allow_graceful=False)
        self.second = self._add()
        return "node"

    def shutdown(self) -> None:
        self._cluster.shutdown()


def run_round(round_: Round, strike: Strike, rng: random.Random) -> None:
    """Run to the end, striking once."""
    while len(round_.codes) < ATTEMPTS and 0 not in round_.codes:
        driver = round_.start()
        if not round_.codes and (done := strike(round_, driver, rng)):
            round_.kills.append(done)
        try:
            round_.codes.append(driver.wait(TIMEOUT_S))
        except subprocess.TimeoutExpired:
            driver.kill()
            round_.codes.append(driver.wait())


def faults_of(round_: Round) -> list[str]:
    """What is wrong with the round's outcome; nothing, if all is well."""
    if 0 not in round_.codes:
        return [f"exit codes {round_.codes}, see {round_.output.with_suffix('.log')}"]
    faults = [] if round_.kills else ["nothing was struck"]
    if not set(round_.kills) & DRIVERS and len(round_.codes) > 1:
        faults.append(f"the driver did not go on by itself: exit codes {round_.codes}")
    check = [sys.executable, "-m", "jobs", "verify", str(round_.output)]
    if subprocess.run(check, capture_output=True, check=False).returncode != 0:
        faults.append("verify failed")
    wanted = collections.Counter(pq.read_table(round_.inventory)["image_id"].to_pylist())
    files = sorted((round_.output / "table").glob("*.parquet"))
    found = collections.Counter(pads.dataset(files).to_table(columns=["image_id"])["image_id"].to_pylist())
    if lost := wanted - found:
        faults.append(f"{lost.total()} rows lost")
    if doubled := found - wanted:
        faults.append(f"{doubled.total()} rows doubled")
    return faults


def draw_inventory(folder: Path, images: int) -> Path:
    """`images` rows over 500 drawn files, some of them broken, each row with its own URI."""
    rng = np.random.default_rng(0)
    sources = []
    for _ in range(500):
        payload, extension = demo_images.encode(
            demo_images.draw(rng.choice(list(demo_images.SUBJECTS)), rng), rng
        )
        sources.append((payload, extension))
    sources += [(payload, name.rsplit(".", 1)[1]) for name, payload in demo_images.broken_files(1)]
    uris = []
    (folder / "images").mkdir(parents=True)
    for number in range(images):
        payload, extension = sources[number % len(sources)]
        path = folder / "images" / f"{number:06d}.{extension}"
        path.write_bytes(payload)
        uris.append(str(path))
    inventory = folder / "inventory.parquet"
    pq.write_table(pa.table({"image_id": [f"image-{n}" for n in range(images)], "uri": uris}), inventory)
    return inventory


def make_bundle(folder: Path, images: Path) -> Path:
    """A certified bundle of a small ViT with random weights: what it says does not matter here."""
    import torch
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    sizes = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 96}
    names = dict(enumerate(demo_images.SUBJECTS))
    config = ViTConfig(
        image_size=32, patch_size=8, id2label=names, label2id={v: k for k, v in names.items()}, **sizes
    )
    ViTForImageClassification(config).save_pretrained(folder / "checkpoint")
    processor = {"size": {"height": 32, "width": 32}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3,
                 "resample": 2, "image_processor_type": "ViTImageProcessor"}  # fmt: skip
    (folder / "checkpoint" / "preprocessor_config.json").write_text(json.dumps(processor))
    command = [sys.executable, "-m", "jobs", "export", "--checkpoint", str(folder / "checkpoint"),
               "--images", str(images), "--output", str(folder / "bundle")]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True)
    return folder / "bundle"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--images", type=int, default=2_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--engines", nargs="+", choices=["ray", "local"], default=["ray"])
    parser.add_argument(
        "--bundle", type=Path, help="a certified bundle; made here from random weights if not given"
    )
    parser.add_argument("--only", default="", help="only the kinds whose name holds this text")
    parser.add_argument("--keep", action="store_true", help="keep the folders of rounds that passed")
    arguments = parser.parse_args()

    folder = Path(tempfile.mkdtemp(prefix="chaos-"))
    inventory = draw_inventory(folder, arguments.images)
    bundle = arguments.bundle or make_bundle(folder, folder / "images")
    nodes = TwoNodes() if "ray" in arguments.engines else None
    flags = {"local": ("--engine", "local"), "ray": ("--ray-address", nodes.address if nodes else "")}
    engines = tuple(flags[engine] for engine in arguments.engines)
    strikes: dict[str, Strike] = {
        "driver, any time": kill_driver_at_random(within_s=10 if nodes else 3),
        "driver, planning": kill_driver_when("planning", planning),
        "driver, ledger": kill_driver_when("ledger", writing_ledger),
        "driver, publishing": kill_driver_when("publishing", publishing),
        "rival driver": start_rival,
        "rival taking over": take_over,
    }
    if nodes and len(engines) == 1:  # the processes of a cluster
        strikes |= {
            "ONNX actor": kill_worker("Classifier", within_s=3),
            "load actor": kill_worker("Loader", within_s=3),
            "task worker": kill_worker("write_batch", within_s=0.5),
            "second node": nodes.kill_second,
        }
    strikes = {name: strike for name, strike in strikes.items() if arguments.only in name}
    rng = random.Random(arguments.seed)
    outcome = {name: collections.Counter[str]() for name in strikes}
    try:
        for number in range(arguments.rounds):
            name = list(strikes)[number % len(strikes)]
            round_ = Round(folder / f"round-{number:03d}", inventory, bundle, engines)
            started = time.monotonic()
            run_round(round_, strikes[name], rng)
            faults = faults_of(round_)
            outcome[name].update(
                ["rounds", *(["killed"] if round_.kills else []), *([] if faults else ["passed"])]
            )
            print(f"{number + 1:3d} {name:20s} killed {round_.kills} {time.monotonic() - started:5.1f} s "
                  f"{faults or 'ok'}", flush=True)  # fmt: skip
            if not faults and not arguments.keep:
                shutil.rmtree(round_.output)
    finally:
        if nodes:
            nodes.shutdown()
    show(outcome)
    passed = sum(counts["passed"] for counts in outcome.values())
    if passed == arguments.rounds and not arguments.keep:
        shutil.rmtree(folder)
    return 0 if passed == arguments.rounds else 1


def show(outcome: dict[str, collections.Counter[str]]) -> None:
    table = Table("killed", "rounds", "struck", "published and verified")
    for name, counts in outcome.items():
        table.add_row(name, *(str(counts[key]) for key in ("rounds", "killed", "passed")))
    Console().print(table)


if __name__ == "__main__":
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    sys.exit(main())
