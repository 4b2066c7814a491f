"""A real Prometheus with our rules that scrapes a head, and the queries of the dashboard to ask it."""

import json
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import requests
import yaml

from jobs import cli
from tests.builders.ray_head import Head, free_port

MONITORING = Path(cli.__file__).parent / "cluster" / "monitoring"
ALERTS, DASHBOARD = MONITORING / "alerts.yaml", MONITORING / "dashboard.json"


def panels() -> dict[str, list[str]]:
    """The dashboard's queries by the title of their panel."""
    found = json.loads(DASHBOARD.read_text())["panels"]
    return {panel["title"]: [target["expr"] for target in panel["targets"]] for panel in found}


class Prometheus:
    """Answers of the server at an address."""

    def __init__(self, address: str) -> None:
        self._url = f"http://{address}/api/v1"

    def values(self, query: str) -> list[float]:
        """What a query of the dashboard gives now; nothing while the server starts."""
        query = query.replace("$SessionName", ".+").replace("$Cluster", "here")
        try:
            found = requests.get(f"{self._url}/query", params={"query": query}, timeout=10).json()
        except requests.ConnectionError:
            return []
        return [float(each["value"][1]) for each in found["data"]["result"]]

    def rules(self) -> list[dict[str, Any]]:
        """The rules as they were evaluated last."""
        groups = requests.get(f"{self._url}/rules", timeout=10).json()["data"]["groups"]
        return [rule for group in groups for rule in group["rules"]]


@contextmanager
def prometheus(head: Head, folder: Path) -> Iterator[Prometheus]:
    """The server, which scrapes every second."""
    scraped = {"targets": [head.metrics.removeprefix("http://").removesuffix("/metrics")]}
    jobs = [{"job_name": "ray", "static_configs": [{**scraped, "labels": {"ray_io_cluster": "here"}}]}]
    every = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    folder.mkdir()
    (folder / "config.yaml").write_text(
        yaml.safe_dump({"global": every, "rule_files": [str(ALERTS)], "scrape_configs": jobs})
    )
    address = f"127.0.0.1:{free_port()}"
    options = {"config.file": "config.yaml", "storage.tsdb.path": "data", "web.listen-address": address}
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            ["prometheus", *(f"--{name}={value}" for name, value in options.items())],
            cwd=folder,
            stdout=log,
            stderr=log,
        )
    try:
        yield Prometheus(address)
    finally:
        process.terminate()
        process.wait(30)
