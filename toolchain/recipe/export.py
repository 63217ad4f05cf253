"""The `export` and `profile` sections."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from toolchain.recipe.section import Positive, Section


class AutoSpec(Section):
    max_drop: Annotated[float, Field(ge=0, lt=1)] | None = None
    """How much top-1 on the headline set may fall below that of fp32 in the same runtime, as a fraction.
    Absent: quantize.max_drop, or 0.01."""


def is_quantized(precision: str) -> bool:
    """Whether a precision is made of an int8 checkpoint."""
    return precision.startswith("int8")


class ExportSpec(Section):
    runtimes: tuple[Literal["onnxruntime", "openvino", "tensorrt"], ...] = ("onnxruntime",)
    """`tensorrt` writes kits of the shipped model, and builds their engines here if `build_engines`."""

    build_engines: bool = True
    precisions: tuple[Literal["fp32", "fp16", "bf16", "int8", "int8-fp16", "int8-bf16"], ...] = ("fp32", "int8")
    """Of the student; teacher and baseline, which are there for comparison, in fp32 and for the first runtime alone."""

    opset: Literal[18, 19, 20] = 20

    auto: AutoSpec | None = None
    """Choose, for each runtime, the one of `precisions` to ship: the fastest here within a budget of fp32's accuracy.
    One that cannot be made is then no error but rejected.  Absent: nothing is chosen."""

    batch: Literal[1] | None = None
    """1 fixes the first dimension of every graph, for NPUs and runtimes that know no other; absent: it is free."""

    uint8_input: bool = False
    """Beside image.onnx of the student also image_uint8.onnx, which preprocesses too; not in kits of TensorRT."""

    @model_validator(mode="after")
    def _something_is_exported(self) -> "ExportSpec":
        if not self.runtimes or not self.precisions:
            raise ValueError("runtimes and precisions need at least one entry each")
        return self

    @model_validator(mode="after")
    def _auto_has_something_to_weigh(self) -> "ExportSpec":
        if self.auto is not None and "fp32" not in self.precisions:
            raise ValueError("auto holds every precision against fp32; add fp32 to precisions")
        if self.auto is not None and "tensorrt" in self.runtimes:
            raise ValueError("auto weighs what runs here, and a tensorrt engine runs on its device; export kits apart")
        return self

    @property
    def is_quantized(self) -> bool:
        """Whether one of the precisions is made of an int8 checkpoint."""
        return any(is_quantized(precision) for precision in self.precisions)


class ProfileSpec(Section):
    processes: Positive = 3
    """Fresh processes per measurement."""

    seconds: Annotated[float, Field(gt=0)] = 1.0
    """Measured time per tower, shared among the processes."""

    pytorch: tuple[Literal["eager", "compiled"], ...] = ()
    """Also measure the checkpoint that ships as plain open_clip runs it, in PyTorch fp32: rows for reference, beside
    its fp32 export, and none without one.  `compiled` (torch.compile) needs a C++ compiler."""
