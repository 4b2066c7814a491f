"""A model runs on the provider asked for, in few fixed batch sizes, and gives an image one answer."""

import subprocess
import sys
import textwrap

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from pipelines.bundle import providers, session
from pipelines.bundle.manifest import BundleDamaged
from pipelines.bundle.providers import ProviderUnavailable
from pipelines.bundle.session import OnnxModel
from pipelines.bundle.settings import RuntimeSpec
from tests.builders.models import small_graph


def pixels(n: int, height: int = 4, width: int = 6) -> np.ndarray:
    return np.random.default_rng(n).integers(0, 256, (n, height, width, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def model() -> OnnxModel:
    return OnnxModel(small_graph(), RuntimeSpec(batch_size=6))


@pytest.mark.parametrize("n", [1, 2, 5, 6, 7, 13])
def test_any_number_of_images_is_answered_in_order(model, n):
    """N-1, N, N+1 and more than two batches."""
    weight = onnx.numpy_helper.to_array(onnx.load_model_from_string(small_graph()).graph.initializer[0])
    logits_nc, probabilities_nc = model.run(pixels(n))
    np.testing.assert_allclose(logits_nc, pixels(n).reshape(n, -1) @ weight, atol=1e-4)
    np.testing.assert_allclose(probabilities_nc.sum(axis=1), 1, atol=1e-6)


def test_no_images_give_empty_arrays(model):
    logits_nc, probabilities_nc = model.run(np.empty((0, 4, 6, 3), np.uint8))
    assert logits_nc.shape == probabilities_nc.shape == (0, 5)


@pytest.mark.parametrize(("n", "batches"), [(3, [2, 1]), (6, [6]), (13, [6, 6, 1]), (5, [4, 1])])
def test_no_image_is_run_in_vain_on_cpu(monkeypatch, n, batches):
    """Padding 9 images to 16 cost a fifth more in chunks of 41."""
    found, run = [], session.Session.__call__
    monkeypatch.setattr(
        session.Session, "__call__", lambda self, batch: (found.append(len(batch)), run(self, batch))[1]
    )
    model = OnnxModel(small_graph(), RuntimeSpec(batch_size=6))
    model.run(pixels(n))
    assert found == batches


def test_batch_mates_are_never_seen(model):
    """The same image alone, in a part of a batch and in a full one."""
    alone = model.run(pixels(6)[:1])[1]
    assert np.array_equal(alone, model.run(pixels(6)[:3])[1][:1])
    assert np.array_equal(alone, model.run(pixels(6))[1][:1])


@pytest.mark.parametrize(
    "wrong",
    [np.zeros((1, 6, 4, 3), np.uint8), np.zeros((1, 4, 6, 3), np.float32), np.zeros((4, 6, 3), np.uint8)],
)
def test_pixels_of_another_shape_or_type_are_refused(model, wrong):
    with pytest.raises(ValueError, match=r"the model takes uint8 \[n, \(4, 6, 3\)\]"):
        model.run(wrong)


def test_batch_sizes_are_few_and_fixed():
    assert RuntimeSpec().buckets == [1, 2, 4, 8, 16]
    assert RuntimeSpec(batch_size=12).buckets == [1, 2, 4, 8, 12]
    assert RuntimeSpec(batch_size=1).buckets == RuntimeSpec("cuda", batch_size=1).buckets == [1]
    assert RuntimeSpec("cuda").buckets == [32, 256]


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_missing_gpu_stops_the_session_instead_of_running_on_cpu(precision):
    """ONNX Runtime alone would warn and run on CPU (onnxruntime #23372)."""
    if _has_gpu():
        pytest.skip("this machine has a GPU")
    with pytest.raises(ProviderUnavailable):
        OnnxModel(small_graph(), RuntimeSpec("cuda", precision))


def test_int8_on_a_gpu_is_refused_before_anything_is_loaded():
    with pytest.raises(ValueError, match="int8 does not run on cuda"):
        RuntimeSpec(provider="cuda", precision="int8")


@pytest.mark.parametrize("payload", [b"", b"not a model", small_graph()[:300]])
def test_bytes_that_are_no_model_are_a_clear_error(payload):
    with pytest.raises(BundleDamaged, match="cannot load the model"):
        OnnxModel(payload, RuntimeSpec())


def test_graph_with_other_inputs_is_refused():
    model = onnx.load_model_from_string(small_graph())
    model.graph.input[0].type.tensor_type.elem_type = TensorProto.FLOAT
    del model.graph.node[0]
    model.graph.node[0].input[0] = "pixels"
    with pytest.raises(BundleDamaged, match=r"tensor\(float\).*ours map uint8"):
        OnnxModel(model.SerializeToString(), RuntimeSpec())


def test_newer_opset_than_the_runtime_knows_is_a_clear_error():
    model = onnx.load_model_from_string(small_graph())
    model.opset_import[0].version = 99
    with pytest.raises(BundleDamaged, match=r"ONNX Runtime 1\.\d+\.\d+ cannot load the model"):
        OnnxModel(model.SerializeToString(), RuntimeSpec())


def hungry_graph(values_per_image: int) -> bytes:
    """Our signature around an intermediate of `values_per_image` float32 per image."""
    nodes = [
        helper.make_node("Flatten", ["pixels"], ["flat"]),
        helper.make_node("Cast", ["flat"], ["values"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMax", ["values", "axis"], ["mean"], keepdims=1),
        helper.make_node("Expand", ["mean", "wide"], ["huge"]),
        helper.make_node("Sin", ["huge"], ["also_huge"]),
        helper.make_node("ReduceMax", ["also_huge", "axis"], ["one"], keepdims=1),
        helper.make_node("Concat", ["one", "one"], ["logits"], axis=1),
        helper.make_node("Softmax", ["logits"], ["probabilities"]),
    ]
    outputs = [
        helper.make_tensor_value_info(n, TensorProto.FLOAT, ["batch", 2]) for n in ("logits", "probabilities")
    ]
    constants = [
        onnx.numpy_helper.from_array(np.array([1], np.int64), "axis"),
        onnx.numpy_helper.from_array(np.array([1, values_per_image], np.int64), "wide"),
    ]
    pixels = helper.make_tensor_value_info("pixels", TensorProto.UINT8, ["batch", 4, 6, 3])
    graph = helper.make_graph(nodes, "hungry", [pixels], outputs, constants)
    opset = [helper.make_opsetid("", 23)]
    return helper.make_model(graph, opset_imports=opset, ir_version=10).SerializeToString()


def test_too_little_memory_for_a_full_batch_names_the_batch_size(tmp_path):
    """A real allocation failure: the process may have 0.4 GB more than it needs to start."""
    (tmp_path / "hungry.onnx").write_bytes(hungry_graph(5_000_000))
    script = """
        import resource, sys
        import numpy as np
        from pipelines.bundle.session import OnnxModel
        from pipelines.messages import JobFailed
        from pipelines.bundle.settings import RuntimeSpec

        used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + 400_000_000,) * 2)
        payload = open(sys.argv[1], "rb").read()
        try:
            OnnxModel(payload, RuntimeSpec(batch_size=16)).run(np.zeros((16, 4, 6, 3), np.uint8))
        except JobFailed as error:
            print(error)
        answers, _ = OnnxModel(payload, RuntimeSpec(batch_size=2)).run(np.full((5, 4, 6, 3), 7, np.uint8))
        assert np.allclose(answers, np.sin(7), atol=1e-5), answers
        print("a smaller batch runs")
    """
    command = [sys.executable, "-c", textwrap.dedent(script), str(tmp_path / "hungry.onnx")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert "could not run a batch of 16 images on cpu" in done.stdout, done.stderr[-2000:]
    assert "lower --batch-size" in done.stdout
    assert "a smaller batch runs" in done.stdout, done.stderr[-2000:]


class GpuSession:
    """Answers with the mean of each image; the session's own outputs are asked of it too."""

    image_shape = (4, 6, 3)

    def __init__(self, model: bytes, spec: RuntimeSpec, size: int) -> None:
        self.size, self.session, self.shape = size, self, [None, 1]
        self.batches: list[int] = []

    def get_providers(self) -> list[str]:
        return ["CUDAExecutionProvider"]

    def get_modelmeta(self):
        return type("Meta", (), {"custom_metadata_map": {}})

    def get_outputs(self):
        return [self]

    def __call__(self, batch_nhwc):
        assert len(batch_nhwc) <= self.size
        self.batches.append(len(batch_nhwc))
        return [batch_nhwc.mean(axis=(1, 2, 3))[:, None]] * 2


@pytest.mark.parametrize(
    ("n", "batches"),
    [(1, {32: [1], 256: []}), (33, {32: [], 256: [33]}), (300, {32: [], 256: [256, 44]})],
)
def test_gpu_has_a_session_for_full_batches_and_one_for_the_tail(monkeypatch, n, batches):
    monkeypatch.setattr(session, "Session", GpuSession)
    model = OnnxModel(b"", RuntimeSpec("cuda"))
    np.testing.assert_allclose(model.run(pixels(n))[0][:, 0], pixels(n).mean(axis=(1, 2, 3)), rtol=1e-6)
    assert {size: each.batches for size, each in model._sessions.items()} == batches


def test_certificate_environment_names_what_ran(model):
    environment = model.environment()
    assert environment["providers"] == ["CPUExecutionProvider"]
    assert environment["batch_size"] == 6
    assert environment["machine"]
    assert environment["nodes"] == {"CPUExecutionProvider": 4}


def test_running_a_model_loads_neither_torch_nor_transformers():
    """A classification worker starts in a fraction of a second and in a fraction of the memory."""
    modules = "[m for m in ('torch', 'transformers') if m in sys.modules]"
    check = f"import sys, pipelines.bundle.session; print({modules})"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def _has_gpu() -> bool:
    try:
        providers.gpu_name(0)
    except ProviderUnavailable:
        return False
    return True


@pytest.mark.gpu
@pytest.mark.parametrize("n", [1, 7, 8, 9, 20])
def test_gpu_gives_what_the_cpu_gives(n):
    """Logits are of the order of 10."""
    reference_nc = OnnxModel(small_graph(), RuntimeSpec()).run(pixels(n))[0]
    gpu = OnnxModel(small_graph(), RuntimeSpec("cuda", batch_size=8))
    logits_nc, probabilities_nc = gpu.run(pixels(n))
    np.testing.assert_allclose(logits_nc, reference_nc, atol=1e-3)
    np.testing.assert_allclose(probabilities_nc.sum(axis=1), 1, atol=1e-2)
    assert gpu.providers[0] == providers.EP_NAMES["cuda"]


@pytest.mark.gpu
def test_gpu_answers_do_not_depend_on_padding_or_earlier_batches():
    model = OnnxModel(small_graph(), RuntimeSpec(provider="cuda", batch_size=8))
    first = model.run(pixels(8))[1]
    model.run(pixels(3))
    assert np.array_equal(model.run(pixels(8))[1], first)
