"""What an ONNX file of a bundle may hold: its own weights, and operators whose code is known.

ONNX Runtime opens whatever paths a graph names, so this is checked before it sees the bytes. Integrity is
checked by hash.
"""

from collections.abc import Iterator
from typing import Any

from pipelines.bundle.manifest import BundleDamaged

KNOWN_DOMAINS = frozenset({"", "ai.onnx", "com.microsoft"})
ENGINE = "EPContext"
"""Operator of com.microsoft that loads native code, a compiled engine, from a path or from its attribute."""


def check_graph(payload: bytes, name: str) -> None:
    """Refuse an ONNX file that reaches beyond itself, wherever in it: in a branch, a constant, a function.

    Raises:
        BundleDamaged: weights in other files, operators of unknown libraries, functions, compiled engines;
            or it cannot be parsed.
    """
    import onnx
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    try:
        model = onnx.load_model_from_string(payload)
    except DecodeError as error:
        raise BundleDamaged(f"{name} is not an ONNX file: {error}") from error
    if model.functions:
        raise BundleDamaged(
            f"{name} defines the function {model.functions[0].name}; a bundle's models use operators alone"
        )
    for message in _messages(model):
        if isinstance(message, onnx.TensorProto):
            _check_tensor(message, name)
        elif isinstance(message, (onnx.NodeProto, onnx.OperatorSetIdProto)):
            _check_operator(message, name)


def _messages(message: Any) -> Iterator[Any]:
    """The protobuf message and every one inside it: attributes hold tensors, and whole graphs."""
    yield message
    for field, value in message.ListFields():
        if field.message_type is not None:
            for inner in value if field.is_repeated else (value,):
                yield from _messages(inner)


def _check_tensor(tensor: Any, name: str) -> None:
    if tensor.data_location != tensor.DEFAULT or tensor.external_data:
        raise BundleDamaged(
            f"{name} keeps {tensor.name or 'a tensor'} in another file; models of a bundle hold theirs"
        )


def _check_operator(message: Any, name: str) -> None:
    """Of a node, or of an import of operators."""
    if message.domain not in KNOWN_DOMAINS:
        known = ", ".join(sorted(KNOWN_DOMAINS - {""}))
        raise BundleDamaged(f"{name} uses operators of {message.domain}; known are those of {known}")
    if getattr(message, "op_type", "") == ENGINE:
        raise BundleDamaged(f"{name} holds a compiled engine ({ENGINE}); engines are built on their own GPU")
