"""LLMInferenceService: what KServe makes of the configuration, the service and its own preset, strictly against the CRD."""

from __future__ import annotations

import copy
import re
import shlex
from typing import Any

import pytest

import pagoda
from pagoda.cli.probe import PATHS
from pagoda.config.kv_events import KVEventsConfig
from pagoda.config.sources import load_as_vllm
from tests.deploy.test_manifests import needs_crds, objects
from tests.support.kserve_objects import crd_errors

FOLDERS = ["llm/single", "llm/prefix-routing"]
ENABLE_TLS = re.compile(r"\{\{ if \.GlobalConfig\.EnableTLS \}\}(\w+)\{\{ else \}\}(\w+)\{\{ end \}\}")
# Strategic merge: of these lists the entries are merged by this field, all others are replaced.
MERGE_KEYS = {"containers": "name", "volumes": "name", "env": "name", "volumeMounts": "mountPath", "baseRefs": "name"}

# Of KServe's preset for one node, what the configuration meets.
PRESET: dict[str, Any] = {
    "template": {
        "terminationGracePeriodSeconds": 60,
        "containers": [
            {
                "name": "main",
                "image": "vllm",
                "command": ["/bin/bash", "-c", "exec vllm serve /mnt/models", "--"],
                "ports": [{"containerPort": 8000, "protocol": "TCP"}],
                "env": [{"name": "HOME", "value": "/home"}, {"name": "HF_HUB_CACHE", "value": "/models"}],
                "securityContext": {"readOnlyRootFilesystem": True, "runAsNonRoot": True},
                "livenessProbe": {
                    "httpGet": {"path": "/health", "port": 8000},
                    "failureThreshold": 3,
                    "periodSeconds": 10,
                },
                "readinessProbe": {"httpGet": {"path": "/health", "port": 8000}, "failureThreshold": 60},
                "startupProbe": {"httpGet": {"path": "/health", "port": 8000}, "failureThreshold": 60},
                "volumeMounts": [{"name": "home", "mountPath": "/home"}, {"name": "tmp-dir", "mountPath": "/tmp"}],
            }
        ],
        "volumes": [{"name": "home", "emptyDir": {}}, {"name": "tmp-dir", "emptyDir": {}}],
    }
}


def merged(base: Any, over: Any, field: str = "") -> Any:
    """Kubernetes' strategic merge of two specs."""
    if isinstance(base, dict) and isinstance(over, dict):
        return base | {key: merged(base[key], value, key) if key in base else value for key, value in over.items()}
    if isinstance(base, list) and isinstance(over, list) and field in MERGE_KEYS:
        key = MERGE_KEYS[field]
        items = {item[key]: item for item in base}
        for item in over:
            items[item[key]] = merged(items[item[key]], item) if item[key] in items else item
        return list(items.values())
    return over


def with_tls(node: Any, is_on: bool) -> Any:
    """The templates of KServe in a configuration, filled in."""
    if isinstance(node, dict):
        return {key: with_tls(value, is_on) for key, value in node.items()}
    if isinstance(node, list):
        return [with_tls(value, is_on) for value in node]
    return ENABLE_TLS.sub(r"\1" if is_on else r"\2", node) if isinstance(node, str) else node


def of_kind(folder: str, kind: str) -> dict[str, Any]:
    (document,) = [document for document in objects(folder) if document["kind"] == kind]
    return document


def combined(folder: str, *, tls: bool = True) -> dict[str, Any]:
    """The service as KServe's controller runs it: the preset, then what `baseRefs` name, then its own spec."""
    service, config = of_kind(folder, "LLMInferenceService"), of_kind(folder, "LLMInferenceServiceConfig")
    assert [reference["name"] for reference in service["spec"]["baseRefs"]] == [config["metadata"]["name"]]
    spec = merged(merged(copy.deepcopy(PRESET), config["spec"]), service["spec"])
    return {**service, "spec": with_tls(spec, tls)}


def main_container(document: dict[str, Any]) -> dict[str, Any]:
    (container,) = document["spec"]["template"]["containers"]
    assert container["name"] == "main"
    return container


@needs_crds
@pytest.mark.parametrize("folder", FOLDERS)
def test_the_crd_knows_every_field_of_the_service_by_itself_and_combined(folder: str) -> None:
    assert crd_errors(of_kind(folder, "LLMInferenceService")) == []
    assert crd_errors(combined(folder)) == []


@needs_crds
def test_the_crd_knows_every_field_of_the_configuration() -> None:
    # The spec of both kinds is one type; a configuration may leave out what a service must have.
    config = of_kind("llm/config", "LLMInferenceServiceConfig")
    assert config["apiVersion"] == "serving.kserve.io/v1alpha2"
    config = {**config, "kind": "LLMInferenceService", "spec": {"model": {"uri": "hf://a/b"}, **config["spec"]}}
    assert crd_errors(config) == []
    config["spec"]["template"]["containers"][0]["readynessProbe"] = {}
    assert any("readynessProbe" in error for error in crd_errors(config))


@pytest.mark.parametrize("tls", [True, False])
def test_the_presets_command_runs_in_pagodas_image_with_probes_that_tell_live_from_ready(tls: bool) -> None:
    container = main_container(combined("llm/single", tls=tls))
    assert container["image"].startswith(f"pagoda:{pagoda.__version__}")
    assert container["command"] == PRESET["template"]["containers"][0]["command"]
    assert "args" not in container
    scheme = "HTTPS" if tls else "HTTP"
    live, ready = container["livenessProbe"], container["readinessProbe"]
    assert live["httpGet"] == {"path": PATHS["live"], "port": 8000, "scheme": scheme}
    assert ready["httpGet"] == {"path": PATHS["ready"], "port": 8000, "scheme": scheme}
    assert live["failureThreshold"] == 3  # the preset's
    mounts = {mount["mountPath"] for mount in container["volumeMounts"]}
    assert mounts == {"/home", "/tmp", "/cache"}


@pytest.mark.parametrize("folder", FOLDERS)
def test_the_server_takes_the_additional_arguments(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POD_IP", "10.0.0.7")
    environ = {entry["name"]: entry.get("value", "10.0.0.7") for entry in main_container(combined(folder))["env"]}
    loaded = load_as_vllm(shlex.split(environ["VLLM_ADDITIONAL_ARGS"]), {})
    assert loaded.config.max_model_len == 8192
    if folder == "llm/prefix-routing":
        assert loaded.config.kv_events_config is not None
        events = KVEventsConfig.parse(loaded.config.kv_events_config, environ)
        name = of_kind(folder, "LLMInferenceService")["spec"]["model"]["name"]
        assert events.topic == f"kv@10.0.0.7@{name}"
        assert events.is_on
        scheduler = of_kind(folder, "LLMInferenceService")["spec"]["router"]["scheduler"]["config"]["inline"]
        (scorer,) = [plugin for plugin in scheduler["plugins"] if plugin["type"] == "precise-prefix-cache-scorer"]
        assert scorer["parameters"]["tokenProcessorConfig"]["blockSize"] == loaded.config.block_size
        port = scorer["parameters"]["kvEventsConfig"]["podDiscoveryConfig"]["socketPort"]
        assert events.endpoint == f"tcp://*:{port}"
