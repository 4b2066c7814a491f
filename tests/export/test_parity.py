"""Parity refuses every way in which a released model can differ from its checkpoint, and names the limit.

Each fault is planted into a real export of a real small ViT, at the place where such a mistake is made.
"""

import dataclasses
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from export import certificate, convert, images, parity, release
from export.certificate import Candidate
from export.checkpoint import open_checkpoint
from jobs.cli import main
from pipelines.bundle.bundle import open_bundle
from pipelines.bundle.limits import LIMITS, Limits
from pipelines.specs import ImageSpec, ModelSpec
from tests.builders.models import CLASS_IDS, checkpoint, dataset


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("trained") / "best")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return dataset(tmp_path_factory.mktemp("pictures") / "dataset", 40)


@pytest.fixture(autouse=True)
def _no_speed_measured(monkeypatch) -> None:
    monkeypatch.setattr(certificate, "SPEED_S", 0.0)


def export(trained: Path, pictures: Path, output: Path) -> int:
    return main(["export", "--checkpoint", str(trained), "--images", str(pictures), "--output", str(output)])


def test_faithful_export_passes_with_accuracy_and_agreement_stated(trained, pictures, tmp_path, capsys):
    assert export(trained, pictures, tmp_path / "bundle") == 0
    certificate = open_bundle(str(tmp_path / "bundle")).certificate_for("cpu", "fp32").content
    metrics = certificate["metrics"]
    assert certificate["images"]["own"] == 40
    assert certificate["images"]["edge_cases"] == len(images.edge_cases())
    assert metrics["max_logit"] <= 1e-3
    assert metrics["top1"]["different"] == metrics["topk"]["different"] == 0
    assert metrics["labelled"]["accuracy"]["reference"] == metrics["labelled"]["accuracy"]["candidate"] > 0.8
    assert certificate["batches"]["max_change"] <= 1e-5
    assert "fp32 on cpu: passed on 61 images" in (printed := capsys.readouterr().out)
    assert f"next: iab-vision classify --inventory IMAGES --bundle {tmp_path / 'bundle'}" in printed
    assert "published at the thresholds: " in printed


@pytest.fixture(scope="module")
def faithful_graph(trained) -> bytes:
    """For faults outside the graph: it need not be traced again for each."""
    with open_checkpoint(str(trained)) as found:
        return convert.convert(found.network(), found.spec, {})


def wrapped_network(monkeypatch, change) -> None:
    """Have the converter see a changed copy of the network; the reference keeps the true one."""
    faithful = convert.convert

    def faulty(network, spec, metadata):
        return faithful(*change(network, spec), metadata)

    monkeypatch.setattr(convert, "convert", faulty)


def perturbed_weights(monkeypatch) -> None:
    """One layer's weights are off by 1 %."""
    import copy

    def change(network, spec):
        network = copy.deepcopy(network)
        weight = network.vit.layers[1].mlp.fc1.weight
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            weight.mul_(1 + 0.01 * torch.randn(weight.shape, generator=generator))
        return network, spec

    wrapped_network(monkeypatch, change)


def broken_weight(monkeypatch) -> None:
    """One weight is NaN, as after a diverged training or an overflow in fp16."""
    import copy

    def change(network, spec):
        network = copy.deepcopy(network)
        with torch.no_grad():
            network.classifier.weight[2, 5] = float("nan")
        return network, spec

    wrapped_network(monkeypatch, change)


def planted_spec(monkeypatch, change) -> None:
    """Have the bundle state another spec than its checkpoint's."""
    faithful = release.contents

    def faulty(checkpoint, graphs):
        return faithful(dataclasses.replace(checkpoint, spec=change(checkpoint.spec)), graphs)

    monkeypatch.setattr(release, "contents", faulty)


def permuted_labels(monkeypatch) -> None:
    """The bundle lists the classes in another order than the network's outputs."""
    planted_spec(
        monkeypatch,
        lambda spec: dataclasses.replace(spec, class_ids=(*spec.class_ids[1:], spec.class_ids[0])),
    )


def permuted_outputs(monkeypatch) -> None:
    """The graph's outputs are in another order than the checkpoint's."""
    import copy

    def change(network, spec):
        network = copy.deepcopy(network)
        order = torch.tensor([1, 2, 3, 4, 0])
        with torch.no_grad():
            network.classifier.weight.copy_(network.classifier.weight[order])
            network.classifier.bias.copy_(network.classifier.bias[order])
        return network, spec

    wrapped_network(monkeypatch, change)


def swapped_mean_and_std(monkeypatch) -> None:
    """Normalisation takes one for the other."""

    def change(network, spec):
        image = spec.image_spec
        return network, other_image_spec(spec, mean=image.std, std=image.mean)

    wrapped_network(monkeypatch, change)


def lost_normalisation(monkeypatch) -> None:
    """Pixels reach the network in [0, 1]."""

    def change(network, spec):
        return network, other_image_spec(spec, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))

    wrapped_network(monkeypatch, change)


def bgr(monkeypatch) -> None:
    """The graph takes blue for red."""
    faithful = convert.PixelClassifier.forward

    def faulty(self, pixels):
        return faithful(self, pixels.flip(3))

    monkeypatch.setattr(convert.PixelClassifier, "forward", faulty)


def lost_temperature(monkeypatch) -> None:
    """Probabilities are the plain softmax."""
    wrapped_network(monkeypatch, lambda network, spec: (network, dataclasses.replace(spec, temperature=1.0)))


def softmax_twice(monkeypatch) -> None:
    faithful = convert.PixelClassifier.forward

    def faulty(self, pixels):
        logits, probabilities = faithful(self, pixels)
        return logits, probabilities.softmax(-1)

    monkeypatch.setattr(convert.PixelClassifier, "forward", faulty)


def sigmoid_for_softmax(monkeypatch) -> None:
    wrapped_network(monkeypatch, lambda network, spec: (network, dataclasses.replace(spec, multi_label=True)))


def other_image_spec(spec, **changes):
    return dataclasses.replace(spec, image_spec=dataclasses.replace(spec.image_spec, **changes))


def other_resize(monkeypatch) -> None:
    """The bundle states another filter than the checkpoint was trained with."""
    planted_spec(monkeypatch, lambda spec: other_image_spec(spec, resample="bicubic"))


def cropped_instead_of_stretched(monkeypatch) -> None:
    planted_spec(monkeypatch, lambda spec: other_image_spec(spec, fit="crop"))


def ignored_exif(monkeypatch) -> None:
    """Classification does not turn pictures upright."""

    def upside_down(payloads, spec):
        return images.decode([without_exif(payload) for payload in payloads], spec)

    def without_exif(payload: bytes) -> bytes:
        return payload.replace(b"Exif\0\0", b"Nope\0\0")

    faithful = certificate.load_candidate

    def faulty(*arguments) -> Candidate:
        return dataclasses.replace(faithful(*arguments), decode=upside_down)

    monkeypatch.setattr(certificate, "load_candidate", faulty)


FAULTS = [
    (perturbed_weights, "relative_logit"),
    (broken_weight, "max_logit"),
    (permuted_labels, "max_logit"),
    (permuted_outputs, "top1 agreement"),
    (swapped_mean_and_std, "max_logit"),
    (lost_normalisation, "max_logit"),
    (bgr, "max_logit"),
    (lost_temperature, "activation_error"),
    (softmax_twice, "activation_error"),
    (sigmoid_for_softmax, "activation_error"),
    (other_resize, "pixels_differ"),
    (cropped_instead_of_stretched, "pixels_differ"),
    (ignored_exif, "pixels_differ"),
]


OUTSIDE_THE_GRAPH = (permuted_labels, other_resize, cropped_instead_of_stretched, ignored_exif)


@pytest.mark.parametrize(("plant", "metric"), FAULTS, ids=[plant.__name__ for plant, _ in FAULTS])
def test_planted_fault_is_refused_and_the_limit_named(
    trained, pictures, faithful_graph, tmp_path, monkeypatch, capsys, plant, metric
):
    if plant in OUTSIDE_THE_GRAPH:
        monkeypatch.setattr(convert, "convert", lambda *_: faithful_graph)
    plant(monkeypatch)
    assert export(trained, pictures, tmp_path / "bundle") == 3
    assert not (tmp_path / "bundle").exists()
    document = json.loads((tmp_path / "bundle-refused" / "cpu-fp32.json").read_text())
    assert metric in [failure["metric"] for failure in document["failures"]]
    assert f"{metric} is" in capsys.readouterr().err
    assert f"<li>{metric}: " in (tmp_path / "bundle-refused" / "report.html").read_text()


def test_swap_within_the_margin_is_a_tie_and_beyond_it_a_difference():
    reference_nc = np.array([[5.0, 4.999, 1.0], [5.0, 4.9, 1.0], [3.0, 2.0, 1.0]])
    candidate_nc = np.array([[4.999, 5.0, 1.0], [4.9, 5.0, 1.0], [3.0, 2.0, 1.0]])
    for k in (1, 2):
        assert parity.agreement(reference_nc, candidate_nc, k, 2e-3) == {
            "same": 1,
            "ties": 1,
            "different": 1,
            "share": pytest.approx(2 / 3),
        }


def test_without_a_margin_no_swap_is_excused():
    found = parity.agreement(np.array([[1.0, 1.0]]), np.array([[1.0, 1.1]]), 1, 0.0)
    assert (found["ties"], found["different"]) == (0, 1)


def test_swap_far_down_the_top_k_counts_against_the_ordered_top_k_alone():
    reference_nc, candidate_nc = np.array([[9.0, 5.0, 4.0, 1.0]]), np.array([[9.0, 4.0, 5.0, 1.0]])
    assert parity.agreement(reference_nc, candidate_nc, 1, 0.1)["same"] == 1
    assert parity.agreement(reference_nc, candidate_nc, 3, 0.1)["different"] == 1


def test_relative_difference_ignores_a_constant_and_means_the_same_for_small_logits():
    logits_nc = np.random.default_rng(0).normal(size=(10, 4))
    assert parity.relative(logits_nc + 7, logits_nc) < 1e-12
    assert parity.relative(logits_nc * 1.01, logits_nc) == pytest.approx(0.01)
    assert parity.relative(logits_nc * 1.01e-6, logits_nc * 1e-6) == pytest.approx(0.01)


def test_nan_never_passes():
    """A comparison with NaN is false, so each limit asks for "not within" and not for "beyond"."""
    reference = _outputs(np.zeros((2, 3), np.float32))
    candidate = _outputs(np.full((2, 3), np.nan, np.float32))
    measured = parity.compare(reference, candidate, LIMITS["fp32"], np.full((2, 3), -1))
    assert parity.failures(measured, {"max_change": 0.0}, LIMITS["fp32"])
    assert parity.failures(measured, {"max_change": float("nan")}, LIMITS["int8"])


def test_one_lost_image_is_granted_and_two_are_not():
    limits = dataclasses.replace(LIMITS["int8"], max_accuracy_loss=0.005)
    assert not _labelled_failures(lost=1, limits=limits)
    assert _labelled_failures(lost=2, limits=limits) == ["accuracy loss is 0.04; the limit is 0.02"]


def test_unlabelled_images_say_nothing_of_accuracy():
    assert parity.compare_labelled(np.eye(3), np.eye(3), np.full((3, 3), -1), multi_label=False) is None


def test_what_turned_answers_do_to_calibration_is_granted_and_no_more() -> None:
    limits = LIMITS["int8"]
    assert not _labelled_failures(lost=0, limits=limits, gained=1, calibration_change=0.019)
    assert _labelled_failures(lost=0, limits=limits, gained=1, calibration_change=0.021)
    assert not _labelled_failures(lost=1, limits=limits, gained=2, calibration_change=0.059)
    assert _labelled_failures(lost=0, limits=limits, calibration_change=0.03)


def _labelled_failures(
    *, lost: int, limits: Limits, gained: int = 0, calibration_change: float = 0.0
) -> list[str]:
    measured = {
        "images": 50,
        "accuracy": {},
        "calibration_error": {"reference": 0.1, "candidate": 0.1 + calibration_change},
        "lost": lost,
        "gained": gained,
    }
    return [str(failure) for failure in parity._labelled_failures(measured, limits)]


def _outputs(logits_nc: np.ndarray) -> parity.Outputs:
    from export.reference import activation

    probabilities_nc = activation(logits_nc, temperature=1, multi_label=False)
    pixels_nhwc = np.zeros((len(logits_nc), 2, 2, 3), np.uint8)
    return parity.Outputs(
        ModelSpec(CLASS_IDS[:3], "labels", ImageSpec()), pixels_nhwc, logits_nc, probabilities_nc
    )


def test_edge_cases_all_decode_and_cover_what_breaks_pipelines():
    modes = {Image.open(io.BytesIO(sample.payload)).mode for sample in images.edge_cases()}
    assert {"RGB", "L", "CMYK", "P", "RGBA", "1"} <= modes
    assert all(sample.edge_case for sample in images.edge_cases())
