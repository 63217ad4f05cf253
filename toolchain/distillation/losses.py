"""The definitions of the training losses, each a pure function of unit-norm features and scales.

The losses come from CLIP-KD (arXiv:2307.12732), CLIP (arXiv:2103.00020), TinyCLIP (arXiv:2309.12314) and SigLIP
(arXiv:2303.15343).  They hold the B x B similarities of a whole batch, as their equations do.  Training computes the
same numbers in blocks of rows (blockwise_losses.py), and the tests compare the two.  No gradient is stopped here: pass
teacher features without gradient.

Arithmetic is float32 or wider for every input, also under autocast: the features are unit vectors multiplied by a scale
of up to 100, and in bfloat16 the logits would have steps of 0.5.  float64 stays float64.  NaN stays NaN.

Features are one per row; logits have anchors in rows and candidates in columns.  A `logit_scale` is the multiplier;
its logarithm is always called `log_logit_scale`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

MAX_LOGIT_SCALE = 100.0
"""Bound on a learnt multiplier, from CLIP (arXiv:2103.00020), section 2.5: training is unstable above it."""


def clip_loss(image_BD: Tensor, text_BD: Tensor, logit_scale: Tensor | float) -> Tensor:
    """Return the contrastive task loss: a pair's image and text pick each other out of the batch.

        L = 1/2 [ CE(s u w^T) + CE(s w u^T) ],   CE(Z) = mean_i -log softmax(Z_i)_i

    u, w: unit-norm image and text features [B, D]; s: `logit_scale`.  CLIP (arXiv:2103.00020), figure 3.
    Scalar, mean over B, in nats; >= 0, and log B for uninformative features.
    """
    image_anchored = _mean_cross_entropy(image_BD, text_BD, logit_scale)
    return (image_anchored + _mean_cross_entropy(text_BD, image_BD, logit_scale)) / 2


def sigmoid_loss(image_BD: Tensor, text_BD: Tensor, logit_scale: Tensor | float, logit_bias: Tensor | float) -> Tensor:
    """Return the task loss of a sigmoid model: of every image and text, decide whether they are a pair.

        L = mean_i sum_j -log sigma(z_ij (s u_i w_j + b)),   z_ij = 1 if i = j, else -1

    u, w: unit-norm image and text features [B, D]; s: `logit_scale`; b: `logit_bias`.  SigLIP (arXiv:2303.15343),
    section 3.2.  Scalar, summed over the B candidates and mean over B, in nats; >= 0.  It is the same in both
    directions, so there is only one.
    """
    logits_BB = scaled_similarities(image_BD, text_BD, logit_scale) + logit_bias
    sign_BB = 2 * torch.eye(len(logits_BB), dtype=logits_BB.dtype, device=logits_BB.device) - 1
    return -F.logsigmoid(sign_BB * logits_BB).sum(-1).mean()


def crd_loss(
    student_image_BD: Tensor,
    student_text_BD: Tensor,
    logit_scale: Tensor | float,
    teacher_image_BE: Tensor,
    teacher_text_BE: Tensor,
    teacher_logit_scale: Tensor | float,
) -> Tensor:
    """Return the contrastive relational distillation loss: match the teacher's distribution over in-batch matches.

        L = 1/2 [ mean_i KL(p_i || q_i)  over image -> text  +  the same over text -> image ]
        p = softmax(r V T^T),   q = softmax(s u w^T),   over the B candidates of a row

    u, w: student features [B, D]; V, T: teacher features [B, E]; all unit-norm; the widths may differ.  Each model
    keeps its own scale, s and r.  CLIP-KD (arXiv:2307.12732), section "Contrastive Relational Distillation".
    Scalar, mean over B, in nats; >= 0, and 0 iff the distributions agree.
    """
    student = (student_image_BD, student_text_BD, logit_scale)
    teacher = (teacher_image_BE, teacher_text_BE, teacher_logit_scale)
    student_image_BB, student_text_BB = _both_directions(*student)
    teacher_image_BB, teacher_text_BB = _both_directions(*teacher)
    return (_mean_kl(teacher_image_BB, student_image_BB) + _mean_kl(teacher_text_BB, student_text_BB)) / 2


def affinity_loss(
    student_image_BD: Tensor,
    student_text_BD: Tensor,
    teacher_image_BE: Tensor,
    teacher_text_BE: Tensor,
    affinity_logit_scale: Tensor | float,
) -> Tensor:
    """Return the affinity mimicking loss: the cross entropy of the student's in-batch affinities with the teacher's.

        L = 1/2 [ mean_i -sum_j p_ij log q_ij  over image -> text  +  the same over text -> image ]
        p = softmax(a V T^T),   q = softmax(a u w^T),   over the B candidates of a row

    u, w: student features [B, D]; V, T: teacher features [B, E]; all unit-norm; the widths may differ.
    a: `affinity_logit_scale`, ONE constant for both models.  TinyCLIP (arXiv:2309.12314), section on affinity
    mimicking; its scripts set a = 50.  Scalar, mean over B, in nats; at least the entropy of p, which it is iff q = p.

    The entropy of p is constant, so the gradients are those of `crd_loss` with a in place of both scales.  That is the
    difference: in CRD each model has its own scale, and a student can match the teacher's distributions with smaller
    differences of cosines and a larger scale.  Here the cosines themselves must equal the teacher's, up to one constant
    for all, and no scale is trained.
    """
    student_image_BB, student_text_BB = _both_directions(student_image_BD, student_text_BD, affinity_logit_scale)
    teacher_image_BB, teacher_text_BB = _both_directions(teacher_image_BE, teacher_text_BE, affinity_logit_scale)
    image_anchored = F.cross_entropy(student_image_BB, teacher_image_BB.softmax(-1))
    return (image_anchored + F.cross_entropy(student_text_BB, teacher_text_BB.softmax(-1))) / 2


def sigmoid_kd_loss(
    student_image_BD: Tensor,
    student_text_BD: Tensor,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float,
    teacher_image_BE: Tensor,
    teacher_text_BE: Tensor,
    teacher_logit_scale: Tensor | float,
    teacher_logit_bias: Tensor | float,
) -> Tensor:
    """Return the sigmoid distillation loss: match the teacher's probability that an image and a text are a pair.

        L = mean_i sum_j [ p_ij log(p_ij / q_ij) + (1 - p_ij) log((1 - p_ij) / (1 - q_ij)) ]
        p = sigma(r V T^T + c),   q = sigma(s u w^T + b)

    u, w: student features [B, D]; V, T: teacher features [B, E]; all unit-norm; the widths may differ.  Both are
    sigmoid models (SigLIP, arXiv:2303.15343) with their own scales s, r and biases b, c.  It is to `sigmoid_loss` what
    `crd_loss` is to `clip_loss`: the pairs' labels are replaced by the teacher's probabilities.  Scalar, summed over
    the B candidates and mean over B, in nats; >= 0, and 0 iff the probabilities agree.
    """
    student_BB = scaled_similarities(student_image_BD, student_text_BD, logit_scale) + logit_bias
    teacher_BB = scaled_similarities(teacher_image_BE, teacher_text_BE, teacher_logit_scale) + teacher_logit_bias
    # not 1 - sigmoid(x), which has no digits left of a probability near 1
    yes_BB = teacher_BB.sigmoid() * (F.logsigmoid(teacher_BB) - F.logsigmoid(student_BB))
    no_BB = (-teacher_BB).sigmoid() * (F.logsigmoid(-teacher_BB) - F.logsigmoid(-student_BB))
    return (yes_BB + no_BB).sum(-1).mean()


def fd_loss(image_BD: Tensor, text_BD: Tensor, teacher_image_BD: Tensor, teacher_text_BD: Tensor) -> Tensor:
    """Return the feature distillation loss: squared distance to the teacher's features, image plus text.

        L = mean_i |p_i - V_i|^2 + mean_i |q_i - T_i|^2  =  mean_i (2 - 2 cos(p_i, V_i)) + mean_i (2 - 2 cos(q_i, T_i))

    p, q: student features in the teacher's width (see `DistillationHeads`); V, T: teacher features; all unit-norm
    [B, D], D the teacher's width here.  CLIP-KD (arXiv:2307.12732), section "Feature Distillation".  Masked feature
    distillation, its next section, is this loss with p of an image of which the student saw only some patches.
    Scalar, summed over D and over the two modalities, mean over B; in [0, 8], and 4 for orthogonal features.

    The sum over D makes the weight independent of the width.  CLIP-KD's code takes the mean over D with a weight of
    2000 in its recipes, which is 2000 / D here (3.9 at D = 512).
    """
    return _mean_square_distance(image_BD, teacher_image_BD) + _mean_square_distance(text_BD, teacher_text_BD)


def icl_loss(
    image_BD: Tensor,
    text_BD: Tensor,
    teacher_image_BD: Tensor,
    teacher_text_BD: Tensor,
    cross_logit_scale: Tensor | float,
) -> Tensor:
    """Return the interactive contrastive loss: a student feature picks its pair out of the teacher's features.

        L = 1/2 [ CE(c p T^T) + CE(c q V^T) ],   CE as in `clip_loss`

    p, q: student image and text features in the teacher's width; V, T: teacher image and text features; all unit-norm
    [B, D], D the teacher's width here; c: `cross_logit_scale`.  Anchors are the student's and candidates the
    teacher's, one direction for each modality.  CLIP-KD (arXiv:2307.12732), section "Interactive Contrastive
    Learning".  Scalar, mean over B, in nats; >= 0, and log B for uninformative features.
    """
    image_anchored = _mean_cross_entropy(image_BD, teacher_text_BD, cross_logit_scale)
    return (image_anchored + _mean_cross_entropy(text_BD, teacher_image_BD, cross_logit_scale)) / 2


def gd_loss(
    image_BD: Tensor,
    text_BD: Tensor,
    logit_scale: Tensor | float,
    teacher_image_BD: Tensor,
    teacher_text_BD: Tensor,
    teacher_logit_scale: Tensor | float,
) -> Tensor:
    """Return the gradient distillation loss: match the gradients of the task loss in both models' features.

        L = sum of four terms  mean_i |B g_i - B G_i|^2,   g = the gradient of CE(s p q^T) in p, in q, and
            of CE(s q p^T) in q, in p;   G = the same of V, T and r
        B dCE(s a k^T)/da = s (A k - k),   B dCE(s a k^T)/dk = s (A^T a - a),   A = softmax(s a k^T) over a row

    p, q: student features in the teacher's width; V, T: teacher features; all unit-norm [B, D], D the teacher's width
    here; s, r: the scales, which MULTIPLY the similarities.  CLIP-KD (arXiv:2307.12732), section "Gradient
    Distillation".  Scalar, summed over D and the four terms, mean over B; >= 0, and 0 where the models agree.

    CLIP-KD's code takes the mean over B and D of the gradients of a mean over B, so B^2 D times its value is this loss.
    Its weight of 1e8 at B = 1024, D = 512 is 1e8 / (1024^2 * 512) = 0.186 here, at every batch size and width.  The
    released code also divides by the scales where the equation multiplies: pass 1 / s and 1 / r to reproduce it.
    """
    student = *_scaled_gradients(image_BD, text_BD, logit_scale), *_scaled_gradients(text_BD, image_BD, logit_scale)
    teacher = (
        *_scaled_gradients(teacher_image_BD, teacher_text_BD, teacher_logit_scale),
        *_scaled_gradients(teacher_text_BD, teacher_image_BD, teacher_logit_scale),
    )
    return torch.stack([_mean_square_distance(g_BD, G_BD) for g_BD, G_BD in zip(student, teacher, strict=True)]).sum()


def afd_loss(fused_image_BD: Tensor, fused_text_BD: Tensor, fusion_logit_scale: Tensor | float) -> Tensor:
    """Return the augmented feature distillation loss: the task loss of features fused from both models.

        L = 1/2 [ CE(f h k^T) + CE(f k h^T) ],   CE as in `clip_loss`

    h, k: unit-norm fusions [B, D] of both models' image and both models' text features (see `DistillationHeads`);
    f: `fusion_logit_scale`.  CLIP-KD (arXiv:2307.12732), section "Augmented Feature Distillation".  Scalar, mean over
    B, in nats; >= 0, and log B for uninformative features.
    """
    return clip_loss(fused_image_BD, fused_text_BD, fusion_logit_scale)


def cross_kd_loss(
    image_BD: Tensor,
    text_BD: Tensor,
    teacher_image_BD: Tensor,
    teacher_text_BD: Tensor,
    cross_logit_scale: Tensor | float,
    teacher_logit_scale: Tensor | float,
) -> Tensor:
    """Return the cross-model relational loss: `crd_loss` with `icl_loss`'s similarities instead of the student's.

        L = 1/2 [ mean_i KL(P_i || softmax(c p T^T)_i) + mean_i KL(Q_i || softmax(c q V^T)_i) ]
        P = softmax(r V T^T),   Q = softmax(r T V^T),   over the B candidates of a row

    p, q: student features in the teacher's width; V, T: teacher features; all unit-norm [B, D], D the teacher's width
    here; c: `cross_logit_scale`, r: `teacher_logit_scale`.  CLIP-KD's code has it (`--alpha_cross_kd_loss`), but no
    recipe uses it.  Scalar, mean over B, in nats; >= 0, and 0 iff the distributions agree.
    """
    teacher_image_BB, teacher_text_BB = _both_directions(teacher_image_BD, teacher_text_BD, teacher_logit_scale)
    image_anchored = _mean_kl(teacher_image_BB, scaled_similarities(image_BD, teacher_text_BD, cross_logit_scale))
    text_anchored = _mean_kl(teacher_text_BB, scaled_similarities(text_BD, teacher_image_BD, cross_logit_scale))
    return (image_anchored + text_anchored) / 2


def widen(x: Tensor) -> Tensor:
    """Return `x` in float32, or unchanged if it is float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def scaled_similarities(anchor_BD: Tensor, candidate_KD: Tensor, logit_scale: Tensor | float) -> Tensor:
    """Return logits [B, K]: the cosines of anchors and candidates, times the scale."""
    with torch.autocast(anchor_BD.device.type, enabled=False):  # autocast would multiply in 16 bits
        return logit_scale * (widen(anchor_BD) @ widen(candidate_KD).T)


def _both_directions(image_BD: Tensor, text_BD: Tensor, logit_scale: Tensor | float) -> tuple[Tensor, Tensor]:
    image_logits_BB = scaled_similarities(image_BD, text_BD, logit_scale)
    return image_logits_BB, image_logits_BB.T


def _scaled_gradients(anchor_BD: Tensor, candidate_BD: Tensor, logit_scale: Tensor | float) -> tuple[Tensor, Tensor]:
    """Return B times the gradients of `_mean_cross_entropy` in the anchors and in the candidates, in closed form."""
    with torch.autocast(anchor_BD.device.type, enabled=False):
        anchor_BD, candidate_BD = widen(anchor_BD), widen(candidate_BD)
        probability_BB = scaled_similarities(anchor_BD, candidate_BD, logit_scale).softmax(-1)
        of_anchors_BD = logit_scale * (probability_BB @ candidate_BD - candidate_BD)
        return of_anchors_BD, logit_scale * (probability_BB.T @ anchor_BD - anchor_BD)


def _mean_cross_entropy(anchor_BD: Tensor, candidate_BD: Tensor, logit_scale: Tensor | float) -> Tensor:
    """Return the mean over rows of -log softmax; candidate i is the match of anchor i."""
    logits_BB = scaled_similarities(anchor_BD, candidate_BD, logit_scale)
    return F.cross_entropy(logits_BB, torch.arange(len(logits_BB), device=logits_BB.device))


def _mean_kl(p_logits_BK: Tensor, q_logits_BK: Tensor) -> Tensor:
    """Return the mean over rows of KL(p || q), with p and q given as logits."""
    log_p_BK, log_q_BK = p_logits_BK.log_softmax(-1), q_logits_BK.log_softmax(-1)
    return F.kl_div(log_q_BK, log_p_BK, reduction="batchmean", log_target=True)


def _mean_square_distance(a_BD: Tensor, b_BD: Tensor) -> Tensor:
    """Return the mean over rows of |a - b|^2; near zero it keeps the digits that 2 - 2 cos loses."""
    return (widen(a_BD) - widen(b_BD)).square().sum(-1).mean()
