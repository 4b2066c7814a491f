"""The one place that runs a released model: classify, predict and the parity measurement all come here.

An `OnnxModel` turns uint8 pixels of any number into logits and probabilities, on the provider that was
asked for or not at all. Batches have a few fixed sizes; the last one is padded. It neither opens
bundles' files nor decodes images, and it never imports torch.
"""

import ctypes
import hashlib
import importlib
import os
import platform
import re
import subprocess
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from pipelines.bundle import Bundle
from pipelines.specs import Provider, RuntimeSpec
from pipelines.storage import is_local, local_path

INPUT = "pixels"
OUTPUTS = ["logits", "probabilities"]
EP_NAMES: dict[Provider, str] = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
}
_OUT_OF_MEMORY = (
    "out of memory",
    "OUT_OF_MEMORY",
    "Failed to allocate memory",
    "bad_alloc",
    "bad allocation",
)
"""How ONNX Runtime's arenas, CUDA, cuBLAS and the C++ library word it: there is no exception type for it."""
_QUIET = 3  # errors only: the warnings about shape nodes come once per session and mean nothing to a user


class ProviderUnavailable(RuntimeError):
    """The provider that was asked for is not the one that would run the model."""


class ModelUnusable(ValueError):
    """The graph is not one of ours: wrong inputs, wrong outputs, or the runtime cannot load it."""


class OutOfMemory(RuntimeError):
    """Not even one image fits into memory beside the model."""


class OnnxModel:
    """A loaded and verified ONNX model.

    Raises:
        ProviderUnavailable: the session would run anything on another provider than `spec.provider`.
        ModelUnusable: the bytes are not a graph of this project.
    """

    def __init__(self, model: bytes, spec: RuntimeSpec) -> None:
        self.spec = spec
        """How it runs; its batch size halves when memory runs out."""
        self._model = model
        self._sessions: dict[int, _Session] = {}
        probe = self._session(self._bucket(1 if spec.provider == "cpu" else spec.batch_size))
        self.providers: list[str] = probe.session.get_providers()
        self.metadata: dict[str, str] = probe.session.get_modelmeta().custom_metadata_map
        shape = probe.session.get_inputs()[0].shape
        self.height, self.width = int(shape[1]), int(shape[2])
        self.n_classes = int(probe.session.get_outputs()[0].shape[1])
        self.run(np.zeros((probe.bucket or 1, self.height, self.width, 3), np.uint8))  # warm-up

    @property
    def batch_size(self) -> int:
        """Most images that are run at once."""
        return self.spec.batch_size

    def run(self, pixels_nhwc: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Logits and probabilities, float32 [n, classes], of uint8 [n, height, width, 3]; any n."""
        expected = (self.height, self.width, 3)
        if pixels_nhwc.dtype != np.uint8 or pixels_nhwc.shape[1:] != expected:
            raise ValueError(
                f"pixels are {pixels_nhwc.dtype} {pixels_nhwc.shape}; the model takes uint8 [n, {expected}]"
            )
        logits_nc, probabilities_nc = (
            np.empty((len(pixels_nhwc), self.n_classes), np.float32) for _ in OUTPUTS
        )
        start = 0
        while start < len(pixels_nhwc):
            batch = pixels_nhwc[start : start + self.batch_size]
            outputs = self._attempt(batch)
            if outputs is not None:
                stop = start + len(batch)
                logits_nc[start:stop], probabilities_nc[start:stop] = outputs
                start = stop
        return logits_nc, probabilities_nc

    def environment(self) -> dict[str, Any]:
        """What a certificate must say about how and where this model ran."""
        session = next(iter(self._sessions.values())).session
        return {
            "onnxruntime": ort.__version__,
            "providers": self.providers,
            "provider_options": session.get_provider_options(),
            "batch_size": self.batch_size,
            "buckets": self.spec.buckets,
            "threads": self.spec.threads,
            "allow_tf32": self.spec.tf32,
            "machine": cpu_name() if self.spec.provider == "cpu" else gpu_name(self.spec.device_id),
            "nodes": {name: len(kinds) for name, kinds in placement(session).items()},
        }

    def _attempt(self, batch_nhwc: np.ndarray) -> list[np.ndarray] | None:
        """The outputs, or None when memory ran out and the batch size was halved."""
        bucket = self._bucket(len(batch_nhwc))
        try:
            return self._session(bucket)(batch_nhwc, bucket)
        except Exception as error:  # ORT raises several unrelated types for one full memory
            if not any(words in str(error) for words in _OUT_OF_MEMORY):
                raise
            self._halve(bucket, error)
            return None

    def _halve(self, bucket: int, error: Exception) -> None:
        if bucket == 1:
            raise OutOfMemory(
                f"one image does not fit into the memory of {self.spec.provider} beside the model: {error}"
            ) from error
        self.spec = replace(self.spec, batch_size=bucket // 2)
        self._sessions.clear()

    def _bucket(self, n: int) -> int:
        return next(size for size in self.spec.buckets if size >= n)

    def _session(self, bucket: int) -> "_Session":
        key = 0 if self.spec.provider == "cpu" else bucket
        if key not in self._sessions:
            self._sessions[key] = _Session(self._model, self.spec, key)
        return self._sessions[key]


def load(bundle: Bundle, spec: RuntimeSpec) -> OnnxModel:
    """The model of an opened bundle; whether it is certified is for the caller to have checked.

    TensorRT's engines are kept beside a local bundle, in the folder of its name with `.engines` behind it.
    """
    if spec.provider == "tensorrt" and not spec.engine_cache and is_local(bundle.uri):
        spec = replace(spec, engine_cache=f"{local_path(bundle.uri)}.engines")
    return OnnxModel(bundle.model_bytes(spec.precision, spec.provider), spec)


class _Session:
    """One ONNX Runtime session; with `bucket` > 0 frozen to that batch size with its buffers bound."""

    def __init__(self, model: bytes, spec: RuntimeSpec, bucket: int) -> None:
        self.spec = spec
        self.bucket = bucket
        if spec.provider != "cpu":
            _load_gpu_libraries(spec.provider)
        providers = [(EP_NAMES[spec.provider], _provider_options(model, spec, bucket))]
        if spec.provider == "tensorrt":
            providers.append((EP_NAMES["cuda"], _cuda_options(spec)))
        try:
            self.session = ort.InferenceSession(model, _session_options(spec, bucket), providers=providers)
        except Exception as error:  # ORT has an unrelated type per reason; all mean no
            raise _refusal(spec, error) from error
        _check_signature(self.session)
        _check_placement(self.session, spec)
        if bucket:
            self._bind()

    def __call__(self, batch_nhwc: np.ndarray, bucket: int) -> list[np.ndarray]:
        n = len(batch_nhwc)
        if not self.bucket:
            padded = np.zeros((bucket, *batch_nhwc.shape[1:]), np.uint8) if n < bucket else batch_nhwc
            if n < bucket:
                padded[:n] = batch_nhwc
            outputs = self.session.run(OUTPUTS, {INPUT: np.ascontiguousarray(padded)})
        else:
            self._staging[:n] = batch_nhwc
            self._staging[n:] = 0
            self._device_input.update_inplace(self._staging)
            self.session.run_with_iobinding(self._binding)
            outputs = [value.numpy() for value in self._device_outputs]
        return [output[:n] for output in outputs]

    def _bind(self) -> None:
        """Buffers at fixed addresses, as CUDA graphs need; the host side is page-locked for a faster copy."""
        device = ("cuda", self.spec.device_id)
        _, *sides = self.session.get_inputs()[0].shape
        self._staging = _page_locked((self.bucket, *map(int, sides)))
        self._device_input = ort.OrtValue.ortvalue_from_numpy(self._staging, *device)
        self._binding = self.session.io_binding()
        self._binding.bind_ortvalue_input(INPUT, self._device_input)
        self._device_outputs = []
        for output in self.session.get_outputs():
            shape = [self.bucket, int(output.shape[1])]
            value = ort.OrtValue.ortvalue_from_shape_and_type(shape, np.float32, *device)
            self._binding.bind_ortvalue_output(output.name, value)
            self._device_outputs.append(value)


def _session_options(spec: RuntimeSpec, bucket: int) -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.intra_op_num_threads = spec.threads
    options.inter_op_num_threads = 1
    options.log_severity_level = _QUIET
    # Idle threads that spin take the cores from the decoders and from other sessions beside them.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    if spec.precision == "int8":
        # A CPU without VNNI adds products of unsigned and signed bytes in 16 bits, where they overflow.
        options.add_session_config_entry("session.x64quantprecision", "1")
    if spec.provider != "cpu":
        # Without it a missing CUDA library means a warning and a session on CPU (onnxruntime #23372).
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
        # Folds away the shape arithmetic of a dynamic batch, which would sit on the CPU provider.
        options.add_free_dimension_override_by_name("batch", bucket)
    return options


def _provider_options(model: bytes, spec: RuntimeSpec, bucket: int) -> dict[str, str]:
    if spec.provider == "cpu":
        return {}
    if spec.provider == "cuda":
        return {**_cuda_options(spec), "enable_cuda_graph": "1"}
    cache = str(engine_cache(model, spec))
    shape = f"{INPUT}:{bucket}x{'x'.join(map(str, _image_shape(model)))}"
    return {
        "device_id": str(spec.device_id),
        "trt_fp16_enable": "1" if spec.precision == "fp16" else "0",
        "trt_layer_norm_fp32_fallback": "1",
        "trt_cuda_graph_enable": "1",
        "trt_engine_cache_enable": "1",
        "trt_engine_cache_path": cache,
        "trt_timing_cache_enable": "1",
        "trt_timing_cache_path": cache,
        "trt_profile_min_shapes": shape,
        "trt_profile_opt_shapes": shape,
        "trt_profile_max_shapes": shape,
    }


def _cuda_options(spec: RuntimeSpec) -> dict[str, str]:
    return {
        "device_id": str(spec.device_id),
        "use_tf32": "1" if spec.allow_tf32 else "0",
        "arena_extend_strategy": "kSameAsRequested",
        "cudnn_conv_algo_search": "HEURISTIC",
    }


def engine_cache(model: bytes, spec: RuntimeSpec) -> Path:
    """Folder of the TensorRT engines of this model on this kind of GPU, made when missing.

    An engine is native code for one GPU and one TensorRT, so both are in the name.
    """
    root = Path(spec.engine_cache or Path.home() / ".cache" / "iab-vision" / "engines")
    tensorrt = importlib.import_module("tensorrt").__version__
    versions = re.sub(r"[^\w.]+", "-", f"{gpu_name(spec.device_id)} tensorrt {tensorrt}")
    folder = root / f"{hashlib.sha256(model).hexdigest()[:16]}-{versions}"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    return folder


def _image_shape(model: bytes) -> list[int]:
    """Height, width and channels of the input: an engine's profile is stated before there is a session."""
    onnx = importlib.import_module("onnx")
    pixels = onnx.load_model_from_string(model).graph.input[0]
    return [axis.dim_value for axis in pixels.type.tensor_type.shape.dim[1:]]


def _check_signature(session: ort.InferenceSession) -> None:
    inputs = [(value.name, value.type, len(value.shape)) for value in session.get_inputs()]
    outputs = [value.name for value in session.get_outputs()]
    if inputs != [(INPUT, "tensor(uint8)", 4)] or outputs != OUTPUTS:
        raise ModelUnusable(
            f"the graph maps {inputs} to {outputs}; ours map uint8 [batch, height, width, 3] to {OUTPUTS}"
        )


def _check_placement(session: ort.InferenceSession, spec: RuntimeSpec) -> None:
    """The provider asked for must be active, and on a GPU nothing may be left for the CPU."""
    active = session.get_providers()
    if active[0] != EP_NAMES[spec.provider]:
        raise ProviderUnavailable(f"{spec.provider} was asked for, but the session runs on {active}")
    if spec.provider == "cpu":
        return
    nodes = placement(session)
    allowed = {EP_NAMES[spec.provider], EP_NAMES["cuda"]}  # what TensorRT does not know, CUDA may run
    if EP_NAMES[spec.provider] not in nodes or nodes.keys() - allowed:
        raise ProviderUnavailable(f"{spec.provider} was asked for, but the nodes would run on {nodes}")


def placement(session: ort.InferenceSession) -> dict[str, list[str]]:
    """Provider -> the kinds of operators that it runs, once for each node."""
    found: dict[str, list[str]] = {}
    for subgraph in session.get_provider_graph_assignment_info():
        found.setdefault(subgraph.ep_name, []).extend(node.op_type for node in subgraph.get_nodes())
    return found


def _refusal(spec: RuntimeSpec, error: Exception) -> Exception:
    if spec.provider == "cpu":
        return ModelUnusable(f"ONNX Runtime {ort.__version__} cannot load the model: {error}")
    return ProviderUnavailable(
        f"ONNX Runtime {ort.__version__} cannot run the model on {spec.provider} {spec.device_id}: {error}. "
        "Check nvidia-smi, and install the CUDA 13 libraries: pip install 'onnxruntime-gpu[cuda,cudnn]'"
    )


def _load_gpu_libraries(provider: Provider) -> None:
    """Put the CUDA (and TensorRT) libraries of the Python packages where the provider finds them."""
    ort.preload_dlls()
    if provider == "tensorrt":
        try:
            importlib.import_module("tensorrt")  # loads libnvinfer
        except ImportError as error:
            raise ProviderUnavailable("TensorRT is not installed: pip install 'tensorrt-cu13<11'") from error


def _page_locked(shape: tuple[int, ...]) -> np.ndarray:
    """A zeroed uint8 array whose pages CUDA has locked; an ordinary one where it will not."""
    buffer = np.zeros(shape, np.uint8)
    try:
        cudart = ctypes.CDLL("libcudart.so.13")
    except OSError:
        return buffer  # only the copy to the device is slower
    address = ctypes.c_void_p(buffer.ctypes.data)
    if cudart.cudaHostRegister(address, ctypes.c_size_t(buffer.nbytes), 0) == 0:
        weakref.finalize(buffer, cudart.cudaHostUnregister, address)
    return buffer


def cpu_name() -> str:
    """The processor's model name."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine()
    )


def gpu_name(device_id: int) -> str:
    """The GPU's name and driver, as nvidia-smi says."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    device = visible[device_id] if len(visible) > device_id and visible[device_id] else str(device_id)
    command = ["nvidia-smi", f"--id={device}", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)  # noqa: S603
    except (OSError, subprocess.SubprocessError) as error:
        raise ProviderUnavailable(f"nvidia-smi does not answer: {error}") from error
    return answer.stdout.strip().replace(", ", " driver ")
