"""One measurement: the same encoded images through the checkpoint and through a model as it would be run.

`gather` takes the reference's side once; `measure` takes a candidate's and returns the document that
becomes its certificate, with the verdict in it. Where it goes, `release.py` and `certification.py` decide.
"""

import base64
import hashlib
import io
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np
from PIL import Image

from export import images, parity
from export.images import Sample
from export.parity import LIMITS, Scores
from export.reference import Network, activation, named
from pipelines.bundle.session import OnnxModel
from pipelines.specs import ImageSpec, Precision

WORST_IMAGES = 8
THUMBNAIL_PX = 160
SPEED_S = 0.4
"""Least time that a batch size's speed is measured over, seconds."""

Decode = Callable[[Sequence[bytes], ImageSpec], list[np.ndarray | None]]


class NothingToCompare(ValueError):
    """No image of the sample could be decoded."""


@dataclass(frozen=True)
class Labels:
    """What both sides must agree on about the outputs."""

    class_ids: tuple[str, ...]
    multi_label: bool
    temperature: float


@dataclass(frozen=True)
class Evidence:
    """The images of a measurement and what the reference makes of them."""

    sample: tuple[Sample, ...]
    undecodable: tuple[str, ...]
    scores: Scores
    targets_nc: np.ndarray
    description: str
    """What the reference is, in words."""


@dataclass(frozen=True)
class Candidate:
    """One way of running a bundle: everything between encoded bytes and the top k."""

    model: OnnxModel
    labels: Labels
    spec: ImageSpec
    decode: Decode = images.decode
    calibrated_on: frozenset[str] = frozenset()
    """Fingerprints of the images that its int8 ranges come from."""


def gather(
    sample: Sequence[Sample],
    targets_nc: np.ndarray,
    *,
    network: Network,
    labels: Labels,
    spec: ImageSpec,
    description: str,
) -> Evidence:
    """The reference's pixels, logits and probabilities; images that do not decode are set aside.

    Raises:
        NothingToCompare: none decodes.
    """
    decoded = images.decode([one.payload for one in sample], spec)
    kept = [index for index, pixels in enumerate(decoded) if pixels is not None]
    if not kept:
        raise NothingToCompare(f"none of the {len(sample)} images could be decoded")
    pixels_nhwc = np.stack([pixels for pixels in decoded if pixels is not None])
    logits_nc = network(pixels_nhwc, spec)
    probabilities_nc = activation(logits_nc, temperature=labels.temperature, multi_label=labels.multi_label)
    return Evidence(
        sample=tuple(sample[index] for index in kept),
        undecodable=tuple(one.image_id for one, p in zip(sample, decoded, strict=True) if p is None),
        scores=Scores(
            labels.class_ids, pixels_nhwc, logits_nc, probabilities_nc, labels.temperature, labels.multi_label
        ),
        targets_nc=targets_nc[kept],
        description=description,
    )


def measure(evidence: Evidence, candidate: Candidate, precision: Precision) -> dict[str, Any]:
    """The certificate's document: numbers, limits, verdict, worst images."""
    started = time.monotonic()
    limits = LIMITS[precision]
    found = score(evidence.sample, candidate)
    metrics = parity.compare(evidence.scores, found, limits, evidence.targets_nc)
    batches = parity.batch_invariance(candidate.model, found.pixels_nhwc)
    failures = parity.failures(metrics, batches, limits)
    document = {
        "passed": not failures,
        "failures": [asdict(failure) for failure in failures],
        "reference": evidence.description,
        "images": images_summary(evidence),
        "calibration": calibration_summary(evidence.sample, candidate.calibrated_on),
        "limits": parity.limits_json(limits),
        "metrics": metrics,
        "batches": batches,
        "speed": speed(candidate.model, found.pixels_nhwc),
        "worst": worst(evidence, found),
        "temperature": candidate.labels.temperature,
        "environment": candidate.model.environment(),
        "seconds": round(time.monotonic() - started, 1),
        "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    finite_document: dict[str, Any] = finite(document)
    return finite_document


def finite(value: Any) -> Any:
    """The same document with NaN and infinities as text: JSON has no word for them."""
    if isinstance(value, dict):
        return {name: finite(entry) for name, entry in value.items()}
    if isinstance(value, list):
        return [finite(entry) for entry in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def score(sample: Sequence[Sample], candidate: Candidate) -> Scores:
    """The candidate's side; an image that it alone cannot decode is black, and so a difference."""
    spec = candidate.spec
    black = np.zeros((spec.height, spec.width, 3), np.uint8)
    decoded = candidate.decode([one.payload for one in sample], spec)
    pixels_nhwc = np.stack([black if pixels is None else pixels for pixels in decoded])
    logits_nc, probabilities_nc = candidate.model.run(pixels_nhwc)
    labels = candidate.labels
    return Scores(
        labels.class_ids, pixels_nhwc, logits_nc, probabilities_nc, labels.temperature, labels.multi_label
    )


def images_summary(evidence: Evidence) -> dict[str, Any]:
    """How many images of which kind, and a hash over all of their bytes."""
    digest = hashlib.sha256()
    for one in evidence.sample:
        digest.update(hashlib.sha256(one.payload).digest())
    awkward = sum(one.awkward for one in evidence.sample)
    return {
        "compared": len(evidence.sample),
        "own": len(evidence.sample) - awkward,
        "awkward": awkward,
        "undecodable": list(evidence.undecodable),
        "sha256": digest.hexdigest(),
    }


def calibration_summary(sample: Sequence[Sample], calibrated_on: frozenset[str]) -> dict[str, int] | None:
    """How many images int8 was calibrated on, and how many of those compared are among them."""
    if not calibrated_on:
        return None
    judged = sum(one.fingerprint in calibrated_on for one in sample)
    return {"images": len(calibrated_on), "compared_too": judged}


def speed(model: OnnxModel, pixels_nhwc: np.ndarray) -> dict[str, float]:
    """Images per second of the session alone, by batch size."""
    found = {}
    for size in sorted({1, min(8, model.batch_size), model.batch_size}):
        batch_nhwc = np.resize(pixels_nhwc, (size, *pixels_nhwc.shape[1:]))
        model.run(batch_nhwc)
        started, runs = time.monotonic(), 0
        while time.monotonic() - started < SPEED_S:
            model.run(batch_nhwc)
            runs += 1
        found[str(size)] = round(runs * size / (time.monotonic() - started), 1)
    return found


def worst(evidence: Evidence, found: Scores) -> list[dict[str, Any]]:
    """The images whose logits differ most, with both sides' best labels."""
    change = np.abs(found.logits_nc - evidence.scores.logits_nc).max(axis=1)
    return [
        {
            "image_id": evidence.sample[row].image_id,
            "thumbnail": thumbnail(evidence.scores.pixels_nhwc[row]),
            "max_logit": float(change[row]),
            "reference": named(
                evidence.scores.class_ids, evidence.scores.probabilities_nc[row], parity.TOP_K
            ),
            "candidate": named(found.class_ids, found.probabilities_nc[row], parity.TOP_K),
        }
        for row in np.argsort(-change, kind="stable")[:WORST_IMAGES]
    ]


def thumbnail(pixels_hwc: np.ndarray) -> str:
    """The pixels that the model saw, as a data URI of a few kilobytes."""
    image = Image.fromarray(pixels_hwc)
    image.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX))
    sink = io.BytesIO()
    image.save(sink, "JPEG", quality=80)
    return f"data:image/jpeg;base64,{base64.b64encode(sink.getvalue()).decode()}"
