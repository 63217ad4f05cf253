"""Parity check: verify that an exported model computes in its runtime what its checkpoint computed in PyTorch.

The input is an exported model's directory, whose parity.npz holds PyTorch's results. The output is a `Proof`, or a
GateError that names the worst sample.
Add another comparison to parity.py, its bound for a precision to the table in toolchain/precisions.py, and a reader of
another runtime's optimized graph to executed_graph.py.
"""
