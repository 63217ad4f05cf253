"""What a frozen teacher says of a batch: computed on the spot, or looked up.

B batch   b rows of one process   E teacher width   T tokens   N samples   V views   C captions
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from toolchain.data import TrainingData
from toolchain.feed import Fed
from toolchain.models import ClipModel, compile_towers
from toolchain.objectives import TeacherBatch
from toolchain.onednn import on_onednn
from toolchain.recipe import Precision

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_CHUNK = 256  # samples per forward, when features are stored


class Progress(Protocol):
    """How a long stage says where it is; `clipkd.py` draws it."""

    def __call__(self, what: str, done: int, total: int, note: str = "") -> None: ...


@dataclass(frozen=True)
class LiveTeacher:
    """A frozen teacher, run on the batch at hand."""

    model: ClipModel
    logit_scale: Tensor
    dtype: torch.dtype
    compiled: bool = False

    @torch.no_grad()  # not inference_mode: the objectives save these features for their backward pass
    def of(self, batch: Fed) -> TeacherBatch:
        """What it says of a batch."""
        assert batch.teacher_pixels is not None
        assert batch.teacher_ids is not None
        image_bE = self.image_features(batch.teacher_pixels)
        return TeacherBatch(image_bE, self.text_features(batch.teacher_ids), self.logit_scale)

    def image_features(self, pixels: Tensor) -> Tensor:
        """[B, E] float32, unit rows, of uint8 pixels."""
        with on_onednn(pixels.device, compiled=self.compiled):
            raw_BE = self.model.encode_image(self.model.normalise(pixels).to(self.dtype))
        return nn.functional.normalize(raw_BE.float(), dim=-1)

    def text_features(self, input_ids_BT: Tensor) -> Tensor:
        """[B, E] float32, unit rows."""
        with on_onednn(input_ids_BT.device, compiled=self.compiled):
            raw_BE = self.model.encode_text(input_ids_BT)
        return nn.functional.normalize(raw_BE.float(), dim=-1)


@dataclass(frozen=True)
class StoredTeacher:
    """What a frozen teacher said of every stored view, and of every caption those have."""

    image_VNE: Tensor
    text_CE: Tensor
    captions: dict[str, int]
    logit_scale: Tensor

    def of(self, batch: Fed) -> TeacherBatch:
        """What it said of a batch."""
        device = self.logit_scale.device
        image_bE = self.image_VNE[batch.view, torch.from_numpy(batch.sample_b)].to(device)
        text_bE = self.text_CE[[self.captions[caption] for caption in batch.captions_b]].to(device)
        return TeacherBatch(image_bE, text_bE, self.logit_scale)

    def save(self, path: Path) -> None:
        """Keep it, atomically, for a run that is interrupted and for the other processes."""
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".partial")
        stored = {"image": self.image_VNE, "text": self.text_CE, "captions": self.captions}
        torch.save(stored | {"logit_scale": self.logit_scale.cpu()}, partial)
        partial.replace(path)


def load_stored_teacher(path: Path, device: torch.device) -> StoredTeacher:
    """What `StoredTeacher.save` kept."""
    saved = torch.load(path, weights_only=True)
    return StoredTeacher(saved["image"], saved["text"], saved["captions"], saved["logit_scale"].to(device))


def live_teacher(
    teacher: ClipModel, precision: Precision, device: torch.device, *, compiled: bool = False
) -> LiveTeacher:
    """The teacher, frozen, its weights in the precision it computes in; its features are float32 again."""
    logit_scale = teacher.logit_scale.detach().float().to(device)  # before it is rounded
    net: Any = teacher.net.eval().requires_grad_(False).to(device, DTYPES[precision])
    if compiled:
        compile_towers(net)
    return LiveTeacher(teacher, logit_scale, DTYPES[precision], compiled)


@torch.inference_mode()
def store_teacher_features(live: LiveTeacher, data: TrainingData, num_views: int, progress: Progress) -> StoredTeacher:
    """Run the teacher once over `num_views` views of every sample, and over every distinct caption of those."""
    geometry, device = live.model.geometry, live.logit_scale.device
    image_VNE = torch.empty(num_views, data.num_samples, live.model.embed_dim)
    captions: dict[str, int] = {}
    sample_N = np.arange(data.num_samples)
    for view in range(num_views):
        for start in range(0, data.num_samples, _CHUNK):
            batch = data.view_of(sample_N[start : start + _CHUNK], view, [geometry])
            if len(batch.sample_B):  # of damaged ones there is nothing to store
                image_VNE[view, batch.sample_B] = live.image_features(batch.pixels[geometry].to(device)).cpu()
            for caption in batch.captions_B:
                captions.setdefault(caption, len(captions))
            done = view * data.num_samples + min(start + _CHUNK, data.num_samples)
            progress("teacher features", done, num_views * data.num_samples)
    texts = list(captions)
    chunks = [texts[start : start + _CHUNK] for start in range(0, len(texts), _CHUNK)]
    text_CE = torch.cat([live.text_features(live.model.ids_of(chunk).to(device)).cpu() for chunk in chunks])
    return StoredTeacher(image_VNE, text_CE, captions, live.logit_scale)
