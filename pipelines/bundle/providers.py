"""ONNX Runtime's execution providers: what each is asked for, and proof that it is the one that runs.

Options and placement of the nodes. It runs no model, and everything but `gpu_name` works without a GPU.
"""

import os
import platform
import subprocess
from contextlib import suppress
from functools import cache
from pathlib import Path

import onnxruntime as ort

from pipelines.bundle.settings import RuntimeSpec
from pipelines.messages import JobFailed
from pipelines.specs import Provider

EP_NAMES: dict[Provider, str] = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
DRIVER = " driver "
"""Between the model and the driver in `gpu_name`."""
_FLAGS = ("flags", "Features")
"""How lines of /proc/cpuinfo begin that list a CPU's instructions, on x86 and on ARM."""
_INT8_EXTENSIONS = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8", "asimddp", "i8mm", "sve")
_QUIET = 3  # errors only: the warnings about shape nodes come once per session and mean nothing to a user


class ProviderUnavailable(JobFailed):
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
        # Idle threads that spin take the cores from the decoders and from other sessions.
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


def provider_options(spec: RuntimeSpec) -> list[tuple[str, dict[str, str]]]:
    """The one provider that may run the graph, and its options."""
    if spec.provider == "cpu":
        return [(EP_NAMES["cpu"], {})]
    options = {
        "device_id": str(spec.device_id),
        "use_tf32": "0",
        "arena_extend_strategy": "kSameAsRequested",
        "cudnn_conv_algo_search": "HEURISTIC",
        "enable_cuda_graph": "1",
    }
    return [(EP_NAMES["cuda"], options)]


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


def cpu_name() -> str:
    """The processor's model name."""
    return _read_cpuinfo("model name") or platform.processor() or platform.machine()


def vector_extensions() -> list[str]:
    """The instructions of this CPU that int8 products depend on; empty where the system does not say."""
    flags = _read_cpuinfo(*_FLAGS).split()
    return [name for name in _INT8_EXTENSIONS if name in flags]


@cache
def _read_cpuinfo(*keys: str) -> str:
    """The value of the first line that begins with one of these; empty where the system does not say."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith(keys):
                return line.partition(":")[2].strip()
    return ""


def gpu_name(device_id: int) -> str:
    """The GPU's name and driver, as nvidia-smi says."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    device = visible[device_id] if len(visible) > device_id and visible[device_id] else str(device_id)
    try:
        answer = _run_nvidia_smi(f"--id={device}", "--query-gpu=name,driver_version", "--format=csv,noheader")
    except (OSError, subprocess.SubprocessError) as error:
        raise ProviderUnavailable(f"nvidia-smi does not answer: {error}") from error
    return answer.strip().replace(", ", DRIVER)


def count_gpus() -> int:
    """NVIDIA GPUs that this process may use: `CUDA_VISIBLE_DEVICES`, else all that nvidia-smi lists."""
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        devices = os.environ["CUDA_VISIBLE_DEVICES"].split(",")
        return sum(device.strip() not in ("", "-1") for device in devices)
    try:
        return len(_run_nvidia_smi("--list-gpus").splitlines())
    except (OSError, subprocess.SubprocessError):
        return 0


def _run_nvidia_smi(*arguments: str) -> str:
    command = ["nvidia-smi", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout  # noqa: S603
