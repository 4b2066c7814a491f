"""Settings that several rooms share, and how a class of settings is declared.

Each field's default has one home, with its meaning and unit in the line below it and its limits in its type.
"""

import dataclasses
from collections.abc import Mapping
from ipaddress import ip_network
from typing import Annotated, Any, Literal, TypeVar, dataclass_transform

from pydantic import (
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
)
from pydantic.dataclasses import dataclass

Provider = Literal["cpu", "cuda"]
Precision = Literal["fp32", "fp16", "int8"]
Fraction = Annotated[float, Field(ge=0, le=1)]
Timeout = Annotated[float, Field(ge=0.05)]
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


DEFAULT_BATCH: dict[Provider, int] = {"cpu": 16, "cuda": 256}
"""Images per session run. More than 16 are no faster on a core; a data-centre GPU wants hundreds."""


@validated
class ImageSpec:
    """How encoded bytes become the model's pixels; part of the model, carried in its bundle."""

    height: PositiveInt = 224
    """Rows of the model's input, pixels."""
    width: PositiveInt = 224
    """Columns of the model's input, pixels."""
    fit: Literal["stretch", "crop"] = "stretch"
    """`stretch` resizes both sides; `crop` resizes the shorter side and cuts the centre."""
    resample: Literal["bilinear", "bicubic"] = "bilinear"
    """Resampling filter (antialiased)."""
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    """Per-channel mean of RGB in [0, 1], subtracted inside the graph."""
    std: tuple[PositiveFloat, PositiveFloat, PositiveFloat] = (0.5, 0.5, 0.5)
    """Per-channel standard deviation of RGB in [0, 1], divided by inside the graph."""

    @property
    def pixel_bytes(self) -> int:
        """Bytes of one image's pixels: uint8 RGB."""
        return self.height * self.width * 3


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


@validated
class InventoryOptions:
    """How an inventory is read; what it is, its name and its columns say themselves."""

    form: Literal["auto", "table", "images", "tars"] = "auto"
    """What the inventory is, where its name or folder misleads."""
    all_files: bool = False
    """In a folder or prefix, take every file as an image, whatever its name."""
    rename: tuple[str, ...] = ()
    """Columns of a table under another name, as `old=new`; `photo_url=uri` makes a column the URI."""
    drop_columns: tuple[str, ...] = ()
    """Columns of a table that are not carried over to the predictions."""
    payload_column: str = ""
    """Column of a Parquet table that holds the images themselves; empty: found when there is no `uri`."""
    keep_plan: bool = False
    """Finish the plan that is frozen in the output, even if the inventory has changed since."""

    def __post_init__(self) -> None:
        for pair in self.rename:
            if not all(pair.partition("=")):
                raise ValueError(f"rename holds {pair!r}; it must be old=new")


@validated
class FetchLimits:
    """What one request may cost, and how politely many are made."""

    concurrency: PositiveInt = 128
    """Requests in flight per load actor."""
    per_host: PositiveInt = 16
    """http(s) requests in flight per host (name and port), shared out among the load actors, one at least."""
    host_failures: PositiveInt = 20
    """Failed connections or time-outs of one http(s) host in a row, over 15 s and more, after which its
    further images are not tried in this pass, but for one every 30 s."""
    connect_timeout_s: Timeout = 5.0
    """Time to connect, seconds."""
    read_timeout_s: Timeout = 15.0
    """Longest silence between two reads, seconds."""
    total_timeout_s: Timeout = 60.0
    """Longest time for one object, all attempts included, seconds."""
    max_attempts: PositiveInt = 4
    """Requests made for one object before its failure is recorded."""
    backoff_s: NonNegativeFloat = 1.0
    """Wait before the second attempt, seconds, jittered; each further one waits 2.5 times longer."""
    max_bytes: PositiveInt = 64_000_000
    """Largest object, bytes, enforced while streaming."""
    max_buffered_bytes: int = 512_000_000
    """Bytes of payloads in memory per load actor, until they are decoded; further ones wait their turn."""
    max_redirects: NonNegativeInt = 5
    """http(s) redirects followed."""
    user_agent: str = "iab-vision/0.1 (+image categorisation; contact your publisher account manager)"
    """User-Agent of http(s) requests."""
    allow_private_addresses: bool = False
    """Fetch from private, loopback and link-local addresses too (tests, intranets)."""
    allowed_networks: tuple[str, ...] = ()
    """Private networks that may be fetched from all the same, as `10.20.0.0/16`."""

    def __post_init__(self) -> None:
        if self.max_buffered_bytes < self.max_bytes:
            raise ValueError(
                f"max_buffered_bytes is {self.max_buffered_bytes}; "
                f"it must be at least max_bytes, {self.max_bytes}"
            )
        for network in self.allowed_networks:
            ip_network(network)

    def shared_by(self, load_actors: int) -> "FetchLimits":
        """One load actor's share of what all of them may do together."""
        return dataclasses.replace(self, per_host=max(1, self.per_host // load_actors))


@validated
class RuntimeSpec:
    """How the ONNX session runs, in classify and in parity alike."""

    provider: Provider = "cpu"
    """Execution provider; the session must really use it or the actor fails at start."""
    precision: Precision = "fp32"
    """Which file of the bundle."""
    batch_size: NonNegativeInt = 0
    """Most images per session run; 0 becomes the provider's `DEFAULT_BATCH`."""
    threads: PositiveInt = 1
    """Intra-op threads of a CPU session."""
    device_id: NonNegativeInt = 0
    """GPU of a CUDA session, as visible to the process."""
    allow_tf32: bool = False
    """Let CUDA round float32 products to TF32."""

    def __post_init__(self) -> None:
        if self.precision == "int8" and self.provider != "cpu":
            raise ValueError(f"int8 does not run on {self.provider}; it is made for cpu: use fp16 on a GPU")
        object.__setattr__(self, "batch_size", self.batch_size or DEFAULT_BATCH[self.provider])

    @property
    def buckets(self) -> list[int]:
        """The batch sizes that are ever run, ascending.

        On CPU the powers of two below the full one, which make up any number of images. A GPU session is
        frozen to one size (CUDA graph, arena without growth: onnxruntime #24376), so there is one more, to
        which a tail is padded.
        """
        if self.provider == "cpu":
            powers = range(self.batch_size.bit_length())
            smaller = {1 << power for power in powers if 1 << power < self.batch_size}
        else:
            smaller = {max(1, self.batch_size // 8)}
        return sorted({*smaller, self.batch_size})

    def next_batch(self, n: int) -> int:
        """How many of `n` images run next: on CPU nothing is padded, as every image costs the same time."""
        return (
            max(size for size in self.buckets if size <= n)
            if self.provider == "cpu"
            else min(n, self.batch_size)
        )


@validated
class Measuring:
    """On what, and in which session options, the parity of a bundle is measured."""

    sample_images: PositiveInt = 256
    """Images of the user that are compared; awkward ones made by the project come on top."""
    calibration_images: PositiveInt = 512
    """Images of the user that int8 ranges come from: others than those compared, while there are others."""
    seed: int = 0
    """Decides which images are drawn."""
    batch_size: NonNegativeInt = 0
    """Most images per session run, which classify may then use; 0 is 16 on CPU and 256 on GPU."""
    threads: PositiveInt = 1
    """CPU threads of a session; what classify uses."""
    device_id: NonNegativeInt = 0
    """GPU of a CUDA session."""


@validated
class Workers:
    """The two pools of classify and the grain of the work."""

    load_actors: NonNegativeInt = 0
    """Actors that fetch and decode; 0 sizes the pool from the cluster."""
    infer_actors: NonNegativeInt = 0
    """Actors that own an ONNX session; 0 is one per GPU, or one per CPU core."""
    items_per_batch: NonNegativeInt = 0
    """Images that travel together; 0 is 64 on CPU, and the batch size on GPU."""
    items_per_part: PositiveInt = 20_000
    """Images per part file, fewer where these answer for over 100,000 rows: what a crash may cost."""
    rows_per_file: PositiveInt = 1_000_000
    """Rows per published file, about 100 MB."""
