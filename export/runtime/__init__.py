"""Runtime: open exported models and encode with them, here or on a device, without torch.

The input is an exported model's directory; the output is `ExportedEncoders`, which turn images and captions into unit
features. To add a runtime, add a row to toolchain/runtimes.py and a function that opens a graph to
device_programs/runner.py. A runtime that builds its own files from the graphs gets a module such as
tensorrt_engines.py.
"""

from export.runtime.exported_model import open_exported

__all__ = ["open_exported"]  # the name that model cards import
