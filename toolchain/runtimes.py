"""The runtimes that exported models run in: one table row has every fact about each.

A TensorRT build kit (kit) is a folder of graphs from which the target device builds its own TensorRT engines.
To add a runtime, add its row and its name in `RuntimeName`, a function that opens its graphs in runner.py, and a
capability in export/devices/doctor.py with its probe in export/device_programs/probes.py.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

from toolchain.precisions import PrecisionName

RuntimeName: TypeAlias = Literal["onnxruntime", "openvino", "tensorrt"]


@dataclass(frozen=True)
class Runtime:
    name: RuntimeName
    title: str
    install: str
    """The command that installs it for clipkd."""

    graphs_open_in: RuntimeName
    """The runtime that opens its graphs on the exporting machine: itself, or another one for a kit."""

    devices: tuple[str, ...]
    """The kinds of device that it supports, as in `--device`."""

    capabilities: tuple[str, ...]
    """The capabilities in export/devices/doctor.py that it needs on its usual device."""

    package: str | None = None
    """The package that a device without clipkd installs; None: more than one command is needed."""

    computes_alone: tuple[PrecisionName, ...] = ()
    """The precisions that only this runtime supports."""

    separates_products: bool = False
    """It computes queries, keys and values faster as separate products than as one that is split."""

    rounds_outputs: bool = False
    """It computes a convolution in int8 only if the output is rounded to int8 too, directly or after a ReLU."""

    @property
    def is_kit(self) -> bool:
        """Return True if the exported model is a TensorRT build kit."""
        return self.graphs_open_in != self.name


RUNTIMES: Mapping[str, Runtime] = {
    row.name: row
    for row in (
        Runtime(
            "onnxruntime",
            title="ONNX Runtime",
            install="pip install 'clipkd[onnxruntime]'",
            graphs_open_in="onnxruntime",
            devices=("cpu", "cuda"),
            capabilities=("onnxruntime cpu",),
            package="onnxruntime",
            rounds_outputs=True,
        ),
        Runtime(
            "openvino",
            title="OpenVINO",
            install="pip install 'clipkd[openvino]'",
            graphs_open_in="openvino",
            devices=("cpu", "gpu", "npu"),
            capabilities=("openvino cpu",),
            package="openvino",
            computes_alone=("int8-bf16",),
            separates_products=True,
        ),
        Runtime(
            "tensorrt",
            title="TensorRT",
            install="pip install 'clipkd[tensorrt]'",
            graphs_open_in="onnxruntime",
            devices=("cuda",),
            capabilities=("nvidia driver", "tensorrt build"),
        ),
    )
}
"""Runtimes by name; by default the first suitable one is used."""


def runtime_title(name: str) -> str:
    """Return the title of a runtime, or the name itself if it is unknown."""
    return RUNTIMES[name].title if name in RUNTIMES else name


def choose_runtime(device: str) -> str:
    """Return the first runtime that supports a device (`cpu`, `cuda:0`, `npu`), or the first of all."""
    kind = device.partition(":")[0]
    return next((runtime.name for runtime in RUNTIMES.values() if kind in runtime.devices), next(iter(RUNTIMES)))


def runtime_that_computes_alone(precision: str) -> Runtime | None:
    """Return the only runtime that supports a precision, or None if several do."""
    return next((runtime for runtime in RUNTIMES.values() if precision in runtime.computes_alone), None)
