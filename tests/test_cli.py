"""The command line: exit codes, full messages, the content of stdout, and the few modules that help imports."""

import errno
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
import yaml
from conftest import REPOSITORY, Ended
from PIL import Image
from test_report import edit, make_run

import clipkd as command
from export.pipeline import export as deployment_stages
from export.pipeline import quantize_or_reject as quantize_module
from export.pipeline import report as report_module
from toolchain.errors import ClipkdError
from toolchain.pipeline import train as training_stages
from toolchain.recipe.load import load_recipe, shipped_recipes
from toolchain.report.collect import collect
from toolchain.report.row import COUNT, FIELDS, Field
from toolchain.stage import Stage, StageSpec, run_stage

Clipkd = Callable[..., Ended]

COMMANDS = [
    [],
    *([info.name or info.callback.__name__] for info in command.app.registered_commands if info.callback),
    *([group.name] for group in command.app.registered_groups),
    ["recipes", "copy"],
    ["data", "inspect"],
    ["data", "pack"],
    *(["devices", name] for name in ("list", "add", "test", "remove")),
]


def python(*arguments: str | Path, cwd: Path = REPOSITORY, path: Path = REPOSITORY) -> subprocess.CompletedProcess[str]:
    """Run Python in a new process that finds clipkd through PYTHONPATH, not through its working directory."""
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=cwd,
        env={"PYTHONPATH": str(path), "PATH": "/usr/bin:/bin", "COLUMNS": "120"},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run directory with a recipe and no stages."""
    folder = tmp_path / "run"
    folder.mkdir()
    recipe = load_recipe(REPOSITORY / "recipes" / "glyphs.yaml").model_dump(mode="json")
    (folder / "recipe.yaml").write_text("# resolved by clipkd:\n" + yaml.safe_dump(recipe))
    return folder


@pytest.fixture
def recipe(tmp_path: Path, teacher_folder: Path) -> Path:
    """A recipe outside the repository, next to its teacher's weights."""
    shutil.copytree(teacher_folder, tmp_path / "teacher")
    content = (REPOSITORY / "recipes" / "glyphs.yaml").read_text()
    (tmp_path / "mine.yaml").write_text(content.replace("model: glyphs_teacher", "model: teacher"))
    return tmp_path / "mine.yaml"


# Help.


def test_commands_were_found() -> None:
    names = {" ".join(path) for path in COMMANDS if None not in path}
    assert {"run", "distill", "quantize", "export", "report", "predict", "verify", "show", "recipes"} <= names


@pytest.mark.parametrize("path", COMMANDS[1:], ids=" ".join)
def test_every_command_has_an_example_that_names_it(clipkd: Clipkd, path: list[str]) -> None:
    ended = clipkd(*path, "--help")
    assert ended.code == 0
    text = " ".join(ended.out.replace("│", " ").split())
    assert f"Example: clipkd {' '.join(path)}" in text
    assert ended.err == ""


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_help_fits_80_columns(clipkd: Clipkd, path: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    lines = clipkd(*path, "--help").out.splitlines()
    assert max(map(len, lines)) <= 80
    for line in lines:
        if line[:1] in {"│", "╭", "╰"}:
            assert line[-1] == {"│": "│", "╭": "╮", "╰": "╯"}[line[0]], line
            assert len(line) == 80
    usage = next(line for line in lines if "Usage:" in line)
    assert usage.startswith(f" Usage: {' '.join(['clipkd', *path])} [OPTIONS]")
    assert not set("{}<>") & set(usage)
    assert not [line for line in lines if "<bool>" in line], "a flag takes no value"


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_each_example_is_a_command_that_parses(
    clipkd: Clipkd, path: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Check that a shell runs each example as it stands in a terminal of 80 columns; `\\` continues a line."""
    monkeypatch.setenv("COLUMNS", "80")
    text = "\n".join(line.strip() for line in clipkd(*path, "--help").out.splitlines()).replace("\\\n", "")
    examples = re.findall(r"^(?!Usage)[A-Z][^:|]*: ((?:torchrun|clipkd) .*)$", text, re.MULTILINE)
    assert examples
    for example in examples:
        words = shlex.split(example)
        words = words[words.index("clipkd") + 1 :]
        group: Any = typer.main.get_command(command.app)
        while words and hasattr(group, "commands") and words[0] in group.commands:
            group = group.commands[words.pop(0)]
        group.make_context("clipkd", words, resilient_parsing=False)


def test_help_loads_nothing_heavy() -> None:
    script = (
        "import sys\nsys.argv = ['clipkd', '--help']\nimport clipkd\n"
        "try: clipkd.main()\n"
        "finally: sys.stderr.write(' '.join({'numpy', 'pydantic', 'torch', 'onnxruntime', 'PIL'} & set(sys.modules)))"
    )
    ended = python("-c", script)
    assert ended.returncode == 0
    assert "Usage: clipkd" in ended.stdout
    assert ended.stderr == ""


# Results go to stdout, everything else to stderr; in a new process, started in another directory.


def test_a_result_goes_to_stdout(tmp_path: Path) -> None:
    ended = python("-m", "clipkd", "recipes", "--json", cwd=tmp_path)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert set(json.loads(ended.stdout)) >= {"glyphs", "glyphs_teacher"}


def test_an_error_goes_to_stderr_with_its_exit_code(tmp_path: Path) -> None:
    ended = python("-m", "clipkd", "run", "glyphs", "--out", "run", "--set", "distill.setps=3", cwd=tmp_path)
    assert (ended.returncode, ended.stdout) == (2, "")
    recipe = REPOSITORY / "recipes" / "glyphs.yaml"
    said = "1 problem(s)\n  distill.setps: unknown key; did you mean steps?\n"
    assert ended.stderr == f"error: {recipe} with --set distill.setps=3: {said}"
    assert list(tmp_path.iterdir()) == [], "a recipe that is wrong makes no run directory"


@pytest.mark.parametrize("package", ["toolchain", "export", "recipes"])
def test_foreign_packages_are_refused(tmp_path: Path, package: str) -> None:
    (tmp_path / "foreign" / package).mkdir(parents=True)
    (tmp_path / "foreign" / package / "__init__.py").write_text("")
    ended = subprocess.run(
        [sys.executable, "-m", "clipkd", "recipes"],
        cwd=tmp_path,
        env={"PYTHONPATH": f"{tmp_path / 'foreign'}:{REPOSITORY}"},
        capture_output=True,
        text=True,
    )
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr == (
        f"error: the package '{package}' was found in {tmp_path / 'foreign'}, expected in {REPOSITORY}; "
        f"run from another directory, or remove {tmp_path / 'foreign'} from PYTHONPATH\n"
    )


INTERRUPTED = """
import sys, time
from pathlib import Path
from types import SimpleNamespace
import clipkd
from toolchain.pipeline import train as training_stages
from toolchain.stage import StageSpec, run_stage

def work(folder):
    (folder / "checkpoint").write_text("half")
    screen.progress("training", 1, 2)
    sys.stderr.write("working\\n")
    sys.stderr.flush()
    time.sleep(60)

def train(recipe, out, asked, how):
    global screen
    screen = asked
    stage = run_stage(StageSpec(out / "student", kind="x", version=1), work)
    return {"student": stage}

training_stages.train_checkpoints = train
clipkd.main()
"""


@pytest.fixture
def working(tmp_path: Path) -> Iterator["subprocess.Popen[str]"]:
    """A `clipkd distill` process in the middle of a one-minute training."""
    arguments = [sys.executable, "-c", INTERRUPTED, "distill", "glyphs", "--out", str(tmp_path / "run")]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(arguments, cwd=REPOSITORY, **pipes) as process:
        assert process.stderr is not None
        assert process.stderr.readline() == "working\n"
        yield process
        process.kill()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "sigterm"])
def test_asked_to_stop_it_ends_with_130_and_leaves_what_continues(
    working: "subprocess.Popen[str]", tmp_path: Path, number: signal.Signals
) -> None:
    working.send_signal(number)
    out, err = working.communicate(timeout=30)
    assert working.returncode == 130
    assert out == ""
    assert "Traceback" not in err
    assert (tmp_path / "run" / ".student.partial" / "checkpoint").read_text() == "half"
    assert not (tmp_path / "run" / "student").exists()


def test_two_runs_at_once(working: "subprocess.Popen[str]", tmp_path: Path, clipkd: Clipkd) -> None:
    run = tmp_path / "run"
    ended = clipkd("distill", "glyphs", "--out", run)
    assert (ended.code, ended.out) == (1, "")
    assert ended.err == f"error: {run}: another clipkd is using this run; wait for it to end, or choose another --out\n"


# Bad input: exit code and full message.


def test_wrong_type(clipkd: Clipkd, tmp_path: Path) -> None:
    ended = clipkd("run", "glyphs", "--out", tmp_path / "run", "--set", "distill.steps=many")
    assert (ended.code, ended.out) == (2, "")
    assert ended.err == (
        f"error: {REPOSITORY / 'recipes' / 'glyphs.yaml'} with --set distill.steps=many: 1 problem(s)\n"
        "  distill.steps: Input should be a valid integer, unable to parse string as an integer (got 'many')\n"
    )


def test_unknown_recipe(clipkd: Clipkd, tmp_path: Path) -> None:
    ended = clipkd("run", "glyph", "--out", tmp_path / "run")
    assert (ended.code, ended.out) == (2, "")
    assert (
        ended.err == "error: glyph: no included recipe has this name, and no such file exists; did you mean glyphs?\n"
    )


@pytest.mark.parametrize("verb", ["quantize", "export", "report"])
def test_missing_run(clipkd: Clipkd, tmp_path: Path, verb: str) -> None:
    run = tmp_path / "absent"
    ended = clipkd(verb, run)
    assert (ended.code, ended.out) == (2, "")
    assert ended.err == f"error: {run}: no such run directory. Make one with: clipkd run glyphs --out {run}\n"
    assert not run.exists()
    ended = clipkd(verb, tmp_path)
    assert ended.code == 2
    assert ended.err == (
        f"error: {tmp_path}: no recipe.yaml in it; not a clipkd run. "
        f"Make one with: clipkd run glyphs --out {tmp_path}\n"
    )


def test_what_is_no_run_is_named_for_what_it_is(clipkd: Clipkd, tmp_path: Path) -> None:
    recipe = tmp_path / "my.yaml"
    recipe.write_text("name: my\n")
    assert clipkd("quantize", recipe).err == (
        f"error: {recipe}: is a file; expected a run directory; make a run from this recipe with: "
        f"clipkd run {recipe} --out RUN\n"
    )
    student = tmp_path / "run" / "student"
    student.mkdir(parents=True)
    (student / "manifest.json").write_text("{}")
    said = clipkd("export", student.parent).err
    assert said.startswith(f"error: {student.parent}: it has stages, but no recipe.yaml. Restore that file, or repeat")
    assert "glyphs" not in said, "another recipe in this run would replace its stages"
    (student.parent / "recipe.yaml").write_text("name: my\n")
    said = clipkd("report", student).err
    assert (
        said == f"error: {student}: expected a run directory; this is a part of the run {student.parent}. Name that\n"
    )
    for verb in ("show", "doctor"):
        said = clipkd(verb, student.parent).err
        assert "is a directory; expected a recipe; name this one's recipe: " in said
        assert str(student.parent / "recipe.yaml") in said


def test_verify_checks_all_stages_though_one_is_damaged(clipkd: Clipkd, tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        run_stage(StageSpec(tmp_path / name, "test", 1), lambda folder: {"n": (folder / "file").write_text("content")})
    (tmp_path / "a" / "file").unlink()
    (tmp_path / "b" / "file").write_text("other")
    ended = clipkd("verify", tmp_path)
    assert (ended.code, ended.out) == (1, f"ok {tmp_path / 'c'}\n")
    assert re.sub("[0-9a-f]{16}", "HASH", ended.err).count("changed since clipkd wrote it: expected sha256 HASH") == 2


def test_a_terminal_that_lacks_a_character_shows_its_escape(tmp_path: Path) -> None:
    command = [sys.executable, REPOSITORY / "clipkd.py", "show", tmp_path / "n\u00fc\udcff\u2605.yaml"]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    ended = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert ended.returncode == 2
    assert "n\\xfc\\udcff\\u2605.yaml: no included recipe has this name" in ended.stderr
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize("arguments", [["recipes", "copy", "glyphs"], ["run", "glyphs", "--out"]])
def test_a_file_where_a_folder_is_needed_is_named(clipkd: Clipkd, tmp_path: Path, arguments: list[str]) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    ended = clipkd(*arguments, file / "deep" / "x.yaml")
    assert ended.code == 1
    assert str(file) in ended.err
    assert "Traceback" not in ended.err
    assert file.read_text() == "mine"


def test_a_run_is_reported_once(clipkd: Clipkd, run: Path, tmp_path: Path) -> None:
    ended = clipkd("report", run, run / ".." / run.name, "--out", tmp_path / "joint")
    assert ended.code == 2
    assert ended.err.startswith("error: report: a run is named twice: ")
    assert not (tmp_path / "joint").exists()


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (errno.EACCES, "error: runs/x: Permission denied. Change its permissions, or choose another place\n"),
        (errno.EROFS, "error: runs/x: Read-only file system. Choose a place that can be written, as with --out\n"),
        (errno.EDQUOT, "Finished stages and the last training checkpoint are kept"),
    ],
)
def test_errors_of_the_system_that_a_user_can_fix_are_messages(
    clipkd: Clipkd, monkeypatch: pytest.MonkeyPatch, number: int, said: str
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError(number, os.strerror(number), "runs/x")

    monkeypatch.setattr("toolchain.recipe.load.load_recipe", fail)
    ended = clipkd("show", "glyphs")
    assert ended.code == 1
    assert said in ended.err
    assert "Traceback" not in ended.err


@pytest.mark.parametrize("verb", ["run", "distill"])
@pytest.mark.parametrize("name", ["thesis.tex", "recipe.yaml"])
def test_foreign_directory(clipkd: Clipkd, tmp_path: Path, verb: str, name: str) -> None:
    (tmp_path / name).write_text("years of work")
    ended = clipkd(verb, "glyphs", "--out", tmp_path)
    assert (ended.code, ended.out) == (1, "")
    assert ended.err == (
        f"error: {tmp_path}: not empty, and no recipe.yaml of clipkd; not a run. Choose another --out\n"
    )
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [(name, "years of work")]


def test_foreign_directory_in_a_stages_place(clipkd: Clipkd, recipe: Path, tmp_path: Path) -> None:
    teacher = tmp_path / "run" / "teacher"
    teacher.mkdir(parents=True)
    (tmp_path / "run" / "recipe.yaml").write_text("# resolved by clipkd:\n")
    ended = clipkd("distill", recipe, "--out", tmp_path / "run")
    assert ended.code == 1
    assert ended.err == (
        f"error: {teacher}: no manifest.json, so clipkd did not make this directory and does not change it\n"
    )
    assert list(teacher.iterdir()) == []


def test_corrupted_weights(clipkd: Clipkd, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object) -> Stage:
        raise ClipkdError("stop after the teacher")

    monkeypatch.setattr(training_stages, "_train_one", stop)
    run = tmp_path / "run"
    first = clipkd("distill", recipe, "--out", run)
    assert "teacher" in first.err
    assert "done in " in first.err
    assert first.err.endswith("error: stop after the teacher\n")
    weights = run / "teacher" / "open_clip_model.safetensors"
    weights.write_bytes(b"wEights")
    again = ["distill", recipe, "--out", run]
    for arguments in (again, ["verify", run], ["show", *again[1:]], ["export", run]):
        ended = clipkd(*arguments)
        assert (ended.code, ended.out) == (1, ""), arguments
        assert re.sub("[0-9a-f]{16}", "HASH", ended.err) == (
            f"error: {weights}: changed since clipkd wrote it: expected sha256 HASH, got HASH. "
            f"Restore it from a copy, or remove {run / 'teacher'} and run the command again\n"
        )


class Grey:
    def preprocess(self, image: Image.Image) -> np.ndarray:
        return np.ones((3, 1, 1), np.float32)

    def encode_pixels(self, pixel_values_BCHW: np.ndarray) -> np.ndarray:
        return np.ones((len(pixel_values_BCHW), 2), np.float32)

    def compute_probabilities(self, image_BE: np.ndarray, features_KD: np.ndarray) -> np.ndarray:
        return np.full((len(image_BE), len(features_KD)), 1 / len(features_KD), np.float32)


def test_one_unreadable_image_among_many(clipkd: Clipkd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "image.onnx").write_bytes(b"")
    np.savez(tmp_path / "classes.npz", names=["a", "b"], features_KD=np.eye(2, dtype=np.float32), logit_scale=1)
    monkeypatch.setattr("export.runtime.predict.open_exported", lambda path: Grey())
    monkeypatch.chdir(tmp_path)
    photos = Path("photos")
    photos.mkdir()
    Image.new("RGB", (4, 4)).save(photos / ":cat:.png")
    (photos / "notes.txt").touch()
    (photos / "torn.png").write_bytes(b"not a picture")
    arguments = ("predict", tmp_path, photos, "letter.png", "--top", "1")
    ended = clipkd(*arguments)
    assert ended.code == 1
    assert ended.out.splitlines() == [
        "photos/:cat:.png   50.0 %  a",
        "photos/torn.png   error: not an image: starts with b'not a pi'",
        "letter.png        error: no such file",
    ]
    assert ended.err == (
        "passed over, not images: 1 .txt\nerror: 2 of 3 images have no labels; their rows give the reasons\n"
    )
    document = json.loads(clipkd(*arguments, "--json").out)
    assert [row["labels"] for row in document] == [[{"label": "a", "probability": 0.5}], [], []]
    assert [row["error"] is None for row in document] == [True, False, False]
    lines = clipkd(*arguments, "--jsonl")
    assert (lines.code, [json.loads(line) for line in lines.out.splitlines()]) == (1, document)
    assert clipkd("predict", tmp_path, photos / ":cat:.png").code == 0
    assert clipkd(*arguments, "--json", "--jsonl").code == 2


def test_predict_without_a_model(clipkd: Clipkd, tmp_path: Path) -> None:
    ended = clipkd("predict", tmp_path, tmp_path / "letter.png")
    assert (ended.code, ended.out) == (1, "")
    assert ended.err == (
        f"error: {tmp_path}: no image.onnx; not an exported model; name a directory such as RUN/exported/NAME, "
        "or RUN/student; make one with: clipkd export RUN\n"
    )
    ended = clipkd("predict", tmp_path, tmp_path / "letter.png", "--labels", " , ")
    assert ended.code == 2
    assert ended.err == "error: --labels ' , ': contains no label; write, for example, --labels 'a cat,a dog'\n"


@pytest.mark.parametrize(
    "arguments", [["run"], ["run", "glyphs"], ["fly"], ["predict", "model", "x.png", "--top", "0"]]
)
def test_usage(clipkd: Clipkd, arguments: list[str]) -> None:
    ended = clipkd(*arguments)
    assert (ended.code, ended.out) == (2, "")
    assert ended.err.startswith("Usage: ")


def test_a_missing_package_names_its_extra(clipkd: Clipkd, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def train(*_: object) -> None:
        raise ModuleNotFoundError("No module named 'open_clip.model'", name="open_clip.model")

    monkeypatch.setattr(training_stages, "train_checkpoints", train)
    ended = clipkd("export", run)
    assert ended.code == 3
    assert (
        ended.err
        == "error: this command needs open_clip.model, which is not installed; run: pip install 'clipkd[train]'\n"
    )


def test_a_bug_keeps_its_traceback(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def train(*_: object) -> None:
        raise ModuleNotFoundError("No module named 'toolchain.nothing'", name="toolchain.nothing")

    monkeypatch.setattr(training_stages, "train_checkpoints", train)
    monkeypatch.setattr(sys, "argv", ["clipkd", "export", str(run)])
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with pytest.raises(ModuleNotFoundError):
        command.main()
    for number, handler in handlers.items():
        signal.signal(number, handler)


def test_a_full_disk_outside_of_stages(clipkd: Clipkd, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def train(*_: object) -> None:
        raise OSError(28, "No space left on device", "report.json")

    monkeypatch.setattr(training_stages, "train_checkpoints", train)
    ended = clipkd("export", run)
    assert ended.code == 1
    assert ended.err == (
        "error: the disk is full ([Errno 28] No space left on device: 'report.json'). Finished stages and the last "
        "training checkpoint are kept: free some space and repeat the command to resume\n"
    )


# recipes, show, verify.


def test_recipes_lists_each_with_its_headline(clipkd: Clipkd) -> None:
    headlines = json.loads(clipkd("recipes", "--json").out)
    assert headlines["glyphs"].endswith("the quickstart.")
    assert all("\n" not in text and "#" not in text for text in headlines.values())
    assert "glyphs_teacher" in clipkd("recipes").out


def test_recipes_copy(clipkd: Clipkd, tmp_path: Path) -> None:
    file = tmp_path / "new folder" / "my.yaml"
    ended = clipkd("recipes", "copy", "glyphs", file)
    assert (ended.code, ended.out, ended.err) == (0, f"{file}\n", "")
    assert file.read_text() == (REPOSITORY / "recipes" / "glyphs.yaml").read_text()
    assert load_recipe(file) == load_recipe(REPOSITORY / "recipes" / "glyphs.yaml")
    ended = clipkd("recipes", "copy", "glyphs", file)
    assert (ended.code, ended.err) == (2, f"error: {file}: exists already; choose another name\n")
    assert clipkd("recipes", "copy", "glyhps", tmp_path / "other.yaml").code == 2


def test_show_is_a_recipe_again(clipkd: Clipkd, tmp_path: Path) -> None:
    ended = clipkd("show", "glyphs", "--set", "seed=3")
    assert (ended.code, ended.err) == (0, "")
    (tmp_path / "again.yaml").write_text(ended.out)
    assert load_recipe(tmp_path / "again.yaml") == load_recipe(REPOSITORY / "recipes" / "glyphs.yaml", ["seed=3"])
    assert "# student-int8: not made\n" in ended.out


def test_show_resolves_every_recipe_that_ships(clipkd: Clipkd) -> None:
    names = shipped_recipes()
    assert len(names) > 30
    for name in names:
        ended = clipkd("show", name)
        assert (ended.code, ended.err) == (0, ""), name
        recipe = yaml.safe_load(ended.out)
        assert recipe["name"] == name.rpartition("/")[2]
        stages = [line for line in ended.out.splitlines() if line.startswith("# ")]
        assert "# student: not made" in stages
        assert ("# teacher: not made" in stages) == (recipe["teacher"] is not None)
        assert any("exported/" in stage for stage in stages) == (recipe["evaluate"] is not None)


def test_models_that_do_not_fit_are_refused_before_the_teacher_is_trained(clipkd: Clipkd, tmp_path: Path) -> None:
    run = tmp_path / "run"
    ended = clipkd("distill", "glyphs", "--out", run, "--set", "distill.loss_weights.mfd=1")
    assert (ended.code, ended.out) == (2, "")
    assert "cannot drop patches, which masked feature distillation needs" in ended.err
    assert [path.name for path in run.iterdir() if not path.name.startswith(".")] == ["recipe.yaml"]


def test_training_alone_needs_no_evaluation_and_reporting_does(clipkd: Clipkd, tmp_path: Path) -> None:
    ended = clipkd("run", "glyphs", "--out", tmp_path / "run", "--set", "evaluate=null")
    assert (ended.code, ended.out) == (2, "")
    assert "recipe glyphs has no evaluate section" in ended.err
    assert "clipkd distill" in ended.err


def test_a_missing_compiler_is_found_before_anything_is_trained(
    clipkd: Clipkd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    run = tmp_path / "run"
    ended = clipkd("run", "glyphs", "--out", run, "--set", "profile.pytorch=[eager, compiled]")
    assert (ended.code, ended.out) == (3, "")
    assert "there is no no-such-compiler on the PATH" in ended.err
    assert [path.name for path in run.iterdir() if not path.name.startswith(".")] == ["recipe.yaml"]


def test_show_says_what_a_run_has(clipkd: Clipkd, tmp_path: Path) -> None:
    run = tmp_path / "run"
    depends: dict[str, Any] = {"kind": "x", "version": 1, "fields": {}, "fingerprints": {}, "inputs": {}}
    run_stage(StageSpec(run / "teacher", **depends), lambda folder: {})
    (run / ".baseline.partial").mkdir()
    shown = json.loads(clipkd("show", "glyphs", "--out", run, "--json").out)
    states = {stage["stage"]: stage["state"] for stage in shown["stages"]}
    assert (states["teacher"], states["baseline"]) == ("of another recipe", "interrupted")
    assert states["student"] == "not made"
    assert {"exported/student-onnxruntime-int8", "measured/student-onnxruntime-int8/cpu"} < set(states)
    assert shown["recipe"]["seed"] == 0
    assert json.loads(clipkd("show", "glyphs_teacher", "--json").out)["recipe"]["teacher"] is None


def test_verify_checks_every_stage_of_a_run(clipkd: Clipkd, tmp_path: Path) -> None:
    depends: dict[str, Any] = {"kind": "x", "version": 1, "fields": {}, "fingerprints": {}, "inputs": {}}
    made = [run_stage(StageSpec(tmp_path / name, **depends), lambda folder: {}) for name in ("a", "b/c")]
    ended = clipkd("verify", tmp_path)
    assert (ended.code, ended.err) == (0, "")
    assert ended.out == "".join(f"ok {stage.path}\n" for stage in made)
    assert json.loads(clipkd("verify", made[1].path, "--json").out) == {str(made[1].path): made[1].digest}
    ended = clipkd("verify", tmp_path / "absent")
    assert ended.code == 2
    assert ended.err == (
        f"error: {tmp_path / 'absent'}: no clipkd stage in it; expected a run, or a directory with manifest.json\n"
    )


# The run's recipe.


def test_a_run_keeps_its_resolved_recipe_and_its_command(
    clipkd: Clipkd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training_stages, "train_checkpoints", lambda *_: {})
    run = tmp_path / "run"
    assert clipkd("distill", "glyphs", "--out", run, "--set", 'name="two\nseed: 99"').code == 0
    first = (run / "recipe.yaml").read_text()
    assert first.startswith("# clipkd distill glyphs --out ")
    assert load_recipe(run / "recipe.yaml").seed == 0, "a line break in an argument must not leave the comment"
    monkeypatch.setattr(quantize_module, "quantize_or_reject", lambda *_, **options: {})
    monkeypatch.setattr(deployment_stages, "export_models", lambda *_: {})
    assert clipkd("export", run, "--set", "seed=5", "--set", "export.opset=18").code == 0
    again = load_recipe(run / "recipe.yaml")
    assert (again.seed, again.export.opset) == (5, 18), "a later verb records its flags"
    assert [path.name for path in run.iterdir() if path.name.endswith(".partial")] == []


def test_json_of_a_stage(clipkd: Clipkd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = Stage(tmp_path / "student", {"summary": {"role": "student", "train_s": 1.5}}, cached=True)
    monkeypatch.setattr(training_stages, "train_checkpoints", lambda *_: {"student": stage})
    assert json.loads(clipkd("distill", "glyphs", "--out", tmp_path / "run", "--json").out) == {
        "student": {"path": str(tmp_path / "student"), "role": "student", "train_s": 1.5}
    }
    assert clipkd("distill", "glyphs", "--out", tmp_path / "run").out == f"{tmp_path / 'student'}\n"


# The report of a run.


def reported_run(run: Path) -> Path:
    """Return a run of trained, exported and measured stages with real manifests."""
    make_run(run)

    def again(path: Path) -> None:
        def copy(folder: Path) -> dict[str, Any]:
            shutil.copytree(kept, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("manifest.json"))
            summary: dict[str, Any] = json.loads((kept / "manifest.json").read_text())["summary"]
            return summary

        kept = path.rename(path.with_name(f".{path.name}.kept"))
        run_stage(StageSpec(path, kind="x", version=1), copy)
        shutil.rmtree(kept)

    for manifest in sorted(run.rglob("manifest.json")):
        again(manifest.parent)
    return run


class Lines:
    """A screen that records the last line of each stage."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def starts(self, stage: str) -> None: ...

    def line(self, name: str, text: str) -> None:
        assert name == "report"
        self.lines.append(text)


def reported(run: Path) -> str:
    """Return the screen's line for a run's report, after checking that the written files match the run."""
    screen = Lines()
    document = report_module.report_run(run, screen)  # type: ignore[arg-type]
    (ended,) = screen.lines
    assert document == json.loads((run / "report.json").read_text())
    assert {path.suffix[1:] for path in run.glob("report.*")} == {"json", "csv", "md", "png", "svg", "html"}
    return ended


@pytest.fixture(scope="module")
def reported_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = reported_run(tmp_path_factory.mktemp("reported") / "run")
    assert reported(run) == "written"
    return run


def test_a_second_report_and_that_of_a_copied_run_are_cached(reported_once: Path, tmp_path: Path) -> None:
    before = {path.name: path.read_bytes() for path in reported_once.glob("report.*")}
    assert reported(reported_once) == "cached"
    copied = shutil.copytree(reported_once, tmp_path / "copied", copy_function=shutil.copyfile)  # its files are newer
    (copied / "recipe.yaml").write_text("# clipkd run elsewhere\n" + (copied / "recipe.yaml").read_text())
    assert reported(copied) == "cached", "neither times nor the command that was run decide it"
    assert {path.name: path.read_bytes() for path in copied.glob("report.*")} == before


def change_measurement(run: Path) -> None:
    def work(folder: Path) -> dict[str, Any]:
        shutil.copytree(kept, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("manifest.json"))
        edit(folder / "profile.json", images_per_s=1.0)
        return {}

    path = run / "measured" / "student-onnxruntime-int8" / "cpu"
    kept = shutil.copytree(path, run / "kept")
    run_stage(StageSpec(path, kind="x", version=2), work)
    shutil.rmtree(kept)


def measure_on_another_device(run: Path) -> None:
    cpu = run / "measured" / "student-onnxruntime-int8" / "cpu"
    shutil.copytree(cpu, cpu.with_name("orin"))


def export_a_kit(run: Path) -> None:
    """Export a TensorRT build kit, which is not measured here; its row gives that as its status."""
    summary = {"role": "student", "runtime": "tensorrt", "precision": "int8"}
    run_stage(StageSpec(run / "exported" / "student-tensorrt-int8", kind="export", version=1), lambda folder: summary)


def train_again(run: Path) -> None:
    """Train to the same bytes in another time, so the digests are unchanged."""
    edit(run / "student" / "manifest.json", summary={"train_s": 1.0})


@pytest.mark.parametrize(
    "change",
    [
        *(change_measurement, measure_on_another_device, export_a_kit, train_again),
        lambda run: shutil.rmtree(run / "exported" / "teacher-onnxruntime-fp32"),
        lambda run: (run / "recipe.yaml").write_text("name: other\n"),
        lambda run: (run / "report.html").unlink(),
        lambda run: (run / "report.csv").write_text("mine"),
        lambda run: edit(run / "report.json", rows=[]),
        lambda run: (run / ".report.json").unlink(),
        lambda run: (run / ".report.json").write_text("torn"),
    ],
    ids=[
        *("measurement", "device", "kit", "training time", "export", "recipe"),
        *("deleted file", "edited file", "edited json", "no record", "torn record"),
    ],
)
def test_a_report_of_something_else_is_written_again(
    reported_once: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Path], Any]
) -> None:
    """This includes a kill between measuring and reporting: every stage is cached, but the report is older."""
    monkeypatch.setattr("toolchain.report.chart.render_chart", lambda report, form: b"drawn")
    run = shutil.copytree(reported_once, tmp_path / "run")
    change(run)
    assert reported(run) == "written"
    assert json.loads((run / "report.json").read_text()) == collect([run])
    assert reported(run) == "cached"


def test_a_new_field_is_in_the_report_of_a_finished_run(
    reported_once: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = shutil.copytree(reported_once, tmp_path / "run")
    monkeypatch.setitem(FIELDS, "opset", Field(COUNT, lambda of: of.summary.get("opset")))
    assert reported(run) == "written"
    assert {row["opset"] for row in json.loads((run / "report.json").read_text())["rows"]} == {20}
    monkeypatch.undo()
    assert reported(run) == "written"


def test_the_report_command_leaves_a_report_that_is_up_to_date(
    clipkd: Clipkd, reported_once: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("toolchain.report.chart.render_chart", lambda report, form: b"drawn")
    run = shutil.copytree(reported_once, tmp_path / "run")
    (run / "recipe.yaml").write_text("# resolved by clipkd:\nname: glyphs\n")
    assert clipkd("report", run).code == 0
    assert reported(run) == "cached"
    (tmp_path / "rows.csv").write_text("name,device,p50_ms,top1\nrival,cpu,1.0,0.5\n")
    assert clipkd("report", run, "--external", tmp_path / "rows.csv").code == 0
    assert reported(run) == "written", "the rows from elsewhere are not the run's"
    assert clipkd("report", run, "--out", tmp_path / "apart").code == 0
    assert not (tmp_path / "apart" / ".report.json").exists()
    assert reported(run) == "cached"


def test_a_report_that_is_up_to_date_loads_nothing_heavy(reported_once: Path) -> None:
    code = (
        "import sys\n"
        "for name in ('torch', 'numpy', 'matplotlib', 'plotly'): sys.modules[name] = None\n"
        "from pathlib import Path\n"
        "from export.pipeline.report import report_run\n"
        "class Screen:\n"
        "    starts = staticmethod(lambda name: None)\n"
        "    line = staticmethod(lambda name, text: sys.stdout.write(text))\n"
        "report_run(Path(sys.argv[1]), Screen)"
    )
    ended = python("-c", code, reported_once)
    assert (ended.returncode, ended.stdout) == (0, "cached"), ended.stderr


def test_a_run_of_kits_alone_is_reported(tmp_path: Path) -> None:
    """Report files without a record of their inputs may be older."""
    run = tmp_path / "run"
    export_a_kit(run)
    for suffix in ("json", "csv", "md", "png", "svg", "html"):
        (run / f"report.{suffix}").write_text('{"schema": 1, "rows": [1]}')
    assert reported(run) == "written"
    (row,) = json.loads((run / "report.json").read_text())["rows"]
    assert (row["runtime"], row["status"]) == ("tensorrt", "not measured")
    assert reported(run) == "cached"


def test_adopting_makes_a_run_that_the_other_commands_know(clipkd: Clipkd, tmp_path: Path) -> None:
    run = tmp_path / "run"
    ended = clipkd("adopt", "recipes/glyphs_teacher", "--like", "glyphs", "--out", run, "--json")
    assert ended.code == 0, ended.err
    assert list(json.loads(ended.out)) == ["adopted"]
    assert json.loads((run / "adopted" / "manifest.json").read_text())["summary"]["role"] == "adopted"
    shown = clipkd("show", run / "recipe.yaml", "--out", run)
    assert "# adopted: made\n# adopted-int8: not made\n# exported/adopted-onnxruntime-fp32: not made" in shown.out
    assert clipkd("verify", run).code == 0
    again = clipkd("adopt", "recipes/glyphs_teacher", "--like", "glyphs", "--out", run)
    assert again.code == 0
    assert "cached" in again.err


def test_adopting_what_has_no_weights(clipkd: Clipkd, tmp_path: Path) -> None:
    ended = clipkd("adopt", "recipes/vit_t_16", "--out", tmp_path / "run")
    assert ended.code == 1
    assert "has a configuration but no weights" in ended.err
    ended = clipkd("adopt", "ViT-B-33", "--out", tmp_path / "other")
    assert ended.code == 2
    assert "ViT-B-32" in ended.err
