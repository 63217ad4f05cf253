"""The `export` and `profile` sections, and the changes that the flags of `clipkd export` make to `export`.

A TensorRT build kit (kit) is a folder of graphs from which the target device builds its own TensorRT engines."""

import difflib
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from toolchain.errors import UsageError
from toolchain.precisions import PRECISIONS, REFERENCE_PRECISION, SAFEST_FIRST, PrecisionName
from toolchain.recipe.section import Positive, Section, Several
from toolchain.runtimes import RUNTIMES, RuntimeName


class AutoSpec(Section):
    max_drop: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Largest accepted drop of headline top-1 from fp32 in the same runtime, as a fraction.
    Absent: quantize.max_drop, or 0.01."""


class ExportSpec(Section):
    runtimes: Several[RuntimeName] = ("onnxruntime",)
    """Runtimes to export for.  `tensorrt` writes TensorRT build kits of the shipped model, and builds their engines
    on this machine if `build_engines`."""

    build_engines: bool = True
    precisions: Several[PrecisionName] = ("fp32", "int8")
    """Precisions of the student.  Absent: fp32, and int8 if there is a `quantize` section or `auto`.  Teacher and
    baseline serve for comparison: they are exported in fp32 for the first runtime only."""

    opset: Literal[18, 19, 20] = 20

    auto: AutoSpec | None = None
    """Choose the precision to ship for each runtime: the fastest on this machine whose top-1 stays within `max_drop` of
    fp32's.  A precision that cannot be exported is then rejected without an error.  Absent: no choice is made."""

    batch: Literal[1] | None = None
    """1 fixes the first dimension of every graph, for NPUs and runtimes that need fixed shapes.  Absent: any size."""

    uint8_input: bool = False
    """Also write the student's image_uint8.onnx, which includes preprocessing; not in TensorRT build kits."""

    @model_validator(mode="after")
    def _check_not_empty(self) -> "ExportSpec":
        if not self.runtimes or not self.precisions:
            raise ValueError("runtimes and precisions need at least one entry each")
        return self

    @model_validator(mode="after")
    def _check_auto(self) -> "ExportSpec":
        if self.auto is not None and REFERENCE_PRECISION not in self.precisions:
            raise ValueError(
                f"auto compares every precision with {REFERENCE_PRECISION}; add {REFERENCE_PRECISION} to precisions"
            )
        kits = [runtime for runtime in self.runtimes if RUNTIMES[runtime].is_kit]
        if self.auto is not None and kits:
            raise ValueError(
                f"auto measures on this machine, but {kits[0]} engines run on the target device: "
                f"export {kits[0]} without auto"
            )
        return self

    @property
    def is_quantized(self) -> bool:
        """True if one of the precisions is exported from an int8 checkpoint."""
        return any(PRECISIONS[precision].is_quantized for precision in self.precisions)


@dataclass(frozen=True)
class ExportFlags:
    """The flags of `clipkd export`; an absent flag leaves the run's recipe as it is.

    Raises:
        UsageError: a flag has a wrong value, or needs or excludes another flag.
    """

    runtimes: tuple[RuntimeName, ...] = ()
    """Runtimes of this machine replace the recorded ones; TensorRT build kits are added to the recorded ones."""

    precisions: tuple[str, ...] | None = None
    """Names of `PRECISIONS`, as the user wrote them."""

    build_engines: bool = True
    auto: bool | None = None
    max_drop: float | None = None
    batch: int | None = None
    uint8_input: bool = False

    @property
    def only_kits(self) -> bool:
        """True if TensorRT build kits are the only runtimes asked for."""
        return bool(self.runtimes) and all(RUNTIMES[runtime].is_kit for runtime in self.runtimes)

    def __post_init__(self) -> None:
        self._check_values()
        kits = any(RUNTIMES[runtime].is_kit for runtime in self.runtimes)
        if not (self.build_engines or kits):
            raise UsageError("--no-build applies to TensorRT engines: write --trt --no-build")
        if self.max_drop is not None and not self.auto:
            raise UsageError("--max-drop applies to --auto: write --auto --max-drop 0.01")
        if self.auto and kits:
            raise UsageError(
                "--auto measures on this machine, but TensorRT engines run on the target device: "
                "export TensorRT without --auto"
            )

    def _check_values(self) -> None:
        """Report a wrong value as that of its flag; in the recipe it would look like an error of recipe.yaml."""
        known = ", ".join(PRECISIONS)
        for name in self.precisions or ():
            if name not in PRECISIONS:
                near = difflib.get_close_matches(name, PRECISIONS, 1)
                hint = f"did you mean {near[0]}?" if near else f"expected one or more of {known}"
                raise UsageError(f"--precision {name}: no such precision; {hint}")
        if self.precisions == ():
            raise UsageError(f"--precision: names no precision; expected one or more of {known}, comma-separated")
        if self.max_drop is not None and not 0 <= self.max_drop < 1:
            raise UsageError(
                f"--max-drop {self.max_drop:g}: expected a fraction of 1, such as 0.01 for one point of top-1"
            )


def export_overrides(recorded: ExportSpec, flags: ExportFlags) -> dict[str, Any]:
    """Return the fields of a run's `export` section that flags change, in a recipe's form.

    With --auto, fp32 is always among the precisions; without --precision, all precisions are.

    Raises:
        UsageError: --auto has no runtime that runs on this machine.
    """
    kits = [runtime for runtime in flags.runtimes if RUNTIMES[runtime].is_kit]
    named = [runtime for runtime in flags.runtimes if not RUNTIMES[runtime].is_kit]
    changes: dict[str, Any] = {}
    if flags.precisions is not None:
        changes["precisions"] = list(dict.fromkeys(flags.precisions))
    if flags.auto:
        named = named or [runtime for runtime in recorded.runtimes if not RUNTIMES[runtime].is_kit]
        if not named:
            raise UsageError(
                f"--auto measures on this machine, but the recipe exports only for {', '.join(recorded.runtimes)}: "
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
    """Number of new processes per measurement."""

    seconds: Annotated[float, Field(gt=0)] = 1.0
    """Measured seconds per tower, divided among the processes."""

    pytorch: Several[Literal["eager", "compiled"]] = ()
    """Also measure the shipped checkpoint in PyTorch fp32, as plain open_clip runs it, for the report's reference rows.
    This needs its fp32 export.  `compiled` (torch.compile) needs a C++ compiler."""
