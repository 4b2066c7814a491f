"""What the best model of a run is worth: calibrated on validation, measured on both splits, reported.

Nothing is ever fitted on the test split. When the dataset has none, the report is about validation and
says so.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipelines.datasets import splits
from pipelines.evaluation import calibration, metrics
from pipelines.evaluation.evaluation import Evaluation, Scored, evaluate
from pipelines.evaluation.gallery import gallery
from pipelines.evaluation.report import write_report
from pipelines.messages import redact
from pipelines.storage import uris
from pipelines.training import logits as scoring
from pipelines.training import runs
from pipelines.training.checkpoints import Sidecar
from pipelines.training.decoded import DecodedData
from pipelines.training.preview import augmented_samples
from pipelines.training.recipe import Recipe
from pipelines.training.resources import Resources

MEASURED = (splits.VALIDATION, splits.TEST)


@dataclass(frozen=True)
class Scores:
    """Raw logits of the validation and test images."""

    corpus: DecodedData
    logits: Mapping[str, npt.NDArray[np.float32]]
    """Split -> [images, classes], in the order of `corpus.rows`."""

    @classmethod
    def of(
        cls, corpus: DecodedData, sidecar: Sidecar, files: Mapping[str, bytes], resources: Resources
    ) -> Self:
        """Run the model in these files over what is there to measure on."""
        measured = [name for name in MEASURED if len(corpus.rows[name])]
        return cls(
            corpus,
            {
                name: scoring.score(corpus.decoded[name], corpus.rows[name], files, sidecar, resources)
                for name in measured
            },
        )

    def targets(self, split: str) -> npt.NDArray[Any]:
        targets: npt.NDArray[Any] = self.corpus.data.targets()[self.corpus.rows[split]]
        return targets

    def scored(self, split: str, sidecar: Sidecar) -> Scored:
        """Logits, calibrated probabilities and truth of one split."""
        logits_nc = self.logits[split]
        return Scored(sidecar.class_ids, logits_nc, probabilities_of(logits_nc, sidecar), self.targets(split))


def probabilities_of(logits_nc: npt.NDArray[np.float32], sidecar: Sidecar) -> npt.NDArray[np.float32]:
    return metrics.probabilities(logits_nc, temperature=sidecar.temperature, multi_label=sidecar.multi_label)


def calibrated(scores: Scores, sidecar: Sidecar, *, target_precision: float) -> Sidecar:
    """The sidecar with the temperature and the thresholds that suit the validation images."""
    logits_nc, truth = scores.logits[splits.VALIDATION], scores.targets(splits.VALIDATION)
    sidecar = replace(sidecar, temperature=calibration.fit_temperature(logits_nc, truth))
    thresholds = calibration.fit_thresholds(
        probabilities_of(logits_nc, sidecar),
        truth,
        scores.corpus.data.taxonomy.rollup(sidecar.class_ids),
        target_precision=target_precision,
    )
    return replace(sidecar, thresholds=thresholds)


def evaluations(scores: Scores, sidecar: Sidecar, *, about: Mapping[str, str]) -> dict[str, Evaluation]:
    """Split -> everything measured on it."""
    data = scores.corpus.data
    return {
        name: evaluate(
            scores.scored(name, sidecar),
            data.taxonomy,
            thresholds=sidecar.thresholds,
            about={
                **about,
                "dataset": redact(data.settings.uri),
                "split": name,
                "taxonomy": data.taxonomy.name,
            },
        )
        for name in scores.logits
    }


def report(
    scores: Scores,
    sidecar: Sidecar,
    found: Mapping[str, Evaluation],
    recipe: Recipe,
    files: Mapping[str, bytes],
    output: str,
) -> None:
    """Write the run's report: the last split measured, its pictures, how training went."""
    corpus, split = scores.corpus, list(found)[-1]
    data, rows = corpus.data, corpus.rows[split]
    images = data.rows.take(pa.array(rows)).append_column("item_id", pa.array(rows, pa.int64()))
    network = scoring.network(files)
    shown = gallery(scores.scored(split, sidecar), data.taxonomy, images, corpus.spec, network=network)
    material = replace(
        shown,
        history=runs.history(output),
        class_counts=class_counts(corpus, (splits.TRAIN, *found)),
        balancing=balancing(recipe),
        augmented=augmented_samples(corpus, recipe),
    )
    write_report(found[split], uris.join(output, runs.REPORT), material)


def class_counts(corpus: DecodedData, names: Sequence[str]) -> dict[str, dict[str, int]]:
    """Split -> class -> images that were used, after broken ones and copies were left out."""
    data = corpus.data
    return {
        name: dict(zip(data.classes, data.class_counts(corpus.rows[name]).tolist(), strict=True))
        for name in names
    }


def balancing(recipe: Recipe) -> str:
    """What was done about rare classes, in a sentence."""
    balance, done = recipe.balance, []
    counted = "" if balance.sampling == "none" else ", counted as sampled"
    if balance.sampling != "none":
        target = f" of {balance.target_per_class} images" if balance.target_per_class else ""
        done.append(f"classes sampled evenly ({balance.sampling}{target})")
    if balance.class_weights != "none":
        done.append(f"class weights in the loss ({balance.class_weights}{counted})")
    if balance.logit_adjustment:
        done.append(f"logits adjusted by class frequency (tau {balance.logit_adjustment:g}{counted})")
    if recipe.loss.focal_gamma:
        done.append(f"focal loss (gamma {recipe.loss.focal_gamma:g})")
    return f"{'; '.join(done)}." if done else "Nothing was done about rare classes."
