"""What may import what, read from the source; and what must run where torch cannot be imported."""

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import REPOSITORY

MODULES = [
    REPOSITORY / "clipkd.py",
    *sorted(REPOSITORY.glob("toolchain/*.py")),
    *sorted(REPOSITORY.glob("export/*.py")),
]
OURS = {"clipkd", "export", "toolchain"}
MAY_IMPORT = {"clipkd.py": {"export", "toolchain"}, "export": {"export", "toolchain"}, "toolchain": {"toolchain"}}

PROGRAMS = ("runner", "machine", "probes", "agent", "build_engine")  # of their own, on devices that have no clipkd

TORCH_FREE = [
    "toolchain.stages",
    "toolchain.training_stages",
    "export.deployment_stages",
    "export.auto",
    "export.auto_stages",
    "toolchain.sources",
    "toolchain.recipe",
    "toolchain.shard_files",
    "toolchain.damage",
    "toolchain.listings",
    "toolchain.pictures",
    "toolchain.samples",
    "toolchain.caption_lengths",
    "toolchain.inspection",
    "toolchain.packing",
    "toolchain.errors",
    "toolchain.evaluate",
    "toolchain.eval_sets",
    "toolchain.report",
    "toolchain.report_page",
    "toolchain.glyphs",
    "export.runtime",
    "export.profile",
    "export.profile_models",
    "export.predict",
    "export.measure",
    "export.parity",
    "export.runner",
    "export.build_engine",
    "export.to_tensorrt",
    "export.classes",
    "export.model_card",
    "export.machine",
    "export.probes",
    "export.agent",
    "export.devices",
    "export.remote",
    "export.doctor",
    "clipkd",
]
FORBIDDEN = ["torch", "torchvision", "open_clip", "timm", "transformers", "nncf", "onnx", "onnxscript", "safetensors"]
# Imports each module where the forbidden packages cannot be, and prints what failed.
WITHOUT_TORCH = f"""
import importlib, json, sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {FORBIDDEN!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Absent())
failed = {{}}
for module in {[*TORCH_FREE, "toolchain.models"]!r}:
    try:
        importlib.import_module(module)
    except Exception as error:
        failed[module] = repr(error)
print(json.dumps(failed))
"""


def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imports(tree: ast.AST) -> Iterator[str]:
    """Every module imported anywhere, functions included."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield node.module or ""


def test_modules_were_found() -> None:
    assert {"clipkd", "stages", "distil", "models", "runtime", "runner", "parity"} <= {path.stem for path in MODULES}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(REPOSITORY).as_posix())
def test_imports_go_down_only(path: Path) -> None:
    imported = {name.partition(".")[0] for name in imports(tree_of(path))}
    layer = path.name if path.parent == REPOSITORY else path.parent.name
    assert imported & OURS <= MAY_IMPORT[layer]
    assert "tests" not in imported


@pytest.mark.parametrize("path", MODULES[1:], ids=lambda path: path.relative_to(REPOSITORY).as_posix())
def test_only_the_command_line_parses_prints_and_exits(path: Path) -> None:
    tree = tree_of(path)
    imported = {name.partition(".")[0] for name in imports(tree)}
    assert imported & {"typer", "click", "rich"} == set()
    if path.stem in PROGRAMS:
        return
    assert "argparse" not in imported
    calls = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    assert calls & {"print", "input", "exit", "quit", "sys.exit", "os._exit", "sys.stdout.write"} == set()


def test_the_command_line_has_no_print() -> None:
    calls = {ast.unparse(node.func) for node in ast.walk(tree_of(MODULES[0])) if isinstance(node, ast.Call)}
    assert calls & {"print", "input"} == set()


def test_the_runner_stands_alone() -> None:
    tree = tree_of(REPOSITORY / "export" / "runner.py")
    everywhere = {name.partition(".")[0] for name in imports(tree)}
    top = {name.partition(".")[0] for node in tree.body if not isinstance(node, ast.If) for name in _imports_of(node)}
    third_party = {"numpy", "onnxruntime", "tensorrt", "cuda", "PIL", "tokenizers"}
    third_party |= {"torch", "open_clip"}  # of a checkpoint, which is timed on the machine that trains alone
    assert everywhere - set(sys.stdlib_module_names) <= third_party
    assert top - set(sys.stdlib_module_names) <= {"numpy"}, "a device without Pillow can still time graphs"


@pytest.mark.parametrize("name", ["agent", "machine", "probes"])
def test_what_devices_run_needs_the_standard_library_alone(name: str) -> None:
    tree = tree_of(REPOSITORY / "export" / f"{name}.py")
    top = {module.partition(".")[0] for node in tree.body for module in _imports_of(node)}
    assert top <= set(sys.stdlib_module_names)


@pytest.mark.parametrize("name", PROGRAMS)
def test_what_devices_run_is_of_python_3_8(name: str) -> None:
    ast.parse((REPOSITORY / "export" / f"{name}.py").read_text(encoding="utf-8"), feature_version=(3, 8))


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
    assert "No module named 'open_clip'" in failed_without_torch["toolchain.models"]


@pytest.mark.parametrize("module", TORCH_FREE)
def test_no_torch_on_the_device(failed_without_torch: dict[str, str], module: str) -> None:
    assert module not in failed_without_torch, failed_without_torch[module]
