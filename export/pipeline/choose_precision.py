"""Score and time the models that a run exported for each runtime, and record which to ship (`export.auto`)."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from export.pipeline.measure import measure_models
from export.pipeline.plan import FAILED, is_of_the_model, plan_exports, shipped_role
from export.pipeline.precision_verdicts import (
    MAX_DROP,
    MIN_PROCESSES,
    Candidate,
    Count,
    Latency,
    Verdict,
    decide,
    doubts,
    too_far,
)
from toolchain.errors import ClipkdError, GateError
from toolchain.filesystem import partial_path, read_json, write_json
from toolchain.pipeline.stage_inputs import require_evaluation
from toolchain.precisions import PRECISIONS, REFERENCE_PRECISION
from toolchain.progress import Screen
from toolchain.provenance import machine
from toolchain.recipe.recipe import Recipe
from toolchain.significance import paired_drop
from toolchain.stage import Stage, StageSpec, run_stage

if TYPE_CHECKING:
    from export.profiling.protocol import Profile

AUTO = "auto.json"

Models = Mapping[str, Stage]
Profiles = Mapping[str, Mapping[str, Any]]
"""Documents of profile.json by precision."""


class AutoCandidate(TypedDict):
    """One precision in one runtime; unknown values are null."""

    precision: str
    model: str
    """Its directory, relative to the run."""

    digest: str | None
    verdict: Count
    reason: str
    top1_drop_vs_fp32: float | None
    top1_drop_vs_fp32_low: float | None
    top1_drop_vs_fp32_high: float | None
    top1_drop_vs_fp32_p: float | None
    p50_ms: float | None
    p50_low_ms: float | None
    p50_high_ms: float | None
    grade: str | None
    flags: list[str]


class AutoRuntime(TypedDict):
    precision: str | None
    """The precision to ship; null if not even fp32 can be shipped."""

    model: str | None
    candidates: list[AutoCandidate]
    """The safest first."""

    warnings: list[str]


class AutoDocument(TypedDict):
    """The content of auto.json."""

    schema: int
    max_drop: float
    headline: str
    runtimes: dict[str, AutoRuntime]


def choose_precisions(recipe: Recipe, out: Path, exported: Models, measured: Models, screen: Screen) -> AutoDocument:
    """Return auto.json: for each runtime the model to ship, and the reason why each other precision was rejected.

    Accuracy comes from `measure_models`, which runs here for models missing from `measured`. Models within the budget
    are then timed in interleaved processes.
    """
    max_drop = _max_drop(recipe)
    runtimes: dict[str, AutoRuntime] = {}
    for runtime in recipe.export.runtimes:
        ours = [planned for planned in plan_exports(recipe) if planned.role == shipped_role(recipe)]
        names = {planned.precision: planned.name for planned in ours if planned.runtime == runtime}
        candidates = _score(recipe, out, names, exported, measured, screen)
        profiles: Profiles = {}
        if candidates[REFERENCE_PRECISION].problem is None:
            within = {of: exported[names[of]] for of in candidates if too_far(candidates[of], max_drop) is None}
            profiles, problems = _time(recipe, out, runtime, within, screen)
            candidates |= {of: replace(candidates[of], problem=problem) for of, problem in problems.items()}
            candidates |= {of: replace(candidates[of], latency=_latency(profiles[of])) for of in profiles}
        verdicts = decide(list(candidates.values()), max_drop)
        rows = [
            _row(names[of], exported.get(names[of]), candidates[of], verdict, profiles.get(of))
            for of, verdict in verdicts.items()
        ]
        chosen = next((of for of, verdict in verdicts.items() if verdict.count == "chosen"), None)
        warnings = [*doubts(candidates[chosen], max_drop), *_noise(out, runtime, profiles)] if chosen else []
        model = f"exported/{names[chosen]}" if chosen else None
        runtimes[runtime] = {"precision": chosen, "model": model, "candidates": rows, "warnings": warnings}
        screen.line(f"auto/{runtime}", f"ship {chosen}" if chosen else "nothing to ship")
    document: AutoDocument = {
        "schema": 1,
        "max_drop": max_drop,
        "headline": require_evaluation(recipe).headline,
        "runtimes": runtimes,
    }
    write_json(out / AUTO, document, allow_nan=False)
    return document


def _max_drop(recipe: Recipe) -> float:
    """Return how much top-1 may drop: the value in `export.auto`, else in `quantize`, else MAX_DROP."""
    assert recipe.export.auto is not None
    quantize_drop = recipe.quantize.max_drop if recipe.quantize is not None else None
    return next(drop for drop in (recipe.export.auto.max_drop, quantize_drop, MAX_DROP) if drop is not None)


def without_failed(exported: Models, chosen: AutoDocument) -> dict[str, Stage]:
    """Return the exported models without those that `choose_precisions` could not score or time."""
    candidates = [candidate for runtime in chosen["runtimes"].values() for candidate in runtime["candidates"]]
    failed = {Path(candidate["model"]).name for candidate in candidates if candidate["verdict"] == "failed"}
    return {name: stage for name, stage in exported.items() if name not in failed}


def require_choices(document: AutoDocument | None, run: Path) -> None:
    """Check that every runtime has a model to ship; `document` is None if the run makes no choice.

    Raises:
        GateError: a runtime has nothing to ship, not even fp32.
    """
    runtimes = document["runtimes"].items() if document is not None else ()
    without = [runtime for runtime, found in runtimes if found["model"] is None]
    if without:
        raise GateError(f"{run / AUTO}: nothing to ship for {', '.join(without)}, not even fp32; it lists the reasons")


def _score(
    recipe: Recipe, out: Path, names: Mapping[str, str], exported: Models, measured: Models, screen: Screen
) -> dict[str, Candidate]:
    """Return each precision of one runtime, safest first, with its drop compared with fp32 or why it is unknown."""
    candidates: dict[str, Candidate] = {}
    right: dict[str, Any] = {}
    for precision in sorted(names, key=lambda name: PRECISIONS[name].safety_rank):
        name = names[precision]
        if name not in exported:
            failure = read_json(partial_path(out / "exported" / name) / FAILED)
            candidates[precision] = Candidate(precision, problem=failure["reason"])
            continue
        try:
            stage = measured.get(name) or measure_models(recipe, out, {name: exported[name]}, screen)[name]
        except ClipkdError as error:
            if not is_of_the_model(error):
                raise
            candidates[precision] = Candidate(precision, problem=str(error))
            continue
        right[precision] = _right_answers(stage, require_evaluation(recipe).headline)
        drop = (
            paired_drop(right[REFERENCE_PRECISION], right[precision])
            if len(right) > 1 and REFERENCE_PRECISION in right
            else None
        )
        candidates[precision] = Candidate(precision, drop=drop)
    return candidates


def _right_answers(measured: Stage, headline: str) -> Any:
    """Return [N] booleans: True for each image of the headline set that a model classified correctly."""
    import numpy as np

    with np.load(measured.path / "samples.npz", allow_pickle=False) as samples:
        return samples[f"{headline}_rank"] < 1


def _time(recipe: Recipe, out: Path, runtime: str, models: Models, screen: Screen) -> tuple[Profiles, dict[str, str]]:
    """Return interleaved profiles of one runtime's models by precision, and why the other models have none.

    The profiles of a report are measured one model after another, so drift of the machine would bias a comparison.
    """
    processes = max(MIN_PROCESSES, recipe.profile.processes)
    seconds = recipe.profile.seconds * processes / recipe.profile.processes  # same time per process as there
    failed: dict[str, ClipkdError] = {}

    def work(folder: Path) -> dict[str, Any]:
        from export.profiling.protocol import Effort, Profile, profile_together

        paths = [model.path for model in models.values()]
        found = profile_together(paths, effort=Effort(processes, seconds), progress=screen.progress)
        by_precision = dict(zip(models, found, strict=True))
        failed.update({of: result for of, result in by_precision.items() if isinstance(result, ClipkdError)})
        if failed:
            raise next(iter(failed.values()))  # do not store a failure: the next attempt may succeed
        _write_profiles(folder, {of: result for of, result in by_precision.items() if isinstance(result, Profile)})
        return {"runtime": runtime, "precisions": list(models)}

    screen.starts(f"auto/{runtime}")
    spec = StageSpec(
        _timings(out, runtime),
        kind="auto",
        version=1,
        fields={"processes": processes, "seconds": seconds},
        fingerprints={"machine": json.dumps(machine(), sort_keys=True)},
        inputs=models,
    )
    try:
        stage = run_stage(spec, work)
    except ClipkdError as error:
        if REFERENCE_PRECISION in failed or error not in failed.values():
            raise
        left = {of: model for of, model in models.items() if of not in failed}
        profiles, problems = _time(recipe, out, runtime, left, screen)
        return profiles, problems | {of: str(why) for of, why in failed.items()}
    screen.done(f"auto/{runtime}", stage)
    return read_json(stage.path / "profiles.json"), {}


def _write_profiles(folder: Path, profiles: "Mapping[str, Profile]") -> None:
    """Write profiles.json and the latency samples it was computed from."""
    import numpy as np

    write_json(folder / "profiles.json", {of: profile.document for of, profile in profiles.items()})
    samples: dict[str, Any] = {
        f"{of}_{name}": values for of, profile in profiles.items() for name, values in profile.samples.items()
    }
    np.savez(folder / "samples.npz", **samples)


def _timings(out: Path, runtime: str) -> Path:
    return out / "auto" / runtime


def _latency(profile: Mapping[str, Any]) -> Latency:
    image = profile["image"]
    return Latency(image["p50_ms"], image["p50_low_ms"], image["p50_high_ms"])


def _row(
    name: str, exported: Stage | None, candidate: Candidate, verdict: Verdict, profile: Mapping[str, Any] | None
) -> AutoCandidate:
    drop, latency = candidate.drop, candidate.latency
    return {
        "precision": candidate.precision,
        "model": f"exported/{name}",
        "digest": exported.digest if exported is not None else None,
        "verdict": verdict.count,
        "reason": verdict.reason,
        "top1_drop_vs_fp32": drop and drop.drop,
        "top1_drop_vs_fp32_low": drop and drop.low,
        "top1_drop_vs_fp32_high": drop and drop.high,
        "top1_drop_vs_fp32_p": drop and drop.p,
        "p50_ms": latency and latency.p50_ms,
        "p50_low_ms": latency and latency.low_ms,
        "p50_high_ms": latency and latency.high_ms,
        "grade": profile["grade"] if profile is not None else None,
        "flags": list(profile["flags"]) if profile is not None else [],
    }


def _noise(out: Path, runtime: str, profiles: Profiles) -> list[str]:
    noisy = [f"{of} {', '.join(profile['flags'])}" for of, profile in profiles.items() if profile["grade"] == "C"]
    if not noisy:
        return []
    return [
        f"timed with grade C ({'; '.join(noisy)}): before you ship it, delete {_timings(out, runtime)} and repeat the "
        "command on a quiet machine"
    ]
