"""Graphs: write a checkpoint's towers as ONNX graphs, with all files that a device without torch needs.

The input is a model with its towers and a `PlannedExport`; the output is the files of an exported model and their
`GraphSummary`. Add an equivalent form that a runtime executes faster to onnx_rewrites.py, the conversion of a tower to
a precision to precision.py, and further files of a build kit to a module such as tensorrt_kit.py.
"""
