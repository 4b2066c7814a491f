"""Where a training run happens: cores, workers, devices, checkpoints. None of it changes what is learned."""

from dataclasses import replace
from typing import Literal

from pydantic import NonNegativeInt, PositiveFloat, PositiveInt

from pipelines.machine import cores
from pipelines.messages import InputError
from pipelines.specs import validated


@validated
class Resources:
    """Where a run trains, and what it keeps while it does."""

    num_workers: PositiveInt = 1
    """Training workers: one per GPU, or processes on CPU."""
    use_gpu: bool = False
    """Give each worker a GPU."""
    cpus_per_worker: PositiveFloat = 1
    """Logical CPUs that Ray reserves for each worker."""
    checkpoint_every_steps: NonNegativeInt = 0
    """Also keep a checkpoint every so many steps within an epoch; 0: at the end of each epoch only."""
    log_every_steps: NonNegativeInt = 50
    """Steps between logs of loss, learning rate, gradient norm and speed; 0: at evaluations only."""
    num_to_keep: PositiveInt = 2
    """Best checkpoints kept, in addition to the latest."""
    runs_at_once: PositiveInt = 1
    """Trainings that share a machine, and its cores."""
    max_failures: NonNegativeInt = 3
    """Lost workers or nodes from which the run recovers by itself."""
    trackers: tuple[Literal["mlflow", "wandb"], ...] = ()
    """Trackers that get what TensorBoard gets; each needs its extra installed."""

    def on_cluster(self, wanted: bool | None) -> "Resources":
        """These with GPUs as asked for, or when unsaid if the running cluster has one for each worker.

        Raises:
            InputError: GPUs are asked for and there are too few.
        """
        import ray

        gpus = int(ray.cluster_resources().get("GPU", 0))
        if wanted and gpus < self.num_workers:
            raise InputError(
                f"{self.num_workers} workers want a GPU each and the cluster has {gpus}; "
                "lower --num-workers or leave --use-gpu out"
            )
        return replace(self, use_gpu=gpus >= self.num_workers if wanted is None else wanted)


def threads_of(workers: int) -> int:
    """Threads for each of so many workers that compute on this machine at once."""
    return max(1, cores() // workers)
