"""The gate: a checkpoint becomes a bundle when every precision passes its parity, and otherwise nothing.

`export` converts, measures from encoded bytes to the top k in classify's own session options, and writes
the bundle with its certificates last. A refusal leaves a report beside the output, never a bundle. What is
measured later, on other machines, is `certification.py`'s business.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa

from export import card, certification, checkpoint, convert, images, quantize, report
from export.certification import Documents
from export.checkpoint import Checkpoint
from export.convert import Surroundings
from export.images import Sample
from export.measurement import Candidate, measure
from export.quantize import Graph
from export.settings import ParitySettings
from pipelines.bundle import bundle
from pipelines.bundle.bundle import Bundle, Manifest
from pipelines.bundle.session import OnnxModel
from pipelines.machine import library_versions
from pipelines.messages import redact
from pipelines.specs import Precision
from pipelines.storage import storage

REFUSED_SUFFIX = "-refused"
"""The report of a refusal lies in a folder of the output's name with this behind it."""
_WITHOUT_EFFECT = {"ray", "numpy", "pyarrow", "obstore"}
"""Libraries that no byte of a model depends on: another version must not change the bundle's `model_id`."""
logger = logging.getLogger(__name__)


class OutputExists(ValueError):
    """Something lies where the bundle is to be written."""


def export(
    checkpoint_uri: str,
    images_uri: str,
    output_uri: str,
    *,
    precisions: Sequence[Precision] = ("fp32",),
    measuring: ParitySettings | None = None,
) -> Bundle:
    """Write the bundle of a checkpoint and open it.

    Raises:
        OutputExists, UnusableCheckpoint, NoImages, TooFewImages, NotConvertible: nothing was written.
        ParityRefused: a precision is over its limits; the report lies at `output_uri` + `-refused`.
    """
    measuring = measuring or ParitySettings()
    if storage.open_storage(output_uri).list():
        raise OutputExists(f"{redact(output_uri)} exists; name another output, or remove it first")
    with checkpoint.opened(checkpoint_uri) as trained:
        own, further = _drawn(images_uri, measuring, calibrating="int8" in precisions)
        network = trained.network()
        evidence = certification.evidence_of_checkpoint(trained, network, own, measuring.seed)
        logger.info(
            "comparing on %d images; %d do not decode", len(evidence.sample), len(evidence.undecodable)
        )
        graphs = dict(_graphs(trained, network, precisions, further))
        files, manifest = contents(trained, graphs)
    documents: Documents = {
        ("cpu", name): measure(evidence, _candidate(files, manifest, name, measuring), name)
        for name in graphs
    }
    certification.warn_of_calibration(documents)
    labels = bundle.read_labels(files[bundle.LABELS_FILE])
    _refuse_failed(f"{output_uri.rstrip('/')}{REFUSED_SUFFIX}", documents, labels)
    files[certification.page_path("cpu")] = report.render(documents, labels)
    with _removed_on_failure(output_uri):
        bundle.write_bundle(output_uri, files, manifest, documents)
    made = bundle.open_bundle(output_uri)
    if certification.has_gpu(measuring.device_id):
        certification.add_gpu(made, evidence, graphs, measuring)
        made = bundle.open_bundle(output_uri, verify=False)
    return made


@contextmanager
def _removed_on_failure(output_uri: str) -> Iterator[None]:
    """Leave no half of a bundle behind: the folder was empty before, so all that is in it is ours."""
    try:
        yield
    except BaseException:
        folder = storage.open_storage(output_uri)
        folder.delete(*[entry.path for entry in folder.list()])
        raise


def _drawn(
    images_uri: str, measuring: ParitySettings, *, calibrating: bool
) -> tuple[list[Sample], list[Sample]]:
    """The images to compare, and further ones to calibrate on: all of them where too few are left."""
    count = measuring.sample_images + (measuring.calibration_images if calibrating else 0)
    drawn = images.draw(images_uri, count=count, seed=measuring.seed)
    own, further = drawn[: measuring.sample_images], drawn[measuring.sample_images :]
    return own, further if len(further) >= quantize.MIN_CALIBRATION_IMAGES else drawn


def _graphs(
    trained: Checkpoint, network: Any, precisions: Sequence[Precision], further: Sequence[Sample]
) -> Iterator[tuple[Precision, Graph]]:
    """The ONNX graphs asked for; float32 is always one: int8 comes from it, certify compares with it."""
    around = Surroundings(trained.image_spec, trained.temperature, trained.multi_label)

    def metadata(name: Precision) -> dict[str, str]:
        return convert.metadata_of(trained, temperature=trained.temperature, precision=name)

    portable = convert.convert(network, around, metadata("fp32"))
    yield "fp32", Graph(portable, trained.temperature, {})
    if "fp16" in precisions:
        yield "fp16", quantize.half(network, around, metadata("fp16"))
    if "int8" in precisions:
        pixels = images.decode([one.payload for one in further], trained.image_spec)
        readable_nhwc = np.array([one for one in pixels if one is not None])
        used = {one.fingerprint for one, found in zip(further, pixels, strict=True) if found is not None}
        graph = quantize.quantised(portable, readable_nhwc, around, metadata("int8"))
        yield "int8", replace(graph, notes={**graph.notes, "calibrated_on": sorted(used)})


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
        versions={n: v for n, v in library_versions().items() if n not in _WITHOUT_EFFECT},
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
    files: Mapping[str, bytes], manifest: Manifest, name: Precision, measuring: ParitySettings
) -> Candidate:
    """A precision as a reader of the bundle would run it: everything comes from the files to be written."""
    class_ids = bundle.read_labels(files[bundle.LABELS_FILE])["id"].to_pylist()
    spec = certification.runtime_spec(measuring, "cpu", name)
    labels = certification.labels_of(manifest, class_ids, name)
    model = OnnxModel(files[bundle.MODEL_FILES[name]], spec)
    calibrated_on = certification.calibrated_on(manifest, name)
    return Candidate(model, labels, manifest.image_spec, calibrated_on=calibrated_on)


def _refuse_failed(report_uri: str, documents: Documents, labels: pa.Table) -> None:
    """Keep the report of a bundle that is not made, and raise what says why; nothing when all passed."""
    if all(document["passed"] for document in documents.values()):
        return
    folder = storage.open_storage(report_uri)
    for (provider, name), document in documents.items():
        folder.put(f"{provider}-{name}.json", report.as_json(document))
    folder.put("report.html", report.render(documents, labels))
    certification.refuse_failed(documents, f"{redact(report_uri)}/report.html")
