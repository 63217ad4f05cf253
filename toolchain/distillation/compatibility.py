"""Refuse a teacher and a student that cannot be trained together, before training starts."""

from open_clip.coca_model import CoCa

from toolchain.distillation.objectives import select
from toolchain.errors import UsageError
from toolchain.models.clip_model import ClipModel
from toolchain.models.patch_masking import check_can_mask
from toolchain.recipe.distill import LossWeights


def check_pair(student: ClipModel, teacher: ClipModel | None, weights: LossWeights) -> None:
    """Refuse, before any data is read, models that cannot be trained together as asked.

    Tokenizers, context lengths, image sizes, normalisation and widths may all differ.  So may the loss a teacher was
    trained with: the objectives that compare softmax distributions (CRD, GD, cross-KD) take a sigmoid teacher (SigLIP,
    arXiv:2303.15343) as it is.  It holds that pair (i, j) matches with probability sigma(l_ij), l = t cos + b,
    independently; given that exactly one candidate of i matches, which is what a batch of pairs says, it is j with

        prod_k (1 - sigma(l_ik)) sigma(l_ij) / (1 - sigma(l_ij))  ~  exp(l_ij),   that is  softmax_j(t cos_ij),

    where the bias b has cancelled.

    Raises:
        UsageError: the two cannot work together, or the student cannot be trained at all; with the reason.
    """
    for model in (student, teacher):
        if model is not None:
            _ = model.geometry
    if isinstance(student.net, CoCa):
        raise UsageError(
            f"student {student.name}: a CoCa model, whose caption decoder no loss here would train. Choose a student "
            "with an image tower and a text tower only; as a teacher this model is welcome"
        )
    if getattr(student.net, "logit_bias", None) is not None:
        raise UsageError(
            f"student {student.name}: has a logit_bias, made for a sigmoid loss; the losses here are softmax losses, "
            "in which a bias cancels and is never trained. Write student.model_cfg: {init_logit_bias: null}"
        )
    objectives = select(weights.model_dump(), with_teacher=teacher is not None).values()
    if any(objective.on_whole_image for objective in objectives):
        check_can_mask(student.net.visual)  # type: ignore[arg-type]
