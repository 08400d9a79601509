"""KServe objects checked in two ways: strictly against the CRDs, and by building KServe's own model classes of them."""

from __future__ import annotations

import importlib.util
import os
import re
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import yaml
from jsonschema import Draft202012Validator

from tests.support.rest_harness import import_kserve

REPOSITORY = Path(__file__).parents[2]
CRDS_VARIABLE = "TEST_KSERVE_CRDS"
_PLAIN = {"str": str, "int": int, "float": (int, float), "bool": bool}


def crds() -> Path | None:
    """The folder with KServe's CRDs and a strict validator: named by the variable, or beside the checkout; None if nowhere.

    The CRDs are too large to keep here.
    """
    folder = Path(os.environ.get(CRDS_VARIABLE) or REPOSITORY.parent / "shared" / "kserve-crds")
    return folder if (folder / "validate.py").is_file() else None


@cache
def _validator(kind: str, version_name: str) -> Draft202012Validator:
    """The validator of one version of a kind. Only its own file is read: they are megabytes long."""
    folder, tool = crds(), _validator_tool()
    assert folder is not None
    definition = yaml.load((folder / f"{kind.lower()}s.yaml").read_text(), Loader=tool.LOADER)
    (version,) = [version for version in definition["spec"]["versions"] if version["name"] == version_name]
    return Draft202012Validator(tool.to_strict_json_schema(version["schema"]["openAPIV3Schema"], root=True))


def _validator_tool() -> ModuleType:
    folder = crds()
    assert folder is not None
    spec = importlib.util.spec_from_file_location("kserve_crd_validator", folder / "validate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def crd_errors(document: dict[str, Any]) -> list[str]:
    """What the CRD's schema, closed against unknown fields, finds wrong."""
    found = _validator(document["kind"], document["apiVersion"].rpartition("/")[2]).iter_errors(document)
    return [f"{'/'.join(map(str, error.absolute_path)) or '.'}: {error.message[:200]}" for error in found]


def build_model(document: dict[str, Any]) -> Any:
    """The object as KServe's own class for its kind; ValueError for a field or type that the class does not know."""
    version = document["apiVersion"].rpartition("/")[2].capitalize()
    return _build(document, f"{version}{document['kind']}", document["kind"])


def _build(data: Any, type_name: str, where: str) -> Any:
    kserve_models = __import__(f"{import_kserve().__name__}.models", fromlist=["models"])
    if match := re.fullmatch(r"list\[(.+)\]", type_name):
        return [_build(item, match[1], f"{where}[{index}]") for index, item in enumerate(data)]
    if match := re.fullmatch(r"dict[(\[]str, (.+)[)\]]", type_name):
        return {key: _build(item, match[1], f"{where}.{key}") for key, item in data.items()}
    if type_name in _PLAIN:
        if not isinstance(data, _PLAIN[type_name]):
            raise ValueError(f"{where}: {data!r} is no {type_name}")
        return data
    if type_name in ("object", "V1beta1MetricQuantity"):  # a quantity: number or text
        return data
    if model := getattr(kserve_models, type_name, None):
        return _build_kserve(data, model, where)
    return _build_kubernetes(data, type_name, where)


def _build_kserve(data: dict[str, Any], model: Any, where: str) -> Any:
    attributes = {key: attribute for attribute, key in model.attribute_map.items()}
    arguments = {}
    for key, value in data.items():
        if key not in attributes:
            raise ValueError(f"{where}: {model.__name__} has no {key}")
        arguments[attributes[key]] = _build(value, model.openapi_types[attributes[key]], f"{where}.{key}")
    return model(**arguments)


def _build_kubernetes(data: Any, type_name: str, where: str) -> Any:
    """A part that is a plain Kubernetes type, of which the Python class forbids unknown fields."""
    from kubernetes.client import models

    model = getattr(models, re.sub(r"^K8sIoApi\w+?(?=V\d)", "", type_name))
    try:
        return model.model_validate(data)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
