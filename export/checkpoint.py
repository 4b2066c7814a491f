"""A trained checkpoint folder -> what export needs to know about it, and the network itself.

Reads `run/`, `run/best/` or any Hugging Face image classifier: `config.json`, safetensors weights,
`preprocessor_config.json`, and `iab_vision.json` where training wrote one. Pickled weights are refused.
"""

import hashlib
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.messages import InputError, first_line, redact
from pipelines.specs import ModelSpec
from pipelines.storage import storage, uris
from pipelines.taxonomy import taxonomy
from pipelines.taxonomy.taxonomy import Taxonomy
from pipelines.training import model_files

NOT_STATED = "not stated"
"""Licence of a checkpoint that names none."""
_FILES = (model_files.CONFIG, model_files.PREPROCESSOR, model_files.SIDECAR)


@dataclass(frozen=True)
class Checkpoint:
    """An image classifier on this machine's disk; the network is loaded when asked for."""

    folder: Path
    source: str
    """Where it came from, without credentials."""
    sha256: str
    """Over the configuration and the weights."""
    config: Mapping[str, Any]
    spec: ModelSpec
    taxonomy: Taxonomy
    taxonomy_table: bytes | None
    """The user's own table, which the bundle must hold; None for a built-in one or flat labels."""

    @property
    def architecture(self) -> str:
        return str((self.config.get("architectures") or [self.config.get("model_type")])[0])

    @property
    def licence(self) -> str:
        return str(self.config.get("license") or NOT_STATED)

    def files(self) -> dict[str, bytes]:
        """What `network` is made of, by name, to be sent elsewhere."""
        return {path.name: path.read_bytes() for path in self.folder.iterdir() if _is_needed(path.name)}

    def network(self, attention: str = "eager") -> Any:
        """The transformers model in float32 and evaluation mode."""
        import torch
        from transformers import AutoConfig, AutoModelForImageClassification
        from transformers.utils import logging as transformers_logging

        transformers_logging.disable_progress_bar()
        try:
            config = AutoConfig.from_pretrained(self.folder, local_files_only=True)
            network = AutoModelForImageClassification.from_pretrained(
                self.folder,
                config=config,
                attn_implementation=attention if _has_attention(config) else "eager",
                dtype=torch.float32,
                use_safetensors=True,
                local_files_only=True,
            )
        except (OSError, ValueError) as error:  # an unknown model type, a file that is not what it says
            raise InputError(f"{self.source} cannot be loaded: {first_line(error)}") from error
        return network.eval()


@contextmanager
def open_checkpoint(uri: str) -> Iterator[Checkpoint]:
    """The checkpoint at `uri`; a remote one is held in a temporary folder meanwhile.

    Raises:
        InputError: no image classifier, no safetensors, or labels that the taxonomy lacks.
    """
    folder = storage.open_storage(uri)
    if not folder.exists("config.json") and folder.exists("best/config.json"):
        uri = uris.join(uri, "best")
    if uris.is_local(uri):
        yield read_checkpoint(uris.local_path(uri), redact(uri))
        return
    with tempfile.TemporaryDirectory(prefix="iab-vision-checkpoint-") as local:
        _download(uri, Path(local))
        yield read_checkpoint(Path(local), redact(uri))


def read_checkpoint(folder: Path, source: str) -> Checkpoint:
    """The checkpoint in a local folder."""
    spec = model_files.read_model_spec(folder, source)
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise InputError(f"{source} holds no *.safetensors; pickled weights are not read")
    return Checkpoint(
        folder=folder,
        source=source,
        sha256=_sha256([*(folder / name for name in _FILES), *weights]),
        config=model_files.read_json(folder / model_files.CONFIG) or {},
        spec=spec,
        taxonomy=_taxonomy(spec.taxonomy, spec.class_ids),
        taxonomy_table=None if _is_known(spec.taxonomy) else taxonomy.read_table(spec.taxonomy).encode(),
    )


def _taxonomy(name: str, class_ids: tuple[str, ...]) -> Taxonomy:
    found = taxonomy.load(name, labels=class_ids)
    for class_id in class_ids:
        if class_id not in found:
            raise InputError(f"class {class_id!r} of the checkpoint is not an id of {found.name}")
    return found


def _is_known(name: str) -> bool:
    return name in (taxonomy.FLAT, taxonomy.VECTORS) or name.removeprefix("iab-content-") in taxonomy.CATTAX


def _has_attention(config: Any) -> bool:
    return hasattr(config, "num_attention_heads") or hasattr(config, "num_heads")


def _sha256(paths: list[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        if path.exists():
            with path.open("rb") as file:
                digest.update(f"{path.name}:{hashlib.file_digest(file, 'sha256').hexdigest()};".encode())
    return digest.hexdigest()


def _is_needed(name: str) -> bool:
    return name in _FILES or name.endswith((".safetensors", ".safetensors.index.json"))


def _download(uri: str, folder: Path) -> None:
    """The files that `read_checkpoint` looks at, without other checkpoints in folders below it."""
    remote = storage.open_storage(uri)
    for name in [entry.path for entry in remote.list() if "/" not in entry.path]:
        if _is_needed(name):
            (folder / name).write_bytes(remote.read(name))
