"""`iab-vision taxonomy`: lists a taxonomy as a tree, or the categories whose id or path holds the words.

iab-vision taxonomy auto racing
"""

from pydantic import Field
from pydantic_settings import CliPositionalArg

from jobs.errors import checking_input
from jobs.settings import JobConfig, field_of
from pipelines.datasets.settings import DataSettings
from pipelines.messages import InputError


class TaxonomyConfig(JobConfig):
    """List a taxonomy, or search it."""

    words: CliPositionalArg[list[str]] = Field(default_factory=list)
    """Words that a category's id or path must hold; none lists all."""
    taxonomy: str = field_of(DataSettings, "taxonomy")


def run(config: TaxonomyConfig) -> int:
    """Print a line per category: its id, and its path from Tier 1 down."""
    from pipelines.taxonomy import taxonomy as taxonomies

    with checking_input():
        taxonomy = taxonomies.load(config.taxonomy)
    words = [word.casefold() for word in config.words]
    paths = [(node.id, taxonomy.path(node.id)) for node in taxonomy.nodes]
    found = [line for line in paths if all(word in " ".join(line).casefold() for word in words)]
    if not found:
        raise InputError(f"no category of {taxonomy.name} holds {' '.join(config.words)!r}; try fewer words")
    width = max(len(node_id) for node_id, _ in found)
    for node_id, path in sorted(found, key=lambda line: line[1]):
        print(f"{node_id:<{width}}  {path}")
    return 0
