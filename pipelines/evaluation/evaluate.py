"""Evaluate a model on a labelled dataset: score, measure, draw, write."""

import logging
from collections.abc import Mapping
from dataclasses import replace

import pyarrow as pa

from pipelines.datasets import splits
from pipelines.datasets.dataset import LabelledData
from pipelines.evaluation.eval_set import ALL, EvalSet, Leakage, build_eval_set, find_leakage
from pipelines.evaluation.evaluation import BIASED, Evaluation, evaluate
from pipelines.evaluation.gallery import make_gallery
from pipelines.evaluation.models import EvaluatedModel
from pipelines.evaluation.per_image import write_images
from pipelines.evaluation.report import write_report
from pipelines.evaluation.score import EvalResult, score
from pipelines.messages import redact

log = logging.getLogger(__name__)

LISTED = 20
"""Unreadable images named in the log."""


def evaluate_model(
    model: EvaluatedModel,
    data: LabelledData,
    split: str,
    *,
    recorded: Mapping[str, str] | None,
    output: str,
) -> Evaluation:
    """Measure the model on a split and write `report.html`, `evaluation.json` and `evaluation.parquet`.

    Args:
        split: name of a split, or `all`.
        recorded: image URI -> split in the run that made the model, where that is known.

    Raises:
        InputError: the split is empty, or its labels are not the model's.
        JobFailed: no image can be decoded.
    """
    data = data.with_splits(recorded or {})
    eval_set = build_eval_set(
        data, split, model.spec.class_ids, model.taxonomy, multi_label=model.spec.multi_label
    )
    leakage = find_leakage(data, split, recorded)
    _warn(eval_set, leakage)
    log.info("classifying %d images, split %s", eval_set.images.num_rows, split)
    result = score(eval_set, model.spec.class_ids, model.predict(eval_set.images))
    for image in result.unreadable[:LISTED]:
        log.warning("left out %s: %s %s", image["uri"], image["status"], image["error"])
    found = evaluate(
        result.scored,
        model.taxonomy,
        thresholds=model.spec.thresholds,
        about=_about(model, data, split, leakage, result) | _fitted_here(result.images, recorded or {}),
        slices=result.slices,
    )
    log.info("drawing the report")
    shown = make_gallery(
        result.scored, model.taxonomy, result.images, model.spec.image_spec, network=model.network
    )
    counts = {} if split == ALL else data.images_per_class(data.rows_by_split())
    if split == ALL:  # no split of this dataset was made for the model, but for what its run recorded
        result = replace(result, images=_with_recorded_splits(result.images, recorded or {}))
    write_images([result], output)
    write_report(found, output, replace(shown, history=model.history, class_counts=counts))
    return found


def _with_recorded_splits(images: pa.Table, recorded: Mapping[str, str]) -> pa.Table:
    known = pa.array(_recorded_splits(images, recorded), pa.string())
    return images.set_column(images.schema.get_field_index("split"), "split", known)


def _recorded_splits(images: pa.Table, recorded: Mapping[str, str]) -> list[str | None]:
    return [recorded.get(redact(uri)) for uri in images["uri"].to_pylist()]


def _fitted_here(images: pa.Table, recorded: Mapping[str, str]) -> dict[str, str]:
    """The head's line about thresholds, where the model's run fitted them on some of these images."""
    fitted = _recorded_splits(images, recorded).count(splits.VALIDATION)
    if not fitted:
        return {}
    some = "these images" if fitted == images.num_rows else f"{fitted} of these images"
    return {"thresholds": f"fitted on {some}: {BIASED}"}


def _warn(eval_set: EvalSet, leakage: Leakage) -> None:
    if leakage.suspected:
        log.warning(
            "the numbers may be too good: images of this split that were trained on: %s. Give --run RUN, "
            "which made the model, or use --split all with images that it has never seen",
            leakage.summary,
        )
    for label, images in eval_set.uncovered.items():
        log.warning("no class of the model covers %s (%d images)", label, images)


def _about(
    model: EvaluatedModel, data: LabelledData, split: str, leakage: Leakage, result: EvalResult
) -> dict[str, str]:
    return {
        "model": model.name,
        "dataset": data.settings.uri,
        "split": split,
        "seen in training": leakage.summary,
        "taxonomy": model.taxonomy.name,
        "unreadable images": str(len(result.unreadable)),
        "certificate": model.certificate,
    }
