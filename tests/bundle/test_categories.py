"""Every id that predictions hold has a name, a place and a threshold, classes and ancestors alike."""

import io

import pyarrow.parquet as pq

from pipelines.bundle.categories import categories_bytes, count_published, list_categories
from pipelines.specs import ImageSpec, ModelSpec
from pipelines.taxonomy import taxonomy

CLASSES = ("518", "425", "v9i3On")
"""Sports > Skiing > … and Pets > Dogs have ancestors that are no classes."""
THRESHOLDS = {"518": 2.0, "425": 0.75, "v9i3On": 2.0, "483": 0.6, "422": 2.0}


def table() -> dict[str, dict]:
    spec = ModelSpec(CLASSES, "iab-content-3.1", ImageSpec(), thresholds=THRESHOLDS)
    rows = pq.read_table(io.BytesIO(categories_bytes(spec, taxonomy.load("3.1")))).to_pylist()
    return {row["id"]: row for row in rows}


def test_classes_and_all_their_ancestors_are_named():
    tree, rows = taxonomy.load("3.1"), table()
    wanted = {one for class_id in CLASSES for one in (class_id, *tree.ancestors(class_id))}
    assert rows.keys() == wanted
    assert {one for one, row in rows.items() if row["is_class"]} == set(CLASSES)
    assert (rows["425"]["path"], rows["425"]["parent_id"], rows["425"]["tier"]) == ("Pets > Dogs", "422", 2)
    assert rows["422"]["parent_id"] is None and rows["422"]["cattax"] == 9


def test_a_threshold_that_no_score_reaches_is_none_at_all():
    rows = table()
    assert (rows["425"]["threshold"], rows["425"]["published"]) == (0.75, True)
    assert (rows["518"]["threshold"], rows["518"]["published"]) == (None, False)
    assert rows["518"]["published_above"] and not rows["425"]["published_above"]


def test_summary_counts_parents_apart_from_classes():
    listed = list_categories(taxonomy.load("3.1"), CLASSES, dict.fromkeys(table(), 2.0) | {"483": 0.6})
    assert count_published(listed) == f"1 of {len(listed)} categories (Sports), 0 of the 3 classes"
