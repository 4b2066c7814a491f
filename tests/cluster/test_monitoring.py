"""The dashboard and the alert rules ask for what a run exports, and the alerts fire."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from pipelines import metrics
from tests.builders.prometheus import ALERTS, DASHBOARD, panels

ROOT = Path(metrics.__file__).parents[1]
EXPORTED = {
    *(f"{name}_total" for name in metrics.COUNTERS),
    *metrics.GAUGES,
    *(f"{metrics.STAGE_SECONDS}_{part}" for part in ("bucket", "sum", "count")),
}

needs_promtool = pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")


def queries() -> list[str]:
    return [query for asked in panels().values() for query in asked]


def test_every_figure_that_is_asked_for_is_exported_and_every_exported_one_is_shown() -> None:
    asked = {name for text in queries() for name in re.findall(r"ray_iab_vision_(\w+)", text)}
    alerted = set(re.findall(r"ray_iab_vision_(\w+)", ALERTS.read_text()))
    assert asked | alerted <= EXPORTED
    assert asked == EXPORTED


def test_the_dashboard_filters_by_rays_own_variables() -> None:
    variables = {each["name"] for each in json.loads(DASHBOARD.read_text())["templating"]["list"]}
    assert variables == {"datasource", "SessionName", "Cluster"}
    assert all('SessionName=~"$SessionName"' in text for text in queries())


def test_every_gauge_that_is_set_is_named_among_the_gauges() -> None:
    code = "".join(path.read_text() for room in ("pipelines", "jobs") for path in (ROOT / room).rglob("*.py"))
    assert set(re.findall(r'metrics\.put\("(\w+)"', code)) == set(metrics.GAUGES)
    assert set(re.findall(r'metrics\.count\("(\w+)"', code)) == set(metrics.COUNTERS)


def promtool(*arguments: str, at: Path) -> None:
    done = subprocess.run(["promtool", *arguments], cwd=at, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@needs_promtool
def test_the_rules_are_valid_and_each_alert_fires(tmp_path: Path) -> None:
    for path in (ALERTS, Path(__file__).parent / "alerts_test.yaml"):
        shutil.copy(path, tmp_path)
    promtool("check", "rules", "alerts.yaml", at=tmp_path)
    promtool("test", "rules", "alerts_test.yaml", at=tmp_path)
    tested = yaml.safe_load((tmp_path / "alerts_test.yaml").read_text())["tests"][0]["alert_rule_test"]
    rules = yaml.safe_load(ALERTS.read_text())["groups"][0]["rules"]
    assert {one["alertname"] for one in tested if "exp_alerts" in one} == {rule["alert"] for rule in rules}


@needs_promtool
def test_the_dashboards_queries_are_valid(tmp_path: Path) -> None:
    filled = [text.replace("$SessionName", ".+").replace("$Cluster", ".*") for text in queries()]
    rules = [{"record": f"panel:{number}", "expr": text} for number, text in enumerate(filled)]
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": rules}]}))
    promtool("check", "rules", "rules.yaml", at=tmp_path)
