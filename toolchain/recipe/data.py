"""The `data` section: one spec for each kind of training data, with the facts about a kind that other modules ask for.

A new kind is a spec here and in `DataSpec` (in `FileSpec` if a listing provides its samples), a file in toolchain/data,
and its cases in toolchain/data/open.py.
"""

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from toolchain.recipe.section import Fraction, Positive, Section

MAX_DAMAGED = 0.1
"""Share of damaged samples at which a run stops unless told otherwise: broken downloads are a few in a hundred at the
worst, a wrong column, root or folder is nearly all.  In between is room, so that chance stops no run at hour nine."""


class DataSection(Section):
    """The base of every kind: facts about it that no recipe changes and that are no part of a stage's key."""

    needs_loader_workers: ClassVar[bool] = True
    """False: samples cost so little to make that the training process makes them itself."""

    is_stored: ClassVar[bool] = True
    """False: images are drawn while training, so that there is nothing to pack."""

    licence: ClassVar[str | None] = None
    """For the model card, where it is known without asking the user."""

    @property
    def captionless_kind(self) -> str | None:
        """The kind of data that has images without captions; None if all images have captions."""
        return None


class GlyphsSpec(DataSection):
    needs_loader_workers = False
    is_stored = False
    licence = (
        "drawn from the DejaVu fonts (Bitstream Vera and Arev licences, changes in the public domain); "
        "scored on STIX (SIL Open Font Licence 1.1)"
    )
    max_damaged: ClassVar[float] = 1.0

    kind: Literal["glyphs"]

    views: Positive = 3
    """Distinct augmentations of each sample; epoch e shows view e mod views."""


class _StoredImagesSpec(DataSection):
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


class WebdatasetSpec(_StoredImagesSpec):
    kind: Literal["webdataset"]

    shards: Annotated[tuple[str, ...], Field(min_length=1)]
    """Tar files of image-text pairs as img2dataset writes them; braces expand: data/cc3m/{00000..00331}.tar.
    Relative to the folder clipkd runs in."""


class CsvSpec(_StoredImagesSpec):
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


class ImageFolderSpec(_StoredImagesSpec):
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


class ImagesSpec(_StoredImagesSpec):
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

    @property
    def captionless_kind(self) -> str:
        return self.kind


FileSpec = CsvSpec | ImageFolderSpec | ImagesSpec
SourceSpec = WebdatasetSpec | FileSpec


class MixtureSpec(DataSection):
    """data:
    kind: mixture                  # an epoch shows all of them, shuffled
    sources:
      - {kind: webdataset, shards: ["data/cc3m/{00000..00331}.tar"]}
      - {kind: image_folder, path: data/animals}
    repeat: [1, 4]                 # the animals four times an epoch, cropped and captioned anew each time
    """

    kind: Literal["mixture"]

    sources: Annotated[tuple[Annotated[SourceSpec, Field(discriminator="kind")], ...], Field(min_length=2)]
    repeat: tuple[Positive, ...] | None = None
    """How often an epoch shows each source.  Absent: once."""

    views: Positive | None = None
    """Distinct augmentations of each sample, of all sources together."""

    max_damaged: Annotated[float, Field(ge=0, le=1)] = MAX_DAMAGED
    """Share of damaged samples, of all sources together, above which training stops."""

    @property
    def captionless_kind(self) -> str | None:
        return next((source.captionless_kind for source in self.sources if source.captionless_kind), None)

    @model_validator(mode="after")
    def _one_of_each(self) -> Self:
        if self.repeat is not None and len(self.repeat) != len(self.sources):
            raise ValueError(f"repeat has {len(self.repeat)} numbers for {len(self.sources)} sources")
        for field in ("max_damaged", "views"):
            if any(field in source.model_fields_set for source in self.sources):
                raise ValueError(f"{field} is of all sources together: say it beside sources, not in one of them")
        return self


DataSpec = GlyphsSpec | SourceSpec | MixtureSpec
