"""Augmentation changes what it says, leaves the rest, and does not depend on how a batch is shared out."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from pipelines.training import augment
from pipelines.training.recipe import Augment

OFF = Augment(min_crop_scale=1, crop_aspect=1, flip=0)
EVERYTHING = Augment(
    rotation_degrees=20, brightness=0.4, contrast=0.4, saturation=0.4, hue_degrees=20, blur=0.5, erasing=0.5,
    vertical_flip=0.5, randaugment_num_ops=2, mixup=0.4, cutmix=1.0,
)  # fmt: skip


def pixels(n: int = 8, side: int = 24) -> torch.Tensor:
    """Smooth pictures: a gradient across, one down, and a constant."""
    ramp = np.linspace(20, 230, side)
    one = np.stack(
        [np.tile(ramp, (side, 1)), np.tile(ramp[:, None], (1, side)), np.full((side, side), 90.0)], 2
    )
    return torch.from_numpy(np.stack([np.roll(one, 2 * i, 2) for i in range(n)]).astype(np.uint8))


def changed(spec: Augment, images: torch.Tensor, seed: int = 0, side: int = 24) -> torch.Tensor:
    draws = augment.draw(spec, len(images), torch.Generator().manual_seed(seed))
    return augment.apply(images, draws, height=side, width=side)


def plain(images: torch.Tensor) -> torch.Tensor:
    return images.permute(0, 3, 1, 2).float() / 255


def test_nothing_asked_for_changes_nothing():
    torch.testing.assert_close(changed(OFF, pixels()), plain(pixels()), atol=1e-5, rtol=0)


def test_flips_mirror_the_picture():
    torch.testing.assert_close(
        changed(replace(OFF, flip=1), pixels()), plain(pixels()).flip(3), atol=1e-5, rtol=0
    )
    upside_down = changed(replace(OFF, vertical_flip=1), pixels())
    torch.testing.assert_close(upside_down, plain(pixels()).flip(2), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "setting",
    [
        {"min_crop_scale": 0.3}, {"rotation_degrees": 30}, {"brightness": 0.5}, {"contrast": 0.5},
        {"saturation": 0.5}, {"hue_degrees": 60}, {"blur": 1.0}, {"erasing": 1.0}, {"randaugment_num_ops": 3},
        {"mixup": 1, "mix_prob": 1}, {"cutmix": 1, "mix_prob": 1},
    ],
)  # fmt: skip
def test_each_setting_alone_changes_pictures_and_keeps_their_range(setting):
    images = changed(replace(OFF, **setting), pixels())
    assert (images - plain(pixels())).abs().amax((1, 2, 3)).gt(0.01).sum() >= 4
    assert images.min() >= 0 and images.max() <= 1
    assert images.shape == (8, 3, 24, 24)


def test_saturation_and_hue_leave_grey_pictures_grey():
    grey = torch.full((4, 8, 8, 3), 100, dtype=torch.uint8)
    images = changed(replace(OFF, saturation=0.9, hue_degrees=90), grey, side=8)
    torch.testing.assert_close(images, plain(grey), atol=2e-3, rtol=0)


def test_slices_of_a_batch_are_changed_as_the_whole_batch_is():
    images = pixels(12)
    draws = augment.draw(EVERYTHING, 12, torch.Generator().manual_seed(3))
    whole = augment.apply(images, draws, height=16, width=16)
    parts = [
        augment.apply(images[i : i + 4], draws.slice(i, i + 4), height=16, width=16) for i in range(0, 12, 4)
    ]
    torch.testing.assert_close(torch.cat(parts), whole)


def test_the_same_seed_gives_the_same_pictures_and_another_does_not():
    torch.testing.assert_close(changed(EVERYTHING, pixels(), 5), changed(EVERYTHING, pixels(), 5))
    assert not torch.equal(changed(EVERYTHING, pixels(), 5), changed(EVERYTHING, pixels(), 6))


def test_mixup_mixes_targets_in_the_shares_of_the_pictures():
    spec = replace(OFF, mixup=1.0, mix_prob=1.0)
    draws = augment.draw(spec, 2, torch.Generator().manual_seed(0))
    black_and_white = torch.stack([torch.zeros(8, 8, 3), torch.full((8, 8, 3), 255)]).to(torch.uint8)
    images = augment.apply(black_and_white, draws, height=8, width=8)
    targets = augment.mix_targets(torch.eye(2), draws, height=8, width=8)
    torch.testing.assert_close(images.mean((1, 2, 3)), targets[:, 1], atol=1e-5, rtol=0)
    assert 0.5 <= targets[0, 0] < 1


def test_the_last_image_of_an_odd_micro_batch_stays_unmixed():
    draws = augment.draw(
        replace(OFF, mixup=1.0, cutmix=1.0, mix_prob=1.0), 6, torch.Generator().manual_seed(0)
    )
    images, targets, part = pixels(3), torch.eye(3), draws.slice(0, 3)
    mixed = augment.apply(images, part, height=24, width=24)
    torch.testing.assert_close(mixed[2], plain(images)[2])
    assert not torch.allclose(mixed[0], plain(images)[0])
    torch.testing.assert_close(augment.mix_targets(targets, part, height=24, width=24)[2], targets[2])


def test_cutmix_targets_count_the_pixels_taken():
    spec = replace(OFF, cutmix=1.0, mix_prob=1.0)
    draws = augment.draw(spec, 2, torch.Generator().manual_seed(2))
    black_and_white = torch.stack([torch.zeros(16, 16, 3), torch.full((16, 16, 3), 255)]).to(torch.uint8)
    images = augment.apply(black_and_white, draws, height=16, width=16)
    targets = augment.mix_targets(torch.eye(2), draws, height=16, width=16)
    torch.testing.assert_close(images.mean((1, 2, 3)), targets[:, 1], atol=1e-5, rtol=0)
    assert set(images.unique().tolist()) <= {0.0, 1.0}
