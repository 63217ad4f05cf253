"""The whole recipe: its sections and the rules between them."""

from typing import Annotated

from pydantic import Field, model_validator

from toolchain.precisions import REFERENCE_PRECISION
from toolchain.recipe.data import DataSpec
from toolchain.recipe.distill import NEED_CAPTIONS, OF_OWN_FEATURES, WITHOUT_CAPTIONS, DistillSpec
from toolchain.recipe.evaluate import EvaluateSpec
from toolchain.recipe.export import ExportSpec, ProfileSpec
from toolchain.recipe.model import CORPUS_SECTIONS, StudentSpec, TeacherSpec
from toolchain.recipe.quantize import QuantizeSpec
from toolchain.recipe.section import Section, Several


class Recipe(Section):
    name: str
    seed: Annotated[int, Field(ge=0, lt=1 << 63)] = 0
    data: Annotated[DataSpec | None, Field(discriminator="kind")] = None
    """Training data.  Absent: nothing is trained or calibrated."""

    teacher: TeacherSpec | None = None
    """Absent: plain contrastive training, as for baselines and teachers."""

    more_teachers: Several[TeacherSpec] = ()
    """Further teachers of the same student: it learns the mean of their relations, and the features of each
    (docs/method.md).  They need distill.teacher_cache."""

    student: StudentSpec
    baseline: bool = False
    """Also train the same student without the teacher, from the same seed and batches."""

    distill: DistillSpec | None = None
    """Absent: the student keeps its existing weights (clipkd adopt)."""

    quantize: QuantizeSpec | None = None
    """Absent: no int8 student."""

    export: ExportSpec = ExportSpec()
    evaluate: EvaluateSpec | None = None
    """Absent: train only; accuracies and the report need this section."""

    profile: ProfileSpec = ProfileSpec()

    @property
    def teachers(self) -> dict[str, TeacherSpec]:
        """The teachers of the student by the names of their stages: teacher, teacher-2, and so on."""
        specs = (self.teacher, *self.more_teachers) if self.teacher else ()
        return {"teacher" if number == 1 else f"teacher-{number}": spec for number, spec in enumerate(specs, 1)}

    @model_validator(mode="after")
    def _suit_default_precisions(self) -> "Recipe":
        """Return the recipe without int8 if nobody wrote it and nothing can make it."""
        if self.quantize is None and self.export.auto is None and "precisions" not in self.export.model_fields_set:
            return self.model_copy(
                update={"export": self.export.model_copy(update={"precisions": (REFERENCE_PRECISION,)})}
            )
        return self

    @model_validator(mode="after")
    def _check_training(self) -> "Recipe":
        if self.distill is not None:
            if self.data is None:
                raise ValueError("no `data` section to train on; add one")
            if self.distill.teacher_cache is not None and self.teacher is None:
                raise ValueError("distill.teacher_cache needs a `teacher` section; add one, or drop teacher_cache")
            if self.distill.teacher_cache is not None and self.data.views is None:
                raise ValueError(
                    "distill.teacher_cache needs data.views, the number of augmentations of each sample to store: "
                    "epoch e then shows view e mod views. Set it to 1 (the cheapest) or more, as the disk allows"
                )
        elif self.teacher is not None or self.baseline:
            raise ValueError(
                "teacher and baseline are for training, but there is no `distill` section; add one or drop them"
            )
        elif self.student.is_random and self.student.inherit is None:
            raise ValueError(
                "no `distill` section, so the student needs existing weights; "
                "add distill, or give student one of pretrained, checkpoint, init: weights"
            )
        if self.quantize is not None and self.data is None:
            raise ValueError("quantize needs a `data` section to calibrate on; add one, or drop quantize")
        return self

    @model_validator(mode="after")
    def _check_objectives_without_captions(self) -> "Recipe":
        kind = self.data.captionless_kind if self.data else None
        if self.distill is None or kind is None:
            return self
        weights = self.distill.loss_weights.model_dump()
        wrong = [name for name in NEED_CAPTIONS if weights[name]]
        if self.teacher is None or self.baseline:
            raise ValueError(f"data of kind {kind} has no captions: it needs a teacher, and baseline must be false")
        if wrong:
            raise ValueError(
                f"data of kind {kind} has no captions, but {', '.join(wrong)} need images with their own captions; "
                f"set {', '.join(f'distill.loss_weights.{name}' for name in wrong)} to 0 and use {WITHOUT_CAPTIONS}"
            )
        return self

    @model_validator(mode="after")
    def _check_more_teachers(self) -> "Recipe":
        if not self.more_teachers:
            return self
        if self.teacher is None:
            raise ValueError("more_teachers needs a `teacher` section; write the first teacher there")
        cache = self.distill.teacher_cache if self.distill else None
        if cache is None:
            raise ValueError(
                "more_teachers needs distill.teacher_cache, because several teachers do not run in each step; "
                "add teacher_cache: {}, and data.views"
            )
        assert self.distill is not None
        weights = self.distill.loss_weights.model_dump()
        if not any(weights[name] for name in OF_OWN_FEATURES):
            raise ValueError(
                "more_teachers: the objectives with a weight read the student's features through projections to each "
                f"teacher's width, so nothing trains the features that ship; give one of {', '.join(OF_OWN_FEATURES)} "
                "a weight in distill.loss_weights"
            )
        if cache.path is not None:
            raise ValueError("distill.teacher_cache.path is the cache of one teacher; remove path, or more_teachers")
        if self.student.has_teachers_text:
            raise ValueError("student.text_tower: teacher is the text tower of one teacher; remove more_teachers")
        return self

    @model_validator(mode="after")
    def _check_text_tower(self) -> "Recipe":
        if self.student.has_teachers_text and (self.teacher is None or self.distill is None):
            raise ValueError("student.text_tower: teacher needs the sections `teacher` and `distill`; add them")
        if self.student.has_teachers_text and self.baseline:
            raise ValueError(
                "student.text_tower: teacher has no baseline: without a teacher there is no text tower. "
                "Set baseline: false"
            )
        return self

    @model_validator(mode="after")
    def _check_student(self) -> "Recipe":
        if self.student.inherits_from_teacher and self.teacher is None:
            raise ValueError("student.inherit: teacher needs a `teacher` section; add one, or name a model")
        for section in CORPUS_SECTIONS:
            if section in self.student.vocabulary and getattr(self, section) is None:
                raise ValueError(f"student.vocabulary: {section} needs the section `{section}`; add it, or name a file")
        return self

    @model_validator(mode="after")
    def _check_int8(self) -> "Recipe":
        if self.export.is_quantized and self.quantize is None and self.export.auto is None:
            raise ValueError("export.precisions has int8, but there is no `quantize` section; add one or drop int8")
        return self

    @model_validator(mode="after")
    def _check_baseline(self) -> "Recipe":
        if self.baseline and self.teacher is None:
            raise ValueError("baseline: true needs a `teacher` section; add one, or drop baseline")
        return self

    @model_validator(mode="after")
    def _check_evaluation(self) -> "Recipe":
        if self.distill is not None and self.distill.evaluate_every and self.evaluate is None:
            raise ValueError("distill.evaluate_every needs an `evaluate` section with the headline set; add one")
        return self
