"""The chart, rendered by Helm's own engine, and value sets that between them switch on everything it has."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import helm_python
import yaml

CHART = Path(__file__).parents[2] / "charts" / "pagoda"
RELEASE = "story"
NAMESPACE = "tales"

VALUE_SETS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "hub model with a token": {"model": {"hubId": "Qwen/Qwen3-0.6B", "hubTokenSecret": {"name": "hf"}}},
    "model from a claim": {"model": {"name": "tale", "claim": {"name": "weights", "path": "qwen/latest"}}},
    "model from an init container": {
        "model": {
            "initContainer": {
                "image": "fetch:1",
                "command": ["fetch"],
                "args": ["--to", "/models"],
                "env": [{"name": "FROM", "value": "there"}],
                "sizeLimit": "20Gi",
            }
        }
    },
    "gpu": {
        "resources": {"gpus": 1, "limits": {"memory": "64Gi"}, "sharedMemory": "8Gi"},
        "placement": {
            "nodeSelector": {"accelerator": "h200"},
            "tolerations": [{"key": "spot", "operator": "Exists"}],
            "runtimeClassName": "nvidia",
            "priorityClassName": "serving",
        },
    },
    "every kind of engine setting": {
        "engine": {
            "max_body_bytes": 33554432,
            "kv_cache_memory_bytes": "2GiB",
            "max_model_len": "auto",
            "max_num_seqs": 64,
            "gpu_memory_utilization": 0.85,
            "enable_prefix_caching": False,
            "log_format": "json",
            "default_max_tokens": "none",
            "grace_period_seconds": 90.5,
            "engine_start_timeout_seconds": 3600,
        }
    },
    "api keys": {"security": {"apiKeysSecret": {"name": "keys", "key": "clients.txt"}}},
    "tls": {"network": {"tls": {"secretName": "cert"}}, "monitoring": {"monitor": "service"}},
    "other ports and a load balancer": {
        "network": {
            "httpPort": 9000,
            "grpcPort": 9001,
            "service": {"type": "LoadBalancer", "annotations": {"lb/internal": "true"}},
        }
    },
    "network closed to most": {
        "network": {
            "policy": {
                "from": [{"namespaceSelector": {"matchLabels": {"team": "a"}}}],
                "egress": [{"ports": [{"port": 3128, "protocol": "TCP"}]}],
            }
        }
    },
    "no network policy, no budget, no account": {
        "network": {"policy": {"enabled": False}},
        "rollout": {"podDisruptionBudget": {"enabled": False}},
        "security": {"serviceAccount": {"create": False}},
    },
    "hpa": {"autoscaling": {"type": "hpa", "waitingRequests": 2.5}},
    "keda": {
        "autoscaling": {"type": "keda", "maxReplicas": 8, "keda": {"prometheusAddress": "http://prometheus:9090"}}
    },
    "monitored by service, with rules and dashboard": {
        "monitoring": {
            "monitor": "service",
            "labels": {"release": "prometheus"},
            "rules": {"enabled": True},
            "dashboard": {"enabled": True},
        }
    },
    "monitored by pod, under vLLM's names": {
        "engine": {"metrics_prefix": "vllm:"},
        "monitoring": {"monitor": "pod", "rules": {"enabled": True}, "dashboard": {"enabled": True}},
        "autoscaling": {"type": "keda", "keda": {"prometheusAddress": "http://prometheus:9090"}},
    },
    "replicas without surge": {
        "replicas": 3,
        "rollout": {"maxSurge": 0, "maxUnavailable": "25%", "preStopSeconds": 0},
        "placement": {"affinity": {"nodeAffinity": {}}, "spreadOver": []},
    },
    "names, labels, volumes, environment": {
        "fullnameOverride": "a-name-of-its-own",
        "extraLabels": {"team": "a", "app.kubernetes.io/name": "usurper"},
        "podAnnotations": {"note": "x"},
        "image": {"repository": "here/pagoda", "digest": "sha256:" + "0" * 64, "pullSecrets": ["registry"]},
        "storage": {
            "cache": {"claimName": "cache"},
            "extraVolumes": [{"name": "more", "emptyDir": {}}],
            "extraVolumeMounts": [{"name": "more", "mountPath": "/more"}],
        },
        "extraEnv": [{"name": "HTTPS_PROXY", "value": "http://proxy:3128"}],
    },
}


@cache
def _chart() -> helm_python.Chart:
    return helm_python.Chart.load(CHART)


def render_files(values: dict[str, Any]) -> dict[str, str]:
    """Every template's text by its file name; raises `helm_python.HelmError` where Helm would."""
    return _render_files(json.dumps(values))


@cache
def _render_files(values: str) -> dict[str, str]:
    rendered = _chart().render(json.loads(values), name=RELEASE, namespace=NAMESPACE)
    return {name.rpartition("/")[2]: text for name, text in rendered.items()}


def render(values: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Every object by its kind (the test's pod as `Pod`, the dashboard as `Dashboard`)."""
    objects: dict[str, dict[str, Any]] = {}
    for name, text in render_files(values).items():
        if not name.endswith(".yaml"):
            continue
        for document in yaml.safe_load_all(text):
            if document is not None:
                kind = "Dashboard" if name == "dashboard.yaml" else document["kind"]
                assert kind not in objects
                objects[kind] = document
    return objects


def render_documents(values: dict[str, Any]) -> list[dict[str, Any]]:
    """Everything that `helm install` would apply, which the test's pod is not."""
    texts = [text for name, text in render_files(values).items() if name.endswith(".yaml") and name != "ask.yaml"]
    return [document for text in texts for document in yaml.safe_load_all(text) if document is not None]


def config_file(objects: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The settings that the server will read."""
    return json.loads(objects["ConfigMap"]["data"]["pagoda.json"])


def server_pod(objects: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The spec of the server's pods."""
    return objects["Deployment"]["spec"]["template"]["spec"]


def server_container(objects: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The server's container."""
    (container,) = server_pod(objects)["containers"]
    return container
