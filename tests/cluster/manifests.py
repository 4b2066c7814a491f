"""The manifests of jobs/cluster/kubernetes, put together, and whatever is wrong with one.

`kubectl kustomize` does the same with the values filled in; this needs no program.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

import jsonschema
import kubernetes_validate
import yaml

from jobs import cli
from pipelines.messages import InputError
from tests.cluster.entrypoints import arguments_of_driver, arguments_of_submitter

FOLDER = Path(cli.__file__).parent / "cluster" / "kubernetes"
SCHEMAS = Path(__file__).parent / "schemas"
KUBERNETES = "1.34"
NAME_LENGTH = {"RayJob": 47, "RayCronJob": 36, "CronJob": 52, "RayCluster": 63}
"""Longest names: KubeRay's and Kubernetes' children add a suffix, and a label holds 63 characters."""
OBJECT_STORE_SHARE = 0.3
"""Share of a pod's memory that Ray takes for its object store."""
LOAD_ACTOR_GIB = 2
"""Most memory of a load actor: payloads, pixels and its decoder."""
Manifest = dict[str, Any]


def manifests() -> dict[str, Manifest]:
    """Every manifest by its path, the cluster's spec copied where the kustomizations copy it."""
    return json.loads(_read())  # nothing shared, so that a test may change one


@cache
def _read() -> str:
    found = {
        str(path.relative_to(FOLDER)): yaml.safe_load(path.read_text())
        for path in sorted(FOLDER.rglob("*.yaml"))
        if path.name != "kustomization.yaml"
    }
    spec = found["cluster/raycluster.yaml"]["spec"]
    for manifest in found.values():
        if manifest["kind"] == "RayJob":
            manifest["spec"]["rayClusterSpec"] = spec
        elif manifest["kind"] == "RayCronJob":
            manifest["spec"]["jobTemplate"]["rayClusterSpec"] = spec
    return json.dumps(found)


@cache
def _validator(kind: str) -> jsonschema.Draft202012Validator:
    schema = json.loads((SCHEMAS / f"{kind.lower()}.schema.json").read_text())
    return jsonschema.Draft202012Validator(schema)


def faults(manifest: Manifest) -> list[str]:
    """What is wrong with a manifest: by its schema, and by the rules that no schema has."""
    return [*_against_schema(manifest), *_against_rules(manifest)]


def _against_schema(manifest: Manifest) -> Iterator[str]:
    if manifest["apiVersion"] == "ray.io/v1":
        for error in _validator(manifest["kind"]).iter_errors(manifest):
            yield f"{error.json_path}: {error.message[:200]}"
        for pod in _pod_templates(manifest):  # KubeRay's schemas take any pod; Kubernetes does not
            yield from _against_kubernetes(
                {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, **pod}
            )
    else:
        yield from _against_kubernetes(manifest)


def _against_kubernetes(manifest: Manifest) -> Iterator[str]:
    if message := _against_kubernetes_schema(json.dumps(manifest)):
        yield message


@cache  # many manifests hold the same pods, and each validation reads the schemas again
def _against_kubernetes_schema(manifest: str) -> str | None:
    try:
        kubernetes_validate.validate(json.loads(manifest), KUBERNETES, strict=True)
    except kubernetes_validate.ValidationError as error:
        return str(error.message)
    return None


def _against_rules(manifest: Manifest) -> Iterator[str]:
    kind, spec = manifest["kind"], manifest.get("spec", {})
    name = manifest["metadata"]["name"]
    if len(name) > NAME_LENGTH.get(kind, 253):
        yield f"the name of a {kind} has at most {NAME_LENGTH[kind]} characters: {name}"
    if kind in ("CronJob", "RayCronJob"):
        yield from _schedule(spec)
    if kind == "CronJob":
        yield from _cron_job(spec)
    job = {"RayJob": spec, "RayCronJob": spec.get("jobTemplate", {})}.get(kind)
    if job is not None:
        yield from _ray_job(job)
    cluster = spec if kind == "RayCluster" else (job or {}).get("rayClusterSpec")
    if cluster:
        yield from _ray_cluster(cluster)
    for pod in _pod_templates(manifest):
        yield from _pod(pod["spec"])


def _schedule(spec: Mapping[str, Any]) -> Iterator[str]:
    if len(spec["schedule"].split()) != 5:
        yield f"a schedule has five fields: {spec['schedule']}"
    try:
        ZoneInfo(spec["timeZone"])
    except (KeyError, ZoneInfoNotFoundError):
        yield f"there is no time zone {spec.get('timeZone')}"


def _cron_job(spec: Mapping[str, Any]) -> Iterator[str]:
    job = spec["jobTemplate"]["spec"]
    pod = job["template"]["spec"]
    if spec.get("concurrencyPolicy") != "Forbid":
        yield "two nights may overlap: concurrencyPolicy is not Forbid"
    if spec.get("startingDeadlineSeconds", 0) < 60:
        yield "startingDeadlineSeconds: a tick that is missed by a minute is lost"
    if pod.get("restartPolicy") != "Never":
        yield "podFailurePolicy needs restartPolicy Never"
    rules = [rule["onExitCodes"] for rule in job["podFailurePolicy"]["rules"] if "onExitCodes" in rule]
    for rule in rules:
        if rule.get("containerName") not in {each["name"] for each in pod["containers"]}:
            yield f"podFailurePolicy names no container: {rule.get('containerName')}"
    if not {2, 3, 130} <= {code for rule in rules for code in rule["values"]}:
        yield "podFailurePolicy retries exit code 2, 3 or 130"
    for container in pod["containers"]:
        arguments = arguments_of_submitter(*container["args"])
        yield from _command(arguments[arguments.index("nightly") :])


def _ray_job(job: Mapping[str, Any]) -> Iterator[str]:
    """The rules of KubeRay's own validation (ray-operator/pkg/utils/validation.go, v1.7.0)."""
    ends = job.get("shutdownAfterJobFinishes", False)
    if job.get("suspend") and not ends:
        yield "suspend needs shutdownAfterJobFinishes"
    if job.get("ttlSecondsAfterFinished", 0) > 0 and not ends:
        yield "ttlSecondsAfterFinished needs shutdownAfterJobFinishes"
    if job.get("clusterSelector") and job.get("backoffLimit", 0) > 0:
        yield "clusterSelector excludes backoffLimit"
    if job.get("submissionMode") == "SidecarMode" and {"submitterPodTemplate", "submitterConfig"} & set(job):
        yield "SidecarMode excludes submitterPodTemplate and submitterConfig"
    if not isinstance(yaml.safe_load(job.get("runtimeEnvYAML", "{}")), dict):
        yield "runtimeEnvYAML is no mapping"
    yield from _command(arguments_of_driver(job["entrypoint"])[len(["-m", "jobs"]) :])


def _command(words: Sequence[str]) -> Iterator[str]:
    """Whether the command exists and takes the settings."""
    command, *settings = words
    try:
        cli.parse(command, settings)
    except InputError as error:
        yield f"{command}: {error}"


def _ray_cluster(spec: Mapping[str, Any]) -> Iterator[str]:
    from importlib import metadata

    if spec["rayVersion"] != metadata.version("ray"):
        yield f"rayVersion is {spec['rayVersion']}, ray is {metadata.version('ray')}"
    if spec["headGroupSpec"]["rayStartParams"].get("num-cpus") != "0":
        yield "the head takes work: num-cpus is not 0"
    if spec.get("authOptions", {}).get("mode") != "token":
        yield "the cluster asks for no token"
    for group in spec["workerGroupSpecs"]:
        if not group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]:
            yield f"{group['groupName']}: replicas are not between minReplicas and maxReplicas"
        yield from _worker(group["groupName"], group["template"]["spec"])


def _worker(group: str, pod: Mapping[str, Any]) -> Iterator[str]:
    limits = pod["containers"][0]["resources"]["limits"]
    memory = _gib(limits["memory"])
    shared = next((v["emptyDir"]["sizeLimit"] for v in pod["volumes"] if v["name"] == "shared-memory"), "0Gi")
    if _gib(shared) < OBJECT_STORE_SHARE * memory:
        yield f"{group}: /dev/shm of {shared} cannot hold the object store, 30 % of {memory} GiB"
    if int(limits["cpu"]) * LOAD_ACTOR_GIB > (1 - OBJECT_STORE_SHARE) * memory:
        yield f"{group}: {memory} GiB are too little for {limits['cpu']} load actors and the object store"
    tolerated = {each["key"] for each in pod.get("tolerations", [])}
    if "nvidia.com/gpu" in limits and "nvidia.com/gpu" not in tolerated:
        yield f"{group}: GPU nodes are tainted, and the taint is not tolerated"


def _pod(pod: Mapping[str, Any]) -> Iterator[str]:
    if not pod.get("securityContext", {}).get("runAsNonRoot"):
        yield "the pod may run as root"
    for container in pod["containers"]:
        name, resources = container["name"], container["resources"]
        if resources["limits"]["memory"] != resources["requests"]["memory"]:
            yield f"{name}: the node may run out of memory, limits and requests differ"
        for variable in container.get("env", []):
            if re.search("KEY|SECRET|TOKEN|PASSWORD", variable["name"]) and "value" in variable:
                yield f"{name}: {variable['name']} is written in the text"
        probes = [container.get("readinessProbe"), container.get("livenessProbe")]
        if name.startswith("ray-") and not all(probe and "httpGet" in probe for probe in probes):
            yield f"{name}: KubeRay's own probes call wget, which the image does not have"


def _pod_templates(manifest: Manifest) -> Iterator[Manifest]:
    """Every pod template of a manifest."""

    def below(value: Any) -> Iterator[Manifest]:
        if isinstance(value, dict):
            if isinstance(value.get("template"), dict) and "containers" in value["template"].get("spec", {}):
                yield value["template"]
            for inner in value.values():
                yield from below(inner)
        elif isinstance(value, list):
            for inner in value:
                yield from below(inner)

    yield from below(manifest.get("spec", {}))


def _gib(text: str) -> int:
    return int(text.removesuffix("Gi"))
