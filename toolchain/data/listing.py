"""Define the protocol of a sample listing, and read the files and folders that listings need.

Importing this module needs no torch.
"""

import os
import stat
from array import array
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple, NoReturn, Protocol, overload

from toolchain.data.bad_samples import NO_FILE, TOO_LARGE, LeftOut, UnusableError, merge_left_out, to_utf8
from toolchain.data.file_content import HEAD_BYTES, name_bad_text
from toolchain.data.images import is_image_name
from toolchain.errors import ClipkdError, UsageError

_LARGEST_FILE = 1 << 28  # bytes; a larger file is not a photograph and is not read
_IGNORED_FILES = frozenset({"Thumbs.db", "desktop.ini"})  # written by file managers


class Listing(Protocol):
    """Images and their captions, by sample number."""

    @property
    def left_out(self) -> tuple[LeftOut, ...]:
        """Entries that are no usable sample, and files that are no samples."""
        ...

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


class PackedStrings(Sequence[str]):
    """Strings in one block of memory, about 8 bytes more than their text.

    Reading a list of strings writes their reference counts, so each forked worker would copy the whole list in time.
    """

    def __init__(self, strings: Iterable[str]) -> None:
        content, self._ends_N = bytearray(), array("q", [0])
        for string in strings:
            content += os.fsencode(string)
            self._ends_N.append(len(content))
        self._content = bytes(content)

    def __len__(self) -> int:
        return len(self._ends_N) - 1

    @overload
    def __getitem__(self, index: int) -> str: ...

    @overload
    def __getitem__(self, index: slice) -> list[str]: ...

    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        return os.fsdecode(self._content[self._ends_N[index] : self._ends_N[index + 1]])


def read_file(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ClipkdError(f"{path}: cannot be read: {error.strerror}") from None


def read_text(path: Path, where: str = "") -> str:
    """Return a text file in UTF-8, with or without a byte-order mark; `where` begins an error message.

    Raises:
        UsageError: the file is not UTF-8; the message names its content if it is known.
        ClipkdError: the file cannot be read.
    """
    return decode_text(read_file(path), f"{where}{path}")


def decode_text(content: bytes, name: str) -> str:
    """Return text decoded from UTF-8, with or without a byte-order mark.

    Raises:
        UsageError: it is not UTF-8; the message names the content if it is known.
    """
    known = name_bad_text(content[:HEAD_BYTES])
    if known:
        raise UsageError(f"{name}: expected text in UTF-8; it is {known}")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise UsageError(f"{name}: line {line}: is not UTF-8: {error.reason}; save the file as UTF-8") from None


def _describe_search(name: str) -> str:
    return "a recipe does not expand ~; write the whole path" if name.startswith("~") else f"searched in {Path.cwd()}"


def require_file(name: str) -> Path:
    if Path(name).is_dir():
        raise UsageError(f"data: {name}: is a folder; expected a file")
    if not Path(name).is_file():
        raise UsageError(f"data: {name}: no such file ({_describe_search(name)})")
    return Path(name)


def require_folder(name: str) -> Path:
    if Path(name).is_file():
        raise UsageError(f"data.path: {name}: is a file; expected a folder; data.kind is csv or webdataset for files")
    if not Path(name).is_dir():
        raise UsageError(f"data.path: {name}: no such folder ({_describe_search(name)})")
    return Path(name)


class FolderImages(NamedTuple):
    """The images below a folder, and the entries that are none."""

    paths: list[str]
    left_out: tuple[LeftOut, ...]


def list_images(root: Path) -> FolderImages:
    """List the images below a folder sorted by name, in the same order on every file system.

    Hidden entries and files of file managers are ignored.  All other entries that are no image are counted by suffix:
    files, links to folders, which are not followed, and links to images that do not exist.

    Raises:
        OSError: a folder cannot be read.
    """
    paths: list[str] = []
    left_out: list[LeftOut] = []
    for folder, subfolders, names in os.walk(root, onerror=_raise):
        subfolders.sort(key=os.fsencode)
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        links = [Path(folder, name) for name in subfolders if Path(folder, name).is_symlink()]
        left_out += [LeftOut("link to a folder", 1, (to_utf8(str(link)),), is_sample=False) for link in links]
        for name in sorted(names, key=os.fsencode):
            path = Path(folder, name)
            if is_ignored(name):
                continue
            if not is_image_name(name):
                left_out.append(pass_over(path))
                if len(left_out) > 1000:  # a caption file beside each of a million images
                    left_out = list(merge_left_out(left_out))
            elif path.exists():
                paths.append(str(path))
            else:
                left_out.append(LeftOut(NO_FILE, 1, (to_utf8(f"{path}: a link to a file that does not exist"),)))
        left_out = list(merge_left_out(left_out))
    return FolderImages(paths, tuple(left_out))


def is_ignored(name: str) -> bool:
    """Return True for hidden entries and for the files that file managers write."""
    return name.startswith(".") or name in _IGNORED_FILES


def pass_over(path: Path) -> LeftOut:
    """Return a file that is no sample, to be counted by its suffix."""
    return LeftOut(to_utf8(path.suffix.lower()) or "without suffix", 1, (to_utf8(str(path)),), is_sample=False)


def _raise(error: OSError) -> NoReturn:
    raise error  # os.walk would leave out a folder that cannot be read


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
