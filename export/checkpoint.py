"""A trained checkpoint folder -> what export needs to know about it, and the network itself.

Reads `run/`, `run/best/` or any Hugging Face image classifier: `config.json`, safetensors weights,
`preprocessor_config.json`, and `iab_vision.json` where training wrote one. Pickled weights are refused.
"""

import hashlib
import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.bundle.bundle import FLAT
from pipelines.messages import redact
from pipelines.specs import ImageSpec
from pipelines.storage import storage, uris
from pipelines.taxonomy import taxonomy
from pipelines.taxonomy.taxonomy import Taxonomy

NOT_STATED = "not stated"
"""Licence of a checkpoint that names none."""
_FILES = ("config.json", "preprocessor_config.json", "iab_vision.json")
_RESAMPLE = {2: "bilinear", 3: "bicubic"}
"""Pillow's numbers, as Hugging Face writes them."""


class UnusableCheckpoint(ValueError):
    """The folder is not an image classifier that can be exported."""


@dataclass(frozen=True)
class Checkpoint:
    """An image classifier on this machine's disk; the network is loaded when asked for."""

    folder: Path
    source: str
    """Where it came from, without credentials."""
    sha256: str
    """Over the configuration and the weights."""
    config: Mapping[str, Any]
    class_ids: tuple[str, ...]
    """Ids in the order of the network's outputs."""
    taxonomy: Taxonomy
    taxonomy_table: bytes | None
    """The user's own table, which must travel with the bundle; None for a built-in one or flat labels."""
    image_spec: ImageSpec
    temperature: float
    thresholds: Mapping[str, float]
    multi_label: bool

    @property
    def architecture(self) -> str:
        return str((self.config.get("architectures") or [self.config.get("model_type")])[0])

    @property
    def licence(self) -> str:
        return str(self.config.get("license") or NOT_STATED)

    def network(self, attention: str = "eager") -> Any:
        """The transformers model in float32 and evaluation mode."""
        import torch
        from transformers import AutoConfig, AutoModelForImageClassification
        from transformers.utils import logging as transformers_logging

        transformers_logging.disable_progress_bar()
        config = AutoConfig.from_pretrained(self.folder, local_files_only=True)
        known = {"eager"} if not _has_attention(config) else {attention}
        network = AutoModelForImageClassification.from_pretrained(
            self.folder,
            config=config,
            attn_implementation=known.pop(),
            dtype=torch.float32,
            use_safetensors=True,
            local_files_only=True,
        )
        return network.eval()


@contextmanager
def opened(uri: str) -> Iterator[Checkpoint]:
    """The checkpoint at `uri`; a remote one is held in a temporary folder meanwhile.

    Raises:
        UnusableCheckpoint: no image classifier, no safetensors, or labels that the taxonomy lacks.
    """
    folder = storage.open_storage(uri)
    if not folder.exists("config.json") and folder.exists("best/config.json"):
        uri = uris.join(uri, "best")
    if uris.is_local(uri):
        yield read(uris.local_path(uri), redact(uri))
        return
    with tempfile.TemporaryDirectory(prefix="iab-vision-checkpoint-") as local:
        _download(uri, Path(local))
        yield read(Path(local), redact(uri))


def read(folder: Path, source: str) -> Checkpoint:
    """The checkpoint in a local folder."""
    config = _json(folder / "config.json")
    if config is None:
        raise UnusableCheckpoint(f"{source} holds no config.json; give a run folder or its best/")
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise UnusableCheckpoint(f"{source} holds no *.safetensors; pickled weights are not read")
    ours = _json(folder / "iab_vision.json") or {}
    class_ids = _class_ids(config, ours, source)
    name = str(ours.get("taxonomy", FLAT))
    return Checkpoint(
        folder=folder,
        source=source,
        sha256=_sha256([*(folder / name for name in _FILES), *weights]),
        config=config,
        class_ids=class_ids,
        taxonomy=_taxonomy(name, class_ids),
        taxonomy_table=None if _is_known(name) else taxonomy.read_table(name).encode(),
        image_spec=_image_spec(folder, config, ours),
        temperature=float(ours.get("temperature", 1.0)),
        thresholds=dict(ours.get("thresholds", {})),
        multi_label=bool(ours.get("multi_label", config.get("problem_type") == "multi_label_classification")),
    )


def _class_ids(config: Mapping[str, Any], ours: Mapping[str, Any], source: str) -> tuple[str, ...]:
    id2label = config.get("id2label") or {}
    try:
        labels = [id2label[str(index)] for index in range(len(id2label))]
    except KeyError as error:
        raise UnusableCheckpoint(f"{source}: id2label of config.json has no index {error}") from error
    if not labels:
        raise UnusableCheckpoint(f"{source}: config.json has no id2label; it is not an image classifier")
    if len(set(labels)) != len(labels):
        raise UnusableCheckpoint(f"{source}: id2label of config.json names a label twice")
    stated = ours.get("class_ids", labels)
    if ours.get("labels_are_ids", True) and list(stated) != labels:
        raise UnusableCheckpoint(
            f"{source}: class_ids of iab_vision.json differ from id2label of config.json"
        )
    return tuple(map(str, stated))


def _taxonomy(name: str, class_ids: tuple[str, ...]) -> Taxonomy:
    found = taxonomy.flat(class_ids) if name == FLAT else taxonomy.load(name)
    for class_id in class_ids:
        if class_id not in found:
            raise UnusableCheckpoint(f"class {class_id!r} of the checkpoint is not an id of {found.name}")
    return found


def _is_known(name: str) -> bool:
    return name in (FLAT, taxonomy.VECTORS) or name.removeprefix("iab-content-") in taxonomy.CATTAX


def _image_spec(folder: Path, config: Mapping[str, Any], ours: Mapping[str, Any]) -> ImageSpec:
    if "image_spec" in ours:
        spec = dict(ours["image_spec"])
        return ImageSpec(**{**spec, "mean": tuple(spec["mean"]), "std": tuple(spec["std"])})
    processor = _json(folder / "preprocessor_config.json")
    if processor is None:
        height, width = _sides(config.get("image_size", 224))
        return ImageSpec(height=height, width=width)
    return image_spec_of(processor)


def image_spec_of(processor: Mapping[str, Any]) -> ImageSpec:
    """The ImageSpec that a Hugging Face `preprocessor_config.json` describes; refuses what it cannot say."""
    size = processor.get("size", 224)
    cropped = processor.get("do_center_crop", False)
    shorter = size.get("shortest_edge") if isinstance(size, dict) else None
    target = _sides(processor["crop_size"] if cropped else size)
    if cropped and (shorter or min(_sides(size))) != min(target):
        raise UnusableCheckpoint(
            f"preprocessor_config.json resizes to {size} and crops {target}; here the crop takes the whole "
            "shorter side. Write an iab_vision.json with the image_spec to use beside it"
        )
    resample = _RESAMPLE.get(processor.get("resample", 2))
    if resample is None:
        raise UnusableCheckpoint(
            f"preprocessor_config.json has resample {processor['resample']}; known are {_RESAMPLE}"
        )
    normalised = processor.get("do_normalize", True)
    return ImageSpec(
        height=target[0],
        width=target[1],
        fit="crop" if cropped or shorter else "stretch",
        resample=resample,  # type: ignore[arg-type]
        mean=tuple(processor.get("image_mean", (0.5, 0.5, 0.5))) if normalised else (0.0, 0.0, 0.0),
        std=tuple(processor.get("image_std", (0.5, 0.5, 0.5))) if normalised else (1.0, 1.0, 1.0),
    )


def _sides(size: Any) -> tuple[int, int]:
    if isinstance(size, dict):
        side = size.get("shortest_edge")
        return (int(side), int(side)) if side else (int(size["height"]), int(size["width"]))
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    return int(height), int(width)


def _has_attention(config: Any) -> bool:
    return hasattr(config, "num_attention_heads") or hasattr(config, "num_heads")


def _json(path: Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UnusableCheckpoint(f"{path.name} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise UnusableCheckpoint(f"{path.name} holds a {type(content).__name__}; expected an object")
    return content


def _sha256(paths: list[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        if path.exists():
            with path.open("rb") as file:
                digest.update(f"{path.name}:{hashlib.file_digest(file, 'sha256').hexdigest()};".encode())
    return digest.hexdigest()


def _download(uri: str, folder: Path) -> None:
    """The files that `read` looks at; other checkpoints in folders below it stay where they are."""
    remote = storage.open_storage(uri)
    for name in [entry.path for entry in remote.list() if "/" not in entry.path]:
        if name in _FILES or name.endswith((".safetensors", ".safetensors.index.json")):
            (folder / name).write_bytes(remote.read(name))
