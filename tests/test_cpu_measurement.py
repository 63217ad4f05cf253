"""The measurement of a model on this machine's CPU: which parts of an earlier one still hold."""

from pathlib import Path

import pytest

from export.pipeline.cpu_measurement import Earlier, Scoring, Subject
from toolchain import stage as stages
from toolchain.recipe.evaluate import EvaluateSpec
from toolchain.recipe.export import ProfileSpec
from toolchain.stage import RESOLVED, StageSpec, run_stage

TIMING = ProfileSpec(processes=3, seconds=3.0)


def make_subject(run: Path) -> Subject:
    run.mkdir(exist_ok=True)
    (run / "recipe.yaml").write_text(f"# {RESOLVED}\n")
    return Subject(run, run_stage(StageSpec(run / "exported" / "student", "export", 1), lambda folder: {}))


def test_a_measurement_that_is_being_replaced_still_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`clipkd evaluate` adds accuracy to a latency; killed between the two renames, it must not lose the latency."""
    subject, scored = make_subject(tmp_path), Scoring(EvaluateSpec(), "abc")
    run_stage(subject.specify_parts(None, TIMING), lambda folder: {"p50_ms": 1.0})
    real, left = Path.rename, 1

    def killed(path: Path, target: Path) -> Path:
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt
        return real(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", killed)
        with pytest.raises(KeyboardInterrupt):
            run_stage(make_subject(tmp_path).specify_parts(scored, None), lambda folder: {"p50_ms": 1.0})
    assert not subject.path.exists()
    again = make_subject(tmp_path)
    assert again.earlier.profile == {"processes": 3, "seconds": 3.0}
    assert (again.earlier.path / stages.MANIFEST).is_file(), "its files can be copied"
    made = run_stage(again.specify_parts(scored, None), lambda folder: {})
    assert made.cached, "the work was complete before the kill"
    assert made.manifest["fields"]["profile"] == {"processes": 3, "seconds": 3.0}


@pytest.mark.parametrize(
    ("processes", "seconds", "longer"),
    [(3, 3.0, False), (3, 1.0, True), (1, 1.0, True), (1, 2.0, False), (5, 5.0, False)],
)
def test_a_longer_measurement_has_no_fewer_processes_and_seconds_in_each(
    tmp_path: Path, processes: int, seconds: float, longer: bool
) -> None:
    earlier = Earlier(tmp_path, profile={"processes": 3, "seconds": 3.0})
    assert earlier.is_longer(ProfileSpec(processes=processes, seconds=seconds)) is longer
