"""The best model of a run: scored on validation and test, calibrated on validation, reported.

Nothing is fitted on the test split. A dataset without one gets a report on validation, which says so.
"""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pyarrow as pa
import torch

from pipelines.datasets import pixels, splits
from pipelines.datasets.dataset import LabelledData
from pipelines.evaluation import calibration
from pipelines.evaluation.eval_set import EvalSet, take_images
from pipelines.evaluation.evaluation import Evaluation, evaluate
from pipelines.evaluation.gallery import make_gallery
from pipelines.evaluation.per_image import write_images
from pipelines.evaluation.report import ReportImage, write_report
from pipelines.evaluation.score import EvalResult, score
from pipelines.images.pixels import pixels_of
from pipelines.images.prepare import Pixels
from pipelines.messages import JobFailed, redact
from pipelines.specs import ImageSpec, ModelSpec
from pipelines.status import Status
from pipelines.storage.uris import join
from pipelines.training import augment, runs
from pipelines.training.decoded import DecodedData
from pipelines.training.logits import load_network, predict_on_cluster
from pipelines.training.recipe import Recipe
from pipelines.training.resources import Resources

MEASURED = (splits.VALIDATION, splits.TEST)
AUGMENTED_IMAGES = 8
"""Training images that the report shows as augmentation leaves them."""

Results = Mapping[str, EvalResult]
"""Split -> scores of its images."""


def score_splits(
    corpus: DecodedData, model_spec: ModelSpec, files: Mapping[str, bytes], resources: Resources
) -> dict[str, EvalResult]:
    """Run the model in these files over the validation and test images that there are.

    Raises:
        JobFailed: an image of a streamed dataset could be read before training and cannot now.
    """
    found = {}
    targets = corpus.data.targets()
    for name in (name for name in MEASURED if len(corpus.rows[name])):
        rows = corpus.rows[name]
        eval_set = EvalSet(take_images(corpus.data, rows), targets[rows])
        predictions = predict_on_cluster(corpus.decoded[name], files, model_spec, resources)
        found[name] = score(eval_set, model_spec.class_ids, predictions)
        _refuse_lost(found[name])
    return found


def _refuse_lost(result: EvalResult) -> None:
    if lost := len(result.unreadable):
        raise JobFailed(
            f"{lost} of {lost + result.images.num_rows} images to measure could be read before training and "
            "cannot now; the same command measures again without training again. --cache.mode disk reads "
            "every image once"
        )


def calibrate(
    results: Results, model_spec: ModelSpec, data: LabelledData, *, target_precision: float
) -> tuple[dict[str, EvalResult], ModelSpec]:
    """Results and spec with the temperature and the thresholds that suit the validation images."""
    on_validation = results[splits.VALIDATION].scored
    temperature = calibration.fit_temperature(on_validation.logits_nc, on_validation.targets)
    calibrated = {
        name: replace(result, scored=result.scored.at_temperature(temperature))
        for name, result in results.items()
    }
    thresholds = calibration.fit_thresholds(
        calibrated[splits.VALIDATION].scored.probabilities_nc,
        on_validation.targets,
        data.taxonomy.rollup(model_spec.class_ids),
        target_precision=target_precision,
    )
    return calibrated, replace(model_spec, temperature=temperature, thresholds=thresholds)


def evaluate_splits(
    results: Results, model_spec: ModelSpec, data: LabelledData, *, model: str
) -> dict[str, Evaluation]:
    """Split -> everything measured on it."""
    about = {"model": model, "dataset": redact(data.settings.uri), "taxonomy": data.taxonomy.name}
    return {
        name: evaluate(
            result.scored, data.taxonomy, thresholds=model_spec.thresholds, about={**about, "split": name}
        )
        for name, result in results.items()
    }


def write_run_report(
    results: Results,
    found: Mapping[str, Evaluation],
    corpus: DecodedData,
    recipe: Recipe,
    *,
    files: Mapping[str, bytes],
    output: str,
) -> None:
    """Write the run's report: the last split measured, its images, how training went."""
    split, data = list(found)[-1], corpus.data
    result = results[split]
    shown = make_gallery(
        result.scored, data.taxonomy, result.images, corpus.spec, network=load_network(files)
    )
    extras = replace(
        shown,
        history=runs.history(output),
        class_counts=data.images_per_class({name: corpus.rows[name] for name in (splits.TRAIN, *found)}),
        balancing=describe_balancing(recipe),
        augmented=augmented_samples(corpus, recipe),
    )
    write_images(results.values(), join(output, runs.REPORT))
    write_report(found[split], join(output, runs.REPORT), extras)


def describe_balancing(recipe: Recipe) -> str:
    """What was done about rare classes, in a sentence."""
    balance, done = recipe.class_balance, []
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


def augmented_samples(corpus: DecodedData, recipe: Recipe) -> list[ReportImage]:
    """Random training images, each changed once as a training step would; unreadable ones are left out."""
    rows = corpus.rows[splits.TRAIN]
    chosen = np.random.default_rng(recipe.seed).choice(rows, min(AUGMENTED_IMAGES, len(rows)), replace=False)
    table = take_images(corpus.data, chosen)
    decoded = pixels.decode_batch(table, corpus.stored_spec)
    readable = pa.compute.equal(decoded["status"], Status.OK)
    pixels_nhwc = pixels_of(decoded["pixels"].filter(readable), corpus.stored_spec)
    changed = _change_pixels(pixels_nhwc, recipe, corpus.spec)
    uris = table["uri"].filter(readable).to_pylist()
    return [
        ReportImage(i, uri, pixels_hwc) for i, (uri, pixels_hwc) in enumerate(zip(uris, changed, strict=True))
    ]


def _change_pixels(pixels_nhwc: Pixels, recipe: Recipe, spec: ImageSpec) -> Pixels:
    """uint8 [n, height, width, 3] after one draw of the recipe's augmentation."""
    generator = torch.Generator().manual_seed(recipe.seed)
    draws = augment.draw(recipe.augment, len(pixels_nhwc), generator)
    images = augment.apply(torch.from_numpy(pixels_nhwc.copy()), draws, height=spec.height, width=spec.width)
    changed: Pixels = (images.permute(0, 2, 3, 1) * 255).round().to(torch.uint8).numpy()
    return changed
