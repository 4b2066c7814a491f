"""Labels resolve or are refused with candidates; roll-ups never put a parent below its child."""

import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.messages import InputError
from pipelines.taxonomy import crosswalk, taxonomy

SMALL = "id,parent_id,name\nv9i3On,,Sensitive\nkid,v9i3On,Risky\n7,,Sports\n8,7,Tennis\n9,8,Clay court\n"


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> taxonomy.Taxonomy:
    path = tmp_path_factory.mktemp("own") / "small.csv"
    path.write_text(SMALL)
    return taxonomy.load(str(path))


@pytest.mark.parametrize(
    ("version", "cattax", "nodes", "tier1"),
    [
        ("1.0", 1, 392, 26),
        ("2.0", 2, 1179, 35),
        ("2.1", 5, 1179, 35),
        ("2.2", 6, 1196, 37),
        ("3.0", 7, 703, 37),
        ("3.1", 9, 704, 37),
    ],
)
def test_built_in_tables_are_whole(version: str, cattax: int, nodes: int, tier1: int) -> None:
    table = taxonomy.load(version)
    assert (table.cattax, table.version, len(table.nodes)) == (cattax, version, nodes)
    assert sum(node.tier == 1 for node in table.nodes) == tier1
    assert all(table.tier1(node.id) in table for node in table.nodes)
    assert taxonomy.load(table.name) == table


def test_default_is_3_1_with_ids_that_are_text() -> None:
    table = taxonomy.load()
    assert table.name == "iab-content-3.1"
    assert sum(not node.id.isdigit() for node in table.nodes) == 31
    assert table.node("v9i3On").name == "Sensitive Topics"


def test_descriptive_vectors_are_a_table_too() -> None:
    assert taxonomy.load("vectors-3.0").path("bsr002") == "Brand Suitability and Risk > High Risk"


@pytest.mark.parametrize("label", ["539", "Sports > Tennis", "sports>tennis", "Tennis", "  TENNIS "])
def test_labels_resolve_by_id_path_or_unique_name(label: str) -> None:
    assert taxonomy.load().resolve(label) == "539"


@pytest.mark.parametrize("label", ["home-garden", "home_and_garden", "Home & Garden", "HOME and  garden"])
def test_folder_names_resolve_with_or_without_and(label: str) -> None:
    assert taxonomy.load().resolve(label) == "274"


@pytest.mark.parametrize(("label", "candidate"), [("Tenis", "539 (Sports > Tennis)"), ("v9i3on", "v9i3On")])
def test_unknown_label_is_refused_with_close_ones(label: str, candidate: str) -> None:
    with pytest.raises(taxonomy.UnknownLabel) as refusal:
        taxonomy.load().resolve(label)
    assert candidate in str(refusal.value)
    assert str(pickle.loads(pickle.dumps(refusal.value))) == str(refusal.value)


def test_ambiguous_label_is_refused_with_all_candidates() -> None:
    with pytest.raises(taxonomy.AmbiguousLabel, match=r"1225.*1227.*1237"):
        taxonomy.load("2.2").resolve("Antarctica")


def test_tree_walks(small: taxonomy.Taxonomy) -> None:
    assert small.ancestors("9") == ("8", "7")
    assert small.tier1("9") == "7"
    assert small.path("9") == "Sports > Tennis > Clay court"
    assert [small.node(one).tier for one in ("7", "8", "9")] == [1, 2, 3]
    assert (small.name, small.cattax) == ("small", 500)


@pytest.mark.parametrize(
    ("table", "complaint"),
    [
        ("id,parent_id\n1,\n", "lacks name"),
        ("id,name\n", "no rows"),
        ("id,name\n1,\n", "line 2"),
        ("id,name\n1,a\n1,b\n", "given twice in the taxonomy: 1;"),
        ("id,parent_id,name\n1,2,a\n", "parent '2' of node '1'"),
        ("id,parent_id,name\n1,2,a\n2,1,b\n", "cycle: 1 > 2 > 1"),
    ],
)
def test_a_table_that_is_no_tree_is_refused(table: str, complaint: str, tmp_path: Path) -> None:
    path = tmp_path / "own.csv"
    path.write_text(table)
    with pytest.raises(InputError, match=complaint):
        taxonomy.load(str(path))


def test_a_missing_table_is_refused_with_the_built_in_ones() -> None:
    with pytest.raises(InputError, match=r"1\.0, 2\.0.*3\.1"):
        taxonomy.load("3.2")


def test_flat_labels_keep_their_spelling() -> None:
    pets = taxonomy.load("labels", labels=["cat", "Cat", "a > b"])
    assert [pets.resolve(label) for label in ("Cat", "cat", "a > b")] == ["Cat", "cat", "a > b"]
    assert pets.rollup(["cat", "Cat"]).ids == ("cat", "Cat")
    with pytest.raises(InputError, match="given twice"):
        taxonomy.load("labels", labels=["cat", "cat"])


def test_rollup_sums_what_excludes_and_takes_the_maximum_of_what_does_not(small: taxonomy.Taxonomy) -> None:
    rollup = small.rollup(["9", "7", "kid"])
    probabilities_nc = np.array([[0.25, 0.25, 0.5]], dtype=np.float32)
    assert rollup.ids == ("9", "7", "kid", "8", "v9i3On")
    assert [rollup.ids[column] for column in rollup.tier1] == ["7", "v9i3On"]
    assert rollup.apply(probabilities_nc).tolist() == [[0.25, 0.5, 0.5, 0.25, 0.5]]
    assert rollup.apply(probabilities_nc, multi_label=True).tolist() == [[0.25, 0.25, 0.5, 0.25, 0.5]]


def test_rollup_refuses_another_number_of_classes(small: taxonomy.Taxonomy) -> None:
    with pytest.raises(ValueError, match="3 probabilities per image; this roll-up has 2"):
        small.rollup(["7", "8"]).apply(np.zeros((1, 3), dtype=np.float32))


@given(seed=st.integers(0, 2**32 - 1), multi_label=st.booleans())
def test_no_parent_is_ever_below_its_child(seed: int, multi_label: bool) -> None:
    table = taxonomy.load()
    rng = np.random.default_rng(seed)
    classes = rng.permutation([node.id for node in table.nodes])[: rng.integers(1, 704)].tolist()
    logits_nc = rng.normal(size=(3, len(classes))) * 8
    probabilities_nc = np.exp(logits_nc) / np.exp(logits_nc).sum(axis=1, keepdims=True)
    rollup = table.rollup(classes)
    rolled_nc = rollup.apply(probabilities_nc.astype(np.float32), multi_label=multi_label)
    column = {one: index for index, one in enumerate(rollup.ids)}
    for one in rollup.ids:
        parent = table.node(one).parent_id
        assert parent is None or (rolled_nc[:, column[parent]] >= rolled_nc[:, column[one]]).all()
    assert rolled_nc.max() <= 1
    if not multi_label:
        np.testing.assert_allclose(rolled_nc[:, list(rollup.tier1)].sum(axis=1), 1, atol=1e-5)


def test_rollup_of_an_image_does_not_depend_on_its_batch() -> None:
    table = taxonomy.load()
    rollup = table.rollup([node.id for node in table.nodes])
    probabilities_nc = np.random.default_rng(3).dirichlet(np.ones(704), size=17).astype(np.float32)
    together = rollup.apply(probabilities_nc)
    alone = np.concatenate([rollup.apply(probabilities_nc[i : i + 1]) for i in range(17)])
    assert (together == alone).all()


@pytest.mark.parametrize(
    ("node_id", "source", "target", "ids", "lossy"),
    [
        ("539", "3.1", "2.2", ("539",), False),  # kept
        ("338", "2.2", "3.1", ("338",), True),  # Music and Audio -> Music
        ("mm3UXx", "2.2", "3.1", ("mm3UXx",), False),  # only its capitals changed
        ("IAB1-1", "1.0", "2.0", ("42",), False),
        ("IAB7-1", "1.0", "3.1", ("225",), False),  # the row that is misspelt AB7… as published
        ("IAB9-24", "1.0", "2.0", ("239",), True),  # "No Semantic Equivalency"
        ("IAB26", "1.0", "3.1", (), True),  # Illegal Content was dropped
        ("42", "3.1", "1.0", ("IAB1-1",), False),
        ("301", "2.0", "1.0", ("IAB7",), True),  # several 1.0 ids lead to it: their parent
        ("484", "3.1", "3.1", ("484",), False),
    ],
)
def test_crosswalk_says_what_is_lost(
    node_id: str, source: str, target: str, ids: tuple[str, ...], lossy: bool
) -> None:
    mapping = crosswalk.convert(node_id, taxonomy.load(source), taxonomy.load(target))
    assert mapping == crosswalk.Mapping(ids, lossy)


@pytest.mark.parametrize("source", taxonomy.CATTAX)
@pytest.mark.parametrize("target", taxonomy.CATTAX)
def test_every_id_maps_into_the_target_or_to_nothing(source: str, target: str) -> None:
    origin, destination = taxonomy.load(source), taxonomy.load(target)
    for node in origin.nodes:
        mapping = crosswalk.convert(node.id, origin, destination)
        assert all(one in destination for one in mapping.ids)
        assert mapping.ids or mapping.lossy


def test_a_users_own_table_has_no_crosswalk(small: taxonomy.Taxonomy) -> None:
    with pytest.raises(InputError, match="small"):
        crosswalk.convert("7", small, taxonomy.load())
