"""Mode `multiNode`: groups of a head and its workers, who find each other, trust each other, and change together."""

from typing import Any

import pytest

from pagoda.cli.main import COMMANDS
from pagoda.cli.probe import PATHS
from pagoda.config import load
from tests.support.chart import (
    VALUE_SETS,
    config_file,
    render,
    render_files,
    server_container,
    server_pod,
    workers,
)

MULTI_NODE = {name: values for name, values in VALUE_SETS.items() if values.get("mode") == "multiNode"}
GPUS = MULTI_NODE["multi-node, groups of GPUs with RDMA"]
every_multi_node_set = pytest.mark.parametrize("values", MULTI_NODE.values(), ids=MULTI_NODE.keys())


def worker_pods(objects: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    return [worker["spec"]["template"]["spec"] for worker in workers(objects)]


def worker_container(objects: dict[str, dict[str, Any]], group: int = 0) -> dict[str, Any]:
    (container,) = worker_pods(objects)[group]["containers"]
    return container


def environment(container: dict[str, Any]) -> dict[str, Any]:
    return {variable["name"]: variable.get("value", variable.get("valueFrom")) for variable in container["env"]}


@every_multi_node_set
def test_each_group_is_a_head_and_the_other_nodes(values: dict[str, Any]) -> None:
    objects = render(values)
    nodes, groups = values["multiNode"].get("nodes", 2), values.get("replicas", 1)
    assert objects["Head"]["spec"]["replicas"] == groups
    assert [worker["spec"]["replicas"] for worker in workers(objects)] == [nodes - 1] * groups
    for workload in (objects["Head"], *workers(objects)):
        assert workload["spec"]["podManagementPolicy"] == "Parallel"  # all must be there before any is ready


@every_multi_node_set
def test_workers_find_their_own_head_by_a_name_that_is_known_before_it_is_ready(values: dict[str, Any]) -> None:
    objects = render(values)
    ranks, head = objects["Ranks"], objects["Head"]
    assert ranks["spec"]["clusterIP"] == "None"
    assert ranks["spec"]["publishNotReadyAddresses"] is True
    for group, worker in enumerate(workers(objects)):
        command, address, *_ = worker_container(objects, group)["args"]
        assert address == f"{head['metadata']['name']}-{group}.{ranks['metadata']['name']}"
        assert command == "join"
        assert command in COMMANDS
        assert worker["spec"]["serviceName"] == head["spec"]["serviceName"] == ranks["metadata"]["name"]
        for workload in (head, worker):
            assert ranks["spec"]["selector"].items() <= workload["spec"]["template"]["metadata"]["labels"].items()
    assert not ranks["spec"]["selector"].items() <= objects["Pod"]["metadata"]["labels"].items()


@every_multi_node_set
def test_only_heads_are_asked_and_scraped(values: dict[str, Any]) -> None:
    objects = render(values)
    selectors = [objects["Service"]["spec"]["selector"], objects["Head"]["spec"]["selector"]["matchLabels"]]
    selectors += [objects["PodMonitor"]["spec"]["selector"]["matchLabels"]] if "PodMonitor" in objects else []
    for worker in workers(objects):
        labels = worker["spec"]["template"]["metadata"]["labels"]
        assert worker["spec"]["selector"]["matchLabels"].items() <= labels.items()
        assert not any(selector.items() <= labels.items() for selector in selectors)


@every_multi_node_set
def test_names_leave_room_for_what_kubernetes_appends(values: dict[str, Any]) -> None:
    objects = render(values)
    for workload in (objects["Head"], *workers(objects)):
        # the label controller-revision-hash is the name, a dash and ten characters, and a label has 63
        assert len(workload["metadata"]["name"]) <= 52


@every_multi_node_set
def test_every_container_has_the_three_probes_of_what_runs_in_it(values: dict[str, Any]) -> None:
    objects = render(values)
    assert server_container(objects)["readinessProbe"]["httpGet"]["path"] == PATHS["ready"]
    for group in range(len(workers(objects))):
        container = worker_container(objects, group)
        commands = {name: container[f"{name}Probe"]["exec"]["command"] for name in ("startup", "readiness", "liveness")}
        names = {"startup": "startup", "readiness": "ready", "liveness": "live"}
        assert commands == {name: ["pagoda", "probe", probe, "--rank"] for name, probe in names.items()}
        assert {probe for _, _, probe, _ in commands.values()} <= PATHS.keys()
        # A worker may come before its head, and wait for it as long as the head may take.
        for key in ("periodSeconds", "failureThreshold"):
            assert container["startupProbe"][key] == server_container(objects)["startupProbe"][key]


@every_multi_node_set
def test_workers_outlive_the_drain_of_their_head(values: dict[str, Any]) -> None:
    objects = render(values)
    for pod in worker_pods(objects):
        assert pod["terminationGracePeriodSeconds"] == server_pod(objects)["terminationGracePeriodSeconds"]
        assert pod["containers"][0]["lifecycle"]["preStop"]["exec"]["command"][:2] == ["sh", "-c"]


@every_multi_node_set
def test_settings_are_told_to_the_heads_alone(values: dict[str, Any]) -> None:
    objects = render(values)
    settings = config_file(objects)
    assert settings["distributed_executor_backend"] == "ray"
    assert "ray_address" not in settings  # each head starts its own
    wanted = values["engine"].get("rendezvous_timeout_seconds", settings["engine_start_timeout_seconds"])
    assert settings["rendezvous_timeout_seconds"] == wanted
    changed = render({**values, "engine": {**values["engine"], "max_num_seqs": 7}})
    assert objects["Head"]["spec"]["template"] != changed["Head"]["spec"]["template"]
    assert workers(objects) == workers(changed)
    for pod in worker_pods(objects):
        assert not {"config", "tls", "api-keys"} & {volume["name"] for volume in pod["volumes"]}


@every_multi_node_set
def test_workers_are_told_what_their_head_reckons_with(values: dict[str, Any]) -> None:
    objects = render(values)
    settings = config_file(objects)
    for group in range(len(workers(objects))):
        _, _, *options = worker_container(objects, group)["args"]
        loaded = load(options, {})
        told = {option.partition("=")[0].removeprefix("--").replace("-", "_") for option in options}
        assert {"ray_first_port", "rendezvous_timeout_seconds"} <= told
        assert {key: getattr(loaded.config, key) for key in told} == {key: settings[key] for key in told}
        assert loaded.config.ray_first_port == settings["ray_first_port"] == 6380
        has_gpus = "gpus" in values.get("resources", {})
        ranks = None if has_gpus else values["engine"].get("tensor_parallel_size", 1)
        assert loaded.config.ray_num_cpus == settings.get("ray_num_cpus") == ranks


@every_multi_node_set
def test_the_token_of_the_ray_cluster_comes_from_a_secret_into_every_pod(values: dict[str, Any]) -> None:
    objects = render(values)
    secret = values["multiNode"]["ray"]["tokenSecret"]
    wanted = {"secretKeyRef": {"name": secret["name"], "key": secret.get("key", "token")}}
    for container in (server_container(objects), *(pod["containers"][0] for pod in worker_pods(objects))):
        assert environment(container)["RAY_AUTH_TOKEN"] == wanted


def test_interface_nccl_options_and_rdma_reach_head_and_workers() -> None:
    objects = render(GPUS)
    for container in (server_container(objects), worker_container(objects), worker_container(objects, 2)):
        variables = environment(container)
        assert variables["NCCL_SOCKET_IFNAME"] == variables["GLOO_SOCKET_IFNAME"] == "net1"
        assert (variables["NCCL_IB_HCA"], variables["NCCL_DEBUG"]) == ("mlx5", "INFO")
        limits = container["resources"]["limits"]
        assert (limits["nvidia.com/gpu"], limits["rdma/hca_shared_devices_a"]) == (8, 8)
        assert container["securityContext"]["capabilities"]["add"] == ["IPC_LOCK"]
        assert "HF_TOKEN" in variables  # every rank reads its own part of the weights
    for workload in (objects["Head"], *workers(objects)):
        annotations = workload["spec"]["template"]["metadata"]["annotations"]
        assert annotations["k8s.v1.cni.cncf.io/networks"] == "rdma"


def test_without_an_interface_the_route_decides() -> None:
    variables = environment(worker_container(render(MULTI_NODE["multi-node, two pods"])))
    assert not {"NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"} & variables.keys()


def test_a_group_stays_within_its_domain_and_on_nodes_of_its_own() -> None:
    objects = render(GPUS)
    for group, pod in enumerate(worker_pods(objects)):
        (near,) = pod["affinity"]["podAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
        assert near["topologyKey"] == "example.com/rack"
        assert near["labelSelector"]["matchLabels"] == {
            "statefulset.kubernetes.io/pod-name": f"{objects['Head']['metadata']['name']}-{group}"
        }
        (apart,) = pod["affinity"]["podAntiAffinity"]["preferredDuringSchedulingIgnoredDuringExecution"]
        assert apart["podAffinityTerm"]["topologyKey"] == "kubernetes.io/hostname"
        assert "topologySpreadConstraints" not in pod  # its head's place is its own
    assert "podAffinity" not in server_pod(objects)["affinity"]


def test_network_policy_lets_the_group_talk_on_every_port_and_nobody_else() -> None:
    objects = render(MULTI_NODE["multi-node, four pods, keys, TLS, monitored"])
    policy = objects["NetworkPolicy"]["spec"]
    group = {"podSelector": {"matchLabels": objects["Ranks"]["spec"]["selector"]}}
    assert {"from": [group]} in policy["ingress"]
    assert {"to": [group]} in policy["egress"]
    others = [rule for rule in policy["ingress"] if rule != {"from": [group]}]
    assert [[port["port"] for port in rule["ports"]] for rule in others] == [["http1", "h2c"]]
    assert policy["podSelector"]["matchLabels"] == objects["Ranks"]["spec"]["selector"]


def test_a_budget_counts_the_whole_release() -> None:
    objects = render(GPUS)
    spec = objects["PodDisruptionBudget"]["spec"]
    assert spec["maxUnavailable"] == 1
    for workload in (objects["Head"], *workers(objects)):
        labels = workload["spec"]["template"]["metadata"]["labels"]
        assert spec["selector"]["matchLabels"].items() <= labels.items()


def test_groups_below_the_partition_keep_their_version() -> None:
    objects = render(MULTI_NODE["multi-node, upgraded group by group"])
    partitions = [w["spec"]["updateStrategy"]["rollingUpdate"]["partition"] for w in workers(objects)]
    assert objects["Head"]["spec"]["updateStrategy"]["rollingUpdate"]["partition"] == 1
    assert partitions == [1, 0]  # all workers of group 0 keep theirs, those of group 1 change


def test_notes_tell_where_to_look() -> None:
    notes = render_files(MULTI_NODE["multi-node, two pods"])["NOTES.txt"]
    assert "rollout status statefulset/story-pagoda-head" in notes
    assert "exec story-pagoda-worker-0-0 -- pagoda probe ready --rank" in notes
    assert "There is one group" in notes
