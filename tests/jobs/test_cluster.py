"""How Ray is started on this machine."""

import pytest

from jobs.cluster import STARTS, start_here

TOO_LATE = "The current node timed out during startup. This could happen because"


@pytest.mark.parametrize(
    ("errors", "starts", "ends_with"),
    [
        ([], 1, None),
        ([TOO_LATE], 2, None),
        ([TOO_LATE] * STARTS, STARTS, "timed out"),
        (["no such cluster"], 1, "no such"),
    ],
)
def test_ray_is_started_again_where_its_node_was_too_late(
    errors: list[str], starts: int, ends_with: str | None
) -> None:
    waiting, started = iter(errors), []

    def start() -> None:
        started.append(1)
        if error := next(waiting, None):
            raise Exception(error)

    if ends_with:
        with pytest.raises(Exception, match=ends_with):
            start_here(start)
    else:
        start_here(start)
    assert len(started) == starts
