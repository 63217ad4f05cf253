"""Write the tables of the page as HTML, with the attributes that the page's script filters rows by."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

FILTERS = ("device", "runtime", "precision", "grade")


def filter_value(row: Mapping[str, Any], field: str) -> str:
    """Return the value of a field as shown in the page's filters."""
    return "unknown" if row[field] is None else str(row[field])


def filter_data(row: Mapping[str, Any]) -> str:
    """Return the attributes that the script uses to show or hide a row."""
    return "".join(f' data-{field}="{escape(filter_value(row, field))}"' for field in FILTERS)


def leading_number(text: str) -> float | None:
    """Return the number at the start of a cell, used for sorting; None if there is none."""
    try:
        return float(text.split(" ")[0].replace(",", ""))
    except ValueError:
        return None


def sortable_table(
    headers: Sequence[str],
    cells: Sequence[Sequence[str]],
    keys: Sequence[Sequence[float | str | None]],
    numeric: Sequence[bool],
    marks: Sequence[str],
    name: str,
) -> str:
    """Return a table that the script can sort by `keys`; a wide table scrolls while its first column stays visible.

    `marks` are HTML attributes of its rows.
    """
    head = "".join(
        f"<th scope=col{' class=number' if number else ''}><button type=button>{escape(header)}</button></th>"
        for header, number in zip(headers, numeric, strict=True)
    )
    body = []
    for row, row_keys, mark in zip(cells, keys, marks, strict=True):
        texts = [
            f'<{tag} data-key="{escape("" if key is None else str(key))}"{" class=number" if number else ""}>'
            f"{escape(text)}</{tag.split(' ')[0]}>"
            for tag, text, key, number in zip(
                ["th scope=row", *["td"] * (len(row) - 1)], row, row_keys, numeric, strict=True
            )
        ]
        body.append(f"<tr{mark}>{''.join(texts)}</tr>")
    table = f"<table class={name}><thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table>"
    return f"<div class=scroll tabindex=0 role=region aria-label={name}>{table}</div>"


def plain_table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table that cannot be sorted; without headers it is a table of facts."""
    head = "".join(f"<th scope=col>{escape(header)}</th>" for header in headers)
    body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    thead = f"<thead><tr>{head}</tr></thead>" if any(headers) else ""
    table = f"<table class='plain{'' if any(headers) else ' facts'}'>{thead}<tbody>{body}</tbody></table>"
    return f"<div class=scroll tabindex=0 role=region aria-label=Table>{table}</div>"
