"""Rewrite exported graphs into equivalent forms that runtimes execute faster."""

from collections import Counter

import numpy as np
from onnx import GraphProto, NodeProto, TensorProto, helper, numpy_helper


def separate_gemm_biases(graph: GraphProto) -> None:
    """Replace Gemm(x, int8 weight, b) by Gemm(x, int8 weight) + b: ONNX Runtime fuses no float bias into QGemm."""
    dequantized = {node.output[0] for node in graph.node if node.op_type == "DequantizeLinear"}
    nodes = []
    for node in graph.node:
        nodes.append(node)
        if node.op_type == "Gemm" and len(node.input) == 3 and node.input[1] in dequantized:
            product, output = f"{node.output[0]}_without_bias", node.output[0]
            nodes.append(helper.make_node("Add", [product, node.input[2]], [output], f"{node.name}_bias"))
            del node.input[2]
            node.output[0] = product
    del graph.node[:]
    graph.node.extend(nodes)


def unsign_shared_activations(graph: GraphProto) -> None:
    """Round activations that several operators read to uint8 with a zero point of 128 instead of int8: the same values.

    On x86, ONNX Runtime multiplies only uint8 activations in integers.  It converts int8 ones itself if one operator
    reads them, and otherwise computes in floats and dequantizes the weights in every call.  Do not use it for TensorRT,
    which supports no zero points.
    """
    readers: dict[str, list[NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    scalars = [tensor for tensor in graph.initializer if tensor.data_type == TensorProto.INT8 and not tensor.dims]
    signed = {tensor.name for tensor in scalars if numpy_helper.to_array(tensor) == 0}
    unsigned = numpy_helper.from_array(np.array(128, np.uint8), "unsigned_zero_point")
    integers = set()
    for quantize in (node for node in graph.node if node.op_type == "QuantizeLinear" and node.input[2] in signed):
        rounded = readers.get(quantize.output[0], [])
        if any(node.op_type != "DequantizeLinear" for node in rounded):
            continue
        if sum(len(readers.get(node.output[0], [])) for node in rounded) > 1:
            integers.add(quantize.output[0])
            for node in (quantize, *rounded):
                node.input[2] = unsigned.name
    if integers:
        graph.initializer.append(unsigned)
    for value in graph.value_info:
        if value.name in integers:
            value.type.tensor_type.elem_type = TensorProto.UINT8


def separate_products(graph: GraphProto) -> None:
    """Replace Split(x W + b) by one product per part, so that OpenVINO does not copy queries, keys and values.

    ONNX Runtime is as fast with one product.
    """
    maker = {output: node for node in graph.node for output in node.output}
    stored = {tensor.name: tensor for tensor in graph.initializer}
    replaced: dict[str, list[NodeProto]] = {}
    for split in (node for node in graph.node if node.op_type == "Split"):
        total = maker.get(split.input[0])
        if total is None or total.op_type != "Add":
            continue
        product, bias = sorted(total.input, key=lambda name: name in stored)
        matmul = maker.get(product)
        if matmul is None or matmul.op_type != "MatMul" or bias not in stored:
            continue
        weights = _weight_parts(matmul.input[1], len(split.output), maker, stored, graph)
        biases = _parts(stored[bias], len(split.output), 0, graph)
        if weights is None or biases is None:
            continue
        replaced[split.name] = [
            node
            for (made, weight), part, output in zip(weights, biases, split.output, strict=True)
            for node in (
                *made,
                helper.make_node("MatMul", [matmul.input[0], weight], [f"{output}_product"], f"{output}_product"),
                helper.make_node("Add", [f"{output}_product", part], [output], f"{output}_sum"),
            )
        ]
    nodes = [new for node in graph.node for new in replaced.get(node.name, [node])]
    del graph.node[:]
    graph.node.extend(_read(nodes, graph))
    used = {name for node in graph.node for name in node.input}
    kept = [tensor for tensor in graph.initializer if tensor.name in used]
    del graph.initializer[:]
    graph.initializer.extend(kept)


def _weight_parts(
    name: str, count: int, maker: dict[str, NodeProto], stored: dict[str, TensorProto], graph: GraphProto
) -> list[tuple[list[NodeProto], str]] | None:
    """Return nodes and name of each part of a weight [E, count * F], stored in this form or as int8 [count * F, E]."""
    if name in stored:
        parts = _parts(stored[name], count, 1, graph)
        return None if parts is None else [([], part) for part in parts]
    transpose = maker.get(name)
    if transpose is None or transpose.op_type != "Transpose":
        return None
    dequantize = maker.get(transpose.input[0])
    if dequantize is None or dequantize.op_type != "DequantizeLinear" or any(n not in stored for n in dequantize.input):
        return None
    sliced = [_parts(stored[n], count, 0, graph) for n in dequantize.input]
    made = []
    for place in range(count):
        inputs = [parts[place] for parts in sliced if parts is not None]
        if len(inputs) < len(sliced):
            return None
        part = _copy_node(dequantize, place, inputs)
        turned = _copy_node(transpose, place, list(part.output))
        made.append(([part, turned], turned.output[0]))
    return made


def _copy_node(node: NodeProto, place: int, inputs: list[str]) -> NodeProto:
    """Return a copy of an operator with the same attributes and other inputs."""
    copied = NodeProto()
    copied.CopyFrom(node)
    copied.name, copied.output[0] = f"{node.name}.{place}", f"{node.output[0]}.{place}"
    del copied.input[:]
    copied.input.extend(inputs)
    return copied


def _parts(tensor: TensorProto, count: int, axis: int, graph: GraphProto) -> list[str] | None:
    """Store the equal parts of a stored tensor and return their names; None if it cannot be split."""
    values = numpy_helper.to_array(tensor)
    if values.ndim <= axis or values.shape[axis] % count:
        return None
    names = [f"{tensor.name}.{place}" for place in range(count)]
    known = {other.name for other in graph.initializer}
    for part_name, part in zip(names, np.split(values, count, axis), strict=True):
        if part_name not in known:  # zero points are shared
            graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(part), part_name))
    return names


def _read(nodes: list[NodeProto], graph: GraphProto) -> list[NodeProto]:
    """Return the nodes without those whose outputs nothing reads."""
    wanted = {value.name for value in graph.output}
    while True:
        readers = Counter(name for node in nodes for name in node.input)
        left = [node for node in nodes if any(readers[name] or name in wanted for name in node.output)]
        if len(left) == len(nodes):
            return left
        nodes = left
