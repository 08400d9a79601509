"""One state of several replicas: what the engine as a whole can do for a client.

    every replica ready                         ready
    some serve, others do not                   degraded     also while any that serves is degraded itself
    none serves, all may restart                starting
    one is dead                                 dead         the server exits, so that a whole one is started in its place
    draining                                    draining     until all are dead

The first start ends when all replicas are ready.
"""

from __future__ import annotations

from collections.abc import Sequence

from pagoda.engine.health import SERVING, EngineHealth, EngineState


def overall(current: EngineState, replicas: Sequence[EngineHealth]) -> tuple[EngineState, str]:
    """The state of the whole, and why: the sentence names the replicas that are the cause."""
    dead = [health for health in replicas if health.state is EngineState.DEAD]
    if current is EngineState.DRAINING:
        return (EngineState.DEAD, _sentence(dead)) if len(dead) == len(replicas) else (current, "")
    if dead:
        return EngineState.DEAD, _sentence(dead)
    serving = [health for health in replicas if health.state in SERVING]
    lacking = [health for health in replicas if health.state is not EngineState.READY]
    if not lacking:
        return EngineState.READY, f"all {len(replicas)} replicas are ready"
    if not serving or not all(health.has_started for health in replicas):
        return EngineState.STARTING, _sentence(lacking)
    return EngineState.DEGRADED, _sentence(lacking)


def _sentence(replicas: Sequence[EngineHealth]) -> str:
    return "; ".join(f"{health.name} is {health.state}: {health.cause or health.phase}" for health in replicas)
