"""What is saved opens in plain open_clip and computes the same; what is broken is said."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from conftest import STUDENT
from PIL import Image

from toolchain.errors import ArtifactError
from toolchain.models import (
    CONFIG,
    WEIGHTS,
    load_model,
    num_parameters,
    save_model,
    unit_image_features,
    unit_text_features,
)

CAPTIONS = ["", "latin small letter a", "the character LEFTWARDS ARROW with hook", "a drawing of " + "very " * 40]
SIZES = [(32, 32), (64, 64), (31, 47), (200, 10)]

# Plain open_clip keeps images in another memory layout: the same products, summed in another order.
MAX_FEATURE_ERROR = 1e-5
# One multiplication in place of a division: the last bit.
MAX_PIXEL_ERROR = 1e-6


def picture(size: tuple[int, int], seed: int = 0) -> Image.Image:
    width, height = size
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def test_a_saved_model_opens_in_plain_open_clip_anywhere(
    teacher_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = load_model(teacher_folder)
    moved = shutil.copytree(teacher_folder, tmp_path / "elsewhere" / "moved")
    monkeypatch.chdir(tmp_path)
    net, _, preprocess = open_clip.create_model_and_transforms("local-dir:elsewhere/moved")
    tokenize = open_clip.get_tokenizer("local-dir:elsewhere/moved")
    net.eval()

    expected = {CONFIG, WEIGHTS, "tokenizer.json", "tokenizer_config.json"}
    assert {path.name for path in moved.iterdir()} == expected
    plain = net.state_dict()
    assert plain.keys() == ours.net.state_dict().keys()
    assert all(torch.equal(value, plain[key]) for key, value in ours.net.state_dict().items())

    input_ids_BT = ours.tokenize(CAPTIONS)
    assert torch.equal(input_ids_BT, tokenize(CAPTIONS))
    assert input_ids_BT.shape == (len(CAPTIONS), ours.context_length)
    for size in SIZES:
        assert torch.equal(ours.preprocess(picture(size)), preprocess(picture(size)))

    pixel_values_BCHW = torch.stack([preprocess(picture((32, 32), seed)) for seed in range(4)])
    with torch.inference_mode():
        image_BD, text_BD = net.encode_image(pixel_values_BCHW), net.encode_text(input_ids_BT)
        ours_image_BD = unit_image_features(ours.net, pixel_values_BCHW)
        ours_text_BD = unit_text_features(ours.net, input_ids_BT)
    for theirs, unit in ((image_BD, ours_image_BD), (text_BD, ours_text_BD)):
        assert unit.dtype == torch.float32
        assert torch.allclose(unit.norm(dim=-1), torch.ones(4))
        assert (unit - theirs / theirs.norm(dim=-1, keepdim=True)).abs().max() < MAX_FEATURE_ERROR


def test_what_the_configuration_says(teacher_folder: Path) -> None:
    model = load_model(teacher_folder)
    assert (model.image_size, model.context_length, model.embed_dim) == (32, 20, 128)
    assert not model.net.training
    assert model.logit_scale.item() == pytest.approx(1 / 0.07), "the multiplier, which open_clip initialises so"
    assert sum(num_parameters(model.net)) == sum(parameter.numel() for parameter in model.net.parameters())
    assert num_parameters(model.net)[0] == sum(parameter.numel() for parameter in model.net.visual.parameters())


def test_saving_again_gives_the_same_bytes(teacher_folder: Path, tmp_path: Path) -> None:
    save_model(load_model(teacher_folder), tmp_path)
    for path in teacher_folder.iterdir():
        assert (tmp_path / path.name).read_bytes() == path.read_bytes()


def test_normalise_equals_preprocess_where_nothing_is_resized(student_folder: Path) -> None:
    config = json.loads((student_folder / CONFIG).read_text())
    config["preprocess_cfg"] |= {"mean": [0.48, 0.45, 0.4], "std": [0.26, 0.27, 0.28]}  # channels that differ
    (student_folder / CONFIG).write_text(json.dumps(config))
    model = load_model(student_folder, random_seed=0)
    pictures = [picture((32, 32), seed) for seed in range(3)]
    pixels_BCHW = torch.stack([torch.from_numpy(np.array(image)) for image in pictures]).permute(0, 3, 1, 2)
    expected_BCHW = torch.stack([model.preprocess(image) for image in pictures])
    assert (model.normalise(pixels_BCHW) - expected_BCHW).abs().max() < MAX_PIXEL_ERROR


def test_a_random_model_is_a_function_of_its_seed() -> None:
    first, again, other = (load_model(STUDENT, random_seed=seed).net.state_dict() for seed in (5, 5, 6))
    assert all(torch.equal(value, again[key]) for key, value in first.items())
    assert not all(torch.equal(value, other[key]) for key, value in first.items())


# Broken folders.


def without(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def edit(change: Callable[[dict[str, dict[str, object]]], object]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        config = json.loads((folder / CONFIG).read_text())
        change(config)
        (folder / CONFIG).write_text(json.dumps(config))

    return damage


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (shutil.rmtree, "FOLDER: no open_clip_config.json; expected an open_clip local-dir"),
        (without(CONFIG), "FOLDER: no open_clip_config.json; expected an open_clip local-dir"),
        (without(WEIGHTS), "FOLDER: no open_clip_model.safetensors; this model has a configuration but no weights"),
        (lambda folder: (folder / CONFIG).write_text("{"), "FOLDER/open_clip_config.json: not JSON: "),
        (
            lambda folder: (folder / CONFIG).write_text("{}"),
            "FOLDER/open_clip_config.json: no model_cfg and no preprocess_cfg; expected an open_clip local-dir's conf",
        ),
        (
            edit(lambda config: config.pop("preprocess_cfg")),
            "FOLDER/open_clip_config.json: no preprocess_cfg; expected",
        ),
        (
            edit(lambda config: config["model_cfg"].update(embed_dim=64)),
            "FOLDER/open_clip_model.safetensors: these weights do not fit FOLDER: 2 of another shape: text_projection "
            "[64, 128] for [64, 64], visual.head.proj.weight [128, 256] for [64, 256]. Most likely they are another ",
        ),
        (edit(lambda config: config["model_cfg"].update(vision=3)), "FOLDER: open_clip cannot build this model: "),
        (
            lambda folder: (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-100]),
            "FOLDER/open_clip_model.safetensors: not a file of weights, or damaged: ",
        ),
        (
            lambda folder: (folder / WEIGHTS).write_bytes(b""),
            "FOLDER/open_clip_model.safetensors: not a file of weights, or damaged: ",
        ),
        (lambda folder: (folder / "tokenizer.json").write_text("{"), "FOLDER: "),
        (edit(lambda config: config["preprocess_cfg"].update(sise=3)), "FOLDER: "),
    ],
)
def test_a_broken_folder_is_said(
    teacher_folder: Path, tmp_path: Path, damage: Callable[[Path], None], said: str
) -> None:
    folder = shutil.copytree(teacher_folder, tmp_path / "model")
    damage(folder)
    with pytest.raises(ArtifactError) as caught:
        load_model(folder)
    assert str(caught.value).startswith(said.replace("FOLDER", str(folder)))


def test_a_random_model_needs_no_weights(student_folder: Path) -> None:
    assert not (student_folder / WEIGHTS).exists()
    load_model(student_folder, random_seed=0)
