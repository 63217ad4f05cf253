"""Describe the measurement of a run's model on this machine's CPU, and the parts of an earlier one that still hold.

A measurement is one stage, measured/MODEL/cpu, with two parts: accuracy and latency.  `clipkd run` makes both at once,
`clipkd evaluate` the first and `clipkd profile` the second.  Whichever command comes later keeps the other part.
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
from toolchain.stage import MANIFEST, REFERENCE_KIND, Stage, StageSpec, open_stage

STORED_MODELS = "a run stores measurements of exported models, and of checkpoints with an fp32 export of their own"


class Scoring(NamedTuple):
    """The evaluation sets that a model is scored on, and the hash of their files."""

    spec: EvaluateSpec
    fingerprint: str


def scoring(spec: EvaluateSpec) -> Scoring:
    """Return evaluation sets with the hash of their files; read them once for all models."""
    from toolchain.evaluation.open_sets import fingerprints

    return Scoring(spec, fingerprints(spec.sets))


@dataclass(frozen=True)
class Subject:
    """A model of a run to measure on this machine's CPU: an exported one, or a checkpoint in PyTorch."""

    run: Path

    model: Stage
    """The exported model.  For a checkpoint it is the fp32 export, which has the samples and the preprocessing."""

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
        inputs, kind, version, about = {"model": self.model}, "measure", 2, {}
        if self.checkpoint is not None:
            inputs, kind, version = {"checkpoint": self.checkpoint, "model": self.model}, REFERENCE_KIND, 1
            about = {"pytorch": self.mode}
        here = {"machine": json.dumps(machine(), sort_keys=True)}
        return StageSpec(self.path, kind, version, {**fields, **about}, {**fingerprints, **here}, inputs)

    def specify_parts(
        self, scored: Scoring | None, timing: ProfileSpec | None, *, times_anew: bool = False
    ) -> StageSpec:
        """Return the stage that has both parts: those asked for, and of the earlier measurement those that still hold.

        An earlier latency that was measured for as long as `timing` asks is kept, unless `times_anew`.
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
        """Return the stored measurement of the same model on the same machine; one without parts if there is none.

        Raises:
            ArtifactError: the stored measurement is corrupt.
        """
        if not self.path.exists():
            return Earlier(self.path)
        manifest = open_stage(self.path).manifest
        fields, fingerprints = manifest["fields"], manifest["fingerprints"]
        now = self.specify({}, {}).depends
        is_ours = all(manifest[key] == now[key] for key in ("kind", "version", "inputs"))
        is_ours &= fingerprints.get("machine") == now["fingerprints"]["machine"]
        if not is_ours or fields.get("pytorch") != now["fields"].get("pytorch"):
            return Earlier(self.path)
        return Earlier(self.path, True, fields.get("evaluate"), fingerprints.get("sets"), fields.get("profile"))


@dataclass(frozen=True)
class Earlier:
    """The parts of a stored measurement that hold for the current model on this machine."""

    path: Path
    is_proven: bool = False
    """Its parity check holds."""

    evaluate: dict[str, Any] | None = None
    """The evaluate section that it was scored with; None if it was not."""

    sets: str | None = None
    """The hash of the evaluation sets."""

    profile: dict[str, Any] | None = None
    """The processes and seconds that it was timed with; None if it was not."""

    def is_longer(self, timing: ProfileSpec, *, or_equal: bool = False) -> bool:
        """Return True if it was timed in at least as many processes and seconds of each, and not just as long."""
        asked = timing.model_dump(exclude={"pytorch"})
        if self.profile is None or self.profile == asked:
            return or_equal and self.profile is not None
        processes, seconds = self.profile["processes"], self.profile["seconds"]
        return bool(processes >= timing.processes and seconds / processes >= timing.seconds / timing.processes)


def find_subject(model: Path) -> Subject | None:
    """Return an exported model or a checkpoint of a run as what is measured; None if its measurement is not stored.

    That is the case for a model that is not a stage of a run, a TensorRT build kit, whose engines do not run on a CPU,
    and a checkpoint without an fp32 export of its own, which has the samples to verify its features with.
    """
    run = find_run(model)
    if run is None or not (model / MANIFEST).is_file():
        return None
    where = model.absolute().parent
    stage = open_stage(model)
    if is_checkpoint(model):
        exported = _find_fp32_export(run, stage) if where == run else None
        return None if exported is None else Subject(run, exported, stage)
    is_kit = RUNTIMES[stage.manifest["summary"].get("runtime", "onnxruntime")].is_kit
    return None if is_kit or where != run / "exported" else Subject(run, stage)


def _find_fp32_export(run: Path, checkpoint: Stage) -> Stage | None:
    """Return the export that `clipkd run` measures a checkpoint beside, if it was made from this checkpoint."""
    planned = plan_exports(load_recipe(run / "recipe.yaml"))
    wanted = checkpoint.path.name, REFERENCE_PRECISION
    paths = [run / "exported" / each.name for each in planned if (each.role, each.precision) == wanted]
    path = next((path for path in paths if (path / MANIFEST).is_file()), None)
    exported = None if path is None else open_stage(path)
    return exported if exported and exported.manifest["inputs"].get("checkpoint") == checkpoint.digest else None
