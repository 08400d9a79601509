"""What `pagoda deploy` makes: an InferenceService with a custom predictor, hardened, with probes of the engine's state, the
Secret of its API keys, and the NetworkPolicy before it.

It is that of manifests/base; docs/deployment.md has the reasons.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any

from pagoda.config.schema import PagodaConfig

API_GROUP = "serving.kserve.io"
API_VERSION = "v1beta1"
CONTAINER = "kserve-container"
MODEL_MOUNT = "/mnt/models"
KEYS_MOUNT = "/etc/pagoda-keys"
OWN_KEY = "pagoda-deploy"
"""The API key of the Secret that is made here, by its name there."""
MANAGED_BY = {"app.kubernetes.io/managed-by": "pagoda-deploy"}

PRE_STOP_SECONDS = 10
CLOSING_SECONDS = 10
STARTUP_PERIOD_SECONDS = 5
STARTUP_MARGIN_SECONDS = 60
ROUTE_TIMEOUT_SECONDS = 3600
USER = 10001


@dataclass(frozen=True, slots=True, kw_only=True)
class Deployment:
    """What a user of `pagoda deploy` chooses. `config`: the settings in effect, of which `arguments` are those given.

    `keys_secret`: the Secret whose keys are the API keys; None for a server that asks for none. `allowed_namespaces`: whose
    pods may come in besides those of its own; None for everybody.
    """

    name: str
    image: str
    config: PagodaConfig
    arguments: Sequence[str] = ()
    storage_uri: str | None = None
    replicas: int = 1
    cpu: str = "1"
    memory: str = "4Gi"
    gpus: int = 0
    keys_secret: str | None = None
    allowed_namespaces: Sequence[str] | None = ()


def api_key_secret(name: str, key: str) -> dict[str, Any]:
    """A Secret with one API key."""
    return {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {"name": name, "labels": MANAGED_BY},
        "type": "Opaque",
        "stringData": {OWN_KEY: key},
    }


def network_policy(deployment: Deployment) -> dict[str, Any] | None:
    """Who may come in: the pods of the InferenceService's namespace and of those allowed; None where everybody may."""
    if deployment.allowed_namespaces is None:
        return None
    own: list[dict[str, Any]] = [{"podSelector": {}}]
    others = [
        {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": name}}}
        for name in deployment.allowed_namespaces
    ]
    ports = [{"port": port, "protocol": "TCP"} for port in (deployment.config.http_port, deployment.config.grpc_port)]
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {"name": deployment.name, "labels": MANAGED_BY},
        "spec": {
            "podSelector": {"matchLabels": {"app": f"isvc.{deployment.name}-predictor"}},
            "policyTypes": ["Ingress"],
            "ingress": [{"ports": ports, "from": own + others}],
        },
    }


def inference_service(deployment: Deployment) -> dict[str, Any]:
    """The object for `kubectl apply`."""
    annotations = {
        f"{API_GROUP}/deploymentMode": "Standard",
        f"{API_GROUP}/autoscalerClass": "none",
    }
    grace = PRE_STOP_SECONDS + ceil(deployment.config.grace_period_seconds) + CLOSING_SECONDS
    predictor: dict[str, Any] = {
        "minReplicas": deployment.replicas,
        "timeout": ROUTE_TIMEOUT_SECONDS,
        "deploymentStrategy": {"type": "RollingUpdate", "rollingUpdate": {"maxUnavailable": 0, "maxSurge": 1}},
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "terminationGracePeriodSeconds": grace,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": USER,
            "runAsGroup": USER,
            "fsGroup": USER,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [_container(deployment)],
        "volumes": [
            {"name": "cache", "emptyDir": {}},
            {"name": "tmp", "emptyDir": {}},
            {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": "1Gi"}},
        ],
    }
    if deployment.keys_secret is not None:
        keys = {"secretName": deployment.keys_secret, "defaultMode": 0o440}
        predictor["volumes"].append({"name": "api-keys", "secret": keys})
    if deployment.gpus:
        predictor["tolerations"] = [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]
    return {
        "apiVersion": f"{API_GROUP}/{API_VERSION}",
        "kind": "InferenceService",
        "metadata": {"name": deployment.name, "annotations": annotations},
        "spec": {"predictor": predictor},
    }


def _container(deployment: Deployment) -> dict[str, Any]:
    config = deployment.config
    start_seconds = config.engine_start_timeout_seconds + STARTUP_MARGIN_SECONDS
    arguments = ["serve", f"--model_name={deployment.name}", *deployment.arguments]
    limits: dict[str, Any] = {"memory": deployment.memory}
    if deployment.gpus:
        limits["nvidia.com/gpu"] = str(deployment.gpus)
    container: dict[str, Any] = {
        "name": CONTAINER,
        "image": deployment.image,
        "args": arguments,
        "ports": [
            {"name": "http1", "containerPort": config.http_port, "protocol": "TCP"},
            {"name": "h2c", "containerPort": config.grpc_port, "protocol": "TCP"},
        ],
        "startupProbe": _probe(
            "ready", config, STARTUP_PERIOD_SECONDS, 5, ceil(start_seconds / STARTUP_PERIOD_SECONDS)
        ),
        "readinessProbe": _probe("ready", config, 5, 3, 2),
        "livenessProbe": _probe("live", config, 10, 5, 3),
        "lifecycle": {"preStop": {"exec": {"command": ["sleep", str(PRE_STOP_SECONDS)]}}},
        "resources": {"requests": {"cpu": deployment.cpu, "memory": deployment.memory}, "limits": limits},
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
        "volumeMounts": [
            {"name": "cache", "mountPath": "/cache"},
            {"name": "tmp", "mountPath": "/tmp"},
            {"name": "shm", "mountPath": "/dev/shm"},
        ],
    }
    if deployment.keys_secret is not None:
        container["args"].append(f"--api_keys_file={KEYS_MOUNT}")
        container["volumeMounts"].append({"name": "api-keys", "mountPath": KEYS_MOUNT, "readOnly": True})
    if deployment.storage_uri is not None:
        container["args"].append(f"--model_dir={MODEL_MOUNT}")
        container["env"] = [{"name": "STORAGE_URI", "value": deployment.storage_uri}]
    return container


def _probe(question: str, config: PagodaConfig, period: int, timeout: int, failures: int) -> dict[str, Any]:
    return {
        "httpGet": {"path": f"/v2/health/{question}", "port": config.http_port},
        "periodSeconds": period,
        "timeoutSeconds": timeout,
        "failureThreshold": failures,
    }
