"""A bundle: the folder that holds one released model and the proof that it may run.

Reads, verifies and writes `manifest.json`, the ONNX files, `labels.parquet` and `certificates/`
(layout: README). Nothing is parsed before its hash agrees with the manifest, nothing is
unpickled, and every byte handed out was hashed in memory first. It runs no model.
"""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.bundle.coverage import find_gap
from pipelines.bundle.manifest import (
    CERTIFICATES,
    MANIFEST_FILE,
    MODEL_FILES,
    BundleDamaged,
    Certificate,
    FileRecord,
    Manifest,
    NotABundle,
    NotCertified,
    seal,
)  # fmt: skip
from pipelines.bundle.onnx_check import check_graph
from pipelines.bundle.settings import RuntimeSpec
from pipelines.messages import redact
from pipelines.specs import ModelSpec, Precision, Provider
from pipelines.storage import storage
from pipelines.taxonomy import taxonomy
from pipelines.taxonomy.taxonomy import Taxonomy

LABELS_FILE = "labels.parquet"
TAXONOMY_FILE = "taxonomy.csv"
"""Only where the taxonomy is a table of the user's own."""

LABELS = pa.schema(
    [
        pa.field("class_index", pa.int32(), nullable=False),
        pa.field("id", pa.string(), nullable=False),
        pa.field("parent_id", pa.string()),
        pa.field("name", pa.string(), nullable=False),
        pa.field("path", pa.string(), nullable=False),
        pa.field("tier", pa.int32(), nullable=False),
    ]
)

MAX_JSON_BYTES = 16 << 20
"""A manifest or certificate of 10,000 classes is under 2 MB; more is not ours and is not read."""


@dataclass(frozen=True)
class Bundle:
    """An opened bundle; small, and picklable: model bytes are read when they are asked for."""

    uri: str
    manifest: Manifest
    manifest_sha256: str
    labels: pa.Table
    certificates: tuple[Certificate, ...]

    @property
    def model_id(self) -> str:
        return self.manifest.model_id

    @property
    def spec(self) -> ModelSpec:
        """What the model takes and what its outputs mean."""
        return self.manifest.model

    def taxonomy(self) -> Taxonomy:
        """The taxonomy that the classes belong to, as it was when the bundle was made."""
        record = self.manifest.files.get(TAXONOMY_FILE)
        if record is None:
            return taxonomy.load(self.spec.taxonomy, labels=self.spec.class_ids)
        payload = _read_verified(storage.open_storage(self.uri), TAXONOMY_FILE, record)
        version = hashlib.sha256(payload).hexdigest()[:12]
        return Taxonomy(self.spec.taxonomy, version, self.manifest.cattax, taxonomy.parse(payload.decode()))

    def model_bytes(self, precision: Precision) -> bytes:
        """The verified bytes of the ONNX file of a precision."""
        expected = self.model_record(precision)
        return _read_verified(storage.open_storage(self.uri), MODEL_FILES[precision], expected)

    def model_record(self, precision: Precision) -> FileRecord:
        """What that file must be; raises `NotCertified` when the bundle was made without it."""
        found = self.manifest.files.get(MODEL_FILES[precision])
        if found is None:
            held = [p for p, file in MODEL_FILES.items() if file in self.manifest.files]
            raise NotCertified(
                f"{redact(self.uri)} holds no {precision} model (it holds {', '.join(held)}); "
                f"export it again with --precisions {','.join([*held, precision])}"
            )
        return found

    def certificate_for(self, provider: Provider, precision: Precision) -> Certificate:
        """The passing certificate that covers `precision` on `provider`; raises `NotCertified`.

        None covers anything without that of fp32 on cpu: it is written last, and others compare with it.
        """
        if (provider, precision) != ("cpu", "fp32"):
            self.certificate_for("cpu", "fp32")
        model = self.manifest.files.get(MODEL_FILES[precision])
        wanted = f"{CERTIFICATES}/{provider}-{precision}.json"
        found = next((c for c in self.certificates if c.name == wanted), None)
        uri = redact(self.uri)
        if found is None or model is None:
            reason = f"{uri} has no certificate for {precision} on {provider} (it has: {self._certified()})"
        elif not found.passed:
            reason = f"{uri}/{wanted} says that {precision} on {provider} failed parity"
        elif (found.manifest_sha256, found.model_sha256) != (self.manifest_sha256, model.sha256):
            reason = f"{uri}/{wanted} was made for another model or manifest than this one"
        else:
            return found
        raise NotCertified(
            f"{reason}. Make one on a machine that has the provider: {self._command(provider, precision)}"
        )

    def certificate_covering(self, spec: RuntimeSpec) -> Certificate:
        """The passing certificate that measured what would run here; raises `NotCertified`."""
        found = self.certificate_for(spec.provider, spec.precision)
        if gap := find_gap(found, spec):
            raise NotCertified(
                f"{redact(self.uri)}/{found.name} does not cover this: {gap}. Measure it where it is to run: "
                f"{self._command(spec.provider, spec.precision)} --parity.batch-size {spec.batch_size}"
            )
        return found

    def _command(self, provider: Provider, precision: Precision) -> str:
        reference = " --checkpoint RUN" if (provider, precision) == ("cpu", "fp32") else ""
        return (
            f"iab-vision certify {redact(self.uri)} --images URI --provider {provider} "
            f"--precisions {precision}{reference}"
        )

    def _certified(self) -> str:
        return ", ".join(f"{c.provider}-{c.precision}" for c in self.certificates if c.passed) or "none"


def open_bundle(uri: str, *, verify: bool = True) -> Bundle:
    """Open the bundle at `uri`; `verify` hashes every file now rather than when it is read.

    Raises `NotABundle`, or `BundleDamaged` naming the file, what was expected and what was found.
    """
    folder = storage.open_storage(uri)
    if not folder.exists(MANIFEST_FILE):
        raise NotABundle(
            f"{redact(uri)} is not a bundle: it has no {MANIFEST_FILE}; iab-vision export makes one"
        )
    payload = _read_limited(folder, MANIFEST_FILE)
    manifest = Manifest.from_json(payload)
    for name in (LABELS_FILE, MODEL_FILES["fp32"]):
        if name not in manifest.files:
            raise BundleDamaged(f"{MANIFEST_FILE} does not list {name}")
    if verify:
        for name in manifest.files.keys() - {LABELS_FILE}:
            _verify(folder, name, manifest.files[name])
    labels = read_labels(_read_verified(folder, LABELS_FILE, manifest.files[LABELS_FILE]))
    if tuple(labels["id"].to_pylist()) != manifest.model.class_ids:
        raise BundleDamaged(f"{LABELS_FILE} holds other classes, or another order, than {MANIFEST_FILE}")
    return Bundle(
        uri, manifest, hashlib.sha256(payload).hexdigest(), labels, tuple(_read_certificates(folder))
    )


def write_bundle(uri: str, files: Mapping[str, bytes], manifest: Manifest) -> None:
    """Write a new bundle without certificates: the files, then the manifest."""
    folder = storage.open_storage(uri)
    for name, payload in files.items():
        folder.put(name, payload)
    folder.put(MANIFEST_FILE, manifest.to_json())


def copy_bundle(bundle: Bundle, uri: str) -> None:
    """Copy a bundle to another folder, its files verified again; the certificate of fp32 on cpu is last."""
    source, target = storage.open_storage(bundle.uri), storage.open_storage(uri)
    for name, expected in bundle.manifest.files.items():
        target.put(name, _read_verified(source, name, expected))
    last = f"{CERTIFICATES}/cpu-fp32.json"
    paths = sorted((entry.path for entry in source.list(CERTIFICATES)), key=lambda path: path == last)
    for path in (MANIFEST_FILE, *paths):
        target.put(path, source.read(path))


def add_certificate(
    uri: str, manifest: Manifest, provider: Provider, precision: Precision, content: Mapping[str, Any]
) -> None:
    """Write or replace one certificate, bound to the hashes of the manifest and of the model file."""
    document = {
        **content,
        "provider": provider,
        "precision": precision,
        "manifest_sha256": hashlib.sha256(manifest.to_json()).hexdigest(),
        "model_sha256": manifest.files[MODEL_FILES[precision]].sha256,
    }
    storage.open_storage(uri).put(f"{CERTIFICATES}/{provider}-{precision}.json", seal(document))


def labels_bytes(labels: pa.Table) -> bytes:
    """`labels.parquet` of a table of schema `LABELS`; the same table gives the same bytes."""
    sink = pa.BufferOutputStream()
    pq.write_table(labels.cast(LABELS), sink, compression="zstd")
    return bytes(sink.getvalue())


def read_labels(payload: bytes) -> pa.Table:
    """The table behind the bytes of `labels.parquet`, in the order of the graph's outputs."""
    try:
        labels = pq.ParquetFile(pa.BufferReader(payload)).read()  # read_table imports pandas, half a second
        labels = labels.select(LABELS.names).cast(LABELS)
    except (pa.ArrowException, KeyError) as error:
        raise BundleDamaged(f"{LABELS_FILE} is not a table of {LABELS.names}: {error}") from error
    if labels["class_index"].to_pylist() != list(range(labels.num_rows)):
        raise BundleDamaged(f"{LABELS_FILE} is not in the order of class_index 0, 1, …")
    return labels


def _read_certificates(folder: storage.Storage) -> Iterator[Certificate]:
    for entry in folder.list(CERTIFICATES):
        if entry.path.endswith(".json"):
            yield Certificate.from_json(_read_limited(folder, entry.path), entry.path)


def _read_limited(folder: storage.Storage, path: str) -> bytes:
    size = folder.size(path)
    if size > MAX_JSON_BYTES:
        raise BundleDamaged(f"{path} has {size} bytes; the limit is {MAX_JSON_BYTES}")
    return bytes(folder.read(path))


def _verify(folder: storage.Storage, name: str, expected: FileRecord) -> None:
    """One file at a time, each read once: of a bundle of three precisions, the largest is held in memory."""
    payload = _read_verified(folder, name, expected)
    if name in MODEL_FILES.values():
        check_graph(payload, name)


def _read_verified(folder: storage.Storage, name: str, expected: FileRecord) -> bytes:
    if not folder.exists(name):
        raise BundleDamaged(f"{name} is missing; the manifest expects {expected.bytes} bytes")
    if (size := folder.size(name)) != expected.bytes:
        raise BundleDamaged(f"{name} has {size} bytes; the manifest expects {expected.bytes}")
    payload = bytes(folder.read(name))
    if (found := hashlib.sha256(payload).hexdigest()) != expected.sha256:
        raise BundleDamaged(
            f"{name} was altered: its sha256 is {found}; the manifest expects {expected.sha256}"
        )
    return payload
