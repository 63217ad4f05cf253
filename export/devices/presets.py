"""Known kinds of device: the runtimes and precisions that they support."""

from dataclasses import dataclass

from toolchain.precisions import PrecisionName
from toolchain.runtimes import RuntimeName


@dataclass(frozen=True)
class Preset:
    """A common board and what it supports; None for a fact that depends on the installed software."""

    title: str
    runtimes: tuple[RuntimeName, ...]
    precisions: tuple[PrecisionName, ...]
    tensorrt: str | None = None
    """TensorRT version that comes with the board's system software."""

    notes: str = ""
    source: str = ""


_JETPACK = "docs.nvidia.com/deeplearning/tensorrt: support matrices of 10.x and 11.x"
_ORIN = "Compute capability 8.7: int8 and fp16, no fp8. Build engines on the device; they cannot be built elsewhere. "
_LINEAR = "For ViTs, quantize linear layers only: int8 is then 1.15 times as fast as fp16 (onnxsim#1742, Orin Nano)."
_JETSON_LOCK = "Lock clocks before measuring: sudo nvpmodel -m 0; sudo jetson_clocks."
PRESETS = {
    "jetson-orin-nano": Preset(
        "Jetson Orin Nano, JetPack 6",
        ("tensorrt", "onnxruntime"),
        ("fp32", "fp16", "int8", "int8-fp16"),
        "10",
        f"{_ORIN}{_LINEAR} {_JETSON_LOCK}",
        _JETPACK,
    ),
    "jetson-orin-nx": Preset(
        "Jetson Orin NX, JetPack 6",
        ("tensorrt", "onnxruntime"),
        ("fp32", "fp16", "int8", "int8-fp16"),
        "10",
        f"{_ORIN}{_LINEAR} {_JETSON_LOCK}",
        _JETPACK,
    ),
    "jetson-agx-orin": Preset(
        "Jetson AGX Orin, JetPack 6 (TensorRT 10) or 7.2.2 and newer (TensorRT 11.4.1)",
        ("tensorrt", "onnxruntime"),
        ("fp32", "fp16", "int8", "int8-fp16"),
        "10 or 11, by JetPack",
        f"{_ORIN}{_JETSON_LOCK}",
        _JETPACK,
    ),
    "jetson-xavier-nx": Preset(
        "Jetson Xavier NX, JetPack 5 (its last)",
        ("onnxruntime",),
        ("fp32", "fp16", "int8"),
        "8",
        "TensorRT 8 lacks the strongly typed networks that clipkd builds (they need 10.12): ONNX Runtime only. "
        f"{_JETSON_LOCK}",
        "developer.nvidia.com/embedded/jetpack-archive",
    ),
    "raspberry-pi-4": Preset(
        "Raspberry Pi 4 (Cortex-A72)",
        ("onnxruntime",),
        ("fp32", "int8"),
        None,
        "64-bit system only. No dot-product instructions: int8 saves memory rather than time. "
        "Passive cooling throttles: warm it up first, and check that vcgencmd get_throttled prints 0x0.",
        "ARM Cortex-A72 is ARMv8.0-A: no asimddp in /proc/cpuinfo",
    ),
    "raspberry-pi-5": Preset(
        "Raspberry Pi 5 (Cortex-A76)",
        ("onnxruntime",),
        ("fp32", "fp16", "int8"),
        None,
        "64-bit system. Has dot-product instructions (asimddp). "
        "Needs its active cooler: check that vcgencmd get_throttled prints 0x0.",
        "ARM Cortex-A76 is ARMv8.2-A: asimddp and asimdhp in /proc/cpuinfo",
    ),
    "intel-n100": Preset(
        "Intel N100 mini PC",
        ("openvino", "onnxruntime"),
        ("fp32", "fp16", "int8"),
        None,
        "AVX2 and AVX-VNNI, no AVX-512; OpenVINO also runs on its graphics (device gpu). Fanless models throttle.",
        "ark.intel.com: Intel Processor N100",
    ),
    "cuda-server": Preset(
        "Linux machine with an NVIDIA GPU",
        ("tensorrt", "onnxruntime"),
        ("fp32", "fp16", "bf16", "int8", "int8-fp16"),
        None,
        "TensorRT 10.12 or newer. int8 may be slower than fp16 (twice as slow on a T4, Model-Optimizer#167): "
        "measure both. "
        "Lock clocks before measuring: sudo nvidia-smi -pm 1; sudo nvidia-smi -lgc F,F.",
        "docs.nvidia.com/deeplearning/tensorrt: performance best practices",
    ),
}
"""Common boards.  A preset is information only; `clipkd devices test` checks each capability by running it."""
