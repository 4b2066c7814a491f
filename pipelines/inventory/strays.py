"""Rows of a table that name images outside the places that it may read: counted, and refused where many."""

from collections import Counter
from collections.abc import Sequence

import pyarrow as pa
import pyarrow.compute as pc

from pipelines.messages import InputError, redact
from pipelines.storage.objects import OBJECT_SCHEMES
from pipelines.storage.places import Places, place_of
from pipelines.storage.uris import scheme_of

REFUSED_SHARE = 0.1
"""Share of the rows from which on strays are a flag that was forgotten, not rows that went astray."""

PLACES_SHOWN = 5


class Strays:
    """Rows by the place that would have to be allowed for them."""

    def __init__(self, base: str, allowed: Sequence[str]) -> None:
        self._base, self._allowed = base, allowed
        self._places = Places.of(base, allowed)
        self._n_rows = 0
        self._found: Counter[str] = Counter()

    def count(self, uris: pa.Array, containers: pa.Array) -> None:
        """Add a batch of rows: their bytes are in the container, if there is one, else at the URI."""
        self._n_rows += len(uris)
        locations = pc.utf8_trim_whitespace(pc.coalesce(containers, uris))
        web = pc.match_substring_regex(locations, "^https?://", ignore_case=True)
        others = locations.filter(pc.invert(web))
        for found in pc.value_counts(pc.replace_substring_regex(others, "[^/]*$", "")).to_pylist():
            location = found["values"] + "x"
            if not self._places.permit(location):
                self._found[place_of(location)] += found["counts"]

    def refuse_many(self) -> None:
        """Raises InputError if too many rows of the table are outside."""
        n_strays = self._found.total()
        if not n_strays or n_strays < REFUSED_SHARE * self._n_rows:
            return
        most = self._found.most_common(PLACES_SHOWN)
        counts = ", ".join(f"{n:,} in {_shown(place)}" for place, n in most)
        more = f", and {len(self._found) - len(most):,} places more" if len(self._found) > len(most) else ""
        allow = ",".join([*self._allowed, *(_shown(place) for place, _ in most)])
        raise InputError(
            f"{n_strays:,} of {self._n_rows:,} rows name images outside of {redact(self._base)} and the web, "
            f"which is all that this inventory may read: {counts}{more}. If these are the images, add "
            f"--fetch.allow {allow}"
        )


def _shown(place: str) -> str:
    """The place without a password; what is before the @ of an Azure container is its name."""
    return place if scheme_of(place) in OBJECT_SCHEMES else redact(place)
