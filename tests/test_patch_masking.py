"""The masked student forward: the reference's values, no influence of what is hidden, nothing left behind."""

from collections.abc import Callable

import numpy as np
import pytest
import timm
import torch
from golden import RTOL, golden_values
from open_clip.modified_resnet import ModifiedResNet
from open_clip.timm_model import TimmModel
from open_clip.transformer import VisionTransformer
from torch import Tensor, nn

from toolchain.data.random_numbers import uniforms
from toolchain.errors import UsageError
from toolchain.models.patch_masking import (
    check_can_mask,
    kept_patches,
    masked_image_features,
    num_patches,
    patches_of_least_noise,
)

pytestmark = pytest.mark.usefixtures("one_thread")

SAME_FLOAT64_ATOL = 1e-12  # features of order 1 from sums in another order; float64 has 1e-16
FLOAT32_ATOL = 1e-6  # the same in float32
BATCH = 3


def open_clip_vit(**options) -> VisionTransformer:
    sizes = {"image_size": 32, "patch_size": 8, "width": 32, "layers": 2, "heads": 2, "mlp_ratio": 2, "output_dim": 12}
    return VisionTransformer(**(sizes | options))


class TimmTower(TimmModel):
    """open_clip's adapter around a timm trunk of any size."""

    def __init__(self, name: str, **options) -> None:
        nn.Module.__init__(self)
        self.trunk = timm.create_model(name, num_classes=0, **options)
        self.head = nn.Linear(self.trunk.num_features, 12)


def timm_vit(name: str = "vit_tiny_patch16_224", **options) -> TimmTower:
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
    return TimmTower(name, **(sizes | options))


TOWERS: dict[str, Callable[[], nn.Module]] = {
    "open_clip, class token": open_clip_vit,
    "open_clip, mean": lambda: open_clip_vit(pool_type="avg", final_ln_after_pool=True, no_ln_pre=True),
    "open_clip, attention pool": lambda: open_clip_vit(
        attentional_pool=True, attn_pooler_heads=2, attn_pooler_queries=1
    ),
    "open_clip, wide image": lambda: open_clip_vit(image_size=(16, 64)),
    "timm, class token": timm_vit,
    "timm, mean": lambda: timm_vit(class_token=False, global_pool="avg"),
    "timm, registers": lambda: timm_vit(reg_tokens=4, no_embed_class=True, pre_norm=True),
    "timm, attention pool": lambda: timm_vit(class_token=False, global_pool="map"),
    "timm, distilled": lambda: timm_vit("deit_tiny_distilled_patch16_224"),
}
NUM_PATCHES = 16


@pytest.fixture(params=TOWERS)
def tower(request: pytest.FixtureRequest) -> nn.Module:
    """A small float64 image tower with 16 patches, every parameter drawn: none is 0 or 1 by its start."""
    torch.manual_seed(5)
    tower = TOWERS[request.param]().double()
    for parameter in tower.parameters():
        parameter.data = 0.3 * torch.randn_like(parameter)
    return tower


def pixels_of(tower: nn.Module, batch: int = BATCH) -> Tensor:
    height, width = getattr(tower, "image_size", (32, 32))
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(6), dtype=torch.float64)


def kept(ratio: float, batch: int = BATCH) -> Tensor:
    return kept_patches(0, np.arange(batch), 0, num_patches=NUM_PATCHES, mask_ratio=ratio)


# The reference.


@pytest.fixture
def golden() -> tuple[VisionTransformer, dict[str, np.ndarray]]:
    values = golden_values("mfd")
    tower = open_clip_vit(mlp_ratio=4, output_dim=16).double()
    tower.load_state_dict(
        {name.removeprefix("state."): torch.from_numpy(x) for name, x in values.items() if name.startswith("state.")}
    )
    return tower, values


@pytest.mark.parametrize("ratio", [0.5, 0.75])
def test_masked_features_equal_the_reference(
    golden: tuple[VisionTransformer, dict[str, np.ndarray]], ratio: float
) -> None:
    tower, values = golden
    kept_BK = patches_of_least_noise(torch.from_numpy(values[f"in.noise_r{ratio}"]), ratio)
    assert kept_BK.dtype == torch.int64
    np.testing.assert_array_equal(kept_BK.numpy(), values[f"out.kept_patch_ids_in_order_r{ratio}"])
    found = masked_image_features(tower, torch.from_numpy(values["in.image"]), kept_BK)
    np.testing.assert_allclose(found.detach().numpy(), values[f"out.mask_forward_r{ratio}"], rtol=RTOL)


@pytest.mark.parametrize("ratio", [0.5, 0.75])
def test_the_reference_hides_the_others(golden: tuple[VisionTransformer, dict[str, np.ndarray]], ratio: float) -> None:
    _, values = golden
    hidden = torch.ones(3, NUM_PATCHES).scatter(1, torch.from_numpy(values[f"out.kept_patch_ids_in_order_r{ratio}"]), 0)
    np.testing.assert_array_equal(hidden.numpy(), values[f"out.mask_r{ratio}"])


def test_the_towers_ordinary_features_equal_the_reference(
    golden: tuple[VisionTransformer, dict[str, np.ndarray]],
) -> None:
    tower, values = golden
    pixels = torch.from_numpy(values["in.image"])
    np.testing.assert_allclose(tower(pixels).detach().numpy(), values["out.full_forward"], rtol=RTOL)
    found = masked_image_features(tower, pixels, kept(0.0))
    np.testing.assert_allclose(found.detach().numpy(), values["out.full_forward"], rtol=RTOL)


# What the tower sees.


def test_all_patches_in_any_order_give_the_ordinary_features(tower: nn.Module) -> None:
    pixels, all_BL = pixels_of(tower), kept(0.0)
    assert all_BL.sort(dim=1).values.tolist() == [list(range(NUM_PATCHES))] * BATCH
    assert all_BL[0].tolist() != list(range(NUM_PATCHES))
    with torch.no_grad():
        ordinary, masked = tower(pixels), masked_image_features(tower, pixels, all_BL)
        torch.testing.assert_close(masked, ordinary, rtol=0, atol=SAME_FLOAT64_ATOL)
        single = masked_image_features(tower.float(), pixels.float(), all_BL)
        torch.testing.assert_close(
            single, tower(pixels.float()), rtol=0, atol=FLOAT32_ATOL * ordinary.abs().max().item()
        )


@pytest.mark.parametrize("ratio", [0.25, 0.75, 0.9375])
def test_what_is_hidden_has_no_influence_and_what_is_shown_has(tower: nn.Module, ratio: float) -> None:
    """Hidden patches are not even numbers, and the features are what they were."""
    pixels, kept_BK = pixels_of(tower), kept(ratio)
    grid_width = pixels.shape[-1] // 8
    hidden, shown = pixels.clone(), pixels.clone()
    for i in range(BATCH):
        for patch in range(NUM_PATCHES):
            y, x = 8 * (patch // grid_width), 8 * (patch % grid_width)
            (shown if patch in kept_BK[i].tolist() else hidden)[i, :, y : y + 8, x : x + 8] = torch.nan
    with torch.no_grad():
        features = masked_image_features(tower, pixels, kept_BK)
        assert features.isfinite().all()
        torch.testing.assert_close(
            masked_image_features(tower, hidden, kept_BK), features, rtol=0, atol=SAME_FLOAT64_ATOL
        )
        assert masked_image_features(tower, shown, kept_BK).isnan().all()
        assert (features - tower(pixels)).abs().max() > 1e-3, "and the hidden ones did matter"


def test_gradients_reach_the_shown_pixels_and_every_parameter(tower: nn.Module) -> None:
    pixels, kept_BK = pixels_of(tower).requires_grad_(), kept(0.75)
    tower.train()
    masked_image_features(tower, pixels, kept_BK).square().sum().backward()
    patches = nn.functional.unfold(pixels.grad, 8, stride=8).abs().sum(1)  # [B, L]
    shown = torch.zeros(BATCH, NUM_PATCHES, dtype=torch.bool).scatter(1, kept_BK, True)
    assert (patches[shown] > 0).all()
    assert (patches[~shown] == 0).all()
    missing = {name for name, parameter in tower.named_parameters() if parameter.grad is None}
    assert missing == {name for name, parameter in tower.named_parameters() if not parameter.requires_grad}


def test_the_gradient_is_that_of_finite_differences(tower: nn.Module) -> None:
    pixels, kept_BK = pixels_of(tower, batch=1), kept(0.75, batch=1)
    direction = torch.randn_like(pixels)
    along = torch.zeros((), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a: masked_image_features(tower, pixels + a * direction, kept_BK), (along,))


def test_an_image_is_masked_by_its_own_row(tower: nn.Module) -> None:
    pixels, kept_BK = pixels_of(tower), kept(0.75)
    with torch.no_grad():
        together = masked_image_features(tower, pixels, kept_BK)
        for i in range(BATCH):
            alone = masked_image_features(tower, pixels[i : i + 1], kept_BK[i : i + 1])
            torch.testing.assert_close(together[i : i + 1], alone, rtol=0, atol=SAME_FLOAT64_ATOL)


@pytest.mark.parametrize("make", [lambda: open_clip_vit(patch_dropout=0.5), lambda: timm_vit(patch_drop_rate=0.5)])
def test_the_towers_own_patch_dropout_gives_way(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    tower = make().double().train()
    pixels, kept_BK = pixels_of(tower), kept(0.5)
    state = torch.get_rng_state()
    first, second = (masked_image_features(tower, pixels, kept_BK) for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), state), "no number was drawn"
    assert not torch.equal(tower(pixels), tower(pixels)), "it is back, and drops at random"


def test_checkpointed_blocks_give_the_same_features_and_gradients() -> None:
    torch.manual_seed(0)
    tower = open_clip_vit().double().train()
    gradients = []
    for checkpointed in (False, True):
        tower.set_grad_checkpointing(checkpointed)
        tower.zero_grad()
        masked_image_features(tower, pixels_of(tower), kept(0.75)).square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in tower.parameters()])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, checkpointed, rtol=0, atol=SAME_FLOAT64_ATOL)


# What is left behind.


def test_nothing_is_left_behind(tower: nn.Module) -> None:
    pixels = pixels_of(tower)
    modules, state, before = dict(tower.named_modules()), list(tower.state_dict()), tower(pixels)
    masked_image_features(tower, pixels, kept(0.75))
    assert dict(tower.named_modules()) == modules
    assert list(tower.state_dict()) == state
    assert torch.equal(tower(pixels), before)


def test_nothing_is_left_behind_by_a_failure(tower: nn.Module) -> None:
    pixels = pixels_of(tower)
    modules, before = dict(tower.named_modules()), tower(pixels)
    with pytest.raises(RuntimeError):
        masked_image_features(tower, pixels, torch.full((BATCH, 4), NUM_PATCHES))
    with pytest.raises(AssertionError):
        masked_image_features(tower, pixels, kept(0.75)[:2])  # of another batch
    assert dict(tower.named_modules()) == modules
    assert torch.equal(tower(pixels), before)


def test_a_tower_that_passes_its_slot_by_is_found_out() -> None:
    """The released code's defect: a mask without effect."""

    class Careless(VisionTransformer):
        def _embeds(self, x: Tensor) -> Tensor:
            patches = self.conv1(x).flatten(2).transpose(1, 2)
            return torch.cat([self.class_embedding.expand(len(x), 1, -1), patches], 1) + self.positional_embedding

    options = {"image_size": 32, "patch_size": 8, "width": 32, "layers": 1, "heads": 2, "mlp_ratio": 2}
    tower = Careless(**options).double()
    with pytest.raises(AssertionError, match="Careless passed its patch-dropout slot 0 times"):
        masked_image_features(tower, pixels_of(tower), kept(0.75))


# Which towers.


def test_the_number_of_patches(tower: nn.Module) -> None:
    check_can_mask(tower)
    assert num_patches(tower) == NUM_PATCHES


def test_a_tower_that_open_clip_builds_can_mask() -> None:
    """The adapter as it is, not the small one of these tests."""
    tower = TimmModel("vit_tiny_patch16_224", embed_dim=12, image_size=224, pool="token")
    check_can_mask(tower)
    assert num_patches(tower) == 196


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "open_clip ResNet": (
        lambda: ModifiedResNet([1, 1, 1, 1], output_dim=12, heads=2, image_size=32, width=8),
        "ModifiedResNet",
    ),
    "timm ResNet": (lambda: TimmTower("resnet10t"), "timm's ResNet (resnet10t)"),
    "MobileNet": (lambda: TimmTower("mobilenetv3_small_050"), "timm's MobileNetV3 (mobilenetv3_small_050)"),
    "MobileViT": (lambda: TimmTower("mobilevit_xxs"), "timm's ByobNet (mobilevit_xxs)"),
    "Swin": (
        lambda: TimmTower("swin_tiny_patch4_window7_224", embed_dim=24, depths=(1, 1, 1, 1)),
        "timm's SwinTransformer (swin_tiny_patch4_window7_224)",
    ),
    "EVA": (lambda: TimmTower("eva02_tiny_patch14_224", depth=1), "timm's Eva (eva02_tiny_patch14_224)"),
    "anything else": (lambda: nn.Linear(3, 3), "Linear"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_tower_that_cannot_mask_is_refused(name: str) -> None:
    make, kind = REFUSED[name]
    tower = make()
    expected = (
        f"the student's image tower, {kind}, cannot drop patches, which masked feature distillation needs; "
        "remove distill.loss_weights.mfd, or choose a student with a vision transformer"
    )
    for refused in (
        lambda: check_can_mask(tower),
        lambda: num_patches(tower),
        lambda: masked_image_features(tower, torch.zeros(BATCH, 3, 32, 32), kept(0.75)),
    ):
        with pytest.raises(UsageError) as caught:
            refused()
        assert str(caught.value) == expected


# Which patches.


def test_a_sample_is_masked_the_same_in_any_company() -> None:
    ids = np.array([7, 3, 2**40, 0, 11])
    together = kept_patches(5, ids, 2, num_patches=49, mask_ratio=0.75)
    assert (together.dtype, together.shape) == (torch.int64, (5, 12))
    order = np.array([3, 0, 4, 2, 1])
    assert torch.equal(kept_patches(5, ids[order], 2, num_patches=49, mask_ratio=0.75), together[order])
    for i, sample in enumerate(ids):
        alone = kept_patches(5, np.array([sample]), 2, num_patches=49, mask_ratio=0.75)
        assert torch.equal(alone[0], together[i])


def test_seed_sample_and_draw_each_change_the_mask() -> None:
    masks = [
        tuple(kept_patches(seed, np.array([sample]), draw, num_patches=49, mask_ratio=0.75)[0].sort().values.tolist())
        for seed in range(3)
        for sample in range(5)
        for draw in range(4)
    ]
    assert len(set(masks)) == len(masks) == 60


def test_the_noise_is_not_that_of_the_views() -> None:
    """Which a view's rotation and colours are made of: a mask must not tell them."""
    ids = np.arange(64)
    mask = kept_patches(5, ids, 2, num_patches=16, mask_ratio=0.5)
    of_view = patches_of_least_noise(torch.from_numpy(uniforms(5, ids, 2, 16)), 0.5)
    same = sum(set(a) == set(b) for a, b in zip(mask.tolist(), of_view.tolist(), strict=True))
    assert same == 0


@pytest.mark.parametrize(
    ("count", "ratio", "expected"), [(16, 0.0, 16), (16, 0.75, 4), (196, 0.75, 49), (49, 0.75, 12), (10, 0.85, 1)]
)
def test_how_many_patches_are_kept(count: int, ratio: float, expected: int) -> None:
    found = kept_patches(0, np.arange(8), 0, num_patches=count, mask_ratio=ratio)
    assert found.shape == (8, expected)
    assert found.min() >= 0
    assert found.max() < count
    assert all(len(set(row)) == expected for row in found.tolist()), "none twice"


def test_every_patch_is_kept_as_often() -> None:
    """Each in a quarter of 20,000 masks, within five standard deviations, and independently of its neighbour."""
    draws = 20_000
    found = kept_patches(1, np.arange(draws), 0, num_patches=16, mask_ratio=0.75)
    shown = torch.zeros(draws, 16).scatter(1, found, 1.0)
    deviation = (draws * 0.25 * 0.75) ** 0.5
    assert (shown.sum(0) - draws / 4).abs().max() < 5 * deviation
    both = (shown.T @ shown).fill_diagonal_(draws * 4 * 3 / (16 * 15))  # a pair: 4 of 16, then 3 of 15
    assert (both - draws * 4 * 3 / (16 * 15)).abs().max() < 5 * (draws * 0.05) ** 0.5


@pytest.mark.parametrize("ratio", [0.95, 0.99])
def test_a_mask_that_hides_everything_is_refused(ratio: float) -> None:
    with pytest.raises(UsageError) as caught:
        kept_patches(0, np.arange(2), 0, num_patches=16, mask_ratio=ratio)
    assert str(caught.value) == f"distill.mask_ratio {ratio} hides all of the student's 16 patches; lower it"
