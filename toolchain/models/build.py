"""Build, load and save models as open_clip local-dirs."""

import json
import logging
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip import pretrained as open_clip_pretrained
from open_clip.factory import get_model_config
from open_clip.tokenizer import HFTokenizer
from open_clip.transform import PreprocessCfg, image_transform_v2
from safetensors.torch import save_file
from torch import nn

from toolchain.errors import ArtifactError, UsageError, one_line
from toolchain.models.clip_model import ClipModel
from toolchain.models.hub import from_hub, not_downloaded, offline_reason
from toolchain.models.towers import is_convolutional
from toolchain.models.weights import load_weights, weights_file
from toolchain.recipe.model import ModelSpec
from toolchain.recipe.model_config import merge_config
from toolchain.recipe.model_names import CONFIG, HUB, WEIGHTS, model_folder, suggestion
from toolchain.user_documents import InvalidDocument, decode_document, parse_json

# all files that tokenizers of transformers may read; a model has some of them
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tokenizer.model",
)


def build_model(spec: ModelSpec, *, seed: int, say: Callable[[str], None] = lambda _: None) -> ClipModel:
    """Return the model of a loaded recipe, in evaluation mode, in float32, on the CPU.

    With `spec.is_random` it is initialized from `seed`, which also seeds torch's global generator; otherwise it has its
    weights.  `say` receives a message before each download.

    Raises:
        UsageError: an unknown tag, an architecture without weights, or changes that open_clip does not know.
        ArtifactError: a folder, file or download is missing or corrupt, or the weights do not fit the model.
    """
    folder = model_folder(spec)
    tag: dict[str, Any] = {}
    if folder is not None:
        config = read_config(folder)
    elif spec.model.startswith(HUB):
        config = _read_json(from_hub(spec.model.removeprefix(HUB), CONFIG, say), ("model_cfg",))
    else:
        tag = _tag(spec) if spec.pretrained else {}
        config = _architecture(spec.model, tag)
    config = {
        "model_cfg": merge_config(config["model_cfg"], spec.model_cfg),
        "preprocess_cfg": merge_config(config.get("preprocess_cfg", {}), spec.preprocess_cfg),
    }
    weights = None if spec.is_random else weights_file(spec, folder, tag, say)
    changed_tokenizer = "hf_tokenizer_name" in spec.model_cfg.get("text_cfg", {})
    with tempfile.TemporaryDirectory() as staging:
        tokenizer = _tokenizer_files(config, None if changed_tokenizer else folder, Path(staging), say)
    changed = bool(spec.model_cfg or spec.preprocess_cfg)
    model = assemble_model(spec.model, config, tokenizer, seed if spec.is_random else None, changed=changed)
    if weights is not None:
        load_weights(model.net, weights, spec.model, model.config["model_cfg"], spec.model_cfg, say)
    return model


def load_model(folder: Path, *, random_seed: int | None = None) -> ClipModel:
    """Return the model of a local-dir; its weights are required unless `random_seed` is given.

    Raises:
        ArtifactError: the folder is not an open_clip local-dir, or its weights are missing or do not fit its config.
    """
    spec = ModelSpec(model=str(folder.absolute()), init="weights" if random_seed is None else "random")
    return build_model(spec, seed=random_seed or 0)


def read_config(folder: Path) -> dict[str, Any]:
    """Return the content of a local-dir's open_clip_config.json."""
    if not (folder / CONFIG).is_file():
        raise ArtifactError(f"{folder}: no {CONFIG}; expected an open_clip local-dir")
    return _read_json(folder / CONFIG, ("model_cfg", "preprocess_cfg"))


def save_model(model: ClipModel, folder: Path) -> None:
    """Write weights, configuration and tokenizer: a folder that `open_clip.create_model("local-dir:…")` opens.

    The folder is self-contained, except for a text tower of transformers (`hf_model_name`): open_clip reads that
    architecture's configuration from the Hub or its cache.
    """
    state = {key: value.detach().cpu().contiguous() for key, value in model.net.state_dict().items()}
    save_file(state, folder / WEIGHTS)
    _write_configuration(folder, model.config, model.tokenizer_files)


def assemble_model(
    name: str, config: dict[str, Any], tokenizer: dict[str, bytes], seed: int | None = None, *, changed: bool = False
) -> ClipModel:
    """Return the model that open_clip builds from this configuration, with random weights.

    `changed` is true if the recipe changes the configuration: an error of open_clip is then a usage error.

    Raises:
        UsageError, ArtifactError: open_clip cannot build this model.
    """
    hf_model = config["model_cfg"].get("text_cfg", {}).get("hf_model_name")
    unreachable = offline_reason() if hf_model and not Path(hf_model).is_dir() else None
    with tempfile.TemporaryDirectory() as staging, _quiet():
        _write_configuration(Path(staging), config, tokenizer)
        local_dir = f"local-dir:{staging}"
        if seed is not None:
            torch.manual_seed(seed)
        try:
            net = open_clip.create_model(local_dir, load_weights=False, pretrained_text=False)
            decoder: Any = getattr(net, "text_decoder", None)  # CoCa's, for captions
            if decoder is not None:
                nn.init.normal_(decoder.text_projection, std=decoder.width**-0.5)  # open_clip leaves it uninitialized
            tokenize = open_clip.get_tokenizer(local_dir)
            preprocess_cfg = json.loads(json.dumps(net.visual.preprocess_cfg))
            PreprocessCfg(**config["preprocess_cfg"])  # create_model ignores unknown fields
            preprocess = image_transform_v2(PreprocessCfg(**preprocess_cfg), is_train=False)
        except ModuleNotFoundError:
            raise
        except Exception as error:  # constructors, transformers and tokenizers raise all kinds
            if hf_model and isinstance(error, OSError):
                what = f"{name}: the configuration of its text tower {hf_model}"
                raise not_downloaded(what, unreachable or error) from error
            reason = one_line(error).replace(local_dir, name).replace(staging, name)
            if changed:
                raise UsageError(
                    f"{name}: open_clip cannot build this model with the recipe's changes: {reason}"
                ) from error
            raise ArtifactError(f"{name}: open_clip cannot build this model: {reason}") from error
    _check_input_size(net.visual, name, changed)
    if is_convolutional(net.visual):
        net.visual.to(memory_format=torch.channels_last)  # convolutions run twice as fast
    complete = {"model_cfg": config["model_cfg"], "preprocess_cfg": preprocess_cfg}
    return ClipModel(net.eval(), name, complete, tokenizer, tokenize, preprocess)


def _write_configuration(folder: Path, config: dict[str, Any], tokenizer: Mapping[str, bytes]) -> None:
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    for name, content in tokenizer.items():
        (folder / name).write_bytes(content)


def _check_input_size(visual: Any, name: str, changed: bool) -> None:
    """Refuse an image size that timm's tower is not built for: open_clip does not pass the size to it."""
    patches = getattr(getattr(visual, "trunk", None), "patch_embed", None)
    built, asked = getattr(patches, "img_size", None), visual.image_size
    if built is not None and getattr(patches, "strict_img_size", False) and tuple(built) != tuple(asked):
        raise (UsageError if changed else ArtifactError)(
            f"{name}: its image tower takes {built[0]} x {built[1]} pixels but image_size is {asked[0]} x {asked[1]}, "
            "and open_clip cannot resize this tower. Choose a timm_model_name made for that size"
        )


def _architecture(name: str, tag: Mapping[str, Any]) -> dict[str, Any]:
    """Return the configuration of one of open_clip's architectures, with the settings of a tag's weights."""
    model_cfg = get_model_config(name)
    if model_cfg is None:
        near = suggestion(name, open_clip.list_models())
        hint = f"did you mean {near}?" if near else "open_clip.list_models() lists the known ones"
        raise UsageError(f"model '{name}': open_clip has no such architecture; {hint}")
    if tag.get("quick_gelu"):  # open_clip only warns if the name does not match
        model_cfg["quick_gelu"] = True
    keys = set(PreprocessCfg.__dataclass_fields__) & {key for key, value in tag.items() if value is not None}
    return {"model_cfg": model_cfg, "preprocess_cfg": {key: tag[key] for key in sorted(keys)}}


def _tag(spec: ModelSpec) -> dict[str, Any]:
    """Return open_clip's record of an architecture's weights: preprocessing, activation and location."""
    assert spec.pretrained is not None
    tag: dict[str, Any] = open_clip_pretrained.get_pretrained_cfg(spec.model, spec.pretrained)
    if tag:
        return tag
    tags = open_clip_pretrained.list_pretrained_tags_by_model(spec.model)
    near = suggestion(spec.pretrained, tags)
    if near:
        hint = f"did you mean {near}?"
    elif Path(spec.pretrained).suffix:
        hint = f"for a file, write checkpoint: {spec.pretrained}"
    else:
        hint = _known_tags(tags)
    raise UsageError(f"pretrained '{spec.pretrained}': open_clip has no such weights for {spec.model}; {hint}")


def _known_tags(tags: list[str]) -> str:
    return f"it has {', '.join(tags)}" if tags else "it has none"


def _tokenizer_files(
    config: Mapping[str, Any], folder: Path | None, staging: Path, say: Callable[[str], None]
) -> dict[str, bytes]:
    """Return the files of a tokenizer that is not open_clip's own, from the folder or otherwise from the Hub.

    Raises:
        ArtifactError: the Hub's tokenizer cannot be loaded, or tokenizes differently once it is saved.
    """
    text_cfg = config["model_cfg"].get("text_cfg", {})
    source = text_cfg.get("hf_tokenizer_name")
    if not source:
        return {}
    if folder is None:
        unreachable = None
        if not Path(source).is_dir():
            say(f"tokenizer {source}: loading from the Hugging Face Hub or its local cache")
            unreachable = offline_reason()
        arguments = {
            "context_length": text_cfg.get("context_length", 77),
            "tokenizer_mode": text_cfg.get("tokenizer_mode"),
            **text_cfg.get("tokenizer_kwargs", {}),
        }
        try:
            tokenizer = HFTokenizer(source, **arguments)
        except (OSError, ValueError) as error:  # transformers raises either for a name it cannot resolve
            raise not_downloaded(f"tokenizer {source}", unreachable or error) from error
        tokenizer.save_pretrained(str(staging))
        if not torch.equal(HFTokenizer(str(staging), **arguments)(_CAPTIONS), tokenizer(_CAPTIONS)):
            raise ArtifactError(
                f"tokenizer {source}: after saving and loading it tokenizes differently, so no folder can hold it. "
                "Choose a model with another tokenizer"
            )
        folder = staging
    return {name: (folder / name).read_bytes() for name in TOKENIZER_FILES if (folder / name).is_file()}


_CAPTIONS = ["", "a photo of a cat", "Zwölf Boxkämpfer, 12 km; ein Café?", "<b>&amp;</b> 猫 🐈", "very " * 99]


def _read_json(path: Path, keys: tuple[str, ...]) -> dict[str, Any]:
    try:
        config: dict[str, Any] = parse_json(decode_document(path.read_bytes()))
    except InvalidDocument as error:
        raise ArtifactError(f"{path}: {error}") from None
    missing = [key for key in keys if key not in config]
    if missing:
        raise ArtifactError(f"{path}: no {' and no '.join(missing)}; expected an open_clip local-dir's configuration")
    return config


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence open_clip, which logs every look-up on the root logger."""
    root, level = logging.getLogger(), logging.getLogger().level
    root.setLevel(logging.ERROR)
    try:
        yield
    finally:
        root.setLevel(level)
