"""Find or download a weights file, and load it into the model."""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from open_clip import pretrained as open_clip_pretrained
from open_clip.convert import convert_state_dict
from open_clip.model import convert_to_custom_text_state_dict, resize_pos_embed
from torch import Tensor, nn

from toolchain.errors import ArtifactError, UsageError, name_some
from toolchain.models.finite import describe_non_finite
from toolchain.models.hub import download_tag, from_hub
from toolchain.models.state_dict import common_prefix, read_weights
from toolchain.recipe.model import ModelSpec
from toolchain.recipe.model_names import HUB, WEIGHTS

# file names that open_clip tries for a local-dir's weights, in its order
_WEIGHT_FILES = (
    WEIGHTS,
    "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin",
    "open_clip_pytorch_model.pth",
    "model.safetensors",
    "pytorch_model.bin",
    "pytorch_model.pth",
    "model.pth",
)
_OPENAI_KEYS = frozenset({"input_resolution", "context_length", "vocab_size"})  # only OpenAI's archives have these
_NAMED_KEYS = 3  # number of wrong keys that a message lists


def weights_file(spec: ModelSpec, folder: Path | None, tag: Mapping[str, Any], say: Callable[[str], None]) -> Path:
    """Return the path of a model's weights file, after downloading it if necessary."""
    if spec.checkpoint is not None:
        return Path(spec.checkpoint)
    if folder is not None:
        return _folder_weights(folder)
    if spec.model.startswith(HUB):
        return from_hub(spec.model.removeprefix(HUB), None, say)
    if not tag:
        tags = open_clip_pretrained.list_pretrained_tags_by_model(spec.model)
        others = f" (or another of {', '.join(tags[1:])})" if tags[1:] else ""
        choose = f"pretrained: {tags[0]}{others}, " if tags else ""
        raise UsageError(
            f"model {spec.model}: an architecture, and the recipe names no weights for it. "
            f"Add {choose}checkpoint: FILE, or init: random"
        )
    return download_tag(f"{spec.model}, weights {spec.pretrained}", dict(tag), say)


def _folder_weights(folder: Path) -> Path:
    found = [folder / name for name in _WEIGHT_FILES if (folder / name).is_file()]
    found = found or sorted(path for path in folder.iterdir() if path.suffix in (".safetensors", ".bin", ".pt", ".pth"))
    if not found:
        raise ArtifactError(
            f"{folder}: no {WEIGHTS}; this model has a configuration but no weights. "
            "Name a weights file with checkpoint, or train from scratch with init: random"
        )
    if len(found) > 1 and found[0].name not in _WEIGHT_FILES:
        names = name_some(path.name for path in found)
        raise ArtifactError(f"{folder}: several possible weights files: {names}. Name one with checkpoint")
    return found[0]


def load_weights(
    net: nn.Module,
    path: Path,
    name: str,
    model_cfg: Mapping[str, Any],
    changes: Mapping[str, Any],
    say: Callable[[str], None] = lambda _: None,
) -> None:
    """Load a file's weights into a model.

    The weights still fit after two kinds of `changes` to the architecture: another image size of a vision transformer,
    whose position grid is interpolated, and a shorter context, which keeps the first positions.  `say` receives a
    message on what the file has besides.

    Raises:
        ArtifactError: the file cannot be read safely, or its weights do not fit or are not finite.
        UsageError: the weights are OpenAI's, and the model does not have the activation they were trained with.
    """
    state = convert_state_dict(net, read_weights(path, say))
    if state.keys() >= _OPENAI_KEYS:
        if not model_cfg.get("quick_gelu") and "quick_gelu" not in changes:
            raise UsageError(
                f"{path}: OpenAI's weights were trained with QuickGELU, and {name} has GELU: it would run and compute "
                "wrong features. Set model_cfg: {quick_gelu: true}, or choose the architecture's -quickgelu variant"
            )
        state = {key: value for key, value in state.items() if key not in _OPENAI_KEYS}
    if "positional_embedding" in state and not hasattr(net, "positional_embedding"):
        state = convert_to_custom_text_state_dict(state)
    own = net.state_dict()
    for key in ("logit_scale", "logit_bias"):  # a scalar in some versions, a vector of one in others
        if key in state and key in own and state[key].numel() == 1:
            state[key] = state[key].reshape(own[key].shape)
    if "init_logit_bias" in changes and "logit_bias" not in own:
        state.pop("logit_bias", None)
    if "text.transformer.embeddings.position_ids" not in own:  # transformers stored these before 4.31
        state.pop("text.transformer.embeddings.position_ids", None)
    if "image_size" in changes.get("vision_cfg", {}):
        resize_pos_embed(state, net)
    if "context_length" in changes.get("text_cfg", {}):
        for key in ("positional_embedding", "text.positional_embedding"):
            if key in state and key in own and len(state[key]) > len(own[key]):
                state[key] = state[key][: len(own[key])]  # with a causal mask, exact for every caption that fits
    _check_fit(state, own, path, name, net)
    if wrong := describe_non_finite(state):
        raise ArtifactError(
            f"{path}: {wrong}. A model with these weights computes nothing; use an earlier checkpoint, or the file "
            "before it was converted"
        )
    whole = [key for key in own if own[key].is_floating_point() and not state[key].is_floating_point()]
    if whole:
        kinds = name_some(sorted({str(state[key].dtype).removeprefix("torch.") for key in whole}))
        raise ArtifactError(
            f"{path}: {len(whole)} of {len(own)} tensors have whole numbers ({kinds}) instead of floats: "
            f"{name_some(whole, _NAMED_KEYS)}. These are quantized weights without their scales; use the file before "
            "it was quantized"
        )
    net.load_state_dict(state)


def _check_fit(state: Mapping[str, Tensor], own: Mapping[str, Tensor], path: Path, name: str, net: nn.Module) -> None:
    missing = [key for key in own if key not in state]
    unexpected = [key for key in state if key not in own]
    misshaped = [key for key in own if key in state and own[key].shape != state[key].shape]
    if not (missing or unexpected or misshaped):
        return
    shapes = [f"{key} {list(state[key].shape)} instead of {list(own[key].shape)}" for key in misshaped]
    found = [
        f"{len(keys)} {kind}: {', '.join(keys[:_NAMED_KEYS])}{', …' if len(keys) > _NAMED_KEYS else ''}"
        for kind, keys in (("missing", missing), ("unexpected", unexpected), ("with a different shape", shapes))
        if keys
    ]
    cause = _unknown_names(state, own)
    cause = cause or f"Most likely {_likely_cause(state, missing, unexpected, misshaped, net.visual)}"
    raise ArtifactError(f"{path}: these weights do not fit {name}: {'; '.join(found)}. {cause}")


def _unknown_names(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> str | None:
    """Return what to do about a file whose names are of another layout; None if some are the model's."""
    if any(key in own for key in state):
        return None
    if prefix := common_prefix(state):
        return (
            f"Every name in the file begins with '{prefix}.', a prefix that clipkd does not know. If it wraps the "
            f"model, save the names without it: key.removeprefix('{prefix}.')"
        )
    first = sorted({key.partition(".")[0] for key in state})
    if "vision_model" in first:
        return "The file has the layout of Hugging Face transformers; clipkd reads open_clip's layout of the same model"
    named = ", ".join(first[: _NAMED_KEYS * 2]) + (", …" if len(first) > _NAMED_KEYS * 2 else "")
    return f"No name in the file is one of the model's; they begin with {named}"


def _likely_cause(
    state: Mapping[str, Tensor], missing: list[str], unexpected: list[str], misshaped: list[str], visual: Any
) -> str:
    match missing, unexpected, misshaped:
        case [], [], [("visual.positional_embedding" | "visual.attnpool.positional_embedding") as key]:
            stride = 32 if "attnpool" in key else visual.patch_size[0]
            size = round(math.sqrt(len(state[key]) - 1)) * stride
            return f"they were trained at another image size; write model_cfg: {{vision_cfg: {{image_size: {size}}}}}"
        case [], [], [("positional_embedding" | "text.positional_embedding") as key]:
            context = f"{{text_cfg: {{context_length: {len(state[key])}}}}}"
            return f"they were trained with another context length; write model_cfg: {context}"
        case [], ["logit_bias"], []:
            return "they were trained with a sigmoid loss; write model_cfg: {init_logit_bias: -10}"
        case _:
            return "they belong to another architecture; name it in model, or its differences in model_cfg"
