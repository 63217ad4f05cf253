"""Export: what leaves the training machine.

Checkpoints come in as stages; exported models, their proofs, accuracies and latencies go out as stages.
The packages are in the order in which they may import each other: device_programs, devices, graphs, runtime, proof,
profiling, students, pipeline; what a precision or a runtime is stands in toolchain/precisions.py and
toolchain/runtimes.py.
"""
