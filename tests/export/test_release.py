"""Export writes a whole bundle or none; certify adds what another machine measured; the report shows it."""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml

from export import card, certificate, checkpoint, release
from export import images as samples
from export.settings import ParitySettings
from jobs.cli import main
from pipelines.bundle import bundle, session
from pipelines.bundle.bundle import open_bundle
from pipelines.bundle.manifest import MODEL_FILES, NotCertified, record
from pipelines.bundle.session import load
from pipelines.bundle.settings import RuntimeSpec
from pipelines.messages import InputError
from pipelines.storage.local import LocalStorage
from tests.builders import models
from tests.builders.models import CLASS_IDS, SPEC

TABLES = ("labels.parquet", "categories.parquet")
FEW = ParitySettings(sample_images=5, min_images=5)
FLAGS = ["--parity.sample-images", "5", "--parity.min-images", "5"]
QUICK = ["--parity.sample-images", "20", "--parity.min-images", "5", "--parity.calibration-images", "40"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    return models.checkpoint(tmp_path_factory.mktemp("run") / "best")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    return models.dataset(tmp_path_factory.mktemp("pictures") / "dataset", 60)


@pytest.fixture(scope="module")
def exported(trained, pictures, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("exported") / "bundle"
    command = [
        "export",
        "--checkpoint",
        str(trained.parent),
        "--images",
        str(pictures),
        "--output",
        str(output),
    ]
    assert main([*command, "--precisions", "fp32,fp16,int8", *QUICK]) == 0
    return output


@pytest.fixture(autouse=True)
def _no_speed_measured(monkeypatch) -> None:
    monkeypatch.setattr(certificate, "SPEED_S", 0.0)


@pytest.fixture
def copied(exported, tmp_path) -> Path:
    return Path(shutil.copytree(exported, tmp_path / "copy"))


def test_bundle_holds_what_readers_are_promised(exported):
    names = {str(path.relative_to(exported)) for path in exported.rglob("*") if path.is_file()}
    assert names == {
        *MODEL_FILES.values(),
        *TABLES,
        *("manifest.json", "README.md", "pixels.py", "certificates/cpu.html"),
        *(f"certificates/cpu-{name}.json" for name in ("fp32", "fp16", "int8")),
    }
    opened = open_bundle(str(exported))
    assert opened.manifest.files.keys() == {*MODEL_FILES.values(), *TABLES, "README.md", "pixels.py"}
    assert opened.spec.class_ids == CLASS_IDS
    assert opened.spec.thresholds == {"483": 0.6}
    assert opened.manifest.temperatures["fp32"] == models.TEMPERATURE


def test_every_precision_in_the_bundle_runs_as_certified(exported, pictures):
    opened = open_bundle(str(exported))
    drawn = samples.draw(samples.OwnImages(str(pictures)), count=10, seed=3)
    pixels_nhwc = np.stack(samples.decode([one.payload for one in drawn], SPEC))
    for name in MODEL_FILES:
        assert opened.certificate_for("cpu", name).passed
        _, probabilities_nc = load(opened, RuntimeSpec(precision=name)).run(pixels_nhwc)
        named = [CLASS_IDS[index] for index in probabilities_nc.argmax(axis=1)]
        assert np.mean([guess == one.labels[0] for guess, one in zip(named, drawn, strict=True)]) >= 0.8


def test_labels_table_gives_each_class_its_place_in_the_taxonomy(exported):
    rows = pq.read_table(exported / "labels.parquet").to_pylist()
    assert [row["id"] for row in rows] == list(CLASS_IDS)
    by_id = {row["id"]: row for row in rows}
    assert (by_id["425"]["parent_id"], by_id["425"]["tier"]) == ("422", 2)
    assert by_id["425"]["path"] == "Pets > Dogs"
    assert by_id["483"]["parent_id"] is None


def test_same_export_elsewhere_has_the_same_model_id(exported, trained, pictures, tmp_path):
    elsewhere = Path(shutil.copytree(trained, tmp_path / "moved"))
    settings = ParitySettings(sample_images=20, min_images=5, calibration_images=40)
    again = release.export(
        str(elsewhere),
        samples.OwnImages(str(pictures)),
        str(tmp_path / "b"),
        precisions=("fp32", "fp16", "int8"),
        settings=settings,
    )
    assert again.model_id == open_bundle(str(exported)).model_id


def test_existing_output_is_refused_before_anything_is_read(tmp_path, capsys):
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle" / "precious.txt").write_text("mine")
    command = [
        "export",
        "--checkpoint",
        "/nowhere",
        "--images",
        "/nowhere",
        "--output",
        str(tmp_path / "bundle"),
    ]
    assert main(command) == 2
    assert re.search(r"bundle exists; name another output", capsys.readouterr().err)
    assert [path.name for path in (tmp_path / "bundle").iterdir()] == ["precious.txt"]


def test_images_that_are_not_there_are_wrong_input(trained, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    for images in (tmp_path / "empty", tmp_path / "missing", tmp_path / "missing.csv"):
        command = [
            "export",
            "--checkpoint",
            str(trained),
            "--images",
            str(images),
            "--output",
            str(tmp_path / "b"),
        ]
        assert main(command) == 2
    assert "holds no image" in capsys.readouterr().err
    assert not (tmp_path / "b").exists()


def test_export_that_fails_while_writing_can_simply_be_repeated(trained, pictures, tmp_path, monkeypatch):
    """Nothing is left in the way; and where even that fails, certificates come last, so nothing runs."""

    put = LocalStorage.put

    def disk_full(self, path, payload):
        if self.uri.endswith("/b") and path.startswith("certificates/"):
            raise OSError(28, "No space left on device")
        put(self, path, payload)

    monkeypatch.setattr(LocalStorage, "put", disk_full)
    with pytest.raises(OSError, match="No space left"):
        release.export(
            str(trained),
            samples.OwnImages(str(pictures)),
            str(tmp_path / "b"),
            settings=FEW,
        )
    assert not [path for path in (tmp_path / "b").rglob("*") if path.is_file()]
    monkeypatch.undo()
    release.export(
        str(trained),
        samples.OwnImages(str(pictures)),
        str(tmp_path / "b"),
        settings=FEW,
    )


def test_certify_adds_this_machines_certificate_and_keeps_the_model(copied, pictures, capsys):
    before = open_bundle(str(copied)).model_id
    (copied / "certificates" / "cpu-int8.json").unlink()
    with pytest.raises(NotCertified, match="iab-vision certify"):
        open_bundle(str(copied)).certificate_for("cpu", "int8")
    command = ["certify", str(copied), "--images", str(pictures), "--precisions", "int8"]
    assert main([*command, "--parity.sample-images", "20", "--parity.min-images", "5"]) == 0
    after = open_bundle(str(copied))
    certificate = after.certificate_for("cpu", "int8")
    assert after.model_id == before
    assert certificate.content["reference"].startswith(f"model.onnx of {before}")
    assert "int8 on cpu: passed" in capsys.readouterr().out
    assert precisions_shown(copied) == ["fp32", "fp16", "int8"]


def precisions_shown(folder: Path) -> list[str]:
    page = (folder / "certificates" / "cpu.html").read_text()
    return re.findall(r"<h2>(\w+) on cpu", page)


def contents_of(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_float32_model_is_not_certified_against_itself(copied, pictures, capsys):
    """The difference would be 0.0, and would replace what the export proved against PyTorch."""
    before = contents_of(copied)
    command = ["certify", str(copied), "--images", str(pictures)]
    assert main([*command, *FLAGS]) == 2
    assert "compared with itself. Name the run" in capsys.readouterr().err
    assert contents_of(copied) == before


def test_float32_model_is_certified_anew_against_its_checkpoint(copied, pictures, trained):
    (copied / "certificates" / "cpu-fp32.json").unlink()
    command = ["certify", str(copied), "--images", str(pictures), "--checkpoint", str(trained)]
    assert main([*command, *FLAGS]) == 0
    content = open_bundle(str(copied)).certificate_for("cpu", "fp32").content
    assert "in PyTorch" in content["reference"]
    assert content["metrics"]["max_logit"] > 0
    assert precisions_shown(copied) == ["fp32", "fp16", "int8"]


def test_checkpoint_of_another_model_is_no_reference(copied, pictures, tmp_path, capsys):
    other = models.checkpoint(tmp_path / "other", network=models.vit(seed=4))
    before = contents_of(copied)
    assert main(["certify", str(copied), "--images", str(pictures), "--checkpoint", str(other)]) == 2
    assert re.search(r"has sha256 \w+, but .* was exported from sha256", capsys.readouterr().err)
    assert contents_of(copied) == before


def test_combination_that_cannot_run_is_refused_before_anything_is_measured(copied, pictures, capsys):
    before = contents_of(copied)
    command = ["certify", str(copied), "--images", str(pictures), "--provider", "cuda"]
    assert main([*command, "--precisions", "fp32,int8"]) == 2
    assert "int8 does not run on cuda" in capsys.readouterr().err
    assert contents_of(copied) == before


@pytest.mark.parametrize(("compared", "calibrated"), [(20, 40), (27, 33), (40, 60), (60, 60)])
def test_images_that_are_compared_calibrate_too_where_too_few_are_left(pictures, compared, calibrated):
    settings = ParitySettings(sample_images=compared, min_images=20, calibration_images=60)
    own, further = release.draw_images(samples.OwnImages(str(pictures)), settings, calibrating=True)
    assert (len(own), len(further)) == (compared, calibrated)
    alone = {one.fingerprint for one in own}.isdisjoint(one.fingerprint for one in further)
    assert alone == (calibrated < 60)


def test_int8_certificate_says_what_it_was_calibrated_on(exported, copied, pictures, caplog):
    """The same images again, with another seed, are partly those that it was made with."""
    certificate = open_bundle(str(exported)).certificate_for("cpu", "int8")
    assert certificate.content["calibration"] == {"images": 40, "compared_too": 0}
    assert "Calibrated on 40 images,\nnone of them" in (exported / "certificates" / "cpu.html").read_text()
    command = ["certify", str(copied), "--images", str(pictures), "--precisions", "int8"]
    assert main([*command, "--parity.sample-images", "60"]) == 0
    certificate = open_bundle(str(copied)).certificate_for("cpu", "int8")
    assert certificate.content["calibration"] == {"images": 40, "compared_too": 40}
    assert "measured on 40 images that it was calibrated on, of 81" in caplog.text
    assert "int8 was calibrated on 40 images; use 500 or more" in caplog.text


def reference_of(trained: Path, pictures: Path) -> certificate.Reference:
    own = samples.draw(samples.OwnImages(str(pictures)), count=5, seed=0)
    with checkpoint.open_checkpoint(str(trained)) as found:
        return release.reference_of_checkpoint(found, found.network(), own, FEW)


def test_gpu_certificates_join_those_of_the_cpu(copied, trained, pictures, monkeypatch, caplog):
    """A stand-in for the GPU runs fp32 and fails in fp16, as a driver that is too old does."""
    faithful = session.load

    def stand_in(opened, spec):
        assert spec.provider == "cuda"
        if spec.precision == "fp16":
            raise RuntimeError("CUDA failure 35")
        return faithful(opened, RuntimeSpec(batch_size=spec.batch_size))

    monkeypatch.setattr(session, "load", stand_in)
    opened, reference = open_bundle(str(copied)), reference_of(trained, pictures)
    release.add_gpu(opened, reference, ("fp32", "fp16", "int8"), ParitySettings(batch_size=8))
    after = open_bundle(str(copied))
    names = [f"{certificate.provider}-{certificate.precision}" for certificate in after.certificates]
    assert names == ["cpu-fp16", "cpu-fp32", "cpu-int8", "cuda-fp32"]
    assert "in PyTorch" in after.certificate_for("cuda", "fp32").content["reference"]
    assert (copied / "certificates" / "cuda.html").exists()
    assert "fp16 is not certified on cuda: CUDA failure 35. Later: iab-vision certify" in caplog.text


def test_export_on_a_gpu_that_fails_keeps_the_bundle(trained, pictures, tmp_path, monkeypatch, caplog):
    faithful = session.load

    def broken(opened, spec):
        if spec.provider == "cuda":
            raise RuntimeError("CUDA failure 700")
        return faithful(opened, spec)

    monkeypatch.setattr(release, "has_gpu", lambda device_id: True)
    monkeypatch.setattr(session, "load", broken)
    command = ["export", "--checkpoint", str(trained), "--images", str(pictures)]
    assert main([*command, "--output", str(tmp_path / "b"), *FLAGS]) == 0
    assert open_bundle(str(tmp_path / "b")).certificate_for("cpu", "fp32").passed
    assert "fp32 is not certified on cuda: CUDA failure 700" in caplog.text


def test_failed_certify_exits_3_and_takes_the_precision_out_of_service(copied, pictures, capsys):
    """An int8 file that does not belong to this model, put there with a manifest to match."""
    before = open_bundle(str(copied))
    manifest = before.manifest
    noisy = _with_noise((copied / "model.int8.onnx").read_bytes())
    files = {**manifest.files, "model.int8.onnx": record(noisy)}
    altered = dataclasses.replace(manifest, files=files)
    (copied / "model.int8.onnx").write_bytes(noisy)
    (copied / "manifest.json").write_bytes(altered.to_json())
    for each in before.certificates:
        bundle.add_certificate(str(copied), altered, "cpu", each.precision, each.content)
    command = ["certify", str(copied), "--images", str(pictures), "--precisions", "int8"]
    assert main([*command, "--parity.sample-images", "20", "--parity.min-images", "5"]) == 3
    assert "int8 on cpu is refused" in capsys.readouterr().err
    with pytest.raises(NotCertified, match="failed parity"):
        open_bundle(str(copied)).certificate_for("cpu", "int8")


def _with_noise(payload: bytes) -> bytes:
    import onnx

    model = onnx.load_model_from_string(payload)
    for tensor in model.graph.initializer:
        if tensor.data_type == onnx.TensorProto.FLOAT and len(tensor.dims) == 2:
            values = onnx.numpy_helper.to_array(tensor)
            tensor.raw_data = np.random.default_rng(0).permutation(values.ravel()).tobytes()
    return model.SerializeToString()


def test_certify_needs_a_certified_reference(copied, pictures, capsys):
    (copied / "certificates" / "cpu-fp32.json").unlink()
    assert main(["certify", str(copied), "--images", str(pictures), "--precisions", "int8"]) == 2
    assert "no certificate for fp32 on cpu" in capsys.readouterr().err


def test_certify_on_a_missing_gpu_fails_without_touching_the_bundle(copied, pictures):
    if release_has_gpu():
        pytest.skip("this machine has a GPU")
    before = sorted(path.name for path in (copied / "certificates").iterdir())
    assert main(["certify", str(copied), "--images", str(pictures), "--provider", "cuda"]) == 1
    assert sorted(path.name for path in (copied / "certificates").iterdir()) == before


def release_has_gpu() -> bool:
    from pipelines.bundle.providers import ProviderUnavailable, gpu_name

    try:
        gpu_name(0)
    except ProviderUnavailable:
        return False
    return True


def test_report_is_one_page_that_needs_nothing_else(exported):
    page = (exported / "certificates" / "cpu.html").read_text()
    assert not re.search(r'(src|href)="(?!data:)', page)
    for name in ("fp32", "fp16", "int8"):
        assert re.search(rf'{name} on cpu: <span class="passed">passed', page)
    assert page.count("data:image/jpeg;base64,") == 3 * 8
    assert "images/s" in page
    assert "undefined" not in page.lower()


def test_card_gives_the_triton_command_and_every_class(exported, tmp_path):
    card = (exported / "README.md").read_text()
    command = re.search(r"install -D BUNDLE/(\S+) MODEL_REPOSITORY/(\S+)", card)
    assert command is not None
    assert (exported / command[1]).exists()
    assert re.fullmatch(r"[a-z_]+/1/model\.onnx", command[2])
    assert all(f"| `{class_id}` |" in card for class_id in CLASS_IDS)


@pytest.mark.parametrize(
    ("licence", "front_matter"),
    [
        ("not stated", {"license": "unknown"}),
        ("Apache-2.0", {"license": "apache-2.0"}),
        ("Acme: internal use", {"license": "other", "license_name": "acme-internal-use"}),
    ],
)
def test_card_names_the_licence_as_the_hub_reads_it(licence, front_matter):
    found = card.hub_metadata(licence)
    assert {name: found[name] for name in found if name.startswith("license")} == front_matter


def test_card_opens_with_the_metadata_of_the_hub(exported):
    _, head, _ = (exported / "README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(head)["license"] == "unknown"


def test_taxonomy_of_the_users_own_travels_with_the_bundle(trained, pictures, tmp_path):
    own = tmp_path / "own.csv"
    own.write_text("id,parent_id,name\nroot,,All\n" + "".join(f"{c},root,Class {c}\n" for c in CLASS_IDS))
    folder = Path(shutil.copytree(trained, tmp_path / "checkpoint"))
    settings = json.loads((folder / "iab_vision.json").read_text())
    (folder / "iab_vision.json").write_text(json.dumps({**settings, "taxonomy": str(own)}))
    made = release.export(
        str(folder),
        samples.OwnImages(str(pictures)),
        str(tmp_path / "b"),
        settings=FEW,
    )
    own.unlink()
    found = open_bundle(str(tmp_path / "b")).taxonomy()
    assert found.path("v9i3On") == "All > Class v9i3On"
    assert (found.name, made.manifest.cattax) == ("own", 500)


def test_flat_labels_are_their_own_taxonomy(trained, pictures, tmp_path):
    folder = Path(shutil.copytree(trained, tmp_path / "checkpoint"))
    settings = json.loads((folder / "iab_vision.json").read_text())
    (folder / "iab_vision.json").write_text(json.dumps({**settings, "taxonomy": "labels"}))
    release.export(
        str(folder),
        samples.OwnImages(str(pictures)),
        str(tmp_path / "b"),
        settings=FEW,
    )
    assert open_bundle(str(tmp_path / "b")).taxonomy().node("v9i3On").parent_id is None


def test_sample_is_the_same_for_a_seed_and_prefers_held_out_images(pictures, tmp_path):
    first = samples.draw(samples.OwnImages(str(pictures)), count=7, seed=1)
    assert [one.image_id for one in samples.draw(samples.OwnImages(str(pictures)), count=7, seed=1)] == [
        one.image_id for one in first
    ]
    assert first != samples.draw(samples.OwnImages(str(pictures)), count=7, seed=2)
    mixed = Path(shutil.copytree(pictures, tmp_path / "mixed"))
    lines = (mixed / "labels.csv").read_text().splitlines()
    trained_on = [line.replace("validation", "train") for line in lines[1:51]]
    (mixed / "labels.csv").write_text("\n".join([lines[0], *trained_on, *lines[51:]]))
    drawn = samples.draw(samples.OwnImages(str(mixed)), count=40, seed=1)
    assert [one.split for one in drawn] == ["validation"] * 10 + ["train"] * 30


def test_folder_with_a_table_of_labels_is_read_by_it_and_says_so(pictures, tmp_path, caplog):
    folder = Path(shutil.copytree(pictures, tmp_path / "listed"))
    lines = (folder / "labels.csv").read_text().splitlines()
    (folder / "labels.csv").write_text("\n".join(lines[:6]))
    with caplog.at_level("INFO"):
        assert len(samples.draw(samples.OwnImages(str(folder)), count=40, seed=1)) == 5
    assert f"{folder}: the images and labels are those of its labels.csv" in caplog.text


@pytest.mark.parametrize("column", ["uri", "file"])
def test_table_without_labels_is_enough(pictures, tmp_path, column):
    table = pictures.parent / f"{column}.csv"
    names = ["0.jpg", "1.jpg"] if column == "file" else [str(pictures / "0.jpg"), str(pictures / "1.jpg")]
    prefix = "dataset/" if column == "file" else ""
    table.write_text("\n".join([column, *(prefix + name for name in names)]))
    drawn = samples.draw(samples.OwnImages(str(table)), count=9, seed=0)
    assert [one.labels for one in drawn] == [(), ()]


def test_table_without_a_place_for_images_says_what_it_has(tmp_path):
    (tmp_path / "t.csv").write_text("picture,size\na,b\n")
    with pytest.raises(InputError, match=r"no column 'uri', 'file', 'file_name'.*--columns.file"):
        samples.draw(samples.OwnImages(str(tmp_path / "t.csv")), count=1, seed=0)


def test_label_that_is_no_class_leaves_the_image_unlabelled(trained):
    known = checkpoint.read_checkpoint(trained, "")
    drawn = [
        samples.Sample("a", b"", ("Sports",)),
        samples.Sample("b", b"", ("210",)),
        samples.Sample("c", b"", ("?",)),
    ]
    targets_nc = samples.targets(drawn, known.spec.class_ids, known.taxonomy)
    assert targets_nc.tolist() == [[1, 0, 0, 0, 0], [-1] * 5, [-1] * 5]


def test_label_below_a_class_counts_as_that_class(trained):
    """As after `train --tier 1`: accuracy is measured on the deeper labels of the dataset too."""
    known = checkpoint.read_checkpoint(trained, "")
    drawn = [samples.Sample("a", b"", (label,)) for label in ("483", "540", "Sports > Sailing")]
    assert known.taxonomy.ancestors("540") == ("483",)
    targets_nc = samples.targets(drawn, ("1", "483"), known.taxonomy)
    assert targets_nc.tolist() == [[0, 1]] * 3


@pytest.mark.photos
def test_file_that_crashes_its_decoder_does_not_end_the_export(tricky):
    """The real files among which some end a process that decodes them unprotected."""
    names = sorted(path for path in tricky.iterdir() if "segfault" in path.name or "crash" in path.name)
    decoded = samples.decode([path.read_bytes() for path in names], SPEC)
    assert len(decoded) == len(names) > 0


@pytest.mark.gpu
def test_gpu_certifies_what_a_cpu_exported(copied, pictures):
    command = ["certify", str(copied), "--images", str(pictures), "--provider", "cuda"]
    assert main([*command, "--precisions", "fp32,fp16", "--parity.batch-size", "32"]) == 0
    opened = open_bundle(str(copied))
    for name in ("fp32", "fp16"):
        certificate = opened.certificate_covering(RuntimeSpec("cuda", name, batch_size=32))
        with pytest.raises(NotCertified, match=r"measured batches of 4, 32 images, and 32, 256 would run"):
            opened.certificate_covering(RuntimeSpec("cuda", name))
        assert certificate.content["environment"]["providers"][0] == "CUDAExecutionProvider"
