"""Kubernetes objects by kind and name, and the small languages inside them."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterable, Mapping
from typing import Any

Object = dict[str, Any]
_SUFFIXES = {"": 1.0, "m": 1e-3} | {s: 1000.0**i for i, s in enumerate("kMGT", 1)}
_SUFFIXES |= {f"{s}i": 1024.0**i for i, s in enumerate("KMGT", 1)}


class CreateContainerConfigError(Exception):
    """The kubelet's own word for a pod that names something that is not there, or something that is not allowed."""


def quantity(text: object) -> float:
    """The number that a Kubernetes quantity (`500m`, `2Gi`) stands for."""
    match = re.fullmatch(r"([0-9.]+)([A-Za-z]*)", str(text))
    if match is None or match[2] not in _SUFFIXES:
        raise ValueError(f"{text!r} is no quantity")
    return float(match[1]) * _SUFFIXES[match[2]]


def expand(text: str, variables: Mapping[str, str]) -> str:
    """`$(NAME)` replaced as in commands and arguments of a pod; `$$(NAME)` stays, and so does a name that is not known."""
    return re.sub(
        r"\$(\$?)\((\w+)\)", lambda match: match[0][1:] if match[1] else variables.get(match[2], match[0]), text
    )


def share(value: int | str, of: int, *, round_up: bool) -> int:
    """A number of pods given as such or in percent of `of`."""
    if isinstance(value, int):
        return value
    percent = int(value.removesuffix("%"))
    return -(-of * percent // 100) if round_up else of * percent // 100


class Objects:
    """What has been applied."""

    def __init__(self) -> None:
        self._objects: dict[tuple[str, str], Object] = {}

    def apply(self, documents: Iterable[Object]) -> None:
        """Add objects, or replace those of the same kind and name."""
        for document in documents:
            self._objects[document["kind"], document["metadata"]["name"]] = document

    def of_kind(self, kind: str) -> list[Object]:
        return [document for (own_kind, _), document in self._objects.items() if own_kind == kind]

    def get(self, kind: str, name: str) -> Object:
        if (kind, name) not in self._objects:
            raise CreateContainerConfigError(f"{kind} {name} not found")
        return self._objects[kind, name]

    def data(self, kind: str, name: str) -> dict[str, bytes]:
        """Keys and contents of a ConfigMap or Secret."""
        document = self.get(kind, name)
        plain, encoded = ("data", "binaryData") if kind == "ConfigMap" else ("stringData", "data")
        contents = {key: base64.b64decode(value) for key, value in document.get(encoded, {}).items()}
        return contents | {key: value.encode() for key, value in document.get(plain, {}).items()}

    def value(self, kind: str, reference: Object) -> str:
        """What a `configMapKeyRef` or `secretKeyRef` means."""
        contents = self.data(kind, reference["name"])
        if reference["key"] not in contents:
            raise CreateContainerConfigError(f"couldn't find key {reference['key']} in {kind} {reference['name']}")
        return contents[reference["key"]].decode()


def selects(selector: Mapping[str, str], labels: Mapping[str, str]) -> bool:
    """Whether labels match a selector; an empty one selects nothing, as in a Service."""
    return bool(selector) and selector.items() <= labels.items()
