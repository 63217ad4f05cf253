"""The `export` and `profile` sections, and what the flags of `clipkd export` change in the first."""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from toolchain.errors import UsageError
from toolchain.precisions import PRECISIONS, REFERENCE_PRECISION, SAFEST_FIRST, PrecisionName
from toolchain.recipe.section import Positive, Section
from toolchain.runtimes import RUNTIMES, RuntimeName


class AutoSpec(Section):
    max_drop: Annotated[float, Field(ge=0, lt=1)] | None = None
    """How much top-1 on the headline set may fall below that of fp32 in the same runtime, as a fraction.
    Absent: quantize.max_drop, or 0.01."""


class ExportSpec(Section):
    runtimes: tuple[RuntimeName, ...] = ("onnxruntime",)
    """`tensorrt` writes kits of the shipped model, and builds their engines here if `build_engines`."""

    build_engines: bool = True
    precisions: tuple[PrecisionName, ...] = ("fp32", "int8")
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
        if self.auto is not None and REFERENCE_PRECISION not in self.precisions:
            raise ValueError(
                f"auto holds every precision against {REFERENCE_PRECISION}; add {REFERENCE_PRECISION} to precisions"
            )
        kits = [runtime for runtime in self.runtimes if RUNTIMES[runtime].is_kit]
        if self.auto is not None and kits:
            raise ValueError(
                f"auto weighs what runs here, and a {kits[0]} engine runs on its device; export kits apart"
            )
        return self

    @property
    def is_quantized(self) -> bool:
        """True if one of the precisions is exported from an int8 checkpoint."""
        return any(PRECISIONS[precision].is_quantized for precision in self.precisions)


@dataclass(frozen=True)
class ExportFlags:
    """The flags of `clipkd export`; what is absent stays as the run's recipe says.

    Raises:
        UsageError: one of them makes no sense without, or with, another.
    """

    runtimes: tuple[RuntimeName, ...] = ()
    """Those that run here replace the recorded ones; kits are added to them."""

    precisions: tuple[str, ...] | None = None
    build_engines: bool = True
    auto: bool | None = None
    max_drop: float | None = None
    batch: int | None = None
    uint8_input: bool = False

    def __post_init__(self) -> None:
        kits = any(RUNTIMES[runtime].is_kit for runtime in self.runtimes)
        if not (self.build_engines or kits):
            raise UsageError("--no-build is about TensorRT engines: write --trt --no-build")
        if self.max_drop is not None and not self.auto:
            raise UsageError("--max-drop is about --auto: write --auto --max-drop 0.01")
        if self.auto and kits:
            raise UsageError("--auto weighs what runs here, and a kit's engines run on its device: export kits apart")


def export_overrides(recorded: ExportSpec, flags: ExportFlags) -> dict[str, Any]:
    """Return the fields of a run's `export` section that flags change, as a recipe would write them.

    With --auto, fp32 is always among the precisions, and every precision is if none is named.

    Raises:
        UsageError: --auto has no runtime that runs here.
    """
    kits = [runtime for runtime in flags.runtimes if RUNTIMES[runtime].is_kit]
    named = [runtime for runtime in flags.runtimes if not RUNTIMES[runtime].is_kit]
    changes: dict[str, Any] = {}
    if flags.precisions is not None:
        changes["precisions"] = list(flags.precisions)
    if flags.auto:
        named = named or [runtime for runtime in recorded.runtimes if not RUNTIMES[runtime].is_kit]
        if not named:
            raise UsageError(
                f"--auto weighs what runs here, and the recipe has {', '.join(recorded.runtimes)} alone: "
                "add --onnx or --openvino"
            )
        precisions = SAFEST_FIRST if flags.precisions is None else flags.precisions
        changes["precisions"] = list(dict.fromkeys((REFERENCE_PRECISION, *precisions)))
        changes["auto"] = {"max_drop": flags.max_drop}
    elif kits or flags.auto is not None:
        changes["auto"] = None
    if named or kits:
        changes["runtimes"] = list(dict.fromkeys((*(named or recorded.runtimes), *kits)))
    if kits:
        changes["build_engines"] = flags.build_engines
    if flags.batch is not None:
        changes["batch"] = flags.batch
    if flags.uint8_input:
        changes["uint8_input"] = True
    return changes


class ProfileSpec(Section):
    processes: Positive = 3
    """Fresh processes per measurement."""

    seconds: Annotated[float, Field(gt=0)] = 1.0
    """Measured time per tower, shared among the processes."""

    pytorch: tuple[Literal["eager", "compiled"], ...] = ()
    """Also measure the checkpoint that ships as plain open_clip runs it, in PyTorch fp32: rows for reference, beside
    its fp32 export, and none without one.  `compiled` (torch.compile) needs a C++ compiler."""
