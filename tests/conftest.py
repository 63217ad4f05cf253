"""What several test modules share: a command line in this process, and a training run of a few dozen samples."""

import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from toolchain.glyphs import TrainingSet

REPOSITORY = Path(__file__).parents[1]
STUDENT = REPOSITORY / "recipes" / "glyphs_student"

NUM_CHARACTERS = 12

# ViT-B-16 of open_clip's with small towers; the vocabulary and the context stay, so its tokenizer fits.
SMALL = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 64, "head_width": 32, "layers": 2},
    "text_cfg": {"width": 32, "heads": 2, "layers": 2},
}


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

    handler = signal.getsignal(signal.SIGINT)
    monkeypatch.setenv("COLUMNS", "120")

    def call(*arguments: str | Path) -> Ended:
        monkeypatch.setattr(sys, "argv", ["clipkd", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            command.main()
        said = capsys.readouterr()
        return Ended(int(ended.value.code or 0), said.out, said.err)

    yield call
    signal.signal(signal.SIGINT, handler)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Threads that wait for each other are slower than one, for products of this size on a busy machine."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def tiny_samples() -> "TrainingSet":
    """Twelve Latin letters in each of the seven training faces."""
    import numpy as np

    from toolchain.glyphs import TrainingSet, training_set

    everything = training_set()
    first = everything.names.index("latin small letter a")
    index_N = np.flatnonzero((everything.character_N >= first) & (everything.character_N < first + NUM_CHARACTERS))
    return TrainingSet(
        everything.masks_NSS[index_N].copy(),
        everything.character_N[index_N] - first,
        everything.names[first : first + NUM_CHARACTERS],
    )


@pytest.fixture(scope="session")
def teacher_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The glyphs student's architecture with random weights of another seed."""
    from toolchain.models import load_model, save_model

    folder = tmp_path_factory.mktemp("teacher")
    save_model(load_model(STUDENT, random_seed=99), folder)
    return folder


@pytest.fixture
def student_folder(tmp_path: Path) -> Path:
    """A copy of the glyphs student's configuration and tokenizer, to be changed at will."""
    return Path(shutil.copytree(STUDENT, tmp_path / "student_config"))
