"""Which training images an epoch draws, and in which order: a function of the seed and the epoch."""

import numpy as np
import numpy.typing as npt

from pipelines.training.recipe import Balance

Indices = npt.NDArray[np.int64]


def epoch_order(strata: Indices, balance: Balance, *, views: int, seed: int, epoch: int) -> Indices:
    """Indices into `strata` for one epoch: every view is a shuffled pass of its own."""
    return np.concatenate(
        [one_pass(strata, balance, np.random.default_rng([seed, epoch, view])) for view in range(views)]
    )


def one_pass(strata: Indices, balance: Balance, random: np.random.Generator) -> Indices:
    """A shuffled pass over the images, each class as often as the sampling says."""
    if balance.sampling == "none":
        return random.permutation(len(strata))
    per_class = target_per_class(strata, balance)
    drawn = [drawn_from(np.flatnonzero(strata == one), per_class, random) for one in np.unique(strata)]
    return random.permutation(np.concatenate(drawn))


def target_per_class(strata: Indices, balance: Balance) -> int:
    counts = np.unique(strata, return_counts=True)[1]
    return {
        "oversample": int(counts.max()),
        "undersample": int(counts.min()),
        "target": balance.target_per_class,
    }[balance.sampling]


def drawn_from(members: Indices, wanted: int, random: np.random.Generator) -> Indices:
    """`wanted` of the members: whole rounds of all of them, then a random part of one."""
    rounds, rest = divmod(wanted, len(members))
    return np.concatenate([np.tile(members, rounds), random.permutation(members)[:rest]])


def images_per_pass(strata: Indices, balance: Balance) -> int:
    if balance.sampling == "none":
        return len(strata)
    return target_per_class(strata, balance) * len(np.unique(strata))
