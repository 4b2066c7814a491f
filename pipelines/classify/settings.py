"""How classify divides its work."""

from pydantic import NonNegativeInt, PositiveInt

from pipelines.specs import validated


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
