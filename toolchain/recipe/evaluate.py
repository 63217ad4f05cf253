"""The `evaluate` section: evaluation sets."""

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from toolchain.recipe.section import Section, Several

SetName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]+$")]
GlyphSet = Literal["stix", "serif", "novel"]


class FolderSet(Section):
    """The user's own labelled images, in one folder per class: CLASS/IMAGE."""

    kind: Literal["folder"]
    name: SetName
    path: str

    classes: str | dict[str, str] | None = None
    """Class name of each folder, {FOLDER: NAME}, or a YAML file of that mapping.  Absent: the folders' names."""

    templates: tuple[str, ...] | str = ("a photo of a {}.",)
    """Prompts with {} in place of the class name, or a file with one prompt a line."""


class ImagenetSet(Section):
    """ImageNet's validation images, or a variant with the same classes, in folders as published."""

    kind: Literal["imagenet"]
    name: SetName = "imagenet"
    path: str

    variant: Literal["val", "v2", "r", "a", "sketch"] = "val"
    """Folders are class numbers in v2 and WordNet ids in all others.  r and a rank only their own 200 classes."""


class ClipBenchmarkSet(Section):
    """A classification or retrieval test set in CLIP_benchmark's webdataset format."""

    kind: Literal["clip_benchmark"]
    name: SetName
    path: str
    split: str = "test"


class KarpathySet(Section):
    """The test split of COCO (5,000 images) or Flickr30k (1,000 images) from Karpathy's dataset_*.json."""

    kind: Literal["karpathy"]
    name: SetName
    file: str
    images: str
    """Folder of the images, or the folder that contains COCO's val2014."""

    captions: Literal["all", "one"] = "all"
    """all: every caption of each image (five or a few more), the standard protocol; one: the first, as in CLIP-KD."""


class PairsSet(Section):
    """Image retrieval and text retrieval with one caption per image, as CC3M's validation pairs are evaluated."""

    kind: Literal["pairs"]
    name: SetName

    file: str | None = None
    """A table with a header and one pair a line; give either `file` or `shards`."""

    delimiter: Annotated[str, Field(min_length=1, max_length=1)] = "\t"
    """With a tab, quotes in cells are plain characters; with any other delimiter, cells may be in double quotes."""

    image_column: str = "filepath"
    caption_column: str = "title"
    images: str | None = None
    """Folder that relative paths in the table start from.  Absent: the table's folder."""

    shards: Several[str] | None = None
    """Webdataset archives, as in data.shards; relative to the current folder."""

    @model_validator(mode="after")
    def _check_source(self) -> "PairsSet":
        if bool(self.file) == bool(self.shards):
            raise ValueError("give either file or shards")
        return self


def _kind_of_set(entry: Any) -> str | None:
    if isinstance(entry, str):
        return "glyphs"
    kind = entry.get("kind") if isinstance(entry, dict) else getattr(entry, "kind", None)
    return None if kind is None else str(kind)


EvalSetSpec = Annotated[
    Annotated[GlyphSet, Tag("glyphs")]
    | Annotated[FolderSet, Tag("folder")]
    | Annotated[ImagenetSet, Tag("imagenet")]
    | Annotated[ClipBenchmarkSet, Tag("clip_benchmark")]
    | Annotated[KarpathySet, Tag("karpathy")]
    | Annotated[PairsSet, Tag("pairs")],
    Discriminator(_kind_of_set),
]


def set_name(spec: EvalSetSpec) -> str:
    return spec if isinstance(spec, str) else spec.name


class EvaluateSpec(Section):
    sets: Several[EvalSetSpec] = ("stix", "serif", "novel")
    """Evaluation sets: glyph sets by name (stix, serif, novel), others by kind (docs/evaluation.md)."""

    headline: str = Field(default_factory=lambda checked: next(map(set_name, checked["sets"]), ""))
    """Name of the evaluation set whose top-1 the report ranks models by.  Absent: the first of `sets`."""

    examples: Annotated[int, Field(ge=0, le=16)] = 16
    """Number of images of the headline set that are stored, scaled to at most 96 pixels, with each model's answer.  The
    report page shows up to 8.  0: no image is copied."""

    @property
    def headline_set(self) -> EvalSetSpec:
        return next(spec for spec in self.sets if set_name(spec) == self.headline)

    @model_validator(mode="after")
    def _check_headline(self) -> "EvaluateSpec":
        if not self.sets:
            raise ValueError("sets is empty; name at least one evaluation set")
        names = [set_name(spec) for spec in self.sets]
        twice = [name for name in names if names.count(name) > 1]
        if twice:
            raise ValueError(f"two sets have the name {twice[0]!r}; give each a different name")
        if self.headline not in names:
            raise ValueError(f"headline '{self.headline}' is not among sets {names}")
        return self
