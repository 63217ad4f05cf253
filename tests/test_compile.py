"""`distill.compile`: few compilations for captions of any length, counted where training asks for them."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import SMALL
from training import silent, spec

from toolchain.data.batch import Batch
from toolchain.distillation import teacher as teacher_module
from toolchain.distillation import training_module
from toolchain.distillation.distill import Training, distill
from toolchain.evaluation.eval_set import classes_set
from toolchain.evaluation.torch_encoders import headline_accuracy
from toolchain.models.build import build_model
from toolchain.models.clip_model import ClipModel
from toolchain.models.tf32 import float32_products
from toolchain.models.towers import compile_towers
from toolchain.recipe.model import ModelSpec

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # torch itself looks at the gradients of what it compiles with
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
]

MAX_COMPILATIONS = 4  # of a tower, for captions of any length: the bound of docs/scaling.md
ROWS = 4
LENGTHS = (ROWS, 2, 3, 77, 7, 8, 16, 17, 31, 48, 64, 76)
"""Tokens of the longest caption of each batch, with its start and its end.  The first has as many tokens as rows."""

RESNET = {"timm_model_name": "resnet10t", "timm_pool": "avg", "timm_proj": "linear", "image_size": 32}


@dataclass(frozen=True)
class _AnyLength:
    """Batches of captions, each with its longest of another length."""

    num_samples = ROWS * len(LENGTHS)
    steps_per_epoch = len(LENGTHS)
    num_views = 1
    left_out = ()

    def batch(self, step: int, rows: slice, geometries: Any) -> Batch:
        words = [max(0, LENGTHS[step] - 2 - 9 * row) for row in range(ROWS)][rows]
        size = geometries[0].size
        pixels = torch.from_numpy(np.random.default_rng(step).integers(0, 256, (len(words), 3, size, size), np.uint8))
        sample_B = np.arange(len(words)) + ROWS * step
        return Batch(dict.fromkeys(geometries, pixels), ["a " * n for n in words], sample_B, 0 * sample_B, 0)


def count_compilations(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Return the compilations of each tower, which run what they are given as it is."""
    counts: Counter[str] = Counter()
    real = torch.nn.Module.compile

    def counting(of: str) -> Callable[[Any], None]:
        def compile_and_count(net: Any) -> None:
            image = {id(module) for module in net.visual.modules()}
            backends = {}
            for part in ("image", "text"):

                def backend(graph: Any, _: Any, tower: str = f"{of} {part}") -> Any:
                    counts[tower] += 1
                    return graph.forward

                backends[part] = backend

            def compile_one(module: torch.nn.Module, **options: Any) -> None:
                real(module, backend=backends["image" if id(module) in image else "text"], **options)

            with monkeypatch.context() as patched:
                patched.setattr(torch.nn.Module, "compile", compile_one)
                compile_towers(net)

        return compile_and_count

    torch._dynamo.reset()
    monkeypatch.setattr(training_module, "compile_towers", counting("student"))
    monkeypatch.setattr(teacher_module, "compile_towers", counting("teacher"))
    return counts


def small(seed: int, **changes: Any) -> ClipModel:
    return build_model(ModelSpec(model="ViT-B-16", model_cfg=SMALL | changes), seed=seed)


@pytest.mark.parametrize(
    ("accumulate", "vision", "expected"),
    [
        pytest.param(1, {}, 2, id="one part"),
        pytest.param(2, {}, 3, id="two parts"),
        pytest.param(2, {"vision_cfg": RESNET}, 3, id="convolutional", marks=pytest.mark.slow),
    ],
)
def test_captions_of_any_length_cost_few_compilations(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, accumulate: int, vision: dict[str, Any], expected: int
) -> None:
    """Training, both passes of accumulation, and an evaluation whose last batch is smaller."""
    counts = count_compilations(monkeypatch)
    monkeypatch.setattr("toolchain.evaluation.torch_encoders._CHUNK", 5)
    images = np.random.default_rng(0).integers(0, 256, (7, 32, 32, 3), np.uint8)
    names = ["a", "b b", "c c c", "d d d d", "e", "f f", "g"]
    training = Training(
        spec(
            steps=len(LENGTHS), batch_size=ROWS, compile=True, accumulate=accumulate, evaluate_every=len(LENGTHS) // 2
        ),
        small(0, **vision),
        small(1, embed_dim=48),
        _AnyLength(),  # type: ignore[arg-type]  # what training reads of it
        accuracy=headline_accuracy(classes_set("made", images, names, ("{}", "a photo of {}"))),
    )
    distill(training, tmp_path, silent)
    assert counts["student text"] == expected <= MAX_COMPILATIONS
    assert counts["teacher text"] == counts["teacher image"] == 1
    assert counts["student image"] == expected + ("vision_cfg" in vision) <= MAX_COMPILATIONS


def test_products_are_exact_unless_the_recipe_asks_for_tf32() -> None:
    def flags() -> tuple[bool, bool]:
        return torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32

    before = flags()
    with float32_products(tf32=False):
        assert flags() == (False, False)
        with float32_products(tf32=True):
            assert flags() == (True, True)
        assert flags() == (False, False)
    assert flags() == before


@pytest.mark.parametrize("tf32", [False, True])
def test_training_rounds_towers_but_no_losses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tf32: bool) -> None:
    seen: dict[str, set[bool]] = {"towers": set(), "gradients": set(), "losses": set(), "teacher": set()}

    def note(what: str) -> Callable[..., None]:
        return lambda *_: seen[what].update({torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32})

    from toolchain.distillation import forward_pass

    real = forward_pass.weighted_loss

    def noted(*arguments: Any, **options: Any) -> Any:
        note("losses")()
        return real(*arguments, **options)

    monkeypatch.setattr(forward_pass, "weighted_loss", noted)
    monkeypatch.setattr("toolchain.distillation.memory.free_bytes", lambda _: None)  # no pass before the first step
    student, teacher = small(0), small(1)
    student.net.visual.conv1.register_forward_hook(note("towers"))  # type: ignore[union-attr]
    student.net.visual.conv1.weight.register_hook(note("gradients"))  # type: ignore[union-attr]
    teacher.net.visual.conv1.register_forward_hook(note("teacher"))  # type: ignore[union-attr]
    student.probe_fast_paths()
    teacher.probe_fast_paths()
    for found in seen.values():
        found.clear()
    distill(
        Training(spec(steps=1, warmup=0, batch_size=ROWS, tf32=tf32), student, teacher, _AnyLength()), tmp_path, silent
    )  # type: ignore[arg-type]
    assert seen == {"towers": {tf32}, "gradients": {tf32}, "losses": {False}, "teacher": {tf32}}


def test_the_default_of_tf32_is_in_no_key() -> None:
    assert "tf32" not in spec().key_fields()
    assert spec(tf32=True).key_fields() == spec().key_fields() | {"tf32": True}
