"""`iab-vision compare A B`: which labels differ between two nights, two predictions or two bundles.

    iab-vision compare nights/images/run_date=2026-11-20 nights/images/run_date=2026-11-21
    iab-vision compare bundle-old bundle-new --images photos/labels.csv --max-flips 0.05

Two bundles run over a sample of the images, in this process: 500 images through two small ViTs take about 20
seconds on 2 cores. Expected result: `comparison/report.html` and `comparison.json`. Exit code 3 when a larger
share of labels differs than `--max-flips`.
"""

import hashlib
import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table

from export.images import OwnImages, Place, find
from jobs.certificate_gate import require_certificate
from jobs.config import CompareConfig
from jobs.errors import checking_input
from pipelines.bundle.bundle import Bundle, open_bundle
from pipelines.bundle.manifest import MANIFEST_FILE
from pipelines.bundle.predictor import open_predictor
from pipelines.bundle.settings import RuntimeSpec
from pipelines.fetch.fetch import Fetcher
from pipelines.fetch.load import decode_here, load
from pipelines.fetch.source import Source
from pipelines.ledger.layout import SUCCESS, decode_manifest
from pipelines.messages import InputError, Refused, redact
from pipelines.nights.compare import Side, choose_flips, compare, open_sides
from pipelines.nights.counts import open_files
from pipelines.nights.page import write_comparison
from pipelines.storage.storage import open_storage
from pipelines.storage.uris import join
from pipelines.taxonomy import taxonomy
from pipelines.taxonomy.taxonomy import AmbiguousLabel, Taxonomy, UnknownLabel

CHUNK = 64
"""Images of a sample that are loaded together."""


def run(config: CompareConfig) -> int:
    """Compare, write the page and the numbers, and print the most important ones."""
    with checking_input():
        places = list_places(config)
    with open_both(config, places) as (a, b, tree), open_sides(a, b) as database:
        found = compare(database, tree, read_truth(places, tree))
        flips = choose_flips(database, config.report_images)
    if not found["images"]:
        raise InputError(f"{a.name} and {b.name} have no labelled image in common")
    document = {"a": redact(a.name), "b": redact(b.name), "max_flips": config.max_flips, **found}
    output = open_storage(config.output)
    write_comparison(document, flips, tree, output, limits=config.fetch)
    output.put("comparison.json", json.dumps(document, indent=1).encode())
    print_summary(document)
    if config.max_flips is not None and found["flip_share"] > config.max_flips:
        raise Refused(
            f"{found['flips']:,} of {found['images']:,} labels differ ({found['flip_share']:.2%}), more than "
            f"--max-flips {config.max_flips:.2%}; {redact(output.uri)}/report.html shows which"
        )
    return 0


def list_places(config: CompareConfig) -> list[Place]:
    """The images that `--images` names, in a fixed random order; none without it."""
    places = find(OwnImages(config.images)) if config.images else []
    return sorted(places, key=lambda place: hashlib.sha256(place.uri.encode()).digest())


@contextmanager
def open_both(config: CompareConfig, places: list[Place]) -> Iterator[tuple[Side, Side, Taxonomy]]:
    """Both sides as predictions, and the taxonomy of the second; bundles are run first."""
    with tempfile.TemporaryDirectory(prefix="iab-vision-compare-") as folder:
        with checking_input():
            uris = (config.a, config.b)
            has_manifest = [open_storage(uri).exists(MANIFEST_FILE) for uri in uris]
            if any(has_manifest) and not all(has_manifest):
                both = zip(uris, has_manifest, strict=True)
                kinds = [f"{redact(uri)} is {'a' if found else 'no'} bundle" for uri, found in both]
                raise InputError(f"{' and '.join(kinds)}: compare two bundles, or two predictions")
            bundles = [open_bundle(uri) for uri in uris] if all(has_manifest) else []
            if bundles and not places:
                raise InputError("two bundles are compared over images; give --images")
            sides = [] if bundles else [open_predictions(uri) for uri in uris]
        for at, bundle in enumerate(bundles):
            sides.append(predict_sample(bundle, places[: config.sample], Path(folder) / str(at), config))
        yield sides[0], sides[1], bundles[1].taxonomy() if bundles else taxonomy_of(sides[1])


def open_predictions(uri: str) -> Side:
    """The files of a night, as its `_SUCCESS` lists them, or of a predictions folder. Raises InputError."""
    table = next((one for one in map(open_storage, (uri, join(uri, "table"))) if one.exists(SUCCESS)), None)
    if table is None:
        raise InputError(
            f"{redact(uri)} has neither manifest.json nor {SUCCESS}: give bundles, folders of `classify`, or "
            "nights, such as TABLE/images/run_date=2026-11-21"
        )
    marker = table.read(SUCCESS)
    listed = [file["name"] for file in decode_manifest(marker)["files"]] if marker else None
    paths = listed or [entry.path for entry in table.list() if entry.path.endswith(".parquet")]
    if not paths:
        raise InputError(f"{redact(uri)} holds no rows")
    return Side(uri, table, paths)


def taxonomy_of(side: Side) -> Taxonomy:
    """The taxonomy that the rows name; one without categories where it is no built-in one."""
    with open_files({"rows": (side.folder, side.paths[:1])}) as database:
        (name,) = database.execute("SELECT max(taxonomy) FROM rows").fetchall()[0]
    version = (name or "").removeprefix("iab-content-")
    if version in taxonomy.CATTAX:
        return taxonomy.load(version)
    return taxonomy.Taxonomy(name or "", "", taxonomy.OWN_CATTAX, ())


def predict_sample(bundle: Bundle, places: list[Place], folder: Path, config: CompareConfig) -> Side:
    """Predictions of a bundle for these images, in a local folder."""
    spec = bundle.spec.image_spec
    runtime = RuntimeSpec(precision=config.precision)
    require_certificate(bundle, runtime, allow_uncertified=config.allow_uncertified)
    predictor = open_predictor(bundle, runtime, config.top_k)
    folder.mkdir()
    scored = []
    with Fetcher(config.fetch) as fetcher:
        for start in range(0, len(places), CHUNK):
            chunk = places[start : start + CHUNK]
            sources = [place.source or Source(place.uri) for place in chunk]
            loaded = load(fetcher, sources, item_ids=range(len(chunk)), spec=spec, decode=decode_here(spec))
            rows = predictor.score(loaded).append_column("uri", pa.array([place.uri for place in chunk]))
            scored.append(rows.append_column("model_id", pa.repeat(bundle.model_id, len(chunk))))
    pq.write_table(pa.concat_tables(scored), folder / "part.parquet")
    return Side(bundle.uri, open_storage(str(folder)), ["part.parquet"])


def read_truth(places: list[Place], tree: Taxonomy) -> dict[str, list[str]]:
    """URI -> ids of its labels, where `--images` is a labelled dataset."""

    def resolve(label: str) -> str:
        try:
            return tree.resolve(label)
        except (AmbiguousLabel, UnknownLabel):  # a label that no prediction can have
            return label

    return {place.uri: [resolve(label) for label in place.labels] for place in places if place.labels}


def print_summary(document: Mapping[str, Any]) -> None:
    """The most important numbers on the terminal."""
    table = Table("compared", "A", "B")
    table.add_row("images in common", f"{document['images']:,}", "")
    table.add_row("labels that differ", f"{document['flips']:,}", f"{document['flip_share']:.2%}")
    table.add_row("Tier 1 differs", f"{document['tier1_flips']:,}", "")
    table.add_row("`cat` differs", f"{document['cat_changes']:,}", "")
    table.add_row("mean best score", f"{document['mean_score_a']:.3f}", f"{document['mean_score_b']:.3f}")
    if truth := document["truth"]:
        table.add_row("accuracy", f"{truth['accuracy_a']:.4f}", f"{truth['accuracy_b']:.4f}")
    console = Console(highlight=False)
    console.print(table)
    for pair in document["pairs"][:5]:
        console.print(f"{pair['images']:>6,}  {pair['a']} → {pair['b']}", markup=False)
