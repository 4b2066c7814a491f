"""`iab-vision predict`: a few images or URLs through a bundle, in this process, without a cluster.

    iab-vision predict --bundle bundle photo.jpg https://example.com/a.webp
    iab-vision predict --checkpoint run photo.jpg

Exit code 0 when every image got a label, 1 when some did not (their reason is shown), 3 when no certificate
covers the precision on cpu.
"""

import json
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field
from pydantic_settings import CliPositionalArg, SettingsConfigDict

from jobs.errors import checking_input
from jobs.settings import JobConfig
from pipelines.fetch.settings import FetchLimits
from pipelines.messages import InputError
from pipelines.specs import Precision


class PredictConfig(JobConfig):
    """Label a few images in this process, without a cluster."""

    model_config = SettingsConfigDict(cli_shortcuts={"as-json": "json"})

    images: CliPositionalArg[list[str]]
    """Image files or URLs."""
    bundle: str | None = None
    """Bundle made by `iab-vision export`; or give `checkpoint`."""
    checkpoint: str | None = None
    """Run made by `iab-vision train`, or any Hugging Face image classifier's folder; or give `bundle`."""
    top_k: int = Field(default=5, ge=1)
    """Labels per image."""
    precision: Precision = "fp32"
    """Which file of the bundle runs."""
    as_json: bool = False
    """Print one JSON object per image instead of a table."""
    allow_uncertified: bool = False
    """Run a precision that no certificate covers; every row of `--json` says so."""
    fetch: FetchLimits = FetchLimits()
    """Limits of each request."""


if TYPE_CHECKING:
    from pipelines.bundle.predictor import Predictor
    from pipelines.specs import ModelSpec
    from pipelines.taxonomy.taxonomy import Taxonomy

    Opened = tuple[Predictor, ModelSpec, Taxonomy, dict[str, Any]]
    """The model, its contract, its taxonomy, and what each row says of it."""


def run(config: PredictConfig) -> int:
    rows = predict(config)
    if config.as_json:
        for row in rows:
            print(json.dumps(row, ensure_ascii=False))
    else:
        print_table(rows)
    return 0 if all(row["status"] == "ok" for row in rows) else 1


def predict(config: PredictConfig) -> list[dict[str, Any]]:
    """One row per image: the label columns of the predictions table, with the path of each label.

    Each row says whether the model that gave it is `certified`; null for a checkpoint, which needs none.
    """
    from pipelines.fetch.fetch import Fetcher
    from pipelines.fetch.load import decode_here, load
    from pipelines.fetch.source import Source

    if not config.images:
        raise InputError("no image was named; give files or URLs after the settings")
    if folders := [image for image in config.images if Path(image).is_dir()]:
        raise InputError(
            f"{folders[0]} is a folder; name its images, or classify them all with `iab-vision classify "
            f"--inventory {folders[0]}`"
        )
    if (config.bundle is None) == (config.checkpoint is None):
        raise InputError("give either --bundle or --checkpoint")
    open_model = open_bundle_model if config.bundle else open_checkpoint_model
    predictor, spec, tree, model = open_model(config)
    sources, image_spec = [Source(uri) for uri in config.images], spec.image_spec
    with Fetcher(config.fetch) as fetcher:
        item_ids, decode = range(len(sources)), decode_here(image_spec)
        loaded = load(fetcher, sources, item_ids=item_ids, spec=image_spec, decode=decode)
    scored = predictor.score(loaded).to_pylist()
    model = {"cattax": tree.cattax, "taxonomy": spec.taxonomy, **model}
    return [{**present(uri, row, tree), **model} for uri, row in zip(config.images, scored, strict=True)]


def open_bundle_model(config: PredictConfig) -> "Opened":
    """The bundle's model, refused unless a certificate covers it or the user allows it."""
    from jobs.certificate_gate import require_certificate
    from pipelines.bundle import bundle as bundles
    from pipelines.bundle.predictor import open_predictor
    from pipelines.bundle.settings import RuntimeSpec

    with checking_input():
        bundle = bundles.open_bundle(config.bundle or "")
    runtime = RuntimeSpec(precision=config.precision, batch_size=1)
    certified = require_certificate(bundle, runtime, allow_uncertified=config.allow_uncertified)
    predictor = open_predictor(bundle, runtime, config.top_k)
    return predictor, bundle.spec, bundle.taxonomy(), {"model_id": bundle.model_id, "certified": certified}


def open_checkpoint_model(config: PredictConfig) -> "Opened":
    """The checkpoint in PyTorch and float32, on this machine's CPU."""
    from export.checkpoint import open_checkpoint
    from pipelines.bundle.labelling import build_labeller
    from pipelines.bundle.predictor import Predictor
    from pipelines.evaluation.models import TorchModel

    with ExitStack() as stack:
        with checking_input():
            found = stack.enter_context(open_checkpoint(config.checkpoint or ""))
        network = found.network("sdpa")
    labels = build_labeller(found.spec, found.taxonomy, top_k=config.top_k)
    predictor = Predictor(TorchModel(network, found.spec), labels, found.spec.image_spec)
    return predictor, found.spec, found.taxonomy, {"model_id": found.sha256[:12], "certified": None}


def present(uri: str, row: dict[str, Any], taxonomy: Any) -> dict[str, Any]:
    labels = [{**label, "path": taxonomy.path(label["id"])} for label in row["labels"] or []]
    columns = {name: value for name, value in row.items() if name != "item_id"}
    return {"uri": uri, **columns, "labels": labels, "cat": row["cat"] or []}


def print_table(rows: Sequence[dict[str, Any]]) -> None:
    """A line per label. Text is printed as it is: no markup, no emoji; a long URI loses its front."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    table = Table("image", "score", "id", "category")
    for row in rows:
        image = Text(shorten_front(row["uri"], console.width // 3))
        if row["status"] != "ok":
            table.add_row(image, "", "", Text(f"{row['status']}: {row['error'] or ''}"), style="red")
        for rank, label in enumerate(row["labels"]):
            first = image if rank == 0 else ""
            table.add_row(first, f"{label['score']:.3f}", Text(label["id"]), Text(label["path"]))
    console.print(table)


def shorten_front(text: str, width: int) -> str:
    """The end of a text that is longer than `width` characters."""
    return text if len(text) <= width else "…" + text[1 - width :]
