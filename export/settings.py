"""How the parity of a bundle is measured."""

from pydantic import NonNegativeInt, PositiveInt

from pipelines.specs import validated


@validated
class ParitySettings:
    """On what, and in which session options, the parity of a bundle is measured."""

    sample_images: PositiveInt = 256
    """Images of the user that are compared; edge cases drawn by the project are added."""
    min_images: PositiveInt = 32
    """Least images of the user that must be compared; with fewer nothing is certified."""
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

    def __post_init__(self) -> None:
        if self.sample_images < self.min_images:
            raise ValueError(
                f"sample_images {self.sample_images} is below min_images {self.min_images}; "
                "a certificate needs that many"
            )
