"""Divide labelled rows into train, validation and test: stratified, repeatable, groups kept whole.

Arrays in, arrays out. A group is everything that must stay together (a page, a domain, a person); rows
without one are their own group. No image is opened here.
"""

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from pipelines.messages import InputError

Array = npt.NDArray[np.generic]

TRAIN, VALIDATION, TEST = "train", "validation", "test"
ALIASES = {
    "train": TRAIN, "training": TRAIN,
    "validation": VALIDATION, "valid": VALIDATION, "val": VALIDATION, "dev": VALIDATION,
    "test": TEST, "testing": TEST,
}  # fmt: skip
"""Names of splits as datasets spell them."""


ROUNDING = 1e-9
"""0.29 of 100 rows is 28.999999999999996 in floating point, and meant as 29."""


def divide(
    strata: npt.NDArray[np.int64], groups: npt.NDArray[np.int64], shares: Mapping[str, float], *, seed: int
) -> npt.NDArray[np.str_]:
    """Give every row one of the names in `shares`, so that each stratum is divided in those shares.

    Groups are dealt out largest first, each to the split that lacks most whole rows of the group's main
    stratum, and where none lacks more than another, to the one that lacks most rows of all: so classes of two
    or three images fill every split together. The first group of a stratum goes where most of it belongs.
    Among equals the order is random but fixed by `seed`.
    """
    names = list(shares)
    wanted_sc = np.outer(list(shares.values()), np.bincount(strata))
    filled_sc = np.zeros_like(wanted_sc)
    chosen = np.zeros(len(strata), np.int64)
    for members in shuffle_groups(groups, seed):
        counts = np.bincount(strata[members], minlength=wanted_sc.shape[1])
        main = counts.argmax()
        lacking = np.floor(wanted_sc[:, main] - filled_sc[:, main] + ROUNDING)
        overall = wanted_sc.sum(axis=1) - filled_sc.sum(axis=1)
        is_first = not filled_sc[:, main].any()
        split = int(wanted_sc[:, main].argmax() if is_first else np.lexsort((-overall, -lacking))[0])
        chosen[members] = split
        filled_sc[split] += counts
    return np.array(names)[chosen]


def shuffle_groups(groups: npt.NDArray[np.int64], seed: int) -> list[npt.NDArray[np.int64]]:
    """Row indices of each group, larger groups first, equal ones in an order fixed by `seed`."""
    order = np.random.default_rng(seed).permutation(len(groups))
    _, first, inverse = np.unique(groups[order], return_index=True, return_inverse=True)
    by_group = np.argsort(inverse, kind="stable")
    members = np.split(order[by_group], np.cumsum(np.bincount(inverse))[:-1])
    rank = np.lexsort((first, np.array([-len(rows) for rows in members])))
    return [members[g] for g in rank]


def sample(strata: npt.NDArray[np.int64], limit: int, *, seed: int) -> npt.NDArray[np.int64]:
    """Indices of exactly `limit` random rows, every stratum with its share of them by largest remainder.

    Among equal remainders, as among the rows of a stratum, the choice is random but fixed by `seed`.
    """
    random = np.random.default_rng(seed)
    _, strata, counts = np.unique(strata, return_inverse=True, return_counts=True)
    wanted, remainder = np.divmod(counts * limit, len(strata))
    by_remainder = np.lexsort((random.permutation(len(counts)), -remainder))
    wanted[by_remainder[: limit - wanted.sum()]] += 1
    order = random.permutation(len(strata))
    order = order[np.argsort(strata[order], kind="stable")]
    rank = np.arange(len(strata)) - np.repeat(np.cumsum(counts) - counts, counts)
    return np.sort(order[rank < wanted[strata[order]]])


def parse_splits(values: Sequence[str]) -> npt.NDArray[np.str_]:
    """The dataset's split column in our words.

    Raises:
        InputError: a name that is none of the known ones.
    """
    unknown = sorted({value for value in values if value.strip().lower() not in ALIASES})
    if unknown:
        raise InputError(
            f"the split column holds {', '.join(map(repr, unknown[:5]))}; "
            f"it must hold {', '.join(sorted(ALIASES))}"
        )
    return np.array([ALIASES[value.strip().lower()] for value in values])


def refuse_straddling(
    splits: npt.NDArray[np.str_], groups: npt.NDArray[np.int64], names: Sequence[str]
) -> None:
    """Raise InputError when rows of one group are in several of the dataset's own splits."""
    pairs = np.unique(np.stack([groups, np.unique(splits, return_inverse=True)[1]]), axis=1)
    straddling = [group for group, n in Counter(pairs[0].tolist()).items() if n > 1]
    if straddling:
        examples = ", ".join(repr(names[group]) for group in straddling[:3])
        raise InputError(
            f"{len(straddling)} groups have rows in several splits (such as {examples}); "
            "fix the split column, or remove it to have groups kept whole"
        )


def carve_validation(
    splits: npt.NDArray[np.str_],
    strata: npt.NDArray[np.int64],
    groups: npt.NDArray[np.int64],
    *,
    validation_of_train: float,
    seed: int,
) -> npt.NDArray[np.str_]:
    """Carve a validation split out of the training one, if there is one and the dataset has no other."""
    train = np.flatnonzero(splits == TRAIN)
    if not len(train) or (splits == VALIDATION).any() or not validation_of_train:
        return splits
    carved = divide(
        strata[train],
        groups[train],
        {TRAIN: 1 - validation_of_train, VALIDATION: validation_of_train},
        seed=seed,
    )
    completed = splits.astype(f"<U{len(VALIDATION)}")
    completed[train] = carved
    return completed


def find_leaking_copies(sha256: Sequence[str | None], splits: npt.NDArray[np.str_]) -> npt.NDArray[np.bool_]:
    """Rows whose very bytes are also in a split that comes first: test before validation before train.

    Equal images within one split stay: they are the dataset's own weighting, and leak nothing.
    """
    order = {TEST: 0, VALIDATION: 1, TRAIN: 2}
    first: dict[str, int] = {}
    for digest, split in zip(sha256, splits, strict=True):
        if digest is not None:
            first[digest] = min(first.get(digest, 2), order[split])
    return np.array(
        [
            digest is not None and order[split] > first[digest]
            for digest, split in zip(sha256, splits, strict=True)
        ],
        bool,
    )
