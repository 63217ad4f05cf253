"""Write MODEL_CARD.md: what an exported model is, its origin, its parity check, and how to use it without torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from export.documents import ExportSummary, Parity, TextParity, Uint8Parity
from toolchain.filesystem import file_sha256
from toolchain.precisions import PRECISIONS
from toolchain.runtimes import RUNTIMES

CARD = "MODEL_CARD.md"
_UNLISTED = (CARD, "SHA256SUMS", "manifest.json", "key", "lock")
"""Files that the card does not list: they are written after it, or are not part of the exported model."""

_BATCH = {None: "any batch size", 1: "batch size 1 only"}

SNIPPET = """\
from pathlib import Path

from PIL import Image

from export.runtime import open_exported

model = open_exported(Path("."))
image_features = model.encode_images([Image.open("image.png")])
text_features = model.encode_texts(["a cat", "a dog"])
print(model.compute_probabilities(image_features, text_features))
"""


_UINT8_SNIPPET = """\
import numpy as np
import onnxruntime
from PIL import Image

options = onnxruntime.SessionOptions()
{options}session = onnxruntime.InferenceSession("image_uint8.onnx", options)
pixels = np.asarray(Image.open("image.png").convert("RGB"))
(image_features,) = session.run(["image_features"], {{"pixels": pixels}})
"""
_LESS_OPTIMIZED = (  # runner.onnxruntime_options gives the reason
    "options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED\n"
)
_DISABLE = 'options.add_session_config_entry("optimization.disable_specified_optimizers", "{}")\n'
_OPTIONS = {
    "fp16": _LESS_OPTIMIZED,
    "bf16": _LESS_OPTIMIZED,
    "int8": _DISABLE.format("MatMulAddFusion"),
    "int8-fp16": _LESS_OPTIMIZED + _DISABLE.format("MatMulAddFusion;WeightBiasQuantization"),
}


def write_card(folder: Path, name: str, summary: ExportSummary, provenance: dict[str, Any]) -> None:
    """Write the model card of the files in `folder`; equal files and arguments give equal bytes.

    `summary` is the summary in the manifest. `provenance` is the result of `describe_origin`.
    """
    kept = sorted(path for path in folder.iterdir() if path.is_file() and path.name not in _UNLISTED)
    sums = "\n".join(f"{file_sha256(path)}  {path.name}" for path in kept)
    origin = "\n".join(f"- {what}: {_format_value(value)}" for what, value in provenance.items())
    text = f"""\
# {name}

A CLIP model. Its image tower and its text tower map images and texts to features of unit norm in one shared space, so
the dot product of two features is their cosine similarity.

- role: {summary["role"]}
- precision: {summary["precision"]}
- runtime: {summary["runtime"]}
- parameters: image {summary["params_image"]:,}, text {summary["params_text"]:,}
- graphs: {summary["size_bytes"]:,} bytes, ONNX opset {summary["opset"]}, {_BATCH[summary["batch"]]}

## Origin

{origin}

Paths are relative to the directory of the run in which this model was made.

The licence of this model depends on the licences of its teachers, of the model whose weights the student started from,
and of the training data, which clipkd cannot detect. If one is not given above, check where it was published before you
pass the model on.

## Parity check

{_parity(summary["parity"], summary["precision"])}

## Use

Use the model for zero-shot classification and for retrieval, on images and captions like its training data. It was not
evaluated on other data. Do not use it to identify people or to make decisions about them.

```python
{SNIPPET}```

This code needs clipkd with its base dependencies and {RUNTIMES[summary["runtime"]].title}; it does not need torch.
`clipkd classes` makes a copy of this model for a fixed set of labels.
{_uint8_input(summary.get("uint8_input"), summary["precision"])}
## Files

```
{sums}
```
"""
    (folder / CARD).write_text(text, encoding="utf-8")


def _format_value(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True)


def uint8_snippet(precision: str) -> str:
    """Return code that opens image_uint8.onnx in ONNX Runtime without clipkd."""
    return _UINT8_SNIPPET.format(options=_OPTIONS.get(precision, ""))


def _uint8_input(measured: Uint8Parity | None, precision: str) -> str:
    if measured is None:
        return ""
    return f"""
`image_uint8.onnx` includes the preprocessing. Its only input, `pixels`, is one decoded image of any size: RGB, uint8,
[height, width, 3]. Its output, `image_features`, is [1, D]. ONNX Runtime and OpenVINO run it without clipkd:

```python
{uint8_snippet(precision)}```

Difference from the preprocessing in preprocess.json, on {measured["num_pictures"]} images of several sizes: \
{100 * measured["share_of_values"]:.3f} % of the values differ, by at most {measured["max_levels"]:.0f} of 255 grey \
levels. The lowest cosine similarity of the features is {measured["min_cosine"]:.6f}.
"""


def describe_low_sqnr(text: TextParity, precision: str) -> str:
    """Return a sentence on the prompts below the precision's threshold: some int8 kernels compute them less exactly."""
    share = f"{text['num_below']:,} of {text['num_samples']:,} prompts"
    threshold = f"{PRECISIONS[precision].min_sqnr_db:g} dB of SQNR"
    return f"{share} are below {threshold}; the worst has cosine {text['min_cosine']:.4f}: {text['worst_prompt']}"


def _parity(parity: Parity, precision: str) -> str:
    text = parity["text"]
    rows = [
        f"| {name} | {tower['num_samples']:,} | {tower['min_cosine']:.6f} | {tower['min_sqnr_db']:.1f} |"
        for name, tower in (("image", parity["image"]), ("text", text))
    ]
    head = (
        "The features of this model compared with those of the checkpoint in PyTorch, including preprocessing and\n"
        "tokenization. The numbers are those of the worst sample; SQNR is the signal-to-quantization-noise ratio of\n"
        "its features.\n\n"
    )
    compared = f"{text['num_samples']:,} of the {text['num_prompts']:,} prompts"
    scope = f"The text tower was compared on {compared} of the evaluation set."
    if text["num_below"]:
        scope += f"\n{describe_low_sqnr(text, precision)}"
    table = "\n".join(["| tower | samples | lowest cosine | lowest SQNR, dB |", "|---|---|---|---|", *rows])
    return f"{head}{table}\n\n{scope}"
