"""Export one model of each family of open_clip's architectures in fp32: which of them can clipkd ship?

    python benchmarks/export_families.py [--only RN50,coca_base] [--samples 32] [--docs docs/export.md]

The models are shrunk (architectures.py) and have random weights. Each is exported for ONNX Runtime and, from the same
graphs, for OpenVINO, and must pass the parity check in both, on the CPU. `--docs` replaces the rows of these families
between that file's markers. The last line of stdout is one JSON document; the exit code is 5 if a family fails.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from architectures import build_small, families
from claims import claim, finish
from export_matrix import captions, pictures

from export.documents import PlannedExport
from export.graphs.export_onnx import adapt_export, export_onnx
from export.proof.prove import prove
from toolchain.errors import ClipkdError
from toolchain.evaluation.eval_set import classes_set
from toolchain.models.towers import example_pixels

BEGIN, END = "<!-- export_families: begin -->", "<!-- export_families: end -->"
HEAD = [
    "| architectures | image tower | text tower | worst SQNR in ONNX Runtime, dB | in OpenVINO, dB |",
    "|---|---|---|---|---|",
]
RUNTIMES = ("onnxruntime", "openvino")


def export_family(config: dict[str, Any], samples: int, scratch: Path) -> dict[str, str]:
    """Return for each runtime the worst SQNR of the image and of the text tower, or the reason of the failure."""
    folders = {name: scratch / name for name in ("architecture", *RUNTIMES)}
    for folder in folders.values():
        folder.mkdir()
    found: dict[str, str] = {}
    try:
        model = build_small(config, folders["architecture"])
        shown, spoken = pictures(samples, example_pixels(model.net).shape[-1]), captions(samples)
        for runtime in RUNTIMES:
            planned = PlannedExport("adopted", "fp32", runtime)
            if runtime == RUNTIMES[0]:
                summary = export_onnx(model, folders[runtime], planned, classes_set("made", shown, spoken, ("{}",)))
            else:
                adapt_export(folders[RUNTIMES[0]], summary, folders[runtime], planned)
            parity = prove(folders[runtime], runtime=runtime, precision="fp32")["parity"]
            found[runtime] = f"{parity['image']['min_sqnr_db']:.0f} / {parity['text']['min_sqnr_db']:.0f}"
    except ClipkdError as error:
        return found | {runtime: _failure(str(error)) for runtime in RUNTIMES if runtime not in found}
    except Exception as error:  # torch, timm and transformers raise anything for a tower that they cannot take
        reason = _failure(f"{type(error).__name__}: {error}")
        return found | {runtime: reason for runtime in RUNTIMES if runtime not in found}
    return found


def _failure(message: str) -> str:
    return f"failed: {' '.join(message.split())[:160]}".replace("|", "/")


def describe_image_tower(config: dict[str, Any]) -> str:
    vision = config["vision_cfg"]
    name = vision.get("timm_model_name")
    if name is not None:
        return f"timm's {name.removeprefix('small_')} and its sizes"
    kind = "ResNet" if isinstance(vision["layers"], list) else "ViT"
    options = [key for key in ("attentional_pool", "ls_init_value", "no_ln_pre", "output_tokens") if vision.get(key)]
    options += ["QuickGELU"] if config.get("quick_gelu") else []
    return f"open_clip's {kind}" + (f" ({', '.join(options)})" if options else "")


def describe_text_tower(config: dict[str, Any]) -> str:
    text = config["text_cfg"]
    if "hf_model_name" in text:
        return f"{text['hf_model_name']} of transformers, with a made configuration"
    read = {"last": "last token", "eos": "end token"}.get(text.get("pool_type"), "end token")
    mask = "no mask" if text.get("no_causal_mask") else "causal"
    return f"open_clip's ({mask}, {'class token' if text.get('embed_cls') else read})"


def row(config: dict[str, Any], names: list[str], found: dict[str, str]) -> str:
    cells = [", ".join(names), describe_image_tower(config), describe_text_tower(config)]
    return f"| {' | '.join(cells + [found[runtime] for runtime in RUNTIMES])} |"


def write(docs: Path, lines: list[str]) -> None:
    """Replace the table's rows of the families that were run; those of others stay, in the order of their names."""
    before, _, rest = docs.read_text(encoding="utf-8").partition(BEGIN)
    there, _, after = rest.partition(END)
    run = {line.split("|")[1] for line in lines}
    kept = [line for line in there.strip().splitlines()[2:] if line.split("|")[1] not in run]
    table = "\n".join([*HEAD, *sorted([*kept, *lines], key=str.lower)])
    docs.write_text(f"{before}{BEGIN}\n{table}\n{END}{after}", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="names of architectures; default: all families")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--docs", type=Path, help="a file whose table to replace")
    options = parser.parse_args()
    wanted = set(filter(None, options.only.split(",")))
    lines, claims = [], []
    for key, names in families().items():
        if wanted and not wanted & set(names):
            continue
        config = json.loads(key)
        with tempfile.TemporaryDirectory(prefix="export-families-") as scratch:
            found = export_family(config, options.samples, Path(scratch))
        lines.append(row(config, names, found))
        print(lines[-1], flush=True)
        passed = float(not any(text.startswith("failed") for text in found.values()))
        claims.append(claim(f"{names[0]} exports and passes parity", passed, "1 = yes", ">=", 1))
        if options.docs:
            write(options.docs, [lines[-1]])
    finish("export_families", claims, samples=options.samples)


if __name__ == "__main__":
    main()
