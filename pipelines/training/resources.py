"""Where a training run happens: cores, workers, devices, checkpoints. None of it changes what is learned."""

from dataclasses import dataclass, replace

from pipelines.machine import cores
from pipelines.specs import at_least


@dataclass(frozen=True)
class Resources:
    """Where a run trains, and what it keeps while it does."""

    num_workers: int = 1
    """Training workers: one per GPU, or processes on CPU."""
    use_gpu: bool = False
    """Give each worker a GPU."""
    cpus_per_worker: float = 1
    """Logical CPUs that Ray reserves for each worker."""
    checkpoint_every_steps: int = 0
    """Also keep a checkpoint every so many steps within an epoch; 0: at the end of each epoch only."""
    checkpoints_to_keep: int = 2
    """Best checkpoints kept, beside the latest."""
    runs_at_once: int = 1
    """Trainings that share a machine, and its cores."""
    max_failures: int = 3
    """Lost workers or nodes from which the run recovers by itself."""
    trackers: tuple[str, ...] = ()
    """`mlflow`, `wandb`: told of every epoch, beside TensorBoard."""

    def __post_init__(self) -> None:
        for name in ("num_workers", "checkpoints_to_keep", "runs_at_once"):
            at_least(name, getattr(self, name), 1)
        for name in ("checkpoint_every_steps", "max_failures"):
            at_least(name, getattr(self, name), 0)

    def on_cluster(self, wanted: bool | None) -> "Resources":
        """These with GPUs as asked for, or when unsaid if the running cluster has one for each worker.

        Raises:
            ValueError: GPUs are asked for and there are too few.
        """
        import ray

        gpus = int(ray.cluster_resources().get("GPU", 0))
        if wanted and gpus < self.num_workers:
            raise ValueError(
                f"{self.num_workers} workers want a GPU each and the cluster has {gpus}; "
                "lower --num-workers or leave --use-gpu out"
            )
        return replace(self, use_gpu=gpus >= self.num_workers if wanted is None else wanted)


def threads_of(workers: int) -> int:
    """Threads for each of so many workers that compute on this machine at once."""
    return max(1, cores() // workers)
