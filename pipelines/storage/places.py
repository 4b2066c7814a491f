"""Places that an inventory may name images in: the web, its own store or folder, and those allowed besides.

An inventory is other people's text: no row of it may read a file or bucket only because a worker can. Links
inside a permitted folder are followed.
"""

import os
import posixpath
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from pipelines.storage.objects import OBJECT_SCHEMES
from pipelines.storage.uris import local_file, scheme_of


@dataclass(frozen=True)
class Places:
    """Permitted prefixes, in their canonical spelling; http(s) is always permitted."""

    prefixes: tuple[str, ...]

    @classmethod
    def of(cls, base: str, allowed: Sequence[str]) -> Self:
        """The allowed places, and the bucket or folder of an inventory whose relative URIs start there."""
        return cls(tuple(_canonical(place) for place in (_bucket_of(base), *allowed)))

    def permit(self, location: str) -> bool:
        """Whether this may be read; what names no place is invalid, but permitted."""
        if scheme_of(location) in ("http", "https") or not _names_place(location):
            return True
        found = _canonical(location)
        return any(found == prefix or found.startswith(f"{prefix}/") for prefix in self.prefixes)


def place_of(location: str) -> str:
    """What would have to be allowed for a location: its bucket, or the first two folders of its path."""
    found = _canonical(location)
    scheme, separator, rest = found.rpartition("://")
    if separator:
        return f"{scheme}://{rest.partition('/')[0]}/"
    return "/".join(found.split("/")[:-1][:3]) + "/"


def _bucket_of(base: str) -> str:
    scheme, separator, rest = base.partition("://")
    return f"{scheme}://{rest.partition('/')[0]}" if separator and scheme_of(base) in OBJECT_SCHEMES else base


def _names_place(location: str) -> bool:
    return "://" in location or location.startswith("~") or (location[:1] == "/" and location[:2] != "//")


def _canonical(location: str) -> str:
    """One spelling of what may be written in several ways, without a slash at its end; `..` is resolved."""
    scheme = scheme_of(location)
    if scheme == "file":
        return os.path.normpath(os.fsdecode(local_file(location))).rstrip("/")
    rest = location.partition("://")[2]
    return f"{OBJECT_SCHEMES.get(scheme, scheme)}://{rest and posixpath.normpath(rest)}".rstrip("/")
