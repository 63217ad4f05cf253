"""YAML and JSON that users write: nothing that is in a file is dropped without a message."""

import json
from pathlib import Path

import pytest
import yaml
from conftest import REPOSITORY, STUDENT

from export.devices.registry import config_file, read_devices
from toolchain.errors import ArtifactError, UsageError
from toolchain.evaluation.open_sets import open_set
from toolchain.models.build import load_model
from toolchain.recipe.evaluate import FolderSet, KarpathySet
from toolchain.recipe.model_names import CONFIG
from toolchain.report.external_rows import external_rows
from toolchain.user_documents import InvalidDocument, decode_document, parse_json, parse_yaml


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: 1\nb: 2\na: 3\n", "a is written twice, in lines 1 and 3."),
        ("distill:\n  lr: 1\ndistill:\n  steps: 2\n", "distill is written twice, in lines 1 and 3."),
        ("s:\n  - {x: 1}\n  - x: 1\n    y: {k: 1,\n      k: 1}\n", "k is written twice, in lines 4 and 5."),
        ("{a: 1, a: 1, b: 2, b: 2}", "a is written twice, in line 1; b is written twice, in line 1."),
        ("a: 1\n\"a\": 2\n", "a is written twice, in lines 1 and 2."),
        ("no: 1\noff: 2\n", "off is written twice, in lines 1 and 2."),
        ("x: &x\n  a: 1\n  a: 2\ny: *x\n", "a is written twice, in lines 2 and 3."),
    ],
)  # fmt: skip
def test_a_key_of_yaml_that_is_there_twice_is_refused_with_both_lines(text: str, said: str) -> None:
    with pytest.raises(InvalidDocument) as caught:
        parse_yaml(text)
    assert str(caught.value).startswith(said)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"a": 1,\n "b": 2,\n "a": 3}', "a is written twice, in lines 1 and 3."),
        ('{"a": [{"k": "x: \\"k\\":"},\n {"k": 1,\n\n "k" : 2}]}', "k is written twice, in lines 2 and 4."),
        ('{"{": 1, "{": {"b": 1}}', "{ is written twice, in line 1."),
        ('{"\\u0061": 1, "a": 2}', "a is written twice, in line 1."),
    ],
)
def test_a_key_of_json_that_is_there_twice_is_refused_with_both_lines(text: str, said: str) -> None:
    with pytest.raises(InvalidDocument) as caught:
        parse_json(text)
    assert str(caught.value).startswith(said)


def test_valid_documents_have_the_values_of_the_usual_parsers() -> None:
    merged = "a: &a {x: 1}\nb: &b {<<: *a, x: 2}\nc: {<<: *b, y: 3}\nd: {<<: [*a, *b], x: 4}\ne: [*a, *a]\n"
    for text in (merged, "", "- 1\n- no\n", "a: {k: 1}\nb: {k: 1}\n1: x\n", "a: 2026-11-28\n"):
        assert parse_yaml(text) == yaml.safe_load(text)
    assert parse_yaml("007: no\nno: 1\n", as_text=True) == {"007": "no", "no": "1"}
    for path in (REPOSITORY / "recipes").rglob("*.yaml"):
        assert parse_yaml(decode_document(path.read_bytes())) == yaml.safe_load(path.read_text())
    assert parse_json('{"a": {"k": 1}, "b": [{"k": 1}, {"k": null}]}') == {"a": {"k": 1}, "b": [{"k": 1}, {"k": None}]}
    assert parse_json(decode_document(b'\xef\xbb\xbf{"a": 1}')) == {"a": 1}, "a byte order mark is no content"


def test_every_file_that_users_write_is_read_strictly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The recipe's own cases are in test_recipe.py."""
    twice = "is written twice, in lines 1 and 2"
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    config_file().parent.mkdir()
    config_file().write_text('{"format": 1, "devices": {"orin": {"destination": "a"},\n "orin": {"destination": "b"}}}')
    with pytest.raises(UsageError, match=f"devices.json: orin {twice}.*; fix or delete the file"):
        read_devices()

    (tmp_path / "images" / "cat").mkdir(parents=True)
    (tmp_path / "classes.yaml").write_text("cat: a cat\ncat: a dog\n")
    own = FolderSet(kind="folder", name="own", path=str(tmp_path / "images"), classes=str(tmp_path / "classes.yaml"))
    with pytest.raises(UsageError, match=f"classes.yaml: cat {twice}"):
        open_set(own)
    coco = tmp_path / "dataset_coco.json"
    coco.write_text('{"images": [],\n "images": []}')
    with pytest.raises(UsageError, match=f"dataset_coco.json: .*images {twice}"):
        open_set(KarpathySet(kind="karpathy", name="coco", file=str(coco), images=str(tmp_path)))

    rows = tmp_path / "rows.json"
    rows.write_text('[{"name": "a", "device": "b",\n "name": "c"}]')
    with pytest.raises(UsageError, match=f"rows.json: name {twice}"):
        external_rows(rows)

    folder = tmp_path / "model"
    folder.mkdir()
    config = json.loads((STUDENT / CONFIG).read_text())
    (folder / CONFIG).write_text('{"model_cfg": {},\n ' + json.dumps(config)[1:])
    with pytest.raises(ArtifactError, match=f"{CONFIG}: model_cfg {twice}"):
        load_model(folder)


def test_many_keys_that_are_written_twice_are_named_in_part() -> None:
    text = "".join(f"key{number}: 1\n" for number in range(300)) * 2
    with pytest.raises(InvalidDocument) as caught:
        parse_yaml(text)
    assert str(caught.value).count("is written twice") == 5
    assert "and 295 more keys. Only one of the two would count" in str(caught.value)


def test_a_git_lfs_pointer_in_place_of_a_document_is_named() -> None:
    with pytest.raises(InvalidDocument, match="a Git LFS pointer, not the file itself"):
        decode_document(b"version https://git-lfs.github.com/spec/v1\noid sha256:4d\nsize 9\n")
