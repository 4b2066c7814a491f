"""ONNX Runtime's execution providers: what each is asked for, and proof that it is the one that runs.

Options, libraries, placement of the nodes, and where TensorRT keeps its engines. It runs no model
(`runtime.py` does), and everything but `gpu_name`, `load_libraries` and a real session works without a GPU.
"""

import fcntl
import hashlib
import importlib
import os
import platform
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import onnxruntime as ort

from pipelines.specs import Provider, RuntimeSpec

EP_NAMES: dict[Provider, str] = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
}
_QUIET = 3  # errors only: the warnings about shape nodes come once per session and mean nothing to a user


class ProviderUnavailable(RuntimeError):
    """The provider that was asked for is not the one that would run the model."""


def session_options(spec: RuntimeSpec, bucket: int) -> ort.SessionOptions:
    """Options of a session; on a GPU it is frozen to `bucket` images a run."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.intra_op_num_threads = spec.threads
    options.inter_op_num_threads = 1
    options.log_severity_level = _QUIET
    for key, value in session_entries(spec).items():
        options.add_session_config_entry(key, value)
    if spec.provider != "cpu":
        # Folds away the shape arithmetic of a dynamic batch, which would sit on the CPU provider.
        options.add_free_dimension_override_by_name("batch", bucket)
    return options


def session_entries(spec: RuntimeSpec) -> dict[str, str]:
    """Session settings that have only a name; ONNX Runtime ignores one that it does not know."""
    entries = {
        # Idle threads that spin take the cores from the decoders and from other sessions beside them.
        "session.intra_op.allow_spinning": "0",
        "session.record_ep_graph_assignment_info": "1",
    }
    if spec.precision == "int8":
        # A CPU without VNNI adds products of unsigned and signed bytes in 16 bits, where they overflow.
        entries["session.x64quantprecision"] = "1"
    if spec.provider != "cpu":
        # Without it a missing CUDA library means a warning and a session on CPU (onnxruntime #23372).
        entries["session.disable_cpu_ep_fallback"] = "1"
    return entries


def requested(spec: RuntimeSpec, engines: Path | None) -> list[tuple[str, dict[str, str]]]:
    """Providers and their options, in the order in which they are offered the graph.

    CUDA behind TensorRT only makes the refusal of `check_placement` name what TensorRT does not know.
    """
    if spec.provider == "cpu":
        return [(EP_NAMES["cpu"], {})]
    cuda = {
        "device_id": str(spec.device_id),
        "use_tf32": "1" if spec.allow_tf32 else "0",
        "arena_extend_strategy": "kSameAsRequested",
        "cudnn_conv_algo_search": "HEURISTIC",
    }
    if engines is None:
        return [(EP_NAMES["cuda"], {**cuda, "enable_cuda_graph": "1"})]
    tensorrt = {
        "device_id": str(spec.device_id),
        "trt_fp16_enable": "True",  # this parser knows True and False alone, CUDA's 1 and 0 too
        "trt_layer_norm_fp32_fallback": "True",
        "trt_cuda_graph_enable": "True",
        "trt_engine_cache_enable": "True",
        "trt_engine_cache_path": str(engines),
        "trt_timing_cache_enable": "True",
        "trt_timing_cache_path": str(engines.parent),  # what one batch size has timed helps the next
    }
    return [(EP_NAMES["tensorrt"], tensorrt), (EP_NAMES["cuda"], cuda)]


def load_libraries(provider: Provider) -> None:
    """Put the CUDA (and TensorRT) libraries of the Python packages where the provider finds them."""
    if provider == "cpu":
        return
    ort.preload_dlls()
    if provider == "tensorrt":
        tensorrt_version()


def tensorrt_version() -> str:
    """Version of the TensorRT package, whose import loads libnvinfer."""
    try:
        return str(importlib.import_module("tensorrt").__version__)
    except ImportError as error:
        raise ProviderUnavailable("TensorRT is not installed: pip install 'tensorrt-cu13<11'") from error


def check_placement(session: ort.InferenceSession, spec: RuntimeSpec) -> None:
    """The provider asked for must be active and run every node; raises `ProviderUnavailable`."""
    active, wanted = session.get_providers(), EP_NAMES[spec.provider]
    if active[0] != wanted:
        raise ProviderUnavailable(f"{spec.provider} was asked for, but the session runs on {active}")
    others = {name: sorted(set(kinds)) for name, kinds in placement(session).items() if name != wanted}
    if others:
        raise ProviderUnavailable(
            f"{spec.provider} was asked for, but it leaves operators to {others}; use another --provider"
        )


def placement(session: ort.InferenceSession) -> dict[str, list[str]]:
    """Provider -> the kinds of operators that it runs, once for each node."""
    found: dict[str, list[str]] = {}
    for subgraph in session.get_provider_graph_assignment_info():
        found.setdefault(subgraph.ep_name, []).extend(node.op_type for node in subgraph.get_nodes())
    return found


def engine_folder(model: bytes, spec: RuntimeSpec, bucket: int) -> Path | None:
    """Folder of the TensorRT engines of this model, batch size and kind of GPU; None on other providers.

    Raises:
        ProviderUnavailable: someone else could write there.
    """
    if spec.provider != "tensorrt":
        return None
    root = Path(spec.engine_cache or Path.home() / ".cache" / "iab-vision" / "engines")
    machine = f"{gpu_name(spec.device_id)} tensorrt {tensorrt_version()}"
    return private_engine_folder(root, model, machine, bucket)


def private_engine_folder(root: Path, model: bytes, machine: str, bucket: int) -> Path:
    """`root`/model and machine/batch size, made when missing, each of them this user's alone.

    An engine is native code for one GPU, one TensorRT and one shape. ONNX Runtime names its file after the
    graph's nodes, not their shapes, and would load the engine of another batch size from the same folder.
    Whoever may write into the folder runs code in this process.

    Raises:
        ProviderUnavailable: a folder cannot be made, is of another user, or others may write to it.
    """
    model_folder = (
        root / f"{hashlib.sha256(model).hexdigest()[:16]}-{re.sub(r'[^A-Za-z0-9.]+', '-', machine)}"
    )
    folder = model_folder / f"batch-{bucket}"
    remedy = "name a folder of your own with --engine-cache (--measuring.engine-cache in certify)"
    try:
        root.parent.mkdir(parents=True, exist_ok=True)
        for path in (root, model_folder, folder):
            path.mkdir(mode=0o700, exist_ok=True)
            status = path.stat()
            if status.st_uid != os.getuid() or status.st_mode & 0o022:
                raise ProviderUnavailable(
                    f"{path} is of user {status.st_uid} with mode {status.st_mode & 0o777:o}; TensorRT's "
                    f"engines are native code, which nobody but user {os.getuid()} may write: {remedy}"
                )
    except OSError as error:
        raise ProviderUnavailable(f"TensorRT's engines have no place in {root}: {error}; {remedy}") from error
    return folder


@contextmanager
def alone_with(engines: Path | None) -> Iterator[None]:
    """One process of this machine at a time: several GPUs' sessions start at once, and one builds for all.

    ONNX Runtime writes an engine in place, and would read the half of one that another is writing.
    """
    if engines is None:
        yield
        return
    with (engines.parent / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


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
