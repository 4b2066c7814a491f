"""What a user reads of a failure on a worker is the error that began it."""

import pytest
import ray.data
from ray.exceptions import RayError

from pipelines.messages import root_cause


def failing_steps() -> list[tuple[object, dict[str, int]]]:
    """A task and an actor; defined in here, they travel to the workers by value."""

    def full_disk(batch: object) -> object:
        try:
            raise KeyError("first")
        except KeyError as error:
            raise OSError(28, "No space left on device") from error

    class NeverReady(RuntimeError):
        pass

    class Unready:
        def __init__(self) -> None:
            raise NeverReady("the bundle was replaced;\nput it back")

        def __call__(self, batch: object) -> object:
            return batch

    return [(full_disk, {}), (Unready, {"concurrency": 1})]


@pytest.mark.ray
@pytest.mark.parametrize(
    ("step", "words"),
    [
        (0, "OSError: [Errno 28] No space left on device"),
        (1, "NeverReady: the bundle was replaced; put it back"),
    ],
)
def test_the_error_of_a_task_or_an_actor_is_found_in_rays_report(ray_cluster, step, words):
    function, settings = failing_steps()[step]
    with pytest.raises(RayError) as failed:
        list(ray.data.range(1).map_batches(function, **settings).iter_batches())
    assert root_cause(str(failed.value)) == words


@pytest.mark.parametrize(
    ("report", "words"),
    [
        ("The node died.", "The node died."),
        ("", "no reason given"),
        ('x\n  File "a.py", line 1\n    f()\na.b.Broken\n\nDuring', "Broken"),
        ('x\n  File "a.py", line 1\nOSError: a\n\nThe above\n  File "b.py"\nB: c', "OSError: a"),
    ],
)
def test_a_report_of_any_form_gives_one_line(report, words):
    assert root_cause(report) == words
