"""The `distill` section: objectives, schedule, teacher cache.

It holds the weights of the objectives and lists which objectives need captions; everything else about an objective is
in distillation/objectives.py.
"""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from toolchain.recipe.model import TeacherSpec
from toolchain.recipe.section import BatchSize, Positive, Precision, Section, Several, StoredDtype, Weight


class LossWeights(Section):
    """Weights that multiply the objectives (docs/method.md); an objective of weight 0 is not computed.

    The default is CLIP-KD's published combination.  CLIP-KD weights FD's mean over the width D by 2000, which is a
    weight of 2000 / D for the sum used here; the default is for D = 512.
    """

    task: Weight = 1.0
    """Contrastive loss of the student alone: of softmaxes, or for a student with a logit bias of sigmoids."""

    crd: Weight = 1.0
    """Contrastive relational distillation."""

    fd: Weight = 3.90625
    """Feature distillation, summed over the width."""

    mfd: Weight = 0.0
    """Masked feature distillation: FD with an image tower that sees only some patches."""

    gd: Weight = 0.0
    """Gradient distillation, summed over the width and scaled by the square of the batch."""

    icl: Weight = 1.0
    """Interactive contrastive learning."""

    afd: Weight = 0.0
    """Augmented feature distillation."""

    cross_kd: Weight = 0.0
    """Relational distillation of the similarities between student and teacher."""

    affinity: Weight = 0.0
    """Affinity mimicking: relational distillation with one constant scale for both models."""

    sigmoid_kd: Weight = 0.0
    """Distillation of the probability that an image and a text are a pair, if both models are sigmoid models."""

    def key_fields(self) -> dict[str, float]:
        """Return the weights for a stage's key, without those that came after the first release and are 0."""
        weights: dict[str, float] = self.model_dump()
        return {name: weight for name, weight in weights.items() if weight or name not in _ADDED_WEIGHTS}


OF_OWN_FEATURES = ("task", "crd", "affinity", "sigmoid_kd")
"""Objectives of the features that ship; the others see them through projections to a teacher's width, or fused."""

NEED_CAPTIONS = ("task", "gd", "icl", "afd")
"""Objectives that need each image to be paired with its own caption."""

AFFINITY_LOGIT_SCALE = 50.0
"""Default scale of affinity mimicking, from TinyCLIP's scripts (`--logit-scale 50`)."""

WITHOUT_CAPTIONS = "fd, mfd, crd, cross_kd, affinity or sigmoid_kd"
"""The other objectives, for messages."""


class TeacherCacheSpec(Section):
    """The teacher's features of every view of `data.views` and every caption, computed once (docs/teacher_cache.md)."""

    dtype: StoredDtype = "float32"
    """Data type of the stored features; int8 has one scale per row."""

    path: str | None = None
    """Teacher cache of another run with the same data and teacher: runs/OTHER/teacher-cache/teacher, relative to the
    current folder.  Absent: this run's own cache, made if it does not exist."""

    also: Several[TeacherSpec] = ()
    """More teachers whose features `clipkd cache` stores, for use by other recipes."""

    @model_validator(mode="after")
    def _check_also(self) -> "TeacherCacheSpec":
        if any(spec.recipe is not None for spec in self.also):
            raise ValueError("also: a teacher cannot be given by recipe; train it first, and name its run as model")
        return self


# Fields and weights that came after the first release: `key_fields` leaves their defaults out.
_ADDED_FIELDS: tuple[str, ...] = ("batch_norm", "tf32", "affinity_logit_scale")
_ADDED_WEIGHTS: tuple[str, ...] = ("affinity", "sigmoid_kd")


class DistillSpec(Section):
    steps: Positive | None = None
    """Number of optimizer steps; give either `steps` or `epochs`."""

    epochs: Positive | None = None

    batch_size: BatchSize
    """Samples per optimizer step, over all ranks."""

    lr: Annotated[float, Field(gt=0)]
    """Peak learning rate of AdamW, reached at the end of warm-up."""

    warmup: Annotated[int, Field(ge=0)]
    """Number of steps of linear warm-up."""

    weight_decay: Weight = 0.1
    loss_weights: LossWeights = LossWeights()

    mask_ratio: Annotated[float, Field(ge=0, lt=1)] = 0.75
    """Fraction of patches that MFD hides from the student."""

    affinity_logit_scale: Annotated[float, Field(gt=0, le=100)] = AFFINITY_LOGIT_SCALE
    """Scale of both models' similarities in affinity mimicking."""

    reference_compat: bool = False
    """Reproduce CLIP-KD's released code where it differs from the paper's equations (docs/method.md)."""

    accumulate: Positive | Literal["auto"] = 1
    """Number of parts in which the samples of a rank pass the student: less memory, the gradients of the whole batch.
    Each part is computed twice.  auto: the smallest number that fits the free memory."""

    loss_memory_mb: Annotated[float, Field(gt=0)] = 128
    """Memory for the similarities of a block of samples with the batch, in MB of 2^20 bytes."""

    precision: Precision = "fp32"
    """Precision of the student's forward and backward pass; parameters, losses and optimizer stay float32."""

    teacher_precision: Precision = "fp32"

    teacher_cache: TeacherCacheSpec | None = None
    """Run the teacher once over every view before training, instead of in each step; {} uses the defaults."""

    grad_clip_norm: Annotated[float, Field(gt=0)] | None = None
    """Maximum norm of all gradients together, including those of the loss heads."""

    compile: bool = False
    """Compile student and teacher with torch.compile: takes minutes once, then speeds up steps on a GPU."""

    tf32: bool = False
    """Round the factors of fp32 matrix products and convolutions on a GPU to TF32 (10 bits of mantissa): faster, with
    other numbers.  It holds for the student and for a teacher without a cache; losses stay in float32."""

    batch_norm: Literal["all_processes", "per_process", "frozen"] = "all_processes"
    """Statistics that batch norms normalize by.  all_processes: those of the batch, over all processes under torchrun;
    per_process: those of each process's own rows, as in CLIP-KD's code; frozen: those that the student starts from, for
    students that start from weights.  Only frozen ones do not depend on `accumulate`."""

    evaluate_every: Positive | None = None
    """Number of steps between zero-shot evaluations of the student on the headline set.  Absent: none."""

    @property
    def parts(self) -> int:
        """The number of parts, after `auto` has been replaced by a number."""
        assert self.accumulate != "auto"
        return self.accumulate

    def num_steps(self, steps_per_epoch: int) -> int:
        """Return the number of optimizer steps."""
        return self.steps or (self.epochs or 0) * steps_per_epoch

    def key_fields(self) -> dict[str, Any]:
        """Return the fields that decide the trained weights, for a stage's key.

        A field that came after the first release is left out at its default: keys of earlier runs stay valid.
        """
        without_effect: Any = {"teacher_cache": {"path", "also"}, "accumulate": True, "loss_memory_mb": True}
        fields = self.model_dump(exclude=without_effect)
        for name in _ADDED_FIELDS:
            if fields[name] == type(self).model_fields[name].default:
                del fields[name]
        return fields | {"loss_weights": self.loss_weights.key_fields()}

    def without_teacher(self) -> "DistillSpec":
        """Return the same training without a teacher: contrastive loss only, independent of teacher fields."""
        task_alone = LossWeights(**dict.fromkeys(LossWeights.model_fields, 0.0) | {"task": 1.0})
        changes: dict[str, Any] = {"loss_weights": task_alone, "teacher_cache": None, "teacher_precision": "fp32"}
        changes |= {"affinity_logit_scale": AFFINITY_LOGIT_SCALE, "reference_compat": False}
        return self.model_copy(update=changes)

    @model_validator(mode="after")
    def _check_length(self) -> "DistillSpec":
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give either steps or epochs")
        if self.steps is not None and self.warmup >= self.steps:
            raise ValueError(f"warmup ({self.warmup}) must be less than steps ({self.steps})")
        if not any(self.loss_weights.model_dump().values()):
            raise ValueError("all loss weights are 0; there is nothing to train")
        return self
