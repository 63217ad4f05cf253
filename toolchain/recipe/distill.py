"""The `distill` section: objectives, schedule, teacher cache.

The weights of the objectives stand here, and which of them need captions; everything else about an objective stands in
distillation/objectives.py.
"""

from typing import Annotated

from pydantic import Field, model_validator

from toolchain.recipe.model import TeacherSpec
from toolchain.recipe.section import BatchSize, Positive, Precision, Section, StoredDtype, Weight


class LossWeights(Section):
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


NEED_CAPTIONS = ("task", "gd", "icl", "afd")
"""Objectives that hold an image and its caption to belong together."""


class TeacherCacheSpec(Section):
    """The teacher's features of every view of `data.views` and every caption, computed once (docs/teacher_cache.md)."""

    dtype: StoredDtype = "float32"
    """How they are stored; int8 with a scale for each row."""

    path: str | None = None
    """A cache that another run made of the same data and teacher: runs/OTHER/teacher-cache/teacher.
    Absent: this run's own, made if it is not there.  Relative to the folder clipkd runs in."""

    also: tuple[TeacherSpec, ...] = ()
    """Further teachers that `clipkd cache` stores the features of, for other recipes."""

    @model_validator(mode="after")
    def _check_further_teachers(self) -> "TeacherCacheSpec":
        if any(spec.recipe is not None for spec in self.also):
            raise ValueError("also: a teacher that a recipe trains is trained by that recipe; name its run as model")
        return self


class DistillSpec(Section):
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

    def num_steps(self, steps_per_epoch: int) -> int:
        """Return the number of optimizer steps."""
        return self.steps or (self.epochs or 0) * steps_per_epoch

    def without_teacher(self) -> "DistillSpec":
        """Return the same training without a teacher: contrastive, and independent of every field that concerns one."""
        task_alone = LossWeights(**dict.fromkeys(LossWeights.model_fields, 0.0) | {"task": 1.0})
        changes = {"loss_weights": task_alone, "teacher_cache": None, "teacher_precision": "fp32"}
        return self.model_copy(update=changes | {"reference_compat": False})

    @model_validator(mode="after")
    def _check_length(self) -> "DistillSpec":
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give either steps or epochs")
        if self.steps is not None and self.warmup >= self.steps:
            raise ValueError(f"warmup ({self.warmup}) must be less than steps ({self.steps})")
        if not any(self.loss_weights.model_dump().values()):
            raise ValueError("all loss weights are 0; there is nothing to train")
        return self
