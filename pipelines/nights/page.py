"""Documents and pictures of nights and comparisons -> their pages."""

import itertools
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jinja2

from pipelines.evaluation.page import open_environment
from pipelines.fetch.settings import FetchLimits
from pipelines.nights.compare import Flip
from pipelines.nights.pictures import Gallery, Picture, make_thumbnails
from pipelines.nights.report import name_of
from pipelines.storage.storage import Storage
from pipelines.taxonomy.taxonomy import Taxonomy

REPORT_HTML = "report.html"
MATRIX_SIDE = 20
"""Categories on a side of the matrix of flips: what fits a page."""


def render_night(document: Mapping[str, Any], gallery: Gallery, taxonomy: Taxonomy) -> str:
    """The page of one night, from `report.describe` and its pictures."""
    return _template("night.html").render(d=document, g=gallery, name_of=partial(name_of, taxonomy))


def write_comparison(
    document: Mapping[str, Any],
    flips: Sequence[Flip],
    taxonomy: Taxonomy,
    output: Storage,
    *,
    limits: FetchLimits,
) -> None:
    """Write `report.html` of a comparison, with a thumbnail of each flip that can be fetched."""
    small = make_thumbnails([flip.uri for flip in flips], {}, limits) if flips else {}
    page = _template("compare.html").render(
        d=document,
        flips=[replace(flip, thumbnail=small.get(flip.uri)) for flip in flips],
        matrix=flip_matrix(document["pairs"]),
        name_of=partial(name_of, taxonomy),
    )
    output.put(REPORT_HTML, page.encode())


def flip_matrix(pairs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The categories with the most flips on both axes, and the images of each pair."""
    involved: Counter[str] = Counter()
    for pair in pairs:
        involved.update({pair["a"]: pair["images"]})
        involved.update({pair["b"]: pair["images"]})
    names = sorted(name for name, _ in involved.most_common(MATRIX_SIDE))
    counted = {(pair["a"], pair["b"]): pair["images"] for pair in pairs}
    cells = [[counted.get((a, b), 0) for b in names] for a in names]
    return {"names": names, "cells": cells, "most": max((max(row) for row in cells), default=0)}


def _template(name: str) -> jinja2.Template:
    environment = open_environment("pipelines.nights", "pipelines.evaluation")
    environment.filters |= {
        "duration": duration,
        "groupby_in_order": group_by_category,
        "p_value": p_value,
        "points": points,
    }
    return environment.get_template(name)


def group_by_category(pictures: Iterable[Picture]) -> list[tuple[str, list[Picture]]]:
    """Pictures by Tier 1 category, in their order."""
    groups = itertools.groupby(pictures, key=lambda picture: picture.tier1_id)
    return [(tier1_id, list(group)) for tier1_id, group in groups]


def points(value: float) -> str:
    """0.0312 -> "+3.1"."""
    return f"{100 * value + 0:+.1f}".replace("-0.0", "0.0").replace("+0.0", "0.0")


def p_value(value: float) -> str:
    """A p-value, "< 0.0001" where it is smaller."""
    return f"{value:.4f}" if value >= 0.0001 else "< 0.0001"


def duration(seconds: float) -> str:
    """4000 -> "1 h 07 min"; 75 -> "1 min 15 s"; 3.21 -> "3.2 s"."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
