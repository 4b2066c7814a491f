"""What a bundle says of itself: `manifest.json`, the certificates, and the errors of a damaged bundle.

Parses and checks documents; it opens no folder and runs no model.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Annotated, Any, Self

from pydantic import Field, StrictInt, StrictStr, StringConstraints, ValidationError

from pipelines.messages import InputError
from pipelines.specs import ModelSpec, Precision, Provider, validated, wrong_settings

FORMAT_VERSION = 3
MANIFEST_FILE = "manifest.json"
CERTIFICATES = "certificates"
MODEL_FILES: dict[Precision, str] = {
    "fp32": "model.onnx",
    "fp16": "model.fp16.onnx",
    "int8": "model.int8.onnx",
}
MAX_FILE_BYTES = (2 << 30) - 1
"""Protobuf cannot hold more in one message, so no ONNX file of ours is larger."""
FileName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")]
"""All files are directly in the folder of the bundle."""


class NotABundle(InputError):
    """The folder holds no bundle, or one of a format that this version cannot read."""


class BundleDamaged(InputError):
    """A file of the bundle is missing, truncated or altered."""


class NotCertified(InputError):
    """No passing certificate covers the provider and precision asked for."""


@validated
class FileRecord:
    """What one file of the bundle must be."""

    sha256: StrictStr
    bytes: Annotated[StrictInt, Field(ge=0, le=MAX_FILE_BYTES)]


@validated
class Manifest:
    """Everything about the model that its users need; its content determines `model_id`."""

    model: ModelSpec
    """What the model takes and what its outputs mean; its taxonomy is named, never a path."""
    cattax: int
    """The taxonomy's AdCOM number."""
    temperatures: dict[str, float]
    """By precision: what the logits are divided by inside the graph."""
    opset: int
    """ONNX opset of the portable graph."""
    ir_version: int
    """ONNX IR version of every graph."""
    versions: dict[str, str]
    """Libraries that made the bundle."""
    source: dict[str, Any]
    """Where the checkpoint came from: architecture, sha256 of its weights, licence."""
    files: dict[FileName, FileRecord]
    """Every other file of the bundle, certificates apart."""
    format_version: int = FORMAT_VERSION

    @cached_property
    def model_id(self) -> str:
        """Short hash of all of the above."""
        return _digest(asdict(self))[:16]

    def to_json(self) -> bytes:
        """The bytes of `manifest.json`."""
        document = {"model_id": self.model_id, **asdict(self)}
        return (json.dumps(document, indent=2, sort_keys=True, allow_nan=False) + "\n").encode()

    @classmethod
    def from_json(cls, payload: bytes) -> Self:
        """Parse `manifest.json`; raises `NotABundle` or `BundleDamaged`."""
        document = parse_json(payload, MANIFEST_FILE)
        version = document.get("format_version")
        if version != FORMAT_VERSION:
            raise NotABundle(
                f"{MANIFEST_FILE} has format_version {version!r}; this iab-vision reads {FORMAT_VERSION}. "
                "Make the bundle again: iab-vision export --checkpoint RUN --images URI --output BUNDLE"
            )
        stated_id = document.pop("model_id", None)
        try:
            manifest = cls(**document)
        except ValidationError as error:
            told = wrong_settings(error)
            raise BundleDamaged(f"{MANIFEST_FILE} is not a manifest of format {version}: {told}") from error
        if manifest.model_id != stated_id:
            raise BundleDamaged(
                f"{MANIFEST_FILE} was altered: it says model_id {stated_id}, its content {manifest.model_id}"
            )
        return manifest


@dataclass(frozen=True)
class Certificate:
    """One parity measurement of one file on one provider (`iab-vision export` and `certify` make them)."""

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
        """Parse a certificate; raises `BundleDamaged` when it is none, was altered or contradicts itself.

        Its sha256 finds damage and careless edits. It is a checksum and no signature: whoever can write
        into the bundle can make another.
        """
        document = parse_json(payload, path)
        keys = ("provider", "precision", "passed", "manifest_sha256", "model_sha256")
        try:
            stated, failures = document.pop("sha256"), document["failures"]
            certificate = cls(**{key: document[key] for key in keys}, content=document)
        except KeyError as error:
            raise BundleDamaged(f"{path} is not a certificate: it has no {error}") from error
        if stated != (found := _digest(document)):
            raise BundleDamaged(
                f"{path} was altered: it says sha256 {stated}, its content has {found}; "
                "remove it, and make it again with iab-vision certify"
            )
        if certificate.passed is not (failures == []):
            raise BundleDamaged(
                f"{path} contradicts itself: passed is {certificate.passed!r}, failures are {failures!r}"
            )
        if certificate.name != path:
            raise BundleDamaged(f"{path} is of {certificate.provider}-{certificate.precision}")
        return certificate


def seal(document: Mapping[str, Any]) -> bytes:
    """A certificate's bytes: the document and, last, the sha256 of its content."""
    content = json.loads(json.dumps(document, allow_nan=False))
    return (json.dumps({**content, "sha256": _digest(content)}, indent=2) + "\n").encode()


def _digest(document: Mapping[str, Any]) -> str:
    canonical = json.dumps(document, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def record(payload: bytes) -> FileRecord:
    """The manifest's entry for a file of these bytes."""
    return FileRecord(hashlib.sha256(payload).hexdigest(), len(payload))


def parse_json(payload: bytes, name: str) -> dict[str, Any]:
    """The object in a JSON file of the bundle; raises `BundleDamaged`."""
    try:
        document = json.loads(payload)
    except (ValueError, RecursionError) as error:
        raise BundleDamaged(f"{name} is not JSON: {error}") from error
    if not isinstance(document, dict):
        raise BundleDamaged(f"{name} holds a {type(document).__name__}; expected an object")
    return document
