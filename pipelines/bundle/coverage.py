"""What a session would do that its certificate did not measure."""

from collections.abc import Mapping, Sequence
from typing import Any

import onnxruntime as ort

from pipelines.bundle import providers
from pipelines.bundle.limits import looser_than_today
from pipelines.bundle.manifest import Certificate
from pipelines.bundle.settings import RuntimeSpec


def find_gap(certificate: Certificate, spec: RuntimeSpec) -> str:
    """The first difference in words; empty when the session was measured as it would run here."""
    measured: Mapping[str, Any] = certificate.content.get("environment", {})
    checks = (_batch_gap, _onnxruntime_gap, _vector_gap, _gpu_gap)
    gaps = [check(measured, spec) for check in checks]
    return next(filter(None, (*gaps, _limits_gap(certificate), _images_gap(certificate))), "")


def _batch_gap(measured: Mapping[str, Any], spec: RuntimeSpec) -> str:
    """On CPU smaller batches than the measured one are covered, as the measurement proves that they change
    nothing. On a GPU every batch size has kernels of its own."""
    sizes = measured.get("buckets") or [0]
    if spec.batch_size > max(sizes) or not (spec.provider == "cpu" or set(spec.buckets) <= set(sizes)):
        return (
            f"it measured batches of {_listed(sizes)} images, and {_listed(spec.buckets)} would run (give "
            "the --batch-size that was measured, or measure this one)"
        )
    return ""


def _onnxruntime_gap(measured: Mapping[str, Any], spec: RuntimeSpec) -> str:
    """Kernels change between minor releases and not within one."""
    stated, here = str(measured.get("onnxruntime")), ort.__version__
    if stated.split(".")[:2] == here.split(".")[:2]:
        return ""
    return f"it was measured with ONNX Runtime {stated}, and {here} would run"


def _vector_gap(measured: Mapping[str, Any], spec: RuntimeSpec) -> str:
    """int8 products are rounded otherwise with and without the instructions for them."""
    stated, here = measured.get("vector_extensions"), providers.vector_extensions()
    if spec.precision != "int8" or stated == here:
        return ""
    named = "unknown" if stated is None else " ".join(stated) or "none"
    return f"it was measured with the vector extensions {named}, and this CPU has {' '.join(here) or 'none'}"


def _gpu_gap(measured: Mapping[str, Any], spec: RuntimeSpec) -> str:
    """Other models of GPU have other kernels. A machine without one, such as a cluster's head, has no gap."""
    if spec.provider == "cpu":
        return ""
    try:
        here = _model_of(providers.gpu_name(spec.device_id))
    except providers.ProviderUnavailable:
        return ""
    stated = _model_of(str(measured.get("machine")))
    return "" if stated == here else f"it was measured on the GPU {stated}, and this one is {here}"


def _model_of(gpu_name: str) -> str:
    """The GPU's name without its driver, which may change."""
    return gpu_name.partition(providers.DRIVER)[0]


def _limits_gap(certificate: Certificate) -> str:
    looser = looser_than_today(certificate.content.get("limits", {}), certificate.precision)
    return f"its limits are looser than today's: {', '.join(looser)}" if looser else ""


def _images_gap(certificate: Certificate) -> str:
    own = certificate.content.get("images", {}).get("own", 0)
    return "" if own else "none of your own images was compared in it"


def _listed(sizes: Sequence[int]) -> str:
    return ", ".join(map(str, sizes))
