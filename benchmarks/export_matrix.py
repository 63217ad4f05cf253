"""Export real-size towers with random weights in every precision and runtime, and check each against PyTorch.

    python benchmarks/export_matrix.py [--models vit_t_16,resnet18] [--precisions fp32,fp16,int8] [--samples 256]
                                       [--docs docs/export.md]

Each row is a whole export of both towers and its parity check, which runs in a process of its own.  fp32 and fp16 must
pass the parity check on ONNX Runtime and OpenVINO, on the CPU.  int8 (calibrated, not fine-tuned) must export, run and
report its SQNR to its own frozen towers.  `--docs` replaces the rows of these exports between that file's markers.  The
last line of stdout is one JSON document; the exit code is 5 if a claim does not hold.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from claims import claim, finish

from export.documents import PlannedExport
from export.graphs.export_onnx import FrozenTowers, export_onnx
from export.proof.prove import prove
from toolchain.errors import ClipkdError
from toolchain.evaluation.eval_set import classes_set
from toolchain.models.build import build_model
from toolchain.models.clip_model import ClipModel
from toolchain.models.towers import example_pixels
from toolchain.quantization.checkpoint import load_quantized
from toolchain.quantization.freeze import freeze
from toolchain.quantization.quantize import Calibration, quantize
from toolchain.recipe.model import ModelSpec
from toolchain.recipe.model_names import resolve_model
from toolchain.runtimes import RUNTIMES

MODELS = ("ViT-S-16", "vit_t_16", "mobilenetv4_s", "MobileCLIP2-S0", "resnet18", "swin_t")
CONFIGS = {  # open_clip has no CLIP model with this image tower
    "mobilenetv4_s": (
        "vit_t_16",
        {
            "vision_cfg": {
                "timm_model_name": "mobilenetv4_conv_small",
                "timm_model_pretrained": False,
                "timm_pool": "avg",
                "timm_proj": "",  # the projection is timm's classifier, after the layer that widens to 1280
                "image_size": 224,
            }
        },
    ),
}
COMPARED = ("onnxruntime", "openvino")
PRECISIONS = ("fp32", "fp16", "int8")
BEGIN, END = "<!-- export_matrix: begin -->", "<!-- export_matrix: end -->"
ADJECTIVES = ("red", "small", "old", "wet", "broken", "tall", "striped", "paper", "silent", "round", "two", "distant")
NOUNS = ("dog", "house", "boat", "tree", "cup", "road", "bird", "chair", "bridge", "lamp", "horse", "window")


def make_images(count: int, size: int) -> np.ndarray:
    """Return [B, size, size, 3] uint8: different fields of colour with grain.

    Images of noise alone would all have almost the same features.
    """
    random = np.random.default_rng(0)
    cells = random.integers(0, 256, (count, 8, 8, 3))
    spread = np.kron(cells, np.ones((1, -(-size // 8), -(-size // 8), 1)))[:, :size, :size]
    return (spread + random.normal(0, 20, spread.shape)).clip(0, 255).astype(np.uint8)


def make_captions(count: int) -> list[str]:
    pairs = [f"a {adjective} {noun}" for noun in NOUNS for adjective in ADJECTIVES]
    return [pairs[index % len(pairs)] + f" number {index}" for index in range(count)]


def build_variant(name: str) -> ClipModel:
    base, changes = CONFIGS.get(name, (name, {}))
    return build_model(
        resolve_model(ModelSpec(model=base, model_cfg=changes, init="random"), Path(), "student"), seed=0
    )


def export_and_check(model: ClipModel, runtime: str, precision: str, samples: int, folder: Path) -> dict[str, Any]:
    """Return `status` (ok or the reason), each tower's SQNR and top-1 agreement, and counts of the graphs' nodes."""
    size = example_pixels(model.net).shape[-1]
    images_BHW3, captions = make_images(samples, size), make_captions(samples)
    frozen = None
    try:
        if precision.startswith("int8"):
            checkpoint = folder / "int8"
            checkpoint.mkdir()
            few = 8
            pixels = example_pixels(model.net, few).float()
            quantize(model, checkpoint, Calibration(pixels, model.tokenize(captions[:few])))
            image, text = load_quantized(checkpoint, model)
            rounds = RUNTIMES[runtime].rounds_outputs
            frozen_image = freeze(image, example_pixels(model.net), round_outputs=rounds)
            frozen = FrozenTowers(frozen_image, freeze(text, model.tokenize(captions[:2])))
        planned = PlannedExport("student", precision, runtime)
        export_onnx(model, folder, planned, classes_set("made", images_BHW3, captions, ("{}",)), frozen)
        proof = prove(folder, runtime=runtime, precision=precision)
    except ClipkdError as error:
        return {"status": " ".join(str(error).split())}
    except Exception as error:  # torch, timm and NNCF raise any exception for an architecture they do not support
        return {"status": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
    return {"status": "ok", **proof}


def table_row(name: str, runtime: str, precision: str, result: dict[str, Any]) -> str:
    if result["status"] != "ok":
        reason = result["status"].replace("|", "/")[:160]
        return f"| {name} | {runtime} | {precision} | failed: {reason} | | | | |"
    parity, nodes = result["parity"], result["nodes"]
    towers = ("image", "text")
    sqnr = " / ".join(f"{parity[tower]['min_sqnr_db']:.0f}" for tower in towers)
    agreement = " / ".join(f"{100 * parity[tower]['top1_agreement']:.1f}" for tower in towers)
    integer = " / ".join(str(nodes[tower]["integer"]) for tower in towers)
    left = " / ".join(str(sum(nodes[tower]["rounding"].values())) for tower in towers)
    fused = " / ".join(f"{nodes[t]['attention']['fused']} of {sum(nodes[t]['attention'].values())}" for t in towers)
    return f"| {name} | {runtime} | {precision} | {sqnr} | {agreement} | {integer} | {left} | {fused} |"


def write(docs: Path, lines: list[str]) -> None:
    """Replace the table's rows of what was exported, in their places; keep the other rows."""
    before, _, rest = docs.read_text(encoding="utf-8").partition(BEGIN)
    present, _, after = rest.partition(END)
    rows = {tuple(line.split("|")[1:4]): line for line in (*present.strip().splitlines()[2:], *lines[2:])}
    table = "\n".join([*lines[:2], *rows.values()])
    docs.write_text(f"{before}{BEGIN}\n{table}\n{END}{after}", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--precisions", default=",".join(PRECISIONS))
    parser.add_argument("--runtimes", default=",".join(COMPARED))
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--docs", type=Path, help="a file whose table to replace")
    options = parser.parse_args()
    lines = [
        "| towers | runtime | precision | worst SQNR, dB | top-1 agreement, % | integer kernels | Q/DQ left | "
        "attention fused |",
        "|---|---|---|---|---|---|---|---|",
    ]
    claims = []
    print("\n".join(lines))
    for name in options.models.split(","):
        model = build_variant(name)
        for precision in options.precisions.split(","):
            for runtime in options.runtimes.split(","):
                with tempfile.TemporaryDirectory(prefix="export-matrix-") as folder:
                    result = export_and_check(model, runtime, precision, options.samples, Path(folder))
                lines.append(table_row(name, runtime, precision, result))
                print(lines[-1], flush=True)
                wanted = (
                    "exports, runs and reports its SQNR"
                    if precision.startswith("int8")
                    else "exports and passes the parity check"
                )
                holds = float(result["status"] == "ok")
                claims.append(claim(f"{name} {runtime} {precision} {wanted}", holds, "1 = yes", ">=", 1))
        if options.docs:
            write(options.docs, lines)
    finish("export_matrix", claims, samples=options.samples)


if __name__ == "__main__":
    main()
