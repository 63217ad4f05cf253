"""Collect the rows of a report from the measurements in runs."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from toolchain.errors import ArtifactError
from toolchain.precisions import PRECISIONS
from toolchain.report.pareto import front_groups, mark_front
from toolchain.report.row import ROLES, SCHEMA, Row, empty_row, read_json, runtime_name
from toolchain.significance import paired_drop
from toolchain.stage import MANIFEST, REFERENCE


def collect(runs: Sequence[Path], external: Sequence[Row] = ()) -> dict[str, Any]:
    """The content of report.json: what `exported/`, `measured/` and the training stages' manifests of runs say, and
    rows measured elsewhere (external_rows.py).

    A checkpoint that was measured in PyTorch has a row too, whose `pytorch` says how it was run: a reference.

    Raises: ArtifactError if nothing was exported, or for a file that is not what its name says.
    """
    rows = [row for run in runs for row in _rows_of(run)] + [empty_row() | row for row in external]
    rows.sort(key=_reading_order)
    for row, name in zip(rows, _unique_names(rows), strict=True):
        row["name"] = row["name"] or name
    right = {id(row): _right_answers(row) for row in rows}
    for row in rows:
        for against, role, precision in (("teacher", "teacher", None), ("fp32", row["role"], "fp32")):
            reference = _reference(rows, row, role=role, precision=precision)
            row |= _drop(row, reference, right, against)
    for group in front_groups(rows).values():
        mark_front(group)
    return {"schema": SCHEMA, "rows": rows}


def _rows_of(run: Path) -> list[Row]:
    manifests = sorted(path for path in run.glob("exported/*/manifest.json") if not path.parent.name.startswith("."))
    if not manifests:
        raise ArtifactError(
            f"{run}: no exported/*/manifest.json, nothing to report. Export a model first:\n"
            f"  clipkd export {run} --onnx --precision fp32"
        )
    rows: list[Row] = []
    for manifest in manifests:
        content = read_json(manifest)
        measured = run / "measured" / manifest.parent.name
        devices = sorted(path for path in measured.glob("*") if path.is_dir() and not path.name.startswith("."))
        for device in devices or (None,):
            rows.append(_row(run, manifest, content.get("summary", {}), device))
            if device is not None and _is_of_another(device, "model", content.get("digest")):
                rows[-1]["status"] = "measured before it was exported again"
    for manifest in sorted(run.glob("measured/*/[!.]*/manifest.json")):
        content = read_json(manifest)
        if content.get("kind") == REFERENCE:
            rows.append(_row(run, manifest, content.get("summary", {}), manifest.parent))
            checkpoint = run / str(rows[-1]["role"]) / MANIFEST
            digest = read_json(checkpoint).get("digest") if checkpoint.exists() else None
            if _is_of_another(manifest.parent, "checkpoint", digest):
                rows[-1]["status"] = "measured before it was trained again"
    return rows


def _is_of_another(measured: Path, what: str, digest: str | None) -> bool:
    """Whether a measurement is known to be of something else than what is there now."""
    manifest = measured / MANIFEST
    recorded = (read_json(manifest).get("inputs") or {}).get(what) if manifest.exists() else None
    return recorded is not None and digest is not None and recorded != digest


# --- rows ------------------------------------------------------------------------------------------------------------


def _row(run: Path, manifest: Path, summary: Row, measured: Path | None) -> Row:
    parity, evaluation, profile = (
        read_json(measured / name) if measured is not None and (measured / name).exists() else {}
        for name in ("parity.json", "evaluation.json", "profile.json")
    )
    role, precision = summary.get("role"), summary.get("precision")
    image, text = profile.get("image") or {}, profile.get("text") or {}
    sets = evaluation.get("sets") or {}
    headline = evaluation.get("headline")
    scores = sets.get(headline) or {}
    return empty_row() | {
        "run": run.as_posix(),
        "model": manifest.relative_to(run).parts[1],
        "role": role,
        "runtime": summary.get("runtime"),
        "pytorch": summary.get("pytorch"),
        "precision": precision,
        "device": profile.get("device") or (measured.name if measured is not None else None),
        "machine": machine_name(profile.get("machine")),
        "batch": profile.get("batch"),
        "fixed_batch": summary.get("batch"),
        "threads": profile.get("threads"),
        **{key: image.get(key) for key in ("p50_ms", "p50_low_ms", "p50_high_ms", "p90_ms", "p99_ms")},
        "p50_by_process_ms": image.get("p50_by_process_ms") or [],
        "text_p50_ms": text.get("p50_ms"),
        "e2e_p50_ms": profile.get("e2e_p50_ms"),
        "images_per_s": profile.get("images_per_s"),
        "headline": headline,
        **{key: scores.get(key) for key in ("top1", "top1_low", "top1_high")},
        "num_eval_images": scores.get("n"),
        "accuracy": {
            name: {
                "top1": values.get("top1"),
                "low": values.get("top1_low"),
                "high": values.get("top1_high"),
                "n": values.get("n"),
                "top5": values.get("top5"),
            }
            for name, values in sets.items()
        },
        "retrieval": {name: values.get("retrieval") or {} for name, values in sets.items()},
        "min_cosine": {tower: (parity.get(tower) or {}).get("min_cosine") for tower in ("image", "text")},
        "params_image": summary.get("params_image"),
        "params_text": summary.get("params_text"),
        "size_bytes": profile.get("size_bytes") or summary.get("size_bytes"),
        "peak_memory_bytes": profile.get("peak_memory_bytes"),
        "train_s": _train_s(run, role, precision),
        "reverted": _reverted(run, role, precision),
        "grade": profile.get("grade"),
        "flags": list(profile.get("flags") or []),
        "status": _status(measured, parity, evaluation, profile),
        "source": manifest.relative_to(run).as_posix(),
    }


def _status(measured: Path | None, parity: Row, evaluation: Row, profile: Row) -> str:
    """`ok`, or why the row has gaps."""
    if measured is None:
        return "not measured"
    found = {"parity.json": parity, "evaluation.json": evaluation, "profile.json": profile}
    missing = [name for name, content in found.items() if not content]
    return f"no {', '.join(missing)}" if missing else "ok"


def _train_s(run: Path, role: str | None, precision: str | None) -> float | None:
    """The training time of the checkpoint a model was exported from: fine-tuned in its precision, or as distilled."""
    for stage in (_quantized_stage(role, precision), f"{role}"):
        manifest = run / stage / "manifest.json"
        if manifest.exists():
            train_s: float | None = (read_json(manifest).get("summary") or {}).get("train_s")
            return train_s
    return None


def _reverted(run: Path, role: str | None, precision: str | None) -> int | None:
    """How many layers of a quantized model went back to float for its accuracy; None where none was to."""
    manifest = run / _quantized_stage(role, precision) / "manifest.json"
    summary = read_json(manifest).get("summary") or {} if manifest.exists() else {}
    found = summary.get("sensitivity")
    return None if found is None else len(found["reverted"])


def _quantized_stage(role: str | None, precision: str | None) -> str:
    """The checkpoint of int8, int8-fp16 and int8-bf16 is one and the same."""
    return f"{role}-{'int8' if precision and precision.startswith('int8') else precision}"


def machine_name(machine: Any) -> str | None:
    """A machine in words that stay the same from one measurement to the next (load and temperature do not)."""
    if not isinstance(machine, dict):
        return None if machine is None else str(machine)
    if machine.get("name"):
        return str(machine["name"])
    parts = [str(machine["cpu"])] if machine.get("cpu") else []
    if machine.get("cores"):
        parts.append(f"{machine['cores']} cores")
    return ", ".join(parts) or None


def _reading_order(row: Row) -> tuple[Any, ...]:
    def place(value: Any, order: tuple[str, ...]) -> int:
        return order.index(value) if value in order else len(order)

    where = (row["device"] is None, row["device"] or "", row["machine"] or "")
    what = (
        place(row["role"], ROLES),
        place(row["precision"], tuple(PRECISIONS)),
        row["runtime"] or "",
        row["model"] or "",
    )
    return *where, *what, row["run"] or "", row["name"] or ""


def _unique_names(rows: Sequence[Row]) -> list[str]:
    """Role and precision, and of those that share them as much more as it takes to tell them apart."""
    details = {
        "run": [Path(row["run"]).name if row["run"] else None for row in rows],
        "runtime": [runtime_name(row) for row in rows],
        **{key: [row[key] for row in rows] for key in ("device", "machine", "model")},
    }
    names = [row["name"] or (f"{row['role']} {row['precision']}" if row["role"] else row["model"]) for row in rows]
    for values in details.values():
        alike: dict[str, set[Any]] = {}
        for name, value in zip(names, values, strict=True):
            alike.setdefault(name, set()).add(value)
        names = [
            f"{name} {value or ''}".strip() if len(alike[name]) > 1 else name
            for name, value in zip(names, values, strict=True)
        ]
    return names


def _reference(rows: Sequence[Row], row: Row, *, role: str | None, precision: str | None) -> Row | None:
    """The row of the same run to compare with on the same images: fp32, then the same runtime, then device."""
    candidates = [
        other
        for other in rows
        if other["run"] is not None
        and other["run"] == row["run"]
        and other["role"] == role
        and precision in (None, other["precision"])
        and other["top1"] is not None
        and (other["headline"], other["num_eval_images"]) == (row["headline"], row["num_eval_images"])
    ]

    def closeness(other: Row) -> tuple[bool, ...]:
        same = ("runtime", "device", "machine", "batch")
        return other["precision"] == "fp32", *(other[key] == row[key] for key in same)

    return max(candidates, key=closeness, default=None)


def _right_answers(row: Row) -> NDArray[np.bool_] | None:
    """[N] which images of the headline set a row's model got right; None where that was not kept."""
    if row["run"] is None or row["headline"] is None:
        return None
    samples = Path(row["run"]) / "measured" / row["model"] / str(row["device"]) / "samples.npz"
    if not samples.exists():
        return None
    try:
        with np.load(samples, allow_pickle=False) as saved:
            rank_N = saved.get(f"{row['headline']}_rank")
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{samples}: cannot be read: {error}. Delete its folder and measure again") from None
    return None if rank_N is None or len(rank_N) != row["num_eval_images"] else rank_N < 1


def _drop(row: Row, reference: Row | None, right: dict[int, NDArray[np.bool_] | None], against: str) -> Row:
    """Fields of what top-1 loses to a reference on the same images, where the answers were kept with a paired test."""
    key = f"top1_drop_vs_{against}"
    if reference is None or row["top1"] is None:
        return {}
    first, second = right[id(reference)], right[id(row)]
    if first is None or second is None or row is reference:
        return {key: float(reference["top1"] - row["top1"])}
    found = paired_drop(first, second)
    return {key: found.drop, f"{key}_low": found.low, f"{key}_high": found.high, f"{key}_p": found.p}
