"""Exporting and measuring: from checkpoints to exported models, their parity checks, accuracies and latencies.

The input is checkpoints as stages; the output is exported models and measurements as stages.
The packages may import each other in this order: device_programs, devices, graphs, runtime, proof, profiling, students,
pipeline. Precisions and runtimes are defined in toolchain/precisions.py and toolchain/runtimes.py.
"""
