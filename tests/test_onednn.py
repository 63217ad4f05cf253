"""Linear layers and attention in oneDNN's shapes: the same numbers and gradients as PyTorch's own."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from toolchain.models import onednn
from toolchain.models.onednn import on_onednn

CPU = torch.device("cpu")
needs_mkl = pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="PyTorch does not use MKL here")
CLOSE = {"rtol": 1e-4, "atol": 1e-5}  # float32 sums of some hundred products, in another order


@pytest.fixture
def small_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers of any size run as large ones do: what is tested must not need a large one."""
    monkeypatch.setattr(onednn, "_FEW_PRODUCTS", 0)


def gradients(module: nn.Module, call: Callable[[Tensor], Tensor], x: Tensor) -> list[Tensor]:
    """The output, and the gradients of input and parameters for a made-up loss."""
    x = x.clone().requires_grad_()
    y = call(x)
    weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(5), dtype=y.dtype)
    module.zero_grad()
    (y * weight).sum().backward()  # type: ignore[no-untyped-call]
    return [y.detach(), x.grad, *(p.grad.clone() for p in module.parameters() if p.grad is not None)]  # type: ignore[list-item]


def same(module: nn.Module, call: Callable[[Tensor], Tensor], x: Tensor) -> None:
    plain = gradients(module, call, x)
    with on_onednn(CPU):
        changed = gradients(module, call, x)
    assert len(plain) == len(changed) > 2
    for a, b in zip(plain, changed, strict=True):
        torch.testing.assert_close(b, a, **CLOSE)


def kernels(call: Callable[[], object]) -> set[str]:
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        call()
    return {event.key for event in profiled.key_averages()}


@pytest.mark.usefixtures("small_too")
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(64, 96), (4, 50, 96), (2, 3, 30, 96), (1, 1, 96)])
def test_a_linear_layer_is_the_same(bias: bool, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(96, 200, bias=bias)
    same(layer, layer, torch.randn(shape))


@pytest.mark.usefixtures("small_too")
def test_inputs_that_are_not_contiguous_and_empty_ones_are_the_same() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(96, 64)
    same(layer, lambda x: layer(x.transpose(0, 1)), torch.randn(50, 8, 96))
    with on_onednn(CPU):
        assert layer(torch.empty(0, 96)).shape == (0, 64)


@needs_mkl
def test_a_float32_linear_layer_runs_as_a_convolution_and_a_float64_one_does_not() -> None:
    x = torch.randn(512, 256)
    layer = nn.Linear(256, 512)
    with torch.no_grad(), on_onednn(CPU):
        assert "aten::mkldnn_convolution" in kernels(lambda: layer(x))
        assert "aten::mkldnn_convolution" not in kernels(lambda: layer.double()(x.double()))
        small = nn.Linear(64, 64)
        assert "aten::mkldnn_convolution" not in kernels(lambda: small(x[:, :64])), "a small one gains nothing"
    assert "aten::mkldnn_convolution" not in kernels(lambda: layer.float()(x)), "only within"


@pytest.mark.usefixtures("small_too")
@pytest.mark.parametrize("masked", [None, "causal", "per head"])
@pytest.mark.parametrize("bias", [True, False])
def test_self_attention_is_the_same(masked: str | None, bias: bool) -> None:
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(64, 4, batch_first=True, bias=bias)
    mask = {
        None: None,
        "causal": torch.full((20, 20), -torch.inf).triu(1),
        "per head": torch.randn(4 * 4, 20, 20),
    }[masked]
    same(attention, lambda x: attention(x, x, x, need_weights=False, attn_mask=mask)[0], torch.randn(4, 20, 64))


@pytest.mark.usefixtures("small_too")
def test_attention_that_asks_for_one_token_is_the_same() -> None:
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(64, 4, batch_first=True)
    mask = torch.randn(4 * 4, 1, 20)
    same(attention, lambda x: attention(x[:, :1], x, x, need_weights=False, attn_mask=mask)[0], torch.randn(4, 20, 64))


@pytest.mark.usefixtures("small_too")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_attention_in_other_precisions_is_near_its_own_reference(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(64, 4, batch_first=True).eval()
    x = torch.randn(4, 20, 64)
    with torch.no_grad():
        reference = attention(x, x, x, need_weights=False)[0]
        attention, x = attention.to(dtype), x.to(dtype)
        with on_onednn(CPU):
            found = attention(x, x, x, need_weights=False)[0]
    assert found.dtype == dtype
    # bfloat16 keeps 8 bits: two roundings of values near 1
    assert (found.float() - reference).abs().max() < (0.02 if dtype == torch.bfloat16 else 1e-6)


@pytest.mark.usefixtures("small_too")
@pytest.mark.parametrize(
    ("made", "called"),
    [
        ({"add_bias_kv": True}, {}),
        ({"add_zero_attn": True}, {}),
        ({"kdim": 32, "vdim": 32}, {}),
        ({}, {"need_weights": True}),
        ({}, {"key_padding_mask": torch.arange(20)[None] >= torch.tensor([[20], [15], [3], [9]])}),
    ],
)
def test_attention_of_another_kind_is_left_alone(made: dict[str, object], called: dict[str, object]) -> None:
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(64, 4, batch_first=True, **made)  # type: ignore[arg-type]
    x, other = torch.randn(4, 20, 64), torch.randn(4, 20, 32 if "kdim" in made else 64)
    arguments = {"need_weights": False} | called
    plain, weights = attention(x, other, other, **arguments)
    with on_onednn(CPU):
        found, found_weights = attention(x, other, other, **arguments)
    torch.testing.assert_close(found, plain, **CLOSE)
    assert (weights is None) == (found_weights is None)


@pytest.mark.usefixtures("small_too")
def test_dropout_of_attention_is_drawn_as_torch_draws_it() -> None:
    attention = nn.MultiheadAttention(64, 4, batch_first=True, dropout=0.5)
    x = torch.randn(4, 20, 64, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(1)
    plain = attention(x, x, x, need_weights=False)[0]
    torch.manual_seed(1)
    with on_onednn(CPU):
        found = attention(x, x, x, need_weights=False)[0]
    torch.testing.assert_close(found, plain, **CLOSE)


@needs_mkl
def test_autocast_compiled_towers_and_gpus_are_left_alone() -> None:
    inactive = [on_onednn(CPU, compiled=True), on_onednn(torch.device("cuda"))]
    with torch.autocast("cpu", torch.bfloat16):
        inactive.append(on_onednn(CPU))
    active = on_onednn(CPU)
    assert all(type(context) is not type(active) for context in inactive)


@pytest.mark.parametrize("channels", [1, 3, 7])
@pytest.mark.parametrize("bias", [False, True])
def test_a_convolution_on_which_onednn_crashes_is_computed_from_the_pixels_it_reads(channels: int, bias: bool) -> None:
    torch.manual_seed(0)
    convolution = nn.Conv2d(channels, 48, 1, 2, bias=bias)
    x_BCHW = torch.randn(2, channels, 33, 32)
    expected = copy.deepcopy(convolution).double()  # float64 and contiguous does not run in oneDNN
    y_BCHW = expected(x_BCHW.double())
    convolution.to(memory_format=torch.channels_last)
    for _ in range(3):
        convolution.zero_grad()
        with on_onednn(CPU):
            found_BCHW = convolution(x_BCHW.to(memory_format=torch.channels_last))
        (found_BCHW * y_BCHW.detach().float()).sum().backward()
    (y_BCHW * y_BCHW.detach()).sum().backward()
    torch.testing.assert_close(found_BCHW.double(), y_BCHW, rtol=1e-5, atol=1e-5)  # a sum of at most 8 products
    torch.testing.assert_close(convolution.weight.grad.double(), expected.weight.grad, rtol=1e-4, atol=1e-3)
