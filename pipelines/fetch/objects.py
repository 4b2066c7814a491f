"""Objects in s3://, gs:// and az:// buckets -> bytes, one attempt at a time, through obstore.

obstore costs a twelfth of s3fs's CPU per object. Its own retries are off: `Downloader` retries every kind of
source the same way. Credentials come from the environment's usual chains.
"""

import re
from typing import TYPE_CHECKING, Any

from pipelines.fetch.memory import Reservation
from pipelines.fetch.retry import FetchError, status_of_code
from pipelines.fetch.settings import FetchLimits
from pipelines.fetch.source import Source
from pipelines.status import Status
from pipelines.storage.objects import open_client, store_settings

if TYPE_CHECKING:
    from obstore import GetOptions

CODE = re.compile(r"status code: (\d{3})([^:\n]{0,60})")
KIND = re.compile(r"HttpError \{\s+kind: (\w+)")
MESSAGE = re.compile(r'message: "([^"]{1,200})"')
REASON = re.compile(r"<Code>(\w{1,60})</Code>")
STATUS_OF_REASON = {"RequestTimeout": Status.TIMEOUT} | dict.fromkeys(
    """
    ExpiredToken TokenRefreshRequired InvalidToken InvalidAccessKeyId SignatureDoesNotMatch
    RequestTimeTooSkewed RequestExpired AuthenticationFailed ExpiredAuthenticationToken
    """.split(),  # noqa: SIM905
    Status.CREDENTIALS_FAILED,
)
"""Error codes of S3 and Azure that say nothing about the object: our keys or our clock are wrong, or we were
too slow. Their HTTP codes, 400 and 403, would make the failure final."""

BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(@[A-Za-z0-9.-]+)?")
"""Names of buckets and containers, and Azure's `container@account`; others make obstore panic."""

ODD_KEY = re.compile(r"^/|//|/$|(^|/)\.\.?(/|$)")
"""Keys that obstore cannot express (it drops a leading slash): they are legal, and s3fs reads them."""


MAX_BUCKETS = 256
"""Buckets whose clients are kept: each has 120 kB."""


class BucketClient:
    """Owns one obstore client, with its connection pool, for each of the last buckets."""

    def __init__(self, limits: FetchLimits) -> None:
        self._limits = limits
        self._stores: dict[str, Any] = {}

    async def get(self, uri: str, source: Source, reservation: Reservation) -> bytes:
        """One attempt: the payload, or the source's span of it. Raises FetchError."""
        from obstore import get_async

        bucket, key = parse(uri)
        span = source.span
        options: GetOptions | None = {"range": (span[0], span[0] + span[1])} if span else None
        try:
            result = await get_async(self._store(bucket), key, options=options)
            if source.planned:
                source.planned.check(result.meta["size"], (result.meta["e_tag"],))
            await reservation.reserve(result.range[1] - result.range[0])
            return bytes(await result.bytes_async())
        except FetchError:
            raise
        except Exception as error:  # obstore raises its own, builtin ones and some that cannot be imported
            raise to_fetch_error(error) from None

    def _store(self, bucket: str) -> Any:
        self._stores[bucket] = self._stores.pop(bucket, None) or open_store(bucket, self._limits)
        if len(self._stores) > MAX_BUCKETS:
            del self._stores[next(iter(self._stores))]  # the one that was not used for longest
        return self._stores[bucket]


def parse(uri: str) -> tuple[str, str]:
    """`scheme://bucket` and the key, which is taken literally. Raises FetchError (`invalid_uri`)."""
    scheme, _, rest = uri.partition("://")
    bucket, _, key = rest.partition("/")
    if not BUCKET.fullmatch(bucket) or not key:
        raise FetchError(Status.INVALID_URI, f"{scheme}:// needs a bucket's name and a key")
    return f"{scheme.lower()}://{bucket}", key


def is_odd(uri: str) -> bool:
    """Whether obstore would read another key than this one."""
    return ODD_KEY.search(uri.partition("://")[2].partition("/")[2]) is not None


def open_store(bucket: str, limits: FetchLimits) -> Any:
    """An obstore client that tries once, within the limits.

    The time-out for a whole object is the downloader's, which pauses while the body waits for memory.
    """
    settings = store_settings(bucket, 0.0)
    settings["retry_config"] = {"max_retries": 0}
    settings["client_options"] |= {
        "connect_timeout": f"{limits.connect_timeout_s}s",
        "read_timeout": f"{limits.read_timeout_s}s",
        "timeout": "1day",
        "user_agent": limits.user_agent,
    }
    return open_client(bucket, settings)


def to_fetch_error(error: Exception) -> FetchError:
    """The status of an obstore error, of which only the text says what happened."""
    text = str(error)
    reason = REASON.search(text)
    found = CODE.search(text)
    if found:
        described = f"HTTP {found[1]}{found[2].rstrip()}" + (f" ({reason[1]})" if reason else "")
        known = STATUS_OF_REASON.get(reason[1]) if reason else None
        status = known or status_of_code(int(found[1]))
        return FetchError(status, described, final=status is Status.CREDENTIALS_FAILED)
    if isinstance(error, FileNotFoundError):
        return FetchError(Status.NOT_FOUND, "no such object")
    if isinstance(error, ValueError):
        return FetchError(Status.INVALID_URI, text)
    kind = KIND.search(text)
    if kind and kind[1] == "Timeout":
        return FetchError(Status.TIMEOUT, "no answer within the time limit")
    message = MESSAGE.search(text)
    first_line = text.split("\n", 1)[0].rpartition(" - ")[2]
    return FetchError(Status.CONNECTION_FAILED, message[1] if message else first_line)
