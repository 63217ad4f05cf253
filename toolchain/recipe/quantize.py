"""The `quantize` section."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from toolchain.recipe.section import BatchSize, Positive, Section, Weight


class QuantizeSpec(Section):
    """Linear and convolutional layers in symmetric int8, weights per output channel."""

    method: Literal["ptq", "qat"] = "qat"
    """Calibrate only, or also fine-tune with the rounding in the loop, against the teacher, as distillation did.
    ptq reads neither steps, lr nor anchor."""

    towers: Annotated[tuple[Literal["image", "text"], ...], Field(min_length=1)] = ("image", "text")
    """Which become int8; the other stays float, as it is."""

    attention: bool = False
    """Also the products within plain attention, open_clip's and timm's, and the last projection: a little faster in
    OpenVINO, slower in ONNX Runtime, and less exact (docs/export.md)."""

    steps: Positive | None = None
    """Optimizer steps of qat."""

    lr: Annotated[float, Field(gt=0)] = 1e-4
    batch_size: BatchSize = 128
    calibration_samples: Positive = 256
    anchor: Weight = 100.0
    """Weight of the squared distance to the float student's features, beside the distillation losses."""

    max_drop: Annotated[float, Field(ge=0, lt=1)] | None = None
    """How much top-1 on the headline set may fall below the float student's, as a fraction; without `evaluate`, how
    much agreement with the teacher on training samples.  The most damaged layers go back to float until it does not.
    Absent: none does."""

    @model_validator(mode="after")
    def _check_method(self) -> "QuantizeSpec":
        if self.method == "qat" and self.steps is None:
            raise ValueError("method: qat needs steps, of its optimizer; or calibrate only, with method: ptq")
        if len(set(self.towers)) < len(self.towers):
            raise ValueError(f"towers {list(self.towers)}: each at most once")
        return self
