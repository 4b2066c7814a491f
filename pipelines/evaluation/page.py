"""Templates -> self-contained pages: the one Jinja environment of all reports, and how it writes figures.

Labels and URIs come from other people's tables, so the environment escapes whatever is put into a page.
"""

import jinja2

from pipelines.taxonomy.taxonomy import SEPARATOR

UNKNOWN = "–"


def open_environment(*packages: str) -> jinja2.Environment:
    """The templates of these packages, searched in this order."""
    environment = jinja2.Environment(
        loader=jinja2.ChoiceLoader([jinja2.PackageLoader(package) for package in packages]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {
        "count": count,
        "decimal": decimal,
        "leaf": lambda path: path.rsplit(SEPARATOR, maxsplit=1)[-1],
        "percent": percent,
    }
    return environment


def count(value: float | None) -> str:
    """12345 -> "12,345"; a dash where it is unknown."""
    return UNKNOWN if value is None else f"{value:,.0f}"


def decimal(value: float | None, places: int) -> str:
    """0.81234 -> "0.812"; a dash where it is unknown."""
    return UNKNOWN if value is None else f"{value:,.{places}f}"


def percent(value: float | None) -> str:
    """0.8123 -> "81.2 %"; a dash where it is unknown."""
    return UNKNOWN if value is None else f"{100 * value:.1f} %"
