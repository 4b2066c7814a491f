"""`iab-vision nightly`: one date of a table of nights, at the cost of what changed since the last one.

    iab-vision nightly --inventory inventory.parquet --bundle bundle --table nights --date 2026-11-21

A night in which nothing changed fetches no image and starts no engine (BENCHMARKS.md). Expected result:
`images/run_date=2026-11-21/` with `_SUCCESS`, and `state/run_date=2026-11-21/report.json`. The same command
continues an interrupted night, and repeats the verdict and the exit code of a published one.
"""

from contextlib import suppress

from jobs import classify_images, lineage
from jobs.classify_images import classify_missing, explain_failures
from jobs.config import NightlyConfig
from jobs.settings import part_of
from pipelines.classify import run as runs
from pipelines.inventory.plan import discard_plan
from pipelines.ledger.entries import Phase
from pipelines.ledger.takeover import hold_run, wait_for_previous
from pipelines.messages import InputError, JobFailed, Refused, redact, suggestion
from pipelines.nights import night as nights
from pipelines.nights import reporting
from pipelines.nights.folders import DateFolders, latest_date
from pipelines.nights.night import NightRun
from pipelines.nights.page import REPORT_HTML
from pipelines.nights.settings import ReportSettings
from pipelines.storage.storage import open_storage


def run(config: NightlyConfig) -> int:
    """Publish the date, or repeat what became of it."""
    with explain_failures():
        folders = DateFolders(open_storage(config.table).uri, config.date)
        check_date(folders)
        verdict = None if config.replace or config.retry_failed else nights.read_verdict(folders)
        if verdict and reporting.has_page(folders.root, verdict["generation"]):
            show(verdict["line"], folders)
            return int(verdict["exit_code"])
        night = prepare(config, folders)
        refuse_unknown_columns(night, config)
        with hold_run(night.run.ledger, night.run.state, take_over=config.take_over):
            return carry_out(night, config)


def check_date(folders: DateFolders) -> None:
    """Refuse a date that is not yet, or that is being removed. Raises InputError."""
    if folders.date > (latest := latest_date()):
        raise InputError(
            f"--date {folders.date} is later than {latest}, tomorrow by UTC and this machine's clock; "
            "give the date of the night"
        )
    if folders.is_removing():
        raise InputError(
            f"{folders.date} is being removed from {redact(folders.table_uri)}; let `prune` finish first"
        )


def prepare(config: NightlyConfig, folders: DateFolders) -> NightRun:
    """The run to continue or to begin, before an engine starts."""
    begun = folders.runs()
    if not begun:
        return open_run(config, folders, 1)
    if not config.replace:
        try:
            return open_run(config, folders, begun[-1])
        except InputError as error:
            raise InputError(f"{error}. To begin the date again: --replace") from error
    last = nights.read_ledger(folders.run(begun[-1]))
    if last is None:  # a process ended between its plan and its run
        discard_plan(folders.run(begun[-1]))
        return open_run(config, folders, begun[-1])
    following = max(last.state.generation, begun[-1]) + 1
    if last.state.phase is Phase.PUBLISHED:
        return open_run(config, folders, following)
    if not last.done.full:  # else it was refused or held, and everything is tried again
        with suppress(InputError):  # what was begun is of another inventory or bundle
            return open_run(config, folders, begun[-1])
    wait_for_previous(last, folders.run(begun[-1]), take_over=config.take_over)
    last.announce()  # whoever still works on it stops at its next entry
    return open_run(config, folders, following)


def open_run(config: NightlyConfig, folders: DateFolders, first_generation: int) -> NightRun:
    """The run of the date that begins with this generation."""
    state = folders.run(first_generation)
    last = nights.read_ledger(state)
    run = classify_images.open_run(
        config,
        state,
        folders.images,
        date=folders.date,
        first_generation=first_generation,
        is_planned=last is not None and last.state.phase is Phase.PUBLISHED,
    )
    return NightRun(folders, run, config.keep_failures)


def refuse_unknown_columns(night: NightRun, config: NightlyConfig) -> None:
    """Raise InputError for a column of `--drift-by` that no row has."""
    names = night.run.plan.carried.names
    unknown = [name for name in config.drift_by if name not in names]
    if unknown and night.run.plan.n_rows:
        close = suggestion(unknown[0], names)
        raise InputError(
            f"--drift-by {unknown[0]} is no column of the inventory{close}; there are: {', '.join(names)}"
        )


def carry_out(night: NightRun, config: NightlyConfig) -> int:
    """Carry over, classify what is left, publish."""
    run = night.run
    published = runs.is_published(run)
    if not published:
        runs.announce(run)
        if config.retry_failed and run.ledger.state.phase is Phase.RUNNING:
            runs.reopen_failed(run)
    if not published or (config.retry_failed and runs.reopen_failed(run)):
        nights.carry_over(night)
        classify_missing(run, config)
        while not nights.gather_night(night):
            classify_missing(run, config)
        runs.write_categories(run, night.folders.root)
        hold_on_drift(night, config)
        nights.publish_night(night)
    return leave_report(night, config)


def hold_on_drift(night: NightRun, config: NightlyConfig) -> None:
    """Publish nothing where the labels moved as far as `--hold-on-drift` says. Raises Refused."""
    if not config.hold_on_drift or night.run.ledger.state.phase is not Phase.RUNNING:
        return
    found = reporting.judge_parts(night, part_of(config, ReportSettings))
    if reporting.reaches(found, config.hold_on_drift):
        raise Refused(
            f"nothing was published: drift {found['summary']}; --hold-on-drift is {config.hold_on_drift}. "
            "The same command without it publishes the night, and with --replace begins it again"
        )


def leave_report(night: NightRun, config: NightlyConfig) -> int:
    """Leave the page and the verdict of a published night; returns the exit code."""
    nights.ensure_report(night)
    found = reporting.report_night(night, part_of(config, ReportSettings))
    if not found and config.fail_on_drift:
        raise JobFailed("the night is published, but not its drift (see above); the same command counts it")
    code = 3 if found and reporting.reaches(found, config.fail_on_drift) else 0
    read = [config.inventory, config.bundle]
    lineage.write_event(night.run, "nightly", inputs=read, run_date=night.folders.date)
    line = nights.finish_night(night, code, f"drift {found['summary'] if found else 'not counted'}")
    show(line, night.folders)
    return code


def show(line: str, folders: DateFolders) -> None:
    """Print what became of a published night, and where its page is."""
    print(line)
    if folders.root.exists(REPORT_HTML):
        print(f"report: {redact(folders.root.uri)}/{REPORT_HTML}")
