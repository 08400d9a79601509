"""LoRA adapters as values of the chart: a list that running pods follow, a claim, or a ConfigMap of one's own."""

from __future__ import annotations

import json
from typing import Any

import helm_python
import pytest

from tests.support.chart import VALUE_SETS, config_file, render, server_container, server_pod, workers

ADAPTERS = [{"name": "sql", "path": "sql-v3"}, {"name": "org/chat", "path": "/models/chat"}]


def mounts(values: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {mount["mountPath"]: mount for mount in server_container(render(values))["volumeMounts"]}


def volumes(values: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {volume["name"]: volume for volume in server_pod(render(values))["volumes"]}


def test_without_adapters_there_is_nothing_of_them() -> None:
    assert not {"enable_lora", "lora_dir"} & config_file(render({})).keys()
    assert not {"/adapters", "/etc/pagoda-lora"} & mounts({}).keys()


def test_a_list_is_a_config_map_that_running_pods_follow() -> None:
    def values(adapters: list[dict[str, str]]) -> dict[str, Any]:
        return {"lora": {"enabled": True, "adapters": adapters, "claim": {"name": "adapters", "path": "team"}}}

    config = config_file(render(values(ADAPTERS)))
    assert (config["enable_lora"], config["lora_dir"]) == (True, "/etc/pagoda-lora")
    listed = render(values(ADAPTERS))["Adapters"]
    assert json.loads(listed["data"]["adapters.json"]) == [
        {"name": "sql", "path": "/adapters/sql-v3"},
        {"name": "org/chat", "path": "/models/chat"},
    ]
    found = mounts(values(ADAPTERS))
    assert found["/adapters"] == {"name": "adapters", "mountPath": "/adapters", "readOnly": True, "subPath": "team"}
    assert found["/etc/pagoda-lora"]["readOnly"]
    assert volumes(values(ADAPTERS))["lora"]["configMap"]["name"] == listed["metadata"]["name"]
    # Another list is no other pod.
    fewer = render(values(ADAPTERS[:1]))
    assert render(values(ADAPTERS))["Deployment"] == fewer["Deployment"]
    assert fewer["Adapters"] != listed


def test_a_claim_alone_is_watched_itself() -> None:
    values = {"lora": {"enabled": True, "claim": {"name": "adapters"}}}
    assert config_file(render(values))["lora_dir"] == "/adapters"
    assert volumes(values)["adapters"]["persistentVolumeClaim"] == {"claimName": "adapters", "readOnly": True}


def test_a_config_map_of_ones_own() -> None:
    values = {"lora": {"enabled": True, "configMap": "my-adapters"}}
    assert config_file(render(values))["lora_dir"] == "/etc/pagoda-lora"
    assert volumes(values)["lora"]["configMap"]["name"] == "my-adapters"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"lora": {"enabled": True, "adapters": ADAPTERS[1:], "configMap": "x"}}, "give one of lora.adapters and"),
        ({"lora": {"adapters": ADAPTERS}}, "need lora.enabled"),
        ({"lora": {"enabled": True, "adapters": ADAPTERS}}, "the path of lora.adapters: sql is in lora.claim"),
    ],
)
def test_values_that_do_not_go_together(values: dict[str, Any], message: str) -> None:
    with pytest.raises(helm_python.HelmError) as caught:
        render(values)
    assert message in str(caught.value)


def test_ranks_on_other_nodes_see_the_claim() -> None:
    values = {**VALUE_SETS["multi-node, two pods"], "lora": {"enabled": True, "claim": {"name": "adapters"}}}
    for worker in workers(render(values)):
        pod = worker["spec"]["template"]["spec"]
        assert "adapters" in {volume["name"] for volume in pod["volumes"]}
        assert "/adapters" in {mount["mountPath"] for mount in pod["containers"][0]["volumeMounts"]}
