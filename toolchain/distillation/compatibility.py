"""Check, before training starts, that a teacher and a student can be trained together."""

from collections.abc import Mapping

from open_clip.coca_model import CoCa

from toolchain.distillation.objectives import Objective, select
from toolchain.errors import UsageError
from toolchain.models.clip_model import ClipModel
from toolchain.models.patch_masking import check_can_mask
from toolchain.recipe.distill import OF_OWN_FEATURES, LossWeights


def check_pair(student: ClipModel, teacher: ClipModel | None, weights: LossWeights) -> None:
    """Check, before any data is read, that the models can be trained together with these weights.

    Tokenizers, context lengths, image sizes, normalization and widths may all differ.  At another width, an objective
    of the features that ship is needed, because the others train projections of them.

    The loss that trained the teacher may differ too: the objectives that compare softmax distributions (CRD, GD,
    cross-KD) accept a sigmoid teacher (SigLIP, arXiv:2303.15343) unchanged.  In its model, pair (i, j) matches with
    probability sigma(l_ij), l = t cos + b, independently.  In a batch of pairs exactly one candidate of i matches, and
    given that, it is j with probability

        prod_k (1 - sigma(l_ik)) sigma(l_ij) / (1 - sigma(l_ij))  ~  exp(l_ij),   that is  softmax_j(t cos_ij),

    and the bias b cancels.  For the same reason these objectives train a sigmoid student's scale, but not its bias.

    Raises:
        UsageError: the two cannot work together, or the student cannot be trained at all.  The message has the reason.
    """
    for model in (student, teacher):
        if model is not None:
            _ = model.geometry
    if isinstance(student.net, CoCa):
        raise UsageError(
            f"student {student.name}: a CoCa model, and no loss of clipkd trains its caption decoder. Choose a student "
            "with an image tower and a text tower only; this model can serve as the teacher"
        )
    objectives = select(weights.model_dump(), with_teacher=teacher is not None)
    if any(objective.on_whole_image for objective in objectives.values()):
        check_can_mask(student.net.visual)  # type: ignore[arg-type]
    _check_sigmoids(student, teacher, objectives, weights)
    if teacher is not None and teacher.embed_dim != student.embed_dim:
        _check_own_features(student, teacher, objectives)


def _check_own_features(student: ClipModel, teacher: ClipModel, objectives: Mapping[str, Objective]) -> None:
    """Check that the student's own features are trained, and not only projections of them to the teacher's width.

    Raises:
        UsageError: they are not.
    """
    if not any(name in OF_OWN_FEATURES for name in objectives):
        raise UsageError(
            f"distill.loss_weights: the objectives with a weight ({', '.join(objectives)}) read the student's features "
            f"(width {student.embed_dim}) through projections to the teacher's width ({teacher.embed_dim}), so nothing "
            f"trains the features that ship. Give one of {', '.join(OF_OWN_FEATURES)} a weight, or choose a student of "
            "the teacher's width"
        )


def _check_sigmoids(
    student: ClipModel, teacher: ClipModel | None, objectives: Mapping[str, Objective], weights: LossWeights
) -> None:
    """Check that a sigmoid student's bias is trained or its teacher's, and that `sigmoid_kd` has two sigmoid models.

    Raises:
        UsageError: they do not fit.
    """
    trains_bias = any(objective.reads_logit_bias for objective in objectives.values())
    if student.logit_bias is not None and not trains_bias and not student.has_teachers_text:
        raise UsageError(
            f"student {student.name}: has a logit_bias, as sigmoid models do (SigLIP), but no objective with a weight "
            "trains it. Give distill.loss_weights.task a weight (of a sigmoid student it is the sigmoid loss), or with "
            "a sigmoid teacher distill.loss_weights.sigmoid_kd; or make it a softmax model: student.model_cfg: "
            "{init_logit_bias: null}"
        )
    if not weights.sigmoid_kd:  # without a teacher too: quantization then takes the student as its own teacher
        return
    for role, model in (("student", student), ("teacher", teacher)):
        if model is not None and model.logit_bias is None:
            advice = (
                "Make it a sigmoid model: student.model_cfg: {init_logit_bias: -10, init_logit_scale: 2.3026}"
                if role == "student"
                else "Choose a sigmoid teacher (SigLIP), or use crd, which needs no bias"
            )
            raise UsageError(
                f"{role} {model.name}: has no logit_bias, and distill.loss_weights.sigmoid_kd compares the "
                f"probabilities of two sigmoid models. {advice}"
            )
