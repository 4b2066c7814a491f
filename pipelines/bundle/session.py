"""The one place that runs a released model: classify, predict and the parity measurement all use it.

An `OnnxModel` turns uint8 pixels of any number into logits and probabilities, on the provider that was
asked for or not at all. Batches have a few fixed sizes; on a GPU a smaller one is padded. It opens no
bundle, decodes no image and imports no torch.
"""

import ctypes
import weakref
from typing import Any

import numpy as np
import onnxruntime as ort

from pipelines import metrics
from pipelines.bundle import providers
from pipelines.bundle.bundle import Bundle
from pipelines.bundle.manifest import BundleDamaged
from pipelines.bundle.providers import ProviderUnavailable
from pipelines.bundle.settings import RuntimeSpec
from pipelines.messages import JobFailed, first_line

INPUT = "pixels"
OUTPUTS = ["logits", "probabilities"]
_GPU_ADVICE = "Check nvidia-smi, and install the CUDA 13 libraries: pip install 'onnxruntime-gpu[cuda,cudnn]'"


class OnnxModel:
    """A loaded and verified ONNX model, warm on a GPU.

    Raises:
        ProviderUnavailable: the session would run anything on another provider than `spec.provider`.
        BundleDamaged: the bytes are not a graph of this project.
        JobFailed: the first batch on a GPU did not run, as when memory is too small for `spec.batch_size`.
    """

    def __init__(self, model: bytes, spec: RuntimeSpec) -> None:
        self.spec = spec
        sizes = [spec.batch_size] if spec.provider == "cpu" else spec.buckets[::-1]
        self._sessions = {size: Session(model, spec, size) for size in sizes}
        self._largest = self._sessions[spec.batch_size]
        session = self._largest.session
        self.providers: list[str] = session.get_providers()
        self.metadata: dict[str, str] = session.get_modelmeta().custom_metadata_map
        self.height, self.width, _ = self._largest.image_shape
        self.n_classes = int(session.get_outputs()[0].shape[1])

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
        n = len(pixels_nhwc)
        logits_nc, probabilities_nc = (np.empty((n, self.n_classes), np.float32) for _ in OUTPUTS)
        start = 0
        while start < n:
            stop = start + self.spec.next_batch(n - start)
            batch_nhwc = pixels_nhwc[start:stop]
            logits_nc[start:stop], probabilities_nc[start:stop] = self._session(len(batch_nhwc))(batch_nhwc)
            metrics.count("images_run", len(batch_nhwc))
            metrics.count("batch_places", self.batch_size)
            start = stop
        return logits_nc, probabilities_nc

    def environment(self) -> dict[str, Any]:
        """What a certificate must say about how and where this model ran."""
        session, on_cpu = self._largest.session, self.spec.provider == "cpu"
        return {
            "onnxruntime": ort.__version__,
            "providers": self.providers,
            "provider_options": session.get_provider_options(),
            "batch_size": self.batch_size,
            "buckets": self.spec.buckets,
            "threads": self.spec.threads,
            "vector_extensions": providers.vector_extensions(),
            "allow_tf32": False,
            "machine": providers.cpu_name() if on_cpu else providers.gpu_name(self.spec.device_id),
            "nodes": {name: len(kinds) for name, kinds in providers.placement(session).items()},
        }

    def _session(self, n: int) -> "Session":
        """The session with the smallest batch that holds `n` images."""
        return self._sessions[min(size for size in self._sessions if size >= n)]


def load(bundle: Bundle, spec: RuntimeSpec) -> OnnxModel:
    """The model of an opened bundle; the caller must have checked that it is certified."""
    return OnnxModel(bundle.model_bytes(spec.precision), spec)


class Session:
    """One ONNX Runtime session: up to `size` images a run on CPU, padded to `size` on a GPU."""

    def __init__(self, model: bytes, spec: RuntimeSpec, size: int) -> None:
        self.size = size
        self._spec = spec
        self.session = _create(model, spec, size)
        _check_signature(self.session)
        providers.check_placement(self.session, spec)
        height, width, channels = self.session.get_inputs()[0].shape[1:]
        self.image_shape = (int(height), int(width), int(channels))
        if spec.provider != "cpu":
            self._bind(spec.device_id)
            # A full batch captures the graph, and finds too little memory now and not in an hour. On CPU the
            # first batch of the run does: only the last one of a chunk is smaller.
            self(np.zeros((size, *self.image_shape), np.uint8))

    def __call__(self, batch_nhwc: np.ndarray) -> list[np.ndarray]:
        """Logits and probabilities of at most `size` images.

        Raises:
            JobFailed: the run failed; out of memory is one reason, which ONNX Runtime has no type for.
        """
        run = self._run_cpu if self._spec.provider == "cpu" else self._run_bound
        try:
            return run(batch_nhwc)
        except Exception as error:  # ORT raises an unrelated type for each reason
            raise _run_failed(self._spec, len(batch_nhwc), error) from error

    def _run_cpu(self, batch_nhwc: np.ndarray) -> list[np.ndarray]:
        outputs: list[np.ndarray] = self.session.run(OUTPUTS, {INPUT: np.ascontiguousarray(batch_nhwc)})
        return outputs

    def _run_bound(self, batch_nhwc: np.ndarray) -> list[np.ndarray]:
        n = len(batch_nhwc)
        self._staging[:n] = batch_nhwc
        self._staging[n:] = 0
        self._device_input.update_inplace(self._staging)
        self.session.run_with_iobinding(self._binding)
        return [value.numpy()[:n] for value in self._device_outputs]

    def _bind(self, device_id: int) -> None:
        """Buffers at fixed addresses, as CUDA graphs need; the host side is page-locked for a faster copy."""
        device = ("cuda", device_id)
        self._staging = _page_locked((self.size, *self.image_shape))
        self._device_input = ort.OrtValue.ortvalue_from_numpy(self._staging, *device)
        self._binding = self.session.io_binding()
        self._binding.bind_ortvalue_input(INPUT, self._device_input)
        self._device_outputs = []
        for output in self.session.get_outputs():
            shape = [self.size, int(output.shape[1])]
            value = ort.OrtValue.ortvalue_from_shape_and_type(shape, np.float32, *device)
            self._binding.bind_ortvalue_output(output.name, value)
            self._device_outputs.append(value)


def _create(model: bytes, spec: RuntimeSpec, size: int) -> ort.InferenceSession:
    if spec.provider != "cpu":
        ort.preload_dlls()  # the CUDA libraries of the Python packages, which the provider would not find
    try:
        return ort.InferenceSession(
            model,
            providers.session_options(spec, size),
            providers=providers.provider_options(spec),
            enable_fallback=0,  # the Python wrapper's own retry on CPU, whatever the options say
        )
    except Exception as error:  # ORT raises an unrelated type for each reason
        if spec.provider == "cpu":
            raise BundleDamaged(f"ONNX Runtime {ort.__version__} cannot load the model: {error}") from error
        raise ProviderUnavailable(
            f"ONNX Runtime {ort.__version__} cannot load the model on {spec.provider} {spec.device_id}: "
            f"{error}. {_GPU_ADVICE}"
        ) from error


def _check_signature(session: ort.InferenceSession) -> None:
    inputs = [(value.name, value.type, len(value.shape)) for value in session.get_inputs()]
    outputs = [value.name for value in session.get_outputs()]
    if inputs != [(INPUT, "tensor(uint8)", 4)] or outputs != OUTPUTS:
        raise BundleDamaged(
            f"the graph maps {inputs} to {outputs}; ours map uint8 [batch, height, width, 3] to {OUTPUTS}"
        )


def _run_failed(spec: RuntimeSpec, n: int, error: Exception) -> JobFailed:
    return JobFailed(
        f"ONNX Runtime {ort.__version__} could not run a batch of {n} images on {spec.provider}: "
        f"{first_line(error)}. If memory is too small, lower --batch-size (--parity.batch-size in export "
        f"and certify). {_GPU_ADVICE if spec.provider != 'cpu' else ''}".rstrip()
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
