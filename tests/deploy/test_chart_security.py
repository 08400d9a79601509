"""What the chart refuses unless the values say so: no API keys, ports for everybody, more rights than `restricted` admits."""

import json
import re
import shlex
from itertools import pairwise
from typing import Any

import helm_python
import pytest
import yaml

from tests.support.chart import CHART, RAY, VALUE_SETS, helm_template, render, server_pod, workers

REPOSITORY = CHART.parents[1]
KEYS = {"apiKeysSecret": {"name": "keys"}}
PEERS = {"policy": {"from": [{"podSelector": {}}]}}
EVERYBODY = {"policy": {"allowAllIngress": True}}
RDMA = {
    "mode": "multiNode",
    "engine": {"pipeline_parallel_size": 2},
    "multiNode": {"ray": RAY, "rdma": {"resource": "rdma/hca_shared_devices_a"}},
}
RAY_CLIENT_SERVER_PORT = 10001
# The volume types and capabilities that the Pod Security Standard `restricted` admits.
RESTRICTED_VOLUMES = {
    *("configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim", "projected", "secret"),
}
RESTRICTED_CAPABILITIES = {"NET_BIND_SERVICE"}

every_value_set = pytest.mark.parametrize("values", VALUE_SETS.values(), ids=VALUE_SETS.keys())


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({}, ["security.apiKeysSecret.name", "security.allowUnauthenticated"]),
        ({"network": PEERS}, ["security.apiKeysSecret.name", "security.allowUnauthenticated"]),
        ({"network": EVERYBODY}, ["security.apiKeysSecret.name", "security.allowUnauthenticated"]),
        ({"security": {"apiKeysSecret": {"key": "clients"}}, "network": PEERS}, ["security.apiKeysSecret.name"]),
        ({"security": KEYS}, ["network.policy.from", "network.policy.allowAllIngress"]),
        ({"security": {"allowUnauthenticated": True}}, ["network.policy.from", "network.policy.allowAllIngress"]),
        ({"security": KEYS, "network": {"policy": {"from": []}}}, ["network.policy.from"]),
        ({"security": {**KEYS, "allowUnauthenticated": True}, "network": PEERS}, ["not both"]),
        ({"security": KEYS, "network": {"policy": {**PEERS["policy"], "allowAllIngress": True}}}, ["not both"]),
    ],
    ids=str,
)
def test_a_release_that_would_be_open_is_refused_by_the_names_of_its_values(
    values: dict[str, Any], named: list[str]
) -> None:
    with pytest.raises(helm_python.HelmError) as error:
        helm_template(values)
    assert [name for name in named if name not in str(error.value)] == []


def notes(values: dict[str, Any]) -> str:
    return helm_template(values)["NOTES.txt"]


def warnings(values: dict[str, Any]) -> list[str]:
    return re.findall(r"^WARNING: (\S+?)[: ]", notes(values), re.M)


def test_a_release_with_keys_and_peers_is_rendered_without_a_warning() -> None:
    assert warnings({"security": KEYS, "network": PEERS}) == []


@pytest.mark.parametrize(
    ("values", "warned"),
    [
        ({"security": {"allowUnauthenticated": True}, "network": PEERS}, ["security.allowUnauthenticated"]),
        ({"security": KEYS, "network": EVERYBODY}, ["network.policy.allowAllIngress"]),
        ({"security": KEYS, "network": {"policy": {"enabled": False}}}, ["network.policy.enabled"]),
    ],
    ids=str,
)
def test_what_was_opened_on_purpose_is_rendered_and_the_notes_warn(values: dict[str, Any], warned: list[str]) -> None:
    assert warnings(values) == warned


@every_value_set
def test_a_policy_names_its_peers_unless_the_values_let_everybody_in(values: dict[str, Any]) -> None:
    objects = render(values)
    if "NetworkPolicy" not in objects:
        assert values["network"]["policy"]["enabled"] is False
        return
    is_open = values.get("network", {}).get("policy", {}).get("allowAllIngress", False)
    for rule in objects["NetworkPolicy"]["spec"]["ingress"]:
        assert bool(rule.get("from")) == (not is_open)


@every_value_set
def test_the_ray_client_server_is_behind_no_service_and_no_rule_for_others(values: dict[str, Any]) -> None:
    objects = render(values)
    ports = {
        port["port"] for kind in ("Service", "Ranks") if kind in objects for port in objects[kind]["spec"]["ports"]
    }
    pods = [server_pod(objects), *(worker["spec"]["template"]["spec"] for worker in workers(objects))]
    ports |= {port["containerPort"] for pod in pods for c in pod["containers"] for port in c.get("ports", [])}
    assert RAY_CLIENT_SERVER_PORT not in ports
    if "NetworkPolicy" in objects:
        policy = objects["NetworkPolicy"]["spec"]
        group = [{"podSelector": policy["podSelector"]}]
        others = [rule for rule in policy["ingress"] if rule.get("from") != group]
        assert [[port["port"] for port in rule["ports"]] for rule in others] == [["http1", "h2c"]]


def violations(pod: dict[str, Any]) -> list[str]:
    """What the Pod Security Standard `restricted` would refuse in a pod's spec."""
    found = [f"{field}: true" for field in ("hostNetwork", "hostPID", "hostIPC") if pod.get(field)]
    for volume in pod.get("volumes", []):
        found += [f"volume {kind}" for kind in volume.keys() - {"name"} - RESTRICTED_VOLUMES]
    context = pod["securityContext"]
    found += [] if context.get("runAsNonRoot") and context.get("runAsUser") != 0 else ["may run as root"]
    found += [] if context.get("seccompProfile", {}).get("type") in ("RuntimeDefault", "Localhost") else ["no seccomp"]
    for container in pod["containers"] + pod.get("initContainers", []):
        found += [f"hostPort {port['hostPort']}" for port in container.get("ports", []) if "hostPort" in port]
        own = container["securityContext"]
        found += [] if own.get("allowPrivilegeEscalation") is False else ["privilege escalation"]
        found += ["privileged"] if own.get("privileged") else []
        found += [] if "ALL" in own["capabilities"].get("drop", []) else ["keeps capabilities"]
        found += [f"adds {name}" for name in set(own["capabilities"].get("add", [])) - RESTRICTED_CAPABILITIES]
    return found


@every_value_set
def test_pods_keep_the_pod_security_standard_that_the_values_name(values: dict[str, Any]) -> None:
    objects = render(values)
    pods = [server_pod(objects), objects["Pod"]["spec"], *(w["spec"]["template"]["spec"] for w in workers(objects))]
    found = {violation for pod in pods for violation in violations(pod)}
    standard = values.get("security", {}).get("podSecurityStandard", "restricted")
    assert found == {"restricted": set(), "baseline": {"volume image"}, "privileged": {"adds IPC_LOCK"}}[standard]


@pytest.mark.parametrize(
    ("values", "named"),
    [
        (RDMA, ["multiNode.rdma.resource", "IPC_LOCK", "security.podSecurityStandard = restricted"]),
        ({**RDMA, "security": {"podSecurityStandard": "baseline"}}, ["IPC_LOCK", "podSecurityStandard = baseline"]),
        (
            {"storage": {"extraVolumes": [{"name": "disk", "hostPath": {"path": "/"}}]}},
            ["storage.extraVolumes", "hostPath", "disk", "security.podSecurityStandard = restricted"],
        ),
        (
            {"storage": {"extraVolumes": [{"name": "share", "nfs": {"server": "s", "path": "/"}}]}},
            ["nfs", "share", "security.podSecurityStandard = restricted"],
        ),
        (
            {
                "security": {"podSecurityStandard": "baseline"},
                "storage": {"extraVolumes": [{"name": "disk", "hostPath": {"path": "/"}}]},
            },
            ["hostPath", "security.podSecurityStandard = baseline"],
        ),
        ({"security": {"podSecurityStandard": "strict"}}, ["podSecurityStandard"]),
    ],
    ids=str,
)
def test_values_that_need_more_than_the_standard_are_refused(values: dict[str, Any], named: list[str]) -> None:
    with pytest.raises(helm_python.HelmError) as error:
        render(values)
    assert [name for name in named if name not in str(error.value)] == []


def test_a_standard_that_admits_a_volume_lets_it_through() -> None:
    share = {"name": "share", "nfs": {"server": "s", "path": "/"}}
    for standard in ("baseline", "privileged"):
        values = {"security": {"podSecurityStandard": standard}, "storage": {"extraVolumes": [share]}}
        assert share in server_pod(render(values))["volumes"]


def flag_values(command: str) -> dict[str, Any]:
    """The values that the flags of a `helm install` set."""
    values: dict[str, Any] = {}
    words = shlex.split(command)
    for flag, assignment in pairwise(words):
        if flag in ("--set", "--set-json"):
            path, _, text = assignment.partition("=")
            *parents, key = path.split(".")
            node = values
            for parent in parents:
                node = node.setdefault(parent, {})
            node[key] = json.loads(text) if flag == "--set-json" else text
    return values


@pytest.mark.parametrize("document", ["docs/deployment.md", "charts/pagoda/README.md"])
def test_the_documented_installs_render_as_they_are_written(document: str) -> None:
    text = (REPOSITORY / document).read_text(encoding="utf-8").replace("\\\n", " ")
    commands = re.findall(r"^ {4}(helm install .*)$", text, re.M)
    assert commands
    files = [yaml.safe_load(block) for block in re.findall(r"^```yaml\n(.*?)^```", text, re.M | re.S)]
    releases = [values for values in files if "repository" in values.get("image", {})]
    assert "deployment" not in document or len(releases) >= 2
    releases += [flag_values(command) for command in commands if " -f " not in command]
    for values in releases:
        assert warnings(values) == []
