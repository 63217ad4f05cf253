"""Open evaluation sets in common formats: folders, ImageNet, CLIP_benchmark shards, Karpathy splits, pairs.

No image is dropped: an unreadable image stays in the set and counts as wrong (`zero_shot.py`), and a set with missing
files, or with images in a format that is not read, is refused.  Other files beside the images are counted by suffix.
"""

import csv
import functools
import hashlib
import importlib.util
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from toolchain.data import glyphs
from toolchain.data.bad_samples import LeftOut, count_passed_over
from toolchain.data.class_folders import list_class_folders, list_class_images, read_class_name
from toolchain.data.file_content import is_unread_suffix
from toolchain.data.images import IMAGE_SUFFIXES
from toolchain.data.listing import read_text
from toolchain.data.pairing import explain_missing_image, find_first, group_files
from toolchain.data.tar_files import expand, read_members
from toolchain.errors import ClipkdError, MissingDependency, UsageError, name_some, quote_start
from toolchain.evaluation.eval_set import EvalSet, ImageFile, captions_set, classes_set
from toolchain.recipe.evaluate import (
    ClipBenchmarkSet,
    EvalSetSpec,
    FolderSet,
    ImagenetSet,
    KarpathySet,
    PairsSet,
    set_name,
)
from toolchain.user_documents import InvalidDocument, parse_json, parse_yaml

_SHARD_SUFFIXES = ("webp", "png", *IMAGE_SUFFIXES)  # CLIP_benchmark prefers the first two


def open_set(spec: EvalSetSpec) -> EvalSet:
    """Open the set that an entry of a recipe's evaluate.sets names; its images are not read yet.

    Raises:
        UsageError: files are missing, unexpected or contradictory; the message names the file.
        MissingDependency: the set needs ImageNet's names, and timm or open_clip is not installed.
        ClipkdError: a file or folder cannot be read.
    """
    try:
        match spec:
            case str():
                glyph = glyphs.eval_set(spec)
                return classes_set(spec, glyph.images_KHWC, glyph.names, glyphs.TEMPLATES)
            case FolderSet():
                return _open_folder(spec)
            case ImagenetSet():
                return _open_imagenet(spec)
            case ClipBenchmarkSet():
                return _open_clip_benchmark(spec)
            case KarpathySet():
                return _open_karpathy(spec)
            case PairsSet():
                return _open_pairs(spec)
    except OSError as error:
        raise ClipkdError(f"{_name_field(spec)}: {error.filename}: cannot be read: {error.strerror}") from None


def fingerprint(spec: EvalSetSpec) -> str:
    """Return a hash for stages that read a set: from names, sizes and times of its files; no image is read."""
    if isinstance(spec, str):
        return glyphs.fingerprint()
    digest = hashlib.sha256(spec.model_dump_json(exclude={"name"}).encode())
    for path in open_set(spec).files:
        stat = path.stat()
        digest.update(f"{path}\0{stat.st_size}\0{stat.st_mtime_ns}\0".encode("utf-8", "surrogateescape"))
    if isinstance(spec, FolderSet) and any("_" in name for name in _name_classes(spec).values()):
        digest.update(b"underscores are spaces")  # such names were once shown as they are
    return digest.hexdigest()


def fingerprints(specs: Sequence[EvalSetSpec]) -> str:
    """Return one hash for several sets."""
    return hashlib.sha256("\n".join(fingerprint(spec) for spec in specs).encode()).hexdigest()


# The user's own folders -----------------------------------------------------------------------------------------------


def _open_folder(spec: FolderSet) -> EvalSet:
    where, root = _name_field(spec), Path(spec.path)
    named = _name_classes(spec)
    _require_same(set(_list_class_folders(root, where)), set(named), f"{where}: the folders of {root}", "classes")
    files = [Path(spec.classes)] if isinstance(spec.classes, str) else []
    templates = spec.templates
    if isinstance(templates, str):
        files.append(Path(templates))
        templates = tuple(line for line in _read_lines(Path(templates), where) if line.strip())
    images, label_N, left_out = _list_labelled_images(root, list(named), where)
    files += [image_file.path for image_file in images]
    names = [read_class_name(name) for name in named.values()]
    return classes_set(
        spec.name, images, names, templates, label_N, upright=True, files=tuple(files), passed_over=left_out
    )


def _name_classes(spec: FolderSet) -> dict[str, str]:
    """Return the name of each class folder as the user wrote it."""
    where = _name_field(spec)
    if spec.classes is None:
        return {folder: folder for folder in _list_class_folders(Path(spec.path), where)}
    return _read_mapping(Path(spec.classes), where) if isinstance(spec.classes, str) else dict(spec.classes)


def _read_mapping(path: Path, where: str) -> dict[str, str]:
    try:
        content = parse_yaml(_read_text(path, where), as_text=True)
    except InvalidDocument as error:
        raise UsageError(f"{where}.classes: {path}: {error}") from None
    if not isinstance(content, dict) or not all(isinstance(value, str) for value in content.values()):
        raise UsageError(f"{where}.classes: {path}: expected a mapping of folders to names, one 'FOLDER: NAME' a line")
    return content


def _list_class_folders(root: Path, where: str) -> list[str]:
    """Return the names of the class folders, sorted."""
    if not root.is_dir():
        raise UsageError(f"{where}.path: {root}: no such folder; expected one with a folder of images per class")
    return list_class_folders(root, f"{where}.path")


def _list_labelled_images(
    root: Path, folders: Sequence[str], where: str
) -> tuple[list[ImageFile], list[int], dict[str, int]]:
    """Return the images of all classes, each image's class by number, and how many other files there are by suffix.

    Raises:
        UsageError: a class has no image, a link to an image leads nowhere, or an image is of a format that is not read.
    """
    found = list_class_images(root, folders, where)
    lost: list[LeftOut] = [left for left in found.left_out if left.is_sample or is_unread_suffix(left.reason)]
    if lost:
        named = name_some(f"{left.number:,} {left.reason} ({left.examples[0]})" for left in lost)
        raise UsageError(
            f"{where}: {root}: images that cannot be read: {named}; an evaluation drops no image. Convert them, for "
            "example to JPEG, or move them out of the folder"
        )
    images = [ImageFile(Path(path)) for paths in found.paths_K for path in paths]
    label_N = [label for label, paths in enumerate(found.paths_K) for _ in paths]
    return images, label_N, count_passed_over(found.left_out)


# ImageNet and its variants --------------------------------------------------------------------------------------------


def _open_imagenet(spec: ImagenetSet) -> EvalSet:
    where, root = _name_field(spec), Path(spec.path)
    names, templates = _read_imagenet_prompts()
    wordnet_ids = _read_imagenet_ids("imagenet_synsets.txt")
    if spec.variant in ("r", "a"):  # ranked among their own 200 classes only
        chosen = [int(line) for line in _read_imagenet_ids(f"imagenet_{spec.variant}_indices.txt")]
        names, wordnet_ids = [names[k] for k in chosen], [wordnet_ids[k] for k in chosen]
    # V2's folders are numbers; sorted as strings, "10" would come before "2".
    expected = [str(k) for k in range(len(names))] if spec.variant == "v2" else wordnet_ids
    kind = "the classes' numbers" if spec.variant == "v2" else "WordNet ids"
    _require_same(
        set(_list_class_folders(root, where)), set(expected), f"{where}: the folders of {root}", f"ImageNet's {kind}"
    )
    images, label_N, left_out = _list_labelled_images(root, expected, where)
    files = tuple(image_file.path for image_file in images)
    return classes_set(
        spec.name, images, names, templates, label_N, files=files, repeats_names=True, passed_over=left_out
    )


def _read_imagenet_ids(file: str) -> list[str]:
    return (_find_package("timm") / "data" / "_info" / file).read_text(encoding="utf-8").split()


@functools.cache
def _read_imagenet_prompts() -> tuple[list[str], tuple[str, ...]]:
    """Return open_clip's ImageNet class names and OpenAI's 80 templates, without importing open_clip or torch."""
    path = _find_package("open_clip") / "zero_shot_metadata.py"
    spec = importlib.util.spec_from_file_location("_clipkd_zero_shot_metadata", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return list(module.IMAGENET_CLASSNAMES), tuple(template("{}") for template in module.OPENAI_IMAGENET_TEMPLATES)


def _find_package(name: str) -> Path:
    try:
        spec = importlib.util.find_spec(name)
    except ModuleNotFoundError:  # raised by an import hook that hides the package
        spec = None
    if spec is None or spec.origin is None:
        raise MissingDependency(
            f"ImageNet's class lists come with {name}, which is not installed: pip install 'clipkd[train]'"
        )
    return Path(spec.origin).parent


# CLIP_benchmark's archives --------------------------------------------------------------------------------------------


def _open_clip_benchmark(spec: ClipBenchmarkSet) -> EvalSet:
    where, root = _name_field(spec), Path(spec.path)
    shards = root / spec.split
    count = " ".join(_read_lines(shards / "nshards.txt", where)).strip()
    if not count.isdigit() or count == "0":
        raise UsageError(f"{where}: {shards / 'nshards.txt'}: expected the number of shards, got {quote_start(count)}")
    type_file = root / "dataset_type.txt"
    kind = " ".join(_read_lines(type_file, where)).strip().lower() if type_file.is_file() else "classification"
    texts_in = {"classification": "cls", "retrieval": "txt"}.get(kind)
    if texts_in is None:
        raise UsageError(f"{where}: {type_file}: expected classification or retrieval, got {quote_start(kind)}")
    tars = [shards / f"{number}.tar" for number in range(int(count))]
    found = list(_read_archives(tars, texts_in, where))
    images = [image_file for image_file, _ in found]
    if kind == "retrieval":
        return captions_set(spec.name, images, [text.splitlines() for _, text in found], files=tuple(tars))
    labels = [text.strip() for _, text in found]
    for image_file, label in zip(images, labels, strict=True):
        if not label.isdigit():
            raise UsageError(f"{where}: {image_file}: expected a class number in its .cls, got {quote_start(label)}")
    names_file, templates_file = root / "classnames.txt", root / "zeroshot_classification_templates.txt"
    names = [line.strip() for line in _read_lines(names_file, where)]
    lines = [line.strip() for line in _read_lines(templates_file, where)]
    templates = [line.replace("{c}", "{}") for line in lines if line]
    files = (*tars, names_file, templates_file)
    return classes_set(
        spec.name, images, names, templates, [int(label) for label in labels], files=files, repeats_names=True
    )


def _read_archives(tars: Sequence[Path], texts_in: str, where: str) -> Iterator[tuple[ImageFile, str]]:
    """Yield each sample's image and the content of its text file, in the archives' order."""
    for tar in tars:
        if not tar.is_file():
            raise UsageError(f"{where}: {tar}: no such archive")
        members, damage = read_members(tar)
        if damage:
            raise UsageError(f"{where}: {tar}: {damage}; an evaluation never skips files silently. Download it again")
        with tar.open("rb") as file:
            for key, files in group_files(members, keep_strays=True).items():
                image, text = find_first(files, _SHARD_SUFFIXES), files.get(texts_in)
                if image is None or text is None:
                    lacks = f"no .{texts_in}, only {name_some(files)}"
                    if image is None:
                        lacks = f"no image, {explain_missing_image(files).detail}"
                    raise UsageError(f"{where}: {tar}: sample {key!r} has {lacks}")
                file.seek(text.offset)
                try:
                    content = file.read(text.size_bytes).decode("utf-8")
                except UnicodeDecodeError:
                    raise UsageError(f"{where}: {tar}: {text.name}: not UTF-8") from None
                yield ImageFile(tar, image.offset, image.size_bytes, image.name), content


# Captions -------------------------------------------------------------------------------------------------------------


def _open_karpathy(spec: KarpathySet) -> EvalSet:
    where, path, root = _name_field(spec), Path(spec.file), Path(spec.images)
    try:
        rows = parse_json(_read_text(path, where))["images"]
        rows = [row for row in rows if row["split"] == "test"]
        captions_N = [[sentence["raw"] for sentence in row["sentences"]] for row in rows]
        places = [(row.get("filepath", ""), row["filename"]) for row in rows]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(
            f"{where}.file: {path}: not Karpathy's dataset_coco.json or dataset_flickr30k.json: {error!r}"
        ) from None
    images = []
    for folder, name in places:
        candidates = [root / folder / name, root / name]  # COCO has a subfolder val2014, Flickr30k has none
        found = next((candidate for candidate in candidates if candidate.is_file()), None)
        if found is None:
            raise UsageError(f"{where}.images: {candidates[0]}: no such file; {path.name} lists it")
        images.append(ImageFile(found))
    if spec.captions == "one":
        captions_N = [captions[:1] for captions in captions_N]
    return captions_set(spec.name, images, captions_N, files=(path, *(image_file.path for image_file in images)))


def _open_pairs(spec: PairsSet) -> EvalSet:
    where = _name_field(spec)
    if spec.shards:
        try:
            tars = expand(spec.shards)
        except UsageError as error:
            raise UsageError(str(error).replace("data.shards", f"{where}.shards", 1)) from None
        found = list(_read_archives(tars, "txt", where))
        images, captions = [image_file for image_file, _ in found], [[text.strip()] for _, text in found]
        return captions_set(spec.name, images, captions, upright=True, files=tuple(tars))
    assert spec.file is not None
    path = Path(spec.file)
    root = Path(spec.images) if spec.images else path.parent
    rows = list(_read_pairs(path, spec, where))
    images = [ImageFile(root / image) for image, _ in rows]
    for image_file in images:
        if not image_file.path.is_file():
            raise UsageError(f"{where}.images: {image_file.path}: no such file; {path} lists it")
    files = (path, *(image_file.path for image_file in images))
    return captions_set(spec.name, images, [[caption] for _, caption in rows], upright=True, files=files)


def _read_pairs(path: Path, spec: PairsSet, where: str) -> Iterator[tuple[str, str]]:
    """Yield image and caption of each line.  A row is one line, so an unclosed quote never swallows another."""
    quoting: Any = csv.QUOTE_NONE if spec.delimiter == "\t" else csv.QUOTE_MINIMAL  # quotes have no meaning in TSV
    header: list[str] = []
    for number, line in enumerate(_read_lines(path, where), 1):
        try:
            cells = next(csv.reader([line], delimiter=spec.delimiter, quoting=quoting, strict=True), [])
        except csv.Error as error:
            raise UsageError(f"{where}.file: {path}, line {number}: {error}") from None
        if not header:
            header = cells
            missing = {spec.image_column, spec.caption_column} - set(header)
            if missing:
                raise UsageError(
                    f"{where}.file: {path}: no column {', '.join(sorted(missing))}; it has {name_some(header, 20)}. "
                    "Set image_column, caption_column and delimiter"
                )
        elif cells:
            if len(cells) != len(header):
                raise UsageError(
                    f"{where}.file: {path}, line {number}: {len(cells)} cells, expected {len(header)} as in its header"
                )
            row = dict(zip(header, cells, strict=True))
            yield row[spec.image_column], row[spec.caption_column]


# Files ----------------------------------------------------------------------------------------------------------------


def _name_field(spec: Any) -> str:
    return f"evaluate.sets {set_name(spec)!r}"


def _read_text(path: Path, where: str) -> str:
    if not path.is_file():
        raise UsageError(f"{where}: {path}: no such file")
    return read_text(path, f"{where}: ")


def _read_lines(path: Path, where: str) -> list[str]:
    """Return a file's lines; unlike splitlines, do not split at other line separators, which captions may contain."""
    return re.split(r"\r\n|\n|\r", _read_text(path, where).rstrip("\r\n"))


def _require_same(found: set[str], expected: set[str], what: str, expectation: str) -> None:
    unknown, missing = sorted(found - expected), sorted(expected - found)
    differences = []
    if unknown:
        differences.append(f"{len(unknown)} unknown: {name_some(unknown)}")
    if missing:
        differences.append(f"{len(missing)} missing: {name_some(missing)}")
    if differences:
        raise UsageError(f"{what} do not match {expectation}; {'; '.join(differences)}")
