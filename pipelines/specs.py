"""Settings that several rooms share, and how a class of settings is declared.

Each field's default has one home, with its meaning and unit in the line below it and its limits in its type.
"""

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar, dataclass_transform

from pydantic import ConfigDict, Field, PositiveFloat, PositiveInt, ValidationError
from pydantic.dataclasses import dataclass

Provider = Literal["cpu", "cuda"]
Precision = Literal["fp32", "fp16", "int8"]
Fraction = Annotated[float, Field(ge=0, le=1)]
FractionAboveZero = Annotated[float, Field(gt=0, le=1)]
Fit = Literal["stretch", "crop", "pad"]
Resample = Literal["bilinear", "bicubic", "lanczos"]
Settings = TypeVar("Settings")


@dataclass_transform(frozen_default=True, field_specifiers=(dataclasses.field, Field))
def validated(cls: type[Settings]) -> type[Settings]:
    """A frozen dataclass that checks its values when it is made, and by `dataclasses.replace`.

    Its fields become flags, with the line below each as their help. Wrong: pydantic's `ValidationError`.
    """
    config = ConfigDict(use_attribute_docstrings=True, extra="forbid")
    return dataclass(frozen=True, config=config)(cls)  # type: ignore[return-value]


def wrong_settings(error: ValidationError) -> str:
    """Each wrong setting with its value and its limit, in one line."""
    return "; ".join(wrong_setting(detail, ".".join(map(str, detail["loc"]))) for detail in error.errors())


def wrong_setting(detail: Mapping[str, Any], name: str) -> str:
    """One wrong setting: its name, its value, what it must be."""
    message = detail["msg"].removeprefix("Value error, ").removeprefix("Input ").replace("should", "must")
    if detail["type"] == "value_error":  # of several fields together: the message names them
        return f"{name}: {message}" if name else message
    return f"{name} is {detail['input']!r}; it {message}"


@validated
class ImageSpec:
    """How encoded bytes become the model's pixels; part of the model, carried in its bundle."""

    height: PositiveInt = 224
    """Rows of the model's input, pixels."""
    width: PositiveInt = 224
    """Columns of the model's input, pixels."""
    fit: Fit = "stretch"
    """`stretch` resizes each side to its goal; `crop` covers both, undistorted; `pad` fits in, on black."""
    resample: Resample = "bilinear"
    """Resampling filter (antialiased)."""
    crop_fraction: FractionAboveZero = 1.0
    """Height and width over their goals in resizing: what the centre crop keeps, 0.875 being 224 of 256."""
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    """Per-channel mean of RGB in [0, 1], subtracted inside the graph."""
    std: tuple[PositiveFloat, PositiveFloat, PositiveFloat] = (0.5, 0.5, 0.5)
    """Per-channel standard deviation of RGB in [0, 1], divided by inside the graph."""

    def __post_init__(self) -> None:
        if self.fit == "pad" and self.crop_fraction < 1:
            raise ValueError(f"crop_fraction is {self.crop_fraction}, and fit is pad, which cuts nothing off")

    @property
    def pixel_bytes(self) -> int:
        """Bytes of one image's pixels: uint8 RGB."""
        return self.height * self.width * 3


@validated
class ModelSpec:
    """What a classifier takes and what its outputs mean, from the checkpoint to the predictions."""

    class_ids: tuple[str, ...]
    """Taxonomy ids in the order of the outputs."""
    taxonomy: str
    """Built-in version, URI of the user's own table, or `labels` for the labels as they are."""
    image_spec: ImageSpec
    """How bytes become the pixels that it takes."""
    multi_label: bool = False
    """Whether the probabilities are independent (sigmoid) rather than a distribution (softmax)."""
    temperature: float = Field(default=1.0, gt=0)
    """Divides the logits before softmax or sigmoid."""
    thresholds: dict[str, float] = Field(default_factory=dict)
    """Least probability, by id, at which an image is given the id in `cat`."""


@validated
class DecodeLimits:
    """What one image may cost its decoder."""

    max_pixels: PositiveInt = 100_000_000
    """Largest width * height accepted, read from the header before anything is decoded."""
    max_side: PositiveInt = 65_535
    """Longest side accepted, pixels: all that JPEG can say. 122 bytes of TIFF may claim 67 million rows."""
    timeout_s: Annotated[float, Field(ge=0.1)] = 20.0
    """Longest time for one image in the decoder, seconds; then `decode_timeout`."""
    max_memory_bytes: Annotated[int, Field(ge=500_000_000)] = 4_000_000_000
    """Address space of a decoder process, bytes; beyond it the image is `decode_failed`."""
