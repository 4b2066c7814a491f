"""The README of a bundle suffices: its own lines reproduce the certified answers without this project."""

import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import onnx
import pytest
from PIL import Image

from export import certificate, release
from export import images as samples
from export.settings import ParitySettings
from pipelines.bundle.bundle import open_bundle
from pipelines.bundle.session import load
from pipelines.bundle.settings import RuntimeSpec
from pipelines.specs import ImageSpec
from tests.builders import models

SPECS = {
    "stretch": models.SPEC,
    "crop": ImageSpec(height=40, width=56, fit="crop", resample="bicubic"),
    "square": ImageSpec(height=48, width=48),
    "cut": ImageSpec(height=48, width=48, crop_fraction=0.875, resample="lanczos"),
    "pad": ImageSpec(height=40, width=56, fit="pad"),
}
LAUNCH = """
import runpy, sys
packages, script, *images = sys.argv[1:]
sys.path.append(packages)
sys.argv = [script, *images]
runpy.run_path(script, run_name="__main__")
"""


@pytest.fixture(scope="module")
def packages(tmp_path_factory) -> Path:
    """A folder from which NumPy, Pillow and ONNX Runtime can be imported, and nothing else."""
    folder = tmp_path_factory.mktemp("packages")
    for module, libraries in {"numpy": "numpy.libs", "PIL": "pillow.libs", "onnxruntime": ""}.items():
        found = Path(find_spec(module).origin).parent
        for path in {found, found.parent / libraries}:
            if path.exists() and path != found.parent:
                (folder / path.name).symlink_to(path)
    return folder


@pytest.fixture(scope="module", params=SPECS)
def bundle(request, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    models.checkpoint(folder / "best", spec=SPECS[request.param])
    models.dataset(folder / "pictures", 20)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(certificate, "SPEED_S", 0.0)
        output, settings = str(folder / "bundle"), ParitySettings(sample_images=10, min_images=5)
        pictures = samples.OwnImages(str(folder / "pictures"))
        release.export(str(folder / "best"), pictures, output, settings=settings)
    blocks = re.findall(r"```python\n(.*?)```", (folder / "bundle" / "README.md").read_text(), re.DOTALL)
    for name, block in zip(("label.py", "examples.py"), blocks, strict=True):
        (folder / "bundle" / name).write_text(block)
    return folder / "bundle"


def printed(script: Path, *images: str, packages: Path, folder: Path) -> list[tuple[str, str, float]]:
    """The image, id and probability of each line that a script prints with those packages alone."""
    command = [sys.executable, "-I", "-S", "-c", LAUNCH, str(packages), str(script), *images]
    environment = {"PATH": os.defpath}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = [line.rsplit(" ", 2) for line in done.stdout.splitlines()]
    return [(image, class_id, float(probability)) for image, class_id, probability in lines]


def test_lines_of_the_readme_give_the_certified_answers(bundle, packages, tmp_path):
    expected = save_awkward_images(tmp_path / "images")
    found = printed(bundle / "label.py", *expected, packages=packages, folder=tmp_path)
    opened = open_bundle(str(bundle))
    decoded = samples.decode([Path(path).read_bytes() for path in expected], opened.spec.image_spec)
    _, probabilities_nc = load(opened, RuntimeSpec()).run(np.stack(decoded))
    assert [image for image, _, _ in found] == expected
    for (image, class_id, probability), probabilities in zip(found, probabilities_nc, strict=True):
        assert class_id == opened.spec.class_ids[probabilities.argmax()], image
        assert probability == pytest.approx(probabilities.max(), abs=1e-5), image


def save_awkward_images(folder: Path) -> list[str]:
    """The edge cases of parity, and shapes and depths that take another way through the decoder."""
    folder.mkdir()
    for case in samples.edge_cases():
        (folder / case.image_id.rpartition("/")[2]).write_bytes(case.payload)
    rng = np.random.default_rng(5)
    for width, height in ((30, 400), (400, 30), (1000, 700), (57, 39)):
        models.picture(1, rng, (width, height)).save(folder / f"{width}x{height}.jpg")
        models.picture(2, rng, (width, height)).save(folder / f"{width}x{height}.tif")
    grey = np.asarray(models.picture(3, rng).convert("L"), np.float32)
    Image.fromarray(grey / 255).save(folder / "unit.tif")
    Image.fromarray(grey * 40 - 300).save(folder / "float.tif")
    Image.fromarray(grey.astype(np.int32) * 70000).save(folder / "32-bit.tif")
    Image.fromarray(grey.astype(np.uint16) * 100).save(folder / "16-bit.pgm")
    return sorted(map(str, folder.iterdir()))


def test_certificate_carries_images_to_check_oneself_against(bundle, packages, tmp_path):
    (tmp_path / "certificates").mkdir()
    name = "certificates/cpu-fp32.json"
    (tmp_path / name).write_bytes((bundle / name).read_bytes())
    expected = printed(bundle / "examples.py", packages=packages, folder=tmp_path)
    assert {image for image, _, _ in expected} == set(certificate.EXAMPLES)
    found = printed(bundle / "label.py", *(one[0] for one in expected), packages=packages, folder=tmp_path)
    assert [one[:2] for one in found] == [one[:2] for one in expected]
    assert [one[2] for one in found] == pytest.approx([one[2] for one in expected], abs=1e-5)


def test_model_file_names_its_classes_and_thresholds(bundle):
    properties = onnx.load(bundle / "model.onnx").metadata_props
    found = {entry.key: entry.value for entry in properties}
    opened = open_bundle(str(bundle))
    assert json.loads(found["iab_vision.labels"]) == list(opened.spec.class_ids)
    assert json.loads(found["iab_vision.paths"])[3] == "Pets > Dogs"
    assert json.loads(found["iab_vision.names"])[3] == "Dogs"
    assert json.loads(found["iab_vision.thresholds"]) == opened.spec.thresholds
