"""One classification run: ledger, passes, error budget, publishing, report.

What the `classify` command and a night have in common. Where it runs is an `Engine`: threads of this process
(`local.run_dataflow`) or a Ray cluster (`on_ray.run_dataflow`).
"""

import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from pipelines.bundle import categories
from pipelines.bundle.bundle import Bundle
from pipelines.bundle.settings import RuntimeSpec
from pipelines.classify import sizing
from pipelines.classify.passes import Progress, run_passes
from pipelines.classify.settings import ErrorBudget, Passes, Workers
from pipelines.classify.sizing import Node
from pipelines.classify.steps import Model, Pools, Source, work_list
from pipelines.fetch.settings import FetchLimits
from pipelines.fetch.source import sources_of
from pipelines.inventory.plan import Plan
from pipelines.ledger import parts, publish
from pipelines.ledger.entries import Phase, sum_counts
from pipelines.ledger.item_set import Range, count
from pipelines.ledger.layout import PLAIN, TableLayout
from pipelines.ledger.ledger import Ledger, read_run_id
from pipelines.ledger.parts import Committer, PartContext
from pipelines.ledger.verify import REPORT_JSON
from pipelines.messages import Refused, redact
from pipelines.specs import DecodeLimits
from pipelines.status import TRANSIENT
from pipelines.storage.storage import Storage
from pipelines.storage.uris import is_local, local_path

HOSTS_SHOWN = 20
"""Hosts in the report: those of most rows without a label."""
SAMPLED_AT = 8
"""Parts of the plan of which so many images are looked for on the other nodes."""

Dataflow = Callable[[pa.Table, Source, Model, PartContext, Pools], Iterator[pa.Table]]


@dataclass(frozen=True)
class Engine:
    """Where the dataflow runs, and what is there."""

    name: str
    run_dataflow: Dataflow
    nodes: Callable[[], Sequence[Node]]
    """What each node has, now."""
    local_cores: int | None
    """Cores, where all of it is this machine."""


@dataclass(frozen=True)
class RunSettings:
    """How a run classifies; `identity` says which of it decides the rows."""

    runtime: RuntimeSpec
    top_k: int
    decode: DecodeLimits
    fetch: FetchLimits
    workers: Workers
    passes: Passes
    budget: ErrorBudget
    commit_interval_s: float


@dataclass
class Run:
    """One classification: its settings, what there is to do, and how far it is."""

    settings: RunSettings
    bundle: Bundle
    state: Storage
    table: Storage
    plan: Plan
    ledger: Ledger
    certified: bool
    """Whether a certificate covers what this process runs."""
    layout: TableLayout = PLAIN
    about: dict[str, Any] = field(default_factory=dict)
    """More for the report."""
    images: int = 0
    """Recorded by this process."""
    seconds: dict[str, float] = field(default_factory=dict)


def identity(bundle: Bundle, plan: Plan, settings: RunSettings) -> dict[str, Any]:
    """What decides the rows of the table; a resume must agree with it.

    That is which images are taken, not how long or how hard each is tried: time-outs, attempts and memory.
    """
    return {
        "plan": plan.hash,
        "model_id": bundle.model_id,
        "precision": settings.runtime.precision,
        "top_k": settings.top_k,
        "max_pixels": settings.decode.max_pixels,
        "max_side": settings.decode.max_side,
        "max_bytes": settings.fetch.max_bytes,
        "max_redirects": settings.fetch.max_redirects,
        "allow_private_addresses": settings.fetch.allow_private_addresses,
        "allowed_networks": settings.fetch.allowed_networks,
        "allow": settings.fetch.allow,
    }


def announce(run: Run) -> None:
    """Enter this process in the ledger, so that a second driver is found before it starts anything."""
    run.ledger.announce(_session(run))


def is_published(run: Run) -> bool:
    """Whether the table is whole; finishes a publication that was interrupted after its last entry."""
    if run.ledger.state.phase is not Phase.PUBLISHED:
        return False
    publish.finish(run.ledger, run.state, run.table, run.layout)
    return True


def is_missing_images(run: Run) -> bool:
    """Whether images are left to classify."""
    return run.ledger.state.phase is Phase.RUNNING and not run.ledger.done.full


def reopen_failed(run: Run) -> bool:
    """Open the rows that failed for a passing reason, of a published table in a new generation.

    Returns whether there are any.
    """
    if run.ledger.state.phase is Phase.RUNNING:
        return parts.reopen_failed(run.ledger, run.state) > 0
    failed = publish.find_failed_items(run.ledger, run.plan, run.table)
    if failed:
        run.ledger.start_generation(failed, _session(run))
    return bool(failed)


def classify_missing(run: Run, engine: Engine, progress: Progress) -> None:
    """Classify every image that the ledger misses, pass after pass."""
    started, before = time.monotonic(), len(run.ledger.done)
    committer = Committer(run.ledger, run.state, every_s=run.settings.commit_interval_s)
    try:
        run_passes(
            run.ledger,
            committer,
            run.settings.passes,
            lambda items, final: _run_dataflow(run, engine, items, final=final),
            progress=progress,
        )
    finally:
        run.seconds["classify"] = run.seconds.get("classify", 0.0) + time.monotonic() - started
        run.images += len(run.ledger.done) - before


def write_categories(run: Run, folder: Storage) -> None:
    """Write the table that names every id of the predictions into a folder."""
    folder.put(categories.FILE, categories.categories_bytes(run.bundle.spec, run.bundle.taxonomy()))


def publish_table(run: Run) -> None:
    """Check the error budget, publish, report.

    Raises:
        Refused: more rows have no label than the budget allows.
    """
    if run.ledger.state.phase is Phase.RUNNING:
        _check_budget(run)
    started = time.monotonic()
    publish.publish(
        run.ledger,
        run.plan,
        run.state,
        run.table,
        rows_per_file=run.settings.workers.rows_per_file,
        layout=run.layout,
    )
    run.seconds["publish"] = time.monotonic() - started
    write_report(run)


def write_report(run: Run) -> None:
    """Write `state/report.json`: the table's counts, and what this process did."""
    ledger, sessions = run.ledger, run.ledger.state.sessions
    statuses = _count_rows(ledger)
    classify_s = run.seconds.get("classify", 0.0)
    report = {
        "rows": run.plan.n_rows,
        "images": run.plan.n_items,
        "statuses": dict(sorted(statuses.items())),
        "retryable_rows": sum(statuses[status.value] for status in TRANSIENT),
        "failing_hosts": dict(ledger.hosts().most_common(HOSTS_SHOWN)),
        "labels": dict(sum_counts(file.labels for file in ledger.state.files.values()).most_common()),
        "generation": ledger.state.generation,
        "last_session": {
            "images": run.images,
            "seconds": {name: round(value, 3) for name, value in run.seconds.items()},
            "images_per_second": round(run.images / classify_s, 1) if classify_s else None,
        },
        "model_id": run.bundle.model_id,
        "taxonomy": run.bundle.spec.taxonomy,
        "providers": sorted({each["provider"] for each in sessions}),
        "precision": run.settings.runtime.precision,
        "certified": all(each["certified"] for each in sessions),
        **run.about,
    }
    run.state.put(REPORT_JSON, json.dumps(report, indent=1).encode())


def is_reported(run: Run) -> bool:
    """Whether the report is there and is about the ledger's last generation."""
    if not run.state.exists(REPORT_JSON):
        return False
    generation: int = json.loads(run.state.read(REPORT_JSON))["generation"]
    return generation == run.ledger.state.generation


def summarize(run: Run) -> str:
    """A published table in one line."""
    counted = ", ".join(f"{name} {n:,}" for name, n in _count_rows(run.ledger).most_common())
    return (
        f"{redact(run.table.uri)}: {run.plan.n_rows:,} rows published ({counted or 'the inventory is empty'})"
    )


def _count_rows(ledger: Ledger) -> Counter[str]:
    """Published rows by status."""
    return sum_counts(file.statuses for file in ledger.state.files.values())


def part_context(run: Run, *, final: bool) -> PartContext:
    """What every row that this run writes has in common."""
    return PartContext(
        state_uri=run.state.uri,
        generation=run.ledger.state.generation,
        run_id=read_run_id(run.state),
        model_id=run.bundle.model_id,
        precision=run.settings.runtime.precision,
        taxonomy=run.bundle.spec.taxonomy,
        cattax=run.bundle.manifest.cattax,
        final=final,
    )


def _run_dataflow(run: Run, engine: Engine, items: Sequence[Range], *, final: bool) -> Iterator[pa.Table]:
    """The dataflow over some of what the ledger misses.

    Raises:
        ClusterChanged: nodes have joined, and much larger pools would do what is left.
    """
    settings, bundle = run.settings, run.bundle
    pools, goal = _pools(run, engine, count(items)), len(run.ledger.done) + count(items)
    grow_at = time.monotonic() + sizing.GROW_AFTER_S
    for written in engine.run_dataflow(
        work_list(items, pools.items_per_batch),
        Source(run.state.uri, bundle.spec.image_spec, settings.decode, settings.fetch, pools.load_actors),
        Model(bundle.uri, bundle.manifest_sha256, settings.runtime, settings.top_k),
        part_context(run, final=final),
        pools,
    ):
        yield written
        if time.monotonic() >= grow_at:
            sizing.refuse_outgrown(pools, lambda: _pools(run, engine, goal - len(run.ledger.done)))


def _pools(run: Run, engine: Engine, n_items: int) -> Pools:
    """The pools that suit the engine now."""
    workers, runtime = run.settings.workers, run.settings.runtime
    return sizing.size_pools(
        workers, engine.nodes(), runtime, n_items=n_items, local_cores=engine.local_cores
    )


def sample_local_images(run: Run) -> list[str]:
    """A few of the images that are files of this machine: on a cluster every node has to see them."""
    if not any(map(is_local, (run.plan.origin.base, *run.settings.fetch.allow))):
        return []
    n_items = run.plan.n_items
    starts = sorted({n_items * number // SAMPLED_AT for number in range(SAMPLED_AT)})
    spans = [(start, min(start + SAMPLED_AT, n_items)) for start in starts]
    locations = [source.location for source in sources_of(run.plan.items(spans))]
    return [uri for uri in locations if is_local(uri) and local_path(uri).exists()]


def _check_budget(run: Run) -> None:
    """Refuse too many rows without a label; a rerun of failed rows can only improve a published table."""
    if run.ledger.state.reopened:
        return
    over = run.settings.budget.find_excess(run.ledger.statuses(), run.ledger.hosts())
    if over:
        raise Refused(
            f"nothing was published: {over}. What was classified is kept in {redact(run.state.uri)}: the "
            "same command with --retry-failed tries the failures again that may have passed, and with a "
            "higher --max-error-rate publishes it as it is"
        )


def _session(run: Run) -> dict[str, Any]:
    """What the ledger keeps of each process that classified or published."""
    return {"provider": run.settings.runtime.provider, "certified": run.certified}
