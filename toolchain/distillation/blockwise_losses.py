"""Compute the losses of losses.py over the rows of one rank, in blocks: memory is linear in the batch.

losses.py defines each loss for a whole batch.  This module has the same values and gradients, computed differently:

- Sweeps (blocks.py) have the similarities of only one block of rows at a time.  Losses of the same similarities share a
  sweep.
- A rank's anchors are its own b rows, and its candidates the B rows of all ranks.  So the ranks share the work.
- A rank's loss is the mean over its own rows.  The mean of these over ranks is the loss of the batch.  Data-parallel
  training takes the mean over ranks of the gradients, which is therefore the gradient of the batch's loss.

Arithmetic is in float32 or wider, as in losses.py.  The caller disables autocast.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from toolchain.distillation.blocks import Sweep, choose_block_rows
from toolchain.distillation.losses import fd_loss, scaled_similarities, widen


class Similarities(NamedTuple):
    """The factors of the logits s a k^T, [b, B], of a rank's anchors and all candidates."""

    anchor_bD: Tensor
    candidate_BD: Tensor
    logit_scale: Tensor


class PairLogits(NamedTuple):
    """The factors of the logits s a k^T + b of a sigmoid model, [b, B]: that an anchor and a candidate are a pair."""

    similarities: Similarities
    logit_bias: Tensor


class Rows(NamedTuple):
    """The rows of a batch that are a rank's own, and the memory for its blocks."""

    first: int
    """Index in the batch of the rank's first row.  Anchor i of the rank belongs to candidate `first` + i."""

    memory_mb: float


def contrast(
    student: Similarities, teacher: Similarities | None, names: tuple[str | None, str | None], rows: Rows
) -> Sweep:
    """Return the sweep of one direction, image to text or text to image, of up to two losses of the same similarities.

        CE / 2,   CE = mean_i -log softmax(s a k^T)_i,i       (`clip_loss`, `icl_loss`, `afd_loss`)
        KL / 2,   KL = mean_i KL(softmax(r V T^T)_i || softmax(s a k^T)_i)      (`crd_loss`, `cross_kd_loss`)

    a, k, s: `student`; V, T, r: `teacher`, which only KL needs.  The mean is over the rank's rows i, and i,i is the
    logit of its match.  `names` are the terms that CE and KL are added to; a loss with the name None is not computed.
    """
    count = len(student.anchor_bD)
    anchors, shared = [widen(student.anchor_bD)], [widen(student.candidate_BD), student.logit_scale]
    if names[1] is not None and teacher is not None:
        anchors += [widen(teacher.anchor_bD)]
        shared += [widen(teacher.candidate_BD), teacher.logit_scale]

    def sum_block(place: slice, block: Sequence[Tensor], whole: Sequence[Tensor]) -> Tensor:
        log_q_cB = scaled_similarities(block[0], whole[0], whole[1]).log_softmax(-1)
        added = []
        if names[0] is not None:
            match_c1 = torch.arange(len(log_q_cB), device=log_q_cB.device)[:, None] + rows.first + place.start
            added.append(-log_q_cB.gather(1, match_c1).sum())
        if names[1] is not None:
            log_p_cB = scaled_similarities(block[1], whole[2], whole[3]).log_softmax(-1)
            added.append(F.kl_div(log_q_cB, log_p_cB, reduction="sum", log_target=True))
        return torch.stack(added) / (2 * count)

    terms = tuple(name for name in names if name is not None)
    return Sweep(terms, sum_block, anchors, shared, len(student.candidate_BD))


def mimic_affinity(student: Similarities, teacher: Similarities, name: str) -> Sweep:
    """Return the sweep that adds one direction of `affinity_loss` to a term; both scales are its constant."""
    count = len(student.anchor_bD)

    def sum_block(place: slice, block: Sequence[Tensor], whole: Sequence[Tensor]) -> Tensor:
        log_q_cB = scaled_similarities(block[0], whole[0], student.logit_scale).log_softmax(-1)
        p_cB = scaled_similarities(block[1], whole[1], teacher.logit_scale).softmax(-1)
        return -(p_cB * log_q_cB).sum().reshape(1) / (2 * count)

    anchors, candidates = ([widen(x[part]) for x in (student, teacher)] for part in range(2))
    return Sweep((name,), sum_block, anchors, candidates, len(student.candidate_BD))


def decide_pairs(
    student: PairLogits, teacher: PairLogits | None, names: tuple[str | None, str | None], rows: Rows
) -> Sweep:
    """Return the sweep of up to two losses of the same pairs: `sigmoid_loss` and `sigmoid_kd_loss`.

    `names` are the terms that they are added to; a loss with the name None is not computed.
    """
    count = len(student.similarities.anchor_bD)
    anchors = [widen(student.similarities.anchor_bD)]
    shared = [widen(student.similarities.candidate_BD), student.similarities.logit_scale, student.logit_bias]
    if names[1] is not None and teacher is not None:
        anchors += [widen(teacher.similarities.anchor_bD)]
        shared += [widen(teacher.similarities.candidate_BD), teacher.similarities.logit_scale, teacher.logit_bias]

    def sum_block(place: slice, block: Sequence[Tensor], whole: Sequence[Tensor]) -> Tensor:
        logits_cB = scaled_similarities(block[0], whole[0], whole[1]) + whole[2]
        added = []
        if names[0] is not None:
            sign_cB = torch.full_like(logits_cB, -1)
            sign_cB[:, rows.first + place.start :].fill_diagonal_(1)
            added.append(-F.logsigmoid(sign_cB * logits_cB).sum())
        if names[1] is not None:
            target_cB = scaled_similarities(block[1], whole[3], whole[4]) + whole[5]
            yes_cB = target_cB.sigmoid() * (F.logsigmoid(target_cB) - F.logsigmoid(logits_cB))
            no_cB = (-target_cB).sigmoid() * (F.logsigmoid(-target_cB) - F.logsigmoid(-logits_cB))
            added.append((yes_cB + no_cB).sum())
        return torch.stack(added) / count

    terms = tuple(name for name in names if name is not None)
    return Sweep(terms, sum_block, anchors, shared, len(student.similarities.candidate_BD))


def match_features(student: tuple[Tensor, Tensor], teacher: tuple[Tensor, Tensor], name: str) -> Sweep:
    """Return the sweep that adds `fd_loss` to a term: images and texts [b, E] of the student, and of the teacher."""
    count, width = student[0].shape

    def sum_block(_: slice, block: Sequence[Tensor], __: Sequence[Tensor]) -> Tensor:
        return fd_loss(*block).reshape(1) * (len(block[0]) / count)

    return Sweep((name,), sum_block, [*map(widen, student), *map(widen, teacher)], [], 2 * width)


def match_gradients(
    student: tuple[Similarities, Similarities],
    teacher: tuple[Similarities, Similarities],
    name: str,
    rows: Rows,
    sum_over_ranks: Callable[[Tensor], Tensor],
) -> tuple[list[Sweep], Tensor]:
    """Return sweeps that have the gradient of `gd_loss` but not its value, and the value.

    `student` and `teacher` have both directions.  The loss is a mean of squares |g - G|^2, where g and G are gradients
    of the task loss, and thus sums over the batch.  This function computes g and G in blocks, without autograd.  The
    returned sweeps sum <R, g - G> with the constant R = d loss / d g.  By the chain rule, its gradient is the loss's.
    """
    value = torch.zeros((), dtype=torch.float64, device=student[0].anchor_bD.device)
    sweeps = []
    for ours, theirs in zip(student, teacher, strict=True):
        count = len(ours.anchor_bD)
        with torch.no_grad():
            student_gradients = _closed_form_gradients(ours, rows, sum_over_ranks)
            teacher_gradients = _closed_form_gradients(theirs, rows, sum_over_ranks)
            on_anchors_bD, on_candidates_BD = (g - G for g, G in zip(student_gradients, teacher_gradients, strict=True))
            for difference_bD in (on_anchors_bD, on_candidates_BD[rows.first : rows.first + count]):
                value += difference_bD.double().square().sum() / count
        for x, factor in ((ours, 2 / count), (theirs, -2 / count)):
            if any(tensor.requires_grad for tensor in x):
                sweeps.append(_inner_product(x, factor * on_anchors_bD, factor * on_candidates_BD, name, rows))
    return sweeps, value.to(on_anchors_bD.dtype)


def _closed_form_gradients(
    x: Similarities, rows: Rows, sum_over_ranks: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """Return B times the gradients of the batch's CE(s a k^T): in the rank's anchors [b, D], in all candidates [B, D].

        in anchors: s (A k - k'),   in candidates: s (A^T a - a),   A = softmax(s a k^T) over a row

    k' are the candidates that match the rank's anchors.  The second sum is over the anchors of all ranks (a collective
    call).
    """
    anchor_bD, candidate_BD = widen(x.anchor_bD), widen(x.candidate_BD)
    of_anchors_bD, of_candidates_BD = torch.empty_like(anchor_bD), torch.zeros_like(candidate_BD)
    size = choose_block_rows(len(candidate_BD), rows.memory_mb, candidate_BD.dtype)
    for start in range(0, len(anchor_bD), size):
        block_cD = anchor_bD[start : start + size]
        probability_cB = scaled_similarities(block_cD, candidate_BD, x.logit_scale).softmax(-1)
        of_anchors_bD[start : start + size] = probability_cB @ candidate_BD
        of_candidates_BD += probability_cB.T @ block_cD
    own = slice(rows.first, rows.first + len(anchor_bD))
    of_anchors_bD -= candidate_BD[own]
    of_candidates_BD[own] -= anchor_bD
    return x.logit_scale * of_anchors_bD, x.logit_scale * sum_over_ranks(of_candidates_BD)


def _inner_product(x: Similarities, on_anchors_bD: Tensor, on_candidates_BD: Tensor, name: str, rows: Rows) -> Sweep:
    """Return the sweep that adds <R, g> + <R', g'> to a term, for the gradients g in anchors and g' in candidates.

    R [b, D] and R' [B, D] are constant.  Row i adds  s < R_i, (A k)_i - k_i >  to the first product, and
    s < (A R')_i - R'_i, a_i >  to the second.
    """

    def sum_block(place: slice, block: Sequence[Tensor], whole: Sequence[Tensor]) -> Tensor:
        anchor_cD, on_anchor_cD = block
        candidate_BD, logit_scale, on_candidate_BD = whole
        own = slice(rows.first + place.start, rows.first + place.start + len(anchor_cD))
        probability_cB = scaled_similarities(anchor_cD, candidate_BD, logit_scale).softmax(-1)
        of_anchors = (on_anchor_cD * (probability_cB @ candidate_BD - candidate_BD[own])).sum()
        of_candidates = ((probability_cB @ on_candidate_BD - on_candidate_BD[own]) * anchor_cD).sum()
        return (logit_scale * (of_anchors + of_candidates)).reshape(1)

    shared = [widen(x.candidate_BD), x.logit_scale, on_candidates_BD]
    return Sweep((name,), sum_block, [widen(x.anchor_bD), on_anchors_bD], shared, len(x.candidate_BD))
