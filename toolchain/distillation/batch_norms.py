"""Compute the batch norms of a student over the rows of all ranks, or from statistics that stay as they are.

W ranks then train the student that one rank trains with the whole batch.  A batch norm remains the same module with the
same names in its state_dict: only its call of `F.batch_norm` is replaced.  timm's BatchNormAct2d makes the same call.
For the n values x_i of one channel, over all ranks,

    y_i = w (x_i - mean) / sqrt(var + eps) + b

    dL/dx_i = w / sqrt(var + eps) (g_i - sum(g) / n - z_i sum(g z) / n)    g = dL/dy, z = (x - mean) / sqrt(var + eps)

where L is the sum of the losses of all ranks.  On GPUs, torch's SyncBatchNorm computes this; it has no CPU kernels.
Weight and bias receive the gradient of a rank's own rows, as all parameters do (distributed.py).
Here W is the number of ranks, and C are channels.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules._functions import SyncBatchNorm
from torch.overrides import TorchFunctionMode

from toolchain.distributed import Processes
from toolchain.errors import UsageError


def find_batch_norms(net: nn.Module) -> list[nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d]:
    """Return the batch norms of a student."""
    return [each for each in net.modules() if isinstance(each, (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d))]


def freeze_batch_norms(net: nn.Module) -> None:
    """Let every batch norm use its running statistics, and not change them, until the next call of `net.train`."""
    for module in find_batch_norms(net):
        module.training = False  # not `eval()`, which would also reach timm's dropout inside the module


def require_statistics(net: nn.Module) -> None:
    """Raise an error if batch norms have the statistics of a new model, with which they normalize nothing.

    Raises:
        UsageError: all running means are 0 and all running variances 1.
    """
    found = [(norm.running_mean, norm.running_var) for norm in find_batch_norms(net)]
    kept = [(mean_C, var_C) for mean_C, var_C in found if mean_C is not None and var_C is not None]
    if kept and all(not mean_C.any() and torch.equal(var_C, torch.ones_like(var_C)) for mean_C, var_C in kept):
        raise UsageError(
            "distill.batch_norm: frozen keeps the statistics that the student starts from, and this student starts "
            "from random weights, without any. Give student.init weights, or use batch_norm: all_processes"
        )


def synchronize_batch_norms(net: nn.Module, processes: Processes) -> None:
    """Let every batch norm in training mode use the rows of all ranks, by collective calls in both passes."""
    if processes.size == 1:
        return
    for module in find_batch_norms(net):
        module.forward = _over_all_ranks(module.forward)  # type: ignore[assignment]


def _over_all_ranks(forward: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Return the forward pass of a batch norm with its call of `F.batch_norm` replaced."""

    def forward_over_all_ranks(x: Tensor) -> Tensor:
        with _OverAllRanks():
            return forward(x)

    # torch.compile does not trace collective calls within an autograd function
    disabled: Callable[[Tensor], Tensor] = torch.compiler.disable(forward_over_all_ranks)  # type: ignore[no-untyped-call]
    return disabled


class _OverAllRanks(TorchFunctionMode):
    """Call `_batch_norm` instead of `F.batch_norm`."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return (_batch_norm if func is F.batch_norm else func)(*args, **(kwargs or {}))


def _batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """Return x [b, C, ...] normalized as by F.batch_norm, but in training mode with the statistics of all ranks' rows.

    The names of the parameters are those of F.batch_norm, which may be passed by name.
    """
    if not training:
        return F.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps)
    running = running_mean, running_var
    if x.device.type == "cuda":
        ranks = dist.group.WORLD, dist.get_world_size()
        output: Tensor = SyncBatchNorm.apply(x, weight, bias, *running, eps, momentum, *ranks)
        return output
    normalized: Tensor
    normalized, mean_C, var_C = _Normalize.apply(x, eps)
    for old_C, new_C in zip(running, (mean_C, var_C), strict=True):
        if old_C is not None:
            old_C.lerp_(new_C.to(old_C.dtype), momentum)
    shape = (1, -1) + (1,) * (x.dim() - 2)
    if weight is not None:
        normalized = normalized * weight.view(shape)
    if bias is not None:
        normalized = normalized + bias.view(shape)
    return normalized.to(x.dtype)


class _Normalize(torch.autograd.Function):
    """Return (x - mean) / sqrt(var + eps) in float32 or wider; and mean and unbiased variance, [C], over all ranks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        wide = x if x.dtype == torch.float64 else x.float()
        # sums in float64, as in PyTorch's CPU kernels
        own_var_C, own_mean_C = torch.var_mean(x.double(), [0, *range(2, x.dim())], correction=0)
        own_n = own_mean_C.new_full((1,), x.numel() // x.shape[1])
        gathered = _gather(torch.cat([own_mean_C, own_var_C, own_n]))
        means_WC, vars_WC, n_W1 = gathered.tensor_split([x.shape[1], 2 * x.shape[1]], dim=1)
        share_W1 = n_W1 / n_W1.sum()
        mean_C = (share_W1 * means_WC).sum(0)
        var_C = (share_W1 * (vars_WC + (means_WC - mean_C).square())).sum(0)
        shape = (1, -1) + (1,) * (x.dim() - 2)
        inverse_C = (var_C + eps).rsqrt().to(wide.dtype)
        normalized = (wide - mean_C.to(wide.dtype).view(shape)) * inverse_C.view(shape)
        ctx.save_for_backward(normalized, inverse_C, n_W1.sum())
        ctx.dtype = x.dtype
        unbiased_C = var_C * (n_W1.sum() / (n_W1.sum() - 1))
        ctx.mark_non_differentiable(mean_C, unbiased_C)
        return normalized, mean_C, unbiased_C

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        normalized, inverse_C, n = ctx.saved_tensors
        gradient, dims = gradients[0], [0, *range(2, normalized.dim())]
        own_2C = torch.stack([gradient.double().sum(dims), (gradient.double() * normalized).sum(dims)])
        sum_C, product_C = (_gather(own_2C.flatten()).sum(0).view_as(own_2C) / n).to(normalized.dtype)
        shape = (1, -1) + (1,) * (normalized.dim() - 2)
        rest = gradient - sum_C.view(shape) - normalized * product_C.view(shape)
        return (inverse_C.view(shape) * rest).to(ctx.dtype), None


def _gather(row_D: Tensor) -> Tensor:
    """Return the row of every rank, [W, D], without gradient."""
    rows_WD = row_D.new_empty(dist.get_world_size(), len(row_D))
    dist.all_gather_into_tensor(rows_WD.flatten(), row_D)
    return rows_WD
