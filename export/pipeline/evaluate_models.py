"""Implement `clipkd evaluate`: score models on evaluation sets, and store the scores in the run of each model."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from export.model_folder import find_run, model_kind
from export.pipeline.cpu_measurement import STORED_MODELS, Scoring, Subject, find_subject, scoring
from export.pipeline.measure import measure_on_cpu
from export.runtime.exported_model import open_exported
from toolchain.evaluation.documents import EvaluatedModel, ModelComparison, SetScores
from toolchain.evaluation.open_sets import open_set
from toolchain.evaluation.zero_shot import Encoders, evaluate
from toolchain.filesystem import read_json
from toolchain.progress import Screen
from toolchain.recipe.evaluate import EvaluateSpec
from toolchain.recipe.load import load_recipe
from toolchain.significance import paired_drop
from toolchain.stage import run_lock


def evaluate_models(models: Sequence[Path], spec: EvaluateSpec, screen: Screen) -> ModelComparison:
    """Return every model's scores on a recipe's evaluation sets, and the difference of each from the first model.

    A model is an exported directory, or a checkpoint directory, which needs torch.  The scores of a run's model are
    stored in measured/MODEL/cpu of the run if the sets are those of its recipe, and are reused from there.

    Raises:
        UsageError: a directory is neither.
        ClipkdError: a set is missing or invalid, or too many of its images cannot be read.
    """
    for model in models:
        model_kind(model)  # raises for an invalid directory before the first evaluation
    sets = [open_set(entry) for entry in spec.sets]
    scored: Scoring | None = None
    documents: list[EvaluatedModel] = []
    first_ranks: Mapping[str, NDArray[Any]] = {}
    for model in models:
        subject = _find_stored(model, spec, screen)
        if subject is None:
            screen.starts(model.name)
            evaluation, samples = evaluate(
                _open_encoders(model), sets, headline=spec.headline, progress=screen.progress
            )
            scores = evaluation["sets"]
        else:
            scored = scored or scoring(spec)
            scores, samples = _score_stored(subject, scored, screen)
        document: EvaluatedModel = {"model": str(model), "sets": scores}
        if documents:
            document["against_first"] = {
                data.name: paired_drop(first_ranks[f"{data.name}_rank"] < 1, samples[f"{data.name}_rank"] < 1)._asdict()
                for data in sets
            }
        else:
            first_ranks = samples
        documents.append(document)
    return {"headline": spec.headline, "models": documents}


def _find_stored(model: Path, spec: EvaluateSpec, screen: Screen) -> Subject | None:
    """Return the model of a run to store scores of; None, with the reason for a run's model, if they are not stored."""
    run = find_run(model)
    if run is None:
        return None
    if load_recipe(run / "recipe.yaml").evaluate != spec:
        screen.say(f"{model}: only printed, because these evaluation sets are not those of {run / 'recipe.yaml'}")
        return None
    if model_kind(model) == "checkpoint" and _torch_device() != "cpu":
        screen.say(f"{model}: only printed, because a run stores the scores of a checkpoint on a CPU")
        return None
    subject = find_subject(model)
    if subject is None:
        screen.say(f"{model}: only printed; {STORED_MODELS}")
    return subject


def _score_stored(
    subject: Subject, scored: Scoring, screen: Screen
) -> tuple[dict[str, SetScores], dict[str, NDArray[Any]]]:
    with run_lock(subject.run):
        stage = measure_on_cpu(subject, screen, scored=scored)
    with np.load(stage.path / "samples.npz") as samples:
        ranks = {name: samples[name] for name in samples.files if name.endswith("_rank")}
    return read_json(stage.path / "evaluation.json")["sets"], ranks


def _torch_device() -> str:
    from toolchain.distributed import join_processes

    return join_processes().device.type


def _open_encoders(model: Path) -> Encoders:
    if model_kind(model) == "exported":
        return open_exported(model)
    from toolchain.distributed import join_processes
    from toolchain.evaluation.torch_encoders import TorchEncoders
    from toolchain.models.build import load_model

    device = join_processes().device
    loaded = load_model(model)
    loaded.net.to(device)
    return TorchEncoders(loaded, device)
