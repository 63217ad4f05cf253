"""Make the table that `clipkd evaluate` prints."""

from toolchain.data.bad_samples import describe_passed_over
from toolchain.evaluation.documents import ModelComparison
from toolchain.text_table import Note, TextTable

HEADERS = ["model", "set", "n", "top-1 %", "top-5 %", "text to image R@1 %", "drop from the first, pp", "p"]


def evaluation_table(document: ModelComparison) -> TextTable:
    """Return a row for each model and set; each model is compared with the first."""
    rows = []
    for scored in document["models"]:
        for name, scores in scored["sets"].items():
            recalls = [value for key, value in scores.get("retrieval", {}).items() if key.endswith("_to_image_r1")]
            lost = scored.get("against_first", {}).get(name)
            rows.append(
                [
                    scored["model"],
                    name,
                    f"{scores['n']:,}",
                    f"{100 * scores['top1']:.1f} [{100 * scores['top1_low']:.1f}, {100 * scores['top1_high']:.1f}]",
                    f"{100 * scores['top5']:.1f}",
                    f"{100 * recalls[0]:.1f}" if recalls else "-",
                    f"{100 * lost['drop']:.1f} [{100 * lost['low']:.1f}, {100 * lost['high']:.1f}]" if lost else "-",
                    f"{lost['p']:.2g}" if lost else "-",
                ]
            )
    return TextTable(HEADERS, rows)


def unreadable_images(document: ModelComparison) -> list[Note]:
    """Return a note for each set with unreadable images or other files; they are the same for every model."""
    sets = document["models"][0]["sets"]
    others = [
        Note(f"{name}: {describe_passed_over(scores['passed_over'])}")
        for name, scores in sets.items()
        if "passed_over" in scores
    ]
    return others + [
        Note(
            f"{name}: {scores['unreadable']['n']} unreadable image(s) counted as wrong: "
            + ", ".join(scores["unreadable"]["first"])
        )
        for name, scores in sets.items()
        if "unreadable" in scores
    ]
