"""Read each model of a run on each device: its export, its checkpoint and its measurements."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toolchain.errors import ArtifactError
from toolchain.stage import MANIFEST, REFERENCE_KIND

Document = Mapping[str, Any]

OUTDATED = ("measured before it was exported again", "measured before it was trained again")
"""Why a measurement is outdated."""


@dataclass(frozen=True)
class Measured:
    """A model on a device, as described by the files of its run; a missing document is empty."""

    run: Path

    manifest: Path
    """The manifest of the exported model, or of the measurement for a checkpoint in PyTorch."""

    summary: Document
    """The summary in that manifest."""

    folder: Path | None
    """measured/MODEL/DEVICE; None if the model was not measured."""

    parity: Document
    evaluation: Document
    profile: Document

    checkpoint: Document
    """The summary of the checkpoint that the model was exported from, quantized or float."""

    outdated: str | None
    """Reason why the measurement is outdated; None if it is of the current model."""

    @property
    def image(self) -> Document:
        """Return the latency of the image tower."""
        return self.profile.get("image") or {}

    @property
    def text(self) -> Document:
        """Return the latency of the text tower."""
        return self.profile.get("text") or {}

    @property
    def sets(self) -> Mapping[str, Document]:
        """Return the scores of every evaluation set."""
        return self.evaluation.get("sets") or {}

    @property
    def scores(self) -> Document:
        """Return the scores of the headline set."""
        return self.sets.get(self.evaluation.get("headline") or "") or {}

    @property
    def status(self) -> str:
        """Return `ok`, or the reason why numbers are missing or outdated."""
        if self.outdated is not None:
            return self.outdated
        if self.folder is None:
            return "not measured"
        found = {"parity.json": self.parity, "evaluation.json": self.evaluation, "profile.json": self.profile}
        missing = [name for name, content in found.items() if not content]
        return f"no {', '.join(missing)}" if missing else "ok"


def measured_models(run: Path) -> list[Measured]:
    """Return every exported model of a run on every device it was measured on, then every checkpoint measured in
    PyTorch.  A model that was not measured is returned once.

    Raises: ArtifactError if nothing was exported, or for a file with invalid content.
    """
    manifests = sorted(run.glob(f"exported/[!.]*/{MANIFEST}"))
    if not manifests:
        raise ArtifactError(
            f"{run}: no exported/*/manifest.json, so there is nothing to report. Export a model first:\n"
            f"  clipkd export {run} --onnx --precision fp32"
        )
    return [found for path in manifests for found in _list_exported(run, path)] + list(_references(run))


def list_manifests(run: Path) -> list[Path]:
    """Return the manifest of every complete stage that a report reads: checkpoints, exported models, measurements."""
    patterns = (f"[!.]*/{MANIFEST}", f"exported/[!.]*/{MANIFEST}", f"measured/*/[!.]*/{MANIFEST}")
    return [path for pattern in patterns for path in sorted(run.glob(pattern))]


def read_json(path: Path) -> dict[str, Any]:
    """Return a JSON object; NaN and infinities, which JSON does not allow, are read as null.

    Raises: ArtifactError if the file is not JSON, or not an object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"), parse_constant=lambda _: None)
    except ValueError as error:
        is_made = path.with_name(MANIFEST).is_file()
        advice = f". Remove {path.parent} and run the command that made it again" if is_made else ""
        raise ArtifactError(f"{path}: not JSON: {error}{advice}") from error
    if not isinstance(content, dict):
        raise ArtifactError(f"{path}: expected a JSON object, got {type(content).__name__}")
    return content


def machine_name(machine: Any) -> str | None:
    """Return a machine's name without load and temperature, which differ between measurements."""
    if not isinstance(machine, dict):
        return None if machine is None else str(machine)
    if machine.get("name"):
        return str(machine["name"])
    parts = [str(machine["cpu"])] if machine.get("cpu") else []
    if machine.get("cores"):
        parts.append(f"{machine['cores']} cores")
    return ", ".join(parts) or None


def _list_exported(run: Path, manifest: Path) -> Iterator[Measured]:
    """Yield an exported model on every device that it was measured on."""
    content = read_json(manifest)
    measured = run / "measured" / manifest.parent.name
    devices = sorted(path for path in measured.glob("*") if path.is_dir() and not path.name.startswith("."))
    for device in devices or (None,):
        outdated = device is not None and _is_of_another(device, "model", content.get("digest"))
        reason = OUTDATED[0] if outdated else None
        yield _read_measured(run, manifest, content.get("summary", {}), device, reason)


def _references(run: Path) -> Iterator[Measured]:
    """Yield every checkpoint that was measured in PyTorch."""
    for manifest in sorted(run.glob(f"measured/*/[!.]*/{MANIFEST}")):
        content = read_json(manifest)
        if content.get("kind") == REFERENCE_KIND:
            summary = content.get("summary", {})
            checkpoint = run / str(summary.get("role")) / MANIFEST
            digest = read_json(checkpoint).get("digest") if checkpoint.exists() else None
            outdated = _is_of_another(manifest.parent, "checkpoint", digest)
            reason = OUTDATED[1] if outdated else None
            yield _read_measured(run, manifest, summary, manifest.parent, reason)


def _read_measured(run: Path, manifest: Path, summary: Document, folder: Path | None, outdated: str | None) -> Measured:
    parity, evaluation, profile = (
        read_json(folder / name) if folder is not None and (folder / name).exists() else {}
        for name in ("parity.json", "evaluation.json", "profile.json")
    )
    checkpoint = _checkpoint_summary(run, summary.get("role"), summary.get("precision"))
    return Measured(run, manifest, summary, folder, parity, evaluation, profile, checkpoint, outdated)


def _checkpoint_summary(run: Path, role: str | None, precision: str | None) -> Document:
    """Return the summary of the checkpoint a model was exported from; int8, int8-fp16 and int8-bf16 share one."""
    quantized = f"{role}-{'int8' if precision and precision.startswith('int8') else precision}"
    for stage in (quantized, f"{role}"):
        manifest = run / stage / MANIFEST
        if manifest.exists():
            return read_json(manifest).get("summary") or {}
    return {}


def _is_of_another(measured: Path, what: str, digest: str | None) -> bool:
    """Return True if a measurement is known to be of an earlier model or checkpoint."""
    manifest = measured / MANIFEST
    recorded = (read_json(manifest).get("inputs") or {}).get(what) if manifest.exists() else None
    return recorded is not None and digest is not None and recorded != digest
