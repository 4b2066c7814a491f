"""fp16 and int8 stay close to float32, keep what must stay float32, and do not depend on batch-mates."""

from collections import Counter
from dataclasses import replace

import numpy as np
import onnx
import pytest

from export import convert, images, parity, quantize
from export.checkpoint import open_checkpoint
from export.reference import activation
from pipelines.bundle.limits import LIMITS
from pipelines.bundle.session import OnnxModel
from pipelines.bundle.settings import RuntimeSpec
from pipelines.messages import InputError
from pipelines.specs import ModelSpec
from tests.builders.models import SPEC, checkpoint, dataset

MODEL_SPEC = ModelSpec((), "labels", SPEC, temperature=1.3)


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    with open_checkpoint(str(checkpoint(tmp_path_factory.mktemp("run") / "best"))) as found:
        return found.network()


@pytest.fixture(scope="module")
def graph(network) -> bytes:
    return convert.convert(network, MODEL_SPEC, {"iab_vision.precision": "fp32"})


@pytest.fixture(scope="module")
def pixels_nhwc(tmp_path_factory) -> np.ndarray:
    drawn = images.draw(
        images.OwnImages(str(dataset(tmp_path_factory.mktemp("d") / "set", 80))), count=80, seed=0
    )
    return np.stack(images.decode([one.payload for one in drawn], SPEC))


@pytest.fixture(scope="module")
def expected_nc(graph, pixels_nhwc) -> np.ndarray:
    return OnnxModel(graph, RuntimeSpec()).run(pixels_nhwc)[0]


@pytest.fixture(scope="module")
def int8(graph, pixels_nhwc) -> quantize.Graph:
    return quantize.quantize_int8(graph, pixels_nhwc, MODEL_SPEC, {"iab_vision.precision": "int8"})


def operators(payload: bytes) -> Counter[str]:
    return Counter(node.op_type for node in onnx.load_model_from_string(payload).graph.node)


def test_half_precision_keeps_normalisation_and_activation_in_float32(network, pixels_nhwc, expected_nc):
    half = quantize.half(network, MODEL_SPEC, {})
    logits_nc, probabilities_nc = OnnxModel(half.payload, RuntimeSpec()).run(pixels_nhwc)
    assert parity.relative(logits_nc, expected_nc) < 5e-3
    own = activation(logits_nc, temperature=1.3, multi_label=False)
    np.testing.assert_allclose(probabilities_nc, own, atol=1e-6)
    model = onnx.load_model_from_string(half.payload)
    kinds = Counter(tensor.data_type for tensor in model.graph.initializer if np.prod(tensor.dims) > 100)
    assert kinds.keys() == {onnx.TensorProto.FLOAT16}


def test_half_precision_is_fused_for_cuda(network):
    """Fused nodes are the reason for a file of its own: Attention there has a cuDNN path, without a mask."""
    payload = quantize.half(network, MODEL_SPEC, {}).payload
    count = operators(payload)
    assert count["Attention"] == 2
    assert count["SkipLayerNormalization"] >= 3
    assert not count["IsNaN"] and not count["Where"]
    nodes = onnx.load_model_from_string(payload).graph.node
    assert [len(node.input) for node in nodes if node.op_type == "Attention"] == [3, 3]


def test_int8_agrees_with_float32_and_says_what_it_left_out(int8, pixels_nhwc, expected_nc):
    logits_nc, _ = OnnxModel(int8.payload, RuntimeSpec()).run(pixels_nhwc)
    assert (logits_nc.argmax(axis=1) == expected_nc.argmax(axis=1)).mean() >= 0.98
    assert int8.notes["calibration_images"] == 80
    assert int8.notes["quantised_layers"] + len(int8.notes["float_layers"]) == 12


def test_int8_quantises_the_large_products_alone(int8):
    """With LayerNorm and softmax quantised too, ViT-B would fall from 84.5 to 23.6 %."""
    model = onnx.load_model_from_string(int8.payload)
    quantised_inputs = {node.output[0] for node in model.graph.node if node.op_type == "DequantizeLinear"}
    fed = {node.op_type for node in model.graph.node if quantised_inputs & set(node.input)}
    assert fed == {"MatMul"}
    assert {(entry.domain, entry.version) for entry in model.opset_import} == {("", 23)}
    assert model.ir_version == 10


def test_int8_of_an_image_does_not_depend_on_its_batch_mates(int8, pixels_nhwc):
    """Dynamic quantisation changes an image's logits by 3 % with other images in its batch."""
    invariance = parity.batch_invariance(OnnxModel(int8.payload, RuntimeSpec(batch_size=8)), pixels_nhwc)
    assert invariance["max_change"] == 0
    assert set(invariance["cases"]) == {
        *(f"batches of {n}" for n in (1, 2, 7, 8, 9)),
        "shuffled",
        "run twice",
    }


def test_int8_is_the_same_file_each_time(graph, int8, pixels_nhwc):
    again = quantize.quantize_int8(graph, pixels_nhwc, MODEL_SPEC, {"iab_vision.precision": "int8"})
    assert again.payload == int8.payload


def test_int8_divides_by_its_own_temperature(int8, pixels_nhwc):
    model = OnnxModel(int8.payload, RuntimeSpec())
    logits_nc, probabilities_nc = model.run(pixels_nhwc)
    own = activation(logits_nc, temperature=int8.temperature, multi_label=False)
    np.testing.assert_allclose(probabilities_nc, own, atol=1e-6)
    assert float(model.metadata["iab_vision.temperature"]) == int8.temperature


@pytest.mark.parametrize("multi_label", [False, True])
@pytest.mark.parametrize("scale", [0.8, 1.25])
def test_temperature_makes_a_scaled_model_as_confident_as_the_original(scale, multi_label):
    logits_nc = np.random.default_rng(0).normal(0, 3, (300, 6))
    spec = replace(MODEL_SPEC, multi_label=multi_label)
    assert quantize.matching_temperature(logits_nc * scale, logits_nc, spec) == pytest.approx(
        1.3 * scale, rel=0.01
    )


def test_layer_that_quantises_badly_is_left_in_float32(tmp_path, pixels_nhwc):
    """One huge channel takes the whole 8-bit range of its layer's input, as outliers of real ViTs do."""
    import copy

    import torch

    with open_checkpoint(str(checkpoint(tmp_path / "best"))) as found:
        network = copy.deepcopy(found.network())
    norm, first = network.vit.layers[0].layernorm_after, network.vit.layers[0].mlp.fc1
    with torch.no_grad():
        norm.weight[7] *= 3000
        norm.bias[7] *= 3000
        first.weight[:, 7] /= 3000
    graph = convert.convert(network, MODEL_SPEC, {})
    found = quantize.quantize_int8(graph, pixels_nhwc, MODEL_SPEC, {})
    assert 0 < len(found.notes["float_layers"]) <= 6
    expected_nc = OnnxModel(graph, RuntimeSpec()).run(pixels_nhwc)[0]
    assert parity.relative(OnnxModel(found.payload, RuntimeSpec()).run(pixels_nhwc)[0], expected_nc) < 0.1


def test_too_few_images_to_calibrate_on_say_how_many_are_needed(graph, pixels_nhwc):
    with pytest.raises(InputError, match=r"int8 has 10 images .* it needs 32.*--precisions"):
        quantize.quantize_int8(graph, pixels_nhwc[:10], MODEL_SPEC, {})


def test_growing_sizes_end_at_the_most():
    assert quantize._growing(6) == [0, 2, 4, 6]
    assert quantize._growing(1) == [0, 1]
    assert quantize._growing(0) == [0]


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["fp32", "fp16"])
def test_gpu_stays_within_the_limits_of_its_precision(network, graph, pixels_nhwc, expected_nc, name):
    payload = quantize.half(network, MODEL_SPEC, {}).payload if name == "fp16" else graph
    model = OnnxModel(payload, RuntimeSpec("cuda", name, batch_size=32))
    logits_nc, _ = model.run(pixels_nhwc)
    assert parity.relative(logits_nc, expected_nc) <= LIMITS[name].max_relative_logit


def test_checkpoint_fixture_is_not_all_near_ties(expected_nc):
    """A guard of these tests: on near-ties agreement would mean nothing."""
    ordered = np.sort(expected_nc, axis=1)
    assert np.median(ordered[:, -1] - ordered[:, -2]) > 1
