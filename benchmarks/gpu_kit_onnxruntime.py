"""Pack ONNX Runtime's GPU package small enough to be carried: for one kind of GPU, without kernels that no CLIP runs.

    python benchmarks/gpu_kit_onnxruntime.py onnxruntime_gpu-1.31.1-cp312-….whl onnxruntime_gpu.tar.xz [--sm 90]

Of the wheel's 256 MB, 231 MB are libonnxruntime_providers_cuda.so: 284 MB, which xz -9 makes no smaller than 185 MB,
because the kernels in it are compressed already, once for each of six kinds of GPUs.  This program overwrites with
zeros the kernels of all other kinds, and of files that were compiled for newer kinds alone (attention of language
models, mixtures of experts): the library keeps its layout, and CUDA loads a kernel only when it is first called.  What
is left compresses to 39 MB, and the Python module to 9 MB.  The result is for measuring only, on a GPU of that kind.

The layout of a "fat binary" is read as the CUDA toolkit's `cuobjdump` shows it: a header (magic number, version, size
of the header, size of the rest), then entries of a header and a payload; an entry's header has the size of both and the
compute capability.
"""

import argparse
import io
import lzma
import struct
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

LIBRARY = "onnxruntime/capi/libonnxruntime_providers_cuda.so"
_UNUSED = ("libonnxruntime.so", "libonnxruntime_providers_tensorrt.so", "ThirdPartyNotices.txt")
_UNUSED_FOLDERS = tuple(f"onnxruntime/{name}/" for name in ("transformers", "quantization", "tools", "datasets"))
_MAGIC = struct.pack("<I", 0xBA55ED50)
_OLDEST_GENERAL = 80  # files compiled for this kind too hold the kernels that every GPU needs


class Entry(NamedTuple):
    """A compiled kernel file in a fat binary: the kind of GPU, and where its payload is."""

    sm: int
    start: int
    size: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", type=Path)
    parser.add_argument("packed", type=Path)
    parser.add_argument("--sm", type=int, default=90, help="compute capability without the point; 90 is Hopper")
    given = parser.parse_args()
    with (
        zipfile.ZipFile(given.wheel) as wheel,
        lzma.open(given.packed, "wb", preset=6) as compressed,
        tarfile.open(fileobj=compressed, mode="w|") as archive,
    ):
        for name in sorted(wheel.namelist()):
            if Path(name).name.startswith(_UNUSED) or name.startswith(_UNUSED_FOLDERS) or name.endswith("/"):
                continue
            content = wheel.read(name)
            if name == LIBRARY:
                content, kept = keep_kernels(content, given.sm)
                print(f"{name}: {kept / 1e6:.1f} MB of kernels for sm_{given.sm} kept")
            info = tarfile.TarInfo(name)
            info.size, info.mode = len(content), 0o755 if ".so" in name else 0o644
            archive.addfile(info, io.BytesIO(content))
    print(f"{given.packed}: {given.packed.stat().st_size / 2**20:.1f} MiB")


def keep_kernels(library: bytes, sm: int) -> tuple[bytes, int]:
    """Return a library with other kernels overwritten by zeros, and the bytes of the kernels that were kept.

    Raises:
        SystemExit: it has no kernels for `sm`.
    """
    changed, kept = bytearray(library), 0
    for entries in fat_binaries(library):
        is_general = any(entry.sm == _OLDEST_GENERAL for entry in entries)
        for entry in entries:
            if entry.sm == sm and is_general:
                kept += entry.size
            else:
                changed[entry.start : entry.start + entry.size] = bytes(entry.size)
    if not kept:
        raise SystemExit(f"no kernels for sm_{sm} were found")
    return bytes(changed), kept


def fat_binaries(library: bytes) -> Iterator[list[Entry]]:
    """Yield the entries of each fat binary of a library."""
    at = library.find(_MAGIC)
    while at >= 0:
        _, version, header, size = struct.unpack_from("<IHHQ", library, at)
        end = at + header + size
        if version == 1 and header == 16 and end <= len(library):
            yield list(_entries(library, at + header, end))
            at = library.find(_MAGIC, end)
        else:  # other data with the same four bytes
            at = library.find(_MAGIC, at + 4)


def _entries(library: bytes, at: int, end: int) -> Iterator[Entry]:
    while at < end:
        _, _, header, size = struct.unpack_from("<HHIQ", library, at)
        (sm,) = struct.unpack_from("<I", library, at + 28)
        yield Entry(sm, at + header, size)
        at += header + size


if __name__ == "__main__":
    main()
