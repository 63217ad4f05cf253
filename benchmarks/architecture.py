"""Draw docs/architecture.png and write the import order into docs/architecture.md.

    python benchmarks/architecture.py

The order is the one that tests/test_architecture.py enforces.  The purpose of each entry is the first sentence of its
docstring.  The arrows of the diagram are the values that flow, under their names in the code; they are not imports.
"""

import ast
import re
import sys
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch
from pages import replace_section

ROOT = Path(__file__).resolve().parent.parent
PAGE, DIAGRAM = ROOT / "docs" / "architecture.md", ROOT / "docs" / "architecture.png"
BEGIN, END = "<!-- import order: written by benchmarks/architecture.py -->", "<!-- end of import order -->"
INK, QUIET, ARROW = "#1a1d21", "#5c636b", "#b34700"
LANES = {  # name: (bottom, top, colour)
    "toolchain/: training and reporting": (2.55, 5.55, "#f3f6fb"),
    "export/: exporting and measuring": (-0.75, 2.25, "#f4f8f2"),
}
BOXES = {  # package: centre of its box
    "recipe": (0.0, 4.0),
    "data": (2.6, 4.7),
    "models": (2.6, 3.3),
    "distillation": (5.0, 4.0),
    "quantization": (7.4, 4.0),
    "evaluation": (9.5, 4.0),
    "report": (12.9, 4.0),
    "students": (2.6, 1.5),
    "graphs": (6.2, 1.5),
    "runtime": (9.5, 1.5),
    "proof": (11.8, 1.5),
    "profiling": (14.15, 1.5),
    "devices": (14.15, -0.1),
    "device_programs": (11.3, -0.1),
}
FLOWS = [  # from, to, name of the value, offset of the name from the middle of the arrow
    ("recipe", "data", "DataSpec", (-0.35, 0.2)),
    ("recipe", "models", "ModelSpec", (-0.35, -0.2)),
    ("data", "distillation", "TrainingData", (0.45, 0.2)),
    ("models", "distillation", "ClipModel", (0.4, -0.2)),
    ("distillation", "quantization", "checkpoint", (0, 0.16)),
    ("distillation", "graphs", "checkpoint", (-0.6, 0)),
    ("quantization", "graphs", "int8 checkpoint", (0.85, 0)),
    ("graphs", "runtime", "exported model", (0, 0.16)),
    ("runtime", "proof", "Encoders", (0, 0.16)),
    ("runtime", "evaluation", "Encoders", (0.5, 0)),
    ("proof", "report", "parity.json", (-0.75, 0.2)),
    ("devices", "profiling", "runner's\ndocument", (-0.55, 0)),
    ("device_programs", "devices", "programs", (0, 0.16)),
    ("evaluation", "report", "evaluation.json", (0, 0.16)),
    ("profiling", "report", "profile.json", (0.6, 0.3)),
    ("models", "students", "untrained\nClipModel", (0.6, 0)),
]
WIDTH, HEIGHT = 1.6, 0.56


def main() -> None:
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    from test_architecture import IMPORT_ORDER

    draw().savefig(DIAGRAM, dpi=110, metadata={"Software": None})
    rows = [f"| {number} | `{name}` | {purpose(name)} |" for number, name in enumerate(IMPORT_ORDER, 1)]
    table = ["| | module or package | what it is for |", "|---|---|---|", *rows]
    replace_section(PAGE, BEGIN, END, "\n".join(["", *table, ""]))


def purpose(name: str) -> str:
    """Return the first sentence of the docstring of a module or package."""
    path = ROOT / Path(*name.split("."))
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    docstring = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
    return re.split(r"(?<=\.)\s", docstring.replace("\n", " "), maxsplit=1)[0].replace("|", "\\|")


def draw() -> Figure:
    figure = Figure(figsize=(13.6, 5.6), facecolor="white", layout="constrained")
    axes = figure.add_subplot()
    axes.set(xlim=(-1.1, 15.4), ylim=(-0.85, 5.65))
    axes.axis("off")
    for title, (bottom, top, colour) in LANES.items():
        style = "round,pad=0,rounding_size=0.12"
        axes.add_patch(FancyBboxPatch((-1.0, bottom), 16.3, top - bottom, boxstyle=style, fc=colour, ec="none"))
        axes.text(-0.85, top - 0.12, title, va="top", color=QUIET, fontsize=11)
    for name, (x, y) in BOXES.items():
        corner, style = (x - WIDTH / 2, y - HEIGHT / 2), "round,pad=0,rounding_size=0.08"
        axes.add_patch(FancyBboxPatch(corner, WIDTH, HEIGHT, boxstyle=style, fc="white", ec=INK, lw=1.1, zorder=3))
        axes.text(x, y, name, ha="center", va="center", color=INK, fontsize=10.5, zorder=4)
    for start, end, value, beside in FLOWS:
        draw_flow(axes, BOXES[start], BOXES[end])
        (x0, y0), (x1, y1) = BOXES[start], BOXES[end]
        middle = ((x0 + x1) / 2 + beside[0], (y0 + y1) / 2 + beside[1])
        axes.text(*middle, value, ha="center", va="center", color=ARROW, fontsize=8, zorder=5)
    return figure


def draw_flow(axes: Axes, start: tuple[float, float], end: tuple[float, float]) -> None:
    """Draw an arrow from the border of one box to the border of another."""
    dx, dy = end[0] - start[0], end[1] - start[1]
    across = (WIDTH / 2 + 0.05) / abs(dx) if dx else 1
    along = (HEIGHT / 2 + 0.05) / abs(dy) if dy else 1
    reach = min(across, along)
    tail, head = (start[0] + reach * dx, start[1] + reach * dy), (end[0] - reach * dx, end[1] - reach * dy)
    style = {"arrowstyle": "-|>", "color": ARROW, "lw": 1.2, "shrinkA": 0, "shrinkB": 0}
    axes.annotate("", head, tail, arrowprops=style)


if __name__ == "__main__":
    main()
