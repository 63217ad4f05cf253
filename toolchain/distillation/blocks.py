"""Sum a function of rows in blocks, forming the gradient of the weighted sum in the same sweep.

A contrastive loss compares each of b rows with B candidates.  The [b, B] similarities are needed only while the rows
that they belong to are summed, so the sweep holds them for one block of rows at a time: memory is linear in B.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

BlockSums = Callable[[slice, Sequence[Tensor], Sequence[Tensor]], Tensor]
"""Return the sums [n] over one block, from its place, the block of each tensor of rows, and the shared tensors."""

_BUFFERS = 8
"""Number of [rows, candidates] arrays that a block has at once: logits and log softmax of two models, their gradients,
and the temporary arrays of autograd."""


def sum_in_blocks(
    sums: BlockSums, weights: Sequence[float], rows: Sequence[Tensor], shared: Sequence[Tensor], block_rows: int
) -> tuple[Tensor, Tensor]:
    """Return the weighted total of n sums over all rows, and the n sums without gradient.

        total = sum_k weights_k S_k,   S = sum over blocks of sums(block)

    `rows` have the same number of rows, of which a block has `block_rows`, the last one perhaps fewer.  `shared` are
    given whole to each block: candidates [B, D] and scales.  The total is differentiable once, in rows and shared.
    """
    total, found = _SumInBlocks.apply(sums, weights, len(rows), block_rows, *rows, *shared)
    return total, found


def choose_block_rows(num_candidates: int, memory_mb: float, dtype: torch.dtype) -> int:
    """Return the number of rows whose similarities with all candidates fit a budget of memory, at least one."""
    return max(1, int(memory_mb * 2**20 / (_BUFFERS * dtype.itemsize * max(1, num_candidates))))


class _SumInBlocks(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, sums: BlockSums, weights: Sequence[float], num_rows: int, block_rows: int, *tensors: Tensor
    ) -> tuple[Tensor, Tensor]:
        wanted = ctx.needs_input_grad[4:]
        gradients = [torch.zeros_like(x) if is_wanted else None for x, is_wanted in zip(tensors, wanted, strict=True)]
        leaves = [x.detach().requires_grad_(is_wanted) for x, is_wanted in zip(tensors, wanted, strict=True)]
        found = torch.zeros(len(weights), dtype=tensors[0].dtype, device=tensors[0].device)
        weight_n = torch.tensor(weights, dtype=found.dtype, device=found.device)
        for start in range(0, len(tensors[0]), block_rows):
            place = slice(start, start + block_rows)
            inputs = [
                x.detach()[place].requires_grad_(x.requires_grad) if i < num_rows else x for i, x in enumerate(leaves)
            ]
            with torch.set_grad_enabled(any(wanted)):
                sum_n = sums(place, inputs[:num_rows], inputs[num_rows:])
                total = (weight_n * sum_n).sum()
            found += sum_n.detach()
            if any(wanted):
                _add_gradients(gradients, inputs, total, place, num_rows)
        ctx.save_for_backward(*gradients)
        ctx.mark_non_differentiable(found)
        return (weight_n * found).sum(), found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, None, None, *(None if x is None else upstream * x for x in ctx.saved_tensors)


def _add_gradients(
    gradients: Sequence[Tensor | None], inputs: Sequence[Tensor], total: Tensor, place: slice, num_rows: int
) -> None:
    """Add a block's gradients to those of the whole tensors."""
    differentiated = [(i, x) for i, x in enumerate(inputs) if x.requires_grad]
    of_block = torch.autograd.grad(total, [x for _, x in differentiated], allow_unused=True)
    for (i, _), gradient in zip(differentiated, of_block, strict=True):
        whole = gradients[i]
        if gradient is not None and whole is not None:
            (whole[place] if i < num_rows else whole).add_(gradient)
