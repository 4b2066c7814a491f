"""How much a released model may differ from its checkpoint: every limit, once, with its reason."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from pipelines.specs import Precision


@dataclass(frozen=True)
class Limits:
    """The most that a precision may differ; None is measured but not limited."""

    max_logit: float | None
    """Largest |Δ logit| over all images and classes."""
    max_relative_logit: float
    """L2 norm of the centred logits' difference over that of the reference, whole sample. Softmax ignores a
    constant, so both are centred; and unlike the absolute limit it means the same for small logits."""
    max_probability: float
    """Largest |Δ probability|."""
    max_confidence_change: float
    """Largest change of the mean probability of the best label: a wrong temperature shows without labels."""
    max_temperature_change: float
    """Largest |temperature / the checkpoint's - 1|."""
    max_activation_error: float
    """Largest |probability - activation(own logits / temperature)|: the graph's tail against float64."""
    min_top1_agreement: float
    """Share of images with the reference's best label, ties apart."""
    min_topk_agreement: float | None
    """Share of images with the reference's ordered top 5, ties apart."""
    tie_margin: float
    """Two labels whose reference logits are closer than this are a tie: fixed beforehand, twice the
    logit noise that the precision is granted."""
    min_published_agreement: float
    """Share of images with the reference's Tier 1 category, and with its set `cat`, ties apart."""
    published_margin: float
    """A category whose reference probability is so close to its threshold (Tier 1: to the best) is a tie."""
    max_accuracy_loss: float
    """Accuracy lost, as a share; a single image is always granted, being the least that can be lost."""
    max_calibration_change: float
    """Largest change of the expected calibration error. What answers that turned right or wrong can cause,
    each an image's share, is granted: top-1 agreement judges them, and a better model would be refused."""
    max_batch_change: float
    """Largest |Δ probability| of one image between batch sizes, paddings and batch-mates."""


LIMITS: dict[Precision, Limits] = {
    # float32 in another order of summation: 1e-6 is measured (onnx against torch), torch float32 against
    # float64 gives as much. 1e-5 leaves room for other CPUs and sees 0.1 % in one layer's weights.
    "fp32": Limits(
        max_logit=1e-3,
        max_relative_logit=1e-5,
        max_probability=5e-4,
        max_confidence_change=1e-4,
        max_temperature_change=1e-6,
        max_activation_error=1e-6,
        min_top1_agreement=1.0,
        min_topk_agreement=1.0,
        tie_margin=2e-3,
        min_published_agreement=1.0,
        published_margin=1e-3,
        max_accuracy_loss=0.0,
        max_calibration_change=1e-3,
        max_batch_change=1e-5,
    ),
    # 11 bits of mantissa: 0.7e-3 to 2e-3 relative is measured on ViT-tiny to base; bfloat16 would be 1.2e-2.
    "fp16": Limits(
        max_logit=None,
        max_relative_logit=5e-3,
        max_probability=1e-2,
        max_confidence_change=2e-3,
        max_temperature_change=1e-6,
        max_activation_error=1e-6,
        min_top1_agreement=0.999,
        min_topk_agreement=0.99,
        tie_margin=0.04,
        min_published_agreement=0.999,
        published_margin=0.02,
        max_accuracy_loss=0.002,
        max_calibration_change=5e-3,
        max_batch_change=1e-2,
    ),
    # 8 bits: 3e-2 relative is a well-behaved ViT. What counts is labels, so no tie of logits is excused.
    # Probabilities may turn over near a tie (0.5) but not on average. Static quantisation does not look at
    # batch-mates; what it leaves in float32 has the noise of one addition, 1.2e-7 of a probability (BEiT,
    # DINOv2), where a dynamically quantised model changes by 1e-2.
    "int8": Limits(
        max_logit=None,
        max_relative_logit=0.25,
        max_probability=0.5,
        max_confidence_change=0.05,
        max_temperature_change=0.2,
        max_activation_error=1e-6,
        min_top1_agreement=0.98,
        min_topk_agreement=None,
        tie_margin=0.0,
        min_published_agreement=0.95,
        published_margin=0.1,
        max_accuracy_loss=0.005,
        max_calibration_change=0.01,
        max_batch_change=1e-6,
    ),
}


def looser_than_today(stated: Mapping[str, Any], precision: Precision) -> list[str]:
    """Names of today's limits that a certificate's limits lack, or grant more than."""
    return [
        name
        for name, limit in asdict(LIMITS[precision]).items()
        if limit is not None and not _as_strict(name, stated.get(name), limit)
    ]


def _as_strict(name: str, stated: Any, limit: float) -> bool:
    if not isinstance(stated, int | float):
        return False
    return stated >= limit if name.startswith("min_") else stated <= limit
