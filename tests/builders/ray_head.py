"""A real Ray head with its job server on this machine, and nodes that join it: each a process tree."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import requests

READY_S = 240
Process = subprocess.Popen[bytes]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@dataclass
class Head:
    """A head that asks for a token, and the environment of a user who has it in his home."""

    address: str
    metrics: str
    agent: str
    gcs: str
    environment: Mapping[str, str]
    process: Process
    nodes: list[Process] = field(default_factory=list)

    def submit(self, *arguments: str) -> subprocess.Popen[str]:
        """Start `iab-vision submit ARGUMENTS` against this head."""
        return subprocess.Popen(
            [sys.executable, "-m", "jobs", "submit", "--address", self.address, *arguments],
            env=dict(self.environment),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def add_node(self, num_cpus: int) -> Process:
        """Start a node and wait until it has joined."""
        agent = free_port()
        flags = [f"--address={self.gcs}", f"--num-cpus={num_cpus}", f"--dashboard-agent-listen-port={agent}"]
        environment = {**self.environment, "RAY_AUTH_MODE": "token"}  # a head alone finds the token by itself
        self.nodes.append(_start(flags, environment, lambda: _is_healthy(f"http://127.0.0.1:{agent}")))
        return self.nodes[-1]

    def kill(self) -> None:
        """End the nodes and the head; what each started ends with it."""
        for process in (*self.nodes, self.process):
            kill(process)


def kill(process: Process) -> None:
    """End a node."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(30)


def start_head(home: Path, *, port: int = 0, num_cpus: int = 8) -> Head:
    """Start `ray start --head` with `home` as the home folder, and wait until its job server answers."""
    token = home / ".ray" / "auth_token"
    token.parent.mkdir(parents=True, exist_ok=True)
    token.write_text("ab" * 32)
    port = port or free_port()
    metrics, agent, gcs = free_port(), free_port(), free_port()
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "IAB_VISION_"))}
    environment = kept | {
        "HOME": str(home),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(Path(__file__).resolve().parents[2]),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_metrics_report_interval_ms": "500",
        "RAY_agent_register_timeout_ms": str(1000 * READY_S),
    }
    flags = [
        "--head",
        f"--port={gcs}",
        f"--dashboard-port={port}",
        f"--dashboard-agent-listen-port={agent}",
        f"--metrics-export-port={metrics}",
        f"--num-cpus={num_cpus}",
    ]
    urls = [f"http://127.0.0.1:{port}", f"http://127.0.0.1:{metrics}/metrics", f"http://127.0.0.1:{agent}"]
    headers = {"Authorization": f"Bearer {token.read_text()}"}
    jobs = f"{urls[0]}/api/jobs/"

    def ready() -> bool:
        """The job server answers already while `ray start` may still give up."""
        return _is_healthy(urls[2]) and requests.get(jobs, headers=headers, timeout=5).ok

    process = _start(flags, environment, ready)
    return Head(*urls, f"127.0.0.1:{gcs}", environment, process)


def _is_healthy(agent: str) -> bool:
    return requests.get(f"{agent}/api/local_raylet_healthz", timeout=5).ok


def _start(flags: Sequence[str], environment: Mapping[str, str], ready: Callable[[], bool]) -> Process:
    """`ray start` with these flags, once ready. Raises RuntimeError if it ends, or after `READY_S`.

    It gives a node 30 s to register, too few on a machine that does other things too: then it starts again.
    """
    log = Path(environment["HOME"], "ray-start.log")
    process, deadline = _run_ray_start(flags, environment, log), time.monotonic() + READY_S
    while time.monotonic() < deadline:
        with suppress(requests.RequestException):
            if ready():
                return process
        if process.poll() is not None:
            if "timed out during startup" not in log.read_text():
                break
            process = _run_ray_start(flags, environment, log)
        time.sleep(0.5)
    kill(process)
    raise RuntimeError(f"not ready within {READY_S} s:\n{log.read_text()[-3000:]}")


def _run_ray_start(flags: Sequence[str], environment: Mapping[str, str], log: Path) -> Process:
    common = ["--block", f"--dashboard-agent-grpc-port={free_port()}", "--object-store-memory=200000000"]
    with log.open("wb") as output:
        return subprocess.Popen(
            ["ray", "start", *common, *flags],
            env=dict(environment),
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
