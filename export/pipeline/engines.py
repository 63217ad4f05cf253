"""Build TensorRT engines from exported TensorRT build kits, as stages."""

import json
from pathlib import Path
from typing import Any

from export.documents import export_summary
from toolchain.errors import ClipkdError
from toolchain.progress import Screen
from toolchain.recipe.recipe import Recipe
from toolchain.runtimes import RUNTIMES
from toolchain.stage import Stage, StageSpec, run_stage


def build_engines(recipe: Recipe, out: Path, exported: dict[str, Stage], screen: Screen) -> dict[str, Stage]:
    """Return the TensorRT engines of every TensorRT build kit, for the GPU of this machine.

    Raises:
        MissingDependency, UnavailableBackend: there is no TensorRT, or no GPU; the kits themselves are complete.
    """
    kits = {name: stage for name, stage in exported.items() if RUNTIMES[export_summary(stage)["runtime"]].is_kit}
    if not kits or not recipe.export.build_engines:
        return {}
    from export.runtime.tensorrt_engines import can_build

    try:
        device = can_build()
    except ClipkdError as error:
        paths = ", ".join(str(stage.path) for stage in kits.values())
        hint = f"The kits are complete: {paths}; build on the device with build_on_device.sh, or export with --no-build"
        raise type(error)(f"{error}. {hint}") from None
    return {f"engines/{name}": open_or_build_engines(kit, out, device, screen) for name, kit in kits.items()}


def open_or_build_engines(kit: Stage, out: Path, device: dict[str, str], screen: Screen) -> Stage:
    """Return the TensorRT engines of one kit of a run, for the GPU of this machine, as `can_build` describes it."""
    from export.runtime.tensorrt_engines import build

    def work(folder: Path) -> dict[str, Any]:
        return build(kit.path, folder, screen.progress)

    name = f"engines/{kit.path.name}"
    screen.starts(name)
    stage = run_stage(
        StageSpec(
            out / name,
            kind="engines",
            version=1,
            fingerprints={"device": json.dumps(device, sort_keys=True)},
            inputs={"kit": kit},
        ),
        work,
    )
    screen.done(name, stage)
    return stage
