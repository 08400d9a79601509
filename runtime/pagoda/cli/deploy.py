"""`pagoda deploy`: puts a model into a Kubernetes cluster with KServe, waits until it is ready, and sends it a request."""

from __future__ import annotations

import argparse
import re
import secrets
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from pagoda import __version__
from pagoda.cli.cluster import Cluster, ClusterError
from pagoda.cli.inference_service import (
    API_GROUP,
    CONTAINER,
    OWN_KEY,
    Deployment,
    api_key_secret,
    inference_service,
    network_policy,
)
from pagoda.cli.parser import CommandParser, settings_names
from pagoda.cli.pod_state import PodState, pod_state
from pagoda.config.command_line import CommandLine, parse_command_line
from pagoda.config.rules import Problem, raise_problems
from pagoda.config.schema import PagodaConfig, option_defaults
from pagoda.config.sources import load
from pagoda.errors import ConfigError

LOG_LINES = 20
PATIENCE_SECONDS = 120.0
"""How long a pod may wait for a node before that is an error: a cluster that grows needs some time to."""
_NAME = r"[a-z]([-a-z0-9]*[a-z0-9])?"
_OWN_SETTINGS = {
    "model_name": "is the InferenceService's name: use --name",
    "api_keys": "would be readable in the InferenceService: use --api-keys-secret, or the key that is made",
    "api_keys_file": "is the Secret of --api-keys-secret, or that which is made",
    "host": "cannot be chosen here: probes and the Service need every address",
    "ssl_certfile": "cannot be given here: use --file, and a Secret",
    "ssl_keyfile": "cannot be given here: use --file, and a Secret",
}


def run(
    arguments: Sequence[str],
    sleep: Callable[[float], None] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
) -> int:
    """Deploy; exit status 0 if the model answered. Raises `ClusterError` or `ConfigError` with the obstacle."""
    line = parse_command_line(arguments)
    own = _parser().parse_args(line.others)
    deployment = None if own.file else _deployment(own, line)
    document = _from_file(own.file, line) if deployment is None else inference_service(deployment)
    policy = None if deployment is None else network_policy(deployment)
    if own.dry_run:
        print(_dry_run(document, policy, deployment), end="")
        return 0
    name = document["metadata"]["name"]
    port = _port(document)
    cluster = Cluster(kubeconfig=own.kubeconfig, context=own.context, namespace=own.namespace)
    key = None if deployment is None else _guard(cluster, deployment, policy, makes_secret=own.api_keys_secret is None)
    cluster.apply(document)
    print(f"applied InferenceService {cluster.namespace}/{name}")
    pod = _Wait(cluster, name, port, sleep, clock).until_ready(own.timeout)
    print(f"{own.question!r}\n-> {_ask(cluster, pod, port, name, own.question, key)!r}")
    print(f"\nAsk on:\n  kubectl -n {cluster.namespace} port-forward pod/{pod} {port} &")
    header = ""
    if deployment is not None and deployment.keys_secret is not None:
        entry = OWN_KEY if own.api_keys_secret is None else "NAME"
        print(
            f"  KEY=$(kubectl -n {cluster.namespace} get secret {deployment.keys_secret} "
            f"-o jsonpath='{{.data.{entry}}}' | base64 -d)"
        )
        header = ' -H "Authorization: Bearer $KEY"'
    print(
        f"  curl{header} http://localhost:{port}/v2/models/{quote(name)}/generate "
        '-d \'{"text_input": "Once upon a time"}\''
    )
    return 0


def _guard(
    cluster: Cluster, deployment: Deployment, policy: dict[str, Any] | None, *, makes_secret: bool
) -> str | None:
    """Apply what keeps others out, before there is anything to reach; returns an API key to ask with, where one can be read.

    Raises `ClusterError`, also for a Secret that was named and is not there.
    """
    if policy is not None:
        cluster.apply_network_policy(policy)
        others = "".join(f", {name}" for name in deployment.allowed_namespaces or ())
        print(
            f"applied NetworkPolicy {cluster.namespace}/{deployment.name}: pods of {cluster.namespace}{others} may come in"
        )
    else:
        print("WARNING: --allow-all-ingress: no NetworkPolicy is made", file=sys.stderr)
    if deployment.keys_secret is None:
        print("WARNING: --allow-unauthenticated: whoever reaches the ports may use the model", file=sys.stderr)
        return None
    if makes_secret:
        values = cluster.ensure_secret(api_key_secret(deployment.keys_secret, secrets.token_hex(32)))
        print(f"API keys: Secret {cluster.namespace}/{deployment.keys_secret}")
    else:
        values = cluster.secret(deployment.keys_secret)
    return _key_to_ask_with(values)


def _key_to_ask_with(values: dict[str, str]) -> str | None:
    """The first key of a Secret's values that has the scope `infer` and is not hashed."""
    for text in ([values[OWN_KEY]] if OWN_KEY in values else []) + [values[name] for name in sorted(values)]:
        word = text.strip().split("\n")[0].split(",")[0].strip()
        if re.fullmatch(r"[\w.~+/=-]{8,}", word) and not word.startswith("-"):
            return word
    return None


def _dry_run(document: dict[str, Any], policy: dict[str, Any] | None, deployment: Deployment | None) -> str:
    """What would be applied. A key is not printed, so the Secret is a comment."""
    parts = [] if policy is None else [_as_yaml(policy)]
    text = "---\n".join([*parts, _as_yaml(document)])
    if deployment is not None and deployment.keys_secret is not None:
        secret = f"{deployment.keys_secret} --from-literal={OWN_KEY}=$(openssl rand -hex 32)"
        text = f"# API keys, unless they are there: kubectl create secret generic {secret}\n{text}"
    return text


class _Wait:
    """Follows an InferenceService until it is ready, saying each stage once."""

    def __init__(
        self, cluster: Cluster, name: str, port: int, sleep: Callable[[float], None], clock: Callable[[], float]
    ) -> None:
        self._cluster = cluster
        self._name = name
        self._port = port
        self._sleep = sleep
        self._clock = clock
        self._started = clock()
        self._said = ""

    def until_ready(self, timeout: float) -> str:
        """The name of a pod that serves. `timeout`: seconds. Raises `ClusterError` for what will not become ready."""
        while True:
            service = self._cluster.inference_service(self._name)
            pods = self._cluster.pods(self._name)
            states = [(str(pod["metadata"]["name"]), pod_state(pod)) for pod in pods]
            ready = [name for name, state in states if state.is_ready]
            if _is_ready(service) and ready:
                self._say("ready")
                return ready[0]
            name, state = states[0] if states else ("", PodState(_service_stage(service)))
            self._say(self._stage(name, state))
            waited = self._clock() - self._started
            if state.problem and (not state.may_pass or waited > min(PATIENCE_SECONDS, timeout)):
                raise ClusterError(self._with_log(name, state, state.problem))
            if waited > timeout:
                problem = f"{self._name} is not ready after {timeout:g} s: {self._said}"
                raise ClusterError(self._with_log(name, state, problem + self._last_warning(name)))
            self._sleep(2.0)

    def _stage(self, pod: str, state: PodState) -> str:
        """The state in words; of a server that loads, its own."""
        if not state.is_running or state.is_ready:
            return state.stage + (f": {state.problem}" if state.problem else "")
        try:
            _, health = self._cluster.ask_pod(pod, self._port, "/health", seconds=5)
            return f"{state.stage}: {health['stage']}" + (f" ({health['detail']})" if health.get("detail") else "")
        except (ClusterError, KeyError, TypeError):
            return state.stage  # it does not listen yet

    def _say(self, stage: str) -> None:
        if stage != self._said:
            print(f"{self._clock() - self._started:6.1f} s  {stage}", flush=True)
            self._said = stage

    def _last_warning(self, pod: str) -> str:
        """The latest warning about a pod, such as a probe that failed."""
        warnings = [event for event in self._cluster.events(pod) if event.get("type") == "Warning"] if pod else []
        return f"; {warnings[-1].get('reason')}: {str(warnings[-1].get('message')).strip()}" if warnings else ""

    def _with_log(self, pod: str, state: PodState, problem: str) -> str:
        if state.container is None:
            return problem
        log = self._cluster.log_tail(pod, state.container, previous=state.has_restarted, lines=LOG_LINES)
        return f"{problem}\nlast lines of its log:\n{log}" if log else problem


def _ask(cluster: Cluster, pod: str, port: int, model: str, question: str, key: str | None) -> str:
    body = {"text_input": question, "parameters": {"max_tokens": 32}}
    path = f"/v2/models/{quote(model, safe='')}/generate"
    status, answer = cluster.ask_pod(pod, port, path, body, seconds=300, key=key)
    if status in (401, 403):
        raise ClusterError(
            "the model is ready; it requires an API key with the scope infer, which this command does not have"
        )
    if status != 200 or not isinstance(answer, dict) or "text_output" not in answer:
        raise ClusterError(f"the model is ready but answers {status}: {answer}")
    return str(answer["text_output"])


def _is_ready(service: dict[str, Any]) -> bool:
    """Whether KServe calls the service ready, and means the object as it is now."""
    status = service.get("status") or {}
    if status.get("observedGeneration", 0) < service["metadata"].get("generation", 0):
        return False
    conditions = {condition["type"]: condition["status"] for condition in status.get("conditions") or []}
    return conditions.get("Ready") == "True"


def _service_stage(service: dict[str, Any]) -> str:
    """KServe's conditions while there is no pod."""
    for condition in (service.get("status") or {}).get("conditions") or []:
        if condition["status"] == "False" and condition.get("message"):
            return f"no pod yet: {condition['message']}"
    return "no pod yet"


def _deployment(own: argparse.Namespace, line: CommandLine) -> Deployment:
    """The user's choices, checked as the server will check them."""
    problems = list(line.problems)
    problems += [Problem(g.name, "", _OWN_SETTINGS[g.key], g.source) for g in line.given if g.key in _OWN_SETTINGS]
    if line.config_file:
        problems.append(Problem("config", line.config_file, "is a file of this machine: give the settings themselves"))
    if own.storage_uri and any(given.key == "model" for given in line.given):
        problems.append(Problem("storage-uri", own.storage_uri, "contradicts --model: give one of them"))
    if not re.fullmatch(_NAME, own.name) or len(own.name) > 40:
        problems.append(Problem("name", own.name, "must be a DNS label of at most 40 characters"))
    if own.api_keys_secret and own.allow_unauthenticated:
        problems.append(Problem("api-keys-secret", own.api_keys_secret, "contradicts --allow-unauthenticated"))
    if own.allow_from and own.allow_all_ingress:
        problems.append(Problem("allow-from", own.allow_from[0], "contradicts --allow-all-ingress"))
    raise_problems(problems)
    arguments = [f"--{given.key}={given.raw}" for given in line.given]
    config = load(arguments, {}).config
    if config.http_port == 0 or config.grpc_port == 0:
        raise ConfigError("http_port and grpc_port must be named: probes and the Service need them")
    return Deployment(
        name=own.name,
        image=own.image,
        config=config,
        arguments=arguments,
        storage_uri=own.storage_uri,
        replicas=own.replicas,
        cpu=own.cpu,
        memory=own.memory,
        gpus=own.gpus,
        keys_secret=None if own.allow_unauthenticated else own.api_keys_secret or f"{own.name}-api-keys",
        allowed_namespaces=None if own.allow_all_ingress else tuple(own.allow_from),
    )


def _from_file(path: str, line: CommandLine) -> dict[str, Any]:
    """The InferenceService in a file; settings are in it, not on the command line."""
    import yaml

    if line.given or line.config_file:
        raise ConfigError("with --file, settings belong into its args, not on the command line")
    try:
        documents = [document for document in yaml.safe_load_all(Path(path).read_text(encoding="utf-8")) if document]
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"--file {path} cannot be read: {error}") from error
    if len(documents) != 1 or not isinstance(documents[0], dict) or documents[0].get("kind") != "InferenceService":
        raise ConfigError(f"--file {path} must hold one InferenceService of {API_GROUP}, and nothing else")
    if not (documents[0].get("metadata") or {}).get("name"):
        raise ConfigError(f"--file {path}: the InferenceService has no metadata.name")
    return dict(documents[0])


def _port(document: dict[str, Any]) -> int:
    """The REST port: the first of the predictor's container, where it names any."""
    predictor = (document.get("spec") or {}).get("predictor") or {}
    for container in predictor.get("containers") or []:
        if container.get("name") == CONTAINER and container.get("ports"):
            return int(container["ports"][0]["containerPort"])
    return int(option_defaults()["http_port"])


def _as_yaml(document: dict[str, Any]) -> str:
    import yaml

    return str(yaml.safe_dump(document, sort_keys=False))


def _parser() -> CommandParser:
    parser = CommandParser(
        prog="pagoda deploy",
        description="Apply an InferenceService, wait until it is ready, and ask it. Every setting of `pagoda serve` may "
        "be given, too: `pagoda deploy --model Qwen/Qwen3-0.6B --max-model-len 4096`. Without a model the "
        "built-in one is served.",
        further=settings_names,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--name", default=PagodaConfig().served_model_name, help="name of InferenceService and model")
    parser.add_argument("--file", help="an InferenceService of your own, in place of one made here")
    parser.add_argument("--storage-uri", help="where KServe fetches the model from: hf://, s3://, pvc://, …")
    parser.add_argument("--image", default=f"pagoda:{__version__}", help="the image of Pagoda")
    parser.add_argument("--replicas", type=int, default=1, help="number of pods")
    parser.add_argument("--cpu", default="1", help="CPUs of a pod")
    parser.add_argument("--memory", default="4Gi", help="memory of a pod")
    parser.add_argument("--gpus", type=int, default=0, help="GPUs of a pod")
    parser.add_argument(
        "--api-keys-secret",
        help="a Secret of which each key is an API key, or a file of them; default: NAME-api-keys, made if missing",
    )
    parser.add_argument("--allow-unauthenticated", action="store_true", help="serve without API keys")
    parser.add_argument(
        "--allow-from",
        action="append",
        default=[],
        metavar="NAMESPACE",
        help="let pods of this namespace in besides those of the model's own, such as the gateway's; may be repeated",
    )
    parser.add_argument("--allow-all-ingress", action="store_true", help="make no NetworkPolicy")
    parser.add_argument("--namespace", "-n", help="namespace; default: the context's")
    parser.add_argument("--context", help="context of the kubeconfig; default: the current one")
    parser.add_argument("--kubeconfig", help="path of the kubeconfig; default: KUBECONFIG or ~/.kube/config")
    parser.add_argument("--timeout", type=float, default=1800.0, help="seconds to wait until ready")
    parser.add_argument("--question", default="Once upon a time", help="what to ask the model")
    parser.add_argument("--dry-run", action="store_true", help="print the InferenceService and do nothing")
    return parser
