"""Equivalent rewrites of a tower before quantization: fold batch norms, move layer-norm gains, merge branches."""

from collections import Counter
from typing import Any

import torch
import torch.nn.functional as F
from timm.models import reparameterize_model
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from toolchain.models.towers import ImageTower

_MERGES_BRANCHES = ("fuse", "reparameterize", "switch_to_deploy")  # methods that timm calls to merge branches
_MAX_MOVE = 0.03  # change of a unit feature: 0.01 if channels are nearly dead, 0.1 if folded wrongly
_MAX_GAIN_MOVE = 1e-4  # change by moving gains: at most 1e-6 in 29 architectures


def fold_batch_norms(tower: nn.Module, example: Tensor) -> dict[str, str]:
    """Fold, in place, every batch norm into the convolution before it; return {batch norm's name: convolution's}.

    The order is observed while `example` runs.  A convolution whose output is also read elsewhere is left unchanged,
    for example where FastViT's attention normalizes a residual branch.  The arithmetic is float64, so folding a batch
    norm that was saved as the identity (see `_float_state`) restores the convolution to the bit.
    """
    convolution_of: dict[int, tuple[nn.Conv2d, Tensor]] = {}  # holding the tensor keeps its id unique
    pairs: list[tuple[nn.Conv2d, nn.BatchNorm2d]] = []

    def record_output(convolution: nn.Module, _: tuple[Tensor, ...], output: Tensor) -> None:
        assert isinstance(convolution, nn.Conv2d)
        convolution_of[id(output)] = (convolution, output)
        readers.count[id(output)] = 0  # an earlier tensor may have had this id

    def record_input(norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if isinstance(norm, nn.BatchNorm2d) and id(inputs[0]) in convolution_of:
            pairs.append((convolution_of[id(inputs[0])][0], norm))

    readers = _Readers()
    handles = [
        module.register_forward_hook(record_output) for module in tower.modules() if isinstance(module, nn.Conv2d)
    ]
    handles += [m.register_forward_pre_hook(record_input) for m in tower.modules() if isinstance(m, nn.BatchNorm2d)]
    with torch.no_grad(), readers:
        before_BD = tower(example)
    for handle in handles:
        handle.remove()
    output_of = {convolution: key for key, (convolution, _) in convolution_of.items()}
    pairs = [pair for pair in pairs if readers.count[output_of[pair[0]]] == 1]

    name_of = {module: name for name, module in tower.named_modules()}
    folded = {name_of[norm]: name_of[convolution] for convolution, norm in pairs}
    for convolution, norm in pairs:
        assert norm.running_mean is not None
        assert norm.running_var is not None
        with torch.no_grad():
            scale_C = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
            shift_C = norm.bias.double() - norm.running_mean.double() * scale_C
            if convolution.bias is not None:
                shift_C += convolution.bias.double() * scale_C
            weight = convolution.weight.double() * scale_C[:, None, None, None]
            convolution.weight.copy_(weight)
            convolution.bias = nn.Parameter(shift_C.to(convolution.weight.dtype))
        # timm's BatchNormAct2d also holds the activation
        rest = [module for name in ("drop", "act") if isinstance(module := getattr(norm, name, None), nn.Module)]
        tower.set_submodule(name_of[norm], nn.Sequential(*rest) if rest else nn.Identity())
    with torch.no_grad():
        error = (tower(example) - before_BD).abs().max().item()
    assert error < _MAX_MOVE, f"folding the batch norms moved a unit feature by {error}"
    return folded


def move_gains(tower: nn.Module, example: Tensor) -> list[str]:
    """Move, in place, gain and bias of layer norms into linear layers that alone read them; return the norms' names.

        W (g * n + b) + c = (W diag(g)) n + (W b + c)

    The gains amplify a few channels, and one scale for all channels then rounds the others coarsely; a weight has a
    scale per output instead.  This is "gamma migration", Outlier Suppression (arXiv:2209.13325), 4.1.  It also saves
    runtimes a pass over the activations.  The readers are observed while `example` runs.  The arithmetic is float64,
    so moving a gain of 1 and a bias of 0 (see `_float_state`) changes no bit.
    """
    outputs: list[tuple[nn.LayerNorm, Tensor]] = []

    def record_output(norm: nn.Module, _: tuple[Tensor, ...], output: Tensor) -> None:
        assert isinstance(norm, nn.LayerNorm)
        outputs.append((norm, output))
        readers.count[id(output)] = 0  # an earlier tensor may have had this id, or functions within the layer read it

    readers = _Readers()
    norms = [module for module in tower.modules() if isinstance(module, nn.LayerNorm) and module.weight is not None]
    handles = [norm.register_forward_hook(record_output) for norm in norms]
    with torch.no_grad(), readers:
        before_BD = tower(example)
    for handle in handles:
        handle.remove()
    runs, uses = Counter(norm for norm, _ in outputs), Counter(weight for _, weight, _ in readers.linears)
    read_by = {}
    for norm, output in outputs:
        linears = [(weight, bias) for read, weight, bias in readers.linears if read is output]
        by_linears_alone = len(linears) == readers.count[id(output)] > 0
        if by_linears_alone and runs[norm] == 1 and all(uses[weight] == 1 for weight, _ in linears):
            read_by[norm] = linears

    name_of = {module: name for name, module in tower.named_modules()}
    with torch.no_grad():
        for norm, linears in read_by.items():
            for weight, bias in linears:
                if norm.bias is not None:
                    bias.copy_(bias.double() + weight.double() @ norm.bias.double())
                weight.copy_(weight.double() * norm.weight.double())
            norm.weight = norm.bias = None  # type: ignore[assignment]
            norm.elementwise_affine = False
        error = (tower(example) - before_BD).abs().max().item()
    assert error < _MAX_GAIN_MOVE, f"moving the gains of layer norms moved a unit feature by {error}"
    return [name_of[norm] for norm in read_by]


class _Readers(TorchFunctionMode):
    """Counts the functions that read each tensor, by id, and records the inputs of linear layers with a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[int] = Counter()
        self.linears: list[tuple[Tensor, Tensor, Tensor]] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, (Tensor, tuple)) and not isinstance(result, torch.Size):
            given = (*args, *(kwargs or {}).values())
            several = (x for many in given if isinstance(many, (list, tuple)) for x in many)  # e.g. of torch.cat
            self.count.update({id(x) for x in (*given, *several) if isinstance(x, Tensor)})
        if func is F.linear and len(args) == 3 and all(isinstance(x, nn.Parameter) for x in args[1:]):
            self.linears.append(args)
        return result


def merge_branches(tower: ImageTower, example: Tensor) -> bool:
    """Merge, in place, training-only parallel branches such as FastViT's; return True if the tower had any."""
    assert isinstance(tower.visual, nn.Module)
    if not any(hasattr(module, name) for module in tower.visual.modules() for name in _MERGES_BRANCHES):
        return False
    with torch.no_grad():
        before_BD = tower(example)
        reparameterize_model(tower.visual, inplace=True)
        error = (tower(example) - before_BD).abs().max().item()
    assert error < _MAX_MOVE, f"merging the branches moved a unit feature by {error}"
    tower.requires_grad_(True)  # merging detaches the parameters
    return True
