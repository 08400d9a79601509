"""A Kubernetes cluster as `pagoda deploy` needs it: objects as plain dictionaries, and errors as sentences."""

from __future__ import annotations

import base64
import http.client
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from pagoda.cli.inference_service import API_GROUP, API_VERSION
from pagoda.errors import PagodaError

FIELD_MANAGER = "pagoda-deploy"
POD_LABEL = f"{API_GROUP}/inferenceservice"
REQUEST_SECONDS = 30


class ClusterError(PagodaError):
    """A deployment is impossible; the message names the obstacle."""


class SecretMissingError(ClusterError):
    """There is no Secret of that name."""


class Cluster:
    """One namespace of the cluster that the kubeconfig (or the pod's own account) names."""

    def __init__(
        self, *, kubeconfig: str | None = None, context: str | None = None, namespace: str | None = None
    ) -> None:
        try:
            from kubernetes import client, config
        except ImportError:
            raise ClusterError("needs the Kubernetes client: pip install kubernetes") from None
        self._client = client
        try:
            self._api = config.new_client_from_config(kubeconfig, context)
            found = _context_namespace(config, kubeconfig, context)
        except config.ConfigException as error:
            raise ClusterError(f"no cluster is configured: {error}") from error
        self._api.configuration.retries = False
        self.namespace = namespace or found or "default"
        self._core = client.CoreV1Api(self._api)
        self._custom = client.CustomObjectsApi(self._api)

    def apply(self, document: dict[str, Any]) -> None:
        """Create or change an InferenceService, server-side: a field that the cluster does not know is an error."""
        name = document["metadata"]["name"]
        with self._errors(f"InferenceService {self.namespace}/{name}"):
            self._custom.patch_namespaced_custom_object(
                *(API_GROUP, API_VERSION, self.namespace, "inferenceservices", name, document),
                field_manager=FIELD_MANAGER,
                field_validation="Strict",
                force=True,
                _content_type="application/apply-patch+yaml",
                _request_timeout=REQUEST_SECONDS,
            )

    def ensure_secret(self, document: dict[str, Any]) -> dict[str, str]:
        """The values of a Secret, which is created if there is none of its name, and else left as it is."""
        name = document["metadata"]["name"]
        try:
            return self.secret(name)
        except SecretMissingError:
            with self._errors(f"Secret {self.namespace}/{name}"):
                self._core.create_namespaced_secret(
                    self.namespace, document, field_manager=FIELD_MANAGER, _request_timeout=REQUEST_SECONDS
                )
            return self.secret(name)

    def secret(self, name: str) -> dict[str, str]:
        """The values of a Secret. Raises `SecretMissingError`."""
        try:
            with self._errors(f"Secret {self.namespace}/{name}"):
                found = json.loads(self._read(self._core.read_namespaced_secret, name, self.namespace))
        except ClusterError as error:
            if isinstance(error.__cause__, self._client.ApiException) and error.__cause__.status == 404:
                raise SecretMissingError(f"there is no Secret {self.namespace}/{name}") from error
            raise
        data: dict[str, str] = found.get("data") or {}
        return {key: base64.b64decode(value).decode(errors="replace") for key, value in data.items()}

    def apply_network_policy(self, document: dict[str, Any]) -> None:
        """Create or change a NetworkPolicy, server-side."""
        name = document["metadata"]["name"]
        with self._errors(f"NetworkPolicy {self.namespace}/{name}"):
            self._client.NetworkingV1Api(self._api).patch_namespaced_network_policy(
                *(name, self.namespace, document),
                field_manager=FIELD_MANAGER,
                field_validation="Strict",
                force=True,
                _content_type="application/apply-patch+yaml",
                _request_timeout=REQUEST_SECONDS,
            )

    def inference_service(self, name: str) -> dict[str, Any]:
        """The InferenceService as it is now."""
        with self._errors(f"InferenceService {self.namespace}/{name}"):
            found = self._custom.get_namespaced_custom_object(
                *(API_GROUP, API_VERSION, self.namespace, "inferenceservices", name), _request_timeout=REQUEST_SECONDS
            )
        assert isinstance(found, dict)
        return found

    def pods(self, name: str) -> list[dict[str, Any]]:
        """The pods of an InferenceService, the newest first."""
        with self._errors(f"pods of {self.namespace}"):
            found = self._read(self._core.list_namespaced_pod, self.namespace, label_selector=f"{POD_LABEL}={name}")
        items: list[dict[str, Any]] = json.loads(found)["items"]
        return sorted(items, key=lambda pod: str(pod["metadata"].get("creationTimestamp") or ""), reverse=True)

    def pod(self, name: str) -> dict[str, Any]:
        """One pod."""
        with self._errors(f"pod {self.namespace}/{name}"):
            found: dict[str, Any] = json.loads(self._read(self._core.read_namespaced_pod, name, self.namespace))
        return found

    def events(self, pod: str) -> list[dict[str, Any]]:
        """What Kubernetes noted about a pod, the latest last."""
        with self._errors(f"events of {self.namespace}"):
            found = self._read(
                self._core.list_namespaced_event, self.namespace, field_selector=f"involvedObject.name={pod}"
            )
        items: list[dict[str, Any]] = json.loads(found)["items"]
        return sorted(items, key=lambda event: str(event.get("lastTimestamp") or ""))

    def log_tail(self, pod: str, container: str, *, previous: bool, lines: int) -> str:
        """The last lines of a container's log, of the container before it if `previous`; empty if there is none."""
        try:
            with self._errors(f"log of {pod}"):
                text = self._read(
                    *(self._core.read_namespaced_pod_log, pod, self.namespace),
                    container=container,
                    previous=previous,
                    tail_lines=lines,
                )
        except ClusterError:
            return ""
        return text.strip()

    def ask_pod(
        self,
        pod: str,
        port: int,
        path: str,
        body: dict[str, Any] | None = None,
        seconds: float = REQUEST_SECONDS,
        key: str | None = None,
    ) -> tuple[int, Any]:
        """Status and JSON of an answer of the server in a pod, through a port-forward; GET, or POST with a body.

        Raises `ClusterError` where the pod cannot be reached.
        """
        from kubernetes import stream

        with self._errors(f"port-forward to {self.namespace}/{pod}"):
            forward = stream.portforward(
                self._core.connect_get_namespaced_pod_portforward, pod, self.namespace, ports=str(port)
            )
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=seconds)
        connection.sock = forward.socket(port)
        connection.sock.settimeout(seconds)
        try:
            data = None if body is None else json.dumps(body)
            headers = {"Content-Type": "application/json"}
            if key is not None:
                headers["Authorization"] = f"Bearer {key}"
            connection.request("GET" if data is None else "POST", path, data, headers)
            answer = connection.getresponse()
            return answer.status, json.loads(answer.read())
        except (OSError, http.client.HTTPException, ValueError) as error:
            reason = forward.error(port) or error or type(error).__name__
            raise ClusterError(f"no answer from {self.namespace}/{pod}: {reason}") from error
        finally:
            connection.close()
            forward.close()

    def _read(self, call: Any, *arguments: Any, **options: Any) -> str:
        """The body of an answer as it came: the client's own classes refuse fields of newer clusters."""
        response = call(*arguments, **options, _preload_content=False, _request_timeout=REQUEST_SECONDS)
        data: bytes = response.data
        return data.decode(errors="replace")

    @contextmanager
    def _errors(self, what: str) -> Iterator[None]:
        """Turn the client's exceptions into sentences about `what`."""
        from urllib3.exceptions import HTTPError

        try:
            yield
        except self._client.ApiException as error:
            raise ClusterError(_refusal(error.status, error.body, error.reason, what)) from error
        except (HTTPError, OSError) as error:
            host = self._api.configuration.host
            raise ClusterError(f"the cluster at {host} cannot be reached: {error}") from error


def _refusal(status: int | None, body: Any, reason: Any, what: str) -> str:
    """What an answer with an error status means."""
    try:
        answer = json.loads(body or "")
        message = str(answer.get("message") or reason)
        details = answer.get("details") or {}
    except (ValueError, TypeError, AttributeError):
        message, details = str(body or reason).strip(), {}
    if status == 404 and details.get("kind") == "namespaces":
        return f"{message}: create it, or name another with --namespace"
    if status == 404 and not details.get("name"):
        return (
            f"KServe is not installed in this cluster: there is no InferenceService ({API_GROUP}/{API_VERSION}). "
            "Install KServe, or use the Helm chart, which does not need it"
        )
    if status in (401, 403):
        return f"not allowed: {message}"
    if status in (400, 422):
        return f"{what} is refused: {message}"
    return f"{what}: the cluster answers {status}: {message}"


def _context_namespace(config: Any, kubeconfig: str | None, context: str | None) -> str | None:
    """The namespace that the chosen context of a kubeconfig names."""
    contexts, active = config.list_kube_config_contexts(kubeconfig)
    chosen = next((entry for entry in contexts if entry["name"] == context), active)
    namespace = chosen["context"].get("namespace")
    return str(namespace) if namespace else None
