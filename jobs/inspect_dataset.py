"""`iab-vision inspect`: look at a labelled dataset before training on it.

    iab-vision inspect photos/labels.csv --output inspection

Reads it as `train` does, decodes every image once in threads of this process (no cluster), and writes
`inspection.html` and `inspection.json`: images per class and split, a grid of each class, unreadable images
with their reasons, duplicates across splits and labels, sizes and formats. Exit code 0 whatever it finds.
"""

import logging

from pydantic import Field
from pydantic_settings import CliPositionalArg

from jobs.errors import checking_input
from jobs.label_map import load_dataset
from jobs.settings import Folder, JobConfig, flags_of, part_of
from pipelines.datasets.settings import DataSettings
from pipelines.machine import cores

log = logging.getLogger(__name__)


class InspectConfig(
    flags_of(DataSettings, "taxonomy", "label_map", "tier", "columns", "splits"),  # type: ignore[misc]
    JobConfig,
):
    """Look at a labelled dataset before training: counts, pictures, unreadable images, duplicates."""

    dataset: CliPositionalArg[str]
    """Labelled images: folder `<label>/image.jpg`, table of files and labels, or Hugging Face Parquet."""
    output: Folder = "inspection"
    """Folder for `inspection.html` and `inspection.json`."""
    max_distance: int = Field(default=4, ge=0, le=16)
    """Bits of 64 in which the perceptual hashes of two copies of a picture may differ."""
    threads: int = Field(default=0, ge=0)
    """Threads that fetch and decode; 0 is one per core."""


def run(config: InspectConfig) -> int:
    """Write the page and the JSON, and log what should be fixed."""
    from pipelines.inspection import page
    from pipelines.inspection.inspect import inspect_dataset

    with checking_input():
        settings = part_of(config, DataSettings, uri=config.dataset)
        data = load_dataset(
            settings, config.output, otherwise=", or --taxonomy labels to see the labels as they are"
        )
    log.info("decoding %d images of %d classes", data.rows.num_rows, len(data.classes))
    found, images = inspect_dataset(data, threads=config.threads or cores(), max_distance=config.max_distance)
    page.write_inspection(found, data, images, config.output)
    for warning in found.warnings:
        log.warning("%s", warning)
    log.info("page: %s/%s", config.output.rstrip("/"), page.PAGE_FILE)
    return 0
