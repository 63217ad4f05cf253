"""The `data` section: one spec for each kind of training data."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from toolchain.recipe.section import Fraction, Positive, Section

MAX_DAMAGED = 0.1
"""Share of damaged samples at which a run stops unless told otherwise: broken downloads are a few in a hundred at the
worst, a wrong column, root or folder is nearly all.  In between is room, so that chance stops no run at hour nine."""


class GlyphsSpec(Section):
    kind: Literal["glyphs"]

    views: Positive = 3
    """Distinct augmentations of each sample; epoch e shows view e mod views."""


class _PicturesSpec(Section):
    views: Positive | None = None
    """Distinct augmentations of each sample; epoch e shows view e mod views.  Absent: every epoch its own, which no
    teacher cache can hold."""

    crop_scale: tuple[Fraction, Fraction] = (0.9, 1.0)
    """Share of the picture's area that a random crop keeps, from and to."""

    max_damaged: Annotated[float, Field(ge=0, le=1)] = MAX_DAMAGED
    """Share of damaged samples above which training stops; below it others are shown in their place."""

    @model_validator(mode="after")
    def _crops_exist(self) -> Self:
        if self.crop_scale[0] > self.crop_scale[1]:
            raise ValueError(f"crop_scale {list(self.crop_scale)}: the first must not exceed the second")
        return self


class WebdatasetSpec(_PicturesSpec):
    kind: Literal["webdataset"]

    shards: Annotated[tuple[str, ...], Field(min_length=1)]
    """Tar files of image-text pairs as img2dataset writes them; braces expand: data/cc3m/{00000..00331}.tar.
    Relative to the folder clipkd runs in."""


class CsvSpec(_PicturesSpec):
    """data:
    kind: csv
    paths: [data/train.tsv]    # UTF-8, the first line names the columns
    delimiter: "\\t"
    image_column: filepath
    caption_column: title      # or several: [title, alt_text]
    root: data/pictures        # of relative names of pictures
    quoted: false              # true: a field in "..." may hold the delimiter
    """

    kind: Literal["csv"]

    paths: Annotated[tuple[str, ...], Field(min_length=1)]
    """Relative to the folder clipkd runs in, as is `root`."""

    delimiter: str
    image_column: str
    caption_column: str | tuple[str, ...]
    """Several columns are several captions of the same picture; so are several rows that name it."""

    root: str | None = None
    """Where relative names of pictures start.  Absent: at the folder of the file that names them."""

    quoted: bool = False
    """Whether a field may stand in double quotes, and then hold the delimiter, a line's end, or a doubled quote."""

    @model_validator(mode="after")
    def _fields_can_be_told_apart(self) -> Self:
        if len(self.delimiter) != 1 or not self.delimiter.isascii() or self.delimiter in '"\r\n':
            raise ValueError(f"delimiter {self.delimiter!r}: expected one ASCII character, such as ',' or '\\t'")
        if not self.caption_column:
            raise ValueError("caption_column names no column")
        return self


Template = Annotated[str, Field(pattern=r"^[^{}]*\{\}[^{}]*$")]


class ImageFolderSpec(_PicturesSpec):
    """data:
    kind: image_folder
    path: data/animals             # data/animals/CLASS/PICTURE
    names: data/animals_names.tsv  # FOLDER, a tab, a name; several lines of a folder: several names
    templates: ["a photo of a {}.", "a drawing of a {}."]
    """

    kind: Literal["image_folder"]

    path: str
    """Relative to the folder clipkd runs in, as is `names`."""

    names: str | None = None
    """Absent: a class is called as its folder, underscores as spaces."""

    templates: Annotated[tuple[Template, ...], Field(min_length=1)] = ("a photo of a {}.",)
    """Each with {} in place of the class; every template with every name is a caption of the picture."""


class ImagesSpec(_PicturesSpec):
    """data:
      kind: images                   # pictures without captions, and the classes a student is made for
      path: data/unlabelled          # everything below it
      classes: data/classes.txt      # one a line
      templates: ["a photo of a {}."]

    In every epoch a picture is shown beside a prompt drawn by chance, which says nothing of it: the objectives that
    hold picture and text to belong together cannot be used, those that compare what student and teacher make of each
    can (fd, mfd, crd, cross_kd).
    """

    kind: Literal["images"]

    path: str
    """Relative to the folder clipkd runs in, as is `classes`."""

    classes: str
    templates: Annotated[tuple[Template, ...], Field(min_length=1)] = ("a photo of a {}.",)


FileSpec = CsvSpec | ImageFolderSpec | ImagesSpec
PicturesSpec = WebdatasetSpec | FileSpec


class MixtureSpec(Section):
    """data:
    kind: mixture                  # an epoch shows all of them, shuffled
    sources:
      - {kind: webdataset, shards: ["data/cc3m/{00000..00331}.tar"]}
      - {kind: image_folder, path: data/animals}
    repeat: [1, 4]                 # the animals four times an epoch, cropped and captioned anew each time
    """

    kind: Literal["mixture"]

    sources: Annotated[tuple[Annotated[PicturesSpec, Field(discriminator="kind")], ...], Field(min_length=2)]
    repeat: tuple[Positive, ...] | None = None
    """How often an epoch shows each source.  Absent: once."""

    views: Positive | None = None
    """Distinct augmentations of each sample, of all sources together."""

    max_damaged: Annotated[float, Field(ge=0, le=1)] = MAX_DAMAGED
    """Share of damaged samples, of all sources together, above which training stops."""

    @model_validator(mode="after")
    def _one_of_each(self) -> Self:
        if self.repeat is not None and len(self.repeat) != len(self.sources):
            raise ValueError(f"repeat has {len(self.repeat)} numbers for {len(self.sources)} sources")
        for field in ("max_damaged", "views"):
            if any(field in source.model_fields_set for source in self.sources):
                raise ValueError(f"{field} is of all sources together: say it beside sources, not in one of them")
        return self


DataSpec = GlyphsSpec | PicturesSpec | MixtureSpec


def lacks_captions(spec: DataSpec) -> bool:
    """Whether some pictures of the data are shown beside texts that say nothing of them."""
    return any(map(lacks_captions, spec.sources)) if isinstance(spec, MixtureSpec) else isinstance(spec, ImagesSpec)
