"""Parts of `submit`'s settings: what its driver needs, and where the submitted command begins."""

from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

SWITCHES = {"--detach", "--again", "--insecure", "--debug", "--help", "-h"}
"""Flags of submit that take no value."""


class Entrypoint(BaseModel, frozen=True, extra="forbid"):
    """What a job's driver needs of the node that it runs on; its workers ask for their own."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    num_cpus: float = Field(default=0, ge=0)
    """CPUs; 0 also runs on a head that takes no work."""
    num_gpus: float = Field(default=0, ge=0)
    """GPUs."""
    memory_bytes: int = Field(default=0, ge=0)
    """Memory."""
    resources: dict[str, float] = Field(default_factory=dict)
    """Custom resources of a node."""

    def keywords(self) -> dict[str, Any]:
        """The arguments of Ray's client."""
        return {
            "entrypoint_num_cpus": self.num_cpus or None,
            "entrypoint_num_gpus": self.num_gpus or None,
            "entrypoint_memory": self.memory_bytes or None,
            "entrypoint_resources": self.resources or None,
        }


def leading_flags(argv: Sequence[str]) -> int:
    """How many arguments come before the first that is neither a flag of submit nor a flag's value."""
    at = 0
    while at < len(argv) and argv[at].startswith("-") and argv[at] != "--":
        at += 1 if "=" in argv[at] or argv[at].replace("--no-", "--") in SWITCHES else 2
    return min(at, len(argv))
