"""The exported file: same bytes anywhere, clean around attention, and it explains itself."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import load_file

from export import convert
from export.checkpoint import open_checkpoint, read_checkpoint
from pipelines.bundle.session import OnnxModel
from pipelines.bundle.settings import RuntimeSpec
from pipelines.messages import InputError
from pipelines.specs import ModelSpec
from tests.builders.models import CLASS_IDS, SPEC, TEMPERATURE, checkpoint


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("run") / "best")


@pytest.fixture(scope="module")
def graph(trained) -> bytes:
    with open_checkpoint(str(trained)) as found:
        metadata = convert.metadata_of(found, precision="fp32")
        return convert.convert(found.network(), found.spec, metadata)


def test_same_checkpoint_gives_same_bytes_from_any_folder_and_process(trained, graph, tmp_path):
    """torch.onnx alone writes half a megabyte of stack traces with this machine's paths."""
    elsewhere = tmp_path / "a folder with spaces"
    shutil.copytree(trained, elsewhere)
    script = """
import hashlib, sys
from export import convert
from export.checkpoint import open_checkpoint
with open_checkpoint(sys.argv[1]) as found:
    metadata = convert.metadata_of(found, precision="fp32")
    print(hashlib.sha256(convert.convert(found.network(), found.spec, metadata)).hexdigest())
"""
    environment = {**os.environ, "PYTHONHASHSEED": "7", "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        [sys.executable, "-c", script, str(elsewhere)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split()[-1] == hashlib.sha256(graph).hexdigest()


def test_graph_has_one_attention_per_block_and_nothing_stray_around_it(graph):
    model = onnx.load_model_from_string(graph)
    count = Counter(node.op_type for node in model.graph.node)
    assert count["Attention"] == 2
    assert not count.keys() & {"IsNaN", "Where", "Slice", "If", "Loop"}
    assert count["Transpose"] <= 2
    assert {(entry.domain, entry.version) for entry in model.opset_import} == {("", 23)}
    assert model.ir_version == 10
    assert b"/site-packages/" not in graph


def test_any_batch_gives_what_torch_gives(trained, graph):
    pixels_nhwc = np.random.default_rng(0).integers(0, 256, (9, SPEC.height, SPEC.width, 3), dtype=np.uint8)
    with open_checkpoint(str(trained)) as found, torch.inference_mode():
        mean, std = torch.tensor(SPEC.mean), torch.tensor(SPEC.std)
        values = ((torch.from_numpy(pixels_nhwc).float() / 255 - mean) / std).permute(0, 3, 1, 2)
        expected = found.network()(pixel_values=values).logits
    logits_nc, probabilities_nc = OnnxModel(graph, RuntimeSpec(batch_size=4)).run(pixels_nhwc)
    np.testing.assert_allclose(logits_nc, expected.numpy(), atol=1e-4)
    np.testing.assert_allclose(probabilities_nc, (expected / TEMPERATURE).softmax(-1).numpy(), atol=1e-5)


def test_file_explains_itself_to_any_runtime(trained, graph):
    said = OnnxModel(graph, RuntimeSpec()).metadata
    assert json.loads(said["iab_vision.labels"]) == list(CLASS_IDS)
    assert json.loads(said["iab_vision.image_spec"])["height"] == SPEC.height
    assert (said["iab_vision.taxonomy"], said["iab_vision.cattax"]) == ("iab-content-3.1", "9")
    assert float(said["iab_vision.temperature"]) == TEMPERATURE
    assert said["iab_vision.checkpoint_sha256"] == read_checkpoint(trained, "").sha256


def test_run_folder_and_its_best_are_the_same_checkpoint(trained):
    with open_checkpoint(str(trained.parent)) as run, open_checkpoint(trained.as_uri()) as best:
        assert run.sha256 == best.sha256


def test_checkpoint_is_fetched_from_remote_storage(trained):
    import fsspec

    memory = fsspec.filesystem("memory")
    for path in trained.iterdir():
        memory.pipe_file(f"/checkpoints/one/best/{path.name}", path.read_bytes())
    memory.pipe_file("/checkpoints/one/best/step-100/model.safetensors", b"an earlier checkpoint")
    memory.pipe_file("/checkpoints/one/best/adapter/extra.safetensors", b"not of this network")
    with open_checkpoint("memory://checkpoints/one") as remote:
        assert remote.sha256 == read_checkpoint(trained, "").sha256
        assert remote.network().config.num_labels == len(CLASS_IDS)


def rewritten(trained: Path, folder: Path, name: str, **changes) -> Path:
    shutil.copytree(trained, folder)
    path = folder / name
    document = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**document, **changes}))
    return folder


def test_pickled_weights_are_refused(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "pickled")
    torch.save(load_file(trained / "model.safetensors"), tmp_path / "pickled" / "pytorch_model.bin")
    (tmp_path / "pickled" / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"no \*\.safetensors; pickled weights are not read"):
        read_checkpoint(tmp_path / "pickled", "pickled")


def test_class_that_the_taxonomy_lacks_is_refused(trained, tmp_path):
    labels = {"0": "483", "1": "1", "2": "V9I3ON", "3": "425", "4": "552"}
    folder = rewritten(trained, tmp_path / "c", "config.json", id2label=labels)
    document = json.loads((folder / "iab_vision.json").read_text())
    (folder / "iab_vision.json").write_text(json.dumps({**document, "class_ids": list(labels.values())}))
    with pytest.raises(InputError, match=r"'V9I3ON' .* not an id of iab-content-3\.1"):
        read_checkpoint(folder, "c")


def test_class_order_that_contradicts_the_config_is_refused(trained, tmp_path):
    folder = rewritten(trained, tmp_path / "c", "iab_vision.json", class_ids=list(reversed(CLASS_IDS)))
    with pytest.raises(InputError, match="differ from id2label"):
        read_checkpoint(folder, "c")


def test_unknown_architecture_is_wrong_input(trained, tmp_path):
    folder = rewritten(trained, tmp_path / "c", "config.json", model_type="unheard_of")
    with open_checkpoint(str(folder)) as found, pytest.raises(InputError, match="cannot be loaded"):
        found.network()


def test_folder_without_model_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"holds no config\.json"):
        read_checkpoint(tmp_path, str(tmp_path))


def test_foreign_checkpoint_keeps_its_own_labels_and_preprocessing(trained, tmp_path):
    folder = tmp_path / "foreign"
    shutil.copytree(trained, folder)
    (folder / "iab_vision.json").unlink()
    config = json.loads((folder / "config.json").read_text())
    names = {str(index): name for index, name in enumerate(["cat", "dog", "pug", "owl", "elk"])}
    (folder / "config.json").write_text(json.dumps({**config, "id2label": names}))
    processor = {"size": {"height": 40, "width": 56}, "resample": 3, "image_mean": [0.1, 0.2, 0.3]}
    (folder / "preprocessor_config.json").write_text(json.dumps({**processor, "image_std": [0.4, 0.5, 0.6]}))
    found = read_checkpoint(folder, "foreign")
    assert (found.spec.class_ids, found.taxonomy.name) == (tuple(names.values()), "labels")
    assert (found.spec.image_spec.resample, found.spec.image_spec.mean) == ("bicubic", (0.1, 0.2, 0.3))


def test_preprocessing_that_cannot_be_kept_is_refused(trained, tmp_path):
    """Resizing without a filter is not what `images.prepare` does: accuracy would drop unnoticed."""
    folder = tmp_path / "foreign"
    shutil.copytree(trained, folder)
    (folder / "iab_vision.json").unlink()
    processor = {"image_processor_type": "ViTImageProcessor", "size": 224, "resample": 0}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    with pytest.raises(InputError, match=r"preprocessor_config\.json .*resample 0"):
        read_checkpoint(folder, "foreign")


def test_model_beyond_one_onnx_file_is_refused_before_it_is_traced():
    """Weights in a second file could be swapped or point elsewhere; nothing below ViT-g needs them."""
    with torch.device("meta"):
        huge = torch.nn.Linear(1 << 15, 1 << 15)
    with pytest.raises(InputError, match=r"Linear has 4295098368 bytes of weights; one ONNX file"):
        convert.convert(huge, ModelSpec((), "labels", SPEC), {})


def test_operation_that_onnx_cannot_express_is_a_clear_error():
    class Odd(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(3, 4))

        def forward(self, pixel_values):
            from types import SimpleNamespace

            pooled = pixel_values.mean((2, 3)) @ self.weight
            return SimpleNamespace(
                logits=torch.linalg.eigvals(pooled.T @ pooled).real.expand(pixel_values.shape[0], 4)
            )

    with pytest.raises(InputError, match=r"torch\.onnx cannot convert Odd"):
        convert.convert(Odd(), ModelSpec((), "labels", SPEC), {})
