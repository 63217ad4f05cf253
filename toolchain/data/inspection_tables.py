"""Make the tables that `clipkd data inspect` prints: counts, distributions of sizes, and corrupt samples."""

from typing import Any

from toolchain.data.file_content import is_unread_suffix
from toolchain.text_table import TextTable


def inspection_tables(document: dict[str, Any]) -> list[TextTable]:
    """Return a table of counts; add tables of distributions, corrupt samples and other files if there are any."""
    tables = [_counts(document)]
    if document["good"]:
        tables.append(_distributions(document))
    if document["broken"]:
        tables.append(_corrupt_samples(document))
    if document["passed_over"]:
        tables.append(_files_passed_over(document["passed_over"]))
    return tables


def _counts(document: dict[str, Any]) -> TextTable:
    rows = [("samples", document["samples"])]
    if document["sampled"] is not None:
        rows.append(("  chosen at random and read; all counts below are of these", document["sampled"]))
    rows.append(("good", document["good"]))
    rows += [(f"  {kind}", number) for kind, number in document["formats"].items()]
    rows.append(("captions", document["captions"]))
    if document["captions_cut"] is not None:
        rows.append(("  longer than CLIP reads (77 tokens)", document["captions_cut"]))
    rows += [
        ("duplicate images", document["same_pictures"]["count"]),
        ("duplicate captions", document["same_captions"]["count"]),
        ("bytes of images", document["picture_bytes"].get("sum", 0)),
    ]
    return TextTable(["in the source", ""], [[name, f"{number:,}"] for name, number in rows], right=[""])


def _distributions(document: dict[str, Any]) -> TextTable:
    """Return the quantiles of image sizes, caption counts and caption lengths."""
    lengths = document["caption_length"]
    measured = {
        "width, px": document["width"],
        "height, px": document["height"],
        "bytes per image": {share: value for share, value in document["picture_bytes"].items() if share != "sum"},
        "captions per sample": document["captions_per_sample"],
        f"caption, {lengths['unit']}": {share: value for share, value in lengths.items() if share != "unit"},
    }
    shares = [f"{100 * float(share):g} %" for share in document["width"]]
    rows = [[name, *(f"{value:,}" for value in found.values())] for name, found in measured.items()]
    return TextTable(["percentile", *shares], rows, right=shares)


def _corrupt_samples(document: dict[str, Any]) -> TextTable:
    rows = [
        [reason, f"{damage['count']:,}", "\n".join(damage["examples"])] for reason, damage in document["broken"].items()
    ]
    return TextTable(["corrupt", "samples", "first examples"], rows, right=["samples"])


def _files_passed_over(counts: dict[str, int]) -> TextTable:
    """Return the number of files that are no samples, by suffix."""
    unread = "images in a format that is not read; convert them, for example to JPEG"
    rows = [[suffix, f"{number:,}", unread if is_unread_suffix(suffix) else ""] for suffix, number in counts.items()]
    return TextTable(["passed over, no samples", "files", ""], rows, right=["files"])
