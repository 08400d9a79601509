"""Kubernetes' own schemas, strict: a field that the version does not know is an error."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import kubernetes_validate
from kubernetes_validate import utils

KUBERNETES_VERSIONS = ("1.29", "1.33", "1.37")

# It would read megabytes of definitions again for every object.
utils.schema_contents = cache(utils.schema_contents)


def validate(document: dict[str, Any], oldest: str = KUBERNETES_VERSIONS[0]) -> None:
    """Raise for an object that one of the versions, from `oldest` on, would refuse, and for a kind without a schema."""
    _validate(json.dumps(document), oldest)


@cache
def _validate(document: str, oldest: str) -> None:
    for version in KUBERNETES_VERSIONS[KUBERNETES_VERSIONS.index(oldest) :]:
        assert kubernetes_validate.validate(json.loads(document), version, strict=True) == version
