"""Sum losses over blocks of rows, and compute the gradient of their weighted sum in the same pass.

A contrastive loss compares each of b rows with B candidates.  A sweep, which is one pass over the b rows, has the
similarities of only one block of c rows at a time, [c, B] instead of [b, B].  It adds the block's gradients to those of
the inputs, which have the inputs' shapes.  Memory is therefore linear in B.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

BLOCK_ARRAYS = 8
"""Number of [c, columns] arrays that exist at once, at most: the logits of two models, their gradients, the softmax of
both, and temporary arrays."""


class Block(NamedTuple):
    """A block of rows, and the arrays to which its gradients are added."""

    place: slice
    """The block's slice of the sweep's rows."""

    rows: Sequence[Tensor]
    """That slice of each tensor in the sweep's `rows`."""

    shared: Sequence[Tensor]
    """The tensors in the sweep's `shared`."""

    gradients: Sequence[Tensor | None]
    """For each tensor in `rows` and then in `shared`, the array to add its gradient to; None: it needs none."""

    weights: Sequence[float]
    """Weights of the sweep's terms.  The gradients to add are those of the weighted sum."""

    work: Sequence[Tensor]
    """The sweep's `num_work` arrays, [c, columns].  They hold what an earlier block left, or anything."""


class Sweep(NamedTuple):
    """One pass over rows in blocks.  Each block adds a value to each of n terms of the loss."""

    terms: tuple[str, ...]
    """Names of the n terms; several sweeps may add to the same term."""

    add_block: Callable[[Block], Tensor]
    """Add the gradients of a block in place, and return what the block adds to each term, [n].  `by_autograd` makes
    such a function from one that only returns the terms.  Any tensor that is not in the block gets no gradient."""

    rows: Sequence[Tensor]
    """Tensors of b rows each, which are split into blocks."""

    shared: Sequence[Tensor]
    """Tensors that every block reads completely: candidates [B, D] and scales."""

    num_columns: int
    """Number of columns of a block's arrays: B for similarities.  It determines the rows of a block."""

    num_work: int = 0
    """Number of arrays that all blocks reuse: on a CPU, requesting them anew took a seventh of the time."""


def sum_in_blocks(
    sweeps: Sequence[Sweep], weights: Mapping[str, float], memory_mb: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the weighted sum of all terms, and the terms without gradient, all scalar.

        total = sum over terms of weight * term,   term = sum over sweeps and their blocks

    A tensor that several sweeps read has one gradient, the sum over the sweeps.  The total can be differentiated once,
    not twice.  The arrays of a block take at most about `memory_mb`, unless one row takes more.
    """
    distinct = {id(x): x for sweep in sweeps for x in (*sweep.rows, *sweep.shared)}
    index = {key: i for i, key in enumerate(distinct)}
    indices = [([index[id(x)] for x in sweep.rows], [index[id(x)] for x in sweep.shared]) for sweep in sweeps]
    names = list(dict.fromkeys(name for sweep in sweeps for name in sweep.terms))
    plan = _Plan(sweeps, indices, {name: weights[name] for name in names}, memory_mb)
    total, terms = _SumInBlocks.apply(plan, *distinct.values())
    return total, dict(zip(names, terms.unbind(), strict=True))


def scale_terms(sweep: Sweep, factors: Mapping[str, float]) -> Sweep:
    """Return the sweep with some terms multiplied, value and gradient."""
    factor_n = [factors.get(name, 1.0) for name in sweep.terms]

    def add_block(block: Block) -> Tensor:
        weights = [factor * weight for factor, weight in zip(factor_n, block.weights, strict=True)]
        value_n = sweep.add_block(block._replace(weights=weights))
        return torch.stack([factor * value for factor, value in zip(factor_n, value_n.unbind(), strict=True)])

    return sweep._replace(add_block=add_block)


def by_autograd(sum_block: Callable[[Block], Tensor]) -> Callable[[Block], Tensor]:
    """Return `Sweep.add_block` for a differentiable function that returns what a block adds to each term, [n]."""

    def add_block(block: Block) -> Tensor:
        is_needed = [gradient is not None for gradient in block.gradients]
        inputs = [
            x.detach().requires_grad_(needed) for x, needed in zip((*block.rows, *block.shared), is_needed, strict=True)
        ]
        rows, shared = inputs[: len(block.rows)], inputs[len(block.rows) :]
        with torch.set_grad_enabled(any(is_needed)):
            value_n = sum_block(block._replace(rows=rows, shared=shared))
            weighted = [w * v for w, v in zip(block.weights, value_n.unbind(), strict=True)]
            total = torch.stack(weighted).sum()  # a tensor of the weights would make the host wait for the GPU
        if total.requires_grad:
            wanted = [(x, target) for x, target in zip(inputs, block.gradients, strict=True) if target is not None]
            found = torch.autograd.grad(total, [x for x, _ in wanted], allow_unused=True)
            for gradient, (_, target) in zip(found, wanted, strict=True):
                if gradient is not None:
                    target.add_(gradient)
        return value_n.detach()

    return add_block


def choose_block_rows(num_columns: int, memory_mb: float, dtype: torch.dtype) -> int:
    """Return the number of rows whose arrays fit a budget of memory, at least one."""
    return max(1, int(memory_mb * 2**20 / (BLOCK_ARRAYS * dtype.itemsize * max(1, num_columns))))


class _Plan(NamedTuple):
    """The arguments of `_SumInBlocks` that are not tensors."""

    sweeps: Sequence[Sweep]
    indices: Sequence[tuple[Sequence[int], Sequence[int]]]
    """For each sweep, the indices of its `rows` and of its `shared` among the distinct tensors."""

    weights: Mapping[str, float]
    """Weights of the terms, in the order of the terms that are returned."""

    memory_mb: float


class _SumInBlocks(torch.autograd.Function):
    """Compute the total with its gradient in the forward pass; the backward pass only multiplies the gradient."""

    @staticmethod
    def forward(ctx: Any, plan: _Plan, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        needed = ctx.needs_input_grad[1:]
        gradients = [_zeros(x) if is_needed else None for x, is_needed in zip(tensors, needed, strict=True)]
        sums = {name: tensors[0].new_zeros((), dtype=torch.float64) for name in plan.weights}
        for sweep, (rows, shared) in zip(plan.sweeps, plan.indices, strict=True):
            num_rows = len(tensors[rows[0]])
            size = choose_block_rows(sweep.num_columns, plan.memory_mb, tensors[rows[0]].dtype)
            first = tensors[rows[0]]
            work = [first.new_empty(min(size, num_rows), sweep.num_columns) for _ in range(sweep.num_work)]
            for start in range(0, num_rows, size):
                place = slice(start, min(start + size, num_rows))
                block = Block(
                    place,
                    [tensors[i][place] for i in rows],
                    [tensors[i] for i in shared],
                    [_slice_rows(gradients[i], place) for i in rows] + [gradients[i] for i in shared],
                    [plan.weights[name] for name in sweep.terms],
                    [array[: place.stop - place.start] for array in work],
                )
                for name, value in zip(sweep.terms, sweep.add_block(block), strict=True):
                    sums[name] += value
        ctx.save_for_backward(*(g if g is None else g.to(x.dtype) for g, x in zip(gradients, tensors, strict=True)))
        terms = torch.stack(list(sums.values())).to(tensors[0].dtype)
        ctx.mark_non_differentiable(terms)
        total = torch.stack([weight * term for weight, term in zip(plan.weights.values(), terms, strict=True)]).sum()
        return total, terms

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        return None, *(None if x is None else upstream * x for x in ctx.saved_tensors)


def _zeros(x: Tensor) -> Tensor:
    """Return zeros to add gradients to; in float64 for a scale, whose gradient is a sum over all b B similarities."""
    return torch.zeros_like(x, dtype=torch.float64 if x.ndim == 0 else x.dtype)


def _slice_rows(gradient: Tensor | None, place: slice) -> Tensor | None:
    """Return a view of some rows of a gradient, if there is one."""
    return None if gradient is None else gradient[place]
