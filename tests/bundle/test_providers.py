"""What is asked of each execution provider exists, and TensorRT's engines lie where nobody else can write."""

import contextlib
import fcntl
import mmap
from pathlib import Path

import onnxruntime as ort
import pytest
from onnxruntime.capi import onnxruntime_pybind11_state as C

from pipelines.bundle import providers
from pipelines.bundle.providers import ProviderUnavailable, private_engine_folder
from pipelines.specs import RuntimeSpec
from tests.builders.models import small_graph

CAPI = Path(ort.__file__).parent / "capi"


def engines(root: Path, bucket: int = 256, machine: str = "NVIDIA H100 driver 580.1 tensorrt 10.16") -> Path:
    return private_engine_folder(root, b"model", machine, bucket)


def test_engines_of_each_batch_size_and_machine_have_a_folder_of_their_own(tmp_path):
    """ONNX Runtime's own name of the file is the same for all batch sizes: it would load the wrong one."""
    folders = [engines(tmp_path / "b.engines", 256), engines(tmp_path / "b.engines", 32)]
    folders.append(engines(tmp_path / "b.engines", 256, "NVIDIA L4 driver 580.1 tensorrt 10.16"))
    assert len({str(folder) for folder in folders}) == 3
    assert engines(tmp_path / "b.engines", 256) == folders[0]
    assert folders[0].name == "batch-256"
    for folder in (folders[0], folders[0].parent, tmp_path / "b.engines"):
        assert folder.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("level", ["root", "model", "batch"])
@pytest.mark.parametrize("mode", [0o770, 0o707])
def test_engine_folder_that_others_can_write_is_refused(tmp_path, level, mode):
    """An engine is native code: whoever writes it runs code in the process that loads it."""
    folder = engines(tmp_path / "b.engines")
    {"root": folder.parent.parent, "model": folder.parent, "batch": folder}[level].chmod(mode)
    with pytest.raises(ProviderUnavailable, match=rf"mode {mode:o}.*--engine-cache"):
        engines(tmp_path / "b.engines")


def test_engine_folder_of_another_user_is_refused(tmp_path, monkeypatch):
    engines(tmp_path / "b.engines")
    owner = (tmp_path / "b.engines").stat().st_uid
    monkeypatch.setattr("os.getuid", lambda: owner + 1)
    with pytest.raises(ProviderUnavailable, match=rf"of user {owner}.*nobody but user {owner + 1}"):
        engines(tmp_path / "b.engines")


def test_engine_folder_that_cannot_be_made_is_a_clear_error(tmp_path):
    (tmp_path / "b.engines").write_text("a file")
    with pytest.raises(ProviderUnavailable, match=r"no place in .*b\.engines.*--engine-cache"):
        engines(tmp_path / "b.engines")


def test_engines_are_built_by_one_process_at_a_time(tmp_path):
    folder = engines(tmp_path / "b.engines", 256)
    other = engines(tmp_path / "b.engines", 32)
    with (
        providers.alone_with(folder),
        (other.parent / "lock").open() as lock,
        pytest.raises(BlockingIOError),
    ):
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    with providers.alone_with(other), providers.alone_with(None):
        pass


def knows(library: str, name: str) -> bool:
    path = next(CAPI.glob(library), None)
    if path is None:
        pytest.skip("this ONNX Runtime was built without GPU providers")
    with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return content.find(name.encode()) >= 0


SPECS = [RuntimeSpec(precision="int8"), RuntimeSpec("cuda", "fp16"), RuntimeSpec("tensorrt", "fp16")]


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.provider)
def test_every_setting_is_one_that_this_runtime_knows(spec):
    """Unknown session settings are ignored without a word; unknown provider options fail on a GPU alone."""
    for key in providers.session_entries(spec):
        assert knows("onnxruntime_pybind11_state*.so", key), key
    folder = Path("/engines/batch-256") if spec.provider == "tensorrt" else None
    for name, options in providers.requested(spec, folder):
        library = {"TensorrtExecutionProvider": "*_tensorrt.so", "CUDAExecutionProvider": "*_cuda.so"}
        for option in options:
            assert knows(library[name], option), option


@pytest.mark.parametrize("wrong", [{}, {"trt_fp16_enable": "1"}])
def test_tensorrts_settings_have_values_that_it_takes(wrong):
    """The binding reads them before it looks for a GPU, whose absence is then no more than a warning."""
    (name, options), _ = providers.requested(RuntimeSpec("tensorrt", "fp16"), Path("/cache/model/batch-32"))
    session = C.InferenceSession(ort.SessionOptions(), small_graph(), False, False)
    refused = pytest.raises(RuntimeError, match="'True' or 'False'") if wrong else contextlib.nullcontext()
    with refused:
        session.initialize_session([name], [{**options, **wrong}], set())


def test_tensorrt_shares_what_it_timed_between_batch_sizes_but_no_engine():
    (_, options), _ = providers.requested(RuntimeSpec("tensorrt", "fp16"), Path("/cache/model/batch-32"))
    assert options["trt_engine_cache_path"] == "/cache/model/batch-32"
    assert options["trt_timing_cache_path"] == "/cache/model"
    assert not any("profile" in name for name in options)  # without effect once the batch is frozen


class Placed:
    """A session as far as its placement is asked for."""

    def __init__(self, active: str, nodes: dict[str, list[str]]) -> None:
        self.active, self.nodes = active, nodes

    def get_providers(self) -> list[str]:
        return [self.active]

    def get_provider_graph_assignment_info(self):
        return [_Subgraph(name, kinds) for name, kinds in self.nodes.items()]


class _Subgraph:
    def __init__(self, ep_name: str, kinds: list[str]) -> None:
        self.ep_name = ep_name
        self.get_nodes = lambda: [type("Node", (), {"op_type": kind}) for kind in kinds]


TENSORRT, CUDA = providers.EP_NAMES["tensorrt"], providers.EP_NAMES["cuda"]


def test_tensorrt_must_run_every_node():
    spec = RuntimeSpec("tensorrt", "fp16")
    providers.check_placement(Placed(TENSORRT, {TENSORRT: ["MatMul", "Cast"]}), spec)
    with pytest.raises(ProviderUnavailable, match=r"leaves operators to .*CUDA.*'Attention', 'Gemm'"):
        nodes = {TENSORRT: ["Cast"], CUDA: ["Gemm", "Attention", "Gemm"]}
        providers.check_placement(Placed(TENSORRT, nodes), spec)


def test_no_node_may_be_left_to_the_cpu():
    nodes = {CUDA: ["MatMul"], "CPUExecutionProvider": ["Shape"]}
    with pytest.raises(ProviderUnavailable, match=r"leaves operators to .*'Shape'"):
        providers.check_placement(Placed(CUDA, nodes), RuntimeSpec("cuda"))


def test_session_that_fell_back_is_refused():
    with pytest.raises(ProviderUnavailable, match=r"cuda was asked for.*CPUExecutionProvider"):
        providers.check_placement(Placed("CPUExecutionProvider", {}), RuntimeSpec("cuda"))
