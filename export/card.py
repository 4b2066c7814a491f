"""The README.md inside a bundle: what the model is, and how to run it without us."""

import re
from collections.abc import Sequence
from importlib import resources

import jinja2
import yaml

from export.checkpoint import NOT_STATED, Checkpoint
from pipelines.bundle.manifest import MODEL_FILES
from pipelines.specs import Precision

FILE = "README.md"
PREPROCESSING = "pixels.py"
HUB_LICENCES = {
    "apache-2.0", "mit", "openrail", "bsd", "bsd-2-clause", "bsd-3-clause", "mpl-2.0", "unlicense", "gpl-3.0",
    "agpl-3.0", "lgpl-3.0", "cc0-1.0", "cc-by-3.0", "cc-by-4.0", "cc-by-sa-3.0", "cc-by-sa-4.0",
    "cc-by-nc-4.0", "cc-by-nc-sa-4.0", "cc-by-nc-nd-4.0", "apple-amlr", "unknown", "other",
}  # fmt: skip
"""Identifiers that the Hugging Face hub knows (hub docs, repositories-licenses): those that models have."""

GEOMETRY = {
    "stretch": "both sides resized",
    "crop": "resized in its own shape until both sides are covered, centre cut out",
    "pad": "resized in its own shape until it fits, centred on black",
}
"""What each `ImageSpec.fit` does, in words."""


def render(trained: Checkpoint, precisions: Sequence[Precision]) -> bytes:
    """The card's bytes; the same checkpoint gives the same card."""
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, trim_blocks=True, autoescape=False)  # noqa: S701
    image = trained.spec.image_spec
    geometry = GEOMETRY[image.fit]
    if image.crop_fraction < 1:
        geometry += f" ({image.crop_fraction:.4g} of each side that is resized is kept)"
    text = environment.from_string(_template("card.md").decode()).render(
        head=yaml.safe_dump(hub_metadata(trained.licence), sort_keys=False).strip(),
        trained=trained,
        spec=image,
        geometry=geometry,
        files=[(name, MODEL_FILES[name]) for name in precisions],
        labels=[(class_id, trained.taxonomy.path(class_id)) for class_id in trained.spec.class_ids],
    )
    return text.encode()


def preprocessing() -> bytes:
    """The Python file with which the card's lines make the model's pixels."""
    return _template(PREPROCESSING)


def _template(name: str) -> bytes:
    return (resources.files("export") / "templates" / name).read_bytes()


def hub_metadata(licence: str) -> dict[str, str]:
    """The front matter; a licence that the hub has no identifier for is `other`, with its name."""
    head = {"library_name": "onnx", "pipeline_tag": "image-classification"}
    if licence == NOT_STATED:
        return {**head, "license": "unknown"}
    if licence.lower() in HUB_LICENCES:
        return {**head, "license": licence.lower()}
    return {
        **head,
        "license": "other",
        "license_name": re.sub(r"[^a-z0-9.]+", "-", licence.lower()).strip("-"),
    }
