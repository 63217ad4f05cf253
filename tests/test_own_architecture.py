"""An architecture of one's own: the folder that docs/method.md describes is trained, adopted and exported."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import REPOSITORY, Ended

from toolchain.models.build import load_model

PAGE = (REPOSITORY / "docs" / "method.md").read_text(encoding="utf-8").partition("## An architecture of your own")[2]


def code(language: str) -> str:
    """Return the first block of a language in the section."""
    found = re.search(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)
    assert found is not None
    return found[1]


@pytest.fixture
def my_student(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder, made by the code of the page."""
    monkeypatch.chdir(tmp_path)
    captions = [f"{size} {letter} number {number}" for size in ("small", "tall") for letter in "abc" for number in "12"]
    (tmp_path / "captions.txt").write_text("\n".join(captions), encoding="utf-8")
    exec(code("python"), {})
    folder = tmp_path / "my_student"
    (folder / "open_clip_config.json").write_text(code("json"), encoding="utf-8")
    assert {path.name for path in folder.iterdir()} == {
        "open_clip_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    return folder


def test_the_described_folder_is_a_model(my_student: Path) -> None:
    model = load_model(my_student, random_seed=0)
    ids_BT = model.tokenize(["a small a", "TALL"])
    assert ids_BT.shape == (2, 16)
    assert ids_BT[:, 0].tolist() == [1, 1]
    assert (ids_BT == 2).sum(1).tolist() == [1, 1], "each caption has its end token"
    assert int(ids_BT.max()) < json.loads(code("json"))["model_cfg"]["text_cfg"]["vocab_size"]


def test_it_is_trained_and_what_was_trained_is_adopted(
    my_student: Path, tiny_recipe: Callable[..., Path], clipkd: Callable[..., Ended], tmp_path: Path
) -> None:
    recipe: Any = tiny_recipe(student={"model": str(my_student)})
    assert clipkd("distill", recipe, "--out", tmp_path / "run").code == 0
    trained = tmp_path / "run" / "student"
    assert (trained / "tokenizer.json").read_bytes() == (my_student / "tokenizer.json").read_bytes()
    adopted = clipkd("adopt", trained, "--like", recipe, "--out", tmp_path / "adopted")
    assert adopted.code == 0, adopted.err
    assert load_model(tmp_path / "adopted" / "adopted").config == load_model(trained).config
