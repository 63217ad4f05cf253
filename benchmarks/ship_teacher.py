"""Write a trained glyphs teacher's weights, in float16, into recipes/glyphs_teacher: the teacher that clipkd includes.

python benchmarks/ship_teacher.py runs/glyphs_teacher/student
"""

import sys
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

WEIGHTS = "open_clip_model.safetensors"
SHIPPED = Path(__file__).resolve().parent.parent / "recipes" / "glyphs_teacher" / WEIGHTS


def main() -> None:
    save_file(halve(load_file(Path(sys.argv[1]) / WEIGHTS)), SHIPPED)
    SHIPPED.chmod(0o644)  # safetensors makes files private
    print(f"{SHIPPED}: {SHIPPED.stat().st_size / 1e6:.1f} MB")


def halve(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return weights in float16.

    Scalars keep their type: the logit scale, and the counters of batch norms, which are integers.
    """
    return {key: value.half() if value.is_floating_point() and value.ndim else value for key, value in state.items()}


if __name__ == "__main__":
    main()
