"""Find or download a weights file, read it without executing code, and load it into the model."""

import math
import pickle
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from open_clip import pretrained as open_clip_pretrained
from open_clip.convert import convert_state_dict
from open_clip.model import convert_to_custom_text_state_dict, resize_pos_embed
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from toolchain.errors import ArtifactError, UsageError
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
    what = f"{spec.model}, weights {spec.pretrained}"
    say(f"{what}: loading from {tag.get('hf_hub') or tag.get('url')} or its local cache")
    try:
        return Path(open_clip_pretrained.download_pretrained(tag))
    except Exception as error:  # the Hub's client, urllib and open_clip raise all kinds
        raise not_downloaded(what, error) from error


def _folder_weights(folder: Path) -> Path:
    found = [folder / name for name in _WEIGHT_FILES if (folder / name).is_file()]
    found = found or sorted(path for path in folder.iterdir() if path.suffix in (".safetensors", ".bin", ".pt", ".pth"))
    if not found:
        raise ArtifactError(
            f"{folder}: no {WEIGHTS}; this model has a configuration but no weights. "
            "Name a weights file with checkpoint, or train from scratch with init: random"
        )
    if len(found) > 1 and found[0].name not in _WEIGHT_FILES:
        names = ", ".join(path.name for path in found)
        raise ArtifactError(f"{folder}: several possible weights files: {names}. Name one with checkpoint")
    return found[0]


def from_hub(repository: str, filename: str | None, say: Callable[[str], None]) -> Path:
    what = f"{HUB}{repository}, {filename or 'its weights'}"
    say(f"{what}: loading from the Hugging Face Hub or its local cache")
    try:
        return Path(open_clip_pretrained.download_pretrained_from_hf(repository, filename=filename))
    except Exception as error:  # the Hub's client raises all kinds
        raise not_downloaded(what, error) from error


def not_downloaded(what: str, error: Exception) -> ArtifactError:
    return ArtifactError(
        f"{what}: cannot be downloaded ({one_line(error)}). Check the name and the network. Offline, copy the cache "
        "(HF_HOME) of a machine that has downloaded it, or name a folder, or a file with checkpoint"
    )


def one_line(error: Exception) -> str:
    message = " ".join(str(error).split()) or type(error).__name__
    return message if len(message) <= 300 else message[:300] + " …"


def load_weights(
    net: nn.Module, path: Path, name: str, model_cfg: Mapping[str, Any], changes: Mapping[str, Any]
) -> None:
    """Load a file's weights into a model.

    The weights still fit after two kinds of `changes` to the architecture: another image size of a vision transformer,
    whose position grid is interpolated, and a shorter context, which keeps the first positions.

    Raises:
        ArtifactError: the file cannot be read safely, or its weights do not fit.
        UsageError: the weights are OpenAI's, and the model does not have the activation they were trained with.
    """
    state = convert_state_dict(net, read_weights(path))
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
    net.load_state_dict(state)


def read_weights(path: Path) -> dict[str, Tensor]:
    """Return a file's tensors by name: safetensors, a bare state_dict, or the state_dict in a training checkpoint.

    Python objects are never unpickled.  The prefixes that DistributedDataParallel and torch.compile add are removed.

    Raises:
        ArtifactError: it is none of these, or corrupt.
    """
    try:
        if path.suffix == ".safetensors":
            content: Any = load_file(path)
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about pickle protocols that torch then refuses
                content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ArtifactError(
            f"{path}: contains Python objects other than tensors, or is not a torch file; clipkd unpickles tensors "
            "only. If you trust the file, save its state_dict alone: torch.save(model.state_dict(), FILE) "
            f"({one_line(error)[:100]})"
        ) from error
    except (SafetensorError, RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        if "TorchScript" in str(error):
            raise ArtifactError(
                f"{path}: a TorchScript archive, as OpenAI publishes its models; clipkd reads state_dicts. "
                "For OpenAI's weights write pretrained: openai instead of checkpoint"
            ) from error
        raise ArtifactError(f"{path}: not a weights file, or corrupt: {one_line(error)}") from error
    state = content.get("state_dict", content) if isinstance(content, dict) else content
    if not isinstance(state, dict) or not state or not all(isinstance(value, Tensor) for value in state.values()):
        held = f"a dictionary of {', '.join(map(str, list(state)[:6]))}" if isinstance(state, dict) else type(state)
        raise ArtifactError(f"{path}: expected a state_dict of tensors, or a checkpoint that contains one; got {held}")
    for prefix in ("module.", "_orig_mod."):
        if all(key.startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): value for key, value in state.items()}
    return dict(state)


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
    raise ArtifactError(
        f"{path}: these weights do not fit {name}: {'; '.join(found)}. "
        f"Most likely {_likely_cause(state, missing, unexpected, misshaped, net.visual)}"
    )


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
