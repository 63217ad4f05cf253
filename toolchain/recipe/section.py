"""The base of every section of a recipe, and the value types that sections share."""

from typing import Annotated, Any, Literal, TypeVar, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

Entry = TypeVar("Entry")


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, (str, dict)) else value


Several = Annotated[tuple[Entry, ...], BeforeValidator(_as_list)]
"""A list; a single entry may be written without brackets, as in --set data.shards=x.tar."""

Positive = Annotated[int, Field(gt=0)]
BatchSize = Annotated[int, Field(ge=2)]  # the contrastive loss of a single pair is always 0
Weight = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(gt=0, le=1)]
Precision = Literal["fp32", "bf16", "fp16"]
StoredDtype = Literal["float32", "float16", "bfloat16", "int8"]


class Section(BaseModel):
    """The base of every section: frozen, without unknown keys, and with attribute docstrings as field help."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False, protected_namespaces=()
    )

    @model_validator(mode="before")
    @classmethod
    def _refuse_booleans(cls, raw: Any) -> Any:
        """Refuse yes, on and true for a number: pydantic takes them for 1."""
        for name, field in cls.model_fields.items() if isinstance(raw, dict) else ():
            value = raw.get(name)
            if isinstance(value, bool) and _takes_number(field.annotation):
                words = "yes, on and true" if value else "no, off and false"
                raise ValueError(f"{name} should be a number (got {value}); YAML reads {words} as a boolean")
        return raw


def _takes_number(annotation: Any) -> bool:
    if annotation in (int, float):
        return True
    if isinstance(annotation, int):  # a value of Literal
        return not isinstance(annotation, bool)
    return any(_takes_number(part) for part in get_args(annotation))
