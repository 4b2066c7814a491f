"""The manifests can be applied, and a fault in one is found before a cluster sees it."""

import shutil
import subprocess
from collections.abc import Callable
from typing import Any

import pytest
import yaml

from tests.cluster.entrypoints import NIGHT, arguments_of_driver
from tests.cluster.manifests import FOLDER, faults, manifests

NAMES = sorted(manifests())


@pytest.mark.parametrize("name", NAMES)
def test_a_manifest_follows_its_schema_and_the_rules_that_stand_in_none(name: str) -> None:
    assert faults(manifests()[name]) == []


NIGHTLY = [
    "nightly", "--date", NIGHT, "--inventory", "s3://bucket/inventory", "--bundle", "s3://bucket/bundle",
    "--table", "s3://bucket/nights", "--provider", "cuda", "--precision", "fp16",
    "--workers.infer-actors", "4", "--workers.start-s", "900", "--fail-on-drift", "alarm",
]  # fmt: skip
DRIVERS = {
    "rayjobs/train.yaml": [
        "train", "--config", "jobs/configs/train_iab_tier1.yaml", "--dataset", "s3://bucket/labels.parquet",
        "--output", "s3://bucket/run", "--num-workers", "4", "--use-gpu",
    ],
    "rayjobs/classify.yaml": [
        "classify", "--inventory", "s3://bucket/inventory", "--bundle", "s3://bucket/bundle",
        "--output", "s3://bucket/predictions", "--provider", "cuda", "--precision", "fp16",
        "--workers.infer-actors", "4", "--workers.start-s", "900",
    ],
    "rayjobs/nightly.yaml": NIGHTLY,
    "raycronjob/raycronjob.yaml": NIGHTLY,
}  # fmt: skip


@pytest.mark.parametrize("name", DRIVERS)
def test_the_driver_gets_values_that_its_submitter_has_not(name: str) -> None:
    spec = manifests()[name]["spec"]
    entrypoint = spec.get("jobTemplate", spec)["entrypoint"]
    assert arguments_of_driver(entrypoint) == ["-m", "jobs", *DRIVERS[name]]


def set_at(path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    """A change of the value at a path of keys and numbers; None removes it."""

    def change(manifest: dict[str, Any]) -> None:
        *way, last = [int(key) if key.isdigit() else key for key in path.split("/")]
        at: Any = manifest
        for key in way:
            at = at[key]
        if value is None:
            del at[last]
        else:
            at[last] = value

    return change


JOB, POD = "spec/jobTemplate/spec", "spec/jobTemplate/spec/template/spec"
PLANTED = [
    ("rayjobs/train.yaml", set_at("spec/shutDownAfterJobFinishes", True), "shutDownAfterJobFinishes"),
    ("raycronjob/raycronjob.yaml", set_at("spec/concurrencyPolicy", "Forbid"), "concurrencyPolicy"),
    ("nightly/cronjob.yaml", set_at("spec/startingDeadline", 60), "startingDeadline"),
    ("cluster/raycluster.yaml",
     set_at("spec/headGroupSpec/template/spec/containers/0/ports/0/port", 1), "port"),
    ("rayjobs/classify.yaml", set_at("spec/shutdownAfterJobFinishes", False), "ttlSecondsAfterFinished"),
    ("rayjobs/classify.yaml", set_at("spec/clusterSelector", {"ray.io/cluster": "x"}), "clusterSelector"),
    ("rayjobs/classify.yaml", set_at("spec/submissionMode", "SidecarMode"), "SidecarMode"),
    ("rayjobs/classify.yaml", set_at("metadata/name", "iab-vision-classify-" + "x" * 30), "47 characters"),
    ("rayjobs/classify.yaml", set_at("spec/entrypoint", "python -m jobs classify --inventry x"), "inventry"),
    ("rayjobs/classify.yaml",
     set_at("spec/entrypoint", "exec python -m jobs classify --workers.infer-actors $GPUS"), "one argument"),
    ("raycronjob/raycronjob.yaml", set_at("spec/timeZone", "Europe/Berlim"), "time zone"),
    ("nightly/cronjob.yaml", set_at(f"{POD}/restartPolicy", "OnFailure"), "restartPolicy Never"),
    ("nightly/cronjob.yaml", set_at(f"{JOB}/podFailurePolicy/rules/0/onExitCodes/values", [2]), "exit code"),
    ("nightly/cronjob.yaml", set_at(f"{POD}/containers/0/name", "other"), "names no container"),
    ("nightly/cronjob.yaml",
     set_at(f"{POD}/containers/0/env/2", {"name": "RAY_AUTH_TOKEN", "value": "ab"}), "is written in"),
    ("nightly/cronjob.yaml", set_at("spec/concurrencyPolicy", "Allow"), "overlap"),
    ("cluster/raycluster.yaml", set_at("spec/rayVersion", "2.9.0"), "rayVersion"),
    ("cluster/raycluster.yaml", set_at("spec/headGroupSpec/rayStartParams", {}), "head takes work"),
    ("cluster/raycluster.yaml", set_at("spec/workerGroupSpecs/1/replicas", 9), "minReplicas"),
    ("cluster/raycluster.yaml", set_at("spec/workerGroupSpecs/0/template/spec/tolerations", []), "tainted"),
    ("cluster/raycluster.yaml",
     set_at("spec/workerGroupSpecs/0/template/spec/volumes/0/emptyDir/sizeLimit", "8Gi"), "/dev/shm"),
    ("cluster/raycluster.yaml", set_at("spec/authOptions", None), "no token"),
    ("cluster/raycluster.yaml",
     set_at("spec/headGroupSpec/template/spec/containers/0/livenessProbe", None), "wget"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "plant", "words"), PLANTED, ids=[words for _, _, words in PLANTED])
def test_a_planted_fault_is_found(name: str, plant: Callable[[dict[str, Any]], None], words: str) -> None:
    manifest = manifests()[name]
    plant(manifest)
    found = faults(manifest)
    assert any(words in fault for fault in found), found


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not installed")
@pytest.mark.parametrize("folder", ["nightly", "rayjobs", "raycronjob"])
def test_the_values_reach_every_manifest_that_is_applied(folder: str) -> None:
    done = subprocess.run(
        ["kubectl", "kustomize", str(FOLDER / folder)], capture_output=True, text=True, check=True
    )
    applied = [one for one in yaml.safe_load_all(done.stdout) if one]
    assert [fault for manifest in applied for fault in faults(manifest)] == []
    text = done.stdout
    assert "image: iab-vision\n" not in text and "image: iab-vision-cuda\n" not in text
    assert all(manifest["metadata"]["namespace"] == "iab-vision" for manifest in applied)
    kinds = {manifest["kind"] for manifest in applied}
    assert {"nightly": "CronJob", "rayjobs": "RayJob", "raycronjob": "RayCronJob"}[folder] in kinds
    assert ("RayCluster" in kinds) == (folder == "nightly")
    assert len([manifest for manifest in applied if "Job" in manifest["kind"]]) == 1
    for manifest in applied:
        if manifest["kind"] == "CronJob":
            env = manifest["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"][0]["env"]
            assert {"name": "TZ", "value": manifest["spec"]["timeZone"]} in env


def test_the_launchers_file_names_a_head_that_takes_no_work() -> None:
    launcher = yaml.safe_load((FOLDER.parent / "ray-up.yaml").read_text())
    head = launcher["available_node_types"][launcher["head_node_type"]]
    assert head["resources"] == {"CPU": 0}
