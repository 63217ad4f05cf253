"""What a recipe has wrong with its data is said before a model is loaded."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Ended, make_shards

import toolchain.models.build


@pytest.mark.parametrize("command", ["distill", "cache"])
@pytest.mark.parametrize(
    ("shards", "batch_size", "said"),
    [("missing.tar", 8, "missing.tar"), ("shards/00000.tar", 64, "distill.batch_size")],
    ids=["missing", "too few"],
)
def test_data_are_checked_before_models_are_loaded(
    clipkd: Callable[..., Ended],
    tiny_recipe: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    command: str,
    shards: str,
    batch_size: int,
    said: str,
) -> None:
    make_shards(tmp_path / "shards", 1, 12, sizes=(40, 60))

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a model was loaded first")

    monkeypatch.setattr(toolchain.models.build, "build_model", refuse)
    monkeypatch.setattr(toolchain.models.build, "load_model", refuse)
    data = {"kind": "webdataset", "shards": [str(tmp_path / shards)], "views": 2}
    distill = {"steps": 3, "batch_size": batch_size, "lr": 1e-3, "warmup": 0, "teacher_cache": {}}
    ended = clipkd(command, tiny_recipe(data=data, distill=distill), "--out", tmp_path / "run")
    assert ended.code == 2, ended.err
    assert said in ended.err
