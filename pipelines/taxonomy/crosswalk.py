"""An id of one Content Taxonomy version -> the ids of another, and whether meaning was lost.

IAB Tech Lab publishes one mapping, 1.0 to 2.0. From 2.0 to 3.1 ids keep their meaning where they are kept;
a dropped one becomes its nearest kept ancestor. Nothing is guessed by similarity of names.
"""

import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

from pipelines.messages import InputError
from pipelines.taxonomy.taxonomy import CATTAX, Taxonomy, group_pairs, load, read_packaged

OLDEST, BRIDGE = "1.0", "2.0"
"""Ids of 1.0 (`IAB1-6`) share nothing with later ones; the published table maps them to 2.0 and back."""


@dataclass(frozen=True)
class Mapping:
    """What an id maps to: `ids` is empty when nothing fits, `lossy` is set when meaning was lost."""

    ids: tuple[str, ...]
    lossy: bool


def convert(node_id: str, source: Taxonomy, target: Taxonomy) -> Mapping:
    """Express an id of the source version in the target version.

    Raises:
        UnknownLabel: the id is not in the source.
        InputError: one of the two is no Content Taxonomy.
    """
    source.node(node_id)
    for taxonomy in (source, target):
        if CATTAX.get(taxonomy.version) != taxonomy.cattax:
            raise InputError(
                f"no mapping from or to {taxonomy.name}; there is one between {', '.join(CATTAX)}"
            )
    if source.version == target.version:
        return Mapping((node_id,), lossy=False)
    if source.version == OLDEST:
        return _chain(_from_oldest(node_id, source), load(BRIDGE), target)
    if target.version == OLDEST:
        bridged = _keep(node_id, source, load(BRIDGE))
        return _join(bridged, [_to_oldest(one, load(BRIDGE), target) for one in bridged.ids])
    return _keep(node_id, source, target)


def _chain(first: Mapping, bridge: Taxonomy, target: Taxonomy) -> Mapping:
    """Map the ids of a mapping into the target version."""
    return _join(first, [convert(one, bridge, target) for one in first.ids])


def _join(first: Mapping, further: Sequence[Mapping]) -> Mapping:
    """The ids of the second step, lossy when either step was."""
    ids = tuple(dict.fromkeys(one for mapping in further for one in mapping.ids))
    return Mapping(ids, lossy=first.lossy or not ids or any(mapping.lossy for mapping in further))


def _keep(node_id: str, source: Taxonomy, target: Taxonomy) -> Mapping:
    """Follow an id between 2.0 and 3.1: itself, or its nearest ancestor that the target kept.

    A node that was renamed beyond case and punctuation counts as lossy: "Music and Audio" became "Music".
    """
    for one in (node_id, *source.ancestors(node_id)):
        if one in target:
            renamed = _letters(source.node(one).name) != _letters(target.node(one).name)
            return Mapping((one,), lossy=one != node_id or renamed)
    return Mapping((), lossy=True)


def _letters(name: str) -> str:
    """A name without case, punctuation and "and"."""
    words = "".join(char if char.isalnum() else " " for char in name.casefold()).split()
    return " ".join(word for word in words if word != "and")


def _from_oldest(node_id: str, oldest: Taxonomy) -> Mapping:
    """From 1.0 to 2.0; lossy when the table says so or when other 1.0 ids map to the same node."""
    forward, noted, backward = _read_mapping()
    for one in (node_id, *oldest.ancestors(node_id)):
        if one in forward:
            target = forward[one]
            return Mapping((target,), lossy=one != node_id or one in noted or len(backward[target]) > 1)
    return Mapping((), lossy=True)


def _to_oldest(node_id: str, bridge: Taxonomy, oldest: Taxonomy) -> Mapping:
    """From 2.0 back to 1.0; where several 1.0 ids map here, their nearest common node."""
    _, noted, backward = _read_mapping()
    for one in (node_id, *bridge.ancestors(node_id)):
        if one in backward:
            shared = _nearest_common(backward[one], oldest.ancestors)
            exact = one == node_id and len(backward[one]) == 1 and backward[one][0] not in noted
            return Mapping((shared,) if shared else (), lossy=not exact)
    return Mapping((), lossy=True)


def _nearest_common(ids: Sequence[str], ancestors: Callable[[str], Sequence[str]]) -> str | None:
    """The nearest node at or above all of these; None when they share none."""
    lines = [(one, *ancestors(one)) for one in ids]
    return next((one for one in lines[0] if all(one in line for line in lines[1:])), None)


@cache
def _read_mapping() -> tuple[dict[str, str], frozenset[str], dict[str, tuple[str, ...]]]:
    """The table 1.0 -> 2.0: forward, the ids whose row has a note, and backward."""
    rows = list(csv.DictReader(io.StringIO(read_packaged("map_1_0_to_2_0.csv"))))
    forward = {row["from_id"]: row["to_id"] for row in rows}
    noted = frozenset(row["from_id"] for row in rows if row["note"])
    return forward, noted, group_pairs((row["to_id"], row["from_id"]) for row in rows)
