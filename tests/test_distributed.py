"""Two processes with half the batch each compute what one does with all of it: real gloo processes, in float64."""

import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from conftest import STUDENT, Ended, tiny_training_set
from golden import golden_values
from timm.layers import BatchNormAct2d
from torch import Tensor, nn
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure
from two_processes import spawn

from toolchain import torchrun
from toolchain.data.glyph_batches import GlyphBatches
from toolchain.data.glyphs import training_set
from toolchain.distillation.batch_norms import synchronize_batch_norms
from toolchain.distillation.distill import Training, distill
from toolchain.distillation.features import BatchFeatures, TeacherFeatures, gather_features
from toolchain.distillation.forward_pass import Forward
from toolchain.distillation.heads import DistillationHeads
from toolchain.distillation.loader import PreparedBatch
from toolchain.distillation.objectives import OBJECTIVES, paper_weight, weighted_loss
from toolchain.distillation.teacher_cache import TeacherCache, TeacherCaches
from toolchain.distillation.training_module import TrainingModule, make_optimizer
from toolchain.distributed import ALONE, Processes
from toolchain.errors import ClipkdError, Interrupted, UsageError
from toolchain.models.build import load_model
from toolchain.models.last_block import encode_class_token
from toolchain.models.text_trimming import encode_tokens, trim_tokens
from toolchain.recipe.distill import DistillSpec, LossWeights

BATCH, STUDENT_WIDTH, TOKENS, STEP, SEED = 8, 16, 10, 5, 3
TRAIN_STEPS, TRAIN_BATCH = 50, 16
MAX_GRADIENT_ERROR = 1e-9  # of the norm of all gradients: float64, summed in another order
MAX_WEIGHT_ERROR = 1e-9  # after 12 or 50 steps in float64
GOLDEN_RTOL = 1e-10
TOWER = {
    "embed_dim": STUDENT_WIDTH,
    "vision_cfg": {"image_size": 16, "layers": 2, "width": 32, "head_width": 16, "patch_size": 4},
    "text_cfg": {"context_length": 10, "vocab_size": 64, "width": 32, "heads": 2, "layers": 2},
}
OF_SOFTMAXES = [name for name in OBJECTIVES if name != "sigmoid_kd"]
CASES = [*({name: 1.0} for name in OBJECTIVES), dict.fromkeys(OF_SOFTMAXES, 1.0), {"task": 1.0, "sigmoid_kd": 1.0}]
WIDTHS = [STUDENT_WIDTH, 24]
TWO_TEACHERS = dict.fromkeys(OF_SOFTMAXES, 1.0), (STUDENT_WIDTH, 24 - STUDENT_WIDTH)
NORMS = [((8, 5), nn.BatchNorm1d), ((8, 5, 4, 3), nn.BatchNorm2d), ((8, 5, 4, 3), BatchNormAct2d)]


@pytest.fixture(scope="module")
def both() -> dict[str, list[Any]]:
    """Every job below, by two processes that start once."""
    jobs = {
        **{f"{names(weights)} {width}": (gradients, weights, width, 0.0) for weights in CASES for width in WIDTHS},
        **{
            f"{names(weights)} {width} in parts": (gradients, weights, width, 0.0, 2)
            for weights in CASES
            for width in WIDTHS
        },
        **{f"trained in {accumulate}": (weights_after_training, accumulate) for accumulate in (1, 2, 8)},
        **{f"two teachers {n}": (gradients, TWO_TEACHERS[0], 24, 0.0, n, TWO_TEACHERS[1]) for n in (1, 2)},
        "patch dropout": (gradients, {"task": 1.0}, 24, 0.5),
        "golden": (golden_rows,),
        "collectives": (collectives,),
        **{f"norm {shape} {cls.__name__}": (normalized, shape, cls) for shape, cls in NORMS},
        **{rule: (trained_convolutional, rule) for rule in ("all_processes", "per_process")},
        "frozen": (trained_convolutional, "frozen", 3),
    }
    return dict(zip(jobs, spawn(list(jobs.values())), strict=True))


def names(weights: dict[str, float]) -> str:
    return "+".join(weights)


# The whole path: towers, masks, heads, gathering, every objective.


def made_student(net: open_clip.CLIP) -> SimpleNamespace:
    return SimpleNamespace(
        net=net,
        embed_dim=STUDENT_WIDTH,
        has_teachers_text=False,
        normalise=lambda pixels: pixels.double() / 127.5 - 1,
        probe_fast_paths=lambda: None,
        encode_image=lambda values: encode_class_token(net.visual, values),
        encode_text=lambda ids: encode_tokens(net, trim_tokens(net, ids)),
    )


def gradients(
    processes: Processes,
    weights: dict[str, float],
    teacher_width: int,
    patch_dropout: float,
    accumulate: int = 1,
    widths: tuple[int, ...] = (),
) -> Any:
    """One step's loss terms and gradients, heads included, as the training loop computes them."""
    torch.manual_seed(SEED if processes.leads else 77)  # the others start elsewhere, and are brought into line
    tower = TOWER | {"vision_cfg": TOWER["vision_cfg"] | {"patch_dropout": patch_dropout}}  # type: ignore[operator]
    tower |= {"init_logit_bias": -3.0} if "sigmoid_kd" in weights else {}
    net = open_clip.CLIP(**tower)
    spec = DistillSpec(
        steps=9, batch_size=BATCH, lr=1, warmup=0, mask_ratio=0.5, accumulate=accumulate, loss_memory_mb=0.001,
        loss_weights=LossWeights(**dict.fromkeys(OBJECTIVES, 0.0) | weights),
    )  # fmt: skip
    student = made_student(net)
    teacher: Any = SimpleNamespace(embed_dim=teacher_width)
    if widths:
        teacher = TeacherCaches(tuple(TeacherCache(Path(), {"embed_dim": width}) for width in widths))
    trained = TrainingModule(student, teacher, spec, processes).double()  # type: ignore[arg-type]
    with torch.no_grad():
        net.logit_scale.fill_(math.log(5.0))  # so that no softmax is one-hot
    module = processes.data_parallel(trained.train())
    random = torch.Generator().manual_seed(1)
    pixels = torch.randint(256, (BATCH, 3, 16, 16), generator=random, dtype=torch.uint8)
    ids = torch.randint(1, 63, (BATCH, TOKENS), generator=random)
    ids[:, 6], ids[:, 7:] = 63, 0  # the end of the text, and padding
    unit = [torch.randn(BATCH, teacher_width, generator=random, dtype=torch.float64) for _ in range(2)]
    image_BE, text_BE = (
        torch.cat([torch.nn.functional.normalize(part, dim=-1) for part in x.split(widths or teacher_width, 1)], 1)
        for x in unit
    )
    rows = processes.rows(BATCH)
    batch = PreparedBatch(pixels[rows], ids[rows], None, None, [], np.arange(100, 100 + BATCH)[rows], 0)
    scales = torch.tensor(4.0, dtype=torch.float64), torch.tensor(-2.0, dtype=torch.float64)
    taught = TeacherFeatures(image_BE[rows], text_BE[rows], *scales)
    if widths:
        scales = (torch.stack([scale, 2 * scale]) for scale in scales)
        taught = TeacherFeatures(image_BE[rows], text_BE[rows], *scales, widths)
    forward = Forward(trained, module, spec, processes, SEED)
    done = forward.run(batch, taught, STEP)
    forward.backward(done, batch, STEP)
    found = {name: p.grad for name, p in trained.named_parameters() if p.requires_grad}
    assert all(gradient is not None for gradient in found.values()), [n for n, g in found.items() if g is None]
    return found | {f"term {name}": term.detach() for name, term in done.terms.items()}


def weights_after_training(processes: Processes, accumulate: int) -> Any:
    """The weights after 50 steps of AdamW on glyphs with every objective, in float64."""
    net = open_clip.CLIP(**TOWER)
    student = made_student(net)
    spec = DistillSpec(
        steps=TRAIN_STEPS, batch_size=TRAIN_BATCH, lr=1e-3, warmup=5, mask_ratio=0.5, accumulate=accumulate,
        loss_memory_mb=0.001, loss_weights=LossWeights(**dict.fromkeys(OF_SOFTMAXES, 0.1)),
    )  # fmt: skip
    torch.manual_seed(SEED)
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    trained = TrainingModule(student, SimpleNamespace(embed_dim=24), spec, processes).double().train()  # type: ignore[arg-type]
    forward = Forward(trained, processes.data_parallel(trained), spec, processes, SEED)
    optimizer = make_optimizer(trained, spec)
    samples, rows = training_set(), processes.rows(TRAIN_BATCH)
    shown = torch.from_numpy(samples.masks_NSS[: TRAIN_STEPS * TRAIN_BATCH : 1, ::4, ::4][:, :16, :16].copy())
    random = torch.Generator().manual_seed(4)
    for step in range(TRAIN_STEPS):
        pixels = shown[step * TRAIN_BATCH : (step + 1) * TRAIN_BATCH, None].expand(-1, 3, -1, -1).to(torch.uint8)[rows]
        ids = torch.randint(1, 63, (TRAIN_BATCH, TOKENS), generator=random)
        ids[:, 6], ids[:, 7:] = 63, 0
        unit = [torch.randn(TRAIN_BATCH, 24, generator=random, dtype=torch.float64) for _ in range(2)]
        taught = TeacherFeatures(
            *(torch.nn.functional.normalize(x, dim=-1)[rows] for x in unit), torch.tensor(4.0, dtype=torch.float64)
        )
        sample_b = np.arange(TRAIN_BATCH)[rows] + step * TRAIN_BATCH
        batch = PreparedBatch(pixels, ids[rows], None, None, [], sample_b, 0)
        optimizer.zero_grad()
        forward.backward(forward.run(batch, taught, step), batch, step)
        optimizer.step()
        trained.clamp_parameters_()
    return {name: value.detach() for name, value in trained.named_parameters()}


@pytest.mark.parametrize(("ranks", "accumulate"), [(1, 2), (1, 8), (2, 1), (2, 2), (2, 8)])
def test_training_in_parts_ends_with_the_same_weights(
    both: dict[str, list[Any]], ranks: int, accumulate: int, whole_batches: dict[str, Tensor]
) -> None:
    if ranks == 1:
        found = weights_after_training(ALONE, accumulate)
    else:
        found, other = both[f"trained in {accumulate}"]
        assert all(torch.equal(value, other[name]) for name, value in found.items())
    assert found.keys() == whole_batches.keys()
    for name, value in whole_batches.items():
        error = (found[name] - value).abs().max().item()
        assert error <= MAX_WEIGHT_ERROR * max(1.0, value.abs().max().item()), (name, error)


@pytest.fixture(scope="module")
def whole_batches() -> dict[str, Tensor]:
    found: dict[str, Tensor] = weights_after_training(ALONE, 1)
    return found


@pytest.mark.parametrize("teacher_width", WIDTHS)
@pytest.mark.parametrize("weights", CASES, ids=names)
def test_two_processes_and_any_number_of_parts_have_the_gradients_of_one(
    both: dict[str, list[Any]], weights: dict[str, float], teacher_width: int
) -> None:
    expected = gradients(ALONE, weights, teacher_width, 0.0)
    norm = torch.stack([value.norm() for name, value in expected.items() if not name.startswith("term")]).norm()
    assert norm > 0
    in_parts = [gradients(ALONE, weights, teacher_width, 0.0, parts) for parts in (2, 8)]
    key = f"{names(weights)} {teacher_width}"
    for found in (*both[key], *both[f"{key} in parts"], *in_parts):
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            error = (found[name] - value).norm()
            assert error <= MAX_GRADIENT_ERROR * norm, (name, error)


def test_two_processes_and_parts_have_the_gradients_of_one_with_two_teachers(both: dict[str, list[Any]]) -> None:
    weights, widths = TWO_TEACHERS
    expected = gradients(ALONE, weights, 24, 0.0, 1, widths)
    norm = torch.stack([value.norm() for name, value in expected.items() if not name.startswith("term")]).norm()
    for found in (*both["two teachers 1"], *both["two teachers 2"], gradients(ALONE, weights, 24, 0.0, 8, widths)):
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert (found[name] - value).norm() <= MAX_GRADIENT_ERROR * norm, name


def test_patch_dropout_is_drawn_by_sample(both: dict[str, list[Any]]) -> None:
    weights = {"task": 1.0}
    expected, whole = gradients(ALONE, weights, 24, 0.5), gradients(ALONE, weights, 24, 0.0)
    assert not torch.equal(expected["term task"], whole["term task"]), "patches were dropped"
    for found in both["patch dropout"]:
        torch.testing.assert_close(found["term task"], expected["term task"], rtol=MAX_GRADIENT_ERROR, atol=0)


# Batch norms: their statistics and gradients are of all rows.


def normalized(processes: Processes, shape: tuple[int, ...], norm_class: type[nn.Module]) -> dict[str, Tensor]:
    """One pass through a batch norm, of three rows in the first process and five in the second, or of all eight."""
    torch.manual_seed(SEED)
    norm = norm_class(shape[1]).double().train()
    nn.init.normal_(norm.weight)  # type: ignore[arg-type]
    x, gradient = torch.randn(2, *shape, dtype=torch.float64) * 3 + 1
    rows = slice(None) if processes.size == 1 else slice(0, 3) if processes.leads else slice(3, None)
    x = x[rows].requires_grad_()
    synchronize_batch_norms(norm, processes)
    y = norm(x)
    y.backward(gradient[rows])
    found = {"y": y.detach(), "dx": x.grad, "dweight": norm.weight.grad, "dbias": norm.bias.grad}
    norm.eval()
    return found | {"eval": norm(x).detach()} | dict(norm.state_dict())  # type: ignore[return-value]


@pytest.mark.parametrize(("shape", "norm_class"), NORMS, ids=str)
def test_a_batch_norm_is_of_the_rows_of_all_processes(
    both: dict[str, list[Any]], shape: tuple[int, ...], norm_class: type[nn.Module]
) -> None:
    expected, found = normalized(ALONE, shape, norm_class), both[f"norm {shape} {norm_class.__name__}"]
    rows = [torch.cat([each[name] for each in found]) for name in ("y", "dx", "eval")]
    torch.testing.assert_close(rows, [expected["y"], expected["dx"], expected["eval"]])
    for name in ("dweight", "dbias"):  # here, the gradients of a process's own rows
        torch.testing.assert_close(found[0][name] + found[1][name], expected[name])
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        assert torch.equal(found[0][name], found[1][name])
        torch.testing.assert_close(found[0][name], expected[name])


def trained_convolutional(processes: Processes, batch_norm: str, accumulate: int = 1) -> dict[str, Tensor]:
    """The state of the glyphs student, a ResNet, after 12 steps: in float64, since rounding grows with every step."""
    student = load_model(STUDENT, random_seed=SEED)
    student.net.double().visual.register_forward_pre_hook(lambda _, inputs: (inputs[0].double(),))  # type: ignore[union-attr]
    spec = DistillSpec(steps=12, batch_size=12, lr=1e-3, warmup=3, batch_norm=batch_norm, accumulate=accumulate)
    if batch_norm == "frozen":  # needs statistics
        student.net.train().visual(torch.rand(32, 3, 32, 32, generator=torch.Generator().manual_seed(SEED)))  # type: ignore[operator]
    training = Training(spec, student, None, GlyphBatches(tiny_training_set(), SEED, 12, 2), seed=SEED)
    with tempfile.TemporaryDirectory() as folder:
        distill(training, Path(folder), lambda *_: None, processes=processes)
    return {name: value.detach() for name, value in student.net.state_dict().items()}


def relative_difference(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    assert found.keys() == expected.keys(), "the names in a checkpoint are those of plain batch norms"
    names = [name for name, value in expected.items() if value.is_floating_point()]
    norm = torch.stack([expected[name].norm() for name in names]).norm()
    return float(torch.stack([(found[name] - expected[name]).norm() for name in names]).norm() / norm)


def test_two_processes_train_a_convolutional_student_as_one(both: dict[str, list[Any]]) -> None:
    """In float32, 12 steps of 64 differ by 2e-4; rounding the initial weights once makes a difference of 8e-4."""
    expected = trained_convolutional(ALONE, "all_processes")
    for found in both["all_processes"]:
        assert relative_difference(found, expected) < MAX_WEIGHT_ERROR
    for found in both["per_process"]:
        assert relative_difference(found, expected) > 0.005, "the rule that was asked for"


def test_frozen_batch_norms_are_exact_in_any_number_of_processes_and_parts(both: dict[str, list[Any]]) -> None:
    expected = trained_convolutional(ALONE, "frozen")
    for found in (
        trained_convolutional(ALONE, "frozen", 2),
        trained_convolutional(ALONE, "frozen", 12),
        *both["frozen"],
    ):
        assert relative_difference(found, expected) < MAX_WEIGHT_ERROR
    name = next(name for name in expected if name.endswith("running_mean"))
    assert expected[name].any(), "the statistics it started from"


def test_the_default_of_batch_norm_is_not_in_the_key_of_a_stage() -> None:
    """Students that one process trained before the field came are still those of their recipes."""
    fields = {"steps": 9, "batch_size": 8, "lr": 1, "warmup": 0}
    key = DistillSpec(**fields).key_fields()
    assert "batch_norm" not in key
    assert DistillSpec(**fields, batch_norm="per_process").key_fields() == key | {"batch_norm": "per_process"}
    cache = {"dtype": "float16", "path": "runs/other"}
    assert DistillSpec(**fields, teacher_cache=cache).key_fields()["teacher_cache"] == {"dtype": "float16"}


# Against the reference's own two processes.


def golden_rows(processes: Processes) -> dict[str, Tensor]:
    """The gradient of the published recipe in one process's raw features, as the released code ran it."""
    inputs = {name: torch.from_numpy(value) for name, value in golden_values("eq32.in").items()}
    rows = processes.rows(8)
    image, text = (inputs[name][rows].clone().requires_grad_() for name in ("s_img_raw", "s_txt_raw"))
    width = inputs["t_img"].shape[1]
    weights = {"task": 1.0, "crd": 1.0, "icl": 1.0, "fd": paper_weight("fd", width=width), "gd": 1.0}
    heads = DistillationHeads(width, width, weights, reference_compat=True).double()
    with torch.no_grad():
        heads.log_cross_logit_scale.fill_(math.log(1 / 0.07))  # type: ignore[union-attr]
    local = TeacherFeatures(inputs["t_img"][rows], inputs["t_txt"][rows], inputs["t_scale"])
    own = BatchFeatures(heads(image, text, local), local)
    everyone, scales = gather_features(own, processes.gather), heads.scales(inputs["s_scale"])
    _, terms = weighted_loss(own, everyone, scales, weights, processes, divides_by_scales=True)
    recipe = weights | {"gd": 0.0}
    weighted_loss(own, everyone, scales, recipe, processes)[0].backward()  # type: ignore[no-untyped-call]
    assert image.grad is not None
    assert text.grad is not None
    return {"s_img_raw_local": image.grad, "s_txt_raw_local": text.grad} | {n: t.detach() for n, t in terms.items()}


def test_rows_are_those_of_the_released_code_times_the_number_of_processes(both: dict[str, list[Any]]) -> None:
    """Without gather_with_grad its mean over processes is the gradient over their number; ours is the gradient."""
    factors = {"fd": 32, "gd": 8**2 * 32}
    for rank, found in enumerate(both["golden"]):
        expected = golden_values(f"ddp2.eq32.gather_with_grad=False.rank{rank}")
        for name in ("task", "crd", "icl", "fd", "gd"):
            assert found[name].item() == pytest.approx(factors.get(name, 1) * expected[f"loss.{name}"], rel=GOLDEN_RTOL)
        for name in ("s_img_raw_local", "s_txt_raw_local"):
            value = expected[f"grad_total.{name}"]
            largest = np.abs(value).max()
            np.testing.assert_allclose(found[name].numpy() / 2, value, rtol=GOLDEN_RTOL, atol=1e-12 * largest)


# Small things.


def test_a_batch_that_cannot_be_shared_is_refused() -> None:
    with pytest.raises(UsageError, match=r"batch_size 10 cannot be split evenly over 4 ranks.* can: 8"):
        Processes(0, 4, torch.device("cpu")).rows(10)


def test_alone_nothing_is_copied() -> None:
    rows = torch.randn(3, 2)
    assert ALONE.gather(rows) is rows
    assert ALONE.data_parallel(torch.nn.Linear(1, 1)).__class__ is torch.nn.Linear
    assert ALONE.any(True)
    assert not ALONE.any(False)
    assert ALONE.broadcast("x") == "x"


def collectives(processes: Processes) -> dict[str, Any]:
    mine = torch.arange(processes.rank, 5, 2, dtype=torch.float32)[:, None]
    return {
        "any": processes.any(processes.rank == 1),
        "any of each": processes.any_of_each(processes.leads, False, not processes.leads, True),
        "none": processes.any(False),
        "share": processes.broadcast(f"from {processes.rank}"),
        "rows": processes.gather_rows(mine, 5),
    }


def test_collectives(both: dict[str, list[Any]]) -> None:
    for found in both["collectives"]:
        assert found["any"] is True
        assert found["any of each"] == [True, False, True, True]
        assert found["none"] is False
        assert found["share"] == "from 0"
        assert found["rows"][:, 0].tolist() == [0, 1, 2, 3, 4]


def test_a_rank_is_read_from_torchruns_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert (torchrun.rank(), torchrun.local_rank(), torchrun.world_size(), torchrun.leads()) == (0, 0, 1, True)
    for name, value in {"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8"}.items():
        monkeypatch.setenv(name, value)
    assert (torchrun.rank(), torchrun.local_rank(), torchrun.world_size(), torchrun.leads()) == (5, 1, 8, False)


def test_processes_that_cannot_meet_say_how_to_start() -> None:
    script = "from toolchain.distributed import join_processes; join_processes()"
    environment = os.environ | {"RANK": "0", "WORLD_SIZE": "2"}
    environment.pop("MASTER_ADDR", None)
    ended = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert "torchrun --nproc-per-node" in ended.stderr


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("[gloo/transport/tcp/pair.cc:545] Read error [127.0.0.1]:9: Connection reset by peer. A cause"),
        torch.distributed.DistBackendError("NCCL error: remote process exited. A cause\nA stack"),
    ],
    ids=["gloo", "nccl"],
)
def test_a_rank_that_loses_another_says_so(error: RuntimeError) -> None:
    first = str(error).partition(". ")[0]
    with pytest.raises(ClipkdError) as caught, Processes(1, 2, torch.device("cpu")).explain_lost_rank():
        raise error
    assert str(caught.value).startswith(f"rank 1 of 2 lost its connection to another rank ({first}). That rank ended")
    assert "A cause" not in str(caught.value)
    for processes, other in ((ALONE, error), (Processes(1, 2, torch.device("cpu")), RuntimeError("a shape"))):
        with pytest.raises(type(other)) as caught_too, processes.explain_lost_rank():
            raise other
        assert caught_too.value is other


def test_a_stopped_training_says_one_sentence_and_torchrun_knows_why(
    clipkd: Callable[..., Ended], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def stop(*_: object, **__: object) -> None:
        raise Interrupted("stopped after step 5 of 9; run the same command to resume")

    monkeypatch.setattr("toolchain.recipe.load.load_recipe", stop)
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    for rank, said in (("0", "error: stopped after step 5 of 9; run the same command to resume"), ("1", "")):
        monkeypatch.setenv("RANK", rank)
        ended = clipkd("show", "glyphs")
        assert (ended.code, ended.err.strip()) == (130, said)
        failure = ProcessFailure(int(rank), 99, 130, str(tmp_path / "error.json"))
        assert failure.message == "stopped after step 5 of 9; run the same command to resume"
        assert abs(failure.timestamp - time.time()) < 60, "or torchrun takes it for the first failure of all"
        (tmp_path / "error.json").unlink()
