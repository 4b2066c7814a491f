"""The certificate as one self-contained HTML page: verdict, numbers, histograms, worst images, speed."""

from collections.abc import Mapping
from typing import Any

import pyarrow as pa

from export.parity import TOP_K
from pipelines.bundle.manifest import MODEL_FILES
from pipelines.evaluation.page import open_environment
from pipelines.specs import Precision, Provider


def render(documents: Mapping[tuple[Provider, Precision], Mapping[str, Any]], labels: pa.Table) -> bytes:
    """The page over certificates; `labels` has the names of the ids."""
    environment = open_environment("export")
    environment.trim_blocks = True
    environment.filters["g"] = number
    page = environment.get_template("certificate.html").render(
        documents=[
            (provider, name, documents[provider, name])
            for provider, name in sorted(documents, key=lambda key: (key[0], list(MODEL_FILES).index(key[1])))
        ],
        names=dict(zip(labels["id"].to_pylist(), labels["name"].to_pylist(), strict=True)),
        top_k=TOP_K,
    )
    return page.encode()


def one_line(provider: str, name: str, document: Mapping[str, Any]) -> str:
    """What a terminal shows of a measurement."""
    metrics, verdict = document["metrics"], "passed" if document["passed"] else "REFUSED"
    top1 = metrics["top1"]
    return (
        f"{name} on {provider}: {verdict} on {document['images']['compared']} images, max |Δ logit| "
        f"{number(metrics['max_logit'])}, top 1 agrees on {top1['share']:.2%} ({top1['ties']} ties), "
        f"{max(document['speed'].values()):g} images/s"
    )


def explain(provider: str, name: str, document: Mapping[str, Any]) -> str:
    """Every limit that a measurement does not keep."""
    broken = "; ".join(
        f"{f['metric']} is {number(f['value'])}, limit {number(f['limit'])}" for f in document["failures"]
    )
    return f"{name} on {provider} is refused: {broken}"


def number(value: float | str | None) -> str:
    """A value or a limit as the page shows it; NaN comes as text."""
    if value is None:
        return "not limited"
    return value if isinstance(value, str) else f"{value:.3g}"
