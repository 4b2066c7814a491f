"""Probabilities become top k, Tier 1 and `cat` as an ad server needs them."""

import numpy as np
import pyarrow as pa
import pytest

from pipelines import schema
from pipelines.bundle.labelling import build_labeller, passing_ids, top_positions
from pipelines.specs import ImageSpec, ModelSpec
from pipelines.taxonomy import taxonomy

CLASSES = ("483", "530", "avbNf2", "1")  # Sports, Sports > Sailing, Sensitive Topics > Arms, Automotive


def label(probabilities: list[list[float]], **settings: object) -> dict[str, list[object]]:
    options = {"thresholds": {}, **settings}
    top_k = options.pop("top_k", 2)
    spec = ModelSpec(CLASSES, "3.1", ImageSpec(), **options)  # type: ignore[arg-type]
    labels = build_labeller(spec, taxonomy.load("3.1"), top_k=top_k)  # type: ignore[arg-type]
    return labels.label(np.array(probabilities, np.float32)).to_pydict()


def test_labels_are_the_top_k_best_first() -> None:
    (labels,) = label([[0.1, 0.2, 0.3, 0.4]])["labels"]
    assert [entry["id"] for entry in labels] == ["1", "avbNf2"]  # type: ignore[attr-defined]
    assert [entry["score"] for entry in labels] == pytest.approx([0.4, 0.3])  # type: ignore[attr-defined]


def test_tier_1_is_chosen_after_rolling_children_up() -> None:
    out = label([[0.3, 0.3, 0.0, 0.4]])
    assert out["top_id"] == ["1"]
    assert out["tier1_id"] == ["483"]
    assert out["tier1_score"] == pytest.approx([0.6])


def test_cat_holds_classes_and_ancestors_that_pass_and_may_be_empty() -> None:
    out = label([[0.05, 0.9, 0.05, 0.0], [0.25, 0.25, 0.25, 0.25]], thresholds={"483": 0.6, "530": 0.95})
    assert out["cat"] == [["483"], []]


def test_more_labels_than_classes_are_not_invented() -> None:
    (labels,) = label([[0.1, 0.2, 0.3, 0.4]], top_k=50)["labels"]
    assert len(labels) == len(CLASSES)  # type: ignore[arg-type]


def test_columns_have_the_types_of_the_published_schema() -> None:
    labels = build_labeller(ModelSpec(CLASSES, "3.1", ImageSpec()), taxonomy.load("3.1"), top_k=3)
    table = labels.label(np.full((5, 4), 0.25, np.float32))
    for field in table.schema:
        assert field.type == schema.SCORED.field(field.name).type, field.name


def test_partial_sorts_give_what_full_sorts_give_ties_included() -> None:
    """Scores of two digits tie at every rank, also across the k-th and at the threshold."""
    rng = np.random.default_rng(0)
    scores_nc = rng.integers(0, 20, (64, 50)).astype(np.float32) / 20
    order_nc = np.argsort(-scores_nc, axis=1, kind="stable")
    for k in (1, 3, 50):
        assert (top_positions(scores_nc, k) == order_nc[:, :k]).all()
    ids = pa.array([str(column) for column in range(50)])
    expected = [
        [str(column) for column in row if scores_nc[at, column] >= 0.5] for at, row in enumerate(order_nc)
    ]
    assert passing_ids(ids, scores_nc, np.full(50, 0.5, np.float32)).to_pylist() == expected
