"""The `quantize` section."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from toolchain.recipe.section import BatchSize, Positive, Section, Several, Weight


class QuantizeSpec(Section):
    """Quantization of linear and convolutional layers to symmetric int8, with one weight scale per output channel."""

    method: Literal["ptq", "qat"] = "qat"
    """ptq: calibrate only; qat: then fine-tune with simulated rounding, using the distillation losses and the teacher.
    ptq ignores steps, lr and anchor."""

    towers: Annotated[Several[Literal["image", "text"]], Field(min_length=1)] = ("image", "text")
    """Towers to quantize; the other one stays float."""

    attention: bool = False
    """Also quantize the matrix products in plain attention (open_clip's and timm's) and the last projection: a little
    faster in OpenVINO, slower in ONNX Runtime, and less accurate (docs/export.md)."""

    steps: Positive | None = None
    """Number of optimizer steps of qat."""

    lr: Annotated[float, Field(gt=0)] = 1e-4
    batch_size: BatchSize = 128
    calibration_samples: Positive = 256
    anchor: Weight = 100.0
    """Weight of the squared distance to the float student's features, added to the distillation losses."""

    max_drop: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Largest accepted drop of headline top-1 from the float student, as a fraction; without `evaluate`, of agreement
    with the teacher on training samples.  The most sensitive layers are returned to float until the drop is within it.
    Absent: all layers stay int8."""

    @model_validator(mode="after")
    def _check_method(self) -> "QuantizeSpec":
        if self.method == "qat" and self.steps is None:
            raise ValueError(
                "method: qat needs steps, its optimizer steps; set steps, or method: ptq to calibrate only"
            )
        if len(set(self.towers)) < len(self.towers):
            raise ValueError(f"towers {list(self.towers)}: expected each tower at most once")
        return self
