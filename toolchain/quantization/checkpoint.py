"""Save and load int8 checkpoints: an open_clip local-dir and the quantizers in the same folder."""

import copy
import json
from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from toolchain.errors import ArtifactError, ClipkdError
from toolchain.filesystem import file_sha256, write_json
from toolchain.models.clip_model import ClipModel
from toolchain.models.finite import describe_non_finite
from toolchain.models.folding import fold_batch_norms, merge_branches, move_gains
from toolchain.models.plain_attention import plain_attention
from toolchain.models.towers import ImageTower, TextTower, example_pixels
from toolchain.quantization.nncf_backend import decode_json, import_nncf, is_quantizer_key, list_quantizers
from toolchain.recipe.model_names import INT8_CONFIG, WEIGHTS

QUANTIZERS = "nncf.safetensors"

TOWERS = ("image", "text")


def load_quantized(folder: Path, source: ClipModel) -> tuple[nn.Module, nn.Module]:
    """Return the image and text tower that `quantize` saved in `folder`, with the same fake quantization.

    `source` provides only the architecture, so `load_model(folder)` is enough.

    Raises:
        ArtifactError: the folder was not written by `quantize`, or it is of another architecture.
    """
    nncf = import_nncf()
    for name in (WEIGHTS, QUANTIZERS, INT8_CONFIG):
        if not (folder / name).is_file():
            raise ArtifactError(
                f"{folder}: no {name}; expected an int8 checkpoint. Make one with: clipkd quantize {folder.parent}"
            )
    try:
        return _restore_towers(folder, source)
    except (
        RuntimeError,
        LookupError,
        TypeError,
        ValueError,
        AttributeError,
        SafetensorError,
        nncf.ValidationError,
        nncf.InternalError,
    ) as error:  # another architecture's state, another version's JSON, or a module unknown to NNCF
        raise ArtifactError(f"{folder}: does not fit the model in {source.name}: {error}") from error


def _restore_towers(folder: Path, source: ClipModel) -> tuple[nn.Module, nn.Module]:
    config = json.loads((folder / INT8_CONFIG).read_text(encoding="utf-8"))
    for name in (WEIGHTS, QUANTIZERS):
        if file_sha256(folder / name) != config["sha256"][name]:
            raise ArtifactError(
                f"{folder / name}: changed since clipkd quantize wrote it: its sha256 differs from {INT8_CONFIG}'s. "
                f"Delete {folder} and quantize again: clipkd quantize {folder.parent}"
            )
    weights, saved = load_file(folder / WEIGHTS), load_file(folder / QUANTIZERS)
    for name, tensors in ((WEIGHTS, weights), (QUANTIZERS, saved)):
        if wrong := describe_non_finite(tensors):
            raise ArtifactError(
                f"{folder / name}: {wrong}. Delete {folder} and quantize again: clipkd quantize {folder.parent}"
            )
    net = copy.deepcopy(source.net)
    net.load_state_dict(weights)
    prepared = float_towers(net, [name for name in TOWERS if name in config], source.tokenize(["a", "b"]))
    if set(config.get("moved", ())) != prepared.moved:
        raise ArtifactError(
            f"{folder}: its layer norms keep their gains, so it is from an older clipkd. Quantize again: "
            f"clipkd quantize {folder.parent}"
        )
    image_tower = _restore_tower("image", prepared.image.eval(), config, saved)
    return image_tower, _restore_tower("text", prepared.text.eval(), config, saved)


def _restore_tower(name: str, tower: nn.Module, config: dict[str, Any], saved: dict[str, Tensor]) -> nn.Module:
    """Return a tower with its saved quantizers; a tower without any is returned unchanged."""
    if name not in config:
        return tower
    nncf, modules = import_nncf(), ("nncf.*", "toolchain.quantization.*")
    quantized: nn.Module = nncf.torch.load_from_config(tower, decode_json(config[name]), allowed_modules=modules)
    state = {key: value for key, value in quantized.state_dict().items() if not is_quantizer_key(key)}
    state |= {key.removeprefix(f"{name}."): v for key, v in saved.items() if key.startswith(f"{name}.")}
    quantized.load_state_dict(state)
    return quantized.eval()


class FloatTowers(NamedTuple):
    """Copies of a student's towers, prepared for quantization."""

    image: ImageTower
    text: TextTower
    folded: dict[str, str]
    """Batch norms, and the convolutions they were folded into."""

    moved: set[str]
    """Layer norms, by their names in the student, whose gains and biases moved into linear layers."""

    is_merged: bool
    """True if the image tower had parallel branches, now merged."""

    @property
    def is_convolutional(self) -> bool:
        return bool(self.folded) or self.is_merged


def float_towers(net: nn.Module, towers: Collection[str], input_ids_BT: Tensor | None) -> FloatTowers:
    """Return copies of a net's towers with batch norms folded, branches merged and gains moved.

    Gains move only in `towers`; another tower keeps its own.  "text" needs `input_ids_BT`, of any texts.
    """
    net = copy.deepcopy(net).eval().requires_grad_(True)
    plain_attention(net)
    image_tower, text_tower, example = ImageTower(net), TextTower(net), example_pixels(net)
    is_merged = merge_branches(image_tower, example)
    folded = fold_batch_norms(image_tower, example)
    moved: set[str] = set()
    if "image" in towers:
        moved.update(move_gains(image_tower, example))
    if "text" in towers:
        assert input_ids_BT is not None
        moved_in_text = move_gains(text_tower, input_ids_BT.to(example.device))
        moved.update(name.removeprefix("clip.") for name in moved_in_text)
    return FloatTowers(image_tower, text_tower, folded, moved, is_merged)


def save_quantized(
    image_tower: nn.Module, text_tower: nn.Module, prepared: FloatTowers, student: ClipModel, folder: Path
) -> None:
    """Write the float weights, the quantizers and their locations.

    Raises:
        ClipkdError: a weight or a scale is NaN or infinite.
    """
    nncf = import_nncf()
    state = _float_state(image_tower, text_tower, prepared, student.net)
    towers = {"image": image_tower, "text": text_tower}
    quantized = {name: tower for name, tower in towers.items() if list_quantizers(tower)}
    quantizers = {
        f"{name}.{key}": value.detach().cpu().clone(memory_format=torch.contiguous_format)  # some are shared
        for name, tower in quantized.items()
        for key, value in tower.state_dict().items()
        if is_quantizer_key(key) or (prepared.is_merged and name == "image")
    }
    if wrong := describe_non_finite(state | quantizers):
        advice = "Lower quantize.lr, or calibrate only: --set quantize.method=ptq"
        raise ClipkdError(f"{student.name}: the int8 model has {wrong}. {advice}")
    save_file(state, folder / WEIGHTS)
    save_file(quantizers, folder / QUANTIZERS)
    config = {name: nncf.torch.get_config(tower) for name, tower in quantized.items()}
    config["moved"] = sorted(prepared.moved)
    config["sha256"] = {name: file_sha256(folder / name) for name in (WEIGHTS, QUANTIZERS)}
    write_json(folder / INT8_CONFIG, config)


def _float_state(
    image_tower: nn.Module, text_tower: nn.Module, prepared: FloatTowers, net: nn.Module
) -> dict[str, Tensor]:
    """Return the fine-tuned float weights under the original model's names; a merged image tower keeps its old weights.

    A folded batch norm is written so that it only adds the convolution's bias: mean 0, weight 1, variance 1 - eps.  A
    layer norm whose gain moved is written with a gain of 1 and a bias of 0.
    """
    trained = {key.removeprefix("clip."): value for key, value in text_tower.state_dict().items()}
    folded: dict[str, str] = {}
    moved = prepared.moved
    if prepared.is_merged:
        moved = {name for name in moved if not name.startswith("visual.")}
    else:
        trained, folded = trained | image_tower.state_dict(), prepared.folded
    state = {}
    for key, value in net.state_dict().items():
        module, _, leaf = key.rpartition(".")
        if module in folded and leaf != "num_batches_tracked":
            norm: Any = net.get_submodule(module)
            bias = trained[f"{folded[module]}.bias"]
            state[key] = {
                "weight": torch.ones_like(bias),
                "bias": bias,
                "running_mean": torch.zeros_like(bias),
                "running_var": torch.full_like(bias, 1 - norm.eps),
            }[leaf]
        elif module in moved:
            state[key] = torch.ones_like(value) if leaf == "weight" else torch.zeros_like(value)
        elif leaf == "bias" and module in folded.values():
            state[key] = torch.zeros_like(value)  # its value moved into the batch norm
        else:
            state[key] = trained.get(key, value)
    return {key: value.detach().cpu().contiguous() for key, value in state.items()}
