"""The manifests: what kustomize makes of them is taken by Kubernetes, by KServe's CRDs, and by its webhooks' rules."""

import copy
import re
import shutil
import subprocess
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

import pagoda
from pagoda.cli.probe import PATHS
from pagoda.config import load
from pagoda.config.schema import option_defaults
from tests.support.chart import RAY, render, server_container, server_pod, workers
from tests.support.kserve_objects import CRDS_VARIABLE, REPOSITORY, build_model, crd_errors, crds
from tests.support.kubernetes_objects import validate

MANIFESTS = REPOSITORY / "manifests"
KUSTOMIZATIONS = sorted(str(path.parent.relative_to(MANIFESTS)) for path in MANIFESTS.rglob("kustomization.yaml"))
KSERVE_KINDS = ("InferenceService", "ClusterServingRuntime", "ServingRuntime")
# See test_llm_manifests.py.
LLM_KINDS = ("LLMInferenceService", "LLMInferenceServiceConfig")
RUNTIMES = {"pagoda": "runtimes/namespaced", "pagoda-multi-node": "runtimes/multi-node"}
# What KServe puts into the environment of a model over several nodes.
MULTI_NODE_VARIABLES = {
    "TENSOR_PARALLEL_SIZE": "8",
    "PIPELINE_PARALLEL_SIZE": "2",
    "HEAD_SVC": "large-predictor-head-1",
}

every_kustomization = pytest.mark.parametrize("folder", KUSTOMIZATIONS)
needs_crds = pytest.mark.skipif(
    crds() is None, reason=f"KServe's CRDs are not here; {CRDS_VARIABLE} may name their folder"
)


@cache
def _built(folder: str) -> str:
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        pytest.skip("kubectl, which builds kustomizations, is not installed")
    return subprocess.run(
        [kubectl, "kustomize", str(MANIFESTS / folder)], capture_output=True, text=True, check=True, timeout=60
    ).stdout


def objects(folder: str) -> list[dict[str, Any]]:
    """What `kubectl apply -k` would send."""
    return list(yaml.safe_load_all(_built(folder)))


def of_kind(folder: str, kind: str) -> dict[str, Any]:
    (document,) = [document for document in objects(folder) if document["kind"] == kind]
    return document


def found(is_wanted: Callable[[dict[str, Any]], bool]) -> list[Any]:
    """Test parameters: folder and position among its KServe objects of those that are wanted."""
    if shutil.which("kubectl") is None:
        return []
    return [
        pytest.param(folder, index, id=f"{folder}-{document['kind']}")
        for folder in KUSTOMIZATIONS
        for index, document in enumerate(kserve_objects(folder))
        if is_wanted(document)
    ]


def kserve_objects(folder: str) -> list[dict[str, Any]]:
    return [document for document in objects(folder) if document["kind"] in KSERVE_KINDS]


def kserve_object(folder: str, index: int) -> dict[str, Any]:
    return kserve_objects(folder)[index]


def has_container(document: dict[str, Any]) -> bool:
    """Whether the object has the server's container itself, and not a runtime that it names."""
    return "containers" in pod_of(document)


def pod_of(document: dict[str, Any]) -> dict[str, Any]:
    """Where the fields of a pod are."""
    spec = document["spec"]
    return spec.get("predictor") or spec.get("template") or spec


def runtime_of(document: dict[str, Any]) -> dict[str, Any]:
    """The runtime that an InferenceService names; without one, that of the cluster."""
    name = document["spec"]["predictor"].get("model", {}).get("runtime", "pagoda")
    return of_kind(RUNTIMES[name], "ServingRuntime")


every_kserve_object = pytest.mark.parametrize(("folder", "index"), found(lambda document: True))
every_server = pytest.mark.parametrize(("folder", "index"), found(has_container))
every_inference_service = pytest.mark.parametrize(
    ("folder", "index"), found(lambda document: document["kind"] == "InferenceService")
)


def container_of(document: dict[str, Any]) -> dict[str, Any]:
    (container,) = pod_of(document)["containers"]
    return container


def test_there_are_runtimes_a_base_and_overlays() -> None:
    assert {"base", "runtimes/cluster", "runtimes/namespaced"} <= set(KUSTOMIZATIONS)
    assert {"overlays/runtime", "overlays/gpu", "overlays/autoscaling"} <= set(KUSTOMIZATIONS)
    assert {"runtimes/multi-node", "overlays/multi-node"} <= set(KUSTOMIZATIONS)


@every_kustomization
def test_kubernetes_knows_every_field(folder: str) -> None:
    for document in objects(folder):
        if document["kind"] not in (*KSERVE_KINDS, *LLM_KINDS, "PodMonitor"):
            validate(document)


@needs_crds
@every_kserve_object
def test_crds_know_every_field(folder: str, index: int) -> None:
    assert crd_errors(kserve_object(folder, index)) == []


@needs_crds
def test_a_misspelt_probe_would_be_noticed() -> None:
    document = copy.deepcopy(of_kind("base", "InferenceService"))
    container = container_of(document)
    container["readynessProbe"] = container.pop("readinessProbe")
    assert any("readynessProbe" in error for error in crd_errors(document))


# The SDK has no class for a runtime's workerSpec; the CRDs know it.
@every_kserve_object
def test_kserve_s_own_classes_can_be_built(folder: str, index: int) -> None:
    document = kserve_object(folder, index)
    if document["kind"] == "ServingRuntime":
        spec = {key: value for key, value in document["spec"].items() if key != "workerSpec"}
        document = {**document, "metadata": {**document["metadata"], "namespace": "default"}, "spec": spec}
    built = build_model(document)
    assert built.metadata.name == document["metadata"]["name"]


def test_a_field_that_kserve_s_classes_lack_would_be_noticed() -> None:
    document = copy.deepcopy(of_kind("base", "InferenceService"))
    document["spec"]["predictor"]["minReplica"] = 1
    with pytest.raises(ValueError, match="minReplica"):
        build_model(document)


@every_server
def test_probes_are_the_engine_s_and_cover_a_long_start(folder: str, index: int) -> None:
    document = kserve_object(folder, index)
    container = container_of(document)
    assert container["startupProbe"]["httpGet"]["path"] == PATHS["ready"]
    assert container["readinessProbe"]["httpGet"]["path"] == PATHS["ready"]
    assert container["livenessProbe"]["httpGet"]["path"] == PATHS["live"]
    startup = container["startupProbe"]
    assert startup["periodSeconds"] * startup["failureThreshold"] > option_defaults()["engine_start_timeout_seconds"]


@every_server
def test_container_is_what_kserve_expects(folder: str, index: int) -> None:
    document = kserve_object(folder, index)
    container = container_of(document)
    assert container["name"] == "kserve-container"
    # The first port becomes the Service's port 80; a name with h2c makes the second one HTTP/2 in the clear.
    ports = [(port["name"], port["containerPort"]) for port in container["ports"]]
    assert ports == [("http1", option_defaults()["http_port"]), ("h2c", option_defaults()["grpc_port"])]
    assert not {variable["name"] for variable in container.get("env", [])} & {"PYTHONPATH", "PROTOCOL"}
    assert container["image"].startswith(f"pagoda:{pagoda.__version__}")


@every_kserve_object
def test_server_takes_the_arguments(folder: str, index: int, tmp_path: Path) -> None:
    document = kserve_object(folder, index)
    predictor = document["spec"].get("predictor", {})
    words = container_of(runtime_of(document))["args"] + predictor["model"]["args"] if "model" in predictor else None
    command, *arguments = words or container_of(document)["args"]
    assert command == "serve"
    arguments = [word.replace("{{.Name}}", "demo").replace("/mnt/models", str(tmp_path)) for word in arguments]
    arguments = [expanded(word, container_of(document) if has_container(document) else None) for word in arguments]
    config = load(arguments, {}).config
    assert config.model_name == "demo"
    if document["metadata"]["name"] in ("large", "pagoda-multi-node"):
        assert (config.tensor_parallel_size, config.pipeline_parallel_size) == (8, 2)
        assert config.distributed_executor_backend == "ray"


def expanded(word: str, container: dict[str, Any] | None) -> str:
    """An argument with the variables that KServe sets; they must not be ones that we set ourselves."""
    own = {variable["name"] for variable in (container or {}).get("env", [])}
    assert not own & MULTI_NODE_VARIABLES.keys()
    for name, value in MULTI_NODE_VARIABLES.items():
        word = word.replace(f"$({name})", value)
    return word


@every_inference_service
def test_a_stopped_predictor_has_time_to_drain(folder: str, index: int) -> None:
    document = kserve_object(folder, index)
    predictor = document["spec"]["predictor"]
    container = container_of(runtime_of(document) if "model" in predictor else document)
    seconds = int(container["lifecycle"]["preStop"]["exec"]["command"][1]) + option_defaults()["grace_period_seconds"]
    assert predictor["terminationGracePeriodSeconds"] >= seconds + 10
    if "workerSpec" in predictor:
        assert predictor["deploymentStrategy"]["type"] == "Recreate"
        assert predictor["workerSpec"]["terminationGracePeriodSeconds"] == predictor["terminationGracePeriodSeconds"]
    else:
        assert predictor["deploymentStrategy"]["rollingUpdate"]["maxUnavailable"] == 0
    assert predictor["timeout"] > 60  # the route's own default cuts answers off


@every_inference_service
def test_mode_and_autoscaler_are_said(folder: str, index: int) -> None:
    document = kserve_object(folder, index)
    annotations = document["metadata"]["annotations"]
    assert annotations["serving.kserve.io/deploymentMode"] == "Standard"
    scales = "autoScaling" in document["spec"]["predictor"]
    assert annotations["serving.kserve.io/autoscalerClass"] == ("keda" if scales else "none")


def test_workers_of_kserve_and_of_the_chart_run_alike() -> None:
    runtime = of_kind("runtimes/multi-node", "ServingRuntime")["spec"]
    (worker,) = runtime["workerSpec"]["containers"]
    assert worker["name"] == "worker-container"  # KServe looks for this name
    command, head, *options = [expanded(word, worker) for word in worker["args"]]
    assert (command, head) == ("join", MULTI_NODE_VARIABLES["HEAD_SVC"])
    told = load(options, {}).config
    assert told.ray_first_port == 6380
    values = {"mode": "multiNode", "engine": {"pipeline_parallel_size": 2}, "multiNode": {"ray": RAY}}
    (chart,) = workers(render(values))[0]["spec"]["template"]["spec"]["containers"]
    for key in ("startupProbe", "readinessProbe", "livenessProbe", "lifecycle"):
        assert worker[key] == chart[key]
    (head_container,) = runtime["containers"]
    for key in ("env", "securityContext", "volumeMounts", "image"):
        assert worker[key] == head_container[key]
    assert {mount["name"] for mount in worker["volumeMounts"]} == {v["name"] for v in runtime["workerSpec"]["volumes"]}


@every_server
def test_every_empty_dir_has_a_size_limit(folder: str, index: int) -> None:
    document = kserve_object(folder, index)
    pods = [pod_of(document)]
    pods += [document["spec"]["workerSpec"]] if "workerSpec" in document["spec"] else []
    for pod in pods:
        empty = {volume["name"]: volume["emptyDir"] for volume in pod["volumes"] if "emptyDir" in volume}
        assert "tmp" in empty
        assert [name for name in empty if "sizeLimit" not in empty[name]] == []


@every_kustomization
def test_a_policy_names_its_peers(folder: str) -> None:
    for document in objects(folder):
        if document["kind"] == "NetworkPolicy":
            for rule in document["spec"]["ingress"]:
                assert rule.get("from"), rule


def test_prometheus_comes_in_where_it_is_asked_for_metrics() -> None:
    (rule,) = of_kind("overlays/autoscaling", "NetworkPolicy")["spec"]["ingress"]
    metrics = of_kind("overlays/autoscaling", "InferenceService")["spec"]["predictor"]["autoScaling"]["metrics"]
    addresses = {metric["external"]["metric"]["serverAddress"] for metric in metrics}
    namespaces = {re.fullmatch(r"http://[^.]+\.([^.:]+):\d+", address)[1] for address in addresses}
    (namespace,) = namespaces
    peer = {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": namespace}}}
    assert rule["from"] == [{"podSelector": {}}, peer]


def test_rules_of_kserve_s_webhook_for_several_nodes_are_kept() -> None:
    service = of_kind("overlays/multi-node", "InferenceService")
    predictor = service["spec"]["predictor"]
    assert service["metadata"]["annotations"]["serving.kserve.io/autoscalerClass"] == "none"
    assert predictor["model"]["storageUri"].startswith(("pvc://", "oci://"))
    assert predictor["workerSpec"]["pipelineParallelSize"] >= 2
    assert "containers" not in predictor["workerSpec"]
    policy = of_kind("overlays/multi-node", "NetworkPolicy")["spec"]
    group = {"podSelector": policy["podSelector"]}
    assert policy["podSelector"]["matchLabels"]["serving.kserve.io/inferenceservice"] == service["metadata"]["name"]
    assert {"from": [group]} in policy["ingress"]
    assert {"to": [group]} in policy["egress"]


def test_predictor_and_chart_run_the_server_alike() -> None:
    predictor = of_kind("base", "InferenceService")["spec"]["predictor"]
    chart = render({})
    for key in ("lifecycle", "resources", "securityContext"):
        assert container_of(of_kind("base", "InferenceService"))[key] == server_container(chart)[key]
    for key in ("terminationGracePeriodSeconds", "enableServiceLinks", "automountServiceAccountToken"):
        assert predictor[key] == server_pod(chart)[key]
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        ours, theirs = container_of(of_kind("base", "InferenceService"))[probe], server_container(chart)[probe]
        assert {**ours, "httpGet": ours["httpGet"]["path"]} == {**theirs, "httpGet": theirs["httpGet"]["path"]}


def test_selectors_are_the_label_that_kserve_gives_the_pods() -> None:
    name = of_kind("base", "InferenceService")["metadata"]["name"]
    label = {"app": f"isvc.{name}-predictor"}
    assert of_kind("base", "PodDisruptionBudget")["spec"]["selector"]["matchLabels"] == label
    assert of_kind("base", "NetworkPolicy")["spec"]["podSelector"]["matchLabels"] == label
    assert of_kind("overlays/autoscaling", "PodMonitor")["spec"]["selector"]["matchLabels"] == label


def test_autoscaling_asks_for_metrics_of_the_server_in_whole_numbers() -> None:
    from tests.deploy.test_chart_monitoring import served_series

    metrics = of_kind("overlays/autoscaling", "InferenceService")["spec"]["predictor"]["autoScaling"]["metrics"]
    for metric in metrics:
        query = metric["external"]["metric"]["query"]
        assert any(series in query for series in served_series("pagoda_"))
        assert metric["external"]["target"]["value"].isdigit()  # handed on as it stands: `800m` would be no number


def test_format_of_kserve_s_own_runtime_is_not_taken_over() -> None:
    formats = of_kind("runtimes/cluster", "ClusterServingRuntime")["spec"]["supportedModelFormats"]
    assert [entry["name"] for entry in formats if entry.get("autoSelect")] == ["pagoda"]


def built_beside_the_manifests(kustomization: str, folder: Path) -> str:
    """What a user's own kustomization, in a folder beside `manifests`, is built into."""
    shutil.copytree(MANIFESTS, folder / "manifests")
    (folder / "mine").mkdir()
    (folder / "mine" / "kustomization.yaml").write_text(kustomization)
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        pytest.skip("kubectl, which builds kustomizations, is not installed")
    command = [kubectl, "kustomize", str(folder / "mine")]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_an_image_of_one_s_own_is_put_in_by_kustomize(tmp_path: Path) -> None:
    kustomization = {
        "resources": ["../manifests/base", "../manifests/runtimes/cluster"],
        "images": [{"name": "pagoda", "newName": "somewhere/pagoda", "newTag": "7"}],
    }
    text = built_beside_the_manifests(yaml.safe_dump(kustomization), tmp_path)
    assert text.count("image: somewhere/pagoda:7") == 2


def test_the_documented_kustomization_gives_image_keys_and_a_gateway(tmp_path: Path) -> None:
    document = (REPOSITORY / "docs/deployment.md").read_text(encoding="utf-8")
    (kustomization,) = [b for b in re.findall(r"^```yaml\n(.*?)^```", document, re.M | re.S) if "Kustomization" in b]
    text = built_beside_the_manifests(kustomization.replace("path/to/manifests", "../manifests"), tmp_path)
    built = {document["kind"]: document for document in yaml.safe_load_all(text)}
    container = container_of(built["InferenceService"])
    assert container["image"] == f"registry.example/pagoda:{pagoda.__version__}"
    assert container["args"][-1] == "--api_keys_file=/etc/pagoda-keys"
    assert (
        container["volumeMounts"][-1]["name"] == built["InferenceService"]["spec"]["predictor"]["volumes"][-1]["name"]
    )
    assert len(built["NetworkPolicy"]["spec"]["ingress"][0]["from"]) == 2
