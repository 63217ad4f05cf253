"""The one rule by which folders are classes of images, and names of files are images, in training and evaluation."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import STUDENT, jpeg, make_picture, write_tar
from PIL import Image
from pydantic import TypeAdapter
from training import silent, spec

from toolchain.data.batch import Geometry, TrainingData
from toolchain.data.class_folders import read_class_name
from toolchain.data.images import SUFFIXES_OF_FORMAT
from toolchain.data.inspection import inspect
from toolchain.data.inspection_tables import inspection_tables
from toolchain.data.listing import require_file, require_folder
from toolchain.data.open import fingerprint, training_data
from toolchain.data.packing import pack
from toolchain.distillation.distill import Training, distill
from toolchain.errors import ArtifactError, ClipkdError, UsageError
from toolchain.evaluation.open_sets import fingerprint as evaluation_fingerprint
from toolchain.evaluation.open_sets import open_set
from toolchain.filesystem import read_json
from toolchain.models.build import load_model
from toolchain.recipe.data import DataSpec
from toolchain.recipe.evaluate import FolderSet

SMALL = Geometry(16, "bicubic")


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def parsed(**fields: Any) -> DataSpec:
    return TypeAdapter(DataSpec).validate_python(fields)


def opened(batch_size: int = 1, said: list[str] | None = None, **fields: Any) -> TrainingData:
    say = (lambda _: None) if said is None else said.append
    return training_data(parsed(**fields), seed=0, batch_size=batch_size, say=say)


def write_images(root: Path, *names: str) -> Path:
    for number, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg(make_picture(20, 16, seed=number)))
    return root


def evaluated(root: Path, **fields: Any) -> FolderSet:
    return FolderSet(kind="folder", name="mine", path=str(root), **fields)


# Names


@pytest.mark.parametrize(
    ("written", "read"),
    [("red_circle", "red circle"), ("red circle", "red circle"), (" sea_lion_ ", "sea lion"), ("__init__", "init")],
)
def test_underscores_are_spaces(written: str, read: str) -> None:
    assert read_class_name(written) == read


def test_a_class_has_one_name_everywhere(tmp_path: Path) -> None:
    """Names of folders and in files, for training and for evaluation, make the same prompts."""
    root = write_images(tmp_path / "root", "red_circle/a.jpg", "blue_square/b.jpg")
    (tmp_path / "names.tsv").write_text("red_circle\tred_circle\nblue_square\tblue_square\n")
    (tmp_path / "names.yaml").write_text("red_circle: red_circle\nblue_square: blue_square\n")
    (tmp_path / "classes.txt").write_text("red_circle\nblue_square\n")
    prompts = {"a photo of a red circle.", "a photo of a blue square."}
    folder = {"kind": "image_folder", "path": str(root)}
    images = {"kind": "images", "path": str(root), "classes": str(tmp_path / "classes.txt")}
    for fields in (folder, folder | {"names": str(tmp_path / "names.tsv")}, images):
        captions = opened(**fields).list_captions(np.arange(2))
        assert {text for texts in captions for text in texts} == prompts
    named = {"red_circle": "red_circle", "blue_square": "blue_square"}
    for classes in (None, named, str(tmp_path / "names.yaml")):
        data = open_set(evaluated(root, classes=classes))
        assert {data.templates[0].replace("{}", text) for text in data.texts} == prompts


def test_only_stages_whose_names_changed_are_made_again(tmp_path: Path) -> None:
    """A name that has an underscore gives another fingerprint than a name that has none."""
    root = write_images(tmp_path / "root", "cat/a.jpg", "dog/b.jpg")
    spec_of_plain = evaluated(root)
    digest = hashlib.sha256(spec_of_plain.model_dump_json(exclude={"name"}).encode())
    for path in open_set(spec_of_plain).files:
        stat = path.stat()
        digest.update(f"{path}\0{stat.st_size}\0{stat.st_mtime_ns}\0".encode())
    assert evaluation_fingerprint(spec_of_plain) == digest.hexdigest(), "as before the rule"
    spec_of_underscore = evaluated(root, classes={"cat": "a_cat", "dog": "dog"})
    digest = hashlib.sha256(spec_of_underscore.model_dump_json(exclude={"name"}).encode())
    for path in open_set(spec_of_underscore).files:
        stat = path.stat()
        digest.update(f"{path}\0{stat.st_size}\0{stat.st_mtime_ns}\0".encode())
    assert evaluation_fingerprint(spec_of_underscore) != digest.hexdigest()


# Folders


def test_images_in_subfolders_belong_to_the_class(tmp_path: Path) -> None:
    root = write_images(tmp_path / "root", "cat/a.jpg", "cat/2024/b.jpg", "cat/.thumbs/c.jpg", "dog/d.jpg")
    assert opened(kind="image_folder", path=str(root)).num_samples == 3
    data = open_set(evaluated(root))
    assert data.image_group_N.tolist() == [0, 0, 1]
    assert [Path(str(image)).name for image in data.images] == ["a.jpg", "b.jpg", "d.jpg"]


def test_an_empty_class_is_refused_by_both(tmp_path: Path) -> None:
    root = write_images(tmp_path / "root", "cat/a.jpg", "eel/b.heic")
    (root / "owl").mkdir()
    message = r"2 of 3 class folders have no image: eel \(it has 1 \.heic\), owl\. Add images"
    with pytest.raises(UsageError, match=rf"data\.path: .*{message}"):
        opened(kind="image_folder", path=str(root))
    with pytest.raises(UsageError, match=rf"evaluate\.sets 'mine': .*{message}"):
        open_set(evaluated(root))


def test_a_message_about_many_classes_stays_short(tmp_path: Path) -> None:
    root = write_images(tmp_path / "root", "cat/a.jpg")
    for number in range(500):
        (root / f"empty{number:03}").mkdir()
    for open_it in (lambda: opened(kind="image_folder", path=str(root)), lambda: open_set(evaluated(root))):
        with pytest.raises(UsageError, match=r"empty000, .*, \.\.\. \(500 in all\)") as raised:
            open_it()
        assert len(str(raised.value)) < 400


def test_a_folder_that_cannot_be_read_is_not_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write_images(tmp_path / "root", "cat/a.jpg", "cat/locked/b.jpg")

    def refuse(folder: Any, onerror: Any = None, **_: Any) -> list[Any]:
        onerror(PermissionError(13, "Permission denied", str(root / "cat" / "locked")))
        return []

    monkeypatch.setattr("toolchain.data.listing.os.walk", refuse)
    for open_it in (lambda: opened(kind="image_folder", path=str(root)), lambda: open_set(evaluated(root))):
        with pytest.raises(ClipkdError, match="locked: cannot be read: Permission denied"):
            open_it()


def test_a_message_about_a_long_line_stays_short(tmp_path: Path) -> None:
    root = write_images(tmp_path / "root", "cat/a.jpg")
    (tmp_path / "names.tsv").write_text("x" * 1_000_000)
    message = r"names\.tsv: line 1: expected FOLDER<tab>NAME; got 'x{80}'\.\.\. \(1,000,000 characters\)"
    with pytest.raises(UsageError, match=message) as raised:
        opened(kind="image_folder", path=str(root), names=str(tmp_path / "names.tsv"))
    assert len(str(raised.value)) < 400


# Suffixes


def write_every_suffix(folder: Path) -> int:
    """Write an image under every suffix that is read, half of them in capitals; return their number."""
    folder.mkdir(parents=True)
    number = 0
    for kind, suffixes in SUFFIXES_OF_FORMAT.items():
        for suffix in suffixes:
            name = f"{number:02}.{suffix.upper() if number % 2 else suffix}"
            image = Image.new("L", (20, 20), number) if suffix in ("pgm", "pbm") else make_picture(20, 20, seed=number)
            image.save(folder / name, "JPEG" if suffix == "mpo" else kind)
            number += 1
    return number


def test_every_suffix_is_read_by_training_and_evaluation(tmp_path: Path) -> None:
    number = write_every_suffix(tmp_path / "root" / "cat")
    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    folder = {"kind": "image_folder", "path": str(tmp_path / "root")}
    images = {"kind": "images", "path": str(tmp_path / "root"), "classes": str(tmp_path / "classes.txt")}
    members = []
    for path in sorted((tmp_path / "root" / "cat").iterdir()):
        members += [(path.name, path.read_bytes()), (f"{path.stem}.txt", b"a cat")]
    shards = {"kind": "webdataset", "shards": [str(write_tar(tmp_path / "a.tar", members))]}
    for fields in (folder, images, shards):
        data = opened(**fields)
        assert data.num_samples == number
        assert not data.left_out
        assert len(data.read_view(np.arange(number), 0, [SMALL]).sample_B) == number
        assert inspect(parsed(**fields))["good"] == number
    scored = open_set(evaluated(tmp_path / "root"))
    assert len(scored) == number
    assert all(scored.image(index) is not None for index in range(number))
    index = pack(parsed(**folder), tmp_path / "packed")
    assert index["samples"] == number
    packed = opened(kind="webdataset", shards=[str(tmp_path / "packed" / "00000.tar")])
    assert packed.num_samples == number


def write_mixed(root: Path) -> Path:
    write_images(root, *(f"cat/{number}.jpg" for number in range(8)), "cat/a.heic", "cat/b.HEIC", "dog/c.jpg", "d.jpg")
    for name in ("cat/0.txt", "cat/1.txt", "cat/2.txt", "readme", "Thumbs.db", "dog/.DS_Store"):
        (root / name).write_bytes(b"x")
    (root / "dog" / "linked").symlink_to(root / "cat")
    return root


PASSED_OVER = {".txt": 3, ".heic": 2, ".jpg outside the class folders": 1, "link to a folder": 1, "without suffix": 1}


def test_what_is_passed_over_is_counted_by_suffix_and_named(tmp_path: Path, one_thread: None) -> None:
    root = write_mixed(tmp_path / "root")
    fields = {"kind": "image_folder", "path": str(root)}
    said: list[str] = []
    data = opened(batch_size=4, said=said, **fields)
    assert data.num_samples == 9
    assert said == [
        "passed over, no samples: 3 .txt, 2 .heic, 1 .jpg outside the class folders, 1 link to a folder, 1 without "
        "suffix (.heic: images in a format that is not read; convert them, for example to JPEG); "
        f"first: {root}/d.jpg"
    ]
    document = inspect(parsed(**fields))
    assert (document["samples"], document["good"], document["passed_over"]) == (9, 9, PASSED_OVER)
    (table,) = [table for table in inspection_tables(document) if table.headers[0] == "passed over, no samples"]
    assert table.rows[1] == [".heic", "2", "images in a format that is not read; convert them, for example to JPEG"]
    assert pack(parsed(**fields), tmp_path / "packed")["passed_over"] == PASSED_OVER
    weights = {"loss_weights": {"task": 1, "crd": 0, "fd": 0, "icl": 0}}
    (tmp_path / "run").mkdir()
    summary = distill(
        Training(
            spec(steps=2, warmup=0, batch_size=4, **weights),
            load_model(STUDENT, random_seed=0),
            None,
            data,
            max_damaged=0,
        ),
        tmp_path / "run",
        silent,
    )
    assert summary["passed_over"] == PASSED_OVER
    assert "damaged" not in summary, "no note beside the images is a corrupt sample"


def test_an_evaluation_counts_other_files_and_drops_no_image(tmp_path: Path) -> None:
    root = write_mixed(tmp_path / "root")
    with pytest.raises(UsageError, match=r"cannot be read: 2 \.heic \(.*a\.heic\); an evaluation drops no image"):
        open_set(evaluated(root))
    for path in (root / "cat").glob("*.[hH]*"):
        path.unlink()
    assert open_set(evaluated(root)).passed_over == {kind: n for kind, n in PASSED_OVER.items() if kind != ".heic"}


def test_a_link_to_no_image_is_counted(tmp_path: Path) -> None:
    """As git-annex and DVC leave them where an image was not fetched."""
    root = write_images(tmp_path / "root", "cat/a.jpg")
    (root / "cat" / "b.jpg").symlink_to(root / "gone.jpg")
    data = opened(kind="image_folder", path=str(root))
    assert [(left.reason, left.number) for left in data.left_out] == [("no such file", 1)]
    assert inspect(parsed(kind="image_folder", path=str(root)))["broken"]["no such file"]["count"] == 1
    with pytest.raises(UsageError, match="1 no such file"):
        open_set(evaluated(root))


def test_further_images_of_a_sample_are_counted(tmp_path: Path) -> None:
    picture = jpeg(make_picture(20, 20, seed=0))
    members = [("a.jpg", picture), ("a.txt", b"a"), ("a.seg.png", picture), ("a.heic", b"x"), ("a.json", b"{}")]
    fields = {"kind": "webdataset", "shards": [str(write_tar(tmp_path / "a.tar", members))]}
    said: list[str] = []
    for _ in ("indexed", "from the stored index"):
        assert opened(said=said, **fields).num_samples == 1
    named = "passed over, no samples: 1 .heic beside the image, 1 .png beside the image"
    assert said == [f"{named}; first: {tmp_path}/a.tar: a.seg.png"] * 2
    assert inspect(parsed(**fields))["passed_over"] == {".heic beside the image": 1, ".png beside the image": 1}


# Fingerprints


def test_a_fingerprint_changes_when_other_files_count_as_samples(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A teacher cache of another numbering is then refused."""
    shards = parsed(kind="webdataset", shards=[str(write_tar(tmp_path / "a.tar", [("a.jfif", b"x"), ("a.txt", b"a")]))])
    folder = parsed(kind="image_folder", path=str(write_images(tmp_path / "root", "cat/a.jpg", "cat/b.jfif")))
    before = [fingerprint(shards), fingerprint(folder)]
    monkeypatch.setattr("toolchain.data.tar_files.PAIRING_VERSION", 0)
    monkeypatch.setattr("toolchain.data.listing.is_image_name", lambda name: name.endswith(".jpg"))
    assert fingerprint(shards) != before[0]
    assert fingerprint(folder) != before[1]


def test_files_and_folders_that_are_taken_for_each_other_are_named(tmp_path: Path) -> None:
    file = tmp_path / "pairs.csv"
    file.write_text("filepath,title\n")
    with pytest.raises(UsageError, match=r"pairs.csv: is a file; expected a folder; data.kind is csv"):
        require_folder(str(file))
    with pytest.raises(UsageError, match="is a folder; expected a file"):
        require_file(str(tmp_path))
    with pytest.raises(UsageError, match=r"no such folder .a recipe does not expand ~; write the whole path"):
        require_folder("~/images of nobody")


def test_a_document_of_a_run_that_was_changed_is_named(tmp_path: Path) -> None:
    path = tmp_path / "preprocess.json"
    with pytest.raises(ArtifactError, match="no such file; clipkd wrote it"):
        read_json(path)
    path.write_text("{")
    with pytest.raises(ArtifactError, match=r"preprocess.json: not JSON: .* Restore the folder"):
        read_json(path)
