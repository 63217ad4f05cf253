"""The command line: the only module that parses arguments or exits.

`run` is the map of the system.  Commands such as distill, quantize and export run one step of it.
Heavy packages are imported inside the functions that need them, so that help and cached runs start at once.
"""

import errno
import importlib.util
import shlex
import shutil
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer


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
    from toolchain import torchrun
    from toolchain.errors import ClipkdError, GateError, MissingDependency, UsageError
    from toolchain.precisions import SAFEST_FIRST
    from toolchain.terminal import TerminalScreen, open_screen, print_line, print_note, print_result
    from toolchain.text_table import Note, TextTable
except ImportError:  # somebody else's toolchain, which `main` would refuse
    sys.stderr.write(f"error: {_foreign_package()}\n")
    sys.exit(2)

if TYPE_CHECKING:
    from toolchain.recipe.recipe import Recipe
    from toolchain.report.row import Report
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
    from export.pipeline.choose_precision import choose_precisions, require_choices, without_failed
    from export.pipeline.export import export_models
    from export.pipeline.measure import measure_models, measure_references, require_references
    from export.pipeline.quantize_or_reject import quantize_or_reject
    from export.pipeline.report import report_run
    from toolchain.distillation.training_options import TrainingOptions
    from toolchain.pipeline.stage_inputs import require_evaluation
    from toolchain.pipeline.train import train_checkpoints

    with _run_directory(_recipe(recipe, overrides), out) as (loaded, screen):
        require_evaluation(loaded)  # before hours of training
        require_references(loaded)
        checkpoints = train_checkpoints(loaded, out, screen, TrainingOptions(workers))  # teacher, baseline, student
        checkpoints |= quantize_or_reject(loaded, out, checkpoints, screen)  # student-int8
        exported = export_models(loaded, out, checkpoints, screen)  # graphs that passed parity
        chosen = choose_precisions(loaded, out, exported, {}, screen) if loaded.export.auto else None
        sound = exported if chosen is None else without_failed(exported, chosen)
        measured = measure_models(loaded, out, sound, screen)  # accuracy and latency of what ships
        measured |= measure_references(loaded, out, checkpoints, exported, screen)  # and of it in PyTorch
        if not exported:
            require_choices(chosen, out)  # there is nothing to report
        document = report_run(out, screen)  # the table, and the front
    _print_report(document, out, as_json)
    require_choices(chosen, out)


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
    from toolchain.distillation.training_options import TrainingOptions
    from toolchain.pipeline.train import train_checkpoints

    options = TrainingOptions(workers, checkpoint_steps, checkpoint_minutes, keep_checkpoints)
    with _run_directory(_recipe(recipe, overrides), out, shared=True) as (loaded, screen):
        checkpoints = train_checkpoints(loaded, out, screen, options)
    if torchrun.leads():
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
    from toolchain.pipeline.train import train_checkpoints
    from toolchain.recipe.load import adopting, load_recipe, recipe_path

    taken = None if like is None else load_recipe(recipe_path(like))
    weights = {"pretrained": pretrained, "checkpoint": None if checkpoint is None else str(checkpoint)}
    recipe = adopting(model, {key: value for key, value in weights.items() if value}, taken, overrides)
    with _run_directory(recipe, out) as (loaded, screen):
        made = train_checkpoints(loaded, out, screen)
    _print_stages(made, as_json)


@app.command()
def cache(recipe: RecipeArg, out: OutOpt, overrides: SetOpt = None, as_json: JsonOpt = False) -> None:
    """Run a recipe's teacher once over every stored view and caption, for distill to look its features up.

    What it saves and how many bytes it takes is said first.  Interrupted, the same command continues.

    Side by side: [bold]torchrun --nproc-per-node 8 -m clipkd cache RECIPE --out RUN[/]

    Example: [bold]clipkd cache glyphs --out runs/quickstart[/]
    """
    from toolchain.pipeline.train import cache_teachers

    with _run_directory(_recipe(recipe, overrides), out, shared=True) as (loaded, screen):
        made = cache_teachers(loaded, out, screen)
    if torchrun.leads():
        _print_stages(made, as_json)


@app.command()
def quantize(run: RunArg, overrides: SetOpt = None, as_json: JsonOpt = False) -> None:
    """Make the int8 student of a run.

    Example: [bold]clipkd quantize runs/quickstart --set quantize.steps=100[/]
    """
    from toolchain.pipeline.quantize import quantize_checkpoint
    from toolchain.pipeline.run_directory import run_recipe
    from toolchain.pipeline.train import train_checkpoints

    with _run_directory(run_recipe(run, overrides), run) as (loaded, screen):
        checkpoints = train_checkpoints(loaded, run, screen)
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
    from export.pipeline.choices_table import describe_choices
    from export.pipeline.choose_precision import choose_precisions, require_choices
    from export.pipeline.engines import build_engines
    from export.pipeline.export import export_models
    from export.pipeline.quantize_or_reject import quantize_or_reject
    from toolchain.pipeline.run_directory import run_recipe
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
    recorded = run_recipe(run).export
    changes = export_overrides(recorded, flags)
    for kit in [runtime for runtime in recorded.runtimes if RUNTIMES[runtime].is_kit] if auto else []:
        print_note(f"{kit} is not weighed: its engines are built and measured on the device")
    recipe = load_recipe(run / "recipe.yaml", overrides, changes={"export": changes})
    if trt and "tensorrt" not in recipe.export.runtimes:
        raise UsageError("--trt asks for tensorrt, which --set export.runtimes leaves out; name it there too")
    with _run_directory(recipe, run) as (loaded, screen):
        checkpoints = train_checkpoints(loaded, run, screen)
        checkpoints |= quantize_or_reject(loaded, run, checkpoints, screen)
        exported = export_models(loaded, run, checkpoints, screen)
        chosen = choose_precisions(loaded, run, exported, {}, screen) if loaded.export.auto else None
        exported |= build_engines(loaded, run, exported, screen)
    if chosen is None:
        _print_stages(exported, as_json)
    else:
        print_result(chosen, as_json, *describe_choices(chosen, run))
    require_choices(chosen, run)


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
    from toolchain.pipeline.run_directory import require_run
    from toolchain.report.compare import compare, comparison_table
    from toolchain.report.external_rows import external_rows
    from toolchain.report.row import read_report
    from toolchain.report.write import write_report
    from toolchain.stage import run_lock

    _refuse_torchrun()
    for run in runs:
        require_run(run)
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
    print_result(asdict(compared) | {"holds": compared.holds}, as_json, comparison_table(compared))
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
    from toolchain.pipeline.run_directory import require_run
    from toolchain.report.choose_model import choice_lines, choose_model, conditions, rejected_table
    from toolchain.report.collect import collect
    from toolchain.report.external_rows import external_rows

    wanted = conditions(where)
    for run in runs:
        require_run(run)
    rows = collect(runs, [row for path in external or [] for row in external_rows(path)])["rows"]
    choice = choose_model(rows, wanted, by, device)
    rejected = [{"name": row["name"], "reasons": reasons} for row, reasons in choice.rejected]
    answer = {"best": choice.best, "runner_up": choice.runner_up, "rejected": rejected, "warnings": choice.warnings}
    warnings = [Note(f"warning: {warning}") for warning in choice.warnings]
    tables = [rejected_table(choice)] if rejected else []
    print_result(answer, as_json, *choice_lines(choice), *warnings, *tables)
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
    from toolchain.evaluation.table import evaluation_table, unreadable_images
    from toolchain.pipeline.stage_inputs import require_evaluation

    _refuse_torchrun()
    run = run_of(models[0])
    if recipe is None and run is None:
        raise UsageError(f"{models[0]}: in no run whose recipe would name the sets; name one: --recipe RECIPE")
    loaded = _recipe(recipe if recipe is not None else str(run / "recipe.yaml" if run else ""), overrides)
    spec = require_evaluation(loaded)
    with open_screen() as screen:
        screen.starts("evaluate")
        document = evaluate_models(models, spec, screen.progress)
    print_result(document, as_json, evaluation_table(document), *unreadable_images(document))


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
    from export.profiling.table import clocks_note, profiles_table

    _refuse_torchrun()
    own = {key: value for key, value in (("processes", processes), ("seconds", seconds)) if value is not None}
    if quick + standard + bool(own) > 1:
        raise UsageError("choose one of --quick, --standard, and --processes with --seconds: each says how long")
    effort = QUICK if quick else STANDARD if standard else Effort(**own)  # type: ignore[arg-type]  # of an int and a float
    with open_screen() as screen:
        rows, errors = profile_models(models, device, effort, scored=scored, out=out, screen=screen)
    if len(models) > 1 or not errors:
        print_result(rows, as_json, profiles_table(rows), *clocks_note(rows))
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
    rows = [
        ["" if position else answer["image"], ranked["label"], f"{100 * ranked['probability']:.1f} %"]
        for answer in answers
        for position, ranked in enumerate(answer["labels"])
    ]
    print_result(answers, as_json, TextTable(["image", "label", "probability"], rows))


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
    from export.students.choose import choose_students, parse_precisions, require_runtime
    from export.students.table import students_table

    _refuse_torchrun()
    precisions = parse_precisions(precision)
    require_runtime(runtime)
    where = device_named(device)
    with open_screen() as screen:
        screen.starts("students")
        found = choose_students(
            candidates(models or []),
            precisions,
            device=where,
            runtime=runtime,
            threads=threads,
            max_ms=max_ms,
            out=out,
            progress=screen.progress,
        )
    tables = students_table(found.fit) if found.fit else ()
    problems = [
        Note(f"{row['name']} {row['precision']} could not be measured: {row['status']}") for row in found.failed
    ]
    print_result(found.rows, as_json, *tables, *problems, Note(str(found.picture)))
    if found.problem is not None:
        raise found.problem


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
    from toolchain.data.inspection_tables import inspection_tables
    from toolchain.data.open import source_spec

    spec = source_spec(source, kind)
    with open_screen() as screen:
        screen.starts("inspect")
        document = inspect(spec, sample=sample, sheet=sheet, progress=screen.progress)
    sheets = [document["sheet"]] if document["sheet"] else []
    print_result({"source": source, **document}, as_json, *inspection_tables(document), *sheets)


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
        print_note(f"left out {found['count']:,}: {reason}\n  {examples}")
    size = f"{index['samples']:,} samples in {len(index['shards']):,} shard(s), {index['bytes'] / 1e6:,.1f} MB"
    print_result({"path": str(out), **index}, as_json, Note(size), out / INDEX)


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
    from export.devices.table import devices_table, presets_table

    if presets:
        print_result({name: asdict(preset) for name, preset in PRESETS.items()}, as_json, presets_table())
        return
    from export.devices.doctor import local_devices

    known = read_devices()
    here = local_devices()
    document = {"local": here, "remote": [asdict(device) for device in known.values()]}
    print_result(document, as_json, devices_table(here, known.values()))


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
        print_note(PRESETS[preset].notes)
    print_note(f"Try it with: clipkd devices test {name}")
    print_result(asdict(device), as_json, config_file())


@devices_app.command("test")
def try_device(name: DeviceArg, as_json: JsonOpt = False) -> None:
    """Connect to a device and find out what it can do, by doing it.

    Example: [bold]clipkd devices test orin[/]
    """
    from export.devices.doctor import examine, problem
    from export.devices.registry import find_device
    from export.devices.table import capabilities_table, machine_lines

    document = examine(find_device(name))
    print_result(document, as_json, capabilities_table(document), *machine_lines(document.get("machine")))
    if lacking := problem(document["rows"]):
        raise lacking


@devices_app.command("remove")
def remove_device(name: DeviceArg, as_json: JsonOpt = False) -> None:
    """Forget a device; nothing on it is touched.

    Example: [bold]clipkd devices remove orin[/]
    """
    from export.devices.registry import remove_device as forget

    forget(name)
    print_result({"removed": name}, as_json, name)


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
    from export.devices.table import capabilities_table, machine_lines

    loaded = None if recipe is None else _recipe(recipe, None)
    where = None if device is None else device_named(device)
    with open_screen() as screen:
        screen.starts("doctor")
        document = diagnose(loaded, where, progress=screen.progress)
    print_result(document, as_json, capabilities_table(document), *machine_lines(document.get("machine")))
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
    from toolchain.recipe.load import recipe_headlines

    headlines = recipe_headlines()
    table = TextTable(["recipe", "what it does"], list(headlines.items()), no_wrap=["recipe"])
    print_result(headlines, as_json, table)


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
    print_line(file)


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
    from toolchain.pipeline.run_directory import stage_state
    from toolchain.recipe.load import load_recipe, recipe_path

    loaded = load_recipe(recipe_path(recipe), overrides)
    stages = [{"stage": path, "state": stage_state(out / path) if out else "not made"} for path in stage_paths(loaded)]
    resolved = loaded.model_dump(mode="json")
    lines = [f"# {stage['stage']}: {stage['state']}" for stage in stages]
    print_result(
        {"recipe": resolved, "stages": stages}, as_json, yaml.safe_dump(resolved, sort_keys=False).rstrip("\n"), *lines
    )


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
    print_result(checked, as_json, *(f"ok {path}" for path in checked))


@contextmanager
def _run_directory(recipe: "Recipe", out: Path, *, shared: bool = False) -> "Iterator[tuple[Recipe, TerminalScreen]]":
    """Hold a run directory with its recipe resolved into it.

    `shared`: several processes may work in it, of which the first holds it.
    """
    from rich.progress import Progress

    from toolchain.pipeline.run_directory import hold_run

    if not shared:
        _refuse_torchrun()
    if not torchrun.leads():
        yield recipe, TerminalScreen(Progress(disable=True), silent=True)
        return
    with hold_run(recipe, out, f"clipkd {shlex.join(sys.argv[1:])}"), open_screen() as screen:
        yield recipe, screen


def _recipe(name: str, overrides: list[str] | None) -> "Recipe":
    from toolchain.recipe.load import load_recipe, recipe_path

    return load_recipe(recipe_path(name), overrides)


def _refuse_torchrun() -> None:
    if torchrun.world_size() > 1:
        raise UsageError("only clipkd distill runs under torchrun; start this command by itself")


def _print_stages(stages: "dict[str, Stage]", as_json: bool) -> None:
    document = {name: {"path": str(stage.path), **stage.manifest["summary"]} for name, stage in stages.items()}
    print_result(document, as_json, *(stage.path for stage in stages.values()))


def _print_report(document: "Report", out: Path, as_json: bool) -> None:
    from toolchain.report.tables import terminal_table

    print_result(document, as_json, terminal_table(document), Note(str(out / "report.html")))


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
    print_note(f"error: {error}")
    sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
