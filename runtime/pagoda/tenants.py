"""Whose a request is, and how much of the server that tenant may have."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class TenantLimits:
    """What one tenant may have, all its API keys together.

    `weight`: its part of a contended engine, in proportion to the other tenants' weights. `requests_per_minute`,
    `tokens_per_minute` (prompt and output together): None for no limit.
    """

    weight: float = 1.0
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None


UNLIMITED = TenantLimits()
