"""Export a checkpoint as two ONNX graphs, image and text, with all files that a device without torch needs.

Precision is a property of the exported graph and is decided here. fp16 and bf16 store half-precision weights and
compute in them; inputs, outputs and the final normalization stay fp32, and LayerNormalization sums in fp32. int8 stores
the values that freeze.py rounded. int8-fp16 stores the same integers with everything else as in fp16. int8-bf16 is the
graph of int8; OpenVINO computes its float parts in bfloat16.
"""

import json
import shutil
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
import torch.nn.functional as F
from open_clip.transform import PreprocessCfg
from torch import Tensor, nn

from export.documents import GraphSummary, PlannedExport
from export.graphs.onnx_graph import adapt_graph, write_graph, write_uint8_graph
from export.graphs.parity_samples import Prompts, embed_prompts, write_parity_samples
from export.graphs.precision import convert_frozen_tower, is_half, prepare_tower, require_half_range
from export.graphs.tokenizer_json import write_tokenizer
from export.model_folder import IMAGE_GRAPH, IMAGE_INPUT, TEXT_GRAPH, TEXT_INPUT, UINT8_GRAPH
from toolchain.evaluation.eval_set import EvalSet
from toolchain.filesystem import write_json
from toolchain.models.clip_model import ClipModel
from toolchain.models.towers import ImageTower, TextTower, example_pixels, num_parameters, without_attention_fast_path

_SHARED_FILES = ("preprocess.json", "tokenizer.json", "classes.npz", "parity.npz")


class FrozenTowers(NamedTuple):
    """The towers of an int8 student that `quantization/freeze.py` returns, in float32."""

    image: nn.Module
    text: nn.Module


def export_onnx(
    model: ClipModel, folder: Path, planned: PlannedExport, headline: EvalSet, frozen: FrozenTowers | None = None
) -> GraphSummary:
    """Write image.onnx, text.onnx, tokenizer.json, preprocess.json, classes.npz and parity.npz into `folder`.

    The classes and the parity samples are those of `headline`. A set of captions has no classes, and classes.npz
    then holds none. An int8 precision is exported from the `frozen` towers, every other one from the towers of `model`;
    the parity check compares the graphs with the same towers. Returns the part of the summary that is known here.

    Raises:
        ClipkdError: torch cannot export a tower, or exports a graph that breaks the contract.
        GateError: a weight, or the output of a layer on the samples, exceeds the range of fp16.
    """
    if planned.in_precision.is_quantized != (frozen is not None):
        raise ValueError("int8 is exported from frozen towers, the others from the model's own")
    image, text = frozen or FrozenTowers(ImageTower(model.net), TextTower(model.net))
    image.eval()
    text.eval()
    preprocess = {
        "image": asdict(PreprocessCfg(**model.config["preprocess_cfg"])),
        "text": write_tokenizer(model, folder),
    }
    write_json(folder / "preprocess.json", preprocess)
    opset, metadata = max(planned.opset, planned.in_precision.min_opset), _metadata(model, planned, preprocess)
    pixels = example_pixels(model.net).float().cpu()
    ids_2T = model.tokenize([headline.texts[0], headline.texts[-1]])
    with torch.no_grad(), without_attention_fast_path():
        for tower, example, file, names_io in (
            (image, pixels, IMAGE_GRAPH, (IMAGE_INPUT, "image_features")),
            (text, ids_2T, TEXT_GRAPH, (TEXT_INPUT, "text_features")),
        ):
            if frozen is None:
                converted = prepare_tower(tower, example, planned.precision)
            else:
                converted = convert_frozen_tower(tower, planned.precision)
            write_graph(
                converted,
                example,
                folder / file,
                names_io=names_io,
                opset=opset,
                metadata=metadata,
                batch=planned.batch,
                runtime=planned.runtime,
            )
            if planned.uint8_input and file == IMAGE_GRAPH:
                write_uint8_graph(
                    converted,
                    preprocess["image"],
                    folder / UINT8_GRAPH,
                    opset=opset,
                    metadata=metadata,
                    runtime=planned.runtime,
                )
        prompts = _write_samples(folder / "parity.npz", model, (image, text), headline, planned.precision)
        _write_classes(folder / "classes.npz", model, prompts, headline)
    return _summary(model, folder, planned, opset)


def adapt_export(source: Path, summary: Mapping[str, Any], folder: Path, planned: PlannedExport) -> GraphSummary:
    """Write into `folder` the files that `export_onnx` would write, from an export for another runtime.

    `source` and its `summary` are of an export for which plan.py's `is_adaptable` is True. Tracing the towers and
    running PyTorch on the samples take most of an export's time, and their results do not depend on the runtime.
    """
    for name in _SHARED_FILES + ((UINT8_GRAPH,) if planned.uint8_input else ()):
        shutil.copyfile(source / name, folder / name)
    for name in (IMAGE_GRAPH, TEXT_GRAPH):
        adapt_graph(source / name, folder / name, planned.runtime)
    graphs = {key: summary[key] for key in GraphSummary.__annotations__ if key in summary}
    return cast(GraphSummary, graphs | {"runtime": planned.runtime} | _sizes(folder))


def _sizes(folder: Path) -> dict[str, int]:
    image, text = ((folder / file).stat().st_size for file in (IMAGE_GRAPH, TEXT_GRAPH))
    return {"size_bytes": image + text, "size_image_bytes": image, "size_text_bytes": text}


def _summary(model: ClipModel, folder: Path, planned: PlannedExport, opset: int) -> GraphSummary:
    params_image, params_text = num_parameters(model.net)
    summary = {
        "role": planned.role,
        "runtime": planned.runtime,
        "precision": planned.precision,
        "params_image": params_image,
        "params_text": params_text,
        "opset": opset,
        "batch": planned.batch,
    }
    return cast(GraphSummary, summary | _sizes(folder))


def _metadata(model: ClipModel, planned: PlannedExport, preprocess: dict[str, Any]) -> dict[str, str]:
    """Return the metadata stored in each graph."""
    return {
        "clipkd.version": _version(),
        "clipkd.tokenizer": model.name,
        "clipkd.role": planned.role,
        "clipkd.precision": planned.precision,
        "clipkd.preprocess": json.dumps(preprocess, sort_keys=True),
    }


def _version() -> str:
    try:
        return version("clipkd")
    except PackageNotFoundError:  # run from a checkout
        return "source"


def _write_classes(path: Path, model: ClipModel, prompts: Prompts, headline: EvalSet) -> None:
    names = headline.texts if headline.has_classes else []
    features_KD = np.empty((0, model.embed_dim), np.float32)
    if names:
        features_KD = class_embeddings(prompts.features_BD, len(headline.templates)).numpy()
    arrays: dict[str, Any] = {
        "names": np.array(names, np.str_),
        "templates": np.array(headline.templates),
        "features_KD": features_KD,
        "logit_scale": model.logit_scale.detach().cpu().numpy(),
    }
    if model.logit_bias is not None:
        arrays["logit_bias"] = model.logit_bias.detach().cpu().numpy()
    np.savez(path, **arrays)


def class_embeddings(prompt_features_BD: Tensor, num_templates: int) -> Tensor:
    """Return [K, D] float32: normalize(mean over templates of the unit text feature). CLIP (arXiv:2103.00020), 3.1.4

    The prompts are those of all classes in the first template, then in the second, and so on.
    """
    features_PKD = prompt_features_BD.reshape(num_templates, -1, prompt_features_BD.shape[-1])
    return F.normalize(features_PKD.mean(0), dim=-1)


def _write_samples(
    path: Path, model: ClipModel, towers: tuple[nn.Module, nn.Module], headline: EvalSet, precision: str
) -> Prompts:
    """Write the parity samples, and check that the layers' outputs on them fit the precision; return all prompts."""
    image_tower, text_tower = towers
    with ExitStack() as watching:
        if is_half(precision):
            for name, tower in zip(("image", "text"), towers, strict=True):
                watching.enter_context(require_half_range(tower, name, precision))
        prompts = embed_prompts(text_tower, model, headline)
        write_parity_samples(path, model, image_tower, prompts, headline)
    return prompts
