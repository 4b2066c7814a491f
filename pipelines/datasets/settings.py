"""Which images a training run is shown, and how they reach its workers, as validated settings.

`DataSettings` is part of what a run is, for other images or another division are another run; `ImageCache`
only says how pixels travel.
"""

from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveInt

from pipelines.specs import Fraction, validated

LABEL = "label"
"""Column of the label, unless another is named."""


@validated
class Columns:
    """Which columns of a table mean what."""

    label: str = LABEL
    """Column of the label; unset: `labels` where there is one; lists, or text with `|` in `labels`, make the
    model multi-label."""
    file: str = ""
    """Template of an image's path, such as `train/{id}.jpg`; empty: column `uri`, `file` or `file_name`."""
    one_hot: tuple[str, ...] = ()
    """Columns of 0 and 1, one per label, in place of a column of labels; they make the model multi-label."""
    split: str = "split"
    """Column that names the split; empty: neither columns nor names of folders and files say it."""
    group: str = "group"
    """Column whose equal values are kept in one split."""
    slices: tuple[str, ...] = ()
    """Columns, such as the publisher, by whose values evaluation gives the accuracy too."""

    @property
    def label_names(self) -> tuple[str, ...]:
        """Columns that may hold the label, the preferred one first: `labels` only where no other is named."""
        return ("labels", LABEL) if self.label == LABEL else (self.label,)


@validated
class Splits:
    """How images are divided when the dataset does not say."""

    validation: Fraction = 0.2
    """Share of the images for validation."""
    test: Fraction = 0.1
    """Share of the images for the final test."""
    validation_of_train: Fraction = 0.1
    """Share of a given training split that becomes validation when the dataset has none."""
    seed: int = 0
    """Seed of the division."""
    limit: NonNegativeInt = 0
    """Use a random, class-balanced-as-given subset of so many images; 0 uses all."""

    def __post_init__(self) -> None:
        if self.validation + self.test >= 1:
            raise ValueError(
                f"validation {self.validation} and test {self.test} leave nothing to train on; "
                "their sum must be below 1"
            )


@validated
class DataSettings:
    """Which images, what their labels mean and how they are divided: all that decides what a run is shown."""

    uri: str
    """Image folder, table of files and labels, or Hugging Face Parquet."""
    taxonomy: str = "3.1"
    """Content Taxonomy version, URI of a table in the same format, or `labels` to take labels as they are."""
    label_map: str | None = None
    """Table whose first two columns rename labels; an empty target drops a label, or the image of one."""
    tier: PositiveInt | None = None
    """Lift every label to its ancestor of this tier."""
    columns: Columns = Columns()
    """Which columns of a table mean what."""
    splits: Splits = Splits()
    """How images are divided when the dataset does not say."""


@validated
class ImageCache:
    """How training images reach the workers."""

    mode: Literal["auto", "memory", "disk", "stream"] = "auto"
    """`memory`: decoded once, held in the object store; `disk`: once, spilled; `stream`: every epoch."""
    memory_fraction: Fraction = 0.3
    """Largest share of one node's object store that decoded images may take in `memory`."""
    disk_fraction: Fraction = 0.5
    """Largest share of the free disk that decoded images may take in `disk`."""
    margin: Annotated[float, Field(ge=1)] = 1.125
    """Decoded training images are this much larger than the model's input, so that crops stay sharp."""
    max_unreadable_fraction: Fraction = 0.05
    """Largest share of images that may be unreadable before the run stops."""
    images_per_task: PositiveInt = 64
    """Images that one decoding task takes."""
