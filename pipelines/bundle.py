"""A bundle: the folder that holds one released model and the proof that it may run.

Reads, verifies and writes `manifest.json`, the ONNX files, `labels.parquet` and `certificates/`
(layout: README). Nothing is parsed before its hash agrees with the manifest, nothing is
unpickled, and every byte handed out was hashed in memory first. It deliberately runs no model:
`runtime.py` does.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Self

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines import storage, taxonomy
from pipelines.specs import ImageSpec, Precision, Provider
from pipelines.taxonomy import Taxonomy

FORMAT_VERSION = 1
MODEL_FILES: dict[Precision, str] = {
    "fp32": "model.onnx",
    "fp16": "model.fp16.onnx",
    "int8": "model.int8.onnx",
}
LABELS_FILE = "labels.parquet"
TAXONOMY_FILE = "taxonomy.csv"
"""Only where the taxonomy is a table of the user's own."""
MANIFEST_FILE = "manifest.json"
FLAT = "labels"
"""Taxonomy of a bundle whose ids are the labels themselves."""
CERTIFICATES = "certificates"
MARKER = f"{CERTIFICATES}/cpu-fp32.json"
"""Written last by an export: without it the export did not finish."""

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
MAX_FILE_BYTES = (2 << 30) - 1
"""Protobuf cannot hold more in one message, so no ONNX file of ours is larger."""
_PLAIN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


class NotABundle(ValueError):
    """The folder holds no bundle, or one of a format that this version cannot read."""


class BundleDamaged(ValueError):
    """A file of the bundle is missing, truncated or altered."""


class NotCertified(ValueError):
    """No passing certificate covers the provider and precision asked for."""


@dataclass(frozen=True)
class FileRecord:
    """What one file of the bundle must be."""

    sha256: str
    bytes: int


@dataclass(frozen=True)
class Manifest:
    """Everything about the model that its users need; its content determines `model_id`."""

    image_spec: ImageSpec
    """How bytes become the pixels that the graph takes."""
    taxonomy: str
    """Name of the taxonomy that the class ids belong to."""
    cattax: int
    """The taxonomy's AdCOM number."""
    multi_label: bool
    """Whether the probabilities are independent (sigmoid) rather than a distribution (softmax)."""
    thresholds: Mapping[str, float]
    """Least probability, by class id, at which an image is given the class in `cat`."""
    temperatures: Mapping[str, float]
    """By precision: what the logits are divided by inside the graph."""
    opset: int
    """ONNX opset of the portable graph."""
    ir_version: int
    """ONNX IR version of every graph."""
    versions: Mapping[str, str]
    """Libraries that made the bundle."""
    source: Mapping[str, Any]
    """Where the checkpoint came from: architecture, sha256 of its weights, licence."""
    files: Mapping[str, FileRecord]
    """Every other file of the bundle, certificates apart."""
    format_version: int = FORMAT_VERSION
    model_id: str = field(init=False)
    """Short hash of all of the above."""

    def __post_init__(self) -> None:
        canonical = json.dumps(self._content(), sort_keys=True, separators=(",", ":"), allow_nan=False)
        object.__setattr__(self, "model_id", hashlib.sha256(canonical.encode()).hexdigest()[:16])

    def _content(self) -> dict[str, Any]:
        content = {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "model_id"}
        content["image_spec"] = asdict(self.image_spec)
        content["files"] = {name: asdict(record) for name, record in self.files.items()}
        return content

    def to_json(self) -> bytes:
        """The bytes of `manifest.json`."""
        document = {"model_id": self.model_id, **self._content()}
        return (json.dumps(document, indent=2, sort_keys=True, allow_nan=False) + "\n").encode()

    @classmethod
    def from_json(cls, payload: bytes) -> Self:
        """Parse `manifest.json`; raises `NotABundle` or `BundleDamaged`."""
        document = _parse_json(payload, MANIFEST_FILE)
        version = document.pop("format_version", None)
        if version != FORMAT_VERSION:
            raise NotABundle(
                f"{MANIFEST_FILE} has format_version {version!r}; this iab-vision reads {FORMAT_VERSION}"
            )
        stated_id = document.pop("model_id", None)
        try:
            spec = document.pop("image_spec")
            colours = {"mean": tuple(spec["mean"]), "std": tuple(spec["std"])}
            document["image_spec"] = ImageSpec(**{**spec, **colours})
            document["files"] = {name: FileRecord(**record) for name, record in document["files"].items()}
            manifest = cls(**document)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise BundleDamaged(f"{MANIFEST_FILE} is not a manifest of format {version}: {error}") from error
        manifest._check(stated_id)
        return manifest

    def _check(self, stated_id: str | None) -> None:
        if self.model_id != stated_id:
            raise BundleDamaged(
                f"{MANIFEST_FILE} was altered: it says model_id {stated_id}, its content {self.model_id}"
            )
        for name, record in self.files.items():
            if not _PLAIN_NAME.fullmatch(name):
                raise BundleDamaged(
                    f"{MANIFEST_FILE} lists {name!r}; a bundle's files lie directly in its folder"
                )
            if not 0 <= record.bytes <= MAX_FILE_BYTES:
                raise BundleDamaged(
                    f"{MANIFEST_FILE} says {name} has {record.bytes} bytes; the limit is {MAX_FILE_BYTES}"
                )


@dataclass(frozen=True)
class Certificate:
    """One parity measurement of one file on one provider (`export/parity.py` makes them)."""

    provider: Provider
    precision: Precision
    passed: bool
    manifest_sha256: str
    model_sha256: str
    content: Mapping[str, Any]
    """The whole document: limits, metrics, environment, worst images."""

    @property
    def name(self) -> str:
        """Path of the certificate inside the bundle."""
        return f"{CERTIFICATES}/{self.provider}-{self.precision}.json"

    @classmethod
    def from_json(cls, payload: bytes, path: str) -> Self:
        """Parse a certificate; raises `BundleDamaged`."""
        document = _parse_json(payload, path)
        try:
            keys = ("provider", "precision", "manifest_sha256", "model_sha256")
            provider, precision, manifest_sha256, model_sha256 = (document[key] for key in keys)
            certificate = cls(
                provider, precision, document["passed"] is True, manifest_sha256, model_sha256, document
            )
        except KeyError as error:
            raise BundleDamaged(f"{path} is not a certificate: it has no {error}") from error
        if certificate.name != path:
            raise BundleDamaged(f"{path} speaks of {certificate.provider}-{certificate.precision}")
        return certificate


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
    def image_spec(self) -> ImageSpec:
        return self.manifest.image_spec

    @property
    def taxonomy_name(self) -> str:
        return self.manifest.taxonomy

    @property
    def cattax(self) -> int:
        return self.manifest.cattax

    @property
    def thresholds(self) -> Mapping[str, float]:
        return self.manifest.thresholds

    @property
    def multi_label(self) -> bool:
        return self.manifest.multi_label

    @property
    def class_ids(self) -> list[str]:
        """Class ids in the order of the graph's outputs."""
        return list(self.labels["id"].to_pylist())

    def taxonomy(self) -> Taxonomy:
        """The taxonomy that the classes belong to, as it was when the bundle was made."""
        if self.taxonomy_name == FLAT:
            return taxonomy.flat(self.class_ids)
        record = self.manifest.files.get(TAXONOMY_FILE)
        if record is None:
            return taxonomy.load(self.taxonomy_name)
        payload = _read_verified(storage.open_storage(self.uri), TAXONOMY_FILE, record)
        version = hashlib.sha256(payload).hexdigest()[:12]
        return Taxonomy(self.taxonomy_name, version, self.cattax, taxonomy.parse(payload.decode()))

    def model_bytes(self, precision: Precision, provider: Provider = "cpu") -> bytes:
        """The verified bytes of the ONNX file that `provider` runs for `precision`."""
        name = model_file(precision, provider)
        if name not in self.manifest.files:
            held = [p for p, file in MODEL_FILES.items() if file in self.manifest.files]
            raise NotCertified(
                f"{storage.redact(self.uri)} holds no {precision} model (it holds {', '.join(held)}); "
                f"export it again with --precisions {','.join([*held, precision])}"
            )
        return _read_verified(storage.open_storage(self.uri), name, self.manifest.files[name])

    def certificate_for(self, provider: Provider, precision: Precision) -> Certificate:
        """The passing certificate that covers `precision` on `provider`; raises `NotCertified`."""
        model = self.manifest.files.get(model_file(precision, provider))
        wanted = f"{CERTIFICATES}/{provider}-{precision}.json"
        found = next((c for c in self.certificates if c.name == wanted), None)
        uri = storage.redact(self.uri)
        if found is None or model is None:
            reason = f"{uri} has no certificate for {precision} on {provider} (it has: {self._certified()})"
        elif not found.passed:
            reason = f"{uri}/{wanted} says that {precision} on {provider} failed parity"
        elif (found.manifest_sha256, found.model_sha256) != (self.manifest_sha256, model.sha256):
            reason = f"{uri}/{wanted} was made for another model or manifest than this one"
        else:
            return found
        raise NotCertified(
            f"{reason}. Make one on a machine that has the provider: iab-vision certify {uri} --images URI "
            f"--provider {provider} --precisions {precision}"
        )

    def _certified(self) -> str:
        return ", ".join(f"{c.provider}-{c.precision}" for c in self.certificates if c.passed) or "none"


def model_file(precision: Precision, provider: Provider = "cpu") -> str:
    """Name of the ONNX file that `provider` runs for `precision`.

    TensorRT lowers the portable float32 graph to fp16 itself: its parser does not know the fused
    operators of the fp16 file, which are written for the CUDA provider.
    """
    return MODEL_FILES["fp32" if provider == "tensorrt" else precision]


def open_bundle(uri: str, *, verify: bool = True) -> Bundle:
    """Open the bundle at `uri`; `verify` hashes every file now rather than when it is read.

    Raises `NotABundle`, or `BundleDamaged` naming the file, what was expected and what was found.
    """
    folder = storage.open_storage(uri)
    if not folder.exists(MANIFEST_FILE):
        raise NotABundle(
            f"{storage.redact(uri)} is not a bundle: it has no {MANIFEST_FILE}; iab-vision export makes one"
        )
    payload = _read_limited(folder, MANIFEST_FILE)
    manifest = Manifest.from_json(payload)
    for name in (LABELS_FILE, MODEL_FILES["fp32"]):
        if name not in manifest.files:
            raise BundleDamaged(f"{MANIFEST_FILE} does not list {name}")
    if verify:
        for name, record in manifest.files.items():
            _verify(folder, name, record)
    labels = _read_labels(_read_verified(folder, LABELS_FILE, manifest.files[LABELS_FILE]))
    return Bundle(
        uri, manifest, hashlib.sha256(payload).hexdigest(), labels, tuple(_read_certificates(folder))
    )


def write_bundle(
    uri: str,
    files: Mapping[str, bytes],
    manifest: Manifest,
    certificates: Mapping[tuple[Provider, Precision], Mapping[str, Any]],
) -> None:
    """Write a new bundle: the files, then the manifest, then the certificates, `cpu-fp32` last."""
    folder = storage.open_storage(uri)
    for name, payload in files.items():
        folder.put(name, payload)
    folder.put(MANIFEST_FILE, manifest.to_json())
    for (provider, precision), content in sorted(
        certificates.items(), key=lambda entry: entry[0] == ("cpu", "fp32")
    ):
        add_certificate(uri, manifest, provider, precision, content)


def add_certificate(
    uri: str, manifest: Manifest, provider: Provider, precision: Precision, content: Mapping[str, Any]
) -> None:
    """Write or replace one certificate, bound to the manifest and the model file that it speaks of."""
    document = {
        "provider": provider,
        "precision": precision,
        "manifest_sha256": hashlib.sha256(manifest.to_json()).hexdigest(),
        "model_sha256": manifest.files[model_file(precision, provider)].sha256,
        **content,
    }
    payload = (json.dumps(document, indent=2, allow_nan=False) + "\n").encode()
    storage.open_storage(uri).put(f"{CERTIFICATES}/{provider}-{precision}.json", payload)


def record(payload: bytes) -> FileRecord:
    """The manifest's entry for a file of these bytes."""
    return FileRecord(hashlib.sha256(payload).hexdigest(), len(payload))


def labels_bytes(labels: pa.Table) -> bytes:
    """`labels.parquet` of a table of schema `LABELS`; the same table gives the same bytes."""
    sink = pa.BufferOutputStream()
    pq.write_table(labels.cast(LABELS), sink, compression="zstd")
    return bytes(sink.getvalue())


def _read_labels(payload: bytes) -> pa.Table:
    try:
        labels = pq.read_table(pa.BufferReader(payload))
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
    """Hash a file in pieces: verifying a bundle of three precisions must not hold them in memory."""
    _check_size(folder, name, expected)
    digest = hashlib.sha256()
    with folder.open_input(name) as stream:
        while piece := stream.read(8 << 20):
            digest.update(piece)
    _check_hash(name, expected, digest.hexdigest())


def _read_verified(folder: storage.Storage, name: str, expected: FileRecord) -> bytes:
    _check_size(folder, name, expected)
    payload = bytes(folder.read(name))
    _check_hash(name, expected, hashlib.sha256(payload).hexdigest())
    return payload


def _check_size(folder: storage.Storage, name: str, expected: FileRecord) -> None:
    if not folder.exists(name):
        raise BundleDamaged(f"{name} is missing; the manifest expects {expected.bytes} bytes")
    found = folder.size(name)
    if found != expected.bytes:
        raise BundleDamaged(f"{name} has {found} bytes; the manifest expects {expected.bytes}")


def _check_hash(name: str, expected: FileRecord, found: str) -> None:
    if found != expected.sha256:
        raise BundleDamaged(
            f"{name} was altered: its sha256 is {found}; the manifest expects {expected.sha256}"
        )


def _parse_json(payload: bytes, name: str) -> dict[str, Any]:
    try:
        document = json.loads(payload)
    except (ValueError, RecursionError) as error:
        raise BundleDamaged(f"{name} is not JSON: {error}") from error
    if not isinstance(document, dict):
        raise BundleDamaged(f"{name} holds a {type(document).__name__}; expected an object")
    return document
