"""Runtime: open exported models and encode with them, here or on a device, without torch.

An exported model's directory comes in; `ExportedEncoders` go out, which turn images and captions into unit features.
Another runtime is a row in toolchain/runtimes.py and a function that opens a graph in device_programs/runner.py; a
runtime that builds its own files from the graphs gets a module such as tensorrt_engines.py.
"""

from export.runtime.exported_model import open_exported

__all__ = ["open_exported"]  # the name that model cards import
