"""Prove, score and time an exported model on the machine it is on; needs no torch."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from export.parity import check_parity
from export.profile import profile
from export.runtime import open_exported
from toolchain import glyphs
from toolchain.evaluate import evaluate
from toolchain.recipe import EvaluateSpec, ProfileSpec


def measure(model: Path, folder: Path, spec: EvaluateSpec, timing: ProfileSpec, progress: Any) -> dict[str, Any]:
    """Write parity.json, evaluation.json, samples.npz and profile.json; returns the headline numbers.

    Parity comes first: a wrong model is not worth timing.

    Raises:
        GateError: the model does not compute here what it computed in PyTorch.
    """
    manifest = json.loads((model / "manifest.json").read_text(encoding="utf-8"))
    encoders = open_exported(model)
    _write(folder / "parity.json", check_parity(model, precision=manifest["summary"]["precision"], encoders=encoders))
    sets: dict[str, tuple[NDArray[np.uint8], list[str]]] = {
        name: (glyphs.eval_set(name).images_KHWC, glyphs.eval_set(name).names) for name in spec.sets
    }
    evaluation, samples = evaluate(
        encoders, sets, glyphs.TEMPLATES, headline=spec.headline, on_progress=partial(progress, "scoring")
    )
    _write(folder / "evaluation.json", evaluation)
    np.savez(folder / "samples.npz", **samples)  # type: ignore[arg-type]  # numpy types keywords as one array
    timed = profile(model, processes=timing.processes, seconds=timing.seconds, on_progress=progress)
    _write(folder / "profile.json", timed)
    return {"top1": evaluation["sets"][spec.headline]["top1"], "p50_ms": timed["image"]["p50_ms"]}


def _write(path: Path, document: dict[str, Any]) -> None:
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
