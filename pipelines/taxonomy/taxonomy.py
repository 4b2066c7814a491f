"""Category tables (IAB Content Taxonomy 1.0 to 3.1, a user's own, or flat labels) -> one tree.

Ids are case-sensitive text. A `Taxonomy` resolves labels, walks the tree and rolls class probabilities up
to ancestors.
"""

import csv
import difflib
import hashlib
import io
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from importlib import resources
from pathlib import PurePosixPath

import numpy as np
import numpy.typing as npt

from pipelines.messages import InputError
from pipelines.storage.storage import read_uri

CATTAX = {"1.0": 1, "2.0": 2, "2.1": 5, "2.2": 6, "3.0": 7, "3.1": 9}
"""Content Taxonomy version -> its number in AdCOM's list "Category Taxonomies"."""

DEFAULT = "3.1"
FLAT = "labels"
"""Name of the taxonomy whose ids are the labels of a dataset or bundle themselves."""
VECTORS = "vectors-3.0"
"""The descriptive vectors of 3.0 (form factor, purpose, brand suitability …), under the cattax of 3.0."""

OWN_CATTAX = 500
"""AdCOM reserves 500 and above for vendors: a user's own table, or flat labels."""

SEPARATOR = " > "


class UnknownLabel(InputError):
    """A label that is no id, path or name; the message lists close ones."""


class AmbiguousLabel(InputError):
    """A name or path that several nodes share; the message lists their ids."""


@dataclass(frozen=True)
class Node:
    """One category."""

    id: str
    parent_id: str | None
    name: str
    tier: int


@dataclass(frozen=True)
class Taxonomy:
    """A forest of categories, in the order of its table; parents may come after children."""

    name: str
    version: str
    cattax: int
    nodes: tuple[Node, ...]

    def node(self, node_id: str) -> Node:
        """The node of an id.

        Raises:
            UnknownLabel: there is none.
        """
        try:
            return self._by_id[node_id]
        except KeyError:
            raise self._unknown(node_id) from None

    def __contains__(self, node_id: object) -> bool:
        return node_id in self._by_id

    def ancestors(self, node_id: str) -> tuple[str, ...]:
        """Ids above a node, nearest first."""
        found = []
        parent = self.node(node_id).parent_id
        while parent is not None:
            found.append(parent)
            parent = self._by_id[parent].parent_id
        return tuple(found)

    def tier1(self, node_id: str) -> str:
        """The Tier 1 category that a node belongs to; a Tier 1 node is its own."""
        return (node_id, *self.ancestors(node_id))[-1]

    def path(self, node_id: str) -> str:
        """Names from Tier 1 down: "Sports > Tennis"."""
        ids = reversed((node_id, *self.ancestors(node_id)))
        return SEPARATOR.join(self._by_id[one].name for one in ids)

    def resolve(self, label: str) -> str:
        """The id that a label means: an id, a full path or a unique name.

        Case and spacing of names do not count, `-` and `_` are spaces, and `&` is "and": so folders may be
        called `ice-hockey` or `food_and_drink`.

        Raises:
            UnknownLabel: nothing matches; close labels are listed.
            AmbiguousLabel: several nodes match; all are listed.
        """
        if label in self._by_id:
            return label
        matches = self._by_text.get(_normalise(label), ())
        if not matches:
            raise self._unknown(label)
        if len(matches) > 1:
            raise AmbiguousLabel(
                f"label {label!r} means several nodes of {self.name}: {self._listing(matches)}; "
                "use the id or the full path"
            )
        return matches[0]

    def rollup(self, class_ids: Sequence[str]) -> "Rollup":
        """Extends the probabilities of these classes to all their ancestors."""
        for class_id in class_ids:
            self.node(class_id)
        return Rollup(self, tuple(class_ids))

    @cached_property
    def _by_id(self) -> dict[str, Node]:
        return {node.id: node for node in self.nodes}

    @cached_property
    def _by_text(self) -> dict[str, tuple[str, ...]]:
        """Normalised name or path -> ids; a Tier 1 name is its own path."""
        texts = ((text, node.id) for node in self.nodes for text in {node.name, self.path(node.id)})
        return group_pairs((_normalise(text), node_id) for text, node_id in texts)

    def suggest(self, label: str) -> list[str]:
        """Ids whose name, path or id resembles the label, the closest first."""
        folded = {node.id.casefold(): (node.id,) for node in self.nodes}
        texts = self._by_text | folded
        close = difflib.get_close_matches(_normalise(label), texts, n=5, cutoff=0.6)
        return list(dict.fromkeys(node_id for text in close for node_id in texts[text]))

    def _unknown(self, label: str) -> UnknownLabel:
        found = self.suggest(label)
        hint = f"did you mean {self._listing(found)}?" if found else "use an id, a full path or a unique name"
        return UnknownLabel(f"label {label!r} is not in {self.name}; {hint}")

    def _listing(self, ids: Iterable[str]) -> str:
        return ", ".join(f"{one} ({self.path(one)})" for one in ids)


@dataclass(frozen=True)
class Rollup:
    """Class probabilities -> probabilities of every class and every ancestor; no parent below its child."""

    taxonomy: Taxonomy
    class_ids: tuple[str, ...]

    @cached_property
    def ids(self) -> tuple[str, ...]:
        """The columns of `apply`: the classes in their order, then the ancestors that are not classes."""
        above = (parent for class_id in self.class_ids for parent in self.taxonomy.ancestors(class_id))
        return tuple(dict.fromkeys((*self.class_ids, *above)))

    @cached_property
    def tier1(self) -> tuple[int, ...]:
        """Columns of `apply` that are Tier 1 categories."""
        return tuple(
            column for column, one in enumerate(self.ids) if self.taxonomy.node(one).parent_id is None
        )

    @cached_property
    def _steps(self) -> tuple[tuple[int, int], ...]:
        """(child, parent) columns, deepest children first: each child is complete before it is added."""
        column = {one: index for index, one in enumerate(self.ids)}
        deepest_first = sorted(self.ids, key=lambda one: -len(self.taxonomy.ancestors(one)))
        edges = ((one, self.taxonomy.node(one).parent_id) for one in deepest_first)
        return tuple((column[child], column[parent]) for child, parent in edges if parent is not None)

    def apply(
        self, probabilities_nc: npt.NDArray[np.float32], *, multi_label: bool = False
    ) -> npt.NDArray[np.float32]:
        """[N, classes] -> [N, len(ids)]: sums over descendants, or their maximum when labels are independent.

        Summed edge by edge, not as a matrix product: rounding is monotone, so a parent is never below
        its child, and the result of an image does not depend on its batch.
        """
        rows, classes = probabilities_nc.shape
        if classes != len(self.class_ids):
            raise ValueError(
                f"{classes} probabilities per image; this roll-up has {len(self.class_ids)} classes"
            )
        columns = np.zeros((len(self.ids), rows), dtype=np.float32)
        columns[:classes] = probabilities_nc.T
        combine = np.maximum if multi_label else np.add
        for child, parent in self._steps:
            combine(columns[parent], columns[child], out=columns[parent])
        return np.ascontiguousarray(np.minimum(columns, np.float32(1.0)).T)


def load(name_or_uri: str = DEFAULT, *, labels: Sequence[str] = ()) -> Taxonomy:
    """A built-in table ("3.1", "iab-content-3.1", "vectors-3.0" …), or a CSV with the same columns.

    Args:
        name_or_uri: version, name, path or URI; or `FLAT`.
        labels: what the one tier of `FLAT` holds.

    Raises:
        InputError: no such table, or it is no tree.
    """
    if name_or_uri == FLAT:
        return _load_flat(labels)
    version = name_or_uri.removeprefix("iab-content-")
    if version in CATTAX:
        return _load_built_in(version)
    if name_or_uri == VECTORS:
        return Taxonomy(VECTORS, "3.0", CATTAX["3.0"], parse(read_packaged("vectors_3_0.csv")))
    text = read_table(name_or_uri)
    version = hashlib.sha256(text.encode()).hexdigest()[:12]
    return Taxonomy(PurePosixPath(name_or_uri).stem, version, OWN_CATTAX, parse(text))


@cache
def _load_built_in(version: str) -> Taxonomy:
    """One of the project's own versions; parsed once, as it cannot change."""
    text = read_packaged(f"content_{version.replace('.', '_')}.csv")
    return Taxonomy(f"iab-content-{version}", version, CATTAX[version], parse(text))


def _load_flat(labels: Sequence[str]) -> Taxonomy:
    if not labels:
        raise InputError(f"taxonomy {FLAT!r} holds the labels of a dataset or bundle; none are given")
    return Taxonomy(FLAT, "", OWN_CATTAX, _build_tree([{"id": label, "name": label} for label in labels]))


def read_packaged(file: str) -> str:
    """The text of one of the project's own tables."""
    return (resources.files("pipelines") / "taxonomy" / "tables" / file).read_text(encoding="utf-8")


def read_table(uri: str) -> str:
    """The text of a user's table. Raises InputError."""
    try:
        return read_uri(uri).decode("utf-8-sig")
    except (OSError, ValueError, ImportError) as error:  # ValueError: not UTF-8, or an unknown scheme
        known = ", ".join([*CATTAX, VECTORS])
        raise InputError(
            f"taxonomy {uri!r} is neither built in ({known}) nor a CSV that opens: {error}"
        ) from error


def parse(text: str) -> tuple[Node, ...]:
    """Nodes of a CSV with `id,name` and optionally `parent_id`; tiers follow from parents."""
    reader = csv.DictReader(io.StringIO(text))
    missing = sorted({"id", "name"} - set(reader.fieldnames or ()))
    if missing:
        raise InputError(f"the taxonomy lacks {' and '.join(missing)}; it needs the columns id and name")
    return _build_tree([{key: (value or "").strip() for key, value in row.items() if key} for row in reader])


def _build_tree(records: Sequence[dict[str, str]]) -> tuple[Node, ...]:
    """Nodes of records, checked to form a forest."""
    _check_ids(records)
    parents = {record["id"]: record.get("parent_id") or None for record in records}
    return tuple(
        Node(one, parents[one], record["name"], _tier_of(one, parents))
        for record in records
        for one in (record["id"],)
    )


def _check_ids(records: Sequence[dict[str, str]]) -> None:
    """Refuse nameless and repeated nodes."""
    if not records:
        raise InputError("the taxonomy has no rows")
    for line, record in enumerate(records, start=2):
        if not record["id"] or not record["name"]:
            raise InputError(f"line {line} of the taxonomy has no id or no name: {record}")
    repeated = [
        node_id for node_id, count in Counter(record["id"] for record in records).items() if count > 1
    ]
    if repeated:
        raise InputError(f"ids given twice in the taxonomy: {', '.join(repeated[:10])}; each must be unique")


def _tier_of(node_id: str, parents: dict[str, str | None]) -> int:
    """The tier of a node: 1 for a root.

    Raises:
        InputError: a parent is missing, or a node is its own ancestor.
    """
    seen = [node_id]
    while (parent := parents[seen[-1]]) is not None:
        if parent not in parents:
            raise InputError(f"the parent {parent!r} of node {seen[-1]!r} is not in the taxonomy")
        if parent in seen:
            raise InputError(f"the taxonomy has a cycle: {SEPARATOR.join([*seen, parent])}")
        seen.append(parent)
    return len(seen)


def _normalise(text: str) -> str:
    """Names and paths for comparing: case folded, one space between words, no "and" or "&"."""
    words = re.sub(r"[\s_&-]+", " ", text.casefold().replace(">", SEPARATOR)).split()
    return " ".join(word for word in words if word != "and")


def group_pairs(pairs: Iterable[tuple[str, str]]) -> dict[str, tuple[str, ...]]:
    """key -> all its values, in order."""
    groups: dict[str, list[str]] = {}
    for key, value in pairs:
        groups.setdefault(key, []).append(value)
    return {key: tuple(values) for key, values in groups.items()}
