"""Check that an exported folder, in its own runtime, still computes what its checkpoint computed in torch.

The whole path is compared, from uint8 pixels and caption strings on: a wrong mean, a forgotten resize or a tokenizer
that drops the end token changes what ships as much as a wrong weight does.  Needs no torch: `export_onnx` left inputs
and torch's outputs in parity.npz.  The table of precisions holds the bounds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from export.device_programs.runner import as_pair, as_triple
from export.documents import Comparison, Parity, TowerParity, Uint8Parity
from export.model_folder import UINT8_GRAPH
from export.runtime.exported_model import ExportedEncoders, open_exported
from toolchain.errors import ArtifactError, GateError
from toolchain.precisions import PRECISIONS

TIE = 0.01  # of a cosine: candidates nearer than this to the best one count as the same
MAX_PIXEL_ERROR = 1e-4  # of a normalised pixel: a hundredth of one grey level
# Of preprocessing in the graph, in grey levels, against Pillow's, over pictures of several sizes.
MAX_LEVELS = 2.0  # one of each pass, where float32 sums round otherwise than Pillow's integers; 1 measured
MAX_LEVELS_SHARE = 0.05  # of values: 1e-4 measured, and 0.04 where a bilinear kernel makes many halves; else all differ
MIN_UINT8_SQNR_DB = 50.0  # of features then, or what the precision may lose by itself: 78 measured in fp32, 35 in int8
EXACT_DB = 150.0  # reported for equal vectors: float32 resolves 24 bits, which is 144 dB


class ParityEncoders(Protocol):
    def preprocess(self, image: Image.Image) -> NDArray[np.float32]: ...

    def tokenize(self, texts: list[str]) -> NDArray[np.int64]: ...

    def encode_pixels(self, pixel_values_BCHW: NDArray[np.float32]) -> NDArray[np.float32]: ...

    def encode_ids(self, input_ids_BT: NDArray[np.int64]) -> NDArray[np.float32]: ...


def check_parity(folder: Path, *, precision: str, encoders: ParityEncoders | None = None) -> Parity:
    """Return the content of parity.json: of both towers worst cosine, SQNR and sample, and agreement in top-1.

    `encoders` defaults to `open_exported(folder)`.

    Raises:
        ArtifactError: parity.npz is missing or damaged.
        GateError: preprocessing, tokenization or features differ by more than the precision explains.
    """
    saved = _read_samples(folder)
    encoders = encoders or open_exported(folder)
    image_names, text_names = saved["image_names"].tolist(), saved["names"].tolist()

    pixel_values_BCHW = np.stack([encoders.preprocess(Image.fromarray(pixels)) for pixels in saved["pixels_BHWC"]])
    _check_pixels(folder, saved["pixel_values_FCHW"], pixel_values_BCHW, image_names)
    input_ids_BT = encoders.tokenize(saved["captions"].tolist())
    _check_ids(folder, saved["input_ids_BT"], input_ids_BT, text_names)

    image_BD, text_BD = encoders.encode_pixels(pixel_values_BCHW), encoders.encode_ids(input_ids_BT)
    expected_image_BD, expected_text_BD = saved["image_features_BD"], saved["text_features_BD"]
    return {
        "image": _compare_tower(
            f"{folder}: image tower", precision, image_names, expected_image_BD, image_BD, expected_text_BD
        ),
        "text": _compare_tower(
            f"{folder}: text tower", precision, text_names, expected_text_BD, text_BD, expected_image_BD
        ),
    }


def _compare_tower(
    tower: str,
    precision: str,
    names: Sequence[str],
    expected_BD: NDArray[np.float32],
    actual_BD: NDArray[np.float32],
    candidates_KD: NDArray[np.float32],
) -> TowerParity:
    """Compare a tower's features with PyTorch's, and the neighbours that they have among the other tower's.

    Raises:
        GateError: as `compare`, or too few samples keep their nearest candidate.
    """
    what, bounds = f"{tower}, {precision}", PRECISIONS[precision]
    compared = compare(expected_BD, actual_BD, min_sqnr_db=bounds.min_sqnr_db, names=names, what=what)
    agreement = _top1_agreement(expected_BD.astype(np.float64), actual_BD.astype(np.float64), candidates_KD)
    if not agreement >= bounds.min_top1_agreement:
        raise GateError(
            f"{what}: {agreement:.1%} of {len(names)} samples keep their nearest neighbour in the other tower, "
            f"need {bounds.min_top1_agreement:.0%}. Export it again: clipkd export RUN --onnx"
        )
    return {**compared, "top1_agreement": agreement}


def check_uint8_input(
    folder: Path,
    *,
    precision: str,
    encoders: ExportedEncoders,
    features_of: Callable[[NDArray[np.uint8]], NDArray[np.float32]],
    pixel_values_of: Callable[[NDArray[np.uint8]], NDArray[np.float32]],
) -> Uint8Parity:
    """Return what preprocessing in the graph changes, in its runtime: of pixels in grey levels, and of features.

    Both functions take RGB [H, W, 3].  Compared are the first pictures of parity.npz, resized to be larger and smaller
    than the model's size, tall, wide, and of it.

    Raises:
        ArtifactError: parity.npz is missing or damaged.
        GateError: a pixel or a feature differs by more than rounding explains, or at all in a picture of the model's
            size.
    """
    height, width = as_pair(encoders.image_spec["size"])
    std_C11 = np.array(as_triple(encoders.image_spec["std"]), np.float32).reshape(3, 1, 1)
    apart: list[NDArray[np.float32]] = []
    expected, actual, names = [], [], []
    for pixels_HWC in _read_samples(folder)["pixels_BHWC"][:_NUM_RESIZED]:
        for what, (tall, wide) in _RESIZED.items():
            size = max(1, round(wide * width)), max(1, round(tall * height))
            picture = Image.fromarray(pixels_HWC).resize(size, Image.Resampling.BICUBIC)
            pixel_values_CHW, seen = encoders.preprocess(picture), np.asarray(picture)
            names.append(f"{what}, {size[0]}x{size[1]}")
            levels = 255 * std_C11 * np.abs(pixel_values_of(seen)[0] - pixel_values_CHW)
            bound = MAX_LEVELS + _SAME_LEVEL if what != "equal" else _SAME_LEVEL
            if not levels.max() <= bound:
                raise GateError(
                    f"{folder}: preprocessing in the graph differs from Pillow's by {levels.max():.3g} grey levels on "
                    f"a picture ({names[-1]}), need at most {bound:g}; "
                    "export without: --set export.uint8_input=false"
                )
            apart.append(levels.ravel())
            expected.append(encoders.encode_pixels(pixel_values_CHW[None]))
            actual.append(features_of(seen))
    share = float((np.concatenate(apart) > _SAME_LEVEL).mean())
    if not share <= MAX_LEVELS_SHARE:
        raise GateError(
            f"{folder}: preprocessing in the graph differs from Pillow's in {share:.1%} of all values, need at most "
            f"{MAX_LEVELS_SHARE:.0%}; export without: --set export.uint8_input=false"
        )
    compared = compare(
        np.concatenate(expected),
        np.concatenate(actual),
        min_sqnr_db=min(MIN_UINT8_SQNR_DB, PRECISIONS[precision].min_sqnr_db),
        names=names,
        what=f"{folder}: preprocessing in the graph, {precision}",
    )
    return {
        "max_levels": float(max(levels.max() for levels in apart)),
        "share_of_values": share,
        "min_cosine": compared["min_cosine"],
        "min_sqnr_db": compared["min_sqnr_db"],
        "num_pictures": len(names),
        "size_bytes": (folder / UINT8_GRAPH).stat().st_size,
    }


_NUM_RESIZED = 4
_RESIZED = {"equal": (1.0, 1.0), "larger": (2.5, 2.5), "smaller": (0.6, 0.6), "tall": (3.1, 1.2), "wide": (1.1, 2.7)}
_SAME_LEVEL = 0.01  # of a grey level: float32 arithmetic on normalised values


def compare(
    reference_BD: NDArray[np.float32],
    actual_BD: NDArray[np.float32],
    *,
    min_sqnr_db: float,
    names: Sequence[str],
    what: str,
) -> Comparison:
    """Compare row by row, in float64; return the worst row's numbers.

        SQNR_i = 10 log10( |reference_i|^2 / |reference_i - actual_i|^2 )  dB, at most EXACT_DB

    Raises:
        GateError: a row has less than `min_sqnr_db`, or is not finite, or the shapes differ.
    """
    if reference_BD.shape != actual_BD.shape or not len(reference_BD):
        raise GateError(f"{what}: expected features {list(reference_BD.shape)}, got {list(actual_BD.shape)}")
    reference_BD, actual_BD = reference_BD.astype(np.float64), actual_BD.astype(np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        signal_B = (reference_BD**2).sum(-1)
        noise_B = ((reference_BD - actual_BD) ** 2).sum(-1)
        sqnr_db_B = np.minimum(10 * np.log10(signal_B / noise_B), EXACT_DB)
        cosine_B = (reference_BD * actual_BD).sum(-1) / np.sqrt(signal_B * (actual_BD**2).sum(-1))
    worst = int(np.argmin(sqnr_db_B))  # a NaN is argmin's smallest
    if not sqnr_db_B[worst] >= min_sqnr_db:  # not `<`: NaN must fail
        raise GateError(
            f"{what}: sample {worst} of {len(names)} ({names[worst]!r}) differs from PyTorch: SQNR "
            f"{sqnr_db_B[worst]:.1f} dB, need {min_sqnr_db:g} dB; cosine {cosine_B[worst]:.6f}. "
            "Export it again: clipkd export RUN --onnx"
        )
    return {
        "min_cosine": float(cosine_B.min()),
        "min_sqnr_db": float(sqnr_db_B[worst]),
        "worst_sample": worst,
        "num_samples": len(reference_BD),
        "num_not_finite": int((~np.isfinite(actual_BD)).sum()),
    }


def _top1_agreement(
    reference_BD: NDArray[np.floating], actual_BD: NDArray[np.floating], candidates_KD: NDArray[np.float32]
) -> float:
    """Return the share of rows whose nearest candidate is the reference's, or one that it holds within TIE of that.

    Candidates are unit features of the other tower.
    """
    cosine_BK = reference_BD @ candidates_KD.astype(np.float64).T
    chosen_B = (actual_BD @ candidates_KD.astype(np.float64).T).argmax(-1)
    lost_B = cosine_BK.max(-1) - cosine_BK[np.arange(len(chosen_B)), chosen_B]
    return float((lost_B <= TIE).mean())


def _check_pixels(
    folder: Path, expected_FCHW: NDArray[np.float32], actual_BCHW: NDArray[np.float32], names: Sequence[str]
) -> None:
    actual_FCHW = actual_BCHW[: len(expected_FCHW)]
    if actual_FCHW.shape != expected_FCHW.shape:
        raise GateError(
            f"{folder}: preprocessing gives pixel_values {list(actual_FCHW.shape)}, "
            f"expected {list(expected_FCHW.shape)}; see preprocess.json"
        )
    error_F = np.abs(actual_FCHW - expected_FCHW).max((1, 2, 3))
    worst = int(np.argmax(error_F))  # a NaN is argmax's largest
    if not error_F[worst] <= MAX_PIXEL_ERROR:
        raise GateError(
            f"{folder}: preprocessing of sample {worst} ({names[worst]!r}) differs from open_clip's by "
            f"{error_F[worst]:.2g}, need at most {MAX_PIXEL_ERROR:g}; see 'image' in preprocess.json"
        )


def _check_ids(
    folder: Path, expected_BT: NDArray[np.int64], actual_BT: NDArray[np.int64], names: Sequence[str]
) -> None:
    if actual_BT.shape != expected_BT.shape:
        raise GateError(
            f"{folder}: the tokenizer gives input_ids {list(actual_BT.shape)}, expected {list(expected_BT.shape)}"
        )
    wrong_B = (actual_BT != expected_BT).any(-1)
    if wrong_B.any():
        worst = int(np.argmax(wrong_B))
        raise GateError(
            f"{folder}: the tokenizer of tokenizer.json differs from open_clip's on sample {worst} of {len(names)} "
            f"({names[worst]!r}): expected {expected_BT[worst].tolist()}, got {actual_BT[worst].tolist()}"
        )


def _read_samples(folder: Path) -> dict[str, NDArray[Any]]:
    path = folder / "parity.npz"
    try:
        with path.open("rb") as file, np.load(file) as saved:  # np.load leaves a file open that it cannot read
            return dict(saved)
    except FileNotFoundError:
        raise ArtifactError(f"{path}: missing. Export it again: clipkd export RUN --onnx") from None
    except (ValueError, OSError, BadZipFile) as error:  # not an archive, or cut short
        raise ArtifactError(f"{path}: damaged: {error}. Export it again: clipkd export RUN --onnx") from None
