"""Published rows -> whether their sources still hold the bytes that were classified, for a random sample."""

import numpy as np
import pyarrow.parquet as pq

from pipelines.fetch.fetch import Fetcher
from pipelines.fetch.settings import FetchLimits
from pipelines.fetch.source import sources_of
from pipelines.inventory.plan import open_plan
from pipelines.ledger.ledger import Ledger
from pipelines.ledger.republish import list_row_items
from pipelines.ledger.verify import Check
from pipelines.messages import redact
from pipelines.storage.storage import open_storage
from pipelines.storage.uris import join


def check_sources(predictions_uri: str, n_rows: int, limits: FetchLimits) -> Check:
    """Fetch the images of random rows again and compare their sha256; one that is gone is no failure."""
    root = open_storage(predictions_uri).uri
    digest_of = _draw_rows(root, n_rows)
    item_ids = sorted(digest_of)
    items = open_plan(open_storage(join(root, "state"))).items([(number, number + 1) for number in item_ids])
    uris, other, gone = items["uri"].to_pylist(), [], 0
    with Fetcher(limits) as fetcher:
        for index, fetched in fetcher.fetch_many(sources_of(items)):
            gone += fetched.payload is None
            if fetched.payload is not None and fetched.sha256 != digest_of[item_ids[index]]:
                other.append(uris[index])
    found = f"{len(item_ids) - gone - len(other):,} of {len(item_ids):,} images have the recorded bytes"
    found += f", {gone:,} could not be fetched" if gone else ""
    found += f", {len(other):,} have other bytes, such as {redact(other[0])}" if other else ""
    return Check("sources", not other, found)


def _draw_rows(root: str, n_rows: int) -> dict[int, str]:
    """Items of random rows whose bytes were fetched, and their recorded sha256."""
    state, table = open_storage(join(root, "state")), open_storage(join(root, "table"))
    plan = open_plan(state)
    files = [file for file in Ledger(state, plan.n_items).state.files.values() if file.rows]
    rng = np.random.default_rng()
    shares = np.array([file.rows for file in files]) / max(1, sum(file.rows for file in files))
    drawn = rng.multinomial(n_rows, shares) if files else np.array([], int)
    digest_of: dict[int, str] = {}
    for file, wanted in zip(files, drawn, strict=True):
        if wanted:
            digests = pq.read_table(table.open_input(file.name), columns=["sha256"])["sha256"].to_pylist()
            item_ids = list_row_items(file.items, plan).tolist()
            known = [row for row, digest in enumerate(digests) if digest]
            for row in rng.permutation(known)[:wanted]:
                digest_of[item_ids[int(row)]] = digests[int(row)]
    return digest_of
