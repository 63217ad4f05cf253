"""A frozen teacher's features of every stored view and every caption: computed once, looked up in training.

    NAME/cache.json            what the features belong to; a recipe that asks for anything else is refused
    NAME/00000.safetensors     the features of `shard_samples` samples, memory-mapped where they are read

A shard is a function of the teacher, the data and its number: any process makes any shard, and a killed one leaves
whole shards only.  The texts of a shard are stored once each and found by (sample, which of its captions), so that
nothing ever holds the captions of all samples.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from toolchain.errors import ArtifactError, ClipkdError
from toolchain.filesystem import partial_path
from toolchain.recipe.section import StoredDtype

ABOUT = "cache.json"
STORED = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "int8": torch.int8}
_SAFETENSORS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I8": torch.int8}
_SAFETENSORS |= {"I32": torch.int32, "I64": torch.int64, "BOOL": torch.bool}
_OPEN_SHARDS = 1024  # mappings per process; the system allows some 65,000


@dataclass(frozen=True)
class TeacherCache:
    """A finished cache; its shards are opened when they are first read, in whichever process reads them."""

    folder: Path
    about: Mapping[str, Any]

    @property
    def embed_dim(self) -> int:
        return int(self.about["embed_dim"])

    @property
    def logit_scale(self) -> float:
        """The multiplier."""
        return float(self.about["logit_scale"])

    def features(self, sample_B: NDArray[np.int64], pick_B: NDArray[np.int64], view: int) -> tuple[Tensor, Tensor]:
        """Return image and text features [B, E] each, float32, unit rows.

        Raises:
            ClipkdError: a sample had none when the cache was made.
        """
        size = int(self.about["shard_samples"])
        image_BE, text_BE = torch.empty(2, len(sample_B), self.embed_dim)
        shard_B, row_B = sample_B // size, sample_B % size
        for number in np.unique(shard_B).tolist():
            place_b = np.flatnonzero(shard_B == number)
            row_b = torch.from_numpy(row_B[place_b])
            path = shard_path(self.folder, number)
            shard = _open_shard(path, path.stat().st_mtime_ns)
            stored_b = shard["present"][view, row_b]
            first_b = shard["first_caption"][row_b]
            caption_b = first_b + torch.from_numpy(pick_B[place_b])
            stored_b &= caption_b < shard["first_caption"][row_b + 1]
            if not stored_b.all():
                missing = sample_B[place_b[int(torch.nonzero(~stored_b)[0])]]
                raise ClipkdError(
                    f"{self.folder}: sample {missing} has no features of view {view}: it could not be read when the "
                    "cache was made, and can be now. Remove this cache and repeat the command to make it again"
                )
            place = torch.from_numpy(place_b)
            image_BE[place] = _decode_features(shard, "image", (view, row_b))
            text_BE[place] = _decode_features(shard, "text", (shard["text_of_caption"][caption_b].long(),))
        return image_BE, text_BE


def shard_path(folder: Path, number: int) -> Path:
    return folder / f"{number:05d}.safetensors"


def open_cache(folder: Path, expected: Mapping[str, Any]) -> TeacherCache:
    """Open a finished cache, which must be what is expected.

    Raises:
        ArtifactError: there is none, or it belongs to something else; the message lists the differences.
    """
    refuse_foreign(folder, expected)
    try:
        about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ArtifactError(f"{folder}: no {ABOUT}; not a teacher cache. Make it with: clipkd cache") from None
    return TeacherCache(folder, about)


def refuse_foreign(folder: Path, expected: Mapping[str, Any]) -> None:
    """Leave a cache alone that was made, or begun, for something else: it may have taken days.

    Raises:
        ArtifactError: it was; the message lists the differences.
    """
    for place in (folder, partial_path(folder)):
        try:
            found = json.loads((place / ABOUT).read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            continue
        wanted, got = _flat(expected), _flat(found)
        different = [
            f"{field}: expected {wanted.get(field, 'nothing')}, got {got.get(field, 'nothing')}"
            for field in sorted({*wanted, *got} - {"embed_dim", "logit_scale"})
            if wanted.get(field) != got.get(field)
        ]
        if different:
            raise ArtifactError(
                f"{place}: this teacher cache does not belong to the recipe: {'; '.join(different)}. "
                "Remove it to have another made, or choose another run directory"
            )


def _flat(fields: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in json.loads(json.dumps(fields)).items():
        flat |= _flat(value, f"{above}{name}.") if isinstance(value, dict) else {f"{above}{name}": value}
    return flat


def encode_features(name: str, features_XE: Tensor, dtype: StoredDtype) -> dict[str, Tensor]:
    """Return features as they are stored; int8 with a scale for each row."""
    if dtype != "int8":
        return {name: features_XE.to(STORED[dtype])}
    scale_X1 = features_XE.abs().amax(-1, keepdim=True) / 127
    whole_XE = (features_XE / scale_X1.clamp(min=torch.finfo(torch.float32).tiny)).round().to(torch.int8)
    return {name: whole_XE, f"{name}_scale": scale_X1[..., 0].contiguous()}


def _decode_features(shard: Mapping[str, Tensor], name: str, index: tuple[Any, ...]) -> Tensor:
    """Return [B, E] float32 rows, of unit norm again where storage rounded them."""
    stored_BE = shard[name][index]
    if stored_BE.dtype == torch.float32:
        return stored_BE
    wide_BE = stored_BE.float()
    if f"{name}_scale" in shard:
        wide_BE = wide_BE * shard[f"{name}_scale"][index][:, None]
    return nn.functional.normalize(wide_BE, dim=-1)


@lru_cache(maxsize=_OPEN_SHARDS)
def _open_shard(path: Path, written_ns: int) -> dict[str, Tensor]:
    """Map the arrays of a shard: nothing is read before it is asked for, and no file stays open.

    `written_ns` tells a shard from one of that name before it.
    """
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    content = torch.from_file(str(path), shared=False, size=path.stat().st_size, dtype=torch.uint8)
    arrays = {}
    for name, described in header.items():
        if name != "__metadata__":
            begin, end = (8 + length + offset for offset in described["data_offsets"])
            arrays[name] = content[begin:end].view(_SAFETENSORS[described["dtype"]]).view(described["shape"])
    return arrays
