"""`iab-vision classify`: an inventory through a bundle into `OUTPUT/table`, every row exactly once.

    iab-vision classify --inventory inventory.parquet --bundle bundle --output predictions

On two CPU cores about 100 images/s with a ViT-tiny at 224 pixels (BENCHMARKS.md). Expected result:
`table/_SUCCESS`, and `state/report.json` with the counts by status. The same command continues an
interrupted run and does nothing to a finished one.
"""

import logging
import time
from dataclasses import dataclass, field
from typing import Any

import ray
from obstore.exceptions import BaseError
from ray.exceptions import RayError

from jobs.certificate_gate import require_certificate
from jobs.cluster import joins_cluster, nodes_without, ray_cluster
from jobs.config import ClassifyConfig
from jobs.errors import checking_input
from jobs.progress import ProgressReport
from jobs.settings import part_of
from pipelines.bundle.bundle import Bundle, open_bundle
from pipelines.classify import report as run_report
from pipelines.classify.on_ray import Model, Source, classify, work_list
from pipelines.classify.passes import Passes, classify_missing
from pipelines.classify.sizing import size_pools
from pipelines.inventory import inventory
from pipelines.inventory.plan import Plan
from pipelines.ledger import parts, publish
from pipelines.ledger.entries import Phase
from pipelines.ledger.ledger import Ledger
from pipelines.ledger.parts import Committer
from pipelines.ledger.takeover import hold_run
from pipelines.machine import cores, git_revision, library_versions
from pipelines.messages import (
    InputError,
    JobFailed,
    Refused,
    Stopped,
    first_line,
    redact,
    redacted,
    root_cause,
)
from pipelines.specs import InventoryOptions, RuntimeSpec
from pipelines.storage.storage import Storage, open_storage
from pipelines.storage.uris import is_local, join

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
    """Whether a certificate covers what this process runs."""
    images: int = 0
    """Recorded by this process."""
    seconds: dict[str, float] = field(default_factory=dict)


def run(config: ClassifyConfig) -> int:
    """Prepare, classify what is missing, publish, report; or say that it is all done."""
    kept = "what is recorded stays recorded, and the same command continues it"
    try:
        prepared = prepare(config)
        with hold_run(prepared.ledger, prepared.state, take_over=config.take_over):
            return carry_out(prepared)
    except RayError as error:
        raise JobFailed(f"{root_cause(str(error))}; {kept}") from error
    except (OSError, BaseError) as error:  # BaseError: obstore's, from below pyarrow's readers
        raise JobFailed(f"{first_line(error)}; {kept}") from error
    except Stopped as stop:
        raise JobFailed(f"stopped by {stop}; {kept}") from None
    except SystemExit:  # Ray's own answer to SIGTERM while it starts
        raise JobFailed(f"stopped while Ray started; {kept}") from None


def prepare(config: ClassifyConfig) -> Run:
    """Everything that can be checked before Ray starts."""
    started = time.monotonic()
    with checking_input():
        bundle = open_bundle(open_storage(config.bundle).uri)
        runtime = RuntimeSpec(
            provider=config.provider,
            precision=config.precision,
            batch_size=config.batch_size,
            threads=config.threads_per_session,
        )
        certified = require_certificate(bundle, runtime, allow_uncertified=config.allow_uncertified)
        output_uri = open_storage(config.output).uri
        state, table = open_storage(join(output_uri, "state")), open_storage(join(output_uri, "table"))
        refuse_strangers(state, table)
        plan = inventory.plan(config.inventory, state, options=part_of(config, InventoryOptions))
    ledger = open_ledger(state, plan, bundle, config, certified=certified)
    with checking_input():
        publish.refuse_foreign_files(ledger, table)
    if not state.fenced:
        log.warning(
            "%s has no conditional put: two drivers started on it at once might both go on", redact(state.uri)
        )
    seconds = {"plan": time.monotonic() - started}
    return Run(config, bundle, runtime, state, table, plan, ledger, certified, seconds=seconds)


def refuse_strangers(state: Storage, table: Storage) -> None:
    """A table without a ledger is not ours; said before anything is written beside it."""
    if not state.list("ledger"):
        found = [entry.path for entry in table.list() if publish.is_visible(entry.path)]
        if found:
            raise InputError(
                f"{table.uri} holds files that are not of this run and that readers would count too "
                f"({len(found)}, as {found[0]}); move them away or choose another output folder"
            )


def open_ledger(
    state: Storage, plan: Plan, bundle: Bundle, config: ClassifyConfig, *, certified: bool
) -> Ledger:
    """The run's ledger, which must be of the same plan, bundle and settings."""
    details = {
        "config": resolved(config),
        "certified": certified,
        "git_revision": git_revision(),
        "versions": library_versions(),
    }
    return Ledger.open(
        state, identity(bundle, plan, config), n_items=plan.n_items, details=details, lease_s=config.lease_s
    )


def identity(bundle: Bundle, plan: Plan, config: ClassifyConfig) -> dict[str, Any]:
    """What decides the rows of the table; a resume must agree with it.

    That is which images are taken, not how long or how hard each is tried: time-outs, attempts and memory.
    """
    return {
        "plan": plan.hash,
        "model_id": bundle.model_id,
        "precision": config.precision,
        "top_k": config.top_k,
        "max_pixels": config.decode.max_pixels,
        "max_side": config.decode.max_side,
        "max_bytes": config.fetch.max_bytes,
        "max_redirects": config.fetch.max_redirects,
        "allow_private_addresses": config.fetch.allow_private_addresses,
        "allowed_networks": config.fetch.allowed_networks,
    }


def resolved(config: ClassifyConfig) -> Any:
    """The config as it is kept beside the run, without what a URI may hold of credentials."""
    return redacted(config.model_dump(mode="json", exclude={"debug", "config"}))


def carry_out(run: Run) -> int:
    """Classify what is missing, check the error budget, publish, report."""
    if run.ledger.state.phase is Phase.PUBLISHED:
        publish.finish(run.ledger, run.state, run.table)
        if not reopen_failed(run):
            if not run_report.is_current(run.state, run.ledger):  # the driver died before it could report
                report(run)
            print(run_report.one_line(run.ledger, run.plan, run.table))
            return 0
    else:
        run.ledger.announce(session(run))
    if run.ledger.state.phase is Phase.RUNNING:
        if not run.ledger.done.full:
            with ray_cluster(run.config.ray_address, num_cpus=run.config.num_cpus):
                classify_on_cluster(run)
        check_budget(run)
    started = time.monotonic()
    rows_per_file = run.config.workers.rows_per_file
    publish.publish(run.ledger, run.plan, run.state, run.table, rows_per_file=rows_per_file)
    run.seconds["publish"] = time.monotonic() - started
    report(run)
    print(run_report.one_line(run.ledger, run.plan, run.table))
    return 0


def session(run: Run) -> dict[str, Any]:
    """What the ledger keeps of each process that had a part in the table."""
    return {"provider": run.config.provider, "certified": run.certified}


def reopen_failed(run: Run) -> bool:
    """With `--retry-failed`, open a generation for rows that failed in passing; whether there are any."""
    if not run.config.retry_failed:
        return False
    failed = publish.find_failed_items(run.ledger, run.plan, run.table)
    if failed:
        run.ledger.start_generation(failed, session(run))
    return bool(failed)


def classify_on_cluster(run: Run) -> None:
    """Everything that needs Ray."""
    started, before = time.monotonic(), len(run.ledger.done)
    refuse_private_folders(run)
    config = run.config
    committer = Committer(run.ledger, run.state, every_s=config.commit_every_s)
    passes = Passes(later=config.retry_passes, pause_s=config.retry_pause_s)
    try:
        classify_missing(
            run.ledger,
            committer,
            passes,
            lambda final: dataflow(run, final=final),
            progress=ProgressReport(run.ledger.done.n_items, before),
            every_s=config.commit_every_s,
        )
    finally:
        run.seconds["classify"] = time.monotonic() - started
        run.images = len(run.ledger.done) - before


def refuse_private_folders(run: Run) -> None:
    """A folder of this machine serves a cluster only if every node sees it."""
    for uri in filter(is_local, (run.state.uri, run.bundle.uri)):
        if blind := nodes_without(uri):
            raise JobFailed(
                f"{uri} is not there on {', '.join(blind)}; put output and bundle on storage that every node "
                "reaches (s3://, gs://, az://, or a mount that all share)"
            )


def dataflow(run: Run, *, final: bool) -> Any:
    """The dataset that classifies what the ledger misses."""
    config, bundle = run.config, run.bundle
    missing = run.ledger.done.missing()
    try:
        pools = size_pools(
            config.workers,
            ray.cluster_resources(),
            run.runtime,
            n_items=run.plan.n_items - len(run.ledger.done),
            local_cores=None if joins_cluster(config.ray_address) else cores(),
        )
    except ValueError as error:
        raise JobFailed(str(error)) from error
    fetch = config.fetch.shared_by(pools.load_actors)
    source = Source(run.state.uri, bundle.image_spec, config.decode, fetch)
    target = parts.PartContext(
        state_uri=run.state.uri,
        generation=run.ledger.state.generation,
        model_id=bundle.model_id,
        taxonomy=bundle.taxonomy_name,
        cattax=bundle.cattax,
        final=final,
    )
    model = Model(bundle.uri, bundle.manifest_sha256, run.runtime, config.top_k)
    return classify(work_list(missing, pools.items_per_batch), source, model, target, pools)


def check_budget(run: Run) -> None:
    """Refuse to publish too many rows without a label; a rerun of failed rows can only mend a table."""
    if run.ledger.state.generation > 1:
        return
    over = parts.exceeded_error_budget(
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


def report(run: Run) -> None:
    seconds = {name: round(value, 3) for name, value in run.seconds.items()}
    sessions = run.ledger.state.sessions
    about = {
        "model_id": run.bundle.model_id,
        "taxonomy": run.bundle.taxonomy_name,
        "providers": sorted({each["provider"] for each in sessions}),
        "precision": run.config.precision,
        "certified": all(each["certified"] for each in sessions),
    }
    run_report.write(run.state, run.ledger, run.plan, {"images": run.images, "seconds": seconds}, about)
