"""What the chart renders to: objects that Kubernetes takes, and settings that Pagoda takes."""

import copy
import json
import re
from math import ceil
from pathlib import Path
from typing import Any

import helm_python
import pytest
import yaml
from kubernetes_validate import ValidationError

import pagoda
from pagoda.config import load
from pagoda.config.schema import option_defaults
from pagoda.serving.lifecycle import ABORT_TIMEOUT_SECONDS
from tests.support.chart import (
    CHART,
    VALUE_SETS,
    complete,
    config_file,
    render,
    render_files,
    server_container,
    server_pod,
    server_workload,
    workers,
)
from tests.support.kubernetes_objects import validate

# Objects of operators, which kubernetes-validate has no schema for; test_chart_monitoring.py looks at their shape.
OPERATOR_KINDS = {"ServiceMonitor", "PodMonitor", "PrometheusRule", "ScaledObject", "HTTPRoute", "InferencePool"}


every_value_set = pytest.mark.parametrize("values", VALUE_SETS.values(), ids=VALUE_SETS.keys())


@every_value_set
def test_helm_lints_without_errors(values: dict[str, Any]) -> None:
    report = helm_python.lint(CHART, complete(values), strict=True)
    assert report["errors"] == []
    assert [m["error"] for m in report["messages"]] == ["icon is recommended"]


@every_value_set
def test_kubernetes_knows_every_field(values: dict[str, Any]) -> None:
    # Dynamic resource allocation and image volumes came late.
    is_new = values.get("resources", {}).get("claims") or values.get("model", {}).get("uri", "").startswith("oci")
    for kind, document in render(values).items():
        if kind not in OPERATOR_KINDS:
            validate(document, "1.33" if is_new else "1.29")


def test_a_misspelt_field_would_be_noticed() -> None:
    document = copy.deepcopy(render({})["Deployment"])
    document["spec"]["template"]["spec"]["containers"][0]["readynessProbe"] = {}
    with pytest.raises(ValidationError, match="readynessProbe"):
        validate(document)


@every_value_set
def test_pagoda_loads_the_rendered_settings(values: dict[str, Any], tmp_path: Any) -> None:
    settings = config_file(render(values))
    for key in ("ssl_certfile", "ssl_keyfile", "api_keys_file"):  # these and the model are only there in the pod
        if key in settings:
            (tmp_path / key).touch()
            settings[key] = str(tmp_path / key)
    for key, path in (("model", "/models"), ("lora_dir", "/adapters"), ("lora_dir", "/etc/pagoda-lora")):
        if settings.get(key) == path:
            settings[key] = str(tmp_path)
    file = tmp_path / "pagoda.json"
    file.write_text(json.dumps(settings))
    # what Kubernetes adds for a Service named pagoda must not matter, should it be there all the same
    loaded = load(["--config", str(file)], {"PAGODA_PORT": "tcp://10.0.0.1:80"})
    for key, value in values.get("engine", {}).items():
        assert loaded.sources[key] == f"file {file}"
        if isinstance(value, int):
            assert getattr(loaded.config, key) == value


@every_value_set
def test_names_of_objects_are_legal_and_one_namespace_holds_them_all(values: dict[str, Any]) -> None:
    for document in render(values).values():
        assert re.fullmatch(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?", document["metadata"]["name"])
        assert document["metadata"]["namespace"] == "tales"


@every_value_set
def test_selectors_find_the_pods_and_only_them(values: dict[str, Any]) -> None:
    objects = render(values)
    workload = server_workload(objects)
    pod_labels = workload["spec"]["template"]["metadata"]["labels"]
    selectors = [objects["Service"]["spec"]["selector"], workload["spec"]["selector"]["matchLabels"]]
    kinds = {"PodDisruptionBudget", "PodMonitor"} & objects.keys()
    selectors += [objects[kind]["spec"]["selector"]["matchLabels"] for kind in kinds]
    if "NetworkPolicy" in objects:
        selectors.append(objects["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"])
    if "ServiceMonitor" in objects:
        wanted = objects["ServiceMonitor"]["spec"]["selector"]["matchLabels"].items()
        assert wanted <= objects["Service"]["metadata"]["labels"].items()
    for selector in selectors:
        assert selector.items() <= pod_labels.items()
        assert not selector.items() <= objects["Pod"]["metadata"]["labels"].items()


@every_value_set
def test_no_object_carries_a_label_of_kserve(values: dict[str, Any]) -> None:
    # Its controller deletes Deployments and Services that carry them and belong to no InferenceService.
    assert all("kserve.io" not in text for text in render_files(values).values())


@every_value_set
def test_pods_are_locked_down(values: dict[str, Any]) -> None:
    objects = render(values)
    rdma = any("rdma/" in name for name in server_container(objects)["resources"]["limits"])
    pods = [worker["spec"]["template"]["spec"] for worker in workers(objects)]
    for spec in (server_pod(objects), objects["Pod"]["spec"], *pods):
        assert spec["automountServiceAccountToken"] is False
        assert spec["enableServiceLinks"] is False
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["runAsUser"] > 0
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in spec["containers"] + spec.get("initContainers", []):
            adds = {"add": ["IPC_LOCK"]} if rdma and container["name"] == "pagoda" else {}
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"], **adds},
            }


@every_value_set
def test_a_stopped_pod_has_time_to_drain(values: dict[str, Any]) -> None:
    objects = render(values)
    (command,) = [server_container(objects)["lifecycle"]["preStop"]["exec"]["command"]]
    assert command[0] == "sleep"
    drain = int(command[1]) + config_file(objects)["grace_period_seconds"] + 2 * ABORT_TIMEOUT_SECONDS
    assert server_pod(objects)["terminationGracePeriodSeconds"] >= drain


@every_value_set
def test_startup_probe_outlasts_the_engine_s_own_limit(values: dict[str, Any]) -> None:
    objects = render(values)
    probe = server_container(objects)["startupProbe"]
    limit = config_file(objects)["engine_start_timeout_seconds"]
    assert probe["periodSeconds"] * probe["failureThreshold"] > limit
    if "Deployment" in objects:
        deadline = objects["Deployment"]["spec"]["progressDeadlineSeconds"]
        assert deadline > probe["periodSeconds"] * probe["failureThreshold"]


@every_value_set
def test_every_volume_is_mounted_and_every_mount_has_its_volume(values: dict[str, Any]) -> None:
    objects = render(values)
    for pod in (server_pod(objects), *(worker["spec"]["template"]["spec"] for worker in workers(objects))):
        check_volumes(pod)


def check_volumes(pod: dict[str, Any]) -> None:
    containers = pod["containers"] + pod.get("initContainers", [])
    mounted = {mount["name"] for container in containers for mount in container.get("volumeMounts", [])}
    assert mounted == {volume["name"] for volume in pod["volumes"]}
    (shm,) = [volume["emptyDir"] for volume in pod["volumes"] if volume["name"] == "shm"]
    assert shm["medium"] == "Memory"


@every_value_set
def test_every_empty_dir_of_the_chart_has_a_size_limit(values: dict[str, Any]) -> None:
    objects = render(values)
    extra = {volume["name"] for volume in values.get("storage", {}).get("extraVolumes", [])}
    for pod in (server_pod(objects), *(worker["spec"]["template"]["spec"] for worker in workers(objects))):
        empty = {volume["name"]: volume["emptyDir"] for volume in pod["volumes"] if "emptyDir" in volume}
        assert {"tmp", "shm"} <= empty.keys()
        assert [name for name in empty.keys() - extra if "sizeLimit" not in empty[name]] == []


def test_tmp_is_as_large_as_the_release_says() -> None:
    def tmp(values: dict[str, Any]) -> Any:
        (volume,) = [volume for volume in server_pod(render(values))["volumes"] if volume["name"] == "tmp"]
        return volume["emptyDir"]

    assert tmp({}) == {"sizeLimit": "4Gi"}
    assert tmp({"storage": {"tmp": {"sizeLimit": "512Mi"}}}) == {"sizeLimit": "512Mi"}


def test_an_upgrade_takes_no_pod_away_before_another_is_ready() -> None:
    spec = render({})["Deployment"]["spec"]
    assert spec["strategy"]["rollingUpdate"] == {"maxUnavailable": 0, "maxSurge": 1}
    assert server_container(render({}))["lifecycle"]["preStop"]["exec"]["command"] == ["sleep", "10"]


def test_a_changed_setting_replaces_the_pods_and_a_changed_service_does_not() -> None:
    def template(values: dict[str, Any]) -> Any:
        return render(values)["Deployment"]["spec"]["template"]

    assert template({}) != template({"engine": {"max_num_seqs": 8}})
    assert template({}) == template({"network": {"service": {"annotations": {"a": "b"}}}})


def test_grace_of_the_pod_is_pre_stop_drain_and_closing() -> None:
    objects = render({"rollout": {"preStopSeconds": 7}, "engine": {"grace_period_seconds": 90.5}})
    assert server_pod(objects)["terminationGracePeriodSeconds"] == 7 + ceil(90.5) + 10


def test_the_values_that_templates_reckon_with_have_the_schema_s_defaults() -> None:
    engine = yaml.safe_load((CHART / "values.yaml").read_text())["engine"]
    assert engine == {key: option_defaults()[key] for key in engine}


def test_a_name_with_slashes_is_served_and_asked_for_as_it_is() -> None:
    objects = render({"model": {"hubId": "Qwen/Qwen3-0.6B", "name": "publishers/team/models/qwen"}})
    assert config_file(objects)["model_name"] == "publishers/team/models/qwen"
    assert objects["Pod"]["spec"]["containers"][0]["args"][1] == "publishers/team/models/qwen"


def test_the_chart_serves_the_version_it_lies_beside() -> None:
    assert yaml.safe_load((CHART / "Chart.yaml").read_text())["appVersion"] == pagoda.__version__


@pytest.mark.parametrize(
    ("values", "model", "name"),
    [
        ("defaults", None, "demo"),
        ("hub model with a token", "Qwen/Qwen3-0.6B", "Qwen3-0.6B"),
        ("model from a claim", "/models", "tale"),
        ("model from an init container", "/models", "story-pagoda"),
    ],
)
def test_each_source_of_a_model(values: str, model: str | None, name: str) -> None:
    objects = render(VALUE_SETS[values])
    settings = config_file(objects)
    assert (settings.get("model"), settings["model_name"]) == (model, name)
    assert objects["Pod"]["spec"]["containers"][0]["args"][1] == name
    mounts = {mount["name"]: mount for mount in server_container(objects)["volumeMounts"]}
    assert ("model" in mounts) == (model == "/models")
    if "model" in mounts:
        assert mounts["model"]["readOnly"] is True


def test_model_of_a_claim_is_the_directory_named() -> None:
    mounts = {m["name"]: m for m in server_container(render(VALUE_SETS["model from a claim"]))["volumeMounts"]}
    assert mounts["model"]["subPath"] == "qwen/latest"


def test_secrets_are_referred_to_and_never_written() -> None:
    objects = render({**VALUE_SETS["api keys"], "model": {"hubId": "a/b", "hubTokenSecret": {"name": "hf"}}})
    environment = {variable["name"]: variable for variable in server_container(objects)["env"]}
    assert "PAGODA_API_KEYS" not in environment
    assert environment["HF_TOKEN"]["valueFrom"]["secretKeyRef"] == {"name": "hf", "key": "token"}
    assert "api_keys" not in config_file(objects)


@pytest.mark.parametrize(
    ("key", "items", "file"),
    [
        ("clients.txt", [{"key": "clients.txt", "path": "clients.txt"}], "/etc/pagoda-keys/clients.txt"),
        ("", None, "/etc/pagoda-keys"),
    ],
)
def test_api_keys_are_mounted_as_files_that_change_with_their_secret(
    key: str, items: list[dict[str, str]] | None, file: str
) -> None:
    objects = render({"security": {"apiKeysSecret": {"name": "keys", "key": key}}})
    (volume,) = [volume for volume in server_pod(objects)["volumes"] if volume["name"] == "api-keys"]
    assert volume["secret"]["secretName"] == "keys"
    assert volume["secret"].get("items") == items
    assert volume["secret"]["defaultMode"] == 0o440
    (mount,) = [mount for mount in server_container(objects)["volumeMounts"] if mount["name"] == "api-keys"]
    assert mount["readOnly"] is True
    assert "subPath" not in mount  # which the kubelet would never update
    assert config_file(objects)["api_keys_file"] == file
    assert Path(file).is_relative_to(mount["mountPath"])


def test_a_gpu_is_asked_for_and_its_taint_tolerated() -> None:
    objects = render(VALUE_SETS["gpu"])
    assert server_container(objects)["resources"]["limits"] == {"memory": "64Gi", "nvidia.com/gpu": 1}
    pod = server_pod(objects)
    assert {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"} in pod["tolerations"]
    assert {"key": "spot", "operator": "Exists"} in pod["tolerations"]
    assert pod["nodeSelector"] == {"accelerator": "h200"}


def test_pods_of_one_release_prefer_different_nodes_and_spread_over_zones() -> None:
    pod = server_pod(render({}))
    (term,) = pod["affinity"]["podAntiAffinity"]["preferredDuringSchedulingIgnoredDuringExecution"]
    assert term["podAffinityTerm"]["topologyKey"] == "kubernetes.io/hostname"
    assert [c["topologyKey"] for c in pod["topologySpreadConstraints"]] == ["topology.kubernetes.io/zone"]


def test_network_policy_opens_the_two_ports_and_only_the_ways_out_that_are_needed() -> None:
    def policy(name: str) -> Any:
        return render(VALUE_SETS[name])["NetworkPolicy"]["spec"]

    default = policy("defaults")
    assert [port["port"] for port in default["ingress"][0]["ports"]] == ["http1", "h2c"]
    assert [[port["port"] for port in rule["ports"]] for rule in default["egress"]] == [[53, 53]]
    assert [{"port": 443, "protocol": "TCP"}] in [rule["ports"] for rule in policy("hub model with a token")["egress"]]
    closed = policy("network closed to most")
    assert closed["egress"][-1] == {"ports": [{"port": 3128, "protocol": "TCP"}]}
    assert {"namespaceSelector": {"matchLabels": {"team": "a"}}} in closed["ingress"][0]["from"]
    test_labels = render(VALUE_SETS["network closed to most"])["Pod"]["metadata"]["labels"]
    assert any(
        peer.get("podSelector", {}).get("matchLabels", {"": ""}).items() <= test_labels.items()
        for peer in closed["ingress"][0]["from"]
    )


def test_ports_are_rest_first_then_grpc_in_clear_http2() -> None:
    objects = render(VALUE_SETS["other ports and a load balancer"])
    ports = objects["Service"]["spec"]["ports"]
    assert [(port["name"], port["port"], port["appProtocol"]) for port in ports] == [
        ("http1", 9000, "http"),
        ("h2c", 9001, "kubernetes.io/h2c"),
    ]
    assert [port["containerPort"] for port in server_container(objects)["ports"]] == [9000, 9001]
    settings = config_file(objects)
    assert (settings["http_port"], settings["grpc_port"]) == (9000, 9001)


def test_tls_reaches_server_probes_service_and_monitor() -> None:
    objects = render(VALUE_SETS["tls"])
    settings = config_file(objects)
    mounts = {m["name"]: m["mountPath"] for m in server_container(objects)["volumeMounts"]}
    assert settings["ssl_certfile"] == f"{mounts['tls']}/tls.crt"
    assert settings["ssl_keyfile"] == f"{mounts['tls']}/tls.key"
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert server_container(objects)[probe]["httpGet"]["scheme"] == "HTTPS"
    assert objects["ServiceMonitor"]["spec"]["endpoints"][0]["scheme"] == "https"
    assert objects["Pod"]["spec"]["containers"][0]["args"][0].startswith("https://")


@pytest.mark.parametrize(
    ("task", "path"), [("embed", "/v1/embeddings"), ("classify", "/classify"), ("score", "/rerank")]
)
def test_notes_tell_how_to_ask_a_model_that_pools(task: str, path: str) -> None:
    notes = render_files({"engine": {"task": task}})["NOTES.txt"]
    assert f"curl http://localhost:8080{path} -d" in notes
    assert "/generate" not in notes


def test_notes_tell_how_to_ask_this_release() -> None:
    notes = render_files(VALUE_SETS["other ports and a load balancer"])["NOTES.txt"]
    assert "kubectl -n tales port-forward service/story-pagoda 9000 9001" in notes
    assert "curl http://localhost:9000/v2/models/demo/generate -d '{" in notes
    assert "helm -n tales test story" in notes
    scrapes = {"monitoring": {"monitor": "service", "apiKeySecret": {"name": "scrapes"}}}
    notes = render_files({**VALUE_SETS["tls"], **VALUE_SETS["api keys"], **scrapes})["NOTES.txt"]
    assert "jsonpath='{.data.clients\\.txt}'" in notes
    assert 'curl -k -H "Authorization: Bearer $KEY" https://localhost:8080/v2/' in notes


def test_several_models_come_from_one_claim_or_each_from_its_own_place() -> None:
    root = {"model": {"claim": {"name": "models"}}, "engine": {"model_dir_root": "/models", "load_on_demand": True}}
    settings = config_file(render(root))
    assert (settings.get("model"), settings["model_dir_root"], settings["load_on_demand"]) == (None, "/models", True)
    models = {"chat": {"model": "/models/chat"}, "embedder": {"model": "/models/minilm", "task": "embed"}}
    settings = config_file(render({"model": {"claim": {"name": "models"}}, "engine": {"models": models}}))
    assert (settings["models"], settings["model_name"], "model" in settings) == (models, "chat", False)
    with pytest.raises(Exception, match="each names its own in"):
        render({"model": {"hubId": "owner/name"}, "engine": {"models": models}})
