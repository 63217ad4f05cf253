"""Compare clipkd's zero-shot and retrieval scores with CLIP_benchmark's, for the same model and archives.

    python benchmarks/clip_benchmark_agrees.py [--images 400]

Needs the package clip-benchmark; its reader and metrics run unchanged.  The script makes two webdataset archives of
noisy glyphs: one to classify, with several images of each class, and one for retrieval, with five captions for each
image.  The model is the included glyphs teacher, in float32 on the CPU.  The last line of stdout is one JSON document;
the exit code is 5 if a score differs by one image or more.
"""

import argparse
import io
import sys
import tarfile
import tempfile
import types
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from claims import claim, finish
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
NUM_CLASSES = 60
NOISE = 60  # grey levels, so that the accuracy is neither near 0 nor near 1
BATCH = 64
RECALLS = (1, 5, 10)
ROUNDING = 1e-6  # of their float32 means; one image of 400 is 2.5e-3
TEMPLATES = ("{c}", "the character {c}", "a drawing of {c}")
CAPTIONS = ("{}", "the character {}", "a drawing of {}", "{}, drawn", "one {}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=400, help="images in each set")
    count = parser.parse_args().images
    claims = []
    with tempfile.TemporaryDirectory() as scratch:
        for task in ("classification", "retrieval"):
            folder = Path(scratch) / task
            make_archives(folder, task, count)
            for name, difference in differences(folder, task).items():
                what = f"{task}: {name} differs from CLIP_benchmark's by"
                claims.append(claim(what, difference, "fraction", "<=", ROUNDING))
    finish("clip_benchmark_agrees", claims, images=count)


def differences(folder: Path, task: str) -> dict[str, float]:
    from toolchain.distributed import ALONE
    from toolchain.evaluation.open_sets import open_set
    from toolchain.evaluation.torch_encoders import TorchEncoders
    from toolchain.evaluation.zero_shot import evaluate
    from toolchain.models.build import load_model
    from toolchain.recipe.evaluate import ClipBenchmarkSet

    torch.set_num_threads(1)
    model = load_model(ROOT / "recipes" / "glyphs_teacher")
    data = open_set(ClipBenchmarkSet(kind="clip_benchmark", name="made", path=str(folder)))
    ours, _ = evaluate(TorchEncoders(model, ALONE.device), [data], headline="made")
    found = ours["sets"]["made"]
    theirs = their_numbers(model, folder, task)
    if task == "classification":
        pairs = {"acc1": found["top1"], "acc5": found["top5"], "mean_per_class_recall": found["mean_per_class_recall"]}
    else:
        pairs = {}
        for k in RECALLS:
            pairs[f"image_retrieval_recall@{k}"] = found["retrieval"][f"text_to_image_r{k}"]
            pairs[f"text_retrieval_recall@{k}"] = found["retrieval"][f"image_to_text_r{k}"]
    for name, value in pairs.items():
        sys.stderr.write(f"{task:<15} {name:<26} ours {value:.6f}  theirs {theirs[name]:.6f}\n")
    return {name: abs(value - theirs[name]) for name, value in pairs.items()}


def their_numbers(model: Any, folder: Path, task: str) -> dict[str, float]:
    """Return CLIP_benchmark's scores, computed with its own reader, loader and metrics."""
    warnings.simplefilter("ignore")  # the package's dependencies warn
    # Only captioning uses this package, which needs Java; the metrics compared here do not use it.
    for name in ("pycocoevalcap", "pycocoevalcap.eval"):
        sys.modules.setdefault(name, types.ModuleType(name))
    from clip_benchmark.datasets.builder import build_wds_dataset, image_captions_collate_fn
    from clip_benchmark.metrics import zeroshot_classification, zeroshot_retrieval

    dataset = build_wds_dataset("wds/made", model.preprocess, split="test", data_dir=str(folder))
    collate = {"collate_fn": image_captions_collate_fn} if task == "retrieval" else {}
    loader = torch.utils.data.DataLoader(dataset.batched(BATCH, **_collation(collate)), batch_size=None)
    if task == "retrieval":
        numbers: dict[str, float] = zeroshot_retrieval.evaluate(
            model.net, loader, model.tokenize, "cpu", amp=False, recall_k_list=list(RECALLS)
        )
        return numbers
    loader.dataset.classes, templates = dataset.classes, dataset.templates
    # Their accuracy() calls float() on an array of one element, which NumPy no longer allows.  The rest is unchanged.
    zeroshot_classification.float = lambda value: np.asarray(value).item()
    numbers = zeroshot_classification.evaluate(
        model.net, loader, model.tokenize, dataset.classes, templates, "cpu", amp=False
    )
    return numbers


def _collation(collate: dict[str, Any]) -> dict[str, Any]:
    return {"collation_fn": collate["collate_fn"]} if collate else {"collation_fn": torch.utils.data.default_collate}


def make_archives(folder: Path, task: str, count: int) -> None:
    """Write two archives in CLIP_benchmark's layout, of glyphs in every typeface of the training data."""
    from toolchain.data import glyphs

    random = np.random.default_rng(0)
    drawn = glyphs.training_set()
    characters = random.choice(len(drawn.names), NUM_CLASSES, replace=False).tolist()
    (folder / "test").mkdir(parents=True)
    (folder / "test" / "nshards.txt").write_text("2")
    if task == "retrieval":
        (folder / "dataset_type.txt").write_text("retrieval")
        first_of_each = np.unique(drawn.character_N, return_index=True)[
            1
        ]  # equal captions tie, and clipkd counts a tie as a miss
        samples = random.choice(first_of_each, count, replace=False)
    else:
        (folder / "classnames.txt").write_text("\n".join(drawn.names[character] for character in characters))
        (folder / "zeroshot_classification_templates.txt").write_text("\n".join(TEMPLATES))
        samples = random.choice(np.flatnonzero(np.isin(drawn.character_N, characters)), count)
    images_NHWC = glyphs.clean_images(drawn.masks_NSS[samples])
    for shard in range(2):
        with tarfile.open(folder / "test" / f"{shard}.tar", "w") as archive:
            for index in range(shard, count, 2):
                character = int(drawn.character_N[samples[index]])
                pixels_HWC = images_NHWC[index] + NOISE * random.standard_normal(images_NHWC[index].shape)
                encoded = io.BytesIO()
                Image.fromarray(pixels_HWC.clip(0, 255).astype(np.uint8)).save(encoded, "PNG")
                if task == "retrieval":
                    suffix, text = "txt", "\n".join(caption.format(drawn.names[character]) for caption in CAPTIONS)
                else:
                    suffix, text = "cls", str(characters.index(character))
                for kind, content in (("png", encoded.getvalue()), (suffix, text.encode())):
                    info = tarfile.TarInfo(f"s{index:05d}.{kind}")
                    info.size = len(content)
                    archive.addfile(info, io.BytesIO(content))


if __name__ == "__main__":
    main()
