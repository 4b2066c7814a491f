"""What a run without labels for many of its rows is told."""

from pipelines.classify.settings import ErrorBudget


def budget(statuses: dict[str, int], rate: float = 0.5, of: dict[str, float] | None = None) -> str | None:
    return ErrorBudget(rate, of or {}).find_excess(statuses, {"slow.example": 7, "x.example": 1})


def test_the_budget_holds_at_its_limit_and_names_reasons_and_hosts_beyond_it() -> None:
    assert budget({"ok": 5, "timeout": 5}) is None
    message = budget({"ok": 4, "timeout": 4, "not_found": 2})
    assert message is not None
    assert "60.0% (6 of 10 rows), the limit is 50.0%" in message
    assert "timeout 4, not_found 2" in message
    assert "slow.example 7" in message


def test_a_status_can_have_its_own_limit() -> None:
    assert budget({"ok": 9, "denied": 1}, of={"denied": 0.1}) is None
    message = budget({"ok": 8, "denied": 2}, of={"denied": 0.1, "timeout": 0.0})
    assert message is not None
    assert "rate of denied is 20.0%" in message
    assert "timeout" not in message


def test_an_empty_run_is_within_any_budget() -> None:
    assert budget({}, rate=0.0) is None
