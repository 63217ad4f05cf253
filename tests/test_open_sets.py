"""Evaluation sets of every kind, made on disk: what they hold, what they refuse, and what they score by definition."""

import importlib.util
import io
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import REPOSITORY, Ended, jpeg, make_picture, write_tar
from numpy.typing import NDArray
from PIL import Image
from test_choose_precision import Silent

from toolchain.data.images import IMAGE_SUFFIXES
from toolchain.distributed import ALONE
from toolchain.errors import ClipkdError, UsageError
from toolchain.evaluation import zero_shot as module
from toolchain.evaluation.eval_set import EvalSet, ImageFile, captions_set, classes_set
from toolchain.evaluation.open_sets import fingerprint, open_set
from toolchain.evaluation.torch_encoders import TorchEncoders, headline_accuracy
from toolchain.evaluation.zero_shot import TIE, UNRANKED, evaluate, mean_per_class_recall, ranks
from toolchain.models.build import load_model
from toolchain.recipe.evaluate import ClipBenchmarkSet, EvaluateSpec, FolderSet, ImagenetSet, KarpathySet, PairsSet
from toolchain.recipe.load import load_recipe

Clipkd = Callable[..., Ended]

TEACHER = REPOSITORY / "recipes" / "glyphs_teacher"
WIDTH = 8
FLOAT64 = 1e-12  # of a mean of fractions: the same sum in another order


def png(color: tuple[int, int, int], size: tuple[int, int] = (4, 4)) -> bytes:
    encoded = io.BytesIO()
    Image.new("RGB", size, color).save(encoded, "PNG")
    return encoded.getvalue()


def numbered(number: int) -> bytes:
    """A picture that says its number in its colour."""
    return png((number % 256, number // 256, 0))


def number_of(image: Image.Image) -> int:
    red, green, _ = image.getpixel((0, 0))  # type: ignore[misc]
    return int(red + 256 * green)


class Table:
    """Encoders that look features up: of a picture by its number, of a text by itself."""

    def __init__(self, image_features_ND: NDArray[Any], text_features: dict[str, NDArray[Any]]) -> None:
        self.image_features_ND, self.text_features = image_features_ND.astype(np.float32), text_features
        self.largest = 0

    def preprocess(self, image: Image.Image, /) -> NDArray[np.float32]:
        return np.array([[[number_of(image)]]], np.float32)

    def encode_pixels(self, pixel_values_BCHW: NDArray[np.float32], /) -> NDArray[np.float32]:
        self.largest = max(self.largest, len(pixel_values_BCHW))
        rows: NDArray[np.float32] = self.image_features_ND[pixel_values_BCHW[:, 0, 0, 0].astype(int)]
        return rows

    def encode_texts(self, texts: list[str], /) -> NDArray[np.float32]:
        return np.stack([self.text_features[text] for text in texts]).astype(np.float32)


def unit(features: NDArray[Any]) -> NDArray[np.float32]:
    return (features / np.linalg.norm(features, axis=-1, keepdims=True)).astype(np.float32)


def write_folder(root: Path, classes: dict[str, int]) -> Path:
    """CLASS/PICTURE, numbered in the order of writing."""
    number = 0
    for name, count in classes.items():
        (root / name).mkdir(parents=True)
        for index in range(count):
            (root / name / f"{index}.png").write_bytes(numbered(number))
            number += 1
    return root


# The user's own folder


def test_a_folder_of_ones_own(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "mine", {"b_cat": 2, "a_dog": 3})
    (root / "a_dog" / ".DS_Store").write_text("x")
    data = open_set(FolderSet(kind="folder", name="mine", path=str(root)))
    assert data.texts == ["a dog", "b cat"]
    assert data.templates == ("a photo of a {}.",)
    assert data.image_group_N.tolist() == [0, 0, 0, 1, 1]
    images = [data.image(index) for index in range(len(data))]
    assert [number_of(image) for image in images if image] == [2, 3, 4, 0, 1]
    assert not data.one_image_per_class


def test_class_names_and_templates_from_the_recipe_or_from_files(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "mine", {"007": 1, "no": 1})
    (tmp_path / "names.yaml").write_text("no: a Norwegian\n007: a spy\n")
    (tmp_path / "prompts.txt").write_text("{}\n\na picture of {}\n")
    written = FolderSet(
        kind="folder", name="a", path=str(root), classes={"no": "a Norwegian", "007": "a spy"}, templates=("{}",)
    )
    filed = FolderSet(
        kind="folder",
        name="a",
        path=str(root),
        classes=str(tmp_path / "names.yaml"),
        templates=str(tmp_path / "prompts.txt"),
    )
    for data in (open_set(written), open_set(filed)):
        assert data.texts == ["a Norwegian", "a spy"]
        assert [str(data.images[label]) for label in (0, 1)] == [str(root / "no/0.png"), str(root / "007/0.png")]
    assert open_set(filed).templates == ("{}", "a picture of {}")


def damaged_folder(root: Path, what: str) -> FolderSet:
    spec: dict[str, Any] = {"kind": "folder", "name": "mine", "path": str(root)}
    if what == "no folder":
        return FolderSet(**spec)
    write_folder(root, {"cat": 1, "dog": 1})
    match what:
        case "an unread image":
            (root / "cat" / "0.heic").write_text("x")
        case "empty class":
            (root / "eel").mkdir()
            (root / "eel" / "readme.txt").write_text("x")
        case "unnamed":
            spec["classes"] = {"cat": "cat"}
        case "unknown":
            spec["classes"] = {"cat": "cat", "dog": "dog", "eel": "eel"}
        case "same name":
            spec["classes"] = {"cat": "pet", "dog": "pet"}
        case "no place":
            spec["templates"] = ("a photo",)
        case "no templates":
            spec["templates"] = str(root / "none.txt")
    return FolderSet(**spec)


@pytest.mark.parametrize(
    ("what", "said"),
    [
        (
            "no folder",
            "evaluate.sets 'mine'.path: {root}: no such folder; expected one with a folder of images",
        ),
        ("an unread image", "images that cannot be read: 1 .heic ({root}/cat/0.heic); an evaluation drops no image"),
        ("empty class", "evaluate.sets 'mine': {root}: 1 of 3 class folders have no image: eel (it has 1 .txt). Add"),
        ("unnamed", "the folders of {root} do not match classes; 1 unknown: dog"),
        ("unknown", "the folders of {root} do not match classes; 1 missing: eel"),
        ("same name", "evaluate: set 'mine' has 2 classes named 'pet', expected distinct names"),
        ("no place", "evaluate: template 'a photo' has no {{}} in place of the name"),
        ("no templates", "evaluate.sets 'mine': {root}/none.txt: no such file"),
    ],
)
def test_a_folder_that_is_wrong_says_so(tmp_path: Path, what: str, said: str) -> None:
    root = tmp_path / "mine"
    spec = damaged_folder(root, what)
    with pytest.raises(UsageError) as raised:
        open_set(spec)
    assert said.format(root=root) in str(raised.value)


# ImageNet


def wordnet_ids() -> list[str]:
    found = importlib.util.find_spec("timm")
    assert found
    assert found.origin
    return (Path(found.origin).parent / "data/_info/imagenet_synsets.txt").read_text().split()


@pytest.fixture(scope="module")
def imagenet_ids() -> list[str]:
    return wordnet_ids()


def test_imagenet_by_wordnet_id(tmp_path: Path, imagenet_ids: list[str]) -> None:
    from open_clip.zero_shot_metadata import IMAGENET_CLASSNAMES, OPENAI_IMAGENET_TEMPLATES

    write_folder(tmp_path / "val", dict.fromkeys(reversed(imagenet_ids), 1))
    data = open_set(ImagenetSet(kind="imagenet", path=str(tmp_path / "val")))
    assert data.texts == list(IMAGENET_CLASSNAMES)
    assert [template.format("owl") for template in data.templates] == [t("owl") for t in OPENAI_IMAGENET_TEMPLATES]
    for label in (0, 1, 517, 999):
        picture = data.images[label]
        assert isinstance(picture, ImageFile)
        assert picture.path.parent.name == imagenet_ids[label]
        assert data.image_group_N[label] == label


def test_the_folders_of_v2_are_numbers_and_not_strings(tmp_path: Path) -> None:
    """Sorted as strings, folder "10" would be class 2: the mistake of a plain ImageFolder."""
    write_folder(tmp_path / "v2", {str(label): 1 for label in range(1000)})
    data = open_set(ImagenetSet(kind="imagenet", path=str(tmp_path / "v2"), variant="v2"))
    for index in range(len(data)):
        image = data.image(index)
        assert image
        assert number_of(image) == data.image_group_N[index]


@pytest.mark.parametrize(("variant", "first"), [("r", 1), ("a", 6)])
def test_the_classes_of_r_and_a_are_ranked_alone(
    tmp_path: Path, imagenet_ids: list[str], variant: Any, first: int
) -> None:
    from open_clip.zero_shot_metadata import IMAGENET_CLASSNAMES

    found = importlib.util.find_spec("timm")
    assert found
    assert found.origin
    own = (Path(found.origin).parent / f"data/_info/imagenet_{variant}_synsets.txt").read_text().split()
    write_folder(tmp_path / variant, dict.fromkeys(own, 1))
    data = open_set(ImagenetSet(kind="imagenet", path=str(tmp_path / variant), variant=variant))
    assert len(data.texts) == 200
    assert data.texts[0] == IMAGENET_CLASSNAMES[first]
    assert data.texts == [IMAGENET_CLASSNAMES[imagenet_ids.index(wordnet_id)] for wordnet_id in own]
    # every class outside would have won
    eye = np.eye(1000, dtype=np.float32)
    own_last = sorted(range(1000), key=lambda k: imagenet_ids[k] in own)  # two names occur twice
    text_features = {
        template.format(name): eye[k]
        for k, name in ((k, IMAGENET_CLASSNAMES[k]) for k in own_last)
        for template in data.templates
    }
    image_features = np.full((200, 1000), 0.03, np.float32)
    for index, wordnet_id in enumerate(own):
        image_features[index, imagenet_ids.index(wordnet_id)] = 0.02  # behind the 800 others of ImageNet's ...
        image_features[index, [imagenet_ids.index(other) for other in own if other != wordnet_id]] = 0.01  # ... alone
    result, _ = evaluate(Table(image_features, text_features), [data], headline=data.name)
    assert result["sets"][data.name]["top1"] == 1
    assert result["sets"][data.name]["n"] == 200


def test_an_incomplete_imagenet_is_refused(tmp_path: Path, imagenet_ids: list[str]) -> None:
    write_folder(tmp_path / "val", dict.fromkeys([*imagenet_ids[:997], "n00000000"], 1))
    with pytest.raises(UsageError) as raised:
        open_set(ImagenetSet(kind="imagenet", path=str(tmp_path / "val"), variant="sketch"))
    said = f"1 unknown: n00000000; 3 missing: {', '.join(imagenet_ids[997:])}"
    assert str(raised.value).endswith(f"do not match ImageNet's WordNet ids; {said}")


def test_of_two_classes_with_one_name_the_first_is_the_answer() -> None:
    """Two of ImageNet's names occur twice; an argmax, as in CLIP_benchmark, gives the first."""
    features = {"a": [1, 0, 0], "b": [0, 1, 0]}
    names = ["b", "a", "a"]
    pixels_NHWC = np.zeros((3, 4, 4, 3), np.uint8)
    pixels_NHWC[:, :, :, 0] = np.arange(3)[:, None, None]
    data = classes_set("x", pixels_NHWC, names, ["{}"], [0, 1, 2], repeats_names=True)
    table = Table(np.array([[0, 1, 0], [1, 0, 0], [1, 0, 0]]), {key: np.array(row) for key, row in features.items()})
    _, samples = evaluate(table, [data], headline="x")
    assert samples["x_rank"].tolist() == [0, 0, 1]


# CLIP_benchmark's archives


def write_clip_benchmark(root: Path, kind: str, samples: list[list[tuple[str, bytes]]]) -> Path:
    (root / "test").mkdir(parents=True)
    (root / "test" / "nshards.txt").write_text(f"{len(samples)}\n")
    for number, members in enumerate(samples):
        write_tar(root / "test" / f"{number}.tar", members)
    if kind == "retrieval":
        (root / "dataset_type.txt").write_text("retrieval")
    else:
        (root / "classnames.txt").write_text("cat\ndog\n")
        (root / "zeroshot_classification_templates.txt").write_text("a photo of a {c}.\n{c}\n")
    return root


def test_clip_benchmarks_archives_of_classes(tmp_path: Path) -> None:
    shards = [
        [("s0.png", numbered(0)), ("s0.cls", b"1"), ("s1.cls", b"0\n"), ("s1.PNG", numbered(1))],
        [("a/s.2.png", numbered(2)), ("b/s0.png", numbered(3)), ("b/s0.cls", b"1"), ("a/s.cls", b"0")],
    ]
    shards[1] = [("a/s2.png", numbered(2)), ("b/s2.png", numbered(3)), ("b/s2.cls", b"1"), ("a/s2.cls", b"0")]
    root = write_clip_benchmark(tmp_path / "wds", "classification", shards)
    data = open_set(ClipBenchmarkSet(kind="clip_benchmark", name="x", path=str(root)))
    assert (data.texts, data.templates) == (["cat", "dog"], ("a photo of a {}.", "{}"))
    assert data.image_group_N.tolist() == [1, 0, 0, 1]
    assert [number_of(image) for image in map(data.image, range(4)) if image] == [0, 1, 2, 3]


def test_clip_benchmarks_archives_of_captions(tmp_path: Path) -> None:
    shards = [[("s0.png", numbered(0)), ("s0.txt", b"one\ntwo"), ("s1.png", numbered(1)), ("s1.txt", b"three")]]
    root = write_clip_benchmark(tmp_path / "wds", "retrieval", shards)
    data = open_set(ClipBenchmarkSet(kind="clip_benchmark", name="x", path=str(root)))
    assert (data.texts, data.text_group_K.tolist()) == (["one", "two", "three"], [0, 0, 1])


@pytest.mark.parametrize(
    ("members", "said"),
    [
        ([("s0.png", b"x")], "0.tar: sample 's0' has no .cls, only png"),
        ([("s0.cls", b"1")], "0.tar: sample 's0' has no image, only cls"),
        ([("s0.png", b"x"), ("s0.cls", b"cat")], "s0.png: expected a class number in its .cls, got 'cat'"),
        ([("s0.png", b"x"), ("s0.cls", b"2")], "has label 2, expected 0 to 1"),
        ([("s0.png", b"x"), ("s0.cls", b"\xff")], "s0.cls: not UTF-8"),
    ],
)
def test_an_archive_that_is_wrong_says_so(tmp_path: Path, members: list[tuple[str, bytes]], said: str) -> None:
    root = write_clip_benchmark(tmp_path / "wds", "classification", [members])
    with pytest.raises(UsageError) as raised:
        open_set(ClipBenchmarkSet(kind="clip_benchmark", name="x", path=str(root)))
    assert said in str(raised.value)


def test_an_archive_cut_short_is_refused(tmp_path: Path) -> None:
    root = write_clip_benchmark(tmp_path / "wds", "classification", [[("s0.png", numbered(0)), ("s0.cls", b"1")]])
    tar = root / "test" / "0.tar"
    tar.write_bytes(tar.read_bytes()[:540])
    with pytest.raises(UsageError, match=r"0\.tar: ends at byte 540, within s0\.png; an evaluation never skips files"):
        open_set(ClipBenchmarkSet(kind="clip_benchmark", name="x", path=str(root)))


# Captions


def write_karpathy(root: Path, num_captions: tuple[int, ...], folder: str | None = "val2014") -> KarpathySet:
    (root / "pictures" / (folder or "")).mkdir(parents=True)
    rows: list[dict[str, Any]] = [{"split": "train", "filename": "gone.jpg", "sentences": []}]
    for index, count in enumerate(num_captions):
        name = f"{index:04d}.png"
        (root / "pictures" / (folder or "") / name).write_bytes(numbered(index))
        sentences = [{"raw": f"picture {index} caption {k}"} for k in range(count)]
        rows.append({"split": "test", "filename": name, "sentences": sentences})
        if folder:
            rows[-1]["filepath"] = folder
    (root / "dataset.json").write_text(json.dumps({"images": rows}))
    return KarpathySet(kind="karpathy", name="coco", file=str(root / "dataset.json"), images=str(root / "pictures"))


@pytest.mark.parametrize("folder", ["val2014", None], ids=["coco", "flickr30k"])
def test_karpathys_test_split_with_all_captions_or_one(tmp_path: Path, folder: str | None) -> None:
    spec = write_karpathy(tmp_path, (5, 6, 5), folder)
    data, one = open_set(spec), open_set(spec.model_copy(update={"captions": "one"}))
    assert data.text_group_K.tolist() == [0] * 5 + [1] * 6 + [2] * 5
    assert one.texts == [f"picture {index} caption 0" for index in range(3)]
    assert [number_of(image) for image in map(data.image, range(3)) if image] == [0, 1, 2]


def test_a_picture_that_the_json_names_must_be_there(tmp_path: Path) -> None:
    spec = write_karpathy(tmp_path, (5, 5))
    (tmp_path / "pictures/val2014/0001.png").unlink()
    with pytest.raises(UsageError) as raised:
        open_set(spec)
    expected = f"{tmp_path}/pictures/val2014/0001.png: no such file; dataset.json lists it"
    assert str(raised.value) == f"evaluate.sets 'coco'.images: {expected}"


def test_pairs_from_a_table_and_no_row_swallows_another(tmp_path: Path) -> None:
    for index in range(4):
        (tmp_path / f"{index}.png").write_bytes(numbered(index))
    captions = ['"a quote that stays open', "second", 'a "quoted" word', "fourth"]
    rows = ["title\tfilepath", *(f"{caption}\t{index}.png" for index, caption in enumerate(captions))]
    (tmp_path / "val.tsv").write_text("\n".join(rows) + "\n")
    data = open_set(PairsSet(kind="pairs", name="cc3m", file=str(tmp_path / "val.tsv")))
    assert data.texts == captions
    assert data.text_group_K.tolist() == [0, 1, 2, 3]
    (tmp_path / "val.csv").write_text('id,image,text\n7,0.png,"a, b ""c"""\r\n8,1.png,d\n')
    spec = PairsSet(
        kind="pairs", name="cc3m", file=str(tmp_path / "val.csv"), delimiter=",", image_column="image",
        caption_column="text",
    )  # fmt: skip
    assert open_set(spec).texts == ['a, b "c"', "d"]
    (tmp_path / "val.csv").write_text('image,text\n0.png,"open\n1.png,d\n')
    with pytest.raises(UsageError, match=r"val\.csv, line 2: unexpected end of data"):
        open_set(spec)
    (tmp_path / "val.csv").write_text("image,text\n0.png,a,b\n")
    with pytest.raises(UsageError, match=r"val\.csv, line 2: 3 cells, expected 2 as in its header"):
        open_set(spec)


def test_a_table_in_utf_16_is_named_for_what_it_is(tmp_path: Path) -> None:
    (tmp_path / "val.tsv").write_text("filepath\ttitle\n0.png\tx\n", encoding="utf-16")
    with pytest.raises(
        UsageError, match=r"evaluate\.sets 'x': .*val\.tsv: expected text in UTF-8; it is text in UTF-16"
    ):
        open_set(PairsSet(kind="pairs", name="x", file=str(tmp_path / "val.tsv")))


def test_names_with_dots_in_an_archive_are_the_cause(tmp_path: Path) -> None:
    members = [(f"photo v1.{number}.{kind}", b"x") for number in range(3000) for kind in ("jpg", "txt")]
    path = write_tar(tmp_path / "a.tar", members)
    with pytest.raises(UsageError, match=r"'photo v1' has no image, .*ends at its first dot.* Rename them") as raised:
        open_set(PairsSet(kind="pairs", name="x", shards=(str(path),)))
    assert len(str(raised.value)) < 500


def test_pairs_from_shards(tmp_path: Path) -> None:
    for shard in range(2):
        members = [(f"{shard}.png", numbered(shard)), (f"{shard}.txt", f"caption {shard}".encode())]
        write_tar(tmp_path / f"{shard:02d}.tar", members)
    data = open_set(PairsSet(kind="pairs", name="x", shards=(f"{tmp_path}/{{00..01}}.tar",)))
    assert data.texts == ["caption 0", "caption 1"]
    with pytest.raises(UsageError, match=r"^evaluate\.sets 'x'\.shards: 1 of 3 shards do not exist"):
        open_set(PairsSet(kind="pairs", name="x", shards=(f"{tmp_path}/{{00..02}}.tar",)))


def test_shards_hold_every_image_that_training_reads_and_webp_comes_first(tmp_path: Path) -> None:
    images = {}
    for suffix in IMAGE_SUFFIXES:
        Image.new("RGB", (4, 4), (10 * len(images), 0, 0)).save(tmp_path / f"x.{suffix}")
        images[suffix] = (tmp_path / f"x.{suffix}").read_bytes()
    members = [(f"{suffix}.{suffix}", content) for suffix, content in images.items()]
    members += [(f"{suffix}.txt", suffix.encode()) for suffix in images]
    members += [(f"all.{suffix}", content) for suffix, content in images.items()] + [("all.txt", b"webp")]
    write_tar(tmp_path / "a.tar", members)
    data = open_set(PairsSet(kind="pairs", name="x", shards=(f"{tmp_path}/a.tar",)))
    assert data.texts == [*images, "webp"]
    pictures = [picture for picture in data.images if isinstance(picture, ImageFile)]
    assert [picture.member.rpartition(".")[2] for picture in pictures] == data.texts
    assert all(data.image(index) is not None for index in range(len(data)))


# Scores, by definition


def scored_by_definition(
    images_ND: NDArray[Any], texts_KD: NDArray[Any], group_N: list[int], group_K: list[int]
) -> tuple[list[int], list[int]]:
    """Ranks of every image's best text and of every text's best image, in loops."""

    def rank(query_D: NDArray[Any], candidates: NDArray[Any], right: list[bool]) -> int:
        scores = [float(sum(a * b for a, b in zip(query_D, row, strict=True))) for row in candidates.astype(np.float64)]
        best = max(score for score, is_right in zip(scores, right, strict=True) if is_right)
        return sum(score >= best - TIE for score, is_right in zip(scores, right, strict=True) if not is_right)

    image_N = [rank(row, texts_KD, [group == own for group in group_K]) for row, own in zip(images_ND, group_N)]  # noqa: B905
    text_K = [rank(row, images_ND, [group == own for group in group_N]) for row, own in zip(texts_KD, group_K)]  # noqa: B905
    return image_N, text_K


def made_captions(num_images: int, seed: int = 0) -> tuple[EvalSet, Table, list[int]]:
    random = np.random.default_rng(seed)
    counts = random.integers(1, 7, num_images).tolist()
    pixels_NHWC = np.zeros((num_images, 2, 2, 3), np.uint8)
    pixels_NHWC[..., 0] = np.arange(num_images)[:, None, None] % 256
    pixels_NHWC[..., 1] = np.arange(num_images)[:, None, None] // 256
    captions = [[f"{index}/{k}" for k in range(count)] for index, count in enumerate(counts)]
    concept_ND = random.standard_normal((num_images, WIDTH))
    features = {
        text: unit(concept_ND[index] + 0.6 * random.standard_normal(WIDTH))
        for index, texts in enumerate(captions)
        for text in texts
    }
    images_ND = unit(concept_ND + 0.6 * random.standard_normal(concept_ND.shape))
    data = captions_set("made", pixels_NHWC, captions)
    return data, Table(images_ND, features), counts


def test_retrieval_of_several_captions_equals_the_definition() -> None:
    data, table, counts = made_captions(300)
    result, samples = evaluate(table, [data], headline="made")
    group_K = [index for index, count in enumerate(counts) for _ in range(count)]
    texts_KD = np.stack([table.text_features[text] for text in data.texts])
    image_N, text_K = scored_by_definition(table.image_features_ND, texts_KD, list(range(300)), group_K)
    assert samples["made_rank"].tolist() == image_N
    assert samples["made_to_image_rank"].tolist() == text_K
    found = result["sets"]["made"]
    for k in (1, 5, 10):
        assert found["retrieval"][f"image_to_text_r{k}"] == sum(rank < k for rank in image_N) / 300
        assert found["retrieval"][f"text_to_image_r{k}"] == sum(rank < k for rank in text_K) / len(text_K)
    assert found["top1"] == found["retrieval"]["image_to_text_r1"]
    assert 0.1 < found["top1"] < 0.9
    assert found["n"] == 300
    assert "mean_per_class_recall" not in found


def test_classes_of_many_images_equal_the_definition() -> None:
    random = np.random.default_rng(1)
    label_N = random.permutation(np.repeat([0, 1, 2, 4], [3, 40, 90, 200]))  # class 3 has no image
    names = [f"name{k}" for k in range(5)]
    classes_KD = unit(random.standard_normal((5, WIDTH)))
    images_ND = unit(classes_KD[label_N] + 0.6 * random.standard_normal((len(label_N), WIDTH)))
    pixels_NHWC = np.zeros((len(label_N), 2, 2, 3), np.uint8)
    pixels_NHWC[..., 0] = np.arange(len(label_N))[:, None, None] % 256
    pixels_NHWC[..., 1] = np.arange(len(label_N))[:, None, None] // 256
    data = classes_set("made", pixels_NHWC, names, ["{}"], label_N)
    table = Table(images_ND, dict(zip(names, classes_KD, strict=True)))
    result, samples = evaluate(table, [data], headline="made")
    right_N = [
        int(np.argmax(classes_KD @ row)) == label for row, label in zip(images_ND, label_N.tolist(), strict=True)
    ]
    found = result["sets"]["made"]
    assert found["top1"] == sum(right_N) / len(label_N)
    recalls = []
    for label in (0, 1, 2, 4):
        own = [right for right, of in zip(right_N, label_N.tolist(), strict=True) if of == label]
        recalls.append(sum(own) / len(own))
    assert found["mean_per_class_recall"] == pytest.approx(sum(recalls) / 4, abs=FLOAT64)
    assert abs(found["mean_per_class_recall"] - found["top1"]) > 0.01, "the classes are uneven"
    assert "retrieval" not in found
    assert ((samples["made_rank"] == 0) == right_N).all()


def test_mean_per_class_recall_by_hand() -> None:
    assert mean_per_class_recall(np.array([0, 0, 3, 0], np.int32), np.array([0, 0, 0, 2])) == pytest.approx(5 / 6)


def test_the_size_of_chunks_changes_nothing_and_bounds_what_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    data, table, _ = made_captions(200)
    whole = evaluate(table, [data], headline="made")
    largest: list[int] = []
    isfinite = np.isfinite

    def watched(array: Any) -> Any:
        largest.append(np.size(array))
        return isfinite(array)

    monkeypatch.setattr(module, "_CHUNK", 7)
    monkeypatch.setattr(module.np, "isfinite", watched)
    table.largest = 0
    result, samples = evaluate(table, [data], headline="made")
    assert result == whole[0]
    for name, values in whole[1].items():
        if name.endswith("_cosine"):  # BLAS adds in another order for another number of rows, on AVX2 at least
            np.testing.assert_allclose(samples[name], values, rtol=0, atol=1e-6)
        else:
            assert (samples[name] == values).all()
    assert table.largest <= 7
    assert max(largest) == 7 * len(data.texts), "the scores of a chunk, and never of the set"


def test_a_silent_tower_retrieves_nothing() -> None:
    data, table, _ = made_captions(40)
    table.image_features_ND = np.zeros_like(table.image_features_ND)
    found = evaluate(table, [data], headline="made")[0]["sets"]["made"]
    assert found["top1"] == 0
    assert set(found["retrieval"].values()) == {0.0}


@pytest.mark.parametrize("broken", [np.nan, np.inf, -np.inf])
def test_a_broken_tower_is_not_scored(broken: float) -> None:
    data, table, _ = made_captions(40)
    table.image_features_ND = np.full_like(table.image_features_ND, broken)
    with pytest.raises(ClipkdError, match="are NaN or infinite for 40 of 40 inputs, the first: made, image 0"):
        evaluate(table, [data], headline="made")


def test_a_constant_model_retrieves_nothing() -> None:
    data, table, _ = made_captions(40)
    row_D = unit(np.random.default_rng(5).standard_normal(WIDTH))
    table.image_features_ND = np.tile(row_D, (40, 1))
    table.text_features = dict.fromkeys(table.text_features, row_D)
    found = evaluate(table, [data], headline="made")[0]["sets"]["made"]
    assert set(found["retrieval"].values()) == {0.0}


def test_one_caption_that_is_not_finite_leaves_the_others() -> None:
    queries_QD, group_K = unit(np.array([[1.0, 0.0], [0.0, 1.0]])), np.array([0, 0, 1])
    candidates_KD = np.array([[1, 0], [np.nan, 0], [0, 1]], np.float32)
    assert ranks(queries_QD, candidates_KD, None, group_K).tolist() == [0, 1]  # of another: ahead


# Pictures that cannot be read


def many(tmp_path: Path, count: int, broken: tuple[int, ...]) -> EvalSet:
    root = write_folder(tmp_path / "many", {"cat": count, "dog": count})
    for index in broken:
        (root / "cat" / f"{index}.png").write_bytes(numbered(0)[:40])
    return open_set(FolderSet(kind="folder", name="many", path=str(root), templates=("{}",)))


def test_an_unreadable_picture_counts_as_wrong_and_is_named(tmp_path: Path) -> None:
    data = many(tmp_path, 100, (3,))
    table = Table(
        np.repeat(np.eye(2, dtype=np.float32), 100, axis=0), {"cat": np.array([1.0, 0]), "dog": np.array([0, 1.0])}
    )
    result, samples = evaluate(table, [data], headline="many")
    found = result["sets"]["many"]
    wrong = [index for index, rank in enumerate(samples["many_rank"].tolist()) if rank == UNRANKED]
    assert [str(data.images[index]) for index in wrong] == [str(tmp_path / "many/cat/3.png")]
    assert (found["n"], found["top1"]) == (200, 199 / 200)
    assert found["top5"] == 199 / 200, "even among two classes"
    assert found["unreadable"] == {"n": 1, "first": [str(tmp_path / "many/cat/3.png")]}


def test_too_many_unreadable_pictures_are_an_error(tmp_path: Path) -> None:
    data = many(tmp_path, 100, (3, 5, 7))
    (tmp_path / "many/cat/5.png").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    (tmp_path / "many/cat/7.png").write_bytes(b"")
    table = Table(np.ones((200, 2)), {"cat": np.array([1.0, 0]), "dog": np.array([0, 1.0])})
    with pytest.raises(ClipkdError) as raised:
        evaluate(table, [data], headline="many")
    cat = tmp_path / "many" / "cat"
    message = str(raised.value)
    assert message.startswith("evaluation set many: 3 of 200 images cannot be read, more than 1%: ")
    assert f"{cat}/3.png (truncated image: " in message
    assert f"{cat}/5.png (not an image: it is a Git LFS pointer in place of the file" in message
    assert f"{cat}/7.png (zero-byte file). Replace them, or remove them from the set" in message


def test_an_unreadable_picture_is_found_by_none_of_its_captions() -> None:
    data, table, counts = made_captions(150)
    before = evaluate(table, [data], headline="made")[1]
    image = type(data).image

    class Broken(EvalSet):
        def image(self, index: int) -> Image.Image | None:
            return None if index == 4 else image(self, index)

    broken = Broken(**{name: getattr(data, name) for name in data.__dataclass_fields__})
    after = evaluate(table, [broken], headline="made")[1]
    first = sum(counts[:4])
    assert (after["made_to_image_rank"][first : first + counts[4]] == UNRANKED).all()
    assert after["made_rank"][4] == UNRANKED
    others = np.arange(150) != 4
    assert (after["made_rank"][others] == before["made_rank"][others]).all()


def test_own_photos_are_turned_and_benchmarks_are_read_as_they_lie(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    (tmp_path / "mine" / "cat").mkdir(parents=True)
    (tmp_path / "mine" / "cat" / "0.jpg").write_bytes(jpeg(make_picture(40, 20, 0), exif=exif))
    own = open_set(FolderSet(kind="folder", name="a", path=str(tmp_path / "mine")))
    lying = classes_set("a", own.images, ["cat"], ["{}"], [0])
    assert [data.image(0).size for data in (own, lying)] == [(20, 40), (40, 20)]  # type: ignore[union-attr]


@pytest.mark.parametrize("mode", ["CMYK", "P", "L", "RGBA", "LA", "1"])
def test_every_mode_becomes_rgb(tmp_path: Path, mode: str) -> None:
    picture = make_picture(20, 20, 0).convert("RGBA" if mode == "LA" else "RGB").convert(mode)
    picture.save(tmp_path / "0.tiff")
    data = classes_set("a", [ImageFile(tmp_path / "0.tiff")], ["cat"], ["{}"], [0])
    image = data.image(0)
    assert image is not None
    assert image.mode == "RGB"


# Fingerprints


def test_a_fingerprint_changes_with_the_files_and_only_then(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "mine", {"cat": 2, "dog": 1})
    spec = FolderSet(kind="folder", name="mine", path=str(root))
    first = fingerprint(spec)
    assert fingerprint(spec) == first
    assert fingerprint(spec.model_copy(update={"templates": ("{}",)})) != first
    os.utime(root / "cat" / "0.png", (1, 1))
    touched = fingerprint(spec)
    assert touched != first
    shutil.copyfile(root / "cat" / "0.png", root / "cat" / "2.png")
    assert fingerprint(spec) not in (first, touched)


def test_a_fingerprint_reads_no_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write_folder(tmp_path / "mine", {"cat": 2})
    monkeypatch.setattr(Image, "open", lambda *_: pytest.fail("a picture was read"))
    assert fingerprint(FolderSet(kind="folder", name="mine", path=str(root)))


# The recipe


def recipe(tmp_path: Path, evaluate_section: str) -> Path:
    path = tmp_path / "mine.yaml"
    path.write_text(
        "name: mine\ndata: {kind: glyphs}\nstudent: {model: glyphs_tiny}\n"
        "distill: {steps: 2, batch_size: 8, lr: 1.0e-3, warmup: 0}\nexport: {precisions: [fp32]}\n" + evaluate_section
    )
    return path


def test_paths_of_sets_are_beside_the_recipe(tmp_path: Path) -> None:
    write_folder(tmp_path / "mine", {"cat": 1})
    section = "evaluate: {headline: own, sets: [stix, {kind: folder, name: own, path: mine}]}\n"
    loaded = load_recipe(recipe(tmp_path, section))
    assert loaded.evaluate
    spec = loaded.evaluate.headline_set
    assert isinstance(spec, FolderSet)
    assert spec.path == str(tmp_path / "mine")
    assert loaded.evaluate.sets[0] == "stix"


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ("{kind: folder, name: own, pth: x, path: x}", "evaluate.sets.1.pth: unknown key; did you mean path?"),
        ("{kind: folder, path: x}", "evaluate.sets.1.name: Field required"),
        ("{name: own, path: x}", "evaluate.sets.1.kind: Field required"),
        (
            "{kind: cifar, name: own}",
            "evaluate.sets.1.kind: Input should be 'glyphs' or 'folder' or 'imagenet' or 'clip_benchmark' or "
            "'karpathy' or 'pairs' (got 'cifar')",
        ),
        ("{kind: imagenet, path: x, variant: v3}", "evaluate.sets.1.variant: Input should be 'val', 'v2', 'r', 'a'"),
        ("{kind: pairs, name: own}", "evaluate.sets.1: give either file or shards"),
        ("{kind: folder, name: stix, path: x}", "evaluate: two sets have the name 'stix'; give each a different name"),
        ("{kind: folder, name: a/b, path: x}", "evaluate.sets.1.name: String should match pattern"),
        ("cifar", "evaluate.sets.1: Input should be 'stix', 'serif' or 'novel' (got 'cifar')"),
    ],
)
def test_a_wrong_set_names_its_place(tmp_path: Path, entry: str, said: str) -> None:
    with pytest.raises(UsageError) as raised:
        load_recipe(recipe(tmp_path, f"evaluate: {{headline: stix, sets: [stix, {entry}]}}\n"))
    assert said in str(raised.value).splitlines()[1]


def test_glyph_sets_are_as_they_were() -> None:
    spec = EvaluateSpec()
    assert spec.model_dump() == {"headline": "stix", "sets": ("stix", "serif", "novel"), "examples": 16}
    data = open_set("novel")
    assert data.one_image_per_class
    assert len(data) == len(data.texts)


# In PyTorch, while training


def own_glyphs(root: Path, count: int, per_class: int) -> FolderSet:
    """Glyphs as a user's own folder: some classes, several pictures of each."""
    from toolchain.data import glyphs

    stix = glyphs.eval_set("stix")
    for index in range(count):
        folder = root / f"{index:03d}"
        folder.mkdir(parents=True)
        for copy in range(per_class):
            noise = np.random.default_rng([index, copy]).normal(0, 60, (32, 32, 3))
            pixels = (stix.images_KHWC[7 + 40 * index] + noise).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"{copy}.png")
    names = {f"{index:03d}": stix.names[7 + 40 * index] for index in range(count)}
    return FolderSet(kind="folder", name="own", path=str(root), classes=names, templates=glyphs.TEMPLATES)


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> FolderSet:
    return own_glyphs(tmp_path_factory.mktemp("own") / "pictures", 13, 3)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("captions", [False, True])
def test_training_scores_a_set_as_evaluate_does(own: FolderSet, captions: bool) -> None:
    model, data = load_model(TEACHER), open_set(own)
    if captions:
        texts = [[template.format(data.texts[group]) for template in data.templates] for group in range(13)]
        firsts = [data.images[index] for index in range(0, 39, 3)]
        data = captions_set("own", firsts, texts)
    found = headline_accuracy(data)(model, ALONE)
    result, _ = evaluate(TorchEncoders(model, torch.device("cpu")), [data], headline="own")
    assert found == {name: result["sets"]["own"][name] for name in ("top1", "top1_low", "top1_high", "top5", "n")}
    assert found["n"] == len(data)
    assert 0.1 < found["top1"] < 1


# The line, and clipkd evaluate


@pytest.fixture
def own_run(own: FolderSet, tmp_path: Path, tiny_recipe: Callable[..., Path], clipkd: Clipkd) -> Path:
    """A run on the user's own classes and captions, the captions its headline, evaluated while it trains."""
    root = Path(own.path)
    rows = ["title\tfilepath", *(f"a glyph, number {index}\t{index:03d}/0.png" for index in range(13))]
    (tmp_path / "pairs.tsv").write_text("\n".join(rows))
    pairs = {"kind": "pairs", "name": "pairs", "file": "pairs.tsv", "images": str(root)}
    path = tiny_recipe(
        distill={"steps": 2, "batch_size": 8, "lr": 1e-3, "warmup": 0, "evaluate_every": 2},
        evaluate={"headline": "pairs", "sets": [own.model_dump(mode="json"), pairs]},
        profile={"processes": 1, "seconds": 0.05},
    )
    ended = clipkd("run", path, "--out", tmp_path / "run", "--json")
    assert ended.code == 0, ended.err
    report = json.loads(ended.out)
    for row in report["rows"]:
        assert row["status"] == "ok"
        assert row["num_eval_images"] == 13
        assert row["accuracy"]["own"]["n"] == 39
        assert row["retrieval"]["own"] == {}
        assert row["top1"] == row["retrieval"]["pairs"]["image_to_text_r1"]
    logged = [json.loads(line) for line in (tmp_path / "run/student/train.jsonl").read_text().splitlines()]
    assert logged[-1]["accuracy"]["n"] == 13
    return tmp_path / "run"


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_a_run_on_sets_of_ones_own(own_run: Path, own: FolderSet, clipkd: Clipkd) -> None:
    exported, student = own_run / "exported/student-onnxruntime-fp32", own_run / "student"
    teacher = own_run / "exported/teacher-onnxruntime-fp32"
    measured = json.loads((own_run / "measured/student-onnxruntime-fp32/cpu/evaluation.json").read_text())

    said = clipkd("evaluate", exported, student, teacher, "--json")
    document = json.loads(said.out)
    assert [model["model"] for model in document["models"]] == [str(exported), str(student), str(teacher)]
    assert document["models"][0] == {"model": str(exported), "sets": measured["sets"]}
    assert document["models"][1]["sets"] == measured["sets"], "PyTorch and what ships answer alike"
    same, other = (model["against_first"]["own"] for model in document["models"][1:])
    assert (same["drop"], same["p"]) == (0, 1)
    assert other["drop"] == pytest.approx(
        document["models"][0]["sets"]["own"]["top1"] - document["models"][2]["sets"]["own"]["top1"]
    )
    assert "image_to_text" not in clipkd("evaluate", exported).out

    ended = clipkd("predict", exported, Path(own.path) / "000/0.png")
    assert ended.code == 2
    assert "the model was exported without labels; pass some" in ended.err

    shutil.copyfile(Path(own.path) / "000/0.png", Path(own.path) / "000/9.png")  # another set now
    ended = clipkd("run", own_run / "recipe.yaml", "--out", own_run)
    (Path(own.path) / "000/9.png").unlink()
    lines = {line.split()[0]: line.split()[1] for line in ended.err.splitlines() if len(line.split()) > 1}
    assert lines["student"] == "cached"
    assert lines["student-onnxruntime-fp32"] == "cached", "the headline set has not changed"
    assert lines["measured/student-onnxruntime-fp32"] == "done"


@pytest.mark.usefixtures("one_thread")
def test_photos_with_captions_as_the_headline_of_an_export(tmp_path: Path) -> None:
    """Pictures of any size, one of them broken, and no classes: parity holds, and the file scores as PyTorch does."""
    from export.documents import PlannedExport
    from export.graphs.export_onnx import export_onnx
    from export.pipeline.evaluate_models import evaluate_models
    from export.proof.parity import check_parity
    from toolchain.models.build import save_model

    rows = ["title\tfilepath"]
    for index in range(101):
        (tmp_path / f"{index}.jpg").write_bytes(jpeg(make_picture(30 + index, 80 - index // 2, index)))
        rows.append(f"{'many ' * (index % 5)}picture number {index}\t{index}.jpg")
    (tmp_path / "50.jpg").write_bytes(b"no picture")
    (tmp_path / "val.tsv").write_text("\n".join(rows))
    spec = EvaluateSpec(headline="own", sets=(PairsSet(kind="pairs", name="own", file=str(tmp_path / "val.tsv")),))
    headline = open_set(spec.headline_set)
    model = load_model(REPOSITORY / "recipes" / "glyphs_tiny", random_seed=0)
    exported, checkpoint = tmp_path / "exported", tmp_path / "checkpoint"
    exported.mkdir()
    checkpoint.mkdir()
    save_model(model, checkpoint)
    export_onnx(model, exported, PlannedExport("student", "fp32"), headline)
    assert check_parity(exported, precision="fp32")["image"]["num_samples"] == 100
    with np.load(exported / "parity.npz") as samples:
        assert samples["pixels_BHWC"].shape == (100, 36, 40, 3), "to be resized, and cropped"
    with np.load(exported / "classes.npz") as classes:
        assert len(classes["names"]) == len(classes["features_KD"]) == 0
    document = evaluate_models([exported, checkpoint], spec, Silent())
    ours, theirs = (scored["sets"]["own"] for scored in document["models"])
    assert ours == theirs
    assert ours["unreadable"] == {"n": 1, "first": [str(tmp_path / "50.jpg")]}
    assert document["models"][1]["against_first"]["own"]["drop"] == 0


def test_evaluate_refuses_what_is_no_model_and_what_no_recipe_names(tmp_path: Path, clipkd: Clipkd) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "image.onnx").write_bytes(b"")
    ended = clipkd("evaluate", model)
    assert (ended.code, ended.out) == (2, "")
    assert ended.err == f"error: {model} is in no run, so no recipe lists the evaluation sets; add: --recipe RECIPE\n"
    ended = clipkd("evaluate", tmp_path, "--recipe", "glyphs")
    assert ended.code == 2
    assert f"{tmp_path}: neither an exported model (image.onnx) nor a checkpoint (open_clip_config.json)" in ended.err


def test_a_missing_set_is_said_before_anything_is_trained(tmp_path: Path, clipkd: Clipkd) -> None:
    section = "evaluate: {headline: own, sets: [{kind: folder, name: own, path: gone}]}\n"
    ended = clipkd("run", recipe(tmp_path, section), "--out", tmp_path / "run")
    assert ended.code == 2
    assert f"evaluate.sets 'own'.path: {tmp_path}/gone: no such folder" in ended.err
    assert not (tmp_path / "run" / "student").exists()
