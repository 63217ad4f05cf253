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
    Candidate("ViT-B-32", 0.6917, "DataComp-XL; open_clip docs/PRETRAINED.md"),
    Candidate("ViT-B-16", 0.7624, "DFN-2B; open_clip docs/openclip_results.csv"),
    Candidate("RN50", 0.598, "OpenAI; arXiv:2103.00020"),
    Candidate("MobileCLIP2-S0", 0.715, "DFNDR-2B; arXiv:2508.20691"),
    Candidate("MobileCLIP-S1", 0.726, "DataCompDR-1B; arXiv:2311.17049"),
    Candidate("MobileCLIP2-S2", 0.772, "DFNDR-2B; arXiv:2508.20691"),
    Candidate("PE-Core-T-16-384", 0.621, "Meta's 5.4B pairs; arXiv:2504.13181"),
)
"""The candidates that `clipkd students` measures by default."""


def candidates(models: Sequence[str]) -> list[Candidate]:
    """Return the named candidates, or CANDIDATES if none is named; an unknown name has no published accuracy."""
    known = {candidate.model: candidate for candidate in CANDIDATES}
    return [known.get(model, Candidate(model)) for model in models] or list(CANDIDATES)
