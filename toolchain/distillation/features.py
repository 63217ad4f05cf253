"""The features of a batch that the objectives compare: one per row, of unit norm."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class TeacherFeatures(NamedTuple):
    """The teacher's features of one batch: rows of unit norm; its multiplier, and its bias if it is a sigmoid model.

    The features of several teachers stand side by side in E columns, each of unit norm alone; the scales and biases are
    then vectors.
    """

    image_BE: Tensor
    text_BE: Tensor
    logit_scale: Tensor
    logit_bias: Tensor | None = None
    widths: tuple[int, ...] = ()
    """Number of columns of each teacher, if there are several."""


class StudentFeatures(NamedTuple):
    """The student's features of one batch that objectives read: rows of unit norm, in float32 or wider.

    If the widths agree, nothing is projected and `image_BE` is the same tensor as `image_BD`.  For several teachers,
    the projections to each teacher's width stand side by side, as their features do.
    """

    image_BD: Tensor
    text_BD: Tensor
    image_BE: Tensor | None = None
    text_BE: Tensor | None = None
    masked_image_BE: Tensor | None = None
    fused_image_BD: Tensor | None = None
    fused_text_BD: Tensor | None = None


class Scales(NamedTuple):
    """Multipliers of the similarities, all learnt: the student's own, and those that the objectives add.

    A sigmoid model (SigLIP, arXiv:2303.15343) also has a bias, which is added to every product.
    """

    logit_scale: Tensor
    cross_logit_scale: Tensor | None = None
    """The multiplier of similarities between the two models."""

    fusion_logit_scale: Tensor | None = None
    """The multiplier of similarities between fused features."""

    logit_bias: Tensor | None = None
    """The student's own bias; None: the student is a softmax model."""


class BatchFeatures(NamedTuple):
    """The features of one batch, or of one rank's rows of it; without a teacher, the student's alone."""

    student: StudentFeatures
    teacher: TeacherFeatures | None


def split_teachers(features: BatchFeatures) -> list[BatchFeatures]:
    """Return the features for each teacher alone: its own, and the student's in its width."""
    student, teacher = features
    if teacher is None or not teacher.widths:
        return [features]

    widths, number = list(teacher.widths), len(teacher.widths)

    def split(x_BE: Tensor | None) -> Sequence[Tensor | None]:
        return [None] * number if x_BE is None else torch.split(x_BE, widths, dim=1)

    biases = [None] * number if teacher.logit_bias is None else teacher.logit_bias.unbind()
    features_of = (torch.split(x_BE, widths, dim=1) for x_BE in (teacher.image_BE, teacher.text_BE))
    of_teachers = zip(*features_of, teacher.logit_scale.unbind(), biases, strict=True)
    of_student = zip(split(student.image_BE), split(student.text_BE), split(student.masked_image_BE), strict=True)
    return [
        BatchFeatures(student._replace(image_BE=image, text_BE=text, masked_image_BE=masked), TeacherFeatures(*own))
        for own, (image, text, masked) in zip(of_teachers, of_student, strict=True)
    ]


def gather_features(features: BatchFeatures, gather: Callable[[Tensor], Tensor]) -> BatchFeatures:
    """Return the features of all ranks' samples; the student's with one call of `gather`.

    `gather` takes the rows of one rank and returns those of all ranks; the gradient is as exact as that of `gather`.
    It receives all of the student's features concatenated [B, sum of widths] in their common dtype, each distinct
    tensor once.
    """
    distinct = {id(x): x for x in features.student if x is not None}
    everything = gather(torch.cat(list(distinct.values()), dim=1))
    columns = torch.split(everything, [x.shape[1] for x in distinct.values()], dim=1)
    found = dict(zip(distinct, columns, strict=True))
    student = StudentFeatures._make(None if x is None else found[id(x)] for x in features.student)
    teacher = features.teacher
    if teacher is not None:
        teacher = teacher._replace(image_BE=gather(teacher.image_BE), text_BE=gather(teacher.text_BE))
    return BatchFeatures(student, teacher)
