"""The command line: the only module that parses arguments, prints, or exits.

`run` is the map of the system.  Every other command is one of its lines, on the run directory the line before wrote.
Heavy packages are imported inside the functions that need them, so that help and cached runs start at once.
"""

import errno
import importlib.util
import json
import shlex
import shutil
import signal
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.markup import escape
from rich.table import Column, Table


def _foreign_package() -> str | None:
    """`toolchain`, `export` and `recipes` are common names; somebody else's on the path would break us obscurely."""
    here = Path(__file__).resolve().parent
    for package in ("toolchain", "export", "recipes"):
        spec = importlib.util.find_spec(package)
        found = Path(spec.origin).resolve().parent.parent if spec and spec.origin else None
        if found != here:
            return (
                f"the package '{package}' comes from {found}, clipkd from {here}; "
                f"run from another folder, or take {found} out of PYTHONPATH"
            )
    return None


try:
    from toolchain.errors import ClipkdError, GateError, MissingDependency, UsageError
    from toolchain.precisions import SAFEST_FIRST
    from toolchain.terminal import TerminalScreen, open_screen, print_table, stderr, stdout
except ImportError:  # somebody else's toolchain, which `main` would refuse
    sys.stderr.write(f"error: {_foreign_package()}\n")
    sys.exit(2)

if TYPE_CHECKING:
    from toolchain.recipe.recipe import Recipe
    from toolchain.report.choose_model import Choice
    from toolchain.report.compare import Comparison
    from toolchain.stage import Stage

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode="rich")
_EXTRAS = {"torch": "train", "open_clip": "train", "nncf": "train", "onnx": "train", "safetensors": "train"}
_EXTRAS |= {"torchvision": "train", "timm": "train", "transformers": "train"}
_EXTRAS |= {"onnxscript": "train", "matplotlib": "report", "plotly": "report", "onnxruntime": "onnxruntime"}

RecipeArg = Annotated[
    str, typer.Argument(help="A recipe that ships (see `clipkd recipes`) or a path.", metavar="RECIPE")
]
OutOpt = Annotated[Path, typer.Option("--out", "-o", help="The run directory.")]
RunArg = Annotated[Path, typer.Argument(help="A run directory.", metavar="RUN")]
RunsArg = Annotated[list[Path], typer.Argument(help="Run directories.", metavar="RUN...")]
SetOpt = Annotated[
    list[str] | None,
    typer.Option("--set", help="Override a recipe field: section.field=value. Repeatable.", metavar="FIELD=VALUE"),
]
WorkersOpt = Annotated[
    int | None, typer.Option(min=0, help="Loader processes beside each training process.", show_default="by the data")
]
JsonOpt = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]


@app.command()
def run(
    recipe: RecipeArg, out: OutOpt, overrides: SetOpt = None, workers: WorkersOpt = None, as_json: JsonOpt = False
) -> None:
    """Distil, quantize, export, prove, measure and report: every stage of a recipe.

    Interrupted, the same command continues; what is complete is reused.

    Example: [bold]clipkd run glyphs --out runs/quickstart[/]
    """
    from export.pipeline.choose_precision import choose_precisions, without_failed
    from export.pipeline.export import export_models
    from export.pipeline.measure import measure_models, measure_references, require_references
    from export.pipeline.quantize import quantize_or_reject
    from export.pipeline.report import report_run
    from toolchain.pipeline.stage_inputs import How, evaluated
    from toolchain.pipeline.train import train_checkpoints

    with _run_directory(_recipe(recipe, overrides), out) as (loaded, screen):
        evaluated(loaded)  # before hours of training
        require_references(loaded)
        checkpoints = train_checkpoints(loaded, out, screen, How(workers))  # teacher, baseline, student
        checkpoints |= quantize_or_reject(loaded, out, checkpoints, screen)  # student-int8
        exported = export_models(loaded, out, checkpoints, screen)  # graphs that passed parity
        chosen = choose_precisions(loaded, out, exported, {}, screen) if loaded.export.auto else None
        sound = exported if chosen is None else without_failed(exported, chosen)
        measured = measure_models(loaded, out, sound, screen)  # accuracy and latency of what ships
        measured |= measure_references(loaded, out, checkpoints, exported, screen)  # and of it in PyTorch
        if not exported:
            _require_choices(chosen, out)  # there is nothing to report
        document = report_run(out, measured, screen)  # the table, and the front
    _print_report(document, out, as_json)
    _require_choices(chosen, out)


@app.command()
def distill(
    recipe: RecipeArg,
    out: OutOpt,
    overrides: SetOpt = None,
    workers: WorkersOpt = None,
    checkpoint_steps: Annotated[int | None, typer.Option(min=1, help="Checkpoint every so many steps, too.")] = None,
    checkpoint_minutes: Annotated[float, typer.Option(min=0, help="Checkpoint at least this often.")] = 1.0,
    keep_checkpoints: Annotated[int, typer.Option(min=1, help="Checkpoints to keep while training.")] = 2,
    as_json: JsonOpt = False,
) -> None:
    """Train a recipe's student from its teacher, and its baseline without; or, with no teacher, plain CLIP training.

    Interrupted, even by kill -9, the same command continues at the last checkpoint and ends with the same bytes.

    On many GPUs: [bold]torchrun --nproc-per-node 8 -m clipkd distill RECIPE --out RUN[/]

    Example: [bold]clipkd distill glyphs_teacher --out runs/glyphs_teacher[/]
    """
    from toolchain.pipeline.stage_inputs import How
    from toolchain.pipeline.train import train_checkpoints

    how = How(workers, checkpoint_steps, checkpoint_minutes, keep_checkpoints)
    with _run_directory(_recipe(recipe, overrides), out, shared=True) as (loaded, screen):
        checkpoints = train_checkpoints(loaded, out, screen, how)
    if how.leads:
        _print_stages(checkpoints, as_json)


@app.command()
def adopt(
    model: Annotated[
        str, typer.Argument(help="An open_clip architecture, hf-hub:ORG/NAME, or a local folder.", metavar="MODEL")
    ],
    out: OutOpt,
    pretrained: Annotated[str | None, typer.Option(help="open_clip's tag of weights for the architecture.")] = None,
    checkpoint: Annotated[Path | None, typer.Option(help="A file of weights for the architecture.")] = None,
    like: Annotated[
        str | None, typer.Option(help="A recipe whose data, quantize, export, evaluate and profile sections to take.")
    ] = None,
    overrides: SetOpt = None,
    as_json: JsonOpt = False,
) -> None:
    """Make a run of an existing model, to quantize, export, measure and report it without training.

    Example: [bold]clipkd adopt ViT-B-32 --pretrained laion2b_s34b_b79k --like mine.yaml --out runs/b32[/]
    """
    from toolchain.pipeline.stage_inputs import How
    from toolchain.pipeline.train import train_checkpoints
    from toolchain.recipe.load import adopting, load_recipe, recipe_path

    taken = None if like is None else load_recipe(recipe_path(like))
    weights = {"pretrained": pretrained, "checkpoint": None if checkpoint is None else str(checkpoint)}
    recipe = adopting(model, {key: value for key, value in weights.items() if value}, taken, overrides)
    with _run_directory(recipe, out) as (loaded, screen):
        made = train_checkpoints(loaded, out, screen, How())
    _print_stages(made, as_json)


@app.command()
def cache(recipe: RecipeArg, out: OutOpt, overrides: SetOpt = None, as_json: JsonOpt = False) -> None:
    """Run a recipe's teacher once over every stored view and caption, for distill to look its features up.

    What it saves and how many bytes it takes is said first.  Interrupted, the same command continues.

    Side by side: [bold]torchrun --nproc-per-node 8 -m clipkd cache RECIPE --out RUN[/]

    Example: [bold]clipkd cache glyphs --out runs/quickstart[/]
    """
    from toolchain.pipeline.stage_inputs import How
    from toolchain.pipeline.train import cache_teachers

    how = How()
    with _run_directory(_recipe(recipe, overrides), out, shared=True) as (loaded, screen):
        made = cache_teachers(loaded, out, screen, how)
    if how.leads:
        _print_stages(made, as_json)


@app.command()
def quantize(run: RunArg, overrides: SetOpt = None, as_json: JsonOpt = False) -> None:
    """Make the int8 student of a run.

    Example: [bold]clipkd quantize runs/quickstart --set quantize.steps=100[/]
    """
    from toolchain.pipeline.quantize import quantize_checkpoint
    from toolchain.pipeline.stage_inputs import How
    from toolchain.pipeline.train import train_checkpoints

    with _run_directory(_recipe_of(run, overrides), run) as (loaded, screen):
        checkpoints = train_checkpoints(loaded, run, screen, How())
        made = quantize_checkpoint(loaded, run, checkpoints, screen)
    if not made:
        raise UsageError(
            f"{run}: its recipe has no int8, int8-fp16 or int8-bf16 in export.precisions; nothing to quantize"
        )
    _print_stages(made, as_json)


@app.command()
def export(
    run: RunArg,
    onnx: Annotated[bool, typer.Option("--onnx", help="For ONNX Runtime.")] = False,
    openvino: Annotated[bool, typer.Option("--openvino", help="For OpenVINO.")] = False,
    trt: Annotated[
        bool, typer.Option("--trt", help="Also write TensorRT kits, and build their engines here if this can.")
    ] = False,
    build: Annotated[
        bool, typer.Option("--build/--no-build", help="Build engines here; --no-build leaves them to the device.")
    ] = True,
    precision: Annotated[
        str | None, typer.Option(help=f"Of the student, comma-separated: {', '.join(SAFEST_FIRST)}.")
    ] = None,
    auto: Annotated[
        bool | None,
        typer.Option("--auto/--no-auto", help="Of all precisions, choose for each runtime the one to ship."),
    ] = None,
    max_drop: Annotated[
        float | None,
        typer.Option(min=0, help="--auto tolerates this fraction of top-1.", show_default="quantize.max_drop, or 0.01"),
    ] = None,
    batch: Annotated[
        int | None, typer.Option(min=1, max=1, help="Fix the batch of the graphs to 1; else as the recipe says.")
    ] = None,
    uint8_input: Annotated[
        bool, typer.Option("--uint8-input", help="Also write image_uint8.onnx: a picture of any size in, features out.")
    ] = False,
    overrides: SetOpt = None,
    as_json: JsonOpt = False,
) -> None:
    """Export a run's models, each proven equal to its PyTorch model in its own runtime.

    Without flags, to what the run's recipe says; what flags say is recorded there.
    A model that fails its proof is kept beside, marked failed, and never used; the exit code is then 5.
    With --trt, exit code 3 or 4 says that the kits are written but TensorRT or a GPU is missing here.

    With --auto, each precision is also scored and timed here, in its runtime.  The one to ship is within --max-drop of
    fp32 and measurably faster than the safer ones; auto.json of the run names it, and says why not each of the others.

    The fastest that is still right: [bold]clipkd export runs/quickstart --auto --onnx --openvino[/]

    Example: [bold]clipkd export runs/quickstart --openvino --trt --no-build --precision fp32,fp16,int8,int8-fp16[/]
    """
    from export.pipeline.choose_precision import choose_precisions
    from export.pipeline.engines import build_engines
    from export.pipeline.export import export_models
    from export.pipeline.quantize import quantize_or_reject
    from toolchain.pipeline.stage_inputs import How
    from toolchain.pipeline.train import train_checkpoints
    from toolchain.recipe.export import ExportFlags, export_overrides
    from toolchain.recipe.load import load_recipe
    from toolchain.runtimes import RUNTIMES

    asked = {"onnxruntime": onnx, "openvino": openvino, "tensorrt": trt}
    flags = ExportFlags(
        runtimes=tuple(runtime.name for runtime in RUNTIMES.values() if asked.get(runtime.name)),
        precisions=None if precision is None else tuple(word.strip() for word in precision.split(",") if word.strip()),
        build_engines=build,
        auto=auto,
        max_drop=max_drop,
        batch=batch,
        uint8_input=uint8_input,
    )
    recorded = _recipe_of(run, None).export
    changes = export_overrides(recorded, flags)
    for kit in [runtime for runtime in recorded.runtimes if RUNTIMES[runtime].is_kit] if auto else []:
        stderr.print(f"{kit} is not weighed: its engines are built and measured on the device", highlight=False)
    recipe = load_recipe(run / "recipe.yaml", overrides, changes={"export": changes})
    if trt and "tensorrt" not in recipe.export.runtimes:
        raise UsageError("--trt asks for tensorrt, which --set export.runtimes leaves out; name it there too")
    with _run_directory(recipe, run) as (loaded, screen):
        checkpoints = train_checkpoints(loaded, run, screen, How())
        checkpoints |= quantize_or_reject(loaded, run, checkpoints, screen)
        exported = export_models(loaded, run, checkpoints, screen)
        chosen = choose_precisions(loaded, run, exported, {}, screen) if loaded.export.auto else None
        exported |= build_engines(loaded, run, exported, screen)
    if chosen is None:
        _print_stages(exported, as_json)
    else:
        _print_chosen(chosen, run, as_json)
    _require_choices(chosen, run)


@app.command()
def report(
    runs: RunsArg,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Where to write; one run: into it.")] = None,
    external: Annotated[
        list[Path] | None, typer.Option(help="Rows measured elsewhere: CSV or JSON (docs/report.md). Repeatable.")
    ] = None,
    against: Annotated[Path | None, typer.Option(help="An older report.json: exit 5 if anything got worse.")] = None,
    max_slower: Annotated[float, typer.Option(min=0, help="--against tolerates this, as a fraction of p50.")] = 0.05,
    max_top1_loss: Annotated[float, typer.Option(min=0, help="--against tolerates this fraction of top-1.")] = 0.005,
    as_json: JsonOpt = False,
) -> None:
    """Write the report of runs again, together if there are several, and print its table.

    Example: [bold]clipkd report runs/small runs/large --out runs/compared --external jetson.csv[/]
    """
    from toolchain.report.compare import compare
    from toolchain.report.external_rows import external_rows
    from toolchain.report.row import read_report
    from toolchain.report.write import write_report
    from toolchain.stage import run_lock

    _refuse_torchrun()
    for run in runs:
        _require_run(run)
    if len(runs) > 1 and out is None:
        raise UsageError(f"--out: {len(runs)} runs have one report together; say where to write it: --out DIR")
    folder = runs[0] if out is None else out
    older = None if against is None else read_report(against)  # before it may be written over
    elsewhere = [row for path in external or [] for row in external_rows(path)]
    with run_lock(folder) if folder in runs else nullcontext():
        document = write_report(runs, folder, elsewhere)
    if older is None:
        _print_report(document, folder, as_json)
        return
    compared = compare(older, document, max_slower=max_slower, max_top1_loss=max_top1_loss)
    _print_comparison(compared, as_json)
    if not compared.holds:
        raise GateError(f"{folder}: worse than {against} beyond what is tolerated; see the table")


@app.command()
def best(
    runs: RunsArg,
    device: Annotated[str | None, typer.Option("--device", "-d", help="Which device's rows to choose among.")] = None,
    where: Annotated[str, typer.Option(help="Conditions: 'p90_ms<=10, top1_drop_vs_teacher<=0.02'.")] = "",
    by: Annotated[str, typer.Option(help="What to be best by: a field of report.json.")] = "top1",
    external: Annotated[list[Path] | None, typer.Option(help="Rows measured elsewhere: CSV or JSON.")] = None,
    as_json: JsonOpt = False,
) -> None:
    """Choose the model to ship: the best that meets conditions, the runner-up, and why not each of the others.

    Exit code 5 if none does.

    Example: [bold]clipkd best runs/quickstart --device cpu --where 'p90_ms<=10, top1_drop_vs_teacher<=0.2' --by top1[/]
    """
    from toolchain.report.choose_model import choose_model, conditions
    from toolchain.report.collect import collect
    from toolchain.report.external_rows import external_rows

    wanted = conditions(where)
    for run in runs:
        _require_run(run)
    rows = collect(runs, [row for path in external or [] for row in external_rows(path)])["rows"]
    choice = choose_model(rows, wanted, by, device)
    if as_json:
        rejected = [{"name": row["name"], "reasons": reasons} for row, reasons in choice.rejected]
        answer = {"best": choice.best, "runner_up": choice.runner_up, "rejected": rejected, "warnings": choice.warnings}
        stdout.print_json(json.dumps(answer))
    else:
        _print_choice(choice)
    if choice.best is None:
        raise GateError(
            f"no model meets: {', '.join(map(str, wanted)) or 'what was asked'}; relax a condition, or see the reasons"
        )


@app.command()
def evaluate(
    models: Annotated[
        list[Path], typer.Argument(help="Directories: of exported models, or of checkpoints.", metavar="MODEL...")
    ],
    recipe: Annotated[
        str | None,
        typer.Option(help="A recipe whose evaluate section to take.", show_default="that of the model's run"),
    ] = None,
    overrides: SetOpt = None,
    as_json: JsonOpt = False,
) -> None:
    """Score models on evaluation sets: zero-shot accuracy and retrieval, and how each differs from the first.

    Of exported models this is the truth about what ships, in its own runtime and without torch.

    Example: [bold]clipkd evaluate runs/mine/exported/student-onnxruntime-int8 --recipe mine.yaml[/]
    """
    from export.model_folder import run_of
    from export.pipeline.measure_model import evaluate_models
    from toolchain.pipeline.stage_inputs import evaluated

    _refuse_torchrun()
    run = run_of(models[0])
    if recipe is None and run is None:
        raise UsageError(f"{models[0]}: in no run whose recipe would name the sets; name one: --recipe RECIPE")
    loaded = _recipe(recipe if recipe is not None else str(run / "recipe.yaml" if run else ""), overrides)
    spec = evaluated(loaded)
    with open_screen() as screen:
        screen.starts("evaluate")
        document = evaluate_models(models, spec, screen.progress)
    if as_json:
        stdout.print_json(json.dumps(document))
        return
    _print_evaluation(document)


@app.command()
def classes(
    model: Annotated[Path, typer.Argument(help="An exported model's directory.", metavar="MODEL")],
    labels: Annotated[Path, typer.Option(help="A file of labels, one a line.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The directory to make.")],
    templates: Annotated[
        Path | None, typer.Option(help="A file of captions, one a line, {} where the label goes; the model's own.")
    ] = None,
    as_json: JsonOpt = False,
) -> None:
    """Bake a set of labels into an exported model, so that the device needs no text tower; needs no torch.

    Example: [bold]clipkd classes runs/quickstart/exported/student-onnxruntime-int8 --labels labels.txt --out letters[/]
    """
    from export.runtime.bake_classes import bake

    _print_stages({"classes": bake(model, labels, templates, out)}, as_json)


@app.command()
def profile(
    models: Annotated[
        list[Path],
        typer.Argument(help="Directories: of exported models, or of a run's checkpoints.", metavar="MODEL..."),
    ],
    device: Annotated[
        str, typer.Option("--device", "-d", help="Where: cpu, cuda:0, gpu, npu, or a device of `clipkd devices`.")
    ] = "cpu",
    quick: Annotated[bool, typer.Option("--quick", help="3 processes of 2 s for each tower.")] = False,
    standard: Annotated[bool, typer.Option("--standard", help="5 processes of 12 s: numbers to publish.")] = False,
    processes: Annotated[int | None, typer.Option(min=1, help="Fresh processes per tower.", show_default="3")] = None,
    seconds: Annotated[
        float | None, typer.Option(min=0.01, help="Measured time per tower, shared among them.", show_default="1")
    ] = None,
    scored: Annotated[
        bool, typer.Option("--evaluate", help="Also score it on the device, on the sets of its run's recipe.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="A folder for the result and every latency measured.")
    ] = None,
    as_json: JsonOpt = False,
) -> None:
    """Measure exported models here, or on a device reached by ssh: latency, throughput, memory, and how sure we are.

    Several models take turns.  One that crashes, hangs or does not fit is a row with its reason; the others are
    measured, and the exit code is that of the first that failed.

    What another device than cpu measured of a run's model is kept in the run, in measured/MODEL/DEVICE, and used again;
    before it is timed there, it is proven to compute there what it computed in PyTorch.  A run's checkpoint
    (RUN/student) is timed in PyTorch eager, for reference, on this machine's CPU alone.

    Example: [bold]clipkd profile runs/quickstart/exported/student-onnxruntime-int8 --device orin[/]
    """
    from export.pipeline.profile_models import profile_models
    from export.profiling.protocol import QUICK, STANDARD, Effort

    _refuse_torchrun()
    own = {key: value for key, value in (("processes", processes), ("seconds", seconds)) if value is not None}
    if quick + standard + bool(own) > 1:
        raise UsageError("choose one of --quick, --standard, and --processes with --seconds: each says how long")
    effort = QUICK if quick else STANDARD if standard else Effort(**own)  # type: ignore[arg-type]  # of an int and a float
    with open_screen() as screen:
        rows, errors = profile_models(models, device, effort, scored=scored, out=out, screen=screen)
    if len(models) > 1 or not errors:
        _print_profiles(rows, as_json)
    if errors:
        raise errors[0] if len(models) == 1 else type(errors[0])("\n".join(map(str, errors)))


@app.command()
def predict(
    model: Annotated[Path, typer.Argument(help="An exported model's directory.", metavar="MODEL")],
    images: Annotated[list[Path], typer.Argument(help="Pictures.", metavar="IMAGE...")],
    labels: Annotated[str | None, typer.Option(help="Comma-separated labels in place of the model's own.")] = None,
    top: Annotated[int, typer.Option(min=1, help="Labels per picture.")] = 5,
    as_json: JsonOpt = False,
) -> None:
    """Name what is in pictures with an exported model; needs no torch.

    Example: [bold]clipkd predict runs/quickstart/exported/student-onnxruntime-int8 letter.png --labels "a cat,a dog"[/]
    """
    from export.runtime.predict import predict as rank_labels

    wanted = [label.strip() for label in labels.split(",") if label.strip()] if labels is not None else None
    if wanted == []:
        raise UsageError(f"--labels '{labels}': no label in it; write --labels 'a cat,a dog'")
    answers = rank_labels(model, images, wanted, top)
    if as_json:
        stdout.print_json(json.dumps(answers))
        return
    table = Table("image", "label", "probability")
    for answer in answers:
        for position, ranked in enumerate(answer["labels"]):
            name = escape(answer["image"]) if position == 0 else ""
            table.add_row(name, escape(ranked["label"]), f"{100 * ranked['probability']:.1f} %")
    stdout.print(table)


@app.command()
def students(
    models: Annotated[
        list[str] | None,
        typer.Argument(help="Architectures; those that clipkd knows, unless told.", metavar="[MODEL]..."),
    ] = None,
    device: Annotated[
        str, typer.Option("--device", "-d", help="Where: cpu, cuda:0, gpu, npu, or a device of `clipkd devices`.")
    ] = "cpu",
    max_ms: Annotated[float | None, typer.Option(min=0, help="Leave out what takes longer at batch 1.")] = None,
    precision: Annotated[str, typer.Option(help="Comma-separated: fp32, fp16, bf16, int8.")] = "fp32,int8",
    runtime: Annotated[
        str | None, typer.Option(help="onnxruntime or openvino.", show_default="onnxruntime; of gpu and npu, openvino")
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, show_default="the cores there are")] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Where to write students.json and students.png.")] = Path(
        "runs/students"
    ),
    as_json: JsonOpt = False,
) -> None:
    """Measure students before training any: untrained image towers, exported here and timed on a device.

    Accuracies are published ones, of the architecture as others trained it. What was measured once is kept, for each
    device; interrupted, the same command continues.

    Example: [bold]clipkd students --device orin --max-ms 10[/]
    """
    from export.devices.doctor import device_named
    from export.students.candidates import candidates
    from export.students.chart import render_students
    from export.students.measure import STUDENT_PRECISIONS, STUDENT_RUNTIMES, measure_students
    from toolchain.filesystem import write_json

    _refuse_torchrun()
    precisions = list(dict.fromkeys(part.strip() for part in precision.split(",") if part.strip()))
    for part in precisions or [""]:
        if part not in STUDENT_PRECISIONS:
            raise UsageError(f"--precision '{precision}': {part!r} is none of {', '.join(STUDENT_PRECISIONS)}")
    if runtime not in (None, *STUDENT_RUNTIMES):
        raise UsageError(f"--runtime {runtime}: expected one of {', '.join(STUDENT_RUNTIMES)}")
    where = device_named(device)
    with open_screen() as screen:
        screen.starts("students")
        rows = measure_students(
            candidates(models or []),
            precisions,
            device=where,
            runtime=runtime,
            threads=threads,
            progress=screen.progress,
        )
    failed = [row for row in rows if row["status"] != "ok"]
    fit = [row for row in rows if row["status"] == "ok" and (max_ms is None or row["p50_ms"] <= max_ms)]
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "students.json", fit + failed)
    (out / "students.png").write_bytes(render_students(fit))
    if as_json:
        stdout.print_json(json.dumps(fit + failed))
    else:
        _print_students(fit, failed)
        stderr.print(str(out / "students.png"), soft_wrap=True, highlight=False, markup=False)
    if len(failed) == len(rows):
        raise ClipkdError(f"no candidate could be measured on {device}: {failed[0]['status']}")
    if not fit:
        raise GateError(f"no candidate takes at most {max_ms:g} ms on {device}")


data_app = typer.Typer(
    no_args_is_help=True,
    help="Look at training data, or pack it into shards.\n\nExample: [bold]clipkd data inspect glyphs[/]",
)
app.add_typer(data_app, name="data")

SourceArg = Annotated[
    str, typer.Argument(help="A recipe, for its data; or, with --kind, a path or pattern.", metavar="SOURCE")
]
KindOpt = Annotated[
    str | None, typer.Option("--kind", help="What a path is: webdataset or image_folder. Never guessed.")
]


@data_app.command("inspect")
def inspect_data(
    source: SourceArg,
    kind: KindOpt = None,
    sample: Annotated[int | None, typer.Option(min=1, help="Read only so many samples, chosen by chance.")] = None,
    sheet: Annotated[Path | None, typer.Option(help="Write a PNG of some of the pictures here.")] = None,
    as_json: JsonOpt = False,
) -> None:
    """Say what training data holds: numbers, sizes, caption lengths, duplicates, and what is broken; needs no torch.

    Example: [bold]clipkd data inspect "data/cc3m/{00000..00331}.tar" --kind webdataset --sheet cc3m.png[/]
    """
    from toolchain.data.inspection import inspect
    from toolchain.data.open import source_spec

    spec = source_spec(source, kind)
    with open_screen() as screen:
        screen.starts("inspect")
        document = inspect(spec, sample=sample, sheet=sheet, progress=screen.progress)
    if as_json:
        stdout.print_json(json.dumps({"source": source, **document}))
        return
    _print_inspection(document)


@data_app.command("pack")
def pack_data(
    source: SourceArg,
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder of the shards.")],
    kind: KindOpt = None,
    samples_per_shard: Annotated[int, typer.Option(min=1, help="Samples in each shard but the last.")] = 10_000,
    as_json: JsonOpt = False,
) -> None:
    """Write training data as webdataset shards with an index: pictures as they are, without what is damaged.

    Interrupted, even by kill -9, the same command continues and ends with the same bytes.

    Example: [bold]clipkd data pack my.yaml --out data/mine[/]
    """
    from toolchain.data.open import source_spec
    from toolchain.data.packing import INDEX, pack

    spec = source_spec(source, kind)
    with open_screen() as screen:
        screen.starts("pack")
        index = pack(spec, out, samples_per_shard=samples_per_shard, progress=screen.progress)
    for reason, found in index["left_out"].items():
        examples = "\n  ".join(found["examples"])
        stderr.print(
            f"left out {found['count']:,}: {reason}\n  {examples}", markup=False, highlight=False, soft_wrap=True
        )
    if as_json:
        stdout.print_json(json.dumps({"path": str(out), **index}))
        return
    shards, samples = len(index["shards"]), index["samples"]
    stderr.print(f"{samples:,} samples in {shards:,} shard(s), {index['bytes'] / 1e6:,.1f} MB", highlight=False)
    stdout.print(str(out / INDEX), soft_wrap=True, highlight=False, markup=False)


devices_app = typer.Typer(
    no_args_is_help=True,
    help="Machines to measure on: this one, and any that ssh reaches.\n\nExample: [bold]clipkd devices list[/]",
)
app.add_typer(devices_app, name="devices")

DeviceArg = Annotated[str, typer.Argument(help="The device's name.", metavar="NAME")]


@devices_app.command("list")
def list_devices(
    presets: Annotated[bool, typer.Option("--presets", help="Say what common boards support instead.")] = False,
    as_json: JsonOpt = False,
) -> None:
    """List the devices of this machine and those added, or what is known of common boards.

    Example: [bold]clipkd devices list --presets[/]
    """
    from export.devices.presets import PRESETS
    from export.devices.registry import read_devices

    if presets:
        if as_json:
            stdout.print_json(json.dumps({name: asdict(preset) for name, preset in PRESETS.items()}))
            return
        table = Table(Column("preset", no_wrap=True), "board", "runtimes", "TensorRT", "precisions", "notes")
        for name, preset in PRESETS.items():
            cells = (preset.title, ", ".join(preset.runtimes), preset.tensorrt or "-", ", ".join(preset.precisions))
            table.add_row(name, *map(escape, (*cells, preset.notes)))
        print_table(table)
        return
    from export.devices.doctor import local_devices

    known = read_devices()
    here = local_devices()
    if as_json:
        stdout.print_json(json.dumps({"local": here, "remote": [asdict(device) for device in known.values()]}))
        return
    table = Table("device", "where", "what")
    for found in here:
        table.add_row(found["name"], "here", escape(found["what"]))
    for device in known.values():
        table.add_row(device.name, escape(device.destination), escape(device.preset or "-"))
    print_table(table)


@devices_app.command("add")
def add_device(
    name: DeviceArg,
    destination: Annotated[str, typer.Argument(help="As ssh takes it: HOST or USER@HOST.", metavar="DESTINATION")],
    port: Annotated[int | None, typer.Option(min=1, max=65535, show_default="as ssh's configuration says")] = None,
    python: Annotated[
        str, typer.Option(help="The device's Python, 3.8 or newer, with numpy and a runtime.")
    ] = "python3",
    preset: Annotated[str | None, typer.Option(help="What board it is: see `clipkd devices list --presets`.")] = None,
    workdir: Annotated[str | None, typer.Option(help="Its folder for clipkd.", show_default="in ~/.cache")] = None,
    replace: Annotated[bool, typer.Option("--replace", help="Even if there is one of this name.")] = False,
    as_json: JsonOpt = False,
) -> None:
    """Name a machine that ssh reaches, with the keys, jump hosts and known hosts of your own ssh configuration.

    Example: [bold]clipkd devices add orin me@orin.local --preset jetson-orin-nano[/]
    """
    from export.devices.presets import PRESETS
    from export.devices.registry import Device, config_file
    from export.devices.registry import add_device as keep

    device = Device(name, destination, port, python, preset, workdir)
    keep(device, replace=replace)
    if preset is not None:
        stderr.print(PRESETS[preset].notes, highlight=False, markup=False, soft_wrap=True)
    stderr.print(f"Try it with: clipkd devices test {name}", highlight=False, markup=False, soft_wrap=True)
    if as_json:
        stdout.print_json(json.dumps(asdict(device)))
    else:
        stdout.print(str(config_file()), soft_wrap=True, highlight=False, markup=False)


@devices_app.command("test")
def try_device(name: DeviceArg, as_json: JsonOpt = False) -> None:
    """Connect to a device and find out what it can do, by doing it.

    Example: [bold]clipkd devices test orin[/]
    """
    from export.devices.doctor import examine, problem
    from export.devices.registry import find_device

    document = examine(find_device(name))
    _print_capabilities(document, as_json)
    if lacking := problem(document["rows"]):
        raise lacking


@devices_app.command("remove")
def remove_device(name: DeviceArg, as_json: JsonOpt = False) -> None:
    """Forget a device; nothing on it is touched.

    Example: [bold]clipkd devices remove orin[/]
    """
    from export.devices.registry import remove_device as forget

    forget(name)
    if as_json:
        stdout.print_json(json.dumps({"removed": name}))
    else:
        stdout.print(name, highlight=False, markup=False)


@app.command()
def doctor(
    recipe: Annotated[str | None, typer.Argument(help="A recipe: what it needs is marked.", metavar="[RECIPE]")] = None,
    device: Annotated[str | None, typer.Option("--device", "-d", help="cpu, cuda:0, gpu, npu, or one added.")] = None,
    as_json: JsonOpt = False,
) -> None:
    """Find out what this machine, and a device, can do, by doing it; say what mends what cannot be done.

    Exit code 0 if all that the recipe and the device need is there.  Nothing is downloaded.

    Example: [bold]clipkd doctor glyphs --device orin[/]
    """
    from export.devices.doctor import device_named, diagnose, problem

    loaded = None if recipe is None else _recipe(recipe, None)
    where = None if device is None else device_named(device)
    with open_screen() as screen:
        screen.starts("doctor")
        document = diagnose(loaded, where, progress=screen.progress)
    _print_capabilities(document, as_json)
    if lacking := problem(document["rows"]):
        raise lacking


recipes_app = typer.Typer(invoke_without_command=True)
app.add_typer(recipes_app, name="recipes")


@recipes_app.callback()
def recipes(context: typer.Context, as_json: JsonOpt = False) -> None:
    """List the recipes that ship; copy one to edit.

    Example: [bold]clipkd recipes[/]
    """
    if context.invoked_subcommand is not None:
        return
    from toolchain.recipe.load import shipped_recipes
    from toolchain.recipe.model_names import SHIPPED

    described = {name: (SHIPPED / f"{name}.yaml").read_text(encoding="utf-8") for name in shipped_recipes()}
    headlines = {name: text.split("\n#\n")[0].replace("\n", " ").replace("# ", "") for name, text in described.items()}
    if as_json:
        stdout.print_json(json.dumps(headlines))
        return
    table = Table(Column("recipe", no_wrap=True), "what it does")
    for name, headline in headlines.items():
        table.add_row(name, escape(headline))
    print_table(table)


@recipes_app.command("copy")
def copy_recipe(
    name: Annotated[str, typer.Argument(help="A recipe that ships.")],
    file: Annotated[Path, typer.Argument(help="Where to write it.")],
) -> None:
    """Copy a recipe that ships to a file of yours.

    Example: [bold]clipkd recipes copy glyphs my.yaml[/]
    """
    from toolchain.recipe.load import recipe_path

    if file.exists():
        raise UsageError(f"{file}: exists already; choose another name")
    file.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(recipe_path(name), file)
    stdout.print(str(file), soft_wrap=True, highlight=False)


@app.command()
def show(
    recipe: RecipeArg,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="A run directory: say what of it is done.")] = None,
    overrides: SetOpt = None,
    as_json: JsonOpt = False,
) -> None:
    """Print a recipe as clipkd understands it, the stages it asks for, and which of them a run has: the dry run.

    Example: [bold]clipkd show glyphs --out runs/quickstart[/]
    """
    import yaml

    from export.pipeline.plan import stage_paths
    from toolchain.recipe.load import load_recipe, recipe_path

    loaded = load_recipe(recipe_path(recipe), overrides)
    stages = [{"stage": path, "state": _state(out / path) if out else "not made"} for path in stage_paths(loaded)]
    if as_json:
        stdout.print_json(json.dumps({"recipe": loaded.model_dump(mode="json"), "stages": stages}))
        return
    stdout.print(yaml.safe_dump(loaded.model_dump(mode="json"), sort_keys=False), markup=False, highlight=False, end="")
    for stage in stages:
        stdout.print(f"# {stage['stage']}: {stage['state']}", markup=False, highlight=False, soft_wrap=True)


@app.command()
def verify(
    directories: Annotated[list[Path], typer.Argument(help="Stages or runs.", metavar="DIR...")],
    as_json: JsonOpt = False,
) -> None:
    """Check every file of stages or runs against the hash recorded when it was made.

    Example: [bold]clipkd verify runs/quickstart[/]
    """
    from toolchain.stage import MANIFEST, open_stage

    checked: dict[str, str] = {}
    for directory in directories:
        stages = [directory] if (directory / MANIFEST).exists() else sorted(p.parent for p in directory.rglob(MANIFEST))
        if not stages:
            raise UsageError(f"{directory}: no clipkd stage in it; expected a run, or a directory with {MANIFEST}")
        checked |= {str(path): open_stage(path).digest for path in stages if not path.name.startswith(".")}
    if as_json:
        stdout.print_json(json.dumps(checked))
        return
    for path in checked:
        stdout.print(f"ok {path}", markup=False, highlight=False, soft_wrap=True)


def _state(path: Path) -> str:
    from toolchain.filesystem import partial_path
    from toolchain.stage import open_stage

    if path.exists():
        open_stage(path)
        return "made"
    partial = partial_path(path)
    if (partial / "failed.json").exists():
        return "failed"
    return "interrupted" if partial.exists() else "not made"


@contextmanager
def _run_directory(recipe: "Recipe", out: Path, *, shared: bool = False) -> "Iterator[tuple[Recipe, TerminalScreen]]":
    """Hold a run directory with its recipe resolved into it.

    `shared`: several processes may work in it, of which the first holds it.
    """
    import yaml
    from rich.progress import Progress

    from toolchain.filesystem import replacing
    from toolchain.pipeline.stage_inputs import How
    from toolchain.stage import RESOLVED, run_lock

    if not shared:
        _refuse_torchrun()
    if not How().leads:
        yield recipe, TerminalScreen(Progress(disable=True), silent=True)
        return
    with run_lock(out):
        said = "".join(f"# {line}\n" for line in [*f"clipkd {shlex.join(sys.argv[1:])}".splitlines(), RESOLVED])
        resolved = said + yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False)
        with replacing(out / "recipe.yaml") as partial:
            partial.write_text(resolved, encoding="utf-8")
        with open_screen() as screen:
            yield recipe, screen


def _recipe(name: str, overrides: list[str] | None) -> "Recipe":
    from toolchain.recipe.load import load_recipe, recipe_path

    return load_recipe(recipe_path(name), overrides)


def _recipe_of(run: Path, overrides: list[str] | None) -> "Recipe":
    from toolchain.recipe.load import load_recipe

    _require_run(run)
    return load_recipe(run / "recipe.yaml", overrides)


def _refuse_torchrun() -> None:
    from toolchain.pipeline.stage_inputs import How

    if How().size > 1:
        raise UsageError("only clipkd distill runs under torchrun; start this command by itself")


def _require_run(run: Path) -> None:
    if not (run / "recipe.yaml").is_file():
        problem = "no recipe.yaml in it; not a clipkd run" if run.is_dir() else "no such run directory"
        raise UsageError(f"{run}: {problem}. Make one with: clipkd run glyphs --out {run}")


def _print_stages(stages: "dict[str, Stage]", as_json: bool) -> None:
    if as_json:
        stdout.print_json(
            json.dumps({name: {"path": str(s.path), **s.manifest["summary"]} for name, s in stages.items()})
        )
        return
    for stage in stages.values():
        stdout.print(str(stage.path), soft_wrap=True, highlight=False, markup=False)


def _print_report(document: dict[str, Any], out: Path, as_json: bool) -> None:
    if as_json:
        stdout.print_json(json.dumps(document))
        return
    from toolchain.report.tables import terminal_rows

    headers, rows = terminal_rows(document)
    if len({row["runtime"] for row in document["rows"]}) == 1:  # then the names, which end in the precision, say it all
        kept = [index for index, header in enumerate(headers) if header not in ("runtime", "precision")]
        headers, rows = [headers[index] for index in kept], [[row[index] for index in kept] for row in rows]
    table = Table(*(Column(header, overflow="fold") for header in headers))
    for row in rows:
        table.add_row(*(escape(cell) for cell in row))
    print_table(table)
    stderr.print(f"{out / 'report.html'}", soft_wrap=True, highlight=False, markup=False)


def _print_comparison(compared: "Comparison", as_json: bool) -> None:
    if as_json:
        stdout.print_json(json.dumps(asdict(compared) | {"holds": compared.holds}))
        return
    table = Table("name", "p50 new / old", "top-1 change", "worse")
    for change in compared.changes:
        ratio = "-" if change.p50_ratio is None else f"{change.p50_ratio:.3f}"
        if change.p50_ratio is not None and not change.is_told_apart:
            ratio += " (may be chance)"
        points = "-" if change.top1_change is None else f"{100 * change.top1_change:+.1f} pp"
        table.add_row(escape(change.name), ratio, points, escape("; ".join(change.worse)))
    for name in compared.only_old:
        table.add_row(escape(name), "-", "-", "gone")
    for name in compared.only_new:
        table.add_row(escape(name), "-", "-", "(new)")
    print_table(table)


def _print_choice(choice: "Choice") -> None:
    for title, row in (("best", choice.best), ("runner-up", choice.runner_up)):
        if row is not None:
            facts = [f"top-1 {100 * row['top1']:.1f} %"] if row["top1"] is not None else []
            facts += [f"p50 {row['p50_ms']:.3g} ms"] if row["p50_ms"] is not None else []
            facts += [f"{row['size_bytes'] / 1e6:.3g} MB"] if row["size_bytes"] else []
            place = f"{row['run']}/exported/{row['model']}" if row["run"] else str(row["source"])
            stdout.print(
                f"{title}: {row['name']} ({', '.join(facts)})  {place}", soft_wrap=True, highlight=False, markup=False
            )
    for warning in choice.warnings:
        stderr.print(f"warning: {warning}", soft_wrap=True, highlight=False, markup=False)
    if choice.rejected:
        table = Table("rejected", "why")
        for row, reasons in choice.rejected:
            table.add_row(escape(str(row["name"])), escape("; ".join(reasons)))
        print_table(table)


def _print_chosen(document: Mapping[str, Any], run: Path, as_json: bool) -> None:
    if as_json:
        stdout.print_json(json.dumps(document))
        return
    table = Table(
        "runtime", "precision", "verdict", "top-1 drop, pp", "p50 ms", "grade", Column("why", overflow="fold")
    )
    for runtime, found in document["runtimes"].items():
        shipped = f"{found['precision']}  {run / found['model']}" if found["model"] else "nothing to ship"
        stdout.print(f"{runtime}: {shipped}", soft_wrap=True, highlight=False, markup=False)
        for row in found["candidates"]:
            drop, p50_ms = row["top1_drop_vs_fp32"], row["p50_ms"]
            around = [100 * row[f"top1_drop_vs_fp32_{end}"] for end in ("low", "high")] if drop is not None else []
            lost = "-" if drop is None else f"{100 * drop:.2f} [{around[0]:.2f}, {around[1]:.2f}]"
            took = "-" if p50_ms is None else f"{p50_ms:.4g} [{row['p50_low_ms']:.4g}, {row['p50_high_ms']:.4g}]"
            grade = " ".join(filter(None, [row["grade"] or "-", ", ".join(row["flags"])]))
            table.add_row(runtime, row["precision"], row["verdict"], lost, took, grade, escape(row["reason"]))
        for warning in found["warnings"]:
            stderr.print(f"warning: {runtime}: {warning}", soft_wrap=True, highlight=False, markup=False)
    print_table(table)


def _require_choices(document: Mapping[str, Any] | None, run: Path) -> None:
    """Raises: GateError for a runtime in which not even fp32 can be shipped."""
    runtimes = document["runtimes"].items() if document is not None else ()
    without = [runtime for runtime, found in runtimes if found["model"] is None]
    if without:
        raise GateError(f"{run / 'auto.json'}: nothing to ship for {', '.join(without)}, not even fp32; it says why")


def _print_evaluation(document: dict[str, Any]) -> None:
    headers = ["model", "set", "n", "top-1 %", "top-5 %", "text to image R@1 %", "drop from the first, pp", "p"]
    table = Table(*(Column(header, overflow="fold") for header in headers))
    for scored in document["models"]:
        for name, scores in scored["sets"].items():
            recalls = [value for key, value in scores.get("retrieval", {}).items() if key.endswith("_to_image_r1")]
            lost = scored.get("against_first", {}).get(name)
            cells = [
                f"{100 * scores['top1']:.1f} [{100 * scores['top1_low']:.1f}, {100 * scores['top1_high']:.1f}]",
                f"{100 * scores['top5']:.1f}",
                f"{100 * recalls[0]:.1f}" if recalls else "-",
                f"{100 * lost['drop']:.1f} [{100 * lost['low']:.1f}, {100 * lost['high']:.1f}]" if lost else "-",
                f"{lost['p']:.2g}" if lost else "-",
            ]
            table.add_row(escape(scored["model"]), escape(name), f"{scores['n']:,}", *cells)
    print_table(table)
    for name, scores in document["models"][0]["sets"].items():  # of every model the same pictures
        if "unreadable" in scores:
            first = ", ".join(scores["unreadable"]["first"])
            said = f"{name}: {scores['unreadable']['n']} unreadable picture(s) counted as wrong: {first}"
            stderr.print(said, highlight=False, markup=False, soft_wrap=True)


def _print_profiles(rows: list[dict[str, Any]], as_json: bool) -> None:
    if as_json:
        stdout.print_json(json.dumps(rows))
        return
    from export.profiling.table import table

    headers, cells = table(rows)
    shown = Table(*(Column(header, overflow="fold", no_wrap=header.startswith("p50")) for header in headers))
    for row in cells:
        shown.add_row(*map(escape, row))
    print_table(shown)
    to_lock = dict.fromkeys(command for row in rows for command in row.get("to_lock_clocks", ()))
    if to_lock:
        said = "\n".join(("Clocks float, so no grade is A. What would lock them, which clipkd never does:", *to_lock))
        stderr.print(said, soft_wrap=True, highlight=False, markup=False)


def _print_capabilities(document: dict[str, Any], as_json: bool) -> None:
    if as_json:
        stdout.print_json(json.dumps(document))
        return
    table = Table("", Column("capability", no_wrap=True), "where", "status", Column("detail", overflow="fold"))
    for row in document["rows"]:
        mend = f"\n-> {row['mend']}" if row["mend"] else ""
        needed = "needed" if row["needed"] else ""
        table.add_row(needed, row["capability"], escape(row["where"]), row["status"], escape(row["detail"] + mend))
    print_table(table)
    machine = document.get("machine")
    if machine is not None:
        quota = f", quota {machine['cpu_quota']:g} cores" if machine["cpu_quota"] else ""
        limit = machine["memory_limit_bytes"]
        memory = f"{machine['memory_bytes'] / 1e9:.1f} GB" + (f", limit {limit / 1e9:.1f} GB" if limit else "")
        lines = [
            f"{machine['name']}{quota}; {' '.join(machine['isa'])}; governor {machine['governor'] or 'unknown'}",
            f"memory {memory}; free: {machine['disk_free_bytes'] / 1e9:.1f} GB here, "
            f"{machine['home_free_bytes'] / 1e9:.1f} GB at home; {machine['os']}; Python {machine['python']}",
        ]
        stdout.print("\n".join(lines), highlight=False, markup=False, soft_wrap=True)


def _print_inspection(document: dict[str, Any]) -> None:
    """What was counted, how what was measured is spread, and what is broken, in three tables."""
    counted = Table(Column("of the source"), Column("", justify="right"))
    sampled = document["sampled"]
    counted.add_row("samples", f"{document['samples']:,}")
    if sampled is not None:
        counted.add_row("  of these read, chosen by chance; what follows is of them", f"{sampled:,}")
    counted.add_row("good", f"{document['good']:,}")
    for kind, number in document["formats"].items():
        counted.add_row(f"  {kind}", f"{number:,}")
    counted.add_row("captions", f"{document['captions']:,}")
    if document["captions_cut"] is not None:
        counted.add_row("  longer than CLIP reads (77 tokens)", f"{document['captions_cut']:,}")
    counted.add_row("pictures that occurred before", f"{document['same_pictures']['count']:,}")
    counted.add_row("captions that occurred before", f"{document['same_captions']['count']:,}")
    counted.add_row("bytes of pictures", f"{document['picture_bytes'].get('sum', 0):,}")
    print_table(counted)
    measured = {
        "width, px": document["width"],
        "height, px": document["height"],
        "bytes": {share: value for share, value in document["picture_bytes"].items() if share != "sum"},
        "captions a sample": document["captions_per_sample"],
        f"caption, {document['caption_length']['unit']}": {
            share: value for share, value in document["caption_length"].items() if share != "unit"
        },
    }
    if document["good"]:
        shares = [f"{100 * float(share):g} %" for share in document["width"]]
        spread = Table("share of all at most", *(Column(share, justify="right") for share in shares))
        for name, found in measured.items():
            spread.add_row(name, *(f"{value:,}" for value in found.values()))
        print_table(spread)
    if document["broken"]:
        broken = Table("broken", Column("samples", justify="right"), "the first of them")
        for reason, damage in document["broken"].items():
            broken.add_row(reason, f"{damage['count']:,}", escape("\n".join(damage["examples"])))
        print_table(broken)
    if document["sheet"]:
        stdout.print(document["sheet"], soft_wrap=True, highlight=False, markup=False)


def _print_students(fit: list[dict[str, Any]], failed: list[dict[str, Any]]) -> None:
    numbers = ("p50 ms", "95 %", "params M", "GMACs", "MB", "top-1 %")
    headers = [Column("student", no_wrap=True), Column("")]
    headers += [Column(name, justify="right", no_wrap=True) for name in numbers]
    table = Table(*headers, Column("grade", overflow="fold"), padding=(0, 0, 0, 1))  # fits into 100 columns
    sources = list(dict.fromkeys(row["source"] for row in fit if row["source"]))
    for row in fit:
        top1 = "" if row["published_fp32_top1"] is None else f"{100 * row['published_fp32_top1']:.1f}"
        if top1:
            top1 = f"{top1 if row['precision'] == 'fp32' else f'({top1})'} [{sources.index(row['source']) + 1}]"
        shown = {
            "params_image": f"{row['params_image'] / 1e6:.2f}",
            "gmacs": f"{row['gmacs']:.2f}",
            "published_fp32_top1": top1,
        }
        worth = {field: text + (" ★" if field in row["front"] else "  ") for field, text in shown.items()}
        cells = [f"{row['p50_ms']:.3g}", f"{row['p50_low_ms']:.3g}-{row['p50_high_ms']:.3g}"]
        cells += [worth["params_image"], worth["gmacs"], f"{row['size_bytes'] / 1e6:.3g}", worth["published_fp32_top1"]]
        table.add_row(
            escape(row["name"]), row["precision"], *map(escape, cells), " ".join([row["grade"], *row["flags"]])
        )
    if fit:
        print_table(table)
        lines = [
            f"on {fit[0]['device']}, {fit[0]['runtime']}, {fit[0]['threads']} thread(s), batch 1, image towers alone",
            "★ no row of the same precision has as much of it in as little time",
        ]
        if sources:
            lines.append(
                "top-1: ImageNet zero-shot, as published for the float model; in brackets: it is not this row's own"
            )
        lines += [f"[{number}] {source}" for number, source in enumerate(sources, 1)]
        stdout.print("\n".join(lines), soft_wrap=True, highlight=False, markup=False)
    for row in failed:
        problem = f"{row['name']} {row['precision']} could not be measured: {row['status']}"
        stderr.print(problem, soft_wrap=True, highlight=False, markup=False)


def main() -> NoReturn:
    """The `clipkd` command: one place where errors become messages and exit codes."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: sys.exit(130))
    try:
        if problem := _foreign_package():
            raise UsageError(problem)
        app()
    except ClipkdError as error:
        _exit(error)
    except ModuleNotFoundError as error:
        extra = _EXTRAS.get((error.name or "").partition(".")[0])
        if extra is None:
            raise
        _exit(MissingDependency(f"this command needs {error.name}: pip install 'clipkd[{extra}]'"))
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        _exit(ClipkdError(f"the disk is full ({error}). Nothing finished is lost; free space and repeat the command"))
    sys.exit(0)


def _exit(error: ClipkdError) -> NoReturn:
    stderr.print(f"error: {error}", soft_wrap=True, highlight=False, markup=False)
    sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
