"""The README.md inside a bundle: what the model is, and how to run it without this project."""

from collections.abc import Sequence
from importlib import resources

import jinja2

from export.checkpoint import Checkpoint
from pipelines.bundle import MODEL_FILES
from pipelines.specs import Precision

FILE = "README.md"


def render(trained: Checkpoint, precisions: Sequence[Precision]) -> bytes:
    """The card's bytes; the same checkpoint gives the same card."""
    template = (resources.files("export") / "templates" / "card.md").read_text(encoding="utf-8")
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, trim_blocks=True, autoescape=False)  # noqa: S701
    text = environment.from_string(template).render(
        trained=trained,
        spec=trained.image_spec,
        files=[(name, MODEL_FILES[name]) for name in precisions],
        labels=[(class_id, trained.taxonomy.path(class_id)) for class_id in trained.class_ids],
    )
    return text.encode()
