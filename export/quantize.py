"""The smaller precisions of a converted model: fp16 for CUDA, int8 for CPUs with VNNI.

fp16 is exported from the halved network and fused; int8 is static QDQ quantisation of the portable
float32 graph, calibrated on the user's images, with layers left out until it agrees with float32.
"""

import copy
import logging
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper
from scipy import optimize

from export import convert
from export.parity import relative
from export.reference import activation
from pipelines.bundle.session import INPUT, OnnxModel
from pipelines.bundle.settings import RuntimeSpec
from pipelines.messages import InputError
from pipelines.specs import ModelSpec

CONTRIB_OPSET = 20
"""What the fusions of transformers match; above it they leave ONNX `Attention`, which has no cuDNN path."""
PLAIN_ATTENTION = frozenset({"vit", "deit", "dinov2", "dinov2_with_registers", "vit_msn"})
"""Model types without mask or bias: those that the fusions turn into com.microsoft.Attention."""
MIN_CALIBRATION_IMAGES = 32
"""Fewer give unreliable activation ranges; use 500 or more."""
TUNING_IMAGES = 256
"""Calibration images that also judge which layers stay in float32; the certificate uses others."""
TARGET_AGREEMENT = 0.985
TARGET_RELATIVE = 0.1
"""Stricter than the certificate's limits, so that a model made on these images passes on others."""


@dataclass(frozen=True)
class Graph:
    """One ONNX file of the bundle, and how it came about."""

    payload: bytes
    temperature: float
    notes: Mapping[str, Any]


def half(network: Any, spec: ModelSpec, metadata: Mapping[str, str]) -> Graph:
    """fp16 weights and arithmetic, fused for the CUDA provider; normalisation and activation stay float32.

    Halving the network before the export leaves three casts; converting the float32 graph would silently
    raise small constants and halve the activation too.
    """
    from transformers.exporters.onnxruntime_fusions import fuse_for_onnxruntime

    halved = copy.deepcopy(network).half()
    if network.config.model_type in PLAIN_ATTENTION:
        # A mask, even one that hides nothing, would cost the fused and flash kernels of CUDA.
        with convert.use_attention(halved, convert.torch_attention):
            model = convert.trace(halved, spec, opset=CONTRIB_OPSET)
    else:
        with convert.use_attention(halved, convert.onnx_attention):
            model = convert.trace(halved, spec, opset=convert.OPSET)
    with convert.quiet():
        fuse_for_onnxruntime(model, "cuda")
    return Graph(convert.finish(model, metadata), spec.temperature, {})


def quantize_int8(
    float_graph: bytes, pixels_nhwc: np.ndarray, spec: ModelSpec, metadata: Mapping[str, str]
) -> Graph:
    """Static int8 weights and activations in the large products alone, with a temperature of its own.

    LayerNorm, softmax, attention, GELU, patches and the classifier stay float32 (quantised with them,
    ViT-B falls from 84.5 to 23.6 % in FQ-ViT). Layers are left out, worst first, until int8 agrees with
    float32; if half of them do not suffice, the best found comes back and the certificate judges it.

    Raises:
        InputError: too few images to calibrate on.
    """
    if len(pixels_nhwc) < MIN_CALIBRATION_IMAGES:
        raise InputError(
            f"int8 has {len(pixels_nhwc)} images to calibrate on; it needs {MIN_CALIBRATION_IMAGES}: "
            "give more with --images, or leave int8 out of --precisions"
        )
    expected_nc = _logits(float_graph, pixels_nhwc[:TUNING_IMAGES])
    worst_first = _by_sensitivity(float_graph, pixels_nhwc[:8])
    # max takes them one at a time: a large model is not held once for every attempt.
    best = max(_attempts(float_graph, pixels_nhwc, expected_nc, worst_first), key=_Attempt.closeness)
    temperature = matching_temperature(best.logits_nc, expected_nc, spec)
    notes = {
        "calibration_images": len(pixels_nhwc),
        "quantised_layers": len(worst_first) - best.left_out,
        "float_layers": sorted(worst_first[: best.left_out]),
    }
    tagged = {**metadata, "iab_vision.temperature": repr(temperature)}
    return Graph(_with_tail(best.proto, temperature, tagged), temperature, notes)


@dataclass(frozen=True)
class _Attempt:
    """An int8 model without its worst layers, and how close it comes to float32 on the tuning images."""

    left_out: int
    proto: onnx.ModelProto
    logits_nc: np.ndarray
    agreement: float
    error: float

    def closeness(self) -> tuple[float, float]:
        return self.agreement, -self.error


def _attempts(
    float_graph: bytes, pixels_nhwc: np.ndarray, expected_nc: np.ndarray, worst_first: Sequence[str]
) -> Iterator[_Attempt]:
    """With ever more layers in float32, until one is close enough or half of them are."""
    for left_out in _growing(len(worst_first) // 2):
        proto = _quantise(float_graph, pixels_nhwc, worst_first[left_out:])
        found_nc = _logits(proto.SerializeToString(), pixels_nhwc[:TUNING_IMAGES])
        agreement = float((found_nc.argmax(axis=1) == expected_nc.argmax(axis=1)).mean())
        error = relative(found_nc, expected_nc)
        yield _Attempt(left_out, proto, found_nc, agreement, error)
        if agreement >= TARGET_AGREEMENT and error <= TARGET_RELATIVE:
            return


def _growing(most: int) -> list[int]:
    """0, 2, 4, 8 … up to `most`."""
    sizes = [0, *(1 << power for power in range(1, max(most, 1).bit_length()))]
    return sorted({min(size, most) for size in sizes} | {most})


def _logits(graph: bytes, pixels_nhwc: np.ndarray) -> np.ndarray:
    return OnnxModel(graph, RuntimeSpec(threads=os.cpu_count() or 1)).run(pixels_nhwc)[0]


def matching_temperature(found_nc: np.ndarray, expected_nc: np.ndarray, spec: ModelSpec) -> float:
    """The temperature at which int8 is as confident as the calibrated float32 model (least cross entropy).

    Fitted against float32's probabilities and not against labels: these images may be training images,
    on which every model is too sure of itself.
    """
    target_nc = activation(expected_nc, temperature=spec.temperature, multi_label=spec.multi_label)

    def cross_entropy(log_temperature: float) -> float:
        temperature = float(np.exp(log_temperature))
        p_nc = np.clip(activation(found_nc, temperature=temperature, multi_label=spec.multi_label), 1e-12, 1)
        misses = (1 - target_nc) * np.log(np.clip(1 - p_nc, 1e-12, 1)) if spec.multi_label else 0
        return float(-(target_nc * np.log(p_nc) + misses).sum())

    bounds = tuple(np.log(spec.temperature) + np.log([0.5, 2]))
    return round(float(np.exp(optimize.minimize_scalar(cross_entropy, bounds=bounds, method="bounded").x)), 4)


def _quantise(float_graph: bytes, pixels_nhwc: np.ndarray, layers: Sequence[str]) -> onnx.ModelProto:
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static

    with tempfile.TemporaryDirectory(prefix="iab-vision-int8-") as folder, _without_advice():
        path = Path(folder) / "model.onnx"
        quantize_static(
            onnx.load_model_from_string(float_graph),
            str(path),
            _PixelReader(pixels_nhwc),
            quant_format=QuantFormat.QDQ,
            # Unsigned times signed is what VNNI multiplies: 132 against 99 images/s on ViT-tiny.
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            per_channel=True,
            op_types_to_quantize=["MatMul"],
            nodes_to_quantize=list(layers),
            # Outputs stay float32: 132 against 112 images/s and a smaller error on ViT-tiny.
            extra_options={"OpTypesToExcludeOutputQuantization": ["MatMul"]},
        )
        return onnx.load(path)


@contextmanager
def _without_advice() -> Iterator[None]:
    """The quantiser advises a preparation that these graphs do not need, once per attempt."""

    def is_no_advice(record: logging.LogRecord) -> bool:
        return "pre-process" not in record.getMessage()

    logging.getLogger().addFilter(is_no_advice)
    try:
        yield
    finally:
        logging.getLogger().removeFilter(is_no_advice)


class _PixelReader:
    """Calibration batches in the form that ONNX Runtime's quantiser pulls."""

    def __init__(self, pixels_nhwc: np.ndarray, batch_size: int = 8) -> None:
        self._batches = iter(
            {INPUT: pixels_nhwc[start : start + batch_size]}
            for start in range(0, len(pixels_nhwc), batch_size)
        )

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self._batches, None)


def _linear_layers(graph: onnx.GraphProto) -> dict[str, tuple[str, np.ndarray]]:
    """Name of every product with a weight -> its input and the weight."""
    weights = {tensor.name: tensor for tensor in graph.initializer}
    return {
        node.name: (node.input[0], numpy_helper.to_array(weights[node.input[1]]))
        for node in graph.node
        if node.op_type == "MatMul" and node.input[1] in weights
    }


def _by_sensitivity(float_graph: bytes, pixels_nhwc: np.ndarray) -> list[str]:
    """The linear layers by the error that an input rounded to 8 bits puts on their output, worst first."""
    import onnxruntime as ort

    proto = onnx.load_model_from_string(float_graph)
    layers = _linear_layers(proto.graph)
    inputs = sorted({source for source, _ in layers.values()})
    proto.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in inputs)
    session = ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    activations = dict(zip(inputs, session.run(inputs, {INPUT: pixels_nhwc}), strict=True))
    errors = {name: _rounding_error(activations[source], weight) for name, (source, weight) in layers.items()}
    return sorted(errors, key=lambda name: (-errors[name], name))


def _rounding_error(activation_values: np.ndarray, weight: np.ndarray) -> float:
    rows = activation_values.reshape(-1, weight.shape[0])
    low, high = min(float(rows.min()), 0.0), max(float(rows.max()), 0.0)
    scale = max((high - low) / 255, 1e-12)
    rounding = np.round(rows / scale) * scale - rows
    return float(np.linalg.norm(rounding @ weight) / max(float(np.linalg.norm(rows @ weight)), 1e-30))


def _with_tail(proto: onnx.ModelProto, temperature: float, metadata: Mapping[str, str]) -> bytes:
    """The quantised graph with its own temperature before the activation, and its own metadata."""
    graph = proto.graph
    last = next(node for node in graph.node if "probabilities" in node.output)
    before = next((node for node in graph.node if last.input[0] in node.output), None)
    if before is not None and before.op_type == "Div":
        graph.node.remove(before)
    divisor = numpy_helper.from_array(np.float32(temperature), "temperature")
    graph.initializer.append(divisor)
    position = list(graph.node).index(last)
    graph.node.insert(position, onnx.helper.make_node("Div", ["logits", "temperature"], ["scaled_logits"]))
    last.input[0] = "scaled_logits"
    _tidy(proto)
    del proto.metadata_props[:]
    onnx.helper.set_model_props(proto, dict(sorted(metadata.items())))
    onnx.checker.check_model(proto)
    return bytes(proto.SerializeToString(deterministic=True))


def _tidy(proto: onnx.ModelProto) -> None:
    """Drop what the quantiser adds and no node uses: opset imports, stale shapes."""
    domains = {node.domain for node in proto.graph.node}
    kept = [entry for entry in proto.opset_import if entry.domain in domains]
    del proto.opset_import[:]
    proto.opset_import.extend(kept)
    convert.drop_initializer_shapes(proto)
    proto.ir_version = convert.IR_VERSION
