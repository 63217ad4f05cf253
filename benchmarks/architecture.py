"""Draw docs/architecture.png and write the import order into docs/architecture.md.

    python benchmarks/architecture.py

The order is the one that tests/test_architecture.py enforces; what each entry is for is the first sentence of its
docstring.  Arrows of the picture are values that flow, named as the code names them, and not imports.
"""

import ast
import re
import sys
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

ROOT = Path(__file__).resolve().parent.parent
PAGE, PICTURE = ROOT / "docs" / "architecture.md", ROOT / "docs" / "architecture.png"
BEGIN, END = "<!-- import order: written by benchmarks/architecture.py -->", "<!-- end of import order -->"
INK, QUIET, ARROW = "#1a1d21", "#5c636b", "#b34700"
LANES = {  # name: (bottom, top, colour)
    "toolchain/: the training machine": (2.35, 5.05, "#f3f6fb"),
    "export/: what leaves it": (-0.65, 2.05, "#f4f8f2"),
}
BOXES = {  # package: (x, y), in what is drawn as a grid of about 2 by 1
    "recipe": (0.0, 3.7),
    "data": (2.1, 4.4),
    "models": (2.1, 3.0),
    "distillation": (4.2, 3.7),
    "quantization": (6.3, 3.7),
    "evaluation": (8.4, 3.7),
    "report": (10.5, 3.7),
    "students": (2.1, 1.4),
    "graphs": (5.25, 1.4),
    "proof": (7.35, 1.4),
    "profiling": (9.45, 1.4),
    "runtime": (7.35, 0.0),
    "devices": (9.45, 0.0),
    "device_programs": (11.55, 0.0),
}
FLOWS = [  # from, to, the value
    ("recipe", "data", "DataSpec"),
    ("recipe", "models", "ModelSpec"),
    ("data", "distillation", "TrainingData"),
    ("models", "distillation", "ClipModel"),
    ("distillation", "quantization", "checkpoint"),
    ("distillation", "graphs", "checkpoint"),
    ("quantization", "graphs", "int8\ncheckpoint"),
    ("graphs", "proof", "exported\nmodel"),
    ("runtime", "proof", "Encoders"),
    ("runtime", "evaluation", "Encoders"),
    ("proof", "profiling", "parity.json"),
    ("devices", "profiling", "runner's\ndocument"),
    ("device_programs", "devices", "programs"),
    ("evaluation", "report", "evaluation.json"),
    ("profiling", "report", "profile.json"),
    ("models", "students", "untrained\nClipModel"),
]
WIDTH, HEIGHT = 1.5, 0.56


def main() -> None:
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    from test_architecture import IMPORT_ORDER

    draw().savefig(PICTURE, dpi=110, metadata={"Software": None})
    before, rest = PAGE.read_text(encoding="utf-8").split(BEGIN)
    _, after = rest.split(END)
    rows = [f"| {number} | `{name}` | {purpose(name)} |" for number, name in enumerate(IMPORT_ORDER, 1)]
    table = ["| | module or package | what it is for |", "|---|---|---|", *rows]
    PAGE.write_text("\n".join([before + BEGIN, "", *table, "", END + after]), encoding="utf-8")


def purpose(name: str) -> str:
    """Return the first sentence of the docstring of a module or package."""
    path = ROOT / Path(*name.split("."))
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    docstring = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
    return re.split(r"(?<=\.)\s", docstring.replace("\n", " "), maxsplit=1)[0].replace("|", "\\|")


def draw() -> Figure:
    figure = Figure(figsize=(13.2, 6.6), facecolor="white", layout="constrained")
    axes = figure.add_subplot()
    axes.set(xlim=(-1.1, 12.65), ylim=(-0.75, 5.15))
    axes.axis("off")
    for title, (bottom, top, colour) in LANES.items():
        style = "round,pad=0,rounding_size=0.12"
        axes.add_patch(FancyBboxPatch((-1.0, bottom), 13.5, top - bottom, boxstyle=style, fc=colour, ec="none"))
        axes.text(-0.85, top - 0.12, title, va="top", color=QUIET, fontsize=11)
        axes.text(12.35, top - 0.12, "pipeline/ makes each a stage", va="top", ha="right", color=QUIET, fontsize=11)
    for name, (x, y) in BOXES.items():
        corner, style = (x - WIDTH / 2, y - HEIGHT / 2), "round,pad=0,rounding_size=0.08"
        axes.add_patch(FancyBboxPatch(corner, WIDTH, HEIGHT, boxstyle=style, fc="white", ec=INK, lw=1.1, zorder=3))
        axes.text(x, y, name, ha="center", va="center", color=INK, fontsize=10.5, zorder=4)
    for start, end, value in FLOWS:
        draw_flow(axes, BOXES[start], BOXES[end], value)
    return figure


def draw_flow(axes: Axes, start: tuple[float, float], end: tuple[float, float], value: str) -> None:
    """Draw an arrow from the border of one box to that of another, its value beside its middle."""
    dx, dy = end[0] - start[0], end[1] - start[1]
    reach = min((WIDTH / 2 + 0.04) / abs(dx) if dx else 1, (HEIGHT / 2 + 0.04) / abs(dy) if dy else 1)
    tail, head = (start[0] + reach * dx, start[1] + reach * dy), (end[0] - reach * dx, end[1] - reach * dy)
    axes.annotate(
        "", head, tail, arrowprops={"arrowstyle": "-|>", "color": ARROW, "lw": 1.2, "shrinkA": 0, "shrinkB": 0}
    )
    middle = ((tail[0] + head[0]) / 2, (tail[1] + head[1]) / 2)
    box = {"fc": "white", "ec": "none", "alpha": 0.85, "pad": 0.8}
    axes.text(*middle, value, ha="center", va="center", color=ARROW, fontsize=7.6, bbox=box, zorder=5)


if __name__ == "__main__":
    main()
