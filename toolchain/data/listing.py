"""Define the protocol of a sample listing, and read the files and folders that listings need.

Importing this module needs no torch.
"""

import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from toolchain.data.bad_samples import NO_FILE, TOO_LARGE, LeftOut, UnusableError
from toolchain.data.images import is_image_name
from toolchain.errors import ClipkdError, UsageError

_LARGEST_FILE = 1 << 28  # bytes; a larger file is not a photograph and is not read


class Listing(Protocol):
    """Images and their captions, by sample number."""

    @property
    def left_out(self) -> tuple[LeftOut, ...]: ...

    def __len__(self) -> int: ...

    def image_path(self, sample: int) -> Path:
        """Return the file of a sample's image."""
        ...

    def captions(self, sample: int) -> tuple[str, ...]:
        """Return all captions of a sample.

        Raises:
            UnusableError: the sample has no caption.
        """
        ...

    def describe(self, sample: int) -> str:
        """Return a sample's name for messages."""
        ...


def read_file(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ClipkdError(f"{path}: cannot be read: {error.strerror}") from None


def require_file(name: str) -> Path:
    if not Path(name).is_file():
        raise UsageError(f"data: {name}: no such file (searched in {Path.cwd()})")
    return Path(name)


def require_folder(name: str) -> Path:
    if not Path(name).is_dir():
        raise UsageError(f"data.path: {name}: no such folder (searched in {Path.cwd()})")
    return Path(name)


def list_images(root: Path) -> Iterator[Path]:
    """Yield the images below a folder sorted by name, in the same order on every file system.

    Links to folders are not followed.
    """
    for folder, subfolders, names in os.walk(root):
        subfolders.sort(key=os.fsencode)
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        for name in sorted(names, key=os.fsencode):
            path = Path(folder, name)
            if not name.startswith(".") and is_image_name(name) and path.exists():
                yield path


def read_image(path: Path) -> bytes:
    """Return the content of an image file.

    Raises:
        UnusableError: the file is missing, is not a regular file, or is too large for one image.
    """
    try:
        about = path.stat()
        if not stat.S_ISREG(about.st_mode):
            raise UnusableError(NO_FILE, "it is not a file")
        if about.st_size > _LARGEST_FILE:
            raise UnusableError(TOO_LARGE, f"{about.st_size:,} bytes")
        return path.read_bytes()
    except (OSError, ValueError) as error:  # a name may contain a zero byte
        raise UnusableError(NO_FILE, getattr(error, "strerror", None) or str(error)) from error
