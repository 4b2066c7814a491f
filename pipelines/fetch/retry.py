"""Why a request failed, and whether and when to try again."""

import asyncio
import logging
import random
import traceback
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

from pipelines import metrics
from pipelines.fetch.settings import FetchLimits
from pipelines.messages import redact
from pipelines.status import TRANSIENT, Status

logger = logging.getLogger(__name__)
_logged: set[tuple[str, str]] = set()

BACKOFF_FACTOR = 2.5
"""Four attempts 1, 2.5 and 6 seconds apart outlast a short outage and free their slot soon."""

MAX_RETRY_AFTER_S = 3_600.0
"""Cap on Retry-After, seconds; after a longer one the next pass tries again."""

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


class FetchError(Exception):
    """A request that brought no payload; it becomes the row's status and never leaves fetching."""

    def __init__(
        self, status: Status, error: str, *, retry_after_s: float | None = None, final: bool = False
    ) -> None:
        # One line of UTF-8 without secrets, ensured here for every source: texts come from libraries, the
        # inventory and servers (whose other bytes arrive as lone surrogates, which no Arrow string holds).
        text = " ".join(error.split()).encode(errors="replace").decode()
        self.error = redact(text)[:300] or status.value
        super().__init__(self.error)
        self.status = status
        self.retry_after_s = retry_after_s
        self.final = final or status not in TRANSIENT


def internal_error(error: BaseException) -> FetchError:
    """The status of an unexpected exception; the first of each line of code is logged with its traceback."""
    found = FetchError(Status.INTERNAL_ERROR, f"{type(error).__name__}: {error}")
    frames = traceback.extract_tb(error.__traceback__)
    kind = (type(error).__name__, str(frames[-1]) if frames else "")
    if kind not in _logged:
        _logged.add(kind)
        # without the exception itself, whose text may hold secrets
        logger.error("internal_error: %s\n%s", found.error, "".join(traceback.format_list(frames)))
    return found


def status_of_code(code: int) -> Status:
    """The row's status for an HTTP status code that is not a success."""
    if code >= 500:
        return Status.SERVER_ERROR
    return STATUS_OF_CODE.get(code, Status.HTTP_ERROR)


def backoff_s(attempt: int, backoff_base_s: float, jitter: float) -> float:
    """Wait after attempt 1, 2, …; `jitter` in [0, 1) spreads it over half to one and a half times that."""
    return float(backoff_base_s * BACKOFF_FACTOR ** (attempt - 1) * (0.5 + jitter))


def parse_retry_after(header: str | None, now: datetime | None = None) -> float | None:
    """Seconds of a `Retry-After` header, given as a number or a date (RFC 9110, 10.2.3), else None."""
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
class Retry:
    """Counts the attempts at one object and spaces them."""

    limits: FetchLimits
    timeout: asyncio.Timeout
    attempts: int = 0

    async def sleep(self, error: FetchError) -> bool:
        """Wait before the next attempt; False, at once, if there is none or it would start too late."""
        self.attempts += 1
        if error.final or self.attempts >= self.limits.max_attempts:
            return False
        wait_s = backoff_s(self.attempts, self.limits.backoff_s, random.random())
        wait_s = max(wait_s, error.retry_after_s or 0.0)
        deadline = self.timeout.when()
        if deadline is not None and asyncio.get_running_loop().time() + wait_s >= deadline:
            return False
        metrics.count("retries")
        await asyncio.sleep(wait_s)
        return True
