"""Exporting and measuring: from checkpoints to exported models, their parity checks, accuracies and latencies.

Checkpoints go in as stages; exported models and measurements come out as stages.
The packages are in the order in which they may import each other: device_programs, devices, graphs, runtime, proof,
profiling, students, pipeline; what a precision or a runtime is stands in toolchain/precisions.py and
toolchain/runtimes.py.
"""
