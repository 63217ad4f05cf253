"""benchmarks/beyond_glyphs.py without training: its students, their controls, gains, intervals, table and claims."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import REPOSITORY

from toolchain.data.batch import Batch
from toolchain.distillation.losses import sigmoid_loss

STEPS = 60
QUANTILE_DIGITS = 5e-4  # the table of quantiles has three decimals
AT_MINIMUM = 1e-6  # of the gradient; the loss is around 1, in float64
BATCH, WIDTH = 16, 8


@pytest.fixture(autouse=True)
def scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(REPOSITORY / "benchmarks"))


@pytest.fixture
def settings() -> Any:
    import beyond_glyphs

    second = REPOSITORY / "recipes" / "glyphs_teacher"  # any model with weights
    return beyond_glyphs.Settings(Path("out"), STEPS, second)


def results(top1: Mapping[str, tuple[float, ...]]) -> dict[str, dict[int, dict[str, Any]]]:
    """Results of two seeds and more, the last seed first, with the same top-1 in every set."""
    return {
        arm: {
            seed: {
                "pooled": values[seed],
                "sets": {name: {"top1": values[seed], "n": 1} for name in ("stix", "serif", "novel")},
                "train_s": 10.0 + seed,
            }
            for seed in reversed(range(len(values)))
        }
        for arm, values in top1.items()
    }


def test_every_student_belongs_to_a_comparison_and_is_trained_once() -> None:
    import beyond_glyphs

    names = list(beyond_glyphs.COMPARISONS)
    assert beyond_glyphs.choose_arms(names) == list(beyond_glyphs.ARMS)
    assert beyond_glyphs.choose_arms(["start", "captions"]) == ["recipe", "inherited", "image_only"]
    assert set(beyond_glyphs.STATED_AS_ADVANTAGES) <= set(names)


def test_student_and_control_have_equal_samples_and_differ_in_what_is_compared(settings: Any) -> None:
    import beyond_glyphs

    differences = {
        "start": {"inherit", "lr"},
        "relations": {"loss_weights"},
        "teachers": {"more_teachers"},
        "sigmoid": {"loss_weights", "model_cfg"},
        "captions": {"loss_weights", "text_tower"},
    }
    for name, expected in differences.items():
        chosen = beyond_glyphs.COMPARISONS[name]
        both = [beyond_glyphs.load_arm(arm, 7, settings) for arm in (chosen.arm, chosen.control)]
        sections = [each.distill.model_dump() | each.student.model_dump() | each.model_dump() for each in both]
        different = {key for key in sections[0] if sections[0][key] != sections[1][key]}
        assert different - {"distill", "student", "vocabulary"} == expected, name
        assert both[0].distill.warmup < both[0].distill.steps == STEPS


def test_teacher_and_objectives_are_the_quickstarts(settings: Any) -> None:
    import beyond_glyphs

    from toolchain.recipe.load import load_recipe, recipe_path

    written = load_recipe(recipe_path("glyphs"))
    taken = beyond_glyphs.load_arm("recipe", written.seed, settings)
    assert taken.teacher == written.teacher
    assert taken.distill is not None
    assert written.distill is not None
    assert taken.distill.loss_weights == written.distill.loss_weights
    assert taken.student.model == written.student.model


def test_the_second_teacher_sees_smaller_images() -> None:
    import beyond_glyphs

    recipe = beyond_glyphs.load_second_teacher(STEPS)
    size = recipe.student.model_cfg["vision_cfg"]["image_size"]
    assert recipe.student.model == recipe.teacher.model
    assert recipe.student.is_random
    assert recipe.student.preprocess_cfg["size"] == [size, size]
    assert recipe.seed == beyond_glyphs.TEACHER_SEED


def test_a_stored_student_is_that_of_the_same_recipe_and_teachers(settings: Any, tmp_path: Path) -> None:
    import beyond_glyphs

    keys = {
        beyond_glyphs.identify(beyond_glyphs.load_arm(name, seed, settings))
        for name in beyond_glyphs.ARMS
        for seed in (0, 1)
    }
    assert len(keys) == 2 * len(beyond_glyphs.ARMS)
    other = settings._replace(second_teacher=REPOSITORY / "recipes" / "glyphs_tiny")
    assert beyond_glyphs.identify(beyond_glyphs.load_arm("two_teachers", 0, other)) not in keys
    assert beyond_glyphs.identify(beyond_glyphs.load_arm("recipe", 0, other)) in keys


def test_quantiles_of_student_t() -> None:
    """The density of t with n degrees of freedom, integrated between the quantiles, is 0.95."""
    import glyphs_students

    for n, quantile in glyphs_students.T_95.items():
        constant = math.gamma((n + 1) / 2) / (math.sqrt(n * math.pi) * math.gamma(n / 2))
        t = np.linspace(-quantile, quantile, 200_001)
        density = constant * (1 + t**2 / n) ** (-(n + 1) / 2)
        area = (density[1:] + density[:-1]).sum() / 2 * (t[1] - t[0])
        assert area == pytest.approx(0.95, abs=QUANTILE_DIGITS)


def test_an_interval_is_that_of_a_mean() -> None:
    import glyphs_students

    mean, half = glyphs_students.interval([1.0, 2.0, 3.0])
    assert mean == 2.0
    assert half == pytest.approx(glyphs_students.T_95[2] / math.sqrt(3))
    assert math.isnan(glyphs_students.interval([1.0])[1])


def test_gains_are_paired_by_seed() -> None:
    import beyond_glyphs

    found = results({"inherited": (0.11, 0.31, 0.21), "recipe": (0.10, 0.30, 0.20)})
    gain, half = beyond_glyphs.paired_gain(found, "start", [0, 1, 2])
    assert gain == pytest.approx(0.01)
    assert half == pytest.approx(0, abs=1e-12)  # whatever the spread over seeds


def test_the_table_has_control_student_and_teachers() -> None:
    import beyond_glyphs

    found = results({"affinity": (0.30, 0.20), "crd": (0.10, 0.20)})
    teacher = results({"teacher": (0.5,)})["teacher"][0]
    lines = beyond_glyphs.make_table(found, {"the included teacher": teacher}, ["relations"], [0, 1]).splitlines()
    assert lines[2] == "| relations | task + CRD | 15.00 ± 7.07 | - | 15.0 / 15.0 / 15.0 | 10 |"
    # The gains are 20 and 0 points: their mean has the standard error 10, and t with one degree of freedom is 12.706.
    assert (
        lines[3]
        == "| relations | task + affinity mimicking | 25.00 ± 7.07 | +10.00 ± 127.06 | 25.0 / 25.0 / 25.0 | 10 |"
    )
    assert lines[4] == "| - | the included teacher | 50.00 | - | 50.0 / 50.0 / 50.0 | - |"
    assert lines[-1].startswith("Seeds 0, 1;")


@pytest.mark.parametrize(("gain", "holds"), [(0.05, True), (-0.05, False)])
def test_what_the_page_states_is_claimed(gain: float, holds: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    import beyond_glyphs

    found = results({"inherited": (0.1 + gain, 0.2 + gain), "recipe": (0.1, 0.2)})
    monkeypatch.setattr(beyond_glyphs, "STATED_AS_ADVANTAGES", ())
    assert beyond_glyphs.make_claims(found, ["start"], [0, 1]) == []
    monkeypatch.setattr(beyond_glyphs, "STATED_AS_ADVANTAGES", ("start",))
    (claimed,) = beyond_glyphs.make_claims(found, ["start"], [0, 1])
    assert claimed["holds"] is holds


@dataclass(frozen=True)
class Features:
    """A teacher cache and its data: pairs whose image and text features differ by noise."""

    about: Mapping[str, Any]
    batch_size = BATCH

    def batch(self, step: int, rows: slice, geometries: list[Any]) -> Batch:
        sample_B = np.arange(step * BATCH, (step + 1) * BATCH)[rows]
        return Batch({}, [], sample_B, np.zeros_like(sample_B), step)

    def features(self, sample_B: Any, pick_B: Any, view: int) -> tuple[torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(int(sample_B[0]))
        image_BE, noise_BE = torch.randn(2, len(sample_B), WIDTH, generator=generator)
        return F.normalize(image_BE, dim=1), F.normalize(image_BE + noise_BE, dim=1)


def test_a_fitted_sigmoid_teacher_minimizes_its_loss() -> None:
    import beyond_glyphs

    source: Any = Features({"logit_scale": 1.0, "embed_dim": WIDTH})
    fitted = beyond_glyphs.fit_sigmoid(source, source)
    assert fitted.about["embed_dim"] == WIDTH
    scale, bias = (torch.tensor(fitted.about[name]).double() for name in ("logit_scale", "logit_bias"))
    losses = []
    for step in range(beyond_glyphs.FITTED_BATCHES):
        image_BE, text_BE = source.features(np.array([step * BATCH] * BATCH), None, 0)
        losses.append(sigmoid_loss(image_BE.double(), text_BE.double(), scale.requires_grad_(), bias.requires_grad_()))
    gradient = torch.autograd.grad(torch.stack(losses).mean(), [scale, bias])
    assert max(abs(part.item()) for part in gradient) < AT_MINIMUM
    assert scale > 0 > bias
