"""Read a teacher cache: a frozen teacher's features of every stored view and caption, computed once.

    NAME/cache.json            the teacher, data and storage of the features; other recipes are refused
    NAME/00000.safetensors     the features of `shard_samples` samples, memory-mapped for reading

A shard is a function of the teacher, the data and its number, so any rank can make any shard, and a killed rank leaves
only complete shards.  A shard stores each text once and finds it by (sample, caption index), so nothing ever holds the
captions of all samples.
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
_OF_THE_TEACHER = {"embed_dim", "logit_scale", "logit_bias"}  # read from its weights, which are compared by hash
_OPEN_SHARDS = 1024  # mappings per process; the system allows about 65,000


@dataclass(frozen=True)
class TeacherCache:
    """A finished cache; each process opens a shard when it first reads it."""

    folder: Path
    about: Mapping[str, Any]

    @property
    def embed_dim(self) -> int:
        return int(self.about["embed_dim"])

    @property
    def logit_scale(self) -> float:
        """The multiplier of cosine similarities."""
        return float(self.about["logit_scale"])

    @property
    def logit_bias(self) -> float | None:
        """The bias of a sigmoid model; None for a softmax model."""
        return self.about.get("logit_bias")

    def features(self, sample_B: NDArray[np.int64], pick_B: NDArray[np.int64], view: int) -> tuple[Tensor, Tensor]:
        """Return image and text features, [B, E] each: float32, rows of unit norm.

        Raises:
            ClipkdError: a sample had no features when the cache was made, or they are not finite.
        """
        size = int(self.about["shard_samples"])
        image_BE, text_BE = torch.empty(2, len(sample_B), self.embed_dim)
        shard_B, row_B = sample_B // size, sample_B % size
        for number in np.unique(shard_B).tolist():
            index_b = np.flatnonzero(shard_B == number)
            row_b = torch.from_numpy(row_B[index_b])
            path = shard_path(self.folder, number)
            shard = _open_shard(path, path.stat().st_mtime_ns)
            stored_b = shard["present"][view, row_b]
            first_b = shard["first_caption"][row_b]
            caption_b = first_b + torch.from_numpy(pick_B[index_b])
            stored_b &= caption_b < shard["first_caption"][row_b + 1]
            if not stored_b.all():
                missing = sample_B[index_b[int(torch.nonzero(~stored_b)[0])]]
                raise ClipkdError(
                    f"{self.folder}: sample {missing} has no features for view {view}: it was unreadable when the "
                    "cache was made and is readable now. Delete this cache and run the command again to rebuild it"
                )
            index = torch.from_numpy(index_b)
            image_BE[index] = _decode_features(shard, "image", (view, row_b))
            text_BE[index] = _decode_features(shard, "text", (shard["text_of_caption"][caption_b].long(),))
        for part, features_BE in (("image", image_BE), ("text", text_BE)):
            wrong_B = ~features_BE.isfinite().all(-1)
            if wrong_B.any():
                first = sample_B[int(torch.nonzero(wrong_B)[0])]
                raise ClipkdError(
                    f"{self.folder}: the stored {part} features of {int(wrong_B.sum())} of {len(wrong_B)} samples are "
                    f"not finite, the first is sample {first} (view {view}). Delete this cache and run the command "
                    "again to rebuild it"
                )
        return image_BE, text_BE


@dataclass(frozen=True)
class TeacherCaches:
    """The caches of several teachers of the same data.  Their features stand side by side, in E columns in all.

    The teachers may differ in everything: each cache was made with its own teacher's tokenizer and image size.
    """

    members: tuple[TeacherCache, ...]

    @property
    def widths(self) -> tuple[int, ...]:
        return tuple(member.embed_dim for member in self.members)

    @property
    def embed_dim(self) -> int:
        return sum(self.widths)

    def features(self, sample_B: NDArray[np.int64], pick_B: NDArray[np.int64], view: int) -> tuple[Tensor, Tensor]:
        """Return image and text features, [B, E] each: float32, the columns of each teacher of unit norm.

        Raises:
            ClipkdError: as for `TeacherCache`.
        """
        image, text = zip(*(member.features(sample_B, pick_B, view) for member in self.members), strict=True)
        return torch.cat(image, dim=1), torch.cat(text, dim=1)


def shard_path(folder: Path, number: int) -> Path:
    return folder / f"{number:05d}.safetensors"


def open_cache(folder: Path, expected: Mapping[str, Any]) -> TeacherCache:
    """Open a finished cache and check that it matches `expected`.

    Raises:
        ArtifactError: there is no cache, or it does not match; the message lists the differences.
    """
    refuse_foreign(folder, expected)
    try:
        about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ArtifactError(f"{folder}: no {ABOUT}; not a teacher cache. Make one with: clipkd cache") from None
    return TeacherCache(folder, about)


def refuse_foreign(folder: Path, expected: Mapping[str, Any]) -> None:
    """Refuse to overwrite a complete or partial cache that does not match `expected`: it may have taken days.

    Raises:
        ArtifactError: the cache does not match; the message lists the differences.
    """
    for candidate in (folder, partial_path(folder)):
        try:
            found = json.loads((candidate / ABOUT).read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            continue
        wanted, got = _flatten(expected), _flatten(found)
        different = [
            f"{field}: expected {wanted.get(field, 'nothing')}, got {got.get(field, 'nothing')}"
            for field in sorted({*wanted, *got} - _OF_THE_TEACHER)
            if wanted.get(field) != got.get(field)
        ]
        if different:
            raise ArtifactError(
                f"{candidate}: this teacher cache does not match the recipe: {'; '.join(different)}. "
                "Delete it to make a new one, or choose another run directory"
            )


def _flatten(fields: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in json.loads(json.dumps(fields)).items():
        flat |= _flatten(value, f"{above}{name}.") if isinstance(value, dict) else {f"{above}{name}": value}
    return flat


def encode_features(name: str, features_XE: Tensor, dtype: StoredDtype) -> dict[str, Tensor]:
    """Return features in their storage format; int8 has one scale per row."""
    if dtype != "int8":
        return {name: features_XE.to(STORED[dtype])}
    scale_X1 = features_XE.abs().amax(-1, keepdim=True) / 127
    whole_XE = (features_XE / scale_X1.clamp(min=torch.finfo(torch.float32).tiny)).round().to(torch.int8)
    return {name: whole_XE, f"{name}_scale": scale_X1[..., 0].contiguous()}


def _decode_features(shard: Mapping[str, Tensor], name: str, index: tuple[Any, ...]) -> Tensor:
    """Return rows [B, E] in float32, normalized again if storage rounded them."""
    stored_BE = shard[name][index]
    if stored_BE.dtype == torch.float32:
        return stored_BE
    wide_BE = stored_BE.float()
    if f"{name}_scale" in shard:
        wide_BE = wide_BE * shard[f"{name}_scale"][index][:, None]
    return nn.functional.normalize(wide_BE, dim=-1)


@lru_cache(maxsize=_OPEN_SHARDS)
def _open_shard(path: Path, written_ns: int) -> dict[str, Tensor]:
    """Memory-map the arrays of a shard: data is read on access, and no file stays open.

    `written_ns` is part of the cache key: it distinguishes a shard from an earlier one of the same name.
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
