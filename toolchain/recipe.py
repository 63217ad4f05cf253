"""What a recipe may say, and reading one.

A recipe is YAML, complete in itself: no inheritance, interpolation or class paths.  Everything that can change a number
in the report is in it; where things go and how loudly is a flag.
"""

import difflib
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from toolchain.errors import UsageError

SHIPPED = Path(__file__).resolve().parent.parent / "recipes"

Positive = Annotated[int, Field(gt=0)]
BatchSize = Annotated[int, Field(ge=2)]  # a contrastive loss of one pair is 0
Weight = Annotated[float, Field(ge=0)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)


class DataSpec(_Section):
    kind: Literal["glyphs"]

    views: Positive = 3
    """Distinct augmentations of each sample; epoch e shows view e mod views."""


class ModelSpec(_Section):
    model: str
    """An open_clip local-dir: the name of one that ships with clipkd, or a path (relative to the recipe's folder)."""


class LossWeights(_Section):
    task: Weight = 1.0
    """Contrastive loss of the student alone."""

    crd: Weight = 1.0
    """Contrastive relational distillation."""

    fd: Weight = 15.625
    """Feature distillation, summed over the width: CLIP-KD's 2000 is 2000 / D here, this at D = 128."""

    icl: Weight = 1.0
    """Interactive contrastive learning."""


class DistillSpec(_Section):
    steps: Positive
    """Number of optimizer steps."""

    batch_size: BatchSize
    """Samples per optimizer step."""

    lr: Annotated[float, Field(gt=0)]
    """Peak learning rate of AdamW, reached after warm-up."""

    warmup: Annotated[int, Field(ge=0)]
    """Steps of linear warm-up."""

    weight_decay: Weight = 0.1
    loss_weights: LossWeights = LossWeights()

    @model_validator(mode="after")
    def _warmup_ends(self) -> "DistillSpec":
        if self.warmup >= self.steps:
            raise ValueError(f"warmup ({self.warmup}) must be less than steps ({self.steps})")
        return self


class QuantizeSpec(_Section):
    steps: Annotated[int, Field(ge=0)]
    """Optimizer steps of fine-tuning after calibration; 0 calibrates only."""

    lr: Annotated[float, Field(gt=0)] = 1e-4
    batch_size: BatchSize = 128
    calibration_samples: Positive = 256


class ExportSpec(_Section):
    runtimes: tuple[Literal["onnxruntime"], ...] = ("onnxruntime",)
    precisions: tuple[Literal["fp32", "int8"], ...] = ("fp32", "int8")
    """Of the student; teacher and baseline are exported in fp32."""

    opset: Literal[18, 19, 20] = 20

    @model_validator(mode="after")
    def _something_is_exported(self) -> "ExportSpec":
        if not self.runtimes or not self.precisions:
            raise ValueError("runtimes and precisions need at least one entry each")
        return self


class EvaluateSpec(_Section):
    headline: Literal["stix", "serif", "novel"] = "stix"
    """The set whose top-1 the report ranks by."""

    sets: tuple[Literal["stix", "serif", "novel"], ...] = ("stix", "serif", "novel")

    @model_validator(mode="after")
    def _headline_is_evaluated(self) -> "EvaluateSpec":
        if self.headline not in self.sets:
            raise ValueError(f"headline '{self.headline}' is not among sets {list(self.sets)}")
        return self


class ProfileSpec(_Section):
    processes: Positive = 3
    """Fresh processes per measurement."""

    seconds: Annotated[float, Field(gt=0)] = 1.0
    """Measured time per tower, shared among the processes."""


class Recipe(_Section):
    name: str
    seed: Annotated[int, Field(ge=0, lt=1 << 63)] = 0
    data: DataSpec
    teacher: ModelSpec | None = None
    """Absent: plain contrastive training, as for baselines and teachers."""

    student: ModelSpec
    distill: DistillSpec
    quantize: QuantizeSpec | None = None
    """Absent: no int8 student."""

    export: ExportSpec = ExportSpec()
    evaluate: EvaluateSpec = EvaluateSpec()
    profile: ProfileSpec = ProfileSpec()

    @model_validator(mode="after")
    def _int8_needs_quantize(self) -> "Recipe":
        if "int8" in self.export.precisions and self.quantize is None:
            raise ValueError("export.precisions has int8 but there is no quantize section; add one or drop int8")
        return self


def recipe_path(name: str) -> Path:
    """A recipe by the name of one that ships, or by path.

    Raises:
        UsageError: there is no such recipe.
    """
    shipped = SHIPPED / f"{name}.yaml"
    if shipped.is_file():
        return shipped
    path = Path(name)
    if path.is_file():
        return path
    names = shipped_recipes()
    near = difflib.get_close_matches(name, names, 1)
    hint = f"did you mean {near[0]}?" if near else "clipkd recipes lists those that ship"
    raise UsageError(f"{name}: no recipe of this name ships and no such file exists; {hint}")


def shipped_recipes() -> list[str]:
    """Names of the recipes installed with clipkd."""
    return sorted(path.stem for path in SHIPPED.glob("*.yaml"))


def load_recipe(path: Path, overrides: list[str] | None = None) -> Recipe:
    """Read and check a recipe; `overrides` are `section.field=value` strings.

    Raises:
        UsageError: not YAML, or anything in it is unknown or wrong: every problem at once, each with its path.
    """
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"{path}: no such recipe") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: not YAML: {error}") from None
    if not isinstance(raw, dict):
        raise UsageError(f"{path}: a recipe is a mapping of sections; got {type(raw).__name__}")
    for override in overrides or []:
        _apply(raw, override)
    try:
        recipe = Recipe.model_validate(raw)
    except ValidationError as error:
        problems = [_sentence(problem) for problem in error.errors()]
        raise UsageError("\n".join([f"{path}: {len(problems)} problem(s)", *problems])) from None
    models = {name: _anchored(spec, path.parent) for name in ("teacher", "student") if (spec := getattr(recipe, name))}
    return recipe.model_copy(update=models)


def model_folder(spec: ModelSpec) -> Path:
    """Where a loaded recipe's model lies."""
    return SHIPPED / spec.model  # an absolute path replaces the folder on its left


def _anchored(spec: ModelSpec, recipe_folder: Path) -> ModelSpec:
    """The same model by a name that ships or by an absolute path, so that a resolved recipe means the same anywhere."""
    shipped = sorted(path.parent.name for path in SHIPPED.glob("*/open_clip_config.json"))
    if spec.model in shipped:
        return spec
    folder = (recipe_folder / spec.model).resolve()
    if folder.is_dir():
        return ModelSpec(model=str(folder))
    raise UsageError(f"model '{spec.model}': not one that ships ({', '.join(shipped)}) and no folder at {folder}")


def _apply(raw: dict[str, Any], override: str) -> None:
    path, equals, text = override.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys):
        raise UsageError(f"--set {override}: expected section.field=value, as in --set distill.steps=100")
    section: Any = raw
    for key in keys[:-1]:
        section[key] = section = {} if section.get(key) is None else section[key]
        if not isinstance(section, dict):
            raise UsageError(f"--set {override}: {key} is not a section")
    try:
        section[keys[-1]] = yaml.safe_load(text)
    except yaml.YAMLError:
        raise UsageError(f"--set {override}: '{text}' is not a YAML value; quote it for the shell") from None


def _sentence(problem: Any) -> str:
    where = ".".join(str(part) for part in problem["loc"]) or "recipe"
    if problem["type"] == "extra_forbidden":
        known = _fields_at(problem["loc"][:-1])
        near = difflib.get_close_matches(str(problem["loc"][-1]), known, 1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else f"known here: {', '.join(known)}"
        return f"  {where}: unknown key; {hint}"
    got = "" if isinstance(problem["input"], dict) else f" (got {problem['input']!r})"
    return f"  {where}: {problem['msg'].removeprefix('Value error, ')}{got}"


def _fields_at(location: tuple[Any, ...]) -> list[str]:
    model: Any = Recipe
    for part in location:
        annotation = model.model_fields[part].annotation
        options = getattr(annotation, "__args__", (annotation,))
        model = next(option for option in options if isinstance(option, type) and issubclass(option, BaseModel))
    return list(model.model_fields)
