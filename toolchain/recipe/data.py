"""The `data` section: one spec for each kind of training data, with the facts about a kind that other modules need.

To add a kind, add a spec here and in `DataSpec` (in `FileSpec` if a listing provides its samples), a file in
toolchain/data, and its cases in toolchain/data/open.py.
"""

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from toolchain.recipe.section import Fraction, Positive, Section, Several

MAX_DAMAGED = 0.1
"""Default share of corrupt samples above which a run stops.  Failed downloads corrupt a few in a hundred at the worst,
a wrong column, root or folder nearly all.  The limit is far from both, so chance does not stop a run after hours."""


class DataSection(Section):
    """The base of every kind of data.  Its class variables are not set in recipes and do not enter a stage's key."""

    needs_loader_workers: ClassVar[bool] = True
    """False: samples are so cheap to make that the training process makes them itself."""

    is_stored: ClassVar[bool] = True
    """False: images are drawn during training, so there is nothing to pack."""

    licence: ClassVar[str | None] = None
    """Licence of the data for the model card; None if only the user can know it."""

    @property
    def captionless_kind(self) -> str | None:
        """Return the kind of data whose images have no captions; None if all images have captions."""
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
    """Number of distinct augmentations of each sample; epoch e shows view e mod views."""


class _StoredImagesSpec(DataSection):
    views: Positive | None = None
    """Number of distinct augmentations of each sample; epoch e shows view e mod views.  Absent: every epoch draws new
    augmentations, which a teacher cache cannot store."""

    crop_scale: tuple[Fraction, Fraction] = (0.9, 1.0)
    """Smallest and largest share of the image's area that a random crop keeps."""

    max_damaged: Annotated[float, Field(ge=0, le=1)] = MAX_DAMAGED
    """Share of corrupt samples above which training stops; below it, other samples replace them."""

    @model_validator(mode="after")
    def _check_crop_scale(self) -> Self:
        if self.crop_scale[0] > self.crop_scale[1]:
            raise ValueError(f"crop_scale {list(self.crop_scale)}: the first must not exceed the second")
        return self


class WebdatasetSpec(_StoredImagesSpec):
    kind: Literal["webdataset"]

    shards: Annotated[Several[str], Field(min_length=1)]
    """Tar files of image-text pairs as img2dataset writes them; braces expand: data/cc3m/{00000..00331}.tar.
    Paths are relative to the current folder.  s3://, gs://, https:// and http:// are read through a local folder."""

    caption_key: str | None = None
    """Key of the caption in KEY.json, which is then read even where there is a KEY.txt.  Absent: "caption"."""

    cache_gb: Annotated[float, Field(gt=0)] = 20
    """Disk space for copies of remote shards, in GB of 10^9 bytes.  The largest 16 must fit in 3/4 of it."""

    cache_dir: str | None = None
    """Folder for copies of remote shards.  Absent: clipkd's folder in the user's cache folder."""


class CsvSpec(_StoredImagesSpec):
    """CSV or TSV files that name an image and its caption in each row.

    data:
      kind: csv
      paths: [data/train.tsv]    # UTF-8, the first line names the columns
      delimiter: "\\t"
      image_column: filepath
      caption_column: title      # or several: [title, alt_text]
      root: data/images          # folder that relative image paths start from
      quoted: false              # true: a field in "..." may contain the delimiter
    """

    kind: Literal["csv"]

    paths: Annotated[Several[str], Field(min_length=1)]
    """Paths of the files.  They and `root` are relative to the current folder."""

    delimiter: str
    image_column: str
    caption_column: str | tuple[str, ...]
    """Several columns are several captions of the same image; so are several rows with the same image."""

    root: str | None = None
    """Folder that relative image paths start from.  Absent: the folder of the CSV file."""

    quoted: bool = False
    """true: a field may be in double quotes, and may then contain the delimiter, a line break or a doubled quote."""

    @model_validator(mode="after")
    def _check_columns(self) -> Self:
        if len(self.delimiter) != 1 or not self.delimiter.isascii() or self.delimiter in '"\r\n':
            raise ValueError(f"delimiter {self.delimiter!r}: expected one ASCII character, such as ',' or '\\t'")
        if not self.caption_column:
            raise ValueError("caption_column is empty; expected a column or a list of columns")
        return self


Template = Annotated[str, Field(pattern=r"^[^{}]*\{\}[^{}]*$")]


class ImageFolderSpec(_StoredImagesSpec):
    """Images in one folder per class; class names in templates are their captions.

    data:
      kind: image_folder
      path: data/animals             # data/animals/CLASS/IMAGE
      names: data/animals_names.tsv  # FOLDER, tab, name; several lines for a folder give it several names
      templates: ["a photo of a {}.", "a drawing of a {}."]
    """

    kind: Literal["image_folder"]

    path: str
    """Folder of the class folders.  It and `names` are relative to the current folder."""

    names: str | None = None
    """File of class names.  Absent: the folder's name, with spaces for underscores."""

    templates: Annotated[Several[Template], Field(min_length=1)] = ("a photo of a {}.",)
    """Captions with {} in place of the class name; each template with each name is one caption of the image."""


class ImagesSpec(_StoredImagesSpec):
    """Images without captions, and the classes that the student must recognize.

    data:
      kind: images
      path: data/unlabelled          # all images in it and its subfolders
      classes: data/classes.txt      # one a line
      templates: ["a photo of a {}."]

    Every epoch pairs each image with a random prompt that does not describe it.  Objectives that need matching pairs
    therefore cannot be used; objectives that compare the student's features with the teacher's can (fd, mfd, crd,
    cross_kd).
    """

    kind: Literal["images"]

    path: str
    """Folder of the images.  It and `classes` are relative to the current folder."""

    classes: str
    templates: Annotated[Several[Template], Field(min_length=1)] = ("a photo of a {}.",)

    @property
    def captionless_kind(self) -> str:
        return self.kind


FileSpec = CsvSpec | ImageFolderSpec | ImagesSpec
SourceSpec = WebdatasetSpec | FileSpec


class MixtureSpec(DataSection):
    """Several sources together; an epoch shows all their samples, shuffled.

    data:
      kind: mixture
      sources:
        - {kind: webdataset, shards: ["data/cc3m/{00000..00331}.tar"]}
        - {kind: image_folder, path: data/animals}
      repeat: [1, 4]                 # animals four times an epoch, with a new crop and caption each time
    """

    kind: Literal["mixture"]

    sources: Annotated[tuple[Annotated[SourceSpec, Field(discriminator="kind")], ...], Field(min_length=2)]
    repeat: tuple[Positive, ...] | None = None
    """Number of times that an epoch shows each source.  Absent: once each."""

    views: Positive | None = None
    """Number of distinct augmentations of each sample, for all sources."""

    max_damaged: Annotated[float, Field(ge=0, le=1)] = MAX_DAMAGED
    """Share of corrupt samples, over all sources, above which training stops."""

    @property
    def captionless_kind(self) -> str | None:
        return next((source.captionless_kind for source in self.sources if source.captionless_kind), None)

    @model_validator(mode="after")
    def _check_sources(self) -> Self:
        if self.repeat is not None and len(self.repeat) != len(self.sources):
            raise ValueError(f"repeat has {len(self.repeat)} numbers for {len(self.sources)} sources")
        for field in ("max_damaged", "views"):
            if any(field in source.model_fields_set for source in self.sources):
                raise ValueError(
                    f"{field} applies to all sources together; set data.{field}, not {field} of one source"
                )
        return self


DataSpec = GlyphsSpec | SourceSpec | MixtureSpec
