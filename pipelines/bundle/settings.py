"""How a bundle's ONNX session runs."""

from pydantic import NonNegativeInt, PositiveInt

from pipelines.specs import Precision, Provider, validated

DEFAULT_BATCH: dict[Provider, int] = {"cpu": 16, "cuda": 256}
"""Images per session run. More than 16 are no faster on a core; a data-centre GPU wants hundreds."""


@validated
class RuntimeSpec:
    """How the ONNX session runs, in classify and in parity alike."""

    provider: Provider = "cpu"
    """Execution provider; a session that would not really run on it fails at start."""
    precision: Precision = "fp32"
    """Which file of the bundle runs."""
    batch_size: NonNegativeInt = 0
    """Most images per session run; 0 is 16 on CPU and 256 on GPU."""
    threads: PositiveInt = 1
    """Intra-op threads of a CPU session."""
    device_id: NonNegativeInt = 0
    """GPU of a CUDA session, as visible to the process."""

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
