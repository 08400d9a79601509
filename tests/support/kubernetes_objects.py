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


def validate(document: dict[str, Any]) -> None:
    """Raise for an object that one of the versions would refuse, and for a kind that it has no schema for."""
    _validate(json.dumps(document))


@cache
def _validate(document: str) -> None:
    for version in KUBERNETES_VERSIONS:
        assert kubernetes_validate.validate(json.loads(document), version, strict=True) == version
