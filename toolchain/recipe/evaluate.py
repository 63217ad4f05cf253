"""The `evaluate` section: evaluation sets."""

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from toolchain.recipe.section import Section

SetName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]+$")]
GlyphSet = Literal["stix", "serif", "novel"]


class FolderSet(Section):
    """The user's own labelled pictures: CLASS/PICTURE."""

    kind: Literal["folder"]
    name: SetName
    path: str

    classes: str | dict[str, str] | None = None
    """What each folder shows, {FOLDER: NAME}, or a YAML file of that; absent: the folders' names are the classes'."""

    templates: tuple[str, ...] | str = ("a photo of a {}.",)
    """Prompts with {} where the name goes, or a file of them, one a line."""


class ImagenetSet(Section):
    """ImageNet's validation pictures, or a set labelled with its classes, in folders as published."""

    kind: Literal["imagenet"]
    name: SetName = "imagenet"
    path: str

    variant: Literal["val", "v2", "r", "a", "sketch"] = "val"
    """v2's folders are the classes' numbers, all others' WordNet ids; r and a are of 200 classes, ranked alone."""


class ClipBenchmarkSet(Section):
    """A test set as CLIP_benchmark's webdataset format holds it: classification, or retrieval."""

    kind: Literal["clip_benchmark"]
    name: SetName
    path: str
    split: str = "test"


class KarpathySet(Section):
    """The test split of COCO or Flickr30k by Karpathy's dataset_*.json: 5,000 and 1,000 pictures."""

    kind: Literal["karpathy"]
    name: SetName
    file: str
    images: str
    """The folder of the pictures, or the one that holds COCO's val2014."""

    captions: Literal["all", "one"] = "all"
    """All of each picture's captions, five or a few more: the standard protocol; or only the first, as in CLIP-KD."""


class PairsSet(Section):
    """One caption per picture, each to be found among all others, as CC3M's validation pairs are evaluated."""

    kind: Literal["pairs"]
    name: SetName

    file: str | None = None
    """A table with a header, one pair a line; or `shards`."""

    delimiter: Annotated[str, Field(min_length=1, max_length=1)] = "\t"
    """Tab: cells are taken as they are.  Any other: cells may be in double quotes."""

    image_column: str = "filepath"
    caption_column: str = "title"
    images: str | None = None
    """The folder that paths in the table start from; absent: the table's."""

    shards: tuple[str, ...] | None = None
    """Webdataset archives, as in data.shards: relative to the folder clipkd runs in."""

    @model_validator(mode="after")
    def _one_source(self) -> "PairsSet":
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
    headline: str = "stix"
    """The set whose top-1 the report ranks by."""

    sets: tuple[EvalSetSpec, ...] = ("stix", "serif", "novel")
    """Glyph sets by name (stix, serif, novel), others by kind (docs/evaluation.md)."""

    examples: Annotated[int, Field(ge=0, le=16)] = 16
    """Pictures of the headline set, of 96 pixels at most, that are kept with each model's answer for the report's page,
    which shows up to 8.  0: no picture leaves the set."""

    @property
    def headline_set(self) -> EvalSetSpec:
        return next(spec for spec in self.sets if set_name(spec) == self.headline)

    @model_validator(mode="after")
    def _headline_is_evaluated(self) -> "EvaluateSpec":
        names = [set_name(spec) for spec in self.sets]
        twice = [name for name in names if names.count(name) > 1]
        if twice:
            raise ValueError(f"two sets are named {twice[0]!r}; give each a name of its own")
        if self.headline not in names:
            raise ValueError(f"headline '{self.headline}' is not among sets {names}")
        return self
