"""clipkd commands in processes of their own, which say how far they are and can be killed at any moment.

They are forked by the server of `two_processes`, which has imported torch once: half a second each, and not six.
"""

import multiprocessing
import os
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import two_processes  # noqa: F401  # preloads the server

TIMEOUT_S = 120.0  # for one step, on a machine that is busy with other things

MOMENTS = (
    "a checkpoint half written",
    "a checkpoint before its rename",
    "an old checkpoint before its removal",
    "the log cut to the checkpoint's step",
    "the model saved",
    "the files hashed",
    "the manifest written",
    "the scratch removed",
)
"""Where a command can be made to wait for its end."""


@dataclass
class Killable:
    """A `clipkd` command at work."""

    process: Any
    connection: Connection
    said: Path
    steps: list[int] = field(default_factory=list)
    """The steps it said it did."""

    def hears(self, wanted: Callable[[Any], bool]) -> bool:
        """Whether it says what is wanted before it ends."""
        while self.connection.poll(TIMEOUT_S):
            try:
                heard = self.connection.recv()
            except EOFError:
                return False
            if isinstance(heard, int):
                self.steps.append(heard)
            if wanted(heard):
                return True
        raise AssertionError(f"nothing heard for {TIMEOUT_S} s; it said: {self.said.read_text()}")

    def kill(self) -> None:
        """kill -9."""
        self.process.kill()
        self.process.join()

    def ends(self) -> tuple[int, str]:
        """Its exit code and what it said."""
        self.hears(lambda heard: False)
        self.process.join()
        return self.process.exitcode, self.said.read_text()


def start(
    *arguments: str | Path, cache: Path, said: Path, waiting: tuple[str, int] | None = None, keep: Path | None = None
) -> Killable:
    """`clipkd ARGUMENTS`, on the tiny samples where it is to read glyphs.

    `waiting`: at a moment and the number of its occurrence it waits to be killed, and says so.  `keep`: where the
    checkpoints of finished stages are copied before they are removed.  `cache`: for the index of shards.
    """
    ours, theirs = multiprocessing.Pipe(duplex=False)
    context = multiprocessing.get_context("forkserver")
    process = context.Process(target=_run, args=(list(map(str, arguments)), cache, said, waiting, keep, theirs))
    process.start()
    theirs.close()
    return Killable(process, ours, said)


def _run(
    arguments: list[str],
    cache: Path,
    said: Path,
    waiting: tuple[str, int] | None,
    keep: Path | None,
    connection: Connection,
) -> None:
    import torch
    from conftest import tiny_training_set

    import clipkd as command
    from toolchain import stage as stages
    from toolchain.data import glyphs
    from toolchain.distillation import checkpoints
    from toolchain.distillation import distill as distil
    from toolchain.distillation import make_teacher_cache as caching

    torch.set_num_threads(1)
    caching.SHARD_SAMPLES, caching.CHUNK = 16, 5  # many shards of the tiny samples
    with said.open("a") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    connection.send("started")
    samples = tiny_training_set()
    glyphs.training_set = lambda: samples  # type: ignore[assignment]
    os.environ["XDG_CACHE_HOME"] = str(cache)

    def progress(self: Any, what: str, done: int, total: int, note: str = "") -> None:
        connection.send(done if what == "training" else what)

    command.TerminalScreen.progress = progress  # type: ignore[method-assign]
    occurred = dict.fromkeys(MOMENTS, 0)

    def moment(name: str) -> bool:
        """Whether to wait here; not a function that waits, so that what is done half can be done before."""
        occurred[name] += 1
        return waiting == (name, occurred[name])

    def wait() -> None:
        connection.send("waiting")
        time.sleep(10 * TIMEOUT_S)

    real_save, real_replace, real_unlink = torch.save, Path.replace, Path.unlink
    real_save_model, real_hashes = distil.save_model, stages._hashes
    real_rmtree = shutil.rmtree

    def save(state: Any, file: Any) -> None:
        real_save(state, file)
        if moment("a checkpoint half written"):
            file.truncate(file.tell() // 2)
            file.flush()
            wait()

    def replace(path: Path, target: Path) -> Path:
        name = "a checkpoint before its rename" if path.name == "checkpoint.partial" else None
        name = "the log cut to the checkpoint's step" if Path(target).name == "train.jsonl" else name
        if name and moment(name):
            wait()
        return real_replace(path, target)

    def unlink(path: Path, missing_ok: bool = False) -> None:
        if path.name.startswith("step-") and moment("an old checkpoint before its removal"):
            wait()
        real_unlink(path, missing_ok)

    def save_model(*model_and_folder: Any) -> None:
        real_save_model(*model_and_folder)
        if moment("the model saved"):
            wait()

    def hashes(folder: Path) -> dict[str, str]:
        found = real_hashes(folder)
        if (folder / distil.CHECKPOINTS).is_dir():
            if keep:
                shutil.copytree(folder / distil.CHECKPOINTS, keep / folder.name, dirs_exist_ok=True)
            if moment("the files hashed"):
                wait()
        return found

    def rmtree(path: str | Path, *arguments: Any, **options: Any) -> None:
        ours = Path(path).name == stages.SCRATCH and Path(path).is_dir()
        if ours and moment("the manifest written"):
            wait()
        real_rmtree(path, *arguments, **options)
        if ours and moment("the scratch removed"):
            wait()

    checkpoints.torch.save = save  # type: ignore[assignment]
    Path.replace, Path.unlink = replace, unlink  # type: ignore[method-assign]
    distil.save_model, stages._hashes = save_model, hashes
    stages.shutil.rmtree = rmtree  # type: ignore[assignment]
    sys.argv = ["clipkd", *arguments]
    command.main()
