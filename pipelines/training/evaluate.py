"""The best model of a run: scored on validation and test, calibrated on validation, reported.

Trained weights may have been run in a lower precision; what is measured and calibrated here is float32.
Nothing is fitted on the test split. A dataset without one gets a report on validation, which says so.
"""

import logging
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from pipelines.datasets import pixels, splits
from pipelines.datasets.settings import ImageCache
from pipelines.evaluation import calibration
from pipelines.evaluation.calibration import ThresholdRule
from pipelines.evaluation.eval_set import EvalSet
from pipelines.evaluation.evaluation import BIASED, Evaluation, Scored, evaluate
from pipelines.evaluation.gallery import make_gallery
from pipelines.evaluation.metrics import indicator
from pipelines.evaluation.models import TorchModel
from pipelines.evaluation.per_image import write_images
from pipelines.evaluation.report import ReportImage, write_report
from pipelines.evaluation.score import EvalResult, predict_batch, score
from pipelines.images.pixels import pixels_of
from pipelines.images.prepare import Pixels
from pipelines.messages import JobFailed
from pipelines.specs import ImageSpec, ModelSpec
from pipelines.status import Status
from pipelines.storage.uris import join
from pipelines.taxonomy.taxonomy import Taxonomy
from pipelines.training import augment, runs
from pipelines.training.decoded import DecodedData
from pipelines.training.recipe import Recipe
from pipelines.training.resources import Resources

log = logging.getLogger(__name__)

MEASURED = (splits.VALIDATION, splits.TEST)
BATCH = 256
"""Images that a model takes at once here."""
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
    names = [name for name in MEASURED if len(corpus.rows[name])]
    first, *others = (corpus.decoded[name] for name in names)
    # in one pass: each has workers of its own, which take ten seconds to import torch and open the model
    predictions = list(predict_on_cluster(first.union(*others), files, model_spec, resources))
    found, targets = {}, corpus.data.targets()
    for name in names:
        rows = corpus.rows[name]
        eval_set = EvalSet(corpus.data.take(rows), targets[rows])
        found[name] = score(eval_set, model_spec.class_ids, predictions)
        _refuse_lost(found[name])
    return found


class Predictor:
    """One model on one device; batches of decoded images in, their predictions out."""

    def __init__(self, files: Mapping[str, bytes], model_spec: ModelSpec, device: str) -> None:
        self.spec = model_spec.image_spec
        self.predict = TorchModel(load_network(files).to(device), model_spec)

    def __call__(self, batch: pa.Table) -> pa.Table:
        return predict_batch(batch, self.predict, self.spec)


def predict_on_cluster(
    dataset: Any, files: Mapping[str, bytes], model_spec: ModelSpec, resources: Resources
) -> Iterator[pa.Table]:
    """Predictions of every row of a decoded dataset, at the temperature of `model_spec`."""
    import ray

    predicted = dataset.map_batches(
        Predictor,
        fn_constructor_args=(dict(files), model_spec, "cuda" if resources.use_gpu else "cpu"),
        batch_size=BATCH,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(min_size=1, max_size=resources.num_workers),
        num_gpus=1 if resources.use_gpu else None,
    )
    yield from ray.get(predicted.to_arrow_refs())


def predict_images(
    images: pa.Table, files: Mapping[str, bytes], model_spec: ModelSpec, resources: Resources
) -> Iterator[pa.Table]:
    """Predictions of these rows of a labelled dataset, fetched and decoded on the cluster too."""
    decoded = pixels.decode_dataset(images, model_spec.image_spec, ImageCache())
    return predict_on_cluster(decoded, files, model_spec, resources)


def load_network(files: Mapping[str, bytes]) -> Any:
    """The model in these files, in float32 and evaluation mode."""
    from transformers import AutoModelForImageClassification
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        for name, payload in files.items():
            Path(folder, name).write_bytes(payload)
        model = AutoModelForImageClassification.from_pretrained(
            folder, dtype=torch.float32, use_safetensors=True
        )
    return model.eval()


def _refuse_lost(result: EvalResult) -> None:
    if lost := len(result.unreadable):
        raise JobFailed(
            f"{lost} of {lost + result.images.num_rows} images to measure could be read before training and "
            "cannot now; the same command measures again without training again. --cache.mode disk reads "
            "every image once"
        )


@dataclass(frozen=True)
class Calibrated:
    """Scores at their fitted temperature, and what was fitted."""

    scored: dict[str, Scored]
    """Split -> scores."""
    spec: ModelSpec
    """With temperature and thresholds."""
    images_needed: dict[str, int | None]
    """Categories that are never published, and how many more validation images each needs, if that helps."""


def calibrate(
    scored: Mapping[str, Scored], model_spec: ModelSpec, taxonomy: Taxonomy, rule: ThresholdRule
) -> Calibrated:
    """The temperature and the thresholds that suit the validation images."""
    on_validation = scored[splits.VALIDATION]
    temperature = calibration.fit_temperature(on_validation.logits_nc, on_validation.targets)
    calibrated = {name: one.at_temperature(temperature) for name, one in scored.items()}
    rollup = taxonomy.rollup(model_spec.class_ids)
    fitted_on = calibrated[splits.VALIDATION].probabilities_nc, on_validation.targets
    return Calibrated(
        scored=calibrated,
        spec=replace(
            model_spec,
            temperature=temperature,
            thresholds=calibration.fit_thresholds(*fitted_on, rollup, rule),
        ),
        images_needed=calibration.images_needed(*fitted_on, rollup, rule),
    )


def rule_of(recipe: Recipe) -> ThresholdRule:
    """What the recipe asks of thresholds."""
    return ThresholdRule(
        recipe.threshold_goal, recipe.target_precision, recipe.target_recall, recipe.threshold_confidence
    )


SHOWN = 5
"""Categories named in one line of the log; the report has all."""


def log_unpublished(found: Calibrated, taxonomy: Taxonomy, rule: ThresholdRule) -> None:
    """Name categories that no image will be given in `cat`, by what they need for it."""
    total = len(found.spec.thresholds)
    if rule.goal == "precision":
        reached = total - len(found.images_needed)
        log.info("%d of %d categories reach a precision of %g", reached, total, rule.target_precision)
    seen = _seen_in_validation(found, taxonomy)
    paths = {taxonomy.path(one): more for one, more in found.images_needed.items() if one in seen}
    wanted = {
        "validation images, of which there are none": [
            taxonomy.path(one) for one in found.images_needed if one not in seen
        ],
        "more validation images": [f"{path} (some {more} more)" for path, more in paths.items() if more],
        "a better model": [path for path, more in paths.items() if more is None],
    }
    for what, categories in wanted.items():
        if categories:
            more = f" and {len(categories) - SHOWN} others" if len(categories) > SHOWN else ""
            log.warning("never published without %s: %s%s", what, ", ".join(categories[:SHOWN]), more)


def _seen_in_validation(found: Calibrated, taxonomy: Taxonomy) -> set[str]:
    """Ids of the categories that some validation image has, itself or by a class below."""
    rollup = taxonomy.rollup(found.spec.class_ids)
    targets_nc = indicator(found.scored[splits.VALIDATION].targets, len(found.spec.class_ids))
    present_1c = targets_nc.max(axis=0, keepdims=True).astype(np.float32)
    seen = np.ravel(rollup.apply(present_1c, multi_label=True)) > 0
    return {one for one, has_images in zip(rollup.ids, seen, strict=True) if has_images}


def evaluate_splits(
    scored: Mapping[str, Scored],
    model_spec: ModelSpec,
    taxonomy: Taxonomy,
    *,
    about: Mapping[str, str],
    slices: Mapping[str, Mapping[str, Sequence[str | None]]] | None = None,
) -> dict[str, Evaluation]:
    """Split -> everything measured on it, marked where thresholds were fitted on the same images."""
    marks = {splits.VALIDATION: {"thresholds": f"fitted on these images: {BIASED}"}}
    return {
        name: evaluate(
            one,
            taxonomy,
            thresholds=model_spec.thresholds,
            about={**about, "split": name, **marks.get(name, {})},
            slices=(slices or {}).get(name),
        )
        for name, one in scored.items()
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
    table = corpus.data.take(chosen)
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
