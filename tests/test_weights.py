"""Weights of every form load to the bit, nothing is unpickled that is not a tensor, and what does not fit is said."""

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from conftest import SMALL
from safetensors.torch import save_file
from torch import Tensor, nn

from toolchain.errors import ArtifactError, ClipkdError, UsageError
from toolchain.models import weights
from toolchain.models.build import build_model, load_model, save_model
from toolchain.models.clip_model import ClipModel
from toolchain.models.weights import read_weights
from toolchain.recipe.model import ModelSpec

pytestmark = pytest.mark.usefixtures("one_thread")

State = dict[str, Tensor]

# Features of about unit size in float32: the same products, summed in another order.
MAX_FEATURE_ERROR = 1e-5


def small(seed: int = 0, **fields: Any) -> ClipModel:
    return build_model(ModelSpec.model_validate({"model": "ViT-B-16", "model_cfg": SMALL} | fields), seed=seed)


def changed(**sections: dict[str, Any]) -> dict[str, Any]:
    """The small architecture with some of its sections changed."""
    return SMALL | {name: SMALL.get(name, {}) | changes for name, changes in sections.items()}  # type: ignore[operator]


@pytest.fixture(scope="module")
def trained() -> State:
    """The weights of a model that another seed made."""
    return {key: value.detach().clone() for key, value in small(seed=1).net.state_dict().items()}


@pytest.fixture(scope="module")
def small_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small model in a folder: an architecture that no recipe has to change."""
    folder = tmp_path_factory.mktemp("small")
    save_model(small(), folder)
    return folder


def problem(path: Path, kind: type[ClipkdError] = ArtifactError, **fields: Any) -> str:
    with pytest.raises(kind) as caught:
        small(checkpoint=str(path), **fields)
    return str(caught.value).replace(str(path), "FILE")


# Forms.


def training_checkpoint(state: State, path: Path) -> None:
    """What open_clip's trainer saves, of a model in DistributedDataParallel."""
    parameters = [nn.Parameter(torch.zeros(2))]
    optimizer = torch.optim.AdamW(parameters)
    parameters[0].grad = torch.ones(2)
    optimizer.step()
    wrapped = {f"module.{key}": value for key, value in state.items()}
    content = {"epoch": 3, "name": "run", "state_dict": wrapped, "optimizer": optimizer.state_dict(), "scaler": {}}
    torch.save(content, path)


FORMS: dict[str, Callable[[State, Path], object]] = {
    "bare.pt": lambda state, path: torch.save(state, path),
    "prefixed.bin": lambda state, path: torch.save({f"module.{k}": v for k, v in state.items()}, path),
    "compiled.pth": lambda state, path: torch.save({f"module._orig_mod.{k}": v for k, v in state.items()}, path),
    "training.pt": training_checkpoint,
    "old.pt": lambda state, path: torch.save(state, path, _use_new_zipfile_serialization=False),
    "plain.safetensors": lambda state, path: save_file(state, path),
}


@pytest.mark.parametrize("name", FORMS)
def test_a_checkpoint_loads_to_the_bit(trained: State, tmp_path: Path, name: str) -> None:
    FORMS[name](trained, tmp_path / name)
    loaded = small(checkpoint=str(tmp_path / name)).net.state_dict()
    assert loaded.keys() == trained.keys()
    assert all(torch.equal(value, trained[key]) for key, value in loaded.items())
    assert not torch.equal(small(seed=0).net.state_dict()["text_projection"], trained["text_projection"])


def test_half_precision_weights_become_float32(trained: State, tmp_path: Path) -> None:
    torch.save({key: value.half() for key, value in trained.items()}, tmp_path / "half.pt")
    loaded = small(checkpoint=str(tmp_path / "half.pt")).net.state_dict()
    for key, value in loaded.items():
        assert value.dtype == torch.float32
        assert torch.equal(value, trained[key].half().float())


def test_a_scale_may_be_a_number_or_a_vector_of_one(trained: State, tmp_path: Path) -> None:
    torch.save(trained | {"logit_scale": trained["logit_scale"].reshape(1) + 1}, tmp_path / "scale.pt")
    model = small(checkpoint=str(tmp_path / "scale.pt"))
    assert model.net.logit_scale.shape == ()
    assert torch.equal(model.net.logit_scale, trained["logit_scale"] + 1)


def test_weights_of_one_text_tower_fit_the_other_class(trained: State, tmp_path: Path) -> None:
    torch.save(trained, tmp_path / "weights.pt")
    custom = small(checkpoint=str(tmp_path / "weights.pt"), model_cfg=SMALL | {"custom_text": True})
    assert torch.equal(custom.net.state_dict()["text.text_projection"], trained["text_projection"])
    ids_BT = custom.tokenize(["a cat", "two dogs"])
    with torch.inference_mode():
        difference_BD = custom.net.encode_text(ids_BT) - small(seed=1).net.encode_text(ids_BT)
    assert difference_BD.abs().max() < MAX_FEATURE_ERROR


# What is not read.


class Arbitrary:
    """An object whose unpickling would write a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return Path.write_text, (self.path, "executed")


@pytest.mark.parametrize("how", ["torch", "pickle"])
def test_python_objects_are_never_unpickled(trained: State, tmp_path: Path, how: str) -> None:
    path, witness = tmp_path / "evil.pt", tmp_path / "witness"
    content = {"state_dict": trained, "args": Arbitrary(witness)}
    if how == "torch":
        torch.save(content, path)
    else:
        path.write_bytes(pickle.dumps(content["args"]))
    said = problem(path)
    assert said.startswith("FILE: contains Python objects other than tensors, or is not a torch file; ")
    assert "save its state_dict alone: torch.save(model.state_dict(), FILE)" in said
    assert not witness.exists()
    with path.open("rb") as file:
        torch.load(file, weights_only=False) if how == "torch" else pickle.load(file)
    assert witness.read_text() == "executed", "the object does what it is made to do"


def test_a_torchscript_archive(tmp_path: Path) -> None:
    with pytest.warns(FutureWarning, match="torch.jit"):
        torch.jit.save(torch.jit.script(nn.Linear(2, 2)), tmp_path / "openai.pt")
    said = problem(tmp_path / "openai.pt")
    assert said.startswith("FILE: a TorchScript archive, as OpenAI publishes its models; ")
    assert "pretrained: openai instead of checkpoint" in said


@pytest.mark.parametrize(
    ("name", "content"),
    [("empty.pt", b""), ("text.pt", b"<html>not found</html>"), ("zip.pt", b"PK\x03\x04"), ("x.safetensors", b"12345")],
)
def test_a_damaged_file(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    assert problem(tmp_path / name).startswith(("FILE: not a weights file, or corrupt: ", "FILE: contains Python obj"))


def test_a_truncated_file(trained: State, tmp_path: Path) -> None:
    for name, save in FORMS.items():
        save(trained, tmp_path / name)
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-1000])
        assert "FILE: " in problem(tmp_path / name)


@pytest.mark.parametrize(
    ("content", "got"),
    [
        ({"epoch": 1, "model": {"w": torch.zeros(1)}}, "a dictionary of epoch, model"),
        ({}, "a dictionary of "),
        ([torch.zeros(1)], "<class 'list'>"),
        (torch.zeros(1), "<class 'torch.Tensor'>"),
        ({"state_dict": {}}, "a dictionary of "),
    ],
    ids=str,
)
def test_a_file_of_something_else(tmp_path: Path, content: object, got: str) -> None:
    torch.save(content, tmp_path / "other.pt")
    assert problem(tmp_path / "other.pt") == (
        f"FILE: expected a state_dict of tensors, or a checkpoint that contains one; got {got}"
    )


def test_a_prefix_is_removed_only_where_all_keys_have_it(tmp_path: Path) -> None:
    for state, keys in (
        ({"module.a": torch.zeros(1), "module.b": torch.ones(1)}, ["a", "b"]),
        ({"module.a": torch.zeros(1), "b": torch.ones(1)}, ["module.a", "b"]),
        ({"_orig_mod.module": torch.zeros(1)}, ["module"]),
    ):
        torch.save(state, tmp_path / "state.pt")
        assert list(read_weights(tmp_path / "state.pt")) == keys


# What does not fit.


def test_another_architecture_is_said_with_its_first_keys(trained: State, tmp_path: Path) -> None:
    state = {key.replace("resblocks.1", "resblocks.7"): value for key, value in trained.items()}
    state["text_projection"] = torch.zeros(32, 48)
    torch.save(state, tmp_path / "weights.pt")
    assert problem(tmp_path / "weights.pt") == (
        "FILE: these weights do not fit ViT-B-16: "
        "24 missing: visual.transformer.resblocks.1.ln_1.weight, visual.transformer.resblocks.1.ln_1.bias, "
        "visual.transformer.resblocks.1.attn.in_proj_weight, …; "
        "24 unexpected: visual.transformer.resblocks.7.ln_1.weight, visual.transformer.resblocks.7.ln_1.bias, "
        "visual.transformer.resblocks.7.attn.in_proj_weight, …; "
        "1 with a different shape: text_projection [32, 48] instead of [32, 32]. "
        "Most likely they belong to another architecture; name it in model, or its differences in model_cfg"
    )


@pytest.mark.parametrize(
    ("changes", "hint"),
    [
        (
            changed(vision_cfg={"image_size": 64}),
            "at another image size; write model_cfg: {vision_cfg: {image_size: 64}}",
        ),
        (
            changed(text_cfg={"context_length": 32}),
            "with another context length; write model_cfg: {text_cfg: {context_length: 32}}",
        ),
        (SMALL | {"init_logit_bias": -10}, "with a sigmoid loss; write model_cfg: {init_logit_bias: -10}"),
    ],
    ids=["image size", "context", "sigmoid"],
)
def test_a_mismatch_of_one_key_names_its_cause_and_the_cure(
    small_folder: Path, tmp_path: Path, changes: dict[str, Any], hint: str
) -> None:
    source, path = small(seed=1, model_cfg=changes), tmp_path / "weights.pt"
    torch.save(source.net.state_dict(), path)
    spec = ModelSpec(model=str(small_folder), checkpoint=str(path))
    with pytest.raises(ArtifactError) as caught:
        build_model(spec, seed=0)
    assert str(caught.value).endswith(f"Most likely they were trained {hint}")
    cured = build_model(spec.model_copy(update={"model_cfg": changes}), seed=0)
    assert all(torch.equal(value, source.net.state_dict()[key]) for key, value in cured.net.state_dict().items())


def test_the_image_size_of_a_resnet(tmp_path: Path) -> None:
    tiny = {"embed_dim": 32, "vision_cfg": {"layers": [1, 1, 1, 1], "width": 8, "image_size": 96}}
    tiny["text_cfg"] = SMALL["text_cfg"]
    resnet = ModelSpec(model="RN50", model_cfg=tiny)
    torch.save(build_model(resnet, seed=0).net.state_dict(), tmp_path / "weights.pt")
    smaller = tiny | {"vision_cfg": tiny["vision_cfg"] | {"image_size": 64}}  # type: ignore[operator]
    with pytest.raises(ArtifactError, match=r"another image size; write model_cfg: \{vision_cfg: \{image_size: 96\}\}"):
        build_model(ModelSpec(model="RN50", model_cfg=smaller, checkpoint=str(tmp_path / "weights.pt")), seed=0)


def test_nan_weights_load_as_they_are(trained: State, tmp_path: Path) -> None:
    torch.save(trained | {"text_projection": torch.full((32, 32), float("nan"))}, tmp_path / "nan.pt")
    assert small(checkpoint=str(tmp_path / "nan.pt")).net.state_dict()["text_projection"].isnan().all()


# QuickGELU.


def test_openais_weights_need_their_activation_said(trained: State, tmp_path: Path) -> None:
    sizes = {name: torch.tensor(7) for name in ("input_resolution", "context_length", "vocab_size")}
    torch.save(trained | sizes, tmp_path / "openai.pt")
    said = problem(tmp_path / "openai.pt", UsageError)
    assert said.startswith("FILE: OpenAI's weights were trained with QuickGELU, and ViT-B-16 has GELU: ")
    assert "model_cfg: {quick_gelu: true}" in said
    for fields in (
        {"model_cfg": SMALL | {"quick_gelu": True}},
        {"model_cfg": SMALL | {"quick_gelu": False}},  # said, if unwise
        {"model": "ViT-B-16-quickgelu"},
    ):
        model = small(checkpoint=str(tmp_path / "openai.pt"), **fields)
        assert torch.equal(model.net.state_dict()["text_projection"], trained["text_projection"])
        assert model.config["model_cfg"]["quick_gelu"] is (fields.get("model_cfg") != SMALL | {"quick_gelu": False})


# Changes that weights survive.


def test_another_image_size_interpolates_positions_as_open_clip_does(trained: State, tmp_path: Path) -> None:
    torch.save(trained, tmp_path / "weights.pt")
    larger = small(checkpoint=str(tmp_path / "weights.pt"), model_cfg=changed(vision_cfg={"image_size": 48}))
    positions = larger.net.state_dict()["visual.positional_embedding"]
    expected: State = {"visual.positional_embedding": trained["visual.positional_embedding"]}
    open_clip.model.resize_pos_embed(expected, larger.net)
    assert positions.shape == (1 + 6 * 6, 64)
    assert torch.equal(positions, expected["visual.positional_embedding"])
    assert larger.geometry.size == 48
    assert torch.equal(positions[0], trained["visual.positional_embedding"][0]), "the class token has no place"


def test_a_shorter_context_computes_the_same_for_captions_that_fit(trained: State, tmp_path: Path) -> None:
    torch.save(trained, tmp_path / "weights.pt")
    shorter = small(checkpoint=str(tmp_path / "weights.pt"), model_cfg=changed(text_cfg={"context_length": 12}))
    assert torch.equal(shorter.net.positional_embedding, trained["positional_embedding"][:12])
    captions = ["a cat", "two dogs on a very green lawn"]
    assert shorter.tokenize(captions).shape == (2, 12)
    whole = small(seed=1)
    with torch.inference_mode():
        short_BD = shorter.net.encode_text(shorter.tokenize(captions))
        whole_BD = whole.net.encode_text(whole.tokenize(captions))
    assert (short_BD - whole_BD).abs().max() < MAX_FEATURE_ERROR


def test_a_longer_context_than_the_weights_have_is_refused(trained: State, tmp_path: Path) -> None:
    torch.save(trained, tmp_path / "weights.pt")
    said = problem(tmp_path / "weights.pt", model_cfg=changed(text_cfg={"context_length": 99}))
    assert "positional_embedding [77, 32] instead of [99, 32]" in said


def test_a_sigmoid_models_bias_is_dropped_where_the_recipe_says_so(tmp_path: Path) -> None:
    sigmoid = small(seed=1, model_cfg=SMALL | {"init_logit_bias": -10})
    torch.save(sigmoid.net.state_dict(), tmp_path / "weights.pt")
    model = small(checkpoint=str(tmp_path / "weights.pt"), model_cfg=SMALL | {"init_logit_bias": None})
    assert model.net.logit_bias is None


# Folders.


def test_the_file_of_weights_in_a_folder(trained: State, tmp_path: Path) -> None:
    save_model(small(seed=1), tmp_path)
    (tmp_path / "open_clip_model.safetensors").rename(tmp_path / "mine.safetensors")
    (tmp_path / "notes.txt").write_text("no weights")
    assert torch.equal(load_model(tmp_path).net.text_projection, trained["text_projection"]), "the only one"
    torch.save({"another": torch.zeros(1)}, tmp_path / "heads.pt")
    with pytest.raises(
        ArtifactError, match=r"several possible weights files: heads\.pt, mine\.safetensors\. Name one with ch"
    ):
        load_model(tmp_path)
    torch.save(trained, tmp_path / "open_clip_pytorch_model.bin")
    assert torch.equal(load_model(tmp_path).net.text_projection, trained["text_projection"]), "open_clip's own name"
    for path in tmp_path.iterdir():
        if path.suffix in (".bin", ".pt", ".safetensors"):
            path.unlink()
    with pytest.raises(ArtifactError, match=r"no open_clip_model\.safetensors; this model has a configuration but no "):
        load_model(tmp_path)


def test_names_are_those_open_clip_looks_for(tmp_path: Path) -> None:
    """A folder that open_clip finds weights in, and no other file beside them."""
    from open_clip.factory import _find_checkpoint_in_dir

    for name in weights._WEIGHT_FILES:
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "a.safetensors").write_bytes(b"")
    for name in weights._WEIGHT_FILES:
        assert weights._folder_weights(tmp_path) == Path(_find_checkpoint_in_dir(tmp_path)) == tmp_path / name
        (tmp_path / name).unlink()
