"""Proof: check that an exported model computes in its runtime what its checkpoint computed in PyTorch.

An exported model's directory comes in, whose parity.npz holds PyTorch's answers; a `Proof` goes out, or a GateError
that names the worst sample.
Another comparison goes to parity.py, its bound for a precision to the table in toolchain/precisions.py, and a reader of
another runtime's optimised graph to executed_graph.py.
"""
