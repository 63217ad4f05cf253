"""The command line: the only module that parses arguments or exits.

`run` calls every step of the system in order.  Commands such as distill, quantize and export run one step of it.
Functions import heavy packages themselves, which lets help and cached runs start at once.
"""

import importlib.util
import json
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
    """Return a message if `toolchain`, `export` or `recipes`, all common names, would be imported from elsewhere."""
    here = Path(__file__).resolve().parent
    for package in ("toolchain", "export", "recipes"):
        spec = importlib.util.find_spec(package)
        found = Path(spec.origin).resolve().parent.parent if spec and spec.origin else None
        if found != here:
            return (
                f"the package '{package}' was found in {found}, expected in {here}; "
                f"run from another directory, or remove {found} from PYTHONPATH"
            )
    return None


try:
    from toolchain import torchrun
    from toolchain.command_help import HelpCommand, HelpGroup
    from toolchain.errors import ArtifactError, ClipkdError, GateError, Interrupted, MissingDependency, UsageError
    from toolchain.filesystem import describe_os_error
    from toolchain.precisions import SAFEST_FIRST
    from toolchain.terminal import TerminalScreen, open_screen, print_any_text, print_line, print_note, print_result
    from toolchain.text_table import Note, TextTable
except ImportError:  # a foreign `toolchain`, which `main` would refuse
    if (problem := _foreign_package()) is None:
        raise
    sys.stderr.write(f"error: {problem}\n")
    sys.exit(2)

if TYPE_CHECKING:
    from toolchain.pipeline.run_directory import Plan
    from toolchain.recipe.recipe import Recipe
    from toolchain.report.row import Report
    from toolchain.stage import Stage

_HELP = """Distill a CLIP model into a small one, quantize it, export it, and report accuracy and latency.

Start with: [bold]clipkd run glyphs --out runs/quickstart[/]"""
app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode="rich", help=_HELP)
_EXTRAS = {"torch": "train", "open_clip": "train", "nncf": "train", "onnx": "train", "safetensors": "train"}
_EXTRAS |= {"torchvision": "train", "timm": "train", "transformers": "train"}
_EXTRAS |= {"onnxscript": "train", "matplotlib": "report", "plotly": "report", "onnxruntime": "onnxruntime"}

RecipeArg = Annotated[str, typer.Argument(help="A name from `clipkd recipes`, or a path.", metavar="RECIPE")]
OutOpt = Annotated[Path, typer.Option("--out", "-o", help="The run directory: created, or resumed.", metavar="RUN")]
RunArg = Annotated[Path, typer.Argument(help="An existing run directory.", metavar="RUN")]
RunsArg = Annotated[list[Path], typer.Argument(help="Existing run directories.", metavar="RUN...")]
ModelsArg = Annotated[list[Path], typer.Argument(help="Exported models, or a run's checkpoints.", metavar="MODEL...")]
SetOpt = Annotated[
    list[str] | None,
    typer.Option("--set", help="Override a recipe field, as in distill.steps=9. Repeatable.", metavar="FIELD=VALUE"),
]
WorkersOpt = Annotated[
    int | None, typer.Option(min=0, help="Data loader processes per rank.", show_default="by the kind of data")
]
CheckpointStepsOpt = Annotated[int | None, typer.Option(min=1, help="Also write a checkpoint every N steps.")]
CheckpointMinutesOpt = Annotated[float, typer.Option(min=0, help="Minutes between checkpoints, at most.")]
ReplaceOpt = Annotated[
    bool, typer.Option("--replace", help="Also replace stages of an older recipe that took over a minute.")
]
DeviceOpt = Annotated[
    str, typer.Option("--device", "-d", help="cpu, cuda:0, gpu, npu, or a name that `clipkd devices list` prints.")
]
ExternalOpt = Annotated[list[Path] | None, typer.Option(help="Rows measured elsewhere, CSV or JSON. Repeatable.")]
JsonOpt = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]


@app.command()
def run(
    recipe: RecipeArg,
    out: OutOpt,
    overrides: SetOpt = None,
    workers: WorkersOpt = None,
    checkpoint_steps: CheckpointStepsOpt = None,
    checkpoint_minutes: CheckpointMinutesOpt = 1.0,
    replace: ReplaceOpt = False,
    as_json: JsonOpt = False,
) -> None:
    """Run every stage of a recipe: distill, quantize, export, check, measure, report.

    Repeat the command to resume an interrupted run; complete stages are reused.
    If the recipe changed, the stages that depend on the change are made again.
    If one of them took over a minute, the command refuses to start without
    --replace.  `clipkd show RECIPE --out RUN` lists these stages.

    Example: [bold]clipkd run glyphs --out runs/quickstart[/]
    """
    from export.pipeline.choose_precision import choose_precisions, require_choices, without_failed
    from export.pipeline.export import export_models
    from export.pipeline.measure import measure_models, measure_references, require_references
    from export.pipeline.plan_run import plan_run
    from export.pipeline.quantize_or_reject import quantize_or_reject
    from export.pipeline.report import report_run
    from toolchain.distillation.training_options import TrainingOptions
    from toolchain.pipeline.stage_inputs import require_evaluation
    from toolchain.pipeline.train import train_checkpoints

    options = TrainingOptions(workers, checkpoint_steps, checkpoint_minutes, replace=replace)
    with _run_directory(_recipe(recipe, overrides), out, plan_run, replace=replace) as (loaded, screen):
        require_evaluation(loaded)  # fail before hours of training
        require_references(loaded)
        checkpoints = train_checkpoints(loaded, out, screen, options)  # teacher, baseline, student
        checkpoints |= quantize_or_reject(loaded, out, checkpoints, screen, replace=replace)  # student-int8
        exported = export_models(loaded, out, checkpoints, screen)  # graphs that passed parity
        chosen = choose_precisions(loaded, out, exported, {}, screen) if loaded.export.auto else None
        sound = exported if chosen is None else without_failed(exported, chosen)
        measured = measure_models(loaded, out, sound, screen)  # accuracy and latency of exported models
        measured |= measure_references(loaded, out, checkpoints, exported, screen)  # the same in PyTorch
        if not exported:
            require_choices(chosen, out)  # nothing to report: raise
        document = report_run(out, screen)  # the table and the Pareto front
    _print_report(document, out, as_json)
    require_choices(chosen, out)


@app.command()
def distill(
    recipe: RecipeArg,
    out: OutOpt,
    overrides: SetOpt = None,
    workers: WorkersOpt = None,
    checkpoint_steps: CheckpointStepsOpt = None,
    checkpoint_minutes: CheckpointMinutesOpt = 1.0,
    keep_checkpoints: Annotated[int, typer.Option(min=1, help="Number of newest checkpoints kept.")] = 2,
    replace: ReplaceOpt = False,
    as_json: JsonOpt = False,
) -> None:
    """Train a recipe's student with the teacher, and its baseline without one.

    A recipe without a teacher trains plain CLIP.  Repeat the command to resume an
    interrupted training at its last checkpoint, even after kill -9.  On a CPU the
    result then has the same bytes as without the interruption.

    On 8 GPUs: [bold]torchrun --nproc-per-node 8 -m clipkd distill RECIPE --out RUN[/]

    Example: [bold]clipkd distill glyphs --out runs/quickstart[/]
    """
    from toolchain.distillation.training_options import TrainingOptions
    from toolchain.pipeline.plan import plan_checkpoints
    from toolchain.pipeline.train import train_checkpoints

    options = TrainingOptions(workers, checkpoint_steps, checkpoint_minutes, keep_checkpoints, replace)
    planned = _run_directory(_recipe(recipe, overrides), out, plan_checkpoints, replace=replace, shared=True)
    with planned as (loaded, screen):
        checkpoints = train_checkpoints(loaded, out, screen, options)
    if torchrun.leads():
        _print_stages(checkpoints, as_json)


@app.command()
def adopt(
    model: Annotated[
        str, typer.Argument(help="An open_clip architecture, hf-hub:ORG/NAME, or a model directory.", metavar="MODEL")
    ],
    out: OutOpt,
    pretrained: Annotated[str | None, typer.Option(help="The architecture's weights, by their open_clip tag.")] = None,
    checkpoint: Annotated[Path | None, typer.Option(help="The architecture's weights, from a file.")] = None,
    vocabulary: Annotated[Path | None, typer.Option(help="Cut the vocabulary to these texts, one per line.")] = None,
    like: Annotated[
        str | None, typer.Option(help="A recipe to copy data, quantize, export, evaluate and profile from.")
    ] = None,
    overrides: SetOpt = None,
    replace: ReplaceOpt = False,
    as_json: JsonOpt = False,
) -> None:
    """Create a run from an existing model, to ship it without training.

    Its directory then works with quantize, export, profile and report.

    Example: [bold]clipkd adopt glyphs_teacher --like glyphs --out runs/adopted[/]
    """
    from toolchain.distillation.training_options import TrainingOptions
    from toolchain.pipeline.plan import plan_checkpoints
    from toolchain.pipeline.train import train_checkpoints
    from toolchain.recipe.load import load_recipe, make_adoption_recipe, recipe_path

    taken = None if like is None else load_recipe(recipe_path(like))
    weights = {"pretrained": pretrained, "checkpoint": None if checkpoint is None else str(checkpoint)}
    given = {key: value for key, value in weights.items() if value}
    recipe = make_adoption_recipe(model, given, taken, overrides, vocabulary)
    with _run_directory(recipe, out, plan_checkpoints, replace=replace) as (loaded, screen):
        made = train_checkpoints(loaded, out, screen, TrainingOptions(replace=replace))
    _print_stages(made, as_json)


@app.command()
def cache(
    recipe: RecipeArg, out: OutOpt, overrides: SetOpt = None, replace: ReplaceOpt = False, as_json: JsonOpt = False
) -> None:
    """Store the teacher's features of all training data, for distill to read.

    Prints the expected saving and disk use before it starts.
    An interrupted run resumes when you repeat the command.

    On 8 GPUs: [bold]torchrun --nproc-per-node 8 -m clipkd cache RECIPE --out RUN[/]

    Example: [bold]clipkd cache glyphs --out runs/quickstart[/]
    """
    from toolchain.distillation.training_options import TrainingOptions
    from toolchain.pipeline.plan import plan_caches
    from toolchain.pipeline.train import cache_teachers

    planned = _run_directory(_recipe(recipe, overrides), out, plan_caches, replace=replace, shared=True)
    with planned as (loaded, screen):
        made = cache_teachers(loaded, out, screen, TrainingOptions(replace=replace))
    if torchrun.leads():
        _print_stages(made, as_json)


@app.command()
def quantize(run: RunArg, overrides: SetOpt = None, replace: ReplaceOpt = False, as_json: JsonOpt = False) -> None:
    """Quantize a run's student to int8.

    The recipe's quantize section sets the method and the accepted accuracy loss.

    Example: [bold]clipkd quantize runs/quickstart --set quantize.steps=100[/]
    """
    from toolchain.distillation.training_options import TrainingOptions
    from toolchain.pipeline.plan import plan_quantized
    from toolchain.pipeline.quantize import quantize_checkpoint
    from toolchain.pipeline.run_directory import run_recipe
    from toolchain.pipeline.train import train_checkpoints

    with _run_directory(run_recipe(run, overrides), run, plan_quantized, replace=replace) as (loaded, screen):
        checkpoints = train_checkpoints(loaded, run, screen, TrainingOptions(replace=replace))
        made = quantize_checkpoint(loaded, run, checkpoints, screen, replace=replace)
    if not made:
        method = "" if loaded.quantize else "--set quantize.method=ptq "
        raise UsageError(
            f"{run}: nothing to quantize, because its recipe has no int8, int8-fp16 or int8-bf16 in export.precisions; "
            f"add one with: {method}--set 'export.precisions=[fp32, int8]'"
        )
    _print_stages(made, as_json)


@app.command()
def export(
    run: RunArg,
    onnx: Annotated[bool, typer.Option("--onnx", help="Export for ONNX Runtime.")] = False,
    openvino: Annotated[bool, typer.Option("--openvino", help="Export for OpenVINO.")] = False,
    trt: Annotated[bool, typer.Option("--trt", help="Write TensorRT build kits.")] = False,
    build: Annotated[
        bool, typer.Option("--build/--no-build", help="Build the kits' engines here, or leave it to the device.")
    ] = True,
    precision: Annotated[
        str | None, typer.Option(help=f"Precisions of the student, comma-separated: {', '.join(SAFEST_FIRST)}.")
    ] = None,
    auto: Annotated[
        bool | None, typer.Option("--auto/--no-auto", help="Choose the precision to ship for each runtime.")
    ] = None,
    max_drop: Annotated[
        float | None,
        typer.Option(min=0, help="--auto: top-1 loss accepted, a fraction.", show_default="quantize.max_drop or 0.01"),
    ] = None,
    batch: Annotated[int | None, typer.Option(min=1, max=1, help="Fix the batch size of the graphs to 1.")] = None,
    uint8_input: Annotated[
        bool, typer.Option("--uint8-input", help="Also write image_uint8.onnx, which preprocesses images itself.")
    ] = False,
    overrides: SetOpt = None,
    as_json: JsonOpt = False,
) -> None:
    """Export a run's models, each checked against PyTorch in its own runtime.

    Without flags, exports what the run's recipe.yaml asks for.  A flag changes
    that choice, also in recipe.yaml.  With --trt as the only runtime, build kits
    are written, and models exported earlier for other runtimes stay as they are.

    A kit is a folder from which TensorRT engines are built on a GPU.  If they
    cannot be built here, the kits are written all the same, and the exit code is
    3 (no TensorRT) or 4 (no GPU).

    Exit code 5: a model failed its parity check.  It is kept, marked as failed,
    and never used.

    With --auto, each precision is scored and timed on this machine.  For each
    runtime it chooses the fastest that loses at most --max-drop.  Without a
    significant difference, the safer one wins: fp32, then fp16, bf16, int8.
    The reasons are in the run's auto.json.

    Choose precisions: [bold]clipkd export runs/quickstart --auto --onnx --openvino[/]

    Example: [bold]clipkd export runs/quickstart --openvino --trt --no-build \\
      --precision fp32,int8[/]
    """
    from export.pipeline.choices_table import describe_choices
    from export.pipeline.choose_precision import choose_precisions, require_choices
    from export.pipeline.engines import build_engines
    from export.pipeline.export import export_models
    from export.pipeline.plan import select_kits
    from export.pipeline.quantize_or_reject import quantize_or_reject
    from toolchain.pipeline.plan import plan_quantized
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
        print_note(f"--auto skips {kit}: its engines are built and measured on the device")
    recipe = load_recipe(run / "recipe.yaml", overrides, changes={"export": changes})
    if trt and "tensorrt" not in recipe.export.runtimes:
        raise UsageError("--trt asks for tensorrt, which --set export.runtimes leaves out; add it there")
    with _run_directory(recipe, run, plan_quantized) as (loaded, screen):
        if flags.only_kits:  # the recipe keeps its other runtimes; they are not exported anew
            loaded = select_kits(loaded)
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
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Output directory, if not the run.")] = None,
    external: ExternalOpt = None,
    against: Annotated[Path | None, typer.Option(help="An older report.json; exit 5 if a model got worse.")] = None,
    max_slower: Annotated[float, typer.Option(min=0, help="--against: slowdown accepted, fraction of p50.")] = 0.05,
    max_top1_loss: Annotated[float, typer.Option(min=0, help="--against: top-1 loss accepted, a fraction.")] = 0.005,
    as_json: JsonOpt = False,
) -> None:
    """Write the report of a run, or one report of several, and print its table.

    Writes report.json, .csv, .md, .png, .svg and .html.

    Several runs: [bold]clipkd report runs/small runs/large --out runs/compared[/]

    Example: [bold]clipkd report runs/quickstart[/]
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
    if len({run.resolve() for run in runs}) < len(runs):
        raise UsageError(f"report: a run is named twice: {', '.join(map(str, runs))}; name each once")
    if len(runs) > 1 and out is None:
        raise UsageError(f"--out: {len(runs)} runs have one joint report; say where to write it: --out DIR")
    folder = runs[0] if out is None else out
    older = None if against is None else read_report(against)  # read first: the new report may overwrite it
    elsewhere = [row for path in external or [] for row in external_rows(path)]
    with run_lock(folder) if folder in runs else nullcontext():
        document = write_report(runs, folder, elsewhere)
    if older is None:
        _print_report(document, folder, as_json)
        return
    compared = compare(older, document, max_slower=max_slower, max_top1_loss=max_top1_loss)
    print_result(asdict(compared) | {"holds": compared.holds}, as_json, comparison_table(compared))
    if not compared.holds:
        raise GateError(f"{folder}: worse than {against} by more than is accepted; the table lists what changed")


@app.command()
def best(
    runs: RunsArg,
    device: Annotated[
        str | None, typer.Option("--device", "-d", help="Only models measured on this device; default: all.")
    ] = None,
    where: Annotated[str, typer.Option(help="Conditions on fields of report.json, comma-separated.")] = "",
    by: Annotated[str, typer.Option(help="The field of report.json to rank by.")] = "top1",
    include: Annotated[
        list[str] | None, typer.Option(help="Also consider the teacher or baseline. Repeatable.", metavar="ROLE")
    ] = None,
    external: ExternalOpt = None,
    as_json: JsonOpt = False,
) -> None:
    """Choose the model to ship: the best one that meets your conditions.

    Also prints the runner-up, and the reasons against the other models.
    Exit code 5: no model meets the conditions.  Teacher and baseline are not
    meant to ship, so they are considered only with --include.

    Example: [bold]clipkd best runs/quickstart \\
      --where 'p90_ms<=10, top1_drop_vs_teacher<=0.2'[/]
    """
    from toolchain.pipeline.run_directory import require_run
    from toolchain.report.choose_model import choice_lines, choose_model, conditions, explain_no_choice, rejected_table
    from toolchain.report.collect import collect
    from toolchain.report.external_rows import external_rows
    from toolchain.report.missing import missing_notes

    wanted = conditions(where)
    for run in runs:
        require_run(run)
    rows = collect(runs, [row for path in external or [] for row in external_rows(path)])["rows"]
    choice = choose_model(rows, wanted, by, device, include or [])
    rejected = [{"name": row["name"], "reasons": reasons} for row, reasons in choice.rejected]
    answer = {"best": choice.best, "runner_up": choice.runner_up, "rejected": rejected, "warnings": choice.warnings}
    warnings = [Note(f"warning: {warning}") for warning in choice.warnings]
    tables = [rejected_table(choice)] if rejected else []
    missing = missing_notes(rows) if choice.best is not None else []
    print_result(answer, as_json, *choice_lines(choice), *warnings, *tables, *missing)
    if choice.best is None:
        raise GateError(explain_no_choice(choice, wanted))


@app.command()
def evaluate(
    models: ModelsArg,
    recipe: Annotated[
        str | None, typer.Option(help="Use this recipe's evaluate section.", show_default="the model's run")
    ] = None,
    overrides: SetOpt = None,
    as_json: JsonOpt = False,
) -> None:
    """Score models on evaluation sets: zero-shot accuracy and retrieval.

    Compares each model with the first.  Exported models need no torch.  The scores
    of a run's model are stored in its run, for report and best.

    Example: [bold]clipkd evaluate runs/quickstart/exported/student-onnxruntime-int8[/]
    """
    from export.model_folder import find_run, model_kind
    from export.pipeline.evaluate_models import evaluate_models
    from toolchain.evaluation.table import evaluation_table, unreadable_images
    from toolchain.pipeline.stage_inputs import require_evaluation

    _refuse_torchrun()
    run = find_run(models[0])
    model_kind(models[0])
    if recipe is None and run is None:
        raise UsageError(f"{models[0]} is in no run, so no recipe lists the evaluation sets; add: --recipe RECIPE")
    loaded = _recipe(recipe if recipe is not None else str(run / "recipe.yaml" if run else ""), overrides)
    spec = require_evaluation(loaded)
    with open_screen() as screen:
        document = evaluate_models(models, spec, screen)
    print_result(document, as_json, evaluation_table(document), *unreadable_images(document))


@app.command()
def classes(
    model: Annotated[Path, typer.Argument(help="An exported model's directory.", metavar="MODEL")],
    labels: Annotated[Path, typer.Option(help="A text file with one label per line.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The output directory.")],
    templates: Annotated[
        Path | None, typer.Option(help="Captions, one per line, {} for the label.", show_default="the model's")
    ] = None,
    as_json: JsonOpt = False,
) -> None:
    """Store the features of your labels, to classify without torch or text tower.

    Make labels: [bold]printf 'plus sign\\neuro sign\\n' > labels.txt[/]

    Example: [bold]clipkd classes runs/quickstart/exported/student-onnxruntime-int8 \\
      --labels labels.txt --out signs[/]
    """
    from export.runtime.bake_classes import bake

    _print_stages({"classes": bake(model, labels, templates, out)}, as_json)


@app.command()
def profile(
    models: ModelsArg,
    device: DeviceOpt = "cpu",
    quick: Annotated[bool, typer.Option("--quick", help="2 s in each of 3 processes for each tower.")] = False,
    standard: Annotated[bool, typer.Option("--standard", help="12 s in each of 5 processes; to publish.")] = False,
    processes: Annotated[int | None, typer.Option(min=1, help="Processes per tower.", show_default="3")] = None,
    seconds: Annotated[
        float | None, typer.Option(min=0.01, help="Seconds per tower, divided among its processes.", show_default="1")
    ] = None,
    scored: Annotated[
        bool, typer.Option("--evaluate", help="Also score accuracy there, on the run's evaluation sets.")
    ] = False,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Also write results and latencies here.")] = None,
    as_json: JsonOpt = False,
) -> None:
    """Measure latency, throughput and memory of exported models on one device.

    Several models are measured interleaved.  One that fails is a row with its
    reason, and sets the exit code.

    A run's model must pass a parity check first.  Its results are stored in the
    run, in measured/MODEL/DEVICE, for report and best.

    A run's checkpoint, as in RUN/student, is timed in PyTorch on this CPU.

    Example: [bold]clipkd profile runs/quickstart/exported/student-onnxruntime-int8 \\
      --quick[/]
    """
    from export.pipeline.profile_models import profile_models
    from export.profiling.protocol import QUICK, STANDARD, Effort
    from export.profiling.table import clocks_note, profiles_table

    _refuse_torchrun()
    own = {key: value for key, value in (("processes", processes), ("seconds", seconds)) if value is not None}
    if quick + standard + bool(own) > 1:
        raise UsageError("choose one of --quick, --standard, or --processes with --seconds")
    effort = QUICK if quick else STANDARD if standard else Effort(**own)  # type: ignore[arg-type]  # an int and a float
    with open_screen() as screen:
        rows, errors = profile_models(models, device, effort, scored=scored, out=out, screen=screen)
    if len(models) > 1 or not errors:
        print_result(rows, as_json, profiles_table(rows), *clocks_note(rows))
    if errors:
        raise errors[0] if len(models) == 1 else type(errors[0])("\n".join(map(str, errors)))


@app.command()
def predict(
    model: Annotated[Path, typer.Argument(help="An exported model's directory.", metavar="MODEL")],
    images: Annotated[
        list[Path], typer.Argument(help="Image files, folders, or patterns like '**/*.jpg'.", metavar="IMAGE...")
    ],
    labels: Annotated[str | None, typer.Option(help="Labels, comma-separated.", show_default="the model's")] = None,
    top: Annotated[int, typer.Option(min=1, help="Number of labels printed for each image.")] = 5,
    as_json: JsonOpt = False,
    as_jsonl: Annotated[bool, typer.Option("--jsonl", help="Print one JSON object per image, one a line.")] = False,
) -> None:
    """Classify images with an exported model, without torch.

    Each image's labels are printed at once.  For an image that cannot be read,
    the reason is printed instead; the others are still classified, and the exit
    code is 1.

    Make an image: [bold]clipkd data inspect glyphs --sheet glyphs.png[/]

    Example: [bold]clipkd predict runs/quickstart/exported/student-onnxruntime-int8 \\
      glyphs.png[/]
    """
    from export.runtime.predict import answer_lines, describe_other_files, find_images, name_width
    from export.runtime.predict import predict as rank_labels

    wanted = [label.strip() for label in labels.split(",") if label.strip()] if labels is not None else None
    if wanted == []:
        raise UsageError(f"--labels '{labels}': contains no label; write, for example, --labels 'a cat,a dog'")
    if as_json and as_jsonl:
        raise UsageError("--json prints one document, --jsonl one object a line; choose one")
    found = find_images(images)
    if other := describe_other_files(images):
        print_note(other)
    answers, width = [], name_width(found)
    with open_screen() as screen:
        screen.starts("predict")
        for answer in rank_labels(model, found, wanted, top, screen.progress):
            answers.append(answer)
            if not as_json:
                screen.result(*([json.dumps(answer)] if as_jsonl else answer_lines(answer, width)))
    if as_json:
        print_result(answers, as_json)
    if failed := sum(answer["error"] is not None for answer in answers):
        raise ClipkdError(f"{failed:,} of {len(found):,} images have no labels; their rows give the reasons")


@app.command()
def students(
    models: Annotated[
        list[str] | None,
        typer.Argument(help="open_clip architectures; default: a built-in list.", metavar="[MODEL]..."),
    ] = None,
    device: DeviceOpt = "cpu",
    max_ms: Annotated[float | None, typer.Option(min=0, help="Longest latency listed, in ms; default: any.")] = None,
    precision: Annotated[str, typer.Option(help="Comma-separated: fp32, fp16, bf16, int8.")] = "fp32,int8",
    runtime: Annotated[
        str | None, typer.Option(help="onnxruntime or openvino.", show_default="onnxruntime; on gpu and npu openvino")
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads.", show_default="one per core")] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Output directory.")] = Path("runs/students"),
    as_json: JsonOpt = False,
) -> None:
    """Measure the latency of untrained students, to choose one before training.

    Exports each image tower and times it on the device.  The accuracies are
    published ones.  Results are stored; repeat an interrupted command to resume.

    Example: [bold]clipkd students --device cpu --max-ms 10[/]
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
    print_result(found.rows, as_json, *tables, *problems, Note(str(found.chart)))
    if found.problem is not None:
        raise found.problem


data_app = typer.Typer(
    no_args_is_help=True,
    help="Inspect training data, or pack it into shards.\n\nExample: [bold]clipkd data inspect glyphs[/]",
)
app.add_typer(data_app, name="data")

SourceArg = Annotated[str, typer.Argument(help="A recipe, or with --kind a path or pattern.", metavar="SOURCE")]
KindOpt = Annotated[str | None, typer.Option("--kind", help="The format of a path: webdataset or image_folder.")]


@data_app.command("inspect")
def inspect_data(
    source: SourceArg,
    kind: KindOpt = None,
    sample: Annotated[int | None, typer.Option(min=1, help="Read only N random samples; default: all.")] = None,
    sheet: Annotated[Path | None, typer.Option(help="Write a PNG with some of the images here.")] = None,
    as_json: JsonOpt = False,
) -> None:
    """Report the content of training data: counts, sizes, captions, corrupt samples.

    Shards: [bold]clipkd data inspect "data/cc3m/{00000..00331}.tar" --kind webdataset[/]

    Example: [bold]clipkd data inspect glyphs --sheet glyphs.png[/]
    """
    from toolchain.data.inspection import inspect
    from toolchain.data.inspection_tables import inspection_tables
    from toolchain.data.open import source_spec

    spec = source_spec(source, kind)
    with open_screen() as screen:
        screen.starts("inspect")
        document = inspect(spec, sample=sample, sheet=sheet, progress=screen.progress, say=screen.say)
    sheets = [document["sheet"]] if document["sheet"] else []
    print_result({"source": source, **document}, as_json, *inspection_tables(document), *sheets)


@data_app.command("pack")
def pack_data(
    source: SourceArg,
    out: Annotated[Path, typer.Option("--out", "-o", help="Output directory of the shards.")],
    kind: KindOpt = None,
    samples_per_shard: Annotated[int, typer.Option(min=1, help="Samples in each shard except the last.")] = 10_000,
    as_json: JsonOpt = False,
) -> None:
    """Pack training data into webdataset shards with an index.

    Images are copied unchanged; corrupt samples are skipped and listed.

    An interrupted run, even by kill -9, resumes when you repeat the command, and
    ends with the same bytes.

    Example: [bold]clipkd data pack my.yaml --out data/mine[/]
    """
    from toolchain.data.bad_samples import describe_passed_over
    from toolchain.data.open import source_spec
    from toolchain.data.packing import INDEX, pack

    spec = source_spec(source, kind)
    with open_screen() as screen:
        screen.starts("pack")
        index = pack(spec, out, samples_per_shard=samples_per_shard, progress=screen.progress)
    for reason, found in index["left_out"].items():
        examples = "\n  ".join(found["examples"])
        print_note(f"{found['count']:,} not packed: {reason}; for example:\n  {examples}")
    if "passed_over" in index:
        print_note(describe_passed_over(index["passed_over"]))
    size = f"{index['samples']:,} samples in {len(index['shards']):,} shard(s), {index['bytes'] / 1e6:,.1f} MB"
    print_result({"path": str(out), **index}, as_json, Note(size), out / INDEX)


devices_app = typer.Typer(
    no_args_is_help=True,
    help="Manage devices to measure on: this machine, and any reached by ssh.\n\nExample: [bold]clipkd devices list[/]",
)
app.add_typer(devices_app, name="devices")

DeviceArg = Annotated[str, typer.Argument(help="The device's name.", metavar="NAME")]


@devices_app.command("list")
def list_devices(
    presets: Annotated[bool, typer.Option("--presets", help="List what common boards support instead.")] = False,
    as_json: JsonOpt = False,
) -> None:
    """List the devices of this machine and those you added.

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
    destination: Annotated[str, typer.Argument(help="The ssh destination: HOST or USER@HOST.", metavar="DESTINATION")],
    port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="Port of ssh.", show_default="as ssh has it")
    ] = None,
    python: Annotated[str, typer.Option(help="Its Python, 3.8 or later, with numpy and a runtime.")] = "python3",
    preset: Annotated[str | None, typer.Option(help="Its board, from `clipkd devices list --presets`.")] = None,
    workdir: Annotated[str | None, typer.Option(help="Its directory for clipkd.", show_default="in ~/.cache")] = None,
    replace: Annotated[bool, typer.Option("--replace", help="Replace a device of the same name.")] = False,
    as_json: JsonOpt = False,
) -> None:
    """Add a device that ssh reaches.

    Your ssh configuration supplies keys, jump hosts and known hosts.

    Example: [bold]clipkd devices add orin me@orin.local --preset jetson-orin-nano[/]
    """
    from export.devices.presets import PRESETS
    from export.devices.registry import Device, config_file
    from export.devices.registry import add_device as keep

    device = Device(name, destination, port, python, preset, workdir)
    keep(device, replace=replace)
    if preset is not None:
        print_note(PRESETS[preset].notes)
    print_note(f"Test it with: clipkd devices test {name}")
    print_result(asdict(device), as_json, config_file())


@devices_app.command("test")
def try_device(name: DeviceArg, as_json: JsonOpt = False) -> None:
    """Connect to a device and run each capability that it should have.

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
    """Remove a device from the list; nothing on the device changes.

    Example: [bold]clipkd devices remove orin[/]
    """
    from export.devices.registry import remove_device as forget

    forget(name)
    print_result({"removed": name}, as_json, name)


@app.command()
def doctor(
    recipe: Annotated[str | None, typer.Argument(help="Mark what this recipe needs.", metavar="[RECIPE]")] = None,
    device: Annotated[str | None, typer.Option("--device", "-d", help="A device; default: this machine.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Leave out what takes long: PyTorch and TensorRT.")] = False,
    as_json: JsonOpt = False,
) -> None:
    """Check what this machine and a device support, and print how to fix failures.

    Runs each capability.  Downloads nothing.  Exit code 0: all needed ones work.

    Example: [bold]clipkd doctor glyphs[/]
    """
    from export.devices.doctor import device_named, diagnose, problem
    from export.devices.table import capabilities_table, machine_lines

    loaded = None if recipe is None else _recipe(recipe, None)
    where = None if device is None else device_named(device)
    with open_screen() as screen:
        screen.starts("doctor")
        document = diagnose(loaded, where, quick=quick, progress=screen.progress)
    print_result(document, as_json, capabilities_table(document), *machine_lines(document.get("machine")))
    if document["left_out"]:
        print_note(f"--quick left out: {', '.join(document['left_out'])}")
    if lacking := problem(document["rows"]):
        raise lacking


recipes_app = typer.Typer(invoke_without_command=True)
app.add_typer(recipes_app, name="recipes")


@recipes_app.callback()
def recipes(context: typer.Context, as_json: JsonOpt = False) -> None:
    """List the included recipes, or copy one to edit.

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
    name: Annotated[str, typer.Argument(help="A name from `clipkd recipes`.", metavar="NAME")],
    file: Annotated[Path, typer.Argument(help="The file to write.", metavar="FILE")],
) -> None:
    """Copy an included recipe to a new file.

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
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Compare the stages with those of this run.")] = None,
    overrides: SetOpt = None,
    as_json: JsonOpt = False,
) -> None:
    """Print a recipe with every default, and its stages: a dry run.

    With --out, the list says for each stage of that run whether it was made with
    this recipe, which fields differ if not, and what `clipkd run` would do.

    Example: [bold]clipkd show glyphs --out runs/quickstart[/]
    """
    import yaml

    from export.pipeline.plan_run import show_stages
    from toolchain.pipeline.teacher_advice import advise_on_teacher

    loaded = _recipe(recipe, overrides)
    stages = show_stages(loaded, out)
    found = {"recipe": loaded.model_dump(mode="json"), "stages": stages, "advice": advise_on_teacher(loaded)}
    lines = [f"# {stage['stage']}: {text}" for stage in stages for text in (stage["text"], *stage["starts"])]
    lines += [f"# {text}" for text in found["advice"]]
    print_result(found, as_json, yaml.safe_dump(found["recipe"], sort_keys=False).rstrip("\n"), *lines)


@app.command()
def verify(
    directories: Annotated[list[Path], typer.Argument(help="Directories of stages or runs.", metavar="DIR...")],
    as_json: JsonOpt = False,
) -> None:
    """Compare every file of stages or runs with its recorded sha256.

    Example: [bold]clipkd verify runs/quickstart[/]
    """
    from toolchain.pipeline.run_directory import verify_stages

    checked, problems = verify_stages(directories)
    print_result(checked, as_json, *(f"ok {path}" for path in checked))
    if problems:
        raise ArtifactError("\n".join(problems))


for group in (app, data_app, devices_app, recipes_app):
    group.info.cls = HelpGroup
    for registered in group.registered_commands:
        registered.cls = HelpCommand


@contextmanager
def _run_directory(
    recipe: "Recipe", out: Path, plan: "Plan", *, replace: bool = False, shared: bool = False
) -> "Iterator[tuple[Recipe, TerminalScreen]]":
    """Lock a run directory, and write the resolved recipe into it.

    `plan` returns the stages that the command makes, to refuse to replace costly ones.
    `shared`: the ranks of torchrun may work in it together; rank 0 holds the lock.
    """
    from rich.progress import Progress

    from toolchain.pipeline.run_directory import hold_run

    if not shared:
        _refuse_torchrun()
    if not torchrun.leads():
        yield recipe, TerminalScreen(Progress(disable=True), silent=True)
        return
    command = f"clipkd {shlex.join(sys.argv[1:])}"
    with hold_run(recipe, out, command, plan, replace=replace), open_screen() as screen:
        yield recipe, screen


def _recipe(name: str, overrides: list[str] | None) -> "Recipe":
    from toolchain.recipe.load import load_recipe, recipe_path

    return load_recipe(recipe_path(name), overrides)


def _refuse_torchrun() -> None:
    if torchrun.world_size() > 1:
        raise UsageError("under torchrun only `clipkd distill` and `clipkd cache` work; start this command without it")


def _print_stages(stages: "dict[str, Stage]", as_json: bool) -> None:
    document = {name: {"path": str(stage.path), **stage.manifest["summary"]} for name, stage in stages.items()}
    print_result(document, as_json, *(stage.path for stage in stages.values()))


def _print_report(document: "Report", out: Path, as_json: bool) -> None:
    from toolchain.report.missing import missing_notes
    from toolchain.report.tables import terminal_table

    notes = [Note(str(out / "report.html")), *missing_notes(document["rows"])]
    print_result(document, as_json, terminal_table(document), *notes)


def main() -> NoReturn:
    """Run the `clipkd` command, and turn errors into messages and exit codes."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: sys.exit(130))
    print_any_text()
    try:
        if problem := _foreign_package():
            raise UsageError(problem)
        app(prog_name="clipkd")
    except ClipkdError as error:
        _exit(error)
    except ModuleNotFoundError as error:
        extra = _EXTRAS.get((error.name or "").partition(".")[0])
        if extra is None:
            raise
        _exit(
            MissingDependency(
                f"this command needs {error.name}, which is not installed; run: pip install 'clipkd[{extra}]'"
            )
        )
    except OSError as error:
        if (problem := describe_os_error(error)) is None:
            raise
        _exit(ClipkdError(problem))
    sys.exit(0)


def _exit(error: ClipkdError) -> NoReturn:
    if torchrun.leads() or not isinstance(error, Interrupted):  # all ranks stop together, so one sentence is enough
        print_note(f"error: {error}")
    torchrun.report_error(str(error))
    sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
