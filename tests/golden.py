"""Values that CLIP-KD's released code computed (tests/data/clip_kd.npz), and how to compare with them."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

RTOL = 1e-10  # float64 on both sides: only the order of additions differs
ATOL = 1e-12  # of the largest element: what others add up to near 0 keeps its rounding
CASES = ("eq32", "diff32_48")
RAW_SCALE = float(np.log(1 / 0.07))
"""The reference's multiplier of ICL, cross-KD and AFD: it multiplies by the logarithm itself."""

INTENDED_SCALE = 1 / 0.07

CPU = torch.device("cpu")
_FILE = Path(__file__).parent / "data" / "clip_kd.npz"


def golden_values(prefix: str) -> dict[str, np.ndarray]:
    """What the file holds under `prefix.`, without it."""
    with np.load(_FILE) as saved:
        names = [name for name in saved.files if name.startswith(f"{prefix}.")]
        assert names, f"nothing under {prefix}"
        return {name.removeprefix(f"{prefix}."): saved[name] for name in names}


class Golden:
    """One case: float64 inputs on a device, of which `leaves` want gradients, and the recorded results."""

    def __init__(self, case: str, device: torch.device = CPU) -> None:
        self.values = golden_values(case)
        inputs = {name.removeprefix("in."): x for name, x in self.values.items() if name.startswith("in.")}
        self.teacher_image, self.teacher_text, self.teacher_scale = (
            torch.from_numpy(inputs.pop(name)).to(device) for name in ("t_img", "t_txt", "t_scale")
        )
        self.leaves = {name: torch.from_numpy(x.copy()).to(device).requires_grad_() for name, x in inputs.items()}
        self.batch, self.teacher_width = self.teacher_image.shape
        self.objectives = [name.removeprefix("loss.") for name in self.values if name.startswith("loss.")]

    @property
    def factors(self) -> dict[str, float]:
        """What the reference's value is multiplied by here: it takes the mean over the width, and in GD over B^2."""
        ones = dict.fromkeys(self.objectives, 1.0)
        return ones | {"fd": self.teacher_width, "gd": self.batch**2 * self.teacher_width}

    def check(self, name: str, loss: Tensor, leaves: dict[str, Tensor], *, intended: bool = False) -> None:
        """`loss` and its gradients are the recorded ones, and depend on what those depend on."""
        factor = self.factors[name]
        value_kind, gradient_kind = ("intended", "intended_grad") if intended else ("loss", "grad")
        assert loss.dtype == torch.float64
        np.testing.assert_allclose(loss.item(), factor * self.values[f"{value_kind}.{name}"], rtol=RTOL)
        prefix = f"{gradient_kind}.{name}."
        expected = {key.removeprefix(prefix): x for key, x in self.values.items() if key.startswith(prefix)}
        gradients = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True, retain_graph=True)
        found = {
            key: gradient.cpu().numpy() for key, gradient in zip(leaves, gradients, strict=True) if gradient is not None
        }
        if intended:  # recorded for the features alone
            assert expected.keys() == {"s_img_raw", "s_txt_raw"}
        else:  # the fusion layers' biases were not recorded
            assert expected.keys() == {key for key in found if not key.endswith("fusion_b")}
        for key, value in expected.items():
            value = factor * value
            np.testing.assert_allclose(found[key], value, RTOL, ATOL * np.abs(value).max(), err_msg=key)
