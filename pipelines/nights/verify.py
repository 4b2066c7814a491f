"""Proves that every date of a table is whole: `ledger.verify` for each, against the run that made it."""

from pipelines.ledger.ledger import RUN_JSON
from pipelines.ledger.verify import Check, verify_table
from pipelines.messages import InputError
from pipelines.nights.folders import STATE, DateFolders, find_nights, list_dates, list_published


def is_table(uri: str) -> bool:
    """Whether the folder is a table of nights."""
    return bool(list_dates(uri))


def verify_nights(table_uri: str) -> list[Check]:
    """Every check of every date, named by the date. Raises InputError: there is no date.

    A date that was begun and is not published fails the check `published`, and one whose state is gone.
    """
    dates = list_dates(table_uri)
    if not dates:
        raise InputError(f"{table_uri} has no {STATE}/run_date=…: not written by nightly")
    published = {night.date: night for night in find_nights(table_uri)}
    lost = set(list_published(table_uri)) - set(dates)
    checks = [Check(f"{day} published", False, f"it has no {STATE}/run_date={day}") for day in sorted(lost)]
    for day in dates:
        folders = DateFolders(table_uri, day)
        night = published.get(day)
        state = night.state if night else folders.run(max(folders.runs(), default=1))
        if not state.exists(RUN_JSON):
            checks.append(Check(f"{day} published", False, "it was planned and not begun"))
            continue
        found = verify_table(folders.images, state)
        checks += [Check(f"{day} {check.name}", check.ok, check.detail) for check in found]
    return checks
