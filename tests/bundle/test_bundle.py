"""A bundle opens only when it is whole, and runs only where a certificate covers it."""

import dataclasses
import json
import os
from pathlib import Path

import onnx
import pytest
from onnx import helper

from jobs.cli import main
from pipelines.bundle import bundle, manifest
from pipelines.bundle.bundle import open_bundle
from pipelines.bundle.manifest import (
    BundleDamaged,
    Manifest,
    NotABundle,
    NotCertified,
    record,
)
from pipelines.bundle.settings import RuntimeSpec
from pipelines.specs import ImageSpec, ModelSpec
from pipelines.storage.local import LocalStorage
from tests.builders.models import CLASS_IDS, PASSED, small_bundle

FAILED = {"passed": False, "failures": [{"metric": "top1 agreement", "value": 0.5, "limit": 1.0}]}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    small_bundle(tmp_path / "bundle")
    return tmp_path / "bundle"


def rewrite_manifest(folder: Path, change) -> None:
    """What someone who edits the manifest by hand would leave."""
    document = json.loads((folder / "manifest.json").read_text())
    change(document)
    (folder / "manifest.json").write_text(json.dumps(document))


def test_opened_bundle_tells_everything_about_its_model(folder):
    opened = open_bundle(str(folder))
    spec = ModelSpec(CLASS_IDS, "iab-content-3.1", ImageSpec(height=4, width=6), thresholds={"483": 0.5})
    assert (opened.spec, opened.manifest.cattax) == (spec, 9)
    assert opened.certificate_for("cpu", "fp32").passed


def replace_model(folder: Path, payload: bytes) -> None:
    """A bundle with another model, its manifest made to agree."""
    manifest = Manifest.from_json((folder / "manifest.json").read_bytes())
    files = {**manifest.files, "model.onnx": record(payload)}
    (folder / "manifest.json").write_bytes(dataclasses.replace(manifest, files=files).to_json())
    (folder / "model.onnx").write_bytes(payload)


@pytest.mark.parametrize("name", ["model.onnx", "labels.parquet"])
def test_one_changed_byte_is_found_and_named(folder, name):
    payload = bytearray((folder / name).read_bytes())
    payload[len(payload) // 2] ^= 1
    (folder / name).write_bytes(payload)
    with pytest.raises(BundleDamaged, match=f"{name} was altered: its sha256 is .*the manifest expects"):
        open_bundle(str(folder))


def test_truncated_model_is_found_by_its_size(folder):
    payload = (folder / "model.onnx").read_bytes()
    (folder / "model.onnx").write_bytes(payload[:-10])
    with pytest.raises(
        BundleDamaged, match=rf"model.onnx has {len(payload) - 10} bytes.*expects {len(payload)}"
    ):
        open_bundle(str(folder))


def test_missing_file_is_named(folder):
    (folder / "model.onnx").unlink()
    with pytest.raises(BundleDamaged, match=r"model\.onnx is missing"):
        open_bundle(str(folder))


def test_model_altered_after_opening_is_not_handed_out(folder):
    """The bytes that run are the bytes that were hashed: checked again when they are read."""
    opened = open_bundle(str(folder))
    payload = bytearray((folder / "model.onnx").read_bytes())
    payload[-1] ^= 1
    (folder / "model.onnx").write_bytes(payload)
    with pytest.raises(BundleDamaged, match="was altered"):
        opened.model_bytes("fp32")


def test_edited_manifest_no_longer_has_its_model_id(folder):
    rewrite_manifest(folder, lambda document: document["model"]["thresholds"].update({"483": 0.01}))
    with pytest.raises(BundleDamaged, match=r"manifest.json was altered"):
        open_bundle(str(folder))


@pytest.mark.parametrize("name", ["../outside.onnx", "/etc/passwd", "sub/model.onnx", ".hidden", "a\\b"])
def test_manifest_that_points_outside_its_folder_is_refused(folder, name):
    rewrite_manifest(
        folder, lambda document: document["files"].update({name: dataclasses.asdict(record(b""))})
    )
    with pytest.raises(BundleDamaged, match="must match pattern"):
        open_bundle(str(folder))


def test_file_larger_than_any_model_is_refused_before_it_is_read(folder):
    rewrite_manifest(folder, lambda document: document["files"]["model.onnx"].update(bytes=1 << 40))
    with pytest.raises(BundleDamaged, match="must be less than or equal to 2147483647"):
        open_bundle(str(folder))


def outside(**fields) -> onnx.TensorProto:
    """A tensor whose numbers are in a file of the machine that opens it."""
    tensor = onnx.TensorProto(name="weight", data_type=onnx.TensorProto.FLOAT, dims=[1], **fields)
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="../../etc/passwd")
    return tensor


def in_an_initializer(model: onnx.ModelProto) -> None:
    model.graph.initializer[0].CopyFrom(outside())


def in_a_constant(model: onnx.ModelProto) -> None:
    model.graph.node.append(helper.make_node("Constant", [], ["c"], value=outside()))


def in_a_sparse_initializer(model: onnx.ModelProto) -> None:
    model.graph.sparse_initializer.add(dims=[1]).values.CopyFrom(outside())


def branching(model: onnx.ModelProto, branch: onnx.GraphProto) -> None:
    node = helper.make_node("If", ["condition"], ["c"], then_branch=branch, else_branch=branch)
    model.graph.node.append(node)


def in_a_branch(model: onnx.ModelProto) -> None:
    branching(model, onnx.GraphProto(name="branch", initializer=[outside()]))


def in_a_constant_of_a_branch(model: onnx.ModelProto) -> None:
    inner = helper.make_node("Constant", [], ["c"], value=outside())
    branching(model, onnx.GraphProto(name="branch", node=[inner]))


def without_saying_so(model: onnx.ModelProto) -> None:
    model.graph.initializer[0].external_data.add(key="location", value="../../etc/passwd")


@pytest.mark.parametrize(
    "plant",
    [
        in_an_initializer,
        in_a_constant,
        in_a_sparse_initializer,
        in_a_branch,
        in_a_constant_of_a_branch,
        without_saying_so,
    ],
)
def test_weights_in_a_file_elsewhere_are_refused(folder, plant):
    """Even when every hash of the bundle agrees: ONNX Runtime would open the path that the graph names."""
    model = onnx.load_model_from_string((folder / "model.onnx").read_bytes())
    plant(model)
    replace_model(folder, model.SerializeToString())
    with pytest.raises(BundleDamaged, match="keeps weight in another file"):
        open_bundle(str(folder))


def custom_node(model: onnx.ModelProto) -> None:
    model.graph.node[0].domain = "com.example.custom"


def custom_node_in_a_branch(model: onnx.ModelProto) -> None:
    custom = onnx.NodeProto(op_type="Spy", domain="com.example.custom", output=["c"])
    branching(model, onnx.GraphProto(name="branch", node=[custom]))


def custom_import(model: onnx.ModelProto) -> None:
    model.opset_import.add(domain="com.example.custom", version=1)


@pytest.mark.parametrize("plant", [custom_node, custom_node_in_a_branch, custom_import])
def test_operators_of_an_unknown_library_are_refused(folder, plant):
    model = onnx.load_model_from_string((folder / "model.onnx").read_bytes())
    plant(model)
    replace_model(folder, model.SerializeToString())
    with pytest.raises(BundleDamaged, match=r"operators of com\.example\.custom"):
        open_bundle(str(folder))


def test_functions_and_compiled_engines_are_refused(folder):
    """A function can hide any of the above; an engine is native code."""
    payload = (folder / "model.onnx").read_bytes()
    model = onnx.load_model_from_string(payload)
    model.functions.add(name="Hidden", domain="com.microsoft")
    replace_model(folder, model.SerializeToString())
    with pytest.raises(BundleDamaged, match="defines the function Hidden"):
        open_bundle(str(folder))
    model = onnx.load_model_from_string(payload)
    engine = {"embed_mode": 0, "ep_cache_context": "../../engine.so"}
    model.graph.node.append(helper.make_node("EPContext", [], ["c"], domain="com.microsoft", **engine))
    replace_model(folder, model.SerializeToString())
    with pytest.raises(BundleDamaged, match="compiled engine"):
        open_bundle(str(folder))


@pytest.mark.parametrize("record", [{"bytes": "5"}, {"bytes": True}, {"sha256": 7}, {"bytes": None}])
def test_manifest_with_a_size_or_hash_of_another_type_is_damage(folder, record):
    rewrite_manifest(folder, lambda document: document["files"]["model.onnx"].update(record))
    with pytest.raises(BundleDamaged, match=r"files\.model\.onnx\..* must be a valid"):
        open_bundle(str(folder))


def test_opening_reads_every_file_once(folder, monkeypatch):
    """From an object store each reading is a download."""
    read = []
    faithful = LocalStorage.read
    monkeypatch.setattr(LocalStorage, "read", lambda self, path: read.append(path) or faithful(self, path))
    monkeypatch.setattr(LocalStorage, "open_input", None)
    open_bundle(str(folder))
    assert sorted(read) == ["certificates/cpu-fp32.json", "labels.parquet", "manifest.json", "model.onnx"]


def test_file_that_is_no_onnx_is_refused(folder):
    replace_model(folder, b"\xff" * 100)
    with pytest.raises(BundleDamaged, match=r"model\.onnx is not an ONNX file"):
        open_bundle(str(folder))


def test_huge_manifest_is_refused_before_it_is_parsed(folder):
    os.truncate(folder / "manifest.json", bundle.MAX_JSON_BYTES + 1)
    with pytest.raises(BundleDamaged, match=r"manifest\.json has .* bytes; the limit is"):
        open_bundle(str(folder))


@pytest.mark.parametrize("text", ["", "[]", "{", "[" * 100_000, '{"format_version": 3}'])
def test_manifest_that_is_not_one_is_a_clear_error(folder, text):
    (folder / "manifest.json").write_text(text)
    with pytest.raises(BundleDamaged, match=r"manifest\.json"):
        open_bundle(str(folder))


def test_other_format_version_says_which_is_read(folder):
    rewrite_manifest(folder, lambda document: document.update(format_version=99))
    with pytest.raises(NotABundle, match=r"format_version 99; this iab-vision reads 3"):
        open_bundle(str(folder))


FIRST_FORMAT = """{
  "cattax": 9, "files": {}, "format_version": 1,
  "image_spec": {"fit": "stretch", "height": 4, "mean": [0.5, 0.5, 0.5], "resample": "bilinear",
  "std": [0.5, 0.5, 0.5], "width": 6},
  "ir_version": 10, "model_id": "0123456789abcdef",
  "multi_label": false, "opset": 23, "source": {}, "taxonomy": "iab-content-3.1",
  "temperatures": {"fp32": 1.0},
  "thresholds": {"483": 0.5}, "versions": {}
}"""


def test_bundle_of_the_first_format_names_its_version_and_the_command_that_makes_it_again(folder):
    (folder / "manifest.json").write_text(FIRST_FORMAT)
    with pytest.raises(NotABundle, match=r"format_version 1; .* reads 3.*export --checkpoint RUN"):
        open_bundle(str(folder))


def test_labels_that_are_not_the_models_classes_are_damage(folder):
    made = Manifest.from_json((folder / "manifest.json").read_bytes())
    model = dataclasses.replace(made.model, class_ids=CLASS_IDS[::-1])
    (folder / "manifest.json").write_bytes(dataclasses.replace(made, model=model).to_json())
    with pytest.raises(BundleDamaged, match=r"labels\.parquet holds other classes, or another order"):
        open_bundle(str(folder))


def test_copied_bundle_is_the_same_and_its_mark_of_completeness_comes_last(folder, tmp_path, monkeypatch):
    put, written = LocalStorage.put, []
    monkeypatch.setattr(
        LocalStorage, "put", lambda self, path, payload: written.append(path) or put(self, path, payload)
    )
    opened = open_bundle(str(folder))
    bundle.copy_bundle(opened, str(tmp_path / "copy"))
    assert written[-1] == "certificates/cpu-fp32.json"
    copied = open_bundle(str(tmp_path / "copy"))
    assert (copied.manifest, copied.certificates) == (opened.manifest, opened.certificates)


def test_folder_without_manifest_is_not_a_bundle(tmp_path):
    with pytest.raises(NotABundle, match=r"no manifest\.json; iab-vision export makes one"):
        open_bundle(str(tmp_path))


def test_precision_without_certificate_names_the_command_that_makes_one(folder):
    with pytest.raises(
        NotCertified, match=r"no certificate for fp32 on cuda \(it has: cpu-fp32\).*iab-vision certify"
    ):
        open_bundle(str(folder)).certificate_for("cuda", "fp32")


def test_certificate_of_a_failed_measurement_does_not_cover(tmp_path):
    small_bundle(tmp_path / "b", certificates={("cpu", "fp32"): FAILED})
    with pytest.raises(NotCertified, match="failed parity"):
        open_bundle(str(tmp_path / "b")).certificate_for("cpu", "fp32")


def rewrite_certificate(folder: Path, **changes) -> None:
    """What someone who edits a certificate and makes its checksum agree would leave."""
    path = folder / "certificates" / "cpu-fp32.json"
    document = {**json.loads(path.read_text()), **changes}
    del document["sha256"]
    path.write_bytes(manifest.seal(document))


def test_certificate_copied_from_another_bundle_does_not_cover(folder):
    rewrite_certificate(folder, manifest_sha256="0" * 64)
    with pytest.raises(NotCertified, match="another model or manifest"):
        open_bundle(str(folder)).certificate_for("cpu", "fp32")


def test_altered_certificate_is_found_by_its_checksum(tmp_path):
    small_bundle(tmp_path / "b", certificates={("cpu", "fp32"): FAILED})
    path = tmp_path / "b" / "certificates" / "cpu-fp32.json"
    path.write_text(path.read_text().replace("0.5", "1.0"))
    with pytest.raises(BundleDamaged, match=r"cpu-fp32\.json was altered: it says sha256 .*certify"):
        open_bundle(str(tmp_path / "b"))


def test_certificate_without_a_checksum_is_none(folder):
    path = folder / "certificates" / "cpu-fp32.json"
    document = json.loads(path.read_text())
    del document["sha256"]
    path.write_text(json.dumps(document))
    with pytest.raises(BundleDamaged, match="not a certificate: it has no 'sha256'"):
        open_bundle(str(folder))


@pytest.mark.parametrize("passed", ["yes", 1, None, True])
def test_pass_that_names_failures_or_is_not_true_is_damage(folder, passed):
    rewrite_certificate(folder, passed=passed, failures=FAILED["failures"] if passed is True else [])
    with pytest.raises(BundleDamaged, match="contradicts itself"):
        open_bundle(str(folder))


@pytest.mark.parametrize("reference", [None, FAILED])
def test_no_certificate_covers_without_that_of_the_reference(tmp_path, reference):
    """fp32 on cpu comes last, so a bundle without it is half an export; and others are compared with it."""
    passed = {("cuda", "fp32"): PASSED, **({("cpu", "fp32"): reference} if reference else {})}
    small_bundle(tmp_path / "b", certificates=passed)
    with pytest.raises(NotCertified, match=r"cpu.*--precisions fp32 --checkpoint RUN"):
        open_bundle(str(tmp_path / "b")).certificate_for("cuda", "fp32")


@pytest.mark.parametrize("certificates", [{}, {("cuda", "fp32"): PASSED}])
def test_verify_finds_that_a_bundle_is_half_exported(tmp_path, certificates, capsys):
    small_bundle(tmp_path / "b", certificates=certificates)
    assert main(["verify", str(tmp_path / "b")]) == 1
    small_bundle(tmp_path / "whole", certificates={**certificates, ("cpu", "fp32"): PASSED})
    assert main(["verify", str(tmp_path / "whole")]) == 0


def test_adding_a_certificate_keeps_the_model_id(folder):
    before = open_bundle(str(folder))
    bundle.add_certificate(str(folder), before.manifest, "cuda", "fp32", PASSED)
    after = open_bundle(str(folder))
    assert after.model_id == before.model_id
    assert after.certificate_for("cuda", "fp32").passed


@pytest.mark.parametrize("batch_size", [1, 5, 16])
def test_certificate_on_cpu_covers_smaller_batches_than_its_own(folder, batch_size):
    """It proves that batch sizes change nothing there, and `predict` runs one image at a time."""
    assert open_bundle(str(folder)).certificate_covering(RuntimeSpec(batch_size=batch_size)).passed


def test_larger_batches_than_were_measured_name_both_and_the_command(folder):
    with pytest.raises(
        NotCertified,
        match=r"measured batches of 1, 2, 4, 8, 16 images, and .*32 would run.*iab-vision certify"
        r".*--provider cpu --precisions fp32 --checkpoint RUN --parity.batch-size 32",
    ):
        open_bundle(str(folder)).certificate_covering(RuntimeSpec(batch_size=32))


@pytest.mark.parametrize(
    ("environment", "gap"),
    [
        ({"buckets": [32, 256], "allow_tf32": False}, ""),
        ({"buckets": [1, 2, 4, 8, 16], "allow_tf32": False}, "measured batches of 1, 2, 4, 8, 16 images"),
        ({"buckets": [64, 512], "allow_tf32": False}, "measured batches of 64, 512 images, and 32, 256"),
        ({}, "measured batches of 0 images"),
    ],
)
def test_certificate_on_a_gpu_covers_the_very_batch_sizes_alone(folder, environment, gap):
    """Each size has kernels of its own there, and so other numbers."""
    content = {**PASSED, "environment": PASSED["environment"] | {"buckets": []} | environment}
    bundle.add_certificate(str(folder), open_bundle(str(folder)).manifest, "cuda", "fp32", content)
    opened, spec = open_bundle(str(folder)), RuntimeSpec("cuda")
    if gap:
        with pytest.raises(NotCertified, match=gap):
            opened.certificate_covering(spec)
    else:
        assert opened.certificate_covering(spec).passed


def test_precision_that_was_not_exported_names_those_that_were(folder):
    with pytest.raises(NotCertified, match=r"holds no int8 model \(it holds fp32\)"):
        open_bundle(str(folder)).model_bytes("int8")


def test_export_that_died_before_its_certificate_leaves_nothing_that_runs(tmp_path):
    small_bundle(tmp_path / "b", certificates={})
    with pytest.raises(NotCertified):
        open_bundle(str(tmp_path / "b")).certificate_for("cpu", "fp32")


def test_bundle_opens_from_memory_as_from_disk():
    small_bundle("memory://bundles/one")
    opened = open_bundle("memory://bundles/one")
    assert opened.certificate_for("cpu", "fp32").passed
    assert len(opened.model_bytes("fp32")) == opened.manifest.files["model.onnx"].bytes
