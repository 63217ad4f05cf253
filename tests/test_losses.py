"""The losses against the reference's golden values, their definitions as loops, and what must hold of any of them."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from golden import ATOL, CASES, INTENDED_SCALE, RAW_SCALE, RTOL, Golden
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from toolchain.distillation.losses import (
    MAX_LOGIT_SCALE,
    _scaled_gradients,
    afd_loss,
    affinity_loss,
    clip_loss,
    crd_loss,
    cross_kd_loss,
    fd_loss,
    gd_loss,
    icl_loss,
    sigmoid_kd_loss,
    sigmoid_loss,
)

pytestmark = pytest.mark.usefixtures("one_thread")

LOOP_RTOL = 1e-12  # the same float64 numbers, added one by one
FLOAT32_RTOL = 1e-5  # float32 has 6e-8; logits of about 20 and sums over 32 terms lose two digits


def golden_losses(golden: Golden, scale: Tensor | float, *, intended: bool) -> dict[str, Tensor]:
    """Every loss of a golden case, from features made here in plain torch; `scale` of ICL, cross-KD and AFD."""
    leaves = golden.leaves
    raw = {"visual": leaves["s_img_raw"], "text": leaves["s_txt_raw"]}
    teacher = {"visual": golden.teacher_image, "text": golden.teacher_text}
    unit = [F.normalize(x, dim=1) for x in raw.values()]
    projected = unit
    if "visual_proj_w" in leaves:
        linear = [F.linear(x, leaves[f"{tower}_proj_w"], leaves[f"{tower}_proj_b"]) for tower, x in raw.items()]
        projected = [F.normalize(x, dim=1) for x in linear]
    scales = leaves["s_scale"], golden.teacher_scale
    gradient_scales = scales if intended else (1 / scales[0], 1 / scales[1])
    losses = {
        "task": clip_loss(*unit, scales[0]),
        "crd": crd_loss(*unit, scales[0], *teacher.values(), scales[1]),
        "fd": fd_loss(*projected, *teacher.values()),
        "gd": gd_loss(*projected, gradient_scales[0], *teacher.values(), gradient_scales[1]),
        "icl": icl_loss(*projected, *teacher.values(), scale),
        "cross_kd": cross_kd_loss(*projected, *teacher.values(), scale, scales[1]),
    }
    if "visual_fusion_w" in leaves:
        fused = [
            F.normalize(
                F.linear(torch.cat([x, teacher[tower]], 1), leaves[f"{tower}_fusion_w"], leaves[f"{tower}_fusion_b"])
            )
            for tower, x in zip(raw, projected, strict=True)
        ]
        losses["afd"] = afd_loss(*fused, scale)
    return losses


@pytest.mark.parametrize("case", CASES)
def test_losses_and_gradients_equal_the_reference(case: str) -> None:
    golden = Golden(case)
    scale = torch.tensor(RAW_SCALE, dtype=torch.float64, requires_grad=True)
    losses = golden_losses(golden, scale, intended=False)
    assert sorted(losses) == sorted(golden.objectives)
    for name, loss in losses.items():
        scale_name = "fusion_logit_scale" if name == "afd" else "cross_logit_scale"
        golden.check(name, loss, {**golden.leaves, scale_name: scale})


@pytest.mark.parametrize("case", CASES)
def test_losses_and_gradients_equal_the_reference_as_intended(case: str) -> None:
    golden = Golden(case)
    losses = golden_losses(golden, INTENDED_SCALE, intended=True)
    names = [name.removeprefix("intended.") for name in golden.values if name.startswith("intended.")]
    assert sorted(names) == sorted(losses.keys() & {"gd", "icl", "cross_kd", "afd"})
    for name in names:
        golden.check(name, losses[name], golden.leaves, intended=True)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", ["ref", "intended"])
def test_gradients_in_closed_form_equal_the_reference(case: str, kind: str) -> None:
    golden = Golden(case)
    unit = [F.normalize(golden.leaves[name].detach(), dim=1) for name in ("s_img_raw", "s_txt_raw")]
    if case == "diff32_48":
        unit = [
            F.normalize(
                F.linear(golden.leaves[name], golden.leaves[f"{tower}_proj_w"], golden.leaves[f"{tower}_proj_b"])
            )
            for name, tower in (("s_img_raw", "visual"), ("s_txt_raw", "text"))
        ]
    scale = golden.leaves["s_scale"].detach()
    found = _scaled_gradients(*unit, scale if kind == "intended" else 1 / scale)
    for x, name in zip(found, ("grad_p_img", "grad_k_txt"), strict=True):
        expected = golden.batch * golden.values[f"get_grad.{kind}.{name}"]
        np.testing.assert_allclose(x.detach().numpy(), expected, rtol=RTOL, atol=ATOL * np.abs(expected).max())


# Every loss on one made batch, with all features of one width, so that the properties below read the same for each.


def made_features(batch: int = 6, width: int = 5, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Student image, student text, teacher image, teacher text: unit rows, pairs correlated."""
    generator = torch.Generator().manual_seed(7)
    raw = torch.randn(4, batch, width, generator=generator, dtype=torch.float64)
    return [F.normalize(x + raw[0], dim=1).to(dtype) for x in raw]


STUDENT_SCALE, TEACHER_SCALE, CROSS_SCALE, AFFINITY_SCALE = 14.0, 21.0, 9.0, 17.0
STUDENT_BIAS, TEACHER_BIAS = -5.0, -8.0


def task(features: list[Tensor]) -> Tensor:
    return clip_loss(features[0], features[1], STUDENT_SCALE)


def crd(features: list[Tensor]) -> Tensor:
    return crd_loss(features[0], features[1], STUDENT_SCALE, features[2], features[3], TEACHER_SCALE)


def fd(features: list[Tensor]) -> Tensor:
    return fd_loss(*features)


def gd(features: list[Tensor]) -> Tensor:
    return gd_loss(features[0], features[1], STUDENT_SCALE, features[2], features[3], TEACHER_SCALE)


def icl(features: list[Tensor]) -> Tensor:
    return icl_loss(*features, CROSS_SCALE)


def afd(features: list[Tensor]) -> Tensor:
    return afd_loss(features[0], features[1], CROSS_SCALE)


def cross_kd(features: list[Tensor]) -> Tensor:
    return cross_kd_loss(*features, CROSS_SCALE, TEACHER_SCALE)


def sigmoid_task(features: list[Tensor]) -> Tensor:
    return sigmoid_loss(features[0], features[1], STUDENT_SCALE, STUDENT_BIAS)


def affinity(features: list[Tensor]) -> Tensor:
    return affinity_loss(*features, AFFINITY_SCALE)


def sigmoid_kd(features: list[Tensor]) -> Tensor:
    student, teacher = (STUDENT_SCALE, STUDENT_BIAS), (TEACHER_SCALE, TEACHER_BIAS)
    return sigmoid_kd_loss(features[0], features[1], *student, features[2], features[3], *teacher)


ON_FEATURES = pytest.mark.parametrize(
    "loss", [task, sigmoid_task, crd, affinity, sigmoid_kd, fd, gd, icl, afd, cross_kd]
)
OF_THE_TEACHER = pytest.mark.parametrize("loss", [crd, affinity, sigmoid_kd, fd, gd, icl, cross_kd])


def dot(a: Tensor, b: Tensor) -> float:
    return math.fsum(x * y for x, y in zip(a.tolist(), b.tolist(), strict=True))


def log_softmax(logits: list[float]) -> list[float]:
    total = math.log(math.fsum(math.exp(x) for x in logits))
    return [x - total for x in logits]


def cross_entropy_by_definition(anchors: Tensor, candidates: Tensor, scale: float) -> float:
    rows = [log_softmax([scale * dot(anchor, candidate) for candidate in candidates]) for anchor in anchors]
    return -math.fsum(row[i] for i, row in enumerate(rows)) / len(rows)


Similarities = tuple[Tensor, Tensor, float]  # anchors, candidates, scale


def kl_by_definition(student: Similarities, teacher: Similarities) -> float:
    total = 0.0
    for i in range(len(student[0])):
        log_q = log_softmax([student[2] * dot(student[0][i], candidate) for candidate in student[1]])
        log_p = log_softmax([teacher[2] * dot(teacher[0][i], candidate) for candidate in teacher[1]])
        total += math.fsum(math.exp(p) * (p - q) for p, q in zip(log_p, log_q, strict=True))
    return total / len(student[0])


def entropy_by_definition(anchors: Tensor, candidates: Tensor, scale: float) -> float:
    rows = [log_softmax([scale * dot(anchor, candidate) for candidate in candidates]) for anchor in anchors]
    return -math.fsum(math.exp(p) * p for row in rows for p in row) / len(rows)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def sigmoid_kd_by_definition(u: Tensor, w: Tensor, v: Tensor, t: Tensor) -> float:
    total = 0.0
    for i in range(len(u)):
        for j in range(len(u)):
            q = sigmoid(STUDENT_SCALE * dot(u[i], w[j]) + STUDENT_BIAS)
            p = sigmoid(TEACHER_SCALE * dot(v[i], t[j]) + TEACHER_BIAS)
            total += p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
    return total / len(u)


def gradients_by_definition(anchors: Tensor, candidates: Tensor, scale: float) -> list[list[float]]:
    """Rows of B dCE/danchors, then rows of B dCE/dcandidates, element by element."""
    batch, width = anchors.shape
    of_anchors = [[0.0] * width for _ in range(batch)]
    of_candidates = [[0.0] * width for _ in range(batch)]
    for i in range(batch):
        log_p = log_softmax([scale * dot(anchors[i], candidate) for candidate in candidates])
        for j in range(batch):
            of_logit = math.exp(log_p[j]) - (i == j)  # B dCE/dlogit_ij
            for d in range(width):
                of_anchors[i][d] += scale * of_logit * candidates[j, d].item()
                of_candidates[j][d] += scale * of_logit * anchors[i, d].item()
    return of_anchors + of_candidates


def by_definition(name: str, features: list[Tensor]) -> float:
    u, w, v, t = features
    match name:
        case "task":
            forth = cross_entropy_by_definition(u, w, STUDENT_SCALE)
            return (forth + cross_entropy_by_definition(w, u, STUDENT_SCALE)) / 2
        case "crd":
            forth = kl_by_definition((u, w, STUDENT_SCALE), (v, t, TEACHER_SCALE))
            return (forth + kl_by_definition((w, u, STUDENT_SCALE), (t, v, TEACHER_SCALE))) / 2
        case "sigmoid_task":
            terms = []
            for i in range(len(u)):
                for j in range(len(u)):
                    logit = STUDENT_SCALE * dot(u[i], w[j]) + STUDENT_BIAS
                    terms.append(-math.log(sigmoid(logit if i == j else -logit)))
            return math.fsum(terms) / len(u)
        case "affinity":
            forth = kl_by_definition((u, w, AFFINITY_SCALE), (v, t, AFFINITY_SCALE))
            back = kl_by_definition((w, u, AFFINITY_SCALE), (t, v, AFFINITY_SCALE))
            entropies = entropy_by_definition(v, t, AFFINITY_SCALE) + entropy_by_definition(t, v, AFFINITY_SCALE)
            return (forth + back + entropies) / 2
        case "sigmoid_kd":
            return sigmoid_kd_by_definition(u, w, v, t)
        case "fd":
            return math.fsum(2 - 2 * dot(a, b) for a, b in [*zip(u, v, strict=True), *zip(w, t, strict=True)]) / len(u)
        case "gd":
            student = gradients_by_definition(u, w, STUDENT_SCALE) + gradients_by_definition(w, u, STUDENT_SCALE)
            teacher = gradients_by_definition(v, t, TEACHER_SCALE) + gradients_by_definition(t, v, TEACHER_SCALE)
            rows = zip(student, teacher, strict=True)
            return math.fsum(math.dist(ours, theirs) ** 2 for ours, theirs in rows) / len(u)
        case "icl":
            forth = cross_entropy_by_definition(u, t, CROSS_SCALE)
            return (forth + cross_entropy_by_definition(w, v, CROSS_SCALE)) / 2
        case "afd":
            forth = cross_entropy_by_definition(u, w, CROSS_SCALE)
            return (forth + cross_entropy_by_definition(w, u, CROSS_SCALE)) / 2
        case "cross_kd":
            forth = kl_by_definition((u, t, CROSS_SCALE), (v, t, TEACHER_SCALE))
            return (forth + kl_by_definition((w, v, CROSS_SCALE), (t, v, TEACHER_SCALE))) / 2
    raise AssertionError(name)


@ON_FEATURES
def test_loss_equals_its_definition(loss) -> None:
    features = made_features()
    assert loss(features).item() == pytest.approx(by_definition(loss.__name__, features), rel=LOOP_RTOL)


@ON_FEATURES
def test_gradient_equals_finite_differences(loss) -> None:
    leaves = [x.requires_grad_() for x in made_features(batch=3, width=4)]
    assert torch.autograd.gradcheck(lambda *features: loss(list(features)), leaves)


def test_scales_have_the_gradient_of_finite_differences() -> None:
    features = made_features(batch=3, width=4)

    def sum_of_losses(student: Tensor, teacher: Tensor, cross: Tensor, bias: Tensor) -> Tensor:
        total = clip_loss(features[0], features[1], student) + icl_loss(*features, cross)
        total = total + sigmoid_loss(features[0], features[1], student, bias)
        pair = student, bias, features[2], features[3], teacher, 2 * bias
        total = total + sigmoid_kd_loss(features[0], features[1], *pair) + affinity_loss(*features, cross)
        total = total + afd_loss(features[0], features[1], cross) + cross_kd_loss(*features, cross, teacher)
        for relational in (crd_loss, gd_loss):
            total = total + relational(features[0], features[1], student, features[2], features[3], teacher)
        return total

    scales = [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (5.0, 7.0, 3.0, -2.0)]
    assert torch.autograd.gradcheck(sum_of_losses, scales)


def test_crd_gradient_is_the_difference_of_the_distributions() -> None:
    """dL/du follows from dL/dlogits = (q - p) / 2B in each direction: no autograd on this side."""
    u, w, v, t = made_features()
    u.requires_grad_()
    crd_loss(u, w, STUDENT_SCALE, v, t, TEACHER_SCALE).backward()
    student, teacher = STUDENT_SCALE * u.detach() @ w.T, TEACHER_SCALE * v @ t.T
    over_texts = (student.softmax(1) - teacher.softmax(1)) / (2 * len(u))
    over_images = (student.softmax(0) - teacher.softmax(0)) / (2 * len(u))
    torch.testing.assert_close(u.grad, STUDENT_SCALE * (over_texts + over_images) @ w, rtol=LOOP_RTOL, atol=LOOP_RTOL)


def test_crd_is_zero_iff_the_distributions_agree() -> None:
    u, w, _, _ = made_features()
    assert crd_loss(u, w, STUDENT_SCALE, u, w, STUDENT_SCALE).item() == 0
    assert crd_loss(u, w, 2 * STUDENT_SCALE, u, w, STUDENT_SCALE).item() > 1e-3
    wider = torch.cat([u, torch.zeros_like(u)], 1), torch.cat([w, torch.zeros_like(w)], 1)
    assert crd_loss(u, w, STUDENT_SCALE, *wider, STUDENT_SCALE).item() == pytest.approx(0, abs=LOOP_RTOL)


def test_affinity_has_the_gradient_of_crd_at_one_scale_and_no_zero() -> None:
    """Its value differs by the teacher's entropy, a constant."""
    u, w, v, t = made_features()
    u.requires_grad_()
    mimicked, matched = affinity_loss(u, w, v, t, 17.0), crd_loss(u, w, 17.0, v, t, 17.0)
    (found,), (expected,) = (torch.autograd.grad(loss, u) for loss in (mimicked, matched))
    torch.testing.assert_close(found, expected, rtol=LOOP_RTOL, atol=LOOP_RTOL)
    entropy = (entropy_by_definition(v, t, 17.0) + entropy_by_definition(t, v, 17.0)) / 2
    assert affinity_loss(v, t, v, t, 17.0).item() == pytest.approx(entropy, rel=LOOP_RTOL)
    assert mimicked.item() - matched.item() == pytest.approx(entropy, rel=LOOP_RTOL)


def test_affinity_does_not_let_a_larger_scale_make_up_for_smaller_differences_of_cosines() -> None:
    """Features of half the cosines and twice the scale have CRD 0, but not the least affinity loss."""
    _, _, v, t = made_features()
    image, text = F.pad(v, (0, 1)), F.pad(t / 2, (0, 1), value=math.sqrt(0.75))
    torch.testing.assert_close(text.norm(dim=1), torch.ones(6, dtype=torch.float64))
    assert crd_loss(image, text, 2 * TEACHER_SCALE, v, t, TEACHER_SCALE).item() == pytest.approx(0, abs=LOOP_RTOL)
    least = affinity_loss(v, t, v, t, TEACHER_SCALE).item()
    assert affinity_loss(image, text, v, t, TEACHER_SCALE).item() > least + 1e-2


def test_the_sigmoid_loss_is_that_of_open_clip() -> None:
    from open_clip.loss import SigLipLoss

    u, w, _, _ = made_features()
    expected = SigLipLoss()(u, w, torch.tensor(STUDENT_SCALE), torch.tensor(STUDENT_BIAS))
    assert sigmoid_task([u, w]).item() == pytest.approx(expected.item(), rel=1e-6), "its scale and bias are float32"


def test_the_sigmoid_losses_are_the_same_in_both_directions() -> None:
    u, w, v, t = made_features()
    assert sigmoid_task([w, u]).item() == pytest.approx(sigmoid_task([u, w]).item(), rel=LOOP_RTOL)
    assert sigmoid_kd([w, u, t, v]).item() == pytest.approx(sigmoid_kd([u, w, v, t]).item(), rel=LOOP_RTOL)


def test_sigmoid_kd_is_zero_iff_the_probabilities_agree() -> None:
    u, w, _, _ = made_features()
    same = STUDENT_SCALE, STUDENT_BIAS
    assert sigmoid_kd_loss(u, w, *same, u, w, *same).item() == 0
    for other in ((2 * STUDENT_SCALE, STUDENT_BIAS), (STUDENT_SCALE, 2 * STUDENT_BIAS)):
        assert sigmoid_kd_loss(u, w, *other, u, w, *same).item() > 1e-3


def test_sigmoid_kd_of_a_certain_teacher_is_the_sigmoid_loss() -> None:
    """A teacher whose probabilities are 1 for pairs and 0 for others says what the labels say."""
    u, w, _, _ = made_features()
    e = torch.eye(6, dtype=torch.float64)
    found = sigmoid_kd_loss(u, w, STUDENT_SCALE, STUDENT_BIAS, e, e, 400.0, -200.0)
    assert found.item() == pytest.approx(sigmoid_task([u, w]).item(), rel=LOOP_RTOL)


def test_sigmoid_losses_of_certain_models_keep_their_digits() -> None:
    """Beyond a logit of 20, where softplus(x) of torch is x, and beyond 37, where 1 - sigma(x) is 0 in float64."""
    one, scale = torch.ones(1, 1, dtype=torch.float64), 1.0
    for bias in (24.0, 44.0):
        expected = math.log1p(math.exp(-(bias + 1)))
        assert sigmoid_loss(one, one, scale, bias).item() == pytest.approx(expected, rel=LOOP_RTOL, abs=0)
        p, q = math.exp(-(bias + 1)), math.exp(-(bias + 2))  # of the other answer
        kl = p * math.log(p / q) - (p - q)  # the first order of (1 - p) log((1 - p) / (1 - q))
        found = sigmoid_kd_loss(one, one, scale, bias + 1, one, one, scale, bias).item()
        assert found == pytest.approx(kl, rel=1e-9, abs=0)


def test_cross_kd_is_zero_iff_the_distributions_agree() -> None:
    u, w, v, t = made_features()
    assert cross_kd_loss(v, t, v, t, TEACHER_SCALE, TEACHER_SCALE).item() == pytest.approx(0, abs=LOOP_RTOL)
    assert cross_kd_loss(v, t, v, t, 2 * TEACHER_SCALE, TEACHER_SCALE).item() > 1e-3
    assert cross_kd_loss(u, w, v, t, TEACHER_SCALE, TEACHER_SCALE).item() > 1e-3


def test_cross_kd_of_a_silent_student_is_log_batch_less_the_teachers_entropy() -> None:
    """0 where the teacher is silent too, log B where it is certain."""
    _, _, v, t = made_features()
    silent = torch.zeros_like(v)
    assert cross_kd_loss(silent, silent, v, t, CROSS_SCALE, 0.0).item() == pytest.approx(0, abs=LOOP_RTOL)
    certain = torch.eye(6, dtype=torch.float64)
    found = cross_kd_loss(0 * certain, 0 * certain, certain, certain, CROSS_SCALE, MAX_LOGIT_SCALE)
    assert found.item() == pytest.approx(math.log(6), abs=LOOP_RTOL)


def test_cross_kd_is_crd_where_a_models_candidates_are_its_own() -> None:
    _, _, v, t = made_features()
    crossed = cross_kd_loss(v, t, v, t, CROSS_SCALE, TEACHER_SCALE)
    assert crossed.item() == pytest.approx(crd_loss(v, t, CROSS_SCALE, v, t, TEACHER_SCALE).item(), rel=LOOP_RTOL)


def test_gd_compares_what_autograd_says_of_the_task_loss() -> None:
    """Each direction's loss differentiated by autograd: the closed form is nowhere on this side."""
    u, w, v, t = made_features()

    def gradients(image: Tensor, text: Tensor, scale: float) -> list[Tensor]:
        leaves = [image.clone().requires_grad_(), text.clone().requires_grad_()]
        logits, target = scale * leaves[0] @ leaves[1].T, torch.arange(len(image))
        forth = torch.autograd.grad(F.cross_entropy(logits, target), leaves, retain_graph=True)
        return [*forth, *torch.autograd.grad(F.cross_entropy(logits.T, target), leaves)]

    pairs = zip(gradients(u, w, STUDENT_SCALE), gradients(v, t, TEACHER_SCALE), strict=True)
    means = [F.mse_loss(ours, theirs) for ours, theirs in pairs]
    expected = len(u) ** 2 * u.shape[1] * sum(means).item()
    assert gd([u, w, v, t]).item() == pytest.approx(expected, rel=LOOP_RTOL)


def test_gd_is_zero_where_student_and_teacher_agree() -> None:
    u, w, _, _ = made_features()
    assert gd_loss(u, w, STUDENT_SCALE, u, w, STUDENT_SCALE).item() == 0
    assert gd_loss(u, w, 2 * STUDENT_SCALE, u, w, STUDENT_SCALE).item() > 1e-3
    assert gd_loss(w, u, STUDENT_SCALE, u, w, STUDENT_SCALE).item() > 1e-3


def test_gd_of_a_student_with_nothing_left_to_learn_is_the_teachers_own_gradient() -> None:
    """Certain and right, the student's gradient is 0; a silent teacher's is r (mean - own) in all four terms."""
    batch, scale = 5, 3.0
    e = torch.eye(batch, dtype=torch.float64)
    found = gd_loss(e, e, 1e4, 0 * e, e, scale)  # the teacher's images are 0: its logits are too
    of_texts = scale**2 * (1 - 1 / batch)  # |s (mean_j e_j - e_i)|^2, in the images' place of both directions
    assert found.item() == pytest.approx(2 * of_texts, rel=LOOP_RTOL)


def padded(features: list[Tensor]) -> list[Tensor]:
    return [F.pad(x, (0, 11)) for x in features]


def tiled(features: list[Tensor]) -> list[Tensor]:
    return [x.repeat(3, 1) for x in features]


@pytest.mark.parametrize("grown", [padded, tiled])
@pytest.mark.parametrize("loss", [fd, gd])
def test_the_weight_means_the_same_at_every_width_and_batch(loss, grown) -> None:
    """Zeros appended to the features, or every sample shown three times, say nothing new and change no value."""
    features = made_features()
    assert loss(grown(features)).item() == pytest.approx(loss(features).item(), rel=LOOP_RTOL)


def test_gd_is_linear_in_memory_beyond_the_similarities() -> None:
    """No tensor larger than B x B or B x D, forward or backward: the reference's is B x B x D."""
    batch, width = 24, 16
    leaves = [x.requires_grad_() for x in made_features(batch, width)]
    with LargestTensor() as seen:
        gd(leaves).backward()
    assert 0 < seen.numel <= max(batch * batch, batch * width)


class LargestTensor(TorchDispatchMode):
    """The most elements of any tensor that an operation returned."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, tuple | list) else [result]:
            self.numel = max(self.numel, x.numel() if isinstance(x, Tensor) else 0)
        return result


def test_fd_is_0_at_equality_4_when_orthogonal_8_when_opposite() -> None:
    e = torch.eye(4, dtype=torch.float64)
    u, w = e[:2], e[1:3]
    assert fd_loss(u, w, u, w).item() == 0
    assert fd_loss(u, w, e[2:], e[[0, 3]]).item() == 4
    assert fd_loss(u, w, -u, -w).item() == 8


@pytest.mark.parametrize("batch", [1, 2, 7])
def test_uninformative_features_give_log_batch(batch: int) -> None:
    same = F.normalize(torch.ones(batch, 3, dtype=torch.float64), dim=1)
    assert clip_loss(same, same, 100.0).item() == pytest.approx(math.log(batch), abs=LOOP_RTOL)
    assert icl_loss(same, same, same, same, 100.0).item() == pytest.approx(math.log(batch), abs=LOOP_RTOL)
    assert afd_loss(same, same, 100.0).item() == pytest.approx(math.log(batch), abs=LOOP_RTOL)


@ON_FEATURES
def test_order_of_the_batch_does_not_matter(loss) -> None:
    features = made_features()
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    assert loss([x[order] for x in features]).item() == pytest.approx(loss(features).item(), rel=LOOP_RTOL)


@ON_FEATURES
def test_order_of_the_pairing_does_matter(loss) -> None:
    """Of the student's rows against the rest: the guard that makes the test above mean something."""
    u, w, v, t = made_features()
    assert loss([u.roll(1, 0), w, v, t]).item() > loss([u, w, v, t]).item() + 1e-3


@ON_FEATURES
def test_a_rotation_of_the_space_does_not_matter(loss) -> None:
    features = made_features()
    rotation = torch.linalg.qr(torch.randn(5, 5, generator=torch.Generator().manual_seed(1)).double())[0]
    assert loss([x @ rotation for x in features]).item() == pytest.approx(loss(features).item(), rel=LOOP_RTOL)


def test_icl_takes_the_other_modality_as_candidates() -> None:
    u, w, v, t = made_features()
    swapped = icl_loss(w, u, t, v, CROSS_SCALE)
    assert icl_loss(u, w, v, t, CROSS_SCALE).item() == pytest.approx(swapped.item(), rel=LOOP_RTOL)
    same_modality = icl_loss(u, w, t, v, CROSS_SCALE)
    assert abs(icl_loss(u, w, v, t, CROSS_SCALE).item() - same_modality.item()) > 1e-3


@ON_FEATURES
def test_one_nan_makes_the_loss_nan(loss) -> None:
    for which in range(2):  # the student's: every loss reads both of its modalities
        features = made_features()
        features[which][2, 1] = math.nan
        assert math.isnan(loss(features).item()), f"NaN in input {which} was lost"


@OF_THE_TEACHER
def test_one_nan_of_the_teacher_makes_the_loss_nan(loss) -> None:
    for which in (2, 3):
        features = made_features()
        features[which][2, 1] = math.nan
        assert math.isnan(loss(features).item()), f"NaN in input {which} was lost"


@ON_FEATURES
def test_float32_agrees_with_float64(loss) -> None:
    features = made_features(dtype=torch.float32)
    result = loss(features)
    assert result.dtype == torch.float32
    assert result.item() == pytest.approx(loss([x.double() for x in features]).item(), rel=FLOAT32_RTOL)


@ON_FEATURES
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(loss, dtype: torch.dtype) -> None:
    features = made_features(dtype=dtype)
    assert loss(features).dtype == torch.float32
    assert loss(features).item() == loss([x.float() for x in features]).item()


@ON_FEATURES
def test_autocast_does_not_lower_the_precision(loss) -> None:
    features = made_features(dtype=torch.float32)
    expected = loss(features)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(loss(features), expected)


def test_losses_at_the_largest_scale_are_finite_in_float32() -> None:
    u, w, _, _ = made_features(dtype=torch.float32)
    values = [
        clip_loss(u, -u, MAX_LOGIT_SCALE),
        crd_loss(u, -u, MAX_LOGIT_SCALE, u, u, MAX_LOGIT_SCALE),
        icl_loss(u, w, -u, -w, MAX_LOGIT_SCALE),
        afd_loss(u, -u, MAX_LOGIT_SCALE),
        cross_kd_loss(u, w, -u, -w, MAX_LOGIT_SCALE, MAX_LOGIT_SCALE),
        gd_loss(u, -u, MAX_LOGIT_SCALE, u, u, MAX_LOGIT_SCALE),
        affinity_loss(u, -u, u, u, MAX_LOGIT_SCALE),
        sigmoid_loss(u, -u, MAX_LOGIT_SCALE, -10.0),
        sigmoid_kd_loss(u, -u, MAX_LOGIT_SCALE, -10.0, u, u, MAX_LOGIT_SCALE, -10.0),
    ]
    assert all(value.isfinite() for value in values)
