"""A published run or night -> `counts.json` and `report.html` in its state folder, and its drift."""

import json
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

from pipelines.classify.run import Run
from pipelines.ledger.layout import sort_files
from pipelines.ledger.verify import REPORT_JSON
from pipelines.nights import drift, report
from pipelines.nights.counts import ALL, NightCounts, count_night, open_night, read_counts
from pipelines.nights.drift import Level
from pipelines.nights.folders import DateFolders, Night, find_nights
from pipelines.nights.night import NightRun
from pipelines.nights.page import REPORT_HTML, render_night
from pipelines.nights.pictures import Gallery, choose_pictures, fetch_pictures, find_sources
from pipelines.nights.report import PAST_DAYS, NightFacts, Price
from pipelines.nights.settings import ReportSettings
from pipelines.taxonomy.taxonomy import Taxonomy

COUNTS_JSON = "counts.json"


def report_run(run: Run, settings: ReportSettings) -> None:
    """Leave `report.html` of a published classification."""
    counts, gallery = _look(run, settings)
    price = Price(settings.price_per_node_hour, settings.nodes)
    facts = NightFacts(json.loads(run.state.read(REPORT_JSON)), counts, price)
    taxonomy = run.bundle.taxonomy()
    page = render_night(report.describe(facts, taxonomy), gallery, lambda one: report.name_of(taxonomy, one))
    run.state.put(REPORT_HTML, page.encode())


def report_night(night: NightRun, settings: ReportSettings) -> dict[str, Any]:
    """Leave `counts.json` and `report.html` of a published night, and its drift in `report.json`.

    Returns:
        The drift of the night, by `report.describe_drift`.
    """
    run, root = night.run, night.folders.root
    counts, gallery = _look(run, settings)
    past, last = read_past(night.folders, counts.model_id, run.bundle.taxonomy(), settings.drift_by)
    written = json.loads(run.state.read(REPORT_JSON))
    price = Price(settings.price_per_node_hour, settings.nodes)
    facts = NightFacts(written, counts, price, str(night.folders.date), past, last)
    taxonomy = run.bundle.taxonomy()
    document = report.describe(facts, taxonomy)
    page = render_night(document, gallery, lambda one: report.name_of(taxonomy, one))
    root.put(REPORT_HTML, page.encode())
    run.state.put(REPORT_JSON, json.dumps({**written, "drift": document["drift"]}, indent=1).encode())
    root.put(COUNTS_JSON, counts.to_json())
    drift_found: dict[str, Any] = document["drift"]
    return drift_found


def is_reported(night: NightRun) -> bool:
    """Whether the page of the night's last generation is there; `counts.json` is written after it."""
    root = night.folders.root
    if not root.exists(COUNTS_JSON):
        return False
    return read_counts(root.read(COUNTS_JSON)).generation == night.run.ledger.state.generation


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
    until = folders.date - timedelta(days=1)
    nights = [one for one in find_nights(folders.table_uri, until=until) if one.date >= first]
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
    """The counts of the published files, and pictures of some of their images."""
    paths = [file.name for file in sort_files(run.ledger.state)]
    if not paths:
        return _empty(run), Gallery()
    generation = run.ledger.state.generation
    with open_night(run.table, paths, by=settings.drift_by) as database:
        counts = count_night(database, run.bundle.taxonomy(), by=settings.drift_by, generation=generation)
        gallery = choose_pictures(database, settings.report_images)
    if not settings.report_images or not counts.images:
        return counts, gallery
    uris = {picture.uri for picture in (*gallery.by_category, *gallery.least_certain)}
    return counts, fetch_pictures(gallery, find_sources(run.plan, uris), run.settings.fetch)


def _empty(run: Run) -> NightCounts:
    generation = run.ledger.state.generation
    return NightCounts(run.bundle.model_id, generation, 0, 0, 0, None, {}, {}, {ALL: {}})
