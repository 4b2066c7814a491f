"""How an inventory is read."""

from typing import Literal

from pipelines.specs import validated


@validated
class InventoryOptions:
    """How an inventory is read; what it is, its name and its columns say themselves."""

    inventory_type: Literal["auto", "table", "images", "tars"] = "auto"
    """What the inventory is, where its name or folder misleads."""
    all_files: bool = False
    """In a folder or prefix, take every file as an image, whatever its name."""
    rename: tuple[str, ...] = ()
    """Columns of a table under another name, as `old=new`; `photo_url=uri` makes a column the URI."""
    drop_columns: tuple[str, ...] = ()
    """Columns of a table that are not carried over to the predictions."""
    image_column: str = ""
    """Column of a Parquet table that holds the images themselves; empty: found when there is no `uri`."""
    keep_plan: bool = False
    """Finish the plan that is frozen in the output, even if the inventory has changed since."""

    def __post_init__(self) -> None:
        for pair in self.rename:
            if not all(pair.partition("=")):
                raise ValueError(f"rename holds {pair!r}; it must be old=new")
