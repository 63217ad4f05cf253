"""The base of every section of a recipe, and the value types that sections share."""

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

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
