"""Two schedulers at once: one makes the night, and the other one waits for it or says who is at work."""

import pytest

from jobs.cli import main
from tests.builders.drivers import race
from tests.builders.etag_server import EtagServer
from tests.nights.conftest import Nights, picture

FIRST, SECOND = "2026-11-19", "2026-11-20"


@pytest.mark.slow
@pytest.mark.parametrize("attempt", range(3))
def test_two_schedulers_started_together_make_one_night(
    nights: Nights, server: EtagServer, attempt: int
) -> None:
    server.images = {f"/{number}.png": picture(number) for number in range(20)}
    nights.list_images([server.url(path) for path in server.images])
    assert race([nights.command(SECOND)] * 2) in ("both finish", "one finishes, the other names it")
    assert len(nights.rows(SECOND)) == 20
    assert main(["verify", str(nights.table)]) == 0


@pytest.mark.slow
def test_a_late_night_and_tonights_run_at_once_with_the_right_dates(
    nights: Nights, server: EtagServer
) -> None:
    server.images = {f"/{number}.png": picture(number) for number in range(20)}
    nights.list_images([server.url(path) for path in server.images])
    assert race([nights.command(day) for day in (FIRST, SECOND)]) == "both finish"
    assert [len(nights.rows(day)) for day in (FIRST, SECOND)] == [20, 20]
    assert set(nights.carried(FIRST).values()) == {None}
    assert main(["verify", str(nights.table)]) == 0
