"""The training losses, each a pure function of unit-norm features and scales.

All come from CLIP-KD (arXiv:2307.12732) and CLIP (arXiv:2103.00020).  A loss takes features, never logits, so that the
B x B similarities can be swept in blocks of rows without a change of signature.  Gathering over devices, the weights
of the losses and the learnable heads are the caller's; no gradient is stopped here, so hand over teacher features
that carry none.

Arithmetic is float32 or wider whatever the input and whatever autocast says: the features are unit vectors multiplied
by a scale of up to 100, and bfloat16 would leave logits with steps of 0.5.  float64 stays float64.  NaN stays NaN.

    B batch   D student width   E teacher width   K candidates of a row   1 broadcast

Features are one per row; logits have anchors in rows and candidates in columns.  A `logit_scale` is the multiplier,
its logarithm is always called `log_logit_scale`.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MAX_LOGIT_SCALE = 100.0
"""Bound on a learnt multiplier, from CLIP (arXiv:2103.00020), section 2.5: beyond it training is unstable."""

_INITIAL_LOGIT_SCALE = 1 / 0.07  # CLIP, section 2.5


def clip_loss(image_BD: Tensor, text_BD: Tensor, logit_scale: Tensor | float) -> Tensor:
    """Contrastive task loss: a pair's image and text pick each other out of the batch.

        L = 1/2 [ CE(s u w^T) + CE(s w u^T) ],   CE(Z) = mean_i -log softmax(Z_i)_i

    u, w: unit-norm image and text features [B, D]; s: `logit_scale`.  CLIP (arXiv:2103.00020), figure 3.
    Scalar, mean over B, in nats; >= 0, and log B when the features say nothing.
    """
    image_anchored = _mean_cross_entropy(image_BD, text_BD, logit_scale)
    return (image_anchored + _mean_cross_entropy(text_BD, image_BD, logit_scale)) / 2


def crd_loss(
    student_image_BD: Tensor,
    student_text_BD: Tensor,
    logit_scale: Tensor | float,
    teacher_image_BE: Tensor,
    teacher_text_BE: Tensor,
    teacher_logit_scale: Tensor | float,
) -> Tensor:
    """Contrastive relational distillation: match the teacher's distribution over in-batch matches.

        L = 1/2 [ mean_i KL(p_i || q_i)  over image -> text  +  the same over text -> image ]
        p = softmax(r V T^T),   q = softmax(s u w^T),   over the B candidates of a row

    u, w: student features [B, D]; V, T: teacher features [B, E]; all unit-norm, the widths may differ.  Each model
    keeps its own scale, s and r.  CLIP-KD (arXiv:2307.12732), section "Contrastive Relational Distillation".
    Scalar, mean over B, in nats; >= 0, and 0 iff the distributions agree.
    """
    student = (student_image_BD, student_text_BD, logit_scale)
    teacher = (teacher_image_BE, teacher_text_BE, teacher_logit_scale)
    student_image_BB, student_text_BB = _both_directions(*student)
    teacher_image_BB, teacher_text_BB = _both_directions(*teacher)
    return (_mean_kl(teacher_image_BB, student_image_BB) + _mean_kl(teacher_text_BB, student_text_BB)) / 2


def fd_loss(image_BD: Tensor, text_BD: Tensor, teacher_image_BD: Tensor, teacher_text_BD: Tensor) -> Tensor:
    """Feature distillation: the squared distance to the teacher's features, image plus text.

        L = mean_i |p_i - V_i|^2 + mean_i |q_i - T_i|^2  =  mean_i (2 - 2 cos(p_i, V_i)) + mean_i (2 - 2 cos(q_i, T_i))

    p, q: student features in the teacher's width (see `DistillationHeads`); V, T: teacher features; all unit-norm
    [B, D], D the teacher's width here.  CLIP-KD (arXiv:2307.12732), section "Feature Distillation".
    Scalar, summed over D and over the two modalities, mean over B; in [0, 8], and 4 for orthogonal features.

    The sum over D makes its weight independent of the width.  CLIP-KD's code takes the mean over D and its recipes
    say 2000: that weight is 2000 / D here (3.9 at D = 512).
    """
    return _mean_square_distance(image_BD, teacher_image_BD) + _mean_square_distance(text_BD, teacher_text_BD)


def icl_loss(
    image_BD: Tensor,
    text_BD: Tensor,
    teacher_image_BD: Tensor,
    teacher_text_BD: Tensor,
    cross_logit_scale: Tensor | float,
) -> Tensor:
    """Interactive contrastive learning: a student feature picks its pair out of the teacher's features.

        L = 1/2 [ CE(c p T^T) + CE(c q V^T) ],   CE as in `clip_loss`

    p, q: student image and text features in the teacher's width; V, T: teacher image and text features; all unit-norm
    [B, D], D the teacher's width here; c: `cross_logit_scale`.  The student anchors and the teacher supplies the
    candidates, one direction for each modality.  CLIP-KD (arXiv:2307.12732), section "Interactive Contrastive
    Learning".  Scalar, mean over B, in nats; >= 0, and log B when the features say nothing.
    """
    image_anchored = _mean_cross_entropy(image_BD, teacher_text_BD, cross_logit_scale)
    return (image_anchored + _mean_cross_entropy(text_BD, teacher_image_BD, cross_logit_scale)) / 2


class DistillationHeads(nn.Module):
    """The parameters that distillation adds to a student, and that the student ships without.

    `image_projection`, `text_projection`: Linear(D, E) with bias when the widths differ, else None.
    `log_cross_logit_scale`: logarithm of the scale of `icl_loss`, from ln(1 / 0.07).

    CLIP-KD's released code applies that parameter raw, a multiplier of 2.66 instead of 14.3.  Here it is exponentiated
    like every other log scale, which is what its initial value says was meant.
    """

    def __init__(self, student_width: int, teacher_width: int) -> None:
        super().__init__()
        differ = student_width != teacher_width
        self.image_projection = nn.Linear(student_width, teacher_width) if differ else None
        self.text_projection = nn.Linear(student_width, teacher_width) if differ else None
        self.log_cross_logit_scale = nn.Parameter(torch.tensor(math.log(_INITIAL_LOGIT_SCALE)))

    @property
    def cross_logit_scale(self) -> Tensor:
        """The multiplier of `icl_loss`, at most 100.

        The gradient is zero beyond the bound, so a training loop also clamps the parameter after each step
        (`clamp_parameters_`), as CLIP does with its own.
        """
        # Not Tensor.clamp: at the bound itself, where `clamp_parameters_` puts the parameter, its gradient is 0, 1/2 or
        # 1 by torch version and overload, and with 0 the parameter never comes back.
        log_scale = self.log_cross_logit_scale
        bound = log_scale.new_full((), math.log(MAX_LOGIT_SCALE))  # in the parameter's dtype, so that it can be equal
        return torch.where(log_scale > bound, bound, log_scale).exp()

    @torch.no_grad()
    def clamp_parameters_(self) -> None:
        """Bring the log scale back into [0, ln 100], where its gradient lives."""
        self.log_cross_logit_scale.clamp_(0, math.log(MAX_LOGIT_SCALE))

    def forward(self, raw_image_BD: Tensor, raw_text_BD: Tensor) -> tuple[Tensor, Tensor]:
        """Unit-norm image and text features [B, E], for `fd_loss` and `icl_loss`.

            p = normalize(W x + b),   or normalize(x) when the widths agree

        x: the student's RAW features, before normalisation, of the image tower and the text tower.  Their length
        matters because of the bias.  In float32 at least, also under autocast.
        """
        return _project(self.image_projection, raw_image_BD), _project(self.text_projection, raw_text_BD)


def _project(projection: nn.Linear | None, raw_BD: Tensor) -> Tensor:
    with torch.autocast(raw_BD.device.type, enabled=False):
        raw_BD = _widened(raw_BD)
        return F.normalize(raw_BD if projection is None else projection(raw_BD), dim=-1)


def _widened(x: Tensor) -> Tensor:
    """`x` in float32, or in float64 if it is that."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _logits(anchor_BD: Tensor, candidate_KD: Tensor, logit_scale: Tensor | float) -> Tensor:
    """[B, K] scaled similarities."""
    with torch.autocast(anchor_BD.device.type, enabled=False):  # it would multiply in 16 bits
        return logit_scale * (_widened(anchor_BD) @ _widened(candidate_KD).T)


def _both_directions(image_BD: Tensor, text_BD: Tensor, logit_scale: Tensor | float) -> tuple[Tensor, Tensor]:
    image_logits_BB = _logits(image_BD, text_BD, logit_scale)
    return image_logits_BB, image_logits_BB.T


def _mean_cross_entropy(anchor_BD: Tensor, candidate_BD: Tensor, logit_scale: Tensor | float) -> Tensor:
    """Mean over rows of -log softmax, the match of anchor i being candidate i."""
    logits_BB = _logits(anchor_BD, candidate_BD, logit_scale)
    return F.cross_entropy(logits_BB, torch.arange(len(logits_BB), device=logits_BB.device))


def _mean_kl(p_logits_BK: Tensor, q_logits_BK: Tensor) -> Tensor:
    """Mean over rows of KL(p || q), with p and q given as logits."""
    log_p_BK, log_q_BK = p_logits_BK.log_softmax(-1), q_logits_BK.log_softmax(-1)
    return F.kl_div(log_q_BK, log_p_BK, reduction="batchmean", log_target=True)


def _mean_square_distance(a_BD: Tensor, b_BD: Tensor) -> Tensor:
    """Mean over rows of |a - b|^2, which near zero keeps the digits that 2 - 2 cos cancels."""
    return (_widened(a_BD) - _widened(b_BD)).square().sum(-1).mean()
