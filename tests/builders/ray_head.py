"""A real Ray head with its job server on this machine, as a process tree of its own."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import requests

READY_S = 240


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
    environment: Mapping[str, str]
    process: subprocess.Popen[bytes]

    def submit(self, *arguments: str) -> subprocess.Popen[str]:
        """Start `iab-vision submit ARGUMENTS` against this head."""
        return subprocess.Popen(
            [sys.executable, "-m", "jobs", "submit", "--address", self.address, *arguments],
            env=dict(self.environment),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def kill(self) -> None:
        """End the head; what it started ends with it."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(30)


def start_head(home: Path, *, port: int = 0, num_cpus: int = 8) -> Head:
    """Start `ray start --head` with `home` as the home folder, and wait until its job server answers."""
    token = home / ".ray" / "auth_token"
    token.parent.mkdir(parents=True, exist_ok=True)
    token.write_text("ab" * 32)
    port = port or free_port()
    metrics, agent = free_port(), free_port()
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "IAB_VISION_"))}
    environment = kept | {
        "HOME": str(home),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(Path(__file__).resolve().parents[2]),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_metrics_report_interval_ms": "500",
    }
    options = {
        "--port": free_port(),
        "--dashboard-port": port,
        "--dashboard-agent-listen-port": agent,
        "--dashboard-agent-grpc-port": free_port(),
        "--metrics-export-port": metrics,
        "--num-cpus": num_cpus,
        "--object-store-memory": 200_000_000,
    }
    process = subprocess.Popen(
        ["ray", "start", "--head", "--block", *(f"{name}={value}" for name, value in options.items())],
        env=environment,
        stdout=(home / "head.log").open("wb"),
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    urls = [f"http://127.0.0.1:{port}", f"http://127.0.0.1:{metrics}/metrics", f"http://127.0.0.1:{agent}"]
    head = Head(*urls, environment, process)
    deadline = time.monotonic() + READY_S
    headers = {"Authorization": f"Bearer {token.read_text()}"}
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if requests.get(f"{head.address}/api/jobs/", headers=headers, timeout=5).ok:
                return head
        except requests.RequestException:
            pass
        time.sleep(0.5)
    head.kill()
    raise RuntimeError(f"no job server within {READY_S} s:\n{(home / 'head.log').read_text()[-3000:]}")
