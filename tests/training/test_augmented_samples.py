"""The report's sheet of augmented samples shows training images as a training step would change them."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pipelines.datasets import dataset, pixels
from pipelines.datasets.settings import DataSettings, ImageCache
from pipelines.images.pixels import pixels_of
from pipelines.specs import ImageSpec
from pipelines.training import evaluate
from pipelines.training.decoded import DecodedData
from pipelines.training.recipe import Augment
from tests.builders.training import RECIPE, image_folder

SPEC = ImageSpec(height=16, width=20)


@pytest.fixture
def corpus(tmp_path) -> DecodedData:
    """Twelve training images; nothing else of it is looked at."""
    folder = image_folder(tmp_path / "images")
    data = dataset.load(DataSettings(str(folder)))
    rows = {"train": data.indices("train")[:12]}
    return DecodedData(data, SPEC, pixels.enlarge(SPEC, 1.5), {}, rows, "memory", ImageCache(), [], {})


def test_the_sheet_shows_different_training_images_changed_and_at_the_models_size(corpus):
    recipe = replace(RECIPE, augment=Augment(repeats=1, brightness=0.8, erasing=1.0))
    shown = evaluate.augmented_samples(corpus, recipe)
    unchanged = evaluate.augmented_samples(corpus, RECIPE)
    assert len(shown) == len({one.uri for one in shown}) == evaluate.AUGMENTED_IMAGES
    assert all(one.pixels_hwc.shape == (16, 20, 3) for one in shown)
    differences = [
        np.abs(one.pixels_hwc.astype(int) - plain.pixels_hwc).mean()
        for one, plain in zip(shown, unchanged, strict=True)
    ]
    assert min(differences) > 5, "a picture was shown as it is"
    again = evaluate.augmented_samples(corpus, recipe)
    assert all(np.array_equal(a.pixels_hwc, b.pixels_hwc) for a, b in zip(shown, again, strict=True))


def test_without_augmentation_the_sheet_shows_the_images_themselves(corpus):
    rows = corpus.data.rows
    for one in evaluate.augmented_samples(corpus, RECIPE):
        index = rows["uri"].to_pylist().index(one.uri)
        table = rows.slice(index, 1).append_column("item_id", [[index]])
        [original] = pixels_of(pixels.decode_batch(table, SPEC)["pixels"], SPEC)
        assert np.abs(one.pixels_hwc.astype(int) - original).mean() < 25


def test_an_image_that_is_gone_leaves_the_sheet(corpus):
    first, *others = evaluate.augmented_samples(corpus, RECIPE)
    Path(first.uri.removeprefix("file://")).unlink()
    assert [one.uri for one in evaluate.augmented_samples(corpus, RECIPE)] == [one.uri for one in others]
