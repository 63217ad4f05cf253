"""Pack training data into webdataset shards with an index: images copied byte for byte, corrupt samples skipped.

A shard is written to a temporary file and renamed, and `.pack.json` then records how far the source has been read.
After any interruption, the same command resumes at the last whole shard and produces the same bytes.  The index is
written last, so a folder that has one is complete.
"""

import hashlib
import io
import itertools
import json
import os
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from toolchain.data.bad_samples import count_passed_over
from toolchain.data.images import SUFFIXES_OF_FORMAT
from toolchain.data.open import count_stored_samples, fingerprint, list_stored_samples
from toolchain.data.stored_samples import CorruptSample, ReadSample, Sample, read_and_decode
from toolchain.errors import ArtifactError, UsageError
from toolchain.filesystem import hold_lock, write_json
from toolchain.progress import Progress, no_progress
from toolchain.recipe.data import DataSpec, MixtureSpec

INDEX = "index.json"
_PROGRESS, _LOCK, _SHARD_PARTIAL = ".pack.json", ".lock", ".shard.partial"
_FORMAT = 1
_EXAMPLES = 5

Document = dict[str, Any]


def pack(
    spec: DataSpec,
    out: Path,
    *,
    samples_per_shard: int = 10_000,
    progress: Progress = no_progress,
) -> Document:
    """Write a source's good samples to `out` as 00000.tar, 00001.tar, ... in the source's order; return their index.

    Each image is decoded once to find corrupt ones, and stored unchanged.  One caption becomes a .txt, several become a
    .json.  The bytes written depend on the source alone.

    Raises:
        UsageError: the source stores no images; or as for `toolchain.data.open.list_stored_samples`.
        ArtifactError: `out` contains other files, or another process is packing into it.
        ClipkdError: as for `toolchain.data.open.list_stored_samples`.
    """
    if not spec.is_stored:
        raise UsageError(
            f"data.kind {spec.kind}: its images are drawn during training and never stored, so there is nothing to "
            "pack. Give a source of image files"
        )
    if spec.captionless_kind:
        raise UsageError(
            f"data.kind {spec.captionless_kind}: its images have no captions, which shards need. "
            "Train from the folder itself"
        )
    asked = {
        "format": _FORMAT,
        "source": fingerprint(spec),
        "caption_fields": _caption_fields(spec),
        "samples_per_shard": samples_per_shard,
    }
    _make_folder(out)
    with hold_lock(out / _LOCK, f"{out}: another clipkd is packing into it; wait for it, or choose another --out"):
        index = _read(out / INDEX)
        if index is None:
            index = _pack_shards(spec, out, asked, progress)
            write_json(out / INDEX, index)
        _refuse_others(out, asked, index)
        for name in (_PROGRESS, _SHARD_PARTIAL):
            (out / name).unlink(missing_ok=True)
        return index


def _pack_shards(spec: DataSpec, out: Path, asked: Document, progress: Progress) -> Document:
    """Write the shards that are still missing, and return the index of all."""
    state = _read(out / _PROGRESS) or {**asked, "shards": [], "left_out": {}, "passed": 0}
    _refuse_others(out, asked, state)
    write_json(out / _PROGRESS, state)
    total, left_out = count_stored_samples(spec, progress)
    rest = itertools.islice(list_stored_samples(spec), state["passed"], None)
    while state["passed"] < total:
        _add_shard(out, state, rest, lambda passed: progress("packing samples", passed, total))
        write_json(out / _PROGRESS, state)
    sums = {what: sum(shard[what] for shard in state["shards"]) for what in ("samples", "captions", "bytes")}
    passed_over = count_passed_over(left_out)
    others = {"passed_over": passed_over} if passed_over else {}
    return {**asked, **sums, "left_out": state["left_out"], **others, "shards": state["shards"]}


def _add_shard(out: Path, state: Document, rest: Iterator[ReadSample], passed: Callable[[int], None]) -> None:
    """Write the next shard; record its content, the skipped samples and the position in the source in `state`."""
    number, row, captions = len(state["shards"]), 0, 0
    digits = max(4, len(str(state["samples_per_shard"] - 1)))  # img2dataset's keys have 4
    partial = out / _SHARD_PARTIAL
    with partial.open("wb") as file:
        with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as archive:
            for read_sample in rest:
                state["passed"] += 1
                passed(state["passed"])
                found = read_and_decode(read_sample)
                if isinstance(found, CorruptSample):
                    _note(state["left_out"], found)
                    continue
                sample, image = found
                for suffix, content in _files(sample, SUFFIXES_OF_FORMAT[image.format][0]):
                    info = tarfile.TarInfo(f"{number:05d}{row:0{digits}d}.{suffix}")  # no time or owner
                    info.size = len(content)
                    archive.addfile(info, io.BytesIO(content))
                row, captions = row + 1, captions + len(sample.captions)
                if row == state["samples_per_shard"]:
                    break
        file.flush()
        os.fsync(file.fileno())
    if row == 0:  # the rest of the source was corrupt
        return
    name, digest = f"{number:05d}.tar", hashlib.sha256()
    with partial.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    size_bytes = partial.stat().st_size
    partial.replace(out / name)
    state["shards"].append(
        {"name": name, "samples": row, "captions": captions, "bytes": size_bytes, "sha256": digest.hexdigest()}
    )


def _files(sample: Sample, suffix: str) -> list[tuple[str, bytes]]:
    """Return the suffix and content of each of a sample's files."""
    image = [(suffix, sample.image)]
    if not sample.captions:
        return image
    # A reader drops a byte-order mark at the start of a .txt, because it looks like the mark of the file.
    if len(sample.captions) == 1 and not sample.captions[0].startswith("\ufeff"):
        return [*image, ("txt", sample.captions[0].encode())]
    return [*image, ("json", json.dumps({"caption": list(sample.captions)}, ensure_ascii=False).encode())]


def _note(left_out: Document, damage: CorruptSample) -> None:
    found = left_out.setdefault(damage.reason, {"count": 0, "examples": []})
    found["count"] += 1
    if len(found["examples"]) < _EXAMPLES:
        found["examples"].append(damage.where + (f": {damage.detail}" if damage.detail else ""))


# The folder


def _make_folder(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
        others = sorted(path.name for path in out.iterdir() if path.name != _LOCK and path.suffix != ".partial")
        foreign = bool(others) and INDEX not in others and _PROGRESS not in others
        if not foreign:
            (out / _LOCK).touch()
    except OSError as error:
        raise ArtifactError(
            f"{out}: cannot be used as the output directory: {error.strerror}. Choose another --out"
        ) from None
    if foreign:
        raise ArtifactError(
            f"{out}: contains {others[0]}, which clipkd did not write; shards would mix with it. Choose another --out"
        )


def _caption_fields(spec: DataSpec) -> Document:
    """Return the fields of a source that decide which captions its images have, beside its files."""
    if isinstance(spec, MixtureSpec):
        return {"sources": [_caption_fields(source) for source in spec.sources]}
    fields = {"caption_key", "image_column", "caption_column", "delimiter", "quoted", "templates"}
    return spec.model_dump(mode="json", include=fields, exclude_none=True)


def _refuse_others(out: Path, asked: Document, found: Document) -> None:
    """Refuse to resume a packing that was started from a different source or with different settings."""
    words = {
        "caption_fields": "choice of captions",
        "format": "version of the format",
        "source": "source (its files' names and sizes, or which of them count as samples)",
    }
    found = {"caption_fields": asked["caption_fields"], **found}  # folders of an earlier clipkd do not record them
    other = [words.get(key, key) for key, value in asked.items() if found.get(key) != value]
    if other:
        raise ArtifactError(
            f"{out}: was packed with a different {' and '.join(other)}. Choose another --out, or remove it"
        )


def _read(path: Path) -> Document | None:
    try:
        document: Document = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ArtifactError(f"{path}: not written by `clipkd data pack`: {error}. Remove {path.parent}") from None
    return document
