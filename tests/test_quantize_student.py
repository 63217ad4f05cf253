"""The int8 student of a run: what it is calibrated on, what its loss reads, and that it stays near the float one."""

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import STUDENT

from toolchain.data.glyph_batches import GlyphBatches
from toolchain.data.glyphs import TrainingSet
from toolchain.distillation.make_teacher_cache import SHARD_SAMPLES, CachePlan, make_cache
from toolchain.distillation.teacher import live_teacher
from toolchain.distillation.teacher_cache import TeacherCache, open_cache
from toolchain.errors import ClipkdError
from toolchain.models.build import load_model
from toolchain.models.clip_model import ClipModel
from toolchain.models.towers import unit_image_features
from toolchain.quantization import quantize_student as finetune
from toolchain.quantization.checkpoint import load_quantized
from toolchain.quantization.nncf_backend import list_quantizers
from toolchain.quantization.quantize import Calibration, FineTuning
from toolchain.quantization.quantize_student import Quantization, quantize_student
from toolchain.recipe.distill import LossWeights
from toolchain.recipe.quantize import QuantizeSpec

pytestmark = pytest.mark.usefixtures("one_thread")

SAMPLES = 16
ABOUT_CACHE = {"views": 2, "shard_samples": SHARD_SAMPLES}


def silent(what: str, done: int, total: int, note: str = "") -> None:
    pass


def quantized(
    folder: Path, samples: TrainingSet, teacher: ClipModel | TeacherCache | None, weights: LossWeights, **changes: Any
) -> tuple[ClipModel, dict[str, Any]]:
    folder.mkdir()
    student = load_model(STUDENT, random_seed=0)
    spec = QuantizeSpec(**({"steps": 2, "batch_size": 8, "calibration_samples": SAMPLES} | changes))
    data = GlyphBatches(samples, 0, 8, 2)
    return student, quantize_student(Quantization(spec, weights, student, teacher, data, 0), folder, silent)


@pytest.mark.parametrize(
    "weights",
    [LossWeights(), LossWeights(task=0, crd=0, fd=0, icl=0, afd=1), LossWeights(task=0, crd=0, fd=0, icl=0, mfd=2)],
    ids=["published", "a head it has not", "a mask it has not"],
)
def test_any_objectives_fine_tune(
    tmp_path: Path, tiny_samples: TrainingSet, teacher_folder: Path, weights: LossWeights
) -> None:
    student, said = quantized(tmp_path / "int8", tiny_samples, load_model(teacher_folder), weights)
    assert said["steps"] == 2
    image_tower, _ = load_quantized(tmp_path / "int8", student)
    pixels = student.normalise(torch.randint(256, (4, 3, 32, 32), dtype=torch.uint8))
    with torch.no_grad():
        features, expected = image_tower(pixels), unit_image_features(student.net, pixels)
    assert features.isfinite().all()
    assert (features * expected).sum(-1).min() > 0.8, "as near as int8 of random weights is (test_quantize.py)"


def test_without_a_teacher_the_float_student_teaches_and_runs_once(
    tmp_path: Path, tiny_samples: TrainingSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    def again(*_: Any) -> None:
        raise AssertionError("its features are the batch's already")

    monkeypatch.setattr(finetune, "unit_image_features", again)
    monkeypatch.setattr(finetune, "unit_text_features", again)
    student, said = quantized(tmp_path / "int8", tiny_samples, None, LossWeights())
    assert said["steps"] == 2
    fresh = load_model(STUDENT, random_seed=0)
    assert all(torch.equal(value, fresh.net.state_dict()[key]) for key, value in student.net.state_dict().items())


def test_a_cache_teaches_what_the_teacher_does(
    tmp_path: Path, tiny_samples: TrainingSet, teacher_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = GlyphBatches(tiny_samples, 0, 8, 2)
    (tmp_path / "cache").mkdir()
    live = live_teacher(load_model(teacher_folder), "fp32", torch.device("cpu"))
    make_cache(live, data, tmp_path / "cache", CachePlan(ABOUT_CACHE, "float32", num_views=2, steps=2), silent)
    seen: list[list[Any]] = []

    def keep(student: ClipModel, folder: Path, calibration: Any, fine_tuning: FineTuning, **_: Any) -> None:
        seen.append([list(fine_tuning.batches), fine_tuning.loss_fn])

    monkeypatch.setattr(finetune, "quantize", keep)
    weights = LossWeights(task=0, crd=1, fd=0, icl=0)
    quantized(tmp_path / "live", tiny_samples, load_model(teacher_folder), weights)
    monkeypatch.setattr(finetune, "live_teacher", None)  # a cache asks nothing of a model
    cache = open_cache(tmp_path / "cache", ABOUT_CACHE)
    student, _ = quantized(tmp_path / "cached", tiny_samples, cache, weights)
    (of_live, live_loss), (of_cache, cache_loss) = seen
    assert len(of_live) == len(of_cache) == 2
    features = torch.nn.functional.normalize(torch.randn(2, 8, student.embed_dim), dim=-1)
    for one, other in zip(of_live, of_cache, strict=True):
        assert torch.equal(one[0], other[0])
        for expected, found in zip(one[2:], other[2:], strict=True):
            assert (expected - found).abs().max() < 1e-5
        assert torch.isclose(live_loss(*features, one), cache_loss(*features, other), rtol=1e-3)


def test_ptq_takes_no_step(tmp_path: Path, tiny_samples: TrainingSet, teacher_folder: Path) -> None:
    student, said = quantized(
        tmp_path / "int8", tiny_samples, load_model(teacher_folder), LossWeights(), method="ptq", towers=("image",)
    )
    assert said["steps"] == 0
    image_tower, text_tower = load_quantized(tmp_path / "int8", student)
    assert list_quantizers(image_tower)
    assert not list_quantizers(text_tower)


@pytest.mark.parametrize("taught", [True, False])
def test_without_a_labelled_set_the_budget_is_of_agreement(
    tmp_path: Path, tiny_samples: TrainingSet, teacher_folder: Path, taught: bool
) -> None:
    teacher = load_model(teacher_folder) if taught else None
    options = {"method": "ptq", "max_drop": 0.9}
    _, said = quantized(tmp_path / "int8", tiny_samples, teacher, LossWeights(), **options)
    found = said["sensitivity"]
    assert found["measure"] == ("agreement with the teacher" if taught else "agreement with the float student")
    assert len(found["layers"]) == 25, "16 of the image tower, 9 of the text tower"
    assert found["reverted"] == []
    if not taught:
        assert found["float"] == 1.0, "the student agrees with itself"


def test_calibration_sees_every_sample_as_a_view_and_undistorted(
    tmp_path: Path, tiny_samples: TrainingSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Calibration] = []
    monkeypatch.setattr(finetune, "quantize", lambda student, folder, calibration, *_, **__: calls.append(calibration))
    student, _ = quantized(tmp_path / "int8", tiny_samples, None, LossWeights())
    (calibration,) = calls
    pixel_values, input_ids = calibration.pixel_values_BCHW, calibration.input_ids_BT
    assert len(pixel_values) == 2 * SAMPLES
    assert len(input_ids) == SAMPLES
    white = student.normalise(torch.full((1, 3, 32, 32), 255, dtype=torch.uint8))[0, :, 0, 0]
    corners = pixel_values[SAMPLES:, :, 0, 0]
    assert torch.equal(corners, white.expand_as(corners)), "black on white"
    assert not torch.equal(pixel_values[:SAMPLES, :, 0, 0], corners)


def test_the_anchor_is_the_distance_to_the_float_students_features(
    tmp_path: Path, tiny_samples: TrainingSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses: dict[float, float] = {}
    distances: dict[float, float] = {}
    for anchor in (0.0, 3.0):

        def keep(student: Any, folder: Path, calibration: Any, tuning: Any, anchor: float = anchor, **_: Any) -> None:
            batch = next(tuning.batches)
            image_BD = torch.nn.functional.normalize(torch.ones(8, 128), dim=-1)
            losses[anchor] = tuning.loss_fn(image_BD, image_BD, batch).item()
            own_BD = unit_image_features(student.net, batch[0])
            distances[anchor] = (image_BD - own_BD).square().sum(-1).mean().item()

        monkeypatch.setattr(finetune, "quantize", keep)
        quantized(tmp_path / f"int8-{anchor}", tiny_samples, None, LossWeights(), anchor=anchor)
    added = (losses[3.0] - losses[0.0]) / 3
    assert added > distances[3.0] > 0, "the images' distance, and the texts' on top"
    assert added < distances[3.0] + 4


def test_attention_in_8_bits_is_the_specs_to_say(tmp_path: Path, tiny_samples: TrainingSet) -> None:
    softmaxes = []
    for attention in (False, True):
        folder = tmp_path / str(attention)
        student, _ = quantized(folder, tiny_samples, None, LossWeights(), method="ptq", attention=attention)
        softmaxes.append(sum("/softmax/" in name for name, _ in list_quantizers(load_quantized(folder, student)[1])))
    assert softmaxes == [0, 2], "the text tower has two layers"


def test_a_teacher_whose_features_are_not_finite_teaches_nothing(
    tmp_path: Path, tiny_samples: TrainingSet, teacher_folder: Path
) -> None:
    teacher = load_model(teacher_folder)
    with torch.no_grad():
        teacher.net.text_projection.fill_(float("nan"))  # type: ignore[operator]
    with pytest.raises(
        ClipkdError, match=r"teacher .*: NaN or infinity in 1 of 2 tensors: text features .*, of samples "
    ):
        quantized(tmp_path / "int8", tiny_samples, teacher, LossWeights())
