"""The gate: a checkpoint becomes a bundle when every precision passes its parity, and otherwise nothing.

`export` converts, measures from encoded bytes to the top k in classify's own session options, and writes
the bundle with its certificates last. `certify` measures an existing bundle on this machine's provider.
A refusal leaves a report beside the output, never a bundle.
"""

import importlib.metadata
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pyarrow as pa

from export import card, checkpoint, convert, precision, report, samples
from export.checkpoint import Checkpoint
from export.convert import Surroundings
from export.measurement import Candidate, Evidence, Labels, gather, measure
from export.precision import Graph
from export.reference import Network, torch_reference
from export.samples import Sample
from pipelines import bundle, storage
from pipelines.bundle import Bundle, Manifest
from pipelines.runtime import OnnxModel
from pipelines.specs import ImageSpec, Measuring, Precision, Provider, RuntimeSpec

REFUSED_SUFFIX = "-refused"
"""The report of a refusal lies in a folder of the output's name with this behind it."""
_LIBRARIES = (
    "iab-vision",
    "torch",
    "transformers",
    "onnx",
    "onnxscript",
    "onnxruntime-gpu",
    "onnxruntime",
    "pillow",
)

logger = logging.getLogger(__name__)

Documents = dict[tuple[Provider, Precision], dict[str, Any]]


class OutputExists(ValueError):
    """Something lies where the bundle is to be written."""


class ParityRefused(RuntimeError):
    """At least one precision differs too much from the checkpoint; the report says where and how."""


def export(
    checkpoint_uri: str,
    images_uri: str,
    output_uri: str,
    *,
    precisions: Sequence[Precision] = ("fp32",),
    measuring: Measuring | None = None,
) -> Bundle:
    """Write the bundle of a checkpoint and open it.

    Raises:
        OutputExists, UnusableCheckpoint, NoImages, TooFewImages, NotConvertible: nothing was written.
        ParityRefused: a precision is over its limits; the report lies at `output_uri` + `-refused`.
    """
    measuring = measuring or Measuring()
    if storage.open_storage(output_uri).list():
        raise OutputExists(f"{storage.redact(output_uri)} exists; name another output, or remove it first")
    with checkpoint.opened(checkpoint_uri) as trained:
        own, further = _drawn(images_uri, measuring, calibrating="int8" in precisions)
        network = trained.network()
        evidence = _evidence(trained, network, [*own, *samples.awkward(measuring.seed)])
        logger.info(
            "comparing on %d images; %d do not decode", len(evidence.sample), len(evidence.undecodable)
        )
        graphs = dict(_graphs(trained, network, precisions, further))
        files, manifest = contents(trained, graphs)
    documents: Documents = {
        ("cpu", name): measure(evidence, _candidate(files, manifest, name, measuring), name)
        for name in graphs
    }
    if not all(document["passed"] for document in documents.values()):
        raise refusal(f"{output_uri.rstrip('/')}{REFUSED_SUFFIX}", evidence, documents)
    files[f"{bundle.CERTIFICATES}/cpu.html"] = report.render(evidence, documents)
    with _removed_on_failure(output_uri):
        bundle.write_bundle(output_uri, files, manifest, documents)
    return bundle.open_bundle(output_uri)


@contextmanager
def _removed_on_failure(output_uri: str) -> Iterator[None]:
    """Leave no half of a bundle behind: the folder was empty before, so all that is in it is ours."""
    try:
        yield
    except BaseException:
        folder = storage.open_storage(output_uri)
        folder.delete(*[entry.path for entry in folder.list()])
        raise


def _drawn(images_uri: str, measuring: Measuring, *, calibrating: bool) -> tuple[list[Sample], list[Sample]]:
    """The images to compare, and further ones to calibrate on (the same ones where there are no others)."""
    count = measuring.sample_images + (measuring.calibration_images if calibrating else 0)
    drawn = samples.draw(images_uri, count=count, seed=measuring.seed)
    own, further = drawn[: measuring.sample_images], drawn[measuring.sample_images :]
    return own, further or own


def _evidence(trained: Checkpoint, network: Any, sample: Sequence[Sample]) -> Evidence:
    return gather(
        sample,
        samples.targets(sample, trained.class_ids, trained.taxonomy),
        network=torch_reference(network),
        labels=Labels(trained.class_ids, trained.multi_label, trained.temperature),
        spec=trained.image_spec,
        description=f"{trained.architecture} of {trained.source} in PyTorch, float32, eager, CPU",
    )


def _graphs(
    trained: Checkpoint, network: Any, precisions: Sequence[Precision], further: Sequence[Sample]
) -> Iterator[tuple[Precision, Graph]]:
    """The ONNX graphs asked for; float32 is always one, as int8 and TensorRT come from it."""
    around = Surroundings(trained.image_spec, trained.temperature, trained.multi_label)

    def metadata(name: Precision) -> dict[str, str]:
        return convert.metadata_of(trained, temperature=trained.temperature, precision=name)

    portable = convert.convert(network, around, metadata("fp32"))
    yield "fp32", Graph(portable, trained.temperature, {})
    if "fp16" in precisions:
        yield "fp16", precision.half(network, around, metadata("fp16"))
    if "int8" in precisions:
        pixels = samples.decode([one.payload for one in further], trained.image_spec)
        readable_nhwc = np.array([one for one in pixels if one is not None])
        yield "int8", precision.quantised(portable, readable_nhwc, around, metadata("int8"))


def contents(trained: Checkpoint, graphs: Mapping[Precision, Graph]) -> tuple[dict[str, bytes], Manifest]:
    """Every file of the bundle but the certificates, and the manifest that lists them."""
    labels = labels_table(trained)
    files = {bundle.MODEL_FILES[name]: graph.payload for name, graph in graphs.items()}
    files[bundle.LABELS_FILE] = bundle.labels_bytes(labels)
    files[card.FILE] = card.render(trained, list(graphs))
    if trained.taxonomy_table is not None:
        files[bundle.TAXONOMY_FILE] = trained.taxonomy_table
    manifest = Manifest(
        image_spec=trained.image_spec,
        taxonomy=trained.taxonomy.name,
        cattax=trained.taxonomy.cattax,
        multi_label=trained.multi_label,
        thresholds=trained.thresholds,
        temperatures={name: graph.temperature for name, graph in graphs.items()},
        opset=convert.OPSET,
        ir_version=convert.IR_VERSION,
        versions=dict(_versions()),
        source={
            "architecture": trained.architecture,
            "checkpoint_sha256": trained.sha256,
            "licence": trained.licence,
            "precisions": {name: dict(graph.notes) for name, graph in graphs.items()},
        },
        files={name: bundle.record(payload) for name, payload in files.items()},
    )
    return files, manifest


def labels_table(trained: Checkpoint) -> pa.Table:
    """The classes in graph order, with their place in the taxonomy."""
    nodes = [trained.taxonomy.node(class_id) for class_id in trained.class_ids]
    columns = {
        "class_index": range(len(nodes)),
        "id": [node.id for node in nodes],
        "parent_id": [node.parent_id for node in nodes],
        "name": [node.name for node in nodes],
        "path": [trained.taxonomy.path(node.id) for node in nodes],
        "tier": [node.tier for node in nodes],
    }
    return pa.table({name: list(values) for name, values in columns.items()}, schema=bundle.LABELS)


def _candidate(
    files: Mapping[str, bytes], manifest: Manifest, name: Precision, measuring: Measuring
) -> Candidate:
    """A precision as a reader of the bundle would run it: everything comes from the files to be written."""
    class_ids = tuple(bundle.read_labels(files[bundle.LABELS_FILE])["id"].to_pylist())
    model = OnnxModel(files[bundle.model_file(name)], _runtime(measuring, "cpu", name))
    labels = Labels(class_ids, manifest.multi_label, manifest.temperatures[name])
    return Candidate(model, labels, manifest.image_spec)


def certify(
    bundle_uri: str,
    images_uri: str,
    *,
    provider: Provider,
    precisions: Sequence[Precision],
    measuring: Measuring | None = None,
) -> Documents:
    """Measure a bundle on a provider of this machine and write the certificates into it, passed or not.

    The reference is the bundle's own float32 model on CPU, which the export certified against PyTorch.

    Raises:
        NotCertified: that certificate is missing, so there is no reference.
        ParityRefused: a precision failed; its certificate says so, and classify will not run it.
    """
    measuring = measuring or Measuring()
    opened = bundle.open_bundle(bundle_uri)
    opened.certificate_for("cpu", "fp32")
    evidence = _evidence_of_bundle(opened, _drawn(images_uri, measuring, calibrating=False)[0], measuring)
    documents: Documents = {}
    for name in precisions:
        model = OnnxModel(opened.model_bytes(name, provider), _runtime(measuring, provider, name))
        labels = Labels(tuple(opened.class_ids), opened.multi_label, opened.manifest.temperatures[name])
        document = measure(evidence, Candidate(model, labels, opened.image_spec), name)
        bundle.add_certificate(bundle_uri, opened.manifest, provider, name, document)
        documents[provider, name] = document
    page = report.render(evidence, documents)
    storage.open_storage(bundle_uri).put(f"{bundle.CERTIFICATES}/{provider}.html", page)
    if not all(document["passed"] for document in documents.values()):
        raise ParityRefused(
            _summary(documents, f"{storage.redact(bundle_uri)}/{bundle.CERTIFICATES}/{provider}.html")
        )
    return documents


def _evidence_of_bundle(opened: Bundle, own: Sequence[Sample], measuring: Measuring) -> Evidence:
    sample = [*own, *samples.awkward(measuring.seed)]
    model = OnnxModel(opened.model_bytes("fp32"), _runtime(measuring, "cpu", "fp32"))

    def network(pixels_nhwc: np.ndarray, spec: ImageSpec) -> np.ndarray:
        return model.run(np.ascontiguousarray(pixels_nhwc))[0]

    reference: Network = network
    return gather(
        sample,
        samples.targets(sample, opened.class_ids, opened.taxonomy()),
        network=reference,
        labels=Labels(tuple(opened.class_ids), opened.multi_label, opened.manifest.temperatures["fp32"]),
        spec=opened.image_spec,
        description=f"model.onnx of {opened.model_id} on cpu, certified against PyTorch",
    )


def refusal(report_uri: str, evidence: Evidence, documents: Documents) -> ParityRefused:
    """Keep the report of a bundle that is not made; returns what to raise."""
    folder = storage.open_storage(report_uri)
    for (provider, name), document in documents.items():
        folder.put(f"{provider}-{name}.json", report.as_json(document))
    folder.put("report.html", report.render(evidence, documents))
    return ParityRefused(_summary(documents, f"{storage.redact(report_uri)}/report.html"))


def one_line(provider: str, name: str, document: Mapping[str, Any]) -> str:
    """What a terminal shows of a measurement."""
    metrics, verdict = document["metrics"], "passed" if document["passed"] else "REFUSED"
    top1 = metrics["top1"]
    return (
        f"{name} on {provider}: {verdict} on {document['images']['compared']} images, max |Δ logit| "
        f"{report.number(metrics['max_logit'])}, top 1 agrees on {top1['share']:.2%} ({top1['ties']} ties), "
        f"{max(document['speed'].values()):g} images/s"
    )


def _summary(documents: Documents, report_uri: str) -> str:
    parts = []
    for (provider, name), document in documents.items():
        if not document["passed"]:
            broken = "; ".join(
                f"{f['metric']} is {report.number(f['value'])}, limit {report.number(f['limit'])}"
                for f in document["failures"]
            )
            kinds = (
                "; ".join(f"{f['kind']}: {f['detail']}" for f in document["findings"]) or "no kind stands out"
            )
            parts.append(f"{name} on {provider} is refused: {broken}. Kind of difference: {kinds}")
    return f"{'. '.join(parts)}. See {report_uri}"


def _runtime(measuring: Measuring, provider: Provider, name: Precision) -> RuntimeSpec:
    """Classify's own session options."""
    return RuntimeSpec(
        provider,
        name,
        batch_size=measuring.batch_size,
        threads=measuring.threads,
        device_id=measuring.device_id,
    )


def _versions() -> Iterator[tuple[str, str]]:
    for name in _LIBRARIES:
        try:
            yield name, importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # onnxruntime comes under one of two names
