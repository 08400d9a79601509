"""What teams set on their clusters: where it ends up in the rendered objects."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support.chart import VALUE_SETS, config_file, render, server_container, server_pod

TEAMS = VALUE_SETS["what a cluster of many teams asks for"]


@pytest.fixture(scope="module")
def teams() -> dict[str, dict[str, Any]]:
    return render(TEAMS)


def test_containers_arguments_and_environment_of_the_user(teams: dict[str, dict[str, Any]]) -> None:
    pod, container = server_pod(teams), server_container(teams)
    assert [one["name"] for one in pod["containers"]] == ["pagoda", "logs"]
    assert [one["name"] for one in pod["initContainers"]] == ["wait"]
    assert container["args"] == ["serve", "--config", "/etc/pagoda/pagoda.json", "--log-level", "debug"]
    assert container["envFrom"] == TEAMS["extraEnvFrom"]
    assert container["lifecycle"]["postStart"] == TEAMS["lifecycle"]["postStart"]
    assert container["lifecycle"]["preStop"]["exec"]["command"][0] == "sleep"  # the chart's own stays


def test_a_hook_of_the_user_takes_the_place_of_the_chart_s() -> None:
    hook = {"httpGet": {"path": "/drain", "port": 1}}
    assert server_container(render({"lifecycle": {"preStop": hook}}))["lifecycle"] == {"preStop": hook}


def test_a_container_keeps_the_security_context_that_it_brings() -> None:
    own = {"name": "logs", "image": "shipper:1", "securityContext": {"runAsUser": 7}}
    assert server_pod(render({"extraContainers": [own]}))["containers"][1] == own


def test_the_pod_s_labels_scheduler_and_spread(teams: dict[str, dict[str, Any]]) -> None:
    template = teams["Deployment"]["spec"]["template"]
    assert template["metadata"]["labels"]["team"] == "tales"
    assert "team" not in teams["Deployment"]["spec"]["selector"]["matchLabels"]
    assert template["spec"]["schedulerName"] == "volcano"
    assert template["spec"]["topologySpreadConstraints"] == [
        {
            **TEAMS["placement"]["topologySpreadConstraints"][0],
            "labelSelector": teams["Deployment"]["spec"]["selector"],
        }
    ]


def test_service_and_ingress(teams: dict[str, dict[str, Any]]) -> None:
    service, ingress = teams["Service"], teams["Ingress"]
    assert [(port["port"], port["nodePort"], port["targetPort"]) for port in service["spec"]["ports"]] == [
        (80, 30080, "http1"),
        (8081, 30081, "h2c"),
    ]
    assert service["spec"]["sessionAffinityConfig"] == {"clientIP": {"timeoutSeconds": 10800}}
    assert service["spec"]["externalTrafficPolicy"] == "Local"
    assert service["metadata"]["labels"]["tier"] == "models"
    assert [rule["host"] for rule in ingress["spec"]["rules"]] == ["tales.example", "old.example"]
    for rule in ingress["spec"]["rules"]:
        backends = [path["backend"]["service"] for path in rule["http"]["paths"]]
        assert backends == [{"name": service["metadata"]["name"], "port": {"name": "http1"}}] * 2
    # `helm test` asks at the Service's port.
    assert teams["Pod"]["spec"]["containers"][0]["args"][0].endswith(":80")


def test_an_ingress_for_every_host() -> None:
    (rule,) = render({"network": {"ingress": {"enabled": True}}})["Ingress"]["spec"]["rules"]
    assert "host" not in rule


def test_a_claim_for_the_cache_outlives_the_release(teams: dict[str, dict[str, Any]]) -> None:
    claim = teams["PersistentVolumeClaim"]
    assert claim["metadata"]["annotations"] == {"helm.sh/resource-policy": "keep"}
    (cache,) = [volume for volume in server_pod(teams)["volumes"] if volume["name"] == "cache"]
    assert cache["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]


def test_further_objects_are_templates(teams: dict[str, dict[str, Any]]) -> None:
    assert teams["Secret"]["metadata"] == {"name": "story-extra", "namespace": "tales"}


def test_a_route_leads_to_the_service_or_the_pool() -> None:
    alone = render(VALUE_SETS["a gateway alone"])
    (rule,) = alone["HTTPRoute"]["spec"]["rules"]
    assert rule["backendRefs"] == [{"name": alone["Service"]["metadata"]["name"], "port": 8080}]
    assert rule["timeouts"] == {"request": "0s"}
    both = render(VALUE_SETS["a gateway and a pool"])
    pool = both["InferencePool"]
    (rule,) = both["HTTPRoute"]["spec"]["rules"]
    assert rule["backendRefs"] == [
        {"group": "inference.networking.k8s.io", "kind": "InferencePool", "name": pool["metadata"]["name"]}
    ]
    assert pool["spec"]["selector"] == both["Deployment"]["spec"]["selector"]
    assert pool["spec"]["targetPorts"] == [{"number": 8080}]
    assert pool["spec"]["endpointPickerRef"]["name"] == "picker"


@pytest.mark.parametrize(
    ("model", "settings"),
    [
        ({"uri": "hf://Qwen/Qwen3-0.6B"}, {"model": "Qwen/Qwen3-0.6B", "model_name": "Qwen3-0.6B"}),
        ({"uri": "hf://Qwen/Qwen3-0.6B:abc1"}, {"model": "Qwen/Qwen3-0.6B", "revision": "abc1"}),
        ({"hubId": "Qwen/Qwen3-0.6B", "revision": "v1"}, {"model": "Qwen/Qwen3-0.6B", "revision": "v1"}),
        ({"uri": "pvc://weights/a/b"}, {"model": "/models"}),
    ],
)
def test_a_model_by_its_uri(model: dict[str, Any], settings: dict[str, Any]) -> None:
    found = config_file(render({"model": model}))
    assert {key: found[key] for key in settings} == settings


def test_a_claim_by_its_uri() -> None:
    objects = render({"model": {"uri": "pvc://weights/a/b"}})
    (volume,) = [one for one in server_pod(objects)["volumes"] if one["name"] == "model"]
    (mount,) = [one for one in server_container(objects)["volumeMounts"] if one["name"] == "model"]
    assert volume["persistentVolumeClaim"] == {"claimName": "weights", "readOnly": True}
    assert (mount["subPath"], mount["readOnly"]) == ("a/b", True)


def test_a_bucket_is_fetched_by_the_storage_initializer() -> None:
    objects = render(VALUE_SETS["checkpoint of a bucket"])
    (init,) = server_pod(objects)["initContainers"]
    assert init["args"] == ["s3://models/qwen3", "/models"]
    assert init["envFrom"] == [{"secretRef": {"name": "minio"}}]
    ports = [port["port"] for rule in objects["NetworkPolicy"]["spec"]["egress"] for port in rule["ports"]]
    assert {443, 9000} <= set(ports)


@pytest.mark.parametrize("resources", [{"gpus": 1}, {"claims": [{"name": "g", "resourceClaimName": "c", "gpus": 1}]}])
def test_gpus_set_the_device(resources: dict[str, Any]) -> None:
    assert config_file(render({"resources": resources}))["device"] == "cuda"
    assert "device" not in config_file(render({}))


def test_devices_by_dynamic_resource_allocation() -> None:
    objects = render(VALUE_SETS["GPUs by dynamic resource allocation"])
    assert server_pod(objects)["resourceClaims"] == [{"name": "gpus", "resourceClaimTemplateName": "two-gpus"}]
    assert server_container(objects)["resources"]["claims"] == [{"name": "gpus"}]


def test_keda_may_take_the_last_pod() -> None:
    spec = render(VALUE_SETS["keda, down to nothing"])["ScaledObject"]["spec"]
    assert spec["minReplicaCount"] == 0
    assert spec["cooldownPeriod"] == 600
    assert [trigger["type"] for trigger in spec["triggers"]] == ["external-push"]
    assert spec["advanced"]["horizontalPodAutoscalerConfig"]["behavior"] == {
        "scaleUp": {"stabilizationWindowSeconds": 0}
    }


@pytest.mark.parametrize("monitor", ["service", "pod"])
def test_relabelings(monitor: str) -> None:
    rule = [{"action": "drop", "sourceLabels": ["pod"], "regex": "x"}]
    values = {"monitoring": {"monitor": monitor, "relabelings": rule, "metricRelabelings": rule}}
    objects = render(values)
    spec = objects["ServiceMonitor" if monitor == "service" else "PodMonitor"]["spec"]
    (endpoint,) = spec["endpoints" if monitor == "service" else "podMetricsEndpoints"]
    assert endpoint["relabelings"] == endpoint["metricRelabelings"] == rule
