"""Find the layers that lose most in int8, and switch them back to float until an accuracy budget holds.

A layer is an operator with a quantized weight (a convolution, linear layer or embedding), together with the quantizers
of its inputs.  A quantizer whose output no such operator reads, such as one on a residual branch before an addition,
belongs to the layers that produce its input.  A quantizer is off when all layers it belongs to are in float.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from toolchain.errors import ClipkdError, GateError
from toolchain.evaluation.eval_set import EvalSet
from toolchain.evaluation.zero_shot import BLANK, image_ranks
from toolchain.models.clip_model import ClipModel
from toolchain.models.finite import describe_non_finite
from toolchain.models.towers import without_attention_fast_path
from toolchain.progress import Progress, no_progress
from toolchain.quantization.nncf_backend import find_quantizer_nodes, list_quantizers

EXACT_DB = 150.0
"""SQNR reported if nothing differs: float32 resolves 24 bits, which is 144 dB."""

MAX_EFFECT_IMAGES = 512
"""Maximum number of images, evenly spread, on which each layer's own effect is measured."""

MAX_BUDGET_IMAGES = 4096
"""Maximum number of images for the budget check: their pixels are held in memory, 2.5 GB at 224 x 224."""

_CHUNK = 256  # inputs per forward pass

Quantizers = Mapping[str, tuple[Any, ...]]
"""The quantizers of each layer, weight first."""


@dataclass(frozen=True)
class Criterion:
    """Inputs, and a score of the features that two towers compute from them."""

    what: str
    """Name of the score in the manifest, such as "top-1 on stix"."""

    pixel_values_BCHW: Tensor
    input_ids_CT: Tensor
    score: Callable[[Tensor, Tensor], float]
    """Takes image features [B, D] and text features [C, D], returns a fraction."""

    subset: "Criterion | None" = None
    """The same criterion on fewer images, for the effect of each layer; None: use all."""

    @property
    def inputs(self) -> dict[str, Tensor]:
        """The inputs of each tower."""
        return {"image": self.pixel_values_BCHW, "text": self.input_ids_CT}


def headline_criterion(model: ClipModel, data: EvalSet) -> Criterion:
    """Return top-1 on at most `MAX_BUDGET_IMAGES` images of an evaluation set, scored as in zero_shot.py."""
    return replace(
        _criterion_on_set(model, data, MAX_BUDGET_IMAGES), subset=_criterion_on_set(model, data, MAX_EFFECT_IMAGES)
    )


def _criterion_on_set(model: ClipModel, data: EvalSet, max_images: int) -> Criterion:
    """Return top-1 on evenly spread images; if each class has one image, only their classes are candidates."""
    kept = np.linspace(0, len(data) - 1, min(max_images, len(data))).round().astype(np.int64)
    images = data.images[kept] if isinstance(data.images, np.ndarray) else [data.images[i] for i in kept]
    shown = replace(data, images=images, image_group_N=data.image_group_N[kept])
    if data.one_image_per_class:
        shown = replace(shown, texts=[data.texts[i] for i in kept], text_group_K=data.text_group_K[kept])
    images = [shown.image(index) for index in range(len(shown))]
    unreadable_N = np.array([image is None for image in images])
    templates = shown.templates if shown.has_classes else shown.templates[:1]

    def score(image_features_ND: Tensor, text_features_CD: Tensor) -> float:
        text_PKD = text_features_CD.view(len(templates), len(shown.texts), -1)
        text_KD = F.normalize(text_PKD.double().mean(0), dim=-1).float()
        return float((image_ranks(shown, image_features_ND.numpy(), text_KD.numpy(), unreadable_N) < 1).mean())

    return Criterion(
        f"top-1 on {data.name}" + (f", {len(shown)} images" if len(shown) < len(data) else ""),
        torch.stack([model.preprocess(image or BLANK) for image in images]),
        torch.cat([model.tokenize([template.format(text) for text in shown.texts]) for template in templates]),
        score,
    )


def agreement_criterion(whose: str, pixel_values_BCHW: Tensor, input_ids_CT: Tensor, choice_B: Tensor) -> Criterion:
    """Return the share of images for which the towers choose the text that `whose` model chose."""

    def score(image_features_BD: Tensor, text_features_CD: Tensor) -> float:
        cosine_BC = image_features_BD @ text_features_CD.T
        agrees_B = cosine_BC.argmax(-1).eq(choice_B) & cosine_BC.isfinite().all(-1)  # argmax would choose NaN
        return agrees_B.double().mean().item()

    return Criterion(f"agreement with {whose}", pixel_values_BCHW, input_ids_CT, score)


def list_layers(tower: nn.Module, example: Tensor) -> Quantizers:
    """Return the layers of a quantized tower in the order in which they run; empty for a float one."""
    from nncf.torch.function_hook.nncf_graph.nncf_graph_builder import build_nncf_graph

    quantizers = dict(list_quantizers(tower, every_place=True))  # the graph may use any name of a shared quantizer
    if not quantizers:
        return {}
    with without_attention_fast_path():
        graph = build_nncf_graph(tower, example)
    hook_of = {node: name for node, name in find_quantizer_nodes(graph).items() if name in quantizers}
    assert {quantizers[name] for name in hook_of.values()} == {*quantizers.values()}, "every quantizer is in the graph"

    def nearest(node: Any, step: Callable[[Any], list[Any]], *, through_quantizers: bool) -> list[str]:
        """Return the layers reachable from a node without passing through another layer."""
        found, seen, waiting = [], set(), step(node)
        while waiting:
            reached = waiting.pop()
            if reached.node_name in seen or (reached.node_name in hook_of and not through_quantizers):
                continue
            seen.add(reached.node_name)
            if reached.node_name in layers:
                found.append(reached.node_name)
            else:
                waiting += step(reached)
        return found

    layers: dict[str, list[Any]] = {}
    activations = []
    for node in graph.get_all_nodes():
        if node.node_name not in hook_of:
            continue
        read = [p for p in graph.get_previous_nodes(node) if not p.node_name.startswith("__nncf_hooks.")]
        if all(p.node_type == "nncf_model_const" for p in read):
            (operator,) = graph.get_next_nodes(node)
            layers.setdefault(operator.node_name, []).append(quantizers[hook_of[node.node_name]])
        else:
            activations.append(node)
    for node in activations:
        readers = nearest(node, graph.get_next_nodes, through_quantizers=False)
        makers = nearest(node, graph.get_previous_nodes, through_quantizers=True)
        owners = readers or makers or [node.node_name]
        for owner in owners:
            layers.setdefault(owner, []).append(quantizers[hook_of[node.node_name]])
    return {name: tuple(dict.fromkeys(found)) for name, found in layers.items()}


def revert_worst(
    towers: Mapping[str, nn.Module],
    calibration: Mapping[str, Tensor],
    criterion: Criterion,
    float_score: float,
    max_drop: float,
    progress: Progress = no_progress,
) -> dict[str, Any]:
    """Switch the worst layers of fake-quantized "image" and "text" towers to float until `criterion` scores at least
    `float_score - max_drop`; return the measurements and the reverted layers for the manifest.

    The worst layer has the lowest SQNR of the tower's features on `calibration` with this layer alone in int8.  The
    signal is the tower in float:   SQNR = 10 log10( sum |f|^2 / sum |f - q|^2 )  dB.  Ties are ordered by name.

    Raises:
        GateError: even the fine-tuned towers with every layer in float miss the budget.
    """
    layers = {
        f"{tower}/{name}": (tower, quantizers)
        for tower, net in towers.items()
        for name, quantizers in list_layers(net, calibration[tower][:2]).items()
    }
    rows = _measure_layers(towers, calibration, criterion, layers, progress)
    on = list(layers)
    features = _features(towers, criterion, layers, on)
    drop = float_score - criterion.score(features["image"], features["text"])
    first_drop, reverted = drop, []
    for row in rows:
        if drop <= max_drop:
            break
        layer = str(row["layer"])
        tower = layers[layer][0]
        on.remove(layer)
        features[tower] = _compute_features(towers[tower], criterion.inputs[tower], layers, on)
        before, drop = drop, float_score - criterion.score(features["image"], features["text"])
        reverted.append(row | {"drop_before": round(before, 5), "drop_after": round(drop, 5)})
    if not drop <= max_drop:  # not `>`: NaN must fail
        raise GateError(
            f"quantize.max_drop: {criterion.what} is {drop:.4f} below the float student's {float_score:.4f} even with "
            f"every layer in float; allowed: {max_drop:g}. Fine-tuning itself costs that much. "
            "Lower quantize.lr, or calibrate only: --set quantize.method=ptq"
        )
    _switch(layers, on)
    return {
        "measure": criterion.what,
        "max_drop": max_drop,
        "float": round(float_score, 5),
        "drop_before": round(first_drop, 5),
        "drop": round(drop, 5),
        "reverted": reverted,
        "layers": rows,
    }


def _measure_layers(
    towers: Mapping[str, nn.Module],
    calibration: Mapping[str, Tensor],
    criterion: Criterion,
    layers: "_Layers",
    progress: Progress,
) -> list[dict[str, Any]]:
    """Return each layer's SQNR and score drop with this layer alone in int8, worst first."""
    few = criterion.subset or criterion
    in_float = _features(towers, few, layers, ())
    score_in_float = few.score(in_float["image"], in_float["text"])
    signal = {name: _compute_features(net, calibration[name], layers, ()) for name, net in towers.items()}
    rows = []
    for done, (layer, (tower, _)) in enumerate(layers.items()):
        progress("layers", done, len(layers))
        sqnr_db = _sqnr_db(signal[tower], _compute_features(towers[tower], calibration[tower], layers, [layer]))
        alone = in_float | {tower: _compute_features(towers[tower], few.inputs[tower], layers, [layer])}
        effect = score_in_float - few.score(alone["image"], alone["text"])
        rows.append({"layer": layer, "sqnr_db": round(sqnr_db, 1), "drop": round(effect, 5)})
    return sorted(rows, key=lambda row: (row["sqnr_db"], row["layer"]))


def score_towers(towers: Mapping[str, nn.Module], criterion: Criterion) -> float:
    """Return the score of two towers in their current state.

    Raises:
        ClipkdError: their features are NaN or infinite, so that no budget could be compared with the score.
    """
    features = _features(towers, criterion, {}, ())
    if wrong := describe_non_finite(features):
        raise ClipkdError(
            f"{criterion.what}: the features of the model to quantize have {wrong}. It cannot be quantized; train it "
            "again, or use other weights"
        )
    return criterion.score(features["image"], features["text"])


_Layers = Mapping[str, tuple[str, tuple[Any, ...]]]


def _switch(layers: _Layers, on: Sequence[str]) -> None:
    """Enable the quantizers of the layers in `on` and disable all others."""
    for _, quantizers in layers.values():
        for quantizer in quantizers:
            quantizer.enabled.fill_(0)
    for layer in on:
        for quantizer in layers[layer][1]:
            quantizer.enabled.fill_(1)


def _features(
    towers: Mapping[str, nn.Module], criterion: Criterion, layers: _Layers, on: Sequence[str]
) -> dict[str, Tensor]:
    return {name: _compute_features(tower, criterion.inputs[name], layers, on) for name, tower in towers.items()}


@torch.no_grad()
def _compute_features(tower: nn.Module, inputs: Tensor, layers: _Layers, on: Sequence[str]) -> Tensor:
    _switch(layers, on)
    device = next(tower.parameters()).device
    with without_attention_fast_path():
        return torch.cat([tower(chunk.to(device)).cpu() for chunk in torch.split(inputs, _CHUNK)])


def _sqnr_db(signal_BD: Tensor, actual_BD: Tensor) -> float:
    """Return the SQNR within +-EXACT_DB; features that are NaN or infinite have the lowest."""
    noise = (signal_BD.double() - actual_BD.double()).square().sum().item()
    signal = signal_BD.double().square().sum().item()
    if noise == 0:
        return EXACT_DB
    if not math.isfinite(noise) or signal == 0:
        return -EXACT_DB
    return max(-EXACT_DB, min(EXACT_DB, 10 * math.log10(signal / noise)))
