"""`iab-vision classify`: an inventory through a bundle into `OUTPUT/table`, every row exactly once.

    iab-vision classify --inventory inventory.parquet --bundle bundle --output predictions

On two CPU cores about 100 images/s with a ViT-tiny at 224 pixels (BENCHMARKS.md). Expected result:
`table/_SUCCESS`, and `state/report.json` with the counts by status. The same command continues an
interrupted run and does nothing to a finished one.
"""

import datetime
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from obstore.exceptions import BaseError

from jobs import lineage
from jobs.certificate_gate import require_certificate
from jobs.config import ClassificationConfig, ClassifyConfig
from jobs.engines import choose_spread, open_engine
from jobs.errors import checking_input
from jobs.progress import ClassifyProgress
from jobs.settings import part_of
from pipelines.bundle.bundle import Bundle, open_bundle
from pipelines.bundle.categories import FILE
from pipelines.bundle.precision import choose_precision
from pipelines.bundle.settings import RuntimeSpec
from pipelines.classify import run as runs
from pipelines.classify.run import Engine, Run, RunSettings
from pipelines.classify.settings import ErrorBudget, Passes
from pipelines.classify.sizing import size_pools
from pipelines.inventory import inventory
from pipelines.inventory.plan import Plan, open_plan
from pipelines.inventory.settings import InventoryOptions
from pipelines.ledger import publish
from pipelines.ledger.entries import Phase
from pipelines.ledger.layout import GENERATIONS, PLAIN
from pipelines.ledger.ledger import Ledger
from pipelines.ledger.takeover import hold_run
from pipelines.machine import git_revision, package_versions
from pipelines.messages import InputError, JobFailed, OtherRun, Stopped, first_line, redact, redacted
from pipelines.nights import reporting
from pipelines.nights.settings import ReportSettings
from pipelines.storage.storage import Storage, open_storage
from pipelines.storage.uris import join

log = logging.getLogger(__name__)

KEPT = "what is recorded stays recorded, and the same command continues it"


def run(config: ClassifyConfig) -> int:
    """Prepare, classify what is missing, publish, report; or say that it is all done."""
    with explain_failures("the same command starts it again"):
        prepared = prepare(config)
    with explain_failures(), hold_run(prepared.ledger, prepared.state, take_over=config.take_over):
        return carry_out(prepared, config)


@contextmanager
def explain_failures(kept: str = KEPT) -> Iterator[None]:
    """Report failures of storage and requests to stop as a `JobFailed` that says what is kept."""
    try:
        yield
    except (OSError, BaseError) as error:  # BaseError: obstore's, from below pyarrow's readers
        raise JobFailed(f"{first_line(error)}; {kept}") from error
    except Stopped as stop:
        raise JobFailed(f"stopped by {stop}; {kept}") from None
    except SystemExit:  # Ray's own answer to SIGTERM while it starts
        raise JobFailed(f"stopped while Ray started; {kept}") from None


def prepare(config: ClassifyConfig) -> Run:
    """Everything that can be checked before an engine starts."""
    output_uri = open_storage(config.output).uri
    state, table = open_storage(join(output_uri, "state")), open_storage(join(output_uri, "table"))
    try:
        return open_run(config, state, table)
    except OtherRun as error:
        raise InputError(f"{error}; another one needs another output folder") from error


def open_run(
    config: ClassificationConfig,
    state: Storage,
    table: Storage,
    *,
    date: datetime.date | None = None,
    first_generation: int = 1,
    is_planned: bool = False,
) -> Run:
    """The run of a state folder and its table, to begin or to continue.

    Args:
        date: of a night.
        first_generation: above 1 for a run that replaces the table of another.
        is_planned: keep the plan that is there, whatever became of the inventory.
    """
    started = time.monotonic()
    with checking_input():
        bundle = open_bundle(open_storage(config.bundle).uri)
        settings = run_settings(config, bundle)
        allowed = config.allow_uncertified
        certified = require_certificate(bundle, settings.runtime, allow_uncertified=allowed)
        if first_generation == 1:
            publish.refuse_table_without_ledger(state, table)
        plan = open_plan(state) if is_planned else plan_images(config, state)
    identity = runs.identity(bundle, plan, settings) | ({"run_date": str(date)} if date else {})
    layout = GENERATIONS if date else PLAIN
    with checking_input():
        ledger = Ledger.open(
            state,
            identity,
            n_items=plan.n_items,
            details=describe_run(config, certified=certified),
            lease_s=config.lease_s,
            first_generation=first_generation,
        )
        publish.refuse_foreign_files(ledger, table, layout)
    warn_if_unfenced(state)
    seconds = {"inventory" if date else "plan": time.monotonic() - started}
    return Run(settings, bundle, state, table, plan, ledger, certified, layout, seconds=seconds)


def plan_images(config: ClassificationConfig, state: Storage) -> Plan:
    """The plan of the inventory, made now or found in the state folder."""
    options = part_of(config, InventoryOptions)
    spread = choose_spread(config.engine, config.ray_address)
    return inventory.plan(config.inventory, state, options=options, allowed=config.fetch.allow, spread=spread)


def carry_out(run: Run, config: ClassifyConfig) -> int:
    """Classify what is missing, check the error budget, publish, report."""
    if not runs.is_published(run):
        runs.announce(run)
        if config.retry_failed and run.ledger.state.phase is Phase.RUNNING:
            runs.reopen_failed(run)
    elif not (config.retry_failed and runs.reopen_failed(run)):
        if not runs.is_reported(run):  # the driver died before it could report
            runs.write_report(run)
        reporting.report_run(run, part_of(config, ReportSettings))
        print(f"complete already, nothing was done. {runs.summarize(run)}")
        return 0
    classify_missing(run, config)
    runs.write_categories(run, open_storage(config.output))
    runs.publish_table(run)
    reporting.report_run(run, part_of(config, ReportSettings))
    lineage.write_event(run, "classify", inputs=[config.inventory, config.bundle])
    print(runs.summarize(run))
    output = redact(config.output.rstrip("/"))
    print(f"read {output}/table; names of ids: {output}/{FILE}; report: {output}/state/report.html")
    return 0


def classify_missing(run: Run, config: ClassificationConfig) -> None:
    """Classify what the ledger misses; starts no engine if that is nothing."""
    if not runs.is_missing_images(run):
        return
    with open_engine(
        config.engine,
        ray_address=config.ray_address,
        num_cpus=config.num_cpus,
        provider=config.provider,
        needed=(run.state.uri, run.bundle.uri, *runs.sample_local_images(run)),
    ) as engine:
        log.info("%s", describe_start(run, engine, config))
        progress = ClassifyProgress(run.ledger.done.n_items, len(run.ledger.done))
        runs.classify_missing(run, engine, progress)


def describe_start(run: Run, engine: Engine, config: ClassificationConfig) -> str:
    """One line: how much of what is classified, by which model, to where, and with what."""
    runtime, missing = run.settings.runtime, run.plan.n_items - len(run.ledger.done)
    pools = size_pools(
        config.workers, engine.nodes(), runtime, n_items=missing, local_cores=engine.local_cores
    )
    return (
        f"{run.plan.n_rows:,} rows, {run.plan.n_items:,} images ({missing:,} to classify) of "
        f"{redact(config.inventory)}; bundle {redact(config.bundle)} ({run.bundle.model_id}, "
        f"{runtime.precision} on {runtime.provider}); table {redact(run.table.uri)}; engine {engine.name}: "
        f"{pools.load_actors} loaders, {pools.infer_actors} sessions"
    )


def runtime_spec(config: ClassificationConfig, bundle: Bundle) -> RuntimeSpec:
    """How sessions run, with `--precision auto` resolved."""
    runtime = RuntimeSpec(
        provider=config.provider, batch_size=config.batch_size, threads=config.threads_per_session
    )
    if config.precision != "auto":
        return replace(runtime, precision=config.precision)
    choice = choose_precision(bundle, runtime, max_accuracy_loss=config.max_accuracy_loss)
    log.info("--precision auto runs %s: %s", choice.precision, choice.reason)
    return replace(runtime, precision=choice.precision)


def run_settings(config: ClassificationConfig, bundle: Bundle) -> RunSettings:
    """The settings of a run as the command line names them."""
    return RunSettings(
        runtime=runtime_spec(config, bundle),
        top_k=config.top_k,
        decode=config.decode,
        fetch=config.fetch,
        workers=config.workers,
        passes=part_of(config, Passes),
        budget=part_of(config, ErrorBudget),
        commit_interval_s=config.commit_interval_s,
    )


def warn_if_unfenced(state: Storage) -> None:
    """Say so where the storage cannot keep two drivers apart."""
    if not state.fenced:
        log.warning(
            "%s has no conditional put: two drivers started on it at once might both go on", redact(state.uri)
        )


def describe_run(config: ClassificationConfig, *, certified: bool) -> dict[str, Any]:
    """What run.json keeps in addition to the identity, without the credentials in the config's URIs."""
    return {
        "config": redacted(config.model_dump(mode="json", exclude={"debug", "config"})),
        "certified": certified,
        "git_revision": git_revision(),
        "versions": package_versions(),
    }
