"""Check, before training starts, that a teacher and a student can be trained together."""

from open_clip.coca_model import CoCa

from toolchain.distillation.objectives import select
from toolchain.errors import UsageError
from toolchain.models.clip_model import ClipModel
from toolchain.models.patch_masking import check_can_mask
from toolchain.recipe.distill import LossWeights


def check_pair(student: ClipModel, teacher: ClipModel | None, weights: LossWeights) -> None:
    """Check, before any data is read, that the models can be trained together with these weights.

    Tokenizers, context lengths, image sizes, normalization and widths may all differ.  So may the loss that trained the
    teacher: the objectives that compare softmax distributions (CRD, GD, cross-KD) accept a sigmoid teacher (SigLIP,
    arXiv:2303.15343) unchanged.  In its model, pair (i, j) matches with probability sigma(l_ij), l = t cos + b,
    independently.  In a batch of pairs exactly one candidate of i matches, and given that, it is j with probability

        prod_k (1 - sigma(l_ik)) sigma(l_ij) / (1 - sigma(l_ij))  ~  exp(l_ij),   that is  softmax_j(t cos_ij),

    and the bias b cancels.

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
    if getattr(student.net, "logit_bias", None) is not None:
        raise UsageError(
            f"student {student.name}: has a logit_bias, which belongs to a sigmoid loss; clipkd's losses are softmax "
            "losses, in which a bias cancels and is never trained. Set student.model_cfg: {init_logit_bias: null}"
        )
    objectives = select(weights.model_dump(), with_teacher=teacher is not None).values()
    if any(objective.on_whole_image for objective in objectives):
        check_can_mask(student.net.visual)  # type: ignore[arg-type]
