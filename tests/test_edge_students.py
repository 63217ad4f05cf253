"""Students of recent architectures: each trains, is exported with its branches merged, and passes parity."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import SMALL
from torch import Tensor, nn
from training import silent, spec

from export.documents import PlannedExport
from export.graphs.export_onnx import export_onnx
from export.proof.prove import prove
from toolchain.data.batch import Batch
from toolchain.distillation.distill import Training, distill
from toolchain.evaluation.eval_set import classes_set
from toolchain.models.build import build_model, load_model
from toolchain.models.folding import merge_branches
from toolchain.models.towers import ImageTower, num_parameters
from toolchain.recipe.load import load_recipe, recipe_path, shipped_recipes
from toolchain.recipe.model import ModelSpec

pytestmark = pytest.mark.usefixtures("one_thread")

EDGE = [name for name in shipped_recipes() if name.startswith("edge/")]
MERGING = {"repvit_m1_0": 64, "fastvit_t8": 64, "mobileone_s0": 64}  # timm's towers with branches, and an image size
# Of entries of unit features in float64, relative to 1: what remains is the rounding of the same sums.
MAX_MERGE_ERROR = 1e-9
SMALLEST_MOVE = 1e-3  # the features of two images differ by more


class _Noise:
    """Four pairs of noise and a caption, in any geometry."""

    num_samples, steps_per_epoch, num_views, left_out = 8, 2, 1, ()

    def batch(self, step: int, rows: slice, geometries: Any) -> Batch:
        draw = np.random.default_rng(step)
        pixels = {g: torch.from_numpy(draw.integers(0, 256, (4, 3, g.size, g.size), np.uint8)) for g in geometries}
        sample_B = np.arange(4) + 4 * step
        return Batch(pixels, ["a cat", "two dogs", "a house", "a red car"], sample_B, 0 * sample_B, 0)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", EDGE)
def test_every_family_trains_two_steps_is_exported_and_passes_parity(tmp_path: Path, name: str) -> None:
    random = {"init": "random", "pretrained": None}
    student = build_model(load_recipe(recipe_path(name)).student.model_copy(update=random), seed=0)
    teacher = build_model(ModelSpec(model="ViT-B-16", model_cfg=SMALL, init="random"), seed=1)
    before = {key: value.clone() for key, value in student.net.state_dict().items()}
    weights = {"task": 1.0, "crd": 1.0, "fd": 1.0, "icl": 1.0}
    training = Training(
        spec(steps=2, batch_size=4, warmup=0, accumulate=2, loss_weights=weights),
        student,
        teacher,
        _Noise(),  # type: ignore[arg-type]  # what training reads of it
    )
    distill(training, tmp_path, silent)
    moved = [key for key, value in student.net.state_dict().items() if not torch.equal(value, before[key])]
    assert any(key.startswith("visual.") for key in moved)
    assert any(not key.startswith("visual.") for key in moved)
    images = np.random.default_rng(0).integers(0, 256, (6, 300, 280, 3), np.uint8)
    shown = classes_set("made", images, ["a cat", "two dogs", "a house", "b", "c", "d"], ("{}",))
    (tmp_path / "exported").mkdir()
    export_onnx(load_model(tmp_path), tmp_path / "exported", PlannedExport("student", "fp32"), shown)
    parity = prove(tmp_path / "exported", runtime="onnxruntime", precision="fp32")["parity"]
    assert parity["image"]["min_sqnr_db"] > 60
    assert parity["text"]["min_sqnr_db"] > 60


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in EDGE if "M parameters" in recipe_path(name).read_text()])
def test_the_sizes_in_a_recipe_are_those_of_its_student(name: str) -> None:
    recipe = load_recipe(recipe_path(name))
    net = build_model(recipe.student, seed=0).net
    image, text = num_parameters(net)
    header = recipe_path(name).read_text()
    said = re.search(r"([\d.]+) M parameters.*?\(([\d.]+) M", header, re.DOTALL)
    assert said is not None
    assert said.groups() == (f"{image / 1e6:.1f}", f"{text / 1e6:.1f}")


@pytest.mark.parametrize("trunk", MERGING)
def test_merging_the_branches_of_a_trained_tower_is_exact(trunk: str) -> None:
    size = MERGING[trunk]
    vision = {"timm_model_name": trunk, "timm_pool": "avg", "timm_proj": "linear", "image_size": size}
    text = {"width": 32, "heads": 2, "layers": 1}
    changes = {"embed_dim": 32, "vision_cfg": vision, "text_cfg": text}
    net = build_model(ModelSpec(model="ViT-B-16", model_cfg=changes), seed=0).net.double()
    generator = torch.Generator().manual_seed(0)
    for module in net.visual.modules():  # type: ignore[union-attr]  # as after training: no batch norm is the identity
        if isinstance(module, nn.BatchNorm2d):
            for values in (module.running_mean, module.bias):
                assert values is not None
                values.data.normal_(0, 0.1, generator=generator)
            for values in (module.running_var, module.weight):
                assert values is not None
                values.data.uniform_(0.5, 1.5, generator=generator)
    tower = ImageTower(net).eval()
    pixels = torch.randn(2, 3, size, size, dtype=torch.float64, generator=generator)

    def entries() -> Tensor:
        with torch.no_grad():
            return nn.functional.normalize(tower.visual(pixels), dim=-1)  # type: ignore[operator]  # not float32, as the tower's

    before_BD, convolutions = entries(), count_convolutions(tower)
    torch.set_default_dtype(torch.float64)  # timm's RepViT makes the merged convolution in it
    try:
        assert merge_branches(tower, pixels)
    finally:
        torch.set_default_dtype(torch.float32)
    assert (entries() - before_BD).abs().max() <= MAX_MERGE_ERROR
    assert (before_BD[0] - before_BD[1]).abs().max() > SMALLEST_MOVE
    assert count_convolutions(tower) < convolutions


def count_convolutions(tower: nn.Module) -> int:
    return sum(isinstance(module, nn.Conv2d) for module in tower.modules())
