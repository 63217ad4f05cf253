"""End a benchmark: compare each claim with its bound, print one JSON document and set the exit code."""

import json
import os
import platform
import sys
from typing import Any, NoReturn

from toolchain.provenance import machine, revision


def claim(what: str, value: float, unit: str, relation: str, bound: float) -> dict[str, Any]:
    """Return one claim with its outcome; `relation` is >=, <= or >, and a claim whose value is NaN does not hold."""
    holds = {">=": value >= bound, "<=": value <= bound, ">": value > bound}[relation]
    return {"claim": what, "value": round(value, 5), "unit": unit, "bound": f"{relation} {bound:g}", "holds": holds}


def finish(benchmark: str, claims: list[dict[str, Any]], **more: Any) -> NoReturn:
    """Print the document as the last line of stdout; exit with 5 if a claim does not hold."""
    document = {
        "benchmark": benchmark,
        "commit": revision(),
        "machine": machine() | {"kernel": platform.release(), "usable_cores": len(os.sched_getaffinity(0))},
        **more,
        "claims": claims,
    }
    print(json.dumps(document))
    sys.exit(0 if all(item["holds"] for item in claims) else 5)
