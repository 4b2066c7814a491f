"""Everything that can be set about running the steps, as frozen dataclasses that check themselves.

Each field's default lives here alone, with its meaning and unit in the line below it. Standard library
only: a worker and the command line both import this in milliseconds. Training has its own: `recipe.py`.
"""

from dataclasses import dataclass, replace
from ipaddress import ip_network
from typing import Literal

Provider = Literal["cpu", "cuda"]
Precision = Literal["fp32", "fp16", "int8"]

DEFAULT_BATCH: dict[Provider, int] = {"cpu": 16, "cuda": 256}
"""Images per session run. More than 16 are no faster on a core; a data-centre GPU wants hundreds."""


def at_least(name: str, value: float, minimum: float) -> None:
    """Raise ValueError naming the setting, its value and its limit when `value < minimum`."""
    if value < minimum:
        raise ValueError(f"{name} is {value}; it must be at least {minimum}")


def share(name: str, value: float) -> None:
    """Raise ValueError naming the setting when `value` is not within [0, 1]."""
    if not 0 <= value <= 1:
        raise ValueError(f"{name} is {value}; it must be between 0 and 1")


@dataclass(frozen=True)
class ImageSpec:
    """How encoded bytes become the model's pixels; part of the model, carried in its bundle."""

    height: int = 224
    """Rows of the model's input, pixels."""
    width: int = 224
    """Columns of the model's input, pixels."""
    fit: Literal["stretch", "crop"] = "stretch"
    """`stretch` resizes both sides; `crop` resizes the shorter side and cuts the centre."""
    resample: Literal["bilinear", "bicubic"] = "bilinear"
    """Resampling filter (antialiased)."""
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    """Per-channel mean of RGB in [0, 1], subtracted inside the graph."""
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    """Per-channel standard deviation of RGB in [0, 1], divided by inside the graph."""

    @property
    def pixel_bytes(self) -> int:
        """Bytes of one image's pixels: uint8 RGB."""
        return self.height * self.width * 3

    def __post_init__(self) -> None:
        at_least("height", self.height, 1)
        at_least("width", self.width, 1)
        for value in self.std:
            if value <= 0:
                raise ValueError(f"std holds {value}; every standard deviation must be above 0")


@dataclass(frozen=True)
class DecodeLimits:
    """What one image may cost its decoder."""

    max_pixels: int = 100_000_000
    """Largest width * height accepted, read from the header before anything is decoded."""
    max_side: int = 65_535
    """Longest side accepted, pixels: all that JPEG can say. 122 bytes of TIFF may claim 67 million rows."""
    timeout_s: float = 20.0
    """Longest time for one image in the decoder, seconds; then `decode_timeout`."""
    max_memory_bytes: int = 4_000_000_000
    """Address space of a decoder process, bytes; beyond it the image is `decode_failed`."""

    def __post_init__(self) -> None:
        at_least("max_pixels", self.max_pixels, 1)
        at_least("max_side", self.max_side, 1)
        at_least("timeout_s", self.timeout_s, 0.1)
        at_least("max_memory_bytes", self.max_memory_bytes, 500_000_000)


@dataclass(frozen=True)
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


@dataclass(frozen=True)
class FetchLimits:
    """What one request may cost, and how politely many are made."""

    concurrency: int = 128
    """Requests in flight per load actor."""
    per_host: int = 16
    """http(s) requests in flight per host (name and port), shared out among the load actors, one at least."""
    host_failures: int = 20
    """Failed connections or time-outs of one http(s) host in a row, over 15 s and more, after which its
    further images are not tried in this pass, but for one every 30 s."""
    connect_timeout_s: float = 5.0
    """Time to connect, seconds."""
    read_timeout_s: float = 15.0
    """Longest silence between two reads, seconds."""
    total_timeout_s: float = 60.0
    """Longest time for one object, all attempts included, seconds."""
    max_attempts: int = 4
    """Requests made for one object before its failure is recorded."""
    backoff_s: float = 1.0
    """Wait before the second attempt, seconds, jittered; each further one waits 2.5 times longer."""
    max_bytes: int = 64_000_000
    """Largest object, bytes, enforced while streaming."""
    max_buffered_bytes: int = 512_000_000
    """Bytes of payloads in memory per load actor, until they are decoded; further ones wait their turn."""
    max_redirects: int = 5
    """http(s) redirects followed."""
    user_agent: str = "iab-vision/0.1 (+image categorisation; contact your publisher account manager)"
    """User-Agent of http(s) requests."""
    allow_private_addresses: bool = False
    """Fetch from private, loopback and link-local addresses too (tests, intranets)."""
    allowed_networks: tuple[str, ...] = ()
    """Private networks that may be fetched from all the same, as `10.20.0.0/16`."""

    def __post_init__(self) -> None:
        for name in ("concurrency", "per_host", "host_failures", "max_attempts", "max_bytes"):
            at_least(name, getattr(self, name), 1)
        for name in ("connect_timeout_s", "read_timeout_s", "total_timeout_s"):
            at_least(name, getattr(self, name), 0.05)
        at_least("max_redirects", self.max_redirects, 0)
        at_least("backoff_s", self.backoff_s, 0)
        at_least("max_buffered_bytes", self.max_buffered_bytes, self.max_bytes)
        for network in self.allowed_networks:
            ip_network(network)

    def shared_by(self, load_actors: int) -> "FetchLimits":
        """One load actor's share of what all of them may do together."""
        return replace(self, per_host=max(1, self.per_host // load_actors))


@dataclass(frozen=True)
class RuntimeSpec:
    """How the ONNX session runs, in classify and in parity alike."""

    provider: Provider = "cpu"
    """Execution provider; the session must really use it or the actor fails at start."""
    precision: Precision = "fp32"
    """Which file of the bundle."""
    batch_size: int = 0
    """Most images per session run; 0 becomes the provider's `DEFAULT_BATCH`."""
    threads: int = 1
    """Intra-op threads of a CPU session."""
    device_id: int = 0
    """GPU of a CUDA session, as visible to the process."""
    allow_tf32: bool = False
    """Let CUDA round float32 products to TF32."""

    def __post_init__(self) -> None:
        if self.precision == "int8" and self.provider != "cpu":
            raise ValueError(f"int8 does not run on {self.provider}; it is made for cpu: use fp16 on a GPU")
        at_least("batch_size", self.batch_size, 0)
        object.__setattr__(self, "batch_size", self.batch_size or DEFAULT_BATCH[self.provider])
        at_least("threads", self.threads, 1)
        at_least("device_id", self.device_id, 0)

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


@dataclass(frozen=True)
class Measuring:
    """On what, and in which session options, the parity of a bundle is measured."""

    sample_images: int = 256
    """Images of the user that are compared; awkward ones made by the project come on top."""
    calibration_images: int = 512
    """Images of the user that int8 ranges come from: others than those compared, while there are others."""
    seed: int = 0
    """Decides which images are drawn."""
    batch_size: int = 0
    """Most images per session run, which classify may then use; 0 is 16 on CPU and 256 on GPU."""
    threads: int = 1
    """CPU threads of a session; what classify uses."""
    device_id: int = 0
    """GPU of a CUDA session."""

    def __post_init__(self) -> None:
        for name in ("sample_images", "calibration_images", "threads"):
            at_least(name, getattr(self, name), 1)
        at_least("batch_size", self.batch_size, 0)


@dataclass(frozen=True)
class Workers:
    """The two pools of classify and the grain of the work."""

    load_actors: int = 0
    """Actors that fetch and decode; 0 sizes the pool from the cluster."""
    infer_actors: int = 0
    """Actors that own an ONNX session; 0 is one per GPU, or one per CPU core."""
    items_per_batch: int = 0
    """Images that travel together; 0 is 64 on CPU, and the batch size on GPU."""
    items_per_part: int = 20_000
    """Images per part file, fewer where these answer for over 100,000 rows: what a crash may cost."""
    rows_per_file: int = 1_000_000
    """Rows per published file, about 100 MB."""

    def __post_init__(self) -> None:
        at_least("load_actors", self.load_actors, 0)
        at_least("infer_actors", self.infer_actors, 0)
        at_least("items_per_batch", self.items_per_batch, 0)
        for name in ("items_per_part", "rows_per_file"):
            at_least(name, getattr(self, name), 1)
