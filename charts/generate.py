"""Writes the chart's README.md and values.schema.json out of values.yaml and Pagoda's configuration schema.

usage: generate.py [--check]      (`make chart`; --check only says whether the files are current)

In values.yaml the lines above a value hold its description (`# -- text`, going on over further comment lines) and what
JSON schema should know besides the type of the default (`# @schema {...}`). `# @schema engine` stands for the configuration
schema.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from pagoda.config import schema_json

CHART = Path(__file__).resolve().parent / "pagoda"

# Settings that are values of the chart under other names: model.*, network.*, security.apiKeysSecret, lora.*, mode,
# multiNode.*.
CHART_SETTINGS = (
    *(
        "model",
        "model_name",
        "host",
        "http_port",
        "grpc_port",
        "api_keys",
        "api_keys_file",
        "ssl_certfile",
        "ssl_keyfile",
    ),
    *("distributed_executor_backend", "ray_address", "ray_num_cpus", "ray_first_port", "network_interface"),
    *("enable_lora", "lora_dir"),
)
# What charts of others call a value, and what it is called here. The schema takes none of them, and says so by name.
OTHER_NAMES = {
    "": {
        "affinity": "placement.affinity",
        "annotations": "podAnnotations",
        "apiKey": "security.apiKeysSecret.name",
        "args": "extraArgs",
        "commonLabels": "extraLabels",
        "enableLoRA": "lora.enabled",
        "env": "extraEnv",
        "envFrom": "extraEnvFrom",
        "extraInit": "extraInitContainers",
        "extraManifests": "extraObjects",
        "extraPodLabels": "podLabels",
        "extraVolumeMounts": "storage.extraVolumeMounts",
        "extraVolumes": "storage.extraVolumes",
        "gateway": "network.httpRoute",
        "httpRoute": "network.httpRoute",
        "imagePullSecrets": "image.pullSecrets",
        "inferencePool": "network.inferencePool",
        "ingress": "network.ingress",
        "initContainers": "extraInitContainers",
        "labels": "extraLabels",
        "livenessProbe": "probes.liveness",
        "maxReplicas": "autoscaling.maxReplicas",
        "metrics": "monitoring",
        "networkPolicy": "network.policy",
        "nodeSelector": "placement.nodeSelector",
        "persistence": "storage.cache",
        "podDisruptionBudget": "rollout.podDisruptionBudget",
        "podSecurityContext": "security.runAsUser, security.fsGroup",
        "priorityClassName": "placement.priorityClassName",
        "readinessProbe": "probes.readiness",
        "replicaCount": "replicas",
        "runtimeClassName": "placement.runtimeClassName",
        "schedulerName": "placement.schedulerName",
        "securityContext": "security.runAsUser, security.fsGroup",
        "service": "network.service",
        "serviceAccount": "security.serviceAccount",
        "serviceMonitor": "monitoring.monitor",
        "sidecars": "extraContainers",
        "startupProbe": "probes.startup",
        "strategy": "rollout",
        "terminationGracePeriodSeconds": "engine.grace_period_seconds",
        "tls": "network.tls.secretName",
        "tolerations": "placement.tolerations",
        "topologySpreadConstraints": "placement.topologySpreadConstraints",
        "updateStrategy": "rollout",
        "volumeMounts": "storage.extraVolumeMounts",
        "volumes": "storage.extraVolumes",
    },
    "image": {"imagePullPolicy": "image.pullPolicy", "imagePullSecrets": "image.pullSecrets"},
    "model": {
        "id": "model.hubId",
        "path": "model.claim.path",
        "pvc": "model.claim.name",
        "repo": "model.hubId",
        "servedModelName": "model.name",
        "storageUri": "model.uri",
    },
    "resources": {"gpu": "resources.gpus", "shmSize": "resources.sharedMemory"},
    "network": {"port": "network.httpPort", "gateway": "network.httpRoute"},
    "network.service": {
        "nodePort": "network.service.httpNodePort",
        "port": "network.service.httpPort",
        "servicePort": "network.service.httpPort",
    },
    "autoscaling": {"enabled": "autoscaling.type", "hpa": "autoscaling.type", "replicas": "autoscaling.minReplicas"},
    "storage": {"pvc": "storage.cache.claim", "volumes": "storage.extraVolumes"},
}
_KEY = re.compile(r"(?P<indent> *)(?P<key>[A-Za-z_]\w*):(?P<rest>.*)")
_TYPES = {str: "string", bool: "boolean", int: "integer", float: "number", list: "array", dict: "object"}


# Objects of Kubernetes (and of those who extend it) in lists of values: keys that each must have, keys that it may have.
# `# @schema {"items": "EnvVar"}` stands for one, so that a misspelt key is refused before a server prunes it.
OBJECTS = {
    "EnvVar": ("name", "value valueFrom"),
    "EnvFromSource": ("", "prefix configMapRef secretRef"),
    "Toleration": ("", "key operator value effect tolerationSeconds"),
    "TopologySpreadConstraint": (
        "maxSkew topologyKey whenUnsatisfiable",
        "labelSelector minDomains matchLabelKeys nodeAffinityPolicy nodeTaintsPolicy",
    ),
    "Container": (
        "name image",
        "command args workingDir ports envFrom env resources resizePolicy restartPolicy restartPolicyRules volumeMounts "
        "volumeDevices livenessProbe readinessProbe startupProbe lifecycle terminationMessagePath terminationMessagePolicy "
        "imagePullPolicy securityContext stdin stdinOnce tty",
    ),
    "Volume": ("name", None),
    "VolumeMount": ("name mountPath", "subPath subPathExpr readOnly recursiveReadOnly mountPropagation"),
    "IngressTLS": ("", "hosts secretName"),
    "ParentReference": ("name", "group kind namespace sectionName port"),
    "NetworkPolicyPeer": ("", "podSelector namespaceSelector ipBlock"),
    "NetworkPolicyEgressRule": ("", "to ports"),
    "RelabelConfig": ("", "action modulus regex replacement separator sourceLabels targetLabel"),
    "Trigger": ("type", "name metadata authenticationRef metricType useCachedMetrics"),
    "Object": ("apiVersion kind", None),
}


@dataclass
class Value:
    """One key of values.yaml: its path, what is written above it, and its default."""

    path: tuple[str, ...]
    default: Any
    description: str = ""
    annotation: str = ""
    children: list[Value] = field(default_factory=list)


def read_values(path: Path) -> list[Value]:
    """The keys of a values file in their order, as a tree.

    Keys inside a value that has an annotation of its own (a map that users fill) are part of its default.
    """
    text = path.read_text(encoding="utf-8")
    defaults = yaml.safe_load(text)
    roots: list[Value] = []
    open_values: list[tuple[int, Value]] = []
    comment: list[str] = []
    for line in text.splitlines():
        if line.lstrip().startswith("#"):
            comment.append(line.strip().removeprefix("#").strip())
            continue
        match = _KEY.fullmatch(line)
        if match:
            indent = len(match["indent"])
            while open_values and open_values[-1][0] >= indent:
                open_values.pop()
            parent = open_values[-1][1] if open_values else None
            if parent is None or not parent.annotation or parent.annotation == "engine":
                names = (*(parent.path if parent else ()), match["key"])
                value = Value(names, _at(defaults, names), *_read_comment(comment))
                (parent.children if parent else roots).append(value)
                open_values.append((indent, value))
        comment = []
    return roots


def values_schema(roots: list[Value]) -> dict[str, Any]:
    """The chart's values.schema.json."""
    schema = _object(roots)
    schema["properties"]["global"] = {"type": "object", "description": "What Helm hands to every chart; not used here."}
    return {"$schema": "http://json-schema.org/draft-07/schema#", "title": "Values of the Pagoda chart", **schema}


def readme(roots: list[Value]) -> str:
    """The chart's README.md."""
    lines = [_INTRODUCTION, "| Value | Default | |", "|---|---|---|"]
    lines += [f"| `{'.'.join(v.path)}` | {_shown(v.default)} | {_cell(v.description)} |" for v in _documented(roots)]
    return "\n".join(lines) + "\n"


def outputs() -> dict[Path, str]:
    """The generated files and what they should hold."""
    roots = read_values(CHART / "values.yaml")
    return {
        CHART / "values.schema.json": json.dumps(values_schema(roots), indent=2, ensure_ascii=False) + "\n",
        CHART / "README.md": readme(roots),
    }


def main() -> int:
    """Write the files, or with --check compare them; the exit status."""
    stale = [path for path, text in outputs().items() if not path.exists() or path.read_text("utf-8") != text]
    if "--check" in sys.argv[1:]:
        for path in stale:
            print(f"{path} is not current: run `make chart`", file=sys.stderr)
        return 1 if stale else 0
    for path in stale:
        path.write_text(outputs()[path], encoding="utf-8")
    return 0


def _object(values: list[Value]) -> dict[str, Any]:
    """An object of these keys and no other; the names that others have for them are refused by a value that nobody gives."""
    properties: dict[str, Any] = {value.path[-1]: _node(value) for value in values}
    for other, name in OTHER_NAMES.get(".".join(values[0].path[:-1]), {}).items():
        properties[other] = {"const": f"(no value of this chart: it is called {name})"}
    return {"type": "object", "additionalProperties": False, "properties": properties}


def _node(value: Value) -> dict[str, Any]:
    if value.annotation == "engine":
        return _engine(value)
    if value.children:
        return _object(value.children)
    annotation = json.loads(value.annotation) if value.annotation else {}
    if isinstance(annotation.get("items"), str):
        annotation["items"] = _kubernetes(*OBJECTS[annotation["items"]])
    node = {"type": _TYPES[type(value.default)], "description": value.description, **annotation}
    if isinstance(value.default, dict) and "additionalProperties" not in annotation:
        raise ValueError(f"{'.'.join(value.path)}: a map needs `# @schema` with additionalProperties")
    return node


def _kubernetes(required: str, others: str | None) -> dict[str, Any]:
    """An object with these keys; `others` of None: and any other."""
    node: dict[str, Any] = {"type": "object"}
    if required:
        node["required"] = required.split()
    if others is not None:
        node |= {"additionalProperties": False, "properties": {key: {} for key in f"{required} {others}".split()}}
    return node


def _engine(value: Value) -> dict[str, Any]:
    """The configuration schema without what the chart sets itself; the keys that templates read must be there."""
    properties = {key: node for key, node in schema_json()["properties"].items() if key not in CHART_SETTINGS}
    return {
        "type": "object",
        "description": value.description,
        "additionalProperties": False,
        "required": [child.path[-1] for child in value.children],
        "properties": properties,
    }


def _documented(values: list[Value]) -> Iterator[Value]:
    for value in values:
        if value.description:
            yield value
        yield from _documented(value.children)


def _read_comment(lines: list[str]) -> tuple[str, str]:
    description: list[str] = []
    annotation = ""
    for line in lines:
        if line.startswith("@schema"):
            annotation = line.removeprefix("@schema").strip()
        elif line.startswith("--"):
            description = [line.removeprefix("--").strip()]
        elif description:
            description.append(line)
    return " ".join(description), annotation


def _at(tree: Any, path: tuple[str, ...]) -> Any:
    for name in path:
        tree = tree[name]
    return tree


def _shown(default: Any) -> str:
    return f"`{json.dumps(default, ensure_ascii=False)}`".replace("|", "\\|")


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


_INTRODUCTION = """\
# The Pagoda chart

<!-- Generated from values.yaml by `make chart`; edit that file instead. -->

One release serves one model behind a Service with REST and OpenAI routes on port 8080 and gRPC on port 8081: a Deployment of
equal pods, or (`mode: multiNode`) groups of pods that share the model.

    kubectl create secret generic clients --from-literal=api-keys=$(openssl rand -hex 32)
    helm install pagoda ./charts/pagoda --set image.repository=registry.example/pagoda \\
      --set security.apiKeysSecret.name=clients --set-json 'network.policy.from=[{"podSelector":{}}]'
    helm test pagoda --logs

`image.repository` is where you pushed the image. A release says who may ask: without API keys, or without peers of the
NetworkPolicy, it is not rendered (`security.allowUnauthenticated` and `network.policy.allowAllIngress` open it).
docs/deployment.md goes from nothing to a first answer, and says how to size a release and what to do when it does not come up.

Values are checked before anything is rendered: an unknown key, a wrong type or an impossible value is an error that names it.
`engine` takes every setting of docs/configuration.md except those that are values of the chart: `model` (`model.hubId`,
`model.claim`, `model.initContainer`), `model_name` (`model.name`), `host`, `http_port` and `grpc_port` (`network.*`),
`api_keys` (`security.apiKeysSecret`), `ssl_certfile` and `ssl_keyfile` (`network.tls.secretName`), and
`distributed_executor_backend`, `network_interface` and those of Ray (`mode`, `multiNode.*`).

## Values
"""


if __name__ == "__main__":
    sys.exit(main())
