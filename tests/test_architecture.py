"""The imports that each module may have, read from the source, and the modules that must import without torch."""

import ast
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
from conftest import REPOSITORY

MODULES = [
    REPOSITORY / "clipkd.py",
    *sorted(REPOSITORY.glob("toolchain/**/*.py")),
    *sorted(REPOSITORY.glob("export/**/*.py")),
]

# A module or package imports only those above it in this list.
IMPORT_ORDER = (
    "toolchain.errors",
    "toolchain.text_table",
    "toolchain.precisions",
    "toolchain.runtimes",
    "toolchain.significance",
    "toolchain.provenance",
    "toolchain.filesystem",
    "toolchain.user_documents",
    "toolchain.differences",
    "toolchain.torchrun",
    "toolchain.distributed",
    "toolchain.stage",
    "toolchain.progress",
    "toolchain.recipe",
    "toolchain.data",
    "toolchain.models",
    "toolchain.evaluation",
    "toolchain.distillation",
    "toolchain.quantization",
    "toolchain.report",
    "toolchain.pipeline",
    "toolchain.command_help",
    "toolchain.terminal",
    "export.documents",
    "export.model_folder",
    "export.device_programs",
    "export.devices",
    "export.graphs",
    "export.runtime",
    "export.proof",
    "export.profiling",
    "export.students",
    "export.pipeline",
    "clipkd",
)

MAX_LINES = 500
LARGER = {
    "clipkd.py": (1000, "every command of the command line, with its help"),
    "export/device_programs/runner.py": (700, "one file by design: it is copied to devices"),
}

PROGRAMS = ("runner", "machine", "probes", "agent", "build_engine")  # copied to devices without clipkd
USERS_OF_RICH = ("toolchain/terminal.py",)

TORCH_FREE = [
    "toolchain.torchrun",
    "toolchain.distillation.training_options",
    "toolchain.stage",
    "toolchain.pipeline.plan",
    "toolchain.pipeline.stage_inputs",
    "toolchain.pipeline.train",
    "toolchain.pipeline.quantize",
    "toolchain.recipe.model_names",
    "toolchain.recipe.load",
    "toolchain.data.tar_files",
    "toolchain.data.pairing",
    "toolchain.data.bad_samples",
    "toolchain.data.open",
    "toolchain.data.images",
    "toolchain.data.stored_samples",
    "toolchain.data.caption_lengths",
    "toolchain.data.inspection",
    "toolchain.data.packing",
    "toolchain.data.glyphs",
    "toolchain.errors",
    "toolchain.precisions",
    "toolchain.runtimes",
    "toolchain.evaluation.zero_shot",
    "toolchain.evaluation.open_sets",
    "toolchain.report.write",
    "toolchain.report.page",
    "export.documents",
    "export.model_folder",
    "export.runtime.exported_model",
    "export.runtime.predict",
    "export.runtime.bake_classes",
    "export.runtime.tensorrt_engines",
    "export.profiling.protocol",
    "export.profiling.table",
    "export.proof.parity",
    "export.proof.prove",
    *(f"export.device_programs.{name}" for name in PROGRAMS),
    "export.graphs.tensorrt_kit",
    "export.graphs.model_card",
    "export.devices.registry",
    "export.devices.ssh",
    "export.devices.doctor",
    "export.students.choose",
    "export.students.measure",
    *(f"export.pipeline.{path.stem}" for path in sorted(REPOSITORY.glob("export/pipeline/[!_]*.py"))),
    "clipkd",
]
FORBIDDEN = ["torch", "torchvision", "open_clip", "timm", "transformers", "nncf", "onnx", "onnxscript", "safetensors"]
# Imports each module while the forbidden packages cannot be imported, and prints the failures.
WITHOUT_TORCH = f"""
import importlib, json, sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {FORBIDDEN!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Absent())
failed = {{}}
for module in {[*TORCH_FREE, "toolchain.models.build"]!r}:
    try:
        importlib.import_module(module)
    except Exception as error:
        failed[module] = repr(error)
print(json.dumps(failed))
"""


def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imports(tree: ast.AST) -> Iterator[str]:
    """Yield every module imported anywhere, functions included."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield node.module or ""


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(REPOSITORY).with_suffix("").parts).removesuffix(".__init__")


def place(module: str) -> str:
    """Return the entry of IMPORT_ORDER that a module belongs to."""
    return ".".join(module.split(".")[:2])


def imported_modules(path: Path, names: set[str]) -> set[str]:
    """Return our modules that a file imports anywhere, functions and type checking included."""
    found = set()
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= inner & names or {node.module or ""}
    return found & names


def upward_imports(modules: Mapping[str, Path]) -> list[str]:
    """Return imports of modules that come after the importing module in IMPORT_ORDER."""
    return [
        f"{module} imports {imported}"
        for module, path in modules.items()
        for imported in sorted(imported_modules(path, set(modules)))
        if place(module) != place(imported) and IMPORT_ORDER.index(place(imported)) > IMPORT_ORDER.index(place(module))
    ]


def circles(modules: Mapping[str, Path]) -> list[str]:
    """Return modules that import each other, directly or through others."""
    graph = {module: imported_modules(path, set(modules)) for module, path in modules.items()}
    try:
        tuple(TopologicalSorter(graph).static_order())
    except CycleError as error:
        return [" <- ".join(error.args[1])]
    return []


def private_imports(modules: Mapping[str, Path]) -> list[str]:
    """Return private names used in another module, imported or as an attribute."""
    found = []
    for module, path in modules.items():
        tree = tree_of(path)
        ours: set[str] = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in {"toolchain", "export"}:
                found += [f"{module}: {node.module}.{name.name}" for name in node.names if name.name.startswith("_")]
                ours |= {name.asname or name.name for name in node.names if f"{node.module}.{name.name}" in modules}
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in ours:
                dunder = node.attr.startswith("__")
                found += [f"{module}: {node.value.id}.{node.attr}"] if node.attr.startswith("_") and not dunder else []
    return found


OURS = {name_of(path): path for path in MODULES}


def test_modules_were_found() -> None:
    assert {"clipkd", "toolchain.stage", "toolchain.distillation.losses", "export.device_programs.runner"} <= set(OURS)
    packages = {place(name) for name in OURS} - {"toolchain", "export"}
    assert packages == set(IMPORT_ORDER)


def test_imports_go_down_only() -> None:
    assert upward_imports(OURS) == []
    assert not any("tests" in name.split(".") for path in MODULES for name in imports(tree_of(path)))


def test_no_modules_import_each_other() -> None:
    assert circles(OURS) == []


def test_no_private_name_crosses_a_module() -> None:
    assert private_imports(OURS) == []


@pytest.mark.parametrize(
    ("module", "line", "check"),
    [
        ("toolchain.recipe.section", "from export.pipeline.plan import exports", upward_imports),
        ("toolchain.data.listing", "def later():\n    from toolchain.data.open import open_listing", circles),
        ("export.proof.prove", "from export.proof.parity import _TIE", private_imports),
        ("export.proof.prove", "from export.proof import parity\nparity._read_samples()", private_imports),
    ],
)
def test_a_wrong_import_is_found(
    tmp_path: Path, module: str, line: str, check: Callable[[Mapping[str, Path]], list[str]]
) -> None:
    changed = tmp_path / "changed.py"
    changed.write_text(OURS[module].read_text(encoding="utf-8") + f"\n{line}\n", encoding="utf-8")
    assert check(OURS) == []
    assert len(check({**OURS, module: changed})) == 1


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(REPOSITORY).as_posix())
def test_a_module_is_one_idea(path: Path) -> None:
    limit, _ = LARGER.get(path.relative_to(REPOSITORY).as_posix(), (MAX_LINES, ""))
    assert len(path.read_text(encoding="utf-8").splitlines()) <= limit


@pytest.mark.parametrize("path", MODULES[1:], ids=lambda path: path.relative_to(REPOSITORY).as_posix())
def test_only_the_command_line_parses_prints_and_exits(path: Path) -> None:
    tree = tree_of(path)
    imported = {name.partition(".")[0] for name in imports(tree)}
    name = path.relative_to(REPOSITORY).as_posix()
    allowed = {"rich"} if name in USERS_OF_RICH else {"typer"} if name == "toolchain/command_help.py" else set()
    assert imported & {"typer", "click", "rich"} <= allowed
    if path.stem in PROGRAMS:
        return
    assert "argparse" not in imported
    calls = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    assert calls & {"print", "input", "exit", "quit", "sys.exit", "os._exit", "sys.stdout.write"} == set()


def test_the_command_line_has_no_print() -> None:
    calls = {ast.unparse(node.func) for node in ast.walk(tree_of(MODULES[0])) if isinstance(node, ast.Call)}
    assert calls & {"print", "input"} == set()


def test_the_runner_stands_alone() -> None:
    tree = tree_of(REPOSITORY / "export" / "device_programs" / "runner.py")
    everywhere = {name.partition(".")[0] for name in imports(tree)}
    top = {name.partition(".")[0] for node in tree.body if not isinstance(node, ast.If) for name in _imports_of(node)}
    third_party = {"numpy", "onnxruntime", "tensorrt", "cuda", "PIL", "tokenizers"}
    third_party |= {"torch", "open_clip"}  # a checkpoint is timed only on the machine that trains
    assert everywhere - set(sys.stdlib_module_names) <= third_party
    assert top - set(sys.stdlib_module_names) <= {"numpy"}, "a device without Pillow can still time graphs"


@pytest.mark.parametrize("name", ["agent", "machine", "probes"])
def test_what_devices_run_needs_the_standard_library_alone(name: str) -> None:
    tree = tree_of(REPOSITORY / "export" / "device_programs" / f"{name}.py")
    top = {module.partition(".")[0] for node in tree.body for module in _imports_of(node)}
    assert top <= set(sys.stdlib_module_names)


@pytest.mark.parametrize("name", PROGRAMS)
def test_what_devices_run_is_of_python_3_8(name: str) -> None:
    ast.parse(
        (REPOSITORY / "export" / "device_programs" / f"{name}.py").read_text(encoding="utf-8"), feature_version=(3, 8)
    )


def _imports_of(node: ast.stmt) -> Iterator[str]:
    if isinstance(node, ast.Import | ast.ImportFrom):
        yield from imports(node)


@pytest.fixture(scope="module")
def failed_without_torch() -> dict[str, str]:
    ended = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH], cwd=REPOSITORY, capture_output=True, text=True, timeout=300
    )
    assert ended.returncode == 0, ended.stderr
    failed: dict[str, str] = json.loads(ended.stdout)
    return failed


def test_torch_is_really_absent(failed_without_torch: dict[str, str]) -> None:
    assert "No module named 'open_clip'" in failed_without_torch["toolchain.models.build"]


@pytest.mark.parametrize("module", TORCH_FREE)
def test_no_torch_on_the_device(failed_without_torch: dict[str, str], module: str) -> None:
    assert module not in failed_without_torch, failed_without_torch[module]


def test_the_page_of_the_architecture_shows_this_order() -> None:
    page = (REPOSITORY / "docs" / "architecture.md").read_text(encoding="utf-8")
    assert tuple(re.findall(r"^\| \d+ \| `([a-z_.]+)` \|", page, re.MULTILINE)) == IMPORT_ORDER
    for path in re.findall(r"`((?:toolchain|export|tests|benchmarks)/[a-z_/0-9]+\.py)`", page):
        assert (REPOSITORY / path).is_file(), path
