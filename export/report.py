"""The certificate as one self-contained HTML page: verdict, numbers, histograms, worst images, speed."""

import base64
import io
import json
from collections.abc import Mapping
from importlib import resources
from typing import Any

import jinja2
import numpy as np
from PIL import Image

from export.measurement import Evidence
from export.parity import TOP_K
from pipelines.specs import Precision, Provider

THUMBNAIL_PX = 160


def render(evidence: Evidence, documents: Mapping[tuple[Provider, Precision], Mapping[str, Any]]) -> bytes:
    """The page over all documents of one measurement."""
    template = (resources.files("export") / "templates" / "certificate.html").read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.filters["g"] = number
    page = environment.from_string(template).render(
        documents=[(provider, name, document) for (provider, name), document in documents.items()],
        thumbnail=lambda row: thumbnail(evidence.scores.pixels_nhwc[row]),
        top_k=TOP_K,
    )
    return page.encode()


def number(value: float | str | None) -> str:
    """A value or a limit as the page shows it; NaN comes as text."""
    if value is None:
        return "not limited"
    return value if isinstance(value, str) else f"{value:.3g}"


def thumbnail(pixels_hwc: np.ndarray) -> str:
    """The pixels that the model saw, as a data URI."""
    image = Image.fromarray(pixels_hwc)
    image.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX))
    sink = io.BytesIO()
    image.save(sink, "PNG")
    return f"data:image/png;base64,{base64.b64encode(sink.getvalue()).decode()}"


def as_json(document: Mapping[str, Any]) -> bytes:
    """A document that is kept although there is no bundle to put it into."""
    return (json.dumps(document, indent=2, allow_nan=False) + "\n").encode()
