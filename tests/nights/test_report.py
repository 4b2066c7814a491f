"""The page of a night says what happened, against the nights before, and loads nothing from elsewhere."""

import re

from pipelines.nights import report
from pipelines.nights.counts import ALL, TIER1, TIER2, UNCERTAIN, NightCounts
from pipelines.nights.page import duration, p_value, points, render_night
from pipelines.nights.pictures import Gallery, Picture
from pipelines.nights.report import NightFacts
from pipelines.nights.settings import ReportSettings
from tests.nights.tables import TREE

SPORTS, FOOD = "483", "210"
RUN = {
    "model_id": "m1",
    "taxonomy": "3.1",
    "certified": True,
    "night": {
        "images": {"new": 90, "changed": 10, "asked": 200, "carried": 700, "removed": 5},
        "rows": {"carried": 700, "not_modified": 190, "same_bytes": 10, "tonight": 100},
        "unreliable_hosts": [{"host": "<b>cdn</b>", "images": 9, "unreliable": 8}],
    },
    "last_session": {
        "images": 100,
        "images_per_second": 50.0,
        "seconds": {
            "inventory": 1.0,
            "decide": 0.5,
            "carry": 0.5,
            "plan": 1.0,
            "classify": 2.0,
            "publish": 1.0,
        },
    },
}


def night(sports: int, food: int, *, failed: int = 0, host: str = "cdn.example") -> NightCounts:
    tiers = {SPORTS: sports, FOOD: food}
    signals = {TIER1: tiers, TIER2: tiers, UNCERTAIN: {"yes": food, "no": sports}}
    return NightCounts(
        model_id="m1",
        generation=1,
        rows=1000,
        carried=900,
        images=sports + food,
        mean_top_score=0.75,
        statuses={"ok": 1000 - failed, "timeout": failed},
        hosts={host: failed},
        signals={ALL: signals, "publisher=7": signals, "publisher=8": {TIER1: {FOOD: 3}}},
    )


def facts(tonight: NightCounts, *, price: float | None = 3.6) -> NightFacts:
    past = [night(500, 500) for _ in range(4)]
    return NightFacts(
        RUN,
        tonight,
        ReportSettings(price_per_node_hour=price, nodes=2),
        "2026-11-21",
        past,
        night(500, 500, failed=4),
    )


def test_replaced_category_is_an_alarm_that_names_it():
    found = report.describe(facts(night(0, 1000)), TREE)["drift"]
    assert found["level"] == "alarm"
    assert {mover["name"] for mover in found["signals"][0]["movers"]} == {"Sports", "Food & Drink"}
    assert "Sports 50.0 → 0.0 %" in found["summary"]
    assert {signal["segment"] for signal in found["signals"]} == {"", "publisher=7"}


def test_same_labels_are_no_drift_and_a_small_night_is_not_judged():
    assert report.describe(facts(night(500, 500)), TREE)["drift"]["level"] == "none"
    small = report.describe(facts(night(20, 20)), TREE)["drift"]
    assert small["level"] == "none"
    assert small["summary"].startswith("not judged")


def test_time_and_cost_count_no_stage_twice():
    work = report.describe(facts(night(50, 50)), TREE)["work"]
    assert work["seconds"] == 5.0
    assert work["longest"] == "classify"
    assert work["cost"] == 5.0 / 3600 * 3.6 * 2
    assert work["cost_per_million_images"] == 1e6 * work["cost"] / 100
    assert report.describe(facts(night(50, 50), price=None), TREE)["work"]["cost"] is None


def test_statuses_and_hosts_are_shown_against_last_night():
    found = report.describe(facts(night(50, 50, failed=9)), TREE)
    assert [(one["name"], one["rows"], one["last"]) for one in found["statuses"]][1] == ("timeout", 9, 4)
    assert found["hosts"] == [{"name": "cdn.example", "rows": 9, "last": 4}]


def test_page_is_self_contained_and_escapes_what_it_shows():
    pictures = Gallery((Picture("https://x/<script>alert(1)</script>", SPORTS, ((SPORTS, 0.9),), None),), ())
    document = report.describe(facts(night(0, 1000, failed=3, host="<i>bad</i>")), TREE)
    page = render_night(document, pictures, TREE)
    assert not re.search(r"(src|href)=\"(?!#|data:)", page)
    assert "<script>alert" not in page
    assert "<i>bad" not in page
    assert "&lt;b&gt;cdn" in page


def test_page_of_a_single_run_has_no_comparisons():
    alone = NightFacts({}, night(50, 50), ReportSettings())
    page = render_night(report.describe(alone, TREE), Gallery(), TREE)
    assert "last night" not in page
    assert "Drift" not in page


def test_page_of_an_empty_inventory():
    empty = NightCounts("m1", 1, 0, 0, 0, None, {}, {}, {ALL: {}})
    assert "None was classified" in render_night(
        report.describe(NightFacts({}, empty, ReportSettings(price_per_node_hour=1.0)), TREE), Gallery(), TREE
    )


def test_numbers_are_readable():
    assert [duration(s) for s in (3.21, 75, 4020)] == ["3.2 s", "1 min 15 s", "1 h 07 min"]
    assert [points(share) for share in (0.0312, -0.0001, 0)] == ["+3.1", "0.0", "0.0"]
    assert [p_value(p) for p in (0.0123, 1e-9)] == ["0.0123", "< 0.0001"]
