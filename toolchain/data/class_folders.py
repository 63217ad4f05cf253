"""Read classes from folders by one rule for training and evaluation: CLASS/IMAGE, and the names of the classes.

Importing this module needs no torch.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from toolchain.data.bad_samples import LeftOut, count_passed_over, merge_left_out, to_utf8
from toolchain.data.images import is_image_name
from toolchain.data.listing import is_ignored, list_images, pass_over
from toolchain.errors import UsageError, name_some


class ClassImages(NamedTuple):
    """The images of each class, and the entries that are none."""

    paths_K: list[list[str]]
    left_out: tuple[LeftOut, ...]


def read_class_name(text: str) -> str:
    """Return a class name as prompts show it: without surrounding white space, with spaces for underscores."""
    return to_utf8(text).replace("_", " ").strip()


def list_class_folders(root: Path, field: str) -> list[str]:
    """Return the names of the folders in a folder, sorted; hidden ones are ignored.

    Raises:
        UsageError: there are none; `field` is the recipe's.
        OSError: the folder cannot be read.
    """
    folders = sorted(
        (path.name for path in root.iterdir() if path.is_dir() and not is_ignored(path.name)), key=os.fsencode
    )
    if not folders:
        raise UsageError(f"{field}: {root}: expected one folder of images per class, CLASS/IMAGE; found no folder")
    return folders


def list_class_images(root: Path, folders: Sequence[str], field: str) -> ClassImages:
    """Return the images of each class folder, including those in its subfolders.

    Raises:
        UsageError: a class folder has no image.
        OSError: a folder cannot be read.
    """
    paths_K: list[list[str]] = []
    left_out: list[LeftOut] = []
    for path in sorted(root.iterdir()):
        if not path.is_dir() and not is_ignored(path.name):
            left = pass_over(path)
            outside = f"{left.reason} outside the class folders"
            left_out.append(left._replace(reason=outside) if is_image_name(path.name) else left)
    empty = []
    for folder in folders:
        found = list_images(root / folder)
        paths_K.append(found.paths)
        left_out += found.left_out
        if not found.paths:
            held = name_some(f"{number:,} {suffix}" for suffix, number in count_passed_over(found.left_out).items())
            empty.append(f"{folder} (it has {held})" if held else folder)
    if empty:
        raise UsageError(
            f"{field}: {root}: {len(empty):,} of {len(folders):,} class folders have no image: "
            f"{to_utf8(name_some(empty))}. Add images that can be read, or remove the folder"
        )
    return ClassImages(paths_K, merge_left_out(left_out))
