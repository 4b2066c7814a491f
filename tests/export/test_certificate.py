"""A certificate covers what is published: every fault that once passed is refused, each by name.

Planted where such a mistake is made: in the shared decoder, in the manifest, in `labels.parquet`, in the int8
temperature, in the user's images, or in the certificate itself.
"""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pyarrow as pa
import pytest
from PIL import Image

from export import certificate, convert, images, parity, published, quantize, release
from export.checkpoint import open_checkpoint
from export.published import Contract, contract_of
from export.settings import ParitySettings
from jobs import certify_bundle, export_onnx
from jobs.certify_bundle import CertifyConfig
from jobs.cli import main
from jobs.export_onnx import ExportConfig
from pipelines.bundle import bundle, providers
from pipelines.bundle.bundle import open_bundle
from pipelines.bundle.coverage import find_gap
from pipelines.bundle.limits import LIMITS
from pipelines.bundle.manifest import NotCertified
from pipelines.bundle.settings import RuntimeSpec
from pipelines.datasets.settings import Columns
from pipelines.images import prepare
from pipelines.messages import InputError
from pipelines.specs import ImageSpec, ModelSpec
from pipelines.taxonomy import taxonomy
from tests.builders.models import CLASS_IDS, checkpoint, dataset, small_bundle


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("trained") / "best")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    return dataset(tmp_path_factory.mktemp("pictures") / "dataset", 40)


@pytest.fixture(scope="module")
def graph(trained) -> bytes:
    with open_checkpoint(str(trained)) as found:
        return convert.convert(found.network(), found.spec, {})


@pytest.fixture(autouse=True)
def _quick(monkeypatch, graph) -> None:
    monkeypatch.setattr(certificate, "SPEED_S", 0.0)
    monkeypatch.setattr(convert, "convert", lambda *_: graph)


def decode_with(monkeypatch, change) -> None:
    """Have every decoder use a changed `prepare`, as a mistake in it would."""

    class Faulty:
        def __init__(self, spec: ImageSpec) -> None:
            self.spec = spec

        def __enter__(self):
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def prepare_batch(self, payloads):
            found = [change(payload, self.spec) for payload in payloads]
            return found, np.stack([one.pixels_hwc for one in found])

    monkeypatch.setattr(images, "DecoderProcess", Faulty)


def exif_dropped(monkeypatch) -> None:
    """Pictures are not turned upright."""
    monkeypatch.setattr(prepare, "_read_orientation", lambda image: 1)
    decode_with(monkeypatch, prepare.prepare)


def blue_for_red(monkeypatch) -> None:
    """Pixels are BGR."""

    def change(payload, spec):
        found = prepare.prepare(payload, spec)
        return dataclasses.replace(found, pixels_hwc=np.ascontiguousarray(found.pixels_hwc[..., ::-1]))

    decode_with(monkeypatch, change)


def nearest_filter(monkeypatch) -> None:
    """Images are resized without a filter."""
    monkeypatch.setattr(
        prepare, "_fit", lambda image, resized, spec, _: image.resize(resized, Image.Resampling.NEAREST)
    )
    decode_with(monkeypatch, prepare.prepare)


def planted_contents(monkeypatch, change) -> None:
    """Have the bundle be written with changed files and manifest."""
    faithful = release.contents
    monkeypatch.setattr(release, "contents", lambda *arguments: change(*faithful(*arguments)))


def other_thresholds(monkeypatch) -> None:
    """Every threshold is 0."""

    def change(files, manifest):
        spec = dataclasses.replace(manifest.model, thresholds=dict.fromkeys(CLASS_IDS, 0.0))
        return files, dataclasses.replace(manifest, model=spec)

    planted_contents(monkeypatch, change)


def other_cattax(monkeypatch) -> None:
    """The bundle says Content Taxonomy 2, not 3.1."""
    planted_contents(monkeypatch, lambda files, manifest: (files, dataclasses.replace(manifest, cattax=2)))


def other_taxonomy(monkeypatch) -> None:
    """The bundle names labels without parents in place of the taxonomy."""

    def change(files, manifest):
        spec = dataclasses.replace(manifest.model, taxonomy="labels")
        return files, dataclasses.replace(manifest, model=spec)

    planted_contents(monkeypatch, change)


def permuted(*names: str):
    """Columns of labels.parquet are in the order of other classes."""

    def plant(monkeypatch) -> None:
        faithful = published.labels_table

        def faulty(class_ids, tree):
            table = faithful(class_ids, tree)
            for name in names:
                column, field = table.schema.get_field_index(name), table.field(name)
                turned = pa.array(table[name].to_pylist()[::-1], field.type)
                table = table.set_column(column, field, turned)
            return table

        def change(files, manifest):
            tree = taxonomy.load("3.1")
            files = {**files, "labels.parquet": bundle.labels_bytes(faulty(CLASS_IDS, tree))}
            listed = {**manifest.files, "labels.parquet": release.record(files["labels.parquet"])}
            return files, dataclasses.replace(manifest, files=listed)

        planted_contents(monkeypatch, change)

    return plant


FAULTS = {
    "exif_dropped": (exif_dropped, "independent decode of edge_cases"),
    "blue_for_red": (blue_for_red, "independent decode of edge_cases"),
    "nearest_filter": (nearest_filter, "independent decode of edge_cases"),
    "thresholds": (other_thresholds, "thresholds_differ"),
    "cattax": (other_cattax, "cattax_differs"),
    "taxonomy": (other_taxonomy, "published_differ"),
    "names": (permuted("name"), "label_rows_differ"),
    "paths": (permuted("path"), "label_rows_differ"),
    "parents": (permuted("parent_id"), "label_rows_differ"),
}


@pytest.mark.parametrize(("plant", "metric"), FAULTS.values(), ids=FAULTS)
def test_fault_that_logits_do_not_show_is_refused_by_name(
    trained, pictures, tmp_path, monkeypatch, capsys, plant, metric
):
    plant(monkeypatch)
    output = tmp_path / "b"
    command = ["export", "--checkpoint", str(trained), "--images", str(pictures), "--output", str(output)]
    assert main(command) == 3
    assert not output.exists()
    document = json.loads((tmp_path / "b-refused" / "cpu-fp32.json").read_text())
    assert metric in [failure["metric"] for failure in document["failures"]]
    assert f"{metric} is" in capsys.readouterr().err


def test_network_that_fails_on_a_black_image_is_refused(trained, pictures, tmp_path, monkeypatch, capsys):
    """NaN where nothing varies, as from a normalisation by the image's own deviation."""
    from pipelines.bundle.session import OnnxModel

    faithful = OnnxModel.run

    def faulty(self, pixels_nhwc):
        logits_nc, probabilities_nc = faithful(self, pixels_nhwc)
        logits_nc[~pixels_nhwc.any(axis=(1, 2, 3))] = np.nan
        return logits_nc, probabilities_nc

    monkeypatch.setattr(OnnxModel, "run", faulty)
    command = ["export", "--checkpoint", str(trained), "--images", str(pictures)]
    assert main([*command, "--output", str(tmp_path / "b")]) == 3
    assert "max_logit is nan" in capsys.readouterr().err


def test_int8_with_a_wrong_temperature_is_refused_without_labels(
    trained, pictures, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(quantize, "matching_temperature", lambda found, expected, spec: 3 * spec.temperature)
    unlabelled = Path(shutil.copytree(pictures, tmp_path / "unlabelled"))
    (unlabelled / "labels.csv").unlink()
    command = ["export", "--checkpoint", str(trained), "--images", str(unlabelled)]
    assert main([*command, "--output", str(tmp_path / "b"), "--precisions", "int8"]) == 3
    message = capsys.readouterr().err
    assert "temperature_change is" in message
    assert "confidence_change is" in message


def test_too_few_images_of_the_user_certify_nothing(trained, pictures, tmp_path, capsys):
    few = Path(shutil.copytree(pictures, tmp_path / "few"))
    (few / "labels.csv").unlink()
    for path in sorted(few.iterdir())[1:]:
        path.write_bytes(b"no image")
    command = ["export", "--checkpoint", str(trained), "--images", str(few), "--output", str(tmp_path / "b")]
    assert main(command) == 2
    message = capsys.readouterr().err
    assert "1 of your images can be compared (39 more cannot be decoded); a certificate needs 32" in message
    assert not (tmp_path / "b").exists()


def test_images_that_are_missing_are_replaced_by_others(pictures, tmp_path, caplog):
    holed = Path(shutil.copytree(pictures, tmp_path / "holed"))
    first = images.draw(images.OwnImages(str(holed)), count=10, seed=0)
    Path(first[0].image_id).unlink()
    drawn = images.draw(images.OwnImages(str(holed)), count=10, seed=0)
    assert [one.image_id for one in drawn[:9]] == [one.image_id for one in first[1:]]
    assert len(drawn) == 10
    assert f"left out {first[0].image_id}" in caplog.text


def recorded_run(folder: Path, pictures: Path, trained_on: int) -> Path:
    """A run folder that recorded the splits of the pictures."""
    import pyarrow.parquet as pq

    folder.mkdir()
    uris = [str(pictures / f"{index}.jpg") for index in range(40)]
    splits = ["train" if index < trained_on else "test" for index in range(40)]
    pq.write_table(pa.table({"uri": uris, "split": splits}), folder / "splits.parquet")
    return folder


@pytest.mark.parametrize(("held_out", "compared", "trained_on"), [(36, 36, 0), (8, 32, 24)])
def test_images_that_the_run_learned_from_are_compared_only_to_reach_the_least(
    pictures, tmp_path, held_out, compared, trained_on
):
    run = recorded_run(tmp_path / "run", pictures, 40 - held_out)
    own, _ = release.draw_images(
        images.OwnImages(str(pictures)), ParitySettings(), calibrating=False, run=str(run)
    )
    assert (len(own), sum(one.split == "train" for one in own)) == (compared, trained_on)


def test_export_reads_the_columns_that_the_run_was_given(pictures, tmp_path):
    """A table of ids and breeds needs `columns.label` and `columns.file` in training, and not again here."""
    table = tmp_path / "breeds.csv"
    table.write_text("id,breed\n0,483\n1,1\n")
    run = tmp_path / "run"
    run.mkdir()
    columns = {"label": "breed", "file": str(pictures / "{id}.jpg")}
    (run / "recipe.json").write_text(json.dumps({"dataset": {"uri": str(table), "columns": columns}}))
    drawn = images.draw(images.OwnImages(str(table)), count=2, seed=0, run=str(run))
    assert sorted(one.labels for one in drawn) == [("1",), ("483",)]


def test_a_copy_elsewhere_is_read_by_the_columns_that_are_given(pictures, tmp_path):
    """The columns of a run hold for the very table that it had."""
    (tmp_path / "breeds.csv").write_text("id,breed\n0,pug\n1,cat\n")
    (tmp_path / "map.csv").write_text("label,target\npug,483\ncat,1\n")
    table = str(tmp_path / "breeds.csv")
    with pytest.raises(InputError, match=r"--columns\.file 'images/\{id\}\.jpg'"):
        images.find(images.OwnImages(table))
    columns = Columns(label="breed", file=str(pictures / "{id}.jpg"))
    found = images.find(images.OwnImages(table, columns, str(tmp_path / "map.csv")))
    assert [one.labels for one in found] == [("483",), ("1",)]


@pytest.mark.parametrize(
    ("config", "arguments"),
    [
        (ExportConfig, ["--checkpoint", "run", "--images", "t.csv", "--output", "b"]),
        (CertifyConfig, ["b", "--images", "t.csv"]),
    ],
)
def test_columns_and_label_map_can_be_given(config, arguments, monkeypatch):
    given = ["--columns.label", "breed", "--label-map", "map.csv"]
    settings = config.parse([*arguments, *given], command="x")
    seen = []

    def measure(first, source, *others, **settings):
        seen.append(source)
        raise InputError("seen")

    for name in ("export", "certify"):
        monkeypatch.setattr(release, name, measure)
    job = export_onnx if config is ExportConfig else certify_bundle
    for one in (settings, config.parse(arguments, command="x")):
        with pytest.raises(InputError, match="seen"):
            job.run(one)
    assert seen == [
        images.OwnImages("t.csv", Columns(label="breed"), "map.csv"),
        images.OwnImages("t.csv"),
    ]


def test_table_whose_labels_are_not_found_says_so(pictures, tmp_path, caplog):
    caplog.set_level("INFO")
    (tmp_path / "t.csv").write_text(f"file,breed\n{pictures / '0.jpg'},483\n")
    assert [one.labels for one in images.find(images.OwnImages(str(tmp_path / "t.csv")))] == [()]
    assert "taken without labels: " in caplog.text
    assert "no column 'label'" in caplog.text and "--columns.label" in caplog.text


@pytest.mark.parametrize(
    ("folders", "expected"),
    [(("483", "1"), [("1",), ("483",)]), (("train", "test"), [("425",), ("425",)]), (("all",), [("425",)])],
)
def test_folders_of_classes_win_over_labels_csv_as_in_training(pictures, tmp_path, folders, expected):
    for name in folders:
        (tmp_path / name).mkdir()
        shutil.copy(pictures / "0.jpg", tmp_path / name / "a.jpg")
    rows = "".join(f"{name}/a.jpg,425\n" for name in folders)
    (tmp_path / "labels.csv").write_text(f"file,label\n{rows}")
    assert sorted(one.labels for one in images.find(images.OwnImages(str(tmp_path)))) == expected


@pytest.mark.parametrize(
    ("change", "gap"),
    [
        ({"environment": {"onnxruntime": "1.17.0"}}, r"ONNX Runtime 1\.17\.0, and .* would run"),
        ({"environment": {"onnxruntime": None}}, "ONNX Runtime None"),
        ({"limits": {"max_logit": 1e9}}, "limits are looser than today's: max_logit"),
        ({"limits": {"min_top1_agreement": 0.5}}, "looser than today's: min_top1_agreement"),
        ({"images": {"own": 0}}, "none of your own images"),
    ],
)
def test_certificate_made_otherwise_covers_nothing(tmp_path, change, gap):
    small_bundle(tmp_path / "b")
    opened = open_bundle(str(tmp_path / "b"))
    content = dict(opened.certificate_for("cpu", "fp32").content)
    content |= {name: {**content[name], **part} for name, part in change.items()}
    bundle.add_certificate(opened.uri, opened.manifest, "cpu", "fp32", content)
    with pytest.raises(NotCertified, match=f"does not cover this: .*{gap}"):
        open_bundle(opened.uri).certificate_covering(RuntimeSpec())


def test_patch_release_of_onnx_runtime_is_covered(tmp_path):
    small_bundle(tmp_path / "b")
    found = open_bundle(str(tmp_path / "b")).certificate_for("cpu", "fp32")
    major, minor, _ = ort.__version__.split(".", 2)
    content = {
        **found.content,
        "environment": {**found.content["environment"], "onnxruntime": f"{major}.{minor}.99"},
    }
    assert not find_gap(dataclasses.replace(found, content=content), RuntimeSpec())


def test_other_vector_extensions_matter_to_int8_alone(tmp_path, monkeypatch):
    small_bundle(tmp_path / "b")
    found = open_bundle(str(tmp_path / "b")).certificate_for("cpu", "fp32")
    content = {**found.content, "limits": dataclasses.asdict(LIMITS["int8"])}
    int8 = dataclasses.replace(found, precision="int8", content=content)
    assert not find_gap(int8, RuntimeSpec(precision="int8"))
    monkeypatch.setattr(providers, "vector_extensions", lambda: ["avx2"])
    assert "this CPU has avx2" in find_gap(int8, RuntimeSpec(precision="int8"))
    assert not find_gap(found, RuntimeSpec())


@pytest.mark.parametrize(
    ("here", "gap"),
    [
        ("NVIDIA A100 driver 580.1", ""),
        ("NVIDIA L4 driver 550.2", "measured on the GPU NVIDIA A100, and this one is NVIDIA L4"),
    ],
)
def test_certificate_of_a_gpu_covers_its_model_with_any_driver(tmp_path, monkeypatch, here, gap):
    small_bundle(tmp_path / "b")
    found = open_bundle(str(tmp_path / "b")).certificate_for("cpu", "fp32")
    spec = RuntimeSpec(provider="cuda")
    environment = {
        **found.content["environment"],
        "machine": "NVIDIA A100 driver 550.2",
        "buckets": spec.buckets,
    }
    certificate = dataclasses.replace(found, content={**found.content, "environment": environment})
    monkeypatch.setattr(providers, "gpu_name", lambda device_id: here)
    told = find_gap(certificate, spec)
    assert gap in told and bool(told) == bool(gap)


def test_machine_without_gpu_leaves_the_model_of_gpu_to_the_workers(tmp_path, monkeypatch):
    small_bundle(tmp_path / "b")
    found = open_bundle(str(tmp_path / "b")).certificate_for("cpu", "fp32")
    spec = RuntimeSpec(provider="cuda")
    environment = {**found.content["environment"], "machine": "NVIDIA A100 driver 1", "buckets": spec.buckets}
    certificate = dataclasses.replace(found, content={**found.content, "environment": environment})

    def unavailable(device_id: int) -> str:
        raise providers.ProviderUnavailable("nvidia-smi does not answer")

    monkeypatch.setattr(providers, "gpu_name", unavailable)
    assert not find_gap(certificate, spec)


IDS = ("483", "1", "425")


def contract(*, multi_label: bool = False, **thresholds: float) -> Contract:
    spec = ModelSpec(IDS, "3.1", ImageSpec(), multi_label, thresholds={"483": 0.5, **thresholds})
    return contract_of(spec, taxonomy.load("3.1"))


def compared(reference_nc, candidate_nc, *, multi_label: bool = False, precision="fp32"):
    both = contract(multi_label=multi_label)
    found = published.compare(
        both,
        both,
        reference_nc=np.array(reference_nc),
        candidate_nc=np.array(candidate_nc),
        limits=LIMITS[precision],
    )
    return found, parity.published_failures(found, LIMITS[precision])


def test_label_sets_of_a_multi_label_model_are_compared_at_the_thresholds():
    """The best label is the same; a second one appears."""
    found, failures = compared([[0.9, 0.1, 0.2]], [[0.9, 0.7, 0.2]], multi_label=True)
    assert found["cat"]["different"] == 1
    assert [one.metric for one in failures] == ["cat agreement"]


def test_category_within_the_margin_of_its_threshold_is_a_tie():
    found, failures = compared([[0.5002, 0.3, 0.1998]], [[0.4998, 0.3002, 0.2]])
    assert (found["cat"]["ties"], failures) == (1, [])
    found, failures = compared([[0.51, 0.3, 0.19]], [[0.49, 0.31, 0.2]])
    assert (found["cat"]["different"], len(failures)) == (1, 1)


def test_order_of_classes_does_not_matter_to_what_is_published():
    ours, theirs = contract(), contract()
    spec = dataclasses.replace(theirs.spec, class_ids=IDS[::-1])
    turned = contract_of(spec, theirs.taxonomy)
    reference_nc = np.array([[0.7, 0.2, 0.1], [0.1, 0.3, 0.6]])
    found = published.compare(
        ours, turned, reference_nc=reference_nc, candidate_nc=reference_nc[:, ::-1], limits=LIMITS["fp32"]
    )
    assert not parity.published_failures(found, LIMITS["fp32"])
