"""Check, lock and read a run directory and the recipe that it was made from."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import yaml

from toolchain.errors import UsageError
from toolchain.filesystem import replacing
from toolchain.pipeline.plan import PlannedStage
from toolchain.recipe.load import load_recipe
from toolchain.recipe.recipe import Recipe
from toolchain.stage import RESOLVED, refuse_replacing, run_lock

Plan = Callable[[Recipe, Path], Sequence[PlannedStage]]


@contextmanager
def hold_run(recipe: Recipe, run: Path, command: str, plan: Plan, *, replace: bool) -> Iterator[None]:
    """Lock a run directory, creating it if needed, and write its resolved recipe with the command in a comment.

    `plan` returns the stages that the command makes.  Unless `replace` is True, none of them may replace work of
    another recipe that took more than a minute.

    Raises:
        ArtifactError: the directory is not a run, another process has locked it, or it has such work.
    """
    with run_lock(run):
        if not replace:
            refuse_replacing(each for stage in plan(recipe, run) for each in stage.superseded)
        header = "".join(f"# {line}\n" for line in [*command.splitlines(), RESOLVED])
        with replacing(run / "recipe.yaml") as partial:
            partial.write_text(header + yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False), "utf-8")
        yield


def require_run(run: Path) -> None:
    """Raise an error for a directory that is not a run.

    Raises:
        UsageError: the directory does not exist, or has no recipe.yaml.
    """
    if not (run / "recipe.yaml").is_file():
        problem = "no recipe.yaml in it; not a clipkd run" if run.is_dir() else "no such run directory"
        raise UsageError(f"{run}: {problem}. Make one with: clipkd run glyphs --out {run}")


def run_recipe(run: Path, overrides: list[str] | None = None) -> Recipe:
    """Return the recipe that a run was made from, with overrides applied.

    Raises:
        UsageError: the directory is not a run, or an override is wrong.
    """
    require_run(run)
    return load_recipe(run / "recipe.yaml", overrides)
