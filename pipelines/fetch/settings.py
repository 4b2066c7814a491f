"""How images are fetched: what one request may cost, and how many are made at a time."""

from ipaddress import ip_network
from typing import Annotated

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt

from pipelines.specs import validated

Timeout = Annotated[float, Field(ge=0.05)]


@validated
class FetchLimits:
    """What one request may cost, and how politely many are made."""

    concurrency: PositiveInt = 128
    """Requests in flight per load actor."""
    per_host: PositiveInt = 16
    """http(s) requests in flight per host (name and port), shared out among the load actors; where they are
    more, they take turns. Each halves its share when the host answers 429 or 5xx, and lets it grow again."""
    breaker_failures: PositiveInt = 20
    """Failures of one http(s) host in a row (connections, time-outs, 429, 5xx), over 15 s and more, after
    which its further images are not tried in this pass, but for one every 30 s."""
    connect_timeout_s: Timeout = 5.0
    """Time to connect, seconds."""
    read_timeout_s: Timeout = 15.0
    """Longest silence between two reads, seconds."""
    total_timeout_s: Timeout = 60.0
    """Longest time for one object, all attempts included, seconds."""
    max_attempts: PositiveInt = 4
    """Requests made for one object before its failure is recorded."""
    backoff_s: NonNegativeFloat = 1.0
    """Wait before the second attempt, seconds, jittered; each further one waits 2.5 times longer."""
    max_bytes: PositiveInt = 64_000_000
    """Largest object, bytes, enforced while streaming."""
    max_buffered_bytes: int = 512_000_000
    """Bytes of payloads in memory per load actor, until they are decoded; further ones wait their turn.
    A row group of a Parquet table that holds the images may come on top."""
    max_redirects: NonNegativeInt = 5
    """http(s) redirects followed."""
    user_agent: str = "iab-vision/0.1 (+image categorisation; contact your publisher account manager)"
    """User-Agent of http(s) requests."""
    allow_private_addresses: bool = False
    """Fetch from private, loopback and link-local addresses too (tests, intranets)."""
    allowed_networks: tuple[str, ...] = ()
    """Private networks that may be fetched from all the same, as `10.20.0.0/16`."""
    allow: tuple[str, ...] = ()
    """Where an inventory may name images besides http(s) and its own bucket or folder: `s3://other/,/mnt/images`."""

    def __post_init__(self) -> None:
        if self.max_buffered_bytes < self.max_bytes:
            raise ValueError(
                f"max_buffered_bytes is {self.max_buffered_bytes}; "
                f"it must be at least max_bytes, {self.max_bytes}"
            )
        for network in self.allowed_networks:
            ip_network(network)
        for place in self.allow:
            if not place.startswith("/") and "://" not in place:
                raise ValueError(f"allow names {place}; a place is an absolute path, or SCHEME://BUCKET/")
