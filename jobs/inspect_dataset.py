"""`iab-vision inspect`: look at a labelled dataset before training on it.

    iab-vision inspect photos/labels.csv --output inspection

Reads it as `train` does, decodes every image once in threads of this process (no cluster), and writes
`inspection.html` and `inspection.json`: images per class and split, a grid of each class, unreadable images
with their reasons, duplicates across splits and labels, sizes and formats. Exit code 0 whatever it finds.
"""

import logging

from jobs.config import InspectConfig
from jobs.errors import checking_input
from jobs.label_map import load_dataset
from pipelines.machine import cores

log = logging.getLogger(__name__)


def run(config: InspectConfig) -> int:
    """Write the page and the JSON, and log what should be mended."""
    from pipelines.datasets.settings import DataSettings
    from pipelines.inspection import page
    from pipelines.inspection.inspect import inspect_dataset

    with checking_input():
        settings = DataSettings(
            config.dataset,
            config.taxonomy,
            label_map=config.label_map,
            tier=config.tier,
            columns=config.columns,
            splits=config.splits,
        )
        data = load_dataset(
            settings, config.output, otherwise=", or --taxonomy labels to see the labels as they are"
        )
    found, images = inspect_dataset(data, threads=config.threads or cores(), max_distance=config.max_distance)
    page.write_inspection(found, data, images, config.output)
    log.info("%d images, %d classes", data.rows.num_rows, len(data.classes))
    for warning in found.warnings:
        log.warning("%s", warning)
    log.info("page: %s/%s", config.output.rstrip("/"), page.PAGE_FILE)
    return 0
