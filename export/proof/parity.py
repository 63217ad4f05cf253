"""Check that an exported model computes in its own runtime what its checkpoint computed in torch.

The check covers the whole path, from uint8 pixels and caption strings to features: a wrong mean, a forgotten resize or
a tokenizer that drops the end token changes the shipped model as much as a wrong weight does. It needs no torch:
`export_onnx` stored inputs and torch's outputs in parity.npz. The bounds are in the table in toolchain/precisions.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, cast
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from export.device_programs.runner import as_pair, as_triple
from export.documents import Comparison, Parity, TextParity, TowerParity, Uint8Parity
from export.model_folder import UINT8_GRAPH
from export.runtime.exported_model import ExportedEncoders, open_exported
from toolchain.errors import ArtifactError, GateError
from toolchain.precisions import PRECISIONS

TIE = 0.01  # in cosine similarity: candidates within this distance of the best one count as equal
MAX_PIXEL_ERROR = 1e-4  # in normalized pixel values: a hundredth of one grey level
# Bounds for preprocessing in the graph, compared with Pillow's on images of several sizes.
MAX_LEVELS = 2.0  # grey levels: one per pass, where float32 sums round differently from Pillow's integers; measured: 1
MAX_LEVELS_SHARE = 0.05  # of all values; measured: 1e-4 (0.04 where a bilinear kernel gives many ties), 1 if wrong
MIN_UINT8_SQNR_DB = 50.0  # of features, unless the precision's own bound is lower. Measured: 78 in fp32, 35 in int8
EXACT_DB = 150.0  # SQNR reported for equal vectors: float32 resolves 24 bits, which is 144 dB


class ParityEncoders(Protocol):
    def preprocess(self, image: Image.Image) -> NDArray[np.float32]: ...

    def tokenize(self, texts: list[str]) -> NDArray[np.int64]: ...

    def encode_pixels(self, pixel_values_BCHW: NDArray[np.float32]) -> NDArray[np.float32]: ...

    def encode_ids(self, input_ids_BT: NDArray[np.int64]) -> NDArray[np.float32]: ...


def check_parity(folder: Path, *, precision: str, encoders: ParityEncoders | None = None) -> Parity:
    """Return the content of parity.json: for each tower the lowest cosine and SQNR, the worst sample, top-1 agreement.

    The text tower is compared on every prompt in parity.npz. `encoders` defaults to `open_exported(folder)`.

    Raises:
        ArtifactError: parity.npz is missing or corrupt.
        GateError: preprocessing, tokenization or features differ by more than the precision explains.
    """
    saved = _read_samples(folder)
    encoders = encoders or open_exported(folder)
    image_names, captions = saved["image_names"].tolist(), _decode(saved["captions"])
    num_spread = int(saved.get("num_spread", len(captions)))  # early versions stored no other prompts

    pixel_values_BCHW = np.stack([encoders.preprocess(Image.fromarray(pixels)) for pixels in saved["pixels_BHWC"]])
    _check_pixels(folder, saved["pixel_values_FCHW"], pixel_values_BCHW, image_names)
    input_ids_BT = encoders.tokenize(captions)
    _check_ids(folder, saved["input_ids_BT"], input_ids_BT, captions)

    image_BD, text_BD = encoders.encode_pixels(pixel_values_BCHW), encoders.encode_ids(input_ids_BT)
    expected_image_BD, expected_text_BD = saved["image_features_BD"], saved["text_features_BD"]
    image = _compare_tower(
        f"{folder}: image tower", precision, image_names, expected_image_BD, image_BD, expected_text_BD[:num_spread]
    )
    text = _compare_tower(f"{folder}: text tower", precision, captions, expected_text_BD, text_BD, expected_image_BD)
    about = {
        "worst_prompt": captions[text["worst_sample"]],
        "num_prompts": int(saved.get("num_prompts", len(captions))),
    }
    return {"image": image, "text": cast(TextParity, {**text, **about})}


def _compare_tower(
    tower: str,
    precision: str,
    names: Sequence[str],
    expected_BD: NDArray[np.float32],
    actual_BD: NDArray[np.float32],
    candidates_KD: NDArray[np.float32],
) -> TowerParity:
    """Compare a tower's features with PyTorch's, and their nearest neighbours among the other tower's features.

    Raises:
        GateError: as `compare`, or too few samples keep their nearest candidate.
    """
    what, bounds = f"{tower}, {precision}", PRECISIONS[precision]
    compared = compare(
        expected_BD,
        actual_BD,
        min_sqnr_db=bounds.min_sqnr_db,
        names=names,
        what=what,
        max_share_below=bounds.max_share_below,
    )
    agreement = _top1_agreement(expected_BD.astype(np.float64), actual_BD.astype(np.float64), candidates_KD)
    if not agreement >= bounds.min_top1_agreement:
        raise GateError(
            f"{what}: {agreement:.1%} of {len(names)} samples keep their nearest neighbour in the other tower, "
            f"expected at least {bounds.min_top1_agreement:.0%}. Export it again: clipkd export RUN --onnx"
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
    """Return how far preprocessing in the graph, in its runtime, changes pixels (in grey levels) and features.

    Both functions take RGB [H, W, 3]. The compared images are the first ones of parity.npz, resized to be larger than
    the model's size, smaller, tall, wide, and equal to it.

    Raises:
        ArtifactError: parity.npz is missing or corrupt.
        GateError: a pixel or a feature differs by more than rounding explains, or differs at all in an image of the
            model's size.
    """
    height, width = as_pair(encoders.image_spec["size"])
    std_C11 = np.array(as_triple(encoders.image_spec["std"]), np.float32).reshape(3, 1, 1)
    apart: list[NDArray[np.float32]] = []
    expected, actual, names = [], [], []
    for pixels_HWC in _read_samples(folder)["pixels_BHWC"][:_NUM_RESIZED]:
        for what, (tall, wide) in _RESIZED.items():
            size = max(1, round(wide * width)), max(1, round(tall * height))
            resized = Image.fromarray(pixels_HWC).resize(size, Image.Resampling.BICUBIC)
            pixel_values_CHW, seen = encoders.preprocess(resized), np.asarray(resized)
            names.append(f"{what}, {size[0]}x{size[1]}")
            levels = 255 * std_C11 * np.abs(pixel_values_of(seen)[0] - pixel_values_CHW)
            bound = MAX_LEVELS + _SAME_LEVEL if what != "equal" else _SAME_LEVEL
            if not levels.max() <= bound:
                raise GateError(
                    f"{folder}: preprocessing in the graph differs from Pillow's by {levels.max():.3g} grey levels on "
                    f"an image ({names[-1]}), expected at most {bound:g}. "
                    "Export without it: --set export.uint8_input=false"
                )
            apart.append(levels.ravel())
            expected.append(encoders.encode_pixels(pixel_values_CHW[None]))
            actual.append(features_of(seen))
    share = float((np.concatenate(apart) > _SAME_LEVEL).mean())
    if not share <= MAX_LEVELS_SHARE:
        raise GateError(
            f"{folder}: preprocessing in the graph differs from Pillow's in {share:.1%} of all values, expected at "
            f"most {MAX_LEVELS_SHARE:.0%}. Export without it: --set export.uint8_input=false"
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
_SAME_LEVEL = 0.01  # grey levels: the error of float32 arithmetic on normalized values


def compare(
    reference_BD: NDArray[np.float32],
    actual_BD: NDArray[np.float32],
    *,
    min_sqnr_db: float,
    names: Sequence[str],
    what: str,
    max_share_below: float = 0.0,
) -> Comparison:
    """Return the worst row's numbers of a comparison row by row, in float64.

        SQNR_i = 10 log10( |reference_i|^2 / |reference_i - actual_i|^2 )  dB, at most EXACT_DB

    Raises:
        GateError: the SQNR of more than a share `max_share_below` of the rows is below `min_sqnr_db`, or a row is not
            finite, or the shapes differ.
    """
    if reference_BD.shape != actual_BD.shape or not len(reference_BD):
        raise GateError(f"{what}: expected features {list(reference_BD.shape)}, got {list(actual_BD.shape)}")
    if not np.isfinite(reference_BD).all():
        wrong = np.flatnonzero(~np.isfinite(reference_BD).all(-1))
        raise GateError(
            f"{what}: PyTorch's own features of {len(wrong)} of {len(names)} samples are NaN or infinite, the first is "
            f"sample {wrong[0]} ({names[wrong[0]]!r}). The checkpoint is unusable; train it again, or use other weights"
        )
    reference_BD, actual_BD = reference_BD.astype(np.float64), actual_BD.astype(np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        signal_B = (reference_BD**2).sum(-1)
        noise_B = ((reference_BD - actual_BD) ** 2).sum(-1)
        sqnr_db_B = np.minimum(10 * np.log10(signal_B / noise_B), EXACT_DB)
        cosine_B = (reference_BD * actual_BD).sum(-1) / np.sqrt(signal_B * (actual_BD**2).sum(-1))
    worst = int(np.argmin(sqnr_db_B))  # argmin returns a NaN first
    num_below = int((~(sqnr_db_B >= min_sqnr_db)).sum())  # not `<`: NaN must fail
    num_not_finite = int((~np.isfinite(actual_BD)).sum())
    if num_not_finite or num_below > max_share_below * len(names):
        allowed = f"; {num_below:,} are below, at most {max_share_below:.0%} may be" if max_share_below else ""
        raise GateError(
            f"{what}: sample {worst} of {len(names)} ({names[worst]!r}) differs from PyTorch: SQNR "
            f"{sqnr_db_B[worst]:.1f} dB, expected at least {min_sqnr_db:g} dB; cosine {cosine_B[worst]:.6f}{allowed}. "
            "Export it again: clipkd export RUN --onnx"
        )
    return {
        "min_cosine": float(cosine_B.min()),
        "min_sqnr_db": float(sqnr_db_B[worst]),
        "worst_sample": worst,
        "num_samples": len(reference_BD),
        "num_below": num_below,
        "num_not_finite": num_not_finite,
    }


def _top1_agreement(
    reference_BD: NDArray[np.floating], actual_BD: NDArray[np.floating], candidates_KD: NDArray[np.float32]
) -> float:
    """Return the share of rows whose nearest candidate is the reference's, or within TIE of it in the reference.

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
            f"{folder}: preprocessing returns pixel_values {list(actual_FCHW.shape)}, "
            f"expected {list(expected_FCHW.shape)}; see preprocess.json"
        )
    error_F = np.abs(actual_FCHW - expected_FCHW).max((1, 2, 3))
    worst = int(np.argmax(error_F))  # argmax returns a NaN first
    if not error_F[worst] <= MAX_PIXEL_ERROR:
        raise GateError(
            f"{folder}: preprocessing of sample {worst} ({names[worst]!r}) differs from open_clip's by "
            f"{error_F[worst]:.2g}, expected at most {MAX_PIXEL_ERROR:g}; see 'image' in preprocess.json"
        )


def _check_ids(
    folder: Path, expected_BT: NDArray[np.int64], actual_BT: NDArray[np.int64], names: Sequence[str]
) -> None:
    if actual_BT.shape != expected_BT.shape:
        raise GateError(
            f"{folder}: the tokenizer returns input_ids {list(actual_BT.shape)}, expected {list(expected_BT.shape)}"
        )
    wrong_B = (actual_BT != expected_BT).any(-1)
    if wrong_B.any():
        worst = int(np.argmax(wrong_B))
        raise GateError(
            f"{folder}: the tokenizer in tokenizer.json differs from open_clip's on sample {worst} of {len(names)} "
            f"({names[worst]!r}): expected {expected_BT[worst].tolist()}, got {actual_BT[worst].tolist()}"
        )


def _decode(captions: NDArray[Any]) -> list[str]:
    """Return captions, which are stored as UTF-8; early versions stored them as text."""
    texts: list[str] = (np.char.decode(captions, "utf-8") if captions.dtype.kind == "S" else captions).tolist()
    return texts


def _read_samples(folder: Path) -> dict[str, NDArray[Any]]:
    path = folder / "parity.npz"
    try:
        with path.open("rb") as file, np.load(file) as saved:  # np.load leaves an unreadable file open
            return dict(saved)
    except FileNotFoundError:
        raise ArtifactError(f"{path}: missing. Export it again: clipkd export RUN --onnx") from None
    except (ValueError, OSError, BadZipFile) as error:  # not an archive, or cut short
        raise ArtifactError(f"{path}: corrupt: {error}. Export it again: clipkd export RUN --onnx") from None
