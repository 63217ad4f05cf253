"""Compute the losses of losses.py over the rows of one rank, in blocks: memory is linear in the batch.

losses.py defines each loss for a whole batch.  This module has the same values and gradients, computed differently:

- Sweeps (blocks.py) have the similarities of only one block of rows at a time.  Losses of the same similarities share a
  sweep, and so do both directions: image to text is over the rows of s u w^T, and text to image over its columns.
- A rank's anchors are its own b rows, and its candidates the B rows of all ranks.  So the ranks share the work.
- The mean over ranks of a rank's loss is the loss of the batch.  Data-parallel training takes the mean over ranks of
  the gradients, which is therefore the gradient of the batch's loss.

Contrastive losses have their gradient in the logits in closed form, which takes no more arrays than the logits
themselves.  Other losses are differentiated by autograd.

Arithmetic is in float32 or wider, as in losses.py.  The caller disables autocast.
"""

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from toolchain.distillation.blocks import Block, Sweep, by_autograd, choose_block_rows
from toolchain.distillation.losses import fd_loss, widen
from toolchain.distributed import Processes

_T = TypeVar("_T")
Target = Literal["pair", "teacher", "affinity"]
"""Target of the softmax over candidates: the anchor's own pair (cross entropy), the teacher's softmax (KL), or the
teacher's softmax with the student's scale (cross entropy).  The losses of pairs have the first two, with a sigmoid."""


class Similarities(NamedTuple):
    """The factors of the logits s a k^T, [b, B], of a rank's anchors and all candidates."""

    anchor_bD: Tensor
    candidate_BD: Tensor
    logit_scale: Tensor


class PairLogits(NamedTuple):
    """The factors of the logits s a k^T + b of a sigmoid model, [b, B]: that an anchor and a candidate are a pair."""

    similarities: Similarities
    logit_bias: Tensor


def multiply(x: Similarities, out: Tensor | None = None) -> Tensor:
    """Return logits.  The scale multiplies the anchors, which have fewer elements."""
    return torch.mm(x.logit_scale * x.anchor_bD, x.candidate_BD.T, out=out)


class Rows(NamedTuple):
    """The rows of a batch that are a rank's own, and the memory for its blocks."""

    first: int
    """Index in the batch of the rank's first row.  Anchor i of the rank belongs to candidate `first` + i."""

    processes: Processes
    memory_mb: float

    def blocks(self, x: Similarities) -> list[slice]:
        """Return the blocks of the rank's rows."""
        count = len(x.anchor_bD)
        size = choose_block_rows(len(x.candidate_BD), self.memory_mb, x.candidate_BD.dtype)
        return [slice(start, min(start + size, count)) for start in range(0, count, size)]


def contrast(
    student: Similarities,
    teacher: Similarities | None,
    names: Mapping[Target, str],
    rows: Rows,
    *,
    both_directions: bool,
) -> Sweep:
    """Return the sweep of the losses of one kind of similarities (a collective call if `both_directions`).

        pair:     CE / 2,   CE = mean_i -log softmax(s a k^T)_ii       (`clip_loss`, `icl_loss`, `afd_loss`)
        teacher:  KL / 2,   KL = mean_i KL(softmax(r V T^T)_i || softmax(s a k^T)_i)      (`crd_loss`, `cross_kd_loss`)
        affinity: H / 2,    H = mean_i -sum_j softmax(r V T^T)_ij log softmax(s a k^T)_ij,   r = s    (`affinity_loss`)

    a, k, s: `student`; V, T, r: `teacher`, which only KL and H need; a sweep has one of these two at most.  The mean is
    over the rank's rows i, and ii is the logit of its match.  `names` has the term that each loss is added to; others
    are not computed.  `both_directions` adds the losses of the transposed logits.  Their softmax is over a column, and
    thus over the anchors of all ranks; the sums that normalize it are computed here, before the sweep.
    """
    student = _widen(student)
    models = [student] if teacher is None or names.keys() <= {"pair"} else [student, _widen(teacher)]
    has_entropy = "affinity" in names
    columns = _sum_columns(models, rows, has_entropy=has_entropy) if both_directions else None
    half = 1 / (2 * len(student.anchor_bD))

    def add_block(block: Block) -> Tensor:
        ours = [Similarities(*x) for x in _by_model(block.rows, block.shared)]
        targets = _by_model(block.gradients[: len(ours)], block.gradients[len(ours) :])
        is_needed = [any(target is not None for target in of_model) for of_model in targets]
        arrays = _Arrays.of(block.work, ours, is_needed)
        weights = {target: half * weight for target, weight in zip(names, block.weights, strict=True)}
        match = rows.first + block.place.start
        value_n = _add_losses(arrays, _sum_exponentials(arrays, 1, has_entropy=has_entropy), match, weights)
        if columns is not None:
            for sums, logits_cB, power_cB in zip(columns, arrays.logits, arrays.powers, strict=True):
                _exponentiate(logits_cB, sums.max, power_cB)
            value_n = value_n + _add_losses(arrays, columns, match, weights)
        for x, of_model, gradient_cB in zip(ours, targets, arrays.gradients, strict=True):
            if gradient_cB is not None:
                _backpropagate(gradient_cB, x, of_model)
        return half * value_n

    shared = [x for model in models for x in (model.candidate_BD, model.logit_scale)]
    anchors = [model.anchor_bD for model in models]
    num_arrays = _Arrays.count(len(models))
    return Sweep(tuple(names.values()), add_block, anchors, shared, len(student.candidate_BD), num_arrays)


def _widen(x: Similarities) -> Similarities:
    return Similarities(widen(x.anchor_bD), widen(x.candidate_BD), x.logit_scale)


def _by_model(rows: Sequence[_T], shared: Sequence[_T]) -> list[tuple[_T, _T, _T]]:
    """Return anchors, candidates and scale of each model; the student is the first."""
    return list(zip(rows, shared[::2], shared[1::2], strict=True))


class _Arrays(NamedTuple):
    """The arrays [c, B] of a block, for each model; the student is the first."""

    logits: Sequence[Tensor]
    powers: Sequence[Tensor]
    """exp(x - max) of the logits, and their softmax."""

    gradients: Sequence[Tensor | None]
    """Gradients in the logits; None: nothing needs them."""

    spare: Tensor

    @staticmethod
    def count(num_models: int) -> int:
        return 3 * num_models + 1

    @classmethod
    def of(cls, work: Sequence[Tensor], models: Sequence[Similarities], is_needed: Sequence[bool]) -> "_Arrays":
        """Return the arrays with the logits of a block and with gradients of zero."""
        n = len(models)
        logits = [multiply(x, out) for x, out in zip(models, work[:n], strict=True)]
        gradients = [x.zero_() if needed else None for x, needed in zip(work[n : 2 * n], is_needed, strict=True)]
        return cls(logits, work[2 * n : 3 * n], gradients, work[-1])


class _Sums(NamedTuple):
    """Sums over candidates, [c, 1], or over anchors, [1, B], of a model's logits x, relative to their maximum."""

    max: Tensor
    total: Tensor
    """Sum of exp(x - max), in float64."""

    product: Tensor
    """The teacher's sum of exp(x - max) (x - z), in float64; z: the student's logits.  For H, which has the entropy, it
    is that of exp(x - max) (-z)."""

    @property
    def log_total(self) -> Tensor:
        """The logarithm of the sum of exp(x)."""
        return self.max + self.total.log()


def _exponentiate(x_cB: Tensor, maximum: Tensor, power_cB: Tensor) -> None:
    torch.sub(x_cB, maximum.to(x_cB.dtype), out=power_cB).exp_()


def _sum_exponentials(arrays: _Arrays, dim: int, *, has_entropy: bool) -> list[_Sums]:
    """Return the sums over an axis of each model's logits, and set the powers."""
    found = []
    for x_cB, power_cB in zip(arrays.logits, arrays.powers, strict=True):
        maximum = x_cB.amax(dim, keepdim=True)
        _exponentiate(x_cB, maximum, power_cB)
        product = total = power_cB.sum(dim, keepdim=True)
        if x_cB is not arrays.logits[0]:
            product = _subtract(x_cB, arrays, has_entropy).mul_(power_cB).sum(dim, keepdim=True)
        found.append(_Sums(maximum, total.double(), product.double()))
    return found


def _subtract(x_cB: Tensor, arrays: _Arrays, has_entropy: bool) -> Tensor:
    """Return the terms whose mean under the teacher's softmax is in the loss: x - z for KL, -z for H."""
    if has_entropy:
        return torch.neg(arrays.logits[0], out=arrays.spare)
    return torch.sub(x_cB, arrays.logits[0], out=arrays.spare)


@torch.no_grad()
def _sum_columns(models: Sequence[Similarities], rows: Rows, *, has_entropy: bool) -> list[_Sums]:
    """Return the sums over the anchors of all ranks, [1, B], for each model (a collective call)."""
    sums: list[_Sums] = []
    places, candidate_BD = rows.blocks(models[0]), models[0].candidate_BD
    num_rows = places[0].stop
    work = [candidate_BD.new_empty(num_rows, len(candidate_BD)) for _ in range(_Arrays.count(len(models)))]
    for place in places:
        block = [x._replace(anchor_bD=x.anchor_bD[place]) for x in models]
        part = [array_cB[: place.stop - place.start] for array_cB in work]
        arrays = _Arrays.of(part, block, [False] * len(block))
        found = _sum_exponentials(arrays, 0, has_entropy=has_entropy)
        sums = [_merge(both) for both in zip(sums, found, strict=True)] if sums else found
    merged = []
    for of_rank in sums:
        of_ranks = rows.processes.gather(torch.cat([x.double() for x in of_rank]))
        merged.append(_merge([_Sums(*torch.split(x, 1)) for x in torch.split(of_ranks, 3)]))
    return merged


def _merge(parts: Sequence[_Sums]) -> _Sums:
    """Return the sums over an axis of which each part has some positions."""
    maximum = torch.stack([part.max for part in parts]).amax(0)
    factors = [(part.max - maximum).double().exp() for part in parts]
    total = torch.stack([factor * part.total for factor, part in zip(factors, parts, strict=True)]).sum(0)
    product = torch.stack([factor * part.product for factor, part in zip(factors, parts, strict=True)]).sum(0)
    return _Sums(maximum, total, product)


def _add_losses(arrays: _Arrays, sums: Sequence[_Sums], match: int, weights: Mapping[Target, float]) -> Tensor:
    """Return the losses of a block in one direction, [n], and add their weighted gradients in the logits.

        CE = log sum exp(z) - z_match       dCE/dz = q - onehot
        KL = sum p (log p - log q)          dKL/dz = q - p,   dKL/dx = p (x - z - sum p (x - z))
        H = -sum p log q                    dH/dz = q - p,    dH/dx = p (-z - sum p (-z))

    z: the student's logits, q = softmax(z); x: the teacher's, p = softmax(x).  The powers of both become q and p.  The
    gradients are those of all losses in this block's logits.  The losses are those of the block's anchors, or in the
    other direction those of their matches.  Anchor 0 belongs to candidate `match`.
    """
    z_cB, q_cB, gradient_cB, student = arrays.logits[0], arrays.powers[0], arrays.gradients[0], sums[0]
    for power_cB, of_model in zip(arrays.powers, sums, strict=True):
        power_cB.div_(of_model.total.to(power_cB.dtype))
    if gradient_cB is not None:
        gradient_cB.add_(q_cB, alpha=sum(weights.values()))
    losses = []
    for target, weight in weights.items():
        if target == "pair":
            losses.append((_of_matches(student.log_total.expand_as(z_cB), match) - _of_matches(z_cB, match)).sum())
            if gradient_cB is not None:
                _of_matches(gradient_cB, match).sub_(weight)
        else:
            x_cB, p_cB, teacher = arrays.logits[1], arrays.powers[1], sums[1]
            mean = teacher.product / teacher.total  # sum p (x - z), or sum p (-z)
            loss = mean + student.log_total - (teacher.log_total if target == "teacher" else 0)
            losses.append(_of_matches(loss.expand_as(z_cB), match).sum())
            if gradient_cB is not None:
                gradient_cB.sub_(p_cB, alpha=weight)
            if arrays.gradients[1] is not None:
                centered_cB = _subtract(x_cB, arrays, target == "affinity").sub_(mean.to(x_cB.dtype))
                arrays.gradients[1].addcmul_(p_cB, centered_cB, value=weight)
    return torch.stack(losses)


def _of_matches(x_cB: Tensor, match: int) -> Tensor:
    """Return a view of the elements at which anchor i meets candidate `match` + i, [c]."""
    return x_cB[:, match : match + len(x_cB)].diagonal()


def _backpropagate(gradient_cB: Tensor, x: Similarities, targets: Sequence[Tensor | None]) -> None:
    """Add the gradients in the factors of logits s a k^T to the targets: s g k, s g^T a and sum(g k * a)."""
    on_anchors, on_candidates, on_scale = targets
    if on_anchors is not None or on_scale is not None:
        product_cD = gradient_cB @ x.candidate_BD
        if on_scale is not None:
            on_scale.add_((product_cD * x.anchor_bD).sum(dtype=torch.float64))
        if on_anchors is not None:
            on_anchors.add_(product_cD.mul_(x.logit_scale))
    if on_candidates is not None:
        on_candidates.addmm_(gradient_cB.T, x.logit_scale * x.anchor_bD)


def decide_pairs(student: PairLogits, teacher: PairLogits | None, names: Mapping[Target, str], rows: Rows) -> Sweep:
    """Return the sweep of the losses that decide of each anchor and candidate whether they are a pair.

        pair:     mean_i sum_j -log sigma(z_ij l_ij)          (`sigmoid_loss`; z_ij = 1 for a match, else -1)
        teacher:  mean_i sum_j KL(sigma(m_ij) || sigma(l_ij))        (`sigmoid_kd_loss`; of two outcomes)

    l, m: the logits of `student` and `teacher`, which only KL needs.  The mean is over the rank's rows.  `names` has
    the term that each loss is added to; others are not computed.
    """
    models = [student] if teacher is None or "teacher" not in names else [student, teacher]
    models = [PairLogits(_widen(x.similarities), x.logit_bias) for x in models]
    share = 1 / len(student.similarities.anchor_bD)

    def add_block(block: Block) -> Tensor:
        factors = [Similarities(*x) for x in zip(block.rows, block.shared[::3], block.shared[1::3], strict=True)]
        row_targets, shared_targets = block.gradients[: len(models)], block.gradients[len(models) :]
        targets = list(zip(row_targets, *(shared_targets[part::3] for part in range(3)), strict=True))
        logits = [multiply(x).add_(bias) for x, bias in zip(factors, block.shared[2::3], strict=True)]
        gradients = [None if all(x is None for x in of_model) else torch.zeros_like(logits[0]) for of_model in targets]
        weights = {target: share * weight for target, weight in zip(names, block.weights, strict=True)}
        value_n = _add_pair_losses(logits, gradients, rows.first + block.place.start, weights)
        for gradient_cB, x, of_model in zip(gradients, factors, targets, strict=True):
            if gradient_cB is not None:
                _backpropagate(gradient_cB, x, of_model[:3])
                if of_model[3] is not None:
                    of_model[3].add_(gradient_cB.sum(dtype=torch.float64))
        return share * value_n

    anchors = [x.similarities.anchor_bD for x in models]
    shared = [part for x in models for part in (*x.similarities[1:], x.logit_bias)]
    return Sweep(tuple(names.values()), add_block, anchors, shared, len(student.similarities.candidate_BD))


def _add_pair_losses(
    logits: Sequence[Tensor], gradients: Sequence[Tensor | None], match: int, weights: Mapping[Target, float]
) -> Tensor:
    """Return the losses of a block of pairs, [n], and add their weighted gradients in the logits.

    pair:     d/dl = -z sigma(-z l)
    teacher:  d/dl = q - p,   d/dm = p (1 - p) (m - l),   p = sigma(m), q = sigma(l)
    """
    logits_cB, gradient_cB = logits[0], gradients[0]
    losses = []
    for target, weight in weights.items():
        if target == "pair":
            wrong_cB = logits_cB.clone()  # the logit of the wrong answer: -z l
            _of_matches(wrong_cB, match).neg_()
            losses.append(-F.logsigmoid(-wrong_cB).sum())
            if gradient_cB is not None:
                wrong_cB.sigmoid_()
                _of_matches(wrong_cB, match).neg_()
                gradient_cB.add_(wrong_cB, alpha=weight)
        else:
            target_cB = logits[1]
            p_cB, not_p_cB = target_cB.sigmoid(), (-target_cB).sigmoid()  # not 1 - p, which loses digits
            kl_cB = p_cB * (F.logsigmoid(target_cB) - F.logsigmoid(logits_cB))
            kl_cB += not_p_cB * (F.logsigmoid(-target_cB) - F.logsigmoid(-logits_cB))
            losses.append(kl_cB.sum())
            if gradient_cB is not None:
                gradient_cB.add_(logits_cB.sigmoid().sub_(p_cB), alpha=weight)
            if gradients[1] is not None:
                gradients[1].add_(p_cB.mul_(not_p_cB).mul_(target_cB - logits_cB), alpha=weight)
    return torch.stack(losses)


def match_features(student: tuple[Tensor, Tensor], teacher: tuple[Tensor, Tensor], name: str) -> Sweep:
    """Return the sweep that adds `fd_loss` to a term: images and texts [b, E] of the student, and of the teacher."""
    count, width = student[0].shape

    def sum_block(block: Block) -> Tensor:
        return fd_loss(*block.rows).reshape(1) * (len(block.rows[0]) / count)

    return Sweep((name,), by_autograd(sum_block), [*map(widen, student), *map(widen, teacher)], [], 2 * width)


def match_gradients(
    student: tuple[Similarities, Similarities],
    teacher: tuple[Similarities, Similarities],
    name: str,
    rows: Rows,
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
            student_gradients = _closed_form_gradients(ours, rows)
            teacher_gradients = _closed_form_gradients(theirs, rows)
            on_anchors_bD, on_candidates_BD = (g - G for g, G in zip(student_gradients, teacher_gradients, strict=True))
            for difference_bD in (on_anchors_bD, on_candidates_BD[rows.first : rows.first + count]):
                value += difference_bD.double().square().sum() / count
        for x, factor in ((ours, 2 / count), (theirs, -2 / count)):
            if any(tensor.requires_grad for tensor in x):
                sweeps.append(_inner_product(x, factor * on_anchors_bD, factor * on_candidates_BD, name, rows))
    return sweeps, value.to(on_anchors_bD.dtype)


def _closed_form_gradients(x: Similarities, rows: Rows) -> tuple[Tensor, Tensor]:
    """Return B times the gradients of the batch's CE(s a k^T): in the rank's anchors [b, D], in all candidates [B, D].

        in anchors: s (A k - k'),   in candidates: s (A^T a - a),   A = softmax(s a k^T) over a row

    k' are the candidates that match the rank's anchors.  The second sum is over the anchors of all ranks (a collective
    call).
    """
    anchor_bD, candidate_BD, _ = x = _widen(x)
    of_anchors_bD, of_candidates_BD = torch.empty_like(anchor_bD), torch.zeros_like(candidate_BD)
    for place in rows.blocks(x):
        block_cD = anchor_bD[place]
        probability_cB = multiply(x._replace(anchor_bD=block_cD)).softmax(-1)
        of_anchors_bD[place] = probability_cB @ candidate_BD
        of_candidates_BD += probability_cB.T @ block_cD
    own = slice(rows.first, rows.first + len(anchor_bD))
    of_anchors_bD -= candidate_BD[own]
    of_candidates_BD[own] -= anchor_bD
    return x.logit_scale * of_anchors_bD, x.logit_scale * rows.processes.sum(of_candidates_BD)


def _inner_product(x: Similarities, on_anchors_bD: Tensor, on_candidates_BD: Tensor, name: str, rows: Rows) -> Sweep:
    """Return the sweep that adds <R, g> + <R', g'> to a term, for the gradients g in anchors and g' in candidates.

    R [b, D] and R' [B, D] are constant.  Row i adds  s < R_i, (A k)_i - k_i >  to the first product, and
    s < (A R')_i - R'_i, a_i >  to the second.
    """

    def sum_block(block: Block) -> Tensor:
        anchor_cD, on_anchor_cD = block.rows
        candidate_BD, logit_scale, on_candidate_BD = block.shared
        own = slice(rows.first + block.place.start, rows.first + block.place.stop)
        probability_cB = multiply(Similarities(anchor_cD, candidate_BD, logit_scale)).softmax(-1)
        of_anchors = (on_anchor_cD * (probability_cB @ candidate_BD - candidate_BD[own])).sum()
        of_candidates = ((probability_cB @ on_candidate_BD - on_candidate_BD[own]) * anchor_cD).sum()
        return (logit_scale * (of_anchors + of_candidates)).reshape(1)

    shared = [widen(x.candidate_BD), x.logit_scale, on_candidates_BD]
    return Sweep((name,), by_autograd(sum_block), [widen(x.anchor_bD), on_anchors_bD], shared, len(x.candidate_BD))
