"""What a finished run says of itself: `state/report.json`, and one line on the terminal."""

import json
from collections import Counter
from collections.abc import Mapping
from typing import Any

from pipelines.inventory.plan import Plan
from pipelines.ledger.entries import sum_counts
from pipelines.ledger.ledger import Ledger
from pipelines.ledger.verify import REPORT_JSON
from pipelines.messages import redact
from pipelines.status import TRANSIENT
from pipelines.storage.storage import Storage

HOSTS_SHOWN = 20
"""Hosts in the report: those of most rows without a label."""


def is_current(state: Storage, ledger: Ledger) -> bool:
    """Whether the report is there and speaks of the ledger's last generation."""
    if not state.exists(REPORT_JSON):
        return False
    generation: int = json.loads(state.read(REPORT_JSON))["generation"]
    return generation == ledger.state.generation


def write(
    state: Storage, ledger: Ledger, plan: Plan, session: Mapping[str, Any], about: Mapping[str, Any]
) -> None:
    """Write the report.

    Args:
        session: what this process did: `images`, and `seconds` by stage; empty when it did nothing.
        about: model, provider and the like, copied.
    """
    statuses = counts(ledger)
    labels = sum_counts(file.labels for file in ledger.state.files.values())
    classify_s = session.get("seconds", {}).get("classify", 0.0)
    report = {
        "rows": plan.n_rows,
        "images": plan.n_items,
        "statuses": dict(sorted(statuses.items())),
        "retryable_rows": sum(statuses[status.value] for status in TRANSIENT),
        "failing_hosts": dict(ledger.hosts().most_common(HOSTS_SHOWN)),
        "labels": dict(labels.most_common()),
        "generation": ledger.state.generation,
        "last_session": {
            **session,
            "images_per_second": round(session["images"] / classify_s, 1) if classify_s else None,
        },
        **about,
    }
    state.put(REPORT_JSON, json.dumps(report, indent=1).encode())


def counts(ledger: Ledger) -> Counter[str]:
    """Published rows by status."""
    return sum_counts(file.statuses for file in ledger.state.files.values())


def one_line(ledger: Ledger, plan: Plan, table: Storage) -> str:
    counted = ", ".join(f"{name} {n:,}" for name, n in counts(ledger).most_common())
    return f"{redact(table.uri)}: {plan.n_rows:,} rows published ({counted or 'the inventory is empty'})"
