"""Bake a set of labels into an exported model: replace the text tower by a class matrix; needs no torch."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from export.graphs.model_card import CARD
from export.model_folder import IMAGE_GRAPH
from export.runtime.exported_model import ExportedEncoders, open_exported
from toolchain.data.class_folders import read_class_name
from toolchain.errors import ArtifactError, UsageError
from toolchain.stage import MANIFEST, Stage, StageSpec, open_stage, run_stage

CLASSIFIER = "classifier.onnx"
_NAMED = 5  # repeated lines that a message names


def bake(model: Path, labels_file: Path, templates_file: Path | None, out: Path) -> Stage:
    """Write `out`: the image tower, classes.npz of the labels and, if the onnx package is installed, classifier.onnx.

    Raises:
        UsageError: a file is missing, empty, not UTF-8, or has repeated lines; or `out` exists and was not
            made by `clipkd classes`.
        ArtifactError: `model` is not an exported model, or is corrupt, or already has baked-in labels.
    """
    names = [read_class_name(label) for label in read_lines(labels_file, "labels")]
    twice, count = Counter(names).most_common(1)[0]
    if count > 1:
        raise UsageError(f"{labels_file}: {count} labels are {twice!r}, with underscores read as spaces; list it once")
    source = open_stage(model)
    if not (model / IMAGE_GRAPH).is_file():
        raise ArtifactError(f"{model}: no {IMAGE_GRAPH}; not an exported model. Make one with: clipkd export RUN")
    templates = read_templates(templates_file) if templates_file else _own_templates(model)
    if out.resolve() == model.resolve():
        raise UsageError(f"--out {out}: this is the model directory itself; choose another directory")
    if out.exists() and (
        not out.is_dir() or not (out / MANIFEST).is_file() or open_stage(out).manifest["kind"] != "classes"
    ):
        raise UsageError(f"--out {out}: exists and was not made by clipkd classes; choose another directory")
    with_graph = importlib.util.find_spec("onnx") is not None

    def work(folder: Path) -> dict[str, Any]:
        encoders = open_exported(model)
        features_KD, (logit_scale, logit_bias) = class_matrix(encoders, names, templates), encoders.logit_parameters
        shutil.copyfile(model / IMAGE_GRAPH, folder / IMAGE_GRAPH)
        image_spec = json.dumps({"image": encoders.image_spec}, indent=1) + "\n"
        (folder / "preprocess.json").write_text(image_spec, encoding="utf-8")
        arrays: dict[str, Any] = {
            "names": np.array(names),
            "templates": np.array(templates),
            "features_KD": features_KD,
            "logit_scale": logit_scale,
        }
        if logit_bias is not None:
            arrays["logit_bias"] = logit_bias
        np.savez(folder / "classes.npz", **arrays)
        if with_graph:
            _write_classifier(model / IMAGE_GRAPH, folder / CLASSIFIER, encoders, features_KD, names)
        _write_card(folder, source, len(names), templates)
        size_bytes = (folder / IMAGE_GRAPH).stat().st_size
        kept = {name: value for name, value in source.manifest["summary"].items() if name != "uint8_input"}
        sizes = {"size_bytes": size_bytes, "size_image_bytes": size_bytes, "size_text_bytes": 0}
        return kept | {"num_labels": len(names), "params_text": 0} | sizes

    return run_stage(
        StageSpec(
            out,
            kind="classes",
            version=1,
            fields={"labels": names, "templates": templates, "classifier": with_graph},
            inputs={"model": source},
        ),
        work,
    )


def class_matrix(encoders: ExportedEncoders, names: list[str], templates: list[str]) -> NDArray[np.float32]:
    """Return [K, D]: normalize( mean over templates of the unit text feature ).  CLIP (arXiv:2103.00020), 3.1.4.

    Raises:
        ArtifactError: the text tower's feature of a label is not finite.
    """
    features_PKD = np.stack([encoders.encode_texts([t.replace("{}", name) for name in names]) for t in templates])
    mean_KD = features_PKD.mean(0)
    unit_KD: NDArray[np.float32] = (mean_KD / np.linalg.norm(mean_KD, axis=-1, keepdims=True)).astype(np.float32)
    if not np.isfinite(unit_KD).all():
        worst = names[int(np.argmin(np.isfinite(unit_KD).all(-1)))]
        raise ArtifactError(f"{encoders.folder}: the text tower returns NaN or infinity for the label {worst!r}")
    return unit_KD


def read_lines(path: Path, what: str) -> list[str]:
    """Return the lines of a text file, stripped, without blank ones; none may be repeated.

    Raises:
        UsageError: the file is missing, not UTF-8 or empty, or lines are repeated.
    """
    return list(_number_lines(path, what))


def _number_lines(path: Path, what: str) -> dict[str, int]:
    """Return the number of each line of a text file; a BOM, any line ending and blank lines are accepted."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UsageError(f"{path}: cannot read {what}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: not UTF-8 at byte {error.start}; save it as UTF-8") from None
    first: dict[str, int] = {}
    repeated: list[str] = []
    for number, line in enumerate(map(str.strip, text.split("\n")), 1):
        if "\0" in line:
            raise UsageError(f"{path}: line {number} contains a NUL character; not a text file")
        if line in first:
            repeated.append(f"line {number} repeats line {first[line]}: {line!r}")
        elif line:
            first[line] = number
    if repeated:
        more = f"; and {len(repeated) - _NAMED:,} more" if len(repeated) > _NAMED else ""
        raise UsageError(f"{path}: {'; '.join(repeated[:_NAMED])}{more}. Keep one of each")
    if not first:
        raise UsageError(f"{path}: empty; expected {what}, one per line")
    return first


def read_templates(path: Path) -> list[str]:
    """Return the captions in a file of templates, each with one {} in place of the label.

    Raises:
        UsageError: as `read_lines`, or a line does not contain {} exactly once.
    """
    templates = _number_lines(path, "templates")
    for template, number in templates.items():
        if template.count("{}") != 1:
            raise UsageError(f"{path}: line {number}: expected one {{}} where the label goes, got {template!r}")
    return list(templates)


def _own_templates(model: Path) -> list[str]:
    with np.load(model / "classes.npz", allow_pickle=False) as classes:
        return [str(template) for template in classes["templates"]]


def _write_classifier(
    graph: Path, path: Path, encoders: ExportedEncoders, features_KD: NDArray[np.float32], names: list[str]
) -> None:
    """Write image.onnx with one more matrix product: `logits` [batch, K] = scale * features @ classes.

    A sigmoid model's logits also have its bias, so that their sigmoid is the probability of each label.
    """
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    logit_scale, logit_bias = encoders.logit_parameters
    model = onnx.load(graph)
    (features,) = model.graph.output
    matrix_DK = np.ascontiguousarray((logit_scale * features_KD).T.astype(np.float32))
    model.graph.initializer.append(numpy_helper.from_array(matrix_DK, "clipkd_classes_DK"))
    product = "logits" if logit_bias is None else "clipkd_scaled_cosines"
    model.graph.node.append(helper.make_node("MatMul", [features.name, "clipkd_classes_DK"], [product], "classify"))
    if logit_bias is not None:
        model.graph.initializer.append(numpy_helper.from_array(np.array(logit_bias, np.float32), "clipkd_logit_bias"))
        model.graph.node.append(helper.make_node("Add", [product, "clipkd_logit_bias"], ["logits"], "add_logit_bias"))
    first = features.type.tensor_type.shape.dim[0]
    del model.graph.output[:]
    model.graph.output.append(
        helper.make_tensor_value_info("logits", TensorProto.FLOAT, [first.dim_value or "batch", len(names)])
    )
    kept = {entry.key: entry.value for entry in model.metadata_props}
    helper.set_model_props(model, kept | {"clipkd.labels": json.dumps(names)})
    onnx.checker.check_model(model)
    onnx.save(model, path)


def _write_card(folder: Path, source: Stage, num_labels: int, templates: list[str]) -> None:
    """Write the source model's card under a note about the labels and the missing text tower."""
    own = source.path / CARD
    own_text = own.read_text(encoding="utf-8") if own.is_file() else ""
    note = f"""\
# Labels baked in

This copy of the model below classifies images into a fixed set of labels: classes.npz holds {num_labels} labels, made
with {len(templates)} caption templates. It has no text tower. `clipkd classes` made it from the exported model with
sha256 {source.digest}; manifest.json lists the hashes of the files here. Use it with
`clipkd predict {{directory}} IMAGE`. The card of the original model follows.

"""
    (folder / CARD).write_text(note + own_text, encoding="utf-8")
