"""Weights of every form load to the bit, nothing is unpickled that is not a tensor, and what does not fit is said."""

import gzip
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
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
from toolchain.models.state_dict import read_weights
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


def prefixed(state: State, prefix: str) -> State:
    return {prefix + name: value for name, value in state.items()}


def lightning_checkpoint(state: State, path: Path) -> None:
    """The module's model, and the parameters of its loss."""
    modules = prefixed(state, "model.") | {"loss.scale": torch.ones(1), "loss.bias": torch.ones(1)}
    torch.save({"epoch": 3, "state_dict": modules, "callbacks": {}, "optimizer_states": [{}]}, path)


def zeros(state: State) -> State:
    return {name: torch.zeros_like(value) for name, value in state.items()}


FORMS: dict[str, Callable[[State, Path], object]] = {
    "bare.pt": lambda state, path: torch.save(state, path),
    "prefixed.bin": lambda state, path: torch.save(prefixed(state, "module."), path),
    "compiled.pth": lambda state, path: torch.save(prefixed(state, "module._orig_mod."), path),
    "compiled first.pth": lambda state, path: torch.save(prefixed(state, "_orig_mod.module."), path),
    "deep.pt": lambda state, path: torch.save(prefixed(state, "model._orig_mod.module.net."), path),
    "of my own.pt": lambda state, path: torch.save(prefixed(state, "pl_module.backbone."), path),
    "training.pt": training_checkpoint,
    "lightning.ckpt": lightning_checkpoint,
    "of distill.pt": lambda state, path: torch.save(
        {"trained": prefixed(state, "net.") | {"heads.scale": torch.ones(())}, "optimizer": {"state": {}}, "step": 3},
        path,
    ),
    "model.pt": lambda state, path: torch.save({"model": state, "epoch": 1}, path),
    "model_state_dict.pt": lambda state, path: torch.save({"model_state_dict": state, "loss": 0.5}, path),
    "nested.pt": lambda state, path: torch.save({"model": {"state_dict": prefixed(state, "module.")}}, path),
    "own name.pt": lambda state, path: torch.save({"step": 7, "tower_weights": state}, path),
    "only ema.pt": lambda state, path: torch.save({"ema": {"module": state, "decay": 0.99}}, path),
    "with ema.pt": lambda state, path: torch.save({"state_dict": state, "state_dict_ema": zeros(state)}, path),
    "ema first.pt": lambda state, path: torch.save({"model_ema": zeros(state), "model": state}, path),
    "ema within.pt": lambda state, path: torch.save(
        {"state_dict": prefixed(zeros(state), "ema.module.") | prefixed(state, "model.")}, path
    ),
    "ema beside.pt": lambda state, path: torch.save(state | prefixed(zeros(state), "ema_model."), path),
    "averaged.pt": lambda state, path: torch.save({"n_averaged": torch.ones(1)} | prefixed(state, "module."), path),
    "old.pt": lambda state, path: torch.save(state, path, _use_new_zipfile_serialization=False),
    "plain.safetensors": lambda state, path: save_file(state, path),
    "safetensors.pt": lambda state, path: save_file(state, path),
    "torch.safetensors": lambda state, path: torch.save(state, path),
}


@pytest.mark.parametrize("name", FORMS)
def test_a_checkpoint_loads_to_the_bit(trained: State, tmp_path: Path, name: str) -> None:
    FORMS[name](trained, tmp_path / name)
    loaded = small(checkpoint=str(tmp_path / name)).net.state_dict()
    assert loaded.keys() == trained.keys()
    assert all(torch.equal(value, trained[key]) for key, value in loaded.items())
    assert not torch.equal(small(seed=0).net.state_dict()["text_projection"], trained["text_projection"])


@pytest.mark.parametrize(
    ("name", "notes"),
    [
        (
            "with ema.pt",
            [
                "FILE: contains the weights (state_dict) and a moving average of them (state_dict_ema). The weights "
                "are taken. For the average, save it alone: torch.save(torch.load(FILE, weights_only=True)[NAME], "
                "OTHER)"
            ],
        ),
        (
            "ema beside.pt",
            [
                "FILE: contains the weights (names without a prefix) and a moving average of them (ema_model). The "
                "weights are taken. For the average, save it alone: torch.save({name.removeprefix(PREFIX): w for name, "
                "w in state.items() if name.startswith(PREFIX)}, OTHER)"
            ],
        ),
        (
            "lightning.ckpt",
            ["FILE: 2 tensors outside model.* are not of the model, and are ignored: loss.scale, loss.bias"],
        ),
        ("only ema.pt", []),
        ("nested.pt", []),
    ],
)
def test_what_else_a_checkpoint_has_is_said(trained: State, tmp_path: Path, name: str, notes: list[str]) -> None:
    FORMS[name](trained, tmp_path / name)
    said: list[str] = []
    read_weights(tmp_path / name, said.append)
    assert [note.replace(str(tmp_path / name), "FILE") for note in said] == notes


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (
            lambda state: {"student": state, "teacher": state},
            "contains several models: student, teacher. Save the one ",
        ),
        (lambda state: {"model": state, "net": state, "ema": state}, "contains several models: model, net. Save the "),
        (
            lambda state: prefixed(state, "image_net.") | prefixed(state, "teacher."),
            "contains several models: image_net, teacher. Save the one you want alone: torch.save({name.removeprefix(",
        ),
    ],
)
def test_two_models_in_one_file_are_named(
    trained: State, tmp_path: Path, content: Callable[[State], Any], said: str
) -> None:
    torch.save(content(trained), tmp_path / "two.pt")
    assert problem(tmp_path / "two.pt").startswith(f"FILE: {said}")


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
    other = "a Python pickle, not a file that torch.save wrote; "
    assert said.startswith("FILE: " + {"torch": "contains Python objects other than tensors, ", "pickle": other}[how])
    assert "torch.save(model.state_dict(), FILE)" in said
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


@pytest.mark.parametrize(("name", "content"), [("zip.pt", b"PK\x03\x04"), ("x.safetensors", b"12345")])
def test_a_damaged_file(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    assert problem(tmp_path / name).startswith(("FILE: not a weights file, or corrupt: ", "FILE: contains Python obj"))


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22e\nsize 605157884\n"
ARRAYS = io.BytesIO()
np.savez(ARRAYS, kernel=np.zeros(2))


@pytest.mark.parametrize("name", ["weights.pt", "weights.safetensors"])
@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "an empty file, "),
        (LFS, "a Git LFS pointer, not the weights themselves. Fetch them: git lfs pull"),
        (b"<!DOCTYPE html>\n<html><title>Sign in</title></html>", "a web page (HTML), not weights: "),
        (b"\n<html>not found</html>", "a web page (HTML), not weights: "),
        (b'{"error": "Repository not found"}', "JSON text, not weights; "),
        (gzip.compress(b"weights"), "an archive, not weights. Unpack it"),
        (pickle.dumps({"weight": [1.0]}), "a Python pickle, not a file that torch.save wrote; "),
        (ARRAYS.getvalue(), "an archive of NumPy arrays (npz), "),
    ],
    ids=["empty", "lfs", "page", "html", "json", "gzip", "pickle", "npz"],
)
def test_a_file_of_another_kind_is_named_for_what_it_is(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    (tmp_path / name).write_bytes(content)
    assert problem(tmp_path / name).startswith(f"FILE: {said}")


def test_a_truncated_file(trained: State, tmp_path: Path) -> None:
    for name, save in FORMS.items():
        save(trained, tmp_path / name)
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-1000])
        assert "FILE: " in problem(tmp_path / name)


@pytest.mark.parametrize(
    ("content", "got"),
    [
        ({"epoch": 1, "model": {"w": 1.0}}, "a dictionary of epoch, model"),
        ({"optimizer": {"state": {"w": {"step": torch.zeros(1)}}}}, "a dictionary of optimizer"),
        ({}, "an empty dictionary"),
        ([torch.zeros(1)], "list"),
        (torch.zeros(1), "Tensor"),
        ({"state_dict": {}}, "a dictionary of state_dict"),
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
    ("layout", "said"),
    [
        (
            lambda state: {f"backbone.{name}": value for name, value in state.items() if "visual" in name},
            "Every name in the file begins with 'backbone.', a prefix that clipkd does not know. If it wraps the "
            "model, save the names without it: key.removeprefix('backbone.')",
        ),
        (
            lambda state: {"vision_model.embeddings.class_embedding": torch.zeros(2), "text_model.a": torch.zeros(2)},
            "The file has the layout of Hugging Face transformers; clipkd reads open_clip's layout of the same model",
        ),
        (
            lambda state: {"conv1.weight": torch.zeros(2), "fc.weight": torch.zeros(2)},
            "No name in the file is one of the model's; they begin with conv1, fc",
        ),
    ],
)
def test_names_of_another_layout_are_told_apart_from_another_architecture(
    trained: State, tmp_path: Path, layout: Callable[[State], State], said: str
) -> None:
    torch.save(layout(trained), tmp_path / "weights.pt")
    assert problem(tmp_path / "weights.pt").endswith(said)


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


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e300])
@pytest.mark.parametrize("kind", ["pt", "safetensors"])
def test_weights_that_are_not_finite_are_refused(trained: State, tmp_path: Path, kind: str, value: float) -> None:
    """One value is enough, and one that float32 cannot hold counts too."""
    path = tmp_path / f"weights.{kind}"
    projection = trained["text_projection"].double()
    projection[3, 4] = value
    state = trained | {"text_projection": projection}
    save_file(state, path) if kind == "safetensors" else torch.save(state, path)
    said = problem(path)
    assert said.startswith("FILE: NaN or infinity in 1 of 62 tensors: text_projection (1 of 1,024 values). ")


@pytest.mark.parametrize("kind", ["pt", "safetensors"])
def test_weights_quantized_to_whole_numbers_are_refused(trained: State, tmp_path: Path, kind: str) -> None:
    """As floats they would be -1, 0 and 1, and the model would compute nothing."""
    path = tmp_path / f"weights.{kind}"
    state = trained | {"text_projection": trained["text_projection"].to(torch.int8)}
    save_file(state, path) if kind == "safetensors" else torch.save(state, path)
    said = problem(path)
    assert said.startswith("FILE: 1 of 62 tensors have whole numbers (int8) instead of floats: text_projection. ")


def test_a_folders_weights_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    """Teachers, students and adopted models are loaded so."""
    model = small()
    with torch.no_grad():
        for parameter in model.net.parameters():
            parameter.fill_(float("nan"))
    save_model(model, tmp_path)
    with pytest.raises(
        ArtifactError, match=r"open_clip_model\.safetensors: NaN or infinity in 62 of 62 tensors: .*, …"
    ):
        load_model(tmp_path)


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
