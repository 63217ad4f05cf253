"""An open_clip model with its own preprocessing and tokenizer, from wherever it comes.

Every model is built as plain open_clip would build it from a local-dir that holds its complete configuration and
tokenizer, so that `save_model` makes such a folder of any of them.

    B batch   D embedding width   T tokens, the context length   L the leading tokens that are used   CHW image
"""

import json
import logging
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import open_clip
import torch
import torch.nn.functional as F
from open_clip import pretrained as open_clip_pretrained
from open_clip.coca_model import CoCa
from open_clip.factory import get_model_config
from open_clip.tokenizer import HFTokenizer
from open_clip.transform import PreprocessCfg, image_transform_v2
from open_clip.transformer import Transformer, VisionTransformer
from PIL import Image
from safetensors.torch import save_file
from timm.models.eva import Eva
from timm.models.mobilevit import MobileVitBlock, MobileVitV2Block
from timm.models.vision_transformer import VisionTransformer as TimmVisionTransformer
from timm.models.vision_transformer_relpos import VisionTransformerRelPos
from torch import Tensor, nn

from toolchain.data import Geometry
from toolchain.errors import ArtifactError, UsageError
from toolchain.last_block import encode_class_token, reads_class_token
from toolchain.masking import check_can_mask
from toolchain.recipe import LossWeights, ModelSpec
from toolchain.sources import CONFIG, HUB, WEIGHTS, model_folder, suggestion
from toolchain.trimming import encode_tokens, is_trimmable, trim_tokens
from toolchain.weights import from_hub, load_weights, not_downloaded, one_line, weights_file

# Every file that the tokenizers of transformers read, whichever of them a model has.
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


@dataclass(frozen=True)
class ClipModel:
    """A model and what turns pictures and words into its inputs."""

    net: nn.Module
    name: str
    """Where it came from, for messages."""

    config: dict[str, Any]
    """The content of an open_clip_config.json that gives this model: model_cfg and preprocess_cfg."""

    tokenizer_files: dict[str, bytes]
    """Files that its tokenizer is made of; none for open_clip's own."""

    tokenize: Callable[[list[str]], Tensor]
    """Captions to input_ids [B, T], int64."""

    preprocess: Callable[[Image.Image], Tensor]
    """open_clip's evaluation transform: a picture to pixel_values [3, H, W]."""

    @property
    def geometry(self) -> Geometry:
        """The part of the preprocessing that a batch of pictures is prepared for.

        Raises:
            UsageError: the model's images are not square.
        """
        cfg = self.config["preprocess_cfg"]
        height, width = cfg["size"] if isinstance(cfg["size"], list) else (cfg["size"], cfg["size"])
        if height != width:
            raise UsageError(
                f"{self.name}: its images are {height} x {width} (height x width); clipkd prepares square ones only. "
                "Choose a model with a square image_size"
            )
        return Geometry(height, cfg["interpolation"])

    @property
    def image_size(self) -> int:
        return self.geometry.size

    @property
    def context_length(self) -> int:
        return int(self.config["model_cfg"]["text_cfg"].get("context_length", 77))

    @property
    def embed_dim(self) -> int:
        return int(self.config["model_cfg"]["embed_dim"])

    @property
    def logit_scale(self) -> Tensor:
        """The multiplier of cosine similarities (open_clip's attribute of this name is its logarithm)."""
        log_logit_scale: Tensor = self.net.logit_scale  # type: ignore[assignment]  # nn.Module types attributes loosely
        return log_logit_scale.exp().reshape(())  # some models keep it as a vector of one

    def normalise(self, pixels_BCHW: Tensor) -> Tensor:
        """uint8 images of the model's own size to pixel_values on the same device, as `preprocess` makes them."""
        cfg = self.config["preprocess_cfg"]
        scale_311, shift_311 = _statistics(tuple(cfg["mean"]), tuple(cfg["std"]), pixels_BCHW.device)
        layout = torch.channels_last if self._is_convolutional else torch.contiguous_format
        return torch.addcmul(shift_311, pixels_BCHW.to(torch.float32, memory_format=layout), scale_311)

    def settle(self) -> None:
        """Find out now what of the model can be computed for less, which is else found out at the first use.

        Before the net is masked, and before it is in a loader's process, which has no GPU.
        """
        _ = self._reads_class_token, self._trims

    def encode_image(self, pixel_values_BCHW: Tensor) -> Tensor:
        """[B, D] features, as open_clip's encode_image gives them."""
        if self._reads_class_token:
            return encode_class_token(self.net.visual, pixel_values_BCHW)  # type: ignore[arg-type]
        features_BD: Tensor = self.net.encode_image(pixel_values_BCHW)  # type: ignore[operator]
        return features_BD

    def ids_of(self, captions: list[str]) -> Tensor:
        """input_ids [B, L] of captions, without the padding that their features do not depend on."""
        input_ids_BT = self.tokenize(captions)
        return trim_tokens(self.net, input_ids_BT) if self._trims else input_ids_BT

    def encode_text(self, input_ids_BL: Tensor) -> Tensor:
        """[B, D] features of whole or trimmed input_ids, as open_clip's encode_text gives them of whole ones."""
        if self._trims:
            return encode_tokens(self.net, input_ids_BL)
        features_BD: Tensor = self.net.encode_text(input_ids_BL)  # type: ignore[operator]
        return features_BD

    def tokenizes_like(self, other: "ClipModel") -> bool:
        """Whether both make the same input_ids of the same captions."""
        sections = [model.config["model_cfg"].get("text_cfg", {}) for model in (self, other)]
        keys = ("hf_tokenizer_name", "tokenizer_mode", "tokenizer_kwargs", "context_length")
        settings = [[section.get(key) for key in keys] for section in sections]
        return (
            settings[0] == settings[1]
            and self.context_length == other.context_length
            and self.tokenizer_files == other.tokenizer_files
            and self._trims == other._trims
        )

    @cached_property
    def _reads_class_token(self) -> bool:
        return reads_class_token(self.net.visual)  # type: ignore[arg-type]

    @cached_property
    def _trims(self) -> bool:
        return is_trimmable(self.net)

    @cached_property
    def _is_convolutional(self) -> bool:
        return is_convolutional(self.net.visual)  # type: ignore[arg-type]


# Building -------------------------------------------------------------------------------------------------------------


def build_model(spec: ModelSpec, *, seed: int, say: Callable[[str], None] = lambda _: None) -> ClipModel:
    """The model of a loaded recipe, in evaluation mode, in float32, on the CPU.

    `spec.is_random`: initialised from `seed`, which also seeds torch's global generator; otherwise with its weights.
    `say` is told before anything is downloaded.

    Raises:
        UsageError: an unknown tag, an architecture without weights, or changes that open_clip does not know.
        ArtifactError: a folder, file or download is missing or damaged, or the weights do not fit the model.
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
        "model_cfg": _merged(config["model_cfg"], spec.model_cfg),
        "preprocess_cfg": _merged(config.get("preprocess_cfg", {}), spec.preprocess_cfg),
    }
    weights = None if spec.is_random else weights_file(spec, folder, tag, say)
    changed_tokenizer = "hf_tokenizer_name" in spec.model_cfg.get("text_cfg", {})
    with tempfile.TemporaryDirectory() as staging:
        tokenizer = _tokenizer_files(config, None if changed_tokenizer else folder, Path(staging), say)
    changed = bool(spec.model_cfg or spec.preprocess_cfg)
    model = _assembled(spec.model, config, tokenizer, seed if spec.is_random else None, changed)
    if weights is not None:
        load_weights(model.net, weights, spec.model, model.config["model_cfg"], spec.model_cfg)
    return model


def load_model(folder: Path, *, random_seed: int | None = None) -> ClipModel:
    """Open a local-dir; its weights are required unless `random_seed` asks for a fresh initialisation.

    Raises:
        ArtifactError: the folder is no open_clip local-dir, or its weights are missing or do not fit its config.
    """
    spec = ModelSpec(model=str(folder.absolute()), init="weights" if random_seed is None else "random")
    return build_model(spec, seed=random_seed or 0)


def read_config(folder: Path) -> dict[str, Any]:
    """The content of a local-dir's open_clip_config.json."""
    if not (folder / CONFIG).is_file():
        raise ArtifactError(f"{folder}: no {CONFIG}; expected an open_clip local-dir")
    return _read_json(folder / CONFIG, ("model_cfg", "preprocess_cfg"))


def save_model(model: ClipModel, folder: Path) -> None:
    """Write weights, configuration and tokenizer: a folder that `open_clip.create_model("local-dir:…")` opens.

    A text tower of transformers (`hf_model_name`) is the one exception to a folder that needs nothing else: open_clip
    asks the Hub, or its cache, for that architecture's configuration.
    """
    state = {key: value.detach().cpu().contiguous() for key, value in model.net.state_dict().items()}
    save_file(state, folder / WEIGHTS)
    _write_configuration(folder, model.config, model.tokenizer_files)


def _assembled(
    name: str, config: dict[str, Any], tokenizer: dict[str, bytes], seed: int | None, changed: bool
) -> ClipModel:
    """The model that plain open_clip makes of this configuration, its weights drawn at random.

    `changed`: by the recipe, which then is to blame for what open_clip does not take.
    """
    hf_model = config["model_cfg"].get("text_cfg", {}).get("hf_model_name")
    with tempfile.TemporaryDirectory() as staging, _quiet():
        _write_configuration(Path(staging), config, tokenizer)
        local_dir = f"local-dir:{staging}"
        if seed is not None:
            torch.manual_seed(seed)
        try:
            net = open_clip.create_model(local_dir, load_weights=False, pretrained_text=False)
            tokenize = open_clip.get_tokenizer(local_dir)
            preprocess_cfg = json.loads(json.dumps(net.visual.preprocess_cfg))
            PreprocessCfg(**config["preprocess_cfg"])  # create_model passes over what it does not know
            preprocess = image_transform_v2(PreprocessCfg(**preprocess_cfg), is_train=False)
        except ModuleNotFoundError:
            raise
        except Exception as error:  # open_clip raises whatever the constructors, transformers or tokenizers raised
            if hf_model and isinstance(error, OSError):
                raise not_downloaded(f"{name}: the configuration of its text tower {hf_model}", error) from error
            said = one_line(error).replace(local_dir, name).replace(staging, name)
            if changed:
                raise UsageError(
                    f"{name}: open_clip cannot build this model as the recipe changes it: {said}"
                ) from error
            raise ArtifactError(f"{name}: open_clip cannot build this model: {said}") from error
    _check_input_size(net.visual, name, changed)
    if is_convolutional(net.visual):
        net.visual.to(memory_format=torch.channels_last)  # convolutions run twice as fast so
    complete = {"model_cfg": config["model_cfg"], "preprocess_cfg": preprocess_cfg}
    return ClipModel(net.eval(), name, complete, tokenizer, tokenize, preprocess)


def _write_configuration(folder: Path, config: dict[str, Any], tokenizer: Mapping[str, bytes]) -> None:
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    for name, content in tokenizer.items():
        (folder / name).write_bytes(content)


def _check_input_size(visual: Any, name: str, changed: bool) -> None:
    """timm's towers of patches are built for one size, and open_clip does not tell them another."""
    patches = getattr(getattr(visual, "trunk", None), "patch_embed", None)
    built, asked = getattr(patches, "img_size", None), visual.image_size
    if built is not None and getattr(patches, "strict_img_size", False) and tuple(built) != tuple(asked):
        raise (UsageError if changed else ArtifactError)(
            f"{name}: its image tower takes {built[0]} x {built[1]} pixels, image_size says {asked[0]} x {asked[1]}, "
            "and open_clip cannot resize this tower. Choose the timm_model_name made for that size"
        )


def _architecture(name: str, tag: Mapping[str, Any]) -> dict[str, Any]:
    """open_clip's configuration of an architecture of its own, as a tag's weights were trained."""
    model_cfg = get_model_config(name)
    if model_cfg is None:
        near = suggestion(name, open_clip.list_models())
        hint = f"did you mean {near}?" if near else "open_clip.list_models() names those it knows"
        raise UsageError(f"model '{name}': open_clip has no such architecture; {hint}")
    if tag.get("quick_gelu"):  # which open_clip leaves to whoever chooses the name, with a warning
        model_cfg["quick_gelu"] = True
    keys = set(PreprocessCfg.__dataclass_fields__) & {key for key, value in tag.items() if value is not None}
    return {"model_cfg": model_cfg, "preprocess_cfg": {key: tag[key] for key in sorted(keys)}}


def _tag(spec: ModelSpec) -> dict[str, Any]:
    """What open_clip knows of an architecture's weights of this name: preprocessing, activation, where they are."""
    assert spec.pretrained is not None
    tag: dict[str, Any] = open_clip_pretrained.get_pretrained_cfg(spec.model, spec.pretrained)
    if tag:
        return tag
    tags = open_clip_pretrained.list_pretrained_tags_by_model(spec.model)
    near = suggestion(spec.pretrained, tags)
    if near:
        hint = f"did you mean {near}?"
    elif Path(spec.pretrained).suffix:
        hint = f"a file is named by checkpoint: {spec.pretrained}"
    else:
        hint = _known_tags(tags)
    raise UsageError(f"pretrained '{spec.pretrained}': open_clip has no such weights of {spec.model}; {hint}")


def _known_tags(tags: list[str]) -> str:
    return f"it has {', '.join(tags)}" if tags else "it has none"


def _merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with `changes` in place of what it says, section by section."""
    merged = dict(base)
    for key, value in changes.items():
        old = merged.get(key)
        merged[key] = _merged(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return merged


def _tokenizer_files(
    config: Mapping[str, Any], folder: Path | None, staging: Path, say: Callable[[str], None]
) -> dict[str, bytes]:
    """The files of a tokenizer that is not open_clip's own: those of the folder, or else of the Hub.

    Raises:
        ArtifactError: the Hub's tokenizer cannot be had, or does not tokenize as before once it is saved.
    """
    text_cfg = config["model_cfg"].get("text_cfg", {})
    source = text_cfg.get("hf_tokenizer_name")
    if not source:
        return {}
    if folder is None:
        if not Path(source).is_dir():
            say(f"tokenizer {source}: from the Hugging Face Hub, or its cache on this machine")
        arguments = {
            "context_length": text_cfg.get("context_length", 77),
            "tokenizer_mode": text_cfg.get("tokenizer_mode"),
            **text_cfg.get("tokenizer_kwargs", {}),
        }
        try:
            tokenizer = HFTokenizer(source, **arguments)
        except (OSError, ValueError) as error:  # transformers raises either for a name it cannot resolve
            raise not_downloaded(f"tokenizer {source}", error) from error
        tokenizer.save_pretrained(str(staging))
        if not torch.equal(HFTokenizer(str(staging), **arguments)(_CAPTIONS), tokenizer(_CAPTIONS)):
            raise ArtifactError(
                f"tokenizer {source}: saved and opened again it tokenizes otherwise, so no folder could hold it. "
                "Choose a model with another tokenizer"
            )
        folder = staging
    return {name: (folder / name).read_bytes() for name in TOKENIZER_FILES if (folder / name).is_file()}


_CAPTIONS = ["", "a photo of a cat", "Zwölf Boxkämpfer, 12 km; ein Café?", "<b>&amp;</b> 猫 🐈", "very " * 99]


# What a model is, and which go together -------------------------------------------------------------------------------


def check_pair(student: ClipModel, teacher: ClipModel | None, weights: LossWeights) -> None:
    """Refuse, before any data is read, models that cannot be trained together as asked.

    Tokenizers, context lengths, image sizes, normalisation and widths may all differ.  So may the loss a teacher was
    trained with: the objectives that compare softmax distributions (CRD, GD, cross-KD) take a sigmoid teacher (SigLIP,
    arXiv:2303.15343) as it is.  It holds that pair (i, j) matches with probability sigma(l_ij), l = t cos + b,
    independently; given that exactly one candidate of i matches, which is what a batch of pairs says, it is j with

        prod_k (1 - sigma(l_ik)) sigma(l_ij) / (1 - sigma(l_ij))  ~  exp(l_ij),   that is  softmax_j(t cos_ij),

    where the bias b has cancelled.

    Raises:
        UsageError: the two cannot work together, or the student cannot be trained at all; with the reason.
    """
    for model in (student, teacher):
        if model is not None:
            _ = model.geometry
    if isinstance(student.net, CoCa):
        raise UsageError(
            f"student {student.name}: a CoCa model, whose caption decoder no loss here would train. Choose a student "
            "with an image tower and a text tower only; as a teacher this model is welcome"
        )
    if getattr(student.net, "logit_bias", None) is not None:
        raise UsageError(
            f"student {student.name}: has a logit_bias, made for a sigmoid loss; the losses here are softmax losses, "
            "in which a bias cancels and is never trained. Write student.model_cfg: {init_logit_bias: null}"
        )
    if teacher is not None and weights.mfd > 0:
        check_can_mask(student.net.visual)  # type: ignore[arg-type]


def is_vision_transformer(visual: nn.Module) -> bool:
    """Whether an image tower attends over all its patches, as far as AdamW's betas and epsilon care.

    CLIP (arXiv:2103.00020, table 19) trains ViTs with beta2 0.98 and epsilon 1e-6, ResNets with 0.999 and 1e-8.
    CLIP-KD's released code decides by whether "vit" is in the model's name.  This decides by what the tower is made of:
    open_clip's and timm's ViT, EVA, and MobileViT, convolutional though that mostly is, because the paper's MobileViT-S
    was trained so.  For every model of the paper the two agree.
    """
    trunk = getattr(visual, "trunk", visual)
    if isinstance(trunk, (VisionTransformer, TimmVisionTransformer, VisionTransformerRelPos, Eva)):
        return True
    return any(isinstance(module, (MobileVitBlock, MobileVitV2Block)) for module in trunk.modules())


def is_convolutional(visual: nn.Module) -> bool:
    """Whether an image tower convolves beyond cutting its patches, and so runs faster with channels last."""
    return sum(isinstance(module, nn.Conv2d) for module in visual.modules()) > 1


def compile_towers(net: nn.Module) -> None:
    """torch.compile in place: block by block where a tower is a stack of equal blocks, so that one compilation serves
    all of them, and as a whole where it is not."""
    stacks = [module for module in net.modules() if isinstance(module, Transformer)]
    for stack in stacks:
        for block in stack.resblocks:
            block.compile()
    if not any(isinstance(module, Transformer) for module in net.visual.modules()):  # type: ignore[union-attr]
        net.visual.compile()  # type: ignore[union-attr]


def unit_image_features(net: nn.Module, pixel_values_BCHW: Tensor) -> Tensor:
    """[B, D] float32 rows of unit norm."""
    return F.normalize(net.encode_image(pixel_values_BCHW).float(), dim=-1)  # type: ignore[operator]


def unit_text_features(net: nn.Module, input_ids_BT: Tensor) -> Tensor:
    """[B, D] float32 rows of unit norm."""
    return F.normalize(net.encode_text(input_ids_BT).float(), dim=-1)  # type: ignore[operator]


def num_parameters(net: nn.Module) -> tuple[int, int]:
    """Parameters of the image tower, and of everything else (the text tower and the scale)."""
    visual: nn.Module = net.visual  # type: ignore[assignment]  # nn.Module types attributes loosely
    image = sum(parameter.numel() for parameter in visual.parameters())
    return image, sum(parameter.numel() for parameter in net.parameters()) - image


@lru_cache(maxsize=16)
def _statistics(mean: tuple[float, ...], std: tuple[float, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """What to multiply a byte by, and then to add, for (byte / 255 - mean) / std."""
    with torch.inference_mode(False):  # the cache outlives the mode it is filled in
        mean_311, std_311 = (torch.tensor(values, dtype=torch.float64)[:, None, None] for values in (mean, std))
        return (1 / (255 * std_311)).float().to(device), (-mean_311 / std_311).float().to(device)


def _read_json(path: Path, keys: tuple[str, ...]) -> dict[str, Any]:
    try:
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ArtifactError(f"{path}: not JSON: {error}") from None
    missing = [key for key in keys if key not in config]
    if missing:
        raise ArtifactError(f"{path}: no {' and no '.join(missing)}; expected an open_clip local-dir's configuration")
    return config


@contextmanager
def _quiet() -> Iterator[None]:
    """open_clip narrates every look-up on the root logger."""
    root, level = logging.getLogger(), logging.getLogger().level
    root.setLevel(logging.ERROR)
    try:
        yield
    finally:
        root.setLevel(level)
