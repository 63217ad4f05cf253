"""List the images of class folders and of unlabelled folders.

Importing this module needs no torch.
"""

import random
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from toolchain.data.bad_samples import LeftOut, to_utf8
from toolchain.data.class_folders import list_class_folders, list_class_images, read_class_name
from toolchain.data.listing import PackedStrings, list_images, read_text, require_file, require_folder
from toolchain.errors import UsageError, name_some, quote_start
from toolchain.recipe.data import ImageFolderSpec, ImagesSpec

_PROMPTS_PER_IMAGE = 8


@dataclass(frozen=True)
class ClassFolders:
    """Images in FOLDER/CLASS/IMAGE; their captions are all templates filled with all names of the class."""

    paths_N: Sequence[str]
    class_N: "array[int]"
    captions_K: list[tuple[str, ...]]
    left_out: tuple[LeftOut, ...] = ()

    @classmethod
    def open(cls, spec: ImageFolderSpec) -> "ClassFolders":
        root = require_folder(spec.path)
        folders = list_class_folders(root, "data.path")
        names = None if spec.names is None else _read_names(require_file(spec.names))
        unknown = [folder for folder in folders if names is not None and folder not in names]
        if unknown:
            raise UsageError(
                f"{spec.names}: has no name for {len(unknown)} of {len(folders)} folders: "
                f"{to_utf8(name_some(unknown))}. Add a line FOLDER<tab>NAME for each"
            )
        found = list_class_images(root, folders, "data.path")
        images: list[str] = []
        classes = array("q")
        captions = []
        for k, (folder, paths) in enumerate(zip(folders, found.paths_K, strict=True)):
            called = [folder] if names is None else names[folder]
            captions.append(_make_prompts(spec.templates, [read_class_name(name) for name in called]))
            images += paths
            classes.extend([k] * len(paths))
        return cls(PackedStrings(images), classes, captions, found.left_out)

    def __len__(self) -> int:
        return len(self.paths_N)

    def image_path(self, sample: int) -> Path:
        return Path(self.paths_N[sample])

    def captions(self, sample: int) -> tuple[str, ...]:
        return self.captions_K[self.class_N[sample]]

    def describe(self, sample: int) -> str:
        return to_utf8(self.paths_N[sample])


@dataclass(frozen=True)
class UnlabelledImages:
    """Images without captions; each is shown with a few randomly drawn prompts of the classes."""

    paths_N: Sequence[str]
    prompts: tuple[str, ...]
    left_out: tuple[LeftOut, ...] = ()

    @classmethod
    def open(cls, spec: ImagesSpec) -> "UnlabelledImages":
        lines = read_text(require_file(spec.classes)).splitlines()
        classes = list(dict.fromkeys(read_class_name(line) for line in lines if line.strip()))
        if len(classes) < 2:
            raise UsageError(f"{spec.classes}: expected at least two classes, one per line; got {len(classes)}")
        found = list_images(require_folder(spec.path))
        return cls(PackedStrings(found.paths), _make_prompts(spec.templates, classes), found.left_out)

    def __len__(self) -> int:
        return len(self.paths_N)

    def image_path(self, sample: int) -> Path:
        return Path(self.paths_N[sample])

    def captions(self, sample: int) -> tuple[str, ...]:
        """Return a few prompts; only a few, because a teacher cache stores all of them with the image."""
        count = min(_PROMPTS_PER_IMAGE, len(self.prompts))
        return tuple(random.Random(sample).sample(self.prompts, count))

    def describe(self, sample: int) -> str:
        return to_utf8(self.paths_N[sample])


def _make_prompts(templates: Sequence[str], names: Sequence[str]) -> tuple[str, ...]:
    return tuple(template.replace("{}", name) for name in names for template in templates)


def _read_names(path: Path) -> dict[str, list[str]]:
    names: dict[str, list[str]] = {}
    for number, line in enumerate(read_text(path).splitlines(), 1):
        folder, tab, name = line.partition("\t")
        if line.strip():
            if not tab or not name.strip():
                raise UsageError(f"{path}: line {number}: expected FOLDER<tab>NAME; got {quote_start(line)}")
            names.setdefault(folder.strip(), []).append(name.strip())
    return names
