"""Compare the speed of clipkd's data loading with open_clip's webdataset pipeline, on one core at 224 px.

    python benchmarks/data.py [--samples 96] [--rounds 9]

One side is the installed open_clip: `get_wds_dataset` of open_clip_train.data with the training transform of
open_clip.transform and CLIP-KD's crops (scale 0.9 to 1).  The other is clipkd's ShardBatches.batch.  Both run in this
process, with no workers and one thread.  They read every sample of the same shards once a round, in interleaved rounds.
Both read the captions and neither tokenizes them: the tokenizer is the same.

The results differ in one respect.  open_clip's worker returns normalized float32 [B, 3, 224, 224].  clipkd returns
uint8, a quarter of the bytes, and the training step normalizes on the training device.  That is part of the design that
is measured; the cost on a CPU is in the table ("normalizing, once a batch").

The pixels are compared with those of the plain path: Pillow decodes the whole image, cuts the same crop and resizes it
(bicubic).  The claim is about the worst image.

The images are synthetic: random fields whose contrast falls with scale as in photographs, gradients, edges and text,
saved as JPEGs of quality 90.  They have about 70 kB at 512 px; the two photographs included in scikit-learn have 51 and
92 kB at the same size and quality.

For the table of docs/data.md (benchmarks/data_table.py), the script also measures `data inspect`, `data pack` and a
teacher ViT-B/16 in float32 on one image and one caption, each on one core, with samples of 256 px.

The last line of stdout is one JSON document; the exit code is 5 if a claim does not hold.
"""

import argparse
import contextlib
import functools
import io
import json
import math
import os
import statistics
import sys
import tarfile
import tempfile
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from claims import claim, finish
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from train_step import make_batch
from webdataset.tariterators import tar_file_expander

from toolchain.data import images
from toolchain.data.batch import Geometry
from toolchain.data.inspection import inspect
from toolchain.data.packing import pack
from toolchain.data.random_numbers import uniforms
from toolchain.data.webdataset_shards import ShardBatches
from toolchain.distillation.teacher import live_teacher
from toolchain.distributed import ALONE
from toolchain.models.build import build_model
from toolchain.models.text_trimming import trim_tokens
from toolchain.recipe.data import WebdatasetSpec
from toolchain.recipe.model import ModelSpec

MIN_SPEEDUP = {512: 2.0, 256: 1.2}
MIN_PSNR_DB = 40.0
GEOMETRY = Geometry(224, "bicubic")
CROP_SCALE = (0.9, 1.0)
BATCH, SHARDS, QUALITY = 16, 4, 90
SAMPLES_TO_PACK = 100  # of each shard
WORDS = "a an the of on in with and near old red small large dog cat street house tree man woman child boat sea"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=96, help="images of each size")
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    claims: list[dict[str, Any]] = []
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["XDG_CACHE_HOME"] = scratch  # the index of the shards is deleted with them
        for size, bound in MIN_SPEEDUP.items():
            contents = make_shards(Path(scratch) / str(size), arguments.samples, size)
            pattern = str(Path(scratch) / str(size) / f"{{00000..{SHARDS - 1:05d}}}.tar")
            measured = compare(pattern, contents, arguments.rounds)
            found[str(size)] = measured
            claims.append(
                claim(f"images/s to open_clip's, {size} px, median of paired ratios", measured["ratio"], "ratio", ">=",
                      bound)
            )  # fmt: skip
            claims.append(claim(f"worst image compared with the plain path, {size} px", measured["psnr_db"], "dB",
                                ">=", MIN_PSNR_DB))  # fmt: skip
        rates = {"decoding an epoch": found["256"]["images_per_s"]["clipkd"]}
        rates |= measure_commands(Path(scratch) / "many", contents)
    rates["teacher"] = measure_teacher()
    print("\n| on one core, 256 px | samples/s |\n|---|---|")
    for work, rate in rates.items():
        print(f"| {work} | {rate:.1f} |")
    rates = {work: round(rate, 3) for work, rate in rates.items()}
    finish("data", claims, threads=1, samples=arguments.samples, sizes=found, samples_per_s=rates)


def compare(pattern: str, contents: list[bytes], rounds: int) -> dict[str, Any]:
    """Measure both sides on the same shards, interleaved, and how their time divides into parts."""
    spec = WebdatasetSpec(kind="webdataset", shards=(pattern,), crop_scale=CROP_SCALE)
    data = ShardBatches.open(spec, seed=0, batch_size=BATCH)
    sides: dict[str, Callable[[], int]] = {
        "open_clip": open_clip_epoch(pattern, len(contents)),
        "clipkd": lambda: sum(
            len(data.batch(step, slice(None), [GEOMETRY]).captions_B) for step in range(data.steps_per_epoch)
        ),
    }
    taken: dict[str, list[float]] = {name: [] for name in sides}
    for round_ in range(rounds + 1):
        for name, side in sides.items():
            started = time.perf_counter()
            number = side()
            if round_:  # the first round is the warm-up
                taken[name].append((time.perf_counter() - started) / number)
    per_image_ms = {name: 1e3 * statistics.median(seconds) for name, seconds in taken.items()}
    ratio = statistics.median(a / b for a, b in zip(taken["open_clip"], taken["clipkd"], strict=True))
    worst_db = min(psnr_db(content, sample) for sample, content in enumerate(contents))
    kilobytes = sum(map(len, contents)) / len(contents) / 1e3
    parts = {"open_clip": time_open_clip_parts(contents), "clipkd": time_clipkd_parts(contents)}
    side_px = Image.open(io.BytesIO(contents[0])).width
    print(f"\n{len(contents)} JPEGs of {side_px} px, {kilobytes:.0f} kB each\n")
    print("| side | part | ms an image | share |\n|---|---|---|---|")
    for name, whole_ms in per_image_ms.items():
        print(f"| {name} | all: {1e3 / whole_ms:.0f} images/s on a core | {whole_ms:.3f} | 100 % |")
        inside = {part: value for part, value in parts[name].items() if not part.startswith("(")}
        for part, part_ms in inside.items():
            print(f"| | {part} | {part_ms:.3f} | {100 * part_ms / whole_ms:.0f} % |")
        rest_ms = whole_ms - sum(inside.values())
        print(f"| | reading, shuffling, stacking: the rest | {rest_ms:.3f} | {100 * rest_ms / whole_ms:.0f} % |")
    print(f"| | {next(part for part in parts['clipkd'] if part.startswith('('))} "
          f"| {parts['clipkd']['(normalizing, once a batch, on the device)']:.3f} | not included |")  # fmt: skip
    print(f"\nratio {ratio:.2f}, worst image {worst_db:.1f} dB", flush=True)
    return {
        "ratio": ratio,
        "psnr_db": round(worst_db, 2),
        "images_per_s": {name: round(1e3 / value, 1) for name, value in per_image_ms.items()},
        "image_bytes": round(1e3 * kilobytes),
        "ms": {name: {part: round(value, 4) for part, value in found.items()} for name, found in parts.items()},
    }


def open_clip_epoch(pattern: str, num_samples: int) -> Callable[[], int]:
    """Return a function that reads the shards once through open_clip's loader, and returns the number of images."""
    # open_clip imports pandas, and uses it only to read csv files.
    with contextlib.suppress(ImportError):
        sys.modules.setdefault("pandas", types.ModuleType("pandas"))
    from open_clip_train import data as theirs

    # webdataset ends a shard with an empty record, which this version of open_clip's reader cannot read.
    theirs.tar_file_expander = functools.partial(tar_file_expander, eof_value=None)

    arguments = argparse.Namespace(
        train_data=pattern, train_num_samples=num_samples, train_data_upsampling_factors=None, dataset_resampled=False,
        seed=0, batch_size=BATCH, workers=0, world_size=1,
    )  # fmt: skip
    info = theirs.get_wds_dataset(
        arguments, open_clip_transform(), is_train=True, floor=True, tokenizer=lambda text: [text]
    )

    def once() -> int:
        return sum(len(pixels) for pixels, _ in info.dataloader)

    return once


def open_clip_transform() -> Any:
    from open_clip.transform import image_transform

    return image_transform((GEOMETRY.size, GEOMETRY.size), is_train=True, aug_cfg={"scale": CROP_SCALE})


def time_open_clip_parts(contents: list[bytes]) -> dict[str, float]:
    crop, convert, to_tensor, normalize = open_clip_transform().transforms
    clock = Clock()
    for content in contents:
        with clock("decoding"):
            image = Image.open(io.BytesIO(content)).convert("RGB")
        with clock("crop and resizing"):
            image = convert(crop(image))
        with clock("to a float tensor"):
            tensor = to_tensor(image)
        with clock("normalizing"):
            normalize(tensor)
    return clock.medians_ms()


def time_clipkd_parts(contents: list[bytes]) -> dict[str, float]:
    clock = Clock()
    pixels_B3HH = np.empty((BATCH, 3, GEOMETRY.size, GEOMETRY.size), np.uint8)
    mean, std = torch.full((3, 1, 1), 0.5), torch.full((3, 1, 1), 0.25)
    for sample, content in enumerate(contents):
        random_R = random_numbers(sample)
        with clock("decoding"):
            image = Image.open(io.BytesIO(content))
            image.load()
        with clock("crop"):
            cut_HW4 = images.cut_box(image, images.crop_box(*image.size, CROP_SCALE, random_R))
        with clock("resizing"):
            view_HH3 = images.resize(cut_HW4, GEOMETRY)
        with clock("into the batch"):
            pixels_B3HH[sample % BATCH] = view_HH3.transpose(2, 0, 1)
    batches = Clock()
    for _ in range(9):
        with batches("once"):
            torch.from_numpy(pixels_B3HH).float().div_(255).sub_(mean).div_(std)
    return clock.medians_ms() | {"(normalizing, once a batch, on the device)": batches.medians_ms()["once"] / BATCH}


def psnr_db(content: bytes, sample: int) -> float:
    """Return the PSNR in dB between clipkd's view of an image and the plain path's."""
    random_R = random_numbers(sample)
    (ours_HH3,) = images.crop_image(content, CROP_SCALE, random_R, [GEOMETRY])
    image = Image.open(io.BytesIO(content)).convert("RGB")
    box = images.crop_box(*image.size, CROP_SCALE, random_R)
    plain = image.crop(box).resize((GEOMETRY.size, GEOMETRY.size), Image.Resampling.BICUBIC)
    error = np.mean((ours_HH3.astype(np.float64) - np.asarray(plain, np.float64)) ** 2)
    return 10 * math.log10(255**2 / max(error, 1e-9))


def random_numbers(sample: int) -> NDArray[np.float64]:
    return uniforms(0, np.array([sample]), 0, images.CROP_NUMBERS)[0]


class Clock:
    """Record the seconds that each part takes, each time it runs."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = {}

    @contextlib.contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds.setdefault(part, []).append(time.perf_counter() - started)

    def medians_ms(self) -> dict[str, float]:
        return {part: 1e3 * statistics.median(seconds) for part, seconds in self.seconds.items()}


# Rates of the commands and of the teacher


def measure_commands(folder: Path, contents: list[bytes]) -> dict[str, float]:
    """Return samples per second of `data inspect` and `data pack`.

    The start of a command is not counted: the rate is that of the samples by which two calls differ.
    """
    write_shards(folder, [contents[sample % len(contents)] for sample in range(SHARDS * SAMPLES_TO_PACK)])
    paths = [str(folder / f"{shard:05d}.tar") for shard in range(SHARDS)]
    one, all_ = (WebdatasetSpec(kind="webdataset", shards=tuple(some)) for some in (paths[:1], paths))
    commands: dict[str, Callable[[WebdatasetSpec, int], Any]] = {
        "clipkd data inspect": lambda spec, _: inspect(spec),
        "clipkd data pack": lambda spec, round_: pack(spec, folder / f"{len(spec.shards)}.{round_}"),
    }
    rates = {}
    for name, command in commands.items():
        taken = []
        for round_ in range(6):
            seconds = []
            for spec in (one, all_):
                started = time.perf_counter()
                command(spec, round_)
                seconds.append(time.perf_counter() - started)
            taken.append((seconds[1] - seconds[0]) / ((SHARDS - 1) * SAMPLES_TO_PACK))
        rates[name] = 1 / statistics.median(taken[1:])
    return rates


def measure_teacher() -> float:
    """Return samples per second of a teacher ViT-B/16 in float32."""
    teacher = live_teacher(build_model(ModelSpec(model="ViT-B-16"), seed=0), "fp32", ALONE.device)
    taken = []
    with torch.no_grad():
        for seed in range(4):
            pixels, ids_BT = make_batch(BATCH, seed)
            started = time.perf_counter()
            teacher.image_features(pixels)
            teacher.text_features(trim_tokens(teacher.model.net, ids_BT))
            taken.append((time.perf_counter() - started) / BATCH)
    return 1 / statistics.median(taken[1:])


# The images


def make_shards(folder: Path, number: int, size: int) -> list[bytes]:
    """Write shards as img2dataset does; return the encoded images."""
    contents = [make_jpeg(size, seed) for seed in range(number)]
    write_shards(folder, contents)
    return contents


def write_shards(folder: Path, contents: list[bytes]) -> None:
    folder.mkdir(parents=True)
    for shard in range(SHARDS):
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as archive:
            for sample in range(shard, len(contents), SHARDS):
                caption = " ".join(np.random.default_rng(sample).choice(WORDS.split(), 10))
                about = json.dumps({"caption": caption, "key": f"{sample:09d}", "status": "success"})
                for kind, content in (("jpg", contents[sample]), ("json", about.encode()), ("txt", caption.encode())):
                    info = tarfile.TarInfo(f"{sample:09d}.{kind}")
                    info.size = len(content)
                    archive.addfile(info, io.BytesIO(content))


def make_jpeg(size: int, seed: int) -> bytes:
    """Return a coloured JPEG: a random field with the spectrum of photographs, a gradient, shapes and words."""
    random = np.random.default_rng([seed, size])
    fy, fx = np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size)[None]
    frequency = np.maximum(np.hypot(fx, fy), 1 / size)
    planes = []
    for contrast in (1.0, 0.35, 0.35):  # of the luminance plane, and of the two chrominance planes
        spectrum = np.fft.rfft2(random.standard_normal((size, size))) / frequency ** random.uniform(1.2, 1.6)
        plane_HW = np.fft.irfft2(spectrum, s=(size, size))
        ramp_HW = np.add.outer(*(random.uniform(-40, 40) * np.linspace(-1, 1, size) for _ in range(2)))
        planes.append(contrast * (plane_HW / plane_HW.std() * random.uniform(25, 45) + ramp_HW))
    y, cb, cr = planes
    pixels_HW3 = np.stack([y + 1.4 * cr, y - 0.34 * cb - 0.71 * cr, y + 1.77 * cb], -1) + 128
    image = Image.fromarray(pixels_HW3.clip(0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(image)
    for _ in range(6):
        x0, y0, w, h = (random.random(4) * size * [0.9, 0.9, 0.25, 0.25]).tolist()
        draw.ellipse([x0, y0, x0 + w, y0 + h], fill=tuple(random.integers(0, 256, 3).tolist()))
    font = ImageFont.load_default(size=max(10, size // 20))
    for line in range(3):
        words = " ".join(random.choice(WORDS.split(), 4))
        draw.text((size * 0.1, size * (0.2 + 0.25 * line)), words, font=font, fill=(250, 250, 240))
    encoded = io.BytesIO()
    image.save(encoded, "JPEG", quality=QUALITY)
    return encoded.getvalue()


if __name__ == "__main__":
    main()
