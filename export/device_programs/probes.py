"""Check a capability of this machine by running it; one probe per process, because a broken one may crash or hang.

This file is copied to devices and runs there on its own: Python 3.8, its standard library, and the probed package.

    python probes.py onnxruntime:cpu

stdout has one JSON document of details.  Exit status: 0 it works, 3 something is not installed, 4 the hardware or its
driver is missing, 1 it is installed and fails.  The last line of stderr has the reason; the caller knows the fix.
"""

from __future__ import annotations

import ctypes
import json
import os
import platform
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any


class NotThere(Exception):
    """Hardware or a driver is missing."""


def main() -> None:
    document = os.dup(1)
    os.dup2(2, 1)  # keeps the output of native libraries out of the document
    name, _, argument = sys.argv[1].partition(":")
    try:
        details = _PROBES[name](argument)
    except NotThere as error:
        _end(str(error), 4)
    except ImportError as error:
        _end(str(error) or repr(error), 3)
    except Exception as error:
        _end(f"{type(error).__name__}: {error}", 1)
    else:
        with os.fdopen(document, "w") as stdout:
            stdout.write(json.dumps(details) + "\n")


def _end(why: str, status: int) -> None:
    sys.stderr.write("\n" + " ".join(why.split()) + "\n")
    sys.exit(status)


def _base(_argument: str) -> dict[str, Any]:
    """Import numpy, which measuring needs in addition to a runtime."""
    import numpy as np

    return {"python": platform.python_version(), "numpy": np.__version__}


def _pictures(_argument: str) -> dict[str, Any]:
    """Encode and decode a JPEG, which timing the whole path needs."""
    import io

    import PIL
    from PIL import Image

    encoded = io.BytesIO()
    Image.new("RGB", (8, 8), (200, 10, 10)).save(encoded, "JPEG")
    Image.open(io.BytesIO(encoded.getvalue())).load()
    return {"pillow": PIL.__version__}


def _train(_argument: str) -> dict[str, Any]:
    """Compute the gradient of a small layer on the CPU and every GPU."""
    import open_clip
    import timm
    import torch

    devices = ["cpu"] + [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    for device in devices:
        layer = torch.nn.Linear(4, 2).to(device)
        layer(torch.ones(3, 4, device=device)).square().sum().backward()
        if layer.weight.grad is None or not bool(layer.weight.grad.isfinite().all()):
            raise RuntimeError(f"the gradient of a linear layer on {device} is not finite")
    versions = {"torch": torch.__version__, "open_clip": open_clip.__version__, "timm": timm.__version__}
    return dict(versions, devices=devices)


def _quantize(_argument: str) -> dict[str, Any]:
    """Quantize a linear layer with NNCF and compute its gradient, with the reference operators that clipkd uses."""
    os.environ.setdefault("NNCF_CI", "1")  # no telemetry
    sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]  # it would write an identifier to the home folder
    import types

    import nncf
    import torch
    from nncf.torch.quantization import extensions
    from nncf.torch.quantization.reference import ReferenceBackendType, ReferenceQuantize

    plain = ReferenceQuantize(ReferenceBackendType.TORCH)
    functions = types.SimpleNamespace(Quantize_forward=plain.forward, Quantize_backward=plain.backward)
    for namespace in (extensions.QuantizedFunctionsCPU, extensions.QuantizedFunctionsCUDA):
        if isinstance(namespace, extensions.ExtensionNamespace):
            namespace._loaded_namespace = functions

    class Tower(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(4, 2)

        def forward(self, inputs: Any) -> Any:
            return self.layer(inputs)

    layer, inputs = Tower(), torch.rand(3, 4)
    quantized = nncf.quantize(layer, nncf.Dataset([inputs]), subset_size=1)
    quantized.train()
    features = quantized(inputs)
    features.square().sum().backward()
    if torch.equal(features, layer(inputs)):
        raise RuntimeError("NNCF did not change a linear layer")
    return {"nncf": nncf.__version__}


def cpp_compiler() -> list[str]:
    """Return the C++ compiler that torch.compile calls: a program, and its options if any."""
    import shlex

    return shlex.split(os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++"))


def _compiler(_argument: str) -> dict[str, Any]:
    """Compile a C++ file with the compiler that torch.compile calls."""
    import subprocess

    words = cpp_compiler()
    if shutil.which(words[0]) is None:
        raise ImportError(f"no {words[0]} on the PATH, which torch.compile calls")
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "probe.cpp"
        source.write_text("#include <vector>\nint main() { return std::vector<int>(0).size(); }\n")
        command = [*words, str(source), "-o", str(Path(folder) / "probe")]
        done = subprocess.run(command, capture_output=True)
    if done.returncode:
        raise RuntimeError(f"{words[0]}: {done.stderr.decode('utf-8', 'replace').strip()[-200:]}")
    return {"compiler": words[0]}


def _export(_argument: str) -> dict[str, Any]:
    """Export a linear layer to ONNX, and check the graph."""
    import onnx
    import onnxscript
    import torch

    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        path = str(Path(folder) / "probe.onnx")
        program = torch.onnx.export(torch.nn.Linear(4, 2).eval(), (torch.ones(2, 4),), opset_version=20, verbose=False)
        if program is None:
            raise RuntimeError("torch.onnx.export returned nothing")
        program.save(path)
        onnx.checker.check_model(path, full_check=True)
    return {"onnx": onnx.__version__, "onnxscript": onnxscript.__version__}


def _report(_argument: str) -> dict[str, Any]:
    """Draw a plot with Matplotlib, and import Plotly."""
    import io

    os.environ.setdefault("MPLBACKEND", "Agg")
    import matplotlib
    import plotly
    from matplotlib.figure import Figure

    figure = Figure()
    figure.add_subplot().plot([1, 2], [3, 4])
    figure.savefig(io.BytesIO(), format="png")
    return {"matplotlib": matplotlib.__version__, "plotly": plotly.__version__}


_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


def _onnxruntime(device: str) -> dict[str, Any]:
    """Run a graph of one node; a provider that is listed but does not run fails."""
    import numpy as np
    import onnxruntime as ort

    ort.set_default_logger_severity(4)
    kind, _, index = device.partition(":")
    provider = _PROVIDERS[kind]
    if provider not in ort.get_available_providers():
        raise NotThere(f"onnxruntime {ort.__version__} was built without {provider}")
    options = {} if kind == "cpu" else {"device_id": index or "0"}
    if kind == "cuda" and hasattr(ort, "preload_dlls"):
        ort.preload_dlls()
    session = ort.InferenceSession(one_node_graph(), providers=[(provider, options)])
    if session.get_providers()[0] != provider:
        raise NotThere(f"onnxruntime {ort.__version__} offers {provider}, but a session of it runs on the CPU")
    session.disable_fallback()
    (result,) = session.run(None, {"x": np.array([-1.0, 2.0], np.float32)})
    if result.tolist() != [0.0, 2.0]:
        raise RuntimeError(f"relu of [-1, 2] is {result.tolist()} on {provider}")
    return {"onnxruntime": ort.__version__}


def _openvino(device: str) -> dict[str, Any]:
    """Compile and run the same graph on an OpenVINO device."""
    sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]  # it would write an identifier to the home folder
    import numpy as np
    import openvino

    core = openvino.Core()
    wanted = (device or "cpu").upper().replace(":", ".")
    there = core.available_devices
    if wanted not in there and wanted not in [name.partition(".")[0] for name in there]:
        raise NotThere(f"openvino {openvino.__version__} finds no {wanted}, only {', '.join(there) or 'nothing'}")
    compiled = core.compile_model(core.read_model(one_node_graph()), wanted)
    result = compiled(np.array([-1.0, 2.0], np.float32))[0]
    if result.tolist() != [0.0, 2.0]:
        raise RuntimeError(f"relu of [-1, 2] is {result.tolist()} on {wanted}")
    names = [core.get_property(name, "FULL_DEVICE_NAME") for name in there]
    return {"openvino": openvino.__version__.partition("-")[0], "devices": there, "names": names}


def _tensorrt(_argument: str) -> dict[str, Any]:
    """Build an engine of the same graph."""
    import tensorrt as trt

    major, minor = (int(part) for part in trt.__version__.split(".")[:2])
    if (major, minor) < (10, 12):
        raise ImportError(f"TensorRT {trt.__version__} is installed, clipkd needs 10.12 or newer")
    gpu = _nvidia("")
    builder = trt.Builder(trt.Logger(trt.Logger.ERROR))
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, trt.Logger(trt.Logger.ERROR))
    if not parser.parse(one_node_graph()):
        raise RuntimeError(f"TensorRT {trt.__version__} does not read a graph of one node")
    if builder.build_serialized_network(network, builder.create_builder_config()) is None:
        raise RuntimeError(f"TensorRT {trt.__version__} builds no engine of one node")
    return dict(gpu, tensorrt=trt.__version__)


def _nvidia(_argument: str) -> dict[str, Any]:
    """List the GPUs that the NVIDIA driver reports."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        raise NotThere("no NVIDIA driver (libcuda.so.1 does not load)") from None
    count, version = ctypes.c_int(), ctypes.c_int()
    status = cuda.cuInit(0) or cuda.cuDeviceGetCount(ctypes.byref(count))
    if status or not count.value:
        raise NotThere(f"an NVIDIA driver but no GPU (cuInit returns {status})" if status else "no NVIDIA GPU")
    cuda.cuDriverGetVersion(ctypes.byref(version))
    names = []
    for index in range(count.value):
        name = ctypes.create_string_buffer(256)
        cuda.cuDeviceGetName(name, len(name), ctypes.c_int(index))
        names.append(name.value.decode())
    return {"gpus": names, "cuda": f"{version.value // 1000}.{version.value % 1000 // 10}"}


def _system(_argument: str) -> dict[str, Any]:
    """Return the machine's memory, free disk space, and on a Jetson its release."""
    release = Path("/etc/nv_tegra_release")
    return {
        "python": platform.python_version(),
        "architecture": platform.machine(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "disk_free_bytes": shutil.disk_usage(str(Path.home())).free,
        "l4t": release.read_text().splitlines()[0] if release.is_file() else None,
    }


def one_node_graph() -> bytes:
    """Return an ONNX model, y = relu(x) of two floats, without the onnx package (onnx.proto's field numbers)."""

    def value(name: str) -> bytes:
        shape = _field(2, _field(1, _number(1, 2)))
        tensor = _number(1, 1) + shape  # element type: float
        return _field(1, name.encode()) + _field(2, _field(1, tensor))

    node = _field(1, b"x") + _field(2, b"y") + _field(4, b"Relu")
    graph = _field(1, node) + _field(2, b"probe") + _field(11, value("x")) + _field(12, value("y"))
    opset = _field(1, b"") + _number(2, 17)
    return _number(1, 8) + _field(7, graph) + _field(8, opset)


def _number(field: int, value: int) -> bytes:
    return bytes([field << 3, value])  # the value fits in one byte


def _field(field: int, content: bytes) -> bytes:
    if len(content) > 127:
        raise ValueError(f"expected at most 127 bytes, got {len(content)}")
    return bytes([field << 3 | 2, len(content)]) + content


_PROBES = {
    "base": _base,
    "pictures": _pictures,
    "train": _train,
    "quantize": _quantize,
    "compiler": _compiler,
    "export": _export,
    "report": _report,
    "onnxruntime": _onnxruntime,
    "openvino": _openvino,
    "tensorrt": _tensorrt,
    "nvidia": _nvidia,
    "system": _system,
}


if __name__ == "__main__":
    main()
