"""The losses against the reference's golden values, their definitions as loops, and what must hold of any of them."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from toolchain.losses import MAX_LOGIT_SCALE, DistillationHeads, clip_loss, crd_loss, fd_loss, icl_loss

GOLDEN_RTOL = 1e-10  # float64 on both sides: only the order of additions differs
GOLDEN_ATOL = 1e-13  # for gradient elements that are themselves near rounding
LOOP_RTOL = 1e-12  # the same float64 numbers, added one by one
FLOAT32_RTOL = 1e-5  # float32 has 6e-8; logits of about 20 and sums over 32 terms lose two digits

CASES = ("eq32", "diff32_48")
LOSSES = ("task", "crd", "fd", "icl")
RAW_CROSS_SCALE = math.log(1 / 0.07)  # the reference multiplies by the logarithm itself


class Golden:
    """One case of the golden file, as float64 leaves."""

    def __init__(self, case: str) -> None:
        with np.load(Path(__file__).parent / "data" / "clip_kd.npz") as saved:
            prefix = f"{case}."
            self.values = {key.removeprefix(prefix): saved[key] for key in saved.files if key.startswith(prefix)}
        self.leaves = {
            name: torch.from_numpy(self.values[f"in.{name}"].copy()).requires_grad_()
            for name in ("s_img_raw", "s_txt_raw", "s_scale")
        }
        self.teacher_image = torch.from_numpy(self.values["in.t_img"])
        self.teacher_text = torch.from_numpy(self.values["in.t_txt"])
        self.teacher_width = self.teacher_image.shape[1]
        self.heads = DistillationHeads(self.leaves["s_img_raw"].shape[1], self.teacher_width).double()
        for tower, projection in (("visual", self.heads.image_projection), ("text", self.heads.text_projection)):
            if projection is not None:
                projection.weight.data = torch.from_numpy(self.values[f"in.{tower}_proj_w"].copy())
                projection.bias.data = torch.from_numpy(self.values[f"in.{tower}_proj_b"].copy())
                self.leaves[f"{tower}_proj_w"] = projection.weight
                self.leaves[f"{tower}_proj_b"] = projection.bias

    def loss(self, name: str, cross_logit_scale: Tensor | float = RAW_CROSS_SCALE) -> Tensor:
        raw_image, raw_text = self.leaves["s_img_raw"], self.leaves["s_txt_raw"]
        unit = (F.normalize(raw_image, dim=1), F.normalize(raw_text, dim=1))
        teacher = (self.teacher_image, self.teacher_text)
        match name:
            case "task":
                return clip_loss(*unit, self.leaves["s_scale"])
            case "crd":
                return crd_loss(*unit, self.leaves["s_scale"], *teacher, float(self.values["in.t_scale"]))
            case "fd":
                # the reference takes the mean over the teacher's width where fd_loss sums
                return fd_loss(*self.heads(raw_image, raw_text), *teacher) / self.teacher_width
            case "icl":
                return icl_loss(*self.heads(raw_image, raw_text), *teacher, cross_logit_scale)
        raise AssertionError(name)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", LOSSES)
def test_loss_and_gradients_equal_the_reference(case: str, name: str) -> None:
    golden = Golden(case)
    cross_logit_scale = torch.tensor(RAW_CROSS_SCALE, dtype=torch.float64, requires_grad=True)
    leaves = {**golden.leaves, "cross_logit_scale": cross_logit_scale}
    loss = golden.loss(name, cross_logit_scale)
    assert loss.dtype == torch.float64
    assert loss.item() == pytest.approx(golden.values[f"loss.{name}"].item(), rel=GOLDEN_RTOL)
    gradients = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values()), allow_unused=True), strict=True))
    prefix = f"grad.{name}."
    expected = {key.removeprefix(prefix): golden.values[key] for key in golden.values if key.startswith(prefix)}
    assert {key for key, gradient in gradients.items() if gradient is not None} == expected.keys()
    for key, value in expected.items():
        np.testing.assert_allclose(gradients[key].numpy(), value, rtol=GOLDEN_RTOL, atol=GOLDEN_ATOL, err_msg=key)


@pytest.mark.parametrize("case", CASES)
def test_icl_at_the_heads_own_scale_equals_the_reference_as_intended(case: str) -> None:
    golden = Golden(case)
    # a float32 ln(1/0.07) is only right to 1e-8: give the parameter all of its digits
    golden.heads.log_cross_logit_scale.data.fill_(RAW_CROSS_SCALE)
    loss = golden.loss("icl", golden.heads.cross_logit_scale)
    assert loss.item() == pytest.approx(golden.values["intended.icl"].item(), rel=GOLDEN_RTOL)
    for key in ("s_img_raw", "s_txt_raw"):
        (gradient,) = torch.autograd.grad(loss, golden.leaves[key], retain_graph=True)
        expected = golden.values[f"intended_grad.icl.{key}"]
        np.testing.assert_allclose(gradient.numpy(), expected, rtol=GOLDEN_RTOL, atol=GOLDEN_ATOL, err_msg=key)


@pytest.mark.parametrize("case", CASES)
def test_published_recipe_is_the_weighted_sum_with_fd_at_2000_over_width(case: str) -> None:
    golden = Golden(case)
    fd = golden.loss("fd") * golden.teacher_width
    total = golden.loss("task") + golden.loss("crd") + golden.loss("icl") + 2000 / golden.teacher_width * fd
    assert total.item() == pytest.approx(golden.values["total.clipkd_task+crd+icl+2000fd"].item(), rel=GOLDEN_RTOL)
    for key in ("s_img_raw", "s_txt_raw", "s_scale"):
        (gradient,) = torch.autograd.grad(total, golden.leaves[key], retain_graph=True)
        expected = golden.values[f"total_grad.clipkd.{key}"]
        np.testing.assert_allclose(gradient.numpy(), expected, rtol=GOLDEN_RTOL, atol=GOLDEN_ATOL, err_msg=key)


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
    torch.testing.assert_close(u.grad, STUDENT_SCALE * (over_texts + over_images) @ w, rtol=LOOP_RTOL, atol=GOLDEN_ATOL)


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


def test_heads_have_projections_only_when_the_widths_differ() -> None:
    assert [name for name, _ in DistillationHeads(8, 8).named_parameters()] == ["log_cross_logit_scale"]
    heads = DistillationHeads(8, 12)
    assert heads.image_projection.weight.shape == (12, 8)
    assert heads.text_projection.bias.shape == (12,)
    assert not torch.equal(heads.image_projection.weight, heads.text_projection.weight)


@pytest.mark.parametrize("teacher_width", [8, 12])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_heads_return_unit_float32_features_of_the_teachers_width(teacher_width: int, dtype: torch.dtype) -> None:
    heads = DistillationHeads(8, teacher_width)
    raw = 10 * torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        features = heads(*raw.to(dtype))
    for x in features:
        assert (x.shape, x.dtype) == ((5, teacher_width), torch.float32)
        torch.testing.assert_close(x.norm(dim=1), torch.ones(5))


def test_heads_project_before_they_normalise() -> None:
    """With a bias the length of the raw feature matters; normalising first would hide it."""
    heads = DistillationHeads(8, 12)
    raw = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    image, _ = heads(raw, raw)
    longer, _ = heads(10 * raw, raw)
    assert (image - longer).abs().max() > 1e-2


def test_cross_logit_scale_starts_at_14_and_is_held_at_100() -> None:
    heads = DistillationHeads(8, 8)
    assert heads.cross_logit_scale.item() == pytest.approx(1 / 0.07, rel=FLOAT32_RTOL)
    heads.log_cross_logit_scale.data.fill_(6.0)
    assert heads.cross_logit_scale.item() == pytest.approx(MAX_LOGIT_SCALE, rel=FLOAT32_RTOL)


def test_clamped_parameter_can_come_back_from_the_bound() -> None:
    heads = DistillationHeads(8, 8)
    heads.log_cross_logit_scale.data.fill_(6.0)
    heads.clamp_parameters_()
    heads.cross_logit_scale.backward()
    assert heads.log_cross_logit_scale.grad.item() == pytest.approx(MAX_LOGIT_SCALE, rel=FLOAT32_RTOL)
