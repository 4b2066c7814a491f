"""`iab-vision calibrate`: fits temperature and thresholds of a finished run again, without training.

    iab-vision calibrate run --target-precision 0.7

Seconds: the run kept the logits of its validation and test images. Changes best/iab_vision.json, its card and
run.json, and writes a page to RUN/calibration; export makes the bundle with the new thresholds.
"""

import logging

from pydantic_settings import CliPositionalArg

from jobs.errors import checking_input
from jobs.settings import JobConfig, Location, flags_of
from pipelines.messages import redact
from pipelines.training.recipe import Recipe

log = logging.getLogger(__name__)


class CalibrateConfig(
    flags_of(Recipe, "target_precision", "threshold_goal", "target_recall", "threshold_confidence"),  # type: ignore[misc]
    JobConfig,
):
    """Fit temperature and thresholds of a finished run again, without training."""

    run: CliPositionalArg[Location]
    """Folder of a finished run of `train`."""


def run(config: CalibrateConfig) -> int:
    """Fit, write, and say what follows."""
    from pipelines.evaluation.calibration import ThresholdRule
    from pipelines.training.recalibrate import REPORT, recalibrate

    rule = ThresholdRule(
        config.threshold_goal, config.target_precision, config.target_recall, config.threshold_confidence
    )
    with checking_input():
        found = recalibrate(config.run, rule)
    folder = redact(config.run.rstrip("/"))
    log.info("temperature %.2f; report: %s/%s/report.html", found.spec.temperature, folder, REPORT)
    log.info("next: iab-vision export --checkpoint %s --images URI --output BUNDLE", folder)
    return 0
