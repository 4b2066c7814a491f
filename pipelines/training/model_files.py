"""A model folder's JSON files <-> `ModelSpec` and `ImageSpec`: the one reader and the one writer of each.

`config.json` names the classes, `preprocessor_config.json` the pixels, both in Hugging Face's words;
`iab_vision.json` is ours and holds the whole `ModelSpec`. Weights are not read here.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from pipelines.messages import InputError
from pipelines.specs import ImageSpec, ModelSpec, wrong_settings
from pipelines.taxonomy.taxonomy import FLAT

Spec = TypeVar("Spec", ImageSpec, ModelSpec)

CONFIG, SIDECAR, PREPROCESSOR = "config.json", "iab_vision.json", "preprocessor_config.json"
"""Taxonomy of a model whose ids are the labels themselves."""
PIL_RESAMPLING = {"bilinear": 2, "bicubic": 3}
"""Values of PIL.Image.Resampling, as preprocessor_config.json spells them."""
VALUE_SETTINGS: dict[str, Any] = {
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "rescale_offset": False,
    "do_flip_channel_order": False,
}
"""What of the values of pixels an `ImageSpec` has no field for, and the setting that it stands for."""
UNDERSTOOD = {
    *VALUE_SETTINGS, "do_resize", "size", "resample", "do_center_crop", "crop_size", "crop_pct",
    "do_normalize", "image_mean", "image_std",
    # without effect on an RGB image
    "image_processor_type", "feature_extractor_type", "processor_class", "_processor_class", "do_convert_rgb",
    "data_format", "input_data_format", "default_to_square", "return_tensors", "_valid_processor_keys",
}  # fmt: skip
WARPED_FROM = 384
"""ConvNextImageProcessor squeezes the whole image from this size on, and ignores `crop_pct`."""


@dataclass(frozen=True)
class Preprocessing:
    """The pixels that a model was made for, as far as an `ImageSpec` can say."""

    spec: ImageSpec
    unlike: tuple[str, ...] = ()
    """Settings that the spec cannot say, such as `crop_pct 0.875`: they move the cut, not the values."""


def write_model(model: Any, folder: Path, spec: ModelSpec) -> None:
    """config.json, model.safetensors, preprocessor_config.json and iab_vision.json in a local folder."""
    model.save_pretrained(folder)
    (folder / PREPROCESSOR).write_text(json.dumps(preprocessor_config(spec.image_spec), indent=2))
    (folder / SIDECAR).write_text(sidecar_json(spec))


def sidecar_json(spec: ModelSpec) -> str:
    """The text of `iab_vision.json`."""
    return json.dumps({**asdict(spec), "labels_are_ids": True}, indent=2) + "\n"


def preprocessor_config(spec: ImageSpec) -> dict[str, Any]:
    """The spec for users of plain transformers; a crop that is no square is as near as theirs come."""
    size = {"height": spec.height, "width": spec.width}
    cropped = spec.fit == "crop"
    return {
        "image_processor_type": "CLIPImageProcessorPil" if cropped else "ViTImageProcessorPil",
        "do_resize": True,
        "size": {"shortest_edge": min(spec.height, spec.width)} if cropped else size,
        **({"do_center_crop": True, "crop_size": size} if cropped else {}),
        "resample": PIL_RESAMPLING[spec.resample],
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(spec.mean),
        "image_std": list(spec.std),
    }


def read_model_spec(folder: Path, source: str) -> ModelSpec:
    """What the files of a local folder say; what they leave out has the defaults of `ModelSpec`.

    Args:
        source: name of the folder in messages.

    Raises:
        InputError: no image classifier, files that contradict each other, or preprocessing that
            `images.prepare` does not do.
    """
    config = read_json(folder / CONFIG)
    if config is None:
        seen = f"holds no {CONFIG}" if folder.is_dir() else "does not exist"
        raise InputError(f"{source} {seen}; give a run folder or its best/")
    ours = _read_sidecar(folder)
    found = read_preprocessing(folder)
    if found is None:
        height, width = _sides(config.get("image_size", 224))
        found = Preprocessing(ImageSpec(height=height, width=width))
    if found.unlike:
        raise InputError(
            f"{source}: {PREPROCESSOR} asks for {'; '.join(found.unlike)}, which is not done here. Put an "
            f"{SIDECAR} with the image_spec to use into the folder"
        )
    multi_label = config.get("problem_type") == "multi_label_classification"
    checked = {"class_ids": _class_ids(config, ours, source), "image_spec": found.spec}
    ours.pop("labels_are_ids", None)
    return _checked(ModelSpec, {"taxonomy": FLAT, "multi_label": multi_label, **ours, **checked})


def read_preprocessing(folder: Path) -> Preprocessing | None:
    """From `iab_vision.json`, else from `preprocessor_config.json`; None where the folder has neither.

    Raises:
        InputError: a setting that changes the pixels' values in a way that an `ImageSpec` cannot say.
    """
    ours = _read_sidecar(folder)
    if "image_spec" in ours:
        return Preprocessing(_checked(ImageSpec, ours["image_spec"]))
    processor = read_json(folder / PREPROCESSOR)
    return None if processor is None else parse_preprocessor(processor)


def parse_preprocessor(processor: Mapping[str, Any]) -> Preprocessing:
    """What a Hugging Face `preprocessor_config.json` describes; raises InputError as `read_preprocessing`."""
    for name, expected in VALUE_SETTINGS.items():
        value = processor.get(name)
        if value is not None and not math.isclose(value, expected, rel_tol=1e-3):
            raise InputError(
                f"{PREPROCESSOR} has {name} {value}; pixels are divided by 255 here ({name} {expected:.6g}). "
                f"Put an {SIDECAR} whose image_spec has the mean and std for that into the folder"
            )
    names = {number: name for name, number in PIL_RESAMPLING.items()}
    resample = names.get(processor.get("resample", PIL_RESAMPLING["bilinear"]))
    if resample is None:
        raise InputError(f"{PREPROCESSOR} has resample {processor['resample']}; known are {names}")
    (height, width), fit, unlike = _geometry(processor)
    unknown = [f"{k} {v}" for k, v in processor.items() if k not in UNDERSTOOD and v not in (None, False)]
    content = {"height": height, "width": width, "fit": fit, "resample": resample}
    colours = {"mean": processor.get("image_mean"), "std": processor.get("image_std")}
    if not processor.get("do_normalize", True):
        colours = {"mean": (0, 0, 0), "std": (1, 1, 1)}
    content |= {name: value for name, value in colours.items() if value is not None}
    return Preprocessing(_checked(ImageSpec, content), (*unlike, *unknown))


def _checked(kind: type[Spec], content: Mapping[str, Any]) -> Spec:
    """A spec of what a file says; raises InputError naming what is wrong."""
    try:
        return kind(**content)
    except ValidationError as error:
        raise InputError(f"the model's files: {wrong_settings(error)}") from error


def _geometry(processor: Mapping[str, Any]) -> tuple[tuple[int, int], Any, list[str]]:
    """Sides of the result, how it is fitted, and what of it cannot be said."""
    size: Any = processor.get("size", 224)
    size = {k: v for k, v in size.items() if v is not None} if isinstance(size, dict) else size
    cropped = processor.get("do_center_crop", False)
    is_side = cropped and isinstance(size, int)
    shorter: int | None = size if is_side else size.get("shortest_edge") if isinstance(size, dict) else None
    target = _sides(processor["crop_size"] if cropped and "crop_size" in processor else size)
    resized = shorter or min(_sides(size))
    unlike = [] if processor.get("do_resize", True) else ["do_resize False"]
    if cropped and resized != min(target):
        unlike.append(f"a size of {size} of which {target} is cut (do_center_crop)")
    if processor.get("crop_pct") is not None and shorter:
        if shorter >= WARPED_FROM:
            return target, "stretch", unlike
        unlike.append(f"crop_pct {processor['crop_pct']}")
    return target, "crop" if shorter else "stretch", unlike


def _sides(size: Any) -> tuple[int, int]:
    """Height and width of a size in one of Hugging Face's spellings."""
    if isinstance(size, dict):
        side = size.get("shortest_edge")
        if not side and not {"height", "width"} <= size.keys():
            raise InputError(
                f"{PREPROCESSOR} has size {size}; it must hold height and width, or shortest_edge"
            )
        return (int(side), int(side)) if side else (int(size["height"]), int(size["width"]))
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    return int(height), int(width)


def _class_ids(config: Mapping[str, Any], ours: Mapping[str, Any], source: str) -> tuple[str, ...]:
    id2label = config.get("id2label") or {}
    try:
        labels = [id2label[str(index)] for index in range(len(id2label))]
    except KeyError as error:
        raise InputError(f"{source}: id2label of {CONFIG} has no index {error}") from error
    if not labels:
        raise InputError(f"{source}: {CONFIG} has no id2label; it is not an image classifier")
    if len(set(labels)) != len(labels):
        raise InputError(f"{source}: id2label of {CONFIG} names a label twice")
    stated = ours.get("class_ids", labels)
    if ours.get("labels_are_ids", True) and list(stated) != labels:
        raise InputError(f"{source}: class_ids of {SIDECAR} differ from id2label of {CONFIG}")
    return tuple(map(str, stated))


def _read_sidecar(folder: Path) -> dict[str, Any]:
    """The content of `iab_vision.json`; empty where there is none."""
    return read_json(folder / SIDECAR) or {}


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in a file; None where there is no file."""
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path.name} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path.name} holds a {type(content).__name__}; expected an object")
    return content
