"""Certificates for a bundle: what each precision measured on one provider of this machine.

The reference is the checkpoint in PyTorch where it is at hand, and else the bundle's own float32 model on
CPU, which the export certified against PyTorch. Whether a bundle is made at all is `release.py`'s business.
"""

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import onnxruntime as ort

from export import checkpoint, images, report
from export.checkpoint import Checkpoint
from export.images import Sample
from export.measurement import Candidate, Evidence, Labels, gather, measure
from export.reference import torch_reference
from export.settings import ParitySettings
from pipelines.bundle import bundle, providers, session
from pipelines.bundle.bundle import Bundle, Manifest
from pipelines.bundle.settings import RuntimeSpec
from pipelines.messages import redact
from pipelines.specs import ImageSpec, Precision, Provider
from pipelines.storage import storage

WISHED_CALIBRATION_IMAGES = 500
"""Fewer leave int8 ranges to chance: what NVIDIA's Model Optimizer asks for with vision transformers."""

logger = logging.getLogger(__name__)

Documents = dict[tuple[Provider, Precision], dict[str, Any]]


class ParityRefused(RuntimeError):
    """At least one precision differs too much from the checkpoint; the report says where and how."""


class NoReference(ValueError):
    """A model would be compared with itself, or with another checkpoint than its own."""


def certify(
    bundle_uri: str,
    images_uri: str,
    *,
    provider: Provider,
    precisions: Sequence[Precision],
    measuring: ParitySettings | None = None,
    checkpoint_uri: str | None = None,
) -> Documents:
    """Measure a bundle on a provider of this machine and write the certificates into it, passed or not.

    Nothing is written before everything is measured.

    Args:
        checkpoint_uri: what to compare with; without it the bundle's own float32 model on CPU, certified.

    Raises:
        NotCertified: a file is missing, or no checkpoint is given and the float32 model has no certificate.
        NoReference: the reference would be the model itself, or is not the checkpoint of this bundle.
        ParityRefused: a precision failed; its certificate says so, and classify will not run it.
    """
    measuring = measuring or ParitySettings()
    opened = bundle.open_bundle(bundle_uri)
    specs = [runtime_spec(measuring, provider, name) for name in precisions]
    for spec in specs:
        opened.model_record(spec.precision)
    if checkpoint_uri is None:
        evidence = _evidence_of_bundle(opened, images_uri, measuring, specs)
    else:
        evidence = _evidence_of_run(opened, checkpoint_uri, images_uri, measuring)
    documents: Documents = {
        (provider, spec.precision): measure(evidence, candidate(opened, spec), spec.precision)
        for spec in specs
    }
    warn_of_calibration(documents)
    add(opened, documents)
    refuse_failed(documents, f"{redact(bundle_uri)}/{bundle.CERTIFICATES}/{provider}.html")
    return documents


def add(opened: Bundle, documents: Documents) -> None:
    """Write certificates into a bundle, and anew the page over all that each provider then has."""
    for (provider, name), document in documents.items():
        bundle.add_certificate(opened.uri, opened.manifest, provider, name, document)
    held = bundle.open_bundle(opened.uri, verify=False).certificates
    for provider in {provider for provider, _ in documents}:
        shown = {(c.provider, c.precision): c.content for c in held if c.provider == provider}
        storage.open_storage(opened.uri).put(page_path(provider), report.render(shown, opened.labels))


def warn_of_calibration(documents: Documents) -> None:
    """Say where int8 rests on few images, or is judged on the very ones that it was made with."""
    for (provider, name), document in documents.items():
        calibration = document["calibration"] or {"images": WISHED_CALIBRATION_IMAGES, "compared_too": 0}
        if calibration["images"] < WISHED_CALIBRATION_IMAGES:
            logger.warning(
                "%s was calibrated on %d images; %d and more are wished for: export with more --images",
                name,
                calibration["images"],
                WISHED_CALIBRATION_IMAGES,
            )
        if calibration["compared_too"]:
            logger.warning(
                "%s on %s is judged on %d images that it was calibrated on, of %d: its figures flatter it; "
                "give more --images, or others",
                name,
                provider,
                calibration["compared_too"],
                document["images"]["compared"],
            )


def has_gpu(device_id: int) -> bool:
    """Whether a CUDA device answers, and the installed ONNX Runtime was built for one."""
    if providers.EP_NAMES["cuda"] not in ort.get_available_providers():
        return False
    try:
        providers.gpu_name(device_id)
    except providers.ProviderUnavailable:
        return False
    return True


def add_gpu(
    opened: Bundle, evidence: Evidence, precisions: Iterable[Precision], measuring: ParitySettings
) -> None:
    """Certify on cuda what runs there. The bundle stays as it is for CPU, whatever comes of this."""
    for name in precisions:
        if name == "int8":
            continue
        bundle_uri = redact(opened.uri)
        command = f"iab-vision certify {bundle_uri} --images URI --provider cuda --precisions {name}"
        try:
            spec = runtime_spec(measuring, "cuda", name)
            document = measure(evidence, candidate(opened, spec), name)
        except Exception as error:  # ORT, CUDA and cuDNN raise unrelated types; the bundle is good without
            logger.warning("NO CERTIFICATE for %s on cuda: %s. Later: %s", name, error, command)
            continue
        add(opened, {("cuda", name): document})
        if not document["passed"]:
            logger.warning("%s. It will not run there", _explained("cuda", name, document))


def page_path(provider: Provider) -> str:
    """Where the page over a provider's certificates lies in a bundle."""
    return f"{bundle.CERTIFICATES}/{provider}.html"


def evidence_of_checkpoint(trained: Checkpoint, network: Any, own: Sequence[Sample], seed: int) -> Evidence:
    """The user's images and the awkward ones as the checkpoint sees them in PyTorch."""
    sample = [*own, *images.awkward(seed)]
    return gather(
        sample,
        images.targets(sample, trained.class_ids, trained.taxonomy),
        network=torch_reference(network),
        labels=Labels(trained.class_ids, trained.multi_label, trained.temperature),
        spec=trained.image_spec,
        description=f"{trained.architecture} of {trained.source} in PyTorch, float32, eager, CPU",
    )


def labels_of(manifest: Manifest, class_ids: Sequence[str], precision: Precision) -> Labels:
    """What the file of a precision says its outputs are."""
    return Labels(tuple(class_ids), manifest.multi_label, manifest.temperatures[precision])


def runtime_spec(measuring: ParitySettings, provider: Provider, precision: Precision) -> RuntimeSpec:
    """Classify's own session options."""
    return RuntimeSpec(
        provider,
        precision,
        batch_size=measuring.batch_size,
        threads=measuring.threads,
        device_id=measuring.device_id,
    )


def refuse_failed(documents: Documents, report_uri: str) -> None:
    """Raise ParityRefused that names every broken limit, unless all documents passed."""
    parts = [
        _explained(provider, name, document)
        for (provider, name), document in documents.items()
        if not document["passed"]
    ]
    if parts:
        raise ParityRefused(f"{'. '.join(parts)}. See {report_uri}")


def one_line(provider: str, name: str, document: Mapping[str, Any]) -> str:
    """What a terminal shows of a measurement."""
    metrics, verdict = document["metrics"], "passed" if document["passed"] else "REFUSED"
    top1 = metrics["top1"]
    return (
        f"{name} on {provider}: {verdict} on {document['images']['compared']} images, max |Δ logit| "
        f"{report.number(metrics['max_logit'])}, top 1 agrees on {top1['share']:.2%} ({top1['ties']} ties), "
        f"{max(document['speed'].values()):g} images/s"
    )


def _explained(provider: str, name: str, document: Mapping[str, Any]) -> str:
    broken = "; ".join(
        f"{f['metric']} is {report.number(f['value'])}, limit {report.number(f['limit'])}"
        for f in document["failures"]
    )
    return f"{name} on {provider} is refused: {broken}"


def candidate(opened: Bundle, spec: RuntimeSpec) -> Candidate:
    """The bundle as a reader of it would run it."""
    return Candidate(
        session.load(opened, spec),
        labels_of(opened.manifest, opened.class_ids, spec.precision),
        opened.image_spec,
        calibrated_on=calibrated_on(opened.manifest, spec.precision),
    )


def calibrated_on(manifest: Manifest, precision: Precision) -> frozenset[str]:
    """Fingerprints of the images that the file's ranges come from; none where it is not quantised."""
    notes = manifest.source.get("precisions", {}).get(precision, {})
    return frozenset(notes.get("calibrated_on", ()))


def _evidence_of_run(
    opened: Bundle, checkpoint_uri: str, images_uri: str, measuring: ParitySettings
) -> Evidence:
    with checkpoint.opened(checkpoint_uri) as trained:
        stated = opened.manifest.source.get("checkpoint_sha256")
        if trained.sha256 != stated:
            raise NoReference(
                f"{trained.source} has sha256 {trained.sha256}, but {redact(opened.uri)} was "
                f"exported from sha256 {stated}; give that one with --checkpoint, or export this one"
            )
        own = images.draw(images_uri, count=measuring.sample_images, seed=measuring.seed)
        return evidence_of_checkpoint(trained, trained.network(), own, measuring.seed)


def _evidence_of_bundle(
    opened: Bundle, images_uri: str, measuring: ParitySettings, specs: Sequence[RuntimeSpec]
) -> Evidence:
    if any((spec.provider, spec.precision) == ("cpu", "fp32") for spec in specs):
        raise NoReference(
            "fp32 on cpu is what other precisions and providers are compared with; here it would be compared "
            "with itself. Name the run that the bundle was exported from: --checkpoint RUN"
        )
    opened.certificate_for("cpu", "fp32")
    reference = candidate(opened, RuntimeSpec(threads=measuring.threads))
    own = images.draw(images_uri, count=measuring.sample_images, seed=measuring.seed)
    sample = [*own, *images.awkward(measuring.seed)]

    def network(pixels_nhwc: np.ndarray, spec: ImageSpec) -> np.ndarray:
        return reference.model.run(np.ascontiguousarray(pixels_nhwc))[0]

    return gather(
        sample,
        images.targets(sample, opened.class_ids, opened.taxonomy()),
        network=network,
        labels=reference.labels,
        spec=opened.image_spec,
        description=f"model.onnx of {opened.model_id} on cpu, certified against PyTorch",
    )
