"""A model runs on the provider asked for, in few fixed batch sizes, and gives an image one answer."""

import subprocess
import sys
import textwrap
import weakref
from dataclasses import dataclass, field

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from pipelines.bundle import providers
from pipelines.bundle import session as runtime
from pipelines.bundle.providers import ProviderUnavailable
from pipelines.bundle.session import ModelUnusable, OnnxModel, OutOfMemory
from pipelines.specs import RuntimeSpec
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
    found, run = [], runtime.Session.__call__
    monkeypatch.setattr(
        runtime.Session, "__call__", lambda self, batch: (found.append(len(batch)), run(self, batch))[1]
    )
    model = OnnxModel(small_graph(), RuntimeSpec(batch_size=6))
    found.clear()  # the warm-up
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
    with pytest.raises(ModelUnusable, match="cannot load the model"):
        OnnxModel(payload, RuntimeSpec())


def test_graph_with_other_inputs_is_refused():
    model = onnx.load_model_from_string(small_graph())
    model.graph.input[0].type.tensor_type.elem_type = TensorProto.FLOAT
    del model.graph.node[0]
    model.graph.node[0].input[0] = "pixels"
    with pytest.raises(ModelUnusable, match=r"tensor\(float\).*ours map uint8"):
        OnnxModel(model.SerializeToString(), RuntimeSpec())


def test_newer_opset_than_the_runtime_knows_is_a_clear_error():
    model = onnx.load_model_from_string(small_graph())
    model.opset_import[0].version = 99
    with pytest.raises(ModelUnusable, match=r"ONNX Runtime 1\.\d+\.\d+ cannot load the model"):
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


@pytest.mark.parametrize(
    ("values_per_image", "outcome"), [(5_000_000, "batch"), (200_000_000, "OutOfMemory")]
)
def test_full_memory_halves_the_batch_until_one_image_does_not_fit(tmp_path, values_per_image, outcome):
    """A real allocation failure: the process may have 0.4 GB more than it needs to start."""
    (tmp_path / "hungry.onnx").write_bytes(hungry_graph(values_per_image))
    script = """
        import resource, sys
        import numpy as np
        from pipelines.bundle.session import OnnxModel, OutOfMemory
        from pipelines.specs import RuntimeSpec

        used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + 400_000_000,) * 2)
        try:
            model = OnnxModel(open(sys.argv[1], "rb").read(), RuntimeSpec(batch_size=16))
            answers, _ = model.run(np.full((20, 4, 6, 3), 7, np.uint8))
            assert np.allclose(answers, np.sin(7), atol=1e-5), answers
            print("batch", model.batch_size)
        except OutOfMemory:
            print("OutOfMemory")
    """
    command = [sys.executable, "-c", textwrap.dedent(script), str(tmp_path / "hungry.onnx")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.startswith(outcome), done.stderr[-2000:]
    if outcome == "batch":
        assert 1 <= int(done.stdout.split()[1]) < 16


@dataclass
class Gpu:
    """Stands for a GPU's memory: sessions that are alive take as many images of it as their batch size."""

    capacity: int
    words: str = "CUBLAS_STATUS_ALLOC_FAILED"
    free_at_start: int = 0
    """More of it until the first answer, so that memory runs out in the middle of a run."""
    alive: weakref.WeakSet = field(default_factory=weakref.WeakSet)

    def session(self, model: bytes, spec: RuntimeSpec, bucket: int) -> "GpuSession":
        return GpuSession(self, bucket)

    def check(self) -> None:
        if sum(session.bucket for session in self.alive) > self.capacity + self.free_at_start:
            raise RuntimeError(f"Non-zero status code returned: {self.words}")


class GpuSession:
    """Answers with the mean of each image; as ONNX Runtime's, it is what its outputs are asked of."""

    image_shape = (4, 6, 3)

    def __init__(self, gpu: Gpu, bucket: int) -> None:
        self.gpu, self.bucket, self.session, self.shape = gpu, bucket, self, [None, 1]
        gpu.alive.add(self)
        gpu.check()

    def get_providers(self) -> list[str]:
        return ["CUDAExecutionProvider"]

    def get_modelmeta(self):
        return type("Meta", (), {"custom_metadata_map": {}})

    def get_outputs(self):
        return [self]

    def __call__(self, batch_nhwc):
        assert len(batch_nhwc) <= self.bucket
        self.gpu.free_at_start = 0
        self.gpu.check()
        return [batch_nhwc.mean(axis=(1, 2, 3))[:, None]] * 2


def on_gpu(monkeypatch, gpu: Gpu, batch_size: int = 256) -> OnnxModel:
    monkeypatch.setattr(runtime, "Session", gpu.session)
    return OnnxModel(b"", RuntimeSpec("cuda", batch_size=batch_size))


def test_every_batch_size_is_ready_before_the_first_image(monkeypatch):
    gpu = Gpu(capacity=288)
    assert on_gpu(monkeypatch, gpu).batch_size == 256
    assert sorted(session.bucket for session in gpu.alive) == [32, 256]


@pytest.mark.parametrize(("capacity", "expected"), [(287, 128), (256, 128), (143, 64), (71, 32), (2, 1)])
def test_batches_halve_at_start_until_full_and_tail_fit_together(monkeypatch, capacity, expected):
    """A failed session must be gone before the next one is made, or it would fail for the memory of both.

    At 287 it is the tail's session that fails: half of the tail would be 16.
    """
    gpu = Gpu(capacity)
    model = on_gpu(monkeypatch, gpu)
    assert model.batch_size == expected
    assert {session.bucket for session in gpu.alive} == set(model.spec.buckets)


@pytest.mark.parametrize("n", [1, 32, 33, 256, 300])
def test_memory_that_runs_out_while_running_halves_the_full_batch_and_loses_no_image(monkeypatch, n):
    model = on_gpu(monkeypatch, Gpu(capacity=150, free_at_start=200))
    assert model.batch_size == 256
    np.testing.assert_allclose(model.run(pixels(n))[0][:, 0], pixels(n).mean(axis=(1, 2, 3)), rtol=1e-6)
    assert model.batch_size == 128


def test_one_image_that_does_not_fit_says_what_the_runtime_said(monkeypatch):
    with pytest.raises(OutOfMemory, match=r"one image does not fit.*CUBLAS_STATUS_ALLOC_FAILED"):
        on_gpu(monkeypatch, Gpu(capacity=0))


@pytest.mark.parametrize(
    "words",
    [
        "CUDA failure 2: out of memory",
        "CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
        "BFCArena::AllocateRawInternal Failed to allocate memory for requested buffer of size 1024",
        "Available memory of 5 is smaller than requested bytes of 6",
        "std::bad_alloc",
    ],
)
def test_full_memory_is_known_by_its_many_words(monkeypatch, words):
    assert on_gpu(monkeypatch, Gpu(capacity=150, words=words)).batch_size == 128


def test_other_failures_are_not_taken_for_full_memory(monkeypatch):
    with pytest.raises(RuntimeError, match="CUDA_ERROR_ILLEGAL_ADDRESS"):
        on_gpu(monkeypatch, Gpu(capacity=0, words="CUDA_ERROR_ILLEGAL_ADDRESS"))


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
