"""How classify divides its work, what it tries again, and when it refuses to publish."""

from collections.abc import Mapping
from dataclasses import field
from typing import Annotated

from pydantic import AfterValidator, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from pipelines.messages import suggestion
from pipelines.specs import Fraction, validated
from pipelines.status import Status

NAMED = 5
"""Reasons and hosts that a refusal names."""


@validated
class Workers:
    """The two pools of classify and the grain of the work."""

    load_actors: NonNegativeInt = 0
    """Actors that fetch and decode; 0 sizes the pool from the cluster."""
    infer_actors: NonNegativeInt = 0
    """Actors that own an ONNX session; 0 is one per GPU, or one per CPU core."""
    start_s: PositiveFloat = 120.0
    """Longest wait on Ray for the first actor of each pool, seconds: nodes that join, image pull, model."""
    items_per_batch: NonNegativeInt = 0
    """Images that travel together; 0 is 64 on CPU, and the batch size on GPU."""
    items_per_part: PositiveInt = 20_000
    """Images per part file, fewer where these answer for over 100,000 rows: what a crash may cost."""
    rows_per_file: PositiveInt = 1_000_000
    """Rows per published file, about 100 MB."""


@validated
class Passes:
    """How often failures that may pass are tried again."""

    retry_passes: NonNegativeInt = 2
    """Later passes over rows that failed for a passing reason, before they are recorded."""
    retry_pause_s: NonNegativeFloat = 10.0
    """Pause before each later pass, seconds."""
    outage_wait_s: NonNegativeFloat = 300.0
    """Longest wait before the last pass, while nearly everything fails or servers ask for it, seconds."""


def _check_statuses(shares: dict[str, float]) -> dict[str, float]:
    for name in shares:
        if name not in set(Status):
            raise ValueError(f"{name!r} is not a status{suggestion(name, list(Status))}")
    return shares


@validated
class ErrorBudget:
    """Rows without a label beyond which a table is not published."""

    max_error_rate: Fraction = 0.5
    """Largest share of rows without a label that is still published."""
    max_error_rate_of: Annotated[dict[str, Fraction], AfterValidator(_check_statuses)] = field(
        default_factory=dict
    )
    """Largest share of rows with one status, `status=share`."""

    def find_excess(self, statuses: Mapping[str, int], hosts: Mapping[str, int]) -> str | None:
        """Why so many rows without a label must not be published, naming reasons and hosts; or None."""
        rows = max(1, sum(statuses.values()))
        failed = {status: n for status, n in statuses.items() if status != Status.OK.value}
        shares = {
            f"rate of {status}": (failed.get(status, 0), limit)
            for status, limit in self.max_error_rate_of.items()
        }
        shares["error rate"] = (sum(failed.values()), self.max_error_rate)
        over = [
            f"the {name} is {n / rows:.1%} ({n:,} of {rows:,} rows), the limit is {limit:.1%}"
            for name, (n, limit) in shares.items()
            if n > limit * rows
        ]
        if not over:
            return None
        return f"{'; '.join(over)}. Top reasons: {_format_top(failed)}. Top hosts: {_format_top(hosts)}"


def _format_top(counted: Mapping[str, int]) -> str:
    """The most frequent names with their counts, as text."""
    ordered = sorted(counted.items(), key=lambda pair: (-pair[1], pair[0]))[:NAMED]
    return ", ".join(f"{name} {n:,}" for name, n in ordered) or "none"
