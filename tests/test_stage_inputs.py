"""What a recipe has wrong with its data is said before a model is loaded."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Ended, make_shards

import toolchain.models.build


@pytest.mark.parametrize("command", ["distill", "cache"])
@pytest.mark.parametrize(
    ("shards", "changes", "said"),
    [
        ("missing.tar", {}, "missing.tar"),
        ("shards/00000.tar", {"batch_size": 64}, "or lower the batch size, distill.batch_size"),
        ("shards/00000.tar", {"accumulate": 3}, "cannot split 8 samples (distill.batch_size 8 over 1 rank) into"),
        ("shards/00000.tar", {"steps": None, "epochs": 2, "warmup": 9}, "must be less than the 2 steps of 2 epochs"),
    ],
    ids=["missing", "too few", "uneven parts", "only warm-up"],
)
def test_data_are_checked_before_models_are_loaded(
    clipkd: Callable[..., Ended],
    tiny_recipe: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    command: str,
    shards: str,
    changes: dict[str, Any],
    said: str,
) -> None:
    make_shards(tmp_path / "shards", 1, 12, sizes=(40, 60))

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a model was loaded first")

    monkeypatch.setattr(toolchain.models.build, "build_model", refuse)
    monkeypatch.setattr(toolchain.models.build, "load_model", refuse)
    data = {"kind": "webdataset", "shards": [str(tmp_path / shards)], "views": 2}
    distill = {"steps": 3, "batch_size": 8, "lr": 1e-3, "warmup": 0, "teacher_cache": {}} | changes
    ended = clipkd(command, tiny_recipe(data=data, distill=distill), "--out", tmp_path / "run")
    assert ended.code == 2, ended.err
    assert said in ended.err


def test_too_few_samples_to_quantize_are_told_before_the_training(
    clipkd: Callable[..., Ended], tiny_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    make_shards(tmp_path / "shards", 1, 12, sizes=(40, 60))
    recipe = tiny_recipe(
        data={"kind": "webdataset", "shards": [str(tmp_path / "shards" / "00000.tar")]},
        quantize={"method": "ptq"},
        export={"precisions": ["fp32", "int8"]},
    )
    ended = clipkd("distill", recipe, "--out", tmp_path / "run")
    assert ended.code == 2
    assert "12 sample(s) in 1 shard(s) are fewer than a batch of 128; " in ended.err
    assert ended.err.endswith("or lower the batch size, quantize.batch_size\n")
    assert not (tmp_path / "run" / "teacher").exists()
    ended = clipkd("distill", recipe, "--out", tmp_path / "run", "--set", "export.precisions=[fp32]", "--json")
    assert ended.code == 0, "nothing will be quantized"
