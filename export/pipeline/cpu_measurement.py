"""Describe the measurement of a run's model on this machine's CPU, and the parts of a stored one that still hold.

A measurement is one stage, measured/MODEL/cpu, with two parts: accuracy and latency.  `clipkd run` makes both,
`clipkd evaluate` only accuracy and `clipkd profile` only latency.  A command that makes one part copies the other from
the stored measurement, if that is of the same model and machine.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from export.model_folder import find_run, is_checkpoint
from export.pipeline.plan import plan_exports
from toolchain.precisions import REFERENCE_PRECISION
from toolchain.provenance import machine
from toolchain.recipe.evaluate import EvaluateSpec
from toolchain.recipe.export import ProfileSpec
from toolchain.recipe.load import load_recipe
from toolchain.runtimes import RUNTIMES
from toolchain.stage import MANIFEST, REFERENCE_KIND, Stage, StageSpec, list_kept, open_stage

STORED_MODELS = "a run stores measurements of exported models, and of checkpoints with an fp32 export of their own"


class Scoring(NamedTuple):
    """The evaluation sets that a model is scored on, and the hash of their files."""

    spec: EvaluateSpec
    fingerprint: str


def scoring(spec: EvaluateSpec) -> Scoring:
    """Return evaluation sets with the hash of their files, which is computed once for all models."""
    from toolchain.evaluation.open_sets import fingerprints

    return Scoring(spec, fingerprints(spec.sets))


@dataclass(frozen=True)
class Subject:
    """A model of a run to measure on this machine's CPU: an exported one, or a checkpoint in PyTorch."""

    run: Path

    model: Stage
    """The exported model.  For a checkpoint: its fp32 export, whose samples and preprocessing the measurement uses."""

    checkpoint: Stage | None = None
    mode: str = "eager"
    """For a checkpoint: eager or compiled."""

    @property
    def name(self) -> str:
        return self.model.path.name if self.checkpoint is None else f"{self.checkpoint.path.name}-pytorch-{self.mode}"

    @property
    def path(self) -> Path:
        return self.run / "measured" / self.name / "cpu"

    @property
    def timed(self) -> Path:
        """Return the folder that is timed."""
        return self.model.path if self.checkpoint is None else self.checkpoint.path

    def specify(self, fields: Mapping[str, Any], fingerprints: Mapping[str, str]) -> StageSpec:
        """Return the stage of a measurement of this model on this machine."""
        inputs, kind, version, mode = {"model": self.model}, "measure", 2, {}
        if self.checkpoint is not None:
            inputs, kind, version = {"checkpoint": self.checkpoint, "model": self.model}, REFERENCE_KIND, 1
            mode = {"pytorch": self.mode}
        own_machine = {"machine": json.dumps(machine(), sort_keys=True)}
        return StageSpec(self.path, kind, version, {**fields, **mode}, {**fingerprints, **own_machine}, inputs)

    def specify_parts(
        self, scored: Scoring | None, timing: ProfileSpec | None, *, times_anew: bool = False
    ) -> StageSpec:
        """Return the stage with the parts that are asked for, and the other part if a stored measurement of it holds.

        A stored latency that was measured for at least as long as `timing` asks is kept, unless `times_anew`.
        """
        earlier = self.earlier
        is_timed_now = timing is not None and (times_anew or not earlier.is_longer(timing, or_equal=True))
        fields = {
            "evaluate": earlier.evaluate if scored is None else scored.spec.model_dump(mode="json"),
            "profile": timing.model_dump(exclude={"pytorch"}) if timing and is_timed_now else earlier.profile,
        }
        sets = earlier.sets if scored is None else scored.fingerprint
        return self.specify(fields, {} if sets is None else {"sets": sets})

    @cached_property
    def earlier(self) -> "Earlier":
        """Return the stored measurement, or one without parts if none of the same model and machine is stored.

        It is read once: a later change of the stored measurement is not seen.

        Raises:
            ArtifactError: the stored measurement is corrupt.
        """
        # a command that was killed while it replaced the measurement may have left it in `.replaced`
        path = next((path for path in (self.path, *list_kept(self.path)) if path.exists()), None)
        if path is None:
            return Earlier(self.path)
        manifest = open_stage(path).manifest
        fields, fingerprints = manifest["fields"], manifest["fingerprints"]
        now = self.specify({}, {}).depends
        holds = all(manifest[key] == now[key] for key in ("kind", "version", "inputs"))
        holds &= fingerprints.get("machine") == now["fingerprints"]["machine"]
        if not holds or fields.get("pytorch") != now["fields"].get("pytorch"):
            return Earlier(self.path)
        return Earlier(path, True, fields.get("evaluate"), fingerprints.get("sets"), fields.get("profile"))


@dataclass(frozen=True)
class Earlier:
    """The parts of a stored measurement that are of the current model and this machine."""

    path: Path
    """Its directory: the stage's own, or that in which an interrupted replacement keeps it."""

    is_proven: bool = False
    """True if it is of the current model and machine, so its parity check holds."""

    evaluate: dict[str, Any] | None = None
    """The evaluate section that it was scored with; None if it has no accuracy."""

    sets: str | None = None
    """The hash of the evaluation sets."""

    profile: dict[str, Any] | None = None
    """The processes and seconds that it was timed with; None if it has no latency."""

    def is_longer(self, timing: ProfileSpec, *, or_equal: bool = False) -> bool:
        """Return True if its latency is of at least as many processes, and as many seconds in each, as `timing` asks.

        A latency of exactly these processes and seconds counts only if `or_equal`.
        """
        if self.profile is None:
            return False
        if self.profile == timing.model_dump(exclude={"pytorch"}):
            return or_equal
        processes, seconds = self.profile["processes"], self.profile["seconds"]
        return bool(processes >= timing.processes and seconds / processes >= timing.seconds / timing.processes)


def find_subject(model: Path) -> Subject | None:
    """Return an exported model or a checkpoint of a run for measuring; None if a run does not store its measurement.

    A run stores none of a model that is not one of its stages, of a TensorRT build kit (its engines do not run on a
    CPU), and of a checkpoint that has no fp32 export (the samples to verify its features are there).
    """
    run = find_run(model)
    if run is None or not (model / MANIFEST).is_file():
        return None
    parent = model.absolute().parent
    stage = open_stage(model)
    if is_checkpoint(model):
        exported = _find_fp32_export(run, stage) if parent == run else None
        return None if exported is None else Subject(run, exported, stage)
    is_kit = RUNTIMES[stage.manifest["summary"].get("runtime", "onnxruntime")].is_kit
    return None if is_kit or parent != run / "exported" else Subject(run, stage)


def _find_fp32_export(run: Path, checkpoint: Stage) -> Stage | None:
    """Return the fp32 export that `clipkd run` makes of a checkpoint; None if it was made from another checkpoint."""
    planned = plan_exports(load_recipe(run / "recipe.yaml"))
    wanted = checkpoint.path.name, REFERENCE_PRECISION
    paths = [run / "exported" / each.name for each in planned if (each.role, each.precision) == wanted]
    path = next((path for path in paths if (path / MANIFEST).is_file()), None)
    exported = None if path is None else open_stage(path)
    return exported if exported and exported.manifest["inputs"].get("checkpoint") == checkpoint.digest else None
