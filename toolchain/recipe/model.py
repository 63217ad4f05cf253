"""The `teacher` and `student` sections."""

from typing import Any, Literal

from pydantic import Field, model_validator

from toolchain.recipe.section import Section


class ModelSpec(Section):
    """An open_clip model: `model` says the architecture, the rest its changes and its weights.

    `model` is a folder that ships with clipkd (glyphs_teacher, vit_t_16, ...), a path (an open_clip local-dir, or a run
    of clipkd's, whose student it then is), `hf-hub:ORG/NAME`, or the name of an architecture of open_clip's (ViT-B-16).
    """

    model: str

    pretrained: str | None = None
    """open_clip's tag of weights for an architecture of its own, as in laion400m_e32."""

    checkpoint: str | None = None
    """A file of weights for the architecture: a state_dict, an open_clip training checkpoint, or safetensors."""

    model_cfg: dict[str, Any] = Field(default_factory=dict)
    """Changes to the architecture, as in {vision_cfg: {width: 64}}, merged into open_clip's configuration."""

    preprocess_cfg: dict[str, Any] = Field(default_factory=dict)
    """Changes to the preprocessing, as in {mean: [0.5, 0.5, 0.5]}: a checkpoint file does not say its own."""

    init: Literal["weights", "random"] | None = None
    """Whether to start from the model's weights.  Absent: a teacher does, a student only from those it names."""

    @property
    def is_random(self) -> bool:
        """True if the model starts from the seed and not from weights."""
        return self.init == "random" or (self.init is None and self.pretrained is None and self.checkpoint is None)

    @model_validator(mode="after")
    def _check_weights(self) -> "ModelSpec":
        if self.pretrained is not None and self.checkpoint is not None:
            raise ValueError("pretrained and checkpoint both name weights; keep one")
        if self.init == "random" and (self.pretrained or self.checkpoint):
            raise ValueError("init: random contradicts pretrained and checkpoint; keep one")
        return self


class TeacherSpec(ModelSpec):
    model: str = ""

    recipe: str | None = None
    """In place of `model`: a recipe without a teacher, trained first; its student is this run's teacher."""

    @property
    def is_random(self) -> bool:
        """True if the teacher's weights are drawn from the seed, as only a test of the machinery would want."""
        return self.init == "random"

    @model_validator(mode="after")
    def _check_source(self) -> "TeacherSpec":
        if bool(self.model) == bool(self.recipe):
            raise ValueError("give either model or recipe")
        if self.recipe and (self.pretrained or self.checkpoint or self.model_cfg or self.preprocess_cfg or self.init):
            raise ValueError(
                "a teacher that a recipe trains takes no pretrained, checkpoint, model_cfg, preprocess_cfg or init"
            )
        return self
