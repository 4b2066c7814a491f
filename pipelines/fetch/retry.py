"""What one request came to, and whether and when the next one is made."""

import asyncio
import random
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

from pipelines.messages import redact
from pipelines.specs import FetchLimits
from pipelines.status import TRANSIENT, Status

BACKOFF_FACTOR = 2.5
"""Four attempts 1, 2.5 and 6 seconds apart outlast the usual hiccup without holding a place for long."""

MAX_RETRY_AFTER_S = 3_600.0
"""The longest peace that a host is given: one that asks for a year is asked again in the next pass."""

STATUS_OF_CODE = {
    401: Status.DENIED,
    403: Status.DENIED,
    404: Status.NOT_FOUND,
    408: Status.TIMEOUT,
    410: Status.NOT_FOUND,
    425: Status.THROTTLED,
    429: Status.THROTTLED,
    451: Status.DENIED,
}


class Failure(Exception):
    """One request did not bring the object's bytes; becomes a row's status, never leaves fetching."""

    def __init__(
        self, status: Status, error: str, *, retry_after_s: float | None = None, final: bool = False
    ) -> None:
        # One line of UTF-8 without secrets, here once for all: texts come from libraries, servers (whose
        # other bytes arrive as lone surrogates, which no Arrow string holds) and the inventory.
        text = " ".join(error.split()).encode(errors="replace").decode()
        self.error = redact(text)[:300] or status.value
        super().__init__(self.error)
        self.status = status
        self.retry_after_s = retry_after_s
        self.final = final or status not in TRANSIENT


def status_of_code(code: int) -> Status:
    """The row's status for an HTTP status code that is not a success."""
    if code >= 500:
        return Status.SERVER_ERROR
    return STATUS_OF_CODE.get(code, Status.HTTP_ERROR)


def backoff_s(attempt: int, backoff_base_s: float, jitter: float) -> float:
    """Wait after attempt 1, 2, …; `jitter` in [0, 1) spreads it over half to one and a half times that."""
    return float(backoff_base_s * BACKOFF_FACTOR ** (attempt - 1) * (0.5 + jitter))


def retry_after_s(header: str | None, now: datetime | None = None) -> float | None:
    """Seconds that a `Retry-After` header asks for: a number or a date (RFC 9110, 10.2.3), else None."""
    try:
        wait_s = float(header or "")
    except ValueError:
        try:
            moment = parsedate_to_datetime(header or "")
        except (ValueError, TypeError, OverflowError):
            return None
        moment = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
        wait_s = (moment - (now or datetime.now(UTC))).total_seconds()
    return min(max(0.0, wait_s), MAX_RETRY_AFTER_S)


@dataclass
class Attempts:
    """The attempts at one object: when the next may be made, and whether there is one."""

    limits: FetchLimits
    timeout: asyncio.Timeout
    number: int = 0

    async def wait_after(self, failure: Failure) -> bool:
        """Whether there is another attempt, after the wait that is due; never waits into the time-out."""
        if failure.final or self.number >= self.limits.max_attempts:
            return False
        wait_s = backoff_s(self.number, self.limits.backoff_s, random.random())
        wait_s = max(wait_s, failure.retry_after_s or 0.0)
        deadline = self.timeout.when()
        if deadline is not None and asyncio.get_running_loop().time() + wait_s >= deadline:
            return False
        await asyncio.sleep(wait_s)
        return True
