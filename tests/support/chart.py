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

KINDS_BY_FILE = {
    "dashboard.yaml": "Dashboard",
    "head.yaml": "Head",
    "loraconfigmap.yaml": "Adapters",
    "ranks.yaml": "Ranks",
    "worker.yaml": "Worker",
}
RAY = {"tokenSecret": {"name": "ray"}}
# Without these the chart renders nothing; a value set has them unless it gives keys, peers, or its own opt-in.
NO_KEYS = {"allowUnauthenticated": True}
SAME_NAMESPACE = {"from": [{"podSelector": {}}]}

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
    "an embedding model": {
        "model": {"hubId": "sentence-transformers/all-MiniLM-L6-v2"},
        "engine": {"task": "embed", "pooler_config": {"pooling_type": "MEAN", "normalize": True}, "max_num_seqs": 64},
        "resources": {"requests": {"cpu": "2", "memory": "2Gi"}, "limits": {"memory": "4Gi"}},
    },
    "a reranker": {"model": {"hubId": "BAAI/bge-reranker-base"}, "engine": {"task": "score"}},
    "adapters of a list": {
        "lora": {
            "enabled": True,
            "adapters": [{"name": "sql", "path": "sql-v3"}, {"name": "org/chat", "path": "/models/chat"}],
            "claim": {"name": "adapters", "path": "team"},
        },
        "engine": {"max_loras": 4, "max_lora_rank": 64},
    },
    "adapters of a claim": {"lora": {"enabled": True, "claim": {"name": "adapters"}}},
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
    "open to everybody": {
        "security": {"allowUnauthenticated": True},
        "network": {"policy": {"allowAllIngress": True}},
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
    "several GPUs": {"engine": {"tensor_parallel_size": 4}, "resources": {"gpus": 4}},
    "GPUs by dynamic resource allocation": {
        "engine": {"tensor_parallel_size": 2},
        "resources": {"claims": [{"name": "gpus", "resourceClaimTemplateName": "two-gpus", "gpus": 2}]},
    },
    "checkpoint of a bucket": {
        "model": {
            "uri": "s3://models/qwen3",
            "storageInitializer": {
                "image": "kserve/storage-initializer:v0.16.0",
                "envFrom": [{"secretRef": {"name": "minio"}}],
                "env": [{"name": "AWS_ENDPOINT_URL", "value": "http://minio.infra:9000"}],
                "sizeLimit": "20Gi",
            },
        },
        "network": {
            "policy": {
                "from": [{"podSelector": {}}],
                "egress": [
                    {
                        "to": [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "infra"}}}],
                        "ports": [{"port": 9000, "protocol": "TCP"}],
                    }
                ],
            }
        },
    },
    "checkpoint of a claim by its URI": {"model": {"uri": "pvc://weights/qwen/latest"}},
    "checkpoint of an image": {
        "model": {"uri": "oci://registry.example/models/qwen3:1"},
        "security": {"podSecurityStandard": "baseline"},
    },
    "what a cluster of many teams asks for": {
        "extraArgs": ["--log-level", "debug"],
        "extraEnvFrom": [{"secretRef": {"name": "proxy"}}],
        "extraInitContainers": [{"name": "wait", "image": "busybox:1", "command": ["true"]}],
        "extraContainers": [{"name": "logs", "image": "shipper:1"}],
        "extraObjects": [
            {
                "apiVersion": "v1",
                "kind": "Secret",
                "metadata": {"name": "{{ .Release.Name }}-extra", "namespace": "{{ .Release.Namespace }}"},
            }
        ],
        "lifecycle": {"postStart": {"exec": {"command": ["true"]}}},
        "podLabels": {"team": "tales"},
        "placement": {
            "schedulerName": "volcano",
            "topologySpreadConstraints": [
                {"topologyKey": "kubernetes.io/hostname", "maxSkew": 1, "whenUnsatisfiable": "DoNotSchedule"}
            ],
        },
        "storage": {"cache": {"claim": {"create": True, "storageClassName": "fast"}}},
        "network": {
            "service": {
                "type": "NodePort",
                "httpPort": 80,
                "httpNodePort": 30080,
                "grpcNodePort": 30081,
                "labels": {"tier": "models"},
                "sessionAffinity": "ClientIP",
                "extraSpec": {"externalTrafficPolicy": "Local"},
            },
            "ingress": {
                "enabled": True,
                "className": "nginx",
                "annotations": {"nginx.ingress.kubernetes.io/proxy-buffering": "off"},
                "hosts": ["tales.example", "old.example"],
                "paths": ["/v1", "/v2"],
                "tls": [{"secretName": "cert", "hosts": ["tales.example"]}],
            },
        },
    },
    "a gateway and a pool": {
        "network": {
            "httpRoute": {"enabled": True, "parentRefs": [{"name": "gateway"}], "hostnames": ["tales.example"]},
            "inferencePool": {"enabled": True, "endpointPicker": {"name": "picker"}},
        }
    },
    "a gateway alone": {"network": {"httpRoute": {"enabled": True, "parentRefs": [{"name": "gateway"}]}}},
    "keda, down to nothing": {
        "autoscaling": {
            "type": "keda",
            "minReplicas": 0,
            "behavior": {"scaleUp": {"stabilizationWindowSeconds": 0}},
            "keda": {
                "ownTriggers": False,
                "triggers": [{"type": "external-push", "metadata": {"scalerAddress": "a:1"}}],
            },
        }
    },
    "multi-node, two pods": {
        "mode": "multiNode",
        "engine": {"pipeline_parallel_size": 2},
        "multiNode": {"ray": RAY},
    },
    "multi-node, groups of GPUs with RDMA": {
        "mode": "multiNode",
        "replicas": 3,
        "model": {"hubId": "Qwen/Qwen3-235B-A22B", "hubTokenSecret": {"name": "hf"}},
        "engine": {"tensor_parallel_size": 8, "pipeline_parallel_size": 2, "rendezvous_timeout_seconds": 600},
        "resources": {"gpus": 8, "limits": {"memory": "512Gi"}, "sharedMemory": "64Gi"},
        "multiNode": {
            "ray": RAY,
            "networkInterface": "net1",
            "nccl": {"NCCL_IB_HCA": "mlx5", "NCCL_DEBUG": "INFO"},
            "rdma": {"resource": "rdma/hca_shared_devices_a", "count": 8},
            "topologyKey": "example.com/rack",
        },
        "security": {"podSecurityStandard": "privileged"},
        "podAnnotations": {"k8s.v1.cni.cncf.io/networks": "rdma"},
        "placement": {"nodeSelector": {"accelerator": "h200"}},
    },
    "multi-node, four pods, keys, TLS, monitored": {
        "mode": "multiNode",
        "model": {"claim": {"name": "weights"}},
        "engine": {"pipeline_parallel_size": 4, "tensor_parallel_size": 2},
        "multiNode": {"nodes": 4, "ray": {"tokenSecret": {"name": "secrets", "key": "ray"}}},
        "security": {"apiKeysSecret": {"name": "keys"}},
        "network": {"tls": {"secretName": "cert"}, "policy": {"from": [{"podSelector": {}}]}},
        "monitoring": {
            "monitor": "pod",
            "apiKeySecret": {"name": "scrapes"},
            "rules": {"enabled": True},
            "dashboard": {"enabled": True},
        },
    },
    "multi-node, upgraded group by group": {
        "mode": "multiNode",
        "replicas": 2,
        "fullnameOverride": "a-name-so-long-that-it-must-be-cut-somewhere-or-pods-have-none",
        "extraLabels": {"team": "a"},
        "engine": {"pipeline_parallel_size": 2},
        "multiNode": {"ray": RAY},
        "rollout": {"partition": 1, "podDisruptionBudget": {"enabled": False}},
        "network": {"policy": {"enabled": False}},
        "model": {"initContainer": {"image": "fetch:1"}},
        "extraEnv": [{"name": "HTTPS_PROXY", "value": "http://proxy:3128"}],
    },
    "names, labels, volumes, environment": {
        "fullnameOverride": "a-name-of-its-own",
        "extraLabels": {"team": "a", "app.kubernetes.io/name": "usurper"},
        "podAnnotations": {"note": "x"},
        "image": {"repository": "here/pagoda", "digest": "sha256:" + "0" * 64, "pullSecrets": ["registry"]},
        "storage": {
            "cache": {"claimName": "cache"},
            "extraVolumes": [{"name": "more", "emptyDir": {}}],
            "tmp": {"sizeLimit": "512Mi"},
            "extraVolumeMounts": [{"name": "more", "mountPath": "/more"}],
        },
        "extraEnv": [{"name": "HTTPS_PROXY", "value": "http://proxy:3128"}],
    },
}


@cache
def _chart() -> helm_python.Chart:
    return helm_python.Chart.load(CHART)


def complete(values: dict[str, Any]) -> dict[str, Any]:
    """The values, and where they say nothing of keys and peers what the chart asks for: no keys, peers of the namespace."""
    security, network = dict(values.get("security", {})), dict(values.get("network", {}))
    if not security.keys() & {"apiKeysSecret", "allowUnauthenticated"}:
        security |= NO_KEYS
    if not network.get("policy", {}).keys() & {"from", "allowAllIngress"}:
        network["policy"] = network.get("policy", {}) | SAME_NAMESPACE
    return {**values, "security": security, "network": network}


def render_files(values: dict[str, Any]) -> dict[str, str]:
    """Every template's text by its file name; raises `helm_python.HelmError` where Helm would."""
    return helm_template(complete(values))


def helm_template(values: dict[str, Any]) -> dict[str, str]:
    """The same of the values as they are."""
    return _helm_template(json.dumps(values))


@cache
def _helm_template(values: str) -> dict[str, str]:
    rendered = _chart().render(json.loads(values), name=RELEASE, namespace=NAMESPACE)
    return {name.rpartition("/")[2]: text for name, text in rendered.items()}


def render(values: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Every object by its kind: the test's pod as `Pod`, the dashboard as `Dashboard`, and of mode multiNode `Head`, `Ranks`
    (the headless Service) and for each group `Worker 0`, `Worker 1`."""
    objects: dict[str, dict[str, Any]] = {}
    for name, text in render_files(values).items():
        if not name.endswith(".yaml"):
            continue
        for document in yaml.safe_load_all(text):
            if document is not None:
                kind = KINDS_BY_FILE.get(name, document["kind"])
                kind += f" {len([key for key in objects if key.startswith(kind)])}" if kind == "Worker" else ""
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
    """The spec of the server's pods: in mode multiNode, the heads."""
    return server_workload(objects)["spec"]["template"]["spec"]


def server_workload(objects: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What makes the server's pods."""
    return objects.get("Deployment") or objects["Head"]


def workers(objects: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """The StatefulSets of the workers, group by group; none in mode single."""
    return [document for kind, document in objects.items() if kind.startswith("Worker ")]


def server_container(objects: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The server's container."""
    (container,) = [one for one in server_pod(objects)["containers"] if one["name"] == "pagoda"]
    return container
