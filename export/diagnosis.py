"""Why a model differs from its checkpoint: measured differences become the kind of mistake behind them.

Each kind is a hypothesis: the reference is run as if it had made that mistake, and the kind holds when
this explains what the candidate did. It decides nothing; the verdict is `parity.py`'s.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from export.parity import Limits, Scores, relative
from export.reference import Network, activation
from pipelines.specs import ImageSpec

HYPOTHESIS_IMAGES = 16
"""Enough to tell the kinds apart: each costs a forward pass of the reference."""
_OTHER_NORMALISATIONS = {
    "none": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
    "to [-1, 1]": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "ImageNet's": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}


@dataclass(frozen=True)
class Finding:
    """One kind of difference, and what it rests on."""

    kind: str
    detail: str


def diagnose(
    reference: Scores,
    candidate: Scores,
    *,
    network: Network,
    spec: ImageSpec,
    oriented: np.ndarray,
    limits: Limits,
) -> list[Finding]:
    """The kinds of difference, most upstream first; `oriented` marks images with an EXIF rotation."""
    if not np.isfinite(candidate.logits_nc).all():
        rows = int((~np.isfinite(candidate.logits_nc)).any(axis=1).sum())
        return [
            Finding(
                "not_finite", f"logits of {rows} images are NaN or infinite: overflow, or a broken weight"
            )
        ]
    findings = [*_labels(reference, candidate), *_pixels(reference, candidate, oriented)]
    if reference.pixels_nhwc.shape == candidate.pixels_nhwc.shape:
        findings += _logits(candidate, network, spec, limits)
    return [*findings, *_probabilities(candidate, limits)]


def _labels(reference: Scores, candidate: Scores) -> Iterator[Finding]:
    if candidate.class_ids == reference.class_ids:
        return
    moved = sum(a != b for a, b in zip(candidate.class_ids, reference.class_ids, strict=False))
    yield Finding(
        "label_order", f"{moved} of {len(reference.class_ids)} classes are not where the checkpoint has them"
    )


def _pixels(reference: Scores, candidate: Scores, oriented: np.ndarray) -> Iterator[Finding]:
    expected, found = reference.pixels_nhwc, candidate.pixels_nhwc
    if expected.shape != found.shape:
        yield Finding("resize", f"pixels are {found.shape[1:]}, the checkpoint takes {expected.shape[1:]}")
        return
    differ = (expected != found).any(axis=(1, 2, 3))
    if not differ.any():
        return
    change = np.abs(expected[differ].astype(int) - found[differ]).mean()
    what = f"pixels of {differ.sum()} of {len(differ)} images differ, by {change:.2g} of 255 on average"
    if (expected[..., ::-1] == found).all():
        yield Finding("channel_order", f"{what}: they are BGR")
    elif not (differ & ~oriented).any():
        yield Finding("orientation", f"{what}: exactly images with an EXIF rotation")
    else:
        yield Finding("resize", f"{what}: another size, fit, filter or decoder")


def _logits(candidate: Scores, network: Network, spec: ImageSpec, limits: Limits) -> Iterator[Finding]:
    """Held against the reference on the candidate's own pixels, so that those are not blamed twice."""
    pixels_nhwc = candidate.pixels_nhwc[:HYPOTHESIS_IMAGES]
    found_nc = candidate.logits_nc[:HYPOTHESIS_IMAGES]
    expected_nc = network(pixels_nhwc, spec)
    observed = relative(found_nc, expected_nc)
    if observed <= limits.max_relative_logit:
        return
    explained = [
        (relative(found_nc, logits_nc), kind, detail)
        for kind, detail, logits_nc in _hypotheses(pixels_nhwc, found_nc, expected_nc, network, spec)
    ]
    residual, kind, detail = min(explained)
    if residual <= max(10 * limits.max_relative_logit, 0.02 * observed):
        yield Finding(kind, f"{detail}: leaves {residual:.2g} of the relative difference of {observed:.2g}")
    else:
        yield Finding(
            "weights", f"logits differ by {observed:.2g} (relative) on the same pixels; no other kind fits"
        )


def _hypotheses(
    pixels_nhwc: np.ndarray, found_nc: np.ndarray, expected_nc: np.ndarray, network: Network, spec: ImageSpec
) -> Iterator[tuple[str, str, np.ndarray]]:
    bgr_nhwc, reversed_spec = pixels_nhwc[..., ::-1], replace(spec, mean=spec.mean[::-1], std=spec.std[::-1])
    yield "channel_order", "the graph takes BGR", network(bgr_nhwc, spec)
    yield "channel_order", "the graph hands on BGR", network(bgr_nhwc, reversed_spec)
    red, green, blue = (value or 1e-6 for value in spec.mean)
    others = {"mean and std swapped": (spec.std, (red, green, blue)), **_OTHER_NORMALISATIONS}
    for name, (mean, std) in others.items():
        yield (
            "normalisation",
            f"normalised with {name}",
            network(pixels_nhwc, replace(spec, mean=mean, std=std)),
        )
    scale = float((found_nc * expected_nc).sum() / max(float((expected_nc**2).sum()), 1e-30))
    yield "temperature", f"logits are scaled by {scale:.4g}", expected_nc * scale
    order = _permutation(found_nc, expected_nc)
    yield "label_order", f"logits are permuted: {order[:8].tolist()}…", expected_nc[:, order]


def _permutation(found_nc: np.ndarray, expected_nc: np.ndarray) -> np.ndarray:
    """For each column found, the expected column nearest to it."""
    distance_cc = np.abs(found_nc[:, :, None] - expected_nc[:, None, :]).mean(axis=0)
    return np.asarray(distance_cc.argmin(axis=1))


def _probabilities(candidate: Scores, limits: Limits) -> Iterator[Finding]:
    """Held against the candidate's own logits: only the tail of the graph is left to blame."""

    def error(probabilities_nc: np.ndarray) -> float:
        return float(np.abs(candidate.probabilities_nc - probabilities_nc).max())

    def activated(temperature: float, multi_label: bool = candidate.multi_label) -> np.ndarray:
        return activation(candidate.logits_nc, temperature=temperature, multi_label=multi_label)

    expected_nc = activated(candidate.temperature)
    observed = error(expected_nc)
    if observed <= limits.max_activation_error:
        return
    twice_nc = activation(expected_nc, temperature=1, multi_label=candidate.multi_label)
    temperature = min(np.geomspace(0.05, 20, 2000), key=lambda t: error(activated(float(t))))
    explained = {
        ("activation_twice", "probabilities went through the activation twice"): error(twice_nc),
        ("temperature", "the temperature is lost: it is 1"): error(activated(1)),
        ("temperature", f"the temperature is {temperature:.3g}, not {candidate.temperature:.3g}"): error(
            activated(float(temperature))
        ),
        ("activation", "softmax and sigmoid are confused"): error(
            activated(candidate.temperature, not candidate.multi_label)
        ),
    }
    (kind, detail), residual = min(explained.items(), key=lambda entry: entry[1])
    if residual > 0.1 * observed:
        kind, detail = "activation", "probabilities do not follow from the logits"
    yield Finding(kind, f"{detail} (they are off by {observed:.2g})")
