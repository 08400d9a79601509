"""Pydantic on top of the schema: reads typed values out of text, and writes the JSON schema.

The models are built from the one dataclass. Pydantic is imported when first needed, so the engine runs without it.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Annotated, Any, get_args

from pagoda.config.schema import option_defaults, option_types, options
from pagoda.config.values import SIZE_PATTERN, is_optional

if TYPE_CHECKING:
    from pydantic import TypeAdapter
    from pydantic.fields import FieldInfo


def typed_value(key: str, value: Any) -> Any:
    """`value` (see `values.plain_value`) as the type of the setting `key`, within its bounds.

    Text is read as the type; anything else must have it already: `true` is no number.

    Raises:
        ValueError: it is not of the type or out of bounds.
    """
    return _adapter(key).validate_python(value, strict=not isinstance(value, str))


def schema_json() -> dict[str, Any]:
    """JSON schema of a configuration file (and of the `config` values of a Helm chart).

    Sizes may be written as text with a unit, and settings that are chosen at start as `auto`.
    """
    from pydantic import ConfigDict, create_model

    model_fields: dict[str, Any] = {key: (annotation, _field(key)) for key, annotation in option_types().items()}
    model = create_model("PagodaConfig", __config__=ConfigDict(extra="forbid"), **model_fields)
    schema: dict[str, Any] = model.model_json_schema()
    schema.pop("description", None)
    for key, node in schema["properties"].items():
        _allow_text_forms(key, node)
    return schema


@cache
def _adapter(key: str) -> TypeAdapter[Any]:
    from pydantic import TypeAdapter

    annotation: Any = Annotated[option_types()[key], _field(key)]
    return TypeAdapter(annotation)


def _field(key: str) -> FieldInfo:
    from pydantic import Field

    info = options()[key]
    is_float = float in (option_types()[key], *get_args(option_types()[key]))
    field: FieldInfo = Field(
        default=option_defaults()[key],
        description=info.help,
        ge=info.ge,
        gt=info.gt,
        le=info.le,
        lt=info.lt,
        pattern=None if info.pattern is None else f"^(?:{info.pattern})$",
        allow_inf_nan=False if is_float else None,
    )
    return field


def _allow_text_forms(key: str, node: dict[str, Any]) -> None:
    info = options()[key]
    node.pop("title", None)
    if info.secret:
        node["writeOnly"] = True
    forms: list[dict[str, Any]] = []
    if info.unit == "bytes":
        forms.append({"type": "string", "pattern": SIZE_PATTERN})
    if is_optional(key) and str not in get_args(option_types()[key]):
        forms.append({"const": "auto" if info.auto else "none"})
    if not forms:
        return
    if "anyOf" in node:
        node["anyOf"].extend(forms)
        return
    kept = {"description", "default", "writeOnly"}
    own = {name: node.pop(name) for name in list(node) if name not in kept}
    node["anyOf"] = [own, *forms]
