"""A model folder's JSON files <-> `ModelSpec` and `ImageSpec`: the one reader and the one writer of each.

`config.json` names the classes, `preprocessor_config.json` the pixels, both in Hugging Face's words;
`iab_vision.json` is ours and holds the whole `ModelSpec`. Of the weights only the last biases are touched.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
from pydantic import ValidationError

from pipelines.messages import InputError, first_line
from pipelines.specs import Fit, ImageSpec, ModelSpec, wrong_settings
from pipelines.taxonomy.taxonomy import FLAT

log = logging.getLogger(__name__)

Spec = TypeVar("Spec", ImageSpec, ModelSpec)

WEIGHTS = "model.safetensors"
CONFIG, SIDECAR, PREPROCESSOR = "config.json", "iab_vision.json", "preprocessor_config.json"
PIL_RESAMPLING = {"lanczos": 1, "bilinear": 2, "bicubic": 3}
"""Values of PIL.Image.Resampling, as preprocessor_config.json spells them."""
PLAIN_PROCESSORS = frozenset(
    {"ViT", "DeiT", "Beit", "Bit", "CLIP", "ChineseCLIP", "Siglip", "Blip", "Pvt", "MobileNetV1"}
)
"""Image processors of transformers that resize, cut the centre, rescale and standardise, and nothing else."""
WARPED_FROM = 384
"""ConvNextImageProcessor squeezes the whole image from this size on, and ignores `crop_pct`."""


def write_model(model: Any, folder: Path, spec: ModelSpec) -> None:
    """config.json, model.safetensors, preprocessor_config.json and iab_vision.json in a local folder."""
    model.save_pretrained(folder)
    if processor := preprocessor_config(spec.image_spec):
        (folder / PREPROCESSOR).write_text(json.dumps(processor, indent=2))
    (folder / SIDECAR).write_text(sidecar_json(spec))


def sidecar_json(spec: ModelSpec) -> str:
    """The text of `iab_vision.json`."""
    return json.dumps({**asdict(spec), "labels_are_ids": True}, indent=2) + "\n"


def with_paths(config: bytes, paths: Mapping[str, str]) -> bytes:
    """config.json that also says what its ids mean, for readers that have no taxonomy."""
    return (json.dumps({**json.loads(config), "label_paths": dict(paths)}, indent=2) + "\n").encode()


def preprocessor_config(spec: ImageSpec) -> dict[str, Any] | None:
    """The spec for users of plain transformers; None where none of its processors does the same."""
    cropped = spec.fit == "crop"
    if spec.fit == "pad" or (cropped and spec.height != spec.width):
        return None
    height, width = (round(side / spec.crop_fraction) for side in (spec.height, spec.width))
    return {
        "image_processor_type": "CLIPImageProcessorPil" if cropped else "DeiTImageProcessorPil",
        "do_resize": True,
        "size": {"shortest_edge": height} if cropped else {"height": height, "width": width},
        "do_center_crop": cropped or spec.crop_fraction < 1,
        "crop_size": {"height": spec.height, "width": spec.width},
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
    multi_label = config.get("problem_type") == "multi_label_classification"
    checked = {"class_ids": _class_ids(config, ours, source), "image_spec": read_image_spec(str(folder))}
    ours.pop("labels_are_ids", None)
    return _checked(ModelSpec, {"taxonomy": FLAT, "multi_label": multi_label, **ours, **checked})


def read_image_spec(source: str, *, image_size: int | None = None) -> ImageSpec:
    """The pixels that a model in a local folder or on the hub was made for, as its own files say.

    Without a preprocessor's file the size is the config's, or `image_size` where that has none.

    Raises:
        InputError: the model cannot be loaded, does what an `ImageSpec` cannot say, or nothing says its size.
    """
    from transformers import AutoConfig

    ours = _read_sidecar(Path(source))
    if "image_spec" in ours:
        return _checked(ImageSpec, ours["image_spec"])
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise InputError(f"model {source} cannot be loaded: {error}") from error
    processor = _read_processor(source)
    if processor is not None:
        return parse_processor(processor)
    log.warning("%s has no %s: mean and std are taken as 0.5, both sides are resized", source, PREPROCESSOR)
    size = stated_size(config) or image_size
    if not size:
        raise InputError(f"{source} does not say which size of image it takes; give --image-size")
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    return ImageSpec(height=height, width=width)


def stated_size(config: Any) -> Any:
    """The input size that a config states, its own or its vision part's: a side, a pair or None."""
    return getattr(config, "image_size", None) or getattr(
        getattr(config, "vision_config", None), "image_size", None
    )


def _read_processor(source: str) -> Any:
    """transformers' image processor, which knows what its class does with keys that are left out."""
    from transformers import AutoImageProcessor

    folder = Path(source)
    if folder.is_dir() and read_json(folder / PREPROCESSOR) is None:
        return None
    try:
        return AutoImageProcessor.from_pretrained(source, backend="pil", trust_remote_code=False)
    except OSError:
        return None
    except ValueError as error:
        raise InputError(f"{PREPROCESSOR} of {source} cannot be read: {first_line(error)}") from error


def parse_processor(processor: Any) -> ImageSpec:
    """What an image processor of transformers does to a picture.

    Its rescaling is part of mean and std here, which are those of values in [0, 1].

    Raises:
        InputError: it does something that an `ImageSpec` cannot say, each by name.
    """
    settings = vars(processor)
    (height, width), fit, fraction = _geometry(processor)
    names = {number: name for name, number in PIL_RESAMPLING.items()}
    for name, unsayable in {
        "do_resize": not settings["do_resize"],
        "do_pad": settings["do_pad"],
        "resample": settings["resample"] not in names,
    }.items():
        if unsayable:
            raise _unsayable(f"{name} {settings[name]}")
    scale = 255 * (settings["rescale_factor"] if settings["do_rescale"] else 1)
    mean, std = (
        (settings["image_mean"], settings["image_std"]) if settings["do_normalize"] else ([0] * 3, [1] * 3)
    )
    content = {
        "height": height,
        "width": width,
        "fit": fit,
        "crop_fraction": fraction,
        "resample": names[settings["resample"]],
        "mean": [value / scale for value in mean],
        "std": [value / scale for value in std],
    }
    return _checked(ImageSpec, content)


def _unsayable(setting: str) -> InputError:
    return InputError(
        f"{PREPROCESSOR} has {setting}, which is not done here. Put an {SIDECAR} whose image_spec says what "
        "to do instead into a local copy of the model"
    )


def _geometry(processor: Any) -> tuple[tuple[int, int], Fit, float]:
    """Sides of the result, how it is fitted, and its share of what the image is resized to."""
    name = type(processor).__name__.removesuffix("Pil").removesuffix("ImageProcessor")
    size, shorter = processor.size, processor.size.shortest_edge
    if name == "ConvNext" and shorter:
        resized = shorter if shorter >= WARPED_FROM else int(shorter / processor.crop_pct)
        return (shorter, shorter), "stretch" if shorter >= WARPED_FROM else "crop", shorter / resized
    if name not in PLAIN_PROCESSORS:
        raise _unsayable(f"image_processor_type {type(processor).__name__}")
    sides = (shorter, shorter) if shorter and not size.longest_edge else (size.height, size.width)
    if not all(sides):
        raise _unsayable(f"size {processor.to_dict()['size']}")
    target = (processor.crop_size.height, processor.crop_size.width) if processor.do_center_crop else sides
    fractions = {cut / side for cut, side in zip(target, sides, strict=True)}
    if len(fractions) > 1 or max(fractions) > 1 or (shorter and not processor.do_center_crop):
        crop = f"crop_size {target}" if processor.do_center_crop else "do_center_crop False"
        raise _unsayable(f"size {processor.to_dict()['size']} with {crop}")
    return target, "crop" if shorter else "stretch", fractions.pop()


def _checked(kind: type[Spec], content: Mapping[str, Any]) -> Spec:
    """A spec of what a file says; raises InputError naming what is wrong."""
    try:
        return kind(**content)
    except ValidationError as error:
        raise InputError(f"the model's files: {wrong_settings(error)}") from error


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


def put_back(
    files: Mapping[str, bytes], shift: npt.NDArray[np.float64], biases: Sequence[str]
) -> dict[str, bytes]:
    """The model's files with `shift` subtracted from these biases, which are those of the logits.

    Sampling, class weights and logit adjustment change how often a class seems to occur, and no temperature
    undoes that: it is taken from the last layer's biases before one is fitted.
    """
    import torch
    from safetensors.torch import load, save

    tensors = load(files[WEIGHTS])
    for name in biases:
        tensors[name] = (tensors[name].double() - torch.from_numpy(shift)).to(tensors[name].dtype)
    return {**files, WEIGHTS: save(tensors, metadata={"format": "pt"})}
