"""The state of a pod and the reason why it is not ready, from its status."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# Reasons for waiting that do not go away by waiting.
_IMAGE_REASONS = frozenset({"ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull", "ImageInspectError"})
_CONFIG_REASONS = frozenset({"CreateContainerConfigError", "CreateContainerError", "RunContainerError"})


@dataclass(frozen=True, slots=True)
class PodState:
    """One pod in words.

    `problem` is set where waiting does not help, or (`may_pass`) helps only if somebody adds what is missing. `container`:
    whose log tells more; `has_restarted`: the log of the container before it does.
    """

    stage: str
    problem: str | None = None
    may_pass: bool = False
    container: str | None = None
    has_restarted: bool = False
    is_running: bool = False
    is_ready: bool = False


def pod_state(pod: Mapping[str, Any]) -> PodState:
    """The state of `pod`, an object as the API server gives it."""
    status = pod.get("status") or {}
    conditions = {condition["type"]: condition for condition in status.get("conditions") or []}
    scheduled = conditions.get("PodScheduled", {})
    if scheduled.get("status") == "False":
        return PodState("waiting for a node", _unschedulable(scheduled.get("message", "")), may_pass=True)
    for container in status.get("initContainerStatuses") or []:
        state = _init_container(container)
        if state is not None:
            return state
    for container in status.get("containerStatuses") or []:
        state = _blocked(container)
        if state is not None:
            return state
    is_ready = conditions.get("Ready", {}).get("status") == "True"
    running = [c for c in status.get("containerStatuses") or [] if "running" in (c.get("state") or {})]
    if is_ready:
        return PodState("ready", is_running=True, is_ready=True)
    if running:
        restarts = int(running[0].get("restartCount") or 0)
        stage = "loading" if not restarts else f"loading (restart {restarts})"
        return PodState(stage, container=running[0]["name"], has_restarted=bool(restarts), is_running=True)
    return PodState("pulling the image")


def _unschedulable(message: str) -> str:
    if "nvidia.com/gpu" in message:
        return f"no node has a free GPU: {message}"
    return f"no node takes the pod: {message or 'the scheduler gave no reason'}"


def _init_container(container: Mapping[str, Any]) -> PodState | None:
    """The pod's state during an init container; None if it is done."""
    state = container.get("state") or {}
    if (state.get("terminated") or {}).get("exitCode") == 0:
        return None
    blocked = _blocked(container)
    if blocked is not None:
        return blocked
    if "running" in state:
        return PodState(f"{container['name']}: fetching the model", container=container["name"])
    return PodState("pulling the image")


def _blocked(container: Mapping[str, Any]) -> PodState | None:
    """What keeps a container from running; None if nothing does."""
    state = container.get("state") or {}
    waiting = state.get("waiting") or {}
    reason, message = str(waiting.get("reason") or ""), str(waiting.get("message") or "")
    name = str(container["name"])
    if reason in _IMAGE_REASONS:
        image = container.get("image")
        return PodState("pulling the image", f"the image {image} cannot be pulled: {message or reason}")
    if reason in _CONFIG_REASONS:
        return PodState("creating the container", f"the container {name} cannot be made: {message or reason}")
    last = (container.get("lastState") or {}).get("terminated") or {}
    ended = state.get("terminated") or (last if reason == "CrashLoopBackOff" else {})
    if ended.get("exitCode"):
        why = _end(ended)
        return PodState("starting again", f"the container {name} {why}", container=name, has_restarted=bool(waiting))
    return None


def _end(terminated: Mapping[str, Any]) -> str:
    code, reason = terminated.get("exitCode"), terminated.get("reason")
    if reason == "OOMKilled":
        return "needed more memory than its limit and was killed: give it more (--memory)"
    return f"ended with exit status {code}" + (f" ({reason})" if reason and reason != "Error" else "")
