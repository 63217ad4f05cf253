"""The student architectures that `clipkd students` measures: a row each."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Candidate:
    """An architecture and its published accuracy."""

    model: str
    """The value for a recipe's student.model."""

    published_top1: float | None = None
    """ImageNet zero-shot top-1 of the trained float model, as a fraction."""

    source: str = ""
    """The trainers, the data, and an arXiv id or document."""

    weights: str = ""
    """Published weights of the image tower, by timm's name: of a CLIP model, or trained on ImageNet's classes (in1k,
    in22k), which are no CLIP model."""

    licence: str = ""
    """The licence of these weights as timm's configuration states it."""


_CLIP_KD = "CLIP-KD from ViT-B/16, CC3M+12M; arXiv:2307.12732"
CANDIDATES = (
    Candidate("mobilenetv3_small", 0.2695, _CLIP_KD),
    Candidate("vit_t_16", 0.426, "CLIP-KD from ViT-B/16 of LAION-400M, on CC3M+12M; arXiv:2307.12732"),
    Candidate("mobilevit_s", 0.3596, _CLIP_KD),
    Candidate("efficientnet_b0", 0.3544, _CLIP_KD),
    Candidate("resnet18", 0.3136, _CLIP_KD),
    Candidate("swin_t", 0.4018, _CLIP_KD),
    Candidate("ViT-S-32"),
    Candidate("ViT-S-16"),
    Candidate("ViT-M-32"),
    Candidate(
        "ViT-B-32",
        0.6917,
        "DataComp-XL; open_clip docs/PRETRAINED.md",
        "vit_base_patch32_clip_224.datacompxl",
        "apache-2.0",
    ),
    Candidate(
        "ViT-B-16",
        0.7624,
        "DFN-2B; open_clip docs/openclip_results.csv",
        "vit_base_patch16_clip_224.dfn2b",
        "apple-ascl",
    ),
    Candidate("RN50", 0.598, "OpenAI; arXiv:2103.00020", "resnet50_clip.openai", "mit"),
    Candidate("MobileCLIP2-S0", 0.715, "DFNDR-2B; arXiv:2508.20691", "fastvit_mci0.apple_mclip2_dfndr2b", "apple-amlr"),
    Candidate("MobileCLIP-S1", 0.726, "DataCompDR-1B; arXiv:2311.17049", "fastvit_mci1.apple_mclip", "apple-amlr"),
    Candidate("MobileCLIP2-S2", 0.772, "DFNDR-2B; arXiv:2508.20691", "fastvit_mci2.apple_mclip2_dfndr2b", "apple-amlr"),
    Candidate(
        "PE-Core-T-16-384",
        0.621,
        "Meta's 5.4B pairs; arXiv:2504.13181",
        "vit_pe_core_tiny_patch16_384.fb",
        "apache-2.0",
    ),
    Candidate("PE-Core-S-16-384", weights="vit_pe_core_small_patch16_384.fb", licence="apache-2.0"),
    Candidate("mobilenetv4_s", weights="mobilenetv4_conv_small.e2400_r224_in1k", licence="apache-2.0"),
    Candidate("mobilenetv4_m", weights="mobilenetv4_conv_medium.e500_r256_in1k", licence="apache-2.0"),
    Candidate("repvit_m1", weights="repvit_m1_0.dist_450e_in1k", licence="apache-2.0"),
    Candidate("efficientvit_b1", weights="efficientvit_b1.r224_in1k", licence="apache-2.0"),
    Candidate("tiny_vit_5m", weights="tiny_vit_5m_224.dist_in22k", licence="apache-2.0"),
    Candidate("fastvit_t8", weights="fastvit_t8.apple_in1k", licence="fastvit-license"),
)
"""The candidates that `clipkd students` measures by default."""


def candidates(models: Sequence[str]) -> list[Candidate]:
    """Return the named candidates, or CANDIDATES if none is named; an unknown name has no published accuracy."""
    known = {candidate.model: candidate for candidate in CANDIDATES}
    return [known.get(model, Candidate(model)) for model in models] or list(CANDIDATES)
