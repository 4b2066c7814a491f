"""Turn an evaluation and its pictures into `evaluation.json` and one self-contained page.

The page holds its plots and pictures as `data:` URIs and needs no network.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import matplotlib as mpl
import numpy as np
from PIL import Image, ImageOps

from pipelines.evaluation import plots
from pipelines.evaluation.evaluation import Evaluation, Scored
from pipelines.evaluation.metrics import Array
from pipelines.evaluation.page import open_environment
from pipelines.images.pixels import jpeg_uri
from pipelines.storage import storage
from pipelines.taxonomy.taxonomy import SEPARATOR, Taxonomy

EVALUATION_FILE, REPORT_FILE = "evaluation.json", "report.html"

CONFUSIONS_LISTED = 25
PICTURE_SIDE = 192
"""Pixels of a picture on the page: 24 + 12 + 8 of them stay below 1 MB."""

TILES = (
    ("accuracy", "accuracy", "share of images whose best label is right"),
    ("exact_match", "exact match", "share of images with exactly the true labels"),
    ("map", "mAP", "mean average precision over classes"),
    ("accuracy@3", "accuracy@3", "share of images whose true label is among the best three"),
    ("f1_micro", "F1 micro", "F1 over all single decisions"),
    ("balanced_accuracy", "balanced accuracy", "mean recall over classes: each class counts the same"),
    ("f1_macro", "F1 macro", "mean F1 over classes"),
    ("ece", "calibration error", "mean gap between confidence and outcome; lower is better"),
    ("ece_classwise", "class-wise error", "mean over classes of the same for each class's own probability"),
)
"""The numbers at the top of the page: name, caption, what it means."""


@dataclass(frozen=True)
class ReportImage:
    """One image of a report."""

    row: int
    """Which row of the scores it is."""
    uri: str
    pixels_hwc: Array
    """uint8 RGB, as the model saw it."""
    attention: Array | None = None
    """Roll-out map `[rows, columns]` in [0, 1]."""


@dataclass(frozen=True)
class CaptionedImage:
    """One image with what is true of it and what the model said."""

    image: ReportImage
    truth: tuple[str, ...]
    """Paths of its true labels."""
    answers: tuple[tuple[str, float], ...]
    """Paths and probabilities of the best labels, best first."""
    correct: bool


@dataclass(frozen=True)
class ReportExtras:
    """What a report shows in addition to the numbers; whatever is empty is left out."""

    sample: Sequence[CaptionedImage] = ()
    """Images of every class."""
    worst: Sequence[CaptionedImage] = ()
    """The mistakes of the highest loss."""
    doubtful: Sequence[CaptionedImage] = ()
    """Images whose labels are probably wrong."""
    attention: Sequence[CaptionedImage] = ()
    """Images with their roll-out maps."""
    history: Sequence[Mapping[str, Any]] = ()
    """Lines of `metrics.jsonl`."""
    class_counts: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    """Split -> class id -> images, the training split first."""
    balancing: str = ""
    """What training did about rare classes, in a sentence."""
    augmented: Sequence[ReportImage] = ()
    """Augmented training images."""


def write_report(evaluation: Evaluation, output_uri: str, material: ReportExtras | None = None) -> None:
    """Write `report.html`, then `evaluation.json`, into a folder of any storage."""
    folder = storage.open_storage(output_uri)
    folder.put(REPORT_FILE, render_page(evaluation.document(), material or ReportExtras()).encode())
    folder.put(EVALUATION_FILE, evaluation.to_json().encode())


def caption_images(scored: Scored, taxonomy: Taxonomy, images: Sequence[ReportImage]) -> list[CaptionedImage]:
    """What is true of each image and what the model said of it."""
    return [
        CaptionedImage(
            image=image,
            truth=tuple(
                taxonomy.path(scored.class_ids[c]) for c in np.flatnonzero(scored.targets_nc[image.row])
            ),
            answers=_answers(scored, taxonomy, image.row),
            correct=not scored.wrong[image.row],
        )
        for image in images
    ]


def _answers(scored: Scored, taxonomy: Taxonomy, row: int) -> tuple[tuple[str, float], ...]:
    scores = scored.probabilities_nc[row]
    best = np.argsort(-scores, kind="stable")[:3]
    return tuple((taxonomy.path(scored.class_ids[c]), float(scores[c])) for c in best)


def render_page(document: Mapping[str, Any], material: ReportExtras) -> str:
    """The report as one HTML text, from the content of `evaluation.json`."""
    environment = open_environment("pipelines.evaluation")
    environment.filters["interval"] = interval
    return environment.get_template("evaluation.html").render(
        e=document,
        m=material,
        tiles=[tile for tile in TILES if tile[0] in document["overall"]],
        has_tree=any(one["tier1"] != one["id"] for one in document["classes"]),
        classes=sorted(document["classes"], key=lambda one: one["path"]),
        confusions=list_confusions(document),
        plots=draw_plots(document, material),
        thumbnail=thumbnail,
        overlay=overlay,
    )


def draw_plots(document: Mapping[str, Any], material: ReportExtras) -> dict[str, str | None]:
    """Every plot of the page by name; None where there is nothing to draw."""
    classes, cells, curves = document["classes"], document["confusions"], document["curves"]
    roc, precision_recall = plots.plot_curves(curves, classes) if curves else (None, None)
    calibration = document["calibration"]
    return {
        "confusion": plots.plot_confusion(classes, cells) if cells else None,
        "tier1_confusion": plots.plot_tier1_confusion(classes, cells) if cells else None,
        "per_class": plots.plot_classes(classes),
        "roc": roc,
        "precision_recall": precision_recall,
        "reliability": plots.plot_reliability(calibration),
        "class_reliability": plots.plot_class_reliability(calibration, classes)
        if calibration["classes"]
        else None,
        "coverage": plots.plot_coverage(document["coverage"]),
        "learning": plots.plot_learning(material.history),
        "balance": plots.plot_balance(material.class_counts, classes) if material.class_counts else None,
    }


def list_confusions(document: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The most frequent mistakes: which class was taken for which, and how near the two are in the tree."""
    classes = document["classes"]
    mistakes = sorted(
        (cell for cell in document["confusions"] if cell[0] != cell[1]), key=lambda cell: -cell[2]
    )
    return [
        {
            "truth": classes[true]["path"],
            "predicted": classes[predicted]["path"],
            "images": images,
            "share": images / classes[true]["images"],
            "relation": name_relation(classes[true], classes[predicted]),
        }
        for true, predicted, images in mistakes[:CONFUSIONS_LISTED]
    ]


def name_relation(one: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    """How two classes are related: siblings, one below the other, the same Tier 1 category, or not at all."""
    first, second = one["path"].split(SEPARATOR), other["path"].split(SEPARATOR)
    shared = min(len(first), len(second))
    if first[:shared] == second[:shared]:
        return "parent and child"
    if len(first) > 1 and first[:-1] == second[:-1]:
        return "siblings"
    return "same Tier 1" if one["tier1"] == other["tier1"] else "unrelated"


def thumbnail(image: ReportImage) -> str:
    """The image as a JPEG `data:` URI, `PICTURE_SIDE` pixels on its longer side."""
    return jpeg_uri(np.asarray(_small(image.pixels_hwc)))


def overlay(image: ReportImage) -> str:
    """The image with its attention laid over it, as a JPEG `data:` URI."""
    small = _small(image.pixels_hwc)
    attention = Image.fromarray(np.asarray(image.attention, np.float32))
    heat = np.clip(np.asarray(attention.resize(small.size, Image.Resampling.BICUBIC)), 0, 1)
    colour_hwc = mpl.colormaps["inferno"](heat)[..., :3] * 255
    share = 0.25 + 0.5 * heat[..., None]
    mixed_hwc = np.asarray(small) * (1 - share) + colour_hwc * share
    return jpeg_uri(mixed_hwc.astype(np.uint8))


def _small(pixels_hwc: Array) -> Image.Image:
    image = Image.fromarray(np.asarray(pixels_hwc, np.uint8))
    return ImageOps.contain(image, (PICTURE_SIDE, PICTURE_SIDE), Image.Resampling.BICUBIC)


def interval(bounds: Sequence[float | None] | None) -> str:
    """[0.75, 0.87] -> "75–87 %"; empty where it is unknown."""
    if bounds is None or bounds[0] is None or bounds[1] is None:
        return ""
    return f"{100 * bounds[0]:.0f}–{100 * bounds[1]:.0f} %"
