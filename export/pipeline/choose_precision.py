"""`export.auto`: score and time what a run exported in each runtime, and write down what to ship."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from export.pipeline.measure import measure_models
from export.pipeline.plan import FAILED, exports, is_of_the_model, shipped_role
from export.pipeline.precision_verdicts import (
    MAX_DROP,
    MIN_PROCESSES,
    REFERENCE,
    SAFEST_FIRST,
    Candidate,
    Latency,
    Verdict,
    decide,
    doubts,
    too_far,
)
from toolchain.errors import ClipkdError
from toolchain.filesystem import partial_path, write_json
from toolchain.pipeline.stage_inputs import evaluated
from toolchain.progress import Screen
from toolchain.provenance import machine
from toolchain.recipe.recipe import Recipe
from toolchain.significance import paired_drop
from toolchain.stage import Stage, StageSpec, run_stage

AUTO = "auto.json"

Models = Mapping[str, Stage]


def choose_precisions(recipe: Recipe, out: Path, exported: Models, measured: Models, screen: Screen) -> dict[str, Any]:
    """auto.json: for each runtime the model to ship, and on which count each other precision was rejected.

    Accuracy is that of `measure_models`, run here for what `measured` lacks.  Models within the budget are then
    timed in interleaved processes.
    """
    assert recipe.export.auto is not None
    quantize_drop = recipe.quantize.max_drop if recipe.quantize is not None else None
    max_drop = next(drop for drop in (recipe.export.auto.max_drop, quantize_drop, MAX_DROP) if drop is not None)
    found: dict[str, Any] = {}
    for runtime in recipe.export.runtimes:
        ours = (shipped_role(recipe), runtime)
        names = {of: name for name, role, where, of in exports(recipe) if (role, where) == ours}
        candidates = _scored(recipe, out, names, exported, measured, screen)
        profiles: dict[str, Any] = {}
        if candidates[REFERENCE].problem is None:
            within = {of: exported[names[of]] for of in candidates if too_far(candidates[of], max_drop) is None}
            profiles, problems = _timed(recipe, out, runtime, within, screen)
            candidates |= {of: replace(candidates[of], problem=problem) for of, problem in problems.items()}
            candidates |= {of: replace(candidates[of], latency=_latency(profiles[of])) for of in profiles}
        verdicts = decide(list(candidates.values()), max_drop)
        chosen = next((of for of, verdict in verdicts.items() if verdict.count == "chosen"), None)
        found[runtime] = {
            "precision": chosen,
            "model": None if chosen is None else f"exported/{names[chosen]}",
            "candidates": [
                _row(names[of], exported.get(names[of]), candidates[of], verdicts[of], profiles.get(of))
                for of in verdicts
            ],
            "warnings": [*doubts(candidates[chosen], max_drop), *_noise(out, runtime, profiles)] if chosen else [],
        }
        screen.line(f"auto/{runtime}", f"ship {chosen}" if chosen is not None else "nothing to ship")
    document = {"schema": 1, "max_drop": max_drop, "headline": evaluated(recipe).headline, "runtimes": found}
    write_json(out / AUTO, document, allow_nan=False)
    return document


def without_failed(exported: Models, chosen: Mapping[str, Any]) -> dict[str, Stage]:
    """The exported models without those that could not be scored or timed, as `choose_precisions` found."""
    weighed = [candidate for runtime in chosen["runtimes"].values() for candidate in runtime["candidates"]]
    failed = {Path(candidate["model"]).name for candidate in weighed if candidate["verdict"] == "failed"}
    return {name: stage for name, stage in exported.items() if name not in failed}


def _scored(
    recipe: Recipe, out: Path, names: Mapping[str, str], exported: Models, measured: Models, screen: Screen
) -> dict[str, Candidate]:
    """Every precision of one runtime with what it loses to fp32 there, or why that is not known; the safest first."""
    candidates: dict[str, Candidate] = {}
    right: dict[str, Any] = {}
    for precision in sorted(names, key=SAFEST_FIRST.index):
        name = names[precision]
        if name not in exported:
            said = json.loads((partial_path(out / "exported" / name) / FAILED).read_text(encoding="utf-8"))
            candidates[precision] = Candidate(precision, problem=said["reason"])
            continue
        try:
            stage = (
                measured[name]
                if name in measured
                else measure_models(recipe, out, {name: exported[name]}, screen)[name]
            )
        except ClipkdError as error:
            if not is_of_the_model(error):
                raise
            candidates[precision] = Candidate(precision, problem=str(error))
            continue
        right[precision] = _right_answers(stage, evaluated(recipe).headline)
        drop = paired_drop(right[REFERENCE], right[precision]) if len(right) > 1 and REFERENCE in right else None
        candidates[precision] = Candidate(precision, drop=drop)
    return candidates


def _right_answers(measured: Stage, headline: str) -> Any:
    """[N] which images of the headline set a model got right."""
    import numpy as np

    with np.load(measured.path / "samples.npz", allow_pickle=False) as samples:
        return samples[f"{headline}_rank"] < 1


def _timed(
    recipe: Recipe, out: Path, runtime: str, models: Models, screen: Screen
) -> tuple[dict[str, Any], dict[str, str]]:
    """Profiles of one runtime's models by precision, whose processes took turns; and why there is none of the others.

    Those of the report are measured one model after another, so that drift of the machine would decide.
    """
    processes = max(MIN_PROCESSES, recipe.profile.processes)
    seconds = recipe.profile.seconds * processes / recipe.profile.processes  # to each process as much as there
    failed: dict[str, ClipkdError] = {}

    def work(folder: Path) -> dict[str, Any]:
        import numpy as np

        from export.profiling.protocol import Effort, profile_together

        paths = [model.path for model in models.values()]
        found = profile_together(paths, effort=Effort(processes, seconds), progress=screen.progress)
        documents: dict[str, Any] = {}
        samples: dict[str, Any] = {}
        for precision, result in zip(models, found, strict=True):
            if isinstance(result, ClipkdError):
                failed[precision] = result
                continue
            documents[precision] = result.document
            samples |= {f"{precision}_{name}": values for name, values in result.samples.items()}
        if failed:
            raise next(iter(failed.values()))  # a stage keeps nothing that may go well the next time
        write_json(folder / "profiles.json", documents)
        np.savez(folder / "samples.npz", **samples)
        return {"runtime": runtime, "precisions": list(models)}

    screen.starts(f"auto/{runtime}")
    try:
        stage = run_stage(
            StageSpec(
                _timings(out, runtime),
                kind="auto",
                version=1,
                fields={"processes": processes, "seconds": seconds},
                fingerprints={"machine": json.dumps(machine(), sort_keys=True)},
                inputs=models,
            ),
            work,
        )
    except ClipkdError as error:
        if REFERENCE in failed or error not in failed.values():
            raise
        left = {precision: model for precision, model in models.items() if precision not in failed}
        profiles, problems = _timed(recipe, out, runtime, left, screen)
        return profiles, problems | {precision: str(why) for precision, why in failed.items()}
    screen.done(f"auto/{runtime}", stage)
    return json.loads((stage.path / "profiles.json").read_text(encoding="utf-8")), {}


def _timings(out: Path, runtime: str) -> Path:
    return out / "auto" / runtime


def _latency(profile: Mapping[str, Any]) -> Latency:
    image = profile["image"]
    return Latency(image["p50_ms"], image["p50_low_ms"], image["p50_high_ms"])


def _row(
    name: str, exported: Stage | None, candidate: Candidate, verdict: Verdict, profile: Mapping[str, Any] | None
) -> dict[str, Any]:
    """A candidate of auto.json; what is not known is null."""
    drop, latency = candidate.drop, candidate.latency
    return {
        "precision": candidate.precision,
        "model": f"exported/{name}",
        "digest": exported and exported.digest,
        "verdict": verdict.count,
        "reason": verdict.reason,
        "top1_drop_vs_fp32": drop and drop.drop,
        "top1_drop_vs_fp32_low": drop and drop.low,
        "top1_drop_vs_fp32_high": drop and drop.high,
        "top1_drop_vs_fp32_p": drop and drop.p,
        "p50_ms": latency and latency.p50_ms,
        "p50_low_ms": latency and latency.low_ms,
        "p50_high_ms": latency and latency.high_ms,
        "grade": profile and profile["grade"],
        "flags": list(profile["flags"]) if profile is not None else [],
    }


def _noise(out: Path, runtime: str, profiles: Mapping[str, Any]) -> list[str]:
    noisy = [f"{of} {', '.join(profile['flags'])}" for of, profile in profiles.items() if profile["grade"] == "C"]
    if not noisy:
        return []
    return [
        f"timed with grade C ({'; '.join(noisy)}): before you ship it, delete {_timings(out, runtime)} and repeat the "
        "command on a quiet machine"
    ]
