"""How close a released model comes to the checkpoint, and whether that is within the limits.

Pure functions of arrays: the outputs of both sides over the same images become metrics, metrics and
limits become a verdict.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from export import independent
from export.reference import activation, top
from pipelines.bundle.limits import Limits
from pipelines.bundle.session import OnnxModel
from pipelines.evaluation import metrics
from pipelines.specs import ModelSpec

TOP_K = 5


@dataclass(frozen=True)
class Outputs:
    """What one side makes of the same images."""

    spec: ModelSpec
    pixels_nhwc: np.ndarray
    logits_nc: np.ndarray
    probabilities_nc: np.ndarray


@dataclass(frozen=True)
class Failure:
    """One limit that was not kept."""

    metric: str
    value: float
    limit: float

    def __str__(self) -> str:
        return f"{self.metric} is {self.value:.3g}; the limit is {self.limit:g}"


def compare(reference: Outputs, candidate: Outputs, limits: Limits, targets_nc: np.ndarray) -> dict[str, Any]:
    """Every number of the certificate that the outputs of both sides give."""
    by_id = _align(candidate.spec.class_ids, reference.spec.class_ids)
    logits_nc, probabilities_nc = candidate.logits_nc[:, by_id], candidate.probabilities_nc[:, by_id]
    logit_change = np.abs(logits_nc.astype(np.float64) - reference.logits_nc)
    probability_change = np.abs(probabilities_nc.astype(np.float64) - reference.probabilities_nc)
    k = min(TOP_K, len(reference.spec.class_ids))
    return {
        "labels_differ": int(sorted(candidate.spec.class_ids) != sorted(reference.spec.class_ids)),
        "pixels_differ": pixels_differ(reference, candidate),
        "max_logit": float(logit_change.max()),
        "mean_logit": float(logit_change.mean()),
        "relative_logit": relative(logits_nc, reference.logits_nc),
        "max_probability": float(probability_change.max()),
        "mean_probability": float(probability_change.mean()),
        "confidence_change": confidence_change(reference.probabilities_nc, probabilities_nc),
        "temperature_change": abs(candidate.spec.temperature / reference.spec.temperature - 1),
        "activation_error": activation_error(candidate),
        "top1": agreement(reference.logits_nc, logits_nc, 1, limits.tie_margin),
        "topk": {"k": k, **agreement(reference.logits_nc, logits_nc, k, limits.tie_margin)},
        "labelled": compare_labelled(
            reference.probabilities_nc, probabilities_nc, targets_nc, reference.spec.multi_label
        ),
        "histograms": {
            "logit": histogram(logit_change.max(axis=1)),
            "probability": histogram(probability_change.max(axis=1)),
        },
    }


def _align(found_ids: Sequence[str], class_ids: Sequence[str]) -> np.ndarray:
    """Columns of the candidate in the reference's order of ids: a label is compared with itself."""
    if sorted(found_ids) != sorted(class_ids):
        return np.arange(len(class_ids))
    column = {class_id: index for index, class_id in enumerate(found_ids)}
    return np.array([column[class_id] for class_id in class_ids])


def pixels_differ(reference: Outputs, candidate: Outputs) -> int:
    """Images whose pixels are not the same bytes on both sides."""
    if reference.pixels_nhwc.shape != candidate.pixels_nhwc.shape:
        return len(reference.pixels_nhwc)
    return int((reference.pixels_nhwc != candidate.pixels_nhwc).any(axis=(1, 2, 3)).sum())


def relative(values_nc: np.ndarray, reference_nc: np.ndarray) -> float:
    """L2 norm of the difference of centred logits over that of the reference."""
    centred, expected = (
        v.astype(np.float64) - v.mean(axis=1, keepdims=True, dtype=np.float64)
        for v in (values_nc, reference_nc)
    )
    return float(np.linalg.norm(centred - expected) / max(float(np.linalg.norm(expected)), 1e-30))


def confidence_change(reference_nc: np.ndarray, candidate_nc: np.ndarray) -> float:
    """How much the mean probability of each image's best label changes."""
    return abs(float(candidate_nc.max(axis=1).mean() - reference_nc.max(axis=1).mean()))


def activation_error(outputs: Outputs) -> float:
    """How far the probabilities are from what the side's own logits and temperature give in float64."""
    spec = outputs.spec
    expected_nc = activation(outputs.logits_nc, temperature=spec.temperature, multi_label=spec.multi_label)
    return float(np.abs(outputs.probabilities_nc - expected_nc).max())


def agreement(reference_nc: np.ndarray, candidate_nc: np.ndarray, k: int, margin: float) -> dict[str, Any]:
    """How many images have the same ordered top k; a swap within `margin` is a tie, counted apart.

    At each rank the reference score of the candidate's label is held against the score that the
    reference has at that rank.
    """
    expected, found = top(reference_nc, k), top(candidate_nc, k)
    gap_nk = np.abs(
        np.take_along_axis(reference_nc, expected, axis=1) - np.take_along_axis(reference_nc, found, axis=1)
    )
    same = (expected == found).all(axis=1)
    tie = ~same & (gap_nk <= margin).all(axis=1) & (margin > 0)
    return {
        "same": int(same.sum()),
        "ties": int(tie.sum()),
        "different": int((~same & ~tie).sum()),
        "share": float((same | tie).mean()),
    }


def compare_labelled(
    reference_nc: np.ndarray, candidate_nc: np.ndarray, targets_nc: np.ndarray, multi_label: bool
) -> dict[str, Any] | None:
    """Accuracy of the best label and calibration error of both sides, over the images that have labels.

    None without labels, and for NaN, which is no accuracy but another limit's failure.
    """
    known = (targets_nc >= 0).all(axis=1)
    if not known.any() or not np.isfinite(candidate_nc).all():
        return None
    truth_nc = targets_nc[known]
    targets = truth_nc if multi_label else truth_nc.argmax(axis=1)
    rows = np.arange(len(truth_nc))
    sides = {"reference": reference_nc[known], "candidate": candidate_nc[known]}
    right = {name: truth_nc[rows, side.argmax(axis=1)] == 1 for name, side in sides.items()}
    error = {name: metrics.calibration_error(side, targets) for name, side in sides.items()}
    return {
        "images": int(known.sum()),
        "accuracy": {name: float(hits.mean()) for name, hits in right.items()},
        "calibration_error": error,
        "lost": int((right["reference"] & ~right["candidate"]).sum()),
        "gained": int((~right["reference"] & right["candidate"]).sum()),
    }


def histogram(values: np.ndarray) -> dict[str, list[float]]:
    """Counts per decade of the differences: they span many; a zero counts as least, a NaN as most."""
    finite = np.nan_to_num(values, nan=1e3, posinf=1e3)
    exponents = np.clip(np.floor(np.log10(np.maximum(finite, 1e-12))), -9, 2).astype(int)
    decades = np.arange(-9, 3)
    return {
        "from": [float(f"1e{decade}") for decade in decades],
        "images": [int((exponents == decade).sum()) for decade in decades],
    }


def batch_invariance(model: OnnxModel, pixels_nhwc: np.ndarray) -> dict[str, Any]:
    """The largest |Δ probability| that batch size, padding or batch-mates cause, by case."""
    size = model.batch_size
    # Repeated where there are fewer, so that the largest batch is run full.
    pixels_nhwc = np.resize(pixels_nhwc, (size + 1, *pixels_nhwc.shape[1:]))
    together_nc = model.run(pixels_nhwc)[1]
    changes = {}
    for batch in sorted({1, 2, size - 1, size, size + 1} - {0}):
        pieces = [model.run(pixels_nhwc[i : i + batch])[1] for i in range(0, len(pixels_nhwc), batch)]
        changes[f"batches of {batch}"] = float(np.abs(np.concatenate(pieces) - together_nc).max())
    order = np.random.default_rng(0).permutation(len(pixels_nhwc))
    changes["shuffled"] = float(np.abs(model.run(pixels_nhwc[order])[1] - together_nc[order]).max())
    changes["run twice"] = float(np.abs(model.run(pixels_nhwc)[1] - together_nc).max())
    return {"images": len(pixels_nhwc), "max_change": max(changes.values()), "cases": changes}


def failures(measured: dict[str, Any], batches: dict[str, Any], limits: Limits) -> list[Failure]:
    """Every limit that the measurement does not keep; none means that the model may run."""
    upper = {
        "labels_differ": 0,
        "pixels_differ": 0,
        "max_logit": limits.max_logit,
        "relative_logit": limits.max_relative_logit,
        "max_probability": limits.max_probability,
        "confidence_change": limits.max_confidence_change,
        "temperature_change": limits.max_temperature_change,
        "activation_error": limits.max_activation_error,
    }
    found = [Failure(n, measured[n], u) for n, u in upper.items() if u is not None and not measured[n] <= u]
    for name, least in (("top1", limits.min_top1_agreement), ("topk", limits.min_topk_agreement)):
        if least is not None and measured[name]["share"] < least:
            found.append(Failure(f"{name} agreement", measured[name]["share"], least))
    if not batches["max_change"] <= limits.max_batch_change:
        found.append(Failure("batch change", batches["max_change"], limits.max_batch_change))
    return [*found, *_labelled_failures(measured["labelled"], limits)]


def published_failures(measured: dict[str, Any], limits: Limits) -> list[Failure]:
    """What of the published columns, and of the facts that decide them, is not as the checkpoint has it."""
    agreements = ("tier1", "cat")
    found = [Failure(name, n, 0) for name, n in measured.items() if name not in agreements and n]
    for name in agreements:
        share = (measured[name] or {"share": 0.0})["share"]
        if share < limits.min_published_agreement:
            found.append(Failure(f"{name} agreement", share, limits.min_published_agreement))
    return found


def decode_failures(measured: dict[str, Any]) -> list[Failure]:
    """Whether the pixels that both sides share are those of a second way of decoding."""
    limits = {"own": independent.MAX_OF_OWN, "edge_cases": independent.MAX_OF_EDGE_CASES}
    return [
        Failure(f"independent decode of {name}", measured[name]["max"], limit)
        for name, limit in limits.items()
        if not measured[name]["max"] <= limit
    ]


def _labelled_failures(measured: dict[str, Any] | None, limits: Limits) -> list[Failure]:
    if measured is None:
        return []
    found = []
    loss = (measured["lost"] - measured["gained"]) / measured["images"]
    granted = max(limits.max_accuracy_loss, 1 / measured["images"])
    if loss > granted:
        found.append(Failure("accuracy loss", loss, granted))
    error = measured["calibration_error"]
    change = abs(error["candidate"] - error["reference"])
    turned = max(1, measured["lost"] + measured["gained"])
    granted = max(limits.max_calibration_change, turned / measured["images"])
    if change > granted:
        found.append(Failure("calibration change", change, granted))
    return found
