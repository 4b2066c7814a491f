"""One night's rows and distinct new images are counted apart; pictures are chosen among the latter."""

from pathlib import Path

from pipelines.fetch.settings import FetchLimits
from pipelines.nights.counts import (
    ALL,
    NO_CATEGORY,
    SCORE,
    TIER1,
    TIER2,
    UNCERTAIN,
    NightCounts,
    count_night,
    open_night,
    read_counts,
)
from pipelines.nights.pictures import choose_pictures, fetch_pictures
from pipelines.storage.storage import open_storage
from tests.builders.models import dataset
from tests.nights.tables import TREE, carried, row, write_rows

TENNIS, SAILING, FOOD = "542", "530", "210"


def count(folder: Path, names: list[str], *, by: tuple[str, ...] = ()) -> NightCounts:
    with open_night(open_storage(str(folder)), names, by=by) as database:
        return count_night(database, TREE, by=by)


def test_only_distinct_images_of_the_night_count_towards_drift(tmp_path):
    copies = [row(at, SAILING, sha256="0" * 64) for at in range(10, 30)]
    rows = [row(0, SAILING), row(1, FOOD), *copies, carried(2, FOOD), row(3, None), row(6, None)]
    found = count(tmp_path, [write_rows(tmp_path, rows)])
    assert (found.rows, found.carried, found.images) == (25, 1, 3)
    assert found.statuses == {"ok": 23, "not_found": 2}
    assert found.hosts == {"cdn0.example": 2}
    assert found.signals[ALL][TIER1] == {TREE.tier1(SAILING): 2, TREE.tier1(FOOD): 1}
    assert read_counts(found.to_json()) == found


def test_labels_are_counted_by_the_tier_above_them(tmp_path):
    deep = next(node for node in TREE.nodes if node.tier == 3)
    found = count(tmp_path, [write_rows(tmp_path, [row(0, deep.id), row(1, deep.parent_id)])])
    assert found.signals[ALL][TIER2] == {deep.parent_id: 2}
    assert found.signals[ALL][TIER1] == {TREE.tier1(deep.id): 2}


def test_scores_and_missing_categories_are_counted(tmp_path):
    rows = [row(0, FOOD, top_score=1.0, cat=[]), row(1, FOOD, top_score=0.31), row(2, FOOD, top_score=0.05)]
    signals = count(tmp_path, [write_rows(tmp_path, rows)]).signals[ALL]
    assert signals[SCORE] == {"0.9": 1, "0.3": 1, "0.0": 1}
    assert signals[UNCERTAIN] == {"yes": 2, "no": 1}
    assert signals[NO_CATEGORY] == {"yes": 1, "no": 2}


def test_carried_columns_are_counted_on_their_own(tmp_path):
    """An image that two publishers use counts for both, and once in all."""
    shared = [row(at, SAILING, sha256="0" * 64) for at in (0, 1)]
    name = write_rows(tmp_path, [*shared, row(2, FOOD), row(4, FOOD, publisher="it's")])
    found = count(tmp_path, [name], by=("publisher", "page_url"))
    assert found.images == 3
    tier1 = TREE.tier1(SAILING)
    assert [found.signals[f"publisher=p{at}"][TIER1][tier1] for at in (0, 1)] == [1, 1]
    assert sum(found.signals["publisher=it's"][TIER1].values()) == 1
    assert found.signals[ALL][TIER1][tier1] == 1


def test_alike_pictures_of_one_folder_are_a_series_and_a_large_folder_is_none(tmp_path):
    labels = (SAILING, FOOD, TENNIS, FOOD)
    by_folder = [row(at, labels[at // 3 % 4], uri=f"https://x/{at // 3}/{at}.jpg") for at in range(120)]
    found = count(tmp_path, [write_rows(tmp_path, by_folder)])
    assert found.series_effects[ALL][TIER1] == 3
    section = [row(at, labels[at // 60 % 2], uri=f"https://x/{at // 60}/{at}.jpg") for at in range(120)]
    found = count(tmp_path, [write_rows(tmp_path, section)])
    assert found.series_effects[ALL][TIER1] == 1


def test_night_in_which_nothing_was_classified(tmp_path):
    found = count(tmp_path, [write_rows(tmp_path, [carried(0, FOOD), row(1, None)])])
    assert (found.rows, found.images, found.mean_top_score) == (2, 0, None)
    assert found.signals == {ALL: {}}


def test_pictures_are_of_every_category_and_of_the_least_certain(tmp_path):
    pictures = dataset(tmp_path / "pictures", 10)
    uris = sorted(str(path) for path in pictures.glob("*.jpg"))
    rows = [row(at, FOOD, uri=uri, top_score=0.9 - at / 100) for at, uri in enumerate(uris)]
    rows += [row(50, SAILING, uri=str(tmp_path / "gone.jpg"), top_score=0.95), carried(60, TENNIS)]
    name = write_rows(tmp_path, rows)
    with open_night(open_storage(str(tmp_path)), [name]) as database:
        gallery = choose_pictures(database, 6)
    shown = fetch_pictures(gallery, {}, FetchLimits())
    assert [picture.tier1_id for picture in shown.by_category] == [
        *[TREE.tier1(FOOD)] * 3,
        TREE.tier1(SAILING),
    ]
    assert shown.by_category[0].thumbnail.startswith("data:image/jpeg;base64,")
    assert shown.by_category[-1].thumbnail is None
    assert shown.least_certain[0].uri == uris[-1]
