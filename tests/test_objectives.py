"""The objectives through heads and features: golden values, only what is asked for, any widths, a shared batch."""

import itertools
import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import REPOSITORY
from golden import ATOL, CASES, RAW_SCALE, RTOL, Golden, golden_values
from torch import Tensor

from toolchain.distillation import objectives
from toolchain.distillation.features import BatchFeatures, StudentFeatures, TeacherFeatures, gather_features
from toolchain.distillation.heads import DistillationHeads
from toolchain.distillation.losses import MAX_LOGIT_SCALE, affinity_loss, clip_loss, gd_loss, sigmoid_loss
from toolchain.distillation.objectives import (
    OBJECTIVES,
    Contrast,
    Pairs,
    paper_weight,
    weighted_loss,
    weights_on_unit_features,
)
from toolchain.recipe.distill import NEED_CAPTIONS, OF_OWN_FEATURES, LossWeights

pytestmark = pytest.mark.usefixtures("one_thread")

FLOAT32_RTOL = 1e-5  # float32 has 6e-8; the sums are over a few dozen terms
SAME_NUMBERS_RTOL = 1e-12  # float64 on both sides, added in another order
EVERYTHING = dict.fromkeys(OBJECTIVES, 1.0)
OF_SOFTMAXES = tuple(name for name in OBJECTIVES if name != "sigmoid_kd")
"""The objectives of a softmax student."""

PARAMETERS_OF_THE_GOLDEN_FILE = {
    "visual_proj": "image_projection",
    "text_proj": "text_projection",
    "visual_fusion": "image_fusion",
    "text_fusion": "text_fusion",
}


# The reference.


def golden_heads(
    golden: Golden, names: list[str], *, reference_compat: bool
) -> tuple[DistillationHeads, dict[str, Tensor]]:
    """Heads with a golden case's weights, and everything whose gradient the reference recorded."""
    student_width = golden.leaves["s_img_raw"].shape[1]
    weights = dict.fromkeys(names, 1.0)
    heads = DistillationHeads(student_width, golden.teacher_width, weights, reference_compat=reference_compat)
    heads = heads.double().to(golden.teacher_image.device)
    leaves = {name: golden.leaves[name] for name in ("s_img_raw", "s_txt_raw", "s_scale")}
    for theirs, ours in PARAMETERS_OF_THE_GOLDEN_FILE.items():
        linear = getattr(heads, ours)
        if linear is not None:
            linear.weight.data.copy_(golden.leaves[f"{theirs}_w"])
            linear.bias.data.copy_(golden.leaves[f"{theirs}_b"])
            leaves |= {f"{theirs}_w": linear.weight, f"{theirs}_b": linear.bias}
    for theirs, parameter in (
        ("cross_logit_scale", heads.log_cross_logit_scale),
        ("fusion_logit_scale", heads.log_fusion_logit_scale),
    ):
        if parameter is not None:
            parameter.data.fill_(RAW_SCALE)  # a float32 ln(1 / 0.07) is only right to 1e-8
            leaves[theirs] = parameter
    return heads, leaves


def golden_terms(
    golden: Golden, names: list[str], *, reference_compat: bool
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    heads, leaves = golden_heads(golden, names, reference_compat=reference_compat)
    teacher = TeacherFeatures(golden.teacher_image, golden.teacher_text, golden.teacher_scale)
    features = heads(leaves["s_img_raw"], leaves["s_txt_raw"], teacher)
    return each_alone(BatchFeatures(features, teacher), leaves["s_scale"], heads, names), leaves


def differentiable_loss(
    batch: BatchFeatures, logit_scale: Tensor, heads: DistillationHeads, weights: dict[str, float]
) -> tuple[Tensor, dict[str, Tensor]]:
    """The weighted sum and its terms in one process; of a sigmoid student where an objective needs one."""
    bias = torch.tensor(-5.0, dtype=logit_scale.dtype) if weights.get("sigmoid_kd") else None
    scales, compat = heads.scales(logit_scale, bias), heads.reference_compat
    return weighted_loss(batch, batch, scales, weights, divides_by_scales=compat)


def each_alone(
    batch: BatchFeatures, logit_scale: Tensor, heads: DistillationHeads, names: Iterable[str]
) -> dict[str, Tensor]:
    """Each objective computed alone with weight 1, so that it has a gradient of its own."""
    return {name: differentiable_loss(batch, logit_scale, heads, {name: 1.0})[0] for name in names}


@pytest.mark.parametrize("case", CASES)
def test_reference_compat_reproduces_the_released_code(case: str) -> None:
    golden = Golden(case)
    terms, leaves = golden_terms(golden, golden.objectives, reference_compat=True)
    assert sorted(terms) == sorted(golden.objectives)
    for name, term in terms.items():
        golden.check(name, term, leaves)


@pytest.mark.parametrize("case", CASES)
def test_the_default_is_what_was_intended(case: str) -> None:
    golden = Golden(case)
    names = [name.removeprefix("intended.") for name in golden.values if name.startswith("intended.")]
    assert {"gd", "icl", "cross_kd"} <= set(names)
    terms, leaves = golden_terms(golden, names, reference_compat=False)
    for name in names:
        golden.check(name, terms[name], leaves, intended=True)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("reference_compat", [False, True])
def test_what_needs_no_correction_is_the_same_either_way(case: str, reference_compat: bool) -> None:
    golden = Golden(case)
    heads, leaves = golden_heads(golden, golden.objectives, reference_compat=reference_compat)
    teacher = TeacherFeatures(golden.teacher_image, golden.teacher_text, golden.teacher_scale)
    features = heads(leaves["s_img_raw"], leaves["s_txt_raw"], teacher)
    weights = dict.fromkeys(("task", "crd", "fd"), 1.0)
    for name, term in each_alone(BatchFeatures(features, teacher), leaves["s_scale"], heads, weights).items():
        golden.check(name, term, leaves)


@pytest.mark.parametrize("case", CASES)
def test_the_papers_weights_give_the_published_recipe(case: str) -> None:
    golden = Golden(case)
    names = ["task", "crd", "fd", "icl"]
    terms, leaves = golden_terms(golden, names, reference_compat=True)
    total = sum(paper_weight(name, width=golden.teacher_width) * term for name, term in terms.items())
    assert total.item() == pytest.approx(golden.values["total.clipkd_task+crd+icl+2000fd"].item(), rel=RTOL)
    for key in ("s_img_raw", "s_txt_raw", "s_scale"):
        (gradient,) = torch.autograd.grad(total, leaves[key], retain_graph=True)
        expected = golden.values[f"total_grad.clipkd.{key}"]
        np.testing.assert_allclose(gradient.numpy(), expected, RTOL, ATOL * np.abs(expected).max(), err_msg=key)


@pytest.mark.parametrize("case", CASES)
def test_the_papers_weights_give_each_weighted_loss(case: str) -> None:
    """The reference's own products of weight and loss; its 1e8 of GD is for its batch, 1024, and this one has 8."""
    golden = Golden(case)
    terms, _ = golden_terms(golden, golden.objectives, reference_compat=True)
    batch_factor = {"gd": (1024 / golden.batch) ** 2}
    for name, term in terms.items():
        weight = 1.0 if name == "cross_kd" else paper_weight(name, width=golden.teacher_width)
        weighted = weight * batch_factor.get(name, 1.0) * term.item()
        assert weighted == pytest.approx(golden.values[f"weighted.{name}"].item(), rel=RTOL), name


def test_the_papers_weights_in_our_units() -> None:
    at_512 = {name: paper_weight(name) for name in OBJECTIVES}
    assert at_512["fd"] == at_512["mfd"] == 3.90625
    assert at_512["gd"] == pytest.approx(0.186, abs=5e-4)
    assert at_512["cross_kd"] == at_512["sigmoid_kd"] == 0
    assert {at_512[name] for name in ("task", "crd", "icl", "afd", "affinity")} == {1.0}
    assert paper_weight("gd", width=768) * 768 == pytest.approx(at_512["gd"] * 512, rel=SAME_NUMBERS_RTOL)


def test_the_method_tells_every_objectives_weight() -> None:
    told_of_objectives = (REPOSITORY / "docs" / "method.md").read_text(encoding="utf-8").partition("\n## On glyphs")[0]
    rows = [line.split("|") for line in told_of_objectives.splitlines()]
    told = [(row[2].strip(" `"), row[4].split()[-1]) for row in rows if len(row) == 8]
    assert told[2:] == [(name, f"{paper_weight(name):.3g}") for name in OBJECTIVES]


@pytest.mark.parametrize("rank", [0, 1])
def test_the_rows_of_a_rank_have_the_gradient_of_the_whole_batch(rank: int) -> None:
    """The reference on two processes, each with its half of the batch live: rank r holds rows 4r to 4r + 3."""
    golden, names = Golden("eq32"), ["task", "crd", "fd", "icl"]
    terms, leaves = golden_terms(golden, names, reference_compat=True)
    sum(paper_weight(name, width=golden.teacher_width) * term for name, term in terms.items()).backward()
    own = slice(4 * rank, 4 * rank + 4)
    live, alone = (golden_values(f"ddp2.eq32.gather_with_grad={flag}.rank{rank}") for flag in (True, False))
    for name, term in terms.items():
        expected = golden.factors[name] * alone[f"loss.{name}"].item()
        assert term.item() == pytest.approx(expected, rel=RTOL), name
    for key in ("s_img_raw", "s_txt_raw"):
        found, expected = leaves[key].grad[own].numpy(), alone[f"grad_total.{key}_local"]
        np.testing.assert_allclose(found, expected, RTOL, ATOL * np.abs(expected).max(), err_msg=key)
        # with gradients gathered too, each process' is that of the sum over both: what averaging makes whole again
        np.testing.assert_allclose(2 * found, live[f"grad_total.{key}_local"], RTOL, 2 * ATOL * np.abs(expected).max())
    scale = leaves["cross_logit_scale"].grad.item()
    assert scale == pytest.approx(alone["grad_total.cross_logit_scale"].item(), rel=RTOL)


# Only what is asked for.


def made_batch(
    student_width: int = 6, teacher_width: int = 6, batch: int = 5, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, TeacherFeatures, Tensor]:
    """The student's raw image and text features, the teacher's batch, and raw features of masked images."""
    generator = torch.Generator().manual_seed(3)
    raw = 3 * torch.randn(3, batch, student_width, generator=generator, dtype=torch.float64)
    unit = F.normalize(torch.randn(2, batch, teacher_width, generator=generator, dtype=torch.float64), dim=-1)
    scales = torch.tensor(21.0, dtype=dtype), torch.tensor(-8.0, dtype=dtype)
    teacher = TeacherFeatures(unit[0].to(dtype), unit[1].to(dtype), *scales)
    return raw[0].to(dtype), raw[1].to(dtype), teacher, raw[2].to(dtype)


def terms_of(
    heads: DistillationHeads, batch: tuple[Tensor, Tensor, TeacherFeatures, Tensor], names: tuple[str, ...]
) -> dict[str, Tensor]:
    image, text, teacher, masked = batch
    features = heads(image, text, teacher, masked)
    scale = torch.tensor(14.0, dtype=features.image_BD.dtype)
    return each_alone(BatchFeatures(features, teacher), scale, heads, names)


def test_the_objectives_are_those_that_a_recipe_weighs() -> None:
    assert [name for name in OBJECTIVES if name in LossWeights.model_fields] == list(LossWeights.model_fields)


def test_a_recipe_knows_which_objectives_need_captions() -> None:
    assert set(NEED_CAPTIONS) < set(OBJECTIVES)


def test_objectives_of_the_features_that_ship_are_those_without_projection_and_fusion() -> None:
    own = [name for name, objective in OBJECTIVES.items() if not objective.in_teacher_width and not objective.fuses]
    assert list(OF_OWN_FEATURES) == own


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_row_says_whether_its_loss_trains_the_students_scale(name: str) -> None:
    image, text, teacher, masked = made_batch(6, 9)
    heads = DistillationHeads(6, 9, {name: 1.0}).double()
    scale = torch.tensor(14.0, dtype=torch.float64, requires_grad=True)
    features = BatchFeatures(heads(image, text, teacher, masked), teacher)
    term = differentiable_loss(features, scale, heads, {name: 1.0})[0]
    (gradient,) = torch.autograd.grad(term, scale, allow_unused=True) if term.requires_grad else (None,)
    assert (gradient is not None) == OBJECTIVES[name].reads_logit_scale


@pytest.mark.parametrize(
    ("weights", "same_space", "expected"),
    [
        ({"task": 1.0, "crd": 2.0, "fd": 3.0, "icl": 4.0}, True, {"task": 1.0, "crd": 2.0, "fd": 3.0, "icl": 4.0}),
        ({"task": 1.0, "crd": 2.0, "fd": 3.0, "icl": 4.0}, False, {"task": 1.0, "crd": 2.0}),
        ({"fd": 1.0, "mfd": 2.0}, True, {"fd": 3.0}),
        ({"mfd": 2.0}, True, {"fd": 2.0}),
        ({"afd": 1.0}, True, {"task": 1.0}),
        (dict.fromkeys(("fd", "mfd", "gd", "icl", "cross_kd"), 1.0), False, {"task": 1.0}),
    ],
)
def test_unit_features_take_the_objectives_that_need_no_heads(
    weights: dict[str, float], same_space: bool, expected: dict[str, float]
) -> None:
    kept = weights_on_unit_features(weights, same_space=same_space)
    assert {name: weight for name, weight in kept.items() if weight} == expected


def test_without_captions_what_remains_is_a_relation_to_the_teacher() -> None:
    kept = weights_on_unit_features({"fd": 1.0}, same_space=False, has_captions=False)
    assert {name: weight for name, weight in kept.items() if weight} == {"crd": 1.0}


SUBSETS = [subset for size in range(len(OBJECTIVES)) for subset in itertools.combinations(OF_SOFTMAXES, size)]


@pytest.mark.parametrize("teacher_width", [6, 9])
@pytest.mark.parametrize("reference_compat", [False, True])
def test_any_objectives_give_their_terms_and_train_every_parameter(teacher_width: int, reference_compat: bool) -> None:
    """All 512 of a softmax student: data-parallel training refuses a parameter that is left without a gradient."""
    batch = made_batch(6, teacher_width)
    alone = DistillationHeads(6, teacher_width, EVERYTHING, reference_compat=reference_compat).double()
    everything = terms_of(alone, batch, OBJECTIVES)
    for names in SUBSETS:
        weights = dict.fromkeys(names, 0.5)
        heads = DistillationHeads(6, teacher_width, weights, reference_compat=reference_compat).double()
        heads.load_state_dict({key: alone.state_dict()[key] for key in heads.state_dict()})
        image, text, teacher, masked = batch
        features = BatchFeatures(heads(image, text, teacher, masked), teacher)
        if not names:
            continue
        loss, terms = differentiable_loss(features, torch.tensor(14.0, dtype=torch.float64), heads, weights)
        assert tuple(terms) == names
        for name, term in terms.items():
            assert term.item() == pytest.approx(everything[name].item(), rel=SAME_NUMBERS_RTOL), (name, names)
        assert loss.item() == pytest.approx(0.5 * sum(term.item() for term in terms.values()), rel=SAME_NUMBERS_RTOL)
        if parameters := dict(heads.named_parameters()):
            loss.backward()
            for key, parameter in parameters.items():
                assert parameter.grad is not None, (key, names)
                assert parameter.grad.abs().sum() > 0, (key, names)


@pytest.mark.parametrize(
    ("names", "teacher_width", "expected"),
    [
        (("task", "crd"), 9, []),
        (("fd", "mfd", "gd"), 6, []),
        (("fd",), 9, ["image_projection", "text_projection"]),
        (("mfd",), 9, ["image_projection", "text_projection"]),
        (("gd",), 9, ["image_projection", "text_projection"]),
        (("icl",), 6, ["log_cross_logit_scale"]),
        (("cross_kd",), 9, ["image_projection", "log_cross_logit_scale", "text_projection"]),
        (("afd",), 9, ["image_fusion", "log_fusion_logit_scale", "text_fusion"]),
    ],
)
def test_heads_have_the_parameters_that_their_objectives_read(
    names: tuple[str, ...], teacher_width: int, expected: list[str]
) -> None:
    heads = DistillationHeads(6, teacher_width, EVERYTHING | {name: 0.0 for name in OBJECTIVES if name not in names})
    assert sorted({key.partition(".")[0] for key in heads.state_dict()}) == expected


def test_the_layers_have_a_bias_and_are_made_apart() -> None:
    heads = DistillationHeads(6, 9, EVERYTHING)
    assert (heads.image_projection.weight.shape, heads.text_projection.bias.shape) == ((9, 6), (9,))
    assert (heads.image_fusion.weight.shape, heads.text_fusion.bias.shape) == ((6, 15), (6,))
    assert not torch.equal(heads.image_projection.weight, heads.text_projection.weight)
    assert not torch.equal(heads.image_fusion.weight, heads.text_fusion.weight)


@pytest.mark.parametrize("asked", OBJECTIVES)
def test_a_loss_without_a_weight_is_not_computed(asked: str, monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[tuple[str, Any]] = []
    for function in ("contrast", "match_gradients", "match_features", "decide_pairs"):
        real = getattr(objectives, function)

        def record(*arguments: Any, real: Any = real, function: str = function, **options: Any) -> Any:
            called.append((function, arguments[2]))
            return real(*arguments, **options)

        monkeypatch.setattr(objectives, function, record)
    terms_of(DistillationHeads(6, 9, EVERYTHING).double(), made_batch(6, 9), (asked,))
    form = OBJECTIVES[asked].loss
    if isinstance(form, Contrast):
        sweeps = 2 if form.similarities == "cross" else 1  # two directions; of the same matrix in one sweep
        assert called == [("contrast", {form.target: asked})] * sweeps, "without the other loss"
    elif isinstance(form, Pairs):
        assert called == [("decide_pairs", {form.target: asked})]
    else:
        assert called == [("match_gradients" if asked == "gd" else "match_features", asked)]


def test_the_task_of_a_sigmoid_student_is_the_sigmoid_loss() -> None:
    """And that of a softmax student is not, though its teacher is a sigmoid model."""
    image, text, teacher, _ = made_batch(6, 9)
    heads = DistillationHeads(6, 9, EVERYTHING | {"mfd": 0.0}).double()
    features = BatchFeatures(heads(image, text, teacher), teacher)
    scale = torch.tensor(14.0, dtype=torch.float64, requires_grad=True)
    bias = torch.tensor(-5.0, dtype=torch.float64, requires_grad=True)
    unit = features.student.image_BD, features.student.text_BD
    for given, expected in ((bias, sigmoid_loss(*unit, scale, bias)), (None, clip_loss(*unit, scale))):
        loss, _ = weighted_loss(features, features, heads.scales(scale, given), {"task": 2.0})
        assert loss.item() == pytest.approx(2 * expected.item(), rel=SAME_NUMBERS_RTOL)
        (gradient,) = torch.autograd.grad(loss, bias, allow_unused=True)
        assert (gradient is None) == (given is None)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_row_says_whether_its_loss_trains_a_sigmoid_students_bias(name: str) -> None:
    image, text, teacher, masked = made_batch(6, 9)
    heads = DistillationHeads(6, 9, {name: 1.0}).double()
    scale, bias = (torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (14.0, -5.0))
    features = BatchFeatures(heads(image, text, teacher, masked), teacher)
    loss, _ = weighted_loss(features, features, heads.scales(scale, bias), {name: 1.0})
    gradients = torch.autograd.grad(loss, [scale, bias], allow_unused=True) if loss.requires_grad else (None, None)
    row = OBJECTIVES[name]
    assert [x is not None for x in gradients] == [row.reads_logit_scale, row.reads_logit_bias]


def test_affinity_reads_its_own_scale_and_no_other() -> None:
    image, text, teacher, _ = made_batch(6, 9)
    heads = DistillationHeads(6, 9, {"affinity": 1.0}).double()
    features = BatchFeatures(heads(image, text, teacher), teacher)
    unit = features.student.image_BD, features.student.text_BD
    for scale in (50.0, 20.0):
        scales = heads.scales(torch.tensor(14.0, dtype=torch.float64))
        loss, _ = weighted_loss(features, features, scales, {"affinity": 1.0}, affinity_logit_scale=scale)
        expected = affinity_loss(*unit, teacher.image_BE, teacher.text_BE, scale).item()
        assert loss.item() == pytest.approx(expected, rel=SAME_NUMBERS_RTOL)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (("task", "crd"), {"image_BD", "text_BD"}),
        (("gd",), {"image_BD", "text_BD", "image_BE", "text_BE"}),
        (("mfd",), {"image_BD", "text_BD", "image_BE", "text_BE", "masked_image_BE"}),
        (("afd",), {"image_BD", "text_BD", "fused_image_BD", "fused_text_BD"}),
        (OBJECTIVES, set(StudentFeatures._fields)),
    ],
)
def test_features_that_no_objective_reads_are_not_made(names: tuple[str, ...], expected: set[str]) -> None:
    image, text, teacher, masked = made_batch(6, 9)
    features = DistillationHeads(6, 9, dict.fromkeys(names, 1.0)).double()(image, text, teacher, masked)
    assert {name for name, x in features._asdict().items() if x is not None} == expected


def test_without_a_teacher_there_is_the_task_alone() -> None:
    image, text, _, _ = made_batch()
    heads = DistillationHeads(6, 6, {"task": 1.0})
    assert list(heads.parameters()) == []
    features = heads(image, text, None)
    assert [name for name, x in features._asdict().items() if x is not None] == ["image_BD", "text_BD"]
    batch = BatchFeatures(features, None)
    assert list(differentiable_loss(batch, torch.tensor(14.0), heads, EVERYTHING)[1]) == ["task"]


def test_an_objective_that_does_not_exist_is_refused() -> None:
    with pytest.raises(AssertionError, match="unknown objectives: \\['ckd'\\]"):
        DistillationHeads(6, 6, {"ckd": 1.0})


def test_a_masked_image_is_asked_for_and_missed() -> None:
    image, text, teacher, _ = made_batch()
    heads = DistillationHeads(6, 6, {"mfd": 1.0})
    assert heads.reads_masked_image
    with pytest.raises(AssertionError, match="no masked image"):
        heads(image, text, teacher)
    assert not DistillationHeads(6, 6, {"fd": 1.0}).reads_masked_image


# What the features are.


@pytest.mark.parametrize("teacher_width", [6, 9])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_features_are_unit_rows_in_float32_at_least(teacher_width: int, dtype: torch.dtype) -> None:
    image, text, teacher, masked = made_batch(6, teacher_width, dtype=dtype)
    heads = DistillationHeads(6, teacher_width, EVERYTHING).to(torch.promote_types(dtype, torch.float32))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        features = heads(image, text, teacher, masked)
    for name, x in features._asdict().items():
        assert x.dtype == torch.promote_types(dtype, torch.float32), name
        assert x.shape == (5, teacher_width if name.endswith("E") else 6), name
        torch.testing.assert_close(x.norm(dim=1), torch.ones_like(x[:, 0]))


@pytest.mark.parametrize("teacher_width", [6, 9])
def test_autocast_does_not_lower_the_precision(teacher_width: int) -> None:
    batch, heads = made_batch(6, teacher_width, dtype=torch.float32), DistillationHeads(6, teacher_width, EVERYTHING)
    expected = terms_of(heads, batch, OBJECTIVES)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for name, term in terms_of(heads, batch, OBJECTIVES).items():
            assert term.dtype == torch.float32
            assert torch.equal(term, expected[name]), name


@pytest.mark.parametrize("teacher_width", [6, 9])
def test_float32_agrees_with_float64(teacher_width: int) -> None:
    heads = DistillationHeads(6, teacher_width, EVERYTHING)
    narrow = terms_of(heads, made_batch(6, teacher_width, dtype=torch.float32), OBJECTIVES)
    wide = terms_of(heads.double(), made_batch(6, teacher_width), OBJECTIVES)
    for name in OBJECTIVES:
        assert narrow[name].item() == pytest.approx(wide[name].item(), rel=FLOAT32_RTOL), name


def test_layers_are_applied_before_normalising_raw_features_and_after_normalising_fused_ones() -> None:
    """With a bias the length of the raw feature matters in a projection; a fusion reads unit features."""
    image, text, teacher, masked = made_batch(6, 9)
    heads = DistillationHeads(6, 9, EVERYTHING).double()
    features, longer = heads(image, text, teacher, masked), heads(10 * image, text, teacher, 10 * masked)
    assert (features.image_BE - longer.image_BE).abs().max() > 1e-2
    assert (features.masked_image_BE - longer.masked_image_BE).abs().max() > 1e-2
    torch.testing.assert_close(features.fused_image_BD, longer.fused_image_BD, rtol=SAME_NUMBERS_RTOL, atol=1e-14)


def test_a_fusion_reads_the_student_then_the_teacher_of_its_own_modality() -> None:
    image, text, teacher, masked = made_batch(6, 9)
    heads = DistillationHeads(6, 9, EVERYTHING).double()
    features = heads(image, text, teacher, masked)
    for fusion, raw, theirs, found in (
        (heads.image_fusion, image, teacher.image_BE, features.fused_image_BD),
        (heads.text_fusion, text, teacher.text_BE, features.fused_text_BD),
    ):
        for row in range(len(raw)):
            own = raw[row] / raw[row].norm()
            mixed = fusion.weight[:, :6] @ own + fusion.weight[:, 6:] @ theirs[row] + fusion.bias
            torch.testing.assert_close(found[row], mixed / mixed.norm(), rtol=SAME_NUMBERS_RTOL, atol=1e-14)


@pytest.mark.parametrize("teacher_width", [6, 9])
def test_mfd_is_fd_with_the_masked_image_and_the_whole_text(teacher_width: int) -> None:
    image, text, teacher, masked = made_batch(6, teacher_width)
    heads = DistillationHeads(6, teacher_width, EVERYTHING).double()
    terms = terms_of(heads, (image, text, teacher, masked), ("fd", "mfd"))
    shown_masked = terms_of(heads, (masked, text, teacher, image), ("fd", "mfd"))
    assert terms["mfd"].item() == shown_masked["fd"].item()
    assert shown_masked["mfd"].item() == terms["fd"].item() != terms["mfd"].item()


def test_reference_compat_masks_nothing() -> None:
    image, text, teacher, _ = made_batch(6, 9)
    heads = DistillationHeads(6, 9, EVERYTHING, reference_compat=True).double()
    assert not heads.reads_masked_image
    terms = terms_of(heads, (image, text, teacher, torch.full_like(image, math.nan)), ("fd", "mfd"))
    assert terms["mfd"].item() == terms["fd"].item()


@pytest.mark.parametrize("reference_compat", [False, True])
def test_gd_multiplies_by_the_scales_and_the_released_code_divides(reference_compat: bool) -> None:
    image, text, teacher, masked = made_batch()
    heads = DistillationHeads(6, 6, EVERYTHING, reference_compat=reference_compat).double()
    found = terms_of(heads, (image, text, teacher, masked), ("gd",))["gd"]
    unit, power = (F.normalize(image, dim=1), F.normalize(text, dim=1)), -1 if reference_compat else 1
    expected = gd_loss(*unit, 14.0**power, teacher.image_BE, teacher.text_BE, 21.0**power)
    assert found.item() == pytest.approx(expected.item(), rel=SAME_NUMBERS_RTOL)


# The learnt scales.

SCALES = pytest.mark.parametrize("scale", ["cross_logit_scale", "fusion_logit_scale"])


@SCALES
def test_a_scale_starts_at_14_and_is_held_within_1_and_100(scale: str) -> None:
    heads = DistillationHeads(6, 6, EVERYTHING)
    assert getattr(heads, scale).item() == pytest.approx(1 / 0.07, rel=FLOAT32_RTOL)
    for log_scale, bound in ((6.0, MAX_LOGIT_SCALE), (-1.0, 1.0)):
        getattr(heads, f"log_{scale}").data.fill_(log_scale)
        assert getattr(heads, scale).item() == pytest.approx(bound, rel=FLOAT32_RTOL)


@SCALES
@pytest.mark.parametrize(("log_scale", "bound"), [(6.0, MAX_LOGIT_SCALE), (-1.0, 1.0)])
def test_a_clamped_parameter_can_come_back_from_the_bound(scale: str, log_scale: float, bound: float) -> None:
    heads = DistillationHeads(6, 6, EVERYTHING)
    parameter = getattr(heads, f"log_{scale}")
    parameter.data.fill_(log_scale)
    heads.clamp_parameters_()
    getattr(heads, scale).backward()
    assert parameter.grad.item() == pytest.approx(bound, rel=FLOAT32_RTOL)


@SCALES
def test_a_scale_that_is_not_a_number_stays_so(scale: str) -> None:
    heads = DistillationHeads(6, 6, EVERYTHING)
    getattr(heads, f"log_{scale}").data.fill_(math.nan)
    heads.clamp_parameters_()
    assert math.isnan(getattr(heads, scale).item())


@SCALES
@pytest.mark.parametrize("value", [math.log(1 / 0.07), 200.0, -3.0])
def test_reference_compat_multiplies_by_the_parameter_itself(scale: str, value: float) -> None:
    heads = DistillationHeads(6, 6, EVERYTHING, reference_compat=True)
    parameter = getattr(heads, f"log_{scale}")
    assert parameter.item() == pytest.approx(math.log(1 / 0.07), rel=FLOAT32_RTOL)
    parameter.data.fill_(value)
    heads.clamp_parameters_()
    assert getattr(heads, scale).item() == pytest.approx(value, rel=FLOAT32_RTOL)


def test_clamping_heads_without_scales_does_nothing() -> None:
    heads = DistillationHeads(6, 9, {"fd": 1.0})
    before = {key: x.clone() for key, x in heads.state_dict().items()}
    heads.clamp_parameters_()
    assert all(torch.equal(x, before[key]) for key, x in heads.state_dict().items())


# A batch that several processes share: test_distributed.py has its gradients.


@pytest.mark.parametrize(
    ("teacher_width", "names", "reference_compat", "columns"),
    [
        (6, ("task",), False, 12),
        (6, ("task", "fd", "icl"), False, 12),  # the widths agree: nothing more to send
        (9, ("task", "fd", "icl"), False, 12 + 18),
        (6, ("task", "mfd"), False, 12 + 6),
        (6, ("task", "mfd"), True, 12),
        (9, ("task", "mfd"), True, 12 + 18),
        (9, OBJECTIVES, False, 12 + 18 + 9 + 12),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gathering_is_one_call_that_sends_nothing_twice(
    teacher_width: int, names: tuple[str, ...], reference_compat: bool, columns: int, dtype: torch.dtype
) -> None:
    image, text, teacher, masked = made_batch(6, teacher_width, dtype=dtype)
    weights = dict.fromkeys(names, 1.0)
    heads = DistillationHeads(6, teacher_width, weights, reference_compat=reference_compat).to(dtype)
    features = heads(image, text, teacher, masked)
    sent: list[Tensor] = []
    whole = gather_features(BatchFeatures(features, teacher), lambda x: sent.append(x) or torch.cat([x, 2 * x]))
    received = whole.student
    assert [(x.shape, x.dtype) for x in sent[:1]] == [((5, columns), dtype)]
    assert [x is y for x, y in zip(sent[1:], (teacher.image_BE, teacher.text_BE), strict=True)] == [True, True]
    assert whole.teacher is not None
    assert whole.teacher.image_BE.shape == (10, teacher_width)
    for name, x in features._asdict().items():
        y = getattr(received, name)
        assert (x is None) == (y is None), name
        if x is not None:
            assert torch.equal(y, torch.cat([x, 2 * x])), name
    assert (features.image_BE is features.image_BD) == (received.image_BE is received.image_BD)
