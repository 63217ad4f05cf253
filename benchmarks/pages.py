"""Replace what a benchmark wrote into a page."""

from pathlib import Path


def replace_section(page: Path, begin: str, end: str, content: str) -> None:
    """Replace the lines between two marks, each of which the page has once; the marks stay.

    Raises:
        ValueError: a mark is absent, or there more than once.
    """
    before, rest = page.read_text(encoding="utf-8").split(begin)
    _, after = rest.split(end)
    page.write_text(f"{before}{begin}\n{content}\n{end}{after}", encoding="utf-8")
