"""MODEL_CARD.md: what an exported folder is, where it came from, and how to use it without torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from export.documents import ExportSummary, Parity, Uint8Parity
from toolchain.filesystem import file_sha256

CARD = "MODEL_CARD.md"
_APART = (CARD, "SHA256SUMS", "manifest.json", "key", "lock")
"""Written after the card, or not part of what is exported."""

_BATCH = {None: "of any batch", 1: "of batch 1 only"}

SNIPPET = """\
from pathlib import Path

from PIL import Image

from export.runtime import open_exported

model = open_exported(Path("."))
image_features = model.encode_images([Image.open("picture.png")])
text_features = model.encode_texts(["a cat", "a dog"])
print(image_features @ text_features.T)
"""


_UINT8_SNIPPET = """\
import numpy as np
import onnxruntime
from PIL import Image

options = onnxruntime.SessionOptions()
{options}session = onnxruntime.InferenceSession("image_uint8.onnx", options)
pixels = np.asarray(Image.open("picture.png").convert("RGB"))
(image_features,) = session.run(["image_features"], {{"pixels": pixels}})
"""
_LESS_OPTIMISED = (  # as runner.onnxruntime_options says why
    "options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED\n"
)
_WITHOUT = 'options.add_session_config_entry("optimization.disable_specified_optimizers", "{}")\n'
_OPTIONS = {
    "fp16": _LESS_OPTIMISED,
    "bf16": _LESS_OPTIMISED,
    "int8": _WITHOUT.format("MatMulAddFusion"),
    "int8-fp16": _LESS_OPTIMISED + _WITHOUT.format("MatMulAddFusion;WeightBiasQuantization"),
}


def write_card(folder: Path, name: str, summary: ExportSummary, provenance: dict[str, Any]) -> None:
    """Describe the files in `folder`; equal files and arguments give equal bytes.

    `summary` is the manifest's; `provenance` names teacher, data and checkpoint, as the recipe and the manifests do.
    """
    kept = sorted(path for path in folder.iterdir() if path.is_file() and path.name not in _APART)
    sums = "\n".join(f"{file_sha256(path)}  {path.name}" for path in kept)
    came_from = "\n".join(f"- {what}: {_said(value)}" for what, value in provenance.items())
    text = f"""\
# {name}

A CLIP model: an image tower and a text tower into one space, features of unit norm.

- role: {summary["role"]}
- precision: {summary["precision"]}
- runtime: {summary["runtime"]}
- parameters: image {summary["params_image"]:,}, text {summary["params_text"]:,}
- graphs: {summary["size_bytes"]:,} bytes, ONNX opset {summary["opset"]}, {_BATCH[summary["batch"]]}

## Where it came from

{came_from}

Its licence follows from the teacher's and the data's, which clipkd cannot read off them: what is not given above has to
be looked up where they were published, before the model is passed on.

## Proof

{_parity(summary["parity"])}

## Use

Zero-shot classification and retrieval, on pictures and captions like those it was trained on. It was measured on
nothing else. It is not meant to identify people or to decide about them.

```python
{SNIPPET}```

This needs clipkd's base dependencies and ONNX Runtime, not torch. `clipkd classes` bakes a set of labels in.
{_uint8_input(summary.get("uint8_input"), summary["precision"])}
## Files

```
{sums}
```
"""
    (folder / CARD).write_text(text, encoding="utf-8")


def _said(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True)


def uint8_snippet(precision: str) -> str:
    """Return code that opens image_uint8.onnx in ONNX Runtime without clipkd."""
    return _UINT8_SNIPPET.format(options=_OPTIONS.get(precision, ""))


def _uint8_input(measured: Uint8Parity | None, precision: str) -> str:
    if measured is None:
        return ""
    return f"""
`image_uint8.onnx` preprocesses by itself. Its one input `pixels` is a decoded picture: RGB, uint8 [height, width, 3],
of any size, one at a time; `image_features` are [1, D]. ONNX Runtime and OpenVINO run it without clipkd:

```python
{uint8_snippet(precision)}```

Against the preprocessing in preprocess.json, on {measured["num_pictures"]} pictures of several sizes: at most \
{measured["max_levels"]:.0f} of 255 grey levels, in {100 * measured["share_of_values"]:.3f} % of the values; worst \
cosine of features {measured["min_cosine"]:.6f}.
"""


def _parity(parity: Parity) -> str:
    rows = [
        f"| {name} | {tower['num_samples']} | {tower['min_cosine']:.6f} | {tower['min_sqnr_db']:.1f} |"
        for name, tower in (("image", parity["image"]), ("text", parity["text"]))
    ]
    head = "Against the checkpoint in PyTorch, from pixels and captions on; the worst sample of each tower:\n\n"
    return head + "\n".join(["| tower | samples | cosine | SQNR dB |", "|---|---|---|---|", *rows])
