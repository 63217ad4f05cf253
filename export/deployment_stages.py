"""The stages from the checkpoints on: exported models, each held against its PyTorch model, and what they measure.

Heavy packages are imported inside the work, so that a run whose stages are all complete needs none of them.
"""

import json
import math
from pathlib import Path
from typing import Any

from toolchain import training_stages
from toolchain.errors import (
    ArtifactError,
    ClipkdError,
    GateError,
    Interrupted,
    MissingDependency,
    UnavailableBackend,
    UsageError,
)
from toolchain.recipe import Recipe, is_quantized
from toolchain.stages import MANIFEST, REFERENCE, Screen, Stage
from toolchain.training_stages import evaluated

FAILED = "failed.json"


def quantize(recipe: Recipe, out: Path, made: dict[str, Stage], screen: Screen) -> dict[str, Stage]:
    """`training_stages.quantize`; where `export.auto` chooses, an int8 student that cannot be made is rejected."""
    try:
        if recipe.quantize is None and recipe.export.is_quantized:
            raise UsageError("the recipe has no quantize section to make it with")
        return training_stages.quantize(recipe, out, made, screen)
    except ClipkdError as error:
        if recipe.export.auto is None or isinstance(error, ArtifactError | Interrupted):
            raise
        for name, _, _, precision in exports(recipe):
            if is_quantized(precision):
                mark_failed(out / "exported" / name, error)
                screen.line(name, f"failed: {error}")
        return {}


def export(recipe: Recipe, out: Path, made: dict[str, Stage], screen: Screen) -> dict[str, Stage]:
    """ONNX graphs of every model, each held against its PyTorch model before it counts as made."""
    from toolchain import glyphs
    from toolchain.eval_sets import fingerprint, open_set
    from toolchain.stages import run_stage

    exported = {}
    accuracy = evaluated(recipe)
    headline = fingerprint(accuracy.headline_set)
    failures: list[ClipkdError] = []
    for name, role, runtime, precision in exports(recipe):
        is_kit = runtime == "tensorrt"
        if is_quantized(precision) and f"{role}-int8" not in made:
            continue  # `quantize` said why
        checkpoint = made[f"{role}-int8" if is_quantized(precision) else role]
        has_uint8_input = recipe.export.uint8_input and role == shipped_role(recipe) and not is_kit

        def work(
            folder: Path,
            name: str = name,
            role: str = role,
            runtime: str = runtime,
            precision: str = precision,
            checkpoint: Stage = checkpoint,
            is_kit: bool = is_kit,
            has_uint8_input: bool = has_uint8_input,
        ) -> dict[str, Any]:
            if precision == "int8-bf16" and runtime != "openvino":  # its proof would say so, minutes later
                raise UnavailableBackend(f"{name}: OpenVINO alone computes in int8-bf16; export int8 for {runtime}")

            from export.model_card import write_card
            from export.proof import prove
            from export.to_onnx import export_onnx
            from toolchain.models import load_model
            from toolchain.quantize import example_pixels, freeze, load_quantized, sign_activations

            (folder / FAILED).unlink(missing_ok=True)  # of an earlier attempt
            model = load_model(checkpoint.path)
            image_tower, text_tower = None, None
            if is_quantized(precision):
                image, text = load_quantized(checkpoint.path, model)
                if is_kit:
                    sign_activations(image, text)
                image_tower = freeze(image, example_pixels(model.net))
                text_tower = freeze(text, model.tokenize(list(glyphs.TEMPLATES)))
            screen.progress("to ONNX", 0, 2)
            summary = export_onnx(
                model,
                folder,
                role=role,
                precision=precision,
                headline=open_set(accuracy.headline_set),
                runtime=runtime,
                opset=recipe.export.opset,
                batch=recipe.export.batch,
                uint8_input=has_uint8_input,
                image_tower=image_tower,
                text_tower=text_tower,
            )
            screen.progress("parity", 1, 2)
            # A kit's graphs are proven where they can be run: its engines do not exist yet.
            proven_in = "onnxruntime" if is_kit else runtime
            summary |= prove(folder, runtime=proven_in, precision=precision, uint8_input=has_uint8_input)
            if is_kit:
                from export.to_tensorrt import complete_kit, write_sums

                summary["runtime"] = "tensorrt"
                height, width = example_pixels(model.net).shape[-2:]
                complete_kit(folder, (height, width))
            write_card(folder, f"{recipe.name}: {name}", summary, _provenance(recipe, checkpoint))
            if is_kit:
                write_sums(folder)
            return summary

        screen.starts(name)
        path = out / "exported" / name
        try:
            exported[name] = run_stage(
                path,
                kind="export",
                version=5,
                fields={
                    "runtime": runtime,
                    "precision": precision,
                    "opset": recipe.export.opset,
                    "batch": recipe.export.batch,
                    "uint8_input": has_uint8_input,
                    "headline": accuracy.headline,
                    "provenance": _provenance(recipe, checkpoint),
                },
                fingerprints={"headline": headline},
                inputs={"checkpoint": checkpoint},
                work=work,
            )
        except ClipkdError as error:  # the others are still worth having
            weighed = recipe.export.auto is not None and role == shipped_role(recipe)
            if not (is_of_the_model(error) if weighed else isinstance(error, GateError | UnavailableBackend)):
                raise
            mark_failed(path, error)
            if not weighed:
                failures.append(error)
            screen.line(name, f"failed: {error}")
            continue
        screen.done(name, exported[name])
    if failures:
        kind = GateError if any(isinstance(error, GateError) for error in failures) else UnavailableBackend
        raise kind("\n".join(map(str, failures)))
    return exported


def _provenance(recipe: Recipe, checkpoint: Stage) -> dict[str, Any]:
    """What a model card says of where a model came from: names and settings of the recipe, the checkpoint's hash.

    Of a path only its name: a card travels further than a recipe.
    """

    def said(section: Any) -> Any:
        if section is None:
            return "none"
        fields = section.model_dump(mode="json", exclude_none=True)
        return {
            key: Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value
            for key, value in fields.items()
        }

    data = said(recipe.data)
    return {
        "checkpoint": f"sha256 {checkpoint.digest}",
        "teacher": said(recipe.teacher),
        "student": said(recipe.student),
        "data": data,
    } | ({"licence of the data": _GLYPHS_LICENCE} if recipe.data is not None and data.get("kind") == "glyphs" else {})


_GLYPHS_LICENCE = (
    "drawn from the DejaVu fonts (Bitstream Vera and Arev licences, changes in the public domain); "
    "scored on STIX (SIL Open Font Licence 1.1)"
)


def build_engines(recipe: Recipe, out: Path, exported: dict[str, Stage], screen: Screen) -> dict[str, Stage]:
    """The TensorRT engines of every kit, for the GPU of this machine.

    Raises:
        MissingDependency, UnavailableBackend: there is no TensorRT, or no GPU; the kits are complete.
    """
    kits = {name: stage for name, stage in exported.items() if stage.manifest["summary"]["runtime"] == "tensorrt"}
    if not kits or not recipe.export.build_engines:
        return {}
    from export.to_tensorrt import can_build

    try:
        device = can_build()
    except ClipkdError as error:
        places = ", ".join(str(stage.path) for stage in kits.values())
        hint = f"The kits are written: {places}; build on the device with build_on_device.sh, or export with --no-build"
        raise type(error)(f"{error}. {hint}") from None
    return {f"engines/{name}": engines_of(kit, out, device, screen) for name, kit in kits.items()}


def engines_of(kit: Stage, out: Path, device: dict[str, str], screen: Screen) -> Stage:
    """The TensorRT engines of one kit of a run, for the GPU of this machine, which is what `can_build` said."""
    from export.to_tensorrt import build
    from toolchain.stages import run_stage

    def work(folder: Path) -> dict[str, Any]:
        return build(kit.path, folder, screen.progress)

    name = f"engines/{kit.path.name}"
    screen.starts(name)
    stage = run_stage(
        out / name,
        kind="engines",
        version=1,
        fields={},
        fingerprints={"device": json.dumps(device, sort_keys=True)},
        inputs={"kit": kit},
        work=work,
    )
    screen.done(name, stage)
    return stage


def mark_failed(path: Path, error: ClipkdError) -> None:
    """Say in a stage's unfinished directory why it will not become complete; it is kept for inspection."""
    document = {"status": "failed", "exit_code": error.exit_code, "reason": str(error)}
    file = path.with_name(f".{path.name}.partial") / FAILED
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def measure(recipe: Recipe, out: Path, exported: dict[str, Stage], screen: Screen) -> dict[str, Stage]:
    """Parity, accuracy and latency of each exported model, in its own runtime on this machine."""
    from toolchain.stages import run_stage

    measured = {}
    accuracy, fields, fingerprints = evaluated(recipe), _measured_by(recipe), _measured_on(recipe)
    for name, model in exported.items():
        if model.manifest["summary"]["runtime"] == "tensorrt":
            continue  # a kit runs where its engines are built

        def work(folder: Path, model: Stage = model) -> dict[str, Any]:
            from export.measure import measure

            return measure(model.path, folder, accuracy, recipe.profile, screen.progress)

        screen.starts(f"measured/{name}")
        measured[name] = run_stage(
            out / "measured" / name / "cpu",
            kind="measure",
            version=2,
            fields=fields,
            fingerprints=fingerprints,
            inputs={"model": model},
            work=work,
        )
        screen.done(f"measured/{name}", measured[name])
    return measured


def require_references(recipe: Recipe) -> None:
    """Know before hours of training that what the recipe wants of PyTorch itself can be had.

    Raises:
        MissingDependency: a reference is to be compiled, and there is no C++ compiler.
    """
    from export.profile import require_compiler

    if "compiled" in recipe.profile.pytorch:
        require_compiler()


def measure_references(
    recipe: Recipe, out: Path, made: dict[str, Stage], exported: dict[str, Stage], screen: Screen
) -> dict[str, Stage]:
    """The same of the checkpoint that ships in PyTorch, as often as the recipe asks for it.

    Raises:
        MissingDependency: it is to be compiled, and there is no C++ compiler.
    """
    from toolchain.stages import run_stage

    measured: dict[str, Stage] = {}
    if not references(recipe):
        return measured
    accuracy, fields, fingerprints = evaluated(recipe), _measured_by(recipe), _measured_on(recipe)
    for name, role, mode, beside in references(recipe):
        if beside not in exported:
            continue  # it failed, and has said why

        def work(folder: Path, role: str = role, mode: str = mode, beside: str = beside) -> dict[str, Any]:
            from export.measure import measure_reference

            paths = made[role].path, exported[beside].path, folder
            return measure_reference(*paths, accuracy, recipe.profile, mode, screen.progress)

        screen.starts(f"measured/{name}")
        measured[name] = run_stage(
            out / "measured" / name / "cpu",
            kind=REFERENCE,
            version=1,
            fields={**fields, "pytorch": mode},
            fingerprints=fingerprints,
            inputs={"checkpoint": made[role], "model": exported[beside]},
            work=work,
        )
        screen.done(f"measured/{name}", measured[name])
    return measured


def _measured_by(recipe: Recipe) -> dict[str, Any]:
    """The fields that any measurement reads."""
    return {
        "evaluate": evaluated(recipe).model_dump(mode="json"),
        "profile": recipe.profile.model_dump(exclude={"pytorch"}),
    }


def _measured_on(recipe: Recipe) -> dict[str, str]:
    """The data and the machine that any measurement depends on."""
    from toolchain.eval_sets import fingerprints
    from toolchain.stages import machine

    return {"sets": fingerprints(evaluated(recipe).sets), "machine": json.dumps(machine(), sort_keys=True)}


def is_of_the_model(error: ClipkdError) -> bool:
    """Whether an error says that a model is no good, and not that the command cannot go on."""
    return not isinstance(error, ArtifactError | Interrupted | MissingDependency | UsageError)


def shipped_role(recipe: Recipe) -> str:
    """The role of the model that a run is for."""
    return "student" if recipe.distill else "adopted"


def report(out: Path, measured: dict[str, Stage], screen: Screen) -> dict[str, Any]:
    """report.json and its readable forms, written again only when something measured is new."""
    path = out / "report.json"
    screen.starts("report")
    # of kits alone nothing was measured: their report is written each time
    newest = max(((stage.path / MANIFEST).stat().st_mtime_ns for stage in measured.values()), default=math.inf)
    files = [path.with_suffix(suffix) for suffix in (".json", ".csv", ".md", ".png", ".svg", ".html")]
    if all(file.exists() and file.stat().st_mtime_ns >= newest for file in files):
        document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        screen.line("report", "cached")
        return document
    from toolchain.report import write_report

    document = write_report([out], out)
    screen.line("report", "written")
    return document


def exports(recipe: Recipe) -> list[tuple[str, str, str, str]]:
    """Name, role, runtime and precision of every exported model.

    Teacher and baseline do not ship: they are there to compare with, for which one runtime does, the first that runs
    here.
    """
    others = (("teacher", "baseline") if recipe.baseline else ("teacher",)) if recipe.teacher else ()
    first = next((runtime for runtime in recipe.export.runtimes if runtime != "tensorrt"), None)
    shipped = shipped_role(recipe)
    pairs = [(role, "fp32") for role in others] + [(shipped, precision) for precision in recipe.export.precisions]
    return [
        (f"{role}-{runtime}-{precision}", role, runtime, precision)
        for runtime in recipe.export.runtimes
        for role, precision in pairs
        if runtime == first or role == shipped
    ]


def references(recipe: Recipe) -> list[tuple[str, str, str, str]]:
    """Name, role, mode and the fp32 export beside it of every checkpoint that is measured in PyTorch."""
    shipped = shipped_role(recipe)
    beside = [name for name, role, _, precision in exports(recipe) if (role, precision) == (shipped, "fp32")]
    return [(f"{shipped}-pytorch-{mode}", shipped, mode, beside[0]) for mode in recipe.profile.pytorch if beside]


def stage_paths(recipe: Recipe) -> list[str]:
    """The directories in a run that a recipe asks for."""
    trained = (["teacher"] if recipe.teacher else []) + (["baseline"] if recipe.baseline else []) + ["student"]
    cache = recipe.distill.teacher_cache if recipe.distill else None
    if cache is not None and cache.path is None:
        trained.insert(-1, "teacher-cache/teacher")
    if recipe.distill is None:
        trained = ["adopted"]
    quantized = [f"{trained[-1]}-int8"] if recipe.export.is_quantized and recipe.quantize else []
    made = [(name, runtime) for name, _, runtime, _ in exports(recipe)] if recipe.evaluate else []
    measured = [f"measured/{name}/cpu" for name, runtime in made if runtime != "tensorrt"]
    measured += [f"measured/{name}/cpu" for name, *_ in references(recipe)] if recipe.evaluate else []
    chosen = [f"auto/{runtime}" for runtime in recipe.export.runtimes if recipe.export.auto]
    return trained + quantized + [f"exported/{name}" for name, _ in made] + measured + chosen
