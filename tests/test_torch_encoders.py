"""Accuracy while training: that of `evaluate`, and that of the weights that are saved, for any number of processes.

And what two processes do together besides: stop, continue, and say what went wrong.
"""

import math
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import REPOSITORY, STUDENT, tiny_training_set
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from training import BATCH_SIZE, STEPS, assert_same_run, configured, last_state, rows, silent, spec, train
from two_processes import spawn

from toolchain.data.glyph_batches import GlyphBatches
from toolchain.data.glyphs import TEMPLATES, TrainingSet, eval_set
from toolchain.distillation import objectives
from toolchain.distillation.blocks import Block, Sweep
from toolchain.distillation.checkpoints import Checkpoints
from toolchain.distillation.distill import Training, distill
from toolchain.distributed import ALONE, Processes
from toolchain.errors import ClipkdError, Interrupted
from toolchain.evaluation import torch_encoders as module
from toolchain.evaluation.eval_set import EvalSet, captions_set, classes_set
from toolchain.evaluation.torch_encoders import headline_accuracy
from toolchain.evaluation.zero_shot import evaluate
from toolchain.models.build import load_model
from toolchain.models.clip_model import ClipModel
from toolchain.significance import wilson

pytestmark = pytest.mark.usefixtures("one_thread")

TEACHER = REPOSITORY / "recipes" / "glyphs_teacher"
COUNTS = [1, 2, 13, 60]  # fewer than processes, uneven and even
# One process sums a batch's rows in one order, two in another; through the updates of a run in float32.
MAX_RELATIVE_TERM_ERROR = 1e-3


def stix(count: int) -> tuple[NDArray[np.uint8], list[str]]:
    """Characters far from one another in the set's order, whose first are the easiest."""
    whole = eval_set("stix")
    chosen = slice(7, 7 + 40 * count, 40)
    return whole.images_KHWC[chosen], list(whole.names[chosen])


class PlainEncoders:
    """A model as `evaluate` sees it: open_clip's own preprocessing and towers, and nothing else."""

    def __init__(self, model: ClipModel) -> None:
        self.model = model

    def preprocess(self, image: Image.Image, /) -> NDArray[np.float32]:
        values: NDArray[np.float32] = self.model.preprocess(image).numpy()
        return values

    def encode_pixels(self, pixel_values_BCHW: NDArray[np.float32], /) -> NDArray[np.float32]:
        return self._unit(self.model.net.encode_image, torch.from_numpy(pixel_values_BCHW))

    def encode_images(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        return self.encode_pixels(np.stack([self.preprocess(Image.fromarray(image)) for image in images]))

    def encode_texts(self, texts: list[str], /) -> NDArray[np.float32]:
        return self._unit(self.model.net.encode_text, self.model.tokenize(texts))

    def _unit(self, encode: Any, inputs: Tensor) -> NDArray[np.float32]:
        with torch.no_grad():
            features: NDArray[np.float32] = torch.nn.functional.normalize(encode(inputs), dim=-1).numpy()
        return features


# One process.


@pytest.mark.parametrize("count", COUNTS)
def test_it_is_what_evaluate_finds(count: int) -> None:
    images_KHWC, names = stix(count)
    model = load_model(TEACHER)
    found = headline_accuracy(classes_set("stix", images_KHWC, names, TEMPLATES))(model, ALONE)
    result, _ = evaluate(PlainEncoders(model), [classes_set("stix", images_KHWC, names, TEMPLATES)], headline="stix")
    expected = result["sets"]["stix"]
    assert found == {name: expected[name] for name in ("top1", "top1_low", "top1_high", "top5", "n")}
    if count == max(COUNTS):
        assert 0.1 < found["top1"] < 0.95, "a model that tells some apart"
        assert found["top1"] < found["top5"] < 1


def test_it_is_the_share_of_images_nearest_to_their_class() -> None:
    images_KHWC, names = stix(30)
    model = load_model(TEACHER)
    encoders = PlainEncoders(model)
    image_KD = encoders.encode_images(images_KHWC).astype(np.float64)
    classes = []
    for name in names:
        mean_D = encoders.encode_texts([template.format(name) for template in TEMPLATES]).astype(np.float64).mean(0)
        classes.append(mean_D / math.sqrt(sum(x * x for x in mean_D)))
    places = []
    for k, image_D in enumerate(image_KD):
        scores = [float(sum(a * b for a, b in zip(image_D, class_D, strict=True))) for class_D in classes]
        places.append(sum(score > scores[k] for score in scores))
    hits = sum(place == 0 for place in places)
    found = headline_accuracy(classes_set("stix", images_KHWC, names, TEMPLATES))(model, ALONE)
    assert found["top1"] == hits / 30
    assert (found["top1_low"], found["top1_high"]) == wilson(hits, 30)
    assert found["top5"] == sum(place < 5 for place in places) / 30


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, accuracy = load_model(TEACHER), headline_accuracy(classes_set("stix", *stix(60), TEMPLATES))
    whole = accuracy(model, ALONE)
    monkeypatch.setattr(module, "_CHUNK", 7)
    assert accuracy(model, ALONE) == whole


def test_a_model_of_nan_is_not_scored() -> None:
    model = load_model(STUDENT, random_seed=0)
    with torch.no_grad():
        model.net.text_projection.fill_(math.nan)  # type: ignore[operator]
    with pytest.raises(
        ClipkdError, match="the model's text features are NaN or infinite for 13 of 13 inputs, the first: "
    ):
        headline_accuracy(classes_set("stix", *stix(13), TEMPLATES))(model, ALONE)


# Two processes.  Each of the functions below runs in both.


def scored(processes: Processes, count: int) -> dict[str, float]:
    return headline_accuracy(classes_set("stix", *stix(count), TEMPLATES))(load_model(TEACHER), processes)


def uneven() -> EvalSet:
    """Sixty pictures of seven classes, which two processes share in other places than the classes."""
    images_KHWC, names = stix(60)
    return classes_set("uneven", images_KHWC, names[:7], TEMPLATES, np.arange(60) % 7)


def captioned() -> EvalSet:
    """Sixty pictures of one to three captions."""
    images_KHWC, names = stix(60)
    captions = [[template.format(name) for template in TEMPLATES[: 1 + k % 3]] for k, name in enumerate(names)]
    return captions_set("captioned", images_KHWC, captions)


def scored_otherwise(processes: Processes) -> list[dict[str, float]]:
    return [headline_accuracy(data)(load_model(TEACHER), processes) for data in (uneven(), captioned())]


def tiny_data() -> GlyphBatches:
    return GlyphBatches(tiny_training_set(), 0, BATCH_SIZE, 2)


def together(
    processes: Processes, folder: str, student: str, teacher: str | None, stop_rank: int | None = None, **changes: Any
) -> dict[str, Any]:
    """Train; asked to stop after step 5 by a signal to one process, of which the other hears in the next step.

    What is said, and which step is saved when it is.
    """

    def accuracy(model: ClipModel, _: Processes) -> dict[str, float]:
        if stop_rank == processes.rank:
            os.kill(os.getpid(), signal.SIGTERM)
        return {"n": 0}

    def save(self: Checkpoints, step: int, state: dict[str, Any]) -> None:
        time.sleep(0.3)  # so that a process that did not wait would be gone
        real(self, step, state)

    evaluated = {"evaluate_every": 5} if stop_rank is not None else {}
    real, Checkpoints.save = Checkpoints.save, save  # type: ignore[method-assign]
    frozen = load_model(Path(teacher)) if teacher else None
    trained = load_model(Path(student), random_seed=0)
    asked = spec(**evaluated | changes)
    try:
        training = Training(asked, trained, frozen, tiny_data(), accuracy=accuracy)
        said: dict[str, Any] = distill(training, Path(folder), silent, processes=processes)
    except Interrupted as error:
        return {"interrupted": str(error), "step": last_state(Path(folder))["step"]}
    finally:
        Checkpoints.save = real  # type: ignore[method-assign]
    return said


def evaluated(processes: Processes, folder: str) -> dict[str, Any]:
    """Train a student with batch norms, evaluating it."""
    accuracy = headline_accuracy(classes_set("stix", *stix(60), TEMPLATES))
    student = load_model(TEACHER)
    norms = [norm for norm in student.net.modules() if isinstance(norm, torch.nn.BatchNorm2d)]
    assert norms
    for norm in norms:
        norm.momentum = 1.0  # the last batch's statistics alone, of which the two processes have seen a half each
    asked = spec(steps=6, evaluate_every=3, lr=1e-5)
    training = Training(asked, student, None, tiny_data(), accuracy=accuracy)
    return distill(training, Path(folder), silent, processes=processes)


def poisoned(processes: Processes, folder: str, teacher: str, factor: float) -> str:
    """Train where the second process's share of one objective's gradient is not finite."""
    real = objectives.match_features

    def poison(*arguments: Any) -> Sweep:
        sweep = real(*arguments)

        def add_block(block: Block) -> Tensor:
            value_n = sweep.add_block(block)
            for gradient in block.gradients:
                if gradient is not None:
                    gradient.mul_(factor)
            return value_n

        return sweep._replace(add_block=add_block)

    if not processes.leads:
        objectives.match_features = poison
    student, frozen = load_model(STUDENT, random_seed=0), load_model(Path(teacher))
    try:
        distill(Training(spec(), student, frozen, tiny_data()), Path(folder), silent, processes=processes)
    except ClipkdError as error:
        return str(error)
    finally:
        objectives.match_features = real
    return "nothing"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("two")


@pytest.fixture(scope="module")
def both(folder: Path, teacher_folder: Path) -> dict[str, list[Any]]:
    """Every job, by two processes that start once."""
    vision = {"image_size": 32, "patch_size": 8, "width": 32, "head_width": 16, "layers": 2}
    vit = str(configured(folder / "vit", model_cfg={"vision_cfg": vision}))  # no batch norms: one batch's statistics
    names = ("whole", "parts", "evaluated", "poisoned", "signalled")
    for name in names:
        (folder / name).mkdir()
    whole, parts, scoring, bad, signalled = (str(folder / name) for name in names)
    teacher = str(teacher_folder)
    jobs: dict[str, tuple[Any, ...]] = {
        **{f"score {count}": (scored, count) for count in COUNTS},
        "score otherwise": (scored_otherwise,),
        "whole": (together, whole, vit, teacher),
        "stopped": (together, parts, vit, teacher, 1),
        "continued": (together, parts, vit, teacher),
        "first signalled": (together, signalled, vit, teacher, 0),
        "evaluated": (evaluated, scoring),
        "poisoned": (poisoned, bad, teacher, math.nan),
    }
    return dict(zip(jobs, spawn(list(jobs.values())), strict=True))


@pytest.mark.parametrize("count", COUNTS)
def test_two_processes_score_as_one(both: dict[str, list[Any]], count: int) -> None:
    expected = headline_accuracy(classes_set("stix", *stix(count), TEMPLATES))(load_model(TEACHER), ALONE)
    assert both[f"score {count}"] == [expected, expected]


def test_two_processes_score_as_one_whatever_belongs_together(both: dict[str, list[Any]]) -> None:
    expected = scored_otherwise(ALONE)
    assert both["score otherwise"] == [expected, expected]
    assert [found["n"] for found in expected] == [60, 60]
    assert 0.1 < expected[1]["top1"] < 1


def test_the_weights_that_are_saved_score_what_was_logged(both: dict[str, list[Any]], folder: Path) -> None:
    """Their batch norms' statistics are the first process's; the second has others."""
    logged = rows(folder / "evaluated")
    assert [row["step"] for row in logged if "accuracy" in row] == [2, 5]
    student = load_model(folder / "evaluated")
    accuracy = headline_accuracy(classes_set("stix", *stix(60), TEMPLATES))
    assert logged[-1]["accuracy"] == accuracy(student, ALONE)
    assert 0.1 < logged[-1]["accuracy"]["top1"] < 0.95, "which other statistics would change"


def test_two_processes_train_as_one(
    both: dict[str, list[Any]], folder: Path, tmp_path: Path, tiny_samples: TrainingSet, teacher_folder: Path
) -> None:
    assert [(said["steps"], said["processes"]) for said in both["whole"]] == [(STEPS, 2)] * 2
    train(tmp_path, tiny_samples, teacher_folder, student=folder / "vit")
    for found, expected in zip(rows(folder / "whole"), rows(tmp_path), strict=True):
        assert found["terms"].keys() == expected["terms"].keys()
        for name, term in expected["terms"].items():
            value = found["terms"][name]["unweighted"]
            assert value == pytest.approx(term["unweighted"], rel=MAX_RELATIVE_TERM_ERROR), (found["step"], name)
        assert found["grad_norm"] == pytest.approx(expected["grad_norm"], rel=MAX_RELATIVE_TERM_ERROR)


def test_a_signal_to_one_stops_both_when_the_checkpoint_is_there(both: dict[str, list[Any]], folder: Path) -> None:
    for job, name in (("stopped", "parts"), ("first signalled", "signalled")):
        said = f"{folder / name}: stopped after step 6 of {STEPS}; run the same command to resume"
        assert both[job] == [{"interrupted": said, "step": 6}] * 2


def test_two_processes_continue_exactly(both: dict[str, list[Any]], folder: Path, tmp_path: Path) -> None:
    assert [said["steps"] for said in both["continued"]] == [STEPS] * 2
    for name in ("parts", "whole"):
        shutil.copytree(folder / name, tmp_path / name)
        log = (tmp_path / name / "train.jsonl").read_text().replace(', "accuracy": {"n": 0}', "")
        (tmp_path / name / "train.jsonl").write_text(log)
    assert_same_run(tmp_path / "parts", tmp_path / "whole")


def test_a_gradient_of_another_process_is_blamed_on_its_term(both: dict[str, list[Any]], folder: Path) -> None:
    for said in both["poisoned"]:
        assert said.startswith(f"{folder / 'poisoned'}: the gradient is not finite at step 0, in fd (terms ")
