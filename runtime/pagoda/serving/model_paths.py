"""The name of a model in a path: it may have slashes, but does not end with the name of an operation."""

from __future__ import annotations

from starlette.convertors import StringConvertor, register_url_convertor

_OPERATIONS = ("ready", "infer", "generate", "generate_stream", "config", "stats", "load", "unload")


class ModelNameConvertor(StringConvertor):
    """`a` and `publishers/team/models/a`; of `/v2/models/a/infer` it is `a`, so that a wrong method there is one."""

    regex = rf"[^/]+(?:/(?!(?:{'|'.join(_OPERATIONS)})$)[^/]+)*|/.+"


register_url_convertor("model", ModelNameConvertor())

MODEL_NAME = "{model_name:model}"
V2_MODEL = f"/v2/models/{MODEL_NAME}"
V2_VERSION = V2_MODEL + "/versions/{model_version}"
