"""Open data by its kind: the one module that knows every kind of data.

Training batches, listings, stored samples and fingerprints each have one `match` over the kinds; a new kind adds a
case to each.  `source_spec` decides which kinds a path alone can name.
Importing this module needs no torch; only `training_data` does.
"""

import hashlib
import random
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from toolchain.data import glyphs
from toolchain.data.bad_samples import LeftOut, describe_left_out, merge_left_out
from toolchain.data.csv_listing import CsvListing
from toolchain.data.folder_listing import ClassFolders, UnlabelledImages
from toolchain.data.listing import Listing, list_images, read_file, require_file, require_folder
from toolchain.data.local_copies import open_copies
from toolchain.data.remote_files import fingerprint as remote_fingerprint
from toolchain.data.remote_files import list_files
from toolchain.data.stored_samples import (
    PROGRESS_EVERY,
    CorruptSample,
    ReadSample,
    list_glyph_samples,
    list_shard_samples,
    read_listed_sample,
)
from toolchain.data.tar_files import PAIRING_VERSION, expand, expand_urls
from toolchain.data.tar_files import fingerprint as shards_fingerprint
from toolchain.errors import ClipkdError, UsageError
from toolchain.progress import Progress, no_progress
from toolchain.recipe.data import (
    CsvSpec,
    DataSpec,
    FileSpec,
    GlyphsSpec,
    ImageFolderSpec,
    ImagesSpec,
    MixtureSpec,
    WebdatasetSpec,
)
from toolchain.recipe.load import load_recipe, recipe_path, shipped_recipes

if TYPE_CHECKING:
    from toolchain.data.batch import OrderedData, TrainingData


def training_data(
    spec: DataSpec,
    *,
    seed: int,
    batch_size: int,
    batch_size_field: str = "distill.batch_size",
    progress: Progress = no_progress,
    say: Callable[[str], None] = lambda _: None,
) -> "TrainingData":
    """Open the data a recipe names.

    `progress` reports sample listing and shard indexing (slow the first time); `say` reports skipped samples.
    `batch_size_field` is the recipe field that sets `batch_size`, for messages.

    Raises:
        UsageError: files are missing, or contain fewer samples than one batch.
        ClipkdError: a file cannot be read.
    """
    from toolchain.data.assemble import TooFewSamples

    for message in describe_remote(spec):
        say(message)
    try:
        data = _open_data(spec, seed=seed, batch_size=batch_size, progress=progress)
    except TooFewSamples as error:
        raise UsageError(f"{error}, {batch_size_field}") from None
    for sentence in describe_left_out(data.left_out):
        say(sentence)
    return data


def _open_data(spec: DataSpec, *, seed: int, batch_size: int, progress: Progress) -> "TrainingData":
    from toolchain.data.glyph_batches import GlyphBatches
    from toolchain.data.mixture import MixtureBatches, source_seed

    match spec:
        case GlyphsSpec():
            return GlyphBatches(glyphs.training_set(), seed, batch_size, spec.views)
        case MixtureSpec():
            sources = [
                _open_source(source, seed=source_seed(seed, number), batch_size=1, progress=progress)
                for number, source in enumerate(spec.sources)
            ]
            return MixtureBatches.from_sources(
                sources, spec.repeat, seed=seed, batch_size=batch_size, num_views=spec.views
            )
        case _:
            return _open_source(spec, seed=seed, batch_size=batch_size, progress=progress)


def _open_source(spec: WebdatasetSpec | FileSpec, *, seed: int, batch_size: int, progress: Progress) -> "OrderedData":
    """Open the data of one source: webdataset shards, or files on disk."""
    from toolchain.data.file_batches import FileBatches
    from toolchain.data.webdataset_shards import ShardBatches

    if isinstance(spec, WebdatasetSpec):
        return ShardBatches.open(spec, seed=seed, batch_size=batch_size, progress=progress)
    progress("listing samples", 0, 1)
    return FileBatches(open_listing(spec), seed, batch_size, spec.crop_scale, spec.views)


def open_listing(spec: FileSpec) -> Listing:
    """List the samples of a recipe's files.

    Raises:
        UsageError: a file, a folder or a column is missing.
        ClipkdError: a file or folder cannot be read.
    """
    try:
        match spec:
            case CsvSpec():
                return CsvListing(spec)
            case ImageFolderSpec():
                return ClassFolders.open(spec)
            case ImagesSpec():
                return UnlabelledImages.open(spec)
    except OSError as error:
        raise ClipkdError(f"{error.filename}: cannot be read: {error.strerror}") from None


def fingerprint(spec: DataSpec) -> str:
    """Return a hash of everything the samples and their numbers depend on; images count by name and size only.

    Raises:
        UsageError, ClipkdError: as for `open_listing`, or shards are missing.
    """
    match spec:  # every case returns, so that mypy finds a kind that is missing here
        case GlyphsSpec():
            return glyphs.fingerprint()
        case WebdatasetSpec():
            if urls := expand_urls(spec.shards):
                listed = remote_fingerprint(list_files(urls))
                return hashlib.sha256(f"{PAIRING_VERSION}\0{listed}".encode()).hexdigest()
            return shards_fingerprint(expand(spec.shards))
        case MixtureSpec():
            return hashlib.sha256("".join(map(fingerprint, spec.sources)).encode()).hexdigest()
        case CsvSpec():
            contents = (read_file(require_file(path)) for path in spec.paths)
            return hashlib.sha256(b"".join(hashlib.sha256(content).digest() for content in contents)).hexdigest()
        case ImageFolderSpec() | ImagesSpec():
            return _folder_fingerprint(spec)


def _folder_fingerprint(spec: ImageFolderSpec | ImagesSpec) -> str:
    """Return a hash of the images' names and sizes and of the classes' names."""
    root, digest = require_folder(spec.path), hashlib.sha256()
    try:
        for image in map(Path, list_images(root).paths):
            named = f"{image.relative_to(root)}\0{image.stat().st_size}\0"
            digest.update(named.encode("utf-8", "surrogateescape"))
    except OSError as error:
        raise ClipkdError(f"{error.filename}: cannot be read: {error.strerror}") from None
    names = spec.names if isinstance(spec, ImageFolderSpec) else spec.classes
    content = b"" if names is None else read_file(require_file(names))
    digest.update(content)
    lines = content.splitlines()
    if any(b"_" in (line.partition(b"\t")[2] if isinstance(spec, ImageFolderSpec) else line) for line in lines):
        digest.update(b"underscores are spaces")  # such names were once shown as they are
    return digest.hexdigest()


def list_stored_samples(spec: DataSpec, note: Callable[[LeftOut], None] = lambda _: None) -> Iterator[ReadSample]:
    """Yield every sample of a source in order; listing them reads no image.

    Class folders are listed in a fixed random order, because one class after another is a bad order to train in.
    The sources of a mixture follow each other, each once.  `note` is called with files that are no samples.

    Raises:
        UsageError: files are missing or misnamed.
        ClipkdError: a file cannot be read.
    """
    match spec:
        case GlyphsSpec():
            yield from list_glyph_samples()
        case MixtureSpec():
            for source in spec.sources:
                yield from list_stored_samples(source, note)
        case WebdatasetSpec():
            for name, open_shard in _list_shards(spec):
                yield from list_shard_samples(name, open_shard, spec.caption_key, note)
        case _:
            yield from _list_file_samples(spec, note)


def _list_shards(spec: WebdatasetSpec) -> Iterator[tuple[str, Callable[[], BinaryIO]]]:
    """Yield the name of each shard, and a function that opens it; remote ones are copied then."""
    if urls := expand_urls(spec.shards):
        copies = open_copies(spec, urls)
        copies.forget_failures()
        yield from ((file.name, partial(copies.open, file)) for file in list_files(urls))
    else:
        yield from ((str(path), partial(_open_file, path)) for path in expand(spec.shards))


def _open_file(path: Path) -> BinaryIO:
    return path.open("rb")


def describe_remote(spec: DataSpec) -> list[str]:
    """Return a message for each source of remote shards: how many bytes reading them all fetches, and where to.

    Raises:
        UsageError, ClipkdError: shards are missing, or their server does not answer.
    """
    if isinstance(spec, MixtureSpec):
        return [message for source in spec.sources for message in describe_remote(source)]
    if not isinstance(spec, WebdatasetSpec) or not (urls := expand_urls(spec.shards)):
        return []
    files = list_files(urls)
    size_gb = sum(file.size_bytes for file in files) / 1e9
    return [
        f"remote shards: {len(urls):,}, {size_gb:,.2f} GB, the first {files[0].name}; copied as they are read to "
        f"{open_copies(spec, urls).folder}, at most {spec.cache_gb:g} GB at a time"
    ]


def count_stored_samples(spec: DataSpec, progress: Progress) -> tuple[int, tuple[LeftOut, ...]]:
    """Return the number of samples in a source, including corrupt ones, and the files that are no samples.

    Raises:
        UsageError, ClipkdError: as for `list_stored_samples`.
    """
    total = 0
    passed_over: dict[str, LeftOut] = {}

    def note(left_out: LeftOut) -> None:
        before = passed_over.get(left_out.reason)
        (passed_over[left_out.reason],) = merge_left_out([before, left_out] if before else [left_out])

    for _ in list_stored_samples(spec, note):
        total += 1
        if total % PROGRESS_EVERY == 0:
            progress("listing samples", total, total)
    return total, tuple(passed_over.values())


def _list_file_samples(spec: FileSpec, note: Callable[[LeftOut], None]) -> Iterator[ReadSample]:
    listed = open_listing(spec)
    order = list(range(len(listed)))
    if isinstance(spec, ImageFolderSpec):
        random.Random(0).shuffle(order)
    for number in order:
        yield partial(read_listed_sample, listed, number, has_captions=spec.captionless_kind is None)
    for left in listed.left_out:
        if not left.is_sample:
            note(left)
            continue
        for number in range(left.number):
            yield partial(CorruptSample, left.examples[number] if number < len(left.examples) else "", left.reason)


def source_spec(source: str, kind: str | None) -> DataSpec:
    """Return the data spec of a recipe; with a kind, the spec of a path or pattern of that kind.

    Raises:
        UsageError: the recipe does not exist or has no data, or this kind needs more than a path.
    """
    if kind is None:
        try:
            recipe = load_recipe(recipe_path(source))
        except UsageError as error:
            if Path(source).suffix in (".yaml", ".yml") or source in shipped_recipes():
                raise
            raise UsageError(
                f"{error}. For a path or pattern of data, add its kind: --kind webdataset or image_folder"
            ) from None
        if recipe.data is None:
            raise UsageError(f"{source}: this recipe has no `data` section")
        return recipe.data
    if kind == "webdataset":
        return WebdatasetSpec(kind="webdataset", shards=(source,))
    if kind == "image_folder":
        return ImageFolderSpec(kind="image_folder", path=source)
    raise UsageError(
        f"--kind {kind}: a path is enough only for webdataset and image_folder; write a recipe for other kinds"
    )
