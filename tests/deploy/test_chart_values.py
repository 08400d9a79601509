"""Values that are wrong are refused before anything is rendered, by a message that names them."""

import importlib.util
import json
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import helm_python
import pytest
import yaml

from pagoda.config.schema import options
from tests.support.chart import CHART, render

MULTI_NODE: dict[str, Any] = {
    "mode": "multiNode",
    "engine": {"pipeline_parallel_size": 2},
    "multiNode": {"ray": {"tokenSecret": {"name": "ray"}}},
}
WRONG_VALUES: list[tuple[dict[str, Any], str]] = [
    ({"replica": 2}, "replica"),
    ({"replicas": "two"}, "replicas"),
    ({"replicas": -1}, "replicas"),
    ({"engine": {"max_num_sequences": 8}}, "max_num_sequences"),
    ({"engine": {"max_num_seqs": 0}}, "max_num_seqs"),
    ({"engine": {"dtype": "fp8"}}, "dtype"),
    ({"engine": {"gpu_memory_utilization": 1.5}}, "gpu_memory_utilization"),
    ({"engine": {"kv_cache_memory_bytes": "lots"}}, "kv_cache_memory_bytes"),
    ({"engine": {"http_port": 9000}}, "http_port"),
    ({"engine": {"api_keys": ["k"]}}, "api_keys"),
    ({"engine": {"grace_period_seconds": None}}, "grace_period_seconds"),
    ({"engine": {"grace_period_seconds": "30s"}}, "grace_period_seconds"),
    ({"network": {"httpPort": 80}}, "httpPort"),
    ({"network": {"service": {"type": "ExternalName"}}}, "type"),
    ({"network": {"policy": {"enable": True}}}, "enable"),
    ({"probes": {"readyness": {}}}, "readyness"),
    ({"probes": {"startup": {"failureThreshold": 3}}}, "failureThreshold"),
    ({"model": {"hubId": "no slash"}}, "hubId"),
    ({"model": {"name": "a b"}}, "name"),
    ({"model": {"claim": {"path": "/absolute"}}}, "path"),
    ({"model": {"hubId": "a/b", "claim": {"name": "c"}}}, "model.hubId, model.claim.name"),
    ({"image": {"digest": "latest"}}, "digest"),
    ({"autoscaling": {"type": "vpa"}}, "type"),
    ({"autoscaling": {"type": "keda"}}, "autoscaling.keda.prometheusAddress"),
    ({"autoscaling": {"type": "hpa", "minReplicas": 5, "maxReplicas": 2}}, "autoscaling.maxReplicas"),
    ({"rollout": {"maxSurge": 0}}, "rollout.maxSurge"),
    ({"rollout": {"maxSurge": "many"}}, "maxSurge"),
    ({"security": {"runAsUser": 0}}, "runAsUser"),
    ({"extraLabels": {"serving.kserve.io/inferenceservice": "x"}}, "serving.kserve.io/inferenceservice"),
    ({"storage": {"cache": {"sizeLimit": "big"}}}, "sizeLimit"),
    ({"mode": "multinode"}, "mode"),
    ({"multiNode": {"enabled": True}}, "multiNode"),
    ({"multiNode": {"nodes": 1}}, "nodes"),
    ({"multiNode": {"nccl": {"UCX_TLS": "rc"}}}, "UCX_TLS"),
    ({"multiNode": {"rdma": {"resource": "hca"}}}, "resource"),
    ({"multiNode": {"networkInterface": "a name of its own"}}, "networkInterface"),
    ({"engine": {"network_interface": "eth0"}}, "network_interface"),
    ({"engine": {"ray_address": "auto"}}, "ray_address"),
    ({"engine": {"distributed_executor_backend": "ray"}}, "distributed_executor_backend"),
    ({"engine": {"tensor_parallel_size": 4}, "resources": {"gpus": 2}}, "resources.gpus"),
    ({"engine": {"data_parallel_size": 2}, "resources": {"gpus": 1}}, "engine.data_parallel_size = 2"),
    ({"resources": {"gpus": 2}}, "resources.gpus"),
    ({"resources": {"gpus": 1}, "engine": {"device": "cpu"}}, "engine.device = cpu"),
    ({"engine": {"device": "cuda"}}, "engine.device = cuda"),
    ({"resources": {"gpus": 1, "claims": [{"name": "g", "resourceClaimName": "c", "gpus": 1}]}}, "resources.claims"),
    ({"resources": {"claims": [{"name": "g", "gpus": 1}]}}, "resourceClaimTemplateName"),
    ({"model": {"uri": "ftp://there/x"}}, "uri"),
    ({"model": {"uri": "s3://bucket/x"}}, "model.storageInitializer.image"),
    ({"model": {"uri": "hf://owner"}}, "hf://owner/name"),
    ({"model": {"uri": "hf://a/b", "hubId": "a/b"}}, "model.uri, model.hubId"),
    ({"model": {"uri": "pvc://claim/x", "revision": "main"}}, "model.revision"),
    ({"model": {"uri": "oci://r/x:1"}}, "security.podSecurityStandard"),
    ({"storage": {"cache": {"claimName": "c", "claim": {"create": True}}}}, "storage.cache.claim.create"),
    ({"network": {"httpRoute": {"enabled": True}}}, "network.httpRoute.parentRefs"),
    ({"network": {"inferencePool": {"enabled": True}}}, "network.inferencePool.endpointPicker.name"),
    ({"network": {"service": {"httpNodePort": 30080}}}, "network.service.type"),
    ({"network": {"service": {"httpPort": 80, "grpcPort": 80}}}, "network.service.grpcPort"),
    ({"autoscaling": {"type": "hpa", "minReplicas": 0}}, "autoscaling.minReplicas = 0"),
    (
        {"autoscaling": {"type": "keda", "minReplicas": 0, "keda": {"prometheusAddress": "http://p"}}},
        "autoscaling.keda.triggers",
    ),
    ({"autoscaling": {"type": "keda", "keda": {"ownTriggers": False}}}, "autoscaling.keda.ownTriggers"),
    # Names of other charts: the message has the one that is meant here.
    ({"replicaCount": 2}, "it is called replicas"),
    ({"nodeSelector": {"a": "b"}}, "it is called placement.nodeSelector"),
    ({"ingress": {"enabled": True}}, "it is called network.ingress"),
    ({"network": {"service": {"port": 80}}}, "it is called network.service.httpPort"),
    ({"model": {"storageUri": "hf://a/b"}}, "it is called model.uri"),
    ({**MULTI_NODE, "engine": {"pipeline_parallel_size": 2, "data_parallel_size": 2}}, "engine.data_parallel_size"),
    ({**MULTI_NODE, "engine": {"pipeline_parallel_size": 3}}, "engine.pipeline_parallel_size = 3"),
    ({**MULTI_NODE, "engine": {"tensor_parallel_size": 2}}, "multiNode.nodes"),
    ({**MULTI_NODE, "engine": {"pipeline_parallel_size": 4}}, "engine.pipeline_parallel_size = 4"),
    ({**MULTI_NODE, "network": {"httpPort": 6400}}, "multiNode.ray.firstPort"),
    ({"engine": {"ray_first_port": 6380}}, "ray_first_port"),
    ({**MULTI_NODE, "resources": {"gpus": 4}}, "resources.gpus"),
    ({**MULTI_NODE, "multiNode": {}}, "multiNode.ray.tokenSecret.name"),
    ({**MULTI_NODE, "autoscaling": {"type": "hpa"}}, "autoscaling.type"),
    ({**MULTI_NODE, "replicas": 2, "rollout": {"partition": 2}}, "rollout.partition"),
]


@pytest.mark.parametrize(("values", "named"), WRONG_VALUES, ids=[str(values) for values, _ in WRONG_VALUES])
def test_wrong_values_fail_and_are_named(values: dict[str, Any], named: str) -> None:
    with pytest.raises(helm_python.HelmError) as error:
        render(values)
    assert named in str(error.value)


def lists_of(node: dict[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Paths of all values that are lists."""
    if node.get("type") == "array":
        yield path
    for key, child in node.get("properties", {}).items():
        yield from lists_of(child, (*path, key))


@pytest.mark.parametrize("entry", [5, {"nmae": "x"}], ids=["a number", "a misspelt key"])
def test_a_wrong_entry_of_any_list_is_named(entry: Any) -> None:
    paths = list(lists_of(json.loads((CHART / "values.schema.json").read_text())))
    values: dict[str, Any] = {}
    for path in paths:
        place = values
        for key in path[:-1]:
            place = place.setdefault(key, {})
        place[path[-1]] = [entry]
    with pytest.raises(helm_python.HelmError) as error:
        render(values)
    missed = ["/".join(path) for path in paths if f"'/{'/'.join(path)}/0'" not in str(error.value)]
    assert (len(paths) > 30, missed) == (True, [])


def test_the_chart_may_be_a_part_of_another_one() -> None:
    render({"global": {"anything": 1}})


@pytest.fixture(scope="module")
def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("chart_generator", CHART.parent / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_readme_and_schema_are_current(generator: ModuleType) -> None:
    for path, text in generator.outputs().items():
        assert path.read_text() == text, f"{path.name}: run `make chart`"


def test_names_of_other_charts_point_to_values_that_there_are(generator: ModuleType) -> None:
    def paths(values: list[Any]) -> set[str]:
        return {path for v in values for path in ({".".join(v.path)} | paths(v.children))}

    known = paths(generator.read_values(CHART / "values.yaml"))
    for names in generator.OTHER_NAMES.values():
        for name in names.values():
            assert set(name.split(", ")) <= known, name


def test_every_setting_is_a_value_or_set_by_the_chart(generator: ModuleType) -> None:
    engine = generator.values_schema(generator.read_values(CHART / "values.yaml"))["properties"]["engine"]
    assert set(engine["properties"]) == set(options()) - set(generator.CHART_SETTINGS)
    assert set(generator.CHART_SETTINGS) <= set(options())


def test_every_value_is_documented(generator: ModuleType) -> None:
    def leaves(values: list[Any]) -> list[Any]:
        return [leaf for value in values for leaf in (leaves(value.children) or [value])]

    values = generator.read_values(CHART / "values.yaml")
    assert [".".join(leaf.path) for leaf in leaves(values) if not leaf.description] == []
    documented = (CHART / "README.md").read_text()
    assert all(f"`{'.'.join(leaf.path)}`" in documented for leaf in leaves(values))


def test_no_object_of_the_chart_s_own_takes_unknown_keys(generator: ModuleType) -> None:
    schema = generator.values_schema(generator.read_values(CHART / "values.yaml"))

    def check(node: dict[str, Any], defaults: Any) -> None:
        assert node["additionalProperties"] is False
        for name, child in node["properties"].items():
            if "properties" in child:
                check(child, defaults[name])

    check(schema, yaml.safe_load((CHART / "values.yaml").read_text()))
