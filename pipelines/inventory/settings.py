"""How an inventory is read."""

from collections.abc import Mapping
from dataclasses import field
from typing import Annotated, Literal

from pydantic import StringConstraints

from pipelines.specs import validated

Name = Annotated[str, StringConstraints(min_length=1)]


@validated
class InventoryOptions:
    """How an inventory is read; what it is, its name and its columns say themselves."""

    inventory_type: Literal["auto", "table", "images", "tars"] = "auto"
    """What the inventory is, where its name or folder misleads."""
    all_files: bool = False
    """In a folder or prefix, take every file as an image, whatever its name."""
    rename: Mapping[Name, Name] = field(default_factory=dict)
    """Old -> new names of a table's columns; `photo_url=uri` makes a column the URI."""
    drop_columns: tuple[str, ...] = ()
    """Columns of a table that are not carried over to the predictions."""
    image_column: str = ""
    """Column of a Parquet table that holds the images themselves; empty: found when there is no `uri`."""
    keep_plan: bool = False
    """Finish the plan that is frozen in the output, even if the inventory has changed since; refused
    where a tar or a table of images has, as images are found in those by their place."""
