"""The `teacher` and `student` sections."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from toolchain.recipe.section import Section, Several

TEACHER = "teacher"
"""In `student.inherit`: the recipe's own teacher."""

CORPUS_SECTIONS = ("data", "evaluate")
"""Words in `student.vocabulary` that stand for the texts of these sections; everything else is a file."""


class ModelSpec(Section):
    """An open_clip model: `model` gives the architecture, the other fields change it and give its weights.

    `model` is a model included in clipkd (glyphs_teacher, vit_t_16, ...), a path (an open_clip local-dir, or a run
    directory, which stands for its student), `hf-hub:ORG/NAME`, or an open_clip architecture (ViT-B-16).
    """

    model: str

    pretrained: str | None = None
    """open_clip's tag of pretrained weights for one of its architectures, for example laion400m_e32."""

    checkpoint: str | None = None
    """File of weights for the architecture: a state_dict, an open_clip training checkpoint, or safetensors."""

    model_cfg: dict[str, Any] = Field(default_factory=dict)
    """Changes to the architecture, merged into open_clip's configuration, for example {vision_cfg: {width: 64}}."""

    preprocess_cfg: dict[str, Any] = Field(default_factory=dict)
    """Changes to the preprocessing, for example {mean: [0.5, 0.5, 0.5]}; a checkpoint file does not contain its own."""

    init: Literal["weights", "random"] | None = None
    """weights: start from the model's own weights; random: draw weights with the recipe's seed.  Absent: weights for a
    teacher; for a student, random unless pretrained or checkpoint is given."""

    @property
    def is_random(self) -> bool:
        """Return True if the initial weights are drawn at random, with the seed."""
        return self.init == "random" or (self.init is None and self.pretrained is None and self.checkpoint is None)

    @model_validator(mode="after")
    def _check_weights(self) -> "ModelSpec":
        if self.pretrained is not None and self.checkpoint is not None:
            raise ValueError("pretrained and checkpoint both give weights; keep one")
        if self.init == "random" and (self.pretrained or self.checkpoint):
            raise ValueError("init: random contradicts pretrained and checkpoint; keep one")
        return self


class SourceSpec(ModelSpec):
    """A model that already has weights."""

    @property
    def is_random(self) -> bool:
        """Return True if the weights are drawn at random, with the seed; this is useful only in tests."""
        return self.init == "random"


class TeacherSpec(SourceSpec):
    model: str = ""

    recipe: str | None = None
    """Recipe without a teacher, instead of `model`: it is trained first, and its student is this run's teacher."""

    @model_validator(mode="after")
    def _check_source(self) -> "TeacherSpec":
        if bool(self.model) == bool(self.recipe):
            raise ValueError("give either model or recipe")
        if self.recipe and (self.pretrained or self.checkpoint or self.model_cfg or self.preprocess_cfg or self.init):
            raise ValueError(
                "a teacher given by recipe takes no pretrained, checkpoint, model_cfg, preprocess_cfg or init"
            )
        return self


def _as_model(value: Any) -> Any:
    return {"model": value} if isinstance(value, str) else value


class StudentSpec(ModelSpec):
    inherit: Annotated[SourceSpec | None, BeforeValidator(_as_model)] = None
    """Start from the weights of a larger model, thinned to this architecture (docs/inheritance.md).  teacher: from this
    recipe's teacher, and the baseline starts at random.  Otherwise a model, for example runs/half or {model: ViT-B-16,
    pretrained: openai}; the baseline then starts from it too."""

    vocabulary: Several[str] = ()
    """Cut the vocabulary to the tokens of these texts: files of one text per line, data (this recipe's training
    captions) or evaluate (its evaluation sets' texts).  Other words are split into smaller tokens.  Empty: keep all."""

    text_tower: Literal["teacher"] | None = None
    """teacher: train the image tower of `model` alone, in the teacher's feature space, and ship the teacher's text
    tower with it, unchanged but for int8.  Images without captions suffice (data.kind images).
    Absent: the text tower of `model`."""

    @property
    def has_teachers_text(self) -> bool:
        """Return True if the text tower is the teacher's."""
        return self.text_tower == "teacher"

    @property
    def inherits_from_teacher(self) -> bool:
        return self.inherit is not None and self.inherit.model == TEACHER

    def without_teacher(self) -> "StudentSpec":
        """Return the same student, at random if it would inherit from the teacher."""
        return self.model_copy(update={"inherit": None}) if self.inherits_from_teacher else self

    @model_validator(mode="after")
    def _check_inheritance(self) -> "StudentSpec":
        written = {} if self.inherit is None else self.inherit.model_dump(exclude_defaults=True)
        if self.inherits_from_teacher and written.keys() != {"model"}:
            raise ValueError("inherit: teacher is this recipe's teacher as it is; remove the other fields of inherit")
        if self.inherit is not None and not self.is_random:
            raise ValueError("inherit contradicts pretrained, checkpoint and init: weights; keep one")
        return self

    @model_validator(mode="after")
    def _check_text_tower(self) -> "StudentSpec":
        if not self.has_teachers_text:
            return self
        if self.inherit is not None or self.vocabulary:
            raise ValueError(
                "text_tower: teacher takes the teacher's text tower as it is; remove inherit and vocabulary"
            )
        changed = [name for name in ("embed_dim", "text_cfg") if name in self.model_cfg]
        if changed:
            raise ValueError(
                f"text_tower: teacher takes {' and '.join(changed)} from the teacher; remove model_cfg.{changed[0]}"
            )
        return self
