"""The certificate of one file of a bundle on one provider: how close it comes to the checkpoint.

The same encoded images go through the reference (`run_reference`, once) and through a candidate as it would
be run (`measure`); the document with numbers, limits and verdict is written into the bundle by `add`.
"""

import base64
import hashlib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from typing import Any

import numpy as np
from PIL import Image

from export import images, independent, parity, published, report
from export.images import Sample
from export.parity import Outputs
from export.published import Contract
from export.reference import Network, activation, list_top
from pipelines.bundle import bundle, session
from pipelines.bundle.bundle import Bundle
from pipelines.bundle.limits import LIMITS
from pipelines.bundle.manifest import CERTIFICATES
from pipelines.bundle.session import OnnxModel
from pipelines.bundle.settings import RuntimeSpec
from pipelines.datasets.splits import TRAIN
from pipelines.images.pixels import jpeg_uri
from pipelines.messages import InputError
from pipelines.specs import ImageSpec, ModelSpec, Precision, Provider
from pipelines.storage import storage

WORST_IMAGES = 8
THUMBNAIL_PX = 160
SPEED_S = 0.4
"""Least time that a batch size's speed is measured over, seconds."""

EXAMPLES = (
    "tiny-3x2.jpg", "large-1280x960.jpg", "rotated-6.jpg", "cmyk.jpg", "grey-16-bit.png", "transparent.png",
)  # fmt: skip
"""Edge cases that a certificate carries with their answers, to check another implementation against."""

Certificates = dict[tuple[Provider, Precision], dict[str, Any]]
Decode = Callable[[Sequence[bytes], ImageSpec], list[np.ndarray | None]]


@dataclass(frozen=True)
class Reference:
    """The images of a measurement and what the reference makes of them."""

    sample: tuple[Sample, ...]
    undecodable: tuple[str, ...]
    outputs: Outputs
    targets_nc: np.ndarray
    contract: Contract
    """What it publishes."""
    description: str
    """What the reference is, in words."""

    @property
    def own(self) -> int:
        """How many of the images are the user's."""
        return sum(not one.edge_case for one in self.sample)


@dataclass(frozen=True)
class Candidate:
    """One way of running a bundle: everything between encoded bytes and the top k."""

    model: OnnxModel
    contract: Contract
    """What it publishes; the temperature in its spec is that of the precision."""
    decode: Decode = images.decode
    calibrated_on: frozenset[str] = frozenset()
    """Fingerprints of the images that its int8 ranges come from."""

    @property
    def spec(self) -> ModelSpec:
        return self.contract.spec


def run_reference(
    sample: Sequence[Sample],
    targets_nc: np.ndarray,
    *,
    network: Network,
    contract: Contract,
    description: str,
) -> Reference:
    """The reference's pixels, logits and probabilities; images that do not decode are left out.

    Raises:
        InputError: none decodes.
    """
    spec = contract.spec
    decoded = images.decode([one.payload for one in sample], spec.image_spec)
    kept = [index for index, pixels in enumerate(decoded) if pixels is not None]
    if not kept:
        raise InputError(f"none of the {len(sample)} images could be decoded")
    pixels_nhwc = np.stack([pixels for pixels in decoded if pixels is not None])
    logits_nc = network(pixels_nhwc, spec.image_spec)
    probabilities_nc = activation(logits_nc, temperature=spec.temperature, multi_label=spec.multi_label)
    return Reference(
        sample=tuple(sample[index] for index in kept),
        undecodable=tuple(one.image_id for one, p in zip(sample, decoded, strict=True) if p is None),
        outputs=Outputs(spec, pixels_nhwc, logits_nc, probabilities_nc),
        targets_nc=targets_nc[kept],
        contract=contract,
        description=description,
    )


def load_candidate(opened: Bundle, runtime: RuntimeSpec) -> Candidate:
    """The bundle as a reader of it would run it."""
    manifest, precision = opened.manifest, runtime.precision
    contract = published.contract_in(opened)
    notes = manifest.source.get("precisions", {}).get(precision, {})
    return Candidate(
        session.load(opened, runtime),
        replace(contract, spec=replace(contract.spec, temperature=manifest.temperatures[precision])),
        calibrated_on=frozenset(notes.get("calibrated_on", ())),
    )


def measure(reference: Reference, candidate: Candidate, precision: Precision) -> dict[str, Any]:
    """The certificate's document: numbers, limits, verdict and worst images."""
    started = time.monotonic()
    limits = LIMITS[precision]
    outputs = run_candidate(reference.sample, candidate)
    metrics = parity.compare(reference.outputs, outputs, limits, reference.targets_nc)
    batches = parity.batch_invariance(candidate.model, outputs.pixels_nhwc)
    columns = published.compare(
        reference.contract,
        candidate.contract,
        reference_nc=reference.outputs.probabilities_nc,
        candidate_nc=outputs.probabilities_nc,
        limits=limits,
    )
    decoding = _decode_again(reference)
    failures = [
        *parity.failures(metrics, batches, limits),
        *parity.published_failures(columns, limits),
        *parity.decode_failures(decoding),
    ]
    document = {
        "passed": not failures,
        "failures": [asdict(failure) for failure in failures],
        "reference": reference.description,
        "images": _count_images(reference),
        "calibration": _count_calibration(reference.sample, candidate.calibrated_on),
        "limits": asdict(limits),
        "metrics": metrics,
        "published": columns,
        "independent_decode": decoding,
        "batches": batches,
        "speed": _measure_speed(candidate.model, outputs.pixels_nhwc),
        "worst": _worst(reference, outputs),
        "examples": _examples(reference.sample, outputs),
        "temperature": candidate.spec.temperature,
        "environment": candidate.model.environment(),
        "seconds": round(time.monotonic() - started, 1),
        "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    finite_document: dict[str, Any] = _finite(document)
    return finite_document


def add(opened: Bundle, certificates: Certificates) -> None:
    """Write certificates into a bundle, and the page over all that each provider then has."""
    for (provider, name), document in sorted(certificates.items(), key=lambda one: one[0] == ("cpu", "fp32")):
        bundle.add_certificate(opened.uri, opened.manifest, provider, name, document)
    held = bundle.open_bundle(opened.uri, verify=False).certificates
    for provider in {provider for provider, _ in certificates}:
        shown = {(c.provider, c.precision): c.content for c in held if c.provider == provider}
        storage.open_storage(opened.uri).put(page_path(provider), report.render(shown, opened.labels))


def page_path(provider: Provider) -> str:
    """Path inside a bundle of the page over a provider's certificates."""
    return f"{CERTIFICATES}/{provider}.html"


def run_candidate(sample: Sequence[Sample], candidate: Candidate) -> Outputs:
    """The candidate's side; an image that it alone cannot decode is black, and so a difference."""
    spec = candidate.spec.image_spec
    black = np.zeros((spec.height, spec.width, 3), np.uint8)
    decoded = candidate.decode([one.payload for one in sample], spec)
    pixels_nhwc = np.stack([black if pixels is None else pixels for pixels in decoded])
    return Outputs(candidate.spec, pixels_nhwc, *candidate.model.run(pixels_nhwc))


def _finite(value: Any) -> Any:
    """The same document with NaN and infinities as text: JSON has no word for them."""
    if isinstance(value, Mapping):
        return {name: _finite(entry) for name, entry in value.items()}
    if isinstance(value, list):
        return [_finite(entry) for entry in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _decode_again(reference: Reference) -> dict[str, Any]:
    """How far the pixels of both sides are from those of a second way of decoding."""
    own = [row for row, one in enumerate(reference.sample) if not one.edge_case]
    chosen = {
        "own": own[: independent.IMAGES_OF_USER],
        "edge_cases": [row for row, one in enumerate(reference.sample) if one.edge_case],
    }
    outputs = reference.outputs
    return {
        name: independent.compare(
            [reference.sample[row].payload for row in rows],
            outputs.pixels_nhwc[rows],
            outputs.spec.image_spec,
        )
        for name, rows in chosen.items()
    }


def _count_images(reference: Reference) -> dict[str, Any]:
    """How many images of which kind, and a hash over all of their bytes."""
    digest = hashlib.sha256()
    for one in reference.sample:
        digest.update(hashlib.sha256(one.payload).digest())
    splits = [one.split for one in reference.sample]
    return {
        "compared": len(reference.sample),
        "own": reference.own,
        "held_out": sum(split in images.HELD_OUT for split in splits),
        "trained_on": splits.count(TRAIN),
        "edge_cases": len(reference.sample) - reference.own,
        "undecodable": list(reference.undecodable),
        "sha256": digest.hexdigest(),
    }


def _count_calibration(sample: Sequence[Sample], calibrated_on: frozenset[str]) -> dict[str, int] | None:
    """How many images int8 was calibrated on, and how many of those compared are among them."""
    if not calibrated_on:
        return None
    compared_too = sum(one.fingerprint in calibrated_on for one in sample)
    return {"images": len(calibrated_on), "compared_too": compared_too}


def _measure_speed(model: OnnxModel, pixels_nhwc: np.ndarray) -> dict[str, float]:
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


def _worst(reference: Reference, outputs: Outputs) -> list[dict[str, Any]]:
    """The images whose logits differ most, with both sides' best labels."""
    expected = reference.outputs
    change = np.abs(outputs.logits_nc - expected.logits_nc).max(axis=1)
    return [
        {
            "image_id": reference.sample[row].image_id,
            "thumbnail": _thumbnail(expected.pixels_nhwc[row]),
            "max_logit": float(change[row]),
            "reference": list_top(expected.spec.class_ids, expected.probabilities_nc[row], parity.TOP_K),
            "candidate": list_top(outputs.spec.class_ids, outputs.probabilities_nc[row], parity.TOP_K),
        }
        for row in np.argsort(-change, kind="stable")[:WORST_IMAGES]
    ]


def _examples(sample: Sequence[Sample], outputs: Outputs) -> list[dict[str, Any]]:
    """Small images, their bytes in base64, with the candidate's best label of each."""
    found = []
    for one, probabilities in zip(sample, outputs.probabilities_nc, strict=True):
        name = one.image_id.rpartition("/")[2]
        if one.edge_case and name in EXAMPLES:
            best = int(probabilities.argmax())
            answer = {"id": outputs.spec.class_ids[best], "probability": float(probabilities[best])}
            found.append({"file": name, **answer, "bytes": base64.b64encode(one.payload).decode()})
    return found


def _thumbnail(pixels_hwc: np.ndarray) -> str:
    """The pixels that the model saw, as a data URI of a few kilobytes."""
    image = Image.fromarray(pixels_hwc)
    image.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX))
    return jpeg_uri(np.asarray(image))
