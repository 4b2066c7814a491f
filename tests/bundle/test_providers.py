"""Each setting that is asked of an execution provider exists, and the provider must run every node."""

import mmap
from pathlib import Path

import onnxruntime as ort
import pytest

from pipelines.bundle import providers
from pipelines.bundle.providers import ProviderUnavailable
from pipelines.bundle.settings import RuntimeSpec

CAPI = Path(ort.__file__).parent / "capi"


def knows(library: str, name: str) -> bool:
    path = next(CAPI.glob(library), None)
    if path is None:
        pytest.skip("this ONNX Runtime was built without GPU providers")
    with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return content.find(name.encode()) >= 0


SPECS = [RuntimeSpec(precision="int8"), RuntimeSpec("cuda", "fp16")]


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.provider)
def test_every_setting_is_one_that_this_runtime_knows(spec):
    """Unknown session settings are ignored without a word; unknown provider options fail on a GPU alone."""
    for key in providers.session_entries(spec):
        assert knows("onnxruntime_pybind11_state*.so", key), key
    for _, options in providers.provider_options(spec):
        for option in options:
            assert knows("*_cuda.so", option), option


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


CUDA = providers.EP_NAMES["cuda"]


def test_provider_that_runs_every_node_is_accepted():
    providers.check_placement(Placed(CUDA, {CUDA: ["MatMul", "Cast"]}), RuntimeSpec("cuda"))


def test_no_node_may_be_left_to_the_cpu():
    nodes = {CUDA: ["MatMul"], "CPUExecutionProvider": ["Shape"]}
    with pytest.raises(ProviderUnavailable, match=r"leaves operators to .*'Shape'"):
        providers.check_placement(Placed(CUDA, nodes), RuntimeSpec("cuda"))


def test_session_that_fell_back_is_refused():
    with pytest.raises(ProviderUnavailable, match=r"cuda was asked for.*CPUExecutionProvider"):
        providers.check_placement(Placed("CPUExecutionProvider", {}), RuntimeSpec("cuda"))
