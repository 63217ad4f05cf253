"""The objectives in blocks of rows have their definitions' values and gradients, in memory linear in the batch."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from toolchain.distillation import blockwise_losses, losses
from toolchain.distillation.blocks import Block, Sweep, by_autograd, choose_block_rows, sum_in_blocks
from toolchain.distillation.features import BatchFeatures, Scales, StudentFeatures, TeacherFeatures
from toolchain.distillation.objectives import OBJECTIVES, weighted_loss

pytestmark = pytest.mark.usefixtures("one_thread")

MAX_FLOAT64_ERROR = 1e-10  # of the largest element of a tensor
NAMES = [*StudentFeatures._fields, "logit_scale", "cross_logit_scale", "fusion_logit_scale", "teacher_logit_scale"]
AFFINITY_SCALE = 11.0
BIASES = {"logit_bias": -5.0, "teacher_logit_bias": -8.0}
OF_SIGMOIDS = ("sigmoid", "sigmoid_kd")
"""`sigmoid` is the task of a sigmoid student; the other objectives are tested on a softmax student."""

WEIGHTS = st.floats(0.01, 3.0)
LOSSES = [*OBJECTIVES, "sigmoid"]


def define(name: str, x: dict[str, Tensor]) -> Tensor:
    """An objective as losses.py defines it, over the whole batch at once."""
    student, projected = (x["image_BD"], x["text_BD"]), (x["image_BE"], x["text_BE"])
    fused, teacher = (x["fused_image_BD"], x["fused_text_BD"]), (x["teacher_image"], x["teacher_text"])
    scale, teacher_scale, cross = x["logit_scale"], x["teacher_logit_scale"], x["cross_logit_scale"]
    definitions: dict[str, Callable[[], Tensor]] = {
        "task": lambda: losses.clip_loss(*student, scale),
        "crd": lambda: losses.crd_loss(*student, scale, *teacher, teacher_scale),
        "fd": lambda: losses.fd_loss(*projected, *teacher),
        "mfd": lambda: losses.fd_loss(x["masked_image_BE"], x["text_BE"], *teacher),
        "gd": lambda: losses.gd_loss(*projected, scale, *teacher, teacher_scale),
        "icl": lambda: losses.icl_loss(*projected, *teacher, cross),
        "afd": lambda: losses.afd_loss(*fused, x["fusion_logit_scale"]),
        "cross_kd": lambda: losses.cross_kd_loss(*projected, *teacher, cross, teacher_scale),
        "affinity": lambda: losses.affinity_loss(*student, *teacher, AFFINITY_SCALE),
        "sigmoid": lambda: losses.sigmoid_loss(*student, scale, x["logit_bias"]),
        "sigmoid_kd": lambda: losses.sigmoid_kd_loss(
            *student, scale, x["logit_bias"], *teacher, teacher_scale, x["teacher_logit_bias"]
        ),
    }
    return definitions[name]()


def draw_batch(batch: int, width: int, teacher_width: int, scale: float = 14.0, seed: int = 0) -> dict[str, Tensor]:
    """Float64 unit features whose pairs correlate, and scales; all but the teacher's features want a gradient."""
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(batch, max(width, teacher_width), generator=generator, dtype=torch.float64)

    def unit(columns: int) -> Tensor:
        noise = torch.randn(batch, columns, generator=generator, dtype=torch.float64)
        return F.normalize(common[:, :columns] + noise, dim=1)

    x = {name: unit(teacher_width if name.endswith("E") else width) for name in StudentFeatures._fields}
    x |= {name: torch.tensor(scale + i, dtype=torch.float64) for i, name in enumerate(NAMES) if "scale" in name}
    x |= {name: torch.tensor(bias, dtype=torch.float64) for name, bias in BIASES.items()}
    x = {name: value.requires_grad_() for name, value in x.items()}
    return x | {"teacher_image": unit(teacher_width), "teacher_text": unit(teacher_width)}


def cast(x: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: value.detach().to(dtype).requires_grad_(value.requires_grad) for name, value in x.items()}


def compute(x: dict[str, Tensor], weights: dict[str, float], memory_mb: float) -> tuple[Tensor, dict[str, Tensor]]:
    """The weighted sum as training computes it, in one process; of a sigmoid student if one of its losses is asked."""
    named = {{"sigmoid": "task"}.get(name, name): name for name in weights}
    student = StudentFeatures(*(x[name] for name in StudentFeatures._fields))
    scale, bias = x["teacher_logit_scale"], x["teacher_logit_bias"]
    batch = BatchFeatures(student, TeacherFeatures(x["teacher_image"], x["teacher_text"], scale, bias))
    scales = Scales(x["logit_scale"], x["cross_logit_scale"], x["fusion_logit_scale"])
    if any(name in OF_SIGMOIDS for name in weights):
        scales = scales._replace(logit_bias=x["logit_bias"])
    ours = {objective: weights[name] for objective, name in named.items()}
    loss, terms = weighted_loss(batch, batch, scales, ours, memory_mb=memory_mb, affinity_logit_scale=AFFINITY_SCALE)
    return loss, {named[objective]: term for objective, term in terms.items()}


def differentiate(loss: Tensor, x: dict[str, Tensor]) -> dict[str, Tensor]:
    """The gradients in all inputs that the loss depends on."""
    names = [name for name, value in x.items() if value.requires_grad]
    found = torch.autograd.grad(loss, [x[name] for name in names], allow_unused=True)
    return {name: value for name, value in zip(names, found, strict=True) if value is not None}


def memory_for(rows: int, batch: int, dtype: torch.dtype = torch.float64) -> float:
    """The budget that makes blocks of so many rows."""
    found = 1e-6
    while choose_block_rows(batch, found, dtype) < rows:
        found *= 1.01
    assert choose_block_rows(batch, found, dtype) == rows
    return found


def assert_equals_definition(x: dict[str, Tensor], weights: dict[str, float], memory_mb: float) -> None:
    loss, terms = compute(x, weights, memory_mb)
    defined = {name: define(name, x) for name in weights}
    assert terms.keys() == weights.keys()
    for name, term in terms.items():
        assert not term.requires_grad
        assert term.item() == pytest.approx(defined[name].item(), rel=MAX_FLOAT64_ERROR, abs=MAX_FLOAT64_ERROR), name
    expected = differentiate(torch.stack([weights[name] * term for name, term in defined.items()]).sum(), x)
    found = differentiate(loss, x)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        bound = MAX_FLOAT64_ERROR * max(1.0, value.abs().max().item())
        assert (found[name] - value).abs().max().item() <= bound, name


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize(
    ("batch", "width", "teacher_width", "rows", "scale"),
    [(12, 5, 7, 4, 14.0), (13, 7, 5, 4, 14.0), (2, 3, 3, 1, 14.0), (9, 6, 6, 100, 14.0), (10, 5, 5, 3, 100.0)],
    ids=["even", "ragged", "two", "one block", "saturated"],
)
def test_an_objective_equals_its_definition(
    name: str, batch: int, width: int, teacher_width: int, rows: int, scale: float
) -> None:
    memory_mb = memory_for(min(rows, batch), batch) if rows < 100 else 256
    assert_equals_definition(draw_batch(batch, width, teacher_width, scale), {name: 0.7}, memory_mb)


@settings(deadline=None, max_examples=60)
@given(
    batch=st.integers(2, 24), width=st.integers(1, 9), teacher_width=st.integers(1, 9), rows=st.integers(1, 24),
    scale=st.floats(1.0, 100.0), seed=st.integers(0, 99),
    weights=st.one_of(
        st.dictionaries(st.sampled_from([name for name in LOSSES if name not in OF_SIGMOIDS]), WEIGHTS, min_size=1),
        st.dictionaries(st.sampled_from([name for name in LOSSES if name != "task"]), WEIGHTS, min_size=1),
    ),
)  # fmt: skip
def test_any_objectives_in_any_blocks_equal_their_definitions(
    batch: int, width: int, teacher_width: int, rows: int, scale: float, seed: int, weights: dict[str, float]
) -> None:
    memory_mb = memory_for(rows, batch)
    assert_equals_definition(draw_batch(batch, width, teacher_width, scale, seed), weights, memory_mb)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("scale", [14.0, 100.0])
def test_float32_is_as_near_to_float64_as_the_definition_is(name: str, scale: float) -> None:
    """By the largest difference in each tensor over ten batches, at most twice that of the definition in float32."""
    ours: dict[str, float] = {}
    dense: dict[str, float] = {}
    for seed in range(10):
        exact = draw_batch(96, 16, 24, scale, seed)
        expected = differentiate(define(name, exact), exact)
        x = cast(exact, torch.float32)
        found = differentiate(compute(x, {name: 1.0}, memory_for(20, 96, torch.float32))[0], x)
        by_definition = differentiate(define(name, x), x)
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            ours[key] = max(ours.get(key, 0.0), (found[key] - value).abs().max().item())
            dense[key] = max(dense.get(key, 0.0), (by_definition[key] - value).abs().max().item())
    assert all(error <= 2 * dense[key] for key, error in ours.items()), (ours, dense)


class _Largest(TorchDispatchMode):
    """Records the number of elements of the largest tensor that any operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, operation, types, arguments=(), keywords=None):  # type: ignore[no-untyped-def]
        made = operation(*arguments, **(keywords or {}))
        for value in made if isinstance(made, (tuple, list)) else [made]:
            if isinstance(value, Tensor):
                self.elements = max(self.elements, value.numel())
        return made


@pytest.mark.parametrize("name", LOSSES)
def test_the_whole_square_is_never_made(name: str) -> None:
    batch, rows = 64, 8
    x = draw_batch(batch, 6, 6)
    largest = _Largest()
    with largest:
        differentiate(compute(x, {name: 1.0}, memory_for(rows, batch))[0], x)
    assert largest.elements <= max(rows * batch, batch * 6 * 7), "all features are concatenated nowhere here"
    with largest:
        differentiate(define("task", x), x)
    assert largest.elements == batch**2, "the definition makes it"


@contextmanager
def count_products() -> Iterator[list[int]]:
    """Count the products of anchors and candidates."""
    counted = [0]
    real = blockwise_losses.multiply

    def count(*arguments: Any) -> Tensor:
        counted[0] += 1
        return real(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blockwise_losses, "multiply", count)
        yield counted


@pytest.mark.parametrize(
    ("names", "products"),
    [
        (("task",), 2),
        (("crd",), 4),
        (("task", "crd"), 4),
        (("icl", "cross_kd"), 4),
        (("task", "crd", "icl", "afd"), 8),
        (("sigmoid",), 1),
        (("sigmoid", "sigmoid_kd"), 2),
        (("affinity",), 4),
    ],
)
def test_objectives_of_the_same_similarities_share_a_sweep(names: tuple[str, ...], products: int) -> None:
    """Two directions of the student's similarities, and two of the teacher's where a distribution is matched."""
    x = draw_batch(6, 4, 4)
    with count_products() as counted:
        differentiate(compute(x, dict.fromkeys(names, 1.0), 256)[0], x)
    assert counted[0] == products


@pytest.mark.parametrize("task", ["task", "sigmoid"])
def test_a_loss_of_high_scale_is_finite_in_float32(task: str) -> None:
    everything = [task, *(name for name in OBJECTIVES if name not in ("task", "sigmoid_kd"))]
    x = cast(draw_batch(32, 8, 8, 100.0), torch.float32)
    loss, terms = compute(x, dict.fromkeys(everything, 1.0), memory_for(5, 32, torch.float32))
    assert math.isfinite(loss.item())
    assert all(value.isfinite().all() for value in differentiate(loss, x).values())
    assert len(terms) == len(everything)


@pytest.mark.parametrize("name", LOSSES)
def test_a_nan_reaches_the_loss(name: str) -> None:
    x = draw_batch(6, 4, 4)
    for key in StudentFeatures._fields:
        with torch.no_grad():
            x[key][3, 1] = math.nan
    loss, terms = compute(x, {name: 1.0}, memory_for(4, 6))
    assert math.isnan(loss.item())
    assert math.isnan(terms[name].item())


# Sums in blocks of any function.


def test_a_sum_in_blocks_is_the_sum_of_the_rows() -> None:
    """Two sweeps read the same rows, and one of them shares what the other one cuts into blocks."""
    generator = torch.Generator().manual_seed(2)
    rows = torch.randn(7, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    factor = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    places: list[slice] = []

    def sum_both(block: Block) -> Tensor:
        places.append(block.place)
        return torch.stack([(block.shared[0] * block.rows[0]).sum(), (block.rows[0] ** 2).sum()])

    def sum_with_all(block: Block) -> Tensor:
        return (block.rows[0] @ block.shared[0].T).sum().reshape(1)

    sweeps = [
        Sweep(("a", "b"), by_autograd(sum_both), [rows], [factor], 8),
        Sweep(("a",), by_autograd(sum_with_all), [rows], [rows], 8),
    ]
    total, found = sum_in_blocks(sweeps, {"a": 0.5, "b": 3.0}, memory_for(3, 8))
    assert [place.start for place in places] == [0, 3, 6]
    column_sums = rows.sum(0)
    a, b = 2 * rows.sum() + column_sums @ column_sums, rows.square().sum()
    assert list(found) == ["a", "b"]
    torch.testing.assert_close(torch.stack(list(found.values())), torch.stack([a, b]).detach())
    torch.testing.assert_close(total, 0.5 * a + 3 * b)
    expected = torch.autograd.grad(0.5 * (factor * rows.sum() + column_sums @ column_sums) + 3 * b, [rows, factor])
    for ours, theirs in zip(torch.autograd.grad(10 * total, [rows, factor]), expected, strict=True):
        torch.testing.assert_close(ours, 10 * theirs)


def test_without_gradients_nothing_is_differentiated() -> None:
    rows = torch.ones(4, 2)
    sweep = Sweep(("a",), by_autograd(lambda block: block.rows[0].sum().reshape(1)), [rows], [], 2)
    total, _ = sum_in_blocks([sweep], {"a": 1.0}, 1)
    assert total.item() == 8
    assert not total.requires_grad


def test_gradient_distillation_without_gradients_has_its_value() -> None:
    x = draw_batch(6, 4, 4)
    with torch.no_grad():
        assert compute(x, {"gd": 2.0}, 1)[0].item() == pytest.approx(2 * define("gd", x).item())
    detached = {name: value.detach() for name, value in x.items()}
    assert compute(detached, {"gd": 2.0}, 1)[1]["gd"].item() == pytest.approx(define("gd", x).item())


@pytest.mark.parametrize(("candidates", "memory_mb", "rows"), [(16384, 256, 512), (10**9, 1, 1), (8, 256, 2**20)])
def test_block_rows_follow_from_the_budget(candidates: int, memory_mb: float, rows: int) -> None:
    assert choose_block_rows(candidates, memory_mb, torch.float32) == rows
    assert choose_block_rows(candidates, memory_mb, torch.float64) == max(1, rows // 2)
