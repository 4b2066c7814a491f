"""A checkpoint becomes a bundle when every precision passes its parity, and otherwise nothing.

`export` converts, writes the bundle to a temporary folder, measures what is read back from there, and copies
it to the output with the certificate of fp32 on cpu last. `certify` adds what another machine measured.
"""

import json
import logging
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import onnxruntime as ort
import pyarrow as pa

from export import card, certificate, checkpoint, convert, images, published, quantize, report
from export.certificate import Certificates, Reference
from export.checkpoint import Checkpoint
from export.images import OwnImages, Sample
from export.published import Contract
from export.quantize import Graph
from export.reference import Network, torch_reference
from export.settings import ParitySettings
from pipelines.bundle import bundle, categories, providers
from pipelines.bundle.bundle import Bundle
from pipelines.bundle.manifest import MODEL_FILES, Manifest, record
from pipelines.bundle.settings import RuntimeSpec
from pipelines.datasets.splits import TRAIN
from pipelines.machine import package_versions
from pipelines.messages import InputError, Refused, redact
from pipelines.specs import Precision, Provider
from pipelines.storage import storage
from pipelines.training import runs

REFUSED_SUFFIX = "-refused"
"""The report of a refusal is written to a folder of the output's name with this appended."""
RECOMMENDED_CALIBRATION_IMAGES = 500
"""Fewer give unreliable int8 ranges: what NVIDIA's Model Optimizer asks for with vision transformers."""
_WITHOUT_EFFECT = {"ray", "numpy", "pyarrow", "obstore"}
"""Libraries that no byte of a model depends on: another version must not change the bundle's `model_id`."""

Draw = Callable[[], tuple[list[Sample], list[Sample]]]
"""Reads the images to compare, and the further ones."""

logger = logging.getLogger(__name__)


def export(
    checkpoint_uri: str,
    source: OwnImages,
    output_uri: str,
    *,
    precisions: Sequence[Precision] = ("fp32",),
    settings: ParitySettings | None = None,
) -> Bundle:
    """Write the bundle of a checkpoint and open it.

    Raises:
        InputError: the output exists, or checkpoint or images cannot be used; nothing was written.
        Refused: a precision is over its limits; the report is at `output_uri` + `-refused`.
    """
    settings = settings or ParitySettings()
    if storage.open_storage(output_uri).list():
        raise InputError(f"{redact(output_uri)} exists; name another output, or remove it first")
    with tempfile.TemporaryDirectory(prefix="iab-vision-bundle-") as folder:
        with checkpoint.open_checkpoint(checkpoint_uri) as trained:
            run = runs.run_folder(checkpoint_uri)
            calibrating = "int8" in precisions
            own, further = draw_images(source, settings, calibrating=calibrating, run=run)
            logger.info("converting to %s", ", ".join(precisions))
            network = trained.network()
            reference = reference_of_checkpoint(trained, network, own, settings)
            graphs = dict(make_graphs(trained, network, precisions, further))
            files, manifest = contents(trained, graphs)
        bundle.write_bundle(folder, files, manifest)
        draft = bundle.open_bundle(folder)
        certificates = measure_all(reference, draft, [runtime_spec(settings, "cpu", name) for name in graphs])
        _refuse_with_report(f"{output_uri.rstrip('/')}{REFUSED_SUFFIX}", certificates, draft.labels)
        certificate.add(draft, certificates)
        with _removed_on_failure(output_uri):
            bundle.copy_bundle(draft, output_uri)
    made = bundle.open_bundle(output_uri)
    if has_gpu(settings.device_id):
        add_gpu(made, reference, graphs, settings)
        made = bundle.open_bundle(output_uri, verify=False)
    return made


def certify(
    bundle_uri: str,
    source: OwnImages,
    *,
    provider: Provider,
    precisions: Sequence[Precision],
    settings: ParitySettings | None = None,
    checkpoint_uri: str | None = None,
) -> Certificates:
    """Measure a bundle on a provider of this machine and write the certificates into it, passed or not.

    Nothing is written before everything is measured.

    Args:
        checkpoint_uri: what to compare with; without it the bundle's own float32 model on CPU, certified.

    Raises:
        NotCertified: a file is missing, or no checkpoint is given and the float32 model has no certificate.
        InputError: the reference would be the model itself, or is not the checkpoint of this bundle.
        Refused: a precision failed; its certificate says so, and classify will not run it.
    """
    settings = settings or ParitySettings()
    opened = bundle.open_bundle(bundle_uri)
    runtimes = [runtime_spec(settings, provider, name) for name in precisions]
    for runtime in runtimes:
        opened.model_record(runtime.precision)
    run = runs.run_folder(checkpoint_uri) if checkpoint_uri else None
    draw = partial(draw_images, source, settings, calibrating=False, run=run)
    if checkpoint_uri is None:
        reference = _reference_of_bundle(opened, draw, settings, runtimes)
    else:
        reference = _reference_of_run(opened, checkpoint_uri, draw, settings)
    certificates = measure_all(reference, opened, runtimes)
    certificate.add(opened, certificates)
    refuse_failed(certificates, f"{redact(bundle_uri)}/{certificate.page_path(provider)}")
    return certificates


def draw_images(
    source: OwnImages,
    settings: ParitySettings,
    *,
    calibrating: bool,
    run: str | None = None,
) -> tuple[list[Sample], list[Sample]]:
    """The images to compare, and further ones to calibrate on: all of them where too few are left.

    Images that the model was trained on are compared only where fewer than `min_images` are held out.
    """
    count = settings.sample_images + (settings.calibration_images if calibrating else 0)
    drawn = images.draw(source, count=count, seed=settings.seed, run=run)
    held_out = sum(one.split != TRAIN for one in drawn)
    compared = min(settings.sample_images, max(held_out, settings.min_images))
    further = drawn[compared:]
    return drawn[:compared], further if len(further) >= quantize.MIN_CALIBRATION_IMAGES else drawn


def make_graphs(
    trained: Checkpoint, network: Any, precisions: Sequence[Precision], further: Sequence[Sample]
) -> Iterator[tuple[Precision, Graph]]:
    """The ONNX graphs asked for; float32 is always one: int8 comes from it, certify compares with it."""
    spec = trained.spec

    def metadata(name: Precision) -> dict[str, str]:
        return convert.metadata_of(trained, precision=name)

    portable = convert.convert(network, spec, metadata("fp32"))
    yield "fp32", Graph(portable, spec.temperature, {})
    if "fp16" in precisions:
        yield "fp16", quantize.half(network, spec, metadata("fp16"))
    if "int8" in precisions:
        pixels = images.decode([one.payload for one in further], spec.image_spec)
        readable_nhwc = np.array([one for one in pixels if one is not None])
        used = {one.fingerprint for one, found in zip(further, pixels, strict=True) if found is not None}
        graph = quantize.quantize_int8(portable, readable_nhwc, spec, metadata("int8"))
        yield "int8", replace(graph, notes={**graph.notes, "calibrated_on": sorted(used)})


def contents(trained: Checkpoint, graphs: Mapping[Precision, Graph]) -> tuple[dict[str, bytes], Manifest]:
    """Every file of the bundle but the certificates, and the manifest that lists them."""
    files = {MODEL_FILES[name]: graph.payload for name, graph in graphs.items()}
    files[bundle.LABELS_FILE] = bundle.labels_bytes(
        published.labels_table(trained.spec.class_ids, trained.taxonomy)
    )
    files[categories.FILE] = categories.categories_bytes(trained.spec, trained.taxonomy)
    files[card.FILE] = card.render(trained, list(graphs))
    files[card.PREPROCESSING] = card.preprocessing()
    if trained.taxonomy_table is not None:
        files[bundle.TAXONOMY_FILE] = trained.taxonomy_table
    manifest = Manifest(
        model=replace(trained.spec, taxonomy=trained.taxonomy.name),
        cattax=trained.taxonomy.cattax,
        temperatures={name: graph.temperature for name, graph in graphs.items()},
        opset=convert.OPSET,
        ir_version=convert.IR_VERSION,
        versions={n: v for n, v in package_versions().items() if n not in _WITHOUT_EFFECT},
        source={
            "architecture": trained.architecture,
            "checkpoint_sha256": trained.sha256,
            "licence": trained.licence,
            "precisions": {name: dict(graph.notes) for name, graph in graphs.items()},
        },
        files={name: record(payload) for name, payload in files.items()},
    )
    return files, manifest


def runtime_spec(settings: ParitySettings, provider: Provider, precision: Precision) -> RuntimeSpec:
    """Classify's own session options."""
    return RuntimeSpec(provider, precision, settings.batch_size, settings.threads, settings.device_id)


def measure_all(reference: Reference, opened: Bundle, runtimes: Iterable[RuntimeSpec]) -> Certificates:
    """The certificates of some sessions, one model in memory at a time; doubtful int8 ones are warned of."""
    found: Certificates = {}
    for runtime in runtimes:
        n_images, name = len(reference.sample), f"{runtime.precision} on {runtime.provider}"
        logger.info("comparing %s with the checkpoint on %d images", name, n_images)
        candidate = certificate.load_candidate(opened, runtime)
        found[runtime.provider, runtime.precision] = certificate.measure(
            reference, candidate, runtime.precision
        )
    if trained_on := sum(one.split == TRAIN for one in reference.sample):
        logger.warning(
            "%d of the %d images compared were trained on: accuracy and ECE are biased upward; give --images "
            "that were held out",
            trained_on, reference.own,
        )  # fmt: skip
    _warn_of_calibration(found)
    return found


def reference_of_checkpoint(
    trained: Checkpoint, network: Any, own: Sequence[Sample], settings: ParitySettings
) -> Reference:
    """The user's images and the edge cases as the checkpoint sees them in PyTorch."""
    contract = published.contract_of(trained.spec, trained.taxonomy)
    description = f"{trained.architecture} of {trained.source} in PyTorch, float32, eager, CPU"
    return _run_reference(own, settings, contract, torch_reference(network), description)


def _run_reference(
    own: Sequence[Sample], settings: ParitySettings, contract: Contract, network: Network, description: str
) -> Reference:
    """Raises InputError where too few of the user's images can be compared."""
    sample = [*own, *images.edge_cases(settings.seed)]
    targets_nc = images.targets(sample, contract.spec.class_ids, contract.taxonomy)
    reference = certificate.run_reference(
        sample, targets_nc, network=network, contract=contract, description=description
    )
    if reference.own < settings.min_images:
        raise InputError(
            f"{reference.own} of your images can be compared ({len(reference.undecodable)} more cannot be "
            f"decoded); a certificate needs {settings.min_images}: give more with --images, or ask for fewer "
            "with --parity.min-images"
        )
    return reference


def _reference_of_run(opened: Bundle, checkpoint_uri: str, draw: Draw, settings: ParitySettings) -> Reference:
    with checkpoint.open_checkpoint(checkpoint_uri) as trained:
        stated = opened.manifest.source.get("checkpoint_sha256")
        if trained.sha256 != stated:
            raise InputError(
                f"{trained.source} has sha256 {trained.sha256}, but {redact(opened.uri)} was exported from "
                f"sha256 {stated}; give that one with --checkpoint, or export this one"
            )
        own, _ = draw()
        return reference_of_checkpoint(trained, trained.network(), own, settings)


def _reference_of_bundle(
    opened: Bundle, draw: Draw, settings: ParitySettings, runtimes: Sequence[RuntimeSpec]
) -> Reference:
    if any((runtime.provider, runtime.precision) == ("cpu", "fp32") for runtime in runtimes):
        raise InputError(
            "fp32 on cpu is what other precisions and providers are compared with; here it would be compared "
            "with itself. Name the run that the bundle was exported from: --checkpoint RUN"
        )
    opened.certificate_for("cpu", "fp32")
    candidate = certificate.load_candidate(opened, RuntimeSpec(threads=settings.threads))
    own, _ = draw()
    contract = published.contract_of(candidate.spec, opened.taxonomy())
    description = f"model.onnx of {opened.model_id} on cpu, certified against PyTorch"
    return _run_reference(
        own, settings, contract, lambda pixels_nhwc, _: candidate.model.run(pixels_nhwc)[0], description
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
    opened: Bundle, reference: Reference, precisions: Iterable[Precision], settings: ParitySettings
) -> None:
    """Certify on cuda what runs there. The bundle stays usable on CPU even if this fails."""
    for name in precisions:
        if name == "int8":
            continue
        command = f"iab-vision certify {redact(opened.uri)} --images URI --provider cuda --precisions {name}"
        try:
            found = measure_all(reference, opened, [runtime_spec(settings, "cuda", name)])
        except Exception as error:  # ORT, CUDA and cuDNN raise unrelated types; the bundle is good without
            logger.warning("%s is not certified on cuda: %s. Later: %s", name, error, command)
            continue
        certificate.add(opened, found)
        if not found["cuda", name]["passed"]:
            logger.warning("%s. It will not run there", report.explain("cuda", name, found["cuda", name]))


def refuse_failed(certificates: Certificates, report_uri: str) -> None:
    """Raise Refused naming every broken limit, unless all passed."""
    parts = [
        report.explain(provider, name, document)
        for (provider, name), document in certificates.items()
        if not document["passed"]
    ]
    if parts:
        raise Refused(f"{'. '.join(parts)}. See {report_uri}")


def _refuse_with_report(report_uri: str, certificates: Certificates, labels: pa.Table) -> None:
    """Keep the report of a bundle that is not made, and raise Refused; nothing when all passed."""
    if all(document["passed"] for document in certificates.values()):
        return
    folder = storage.open_storage(report_uri)
    for (provider, name), document in certificates.items():
        folder.put(f"{provider}-{name}.json", json.dumps(document, indent=2, allow_nan=False).encode())
    folder.put("report.html", report.render(certificates, labels))
    refuse_failed(certificates, f"{redact(report_uri)}/report.html")


@contextmanager
def _removed_on_failure(output_uri: str) -> Iterator[None]:
    """Leave no half of a bundle: the folder was empty before, so everything in it is ours."""
    try:
        yield
    except BaseException:
        folder = storage.open_storage(output_uri)
        folder.delete(*[entry.path for entry in folder.list()])
        raise


def _warn_of_calibration(certificates: Certificates) -> None:
    """Warn where int8 was calibrated on few images, or is measured on some of them."""
    for (provider, name), document in certificates.items():
        calibration = document["calibration"] or {"images": RECOMMENDED_CALIBRATION_IMAGES, "compared_too": 0}
        if calibration["images"] < RECOMMENDED_CALIBRATION_IMAGES:
            logger.warning(
                "%s was calibrated on %d images; use %d or more: export with more --images",
                name, calibration["images"], RECOMMENDED_CALIBRATION_IMAGES,
            )  # fmt: skip
        if calibration["compared_too"]:
            logger.warning(
                "%s on %s is measured on %d images that it was calibrated on, of %d: its figures are biased "
                "upward; give more --images, or others",
                name, provider, calibration["compared_too"], document["images"]["compared"],
            )  # fmt: skip
