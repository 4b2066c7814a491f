"""`iab-vision prune`: removes the oldest dates of a table of nights, as their ledgers list them.

    iab-vision prune nights --keep-days 28 --dry-run

Seconds per date. Expected result: a line per date; files that no ledger lists stay and are named.
"""

from jobs.classify_images import explain_failures
from jobs.config import PruneConfig
from pipelines.nights import prune
from pipelines.storage.storage import open_storage

NAMED = 5


def run(config: PruneConfig) -> int:
    """Remove the dates, or say which would go."""
    with explain_failures():
        removals = prune.find_removals(open_storage(config.table).uri, keep_days=config.keep_days)
        verb = "would remove" if config.dry_run else "removing"
        for removal in removals:
            files = len(removal.table) + len(removal.state)
            print(f"{removal.folders.date}: {verb} {files:,} files, {removal.n_bytes / 1e6:,.1f} MB")
            if removal.kept:
                named = ", ".join(removal.kept[:NAMED])
                print(f"  {len(removal.kept):,} files are in no ledger and stay: {named}")
            if not config.dry_run:
                prune.remove([removal])
        if not removals:
            print(f"no date is more than {config.keep_days} days older than the newest one")
    return 0
