"""What names every id of the predictions: each class and each of its ancestors, with its threshold.

In a bundle and next to a published table it is `categories.parquet`; reports and logs have it in words.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.bundle.labelling import DEFAULT_THRESHOLD
from pipelines.specs import ModelSpec
from pipelines.taxonomy.taxonomy import Taxonomy

FILE = "categories.parquet"

CATEGORIES = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("name", pa.string(), nullable=False),
        pa.field("path", pa.string(), nullable=False),
        pa.field("parent_id", pa.string()),
        pa.field("tier", pa.int32(), nullable=False),
        pa.field("cattax", pa.int32(), nullable=False),
        pa.field("is_class", pa.bool_(), nullable=False),
        pa.field("threshold", pa.float32()),
        pa.field("published", pa.bool_(), nullable=False),
        pa.field("published_above", pa.bool_(), nullable=False),
    ]
)
NAMED = 8
"""Categories that a summary names."""


@dataclass(frozen=True)
class Category:
    """One id that predictions may hold."""

    id: str
    name: str
    path: str
    parent_id: str | None
    tier: int
    cattax: int
    is_class: bool
    """Whether the model has an output of its own for it; an ancestor's score comes from its classes."""
    threshold: float | None
    """Score from which it enters `cat`; None where no score is high enough."""
    published: bool
    """Whether it may enter `cat` at all."""
    published_above: bool
    """Whether an ancestor may."""


def list_categories(
    taxonomy: Taxonomy, class_ids: Sequence[str], thresholds: Mapping[str, float]
) -> list[Category]:
    """Every class in the order of the outputs, then every ancestor that is none."""
    limits = {one: thresholds.get(one, DEFAULT_THRESHOLD) for one in taxonomy.rollup(class_ids).ids}
    found = []
    for one, threshold in limits.items():
        node, possible = taxonomy.node(one), threshold <= 1
        found.append(
            Category(
                **asdict(node),
                path=taxonomy.path(one),
                cattax=taxonomy.cattax,
                is_class=one in class_ids,
                threshold=threshold if possible else None,
                published=possible,
                published_above=any(limits[parent] <= 1 for parent in taxonomy.ancestors(one)),
            )
        )
    return found


def categories_bytes(spec: ModelSpec, taxonomy: Taxonomy) -> bytes:
    """The bytes of `categories.parquet`; the same model gives the same bytes."""
    rows = [asdict(one) for one in list_categories(taxonomy, spec.class_ids, spec.thresholds)]
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows, schema=CATEGORIES), sink, compression="zstd")
    return bytes(sink.getvalue())


def count_published(categories: Sequence[Category]) -> str:
    """How many may enter `cat`, and their names: "1 of 24 categories (Sports), 0 of the 20 classes"."""
    passing = [one for one in categories if one.published]
    names = ", ".join(one.name for one in passing[:NAMED])
    more = f" and {len(passing) - NAMED} more" if len(passing) > NAMED else ""
    named = f" ({names}{more})" if passing else ""
    classes = sum(one.is_class for one in passing)
    of = sum(one.is_class for one in categories)
    return f"{len(passing)} of {len(categories)} categories{named}, {classes} of the {of} classes"
