"""Graphs: write a checkpoint's towers as ONNX graphs, with all that a device without torch needs beside them.

A model with its towers and a `PlannedExport` come in; the files of an exported model and their `GraphSummary` go out.
An equivalent form that a runtime executes faster goes to onnx_rewrites.py, what a precision does to a tower to
precision.py, and a file that a kit needs beside its graphs to a module such as tensorrt_kit.py.
"""
