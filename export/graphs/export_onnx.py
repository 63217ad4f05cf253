"""A checkpoint becomes two ONNX graphs, image and text, and everything a device without torch needs beside them.

Precision is a property of the exported graph, decided here: fp16 and bf16 store half-precision weights and compute in
them (inputs, outputs and the final normalisation stay fp32, LayerNormalization sums in fp32), int8 stores what
quantize.freeze rounded, int8-fp16 that with everything else as in fp16, and int8-bf16 the graph of int8, of which
OpenVINO computes everything else in bfloat16.

    B batch   D embedding width   K classes   P templates   T tokens   CHW, HWC image
"""

import json
from contextlib import nullcontext
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from open_clip.transform import PreprocessCfg
from torch import Tensor, nn

from export.graphs.onnx_graph import BF16_OPSET, write_graph, write_uint8_graph
from export.graphs.parity_samples import in_chunks, write_parity_samples
from export.graphs.precision import FROZEN, HALF, HALF_SCALES_OPSET, PRECISIONS, frozen_in, prepared, within_half_range
from export.graphs.tokenizer_json import write_tokenizer
from export.model_folder import IMAGE_GRAPH, UINT8_GRAPH
from toolchain.evaluation.eval_set import EvalSet
from toolchain.filesystem import write_json
from toolchain.models.clip_model import ClipModel
from toolchain.models.towers import ImageTower, TextTower, example_pixels, num_parameters, without_attention_fast_path


def export_onnx(
    model: ClipModel,
    folder: Path,
    *,
    role: str,
    precision: str,
    headline: EvalSet,
    runtime: str = "onnxruntime",
    opset: int = 20,
    batch: int | None = None,
    uint8_input: bool = False,
    image_tower: nn.Module | None = None,
    text_tower: nn.Module | None = None,
) -> dict[str, Any]:
    """Write image.onnx, text.onnx, tokenizer.json, preprocess.json, classes.npz and parity.npz into `folder`.

    The classes, and the samples of parity, are those of `headline`; of a set of captions, which has no classes,
    classes.npz holds none.
    Returns the manifest's summary.  `image_tower` and `text_tower` are the frozen ones of an int8 student, in float32,
    and are then also what the exported graphs will be compared with; all others are compared with the float model.
    `batch` 1 fixes the first dimension of every graph; None leaves it free.  `uint8_input` adds image_uint8.onnx.
    Opset 20 is the last whose QuantizeLinear ONNX Runtime optimises correctly (onnxruntime#25526).

    Raises:
        ClipkdError: torch cannot export a tower, or exports a graph that breaks the contract.
        GateError: fp16 cannot hold a weight, or what a layer makes of the samples.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision {precision!r} is none of {PRECISIONS}")
    if (precision in FROZEN) != (image_tower is not None and text_tower is not None):
        raise ValueError("int8 is exported from frozen towers, the others from the model's own")
    opset = max(opset, {"bf16": BF16_OPSET, "int8-fp16": HALF_SCALES_OPSET}.get(precision, opset))
    reference_image = (image_tower or ImageTower(model.net)).eval()
    reference_text = (text_tower or TextTower(model.net)).eval()
    text_spec = write_tokenizer(model, folder)
    preprocess = {"image": asdict(PreprocessCfg(**model.config["preprocess_cfg"])), "text": text_spec}
    write_json(folder / "preprocess.json", preprocess)
    metadata = {
        "clipkd.version": _version(),
        "clipkd.tokenizer": model.name,
        "clipkd.role": role,
        "clipkd.precision": precision,
        "clipkd.preprocess": json.dumps(preprocess, sort_keys=True),
    }
    pixels = example_pixels(model.net).float().cpu()
    ids_2T = model.tokenize([headline.texts[0], headline.texts[-1]])
    with torch.no_grad(), without_attention_fast_path():
        for file, tower, reference, example, names_io in (
            ("image.onnx", image_tower, reference_image, pixels, ("pixel_values", "image_features")),
            ("text.onnx", text_tower, reference_text, ids_2T, ("input_ids", "text_features")),
        ):
            exported = prepared(reference, example, precision) if tower is None else frozen_in(tower, precision)
            write_graph(
                exported,
                example,
                folder / file,
                names_io=names_io,
                opset=opset,
                metadata=metadata,
                batch=batch,
                runtime=runtime,
            )
            if uint8_input and file == IMAGE_GRAPH:
                write_uint8_graph(exported, preprocess["image"], folder / UINT8_GRAPH, opset=opset, metadata=metadata)
        names = headline.texts if headline.has_classes else []
        features_KD = np.empty((0, model.embed_dim), np.float32)
        if names:
            features_KD = class_embeddings(reference_text, model, names, headline.templates).numpy()
        np.savez(
            folder / "classes.npz",
            names=np.array(names, np.str_),
            templates=np.array(headline.templates),
            features_KD=features_KD,
            logit_scale=model.logit_scale.detach().cpu().numpy(),
        )
        towers = reference_image, reference_text
        with (
            within_half_range(reference_image, "image", precision) if precision in HALF else nullcontext(),
            within_half_range(reference_text, "text", precision) if precision in HALF else nullcontext(),
        ):
            write_parity_samples(folder / "parity.npz", model, towers, headline)
    params_image, params_text = num_parameters(model.net)
    return {
        "role": role,
        "runtime": runtime,
        "precision": precision,
        "params_image": params_image,
        "params_text": params_text,
        "opset": opset,
        "batch": batch,
        "size_bytes": sum((folder / file).stat().st_size for file in ("image.onnx", "text.onnx")),
    }


def _version() -> str:
    try:
        return version("clipkd")
    except PackageNotFoundError:  # run from a checkout
        return "source"


@torch.no_grad()
def class_embeddings(text_tower: nn.Module, model: ClipModel, names: list[str], templates: tuple[str, ...]) -> Tensor:
    """[K, D] float32: normalise( mean over templates of the unit text feature ).  CLIP (arXiv:2103.00020), 3.1.4."""
    ids_PKT = [model.tokenize([template.format(name) for name in names]) for template in templates]
    return F.normalize(torch.stack([in_chunks(text_tower, ids_KT) for ids_KT in ids_PKT]).mean(0), dim=-1)
