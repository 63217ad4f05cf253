"""What several test modules share: a command line in this process, and a training run of a few dozen samples."""

import io
import json
import shutil
import signal
import sys
import tarfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from PIL import Image

    from toolchain.data.glyphs import TrainingSet

REPOSITORY = Path(__file__).parents[1]
STUDENT = REPOSITORY / "recipes" / "glyphs_tiny"

NUM_CHARACTERS = 12

_WORDS = (
    "a the of in on with and old young small red blue wooden white portrait photo view person man woman child dog cat "
    "street house river mountain sunset beach boat car table window flowers garden kitchen city night winter holding "
    "standing sitting looking walking near behind background isolated vector illustration stock design pattern"
)

# ViT-B-16 of open_clip's with small towers; the vocabulary and the context stay, so its tokenizer fits.
SMALL = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 64, "head_width": 32, "layers": 2},
    "text_cfg": {"width": 32, "heads": 2, "layers": 2},
}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run the tests marked slow too")
    parser.addoption(
        "--kill-seed", type=int, help="repeat the kills of test_resume that this seed, once printed, chose"
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--slow"):
        for item in items:
            if item.get_closest_marker("slow"):
                item.add_marker(pytest.mark.skip(reason="slow: takes more than some ten seconds; run it with --slow"))


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    out: str
    err: str


@pytest.fixture
def clipkd(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Callable[..., Ended]]:
    """The `clipkd` command, in this process: `clipkd("show", "glyphs")`."""
    import clipkd as command

    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    monkeypatch.setenv("COLUMNS", "120")

    def call(*arguments: str | Path) -> Ended:
        monkeypatch.setattr(sys, "argv", ["clipkd", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            command.main()
        said = capsys.readouterr()
        return Ended(int(ended.value.code or 0), said.out, said.err)

    yield call
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Threads that wait for each other are slower than one, for products of this size on a busy machine."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def tiny_training_set() -> "TrainingSet":
    """Twelve Latin letters in each of the seven training faces."""
    import numpy as np

    from toolchain.data.glyphs import TrainingSet, training_set

    everything = training_set()
    first = everything.names.index("latin small letter a")
    index_N = np.flatnonzero((everything.character_N >= first) & (everything.character_N < first + NUM_CHARACTERS))
    return TrainingSet(
        everything.masks_NSS[index_N].copy(),
        everything.character_N[index_N] - first,
        everything.names[first : first + NUM_CHARACTERS],
    )


@pytest.fixture(scope="session")
def tiny_samples() -> "TrainingSet":
    """`tiny_training_set`, read once."""
    return tiny_training_set()


@pytest.fixture(scope="session")
def teacher_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The glyphs student's architecture with random weights of another seed."""
    from toolchain.models.build import load_model, save_model

    folder = tmp_path_factory.mktemp("teacher")
    save_model(load_model(STUDENT, random_seed=99), folder)
    return folder


@pytest.fixture
def tiny_recipe(
    tmp_path: Path, tiny_samples: "TrainingSet", teacher_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Path]:
    """`tiny_recipe(NAME, SECTION=...)`: a recipe of three steps on the tiny samples, some of its sections changed."""
    import yaml

    monkeypatch.setattr("toolchain.data.glyphs.training_set", lambda: tiny_samples)

    def write(name: str = "mine", **changes: Any) -> Path:
        content = {
            "name": name,
            "data": {"kind": "glyphs", "views": 2},
            "teacher": {"model": str(teacher_folder)},
            "student": {"model": "glyphs_tiny"},
            "distill": {"steps": 3, "batch_size": 8, "lr": 1e-3, "warmup": 0},
            "export": {"precisions": ["fp32"]},
        }
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump({key: value for key, value in (content | changes).items() if value is not None}))
        return path

    return write


@pytest.fixture
def student_folder(tmp_path: Path) -> Path:
    """A copy of the glyphs student's configuration and tokenizer, to be changed at will."""
    return Path(shutil.copytree(STUDENT, tmp_path / "student_config"))


def make_picture(width: int, height: int, seed: int, noise: float = 4.0) -> "Image.Image":
    """Something like a photograph: random fields whose contrast falls with scale, and grain."""
    import numpy as np
    from PIL import Image

    random = np.random.default_rng(seed)
    coarse = np.full((128, 128, 3), random.uniform(80, 170, 3))
    for octave in range(1, 8):
        cells = 32 * 0.7**octave * random.standard_normal((2**octave, 2**octave, 3))
        coarse += np.kron(cells, np.ones((128 >> octave, 128 >> octave, 1)))
    smooth = Image.fromarray(coarse.clip(0, 255).astype(np.uint8)).resize((width, height), Image.Resampling.BICUBIC)
    grain_HW1 = noise * random.standard_normal((height, width, 1), np.float32)
    return Image.fromarray((smooth + grain_HW1).clip(0, 255).astype(np.uint8))


def jpeg(picture: "Image.Image", **options: Any) -> bytes:
    encoded = io.BytesIO()
    picture.save(encoded, "JPEG", **{"quality": 92, **options})
    return encoded.getvalue()


def write_tar(path: Path, members: Iterable[tuple[str, bytes]], format: int = tarfile.USTAR_FORMAT) -> Path:
    """A tar archive of named contents, in this order, as often as they are named."""
    with tarfile.open(path, "w", format=format) as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def make_shards(
    folder: Path, num_shards: int, samples_per_shard: int, sizes: tuple[int, int] = (300, 512), seed: int = 0
) -> list[Path]:
    """Webdataset shards `00000.tar` and on, as img2dataset writes them: KEY.jpg, KEY.json and KEY.txt for each sample.

    Width and height are drawn from `sizes`, captions are of 4 to 20 words; every sample differs from every other.
    """
    import numpy as np

    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for shard in range(num_shards):
        members = []
        for row in range(samples_per_shard):
            random = np.random.default_rng([seed, shard, row])
            width, height = random.integers(sizes[0], sizes[1], 2, endpoint=True).tolist()
            key = f"{shard:05d}{row:04d}"
            caption = " ".join(random.choice(_WORDS.split(), random.integers(4, 21)))
            about = {"caption": caption, "url": f"https://example.org/{key}.jpg", "key": key, "status": "success"}
            about |= {"error_message": None, "width": width, "height": height, "exif": "{}"}
            members += [
                (f"{key}.jpg", jpeg(make_picture(width, height, int(random.integers(1 << 32))))),
                (f"{key}.json", json.dumps(about).encode()),
                (f"{key}.txt", caption.encode()),
            ]
        paths.append(write_tar(folder / f"{shard:05d}.tar", members))
    return paths
