"""A student inherits exactly what its teacher computes, as far as it fits, and says what that is."""

import copy
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import REPOSITORY, Ended
from open_clip.model import resize_pos_embed
from torch import Tensor, nn

from toolchain.data.glyphs import training_set
from toolchain.errors import UsageError
from toolchain.models import inherit
from toolchain.models.build import build_model, load_model, save_model
from toolchain.models.clip_model import ClipModel
from toolchain.models.inherit import inherit_weights
from toolchain.models.student import build_student
from toolchain.models.tower_sizes import plan_space, plan_tower, spread_layers
from toolchain.recipe.model import ModelSpec, StudentSpec
from toolchain.recipe.model_names import fingerprint

pytestmark = pytest.mark.usefixtures("one_thread")

TEXTS = ["a cat", "a photo of two dogs, 12 km away", "", "zwölf Boxkämpfer"]

# Unit features in float32: the same sums in another order, over several layers.
MAX_FEATURE_ERROR = 1e-6

# Half of WIDE in everything: what is to be found again in it.
NARROW: dict[str, Any] = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 32, "head_width": 16, "layers": 2},
    "text_cfg": {"width": 32, "heads": 2, "layers": 2},
}
WIDE: dict[str, Any] = {
    "embed_dim": 40,
    "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 64, "head_width": 16, "layers": 4},
    "text_cfg": {"width": 64, "heads": 4, "layers": 4},
}
FIRST, LIVE_HEADS, LIVE_LAYERS = slice(0, None, 2), (1, 2), (1, 3)


def make(cfg: dict[str, Any], seed: int, **sections: Any) -> ClipModel:
    """Return a model of these sizes whose biases, gains and scales are not those of initialization."""
    changed = {key: cfg[key] | value if isinstance(value, dict) else value for key, value in sections.items()}
    model = build_model(ModelSpec(model="ViT-B-16", model_cfg=copy.deepcopy(cfg | changed)), seed=seed)
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.net.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=random))
    return model


def features(model: ClipModel, texts: list[str] = TEXTS) -> Tensor:
    """Return the unit features of the images and texts, in one matrix [N, E]."""
    size = model.image_size
    pixels_BCHW = torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = [model.encode_image(pixels_BCHW), model.encode_text(model.tokenize(texts))]
    return F.normalize(torch.cat(found), dim=-1)


@torch.no_grad()
def twice(value_N: Tensor) -> Tensor:
    """Repeat every channel: mean and variance stay."""
    return value_N.repeat_interleave(2, 0)


@torch.no_grad()
def hide_block(own: Any, wide: Any) -> None:
    """Put a block into one of twice its size: mirrored channels, heads that write nothing, dead MLP channels."""
    heads, width = own.attn.num_heads, own.attn.head_dim
    for ours, theirs in ((own.ln_1, wide.ln_1), (own.ln_2, wide.ln_2)):
        theirs.weight[FIRST], theirs.bias[FIRST] = ours.weight, ours.bias  # what reads the others is zero
    read_3HDW = wide.attn.in_proj_weight.unflatten(0, (3, 2 * heads, width))
    bias_3HD = wide.attn.in_proj_bias.unflatten(0, (3, 2 * heads, width))
    write_WHD = wide.attn.out_proj.weight.unflatten(1, (2 * heads, width))
    read_3HDW[..., 1::2] = 0
    write_WHD.zero_()
    for head, live in enumerate(LIVE_HEADS):
        read_3HDW[:, live, :, FIRST] = own.attn.in_proj_weight.unflatten(0, (3, heads, width))[:, head]
        bias_3HD[:, live] = own.attn.in_proj_bias.unflatten(0, (3, heads, width))[:, head]
        write_WHD[:, live] = twice(own.attn.out_proj.weight.unflatten(1, (heads, width))[:, head])
    wide.attn.out_proj.bias.copy_(twice(own.attn.out_proj.bias))
    hidden = len(own.mlp.c_fc.bias)
    wide.mlp.c_fc.weight[:, 1::2] = 0
    wide.mlp.c_fc.weight[hidden:, FIRST], wide.mlp.c_fc.bias[hidden:] = own.mlp.c_fc.weight, own.mlp.c_fc.bias
    wide.mlp.c_proj.weight.zero_()
    wide.mlp.c_proj.weight[:, hidden:] = twice(own.mlp.c_proj.weight)
    wide.mlp.c_proj.bias.copy_(twice(own.mlp.c_proj.bias))


@torch.no_grad()
def hide(narrow: ClipModel, wide: ClipModel) -> None:
    """Make a model of twice the size compute a narrow one's features, rotated, in some of its parts."""
    basis_EF = torch.linalg.qr(torch.randn(40, 24, generator=torch.Generator().manual_seed(1))).Q
    own: Any = narrow.net
    theirs: Any = wide.net
    for ours, larger in ((own.visual, theirs.visual), (own, theirs)):
        for number, block in enumerate(larger.transformer.resblocks):
            if number in LIVE_LAYERS:
                hide_block(ours.transformer.resblocks[LIVE_LAYERS.index(number)], block)
            else:
                for linear in (block.attn.out_proj, block.mlp.c_proj):
                    nn.init.zeros_(linear.weight)
                    nn.init.zeros_(linear.bias)
        larger.positional_embedding.copy_(twice(ours.positional_embedding.T).T)
    theirs.visual.conv1.weight.copy_(twice(own.visual.conv1.weight))
    theirs.visual.class_embedding.copy_(twice(own.visual.class_embedding))
    theirs.token_embedding.weight.copy_(twice(own.token_embedding.weight.T).T)
    for name in ("weight", "bias"):
        getattr(theirs.visual.ln_pre, name).copy_(twice(getattr(own.visual.ln_pre, name)))
        getattr(theirs.visual.ln_post, name)[FIRST] = getattr(own.visual.ln_post, name)
        getattr(theirs.ln_final, name)[FIRST] = getattr(own.ln_final, name)
    for ours, larger in ((own.visual.proj, theirs.visual.proj), (own.text_projection, theirs.text_projection)):
        larger.zero_()
        larger[FIRST] = ours @ basis_EF.T


def test_a_student_of_the_same_size_is_a_copy() -> None:
    teacher, student = make(WIDE, 0), make(WIDE, 1)
    assert not torch.equal(features(student), features(teacher))
    recorded = inherit_weights(teacher, student)
    weights = teacher.net.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in student.net.state_dict().items())
    assert torch.equal(features(student), features(teacher))
    assert recorded["image"]["text"] == recorded["text"]["text"] == "all weights"


def test_a_model_hidden_in_a_larger_one_is_found_again() -> None:
    narrow, teacher, student = make(NARROW, 0), make(WIDE, 1), make(NARROW, 2)
    hide(narrow, teacher)
    wanted_NN = features(narrow) @ features(narrow).T
    assert torch.allclose(features(teacher) @ features(teacher).T, wanted_NN, rtol=0, atol=MAX_FEATURE_ERROR)
    recorded = inherit_weights(teacher, student)
    found_NN = features(student) @ features(student).T
    assert (found_NN - wanted_NN).abs().max() <= MAX_FEATURE_ERROR
    for tower in ("image", "text"):
        assert recorded[tower]["layers"] == list(LIVE_LAYERS)
        assert recorded[tower]["heads"] == [list(LIVE_HEADS)] * 2
        assert recorded[tower]["channels"] == list(range(0, 64, 2))


def test_narrower_heads_keep_the_scale_of_their_logits() -> None:
    """Half of every head's queries and keys are zero: without them, queries must be scaled."""
    teacher, student = make(WIDE, 0, vision_cfg={"head_width": 32}), make(WIDE, 1, vision_cfg=NARROW["vision_cfg"])
    given, own = (model.net.visual.transformer.resblocks[0].attn for model in (teacher, student))  # type: ignore
    read_3HDW = given.in_proj_weight.data.unflatten(0, (3, 2, 32))
    read_3HDW[:2, :, ::2] = given.in_proj_bias.data.unflatten(0, (3, 2, 32))[:2, :, ::2] = 0
    kept_C = inherit_weights(teacher, student)["image"]["channels"]
    query_HDW, key_HDW, _ = read_3HDW[..., kept_C]
    own_query_HDW, own_key_HDW, _ = own.in_proj_weight.data.unflatten(0, (3, 2, 16))
    wanted_HWW = query_HDW.mT @ key_HDW / 32**0.5
    assert (own_query_HDW.mT @ own_key_HDW / 16**0.5 - wanted_HWW).abs().max() <= MAX_FEATURE_ERROR
    assert wanted_HWW.abs().max() > 100 * MAX_FEATURE_ERROR


@pytest.mark.parametrize("text_cfg", [{"mlp_ratio": 2.0}, {"width": 96, "heads": 3}])
def test_important_parts_keep_more_of_a_trained_tower(
    text_cfg: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without training, more is kept of the included teacher's features than by the same number of the other parts."""
    teacher = load_model(REPOSITORY / "recipes" / "glyphs_teacher")
    texts = [f"a photo of {name}" for name in training_set().names[::40]]

    def closeness(sign: int) -> float:
        """Return the mean cosine with the teacher if the parts of largest (1) or least (-1) norm are kept."""
        monkeypatch.setattr(inherit, "_largest", lambda norm_N, number: largest(sign * norm_N, number))
        spec = {"model": "glyphs_teacher", "model_cfg": {"text_cfg": text_cfg}}
        student = build_model(ModelSpec.model_validate(spec), seed=0)
        inherit_weights(teacher, student)
        return float((features(student, texts)[3:] * features(teacher, texts)[3:]).sum(1).mean())

    largest = inherit._largest
    assert closeness(1) > closeness(-1)


def test_positions_are_cut_and_interpolated() -> None:
    teacher = make(WIDE, 0)
    student = make(WIDE, 1, text_cfg={"context_length": 16}, vision_cfg={"image_size": 48})
    inherit_weights(teacher, student)
    reloaded = build_model(
        ModelSpec(model="ViT-B-16", model_cfg=WIDE | {"vision_cfg": WIDE["vision_cfg"] | {"image_size": 48}}), seed=2
    )
    state = teacher.net.state_dict()
    resize_pos_embed(state, reloaded.net)
    own = student.net.state_dict()
    assert torch.equal(own["visual.positional_embedding"], state["visual.positional_embedding"])
    assert torch.equal(own["positional_embedding"], state["positional_embedding"][:16])
    fitting = [text for text in TEXTS if int((teacher.tokenize([text]) > 0).sum()) <= 16]
    assert len(fitting) == len(TEXTS)
    error = features(student)[3:] - features(teacher)[3:]  # the texts: with a causal mask, the rest has no effect
    assert error.abs().max() <= MAX_FEATURE_ERROR


def test_blocks_that_do_not_fit_leave_the_ends() -> None:
    teacher, student = make(NARROW, 0), make(NARROW, 1, text_cfg={"layers": 3}, vision_cfg={"width": 64})
    before = copy.deepcopy(student.net.state_dict())
    recorded = inherit_weights(teacher, student)
    given, own = teacher.net.state_dict(), student.net.state_dict()
    assert torch.equal(own["token_embedding.weight"], given["token_embedding.weight"])
    assert torch.equal(own["text_projection"], given["text_projection"])
    changed = {name for name, value in own.items() if not torch.equal(value, before[name])}
    assert not any(name.startswith(("visual.", "transformer.")) for name in changed)
    assert recorded["text"]["text"] == "token embeddings, positions and projection, because layers 3 is larger than 2"
    assert recorded["image"]["text"] == "nothing; its width 64 is larger than 32"


def test_nothing_in_common_is_refused() -> None:
    teacher, student = make(NARROW, 0), make(WIDE, 1)
    with pytest.raises(UsageError, match=r"can inherit nothing from ViT-B-16 \(image tower: nothing; its width 64"):
        inherit_weights(teacher, student)


@pytest.mark.parametrize(("of", "number", "wanted"), [(12, 6, [0, 2, 4, 7, 9, 11]), (12, 1, [0]), (3, 3, [0, 1, 2])])
def test_layers_are_spread(of: int, number: int, wanted: list[int]) -> None:
    assert spread_layers(of, number) == wanted


def test_spread_layers_are_distinct_and_keep_both_ends() -> None:
    for of in range(2, 40):
        for number in range(2, of + 1):
            found = spread_layers(of, number)
            assert found == sorted(set(found))
            assert (len(found), found[0], found[-1]) == (number, 0, of - 1)


def test_a_plan_needs_the_configurations_only() -> None:
    half = {"embed_dim": 256, "vision_cfg": {"width": 384, "layers": 6}, "text_cfg": {"context_length": 32}}
    whole = {"embed_dim": 512, "vision_cfg": {}, "text_cfg": {}}
    assert plan_tower(half, whole, "image").text == (
        "384 of 768 channels, layers 0, 2, 4, 7, 9, 11 of 12, 6 of 12 heads, 1,536 of 3,072 MLP channels"
    )
    assert plan_tower(half, whole, "text").text == "the first 32 of 77 positions"
    assert plan_space(half, whole) is not None
    assert plan_space(whole, whole) is None
    other = {"vision_cfg": {"timm_model_name": "resnet18"}, "text_cfg": {}}
    assert plan_tower(other, whole, "image").extent == "nothing"
    assert plan_tower(other, other, "image").extent == "all"


def test_another_activation_is_remarked_on(tmp_path: Path) -> None:
    save_model(make(NARROW, 0), tmp_path)
    spec = {"model": "ViT-B-16", "model_cfg": NARROW | {"quick_gelu": True}, "inherit": str(tmp_path)}
    heard: list[str] = []
    build_student(StudentSpec.model_validate(spec), seed=0, say=heard.append)
    assert heard == [
        "student.inherit: its source was trained with GELU, and the student has QuickGELU; training has to repair the "
        "difference. To keep the source's, set student.model_cfg: {quick_gelu: false}"
    ]


# In a recipe.


def summary(run: Path, stage: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((run / stage / "manifest.json").read_text())["summary"]
    return content


def test_a_run_inherits_from_its_teacher_and_its_baseline_does_not(
    tiny_recipe: Callable[..., Path], clipkd: Callable[..., Ended], tmp_path: Path
) -> None:
    """After no step worth the name, the student still encodes texts as its teacher does; batch norms have moved."""
    slow = {"steps": 1, "batch_size": 8, "lr": 1e-9, "warmup": 0, "weight_decay": 0}
    student = {"model": "glyphs_tiny", "inherit": "teacher"}
    recipe = tiny_recipe(student=student, baseline=True, distill=slow)
    shown = clipkd("show", recipe)
    assert "# student: image tower inherits from the teacher: all weights" in shown.out
    assert "# baseline: image tower" not in shown.out
    run = tmp_path / "run"
    assert clipkd("distill", recipe, "--out", run).code == 0
    teacher, student_model, baseline = (load_model(run / name) for name in ("teacher", "student", "baseline"))
    wanted_TE = features(teacher)[3:]
    assert (features(student_model)[3:] - wanted_TE).abs().max() <= MAX_FEATURE_ERROR
    assert (features(baseline)[3:] - wanted_TE).abs().max() > 0.1
    assert summary(run, "student")["inherited"]["text"]["text"] == "all weights"
    assert "inherited" not in summary(run, "baseline")

    chained = tiny_recipe("second", student={"model": "glyphs_tiny", "inherit": str(run)}, baseline=True, distill=slow)
    second = tmp_path / "second"
    assert clipkd("distill", chained, "--out", second).code == 0
    for name in ("student", "baseline"):
        assert summary(second, name)["inherited"]["from"] == str(run / "student")
    assert (features(load_model(second / "baseline"))[3:] - wanted_TE).abs().max() <= MAX_FEATURE_ERROR


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"inherit": "teacher", "init": "weights"}, "inherit contradicts pretrained, checkpoint and init: weights"),
        ({"inherit": {"model": "teacher", "pretrained": "openai"}}, "remove the other fields of inherit"),
        ({"inherit": "runs/none"}, "student.inherit.model 'runs/none': no such model"),
    ],
)
def test_what_cannot_be_inherited_is_said(
    tiny_recipe: Callable[..., Path], clipkd: Callable[..., Ended], fields: dict[str, Any], message: str
) -> None:
    ended = clipkd("show", tiny_recipe(student={"model": "glyphs_tiny"} | fields))
    assert ended.code == 2
    assert message in ended.err


def test_without_a_teacher_nothing_is_inherited_from_it(
    tiny_recipe: Callable[..., Path], clipkd: Callable[..., Ended]
) -> None:
    recipe = tiny_recipe(student={"model": "glyphs_tiny", "inherit": "teacher"}, teacher=None)
    ended = clipkd("show", recipe)
    assert ended.code == 2
    assert "student.inherit: teacher needs a `teacher` section" in ended.err


def test_keys_of_earlier_runs_stay_valid() -> None:
    """A student's fingerprint without the new fields is the hash that it was before there were any."""
    spec = StudentSpec(model="ViT-B-16", model_cfg={"embed_dim": 8})
    fields = ("model", "checkpoint", "pretrained", "model_cfg", "preprocess_cfg", "init")
    values = {name: getattr(spec, name) for name in fields}
    assert fingerprint(spec) == hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
    others = [StudentSpec.model_validate(values | {"inherit": name}) for name in ("teacher", "ViT-B-32", "ViT-L-14")]
    assert len({fingerprint(each) for each in (spec, *others)}) == 4
