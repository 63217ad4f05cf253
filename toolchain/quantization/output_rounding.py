"""Round the outputs of convolutions, for runtimes that otherwise compute them in floats.

NNCF rounds what a convolution reads.  ONNX Runtime computes a convolution in integers only if its output is rounded as
well, directly or after a ReLU.  Before a GELU or SiLU it is not: the runtime then dequantizes the weights in every call
and is slower than in fp32.  OpenVINO and TensorRT join such a convolution with what follows it, and need no rounding.

Import this module only after `import_nncf()`.
"""

from collections.abc import Sequence
from typing import Any

import torch
from nncf.torch.function_hook.nncf_graph.nncf_graph_builder import build_nncf_graph
from nncf.torch.function_hook.wrapper import register_post_function_hook
from nncf.torch.quantization.layers import SymmetricQuantizer
from torch import Tensor, nn

from toolchain.quantization.nncf_backend import find_quantizer_nodes, list_quantizers

_MERGED = ("relu", "relu_")  # ONNX Runtime replaces them by the range of the rounding

_LEAST_RANGE = 1e-5  # of a dead convolution, whose output is always 0


class OutputQuantizer(SymmetricQuantizer):  # type: ignore[misc]  # NNCF has no types
    """A quantizer of a convolution's output.  Its class distinguishes it from NNCF's own, also in a saved tower."""


def round_outputs(tower: nn.Module, batches: Sequence[Tensor]) -> None:
    """Insert, in place, quantizers after the quantized convolutions whose outputs are not rounded yet.

    The range of each is the largest value in `batches`, as of the other activations.
    """
    peaks = {name: _Peak() for name in _find_unrounded(tower, batches[0][:2])}
    handles = [register_post_function_hook(tower, name, 0, peak) for name, peak in peaks.items()]
    with torch.no_grad():
        for batch in batches:
            tower(batch)
    for handle in handles:
        handle.remove()
    of_activations = [quantizer for _, quantizer in list_quantizers(tower) if not quantizer.per_channel]
    for name, peak in peaks.items():
        quantizer = OutputQuantizer(of_activations[0]._qspec).to(peak.value.device)
        quantizer.signed = True
        with torch.no_grad():
            quantizer.scale.fill_(peak.value.clamp(min=_LEAST_RANGE))
        register_post_function_hook(tower, name, 0, quantizer)


def _find_unrounded(tower: nn.Module, example: Tensor) -> list[str]:
    """Return the quantized convolutions of which something other than a quantizer reads the output, except a ReLU."""
    graph = build_nncf_graph(tower, example)
    quantizers = find_quantizer_nodes(graph)
    found = []
    for node in graph.get_all_nodes():
        if node.node_type != "conv2d" or not any(n.node_name in quantizers for n in graph.get_previous_nodes(node)):
            continue
        readers = _list_readers(graph, node)
        if len(readers) == 1 and readers[0].node_type in _MERGED:
            readers = _list_readers(graph, readers[0])
        if any(reader.node_name not in quantizers for reader in readers):
            found.append(node.node_name)
    return found


def _list_readers(graph: Any, node: Any) -> list[Any]:
    """Return the nodes that read a node's output; an exported model has no dropout between them."""
    return [
        reader
        for following in graph.get_next_nodes(node)
        for reader in (_list_readers(graph, following) if following.node_type == "dropout" else [following])
    ]


class _Peak(nn.Module):
    """Records the largest magnitude of what passes."""

    def __init__(self) -> None:
        super().__init__()
        self.value = torch.zeros(())

    def forward(self, x: Tensor) -> Tensor:
        self.value = torch.maximum(self.value.to(x.device), x.detach().abs().amax())
        return x
