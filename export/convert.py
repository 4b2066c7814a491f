"""A transformers image classifier -> the bytes of an ONNX graph that takes pixels as they are decoded.

uint8 [batch, height, width, 3] in; float32 logits and probabilities out. Normalisation, temperature and
activation are inside. The same checkpoint gives the same bytes in any process and from any folder.
It measures nothing.
"""

import json
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import onnx
import onnx_ir
import torch
from onnx_ir.passes.common import ClearMetadataAndDocStringPass
from torch import nn

from export.checkpoint import Checkpoint
from pipelines.bundle.manifest import MAX_FILE_BYTES
from pipelines.bundle.session import INPUT, OUTPUTS
from pipelines.datasets.normalize import normalize
from pipelines.messages import InputError, first_line
from pipelines.specs import ModelSpec

OPSET = 23
"""First with `Attention`, last that torch 2.13 writes; ONNX Runtime 1.31 serves it on CPU and CUDA."""
IR_VERSION = 10
"""onnx 1.23 would write 14; ONNX Runtime 1.31 reads up to 13, older runtimes up to 10."""
ATTENTION = "iab_vision_attention"
"""Name under which a conversion registers its attention function with transformers."""


class PixelClassifier(nn.Module):  # type: ignore[misc]
    """The network between normalisation and activation; both of them always in float32."""

    def __init__(self, network: nn.Module, spec: ModelSpec) -> None:
        super().__init__()
        self.network = network
        self.spec = spec

    def forward(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        # Cast first: some runtimes take uint8 at the input alone, and nothing but a cast may read it.
        images_nchw = normalize(pixels, self.spec.image_spec)
        dtype = next(self.network.parameters()).dtype
        logits = self.network(pixel_values=images_nchw.to(dtype)).logits.float()
        scaled = logits / self.spec.temperature
        return logits, scaled.sigmoid() if self.spec.multi_label else scaled.softmax(-1)


def convert(network: nn.Module, spec: ModelSpec, metadata: Mapping[str, str]) -> bytes:
    """The portable graph: opset 23 with one native `Attention` per block, dynamic batch.

    Raises:
        InputError: torch.onnx knows no translation of an operation, or the file would be too large.
    """
    weights = sum(parameter.numel() * parameter.element_size() for parameter in network.parameters())
    if weights > MAX_FILE_BYTES:
        name = type(network).__name__
        raise InputError(
            f"{name} has {weights} bytes of weights; one ONNX file holds at most {MAX_FILE_BYTES}"
        )
    with use_attention(network, onnx_attention):
        program = trace(network, spec, opset=OPSET)
    return finish(program, metadata)


def trace(network: nn.Module, spec: ModelSpec, *, opset: int) -> onnx_ir.Model:
    """The graph as torch.onnx writes it."""
    image = spec.image_spec
    # Three images, as torch.export takes a batch of 0 or 1 for a constant.
    example = torch.zeros((3, image.height, image.width, 3), dtype=torch.uint8)
    try:
        with quiet():
            program = torch.onnx.export(
                PixelClassifier(network, spec).eval(),
                (example,),
                dynamo=True,
                opset_version=opset,
                input_names=[INPUT],
                output_names=OUTPUTS,
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                optimize=True,
                verbose=False,
            )
    except torch.onnx.OnnxExporterError as error:
        name = type(network).__name__
        raise InputError(f"torch.onnx cannot convert {name}: {first_line(error)}") from error
    return program.model


def finish(model: onnx_ir.Model, metadata: Mapping[str, str]) -> bytes:
    """Serialise without anything that depends on this machine; checked against the ONNX standard."""
    with quiet():
        ClearMetadataAndDocStringPass()(model)  # 0.5 MB of stack traces with this machine's paths
    model.metadata_props.update(sorted(metadata.items()))
    model.ir_version = IR_VERSION
    proto = onnx_ir.to_proto(model)
    drop_initializer_shapes(proto)
    onnx.checker.check_model(proto)
    return bytes(proto.SerializeToString(deterministic=True))


def drop_initializer_shapes(proto: onnx.ModelProto) -> None:
    """Remove value_info of initializers: stale after a quantiser transposes one, and never needed."""
    weights = {tensor.name for tensor in proto.graph.initializer}
    kept = [value for value in proto.graph.value_info if value.name not in weights]
    del proto.graph.value_info[:]
    proto.graph.value_info.extend(kept)


def metadata_of(checkpoint: Checkpoint, *, precision: str) -> dict[str, str]:
    """What every ONNX file says of itself, readable by any runtime.

    The manifest's `model_id` covers the hash of this very file, so the file names its checkpoint instead.
    """
    spec, taxonomy = checkpoint.spec, checkpoint.taxonomy
    return {
        "iab_vision.checkpoint_sha256": checkpoint.sha256,
        "iab_vision.architecture": checkpoint.architecture,
        "iab_vision.labels": json.dumps(list(spec.class_ids)),
        "iab_vision.names": json.dumps([taxonomy.node(one).name for one in spec.class_ids]),
        "iab_vision.paths": json.dumps([taxonomy.path(one) for one in spec.class_ids]),
        "iab_vision.thresholds": json.dumps(dict(spec.thresholds), sort_keys=True),
        "iab_vision.taxonomy": taxonomy.name,
        "iab_vision.cattax": str(taxonomy.cattax),
        "iab_vision.image_spec": json.dumps(asdict(spec.image_spec), sort_keys=True),
        "iab_vision.temperature": repr(spec.temperature),
        "iab_vision.multi_label": str(spec.multi_label).lower(),
        "iab_vision.precision": precision,
        "iab_vision.licence": checkpoint.licence,
    }


@contextmanager
def use_attention(network: Any, attention: Callable[..., Any]) -> Iterator[None]:
    """Let transformers call `attention`; its own ones trace with a mask, all true, and guards around it."""
    from transformers import AttentionInterface

    if not getattr(network, "_supports_attention_backend", False):
        yield  # ConvNeXt and its like have none
        return
    before = network.config._attn_implementation
    AttentionInterface.register(ATTENTION, attention)
    network.set_attn_implementation(ATTENTION)
    try:
        yield
    finally:
        network.set_attn_implementation(before)


def onnx_attention(
    _module: nn.Module, *query_key_value_mask: Any, scaling: float | None = None, **_: Any
) -> tuple[torch.Tensor, None]:
    """One ONNX `Attention` in its three-dimensional form; the reshapes cancel against the caller's own."""
    query, key, value, mask = query_key_value_mask
    heads, sequence, size = query.shape[1:]

    def joined(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.transpose(1, 2).reshape(tensor.shape[0], tensor.shape[2], heads * size)

    output = torch.onnx.ops.attention(
        *map(joined, (query, key, value)),
        mask,
        q_num_heads=heads,
        kv_num_heads=heads,
        scale=scaling,
    )[0]
    return output.reshape(query.shape[0], sequence, heads, size), None


def torch_attention(
    _module: nn.Module, *query_key_value_mask: Any, scaling: float | None = None, **_: Any
) -> tuple[torch.Tensor, None]:
    """PyTorch's own, in the form that the fusions of transformers know."""
    output = nn.functional.scaled_dot_product_attention(*query_key_value_mask, scale=scaling)
    return output.transpose(1, 2), None


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the exporter's account of its steps, of missing packages and of its own deprecations."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir", "transformers")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
