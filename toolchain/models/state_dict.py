"""Read a model's tensors out of a weights file of any form, without executing code.

A file holds safetensors or what torch.save wrote: a state_dict, or a checkpoint of some trainer that contains one.  It
is recognized by its content, whatever its name.  Trainers wrap a model and keep a moving average beside it, so the
state_dict may lie in other dictionaries and its names may begin with prefixes.
"""

import pickle
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from toolchain.errors import ArtifactError, name_some, one_line
from toolchain.user_documents import GIT_LFS

State = dict[str, Tensor]

_WRAPPERS = frozenset(
    ("state_dict", "model", "model_state_dict", "model_state", "module", "_orig_mod", "net", "network", "weights")
)
"""Names under which trainers store the model itself, and prefixes that wrappers of a module add."""

_AVERAGES = frozenset(("ema", "swa"))  # words in the name of a moving average of the weights
_NO_MODEL = ("optim", "sched", "scaler", "rng")  # parts of names under which trainers store no model
_IMAGE_TOWER = ("visual.", "image_encoder.", "vision_model.")  # of open_clip, MobileCLIP and transformers
_NO_PREFIX = "names without a prefix"
_NAMED = 3


def read_weights(path: Path, say: Callable[[str], None] = lambda _: None) -> State:
    """Return a model's tensors by name, without the prefixes of wrappers.

    If the file also has a moving average of the weights (EMA), the weights are taken; if it has only the average, that
    is taken.  `say` receives a message on what was left in the file.

    Raises:
        ArtifactError: it is no weights file, corrupt, or has several models.
    """
    content = _read_content(path)
    candidates = _find_states(content)
    if not candidates:
        held = type(content).__name__
        if isinstance(content, dict):
            held = f"a dictionary of {name_some(content)}" if content else "an empty dictionary"
        raise ArtifactError(f"{path}: expected a state_dict of tensors, or a checkpoint that contains one; got {held}")
    alone = "torch.save(torch.load(FILE, weights_only=True)[NAME], OTHER)"
    chosen = _choose(path, list(candidates), alone, say)
    return _strip_prefixes(path, candidates[chosen], say)


# The file -------------------------------------------------------------------------------------------------------------


def _read_content(path: Path) -> Any:
    """Return what a file holds; Python objects are never unpickled."""
    try:
        with path.open("rb") as file:
            head = file.read(512)
        problem = _recognize(head)
        if problem:
            raise ArtifactError(f"{path}: {problem}")
        if head[8:9] == b"{":  # safetensors: the length of a header in JSON, and the header
            return load_file(path)
        with warnings.catch_warnings(), path.open("rb") as file:  # a path of safetensors' suffix torch would not read
            warnings.simplefilter("ignore")  # about pickle protocols that torch then refuses
            return torch.load(file, map_location="cpu", weights_only=True)
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
        raise ArtifactError(
            f"{path}: not a weights file, or corrupt: it starts with {head[:16]!r} ({one_line(error)[:100]})"
        ) from error


def _recognize(head: bytes) -> str | None:
    """Return what a file is that is no weights file, and what to do about it; None if it may be one."""
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if not head:
        return "an empty file, not weights. Copy or download it again"
    if head.startswith(GIT_LFS):
        return "a Git LFS pointer, not the weights themselves. Fetch them: git lfs pull"
    if text.startswith((b"<!doctype", b"<html", b"<?xml")):
        return "a web page (HTML), not weights: an error or a login page was saved in their place. Download them again"
    if text.startswith(b"{"):
        return "JSON text, not weights; it may be an error that was saved in their place. Download them again"
    if head.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ")) or head[257:262] == b"ustar":
        return "an archive, not weights. Unpack it and name the file within"
    if head.startswith(b"PK\x03\x04") and b".npy" in head[:200]:
        return "an archive of NumPy arrays (npz), not weights that clipkd reads. Save a state_dict: torch.save(…)"
    if head.startswith(b"\x80") and _TORCH_MAGIC not in head[:64]:
        return (
            "a Python pickle, not a file that torch.save wrote; clipkd does not unpickle it, because that can execute "
            "code. If you trust the file, save its state_dict: torch.save(model.state_dict(), FILE)"
        )
    return None


_TORCH_MAGIC = 0x1950A86A20F9469CFC6C.to_bytes(10, "little")  # opens the files of torch before 1.6


# The state_dict in it -------------------------------------------------------------------------------------------------


def _find_states(content: Any, place: str = "") -> dict[str, State]:
    """Return every state_dict in a checkpoint by its place, such as `model.state_dict`; "" is the file itself."""
    if not isinstance(content, Mapping) or not content or not all(isinstance(key, str) for key in content):
        return {}
    if all(isinstance(value, Tensor) for value in content.values()):
        return {place: dict(content)}
    found: dict[str, State] = {}
    for key, value in content.items():
        if not any(part in key.lower() for part in _NO_MODEL):
            found |= _find_states(value, f"{place}.{key}" if place else key)
    return found


def _choose(path: Path, names: Sequence[str], alone: str, say: Callable[[str], None]) -> str:
    """Return the name of the model among several: not a moving average, and if that leaves several, a known name.

    Raises:
        ArtifactError: several remain.
    """
    weights = [name for name in names if not _is_average(name)] or list(names)
    known = [name for name in weights if all(part in _WRAPPERS for part in name.split(".") if part)] or weights
    if len(known) > 1:
        raise ArtifactError(f"{path}: contains several models: {_list(known)}. Save the one you want alone: {alone}")
    averages = [name for name in names if _is_average(name) and name != known[0]]
    if averages:
        say(
            f"{path}: contains the weights ({_list(known)}) and a moving average of them ({_list(averages)}). "
            f"The weights are taken. For the average, save it alone: {alone}"
        )
    return known[0]


def _is_average(name: str) -> bool:
    return not _AVERAGES.isdisjoint(re.split(r"[^a-z]+", name.lower()))


def _strip_prefixes(path: Path, state: State, say: Callable[[str], None]) -> State:
    """Return a model's tensors with the names that the model itself gives them.

    Every CLIP has one logit_scale beside its image tower, so whatever precedes it is a prefix, of any nesting.  In a
    file without one, such as a part of a model, the known prefixes are removed where all names have them.
    """
    prefixes = [
        prefix
        for prefix in (name.removesuffix("logit_scale") for name in state if f".{name}".endswith(".logit_scale"))
        if any(name.startswith(tuple(prefix + tower for tower in _IMAGE_TOWER)) for name in state)
    ]
    if not prefixes:
        while common_prefix(state) in _WRAPPERS:
            state = {name.partition(".")[2]: tensor for name, tensor in state.items()}
        return state
    alone = "torch.save({name.removeprefix(PREFIX): w for name, w in state.items() if name.startswith(PREFIX)}, OTHER)"
    prefix = _choose(path, [prefix.rstrip(".") for prefix in prefixes], alone, say)
    prefix = f"{prefix}." if prefix else ""
    others = tuple(other for other in prefixes if other != prefix and not prefix.startswith(other))
    kept = {
        name.removeprefix(prefix): tensor
        for name, tensor in state.items()
        if name.startswith(prefix) and not (others and name.startswith(others))
    }
    beside = [name for name in state if not name.startswith((prefix, *others))]
    if beside:
        say(f"{path}: {len(beside)} tensors outside {prefix}* are not of the model, and are ignored: {_list(beside)}")
    return kept


def common_prefix(names: Iterable[str]) -> str | None:
    """Return the first part of dotted names if they all share it, else None."""
    split = {name.partition(".")[0] if "." in name else "" for name in names}
    first = split.pop() if len(split) == 1 else ""
    return first or None


def _list(names: Sequence[str]) -> str:
    named = ", ".join(name or _NO_PREFIX for name in names[:_NAMED])
    return named + (f" and {len(names) - _NAMED} more" if len(names) > _NAMED else "")
