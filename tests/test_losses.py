"""The losses against the reference's golden values, their definitions as loops, and what must hold of any of them."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from golden import ATOL, CASES, INTENDED_SCALE, RAW_SCALE, RTOL, Golden
from torch import Tensor

from toolchain.losses import (
    MAX_LOGIT_SCALE,
    _scaled_gradients,
    afd_loss,
    clip_loss,
    crd_loss,
    cross_kd_loss,
    fd_loss,
    gd_loss,
    icl_loss,
)

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


STUDENT_SCALE, TEACHER_SCALE, CROSS_SCALE = 14.0, 21.0, 9.0


def task(features: list[Tensor]) -> Tensor:
    return clip_loss(features[0], features[1], STUDENT_SCALE)


def crd(features: list[Tensor]) -> Tensor:
    return crd_loss(features[0], features[1], STUDENT_SCALE, features[2], features[3], TEACHER_SCALE)


def fd(features: list[Tensor]) -> Tensor:
    return fd_loss(*features)


def icl(features: list[Tensor]) -> Tensor:
    return icl_loss(*features, CROSS_SCALE)


ON_FEATURES = pytest.mark.parametrize("loss", [task, crd, fd, icl])


def dot(a: Tensor, b: Tensor) -> float:
    return math.fsum(x * y for x, y in zip(a.tolist(), b.tolist(), strict=True))


def log_softmax(logits: list[float]) -> list[float]:
    total = math.log(math.fsum(math.exp(x) for x in logits))
    return [x - total for x in logits]


def cross_entropy_by_definition(anchors: Tensor, candidates: Tensor, scale: float) -> float:
    rows = [log_softmax([scale * dot(anchor, candidate) for candidate in candidates]) for anchor in anchors]
    return -math.fsum(row[i] for i, row in enumerate(rows)) / len(rows)


def kl_by_definition(student: tuple[Tensor, Tensor, float], teacher: tuple[Tensor, Tensor, float]) -> float:
    total = 0.0
    for i in range(len(student[0])):
        log_q = log_softmax([student[2] * dot(student[0][i], candidate) for candidate in student[1]])
        log_p = log_softmax([teacher[2] * dot(teacher[0][i], candidate) for candidate in teacher[1]])
        total += math.fsum(math.exp(p) * (p - q) for p, q in zip(log_p, log_q, strict=True))
    return total / len(student[0])


def by_definition(name: str, features: list[Tensor]) -> float:
    u, w, v, t = features
    match name:
        case "task":
            forth = cross_entropy_by_definition(u, w, STUDENT_SCALE)
            return (forth + cross_entropy_by_definition(w, u, STUDENT_SCALE)) / 2
        case "crd":
            forth = kl_by_definition((u, w, STUDENT_SCALE), (v, t, TEACHER_SCALE))
            return (forth + kl_by_definition((w, u, STUDENT_SCALE), (t, v, TEACHER_SCALE))) / 2
        case "fd":
            return math.fsum(2 - 2 * dot(a, b) for a, b in [*zip(u, v, strict=True), *zip(w, t, strict=True)]) / len(u)
        case "icl":
            forth = cross_entropy_by_definition(u, t, CROSS_SCALE)
            return (forth + cross_entropy_by_definition(w, v, CROSS_SCALE)) / 2
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

    def sum_of_losses(student: Tensor, teacher: Tensor, cross: Tensor) -> Tensor:
        total = clip_loss(features[0], features[1], student) + icl_loss(*features, cross)
        return total + crd_loss(features[0], features[1], student, features[2], features[3], teacher)

    scales = [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (5.0, 7.0, 3.0)]
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


@pytest.mark.parametrize("loss", [crd, fd, icl])
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
    ]
    assert all(value.isfinite() for value in values)
