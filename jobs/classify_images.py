"""`iab-vision classify`: an inventory through a bundle into `OUTPUT/table`, every row exactly once.

    iab-vision classify --inventory inventory.parquet --bundle bundle --output predictions

On two CPU cores about 100 images/s with a ViT-tiny at 224 pixels (BENCHMARKS.md). Expected result:
`table/_SUCCESS`, and `state/report.json` with the counts by status. The same command continues an
interrupted run and does nothing to a finished one.
"""

import contextlib
import json
import logging
import time
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any

import ray

from jobs.cluster import cores, joins_cluster, ray_cluster
from jobs.config import ClassifyConfig, plain
from jobs.errors import InputError, JobFailed, Refused, checking_input
from jobs.pools import size_pools
from jobs.progress import ProgressReport
from jobs.signals import Stopped, stoppable
from pipelines import inventory, output, publishing
from pipelines.bundle import Bundle, NotCertified, open_bundle
from pipelines.inference import Model, Source, classify, work_list
from pipelines.ledger import Ledger, LedgerDamaged, LedgerLost, RunMismatch, State
from pipelines.output import Committer, PartDamaged
from pipelines.plan import Plan
from pipelines.publishing import TableDamaged
from pipelines.runs import git_revision
from pipelines.schema import TRANSIENT, Status
from pipelines.specs import InventoryOptions, RuntimeSpec
from pipelines.storage import Storage, join, open_storage, redact
from pipelines.verification import REPORT_JSON

CPU_BATCH, GPU_BATCH = 16, 256
ROWS_PER_BLOCK_CPU, ROWS_PER_BLOCK_GPU = 64, 256
"""Decoded images handed on at once: on CPU small, so that every session has work to the end."""

log = logging.getLogger(__name__)


@dataclass
class Run:
    """One classification: what was asked, what there is to do, and how far it is."""

    config: ClassifyConfig
    bundle: Bundle
    runtime: RuntimeSpec
    state: Storage
    table: Storage
    plan: Plan
    ledger: Ledger
    certified: bool
    seconds: dict[str, float] = field(default_factory=dict)


def run(config: ClassifyConfig) -> int:
    try:
        return carry_out(prepare(config))
    except (LedgerLost, LedgerDamaged, PartDamaged, TableDamaged) as error:
        raise JobFailed(str(error)) from error
    except OSError as error:
        raise JobFailed(
            f"{redact(str(error))}; what is recorded stays recorded, and the same command continues it"
        ) from error


def prepare(config: ClassifyConfig) -> Run:
    """Everything that can be checked before Ray starts."""
    started = time.monotonic()
    with checking_input():
        bundle = open_bundle(open_storage(config.bundle).uri)
        runtime = RuntimeSpec(
            provider=config.provider,
            precision=config.precision,
            batch_size=config.batch_size or (CPU_BATCH if config.provider == "cpu" else GPU_BATCH),
            threads=config.threads_per_session,
        )
        certified = is_certified(bundle, config)
        output_uri = open_storage(config.output).uri
        state, table = open_storage(join(output_uri, "state")), open_storage(join(output_uri, "table"))
        plan = inventory.plan(config.inventory, state, options=inventory_options(config))
    ledger = open_ledger(state, plan, bundle, config)
    with checking_input():
        publishing.refuse_foreign_files(ledger, table)
    if not state.fenced:
        log.warning(
            "%s has no conditional put: two drivers started on it at once might both go on", redact(state.uri)
        )
    seconds = {"plan": time.monotonic() - started}
    return Run(config, bundle, runtime, state, table, plan, ledger, certified, seconds)


def open_ledger(state: Storage, plan: Plan, bundle: Bundle, config: ClassifyConfig) -> Ledger:
    """The run's ledger, which must be of the same plan, bundle and settings."""
    details = {"config": resolved(config), **surroundings()}
    try:
        return Ledger.open(state, identity(bundle, plan, config), n_items=plan.n_items, details=details)
    except RunMismatch as error:
        raise InputError(str(error)) from error


def surroundings() -> dict[str, Any]:
    """What else made the run: code and libraries."""
    libraries = ("iab-vision", "ray", "onnxruntime-gpu", "onnxruntime", "pyarrow", "pillow", "obstore")
    versions = {}
    for name in libraries:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return {"git_revision": git_revision(), "versions": versions}


def is_certified(bundle: Bundle, config: ClassifyConfig) -> bool:
    """Whether a passing certificate covers what will run; `--allow-uncertified` lets it be False."""
    try:
        bundle.certificate_for(config.provider, config.precision)
    except NotCertified as error:
        if not config.allow_uncertified:
            raise Refused(str(error)) from error
        log.warning("RUNNING WITHOUT PROOF (--allow-uncertified): %s", error)
        return False
    return True


def inventory_options(config: ClassifyConfig) -> InventoryOptions:
    return InventoryOptions(
        form=config.form,
        all_files=config.all_files,
        rename=tuple(config.rename),
        drop_columns=tuple(config.drop_columns),
        payload_column=config.payload_column,
        keep_plan=config.keep_plan,
    )


def identity(bundle: Bundle, plan: Plan, config: ClassifyConfig) -> dict[str, Any]:
    """What decides the rows of the table; a resume must agree with it."""
    return {
        "plan": plan.hash,
        "model_id": bundle.model_id,
        "precision": config.precision,
        "top_k": config.top_k,
        "max_pixels": config.decode.max_pixels,
        "max_bytes": config.fetch.max_bytes,
    }


def resolved(config: ClassifyConfig) -> dict[str, Any]:
    """The config as it is kept beside the run, without what a URI may hold of credentials."""
    values = config.model_dump(mode="json", exclude={"debug", "config"})
    return {name: redact(value) if isinstance(value, str) else value for name, value in values.items()}


def carry_out(run: Run) -> int:
    """Classify what is missing, check the error budget, publish, report."""
    if run.ledger.view.state is State.PUBLISHED:
        publishing.finish(run.ledger, run.state, run.table)
        if not reopen_failed(run):
            if not report_is_current(run):  # the driver died between publishing and reporting
                write_report(run)
            return say_done(run)
    else:
        run.ledger.announce()
    if run.ledger.view.state is State.RUNNING and not run.ledger.done.full:
        with ray_cluster(run.config.ray_address, num_cpus=run.config.num_cpus):
            classify_missing(run)
    if run.ledger.view.state is State.RUNNING:
        check_budget(run)
    started = time.monotonic()
    rows_per_file = run.config.workers.rows_per_file
    publishing.publish(run.ledger, run.plan, run.state, run.table, rows_per_file=rows_per_file)
    run.seconds["publish"] = time.monotonic() - started
    write_report(run)
    return say_done(run)


def reopen_failed(run: Run) -> bool:
    """With `--retry-failed`, open a generation for rows that failed in passing; whether there are any."""
    if not run.config.retry_failed:
        return False
    failed = publishing.failed_items(run.ledger, run.plan, run.table)
    if failed:
        run.ledger.reopen(failed)
    return bool(failed)


def classify_missing(run: Run) -> None:
    """Pass after pass until every row is recorded; the last pass records passing failures too."""
    passes = run.config.retry_passes + 1
    started = time.monotonic()
    with stoppable(), ProgressReport(run.plan.n_items, len(run.ledger.done)) as progress:
        committer = Committer(run.ledger, run.state, every_s=run.config.commit_every_s)
        try:
            for number in range(1, passes + 1):
                if number > 1:
                    log.info("trying %s images again", f"{left_of(run):,}")
                    time.sleep(run.config.retry_pause_s)
                one_pass(run, committer, progress, final=number == passes)
                committer.flush()
                if run.ledger.done.full:
                    break
        except Stopped as stop:
            committer.flush()
            raise JobFailed(
                f"stopped by {stop}; {len(run.ledger.done):,} of {run.plan.n_items:,} images are recorded, "
                "and the same command continues"
            ) from None
    run.seconds["classify"] = time.monotonic() - started


def left_of(run: Run) -> int:
    return run.plan.n_items - len(run.ledger.done)


def one_pass(run: Run, committer: Committer, progress: ProgressReport, *, final: bool) -> None:
    """Run the dataflow over what is missing and hand each written part to the committer."""
    spec = run.bundle.image_spec
    config = run.config
    on_cpu = config.provider == "cpu"
    source = Source(
        state_uri=run.state.uri,
        image_spec=spec,
        decode=plain(config.decode),
        fetch=plain(config.fetch),
        rows_per_block=ROWS_PER_BLOCK_CPU if on_cpu else ROWS_PER_BLOCK_GPU,
    )
    target = output.Target(
        state_uri=run.state.uri,
        generation=run.ledger.view.generation,
        model_id=run.bundle.model_id,
        taxonomy=run.bundle.taxonomy_name,
        cattax=run.bundle.cattax,
        final=final,
    )
    with checking_input():
        pools = size_pools(
            plain(config.workers),
            ray.cluster_resources(),
            provider=config.provider,
            threads=config.threads_per_session,
            n_items=left_of(run),
            local_cores=None if joins_cluster(config.ray_address) else cores(),
        )
    chunks = work_list(run.ledger.done.missing(), config.workers.rows_per_chunk)
    parts = classify(chunks, source, Model(run.bundle.uri, run.runtime, config.top_k), target, pools)
    done, errors = len(run.ledger.done), 0
    for batch in parts.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
        for row in batch.to_pylist():
            part = output.read_written(row).part
            kept = committer.add(part) if part else None
            if kept:
                done += sum(stop - start for start, stop in kept.items)
                errors += kept.rows - kept.statuses.get(Status.OK.value, 0)
                progress.update(done, errors)


def check_budget(run: Run) -> None:
    """Refuse to publish too many rows without a label."""
    over = output.over_budget(
        run.ledger.statuses(),
        run.ledger.hosts(),
        max_error_rate=run.config.max_error_rate,
        max_error_rate_of=run.config.max_error_rate_of,
    )
    if over:
        raise Refused(
            f"nothing was published: {over}. What was classified is kept in {redact(run.state.uri)}; the "
            "same command with a higher --max-error-rate publishes it, and another --output starts over"
        )


def report_is_current(run: Run) -> bool:
    if not run.state.exists(REPORT_JSON):
        return False
    generation: int = json.loads(run.state.read(REPORT_JSON))["generation"]
    return generation == run.ledger.view.generation


def totals(run: Run) -> tuple[dict[str, int], dict[str, int]]:
    """Published rows by status and by best label."""
    statuses: dict[str, int] = {}
    labels: dict[str, int] = {}
    for file in run.ledger.view.files.values():
        for counted, found in ((statuses, file.statuses), (labels, file.labels)):
            for name, n in found.items():
                counted[name] = counted.get(name, 0) + n
    return statuses, labels


def write_report(run: Run) -> None:
    """`state/report.json`: counts by status, seconds by stage, images/s, label histogram."""
    statuses, labels = totals(run)
    classify_s = run.seconds.get("classify", 0.0)
    report = {
        "rows": run.plan.n_rows,
        "images": run.plan.n_items,
        "statuses": dict(sorted(statuses.items())),
        "labels": dict(sorted(labels.items(), key=lambda pair: -pair[1])),
        "seconds": {name: round(value, 3) for name, value in run.seconds.items()},
        "images_per_second": round(run.plan.n_items / classify_s, 1) if classify_s else None,
        "model_id": run.bundle.model_id,
        "taxonomy": run.bundle.taxonomy_name,
        "provider": run.config.provider,
        "precision": run.config.precision,
        "certified": run.certified,
        "generation": run.ledger.view.generation,
        "retryable_rows": sum(statuses.get(status.value, 0) for status in TRANSIENT),
    }
    run.state.put(REPORT_JSON, json.dumps(report, indent=1).encode())


def say_done(run: Run) -> int:
    statuses, _ = totals(run)
    counted = ", ".join(f"{name} {n:,}" for name, n in sorted(statuses.items(), key=lambda pair: -pair[1]))
    print(f"{redact(run.table.uri)}: {run.plan.n_rows:,} rows published ({counted})")
    return 0
