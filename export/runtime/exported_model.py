"""Open an exported model and encode with it: numpy, Pillow, tokenizers, ftfy and its own runtime, no torch.

The graph inputs of images and captions equal those of open_clip's own evaluation transform and tokenizers.
"""

from __future__ import annotations

import html
import json
import string
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import ftfy
import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tokenizers import Tokenizer

from export.device_programs.runner import (
    EngineSession,
    Graph,
    Unavailable,
    as_pair,
    encode_rows,
    open_graph,
    preprocess_image,
)
from export.model_folder import IMAGE_GRAPH, IMAGE_INPUT, TEXT_GRAPH, TEXT_INPUT
from toolchain.errors import ArtifactError, MissingDependency, UnavailableBackend
from toolchain.runtimes import RUNTIMES, runtime_title
from toolchain.stage import MANIFEST, open_stage

_CHUNK = 256  # rows per run: bounds memory; larger batches are no faster on a CPU
_EXPORT_AGAIN = "Export it again: clipkd export RUN --onnx"
_BAKED = "its labels are baked in and it has no text tower; bake in others with: clipkd classes MODEL --labels FILE"


@dataclass(frozen=True)
class ExportedEncoders:
    """Both towers of an exported model; features are [B, D], float32, of unit norm."""

    folder: Path
    image_size: int
    """Height of `pixel_values`."""

    context_length: int
    precision: str | None
    """`fp32`, `fp16`, `int8` … from the manifest; None if there is no manifest."""

    image_spec: dict[str, Any]
    """An open_clip preprocess_cfg."""

    text_spec: dict[str, Any]
    """The section that `export.graphs.tokenizer_json.text_spec` documents."""

    _tokenizer: Tokenizer | None
    _image: Graph | EngineSession
    _text: Graph | EngineSession | None
    """None if labels were baked in and the text tower left out."""

    def preprocess(self, image: Image.Image) -> NDArray[np.float32]:
        """Return pixel_values [3, H, W], equal to open_clip's evaluation transform."""
        return preprocess_image(image, self.image_spec)

    def tokenize(self, texts: Sequence[str]) -> NDArray[np.int64]:
        """Return input_ids [B, T], equal to open_clip's tokenizer of this model.

        Raises:
            ArtifactError: the model's labels are baked in.
        """
        if self._tokenizer is None:
            raise ArtifactError(f"{self.folder}: {_BAKED}")
        cleaned = [_clean(text, self.text_spec["clean"]) for text in texts]
        rows = [encoding.ids for encoding in self._tokenizer.encode_batch(cleaned)]
        appended_id, zeroed_id = self.text_spec.get("appended_id"), self.text_spec.get("zeroed_id")
        if appended_id is not None:
            rows = [[*row, appended_id] for row in rows]
        input_ids_BT = np.array(rows, np.int64).reshape(len(rows), self.context_length)
        if zeroed_id is not None:
            input_ids_BT[input_ids_BT == zeroed_id] = 0
        return input_ids_BT

    def encode_pixels(self, pixel_values_BCHW: NDArray[np.float32]) -> NDArray[np.float32]:
        return _run(self._image, pixel_values_BCHW)

    def encode_ids(self, input_ids_BT: NDArray[np.int64]) -> NDArray[np.float32]:
        if self._text is None:
            raise ArtifactError(f"{self.folder}: {_BAKED}")
        return _run(self._text, input_ids_BT)

    def encode_images(self, images: Sequence[Image.Image] | NDArray[np.uint8]) -> NDArray[np.float32]:
        """Return features of images, or of uint8 pixels [B, H, W, 3]."""
        chunks = (images[start : start + _CHUNK] for start in range(0, max(len(images), 1), _CHUNK))
        return np.concatenate([self.encode_pixels(self._pixel_values(chunk)) for chunk in chunks])

    def encode_texts(self, texts: Sequence[str]) -> NDArray[np.float32]:
        return self.encode_ids(self.tokenize(texts))

    def compute_probabilities(
        self, image_features_BD: NDArray[np.float32], text_features_KD: NDArray[np.float32]
    ) -> NDArray[np.float32]:
        """Return the probability of each text for each image [B, K], as open_clip defines it for this model.

        With s = logit scale, b = logit bias and z = s cos(image, text) + b, they are the softmax of z over the texts.
        A model with a logit bias was trained with SigLIP's loss (arXiv:2303.15343): they are sigmoid(z), each text by
        itself, and do not sum to 1.

        Raises:
            ArtifactError: classes.npz is missing or corrupt.
        """
        logit_scale, logit_bias = self.logit_parameters
        logits_BK = logit_scale * image_features_BD @ text_features_KD.T
        if logit_bias is None:
            shifted_BK = np.exp(logits_BK - logits_BK.max(axis=1, keepdims=True))
            probabilities_BK: NDArray[np.float32] = shifted_BK / shifted_BK.sum(axis=1, keepdims=True)
            return probabilities_BK
        sigmoid_BK: NDArray[np.float32] = np.exp(-np.logaddexp(np.float32(0), -(logits_BK + logit_bias)))
        return sigmoid_BK

    @cached_property
    def logit_parameters(self) -> tuple[np.float32, np.float32 | None]:
        """The logit scale, and the logit bias of a sigmoid model; None for a softmax model."""
        path = self.folder / "classes.npz"
        try:
            with np.load(path, allow_pickle=False) as classes:
                bias = np.float32(classes["logit_bias"]) if "logit_bias" in classes else None
                return np.float32(classes["logit_scale"]), bias
        except (OSError, KeyError, ValueError, BadZipFile) as error:
            raise ArtifactError(f"{path}: missing or corrupt ({error}). {_EXPORT_AGAIN}") from error

    def _pixel_values(self, images: Sequence[Image.Image] | NDArray[np.uint8]) -> NDArray[np.float32]:
        decoded = [Image.fromarray(image) if isinstance(image, np.ndarray) else image for image in images]
        shape = [len(decoded), 3, *as_pair(self.image_spec["size"])]
        return np.array([self.preprocess(image) for image in decoded], np.float32).reshape(shape)


def open_exported(
    folder: Path,
    *,
    runtime: str | None = None,
    precision: str | None = None,
    device: str = "cpu",
    threads: int | None = None,
    towers: tuple[Graph | EngineSession, Graph | EngineSession] | None = None,
) -> ExportedEncoders:
    """Open both graphs of an exported folder; `threads` None leaves their number to the runtime.

    `runtime` and `precision` default to the manifest's, or to ONNX Runtime without a manifest. If `towers` (image
    and text) are given, they replace the folder's graphs, which are then not opened.

    Every file is first compared with the hash in the manifest (measured once: 0.08 s per 100 MB). A folder that is
    still being written has no manifest yet.

    Raises:
        ArtifactError: a file is missing, corrupt or of another kind.
        UnavailableBackend: the device is not there, or has no kernels for the precision.
        MissingDependency: the runtime is not installed.
    """
    manifest = open_stage(folder).manifest if (folder / MANIFEST).is_file() else {}
    is_baked = manifest.get("kind") == "classes"
    spec = _read_json(folder / "preprocess.json")
    try:
        image_spec, text_spec = spec["image"], {} if is_baked else spec["text"]
        size, context_length = image_spec["size"], 0 if is_baked else int(text_spec["context_length"])
    except (KeyError, TypeError) as error:
        raise ArtifactError(
            f"{folder / 'preprocess.json'}: expected sections 'image' and 'text', missing {error}. {_EXPORT_AGAIN}"
        ) from None
    summary = manifest.get("summary", {})
    runtime, precision = runtime or summary.get("runtime", "onnxruntime"), precision or summary.get("precision")
    if runtime in RUNTIMES:  # for a build kit, open its graphs; tensorrt_engines.open_tensorrt opens its engines
        runtime = RUNTIMES[runtime].graphs_open_in
    settings: dict[str, Any] = {"runtime": runtime, "precision": precision, "device": device, "threads": threads}
    tokenizer = None if is_baked else _open_tokenizer(folder / "tokenizer.json")
    image, text = towers or (
        open_tower(folder / IMAGE_GRAPH, IMAGE_INPUT, **settings),
        None if is_baked else open_tower(folder / TEXT_GRAPH, TEXT_INPUT, **settings),
    )
    return ExportedEncoders(
        folder=folder,
        image_size=int(size[0] if isinstance(size, list) else size),
        context_length=context_length,
        precision=precision,
        image_spec=image_spec,
        text_spec=text_spec,
        _tokenizer=tokenizer,
        _image=image,
        _text=None if is_baked else text,
    )


def open_tower(
    path: Path, input_name: str, *, runtime: str, precision: str | None, device: str, threads: int | None
) -> Graph:
    """Open a graph that has one input of the given name.

    Raises:
        ArtifactError: the graph is missing, corrupt, or has other inputs.
        UnavailableBackend: the device is not there, or has no kernels for the precision.
        MissingDependency: the runtime is not installed.
    """
    _require(path)
    try:
        graph = open_graph(path, runtime, precision=precision, device=device, threads=threads)
    except Unavailable as error:
        raise UnavailableBackend(f"{path}: {error}") from None
    except ModuleNotFoundError as error:
        raise MissingDependency(
            f"{path}: this model runs in {runtime}, which is not installed: {error}. "
            f"Install it with: {RUNTIMES[runtime].install}"
        ) from None
    except Exception as error:  # the runtimes' exceptions have no common base class
        raise ArtifactError(
            f"{path}: {runtime_title(runtime)} cannot open this graph: {error}. {_EXPORT_AGAIN}"
        ) from error
    if list(graph.input_shapes) != [input_name]:
        raise ArtifactError(
            f"{path}: expected one input, {input_name}; got {', '.join(graph.input_shapes) or 'none'}. {_EXPORT_AGAIN}"
        )
    return graph


def _run(graph: Graph | EngineSession, inputs: NDArray[Any]) -> NDArray[np.float32]:
    features_BD: NDArray[np.float32] = encode_rows(graph, inputs, _CHUNK)
    return features_BD


def _clean(text: str, kind: str) -> str:
    text = html.unescape(html.unescape(ftfy.fix_text(text))).strip()
    if kind == "canonicalize":
        text = text.replace("_", " ").translate(_WITHOUT_PUNCTUATION)
    text = " ".join(text.split())
    return text if kind == "whitespace" else text.lower()


_WITHOUT_PUNCTUATION = str.maketrans("", "", string.punctuation)


def _open_tokenizer(path: Path) -> Tokenizer:
    _require(path)
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises bare Exception
        raise ArtifactError(
            f"{path}: not a tokenizer file of the `tokenizers` library: {error}. {_EXPORT_AGAIN}"
        ) from error


def _read_json(path: Path) -> dict[str, Any]:
    _require(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # not JSON, or not UTF-8
        raise ArtifactError(f"{path}: not JSON: {error}. {_EXPORT_AGAIN}") from None
    if not isinstance(content, dict):
        raise ArtifactError(f"{path}: expected a JSON object, got {type(content).__name__}. {_EXPORT_AGAIN}")
    return content


def _require(path: Path) -> None:
    if not path.is_file():
        raise ArtifactError(f"{path}: missing; an exported model needs this file. {_EXPORT_AGAIN}")
