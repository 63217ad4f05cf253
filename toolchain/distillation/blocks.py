"""Sum functions of rows in blocks, forming the gradient of their weighted sum in the same sweep.

A contrastive loss compares each of b rows with B candidates.  The [b, B] similarities are needed only while the rows
that they belong to are summed, so a sweep holds them for one block of rows at a time.  What remains is one gradient of
the shape of each input: memory is linear in B.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_BUFFERS = 12
"""Number of [rows, columns] arrays that a block has at once: the logits and log softmax of two models, their gradients,
and the temporary arrays of autograd."""


class Sweep(NamedTuple):
    """One pass over rows in blocks, which adds to n terms."""

    terms: tuple[str, ...]
    """Names of the n terms."""

    sum_block: Callable[[slice, Sequence[Tensor], Sequence[Tensor]], Tensor]
    """Return what a block adds to each term [n], from its place, the block of each tensor of rows, and the shared ones.
    It must not read any other tensor that wants a gradient."""

    rows: Sequence[Tensor]
    """Tensors of b rows each, which are cut into blocks."""

    shared: Sequence[Tensor]
    """Tensors that every block reads whole: candidates [B, D] and scales."""

    num_columns: int
    """Size of the arrays that a block makes, for each of its rows."""


def sum_in_blocks(
    sweeps: Sequence[Sweep], weights: Mapping[str, float], memory_mb: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the weighted sum of all terms, and the terms without gradient.

        total = sum over terms of weight * term,   term = sum over sweeps and their blocks

    A tensor that several sweeps read has one gradient.  The total is differentiable once.  The arrays of a block take
    at most about `memory_mb`, unless one row takes more.
    """
    distinct = {id(x): x for sweep in sweeps for x in (*sweep.rows, *sweep.shared)}
    place = {key: i for i, key in enumerate(distinct)}
    places = [([place[id(x)] for x in sweep.rows], [place[id(x)] for x in sweep.shared]) for sweep in sweeps]
    names = list(dict.fromkeys(name for sweep in sweeps for name in sweep.terms))
    plan = _Plan(sweeps, places, {name: weights[name] for name in names}, memory_mb)
    total, found = _SumInBlocks.apply(plan, *distinct.values())
    return total, dict(zip(names, found.unbind(), strict=True))


def choose_block_rows(num_columns: int, memory_mb: float, dtype: torch.dtype) -> int:
    """Return the number of rows whose arrays fit a budget of memory, at least one."""
    return max(1, int(memory_mb * 2**20 / (_BUFFERS * dtype.itemsize * max(1, num_columns))))


class _Plan(NamedTuple):
    sweeps: Sequence[Sweep]
    places: Sequence[tuple[Sequence[int], Sequence[int]]]
    """Numbers of each sweep's rows and shared tensors among the distinct ones."""

    weights: Mapping[str, float]
    """Weights of the terms, in the order of the terms that are returned."""

    memory_mb: float


class _SumInBlocks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, plan: _Plan, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        wanted = ctx.needs_input_grad[1:]
        gradients = [_zeros(x) if is_wanted else None for x, is_wanted in zip(tensors, wanted, strict=True)]
        leaves = [x.detach().requires_grad_(is_wanted) for x, is_wanted in zip(tensors, wanted, strict=True)]
        found = {name: tensors[0].new_zeros((), dtype=torch.float64) for name in plan.weights}
        for sweep, (rows, shared) in zip(plan.sweeps, plan.places, strict=True):
            num_rows = len(tensors[rows[0]])
            size = choose_block_rows(sweep.num_columns, plan.memory_mb, tensors[rows[0]].dtype)
            for start in range(0, num_rows, size):
                place = slice(start, start + size)
                block = [leaves[i].detach()[place].requires_grad_(wanted[i]) for i in rows]
                whole = [leaves[i] for i in shared]
                with torch.set_grad_enabled(any(wanted)):
                    added = dict(zip(sweep.terms, sweep.sum_block(place, block, whole), strict=True))
                    total = torch.stack([plan.weights[name] * value for name, value in added.items()]).sum()
                for name, value in added.items():
                    found[name] += value.detach()
                targets = [_cut(gradients[i], place) for i in rows] + [gradients[i] for i in shared]
                _add_gradients(total, [*block, *whole], targets)
        ctx.save_for_backward(*(g if g is None else g.to(x.dtype) for g, x in zip(gradients, tensors, strict=True)))
        terms = torch.stack(list(found.values())).to(tensors[0].dtype)
        ctx.mark_non_differentiable(terms)
        total = torch.stack([weight * term for weight, term in zip(plan.weights.values(), terms, strict=True)]).sum()
        return total, terms

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        return None, *(None if x is None else upstream * x for x in ctx.saved_tensors)


def _zeros(x: Tensor) -> Tensor:
    """Return zeros for the gradient; a scale's is a sum over the square of the batch, which float32 would round."""
    return torch.zeros_like(x, dtype=torch.float64 if x.ndim == 0 else x.dtype)


def _cut(gradient: Tensor | None, place: slice) -> Tensor | None:
    return None if gradient is None else gradient[place]


def _add_gradients(total: Tensor, inputs: Sequence[Tensor], targets: Sequence[Tensor | None]) -> None:
    """Add the gradients of a block's total to the gradients of the whole."""
    wanted = [(x, target) for x, target in zip(inputs, targets, strict=True) if target is not None]
    if wanted:
        gradients = torch.autograd.grad(total, [x for x, _ in wanted], allow_unused=True)
        for gradient, (_, target) in zip(gradients, wanted, strict=True):
            if gradient is not None and target is not None:
                target.add_(gradient)
