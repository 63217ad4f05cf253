"""Build a student as its training starts: with a cut vocabulary, and with inherited weights."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from toolchain.models.build import build_model, load_model
from toolchain.models.clip_model import ClipModel
from toolchain.models.inherit import inherit_weights
from toolchain.models.teacher_text import build_on_text_tower
from toolchain.models.tower_sizes import describe_activations
from toolchain.models.vocabulary import cut_vocabulary
from toolchain.recipe.model import StudentSpec


def build_student(
    spec: StudentSpec,
    *,
    seed: int,
    texts: Iterable[str] = (),
    teacher: Path | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> tuple[ClipModel, dict[str, Any]]:
    """Return a student as its training starts, and what its stage's manifest records about that.

    `texts` are those that its vocabulary is cut to, and `teacher` is the local-dir that `inherit: teacher` and
    `text_tower: teacher` read.

    Raises:
        UsageError, ArtifactError: as `build_model`, `build_on_text_tower`, `cut_vocabulary` and `inherit_weights`.
    """
    if teacher is not None and spec.has_teachers_text:
        return build_on_text_tower(spec, load_model(teacher), seed=seed, say=say), {}
    model = build_model(spec, seed=seed, say=say)
    started: dict[str, Any] = {}
    if spec.vocabulary:
        model, started["vocabulary"] = cut_vocabulary(model, texts)
    if spec.inherit is None:
        return model, started
    if spec.inherits_from_teacher:
        assert teacher is not None
        source = load_model(teacher)
    else:
        source = build_model(spec.inherit, seed=seed, say=say)
    remark = describe_activations(model.config["model_cfg"], source.config["model_cfg"])
    if remark is not None:
        say(remark)
    started["inherited"] = inherit_weights(source, model)
    return model, started
