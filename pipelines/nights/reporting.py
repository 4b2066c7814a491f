"""A published run or night -> `report.html` in its state folder, and its drift.

`counts.json`, written after the page, says of which generation it is; later nights are compared with it.
"""

import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from pipelines.classify.run import Run
from pipelines.ledger.layout import sort_files
from pipelines.ledger.verify import REPORT_JSON
from pipelines.messages import first_line, redact
from pipelines.nights import drift, report
from pipelines.nights.counts import ALL, NightCounts, count_night, open_night, read_counts
from pipelines.nights.drift import Level
from pipelines.nights.folders import DateFolders, Night, find_nights
from pipelines.nights.night import NightRun
from pipelines.nights.page import REPORT_HTML, render_night
from pipelines.nights.pictures import Gallery, choose_pictures, fetch_pictures, find_sources
from pipelines.nights.report import PAST_DAYS, NightFacts
from pipelines.nights.settings import ReportSettings
from pipelines.storage.storage import Storage
from pipelines.taxonomy.taxonomy import Taxonomy

COUNTS_JSON = "counts.json"

log = logging.getLogger(__name__)


def report_run(run: Run, settings: ReportSettings) -> None:
    """Leave the page of a published classification, unless it is there; what fails is a warning."""
    if has_page(run.state, run.ledger.state.generation):
        return
    with _guard_page(run):
        counts, gallery = _look(run, settings)
        facts = NightFacts(json.loads(run.state.read(REPORT_JSON)), counts, settings)
        _leave_page(run, run.state, report.describe(facts, run.bundle.taxonomy()), counts, gallery)


def report_night(night: NightRun, settings: ReportSettings) -> dict[str, Any] | None:
    """Leave the drift of a published night in `report.json`, and its page; what fails is a warning.

    Returns:
        The drift of the night, by `report.describe_drift`; None where it could not be counted.
    """
    run, root = night.run, night.folders.root
    written: dict[str, Any] = json.loads(run.state.read(REPORT_JSON))
    if has_page(root, run.ledger.state.generation):
        return dict(written["drift"])
    found = None
    with _guard_page(run):
        counts, gallery = _look(run, settings)
        past, last = read_past(night.folders, counts.model_id, run.bundle.taxonomy(), settings.drift_by)
        facts = NightFacts(written, counts, settings, str(night.folders.date), past, last)
        document = report.describe(facts, run.bundle.taxonomy())
        found = dict(document["drift"])
        run.state.put(REPORT_JSON, json.dumps({**written, "drift": found}, indent=1).encode())
        _leave_page(run, root, document, counts, gallery)
    return found


def has_page(root: Storage, generation: int) -> bool:
    """Whether the page in this state folder is there, and of this generation."""
    return root.exists(COUNTS_JSON) and read_counts(root.read(COUNTS_JSON)).generation == generation


@contextmanager
def _guard_page(run: Run) -> Iterator[None]:
    """Let no failure of the page change how the command ends: the table is published whole."""
    try:
        yield
    except Exception as error:  # of counting, fetching, decoding, rendering or the storage
        log.warning(
            "%s is published whole, but its page could not be made: %s; the same command tries it again",
            redact(run.table.uri), first_line(error),
        )  # fmt: skip


def _leave_page(
    run: Run, root: Storage, document: dict[str, Any], counts: NightCounts, gallery: Gallery
) -> None:
    """Write the page with the pictures that can be fetched, then the counts that say that it is there."""
    if uris := {picture.uri for picture in (*gallery.by_category, *gallery.least_certain)}:
        gallery = fetch_pictures(gallery, find_sources(run.plan, uris), run.settings.fetch)
    root.put(REPORT_HTML, render_night(document, gallery, run.bundle.taxonomy()).encode())
    root.put(COUNTS_JSON, counts.to_json())


def judge_parts(night: NightRun, settings: ReportSettings) -> dict[str, Any]:
    """The drift of a night before it is published, from the parts that its ledger lists."""
    run = night.run
    taxonomy = run.bundle.taxonomy()
    counts = _empty(run)
    if paths := [part.path for part in run.ledger.state.parts]:
        with open_night(run.state, paths, by=settings.drift_by) as database:
            counts = count_night(database, taxonomy, by=settings.drift_by)
    past, _ = read_past(night.folders, run.bundle.model_id, taxonomy, settings.drift_by)
    return report.describe_drift(drift.judge(report.list_signals(counts, past)), taxonomy)


def reaches(found: dict[str, Any], level: str | None) -> bool:
    """Whether the drift of a night is of this level or a higher one."""
    return level is not None and Level[found["level"]] >= Level[level]


def read_past(
    folders: DateFolders, model_id: str, taxonomy: Taxonomy, by: Sequence[str]
) -> tuple[list[NightCounts], NightCounts | None]:
    """The counts of the trailing nights under this model, and of the last night under any."""
    first = folders.date - timedelta(days=PAST_DAYS)
    found = find_nights(folders.table_uri, until=folders.date)
    nights = [one for one in found if first <= one.date < folders.date]
    counts = [_count_past(one, folders.table_uri, taxonomy, by) for one in nights]
    return [one for one in counts if one.model_id == model_id], counts[-1] if counts else None


def _count_past(night: Night, table_uri: str, taxonomy: Taxonomy, by: Sequence[str]) -> NightCounts:
    """The counts that a night left; counted again if it left none of this generation."""
    root = DateFolders(table_uri, night.date).root
    if root.exists(COUNTS_JSON):
        found = read_counts(root.read(COUNTS_JSON))
        if found.generation == night.generation:
            return found
    if not night.files:
        return NightCounts("", night.generation, 0, 0, 0, None, {}, {})
    with open_night(night.table, night.files, by=by) as database:
        return count_night(database, taxonomy, by=by, generation=night.generation)


def _look(run: Run, settings: ReportSettings) -> tuple[NightCounts, Gallery]:
    """The counts of the published files, and which of their images the page shows."""
    paths = [file.name for file in sort_files(run.ledger.state)]
    if not paths:
        return _empty(run), Gallery()
    generation = run.ledger.state.generation
    with open_night(run.table, paths, by=settings.drift_by) as database:
        counts = count_night(database, run.bundle.taxonomy(), by=settings.drift_by, generation=generation)
        return counts, choose_pictures(database, settings.report_images)


def _empty(run: Run) -> NightCounts:
    generation = run.ledger.state.generation
    return NightCounts(run.bundle.model_id, generation, 0, 0, 0, None, {}, {}, {ALL: {}})
