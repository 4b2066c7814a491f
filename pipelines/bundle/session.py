"""The one place that runs a released model: classify, predict and the parity measurement all come here.

An `OnnxModel` turns uint8 pixels of any number into logits and probabilities, on the provider that was
asked for (`providers.py`) or not at all. Batches have a few fixed sizes, which halve where memory runs out;
on a GPU a smaller one is padded. It neither opens bundles' files nor decodes images, nor imports torch.
"""

import ctypes
import gc
import logging
import weakref
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import numpy as np
import onnxruntime as ort

from pipelines.bundle import providers
from pipelines.bundle.bundle import Bundle
from pipelines.bundle.providers import ProviderUnavailable
from pipelines.specs import RuntimeSpec

INPUT = "pixels"
OUTPUTS = ["logits", "probabilities"]
_OUT_OF_MEMORY = (
    "out of memory",
    "out_of_memory",
    "failed to allocate",
    "bad_alloc",
    "bad allocation",
    "allocation failed",
    "alloc_failed",  # CUBLAS_STATUS_…, CUDNN_STATUS_…
    "allocation_failed",  # CUDNN_STATUS_INTERNAL_ERROR_DEVICE_…
    "cudaerrormemoryallocation",
    "smaller than requested bytes",
)
"""How ONNX Runtime's arenas, CUDA's libraries and C++ word it: it has no exception type."""

log = logging.getLogger(__name__)
Result = TypeVar("Result")


class ModelUnusable(ValueError):
    """The graph is not one of ours: wrong inputs, wrong outputs, or the runtime cannot load it."""


class OutOfMemory(RuntimeError):
    """Not even one image fits into memory beside the model."""


class OnnxModel:
    """A loaded, verified and warm ONNX model.

    Raises:
        ProviderUnavailable: the session would run anything on another provider than `spec.provider`.
        ModelUnusable: the bytes are not a graph of this project.
        OutOfMemory: not even batches of one image fit.
    """

    def __init__(self, model: bytes, spec: RuntimeSpec) -> None:
        self.spec = spec
        """How it runs; its batch size halves when memory runs out."""
        self._model = model
        self._sessions: dict[int, Session] = {}
        largest = None
        while largest is None:
            largest = self._within_memory(self._open)
        self.providers: list[str] = largest.session.get_providers()
        self.metadata: dict[str, str] = largest.session.get_modelmeta().custom_metadata_map
        self.height, self.width, _ = largest.image_shape
        self.n_classes = int(largest.session.get_outputs()[0].shape[1])

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
            batch = pixels_nhwc[start : start + self.spec.next_batch(len(pixels_nhwc) - start)]
            outputs = self._within_memory(partial(self._answer, batch))
            if outputs is not None:
                stop = start + len(batch)
                logits_nc[start:stop], probabilities_nc[start:stop] = outputs
                start = stop
        return logits_nc, probabilities_nc

    def environment(self) -> dict[str, Any]:
        """What a certificate must say about how and where this model ran."""
        largest = self._open()
        on_cpu = self.spec.provider == "cpu"
        return {
            "onnxruntime": ort.__version__,
            "providers": self.providers,
            "provider_options": largest.session.get_provider_options(),
            "batch_size": self.batch_size,
            "buckets": self.spec.buckets,
            "threads": self.spec.threads,
            "allow_tf32": self.spec.allow_tf32,
            "machine": providers.cpu_name() if on_cpu else providers.gpu_name(self.spec.device_id),
            "nodes": {name: len(kinds) for name, kinds in providers.placement(largest.session).items()},
        }

    def _open(self) -> "Session":
        """The session of the largest batches, which run first; those that are missing are made and warmed."""
        keys = [0] if self.spec.provider == "cpu" else self.spec.buckets
        for key in reversed(keys):
            if key not in self._sessions:
                self._sessions[key] = Session(self._model, self.spec, key)
        return self._sessions[keys[-1]]

    def _answer(self, batch_nhwc: np.ndarray) -> list[np.ndarray]:
        self._open()  # after a halving there are none
        bucket = next(size for size in self.spec.buckets if size >= len(batch_nhwc))
        return self._sessions[0 if self.spec.provider == "cpu" else bucket](batch_nhwc)

    def _within_memory(self, work: Callable[[], Result]) -> Result | None:
        """What `work` gives; None when memory ran out: then no session is left, and batches are halved."""
        try:
            return work()
        except Exception as error:  # ORT raises several unrelated types for one full memory
            if not _is_out_of_memory(error):
                raise
            reason = str(error)
        # Behind the handler: the error's traceback would keep the session alive that has to go.
        size = self.batch_size
        if size == 1:
            raise OutOfMemory(
                f"one image does not fit into the memory of {self.spec.provider} beside the model: {reason}"
            )
        self._sessions.clear()
        gc.collect()
        self.spec = replace(self.spec, batch_size=size // 2)
        log.warning(
            "memory ran out on %s at batches of %d images; going on with %d: %s",
            self.spec.provider, size, size // 2, reason,
        )  # fmt: skip
        return None


def load(bundle: Bundle, spec: RuntimeSpec) -> OnnxModel:
    """The model of an opened bundle; whether it is certified is for the caller to have checked."""
    return OnnxModel(bundle.model_bytes(spec.precision), spec)


class Session:
    """One warm ONNX Runtime session; with `bucket` > 0 frozen to that batch size with its buffers bound."""

    def __init__(self, model: bytes, spec: RuntimeSpec, bucket: int) -> None:
        self.bucket = bucket
        if spec.provider != "cpu":
            ort.preload_dlls()  # the CUDA libraries of the Python packages, which the provider would not find
        try:
            self.session = ort.InferenceSession(
                model,
                providers.session_options(spec, bucket),
                providers=providers.requested(spec),
                enable_fallback=0,  # the Python wrapper's own retry on CPU, whatever the options say
            )
            _check_signature(self.session)
            providers.check_placement(self.session, spec)
            height, width, channels = self.session.get_inputs()[0].shape[1:]
            self.image_shape = (int(height), int(width), int(channels))
            if bucket:
                self._bind(spec.device_id)
            self(np.zeros((bucket or 1, *self.image_shape), np.uint8))  # captures the CUDA graph
        except (ModelUnusable, ProviderUnavailable, MemoryError):
            raise
        except Exception as error:  # ORT has an unrelated type per reason; all mean no
            raise _refusal(spec, error) from error

    def __call__(self, batch_nhwc: np.ndarray) -> list[np.ndarray]:
        """Logits and probabilities of a batch, which a frozen session pads."""
        if not self.bucket:
            outputs: list[np.ndarray] = self.session.run(OUTPUTS, {INPUT: np.ascontiguousarray(batch_nhwc)})
            return outputs
        n = len(batch_nhwc)
        self._staging[:n] = batch_nhwc
        self._staging[n:] = 0
        self._device_input.update_inplace(self._staging)
        self.session.run_with_iobinding(self._binding)
        return [value.numpy()[:n] for value in self._device_outputs]

    def _bind(self, device_id: int) -> None:
        """Buffers at fixed addresses, as CUDA graphs need; the host side is page-locked for a faster copy."""
        device = ("cuda", device_id)
        self._staging = _page_locked((self.bucket, *self.image_shape))
        self._device_input = ort.OrtValue.ortvalue_from_numpy(self._staging, *device)
        self._binding = self.session.io_binding()
        self._binding.bind_ortvalue_input(INPUT, self._device_input)
        self._device_outputs = []
        for output in self.session.get_outputs():
            shape = [self.bucket, int(output.shape[1])]
            value = ort.OrtValue.ortvalue_from_shape_and_type(shape, np.float32, *device)
            self._binding.bind_ortvalue_output(output.name, value)
            self._device_outputs.append(value)


def _is_out_of_memory(error: Exception) -> bool:
    text = str(error).lower()
    return isinstance(error, MemoryError) or any(words in text for words in _OUT_OF_MEMORY)


def _check_signature(session: ort.InferenceSession) -> None:
    inputs = [(value.name, value.type, len(value.shape)) for value in session.get_inputs()]
    outputs = [value.name for value in session.get_outputs()]
    if inputs != [(INPUT, "tensor(uint8)", 4)] or outputs != OUTPUTS:
        raise ModelUnusable(
            f"the graph maps {inputs} to {outputs}; ours map uint8 [batch, height, width, 3] to {OUTPUTS}"
        )


def _refusal(spec: RuntimeSpec, error: Exception) -> Exception:
    if spec.provider == "cpu":
        return ModelUnusable(f"ONNX Runtime {ort.__version__} cannot load the model: {error}")
    return ProviderUnavailable(
        f"ONNX Runtime {ort.__version__} cannot run the model on {spec.provider} {spec.device_id}: {error}. "
        "Check nvidia-smi, and install the CUDA 13 libraries: pip install 'onnxruntime-gpu[cuda,cudnn]'"
    )


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
