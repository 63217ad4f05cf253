"""TensorRT without TensorRT: names against the real bindings, the whole path against doubles."""

import ast
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from export.device_programs import build_engine, runner
from export.device_programs.build_engine import BuildProblem, build_engines
from export.graphs import tensorrt_kit as to_tensorrt
from export.runtime import tensorrt_engines
from export.runtime import tensorrt_engines as tensorrt_engines_module
from toolchain.errors import ClipkdError, MissingDependency, UnavailableBackend

REPOSITORY = Path(__file__).parents[1]
DEVICE = {"gpu": "Some GPU", "compute_capability": "8.7", "driver": "CUDA 13.0"}

# Everything of TensorRT that build_engine.py and runner.py use; `test_the_list_is_complete` reads it off their sources.
NAMES = {
    "Logger": ["WARNING"],
    "Builder": ["create_network", "create_builder_config", "create_optimization_profile", "build_serialized_network"],
    "NetworkDefinitionCreationFlag": ["STRONGLY_TYPED"],
    "OnnxParser": ["parse", "num_errors", "get_error"],
    "INetworkDefinition": ["num_inputs", "get_input"],
    "ITensor": ["name", "shape"],
    "IBuilderConfig": [
        "set_memory_pool_limit",
        "builder_optimization_level",
        "profiling_verbosity",
        "clear_flag",
        "add_optimization_profile",
        "create_timing_cache",
        "set_timing_cache",
        "get_timing_cache",
        "progress_monitor",
    ],
    "ITimingCache": ["serialize"],
    "MemoryPoolType": ["WORKSPACE"],
    "ProfilingVerbosity": ["DETAILED"],
    "BuilderFlag": ["TF32"],
    "IOptimizationProfile": ["set_shape"],
    "IProgressMonitor": ["phase_start", "step_complete", "phase_finish"],
    "IHostMemory": ["nbytes"],
    "Runtime": ["deserialize_cuda_engine"],
    "ICudaEngine": [
        "num_io_tensors",
        "get_tensor_name",
        "get_tensor_mode",
        "get_tensor_dtype",
        "get_tensor_shape",
        "create_execution_context",
    ],
    "IExecutionContext": [
        "set_optimization_profile_async",
        "set_tensor_address",
        "set_input_shape",
        "get_tensor_shape",
        "execute_async_v3",
    ],
    "TensorIOMode": ["INPUT", "OUTPUT"],
}
FUNCTIONS = ["init_libnvinfer_plugins", "nptype"]
GONE = {"BuilderFlag": ["FP16", "INT8", "BF16", "FP8"], "IExecutionContext": ["execute_async_v2"]}
# Parameters as called: positional count or keyword names that the docstring of the binding has to show.
SIGNATURES = {
    "Builder.build_serialized_network": ["network", "config"],
    "OnnxParser.parse": ["model"],
    "IBuilderConfig.set_memory_pool_limit": ["pool", "pool_size"],
    "IBuilderConfig.set_timing_cache": ["cache", "ignore_mismatch"],
    "IBuilderConfig.create_timing_cache": ["serialized_timing_cache"],
    "IOptimizationProfile.set_shape": ["input", "min", "opt", "max"],
    "IProgressMonitor.phase_start": ["phase_name", "parent_phase", "num_steps"],
    "IProgressMonitor.step_complete": ["phase_name", "step"],
    "IProgressMonitor.phase_finish": ["phase_name"],
    "IExecutionContext.set_optimization_profile_async": ["profile_index", "stream_handle"],
    "IExecutionContext.set_tensor_address": ["name", "memory"],
    "IExecutionContext.set_input_shape": ["name", "shape"],
    "IExecutionContext.execute_async_v3": ["stream_handle"],
}
CUDART = [
    "cudaGetDeviceProperties",
    "cudaStreamCreate",
    "cudaStreamSynchronize",
    "cudaMalloc",
    "cudaFree",
    "cudaMemcpyAsync",
    "cudaMemcpyKind",
]

# All that the bindings need of their libraries to be imported.
_ENTRY_POINTS = (
    "createInferBuilder_INTERNAL",
    "createInferRuntime_INTERNAL",
    "createInferRefitter_INTERNAL",
    "createNvOnnxParser_INTERNAL",
    "createNvOnnxParserRefitter_INTERNAL",
    "getNvOnnxParserVersion",
    "initLibNvInferPlugins",
    "getPluginRegistry",
    "getBuilderPluginRegistry",
)

_ASK = """
import inspect, json, sys
import tensorrt_bindings as trt
asked = json.loads(sys.stdin.read())
def has(name, members):
    owner = getattr(trt, name, None)
    return [f"{name}.{m}" for m in members if not hasattr(owner, m)] if owner is not None else [name]
missing = [m for name, members in asked["names"].items() for m in has(name, members)]
missing += [name for name in asked["functions"] if not hasattr(trt, name)]
gone = [m for name, members in asked["gone"].items() for m in has(name, members)]
docs = {}
for path in asked["signatures"]:
    owner, name = path.split(".")
    docs[path] = getattr(getattr(trt, owner), name).__doc__
class Monitor(trt.IProgressMonitor):
    def __init__(self):
        trt.IProgressMonitor.__init__(self)
Monitor()
print(json.dumps({"version": trt.__version__, "missing": missing, "gone": gone, "docs": docs}))
"""


@pytest.fixture(scope="module")
def bindings(tmp_path_factory):
    """What the real TensorRT bindings say about the names asked for, over libraries that do nothing."""
    spec = find_spec("tensorrt_bindings")
    compiler = shutil.which("cc") or shutil.which("gcc")
    if spec is None or compiler is None:
        pytest.skip("needs tensorrt_cu13_bindings and a C compiler")
    folder = tmp_path_factory.mktemp("stubs")
    source = folder / "stub.c"
    source.write_text("".join(f"void* {name}(void) {{ return 0; }}\n" for name in _ENTRY_POINTS))
    major = version("tensorrt_cu13_bindings").partition(".")[0]
    for name in ("libnvinfer", "libnvinfer_plugin", "libnvonnxparser"):
        library = f"{name}.so.{major}"
        command = [compiler, "-shared", "-fPIC", f"-Wl,-soname,{library}", "-o", str(folder / library), str(source)]
        subprocess.run(command, check=True, capture_output=True)
    asked = {"names": NAMES, "functions": FUNCTIONS, "gone": GONE, "signatures": list(SIGNATURES)}
    ended = subprocess.run(
        [sys.executable, "-c", _ASK],
        input=json.dumps(asked),
        env=os.environ | {"LD_LIBRARY_PATH": str(folder)},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout)


def test_every_name_exists_in_the_real_bindings(bindings) -> None:
    assert bindings["missing"] == []


def test_what_tensorrt_11_removed_is_gone_and_unused(bindings) -> None:
    assert sorted(bindings["gone"]) == sorted(f"{owner}.{name}" for owner, names in GONE.items() for name in names)


@pytest.mark.parametrize("path", SIGNATURES)
def test_parameters_are_called_as_the_real_bindings_name_them(bindings, path) -> None:
    said = bindings["docs"][path]
    for parameter in SIGNATURES[path]:
        assert re.search(rf"\b{parameter}\b", said), said


def test_the_list_is_complete() -> None:
    """Every attribute that the two sources take of an object of TensorRT's is in the list checked above."""
    objects = {*NAMES, "trt", "builder", "network", "parser", "config", "profile", "context", "_engine", "_runtime"}
    listed = {*NAMES, *FUNCTIONS, "__version__", *(name for names in NAMES.values() for name in names)}
    taken = set()
    for module in (build_engine, runner):
        for node in ast.walk(ast.parse(Path(module.__file__).read_text())):
            if isinstance(node, ast.Attribute):
                owner = node.value
                name = (
                    owner.id if isinstance(owner, ast.Name) else owner.attr if isinstance(owner, ast.Attribute) else ""
                )
                if name in objects and module is runner and name == "parser":
                    continue  # argparse's
                if name in objects:
                    taken.add(node.attr)
    assert taken - listed <= {"__init__", "add_argument", "parse_args", "error"}  # argparse's, of build_engine's main
    assert {"create_network", "execute_async_v3", "TF32"} <= taken


def test_cuda_bindings_have_what_is_used() -> None:
    runtime = pytest.importorskip("cuda.bindings.runtime")
    assert [name for name in CUDART if not hasattr(runtime, name)] == []
    assert {"cudaMemcpyHostToDevice", "cudaMemcpyDeviceToHost"} <= set(dir(runtime.cudaMemcpyKind))
    assert {"name", "major", "minor"} <= set(dir(runtime.cudaDeviceProp))


class Recorder:
    """A double of TensorRT that builds nothing and remembers how it was asked; its plans hold the graph's hash."""

    def __init__(
        self, *, parses: bool = True, builds: bool = True, cache_matches: bool = True, batch: int = -1
    ) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.__version__ = "10.13.2"
        self.Logger = type("Logger", (), {"WARNING": 2, "__init__": lambda self, level: None})
        self.NetworkDefinitionCreationFlag = SimpleNamespace(STRONGLY_TYPED=1)
        self.MemoryPoolType = SimpleNamespace(WORKSPACE="workspace")
        self.ProfilingVerbosity = SimpleNamespace(DETAILED="detailed")
        self.BuilderFlag = SimpleNamespace(TF32="tf32")
        self.IProgressMonitor = type("IProgressMonitor", (), {})
        self.parses, self.builds, self.cache_matches, self.batch = parses, builds, cache_matches, batch
        self.config: Any = None

    def init_libnvinfer_plugins(self, logger, namespace):
        self.calls.append(("plugins", namespace))

    def Builder(self, logger):
        recorder = self

        class Config:
            def set_memory_pool_limit(self, pool, size):
                recorder.calls.append(("memory", pool, size))

            def set_flag(self, flag):
                recorder.calls.append(("set_flag", flag))

            def clear_flag(self, flag):
                recorder.calls.append(("clear_flag", flag))

            def add_optimization_profile(self, profile):
                recorder.calls.append(("profile", *profile.shapes))
                return 0

            def create_timing_cache(self, content):
                recorder.calls.append(("timing", content))
                return content

            def set_timing_cache(self, cache, ignore_mismatch):
                return cache == b"" or recorder.cache_matches

            def get_timing_cache(self):
                return SimpleNamespace(serialize=lambda: b"timings")

        class Profile:
            def set_shape(self, *shapes):
                self.shapes = shapes

        class Builder:
            def create_network(self, flags):
                recorder.calls.append(("network", flags))
                tensor = SimpleNamespace(name=None, shape=None)
                return SimpleNamespace(num_inputs=1, get_input=lambda index: tensor)

            def create_builder_config(self):
                recorder.config = Config()
                return recorder.config

            def create_optimization_profile(self):
                return Profile()

            def build_serialized_network(self, network, config):
                monitor = config.progress_monitor
                monitor.phase_start("tactics", None, 2)
                monitor.phase_start("within", "tactics", 5)
                going = monitor.step_complete("within", 0) and monitor.step_complete("tactics", 0)
                going = going and monitor.step_complete("tactics", 1)
                monitor.phase_finish("within")
                monitor.phase_finish("tactics")
                return b"plan of " + recorder.graph if going and recorder.builds else None

        return Builder()

    def OnnxParser(self, network, logger):
        def parse(content):
            self.graph = content
            tensor = network.get_input(0)
            tensor.name, rest = ("pixel_values", [3, 8, 8]) if content == b"image graph" else ("input_ids", [5])
            tensor.shape = [self.batch, *rest]
            return self.parses

        return SimpleNamespace(parse=parse, num_errors=1, get_error=lambda index: "no importer for Frobnicate")


@pytest.fixture
def kit(tmp_path: Path) -> Path:
    folder = tmp_path / "kit"
    folder.mkdir()
    for tower in build_engine.TOWERS:
        (folder / f"{tower}.onnx").write_bytes(f"{tower} graph".encode())
    return folder


@pytest.fixture
def tensorrt(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    return use(monkeypatch, Recorder())


def use(monkeypatch: pytest.MonkeyPatch, double: Recorder) -> Recorder:
    monkeypatch.setitem(sys.modules, "tensorrt", double)
    monkeypatch.setattr(build_engine, "gpu", lambda: DEVICE)
    return double


def built(kit: Path, **options: Any) -> dict[str, Any]:
    return build_engines(kit, kit.parent / "engines", timing_folder=kit.parent / "timing", **options)


def test_networks_are_strongly_typed_tf32_is_off_and_no_precision_flag_is_set(kit, tensorrt) -> None:
    built(kit)
    assert [call for call in tensorrt.calls if call[0] == "network"] == [("network", 2)] * 2
    assert [call for call in tensorrt.calls if call[0] == "clear_flag"] == [("clear_flag", "tf32")] * 2
    assert not [call for call in tensorrt.calls if call[0] == "set_flag"]


def test_profiles_hold_single_images_and_batches(kit, tensorrt) -> None:
    built(kit, max_batch=32)
    shapes = [call[1:] for call in tensorrt.calls if call[0] == "profile"]
    assert shapes == [
        ("pixel_values", (1, 3, 8, 8), (1, 3, 8, 8), (1, 3, 8, 8)),
        ("pixel_values", (1, 3, 8, 8), (8, 3, 8, 8), (32, 3, 8, 8)),
        ("input_ids", (1, 5), (8, 5), (32, 5)),
    ]
    assert build_engine.profile_sizes("image", 1) == [(1, 1, 1)]


def test_a_graph_of_a_fixed_batch_has_one_profile_of_it(kit, monkeypatch) -> None:
    fixed = use(monkeypatch, Recorder(batch=1))
    manifest = built(kit, max_batch=32)
    shapes = [call[1:] for call in fixed.calls if call[0] == "profile"]
    assert shapes == [("pixel_values", *[(1, 3, 8, 8)] * 3), ("input_ids", *[(1, 5)] * 3)]
    assert manifest["profiles"] == {"image": [[1, 1, 1]], "text": [[1, 1, 1]]}


def test_engines_and_their_manifest(kit, tensorrt) -> None:
    manifest = built(kit)
    out = kit.parent / "engines"
    assert json.loads((out / "engine.json").read_text()) == manifest
    assert {key: manifest[key] for key in DEVICE} == DEVICE
    assert (manifest["tensorrt"], manifest["tf32"]) == ("10.13.2", False)
    for tower in ("image", "text"):
        assert manifest["graphs"][tower] == hashlib.sha256((kit / f"{tower}.onnx").read_bytes()).hexdigest()
        assert manifest["engines"][tower] == hashlib.sha256((out / f"{tower}.engine").read_bytes()).hexdigest()
    assert not list(out.glob("*.partial"))


def test_timings_are_kept_per_device_and_used_again(kit, tensorrt, monkeypatch) -> None:
    built(kit)
    (file,) = (kit.parent / "timing").iterdir()
    assert file.name == "some-gpu-sm8.7-tensorrt-10.13.2.timing"
    assert [call[1] for call in tensorrt.calls if call[0] == "timing"] == [b"", b"timings"]
    other = build_engine.timing_file(DEVICE | {"gpu": "Another"}, "10.13.2")
    assert other != file.name
    mismatched = use(monkeypatch, Recorder(cache_matches=False))
    built(kit)
    assert [call[1] for call in mismatched.calls if call[0] == "timing"] == [b"timings", b""] * 2


def test_progress_is_of_the_outermost_phase(kit, tensorrt) -> None:
    said: list[tuple[str, int, int]] = []
    built(kit, on_progress=lambda *what: said.append(what))
    assert said == [(f"{tower}: tactics", step, 2) for tower in ("image", "text") for step in (1, 2)]


def test_an_error_while_showing_progress_cancels_the_build_and_is_raised(kit, tensorrt) -> None:
    def interrupt(what: str, done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        built(kit, on_progress=interrupt)
    assert not (kit.parent / "engines" / "engine.json").exists()


@pytest.mark.parametrize(
    ("double", "said"),
    [
        (Recorder(parses=False), "rejects this graph: no importer for Frobnicate"),
        (Recorder(builds=False), "built no engine"),
    ],
)
def test_what_does_not_build_leaves_no_manifest(kit, monkeypatch, double, said) -> None:
    use(monkeypatch, Recorder())
    built(kit)
    use(monkeypatch, double)
    with pytest.raises(BuildProblem, match=said):
        built(kit)
    assert not (kit.parent / "engines" / "engine.json").exists()


def test_an_old_tensorrt_and_none_are_said(monkeypatch) -> None:
    old = Recorder()
    old.__version__ = "10.3.0"
    monkeypatch.setitem(sys.modules, "tensorrt", old)
    with pytest.raises(
        MissingDependency,
        match=r"TensorRT 10\.3\.0 is installed; expected 10\.12 or newer\. Install it with: pip install",
    ):
        tensorrt_engines_module.can_build()
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(MissingDependency, match=r"cannot be imported here.*pip install tensorrt"):
        tensorrt_engines_module.can_build()


def test_no_driver_is_said(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", Recorder())

    def absent(name: str) -> None:
        raise OSError(name)

    monkeypatch.setattr(build_engine.ctypes, "CDLL", absent)
    with pytest.raises(UnavailableBackend, match="no NVIDIA driver here") as raised:
        tensorrt_engines_module.can_build()
    assert raised.value.exit_code == 4


class Engine:
    """A double of an engine that takes at most `profiles` rows and returns twice each row's sum."""

    def __init__(self) -> None:
        self.memory: dict[int, np.ndarray] = {}
        self.batches: list[tuple[int, int]] = []
        self.num_io_tensors = 2

    def get_tensor_name(self, index):
        return ("pixel_values", "image_features")[index]

    def get_tensor_mode(self, name):
        return "in" if name == "pixel_values" else "out"

    def get_tensor_dtype(self, name):
        return np.float32

    def get_tensor_shape(self, name):
        return (-1, 3) if name == "pixel_values" else (-1, 1)

    def create_execution_context(self):
        return Context(self)


class Context:
    def __init__(self, engine: Engine) -> None:
        self.engine, self.addresses, self.rows, self.profile = engine, {}, 0, -1

    def set_optimization_profile_async(self, index, stream):
        self.profile = index
        return True

    def set_tensor_address(self, name, address):
        self.addresses[name] = address

    def set_input_shape(self, name, shape):
        self.rows = shape[0]
        return True

    def get_tensor_shape(self, name):
        return (self.rows, 1)

    def execute_async_v3(self, stream):
        self.engine.batches.append((self.profile, self.rows))
        values = self.engine.memory[self.addresses["pixel_values"]].reshape(self.rows, 3)
        self.engine.memory[self.addresses["image_features"]] = 2 * values.sum(1, keepdims=True)
        return True


class Cuda:
    """A double of cuda.bindings.runtime: device memory is a dictionary."""

    cudaMemcpyKind = SimpleNamespace(cudaMemcpyHostToDevice="up", cudaMemcpyDeviceToHost="down")

    def __init__(self, engine: Engine, name: bytes = b"Some GPU\0\0") -> None:
        self.engine, self.name, self.allocated = engine, name, 0

    def cudaGetDeviceProperties(self, device):
        return 0, SimpleNamespace(name=self.name, major=8, minor=7)

    def cudaStreamCreate(self):
        return 0, 1

    def cudaStreamSynchronize(self, stream):
        return (0,)

    def cudaMalloc(self, size):
        self.allocated += 1
        return 0, self.allocated

    def cudaFree(self, address):
        return (0,)

    def cudaMemcpyAsync(self, target, source, count, kind, stream):
        import ctypes

        if kind == "up":
            self.engine.memory[target] = np.frombuffer(ctypes.string_at(source, count), np.float32)
        else:
            content = np.ascontiguousarray(self.engine.memory[source]).tobytes()
            assert len(content) == count
            ctypes.memmove(target, content, count)
        return (0,)


@pytest.fixture
def opened(kit, tensorrt, monkeypatch):
    """`opened()` opens the image engine just built, on doubles; its `Engine` comes with it."""
    engine = Engine()
    deserialised: list[bytes] = []

    def deserialize(plan):
        deserialised.append(plan)
        return engine

    tensorrt.Runtime = lambda logger: SimpleNamespace(deserialize_cuda_engine=deserialize)
    tensorrt.TensorIOMode = SimpleNamespace(INPUT="in", OUTPUT="out")
    tensorrt.nptype = lambda dtype: dtype
    built(kit)

    def opening(cuda: Cuda | None = None):
        monkeypatch.setattr(runner, "_cudart", lambda: cuda or Cuda(engine))
        return runner.open_engine(kit.parent / "engines" / "image.engine", kit / "image.onnx"), engine

    opening.deserialised = deserialised
    return opening


def test_an_engine_runs_batches_of_any_size(opened) -> None:
    session, engine = opened()
    rows = np.arange(21 * 3, dtype=np.float32).reshape(21, 3)
    answer = session.run(rows)
    np.testing.assert_array_equal(answer, 2 * rows.sum(1, keepdims=True))
    session.run(rows[:1])
    assert engine.batches == [(1, 8), (1, 8), (1, 5), (0, 1)]
    assert session.run(rows[:0]).shape == (0, 1)
    assert session.input_shapes == {"pixel_values": [None, 3]}


def _another_graph(kit: Path) -> None:
    (kit / "image.onnx").write_bytes(b"another")


def _another_engine(kit: Path) -> None:
    (kit.parent / "engines" / "image.engine").write_bytes(b"evil")


def _no_manifest(kit: Path) -> None:
    (kit.parent / "engines" / "engine.json").unlink()


def _older_tensorrt(kit: Path) -> None:
    path = kit.parent / "engines" / "engine.json"
    path.write_text(path.read_text().replace("10.13.2", "10.12.0"))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (_another_graph, "built from another graph"),
        (_another_engine, "its sha256 differs from the one in engine.json"),
        (_no_manifest, "no valid engine.json shows that clipkd built it"),
        (_older_tensorrt, r"built by TensorRT 10\.12\.0; here is 10\.13\.2"),
    ],
)
def test_what_clipkd_did_not_build_here_is_never_deserialised(kit, opened, damage, said) -> None:
    damage(kit)
    with pytest.raises(runner.EngineError, match=said):
        opened()
    assert opened.deserialised == []


def test_another_gpus_engine_is_never_deserialised(opened) -> None:
    with pytest.raises(runner.EngineError, match=r"built for Some GPU \(8\.7\); here is Other \(8\.7\)"):
        opened(Cuda(Engine(), b"Other\0"))
    assert opened.deserialised == []


def test_the_builder_is_python_3_8_and_stands_alone(tmp_path) -> None:
    source = Path(build_engine.__file__).read_text()
    ast.parse(source, feature_version=(3, 8))
    shutil.copyfile(build_engine.__file__, tmp_path / "build_engine.py")
    command = [sys.executable, "-I", str(tmp_path / "build_engine.py"), "--kit", str(tmp_path)]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == (4 if find_spec("tensorrt") else 3), ended.stderr
    assert ended.stderr.startswith("error: ")
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize("shell", ["sh", "dash"])
def test_the_script_checks_the_sums_then_builds(kit, shell) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"no {shell}")
    folder = kit.rename(kit.parent / "a kit; $(touch pwned) 'quoted'")
    to_tensorrt.complete_kit(folder, (8, 8))
    (folder / "build_engine.py").write_text("import sys; print(sys.argv[1:])")
    to_tensorrt.write_sums(folder)
    script = str(folder / "build_on_device.sh")
    subprocess.run([shell, "-n", script], check=True)
    python = os.environ | {"PYTHON": sys.executable}
    run = [shell, script, "--max-batch", "4 *"]
    ended = subprocess.run(run, capture_output=True, text=True, env=python, cwd=kit.parent)
    assert ended.returncode == 0, ended.stderr
    assert ast.literal_eval(ended.stdout) == ["--kit", str(folder.resolve()), "--max-batch", "4 *"]
    assert not list(kit.parent.rglob("pwned"))
    (folder / "image.onnx").write_bytes(b"damaged")
    ended = subprocess.run(run, capture_output=True, text=True, env=python, cwd=kit.parent)
    assert ended.returncode != 0
    assert "image.onnx" in ended.stdout + ended.stderr


def test_errors_keep_their_exit_codes(kit, monkeypatch) -> None:
    use(monkeypatch, Recorder(builds=False))
    monkeypatch.setattr(tensorrt_engines, "user_cache_folder", lambda: kit.parent / "cache")
    with pytest.raises(ClipkdError, match="built no engine") as raised:
        tensorrt_engines_module.build(kit, kit.parent / "engines", lambda what, done, total: None)
    assert raised.value.exit_code == 1
