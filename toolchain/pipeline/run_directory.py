"""Check, lock and read a run directory and the recipe that it was made from."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import yaml

from toolchain.errors import ArtifactError, UsageError
from toolchain.filesystem import replacing
from toolchain.pipeline.plan import PlannedStage
from toolchain.recipe.load import load_recipe
from toolchain.recipe.recipe import Recipe
from toolchain.stage import MANIFEST, REPLACED, RESOLVED, open_stage, refuse_replacing, run_lock
from toolchain.user_documents import parse_yaml

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
            _refuse_other_purpose(recipe, run)
        header = "".join(f"# {line}\n" for line in [*command.splitlines(), RESOLVED])
        with replacing(run / "recipe.yaml") as partial:
            partial.write_text(header + yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False), "utf-8")
        yield


def _refuse_other_purpose(recipe: Recipe, run: Path) -> None:
    """Refuse to replace the recipe of a run that trains by one that adopts a model, or the other way round.

    Raises:
        ArtifactError: the run is of the other purpose.
    """
    try:
        earlier = parse_yaml((run / "recipe.yaml").read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return
    if not isinstance(earlier, dict) or "student" not in earlier:
        return
    trains = earlier.get("distill") is not None
    if trains != (recipe.distill is not None):
        purpose = "trains a student" if trains else "adopts a model"
        raise ArtifactError(
            f"{run}: is the run of recipe {earlier.get('name')}, which {purpose}; its recipe.yaml would be replaced. "
            "To keep it, choose another --out. To replace it, add --replace"
        )


def require_run(run: Path) -> None:
    """Raise an error for a directory that is not a run.

    Raises:
        UsageError: the directory does not exist, is a file, or has no recipe.yaml; a message about a directory inside
            a run names the run.
    """
    if (run / "recipe.yaml").is_file():
        return
    outer = next((folder for folder in run.absolute().parents[:3] if (folder / "recipe.yaml").is_file()), None)
    if run.is_dir() and outer is not None:
        raise UsageError(f"{run}: expected a run directory; this is a part of the run {outer}. Name that")
    if run.is_file():
        made = (
            f"; make a run from this recipe with: clipkd run {run} --out RUN" if run.suffix in (".yaml", ".yml") else ""
        )
        raise UsageError(f"{run}: is a file; expected a run directory{made}")
    if any(run.glob(f"*/{MANIFEST}")):
        raise UsageError(
            f"{run}: it has stages, but no recipe.yaml. Restore that file, or repeat the command that made this run, "
            f"with its own recipe: clipkd run RECIPE --out {run}"
        )
    problem = "no recipe.yaml in it; not a clipkd run" if run.is_dir() else "no such run directory"
    raise UsageError(f"{run}: {problem}. Make one with: clipkd run glyphs --out {run}")


def verify_stages(directories: Sequence[Path]) -> tuple[dict[str, str], list[str]]:
    """Check every file of stages or runs; return the digests of whole stages by path, and what is wrong with others.

    Raises:
        UsageError: a directory has no stage in it.
    """
    checked: dict[str, str] = {}
    problems: list[str] = []
    for directory in directories:
        inside = (
            path.parent for path in directory.rglob(MANIFEST) if REPLACED not in path.relative_to(directory).parts
        )
        stages = [directory] if (directory / MANIFEST).exists() else sorted(inside)
        if not stages:
            raise UsageError(f"{directory}: no clipkd stage in it; expected a run, or a directory with {MANIFEST}")
        for path in stages:
            if path.name.startswith("."):
                continue
            try:
                checked[str(path)] = open_stage(path).digest
            except ArtifactError as error:
                problems.append(str(error))
    return checked, problems


def run_recipe(run: Path, overrides: list[str] | None = None) -> Recipe:
    """Return the recipe that a run was made from, with overrides applied.

    Raises:
        UsageError: the directory is not a run, or an override is wrong.
    """
    require_run(run)
    return load_recipe(run / "recipe.yaml", overrides)
