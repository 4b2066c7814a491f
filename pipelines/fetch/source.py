"""Where one object's bytes are, and what fetching made of it."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Self

import pyarrow as pa

from pipelines.fetch.retry import FetchError
from pipelines.status import Status
from pipelines.storage.uris import is_local

Span = tuple[int, int]
"""First byte and length of a part of an object."""


LOCATION = ("uri", "container", "offset", "length", "payload_column")
"""The fields of `Source` that say where the bytes are, as columns of the plan."""


@dataclass(frozen=True, slots=True)
class Validator:
    """What a server said of an object's bytes."""

    etag: str | None
    last_modified: str | None

    def __bool__(self) -> bool:
        return bool(self.etag or self.last_modified)


@dataclass(frozen=True, slots=True)
class Earlier:
    """What an earlier response said of an object, and the bytes that came with it."""

    validator: Validator
    sha256: str


@dataclass(frozen=True, slots=True)
class ContainerVersion:
    """What tells whether a file of many images is still the one that was planned."""

    size_bytes: int
    version: str
    """Its ETag or modification time; empty where the storage tells neither."""

    def check(self, size_bytes: int | None, versions: tuple[str | None, ...]) -> None:
        """Raise FetchError (`source_changed`) unless it has this size and one of these versions.

        What is None is not known. Images are found in it by their place: another file has others there.
        """
        known = {version.strip('"') for version in versions if version}
        same = not known or not self.version or self.version.strip('"') in known
        if not same or size_bytes not in (None, self.size_bytes):
            raise FetchError(Status.SOURCE_CHANGED, Status.SOURCE_CHANGED.meaning)


@dataclass(frozen=True, slots=True)
class Source:
    """Where one object's bytes are."""

    uri: str
    container: str | None = None
    offset: int | None = None
    length: int | None = None
    payload_column: str | None = None
    earlier: Earlier | None = None
    """Ask an http(s) server whether the object is still this one."""
    planned: "ContainerVersion | None" = None
    """The container when it was planned, if it holds several images."""

    @property
    def location(self) -> str:
        """The URI to open, without the white space that URLs bring along from web pages."""
        place = self.container or self.uri
        return place if is_local(place) else place.strip()

    @property
    def span(self) -> Span | None:
        return (self.offset, self.length) if self.offset is not None and self.length is not None else None


@dataclass(frozen=True)
class Fetched:
    """The result for one object: its payload, or the status and error that say why there is none."""

    status: Status
    error: str | None = None
    payload: bytes | None = None
    validator: Validator | None = None
    not_modified: bool = False
    """The object is as the source's `earlier` response said; there is no payload."""
    retry_after_s: float | None = None
    """How long the server asked to wait."""

    @classmethod
    def of(cls, outcome: bytes | FetchError) -> Self:
        if isinstance(outcome, FetchError):
            return cls(outcome.status, outcome.error, retry_after_s=outcome.retry_after_s)
        return cls(Status.OK, None, outcome)

    @cached_property
    def sha256(self) -> str | None:
        """Of the payload, in hexadecimal."""
        return hashlib.sha256(self.payload).hexdigest() if self.payload is not None else None


Batch = list[tuple[int, Fetched]]
"""Indexes of sources, each with its result."""


def sources_of(items: pa.Table, containers: Mapping[str, ContainerVersion] | None = None) -> list[Source]:
    """The sources of a plan's items (`plan.LOCATION`), and the versions of the containers among them."""
    columns = [items[name].to_pylist() for name in LOCATION]
    sources = [Source(*values) for values in zip(*columns, strict=True)]
    if not containers:
        return sources
    return [replace(source, planned=containers.get(source.container or "")) for source in sources]


def check_length(payload: bytes, source: Source) -> Fetched:
    """The payload, unless its container ends before the planned byte range does."""
    if source.length is not None and len(payload) != source.length:
        error = f"{len(payload):,} of {source.length:,} bytes: the container ends before this member does"
        return Fetched(Status.TRUNCATED, error)
    return Fetched.of(payload)
