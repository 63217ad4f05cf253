"""Inspecting: every number against its definition on sources whose contents are known."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import REPOSITORY, jpeg, make_picture, make_shards, write_tar
from hostile import hostile
from open_clip.tokenizer import SimpleTokenizer
from PIL import Image

from toolchain.data import caption_lengths, inspection
from toolchain.data.inspection import inspect
from toolchain.data.open import source_spec
from toolchain.errors import UsageError
from toolchain.recipe.data import GlyphsSpec, WebdatasetSpec

CAPTIONS = [
    "a photo of a cat",
    "Don't   stop,\tit's 1234 &amp;amp; \u00fcn\u00efcode \u65e5\u672c\u8a9e \U0001f600!!!",
    "I'LL we\u2019re na\u00efve caf\u00e9 \u2014 \u201cquotes\u201d 12:30 #tag @name https://example.org/a?b=c",
    "word " * 100,
    "\u00c3\u00a9 mended by ftfy",
    "",
]
MIN_PSNR_DB = 25.0  # of a cell to its picture, shrunk another way; another picture has some 12


def spec_of(*paths: Path) -> WebdatasetSpec:
    return WebdatasetSpec(kind="webdataset", shards=tuple(map(str, paths)))


@pytest.mark.parametrize("caption", CAPTIONS)
def test_tokens_are_counted_as_clip_does(caption: str) -> None:
    unit, length_of = caption_lengths.make_counter()
    assert unit == "tokens"
    assert length_of(caption) == 2 + len(SimpleTokenizer().encode(caption))


def test_without_the_vocabulary_words_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(caption_lengths.importlib.util, "find_spec", lambda name: None)
    unit, length_of = caption_lengths.make_counter()
    assert (unit, length_of("a photo  of a cat")) == ("words", 5)


def test_numbers_are_their_definitions(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    sizes = random.integers(10, 60, (9, 2)).tolist()
    pictures = [jpeg(make_picture(width, height, seed)) for seed, (width, height) in enumerate(sizes)]
    pictures[7] = pictures[2]
    sizes[7] = sizes[2]
    captions = [["one"], ["two", "three"], ["four"], ["one"], ["two"], ["word " * 90], ["six"], ["seven"], ["eight"]]
    members = []
    for number, (picture, texts) in enumerate(zip(pictures, captions, strict=True)):
        members += [(f"{number}.jpg", picture), (f"{number}.json", json.dumps({"caption": texts}).encode())]
    found = inspect(spec_of(write_tar(tmp_path / "a.tar", members)))
    assert (found["samples"], found["good"], found["sampled"]) == (9, 9, None)
    assert found["captions"] == 10
    assert found["formats"] == {"JPEG": 9}
    assert found["captions_cut"] == 1
    assert found["same_pictures"] == {
        "count": 1,
        "examples": [f"{tmp_path / 'a.tar'}: 7 = {tmp_path / 'a.tar'}: 2"],
    }
    assert [example.partition(" = ")[0][-1] for example in found["same_captions"]["examples"]] == ["3", "4"]
    for name, values in (
        ("width", [width for width, _ in sizes]),
        ("height", [height for _, height in sizes]),
        ("picture_bytes", list(map(len, pictures))),
        ("captions_per_sample", list(map(len, captions))),
    ):
        for share in (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0):
            at_most = min(value for value in values if np.mean(np.array(values) <= value) >= share)
            assert found[name][f"{share:g}"] == at_most
    assert found["picture_bytes"]["sum"] == sum(map(len, pictures))
    assert json.loads(json.dumps(found)) == found


def test_damage_is_counted_exactly(tmp_path: Path) -> None:
    samples, damaged = hostile()
    members = [(f"{key}.{kind}", content) for key, files in samples.items() for kind, content in files.items()]
    found = inspect(spec_of(write_tar(tmp_path / "a.tar", members)), sheet=tmp_path / "sheet.png")
    assert {reason: damage["count"] for reason, damage in found["broken"].items()} == Counter(damaged.values())
    assert found["samples"] == len(samples)
    assert found["good"] == len(samples) - len(damaged)
    named = [example for damage in found["broken"].values() for example in damage["examples"]]
    assert all(any(f"a.tar: {key}" in example for key in damaged) for example in named)


def test_of_many_some_are_read_and_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = make_shards(tmp_path, 2, 20, sizes=(20, 30))
    whole = inspect(spec_of(*paths))
    some = [inspect(spec_of(*paths), sample=15) for _ in range(2)]
    assert some[0] == some[1]
    assert (some[0]["samples"], some[0]["sampled"], some[0]["good"]) == (40, 15, 15)
    assert inspect(spec_of(*paths), sample=40) == whole
    looked, count = inspection.read_and_decode, 0

    def counted(*arguments: Any) -> Any:
        nonlocal count
        count += 1
        return looked(*arguments)

    monkeypatch.setattr(inspection, "read_and_decode", counted)
    inspect(spec_of(*paths), sample=7)
    assert count == 7


def test_nothing_good_is_no_error(tmp_path: Path) -> None:
    found = inspect(spec_of(write_tar(tmp_path / "a.tar", [("x.txt", b"x")])), sheet=tmp_path / "sheet.png")
    assert (found["samples"], found["good"], found["width"]) == (1, 0, {})
    with Image.open(tmp_path / "sheet.png") as page:
        assert page.format == "PNG"


def test_a_sheet_that_cannot_be_written_is_refused_before_reading(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for sheet in (tmp_path / "file" / "sheet.png", tmp_path):
        with pytest.raises(UsageError, match="cannot be written"):
            inspect(spec_of(tmp_path / "absent.tar"), sheet=sheet)


def test_the_sheet_shows_the_pictures_in_order(tmp_path: Path) -> None:
    members = [("broken.jpg", b"no"), ("broken.txt", b"not shown")]
    pictures = [make_picture(160, 160, seed) for seed in range(11)]
    for number, picture in enumerate(pictures):
        members += [(f"{number}.jpg", jpeg(picture)), (f"{number}.txt", b"a caption that takes more than a line")]
    inspect(spec_of(write_tar(tmp_path / "a.tar", members)), sheet=tmp_path / "new" / "sheet.png")
    with Image.open(tmp_path / "new" / "sheet.png") as sheet:
        page = np.asarray(sheet.convert("RGB")).astype(float)
    cell_px = inspection._CELL_PX
    height_px = (page.shape[0] - 8) // 2
    for number, picture in enumerate(pictures):
        y, x = 8 + number // 8 * height_px, 8 + number % 8 * cell_px
        shown = page[y : y + 160, x : x + 160]
        assert 10 * np.log10(255**2 / np.mean((shown - np.asarray(picture)) ** 2)) > MIN_PSNR_DB
        below = page[y + 162 : y + 195, x : x + 160]
        assert below.min() < 128, "its caption"
    last = page[8 + height_px :, 8 + 3 * cell_px :]
    assert last.min() == 255, "nothing where there is no picture"


def test_glyphs_are_inspected_as_evaluation_shows_them(
    tmp_path: Path, tiny_samples: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("toolchain.data.glyphs.training_set", lambda: tiny_samples)
    found = inspect(GlyphsSpec(kind="glyphs"), sheet=tmp_path / "sheet.png")
    assert found["good"] == found["samples"] > 0
    assert found["formats"] == {"PNG": found["samples"]}
    assert set(found["width"].values()) == {32}


def test_a_source_is_a_recipe_or_says_its_kind(tmp_path: Path) -> None:
    assert source_spec("glyphs", None).kind == "glyphs"
    assert source_spec("a/{0..3}.tar", "webdataset") == WebdatasetSpec(kind="webdataset", shards=("a/{0..3}.tar",))
    for source, kind, said in (
        ("a/{0..3}.tar", None, "--kind webdataset"),
        ("absent.yaml", None, "no such file"),
        ("a.csv", "csv", "a path is enough only for webdataset and image_folder"),
    ):
        with pytest.raises(UsageError, match=said):
            source_spec(source, kind)


# The command line, where torch cannot be imported.

WITHOUT_TORCH = """
import sys
for name in ("torch", "torchvision", "open_clip", "timm", "transformers"):
    sys.modules[name] = None
import clipkd
clipkd.main()
"""


def without_torch(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", WITHOUT_TORCH, *map(str, arguments)]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=120)


def test_the_commands_need_no_torch_and_keep_stdout_for_the_result(tmp_path: Path) -> None:
    make_shards(tmp_path / "mine", 2, 3, sizes=(20, 30))
    write_tar(tmp_path / "mine" / "00002.tar", [("[red]a.jpg", b"no"), ("[red]a.txt", b"x")])
    source, out = [tmp_path / "mine" / "{00000..00002}.tar", "--kind", "webdataset"], tmp_path / "out"
    inspected = without_torch("data", "inspect", *source, "--json")
    assert (inspected.returncode, inspected.stderr) == (0, "")
    document = json.loads(inspected.stdout)
    assert (document["samples"], document["good"], document["caption_length"]["unit"]) == (7, 6, "words")
    shown = without_torch("data", "inspect", *source)
    assert "[red]a" in shown.stdout.replace("\n", "")
    packed = without_torch("data", "pack", *source, "--out", out)
    assert packed.returncode == 0
    assert packed.stdout == f"{out / 'index.json'}\n"
    assert "1 not packed: not an image; for example:\n  " in packed.stderr
    assert "6 samples in 1 shard(s)" in packed.stderr
    again = without_torch("data", "pack", *source, "--out", out, "--json")
    assert json.loads(again.stdout) == {"path": str(out), **json.loads((out / "index.json").read_text())}
    refused = without_torch("data", "inspect", tmp_path / "mine" / "00000.tar")
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "--kind webdataset" in refused.stderr
