"""The tables that `clipkd data inspect` prints: what was counted, how sizes are distributed, and what is corrupt."""

from typing import Any

Rows = list[list[str]]


def counts(document: dict[str, Any]) -> Rows:
    """Return two columns: what was counted, and how many."""
    rows = [("samples", document["samples"])]
    if document["sampled"] is not None:
        rows.append(("  of these read, chosen by chance; what follows is of them", document["sampled"]))
    rows.append(("good", document["good"]))
    rows += [(f"  {kind}", number) for kind, number in document["formats"].items()]
    rows.append(("captions", document["captions"]))
    if document["captions_cut"] is not None:
        rows.append(("  longer than CLIP reads (77 tokens)", document["captions_cut"]))
    rows += [
        ("pictures that occurred before", document["same_pictures"]["count"]),
        ("captions that occurred before", document["same_captions"]["count"]),
        ("bytes of pictures", document["picture_bytes"].get("sum", 0)),
    ]
    return [[name, f"{number:,}"] for name, number in rows]


def distributions(document: dict[str, Any]) -> tuple[list[str], Rows]:
    """Return headers and rows: the quantiles of sizes, caption counts and caption lengths; no rows without a sample."""
    if not document["good"]:
        return [], []
    lengths = document["caption_length"]
    measured = {
        "width, px": document["width"],
        "height, px": document["height"],
        "bytes": {share: value for share, value in document["picture_bytes"].items() if share != "sum"},
        "captions a sample": document["captions_per_sample"],
        f"caption, {lengths['unit']}": {share: value for share, value in lengths.items() if share != "unit"},
    }
    shares = [f"{100 * float(share):g} %" for share in document["width"]]
    rows = [[name, *(f"{value:,}" for value in found.values())] for name, found in measured.items()]
    return ["share of all at most", *shares], rows


def corrupt_samples(document: dict[str, Any]) -> Rows:
    """Return a row for each reason: the reason, the number of samples, the first of them."""
    return [
        [reason, f"{damage['count']:,}", "\n".join(damage["examples"])] for reason, damage in document["broken"].items()
    ]
