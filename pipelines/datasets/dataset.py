"""Labels as a dataset has them become classes of a taxonomy, and its images are divided into splits.

The result names each image, its class indices and its split. No image is opened here.
"""

import csv
import io
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipelines.datasets import splits
from pipelines.datasets.errors import DatasetError
from pipelines.datasets.labels import Labels
from pipelines.datasets.pixels import class_matrix
from pipelines.datasets.readers import read, read_columns
from pipelines.datasets.settings import DataSettings, Splits
from pipelines.inventory import tables
from pipelines.messages import redact
from pipelines.storage.storage import open_storage
from pipelines.storage.uris import split
from pipelines.taxonomy import taxonomy
from pipelines.taxonomy.taxonomy import AmbiguousLabel, Taxonomy, UnknownLabel


@dataclass(frozen=True)
class LabelledData:
    """Images with their classes, divided into splits."""

    rows: pa.Table
    """Columns of `source.LOCATION`, group, classes list<int32>, split; row number = item id."""
    classes: tuple[str, ...]
    """Class ids in the model's order."""
    taxonomy: Taxonomy
    settings: DataSettings
    """What it was read by; an own table of categories by its absolute path."""
    multi_label: bool
    dropped: dict[str, int] = field(default_factory=dict)
    """Rows left out while reading, by reason."""
    divided_here: frozenset[str] = frozenset()
    """Splits that the dataset does not name itself: with other settings, other images would be in them."""

    @property
    def splits(self) -> npt.NDArray[np.str_]:
        return np.array(self.rows["split"].to_pylist(), dtype="<U10")

    def indices(self, split: str) -> npt.NDArray[np.int64]:
        return np.flatnonzero(self.splits == split)

    def with_splits(self, known: Mapping[str, str]) -> Self:
        """The same images, each in the split that its recorded URI is known by, if it is known."""
        own = self.rows["split"].to_pylist()
        chosen = [known.get(uri, split) for uri, split in zip(self.recorded_uris(), own, strict=True)]
        column = self.rows.schema.get_field_index("split")
        return replace(self, rows=self.rows.set_column(column, "split", pa.array(chosen, pa.string())))

    def recorded_uris(self) -> list[str]:
        """Every image's URI as it may be written down: without user names and signatures, which change."""
        return [redact(uri) for uri in self.rows["uri"].to_pylist()]

    def take(self, rows: npt.NDArray[np.int64]) -> pa.Table:
        """These rows, in this order, with their `item_id`."""
        return self.rows.take(pa.array(rows)).append_column("item_id", pa.array(rows, pa.int64()))

    def targets(self) -> npt.NDArray[Any]:
        """Class indices int64[N]; multi-label: uint8[N, C]."""
        classes = self.rows["classes"].combine_chunks()
        if not self.multi_label:
            return np.asarray(classes.flatten().to_numpy(), np.int64)
        return class_matrix(classes, len(self.classes))

    def class_counts(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Images of each class among these row numbers."""
        targets = self.targets()[rows]
        if self.multi_label:
            return np.asarray(targets.sum(axis=0, dtype=np.int64))
        return np.bincount(targets, minlength=len(self.classes))

    def rows_by_split(self) -> dict[str, npt.NDArray[np.int64]]:
        """Row numbers of every split that has some, the training split first."""
        found = {name: self.indices(name) for name in (splits.TRAIN, splits.VALIDATION, splits.TEST)}
        return {name: rows for name, rows in found.items() if len(rows)}

    def images_per_class(self, rows: Mapping[str, npt.NDArray[np.int64]]) -> dict[str, dict[str, int]]:
        """Split -> class id -> images, among the row numbers of each split."""
        return {
            name: dict(zip(self.classes, self.class_counts(of_split).tolist(), strict=True))
            for name, of_split in rows.items()
        }


def load(settings: DataSettings) -> LabelledData:
    """Read the dataset, resolve its labels and divide it.

    Raises:
        DatasetError: nothing there, a label that the taxonomy does not know.
        InputError: the dataset's own division cannot be used.
    """
    found, multi_label = read(settings.uri, settings.columns)
    labels = rename_labels(found["labels"].to_pylist(), settings.label_map)
    keep = np.array([names is not None and (bool(names) or multi_label) for names in labels], bool)
    if not keep.any():
        raise DatasetError(f"{redact(settings.uri)} holds no labelled image")
    found = found.filter(pa.array(keep))
    labelled = [names for names, kept in zip(labels, keep, strict=True) if names is not None and kept]
    dropped = {"without a label": int((~keep).sum())}
    known, ids = resolve_labels(labelled, settings.taxonomy, settings.tier)
    classes = tuple(order_classes(known, {name for names in ids for name in names}))
    rows, divided_here = divide_rows(found, ids, classes, settings.splits)
    return LabelledData(rows, classes, known, locate_taxonomy(settings), multi_label, dropped, divided_here)


def refuse_untrainable(data: LabelledData) -> None:
    """Raise DatasetError for a dataset that a model can be measured on but cannot learn from."""
    uri, classes = data.settings.uri, data.classes
    if len(classes) < 2:
        raise DatasetError(
            f"{uri} holds {len(classes)} class ({', '.join(classes)}); a classifier needs at least 2"
        )
    for name in (splits.TRAIN, splits.VALIDATION):
        if not len(data.indices(name)):
            raise DatasetError(
                f"{uri} has no {name} images; give more images, other --splits.*, or a split column that "
                f"names some `{name}`"
            )


def locate_taxonomy(settings: DataSettings) -> DataSettings:
    """The settings as a process with another working folder needs them."""
    name = settings.taxonomy
    is_local_table = name.endswith(".csv") and "://" not in name
    return replace(settings, taxonomy=str(Path(name).absolute())) if is_local_table else settings


def rename_labels(labels: Labels, label_map: str | None) -> Labels:
    """Labels through the map: an empty target drops the label, and with it an image of one label.

    A map whose first line is itself a label of the dataset has no header.
    """
    if label_map is None:
        return labels
    mapping = read_label_map(label_map, {name for names in labels for name in names or ()})
    mapped = [[mapping.get(name, name) for name in names] if names else names for names in labels]
    return [[name for name in names if name] if names else names for names in mapped]


def read_label_map(uri: str, known: Container[str]) -> dict[str, str]:
    """Label -> target, from the first two columns of a table."""
    folder, name = split(uri)
    if not open_storage(folder).exists(name):
        raise DatasetError(f"--label-map {redact(uri)} does not exist")
    schema = tables.schema_of([uri])
    if len(schema) < 2:
        raise DatasetError(
            f"--label-map {redact(uri)} has {len(schema)} column; it needs two: label and target"
        )
    table = read_columns(uri, schema, schema.names[:2])
    pairs = list(zip(table[0].to_pylist(), table[1].to_pylist(), strict=True))
    if schema.names[0] in known:
        pairs.insert(0, (schema.names[0], schema.names[1]))
    return {str(label): str(target or "") for label, target in pairs if label is not None}


def resolve_labels(
    labels: Sequence[Sequence[str]], taxonomy_name: str, tier: int | None
) -> tuple[Taxonomy, list[list[str]]]:
    """The taxonomy, and each row's labels as its ids.

    Raises:
        UnknownLabels: all labels that do not resolve.
    """
    distinct = sorted({name for names in labels for name in names})
    known = taxonomy.load(taxonomy_name, labels=distinct)
    deepest = max((node.tier for node in known.nodes), default=1)
    if tier and tier > deepest:
        raise DatasetError(f"tier is {tier}; taxonomy {taxonomy_name} has tiers 1 to {deepest}")
    ids: dict[str, str] = {}
    guesses: dict[str, str | None] = {}
    for name in distinct:
        try:
            ids[name] = lift_to_tier(known, known.resolve(name), tier)
        except (UnknownLabel, AmbiguousLabel):
            guesses[name] = next(iter(known.suggest(name)), None)
    if guesses:
        raise UnknownLabels(known, guesses, f"{len(guesses)} of {len(distinct)}")
    return known, [sorted({ids[name] for name in names}) for names in labels]


class UnknownLabels(DatasetError):
    """Labels that are not in the taxonomy, or mean several of its categories; the message lists all."""

    def __init__(self, known: Taxonomy, guesses: Mapping[str, str | None], share: str) -> None:
        self.known, self.guesses = known, guesses
        lines = [f"  {name}: {self._meaning(guess)}" for name, guess in guesses.items()]
        listed = "\n".join(lines)
        super().__init__(f"{share} labels are not in taxonomy {known.name}, or not unique:\n{listed}")

    def _meaning(self, guess: str | None) -> str:
        return f"{guess} ({self.known.path(guess)})?" if guess else "nothing similar"

    def label_map(self) -> bytes:
        """A label map to correct, as CSV: each label with the best guess, `?` where there is none."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["label", "target", "meaning"])
        for name, guess in self.guesses.items():
            writer.writerow([name, guess or "?", self.known.path(guess) if guess else ""])
        return text.getvalue().encode()


def lift_to_tier(known: Taxonomy, node_id: str, tier: int | None) -> str:
    """The node itself, or its ancestor of that tier when it is deeper."""
    if tier is None or known.node(node_id).tier <= tier:
        return node_id
    return next(ancestor for ancestor in known.ancestors(node_id) if known.node(ancestor).tier == tier)


def order_classes(known: Taxonomy, ids: set[str]) -> list[str]:
    """The classes in the taxonomy's own order, so that siblings are next to each other in every report."""
    return [node.id for node in known.nodes if node.id in ids]


def divide_rows(
    found: pa.Table, ids: list[list[str]], classes: Sequence[str], division: Splits
) -> tuple[pa.Table, frozenset[str]]:
    """The rows with class indices and a split each, reduced to `division.limit`; and the splits made here."""
    index = {node_id: i for i, node_id in enumerate(classes)}
    indices = [sorted(index[node_id] for node_id in names) for names in ids]
    table = found.append_column("classes", pa.array(indices, pa.list_(pa.int32()))).drop_columns(["labels"])
    strata = assign_strata(indices, len(classes))
    names, groups = number_groups(table)
    if division.limit and division.limit < len(strata):
        whole = table["split"].combine_chunks().dictionary_encode().indices.fill_null(-1).to_numpy() + 1
        kept = splits.sample(strata * (whole.max() + 1) + whole, division.limit, seed=division.seed)
        table, strata, groups = table.take(pa.array(kept)), strata[kept], groups[kept]
    chosen, divided_here = choose_splits(table, strata, groups, names, division)
    rows = table.drop_columns(["split"])
    return rows.append_column("split", pa.array(chosen.tolist(), pa.string())), divided_here


def choose_splits(
    table: pa.Table,
    strata: npt.NDArray[np.int64],
    groups: npt.NDArray[np.int64],
    group_names: Sequence[str],
    division: Splits,
) -> tuple[npt.NDArray[np.str_], frozenset[str]]:
    """Every row's split, and which splits the dataset did not name itself."""
    given = table["split"].to_pylist()
    if not any(given):
        shares = {
            splits.TRAIN: 1 - division.validation - division.test,
            splits.VALIDATION: division.validation,
            splits.TEST: division.test,
        }
        return splits.divide(strata, groups, shares, seed=division.seed), frozenset(shares)
    if not all(given):
        raise DatasetError(
            f"{given.count(None) + given.count('')} rows have no split; give all rows one, or none"
        )
    named = splits.parse_splits(given)
    splits.refuse_straddling(named, groups, group_names)
    completed = splits.carve_validation(
        named, strata, groups, validation_of_train=division.validation_of_train, seed=division.seed
    )
    moved = completed != named
    return completed, frozenset([*named[moved].tolist(), *completed[moved].tolist()])


def assign_strata(indices: Sequence[Sequence[int]], n_classes: int) -> npt.NDArray[np.int64]:
    """Each row's stratum: its rarest class; rows without any share one of their own."""
    counts = np.bincount([i for row in indices for i in row], minlength=n_classes)
    return np.array([min(row, key=lambda i: counts[i]) if row else n_classes for row in indices], np.int64)


def number_groups(table: pa.Table) -> tuple[list[str], npt.NDArray[np.int64]]:
    """Names of the groups, and each row's group; a row without a group is one of its own."""
    group = table["group"].combine_chunks()
    alone = pa.array([f"row {row}" for row in range(len(group))])
    encoded = pa.compute.coalesce(group, alone).dictionary_encode()
    return encoded.dictionary.to_pylist(), encoded.indices.to_numpy().astype(np.int64)
