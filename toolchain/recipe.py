"""What a recipe may say, and reading one.

A recipe is YAML, complete in itself: no inheritance, interpolation or class paths.  Everything that can change a number
in the report is in it; where things go and how loudly is a flag.
"""

import difflib
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError, model_validator

from toolchain.damage import MAX_DAMAGED
from toolchain.errors import UsageError
from toolchain.sources import SHIPPED, anchored, resolved

Positive = Annotated[int, Field(gt=0)]
BatchSize = Annotated[int, Field(ge=2)]  # a contrastive loss of one pair is 0
Weight = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(gt=0, le=1)]
Precision = Literal["fp32", "bf16", "fp16"]
StoredDtype = Literal["float32", "float16", "bfloat16", "int8"]


class _Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False, protected_namespaces=()
    )


class GlyphsSpec(_Section):
    kind: Literal["glyphs"]

    views: Positive = 3
    """Distinct augmentations of each sample; epoch e shows view e mod views."""


class _PicturesSpec(_Section):
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


class MixtureSpec(_Section):
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


class ModelSpec(_Section):
    """An open_clip model: `model` says the architecture, the rest its changes and its weights.

    `model` is a folder that ships with clipkd (glyphs_teacher, vit_t_16, ...), a path (an open_clip local-dir, or a run
    of clipkd's, whose student it then is), `hf-hub:ORG/NAME`, or the name of an architecture of open_clip's (ViT-B-16).
    """

    model: str

    pretrained: str | None = None
    """open_clip's tag of weights for an architecture of its own, as in laion400m_e32."""

    checkpoint: str | None = None
    """A file of weights for the architecture: a state_dict, an open_clip training checkpoint, or safetensors."""

    model_cfg: dict[str, Any] = {}
    """Changes to the architecture, as in {vision_cfg: {width: 64}}, merged into open_clip's configuration."""

    preprocess_cfg: dict[str, Any] = {}
    """Changes to the preprocessing, as in {mean: [0.5, 0.5, 0.5]}: a checkpoint file does not say its own."""

    init: Literal["weights", "random"] | None = None
    """Whether to start from the model's weights.  Absent: a teacher does, a student only from those it names."""

    @property
    def is_random(self) -> bool:
        """Whether the model starts from the seed and not from weights."""
        return self.init == "random" or (self.init is None and self.pretrained is None and self.checkpoint is None)

    @model_validator(mode="after")
    def _one_source_of_weights(self) -> "ModelSpec":
        if self.pretrained is not None and self.checkpoint is not None:
            raise ValueError("pretrained and checkpoint both name weights; keep one")
        if self.init == "random" and (self.pretrained or self.checkpoint):
            raise ValueError("init: random contradicts pretrained and checkpoint; keep one")
        return self


class TeacherSpec(ModelSpec):
    model: str = ""

    recipe: str | None = None
    """In place of `model`: a recipe without a teacher, trained first; its student is this run's teacher."""

    @property
    def is_random(self) -> bool:
        """Whether the teacher's weights are drawn from the seed, as only a test of the machinery would want."""
        return self.init == "random"

    @model_validator(mode="after")
    def _model_or_recipe(self) -> "TeacherSpec":
        if bool(self.model) == bool(self.recipe):
            raise ValueError("give either model or recipe")
        if self.recipe and (self.pretrained or self.checkpoint or self.model_cfg or self.preprocess_cfg or self.init):
            raise ValueError(
                "a teacher that a recipe trains takes no pretrained, checkpoint, model_cfg, preprocess_cfg or init"
            )
        return self


class LossWeights(_Section):
    """Multiplies each objective (docs/method.md); 0 leaves it out of the computation too.

    The default is CLIP-KD's published combination: its 2000 of FD's mean over the width D is 2000 / D of the sum, here
    at D = 512.
    """

    task: Weight = 1.0
    """Contrastive loss of the student alone."""

    crd: Weight = 1.0
    """Contrastive relational distillation."""

    fd: Weight = 3.90625
    """Feature distillation, summed over the width."""

    mfd: Weight = 0.0
    """Masked feature distillation: the same, of an image tower that sees only some patches."""

    gd: Weight = 0.0
    """Gradient distillation, summed over the width and scaled by the square of the batch."""

    icl: Weight = 1.0
    """Interactive contrastive learning."""

    afd: Weight = 0.0
    """Augmented feature distillation."""

    cross_kd: Weight = 0.0
    """Relational distillation of the similarities between the two models."""


class TeacherCacheSpec(_Section):
    """The teacher's features of every view of `data.views` and every caption, computed once (docs/teacher_cache.md)."""

    dtype: StoredDtype = "float32"
    """How they are stored; int8 with a scale for each row."""

    path: str | None = None
    """A cache that another run made of the same data and teacher: runs/OTHER/teacher-cache/teacher.
    Absent: this run's own, made if it is not there.  Relative to the folder clipkd runs in."""

    also: tuple[TeacherSpec, ...] = ()
    """Further teachers that `clipkd cache` stores the features of, for other recipes."""

    @model_validator(mode="after")
    def _further_teachers_are_there(self) -> "TeacherCacheSpec":
        if any(spec.recipe is not None for spec in self.also):
            raise ValueError("also: a teacher that a recipe trains is trained by that recipe; name its run as model")
        return self


class DistillSpec(_Section):
    steps: Positive | None = None
    """Number of optimizer steps; or `epochs`."""

    epochs: Positive | None = None

    batch_size: BatchSize
    """Samples per optimizer step, over all processes."""

    lr: Annotated[float, Field(gt=0)]
    """Peak learning rate of AdamW, reached after warm-up."""

    warmup: Annotated[int, Field(ge=0)]
    """Steps of linear warm-up."""

    weight_decay: Weight = 0.1
    loss_weights: LossWeights = LossWeights()

    mask_ratio: Annotated[float, Field(ge=0, lt=1)] = 0.75
    """Share of the patches that MFD hides from the student."""

    reference_compat: bool = False
    """Reproduce CLIP-KD's released code where it differs from the paper's mathematics (docs/method.md)."""

    precision: Precision = "fp32"
    """Of the student's forward and backward pass; parameters, losses and optimizer stay float32."""

    teacher_precision: Precision = "fp32"

    teacher_cache: TeacherCacheSpec | None = None
    """Run the teacher over every view once, before training, instead of in each step; {} does with the defaults."""

    grad_clip_norm: Annotated[float, Field(gt=0)] | None = None
    """Bound on the norm of all gradients together, those of the loss heads included."""

    compile: bool = False
    """torch.compile for student and teacher: minutes once, then faster steps on a GPU."""

    evaluate_every: Positive | None = None
    """Steps between zero-shot evaluations of the student on the headline set."""

    @model_validator(mode="after")
    def _it_ends(self) -> "DistillSpec":
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give either steps or epochs")
        if self.steps is not None and self.warmup >= self.steps:
            raise ValueError(f"warmup ({self.warmup}) must be less than steps ({self.steps})")
        if not any(self.loss_weights.model_dump().values()):
            raise ValueError("all loss weights are 0; there is nothing to train")
        return self


class QuantizeSpec(_Section):
    """Linear and convolutional layers in symmetric int8, weights per output channel."""

    method: Literal["ptq", "qat"] = "qat"
    """Calibrate only, or also fine-tune with the rounding in the loop, against the teacher, as distillation did.
    ptq reads neither steps, lr nor anchor."""

    towers: Annotated[tuple[Literal["image", "text"], ...], Field(min_length=1)] = ("image", "text")
    """Which become int8; the other stays float, as it is."""

    attention: bool = False
    """Also the products within plain attention, open_clip's and timm's, and the last projection: a little faster in
    OpenVINO, slower in ONNX Runtime, and less exact (docs/export.md)."""

    steps: Positive | None = None
    """Optimizer steps of qat."""

    lr: Annotated[float, Field(gt=0)] = 1e-4
    batch_size: BatchSize = 128
    calibration_samples: Positive = 256
    anchor: Weight = 100.0
    """Weight of the squared distance to the float student's features, beside the distillation losses."""

    max_drop: Annotated[float, Field(ge=0, lt=1)] | None = None
    """How much top-1 on the headline set may fall below the float student's, as a fraction; without `evaluate`, how
    much agreement with the teacher on training samples.  The most damaged layers go back to float until it does not.
    Absent: none does."""

    @model_validator(mode="after")
    def _qat_takes_steps(self) -> "QuantizeSpec":
        if self.method == "qat" and self.steps is None:
            raise ValueError("method: qat needs steps, of its optimizer; or calibrate only, with method: ptq")
        if len(set(self.towers)) < len(self.towers):
            raise ValueError(f"towers {list(self.towers)}: each at most once")
        return self


class AutoSpec(_Section):
    max_drop: Annotated[float, Field(ge=0, lt=1)] | None = None
    """How much top-1 on the headline set may fall below that of fp32 in the same runtime, as a fraction.
    Absent: quantize.max_drop, or 0.01."""


def is_quantized(precision: str) -> bool:
    """Whether a precision is made of an int8 checkpoint."""
    return precision.startswith("int8")


class ExportSpec(_Section):
    runtimes: tuple[Literal["onnxruntime", "openvino", "tensorrt"], ...] = ("onnxruntime",)
    """`tensorrt` writes kits of the shipped model, and builds their engines here if `build_engines`."""

    build_engines: bool = True
    precisions: tuple[Literal["fp32", "fp16", "bf16", "int8", "int8-fp16", "int8-bf16"], ...] = ("fp32", "int8")
    """Of the student; teacher and baseline, which are there for comparison, in fp32 and for the first runtime alone."""

    opset: Literal[18, 19, 20] = 20

    auto: AutoSpec | None = None
    """Choose, for each runtime, the one of `precisions` to ship: the fastest here within a budget of fp32's accuracy.
    One that cannot be made is then no error but rejected.  Absent: nothing is chosen."""

    batch: Literal[1] | None = None
    """1 fixes the first dimension of every graph, for NPUs and runtimes that know no other; absent: it is free."""

    uint8_input: bool = False
    """Beside image.onnx of the student also image_uint8.onnx, which preprocesses too; not in kits of TensorRT."""

    @model_validator(mode="after")
    def _something_is_exported(self) -> "ExportSpec":
        if not self.runtimes or not self.precisions:
            raise ValueError("runtimes and precisions need at least one entry each")
        return self

    @model_validator(mode="after")
    def _auto_has_something_to_weigh(self) -> "ExportSpec":
        if self.auto is not None and "fp32" not in self.precisions:
            raise ValueError("auto holds every precision against fp32; add fp32 to precisions")
        if self.auto is not None and "tensorrt" in self.runtimes:
            raise ValueError("auto weighs what runs here, and a tensorrt engine runs on its device; export kits apart")
        return self

    @property
    def is_quantized(self) -> bool:
        """Whether one of the precisions is made of an int8 checkpoint."""
        return any(is_quantized(precision) for precision in self.precisions)


SetName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]+$")]
GlyphSet = Literal["stix", "serif", "novel"]


class FolderSet(_Section):
    """The user's own labelled pictures: CLASS/PICTURE."""

    kind: Literal["folder"]
    name: SetName
    path: str

    classes: str | dict[str, str] | None = None
    """What each folder shows, {FOLDER: NAME}, or a YAML file of that; absent: the folders' names are the classes'."""

    templates: tuple[str, ...] | str = ("a photo of a {}.",)
    """Prompts with {} where the name goes, or a file of them, one a line."""


class ImagenetSet(_Section):
    """ImageNet's validation pictures, or a set labelled with its classes, in folders as published."""

    kind: Literal["imagenet"]
    name: SetName = "imagenet"
    path: str

    variant: Literal["val", "v2", "r", "a", "sketch"] = "val"
    """v2's folders are the classes' numbers, all others' WordNet ids; r and a are of 200 classes, ranked alone."""


class ClipBenchmarkSet(_Section):
    """A test set as CLIP_benchmark's webdataset format holds it: classification, or retrieval."""

    kind: Literal["clip_benchmark"]
    name: SetName
    path: str
    split: str = "test"


class KarpathySet(_Section):
    """The test split of COCO or Flickr30k by Karpathy's dataset_*.json: 5,000 and 1,000 pictures."""

    kind: Literal["karpathy"]
    name: SetName
    file: str
    images: str
    """The folder of the pictures, or the one that holds COCO's val2014."""

    captions: Literal["all", "one"] = "all"
    """All of each picture's captions, five or a few more: the standard protocol; or only the first, as in CLIP-KD."""


class PairsSet(_Section):
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


class EvaluateSpec(_Section):
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


class ProfileSpec(_Section):
    processes: Positive = 3
    """Fresh processes per measurement."""

    seconds: Annotated[float, Field(gt=0)] = 1.0
    """Measured time per tower, shared among the processes."""

    pytorch: tuple[Literal["eager", "compiled"], ...] = ()
    """Also measure the checkpoint that ships as plain open_clip runs it, in PyTorch fp32: rows for reference, beside
    its fp32 export, and none without one.  `compiled` (torch.compile) needs a C++ compiler."""


class Recipe(_Section):
    name: str
    seed: Annotated[int, Field(ge=0, lt=1 << 63)] = 0
    data: Annotated[DataSpec | None, Field(discriminator="kind")] = None
    """Absent: nothing is trained or calibrated."""

    teacher: TeacherSpec | None = None
    """Absent: plain contrastive training, as for baselines and teachers."""

    student: ModelSpec
    baseline: bool = False
    """Also train the same student, from the same seed and batches, without the teacher."""

    distill: DistillSpec | None = None
    """Absent: the student's weights are taken as they are (clipkd adopt)."""

    quantize: QuantizeSpec | None = None
    """Absent: no int8 student."""

    export: ExportSpec = ExportSpec()
    evaluate: EvaluateSpec | None = None
    """Absent: train only; accuracy and the report need it."""

    profile: ProfileSpec = ProfileSpec()

    @model_validator(mode="after")
    def _training_has_what_it_needs(self) -> "Recipe":
        if self.distill is not None:
            if self.data is None:
                raise ValueError("there is no data section to train on")
            if self.distill.teacher_cache is not None and self.teacher is None:
                raise ValueError("distill.teacher_cache stores a teacher's features, and there is no teacher")
            if self.distill.teacher_cache is not None and self.data.views is None:
                raise ValueError(
                    "distill.teacher_cache needs data.views, the number of augmentations of each sample to store: "
                    "epoch e then shows view e mod views. As many as fit the disk; 1 is cheapest"
                )
        elif self.teacher is not None or self.baseline:
            raise ValueError(
                "teacher and baseline are for training, and there is no distill section; add one or drop them"
            )
        elif self.student.is_random and self.student.init != "weights":
            raise ValueError(
                "there is no distill section, so that the student's weights are taken as they are, and it names none; "
                "add distill, or give student one of pretrained, checkpoint, init: weights"
            )
        if self.quantize is not None and self.data is None:
            raise ValueError("quantize calibrates on training data, and there is no data section; add one or drop it")
        return self

    @model_validator(mode="after")
    def _pictures_without_captions_have_their_objectives(self) -> "Recipe":
        if self.distill is None or self.data is None or not lacks_captions(self.data):
            return self
        weights = self.distill.loss_weights.model_dump()
        wrong = [name for name in ("task", "gd", "icl", "afd") if weights[name]]
        if self.teacher is None or self.baseline:
            raise ValueError("data of kind images has no captions: it needs a teacher, and no baseline can be trained")
        if wrong:
            raise ValueError(
                f"data of kind images has no captions, and {', '.join(wrong)} hold a picture and its caption to belong "
                f"together; set {', '.join(f'distill.loss_weights.{name}' for name in wrong)} to 0 and use fd, mfd, "
                "crd or cross_kd"
            )
        return self

    @model_validator(mode="after")
    def _int8_needs_quantize(self) -> "Recipe":
        if self.export.is_quantized and self.quantize is None and self.export.auto is None:
            raise ValueError("export.precisions has int8 but there is no quantize section; add one or drop int8")
        return self

    @model_validator(mode="after")
    def _baseline_needs_a_teacher(self) -> "Recipe":
        if self.baseline and self.teacher is None:
            raise ValueError("baseline: true asks for the student without its teacher, and there is no teacher")
        return self

    @model_validator(mode="after")
    def _evaluating_needs_a_set(self) -> "Recipe":
        if self.distill is not None and self.distill.evaluate_every and self.evaluate is None:
            raise ValueError("distill.evaluate_every needs an evaluate section, which names the headline set")
        return self


def recipe_path(name: str, recipe_folder: Path | None = None) -> Path:
    """A recipe by the name of one that ships, or by path, in a recipe relative to that.

    Raises:
        UsageError: there is no such recipe.
    """
    names = shipped_recipes()
    if name in names:
        return SHIPPED / f"{name}.yaml"
    path = Path(name) if recipe_folder is None else resolved(name, recipe_folder)
    if path.is_file():
        return path
    last_parts = {shipped.rpartition("/")[2]: shipped for shipped in names}
    near = difflib.get_close_matches(name.rpartition("/")[2], last_parts, 1)
    hint = f"did you mean {last_parts[near[0]]}?" if near else "clipkd recipes lists those that ship"
    raise UsageError(f"{name}: no recipe of this name ships and no such file exists; {hint}")


def shipped_recipes() -> list[str]:
    """Names of the recipes installed with clipkd, those in a folder with its name: paper/vit_t_16."""
    paths = [path.relative_to(SHIPPED) for path in (*SHIPPED.glob("*.yaml"), *SHIPPED.glob("*/*.yaml"))]
    return sorted(path.with_suffix("").as_posix() for path in paths)


def load_recipe(path: Path, overrides: list[str] | None = None) -> Recipe:
    """Read and check a recipe; `overrides` are `section.field=value` strings.

    Raises:
        UsageError: not YAML, or anything in it is unknown or wrong: every problem at once, each with its path.
    """
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"{path}: no such recipe") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: not YAML: {error}") from None
    if not isinstance(raw, dict):
        raise UsageError(f"{path}: a recipe is a mapping of sections; got {type(raw).__name__}")
    for override in overrides or []:
        _apply(raw, override)
    return checked(raw, str(path), path.parent)


def adopting(model: str, weights: dict[str, str], like: Recipe | None, overrides: list[str] | None = None) -> Recipe:
    """A recipe that trains nothing: a model as it is, with what `like` says of evaluating, exporting and quantizing.

    Raises:
        UsageError: there is no such model, or it has no weights of its own and none are named.
    """
    sections = ("data", "quantize", "export", "evaluate", "profile")
    taken = {} if like is None else like.model_dump(mode="json", include=set(sections), exclude_none=True)
    if "export" not in taken:
        taken["export"] = {"precisions": ["fp32"]}
    student = {"model": model, **weights} if weights else {"model": model, "init": "weights"}
    raw = {"name": model.rpartition("/")[2], "student": student, **taken}
    for override in overrides or []:
        _apply(raw, override)
    return checked(raw, f"adopting {model}", Path())


def checked(raw: dict[str, Any], where: str, folder: Path) -> Recipe:
    """A recipe from its sections, whose paths are relative to a folder; `where` is for messages.

    Raises:
        UsageError: anything in it is unknown or wrong: every problem at once, each with its path.
    """
    try:
        recipe = Recipe.model_validate(raw)
    except ValidationError as error:
        problems = [_sentence(problem) for problem in error.errors()]
        raise UsageError("\n".join([f"{where}: {len(problems)} problem(s)", *problems])) from None
    changes: dict[str, Any] = {"student": anchored(recipe.student, folder, "student")}
    if recipe.teacher is not None and recipe.teacher.recipe is not None:
        changes["teacher"] = _anchored_recipe(recipe.teacher, folder)
    elif recipe.teacher is not None:
        changes["teacher"] = anchored(recipe.teacher, folder, "teacher")
    if recipe.evaluate is not None:
        sets = tuple(_anchored_set(spec, folder) for spec in recipe.evaluate.sets)
        changes["evaluate"] = recipe.evaluate.model_copy(update={"sets": sets})
    if recipe.distill is not None and recipe.distill.teacher_cache is not None:
        cache = recipe.distill.teacher_cache
        also = tuple(anchored(spec, folder, "distill.teacher_cache.also") for spec in cache.also)
        cache = cache.model_copy(update={"also": also})
        changes["distill"] = recipe.distill.model_copy(update={"teacher_cache": cache})
    return recipe.model_copy(update=changes)


def teacher_recipe(spec: TeacherSpec) -> Recipe:
    """The recipe that trains a loaded recipe's teacher."""
    assert spec.recipe is not None
    return load_recipe(recipe_path(spec.recipe))


def _anchored_recipe(spec: TeacherSpec, recipe_folder: Path) -> TeacherSpec:
    """The same recipe by a name that ships or by an absolute path, once it is known to be one that trains a teacher.

    Raises:
        UsageError: there is no such recipe, it is wrong, or it has a teacher itself.
    """
    assert spec.recipe is not None
    try:
        path = recipe_path(spec.recipe, recipe_folder).resolve()
    except UsageError as error:
        raise UsageError(f"teacher.recipe {error}") from None
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError):
        raw = None  # load_recipe says it better
    if isinstance(raw, dict) and raw.get("teacher") is not None:  # before loading: it may name itself
        raise UsageError(
            f"teacher.recipe {spec.recipe}: this recipe has a teacher itself; expected plain contrastive training. "
            f"To distil from its student, run it and write teacher: {{model: runs/NAME}}"
        )
    load_recipe(path)
    return spec if spec.recipe in shipped_recipes() else spec.model_copy(update={"recipe": str(path)})


def _anchored_set(spec: EvalSetSpec, folder: Path) -> EvalSetSpec:
    """The same set by absolute paths, beside the recipe or else in the current folder."""
    if isinstance(spec, str):
        return spec
    written = {key: getattr(spec, key, None) for key in ("path", "file", "images", "classes", "templates")}
    return spec.model_copy(
        update={key: str(resolved(value, folder)) for key, value in written.items() if isinstance(value, str)}
    )


def _apply(raw: dict[str, Any], override: str) -> None:
    path, equals, text = override.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys):
        raise UsageError(f"--set {override}: expected section.field=value, as in --set distill.steps=100")
    section: Any = raw
    for key in keys[:-1]:
        section[key] = section = {} if section.get(key) is None else section[key]
        if not isinstance(section, dict):
            raise UsageError(f"--set {override}: {key} is not a section")
    try:
        section[keys[-1]] = yaml.safe_load(text)
    except yaml.YAMLError:
        raise UsageError(f"--set {override}: '{text}' is not a YAML value; quote it for the shell") from None


def _sentence(problem: Any) -> str:
    places, known = _walk(problem["loc"])
    where = ".".join(places) or "recipe"
    if problem["type"] == "extra_forbidden":
        near = difflib.get_close_matches(places[-1], known, 1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else f"known here: {', '.join(known)}"
        return f"  {where}: unknown key; {hint}"
    if problem["type"] == "union_tag_not_found":
        return f"  {where}.kind: Field required"
    if problem["type"] == "union_tag_invalid":
        kinds = problem["ctx"]["expected_tags"].replace(", ", " or ")
        return f"  {where}.kind: Input should be {kinds} (got {problem['ctx']['tag']!r})"
    got = "" if isinstance(problem["input"], dict) else f" (got {problem['input']!r})"
    return f"  {where}: {problem['msg'].removeprefix('Value error, ')}{got}"


def _walk(location: tuple[Any, ...]) -> tuple[list[str], list[str]]:
    """A problem's place as the recipe writes it, and the fields known in the section that holds it.

    pydantic also puts into the location which `kind` of section was meant; that is no part of the recipe's path.
    """
    models: list[Any] = [Recipe]
    places: list[str] = []
    known: list[str] = []
    for part in location:
        kinds = [model for model in models if "kind" in model.model_fields]
        if len(kinds) > 1:
            if isinstance(part, int):  # a place in a list of sections
                places.append(str(part))
                continue
            models = [model for model in kinds if part in get_args(model.model_fields["kind"].annotation)]
            continue
        places.append(str(part))
        known = list(models[0].model_fields) if models else known
        field = models[0].model_fields.get(part) if models else None
        models = _sections(field.annotation) if field else []
    return places, known


def _sections(annotation: Any) -> list[Any]:
    """The sections that a field may hold, by itself or in a list."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [section for part in get_args(annotation) for section in _sections(part)]
