"""One night's counts, those of the nights before and what the run recorded -> what its page says. Pure.

`page` renders it. A single classification is a night without a date, a past or carried rows.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipelines.ledger.entries import sum_counts
from pipelines.nights import drift
from pipelines.nights.counts import ALL, NO_CATEGORY, SCORE, TIER1, TIER2, UNCERTAIN, NightCounts
from pipelines.nights.drift import Drift, Level, Signal
from pipelines.nights.settings import ReportSettings
from pipelines.status import Status
from pipelines.taxonomy.taxonomy import Taxonomy

PAST_DAYS = 28
"""Nights before tonight that it is compared with: four whole weeks, so that every weekday counts alike."""

HOSTS_LISTED = 20

ORIGINS = {
    "tonight": "Classified tonight, or without a label.",
    "carried": "The inventory says that the image has not changed. Carried over without a request.",
    "not_modified": "The server answered that it has not changed (HTTP 304). Carried over.",
    "same_bytes": "Fetched; its bytes were classified on an earlier night. Carried over.",
}
"""Where the result of a row comes from; `night.rows` of the report."""

DECISIONS = {
    "new": "Not in the table before.",
    "changed": "The inventory says that it has changed.",
    "asked": "Nothing in the inventory tells whether it has changed; its server was asked.",
    "retried": "It had no label before, for a reason that may have passed.",
    "carried": "Unchanged, by what the inventory says.",
    "carried_failure": "It failed for good some nights ago; it was not tried again.",
    "removed": "No longer in the inventory. Left out of tonight's table.",
}
"""What was decided about each image before anything was fetched; `night.images` of the report."""

STAGES = {
    "inventory": "Read the inventory",
    "plan": "Read the inventory and plan the work",
    "decide": "Compare with the night before",
    "carry": "Carry over what has not changed",
    "classify": "Fetch, decode, run the model, write",
    "gather": "Collect what the servers said for the next night",
    "publish": "Write the table",
}
"""What takes time, in order."""


@dataclass(frozen=True)
class NightFacts:
    """What is known of one night."""

    report: Mapping[str, Any]
    """`state/report.json` of the run."""
    counts: NightCounts
    settings: ReportSettings
    date: str | None = None
    past: Sequence[NightCounts] = ()
    """The nights before, of the same model."""
    last: NightCounts | None = None
    """The night before, whatever its model."""


def list_signals(tonight: NightCounts, past: Sequence[NightCounts]) -> list[Signal]:
    """What drift is looked for in: everything of all images, and Tier 1 of each segment that has enough."""
    found = [_signal(tonight, past, ALL, name) for name in (TIER1, TIER2, SCORE, UNCERTAIN, NO_CATEGORY)]
    by_segment = [_signal(tonight, past, segment, TIER1) for segment in tonight.signals if segment != ALL]
    return found + [signal for signal in by_segment if drift.has_enough(signal)]


def _signal(tonight: NightCounts, past: Sequence[NightCounts], segment: str, name: str) -> Signal:
    def cells(night: NightCounts) -> Mapping[str, int]:
        return night.signals.get(segment, {}).get(name, {})

    nights = [night for night in (tonight, *past) if cells(night)]
    sizes = [sum(cells(night).values()) for night in nights]
    effects = [night.series_effects.get(segment, {}).get(name, 1.0) for night in nights]
    weighted = sum(size * effect for size, effect in zip(sizes, effects, strict=True))
    effect = weighted / sum(sizes) if nights else 1.0
    return Signal(name, cells(tonight), [cells(night) for night in past if cells(night)], segment, effect)


def describe(night: NightFacts, taxonomy: Taxonomy) -> dict[str, Any]:
    """Everything that the page says, as plain data."""
    drifts = drift.judge(list_signals(night.counts, night.past))
    return {
        "date": night.date,
        "rows": night.counts.rows,
        "images": night.counts.images,
        "carried": night.counts.carried,
        "failed": night.counts.rows - night.counts.statuses.get(Status.OK, 0),
        "past_nights": len(night.past),
        "compared_with_last": night.last is not None,
        "about": _about(night),
        "origins": _explain(ORIGINS, night.report.get("night", {}).get("rows", {})),
        "decisions": _explain(DECISIONS, night.report.get("night", {}).get("images", {})),
        "unreliable_hosts": night.report.get("night", {}).get("unreliable_hosts", []),
        "statuses": _statuses(night),
        "hosts": _hosts(night),
        "work": _work(night),
        "labels": {name: _labels(night, name, taxonomy) for name in (TIER1, TIER2)},
        "scores": _scores(night),
        "drift": describe_drift(drifts, taxonomy),
    }


def describe_drift(drifts: Sequence[Drift], taxonomy: Taxonomy) -> dict[str, Any]:
    """The verdict: the level of the night, each signal, and one sentence for a person."""
    level = drift.highest(drifts)
    signals = [drift.describe(one) for one in sorted(drifts, key=lambda one: (-one.level, one.p))]
    for signal in signals:
        for mover in signal["movers"]:
            mover["name"] = _name_cell(taxonomy, signal["signal"], mover["id"])
    return {
        "level": level.name,
        "judged": any(one.is_judged for one in drifts),
        "signals": signals,
        "summary": _summary(level, signals),
    }


def _summary(level: Level, signals: Sequence[Mapping[str, Any]]) -> str:
    judged = [signal for signal in signals if signal["judged"]]
    if not judged:
        return f"not judged: it needs {drift.MIN_IMAGES} images classified tonight, and as many before"
    if level is Level.none:
        nights = max(signal["past_nights"] for signal in judged)
        past = f"the past {nights} nights" if nights > 1 else "the night before"
        return f"none: new images have labels like those of {past}"
    first = judged[0]
    moved = ", ".join(
        f"{mover['name']} {100 * mover['past_share']:.1f} → {100 * mover['share']:.1f} %"
        for mover in first["movers"]
    )
    segment = f" of {first['segment']}" if first["segment"] else ""
    return f"{level.name}: {first['signal']}{segment} ({moved})"


def name_of(taxonomy: Taxonomy, node_id: str) -> str:
    """The path of a category; the id itself where the taxonomy does not have it."""
    return taxonomy.path(node_id) if node_id in taxonomy else node_id


def _name_cell(taxonomy: Taxonomy, signal: str, cell: str) -> str:
    if signal == SCORE:
        return f"{cell} to {float(cell) + 0.1:.1f}"
    if signal in (UNCERTAIN, NO_CATEGORY):
        return signal if cell == "yes" else f"not {signal}"
    return name_of(taxonomy, cell)


def _about(night: NightFacts) -> dict[str, str]:
    report = night.report
    return {
        "model": report.get("model_id", night.counts.model_id),
        "taxonomy": report.get("taxonomy", ""),
        "precision": report.get("precision", ""),
        "provider": ", ".join(report.get("providers", [])),
        "certified": "yes" if report.get("certified", True) else "no: no certificate covers what ran",
        "generation": str(night.counts.generation),
    }


def _explain(meanings: Mapping[str, str], counted: Mapping[str, int]) -> list[dict[str, Any]]:
    """Counts that are there, each with its meaning."""
    return [
        {"name": name, "meaning": meaning, "count": counted[name]}
        for name, meaning in meanings.items()
        if name in counted
    ]


def _statuses(night: NightFacts) -> list[dict[str, Any]]:
    last = night.last.statuses if night.last else {}
    names = sorted({*night.counts.statuses, *last}, key=lambda name: -night.counts.statuses.get(name, 0))
    return [
        {
            "name": name,
            "meaning": Status(name).meaning if name in set(Status) else "",
            "rows": night.counts.statuses.get(name, 0),
            "last": last.get(name, 0),
        }
        for name in names
    ]


def _hosts(night: NightFacts) -> list[dict[str, Any]]:
    last = night.last.hosts if night.last else {}
    hosts = list(night.counts.hosts.items())[:HOSTS_LISTED]
    return [{"name": name, "rows": rows, "last": last.get(name, 0)} for name, rows in hosts]


def _work(night: NightFacts) -> dict[str, Any]:
    """Stages with their seconds, the rate, and the cost."""
    session = night.report.get("last_session", {})
    seconds = {name: session.get("seconds", {}).get(name) for name in STAGES}
    if seconds["decide"] is not None:
        seconds["plan"] = None  # the sum of the others
    spent = {name: each for name, each in seconds.items() if each is not None}
    price, nodes, images = night.settings.price_per_node_hour, night.settings.nodes, session.get("images", 0)
    cost = None if price is None else price * nodes * sum(spent.values()) / 3600
    return {
        "stages": [{"name": name, "meaning": STAGES[name], "seconds": each} for name, each in spent.items()],
        "seconds": sum(spent.values()),
        "longest": max(spent, key=lambda name: spent[name], default=None),
        "images": images,
        "images_per_second": session.get("images_per_second"),
        "cost": cost,
        "cost_per_million_rows": _per_million(cost, night.counts.rows),
        "cost_per_million_images": _per_million(cost, images),
        "nodes": nodes,
        "price_per_node_hour": price,
    }


def _per_million(cost: float | None, n: int) -> float | None:
    return 1e6 * cost / n if n and cost is not None else None


def _labels(night: NightFacts, signal: str, taxonomy: Taxonomy) -> list[dict[str, Any]]:
    """Categories with their share tonight and before, those with the most images first."""
    tonight, past = _shares(night, signal)
    counted = night.counts.signals.get(ALL, {}).get(signal, {})
    ids = sorted({*tonight, *past}, key=lambda one: (-tonight.get(one, 0), -past.get(one, 0), one))
    return [
        {
            "id": one,
            "name": name_of(taxonomy, one),
            "images": counted.get(one, 0),
            "share": tonight.get(one, 0.0),
            "past_share": past.get(one, 0.0),
        }
        for one in ids
    ]


def _scores(night: NightFacts) -> dict[str, Any]:
    tonight, past = _shares(night, SCORE)
    uncertain, past_uncertain = _shares(night, UNCERTAIN)
    empty, past_empty = _shares(night, NO_CATEGORY)
    weights = [(one.images, one.mean_top_score) for one in night.past if one.mean_top_score is not None]
    n_past = sum(images for images, _ in weights)
    return {
        "bins": [
            {"from": at / 10, "share": tonight.get(f"0.{at}", 0.0), "past_share": past.get(f"0.{at}", 0.0)}
            for at in range(10)
        ],
        "mean": night.counts.mean_top_score,
        "past_mean": sum(images * mean for images, mean in weights) / n_past if n_past else None,
        "uncertain": uncertain.get("yes", 0.0) if uncertain else None,
        "past_uncertain": past_uncertain.get("yes", 0.0) if past_uncertain else None,
        "no_category": empty.get("yes", 0.0) if empty else None,
        "past_no_category": past_empty.get("yes", 0.0) if past_empty else None,
    }


def _shares(night: NightFacts, signal: str) -> tuple[dict[str, float], dict[str, float]]:
    """Share of images by cell, tonight and on the past nights together; empty where there are none."""
    found = _signal(night.counts, night.past, ALL, signal)
    return _normalise(found.tonight), _normalise(sum_counts(found.past))


def _normalise(cells: Mapping[str, int]) -> dict[str, float]:
    total = sum(cells.values())
    return {cell: images / total for cell, images in cells.items()} if total else {}
