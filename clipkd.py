"""The command line: the only module that parses arguments, prints, or exits.

`run` is the map of the system.  Every other command is one of its lines, on the run directory the line before wrote.
Heavy packages are imported inside the functions that need them, so that help and cached runs start at once.
"""

import errno
import importlib.util
import json
import os
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.console import Console
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
    from toolchain.errors import ClipkdError, MissingDependency, UsageError
except ImportError:  # somebody else's toolchain, which `main` would refuse
    sys.stderr.write(f"error: {_foreign_package()}\n")
    sys.exit(2)

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from toolchain.recipe import EvaluateSpec, Recipe
    from toolchain.stages import Stage

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode="rich")
stdout, stderr = Console(), Console(stderr=True)

_LINE_EVERY_S = 30.0
_EXTRAS = {"torch": "train", "open_clip": "train", "nncf": "train", "onnx": "train", "safetensors": "train"}
_EXTRAS |= {"torchvision": "train", "timm": "train", "transformers": "train"}
_EXTRAS |= {"onnxscript": "train", "matplotlib": "report", "plotly": "report", "onnxruntime": "onnxruntime"}

RecipeArg = Annotated[
    str, typer.Argument(help="A recipe that ships (see `clipkd recipes`) or a path.", metavar="RECIPE")
]
OutOpt = Annotated[Path, typer.Option("--out", "-o", help="The run directory.")]
RunArg = Annotated[Path, typer.Argument(help="A run directory.", metavar="RUN")]
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
    with _run_directory(recipe, out, overrides) as (loaded, screen):
        _evaluated(loaded)  # before hours of training
        checkpoints = _train(loaded, out, screen, _How(workers))  # teacher, baseline, student
        checkpoints |= _quantize(loaded, out, checkpoints, screen)  # student-int8
        exported = _export(loaded, out, checkpoints, screen)  # graphs that passed parity
        measured = _measure(loaded, out, exported, screen)  # accuracy and latency of what ships
        report = _report(out, measured, screen)  # the table, and the front
    _print_report(report, out, as_json)


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
    how = _How(workers, checkpoint_steps, checkpoint_minutes, keep_checkpoints)
    with _run_directory(recipe, out, overrides, shared=True) as (loaded, screen):
        checkpoints = _train(loaded, out, screen, how)
    if how.leads:
        _print_stages(checkpoints, as_json)


@app.command()
def quantize(run: RunArg, overrides: SetOpt = None, as_json: JsonOpt = False) -> None:
    """Make the int8 student of a run.

    Example: [bold]clipkd quantize runs/quickstart --set quantize.steps=100[/]
    """
    with _run_directory(None, run, overrides) as (loaded, screen):
        checkpoints = _train(loaded, run, screen, _How())
        made = _quantize(loaded, run, checkpoints, screen)
    if not made:
        raise UsageError(f"{run}: its recipe has no int8 in export.precisions; nothing to quantize")
    _print_stages(made, as_json)


@app.command()
def export(run: RunArg, overrides: SetOpt = None, as_json: JsonOpt = False) -> None:
    """Export a run's models to ONNX, each proven equal to its PyTorch model.

    Example: [bold]clipkd export runs/quickstart[/]
    """
    with _run_directory(None, run, overrides) as (loaded, screen):
        checkpoints = _train(loaded, run, screen, _How())
        checkpoints |= _quantize(loaded, run, checkpoints, screen)
        exported = _export(loaded, run, checkpoints, screen)
    _print_stages(exported, as_json)


@app.command()
def report(run: RunArg, as_json: JsonOpt = False) -> None:
    """Write a run's report again, and print its table.

    Example: [bold]clipkd report runs/quickstart --json[/]
    """
    from toolchain.report import write_report
    from toolchain.stages import run_lock

    _refuse_torchrun()
    _require_run(run)
    with run_lock(run):
        document = write_report(run)
    _print_report(document, run, as_json)


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
    from export.predict import predict as rank_labels

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


recipes_app = typer.Typer(invoke_without_command=True)
app.add_typer(recipes_app, name="recipes")


@recipes_app.callback()
def recipes(context: typer.Context, as_json: JsonOpt = False) -> None:
    """List the recipes that ship; copy one to edit.

    Example: [bold]clipkd recipes[/]
    """
    if context.invoked_subcommand is not None:
        return
    from toolchain.recipe import shipped_recipes
    from toolchain.sources import SHIPPED

    described = {name: (SHIPPED / f"{name}.yaml").read_text(encoding="utf-8") for name in shipped_recipes()}
    headlines = {name: text.split("\n#\n")[0].replace("\n", " ").replace("# ", "") for name, text in described.items()}
    if as_json:
        stdout.print_json(json.dumps(headlines))
        return
    table = Table(Column("recipe", no_wrap=True), "what it does")
    for name, headline in headlines.items():
        table.add_row(name, escape(headline))
    wide = stdout if stdout.is_terminal else Console(width=160)  # a file or a pipe gets whole cells
    wide.print(table)


@recipes_app.command("copy")
def copy_recipe(
    name: Annotated[str, typer.Argument(help="A recipe that ships.")],
    file: Annotated[Path, typer.Argument(help="Where to write it.")],
) -> None:
    """Copy a recipe that ships to a file of yours.

    Example: [bold]clipkd recipes copy glyphs my.yaml[/]
    """
    from toolchain.recipe import recipe_path

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

    from toolchain.recipe import load_recipe, recipe_path

    loaded = load_recipe(recipe_path(recipe), overrides)
    stages = [{"stage": path, "state": _state(out / path) if out else "not made"} for path in _stage_paths(loaded)]
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
    from toolchain.stages import MANIFEST, open_stage

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


# The stages -----------------------------------------------------------------------------------------------------------


def _train(recipe: "Recipe", out: Path, screen: "_Screen", how: "_How") -> "dict[str, Stage]":
    """The frozen teacher, the student it teaches, and if asked for the same student, seed and batches without it."""
    from toolchain.recipe import teacher_recipe

    if not (out / "student").exists():
        _refuse_misfits(recipe, screen)
    if recipe.teacher is None:
        return {"student": _train_one(recipe, out, "student", None, screen, how)}
    if recipe.teacher.recipe is not None:
        teacher = _train_one(teacher_recipe(recipe.teacher), out, "teacher", None, screen, how)
    else:
        teacher = _adopt_teacher(recipe, out, screen, how)
    made = {"teacher": teacher}
    if recipe.baseline:
        made["baseline"] = _train_one(recipe, out, "baseline", None, screen, how)
    return made | {"student": _train_one(recipe, out, "student", teacher, screen, how)}


def _refuse_misfits(recipe: "Recipe", screen: "_Screen") -> None:
    """Say that models cannot be trained together before anything is read, downloaded or trained for them."""
    from toolchain.models import build_model, check_pair
    from toolchain.recipe import teacher_recipe

    without_weights = {"pretrained": None, "checkpoint": None, "init": "random"}
    student = build_model(recipe.student.model_copy(update=without_weights), seed=0, say=screen.say)
    teacher = None
    if recipe.teacher is not None:
        spec = teacher_recipe(recipe.teacher).student if recipe.teacher.recipe else recipe.teacher
        teacher = build_model(spec.model_copy(update=without_weights), seed=0, say=screen.say)
    check_pair(student, teacher, recipe.distill.loss_weights)


def _adopt_teacher(recipe: "Recipe", out: Path, screen: "_Screen", how: "_How") -> "Stage":
    """The teacher from wherever it comes, as an open_clip local-dir in the run."""
    from toolchain.sources import fingerprint

    spec = recipe.teacher
    assert spec is not None

    def work(folder: Path) -> dict[str, Any]:
        from toolchain.models import build_model, save_model

        if how.leads:
            save_model(build_model(spec, seed=recipe.seed, say=screen.say), folder)
        return {"role": "teacher", "source": spec.model_dump(exclude_defaults=True), "train_s": None}

    screen.starts("teacher")
    fields = {"seed": recipe.seed} if spec.is_random else {}
    stage = _make_stage(
        how,
        out / "teacher",
        kind="adopt",
        version=2,
        fields=fields,
        fingerprints={"model": fingerprint(spec)},
        inputs={},
        work=work,
    )
    screen.done("teacher", stage)
    return stage


def _train_one(
    recipe: "Recipe", out: Path, name: str, teacher: "Stage | None", screen: "_Screen", how: "_How"
) -> "Stage":
    from toolchain.sources import fingerprint

    spec = recipe.distill
    if teacher is None:  # nothing it reads depends on the weights of losses it does not have
        alone = type(spec.loss_weights)(**dict.fromkeys(spec.loss_weights.model_dump(), 0.0) | {"task": 1.0})
        changes = {"loss_weights": alone, "stored_teacher_features": False, "teacher_precision": "fp32"}
        spec = spec.model_copy(update=changes | {"reference_compat": False})

    def work(folder: Path) -> dict[str, Any]:
        from toolchain.distil import Engine, distil
        from toolchain.feed import training_data
        from toolchain.models import build_model, load_model
        from toolchain.processes import join_processes
        from toolchain.validate import headline_accuracy

        student = build_model(recipe.student, seed=recipe.seed, say=screen.say)
        frozen = load_model(teacher.path) if teacher else None
        processes = join_processes()
        with processes.first_alone():  # shards are indexed once
            data = training_data(
                recipe.data, seed=recipe.seed, batch_size=spec.batch_size, progress=screen.progress, say=screen.say
            )
        accuracy = None
        if spec.evaluate_every and recipe.evaluate:
            headline = glyphs.eval_set(recipe.evaluate.headline)
            accuracy = headline_accuracy(headline.images_KHWC, headline.names, glyphs.TEMPLATES)
        engine = Engine(
            processes,
            _num_workers(recipe, how),
            how.checkpoint_steps,
            60 * how.checkpoint_minutes,
            how.keep_checkpoints,
            screen.say,
        )
        progress = screen.progress
        trained = distil(
            spec, student, frozen, data, folder, progress, seed=recipe.seed, engine=engine, accuracy=accuracy
        )
        return {"role": name} | trained

    from toolchain import glyphs

    screen.starts(name)
    evaluated = {"headline": recipe.evaluate.headline} if spec.evaluate_every and recipe.evaluate else {}
    stage = _make_stage(
        how,
        out / name,
        kind="distil",
        version=2,
        fields={"seed": recipe.seed, "data": recipe.data.model_dump(), "distill": spec.model_dump()} | evaluated,
        fingerprints={"data": _data_fingerprint(recipe), "student": fingerprint(recipe.student)},
        inputs={"teacher": teacher} if teacher else {},
        work=work,
    )
    screen.done(name, stage)
    return stage


def _data_fingerprint(recipe: "Recipe") -> str:
    """What a stage that reads the training data depends on."""
    if recipe.data.kind == "glyphs":
        from toolchain import glyphs

        return glyphs.fingerprint()
    from toolchain.shard_files import expand, fingerprint

    return fingerprint(expand(recipe.data.shards))


def _num_workers(recipe: "Recipe", how: "_How") -> int:
    """Unless told: none for glyphs, which cost little to draw; else the cores that training leaves free."""
    if how.workers is not None:
        return how.workers
    return 0 if recipe.data.kind == "glyphs" else max(1, (os.cpu_count() or 1) // how.size - 1)


def _make_stage(how: "_How", path: Path, *, work: Callable[[Path], dict[str, Any]], **depends: Any) -> "Stage":
    """A stage of one process, or of those that torchrun started: the first makes it, the others work along."""
    from toolchain.stages import open_stage, run_stage

    if how.size == 1:
        return run_stage(path, work=work, **depends)
    from toolchain.processes import join_processes

    together = join_processes()
    if together.leads:

        def working(folder: Path) -> dict[str, Any]:
            together.share(str(folder))
            return work(folder)

        stage = run_stage(path, work=working, **depends)
        if stage.cached:
            together.share(None)
        together.wait()
        return stage
    folder = together.share(None)
    if folder is not None:
        work(Path(folder))
    together.wait()
    return open_stage(path)


def _quantize(recipe: "Recipe", out: Path, made: "dict[str, Stage]", screen: "_Screen") -> "dict[str, Stage]":
    """The int8 student, calibrated and fine-tuned against the teacher."""
    spec = recipe.quantize
    if spec is None or "int8" not in recipe.export.precisions:
        return {}
    from toolchain.stages import run_stage

    name, student, teacher = "student-int8", made["student"], made.get("teacher")

    def work(folder: Path) -> dict[str, Any]:
        from toolchain.feed import training_data
        from toolchain.finetune import quantize_student
        from toolchain.models import load_model

        data = training_data(recipe.data, seed=recipe.seed, batch_size=spec.batch_size)
        frozen = load_model(teacher.path) if teacher else None
        weights, float_student = recipe.distill.loss_weights, load_model(student.path)
        quantized = quantize_student(
            spec, weights, float_student, frozen, data, folder, screen.progress, seed=recipe.seed
        )
        return {"role": "student"} | quantized

    screen.starts(name)
    stage = run_stage(
        out / name,
        kind="quantize",
        version=2,
        fields={
            "seed": recipe.seed,
            "data": recipe.data.model_dump(),
            "quantize": spec.model_dump(),
            "loss_weights": recipe.distill.loss_weights.model_dump(),
        },
        fingerprints={"data": _data_fingerprint(recipe)},
        inputs={"student": student} | ({"teacher": teacher} if teacher else {}),
        work=work,
    )
    screen.done(name, stage)
    return {name: stage}


def _export(recipe: "Recipe", out: Path, made: "dict[str, Stage]", screen: "_Screen") -> "dict[str, Stage]":
    """ONNX graphs of every model, each held against its PyTorch model before it counts as made."""
    from toolchain import glyphs
    from toolchain.stages import run_stage

    exported = {}
    evaluated = _evaluated(recipe)
    for name, role, precision in _exports(recipe):
        checkpoint = made[f"{role}-int8" if precision == "int8" else role]

        def work(
            folder: Path, role: str = role, precision: str = precision, checkpoint: "Stage" = checkpoint
        ) -> dict[str, Any]:
            from export.parity import check_parity
            from export.to_onnx import export_onnx
            from toolchain.models import load_model
            from toolchain.quantize import example_pixels, freeze, load_quantized

            model = load_model(checkpoint.path)
            image_tower, text_tower = None, None
            if precision == "int8":
                image, text = load_quantized(checkpoint.path, model)
                image_tower = freeze(image, example_pixels(model.net))
                text_tower = freeze(text, model.tokenize(list(glyphs.TEMPLATES)))
            headline = glyphs.eval_set(evaluated.headline)
            screen.progress("to ONNX", 0, 2)
            summary = export_onnx(
                model,
                folder,
                role=role,
                precision=precision,
                eval_images=headline.images_KHWC,
                names=headline.names,
                templates=glyphs.TEMPLATES,
                opset=recipe.export.opset,
                image_tower=image_tower,
                text_tower=text_tower,
            )
            screen.progress("parity", 1, 2)
            summary["parity"] = check_parity(folder, precision=precision)
            return summary

        screen.starts(name)
        exported[name] = run_stage(
            out / "exported" / name,
            kind="export",
            version=1,
            fields={"precision": precision, "opset": recipe.export.opset, "headline": evaluated.headline},
            fingerprints={"glyphs": glyphs.fingerprint()},
            inputs={"checkpoint": checkpoint},
            work=work,
        )
        screen.done(name, exported[name])
    return exported


def _measure(recipe: "Recipe", out: Path, exported: "dict[str, Stage]", screen: "_Screen") -> "dict[str, Stage]":
    """Parity, accuracy and latency of each exported model, in its own runtime on this machine."""
    from toolchain import glyphs
    from toolchain.stages import machine, run_stage

    measured = {}
    evaluated = _evaluated(recipe)
    for name, model in exported.items():

        def work(folder: Path, model: "Stage" = model) -> dict[str, Any]:
            from export.measure import measure

            return measure(model.path, folder, evaluated, recipe.profile, screen.progress)

        screen.starts(f"measured/{name}")
        measured[name] = run_stage(
            out / "measured" / name / "cpu",
            kind="measure",
            version=1,
            fields={"evaluate": evaluated.model_dump(), "profile": recipe.profile.model_dump()},
            fingerprints={"glyphs": glyphs.fingerprint(), "machine": json.dumps(machine(), sort_keys=True)},
            inputs={"model": model},
            work=work,
        )
        screen.done(f"measured/{name}", measured[name])
    return measured


def _report(out: Path, measured: "dict[str, Stage]", screen: "_Screen") -> dict[str, Any]:
    """report.json and its readable forms, written again only when something measured is new."""
    from toolchain.stages import MANIFEST

    path = out / "report.json"
    screen.starts("report")
    newest = max((stage.path / MANIFEST).stat().st_mtime_ns for stage in measured.values())
    files = [path.with_suffix(suffix) for suffix in (".json", ".csv", ".md", ".png", ".html")]
    if all(file.exists() and file.stat().st_mtime_ns >= newest for file in files):
        report: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        screen.line("report", "cached")
        return report
    from toolchain.report import write_report

    report = write_report(out)
    screen.line("report", "written")
    return report


def _evaluated(recipe: "Recipe") -> "EvaluateSpec":
    if recipe.evaluate is None:
        raise UsageError(
            f"recipe {recipe.name} has no evaluate section, so that there is nothing to export for and report on; "
            "add one, or train only, with: clipkd distill"
        )
    return recipe.evaluate


def _exports(recipe: "Recipe") -> list[tuple[str, str, str]]:
    """Name, role and precision of every exported model."""
    others = (("teacher", "baseline") if recipe.baseline else ("teacher",)) if recipe.teacher else ()
    pairs = [(role, "fp32") for role in others] + [("student", precision) for precision in recipe.export.precisions]
    return [
        (f"{role}-{runtime}-{precision}", role, precision)
        for runtime in recipe.export.runtimes
        for role, precision in pairs
    ]


def _stage_paths(recipe: "Recipe") -> list[str]:
    trained = (["teacher"] if recipe.teacher else []) + (["baseline"] if recipe.baseline else []) + ["student"]
    quantized = ["student-int8"] if "int8" in recipe.export.precisions else []
    names = [name for name, _, _ in _exports(recipe)] if recipe.evaluate else []
    return trained + quantized + [f"exported/{n}" for n in names] + [f"measured/{n}/cpu" for n in names]


def _state(path: Path) -> str:
    from toolchain.stages import open_stage

    if path.exists():
        open_stage(path)
        return "made"
    return "interrupted" if path.with_name(f".{path.name}.partial").exists() else "not made"


# The terminal ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _How:
    """What of training the command line decides, and no number of the result depends on."""

    workers: int | None = None
    checkpoint_steps: int | None = None
    checkpoint_minutes: float = 1.0
    keep_checkpoints: int = 2

    @property
    def size(self) -> int:
        """How many processes torchrun started."""
        return int(os.environ.get("WORLD_SIZE", "1"))

    @property
    def leads(self) -> bool:
        """Whether this is the first of them, the one that writes and speaks."""
        return os.environ.get("RANK", "0") == "0"


@dataclass
class _Screen:
    """Progress on stderr: a live bar on a terminal, a line now and then elsewhere, one line per stage anywhere."""

    bar: "Progress"
    silent: bool = False
    task: "TaskID | None" = None
    what: str = ""
    stage: str = ""
    first: tuple[float, int] = (0.0, 0)
    spoken_at: float = 0.0

    def starts(self, stage: str) -> None:
        self.stage, self.what = stage, ""

    def progress(self, what: str, done: int, total: int, note: str = "") -> None:
        if self.bar.disable:
            self._now_and_then(what, done, total, note)
            return
        if self.task is None or what != self.what:
            self._clear()
            self.what, self.task = what, self.bar.add_task(f"{self.stage}: {what}", total=total, note="")
        self.bar.update(self.task, completed=done, total=total, note=note)

    def _now_and_then(self, what: str, done: int, total: int, note: str) -> None:
        """Where there is no terminal to draw on: a line every half minute, with the time left at the rate since."""
        now = time.monotonic()
        if what != self.what:
            self.what, self.first, self.spoken_at = what, (now, done), now
        if now - self.spoken_at < _LINE_EVERY_S or self.silent:
            return
        self.spoken_at = now
        left_s = (now - self.first[0]) / max(1, done - self.first[1]) * (total - done)
        left = timedelta(seconds=round(left_s))
        self.bar.console.print(
            f"{self.stage}: {what} {done}/{total}  {left} left  {note}", highlight=False, markup=False, soft_wrap=True
        )

    def say(self, text: str) -> None:
        """Something the user should know that is neither progress nor an error."""
        if not self.silent:
            self.bar.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def done(self, name: str, stage: "Stage") -> None:
        self.line(name, "cached" if stage.cached else f"done in {stage.manifest['took_s']:.0f} s")

    def line(self, name: str, text: str) -> None:
        self._clear()
        if not self.silent:
            self.bar.console.print(f"{name:<40} {text}", highlight=False, markup=False)

    def _clear(self) -> None:
        if self.task is not None:
            self.bar.remove_task(self.task)
            self.task = None


@contextmanager
def _run_directory(
    name: str | None, out: Path, overrides: list[str] | None, *, shared: bool = False
) -> "Iterator[tuple[Recipe, _Screen]]":
    """Hold a run directory with its recipe resolved into it; `name` None: the recipe the run has.

    `shared`: several processes may work in it, of which the first holds it.
    """
    import yaml
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from toolchain.recipe import load_recipe, recipe_path
    from toolchain.stages import RESOLVED, run_lock

    if not shared:
        _refuse_torchrun()
    if name is None:
        _require_run(out)
    recipe = load_recipe(out / "recipe.yaml" if name is None else recipe_path(name), overrides)
    if not _How().leads:
        yield recipe, _Screen(Progress(disable=True), silent=True)
        return
    with run_lock(out):
        said = "".join(f"# {line}\n" for line in [*f"clipkd {shlex.join(sys.argv[1:])}".splitlines(), RESOLVED])
        resolved = said + yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False)
        partial = out / ".recipe.yaml.partial"
        partial.write_text(resolved, encoding="utf-8")
        partial.replace(out / "recipe.yaml")
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        note, quiet = TextColumn("{task.fields[note]}"), not stderr.is_terminal
        with Progress(*columns, note, console=stderr, transient=True, disable=quiet) as bar:
            yield recipe, _Screen(bar)


def _refuse_torchrun() -> None:
    if _How().size > 1:
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
    from toolchain.report import terminal_rows

    headers, rows = terminal_rows(document)
    if len({row["runtime"] for row in document["rows"]}) == 1:  # then the names, which end in the precision, say it all
        kept = [index for index, header in enumerate(headers) if header not in ("runtime", "precision")]
        headers, rows = [headers[index] for index in kept], [[row[index] for index in kept] for row in rows]
    table = Table(*(Column(header, overflow="fold") for header in headers))
    for row in rows:
        table.add_row(*(escape(cell) for cell in row))
    wide = stdout if stdout.is_terminal else Console(width=160)  # a file or a pipe gets whole cells
    wide.print(table)
    stderr.print(f"{out / 'report.html'}", soft_wrap=True, highlight=False, markup=False)


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
