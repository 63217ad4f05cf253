"""Every recipe of the paper trains: two steps on shards made here, its models in the same shapes but small."""

import io
import json
import math
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from conftest import Ended
from PIL import Image

from toolchain.recipe.load import load_recipe, recipe_path, shipped_recipes, teacher_recipe

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

NAMES = [name for name in shipped_recipes() if name.startswith("paper/")]
STEPS, BATCH_SIZE, NUM_SHARDS, PAIRS_PER_SHARD = 2, 4, 2, 6

# An eighth of the embedding width each, so that widths agree and differ where the paper's do.  timm's towers have no
# width to shrink.
TEXT = {"width": 64, "heads": 2, "layers": 1}
SMALL: dict[str, dict[str, Any]] = {
    "ViT-B-16": {"embed_dim": 64, "vision_cfg": {"width": 64, "head_width": 32, "layers": 1}, "text_cfg": TEXT},
    "ViT-L-14": {"embed_dim": 96, "vision_cfg": {"width": 64, "head_width": 32, "layers": 1}, "text_cfg": TEXT},
    "RN50": {"embed_dim": 128, "vision_cfg": {"layers": [1, 1, 1, 1], "width": 8}, "text_cfg": TEXT},
    "RN101": {"embed_dim": 64, "vision_cfg": {"layers": [1, 1, 2, 1], "width": 8}, "text_cfg": TEXT},
    "vit_t_16": {"embed_dim": 64, "vision_cfg": {"width": 64, "head_width": 32, "layers": 1}, "text_cfg": TEXT},
    **{
        name: {"embed_dim": 64, "text_cfg": TEXT}
        for name in ("mobilevit_s", "swin_t", "mobilenetv3_small", "efficientnet_b0", "resnet18")
    },
}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Pairs as img2dataset writes them, in tar files that a brace pattern names."""
    folder, random = tmp_path_factory.mktemp("shards"), np.random.default_rng(0)
    for shard in range(NUM_SHARDS):
        with tarfile.open(folder / f"{shard:05}.tar", "w") as tar:
            for pair in range(PAIRS_PER_SHARD):
                picture = io.BytesIO()
                pixels_HWC = random.integers(0, 256, (40 + pair, 60, 3), np.uint8)
                Image.fromarray(pixels_HWC).save(picture, "JPEG")
                key, caption = f"{shard:05}{pair:04}", f"picture {pair} of shard {shard}"
                for suffix, content in (("jpg", picture.getvalue()), ("txt", caption.encode())):
                    info = tarfile.TarInfo(f"{key}.{suffix}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    return f"{folder}/{{00000..{NUM_SHARDS - 1:05}}}.tar"


def overrides(name: str, shards: str) -> list[str]:
    """What makes a recipe small: --set after --set."""
    recipe = load_recipe(recipe_path(name))
    settings: dict[str, Any] = {
        "data.shards": [shards],
        "distill.epochs": None,
        "distill.steps": STEPS,
        "distill.batch_size": BATCH_SIZE,
        "distill.warmup": 1,
        "distill.precision": "fp32",
        "distill.teacher_precision": "fp32",
        "student.model_cfg": SMALL[recipe.student.model],
    }
    if recipe.teacher is not None:
        model = teacher_recipe(recipe.teacher).student.model if recipe.teacher.recipe else recipe.teacher.model
        settings["teacher"] = {"model": model, "init": "random", "model_cfg": SMALL[model]}
    return [f"{field}={json.dumps(value)}" for field, value in settings.items()]


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_of_the_paper_trains(clipkd: Callable[..., Ended], tmp_path: Path, shards: str, name: str) -> None:
    run, settings = tmp_path / "run", overrides(name, shards)
    ended = clipkd("distill", name, "--out", run, *(part for setting in settings for part in ("--set", setting)))
    assert ended.code == 0, ended.err
    recipe = load_recipe(run / "recipe.yaml")
    weights = recipe.distill.loss_weights.model_dump()
    expected = {loss for loss, weight in weights.items() if weight > 0} if recipe.teacher else {"task"}
    trained(run / "student", expected)
    assert (run / "teacher").is_dir() is (recipe.teacher is not None)


def test_a_teacher_that_a_recipe_trains_first(clipkd: Callable[..., Ended], tmp_path: Path, shards: str) -> None:
    """The paper's own road, with a small copy of the teacher's recipe."""
    recipe = load_recipe(recipe_path("paper/vit_b_16"), overrides("paper/vit_b_16", shards))
    (tmp_path / "teacher.yaml").write_text(yaml.safe_dump(recipe.model_dump(mode="json")))
    settings = [setting for setting in overrides("paper/vit_t_16_fd", shards) if not setting.startswith("teacher=")]
    settings.append(f"teacher={json.dumps({'recipe': str(tmp_path / 'teacher.yaml')})}")
    run = tmp_path / "run"
    ended = clipkd(
        "distill", "paper/vit_t_16_fd", "--out", run, *(part for setting in settings for part in ("--set", setting))
    )
    assert ended.code == 0, ended.err
    trained(run / "student", {"task", "fd"})
    trained(run / "teacher", {"task"})


def trained(stage: Path, losses: set[str]) -> None:
    """A stage's log has every step, every loss asked for and no other, and numbers."""
    rows = [json.loads(line) for line in (stage / "train.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(STEPS))
    for row in rows:
        assert set(row["terms"]) == losses
        assert math.isfinite(row["loss"])
        assert row["loss"] == pytest.approx(sum(term["weighted"] for term in row["terms"].values()), rel=1e-5)
    assert (stage / "open_clip_model.safetensors").is_file()
